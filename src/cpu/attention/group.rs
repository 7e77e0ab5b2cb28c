//! The algorithm over K and V in f16, generic over a register of f32 lanes: one key/value head of one row, all query heads that read
//! it. And what it shares with the one over integers: state, softmax, prefetch.
//!
//! Everything here is inlined into the one function per level that switches its instructions on.

// Tiles are arrays indexed by two constants at a time: iterators over both hide which accumulator meets which operand.
#![expect(clippy::needless_range_loop)]

use std::ops::Range;

use half::f16;

use super::int8::{STEP_BLOCKS, STEP_TOKENS};
use super::{BLOCK_TOKENS, BlockTable, KvCache, KvDtype};

/// Lanes of the widest register. Scratch rows are padded to it with zeros.
pub(super) const WIDEST: usize = 16;

/// Accumulators of the largest tile.
const TILE: usize = 16;

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

    /// Accumulators of a tile, whatever its form, at most [`TILE`]: 8 hide the latency of a fused multiply-add on two ports and
    /// leave 16 registers room, 16 load and widen less for each product where there are 32.
    const TILE: usize;

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
    /// The sum over the lanes of each register, in the level's one order. Only the first [`TILE`](Lanes::TILE) of them matter.
    unsafe fn sums(registers: [Self; TILE]) -> [f32; TILE];

    /// e^x for x <= 88, to about 1 ulp. 0 below -87, where e^x would soon leave the normal numbers; NaN stays.
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

/// The query heads of one row that read one key/value head, and tokens of its context.
#[derive(Clone)]
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
    /// What this thread reads after this group, as far as it is known.
    pub next: [Part<'a>; STEP_BLOCKS],
}

impl<'a> Group<'a> {
    /// This head's part of block `index` of the sequence.
    pub fn part(&self, index: usize) -> Part<'a> {
        let layout = self.cache.layout();
        let (keys, scales) = (layout.keys(self.kv_head), layout.key_scales(self.kv_head));
        let block = self.cache.block(self.layer, self.table.blocks()[index]);
        Part {
            keys: &block[keys.clone()],
            values: &block[keys.end..][..keys.len()],
            scales: &block[scales.start..][..2 * scales.len()],
        }
    }

    /// The slots of block `index` that are to be seen.
    pub fn slots(&self, index: usize) -> Range<usize> {
        let first_token = index * BLOCK_TOKENS;
        self.visible.start.saturating_sub(first_token)..BLOCK_TOKENS.min(self.visible.end - first_token)
    }

    /// Keys of block `index`, in f16, that are to be seen.
    pub fn seen_keys(&self, index: usize) -> &'a [u8] {
        let (keys, slots) = (self.part(index).keys, self.slots(index));
        let row_bytes = self.cache.layout().head_width * size_of::<f16>();
        &keys[slots.start * row_bytes..slots.end * row_bytes]
    }

    /// Its parts of as many blocks from `index` on as integers take in a step, as far as they are to be seen.
    pub fn parts_of_step(&self, index: usize) -> [Part<'a>; STEP_BLOCKS] {
        let end = self.visible.end.div_ceil(BLOCK_TOKENS);
        std::array::from_fn(|place| if index + place < end { self.part(index + place) } else { Part::default() })
    }

    /// What is read first from block `index` on: keys that are to be seen, as far as those lie together, and scales.
    pub fn first_parts(&self, index: usize) -> [Part<'a>; STEP_BLOCKS] {
        match self.cache.layout().dtype {
            KvDtype::F16 => {
                let mut parts = [Part::default(); STEP_BLOCKS];
                parts[0].keys = self.seen_keys(index);
                parts
            }
            KvDtype::Int8 => self.parts_of_step(index),
        }
    }
}

/// One head's part of a block.
#[derive(Clone, Copy, Default)]
pub(super) struct Part<'a> {
    pub keys: &'a [u8],
    pub values: &'a [u8],
    /// `[2, BLOCK_TOKENS]` in f16, of keys and of values, where elements have scales.
    pub scales: &'a [u8],
}

