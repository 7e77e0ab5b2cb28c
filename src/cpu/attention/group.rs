//! The algorithm, generic over a register of f32 lanes: one key/value head of one row, all query heads that read it.
//!
//! Everything here is inlined into the one function per level that switches its instructions on.

// Tiles are arrays indexed by two constants at a time: iterators over both hide which accumulator meets which operand.
#![expect(clippy::needless_range_loop)]

use std::ops::Range;

use half::f16;

use super::{BLOCK_TOKENS, BlockTable, KvCache};

/// Lanes of the widest register. Scratch rows are padded to it with zeros.
const WIDEST: usize = 16;

/// Accumulators of a tile, whatever its form: enough to hide the latency of a fused multiply-add on two ports, few
/// enough for 16 registers.
const TILE: usize = 8;

/// A register of f32 lanes.
///
/// # Safety
///
/// Callers of any method owe it:
/// * the CPU has the instruction set that the type stands for;
/// * a pointer is good for [`COUNT`](Lanes::COUNT) elements. No alignment is asked for.
pub(super) trait Lanes: Copy {
    /// Lanes of a register: a power of two, at most [`WIDEST`].
    const COUNT: usize;

    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    /// Widens exactly: subnormals, infinities and NaN included.
    unsafe fn load_f16(from: *const f16) -> Self;
    unsafe fn store(self, to: *mut f32);

    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    /// `self * factor + addend`, rounded once where the level has the instruction.
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self;
    /// Where a lane is NaN on either side, either side's value.
    unsafe fn max(self, other: Self) -> Self;
    /// 2^n, where the bits of `self` are those of 1.5 * 2^23 + n and 2^n is a normal number. Else anything.
    unsafe fn pow2(self) -> Self;
    /// 0 in lanes where `x < limit`. A lane where x is NaN stays.
    unsafe fn zero_where_below(self, x: Self, limit: Self) -> Self;

    /// The largest lane; any lane if one is NaN.
    unsafe fn max_lane(self) -> f32;
    /// The sum over the lanes of each register, in the level's one order.
    unsafe fn sums(registers: [Self; TILE]) -> [f32; TILE];

    /// The first `count` elements, then zeros. Here `from` is good for `count` elements only.
    #[inline(always)]
    unsafe fn load_f16_first(from: *const f16, count: usize) -> Self {
        let mut row = [f16::ZERO; WIDEST];
        // SAFETY: the caller's `from` holds `count` elements, fewer than a register; `row` holds the widest one.
        unsafe {
            std::ptr::copy_nonoverlapping(from, row.as_mut_ptr(), count);
            Self::load_f16(row.as_ptr())
        }
    }

    /// e^x for x <= 0, to about 1 ulp. 0 below -87, where e^x would soon leave the normal numbers; NaN stays.
    #[inline(always)]
    unsafe fn exp(self) -> Self {
        // e^x = 2^n * e^r with n = round(x / ln 2), |r| <= ln 2 / 2. Adding 1.5 * 2^23 rounds to an integer and leaves n in
        // the low bits. ln 2 comes in two parts, the first so short that n times it is exact. The polynomial is that of
        // Cephes' expf.
        // SAFETY: the caller vouches for the CPU; no pointers.
        unsafe {
            let magic = Self::splat(12_582_912.0);
            let shifted = self.mul_add(Self::splat(std::f32::consts::LOG2_E), magic);
            let n = shifted.sub(magic);
            let r = n.mul_add(Self::splat(-355.0 / 512.0), self);
            let r = n.mul_add(Self::splat(2.121_944_4e-4), r);
            let mut poly = Self::splat(1.987_569_1e-4);
            for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
                poly = poly.mul_add(r, Self::splat(coefficient));
            }
            let poly = poly.mul_add(r.mul(r), r).add(Self::splat(1.0));
            poly.mul(shifted.pow2()).zero_where_below(self, Self::splat(-87.0))
        }
    }
}

/// One task: the query heads of one row that read one key/value head.
pub(super) struct Group<'a> {
    pub cache: &'a KvCache,
    pub layer: usize,
    pub table: &'a BlockTable,
    pub kv_head: usize,
    /// Tokens to attend. Not empty, and inside the table.
    pub visible: Range<usize>,
    pub scale: f32,
    /// `[heads]`: scores without a value that join the softmax; or empty.
    pub sinks: &'a [f32],
    /// `[heads, K]`
    pub q: &'a [f32],
    /// `[heads, K]`
    pub out: &'a mut [f32],
}

