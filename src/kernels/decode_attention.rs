//! Attention of decode rows over the paged KV of the GPU, split over context.
//!
//! A row's context is cut into parts at multiples of [`SPLIT_TOKENS`], which many workgroups attend at once; `decode_combine` puts them
//! together. What is kept of a part in between lies in a [`Scratch`] of some parts, so rows go in [`Batch`]es that fill it.

use super::decode_combine;
use super::paged_attention::{Bindings, Row, Shape};
use crate::checkpoint::Dtype;
use crate::gpu::{Access::*, GpuError, Kernel, Part as Text, Recorder, Slice, Variant, params};

params! {
    /// Immediates of `shaders/decode_attention.wgsl`.
    pub struct Params {
        pub n_parts: u32,
        /// The batch's first entry of the list of parts.
        pub first_part: u32,
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
    }
}

/// Tokens of a part. Part of a row's order of summation, so no tunable.
pub const SPLIT_TOKENS: u32 = 256;

/// A part of a row's context: `vec4<u32>` in the shader.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, bytemuck::NoUninit)]
pub struct Part {
    /// t of its row.
    pub row: u32,
    /// The row's place in its sequence.
    pub position: u32,
    /// Entry of the block table that names the block of tokens `0..BLOCK_TOKENS` of the sequence.
    pub first_block: u32,
    /// It has the tokens from `number * SPLIT_TOKENS` on.
    pub number: u32,
}

/// Where a row's parts are: `vec4<u32>` in `decode_combine`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, bytemuck::NoUninit)]
pub struct Whole {
    /// t
    pub row: u32,
    /// Counted from its batch's first part.
    pub first_part: u32,
    pub n_parts: u32,
    pub unused: u32,
}

/// Rows whose parts fit the scratch together: ranges of the lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batch {
    pub first_part: u32,
    pub n_parts: u32,
    pub first_row: u32,
    pub n_rows: u32,
}

/// Decode rows as the device needs them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Parts {
    pub parts: Vec<Part>,
    pub wholes: Vec<Whole>,
    pub batches: Vec<Batch>,
}

/// Parts that `tokens` tokens take.
pub fn parts_of(tokens: usize) -> usize {
    tokens.div_ceil(SPLIT_TOKENS as usize)
}

impl Parts {
    /// Parts of `rows`, at most `most` to a batch, which is enough for any one row. Tokens that no layer's window shows
    /// (`widest_window`, 0: there is one that shows all) are in none.
    pub fn new(rows: &[Row], widest_window: u32, most: usize) -> Self {
        let mut all = Parts::default();
        for Row { row, position, first_block } in rows.iter().copied() {
            let end = position + 1;
            let begin = if widest_window == 0 { 0 } else { end.saturating_sub(widest_window) };
            let numbers = begin / SPLIT_TOKENS..end.div_ceil(SPLIT_TOKENS);
            let n_parts = numbers.len() as u32;
            assert!(n_parts as usize <= most, "a row at {position} has {n_parts} parts, {most} fit");
            match all.batches.last_mut() {
                Some(batch) if (batch.n_parts + n_parts) as usize <= most => {
                    batch.n_rows += 1;
                    batch.n_parts += n_parts;
                }
                _ => {
                    let (first_part, first_row) = (all.parts.len() as u32, all.wholes.len() as u32);
                    all.batches.push(Batch { first_part, n_parts, first_row, n_rows: 1 });
                }
            }
            let batch = all.batches.last().expect("there is one by now");
            let first_part = all.parts.len() as u32 - batch.first_part;
            all.wholes.push(Whole { row, first_part, n_parts, unused: 0 });
            all.parts.extend(numbers.map(|number| Part { row, position, first_block, number }));
        }
        all
    }
}

/// What is kept of a batch's parts until they are put together.
#[derive(Clone, Copy)]
pub struct Scratch<'a> {
    /// `[parts, H]` pairs of f32: the greatest score and the sum of weights.
    pub states: Slice<'a>,
    /// `[parts, H, K]` f32: weighted values.
    pub sums: Slice<'a>,
}

/// Bytes of the states and sums of one part.
pub fn scratch_bytes(q_heads: usize, head_width: usize) -> [u64; 2] {
    [8 * q_heads as u64, 4 * (q_heads * head_width) as u64]
}

pub static DECODE_ATTENTION: Kernel = Kernel {
    name: "decode_attention",
    parts: &[
        Text::Text(include_str!("../../shaders/shared/kv_octets.wgsl")),
        Text::Text(include_str!("../../shaders/decode_attention.wgsl")),
    ],
    bindings: &[Read, Read, Read, Read, Read, ReadWrite, ReadWrite],
    param_bytes: size_of::<Params>(),
    params: Params::FIELDS,
    tunables: &[],
};

/// Attends the rows of `batches` over their visible tokens. `parts` and `wholes` are the lists of [`Parts`] that they are of.
pub fn record(
    recorder: &mut Recorder<'_>,
    shape: &Shape,
    batches: &[Batch],
    [parts, wholes]: [Slice<'_>; 2],
    scratch: Scratch<'_>,
    bindings: Bindings<'_>,
) -> Result<(), GpuError> {
    shape.check(DECODE_ATTENTION.name);
    let Shape { q_heads, kv_heads, head_width, q_stride, window, scale, has_sinks } = *shape;
    let Bindings { qkv, block_table, kv_blocks, out, sinks } = bindings;
    let Scratch { states, sums } = scratch;
    for Batch { first_part, n_parts, first_row, n_rows } in batches.iter().copied() {
        let params = Params { n_parts, first_part, q_heads, kv_heads, head_width, q_stride, window, scale };
        recorder.dispatch(
            &DECODE_ATTENTION,
            &Variant::new(Dtype::F32),
            &params,
            &[qkv, parts, block_table, kv_blocks, kv_blocks, states, sums],
            [n_parts, kv_heads * shape.group().div_ceil(4), 1],
        )?;
        let params = decode_combine::Params { n_rows, first_row, q_heads, head_width, has_sinks: has_sinks as u32 };
        decode_combine::record(recorder, params, wholes, scratch, sinks, out)?;
    }
    Ok(())
}
