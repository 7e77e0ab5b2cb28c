//! The algorithm over 8-bit K and V: both products in integers, exactly, between roundings of queries and weights to 16 bits.
//!
//! ```text
//! once:             q      ~ s · n      n of 16 bits, s for each head: max |q| / the largest integer
//! block by block:   scores = s · scale of the row · (n · K)            exact sums of 32 bits
//!                   weights as with f16
//!                   weights · scale of the row ~ s' · n'               s' for each head and block, likewise
//!                   out   += s' · (n' · V)                             exact sums of 32 bits
//! ```
//!
//! What the roundings cost: an element of the query is off by 2^-16 of the head's largest at most, a token's weighted value by 2^-16
//! of the largest of its block, under a hundredth of what keeping K and V in 8 bits has cost (`tests/host/attention.rs`).
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
//! Sums are exact, so their order is nobody's concern; nor are those on the way that do not fit 32 bits, where the last one does. Where K
//! is above 512, queries get fewer bits, so that it does.

#![expect(clippy::needless_range_loop)]

use half::f16;

use super::BLOCK_TOKENS;
use super::KEY_GROUP;
use super::group::{Ahead, CacheLine, CacheLines, Group, Lanes, Scratch, State, WIDEST, floats, softmax_step};
use crate::memory::kv_cache::KEY_EXCESS;

/// Registers of integers beside those of f32 lanes.
///
/// # Safety
///
/// Callers of any method owe it:
/// * the CPU has the instruction set that the type stands for;
/// * a pointer is good for the elements that the method names. No alignment is asked for.
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
    /// Stores the nearest integers of numbers of a query, within ±LARGEST_QUERY, one for each lane. Anything for others.
    unsafe fn store_query(numbers: Self::Floats, to: *mut Four);
    /// Stores the nearest integers of weights, within 0 ..= LARGEST_WEIGHT, one for each lane. Anything for others.
    unsafe fn store_weights(numbers: Self::Floats, to: *mut Four);
    /// The larger of `|a|` and `|b|`; NaN where either is.
    unsafe fn max_magnitude(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// The largest lane of what [`max_magnitude`](Self::max_magnitude) returns; NaN if one is.
    unsafe fn max_magnitude_lane(of: Self::Floats) -> f32;
}

/// Four integers of 16 bits, in a level's own order of bytes.
pub(super) type Four = [u8; 8];

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
    let Scratch { q, q_fours, q_scales, q_sums, weights, weight_fours, weight_scales, new_max, state, .. } = scratch;
    let State { head_width, padded, max, weight_sums, out } = state;
    let (head_width, padded) = (*head_width, *padded);
    let (out, weight_sums) = (floats(out), floats(weight_sums));
    let (q, weights) = (floats(q), floats(weights));
    let (q_fours, weight_fours) = (fours(q_fours), fours(weight_fours));
    for (head, row) in group.q.chunks_exact(head_width).enumerate() {
        let padded_row = &mut q[head * padded..][..padded];
        padded_row[..head_width].copy_from_slice(row);
        // SAFETY: the caller vouches for the CPU; the padding is zeros.
        unsafe {
            let limit = I::LARGEST_QUERY.min((i32::MAX as usize / 128 / head_width) as f32);
            let largest = largest_of::<I>(padded_row);
            q_scales[head] = group.scale * (largest / limit);
            let sum = round_query::<I>(padded_row, limit / largest, &mut q_fours[head * padded / 4..][..padded / 4]);
            q_sums[head] = sum.wrapping_mul(-i32::from(KEY_EXCESS));
        }
    }

    let end = group.visible.end.div_ceil(BLOCK_TOKENS);
    let width = group.cache.layout().width_in_fours();
    let scales_at = BLOCK_TOKENS * width;
    for index in group.visible.start / BLOCK_TOKENS..end {
        let slots = group.slots(index);
        let (keys, values) = group.halves(index);
        let next_keys = if index + 1 < end { group.seen_keys(index + 1) } else { group.next };
        let mut keys_ahead = Ahead::new(next_keys);
        let mut values_ahead = Ahead::new(values);
        Ahead::fetch_line(values[scales_at..].as_ptr());
        Ahead::fetch_line(next_keys.as_ptr().wrapping_add(scales_at));
        // SAFETY: the caller vouches for the CPU and the elements, hence for the extents of halves: BLOCK_TOKENS rows in
        // fours, then their scales; the scratch rows have the extents that `Scratch` and `State` state.
        unsafe {
            let key_scales = scales::<I>(keys[scales_at..].as_ptr());
            let mut value_scales = scales::<I>(values[scales_at..].as_ptr());
            // Slots that are not to be seen hold anything, NaN for a scale too.
            value_scales.0[..slots.start].fill(0.0);
            value_scales.0[slots.end..].fill(0.0);
            let block = Block { width, padded };
            let query = Query { fours: q_fours.as_ptr(), scales: q_scales.as_ptr(), sums: q_sums.as_ptr() };
            block.score::<I>(heads, keys.as_ptr(), &key_scales, &query, weights.as_mut_ptr(), &mut values_ahead);
            if slots.len() < BLOCK_TOKENS {
                for weights in weights.chunks_exact_mut(BLOCK_TOKENS) {
                    weights[..slots.start].fill(f32::NEG_INFINITY);
                    weights[slots.end..].fill(f32::NEG_INFINITY);
                }
            }
            softmax_step::<I::Floats>(max, new_max, weights, weight_sums, out, padded);
            for (weights, largest) in weights.chunks_exact_mut(BLOCK_TOKENS).zip(&mut *weight_scales) {
                *largest = multiply::<I>(weights, &value_scales);
            }
            let fours = weight_fours.chunks_exact_mut(BLOCK_TOKENS / 4);
            for ((weights, fours), scale) in weights.chunks_exact(BLOCK_TOKENS).zip(fours).zip(&mut *weight_scales) {
                *scale = round_weights::<I>(weights, *scale, fours);
            }
            block.weigh::<I>(
                heads,
                values.as_ptr(),
                weight_fours.as_ptr(),
                weight_scales,
                out.as_mut_ptr(),
                slots.start / 4..slots.end.div_ceil(4),
                &mut keys_ahead,
            );
        }
    }
    if let Some(earlier) = earlier {
        earlier.merge(&scratch.state);
    }
}