/// A thread's working memory for groups of one form: some KiB that stay in its first-level cache.
pub(super) struct Scratch {
    heads: usize,
    head_width: usize,
    /// K, rounded up to whole registers of any level.
    padded: usize,
    /// `[heads, padded]`, zeros in the padding.
    q: Vec<CacheLine>,
    /// `[heads, padded]`: sums of weighted values, relative to `max`.
    out: Vec<CacheLine>,
    /// `[heads, BLOCK_TOKENS]`: one block's scores, then its weights.
    weights: Vec<CacheLine>,
    /// `[heads, WIDEST]`: sums of weights, lane by lane, relative to `max`.
    weight_sums: Vec<CacheLine>,
    /// `[heads]`: largest score so far.
    max: Vec<f32>,
}

/// 64-byte aligned, so that no load of scratch crosses a cache line.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct CacheLine([f32; WIDEST]);

fn floats(lines: &mut [CacheLine]) -> &mut [f32] {
    bytemuck::cast_slice_mut(lines)
}

impl Scratch {
    pub fn new(heads: usize, head_width: usize) -> Self {
        let padded = head_width.next_multiple_of(WIDEST);
        let zeros = |elements: usize| vec![CacheLine([0.0; WIDEST]); elements / WIDEST];
        Self {
            heads,
            head_width,
            padded,
            q: zeros(heads * padded),
            out: zeros(heads * padded),
            weights: zeros(heads * BLOCK_TOKENS),
            weight_sums: zeros(heads * WIDEST),
            max: vec![0.0; heads],
        }
    }
}

/// Attends one group.
///
/// # Safety
///
/// * The CPU has the instruction set that `V` stands for.
/// * `scratch` was made for as many heads as `group.q` and `group.out` have, and for the cache's head width.
#[inline(always)]
pub(super) unsafe fn attend<V: Lanes>(group: Group, scratch: &mut Scratch) {
    const { assert!(WIDEST.is_multiple_of(V::COUNT) && BLOCK_TOKENS.is_multiple_of(WIDEST)) };
    let Scratch { heads, head_width, padded, .. } = *scratch;
    let q = floats(&mut scratch.q);
    let out = floats(&mut scratch.out);
    let weights = floats(&mut scratch.weights);
    let weight_sums = floats(&mut scratch.weight_sums);
    for (padded_row, row) in q.chunks_exact_mut(padded).zip(group.q.chunks_exact(head_width)) {
        padded_row[..head_width].copy_from_slice(row);
    }
    out.fill(0.0);
    weight_sums.fill(0.0);
    // Not -inf: a first block whose scores are all -inf would make NaN of -inf - -inf, and the weights are to be 0.
    scratch.max.fill(f32::MIN);
    for (head, sink) in group.sinks.iter().enumerate() {
        // As if a token before all others had the sink for a score, and zeros for a value.
        scratch.max[head] = sink.max(f32::MIN);
        weight_sums[head * WIDEST] = 1.0;
    }

    // One block's K rows and V rows.
    let rows = group.cache.layout().keys(group.kv_head);
    let block_rows = |block| group.cache.block(group.layer, block)[rows.start..][..2 * rows.len()].split_at(rows.len());
    let blocks = &group.table.blocks()[..group.visible.end.div_ceil(BLOCK_TOKENS)];
    for index in group.visible.start / BLOCK_TOKENS..blocks.len() {
        let first_token = index * BLOCK_TOKENS;
        let slots = group.visible.start.saturating_sub(first_token)..BLOCK_TOKENS.min(group.visible.end - first_token);
        let (keys, values) = block_rows(blocks[index]);
        let values_ahead = Ahead(&values[slots.start * head_width..slots.end * head_width]);
        let keys_ahead = Ahead(blocks.get(index + 1).map_or(&[], |&next| block_rows(next).0));
        if slots.len() < BLOCK_TOKENS {
            weights.fill(f32::NEG_INFINITY);
        }
        let tiles = Tiles { head_width, padded, slots };
        // SAFETY: the caller vouches for the CPU. `keys` and `values` are [BLOCK_TOKENS, K], `slots` lies within
        // BLOCK_TOKENS, and the scratch rows have the extents that `Scratch` states.
        unsafe {
            tiles.score::<V>(heads, keys.as_ptr(), q.as_ptr(), group.scale, weights.as_mut_ptr(), values_ahead);
            for head in 0..heads {
                let weights = &mut weights[head * BLOCK_TOKENS..][..BLOCK_TOKENS];
                let weight_sums = &mut weight_sums[head * WIDEST..][..WIDEST];
                softmax_step::<V>(&mut scratch.max[head], weights, weight_sums, &mut out[head * padded..][..padded]);
            }
            tiles.weigh::<V>(heads, values.as_ptr(), weights.as_ptr(), out.as_mut_ptr(), keys_ahead);
        }
    }

    for (head, result) in group.out.chunks_exact_mut(head_width).enumerate() {
        // SAFETY: the caller vouches for the CPU; a row of `weight_sums` has the lanes of the widest register.
        let [weight_sum, ..] = unsafe { V::sums([V::load(weight_sums[head * WIDEST..].as_ptr()); TILE]) };
        for (result, weighted) in result.iter_mut().zip(&out[head * padded..]) {
            *result = weighted / weight_sum;
        }
    }
}

