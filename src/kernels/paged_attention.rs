//! What the kernels of attention over the paged KV of the GPU share: the shape of it, rows, and what they bind.

use crate::gpu::Slice;

/// Widest head that the shaders have workgroup memory for.
pub const MAX_HEAD_WIDTH: u32 = 256;

/// Heads and what is visible to a row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shape {
    /// H
    pub q_heads: u32,
    /// G, divides H
    pub kv_heads: u32,
    /// K, even, at most [`MAX_HEAD_WIDTH`]
    pub head_width: u32,
    /// Elements from one row of qkv to the next.
    pub q_stride: u32,
    /// Only the last `window` tokens up to the row's own are visible. 0: all of them.
    pub window: u32,
    /// Factor on `q · k`, usually `1 / sqrt(K)`.
    pub scale: f32,
    /// Each query head has a sink, a score that joins its softmax and has no value.
    pub has_sinks: bool,
}

impl Shape {
    /// Query heads of a KV head.
    pub fn group(&self) -> u32 {
        self.q_heads / self.kv_heads
    }

    pub(in crate::kernels) fn check(&self, kernel: &str) {
        let Shape { q_heads, kv_heads, head_width, .. } = *self;
        assert!(
            head_width.is_multiple_of(2) && head_width <= MAX_HEAD_WIDTH,
            "{kernel}: head width {head_width} is odd or above {MAX_HEAD_WIDTH}"
        );
        assert!(q_heads.is_multiple_of(kv_heads), "{kernel}: {q_heads} query heads on {kv_heads} KV heads");
    }
}

/// A row to attend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// t: its row of qkv and of out.
    pub row: u32,
    /// p: its place in its sequence. It sees tokens up to p.
    pub position: u32,
    /// Entry of the block table that names the block of tokens `0..BLOCK_TOKENS` of its sequence.
    pub first_block: u32,
}

/// What they bind beside their lists of rows.
#[derive(Clone, Copy)]
pub struct Bindings<'a> {
    /// `[T, q_stride]` f32, each row's `[H, K]` query heads first.
    pub qkv: Slice<'a>,
    /// u32: entry `first_block + i` is the block of tokens `i * BLOCK_TOKENS..` of a sequence. Entries of blocks that no row
    /// sees are not used.
    pub block_table: Slice<'a>,
    /// `[blocks, G, 2, BLOCK_TOKENS, K]` f16: K, then V. The rows' own tokens are there already.
    pub kv_blocks: Slice<'a>,
    /// `[T, H, K]` f32: out, only the rows that are attended.
    pub out: Slice<'a>,
    /// `[H]` f32. Any buffer where there are none.
    pub sinks: Slice<'a>,
}
