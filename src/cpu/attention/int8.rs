//! The algorithm over 8-bit K and V: both products in integers, exactly, between roundings of queries and weights to 16 bits.
//!
//! ```text
//! once:              q      ~ s · n      n of 16 bits, s for each head: max |q| / the largest integer
//! two blocks a step: scores = s · scale of the row · (n · K)            exact sums of 32 bits
//!                    weights as with f16
//!                    weights · scale of the row ~ s' · n'               s' for each head and step, likewise
//!                    out   += s' · (n' · V)                             exact sums of 32 bits
//! ```
//!
//! What the roundings cost: an element of the query is off by 2^-16 of the head's largest at most, a token's weighted value by 2^-16
//! of the largest of its step, under a hundredth of what keeping K and V in 8 bits has cost (`tests/host/attention.rs`).
//!
//! The cache keeps its elements in fours, as instructions take them (`memory::kv_cache`): four columns of a token in K, four tokens of a
//! column in V. A lane of scores is a token, one of the output a column, and no sum over lanes is left. One instruction multiplies fours of
//! bytes, one side with a sign and one without, and sums them; 16 bits come to it as two digits to the base of 256:
//!
//! ```text
//! query   n  = 256 · high + low, both in -128 .. 127;   K with an excess of 128:   n · K = n · (K + 128) - 128 · sum of n
//! weights n' = 256 · high + low, both in 0 .. 255;      V with its sign
//! ```
//!
//! A level without that instruction widens the elements and multiplies 16 bits.
//!
//! Memory is asked for ahead: the values of a step during its scores, keys of the next one during its sums of values, scales at once.
//!
//! Sums are exact, so their order is nobody's concern; nor are those on the way that do not fit 32 bits, where the last one does. Where K
//! is above 512, queries get fewer bits, so that it does.

#![expect(clippy::needless_range_loop)]

use std::ops::Range;

use half::f16;

use super::BLOCK_TOKENS;
use super::KEY_GROUP;
use super::group::{Ahead, CacheLevel, CacheLine, Group, Lanes, Part, Scratch, State, WIDEST, floats, rescale};
use crate::memory::kv_cache::KEY_EXCESS;

/// Blocks of a step: what is done once a step (a scale for the weights, sums to be widened) costs half as much for each token.
pub(super) const STEP_BLOCKS: usize = 2;
pub(super) const STEP_TOKENS: usize = STEP_BLOCKS * BLOCK_TOKENS;

/// Registers of integers beside those of f32 lanes.
///
/// # Safety
///
/// Callers of any method owe it:
/// * the CPU has the instruction set that the type stands for;
/// * a pointer is good for what the method names. No alignment is asked for.
pub(super) trait Integers: Sized {
    type Floats: Lanes;
    /// A four of elements in each lane.
    type Elements: Copy;
    /// The same four integers in each lane.
    type Factors: Copy;
    /// A sum in each lane, perhaps in parts.
    type Sums: Copy;

    /// The largest integers that a query and a weight become.
    const LARGEST_QUERY: f32;
    const LARGEST_WEIGHT: f32;
    /// Heads of a tile where there are enough: 4 where elements take more to come by than factors, 2 where it is the other way round.
    const HEADS: usize;
    /// Where what is asked for ahead is to come to: the second level, except where arithmetic has no time to fetch it from there.
    const AHEAD: CacheLevel;

