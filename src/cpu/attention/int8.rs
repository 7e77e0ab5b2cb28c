//! The algorithm over 8-bit K and V: both products in integers, exactly, between roundings of queries and weights to 16 bits.
//!
//! Multiplying integers takes one instruction where widening them to f32 takes one for each head and two more, so that memory, not
//! arithmetic, sets the pace:
//!
//! ```text
//! once:             q      ~ s · n      n of 16 bits, s for each head: max |q| / 32767
//! block by block:   scores = s · scale of the row · (n · K)            exact sums of 32 bits
//!                   weights as with f16
//!                   weights · scale of the row ~ s' · n'               s' for each head and block: the largest / 32767
//!                   out   += s' · (n' · V)                             exact sums of 32 bits
//! ```
//!
//! What the roundings cost: an element of the query is off by 2^-16 of the head's largest at most, a token's weighted value by 2^-16
//! of the largest of its block, under a hundredth of what keeping K and V in 8 bits has cost (`tests/host/attention.rs`).
//!
//! Sums are exact, so their order is nobody's concern. Where K is above 512, queries get fewer bits, so that a sum still fits.
//!
//! The cache keeps these elements in pairs, as instructions take them (`memory::kv_cache`): two columns of a token in K, two tokens of a
//! column in V. A register of scores then holds tokens, one of the output columns, and at most two lanes are summed.

#![expect(clippy::needless_range_loop)]

use half::f16;

use super::BLOCK_TOKENS;
use super::KEY_GROUP;
use super::group::{Ahead, CacheLines, Group, Lanes, Scratch, State, WIDEST, floats, softmax_step};

/// Registers of integers beside those of f32 lanes: pairs of 16 bits in as many lanes, and sums of 32.
///
/// # Safety
///
/// Callers of any method owe it:
/// * the CPU has the instruction set that the type stands for;
/// * a pointer is good for the elements that the method names. No alignment is asked for.
pub(super) trait Integers: Sized {
    type Floats: Lanes;
    /// A pair of 16-bit integers in each lane.
    type Pairs: Copy;
    /// A 32-bit integer in each lane.
    type Sums: Copy;

    unsafe fn zero() -> Self::Sums;
    /// A pair of 8-bit integers for each lane.
    unsafe fn widen(from: *const [i8; 2]) -> Self::Pairs;
    /// A register of pairs.
    unsafe fn load(from: *const [i16; 2]) -> Self::Pairs;
    /// One pair in all lanes.
    unsafe fn splat(from: *const [i16; 2]) -> Self::Pairs;
    /// `sums + a.0 · b.0 + a.1 · b.1`, lane by lane.
    unsafe fn add_products(sums: Self::Sums, a: Self::Pairs, b: Self::Pairs) -> Self::Sums;
    /// Stores the sum of each token as f32, times its scale and a factor, of two registers whose lanes are [`tokens`] of one pair of
    /// columns, then of the next. `scales` and `to` are good for two registers' tokens.
    #[inline(always)]
    unsafe fn store_tokens(sums: [Self::Sums; 2], scales: *const f32, factor: Self::Floats, to: *mut f32) {
        const { assert!(tokens::<Self>() == Self::Floats::COUNT) };
        for (register, sums) in sums.into_iter().enumerate() {
            let at = register * Self::Floats::COUNT;
            // SAFETY: as the caller's.
            unsafe { Self::to_f32(sums).mul(Self::Floats::load(scales.add(at)).mul(factor)).store(to.add(at)) };
        }
    }
    unsafe fn to_f32(sums: Self::Sums) -> Self::Floats;
    /// The nearest integers of numbers in ±32767, one for each lane. Anything for others.
    unsafe fn store_rounded(numbers: Self::Floats, to: *mut i16);
    /// The larger of `|a|` and `|b|`; NaN where either is.
    unsafe fn max_magnitude(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// The largest lane of what [`max_magnitude`](Self::max_magnitude) returns; NaN if one is.
    unsafe fn max_magnitude_lane(of: Self::Floats) -> f32;
}

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
    let Scratch { q, q_rounded, q_scales, q_pairs, weights, weight_pairs, weight_scales, new_max, state, .. } = scratch;
    let State { head_width, padded, max, weight_sums, out } = state;
    let (head_width, padded) = (*head_width, *padded);
    let (out, weight_sums) = (floats(out), floats(weight_sums));
    let (q, weights) = (floats(q), floats(weights));
    let q_pairs: &mut [[i16; 2]] = bytemuck::cast_slice_mut(q_pairs);
    let weight_pairs = words(weight_pairs);
    for (head, row) in group.q.chunks_exact(head_width).enumerate() {
        let padded_row = &mut q[head * padded..][..padded];
        padded_row[..head_width].copy_from_slice(row);
        // SAFETY: the caller vouches for the CPU; the padding is zeros.
        let pairs = unsafe {
            let rounded = &mut words(q_rounded)[..padded];
            q_scales[head] =
                group.scale * round::<I>(padded_row, largest_of::<I>(padded_row), largest_query(head_width), rounded);
            bytemuck::cast_slice::<i16, [i16; 2]>(rounded)
        };
        let spread = &mut q_pairs[head * padded / 2 * KEY_GROUP..][..padded / 2 * KEY_GROUP];
        for (lanes, pair) in spread.chunks_exact_mut(tokens::<I>()).zip(pairs) {
            lanes.fill(*pair);
        }
    }

