//! Causal attention of prompt rows over the paged KV of the GPU.
//!
//! Rows are cut into [`Tile`]s on the host, as many as there are: sequences of all lengths lie side by side and nothing is padded.

use super::paged_attention::{Bindings, Row, Shape};
use crate::checkpoint::Dtype;
use crate::gpu::{Access::*, GpuError, Kernel, Part, Recorder, Slice, Variant, params};

params! {
    /// Immediates of `shaders/prompt_attention.wgsl`.
    pub struct Params {
        pub n_tiles: u32,
        /// H
        pub q_heads: u32,
        /// G, divides H
        pub kv_heads: u32,
        /// K
        pub head_width: u32,
        /// Elements from one row of qkv to the next.
        pub q_stride: u32,
        /// Only the last `window` tokens up to the row's own are visible. 0: all of them.
        pub window: u32,
        /// Factor on `q · k`.
        pub scale: f32,
        /// 1: there are sinks.
        pub has_sinks: u32,
    }
}

impl Params {
    pub(super) fn new(shape: &Shape, n_tiles: usize) -> Self {
        let Shape { q_heads, kv_heads, head_width, q_stride, window, scale, has_sinks } = *shape;
        let (n_tiles, has_sinks) = (n_tiles as u32, has_sinks as u32);
        Self { n_tiles, q_heads, kv_heads, head_width, q_stride, window, scale, has_sinks }
    }
}

/// Consecutive tokens of one sequence, in consecutive rows: `vec4<u32>` in the shaders.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, bytemuck::NoUninit)]
pub struct Tile {
    /// t of the first.
    pub row: u32,
    /// Its place in its sequence.
    pub position: u32,
    /// Entry of the block table that names the block of tokens `0..BLOCK_TOKENS` of the sequence.
    pub first_block: u32,
    pub n_tokens: u32,
}

/// `rows` in tiles of at most `most_tokens` tokens, those with most to do first, so that no long one is left for the end.
/// Where they are cut changes no bit.
pub fn tiles(rows: &[Row], most_tokens: u32) -> Vec<Tile> {
    let mut tiles: Vec<Tile> = Vec::new();
    for row in rows {
        match tiles.last_mut() {
            Some(tile)
                if tile.n_tokens < most_tokens
                    && tile.first_block == row.first_block
                    && tile.row + tile.n_tokens == row.row
                    && tile.position + tile.n_tokens == row.position =>
            {
                tile.n_tokens += 1;
            }
            _ => {
                let Row { row, position, first_block } = *row;
                tiles.push(Tile { row, position, first_block, n_tokens: 1 });
            }
        }
    }
    tiles.sort_by_key(|tile| std::cmp::Reverse(tile.position + tile.n_tokens));
    tiles
}

/// Rows, one per token and query head, that a workgroup takes.
const TILE_ROWS: u32 = 32;

pub static PROMPT_ATTENTION: Kernel = Kernel {
    name: "prompt_attention",
    parts: &[
        Part::Text(include_str!("../../shaders/shared/kv_words.wgsl")),
        Part::Text(include_str!("../../shaders/prompt_attention.wgsl")),
    ],
    bindings: &[Read, Read, Read, Read, ReadWrite, Read],
    param_bytes: size_of::<Params>(),
    params: Params::FIELDS,
    tunables: &[],
};

/// Pieces in which a KV head's query heads are taken: one, unless they are more than a workgroup's rows.
fn head_pieces(shape: &Shape) -> u32 {
    shape.group().div_ceil(TILE_ROWS)
}

/// Most tokens of a tile.
pub fn tile_tokens(shape: &Shape) -> u32 {
    TILE_ROWS / shape.group().div_ceil(head_pieces(shape))
}

/// Attends every row of `list`, the `n_tiles` [`Tile`]s that [`tiles`] made of at most [`tile_tokens`] tokens, over its visible tokens.
/// Neither the other rows nor the cut of a prompt into chunks change a bit.
pub fn record(
    recorder: &mut Recorder<'_>,
    shape: &Shape,
    (list, n_tiles): (Slice<'_>, usize),
    bindings: Bindings<'_>,
) -> Result<(), GpuError> {
    shape.check(PROMPT_ATTENTION.name);
    let Bindings { qkv, block_table, kv_blocks, out, sinks } = bindings;
    recorder.dispatch(
        &PROMPT_ATTENTION,
        &Variant::new(Dtype::F32),
        &Params::new(shape, n_tiles),
        &[qkv, list, block_table, kv_blocks, out, sinks],
        [shape.kv_heads, n_tiles as u32, head_pieces(shape)],
    )
}