    /// Stores the nearest integers of numbers of a query times `factor`, which are within ±LARGEST_QUERY. Any for other numbers. `n`: a
    /// multiple of WIDEST.
    unsafe fn store_query(numbers: *const f32, factor: f32, n: usize, to: *mut Integer);
    /// Stores the nearest integers of STEP_TOKENS weights times `factor`, which are within 0 ..= LARGEST_WEIGHT. Any for other numbers.
    unsafe fn store_weights(numbers: *const f32, factor: f32, to: *mut Integer);
    /// The larger of `|a|` and `|b|`; NaN where either is.
    unsafe fn max_magnitude(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// The largest lane of what [`max_magnitude`](Self::max_magnitude) returns; NaN if one is.
    unsafe fn max_magnitude_lane(of: Self::Floats) -> f32;

    /// The same sum in each lane.
    unsafe fn sums(of: i32) -> Self::Sums;
    /// A four of keys for each lane, with their excess.
    unsafe fn keys(from: *const [u8; 4]) -> Self::Elements;
    /// A four of values for each lane.
    unsafe fn values(from: *const [u8; 4]) -> Self::Elements;
    /// Four integers of a query or of weights, as they were stored.
    unsafe fn splat(from: *const Four) -> Self::Factors;
    /// `sums` and the products of each lane's four of keys with the query's.
    unsafe fn add_keys(sums: Self::Sums, keys: Self::Elements, query: Self::Factors) -> Self::Sums;
    /// `sums` and the products of each lane's four of values with the weights.
    unsafe fn add_values(sums: Self::Sums, values: Self::Elements, weights: Self::Factors) -> Self::Sums;
    unsafe fn to_f32(sums: Self::Sums) -> Self::Floats;
}

/// 16 bits of a query or of weights, in a level's own order.
pub(super) type Integer = [u8; 2];

/// Four of them that follow each other.
pub(super) type Four = [Integer; 4];

/// One or STEP_BLOCKS blocks.
struct Step<'a> {
    heads: usize,
    /// K in whole fours.
    width: usize,
    /// K rounded up: a row of the scratch query and output.
    padded: usize,
    blocks: &'a [StepBlock],
}

/// K and V of a block.
#[derive(Clone)]
struct StepBlock {
    /// `[BLOCK_TOKENS / KEY_GROUP, width / 4, KEY_GROUP]` fours.
    keys: *const u8,
    /// `[BLOCK_TOKENS / 4, width]` fours.
    values: *const u8,
    /// Those of its fours of tokens that have some to be seen.
    fours: Range<usize>,
}

/// Queries of heads.
#[derive(Clone, Copy)]
struct Query {
    /// `[heads, padded]`
    integers: *const Integer,
    /// `[heads]`
    scales: *const f32,
    /// `[heads]`: what sums of products with keys begin with.
    sums: *const i32,
}

/// Weights of heads.
#[derive(Clone, Copy)]
struct Weights {
    /// `[heads, STEP_TOKENS]`
    integers: *const Integer,
    /// `[heads]`
    scales: *const f32,
}

/// Numbers of a step's tokens.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Numbers([f32; STEP_TOKENS]);