    let end = group.visible.end.div_ceil(BLOCK_TOKENS);
    let scales_at = BLOCK_TOKENS * head_width;
    for index in group.visible.start / BLOCK_TOKENS..end {
        let slots = group.slots(index);
        let (keys, values) = group.halves(index);
        let next_keys = if index + 1 < end { group.seen_keys(index + 1) } else { group.next };
        let mut keys_ahead = Ahead::new(next_keys);
        let mut values_ahead = Ahead::new(values);
        Ahead::fetch_line(values[scales_at..].as_ptr());
        Ahead::fetch_line(next_keys.as_ptr().wrapping_add(scales_at));
        // SAFETY: the caller vouches for the CPU and the elements, hence for the extents of halves: `[BLOCK_TOKENS, K]` integers in
        // pairs, then `[BLOCK_TOKENS]` scales; the scratch rows have the extents that `Scratch` and `State` state.
        unsafe {
            let key_scales = scales::<I>(keys[scales_at..].as_ptr());
            let mut value_scales = scales::<I>(values[scales_at..].as_ptr());
            // Slots that are not to be seen hold anything, NaN for a scale too.
            value_scales.0[..slots.start].fill(0.0);
            value_scales.0[slots.end..].fill(0.0);
            let block = Block { head_width, padded };
            let query = Query { pairs: q_pairs.as_ptr(), scales: q_scales.as_ptr() };
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
            let pairs = weight_pairs.chunks_exact_mut(BLOCK_TOKENS);
            for ((weights, pairs), scale) in weights.chunks_exact(BLOCK_TOKENS).zip(pairs).zip(&mut *weight_scales) {
                *scale = round::<I>(weights, *scale, LARGEST, pairs);
            }
            block.weigh::<I>(
                heads,
                values.as_ptr(),
                weight_pairs.as_ptr(),
                weight_scales,
                out.as_mut_ptr(),
                slots.start / 2..slots.end.div_ceil(2),
                &mut keys_ahead,
            );
        }
    }
    if let Some(earlier) = earlier {
        earlier.merge(&scratch.state);
    }
}

/// Tokens in a register of keys. Where there is room for twice as many lanes, the next pair of columns follows.
const fn tokens<I: Integers>() -> usize {
    if I::Floats::COUNT < KEY_GROUP { I::Floats::COUNT } else { KEY_GROUP }
}