/// Turns one head's scores into weights relative to the largest score so far, and what was summed before with them.
///
/// # Safety
///
/// * The CPU has the instruction set that `V` stands for.
/// * Lengths: `weights` BLOCK_TOKENS, `weight_sums` WIDEST, `out` a multiple of WIDEST.
#[inline(always)]
unsafe fn softmax_step<V: Lanes>(max: &mut f32, weights: &mut [f32], weight_sums: &mut [f32], out: &mut [f32]) {
    // SAFETY: the caller vouches for the CPU; each length is a multiple of V::COUNT, and so is each offset.
    unsafe {
        let mut block_max = V::splat(*max);
        for weights in weights.chunks_exact(V::COUNT) {
            block_max = block_max.max(V::load(weights.as_ptr()));
        }
        let new_max = block_max.max_lane();
        // A factor of 1 changes no bits, so most blocks skip this. A NaN is unequal to itself and does not.
        if new_max != *max {
            let factor = V::splat(*max - new_max).exp();
            for sums in [&mut weight_sums[..], out] {
                for sums in sums.chunks_exact_mut(V::COUNT) {
                    V::load(sums.as_ptr()).mul(factor).store(sums.as_mut_ptr());
                }
            }
            *max = new_max;
        }
        let mut sums = V::load(weight_sums.as_ptr());
        for weights in weights.chunks_exact_mut(V::COUNT) {
            // A NaN score makes a NaN weight whatever `new_max` became.
            let weight = V::load(weights.as_ptr()).sub(V::splat(new_max)).exp();
            weight.store(weights.as_mut_ptr());
            sums = sums.add(weight);
        }
        sums.store(weight_sums.as_mut_ptr());
    }
}

/// The two products of a block. Each is cut into tiles of [`TILE`] accumulators, heads × tokens or heads × columns, so
/// that a loaded K or V serves several heads and a loaded query several tokens. Every accumulator belongs to one head and
/// one token (or column), so the form of the tiles changes no bits.
struct Tiles {
    /// K
    head_width: usize,
    /// K rounded up: a row of the scratch query and output.
    padded: usize,
    /// The visible slots of this block.
    slots: Range<usize>,
}

/// # Safety
///
/// Callers of any method owe it:
/// * the CPU has the instruction set that `V` stands for;
/// * pointers to K or V: [BLOCK_TOKENS, head_width]; to queries or outputs: [heads, padded], from the first head that the
///   method is to take; to weights: [heads, BLOCK_TOKENS], likewise;
/// * `slots` ends at BLOCK_TOKENS or before.
impl Tiles {
    /// `weights[head, slot] = scale * (q[head] · keys[slot])` for all visible slots.
    #[inline(always)]
    unsafe fn score<V: Lanes>(
        &self,
        heads: usize,
        keys: *const f16,
        q: *const f32,
        scale: f32,
        weights: *mut f32,
        mut ahead: Ahead,
    ) {
        let mut head = 0;
        // SAFETY: as the caller's, and every step stays below `heads`.
        unsafe {
            let at = |head: usize| (q.add(head * self.padded), weights.add(head * BLOCK_TOKENS));
            while head + 4 <= heads {
                let (q, weights) = at(head);
                self.score_heads::<V, 4, 2>(keys, q, scale, weights, &mut ahead);
                head += 4;
            }
            if head + 2 <= heads {
                let (q, weights) = at(head);
                self.score_heads::<V, 2, 4>(keys, q, scale, weights, &mut ahead);
                head += 2;
            }
            if head < heads {
                let (q, weights) = at(head);
                self.score_heads::<V, 1, 8>(keys, q, scale, weights, &mut ahead);
            }
        }
    }