/// Attends one group, into the scratch's state, and joins that to what came before, if it is given.
///
/// # Safety
///
/// * The CPU has the instruction set that `I` stands for.
/// * `scratch` was made for as many heads as `group.q` has, and for the cache's head width.
/// * The cache's elements are 8-bit integers.
#[inline(always)]
pub(super) unsafe fn attend<I: Integers>(group: &Group, scratch: &mut Scratch, earlier: Option<&mut State>) {
    let heads = scratch.heads;
    scratch.state.begin(group.sinks);
    let Scratch { q, q_integers, q_scales, q_sums, weights, weight_integers, weight_scales, new_max, state, .. } =
        scratch;
    let State { head_width, padded, max, weight_sums, out } = state;
    let (head_width, padded) = (*head_width, *padded);
    let (out, weight_sums) = (floats(out), floats(weight_sums));
    let (q, scores) = (floats(q), floats(weights));
    let (q_integers, weight_integers) = (integers(q_integers), integers(weight_integers));
    for (head, row) in group.q.chunks_exact(head_width).enumerate() {
        let padded_row = &mut q[head * padded..][..padded];
        padded_row[..head_width].copy_from_slice(row);
        // SAFETY: the caller vouches for the CPU; the padding is zeros.
        unsafe {
            let limit = I::LARGEST_QUERY.min((i32::MAX as usize / 128 / head_width) as f32);
            let largest = largest_of::<I>(padded_row);
            q_scales[head] = group.scale * (largest / limit);
            let sum = round_query::<I>(padded_row, limit / largest, &mut q_integers[head * padded..][..padded]);
            q_sums[head] = sum.wrapping_mul(-i32::from(KEY_EXCESS));
        }
    }

    let width = group.cache.layout().width_in_fours();
    let end = group.visible.end.div_ceil(BLOCK_TOKENS);
    let mut index = group.visible.start / BLOCK_TOKENS;
    let mut parts = group.parts_of_step(index);
    while index < end {
        let indices = index..((index / STEP_BLOCKS + 1) * STEP_BLOCKS).min(end);
        index = indices.end;
        let now = parts;
        if index < end {
            parts = group.parts_of_step(index);
        }
        let next = if index < end { parts } else { group.next };
        for Part { scales, .. } in next {
            Ahead::fetch_all(scales.as_ptr(), scales.len());
        }
        let blocks: [StepBlock; STEP_BLOCKS] = std::array::from_fn(|place| {
            // A block that is not there is never read.
            if place >= indices.len() {
                return StepBlock { keys: std::ptr::null(), values: std::ptr::null(), fours: 0..0 };
            }
            let (Part { keys, values, .. }, slots) = (now[place], group.slots(indices.start + place));
            StepBlock { keys: keys.as_ptr(), values: values.as_ptr(), fours: slots.start / 4..slots.end.div_ceil(4) }
        });
        let blocks = &blocks[..indices.len()];
        let (mut key_scales, mut value_scales) = (Numbers([0.0; STEP_TOKENS]), Numbers([0.0; STEP_TOKENS]));
        for (place, Part { scales, .. }) in now.iter().enumerate().take(indices.len()) {
            let (slots, at) = (group.slots(indices.start + place), place * BLOCK_TOKENS);
            let (of_keys, of_values) = scales.split_at(scales.len() / 2);
            // SAFETY: the caller vouches for the CPU, and for elements that have scales.
            unsafe {
                load_scales::<I>(of_keys.as_ptr(), &mut key_scales.0[at..]);
                load_scales::<I>(of_values.as_ptr(), &mut value_scales.0[at..]);
            }
            // Slots that are not to be seen hold anything, NaN for a scale too.
            value_scales.0[at..][..slots.start].fill(0.0);
            value_scales.0[at..][slots.end..BLOCK_TOKENS].fill(0.0);
        }
        // Tokens of the step to be seen.
        let first = indices.start * BLOCK_TOKENS;
        let there = indices.len() * BLOCK_TOKENS;
        let seen = group.visible.start.saturating_sub(first)..there.min(group.visible.end - first);

        let step = Step { heads, width, padded, blocks };
        // SAFETY: the caller vouches for the CPU and the elements, hence for the extents of halves; the scratch rows have the extents that
        // `Scratch` and `State` state.
        unsafe {
            let query = Query { integers: q_integers.as_ptr(), scales: q_scales.as_ptr(), sums: q_sums.as_ptr() };
            score::<I>(
                &step,
                &query,
                key_scales.0.as_ptr(),
                scores.as_mut_ptr(),
                &mut Ahead::new(now.map(|part| part.values)),
            );
            if seen.len() < STEP_TOKENS {
                for scores in scores.chunks_exact_mut(STEP_TOKENS) {
                    scores[..seen.start].fill(f32::NEG_INFINITY);
                    scores[seen.end..].fill(f32::NEG_INFINITY);
                }
            }
            rescale::<I::Floats, STEP_TOKENS>(max, new_max, scores, weight_sums, out, padded);
            let heads = scores.chunks_exact_mut(STEP_TOKENS).zip(weight_sums.chunks_exact_mut(WIDEST));
            for ((weights, weight_sums), (max, scale)) in heads.zip(max.iter().zip(&mut *weight_scales)) {
                *scale = exponentials::<I>(weights, *max, weight_sums, &value_scales);
            }
            let rounded = weight_integers.chunks_exact_mut(STEP_TOKENS);
            for ((weights, rounded), scale) in scores.chunks_exact(STEP_TOKENS).zip(rounded).zip(&mut *weight_scales) {
                *scale = round_weights::<I>(weights, *scale, rounded);
            }
            let weights = Weights { integers: weight_integers.as_ptr(), scales: weight_scales.as_ptr() };
            weigh::<I>(&step, &weights, out.as_mut_ptr(), &mut Ahead::new(next.map(|part| part.keys)));
        }
    }
    if let Some(earlier) = earlier {
        earlier.merge(&scratch.state);
    }
}

fn integers(lines: &mut [CacheLine]) -> &mut [Integer] {
    bytemuck::cast_slice_mut(lines)
}