fn fours(lines: &mut [CacheLine]) -> &mut [Four] {
    bytemuck::cast_slice_mut(lines)
}

/// A block's scales.
///
/// # Safety
///
/// * The CPU has the instruction set that `I` stands for.
/// * BLOCK_TOKENS scales in f16 are there.
#[inline(always)]
unsafe fn scales<I: Integers>(from: *const u8) -> CacheLines {
    let mut all = CacheLines([0.0; BLOCK_TOKENS]);
    for slot in (0..BLOCK_TOKENS).step_by(I::Floats::COUNT) {
        // SAFETY: as the caller's; COUNT divides BLOCK_TOKENS.
        unsafe { I::Floats::load_f16(from.cast::<f16>().add(slot)).store(all.0.as_mut_ptr().add(slot)) };
    }
    all
}

/// Each number times its token's scale; the largest magnitude of what comes out, NaN if there is one.
///
/// # Safety
///
/// * The CPU has the instruction set that `I` stands for.
/// * `numbers` has BLOCK_TOKENS elements.
#[inline(always)]
unsafe fn multiply<I: Integers>(numbers: &mut [f32], scales: &CacheLines) -> f32 {
    // SAFETY: as the caller's.
    unsafe {
        let mut largest = I::Floats::splat(0.0);
        for (numbers, scales) in numbers.chunks_exact_mut(I::Floats::COUNT).zip(scales.0.chunks_exact(I::Floats::COUNT))
        {
            let product = I::Floats::load(numbers.as_ptr()).mul(I::Floats::load(scales.as_ptr()));
            product.store(numbers.as_mut_ptr());
            largest = I::max_magnitude(largest, product);
        }
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
/// * Length: a multiple of WIDEST; `into` a four for four of them.
#[inline(always)]
unsafe fn round_query<I: Integers>(numbers: &[f32], factor: f32, into: &mut [Four]) -> i32 {
    // Adding 1.5 * 2^23 rounds to an integer. Sums of integers below 2^24 are exact: |q| is at most 2^24 / K.
    // SAFETY: as the caller's.
    unsafe {
        let (factor, magic) = (I::Floats::splat(factor), I::Floats::splat(12_582_912.0));
        let mut sums = I::Floats::splat(0.0);
        for (numbers, into) in numbers.chunks_exact(I::Floats::COUNT).zip(into.chunks_exact_mut(I::Floats::COUNT / 4)) {
            let product = I::Floats::load(numbers.as_ptr()).mul(factor);
            I::store_query(product, into.as_mut_ptr());
            sums = sums.add(product.add(magic).sub(magic));
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
/// * Lengths: BLOCK_TOKENS weights, a four for four of them.
#[inline(always)]
unsafe fn round_weights<I: Integers>(weights: &[f32], largest: f32, into: &mut [Four]) -> f32 {
    // SAFETY: as the caller's.
    unsafe {
        let factor = I::Floats::splat(I::LARGEST_WEIGHT / largest);
        for (weights, into) in weights.chunks_exact(I::Floats::COUNT).zip(into.chunks_exact_mut(I::Floats::COUNT / 4)) {
            I::store_weights(I::Floats::load(weights.as_ptr()).mul(factor), into.as_mut_ptr());
        }
        largest / I::LARGEST_WEIGHT
    }
}

/// The two products of a block, in tiles of heads × lanes.
struct Block {
    /// K in whole fours.
    width: usize,
    /// K rounded up: a row of the scratch query and output.
    padded: usize,
}

/// # Safety
///
/// Callers of any method owe it:
/// * the CPU has the instruction set that `I` stands for;
/// * pointers to K: `[BLOCK_TOKENS / KEY_GROUP, width / 4, KEY_GROUP]` fours; to V: `[BLOCK_TOKENS / 4, width]` fours, and scales behind; to
///   queries: `[heads, padded / 4]` fours, from the first head that the method is to take; to outputs: `[heads, padded]`; to weights:
///   `[heads, BLOCK_TOKENS]`, or as many fours, likewise.
impl Block {
    /// `weights[head, slot] = q[head] · keys[slot]`: in integers, then times both scales.
    #[inline(always)]
    unsafe fn score<I: Integers>(
        &self,
        heads: usize,
        keys: *const u8,
        key_scales: &CacheLines,
        query: &Query,
        weights: *mut f32,
        ahead: &mut Ahead,
    ) {
        let keys = keys.cast::<[u8; 4]>();
        let mut head = 0;
        // SAFETY: as the caller's, and every step stays below `heads`.
        unsafe {
            let at = |head: usize| {
                let Query { fours, scales, sums } = *query;
                let query =
                    Query { fours: fours.add(head * self.padded / 4), scales: scales.add(head), sums: sums.add(head) };
                (query, weights.add(head * BLOCK_TOKENS))
            };
            if I::Floats::TILE == 16 {
                while head + 4 <= heads {
                    let (query, weights) = at(head);
                    self.score_heads::<I, 4, 2>(keys, key_scales, &query, weights, ahead);
                    head += 4;
                }
            } else {
                while head + 4 <= heads {
                    let (query, weights) = at(head);
                    self.score_heads::<I, 4, 1>(keys, key_scales, &query, weights, ahead);
                    head += 4;
                }
            }
            if head + 2 <= heads {
                let (query, weights) = at(head);
                self.score_heads::<I, 2, 2>(keys, key_scales, &query, weights, ahead);
                head += 2;
            }
            if head < heads {
                let (query, weights) = at(head);
                self.score_heads::<I, 1, 2>(keys, key_scales, &query, weights, ahead);
            }
        }
    }

    /// `REGISTERS` of tokens at a time.
    #[inline(always)]
    unsafe fn score_heads<I: Integers, const HEADS: usize, const REGISTERS: usize>(
        &self,
        keys: *const [u8; 4],
        key_scales: &CacheLines,
        of: &Query,
        weights: *mut f32,
        ahead: &mut Ahead,
    ) {
        let lanes = I::Floats::COUNT;
        let fours = self.width / 4;
        // SAFETY: as the caller's: every step stays below BLOCK_TOKENS and width / 4.
        unsafe {
            for slot in (0..BLOCK_TOKENS).step_by(REGISTERS * lanes) {
                let group = |slot: usize| keys.add(slot / KEY_GROUP * KEY_GROUP * fours + slot % KEY_GROUP);
                let mut sums = [[I::sums(0); REGISTERS]; HEADS];
                for head in 0..HEADS {
                    sums[head] = [I::sums(*of.sums.add(head)); REGISTERS];
                }
                let bytes = REGISTERS * lanes * size_of::<[u8; 4]>();
                let mut ahead = ahead.steps(fours, bytes);
                for four in 0..fours {
                    ahead.fetch(bytes);
                    let mut row = [I::keys(keys); REGISTERS];
                    for register in 0..REGISTERS {
                        row[register] = I::keys(group(slot + register * lanes).add(four * KEY_GROUP));
                    }
                    for head in 0..HEADS {
                        let query = I::splat(of.fours.add(head * self.padded / 4 + four));
                        for register in 0..REGISTERS {
                            let sum = &mut sums[head][register];
                            *sum = I::add_keys(*sum, row[register], query);
                        }
                    }
                }
                for head in 0..HEADS {
                    let scale = I::Floats::splat(*of.scales.add(head));
                    for register in 0..REGISTERS {
                        let slot = slot + register * lanes;
                        let scales = I::Floats::load(key_scales.0.as_ptr().add(slot));
                        I::to_f32(sums[head][register])
                            .mul(scales.mul(scale))
                            .store(weights.add(head * BLOCK_TOKENS + slot));
                    }
                }
            }
        }
    }

    /// `out[head] += scales[head] · ` sum over `fours` of tokens of `weights[head, token] · values[token]`.
    #[expect(clippy::too_many_arguments)]
    #[inline(always)]
    unsafe fn weigh<I: Integers>(
        &self,
        heads: usize,
        values: *const u8,
        weights: *const Four,
        scales: &[f32],
        out: *mut f32,
        fours: std::ops::Range<usize>,
        ahead: &mut Ahead,
    ) {
        let values = values.cast::<[u8; 4]>();
        let mut head = 0;
        // SAFETY: as the caller's, and every step stays below `heads`.
        unsafe {
            let at = |head: usize| Weigh {
                weights: weights.add(head * BLOCK_TOKENS / 4),
                scales: scales.as_ptr().add(head),
                out: out.add(head * self.padded),
                fours: fours.clone(),
            };
            if I::Floats::TILE == 16 {
                while head + 4 <= heads {
                    self.weigh_heads::<I, 4, 2>(values, &at(head), ahead);
                    head += 4;
                }
                if head + 2 <= heads {
                    self.weigh_heads::<I, 2, 4>(values, &at(head), ahead);
                    head += 2;
                }
            } else {
                while head + 4 <= heads {
                    self.weigh_heads::<I, 4, 1>(values, &at(head), ahead);
                    head += 4;
                }
                if head + 2 <= heads {
                    self.weigh_heads::<I, 2, 2>(values, &at(head), ahead);
                    head += 2;
                }
            }
            if head < heads {
                self.weigh_heads::<I, 1, 4>(values, &at(head), ahead);
            }
        }
    }

    /// `REGISTERS` of columns at a time, then one. The last may read on, into what follows a row of V, for lanes of `out` that are padding.
    #[inline(always)]
    unsafe fn weigh_heads<I: Integers, const HEADS: usize, const REGISTERS: usize>(
        &self,
        values: *const [u8; 4],
        of: &Weigh,
        ahead: &mut Ahead,
    ) {
        let lanes = I::Floats::COUNT;
        let mut column = 0;
        // SAFETY: as the caller's: a register begins below width, and what it reads beyond is less than the BLOCK_TOKENS scales behind V.
        unsafe {
            while column + REGISTERS * lanes <= self.width {
                self.weigh_tile::<I, HEADS, REGISTERS>(values, column, of, ahead);
                column += REGISTERS * lanes;
            }
            while column < self.width {
                self.weigh_tile::<I, HEADS, 1>(values, column, of, ahead);
                column += lanes;
            }
        }
    }

    /// The tile from `column` on.
    #[inline(always)]
    unsafe fn weigh_tile<I: Integers, const HEADS: usize, const REGISTERS: usize>(
        &self,
        values: *const [u8; 4],
        column: usize,
        of: &Weigh,
        ahead: &mut Ahead,
    ) {
        let lanes = I::Floats::COUNT;
        // SAFETY: as the caller's: whole registers of `out` lie within padded.
        unsafe {
            let mut sums = [[I::sums(0); REGISTERS]; HEADS];
            let bytes = REGISTERS * lanes * size_of::<[u8; 4]>();
            let mut ahead = ahead.steps(of.fours.len(), bytes);
            for four in of.fours.clone() {
                ahead.fetch(bytes);
                let mut row = [I::values(values); REGISTERS];
                for register in 0..REGISTERS {
                    row[register] = I::values(values.add(four * self.width + column + register * lanes));
                }
                for head in 0..HEADS {
                    let weights = I::splat(of.weights.add(head * BLOCK_TOKENS / 4 + four));
                    for register in 0..REGISTERS {
                        let sum = &mut sums[head][register];
                        *sum = I::add_values(*sum, row[register], weights);
                    }
                }
            }
            for head in 0..HEADS {
                let scale = I::Floats::splat(*of.scales.add(head));
                for register in 0..REGISTERS {
                    let to = of.out.add(head * self.padded + column + register * lanes);
                    I::to_f32(sums[head][register]).mul_add(scale, I::Floats::load(to)).store(to);
                }
            }
        }
    }
}

/// Queries of some heads, the first of them the first that a method is to take: their integers, scales, and what their sums begin with.
struct Query {
    fours: *const Four,
    scales: *const f32,
    sums: *const i32,
}

/// What the heads of a tile take V with, and where the sum goes.
struct Weigh {
    weights: *const Four,
    scales: *const f32,
    out: *mut f32,
    fours: std::ops::Range<usize>,
}
