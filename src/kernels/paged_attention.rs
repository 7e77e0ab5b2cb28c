//! What `prompt_attention` and `decode_attention` share: parameters, bindings, grid.

use crate::gpu::{Access, Access::*, GpuError, Kernel, Recorder, Slice, Variant, params};

params! {
    /// Immediates of `shaders/shared/paged_attention.wgsl`.
    pub struct Params {
        /// R
        pub n_rows: u32,
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
        /// 1: each query head has a sink, a score that joins its softmax and has no value.
        pub has_sinks: u32,
    }
}

/// Widest head that the shader has workgroup memory for.
pub const MAX_HEAD_WIDTH: u32 = 256;

/// A row to attend: `vec4<u32>` in the shader.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, bytemuck::NoUninit)]
pub struct Row {
    /// t: its row of qkv and of out.
    pub row: u32,
    /// p: its place in its sequence. It sees tokens up to p.
    pub position: u32,
    /// Entry of the block table that names the block of tokens `0..BLOCK_TOKENS` of its sequence.
    pub first_block: u32,
    pub unused: u32,
}

/// What `record` binds.
#[derive(Clone, Copy)]
pub struct Bindings<'a> {
    /// `[T, q_stride]` f32, each row's `[H, K]` query heads first.
    pub qkv: Slice<'a>,
    /// `[R]` [`Row`]
    pub rows: Slice<'a>,
    /// u32: entry `first_block + i` is the block of tokens `i * BLOCK_TOKENS..` of a sequence. Entries of blocks that no row
    /// sees are not used.
    pub block_table: Slice<'a>,
    /// `[blocks, G, 2, BLOCK_TOKENS, K]` f16: K, then V. The rows' own tokens are there already.
    pub kv_blocks: Slice<'a>,
    /// `[T, H, K]` f32: out, only the rows of `rows`.
    pub out: Slice<'a>,
    /// `[H]` f32. Any buffer where there are none.
    pub sinks: Slice<'a>,
}

pub(super) const ACCESS: &[Access] = &[Read, Read, Read, Read, ReadWrite, Read];
pub(super) const TUNABLES: &[(&str, &[u32])] = &[("WG_SIZE", &[32, 64, 128])];

pub(super) fn record(
    kernel: &'static Kernel,
    recorder: &mut Recorder<'_>,
    variant: &Variant,
    params: Params,
    bindings: Bindings<'_>,
) -> Result<(), GpuError> {
    let Params { n_rows, q_heads, kv_heads, head_width, .. } = params;
    assert!(
        head_width.is_multiple_of(2) && head_width <= MAX_HEAD_WIDTH,
        "{}: head width {head_width} is odd or above {MAX_HEAD_WIDTH}",
        kernel.name
    );
    assert!(q_heads.is_multiple_of(kv_heads), "{}: {q_heads} query heads on {kv_heads} KV heads", kernel.name);
    let Bindings { qkv, rows, block_table, kv_blocks, out, sinks } = bindings;
    let workgroups = [n_rows, kv_heads * (q_heads / kv_heads).div_ceil(4), 1];
    recorder.dispatch(kernel, variant, &params, &[qkv, rows, block_table, kv_blocks, out, sinks], workgroups)
}