/// A block's scales.
///
/// # Safety
///
/// * The CPU has the instruction set that `I` stands for.
/// * BLOCK_TOKENS scales in f16 are there, and room for them.
#[inline(always)]
unsafe fn load_scales<I: Integers>(from: *const u8, into: &mut [f32]) {
    for slot in (0..BLOCK_TOKENS).step_by(I::Floats::COUNT) {
        // SAFETY: as the caller's; COUNT divides BLOCK_TOKENS.
        unsafe { I::Floats::load_f16(from.cast::<f16>().add(slot)).store(into.as_mut_ptr().add(slot)) };
    }
}

/// Turns scores into weights, adds them to their sums, and multiplies them by their tokens' scales. The largest of that, NaN if there is one.
///
/// # Safety
///
/// * The CPU has the instruction set that `I` stands for.
/// * Lengths: STEP_TOKENS weights, WIDEST sums.
#[inline(always)]
unsafe fn exponentials<I: Integers>(weights: &mut [f32], max: f32, sums: &mut [f32], scales: &Numbers) -> f32 {
    // SAFETY: as the caller's.
    unsafe {
        let mut sum = I::Floats::load(sums.as_ptr());
        let mut largest = I::Floats::splat(0.0);
        for (weights, scales) in weights.chunks_exact_mut(I::Floats::COUNT).zip(scales.0.chunks_exact(I::Floats::COUNT))
        {
            // A NaN score makes a NaN weight whatever `max` became.
            let weight = I::Floats::load(weights.as_ptr()).sub(I::Floats::splat(max)).exp();
            sum = sum.add(weight);
            let product = weight.mul(I::Floats::load(scales.as_ptr()));
            product.store(weights.as_mut_ptr());
            largest = I::max_magnitude(largest, product);
        }
        sum.store(sums.as_mut_ptr());
        I::max_magnitude_lane(largest)
    }
}

/// The largest magnitude; NaN if one of the numbers is.
///
/// # Safety
///
/// * The CPU has the instruction set that `I` stands for.
/// * Length: a multiple of WIDEST.
#[inline(always)]
unsafe fn largest_of<I: Integers>(numbers: &[f32]) -> f32 {
    // SAFETY: as the caller's.
    unsafe {
        let mut largest = I::Floats::splat(0.0);
        for numbers in numbers.chunks_exact(I::Floats::COUNT) {
            largest = I::max_magnitude(largest, I::Floats::load(numbers.as_ptr()));
        }
        I::max_magnitude_lane(largest)
    }
}

/// Numbers of a query times a factor, as integers, and their sum. Any integers if the factor is no finite number.
///
/// # Safety
///
/// * The CPU has the instruction set that `I` stands for.
/// * Lengths: equal, a multiple of WIDEST.
#[inline(always)]
unsafe fn round_query<I: Integers>(numbers: &[f32], factor: f32, into: &mut [Integer]) -> i32 {
    // Adding 1.5 * 2^23 rounds to an integer. Sums of integers below 2^24 are exact: |q| is at most 2^24 / K.
    // SAFETY: as the caller's.
    unsafe {
        I::store_query(numbers.as_ptr(), factor, numbers.len(), into.as_mut_ptr());
        let (factor, magic) = (I::Floats::splat(factor), I::Floats::splat(12_582_912.0));
        let mut sums = I::Floats::splat(0.0);
        for numbers in numbers.chunks_exact(I::Floats::COUNT) {
            sums = sums.add(I::Floats::load(numbers.as_ptr()).mul(factor).add(magic).sub(magic));
        }
        let mut lanes = CacheLine([0.0; WIDEST]);
        sums.store(lanes.0.as_mut_ptr());
        lanes.sum() as i32
    }
}

/// Weights as integers under the scale that is returned, where `largest` is the largest weight. If that is 0 or NaN, the scale is, and the
/// integers are any.
///
/// # Safety
///
/// * The CPU has the instruction set that `I` stands for.
/// * Lengths: STEP_TOKENS.
#[inline(always)]
unsafe fn round_weights<I: Integers>(weights: &[f32], largest: f32, into: &mut [Integer]) -> f32 {
    // SAFETY: as the caller's.
    unsafe {
        I::store_weights(weights.as_ptr(), I::LARGEST_WEIGHT / largest, into.as_mut_ptr());
        largest / I::LARGEST_WEIGHT
    }
}