/// The softmax and the weighted values of some tokens, as far as they have been taken: nothing yet, or some blocks' worth.
pub(super) struct State {
    pub head_width: usize,
    /// K, rounded up to whole registers of any level.
    pub padded: usize,
    /// `[heads]`: what weights are relative to, the largest score or one not far below it.
    pub max: Vec<f32>,
    /// `[heads, WIDEST]`: sums of weights, lane by lane, relative to `max`.
    pub weight_sums: Vec<CacheLine>,
    /// `[heads, padded]`: sums of weighted values, relative to `max`.
    pub out: Vec<CacheLine>,
}

/// 64-byte aligned, so that no load of scratch crosses a cache line.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
pub(super) struct CacheLine(pub [f32; WIDEST]);

impl CacheLine {
    /// Halves by halves.
    #[inline(always)]
    pub fn sum(&self) -> f32 {
        let mut lanes = self.0;
        let mut width = WIDEST / 2;
        while width > 0 {
            for lane in 0..width {
                lanes[lane] += lanes[lane + width];
            }
            width /= 2;
        }
        lanes[0]
    }
}

pub(super) fn floats(lines: &mut [CacheLine]) -> &mut [f32] {
    bytemuck::cast_slice_mut(lines)
}

fn zeros(elements: usize) -> Vec<CacheLine> {
    vec![CacheLine([0.0; WIDEST]); elements / WIDEST]
}

impl State {
    pub fn new(heads: usize, head_width: usize) -> Self {
        let padded = head_width.next_multiple_of(WIDEST);
        Self {
            head_width,
            padded,
            max: vec![0.0; heads],
            weight_sums: zeros(heads * WIDEST),
            out: zeros(heads * padded),
        }
    }

    pub fn begin(&mut self, sinks: &[f32]) {
        floats(&mut self.out).fill(0.0);
        let weight_sums = floats(&mut self.weight_sums);
        weight_sums.fill(0.0);
        // Not -inf: a first block whose scores are all -inf would make NaN of -inf - -inf, and the weights are to be 0.
        self.max.fill(f32::MIN);
        for (head, sink) in sinks.iter().enumerate() {
            // As if a token before all others had the sink for a score, and zeros for a value.
            self.max[head] = sink.max(f32::MIN);
            weight_sums[head * WIDEST] = 1.0;
        }
    }

    /// Takes in the tokens of `later`, which come after those of `self`. Plain code, inlined where wider registers are on: compilers
    /// keep every rounding, so the same bits on every level.
    #[inline(always)]
    pub fn merge(&mut self, later: &State) {
        for head in 0..self.max.len() {
            // A score that is NaN has made the sums NaN, whatever the maximum became.
            let above = later.max[head] - self.max[head];
            let factor = (-above.abs()).exp();
            let (own, theirs) = if above > 0.0 { (factor, 1.0) } else { (1.0, factor) };
            self.max[head] = self.max[head].max(later.max[head]);
            let own_lines = self.out[head * self.padded / WIDEST..][..self.padded / WIDEST].iter_mut();
            let later_lines = &later.out[head * self.padded / WIDEST..];
            let sums = (&mut self.weight_sums[head], &later.weight_sums[head]);
            for (line, later) in own_lines.zip(later_lines).chain([sums]) {
                // A whole line, then its store: lanes of one register.
                line.0 = std::array::from_fn(|lane| line.0[lane] * own + later.0[lane] * theirs);
            }
        }
    }

    /// Weighted values by the sum of weights: `[heads, K]`.
    pub fn finish(&self, into: &mut [f32]) {
        for (head, result) in into.chunks_exact_mut(self.head_width).enumerate() {
            let out: &[f32] = bytemuck::cast_slice(&self.out[head * self.padded / WIDEST..]);
            let factor = 1.0 / self.weight_sums[head].sum();
            for (result, weighted) in result.iter_mut().zip(out) {
                *result = weighted * factor;
            }
        }
    }
}

/// A thread's working memory for groups of one form: some KiB that stay in its first-level cache.
pub(super) struct Scratch {
    pub heads: usize,
    /// `[heads, padded]`, zeros in the padding.
    pub q: Vec<CacheLine>,
    /// `[heads, STEP_TOKENS]`, or BLOCK_TOKENS over f16: scores, then weights.
    pub weights: Vec<CacheLine>,
    /// Both as 16-bit integers, where K and V are integers, and of queries, `[heads]`, their scales and what sums of products begin with.
    pub q_integers: Vec<CacheLine>,
    pub weight_integers: Vec<CacheLine>,
    pub q_scales: Vec<f32>,
    pub q_sums: Vec<i32>,
    /// `[heads]`: `max` with these scores; the scale of these weights as integers.
    pub new_max: Vec<f32>,
    pub weight_scales: Vec<f32>,
    /// What [`attend`] leaves here.
    pub state: State,
}