    #[inline(always)]
    unsafe fn score_heads<V: Lanes, const HEADS: usize, const TOKENS: usize>(
        &self,
        keys: *const f16,
        q: *const f32,
        scale: f32,
        weights: *mut f32,
        ahead: &mut Ahead,
    ) {
        let mut slot = self.slots.start;
        // SAFETY: as the caller's, and every step stays below `slots.end`.
        unsafe {
            while slot + TOKENS <= self.slots.end {
                ahead.fetch(TOKENS * self.head_width);
                self.score_tile::<V, HEADS, TOKENS>(keys.add(slot * self.head_width), q, scale, weights.add(slot));
                slot += TOKENS;
            }
            while slot < self.slots.end {
                self.score_tile::<V, HEADS, 1>(keys.add(slot * self.head_width), q, scale, weights.add(slot));
                slot += 1;
            }
        }
    }

    /// `keys` and `weights` point at the tile's first token.
    #[inline(always)]
    unsafe fn score_tile<V: Lanes, const HEADS: usize, const TOKENS: usize>(
        &self,
        keys: *const f16,
        q: *const f32,
        scale: f32,
        weights: *mut f32,
    ) {
        const { assert!(HEADS * TOKENS <= TILE) };
        // SAFETY: as the caller's: columns stay below head_width in K, and below padded in q.
        unsafe {
            let mut sums = [V::splat(0.0); TILE];
            let mut column = 0;
            while column + V::COUNT <= self.head_width {
                self.score_columns::<V, HEADS, TOKENS>(keys.add(column), V::COUNT, q.add(column), &mut sums);
                column += V::COUNT;
            }
            if column < self.head_width {
                let lanes = self.head_width - column;
                self.score_columns::<V, HEADS, TOKENS>(keys.add(column), lanes, q.add(column), &mut sums);
            }
            let sums = V::sums(sums);
            for head in 0..HEADS {
                for token in 0..TOKENS {
                    *weights.add(head * BLOCK_TOKENS + token) = sums[head * TOKENS + token] * scale;
                }
            }
        }
    }

    /// One register of columns of a tile; `keys` and `q` point at the first column, each K row has `lanes` of them.
    #[inline(always)]
    unsafe fn score_columns<V: Lanes, const HEADS: usize, const TOKENS: usize>(
        &self,
        keys: *const f16,
        lanes: usize,
        q: *const f32,
        sums: &mut [V; TILE],
    ) {
        // SAFETY: as the caller's: `lanes` columns lie within head_width, V::COUNT within padded.
        unsafe {
            let mut query = [V::splat(0.0); HEADS];
            for head in 0..HEADS {
                query[head] = V::load(q.add(head * self.padded));
            }
            for token in 0..TOKENS {
                let key = load_lanes::<V>(keys.add(token * self.head_width), lanes);
                for head in 0..HEADS {
                    let sum = &mut sums[head * TOKENS + token];
                    *sum = key.mul_add(query[head], *sum);
                }
            }
        }
    }

    /// `out[head] += ` sum over visible slots of `weights[head, slot] * values[slot]`.
    #[inline(always)]
    unsafe fn weigh<V: Lanes>(
        &self,
        heads: usize,
        values: *const f16,
        weights: *const f32,
        out: *mut f32,
        mut ahead: Ahead,
    ) {
        let mut head = 0;
        // SAFETY: as the caller's, and every step stays below `heads`.
        unsafe {
            let at = |head: usize| (weights.add(head * BLOCK_TOKENS), out.add(head * self.padded));
            while head + 4 <= heads {
                let (weights, out) = at(head);
                self.weigh_heads::<V, 4, 2>(values, weights, out, &mut ahead);
                head += 4;
            }
            if head + 2 <= heads {
                let (weights, out) = at(head);
                self.weigh_heads::<V, 2, 4>(values, weights, out, &mut ahead);
                head += 2;
            }
            if head < heads {
                let (weights, out) = at(head);
                self.weigh_heads::<V, 1, 8>(values, weights, out, &mut ahead);
            }
        }
    }

