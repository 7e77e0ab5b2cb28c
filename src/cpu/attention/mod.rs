//! Attention of decode rows over the host KV cache: the CPU lane's one job, and one that streams memory.
//!
//! In: per row its query `[H, K]` in f32, how many tokens it sees, and the blocks that hold them. Out: `[H, K]` in f32.
//!
//! The query heads that share a key/value head form a *group*. One group of one row is one task: it walks its blocks in
//! order and reads each K and V once for all its heads, widening f16 in registers.
//!
//! ```text
//! block by block:   scores = q · K           [heads, 32]   tiles of heads × tokens in registers
//!                   m' = max(m, scores)      earlier sums are rescaled by exp(m - m')
//!                   weights = exp(scores - m')
//!                   out += weights · V       [heads, K]    tiles of heads × columns in registers
//! at the end:       out / sum of weights
//! ```
//!
//! A sink, a score that has no value, is where the largest score and the sum of weights begin.
//!
//! Layers, outermost first: [`attend`] checks every bound and shares tasks among threads; a match on the [`Isa`] picks
//! the code; `avx2`, `avx512`, `neon` and `portable` say what a register of lanes is; `group` has the algorithm, once.
//!
//! Guarantees:
//! * **Row independence**: a row's bits depend on its own query, context and cache contents (and on the level), not on other
//!   rows or threads. Sums run in one order: lanes over columns, tokens in turn, blocks at multiples of [`BLOCK_TOKENS`].
//! * NaN in the query or in visible K or V reaches the output as it does in the reference, so that the engine can tell
//!   whose request it was. Slots outside the visible context are not read.
//!
//! Given up: a context is not split over threads, which would help only where rows × G are fewer than threads. Levels do
//! not agree with each other to the last bit: their lanes are of different widths.

mod group;
mod portable;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;

use rayon::prelude::*;

use super::isa::{Isa, Level};
use crate::memory::kv_cache::{BLOCK_TOKENS, BlockTable, KvCache};
use crate::model::AttentionShape;
use group::{Group, Scratch};

/// One decode row to attend.
#[derive(Debug)]
pub struct DecodeRow<'a> {
    /// `[H, K]`
    pub q: &'a [f32],
    /// `[H, K]`, overwritten.
    pub out: &'a mut [f32],
    /// Tokens of the sequence up to and with this row's own, whose K and V are in the cache already. At least 1.
    pub context: usize,
    pub table: &'a BlockTable,
}

/// Attends all `rows` in one layer of the cache, on all threads of `threads`. `sinks`: `[H]`, a score of each query head that
/// joins its softmax and has no value.
pub fn attend(
    isa: Isa,
    cache: &KvCache,
    layer: usize,
    shape: &AttentionShape,
    sinks: Option<&[f32]>,
    rows: &mut [DecodeRow],
    threads: &rayon::ThreadPool,
) {
    let AttentionShape { q_heads, kv_heads, head_width, window, scale } = *shape;
    let layout = cache.layout();
    assert_eq!((kv_heads, head_width), (layout.kv_heads, layout.head_width), "attention and cache differ in [G, K]");
    assert!(q_heads > 0 && q_heads.is_multiple_of(kv_heads), "{kv_heads} KV heads do not divide {q_heads} query heads");
    assert_ne!(window, Some(0), "a window of 0 tokens hides the row itself");
    assert!(sinks.is_none_or(|sinks| sinks.len() == q_heads), "a sink for each of {q_heads} query heads");
    for row in rows.iter() {
        assert_eq!(row.q.len(), q_heads * head_width, "elements of a query row");
        assert_eq!(row.out.len(), q_heads * head_width, "elements of an output row");
        let capacity = row.table.capacity_tokens();
        assert!((1..=capacity).contains(&row.context), "context {} of a table of {capacity} tokens", row.context);
    }

    let heads = shape.heads_per_group();
    threads.install(|| {
        rows.par_iter_mut().for_each(|row| {
            let DecodeRow { q, context, table, .. } = *row;
            let visible = shape.first_visible(context)..context;
            let groups = row.out.par_chunks_exact_mut(heads * head_width).zip(q.par_chunks_exact(heads * head_width));
            groups.enumerate().for_each_init(
                || Scratch::new(heads, head_width),
                |scratch, (kv_head, (out, q))| {
                    let visible = visible.clone();
                    let sinks = sinks.map_or(&[][..], |sinks| &sinks[kv_head * heads..][..heads]);
                    let group = Group { cache, layer, table, kv_head, visible, scale, sinks, q, out };
                    attend_group(isa, group, scratch);
                },
            );
        });
    });
}

fn attend_group(isa: Isa, group: Group, scratch: &mut Scratch) {
    match isa.level() {
        Level::Portable => portable::attend(group, scratch),
        // SAFETY: an `Isa` of this level exists only where `Isa::available` found AVX2, FMA and F16C.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { avx2::attend(group, scratch) },
        // SAFETY: an `Isa` of this level exists only where `Isa::available` found these three and AVX-512F.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { avx512::attend(group, scratch) },
        // SAFETY: an `Isa` of this level exists only where `Isa::available` found NEON.
        #[cfg(target_arch = "aarch64")]
        Level::Neon => unsafe { neon::attend(group, scratch) },
    }
}