fn words(lines: &mut [super::group::CacheLine]) -> &mut [i16] {
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

/// Numbers as integers in ±`limit` under the scale that is returned, where the largest magnitude is `largest`. If that is 0 or NaN,
/// the scale is, and the integers are any.
///
/// # Safety
///
/// * The CPU has the instruction set that `I` stands for.
/// * Lengths: equal, a multiple of WIDEST.
#[inline(always)]
unsafe fn round<I: Integers>(numbers: &[f32], largest: f32, limit: f32, into: &mut [i16]) -> f32 {
    // SAFETY: as the caller's.
    unsafe {
        let factor = I::Floats::splat(limit / largest);
        for (numbers, into) in numbers.chunks_exact(I::Floats::COUNT).zip(into.chunks_exact_mut(I::Floats::COUNT)) {
            I::store_rounded(I::Floats::load(numbers.as_ptr()).mul(factor), into.as_mut_ptr());
        }
        largest / limit
    }
}

/// The largest integer that a weight becomes.
const LARGEST: f32 = 32767.0;

/// And a query: the sum of K products with -128 .. 127 fits 32 bits.
fn largest_query(head_width: usize) -> f32 {
    LARGEST.min((i32::MAX as usize / 128 / head_width) as f32)
}

/// The two products of a block, in tiles of [`TILE`](Lanes::TILE) sums.
struct Block {
    /// K
    head_width: usize,
    /// K rounded up: a row of the scratch query and output.
    padded: usize,
}

/// # Safety
///
/// Callers of any method owe it:
/// * the CPU has the instruction set that `I` stands for;
/// * pointers to K: `[BLOCK_TOKENS / KEY_GROUP, K / 2, KEY_GROUP, 2]` and scales behind; to V: `[BLOCK_TOKENS / 2, K, 2]`; to queries:
///   `[heads, padded / 2 · KEY_GROUP]`, each pair in as many lanes as a register has [`tokens`], from the first head that the method is to
///   take; to outputs: `[heads, padded]`; to weights: `[heads, BLOCK_TOKENS]`, likewise.
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
        let keys = keys.cast::<[i8; 2]>();
        let mut head = 0;
        // SAFETY: as the caller's, and every step stays below `heads`.
        unsafe {
            let at = |head: usize| {
                let pairs = query.pairs.add(head * self.padded / 2 * KEY_GROUP);
                (Query { pairs, scales: query.scales.add(head) }, weights.add(head * BLOCK_TOKENS))
            };
            if I::Floats::TILE == 16 {
                while head + 4 <= heads {
                    let (query, weights) = at(head);
                    self.score_heads::<I, 4, 4>(keys, key_scales, &query, weights, ahead);
                    head += 4;
                }
            } else {
                while head + 4 <= heads {
                    let (query, weights) = at(head);
                    self.score_heads::<I, 4, 2>(keys, key_scales, &query, weights, ahead);
                    head += 4;
                }
            }
            if head + 2 <= heads {
                let (query, weights) = at(head);
                self.score_heads::<I, 2, 4>(keys, key_scales, &query, weights, ahead);
                head += 2;
            }
            if head < heads {
                let (query, weights) = at(head);
                self.score_heads::<I, 1, 4>(keys, key_scales, &query, weights, ahead);
            }
        }
    }

    /// `REGISTERS` of tokens at a time.
    #[inline(always)]
    unsafe fn score_heads<I: Integers, const HEADS: usize, const REGISTERS: usize>(
        &self,
        keys: *const [i8; 2],
        key_scales: &CacheLines,
        of: &Query,
        weights: *mut f32,
        ahead: &mut Ahead,
    ) {
        const { assert!(REGISTERS.is_multiple_of(2)) };
        let (lanes, tokens) = (I::Floats::COUNT, tokens::<I>());
        let pairs = self.head_width / 2;
        // A last register of one pair only reads on into what follows, and takes it times 0.
        let steps = pairs.div_ceil(lanes / tokens);
        // SAFETY: as the caller's: every step stays below BLOCK_TOKENS and K / 2, or in the scales behind.
        unsafe {
            for slot in (0..BLOCK_TOKENS).step_by(REGISTERS * tokens) {
                let group = |slot: usize| keys.add(slot / KEY_GROUP * KEY_GROUP * pairs + slot % KEY_GROUP);
                let mut sums = [[I::zero(); REGISTERS]; HEADS];
                let bytes = REGISTERS * lanes * size_of::<[i8; 2]>();
                let mut ahead = ahead.steps(steps, bytes);
                for step in 0..steps {
                    ahead.fetch(bytes);
                    let pair = step * (lanes / tokens);
                    let mut row = [I::splat(of.pairs); REGISTERS];
                    for register in 0..REGISTERS {
                        row[register] = I::widen(group(slot + register * tokens).add(pair * KEY_GROUP));
                    }
                    for head in 0..HEADS {
                        let query = I::load(of.pairs.add(head * self.padded / 2 * KEY_GROUP + pair * tokens));
                        for register in 0..REGISTERS {
                            let sum = &mut sums[head][register];
                            *sum = I::add_products(*sum, row[register], query);
                        }
                    }
                }
                for head in 0..HEADS {
                    let scale = I::Floats::splat(*of.scales.add(head));
                    for register in (0..REGISTERS).step_by(2) {
                        let slot = slot + register * tokens;
                        let (scales, to) = (key_scales.0.as_ptr().add(slot), weights.add(head * BLOCK_TOKENS + slot));
                        I::store_tokens([sums[head][register], sums[head][register + 1]], scales, scale, to);
                    }
                }
            }
        }
    }

    /// `out[head] += scales[head] · ` sum over `pairs` of tokens of `weights[head, token] · values[token]`.
    #[expect(clippy::too_many_arguments)]
    #[inline(always)]
    unsafe fn weigh<I: Integers>(
        &self,
        heads: usize,
        values: *const u8,
        weights: *const i16,
        scales: &[f32],
        out: *mut f32,
        pairs: std::ops::Range<usize>,
        ahead: &mut Ahead,
    ) {
        let values = values.cast::<[i8; 2]>();
        let mut head = 0;
        // SAFETY: as the caller's, and every step stays below `heads`.
        unsafe {
            let at = |head: usize| Weigh {
                weights: weights.add(head * BLOCK_TOKENS).cast(),
                scales: scales.as_ptr().add(head),
                out: out.add(head * self.padded),
                pairs: pairs.clone(),
            };
            if I::Floats::TILE == 16 {
                while head + 8 <= heads {
                    self.weigh_heads::<I, 8, 2>(values, &at(head), ahead);
                    head += 8;
                }
                if head + 4 <= heads {
                    self.weigh_heads::<I, 4, 4>(values, &at(head), ahead);
                    head += 4;
                }
                if head + 2 <= heads {
                    self.weigh_heads::<I, 2, 8>(values, &at(head), ahead);
                    head += 2;
                }
                if head < heads {
                    self.weigh_heads::<I, 1, 8>(values, &at(head), ahead);
                }
                return;
            }
            while head + 4 <= heads {
                self.weigh_heads::<I, 4, 2>(values, &at(head), ahead);
                head += 4;
            }
            if head + 2 <= heads {
                self.weigh_heads::<I, 2, 4>(values, &at(head), ahead);
                head += 2;
            }
            if head < heads {
                self.weigh_heads::<I, 1, 8>(values, &at(head), ahead);
            }
        }
    }

    /// `REGISTERS` of columns at a time, then one, then what is left of one.
    #[inline(always)]
    unsafe fn weigh_heads<I: Integers, const HEADS: usize, const REGISTERS: usize>(
        &self,
        values: *const [i8; 2],
        of: &Weigh,
        ahead: &mut Ahead,
    ) {
        let lanes = I::Floats::COUNT;
        let mut column = 0;
        // SAFETY: as the caller's, and every step stays below head_width.
        unsafe {
            while column + REGISTERS * lanes <= self.head_width {
                self.weigh_tile::<I, HEADS, REGISTERS>(values, column, lanes, of, ahead);
                column += REGISTERS * lanes;
            }
            while column + lanes <= self.head_width {
                self.weigh_tile::<I, HEADS, 1>(values, column, lanes, of, ahead);
                column += lanes;
            }
            if column < self.head_width {
                self.weigh_tile::<I, HEADS, 1>(values, column, self.head_width - column, of, ahead);
            }
        }
    }

    /// The tile from `column` on; each register has `columns` of its lanes in a row of V.
    #[inline(always)]
    unsafe fn weigh_tile<I: Integers, const HEADS: usize, const REGISTERS: usize>(
        &self,
        values: *const [i8; 2],
        column: usize,
        columns: usize,
        of: &Weigh,
        ahead: &mut Ahead,
    ) {
        let lanes = I::Floats::COUNT;
        // SAFETY: as the caller's: whole registers of `out` lie within padded.
        unsafe {
            let mut sums = [[I::zero(); REGISTERS]; HEADS];
            let bytes = REGISTERS * lanes * size_of::<[i8; 2]>();
            let mut ahead = ahead.steps(of.pairs.len(), bytes);
            for pair in of.pairs.clone() {
                ahead.fetch(bytes);
                let mut row = [I::splat(of.weights); REGISTERS];
                for register in 0..REGISTERS {
                    let from = values.add(pair * self.head_width + column + register * lanes);
                    row[register] = if columns == lanes {
                        I::widen(from)
                    } else {
                        let mut part = [[0; 2]; WIDEST];
                        std::ptr::copy_nonoverlapping(from, part.as_mut_ptr(), columns);
                        I::widen(part.as_ptr())
                    };
                }
                for head in 0..HEADS {
                    let weight = I::splat(of.weights.add(head * BLOCK_TOKENS / 2 + pair));
                    for register in 0..REGISTERS {
                        let sum = &mut sums[head][register];
                        *sum = I::add_products(*sum, row[register], weight);
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

/// Queries of some heads, the first of them the first that a method is to take: pairs of integers in as many lanes as a register has
/// [`tokens`], and their scales.
struct Query {
    pairs: *const [i16; 2],
    scales: *const f32,
}

/// What the heads of a tile take V with, and where the sum goes.
struct Weigh {
    weights: *const [i16; 2],
    scales: *const f32,
    out: *mut f32,
    pairs: std::ops::Range<usize>,
}