    /// `REGISTERS` of columns at a time, then one, then what is left of one.
    #[inline(always)]
    unsafe fn weigh_heads<V: Lanes, const HEADS: usize, const REGISTERS: usize>(
        &self,
        values: *const f16,
        weights: *const f32,
        out: *mut f32,
        ahead: &mut Ahead,
    ) {
        let mut column = 0;
        // SAFETY: as the caller's, and every step stays below head_width.
        unsafe {
            while column + REGISTERS * V::COUNT <= self.head_width {
                ahead.fetch(BLOCK_TOKENS * REGISTERS * V::COUNT);
                self.weigh_tile::<V, HEADS, REGISTERS>(values.add(column), V::COUNT, weights, out.add(column));
                column += REGISTERS * V::COUNT;
            }
            while column + V::COUNT <= self.head_width {
                self.weigh_tile::<V, HEADS, 1>(values.add(column), V::COUNT, weights, out.add(column));
                column += V::COUNT;
            }
            if column < self.head_width {
                self.weigh_tile::<V, HEADS, 1>(values.add(column), self.head_width - column, weights, out.add(column));
            }
        }
    }

    /// `values` and `out` point at the tile's first column; each V row has `lanes` elements for each register.
    #[inline(always)]
    unsafe fn weigh_tile<V: Lanes, const HEADS: usize, const REGISTERS: usize>(
        &self,
        values: *const f16,
        lanes: usize,
        weights: *const f32,
        out: *mut f32,
    ) {
        const { assert!(HEADS * REGISTERS <= TILE) };
        // SAFETY: as the caller's: V::COUNT columns of `out` lie within padded.
        unsafe {
            let mut sums = [[V::splat(0.0); REGISTERS]; HEADS];
            for head in 0..HEADS {
                for register in 0..REGISTERS {
                    sums[head][register] = V::load(out.add(head * self.padded + register * V::COUNT));
                }
            }
            for slot in self.slots.clone() {
                let mut row = [V::splat(0.0); REGISTERS];
                for (register, row) in row.iter_mut().enumerate() {
                    *row = load_lanes::<V>(values.add(slot * self.head_width + register * V::COUNT), lanes);
                }
                for head in 0..HEADS {
                    let weight = V::splat(*weights.add(head * BLOCK_TOKENS + slot));
                    for register in 0..REGISTERS {
                        sums[head][register] = row[register].mul_add(weight, sums[head][register]);
                    }
                }
            }
            for head in 0..HEADS {
                for register in 0..REGISTERS {
                    sums[head][register].store(out.add(head * self.padded + register * V::COUNT));
                }
            }
        }
    }
}

/// Rows that come next, asked of memory a little at a time while this block computes: V during K, the next block's K during
/// V. The hardware's own prefetch does not follow 32 rows read in strips. A third faster on 1 thread of a 2-core EPYC (AVX2,
/// contexts 128 to 2048: 8 GB/s without, 11 to 12 with). Nothing outside x86-64: stable Rust has no hint there.
struct Ahead<'a>(&'a [f16]);

impl Ahead<'_> {
    /// Asks for the next `elements`, as far as there are any.
    #[inline(always)]
    fn fetch(&mut self, elements: usize) {
        let (now, later) = self.0.split_at(elements.min(self.0.len()));
        #[cfg(target_arch = "x86_64")]
        for line in now.chunks(size_of::<CacheLine>() / size_of::<f16>()) {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            // SAFETY: a hint, which reads nothing; every x86-64 CPU has it.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = now;
        self.0 = later;
    }
}

/// A register of `lanes` f16 elements, the rest zeros.
///
/// # Safety
///
/// * The CPU has the instruction set that `V` stands for.
/// * `from` is good for `lanes` elements, and `lanes <= V::COUNT`.
#[inline(always)]
unsafe fn load_lanes<V: Lanes>(from: *const f16, lanes: usize) -> V {
    // SAFETY: as the caller's.
    unsafe { if lanes == V::COUNT { V::load_f16(from) } else { V::load_f16_first(from, lanes) } }
}