impl Scratch {
    pub fn new(heads: usize, head_width: usize) -> Self {
        let state = State::new(heads, head_width);
        Self {
            heads,
            q: zeros(heads * state.padded),
            weights: zeros(heads * STEP_TOKENS),
            q_integers: zeros((heads * state.padded / 2).next_multiple_of(WIDEST)),
            weight_integers: zeros(heads * STEP_TOKENS / 2),
            q_scales: vec![0.0; heads],
            q_sums: vec![0; heads],
            new_max: vec![0.0; heads],
            weight_scales: vec![0.0; heads],
            state,
        }
    }
}

/// Attends one group, into the scratch's state, and joins that to what came before, if it is given.
///
/// # Safety
///
/// * The CPU has the instruction set that `V` stands for.
/// * `scratch` was made for as many heads as `group.q` has, and for the cache's head width.
/// * The cache's elements are f16.
#[inline(always)]
pub(super) unsafe fn attend<V: Lanes>(group: &Group, scratch: &mut Scratch, earlier: Option<&mut State>) {
    const { assert!(WIDEST.is_multiple_of(V::COUNT) && BLOCK_TOKENS.is_multiple_of(WIDEST)) };
    let heads = scratch.heads;
    scratch.state.begin(group.sinks);
    let new_max = &mut scratch.new_max[..];
    let State { head_width, padded, max, weight_sums, out } = &mut scratch.state;
    let (head_width, padded) = (*head_width, *padded);
    let (out, weight_sums) = (floats(out), floats(weight_sums));
    let q = floats(&mut scratch.q);
    let weights = &mut floats(&mut scratch.weights)[..heads * BLOCK_TOKENS];
    for (padded_row, row) in q.chunks_exact_mut(padded).zip(group.q.chunks_exact(head_width)) {
        padded_row[..head_width].copy_from_slice(row);
    }

    let end = group.visible.end.div_ceil(BLOCK_TOKENS);
    let row_bytes = head_width * size_of::<f16>();
    for index in group.visible.start / BLOCK_TOKENS..end {
        let slots = group.slots(index);
        let Part { keys, values, .. } = group.part(index);
        let next_keys = if index + 1 < end { group.seen_keys(index + 1) } else { group.next[0].keys };
        let mut keys_ahead = Ahead::new([next_keys, &[]]);
        let mut values_ahead = Ahead::new([&values[slots.start * row_bytes..slots.end * row_bytes], &[]]);
        if slots.len() < BLOCK_TOKENS {
            weights.fill(f32::NEG_INFINITY);
        }
        let tiles = Tiles { head_width, padded, slots, scale: group.scale };
        // SAFETY: the caller vouches for the CPU and the elements. `keys` and `values` are [BLOCK_TOKENS, K]; `slots` lies within BLOCK_TOKENS,
        // and the scratch rows have the extents that `Scratch` and `State` state.
        unsafe {
            tiles.score::<V>(heads, keys.as_ptr(), q.as_ptr(), weights.as_mut_ptr(), &mut values_ahead);
            rescale::<V, BLOCK_TOKENS>(max, new_max, weights, weight_sums, out, padded);
            let sums = weight_sums.chunks_exact_mut(WIDEST);
            for ((weights, sums), max) in weights.chunks_exact_mut(BLOCK_TOKENS).zip(sums).zip(&*max) {
                exponentials::<V>(weights, *max, sums);
            }
            tiles.weigh::<V>(heads, values.as_ptr(), weights.as_ptr(), out.as_mut_ptr(), &mut keys_ahead);
        }
    }
    if let Some(earlier) = earlier {
        earlier.merge(&scratch.state);
    }
}

/// How far a score may be above what weights are relative to: weights stay below e^8, and what was summed needs no new scale at each
/// new largest score, of which a context has some, at first above all.
const MAX_LAG: f32 = 8.0;