/// `scores[head, token] = q[head] · keys[token]` for all tokens of the step's blocks, in tiles of heads × registers of tokens: in integers, then
/// times both scales.
///
/// # Safety
///
/// * The CPU has the instruction set that `I` stands for.
/// * `key_scales`: `[STEP_TOKENS]`; `scores`: `[heads, STEP_TOKENS]`.
#[inline(always)]
unsafe fn score<I: Integers>(step: &Step, query: &Query, key_scales: *const f32, scores: *mut f32, ahead: &mut Ahead) {
    for (place, block) in step.blocks.iter().enumerate() {
        let mut head = 0;
        // SAFETY: as the caller's, and every step stays below `heads`.
        unsafe {
            let (keys, at) = (block.keys.cast(), place * BLOCK_TOKENS);
            let mut next = |heads: usize| {
                let Query { integers, scales, sums } = *query;
                let query = Query {
                    integers: integers.add(head * step.padded),
                    scales: scales.add(head),
                    sums: sums.add(head),
                };
                let scores = scores.add(head * STEP_TOKENS + at);
                head += heads;
                (query, key_scales.add(at), scores)
            };
            let mut left = step.heads;
            while I::HEADS == 4 && left >= 4 {
                if I::Floats::TILE == 16 {
                    score_heads::<I, 4, 2>(step, keys, next(4), ahead);
                } else {
                    score_heads::<I, 4, 1>(step, keys, next(4), ahead);
                }
                left -= 4;
            }
            while left >= 2 {
                score_heads::<I, 2, 2>(step, keys, next(2), ahead);
                left -= 2;
            }
            if left > 0 {
                score_heads::<I, 1, 2>(step, keys, next(1), ahead);
            }
        }
    }
}

/// A block's `keys`, `REGISTERS` of tokens at a time. The rest begins with the first head and token: queries, keys' scales, scores.
///
/// # Safety
///
/// As of [`score`].
#[inline(always)]
unsafe fn score_heads<I: Integers, const HEADS: usize, const REGISTERS: usize>(
    step: &Step,
    keys: *const [u8; 4],
    (query, key_scales, scores): (Query, *const f32, *mut f32),
    ahead: &mut Ahead,
) {
    let lanes = I::Floats::COUNT;
    let fours = step.width / 4;
    let q = query.integers.cast::<Four>();
    // SAFETY: as the caller's: every step stays below BLOCK_TOKENS and width / 4.
    unsafe {
        for slot in (0..BLOCK_TOKENS).step_by(REGISTERS * lanes) {
            let group = |slot: usize| keys.add(slot / KEY_GROUP * KEY_GROUP * fours + slot % KEY_GROUP);
            let mut sums = [[I::sums(0); REGISTERS]; HEADS];
            for head in 0..HEADS {
                sums[head] = [I::sums(*query.sums.add(head)); REGISTERS];
            }
            let bytes = REGISTERS * lanes * size_of::<[u8; 4]>();
            // Every tile of heads comes by here, and asks for its share.
            let mut ahead = ahead.steps(fours, bytes * HEADS / step.heads);
            for four in 0..fours {
                ahead.fetch(bytes, I::AHEAD);
                let mut row = [I::keys(keys); REGISTERS];
                for register in 0..REGISTERS {
                    row[register] = I::keys(group(slot + register * lanes).add(four * KEY_GROUP));
                }
                for head in 0..HEADS {
                    let query = I::splat(q.add(head * step.padded / 4 + four));
                    for register in 0..REGISTERS {
                        let sum = &mut sums[head][register];
                        *sum = I::add_keys(*sum, row[register], query);
                    }
                }
            }
            for head in 0..HEADS {
                let scale = I::Floats::splat(*query.scales.add(head));
                for register in 0..REGISTERS {
                    let slot = slot + register * lanes;
                    let scales = I::Floats::load(key_scales.add(slot)).mul(scale);
                    I::to_f32(sums[head][register]).mul(scales).store(scores.add(head * STEP_TOKENS + slot));
                }
            }
        }
    }
}