/// Finds for all heads what weights are relative to from now on, about the largest score so far, and takes what was summed before to that.
/// Step by step for all heads, whose steps do not wait for each other.
///
/// # Safety
///
/// * The CPU has the instruction set that `V` stands for.
/// * Lengths: `max` and `new_max` heads, `scores` `[heads, TOKENS]`, `weight_sums` `[heads, WIDEST]`, `out` `[heads, padded]`.
#[inline(always)]
pub(super) unsafe fn rescale<V: Lanes, const TOKENS: usize>(
    max: &mut [f32],
    new_max: &mut [f32],
    scores: &[f32],
    weight_sums: &mut [f32],
    out: &mut [f32],
    padded: usize,
) {
    // SAFETY: the caller vouches for the CPU; each length is a multiple of V::COUNT, and so is each offset.
    unsafe {
        for ((scores, max), new_max) in scores.chunks_exact(TOKENS).zip(&*max).zip(&mut *new_max) {
            let mut largest = V::splat(f32::NEG_INFINITY);
            for scores in scores.chunks_exact(V::COUNT) {
                largest = largest.max(V::load(scores.as_ptr()));
            }
            let largest = largest.max_lane();
            *new_max = if largest <= *max + MAX_LAG { *max } else { largest };
        }
        let sums = weight_sums.chunks_exact_mut(WIDEST).zip(out.chunks_exact_mut(padded));
        for ((weight_sums, out), (max, new_max)) in sums.zip(max.iter_mut().zip(&*new_max)) {
            // A factor of 1 changes no bits, so most steps skip this. A NaN is unequal to itself and does not.
            if new_max != max {
                let factor = V::splat(*max - *new_max).exp();
                for sums in [&mut weight_sums[..], out] {
                    for sums in sums.chunks_exact_mut(V::COUNT) {
                        V::load(sums.as_ptr()).mul(factor).store(sums.as_mut_ptr());
                    }
                }
                *max = *new_max;
            }
        }
    }
}

/// Turns scores into weights, and adds them to their sums.
///
/// # Safety
///
/// * The CPU has the instruction set that `V` stands for.
/// * Lengths: a multiple of WIDEST weights, WIDEST sums.
#[inline(always)]
unsafe fn exponentials<V: Lanes>(weights: &mut [f32], max: f32, sums: &mut [f32]) {
    // SAFETY: as the caller's.
    unsafe {
        let mut sum = V::load(sums.as_ptr());
        for weights in weights.chunks_exact_mut(V::COUNT) {
            // A NaN score makes a NaN weight whatever `max` became.
            let weight = V::load(weights.as_ptr()).sub(V::splat(max)).exp();
            weight.store(weights.as_mut_ptr());
            sum = sum.add(weight);
        }
        sum.store(sums.as_mut_ptr());
    }
}

/// The two products of a block. Each is cut into tiles of [`TILE`](Lanes::TILE) accumulators, heads × tokens or heads × columns, so
/// that a loaded K or V serves several heads and a loaded query several tokens. Every accumulator belongs to one head and
/// one token (or column), so the form of the tiles changes no bits.
struct Tiles {
    /// K
    head_width: usize,
    /// K rounded up: a row of the scratch query and output.
    padded: usize,
    /// The visible slots of this block.
    slots: Range<usize>,
    /// Factor on q · k.
    scale: f32,
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
        keys: *const u8,
        q: *const f32,
        weights: *mut f32,
        ahead: &mut Ahead,
    ) {
        let keys = keys.cast::<f16>();
        let mut head = 0;
        // SAFETY: as the caller's, and every step stays below `heads`.
        unsafe {
            let at = |head: usize| (q.add(head * self.padded), weights.add(head * BLOCK_TOKENS));
            if V::TILE == 16 {
                while head + 8 <= heads {
                    let (q, weights) = at(head);
                    self.score_heads::<V, 8, 2>(keys, q, weights, ahead);
                    head += 8;
                }
                if head + 4 <= heads {
                    let (q, weights) = at(head);
                    self.score_heads::<V, 4, 4>(keys, q, weights, ahead);
                    head += 4;
                }
                if head + 2 <= heads {
                    let (q, weights) = at(head);
                    self.score_heads::<V, 2, 8>(keys, q, weights, ahead);
                    head += 2;
                }
                if head < heads {
                    let (q, weights) = at(head);
                    self.score_heads::<V, 1, 16>(keys, q, weights, ahead);
                }
                return;
            }
            while head + 4 <= heads {
                let (q, weights) = at(head);
                self.score_heads::<V, 4, 2>(keys, q, weights, ahead);
                head += 4;
            }
            if head + 2 <= heads {
                let (q, weights) = at(head);
                self.score_heads::<V, 2, 4>(keys, q, weights, ahead);
                head += 2;
            }
            if head < heads {
                let (q, weights) = at(head);
                self.score_heads::<V, 1, 8>(keys, q, weights, ahead);
            }
        }
    }

    #[inline(always)]
    unsafe fn score_heads<V: Lanes, const HEADS: usize, const TOKENS: usize>(
        &self,
        keys: *const f16,
        q: *const f32,
        weights: *mut f32,
        ahead: &mut Ahead,
    ) {
        let mut slot = self.slots.start;
        // SAFETY: as the caller's, and every step stays below `slots.end`.
        unsafe {
            while slot + TOKENS <= self.slots.end {
                self.score_tile::<V, HEADS, TOKENS>(keys, slot, q, weights, ahead);
                slot += TOKENS;
            }
            while slot < self.slots.end {
                self.score_tile::<V, HEADS, 1>(keys, slot, q, weights, ahead);
                slot += 1;
            }
        }
    }

    /// The tile whose first token is `slot`.
    #[inline(always)]
    unsafe fn score_tile<V: Lanes, const HEADS: usize, const TOKENS: usize>(
        &self,
        keys: *const f16,
        slot: usize,
        q: *const f32,
        weights: *mut f32,
        ahead: &mut Ahead,
    ) {
        const { assert!(HEADS * TOKENS <= TILE) };
        // SAFETY: as the caller's: columns stay below head_width in K, and below padded in q.
        unsafe {
            let keys = keys.add(slot * self.head_width);
            let mut sums = [V::splat(0.0); TILE];
            let bytes = TOKENS * V::COUNT * size_of::<f16>();
            let mut ahead = ahead.steps(self.head_width / V::COUNT, bytes);
            let mut column = 0;
            while column + V::COUNT <= self.head_width {
                ahead.fetch(bytes, CacheLevel::First);
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
                    *weights.add(head * BLOCK_TOKENS + slot + token) = sums[head * TOKENS + token] * self.scale;
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
        values: *const u8,
        weights: *const f32,
        out: *mut f32,
        ahead: &mut Ahead,
    ) {
        let values = values.cast::<f16>();
        let mut head = 0;
        // SAFETY: as the caller's, and every step stays below `heads`.
        unsafe {
            let at = |head: usize| (weights.add(head * BLOCK_TOKENS), out.add(head * self.padded));
            if V::TILE == 16 {
                while head + 8 <= heads {
                    let (weights, out) = at(head);
                    self.weigh_heads::<V, 8, 2>(values, weights, out, ahead);
                    head += 8;
                }
                if head + 4 <= heads {
                    let (weights, out) = at(head);
                    self.weigh_heads::<V, 4, 4>(values, weights, out, ahead);
                    head += 4;
                }
                if head + 2 <= heads {
                    let (weights, out) = at(head);
                    self.weigh_heads::<V, 2, 8>(values, weights, out, ahead);
                    head += 2;
                }
                if head < heads {
                    let (weights, out) = at(head);
                    self.weigh_heads::<V, 1, 8>(values, weights, out, ahead);
                }
                return;
            }
            while head + 4 <= heads {
                let (weights, out) = at(head);
                self.weigh_heads::<V, 4, 2>(values, weights, out, ahead);
                head += 4;
            }
            if head + 2 <= heads {
                let (weights, out) = at(head);
                self.weigh_heads::<V, 2, 4>(values, weights, out, ahead);
                head += 2;
            }
            if head < heads {
                let (weights, out) = at(head);
                self.weigh_heads::<V, 1, 8>(values, weights, out, ahead);
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
                self.weigh_tile::<V, HEADS, REGISTERS>(values.add(column), V::COUNT, weights, out.add(column), ahead);
                column += REGISTERS * V::COUNT;
            }
            while column + V::COUNT <= self.head_width {
                self.weigh_tile::<V, HEADS, 1>(values.add(column), V::COUNT, weights, out.add(column), ahead);
                column += V::COUNT;
            }
            if column < self.head_width {
                self.weigh_tile::<V, HEADS, 1>(
                    values.add(column),
                    self.head_width - column,
                    weights,
                    out.add(column),
                    ahead,
                );
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
        ahead: &mut Ahead,
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
            let bytes = REGISTERS * V::COUNT * size_of::<f16>();
            let mut ahead = ahead.steps(self.slots.len(), bytes);
            for slot in self.slots.clone() {
                ahead.fetch(bytes, CacheLevel::First);
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

/// Bytes that come next, asked of memory as fast as this block's are used up: V during K, the next block's K during V. The
/// hardware's own prefetch does not follow 32 rows read in strips. In small portions, because a core waits for few lines at a time,
/// and what asks for one more stands in front of the arithmetic. A hint on x86-64 and Arm, nothing elsewhere.
pub(super) struct Ahead {
    next: *const u8,
    end: *const u8,
    /// What follows that, elsewhere.
    then: Range<*const u8>,
}

/// What a tile asks for, step by step, without a choice in its inner loop.
pub(super) struct Steps {
    at: *const u8,
    step: usize,
}

impl Ahead {
    pub fn new([bytes, then]: [&[u8]; 2]) -> Self {
        let range = bytes.as_ptr_range();
        Self { next: range.start, end: range.end, then: then.as_ptr_range() }
    }

    /// Some `bytes` for each of so many steps; once all have been asked for, the same line again and again, which costs nothing.
    #[inline(always)]
    pub fn steps(&mut self, steps: usize, bytes: usize) -> Steps {
        if self.next >= self.end {
            (self.next, self.end) = (self.then.start, self.then.end);
            self.then = self.end..self.end;
        }
        let at = self.next;
        if at >= self.end {
            return Steps { at, step: 0 };
        }
        self.next = at.wrapping_add(steps * bytes);
        Steps { at, step: bytes }
    }

    /// Asks for all of it at once: it is little.
    #[inline(always)]
    pub fn fetch_all(start: *const u8, bytes: usize) {
        for line in (0..bytes).step_by(size_of::<CacheLine>()) {
            Self::fetch_line(start.wrapping_add(line), CacheLevel::First);
        }
    }

    #[inline(always)]
    fn fetch_line(line: *const u8, to: CacheLevel) {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
            // SAFETY: hints, which read nothing, whatever the address; every x86-64 CPU has them.
            unsafe {
                match to {
                    CacheLevel::First => _mm_prefetch::<_MM_HINT_T0>(line.cast()),
                    CacheLevel::Second => _mm_prefetch::<_MM_HINT_T1>(line.cast()),
                }
            }
        }
        #[cfg(target_arch = "aarch64")]
        {
            use std::arch::asm;
            // SAFETY: likewise.
            unsafe {
                match to {
                    CacheLevel::First => {
                        asm!("prfm pldl1keep, [{line}]", line = in(reg) line, options(nostack, readonly, preserves_flags));
                    }
                    CacheLevel::Second => {
                        asm!("prfm pldl2keep, [{line}]", line = in(reg) line, options(nostack, readonly, preserves_flags));
                    }
                }
            }
        }
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        let _ = (line, to);
    }
}

/// The level of cache that a line is to come to. On its way to the first it holds one of the few places of what that level waits for, to the
/// second one of three times as many, but is then a dozen cycles away.
#[derive(Clone, Copy)]
pub(super) enum CacheLevel {
    First,
    Second,
}

impl Steps {
    /// Asks for the next step's `bytes`.
    #[inline(always)]
    pub fn fetch(&mut self, bytes: usize, to: CacheLevel) {
        for line in (0..bytes).step_by(size_of::<CacheLine>()) {
            Ahead::fetch_line(self.at.wrapping_add(line), to);
        }
        self.at = self.at.wrapping_add(self.step);
    }
}

/// A register of `lanes` elements, the rest zeros.
///
/// # Safety
///
/// * The CPU has the instruction set that `V` stands for.
/// * `from` is good for `lanes` elements, and `lanes <= V::COUNT`.
#[inline(always)]
unsafe fn load_lanes<V: Lanes>(from: *const f16, lanes: usize) -> V {
    // SAFETY: as the caller's.
    unsafe {
        if lanes == V::COUNT {
            return V::load_f16(from);
        }
        let mut row = [f16::ZERO; WIDEST];
        std::ptr::copy_nonoverlapping(from, row.as_mut_ptr(), lanes);
        V::load_f16(row.as_ptr())
    }
}