/// `out[head] +=` sum over the step's tokens of `weights[head, token] · values[token]`, in tiles of heads × registers of columns: in integers,
/// then times the weights' scale.
///
/// # Safety
///
/// * The CPU has the instruction set that `I` stands for.
/// * `out`: `[heads, padded]`.
#[inline(always)]
unsafe fn weigh<I: Integers>(step: &Step, weights: &Weights, out: *mut f32, ahead: &mut Ahead) {
    let mut head = 0;
    // SAFETY: as the caller's, and every step stays below `heads`.
    unsafe {
        let mut next = |heads: usize| {
            let Weights { integers, scales } = *weights;
            let weights = Weights { integers: integers.add(head * STEP_TOKENS), scales: scales.add(head) };
            let out = out.add(head * step.padded);
            head += heads;
            (weights, out)
        };
        let mut left = step.heads;
        while I::HEADS == 4 && left >= 4 {
            if I::Floats::TILE == 16 {
                weigh_heads::<I, 4, 2>(step, next(4), ahead);
            } else {
                weigh_heads::<I, 4, 1>(step, next(4), ahead);
            }
            left -= 4;
        }
        while left >= 2 {
            if I::Floats::TILE == 16 {
                weigh_heads::<I, 2, 4>(step, next(2), ahead);
            } else {
                weigh_heads::<I, 2, 2>(step, next(2), ahead);
            }
            left -= 2;
        }
        if left > 0 {
            weigh_heads::<I, 1, 4>(step, next(1), ahead);
        }
    }
}

/// `REGISTERS` of columns at a time, then one. The last may read on, into what follows a row of V, for lanes of `out` that are padding.
/// The rest begins with the first head: weights, output.
///
/// # Safety
///
/// As of [`weigh`].
#[inline(always)]
unsafe fn weigh_heads<I: Integers, const HEADS: usize, const REGISTERS: usize>(
    step: &Step,
    (weights, out): (Weights, *mut f32),
    ahead: &mut Ahead,
) {
    let lanes = I::Floats::COUNT;
    let mut column = 0;
    // SAFETY: as the caller's: a register begins below width, and what it reads beyond is less than the scales that a block ends with.
    unsafe {
        while column + REGISTERS * lanes <= step.width {
            weigh_tile::<I, HEADS, REGISTERS>(step, weights, out, column, ahead);
            column += REGISTERS * lanes;
        }
        while column < step.width {
            weigh_tile::<I, HEADS, 1>(step, weights, out, column, ahead);
            column += lanes;
        }
    }
}

/// The tile from `column` on.
///
/// # Safety
///
/// As of [`weigh_heads`].
#[inline(always)]
unsafe fn weigh_tile<I: Integers, const HEADS: usize, const REGISTERS: usize>(
    step: &Step,
    weights: Weights,
    out: *mut f32,
    column: usize,
    ahead: &mut Ahead,
) {
    let lanes = I::Floats::COUNT;
    // SAFETY: as the caller's: whole registers of `out` lie within padded.
    unsafe {
        let mut sums = [[I::sums(0); REGISTERS]; HEADS];
        for (place, block) in step.blocks.iter().enumerate() {
            let weights = weights.integers.add(place * BLOCK_TOKENS).cast::<Four>();
            let bytes = REGISTERS * lanes * size_of::<[u8; 4]>();
            let mut ahead = ahead.steps(block.fours.len(), bytes * HEADS / step.heads);
            for four in block.fours.clone() {
                ahead.fetch(bytes, I::AHEAD);
                let values = block.values.cast::<[u8; 4]>().add(four * step.width + column);
                let mut row = [I::values(values); REGISTERS];
                for register in 1..REGISTERS {
                    row[register] = I::values(values.add(register * lanes));
                }
                for head in 0..HEADS {
                    let weights = I::splat(weights.add(head * STEP_TOKENS / 4 + four));
                    for register in 0..REGISTERS {
                        let sum = &mut sums[head][register];
                        *sum = I::add_values(*sum, row[register], weights);
                    }
                }
            }
        }
        for head in 0..HEADS {
            let scale = I::Floats::splat(*weights.scales.add(head));
            for register in 0..REGISTERS {
                let to = out.add(head * step.padded + column + register * lanes);
                I::to_f32(sums[head][register]).mul_add(scale, I::Floats::load(to)).store(to);
            }
        }
    }
}
