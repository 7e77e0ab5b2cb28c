//! Rotary embedding of the fused projection, and the rounding of K and V to what the KV cache stores.

use crate::checkpoint::Dtype;
use crate::gpu::{Access::*, GpuError, Kernel, Part, Recorder, Slice, Variant, params};

params! {
    /// Immediates of `shaders/rotary.wgsl`.
    pub struct Params {
        /// T
        pub n_rows: u32,
        /// H
        pub q_heads: u32,
        /// G
        pub kv_heads: u32,
        /// K, even
        pub head_width: u32,
        /// Every element is clamped to ±this first; 0: none is.
        pub clip: f32,
    }
}

/// In `kv_slots`: this row's K and V go into no block of the GPU.
pub const NO_SLOT: u32 = u32::MAX;

pub static ROTARY: Kernel = Kernel {
    name: "rotary",
    parts: &[
        Part::Text(include_str!("../../shaders/shared/f16.wgsl")),
        Part::Text(include_str!("../../shaders/rotary.wgsl")),
    ],
    bindings: &[ReadWrite, Read, Read, Read, ReadWrite, ReadWrite],
    param_bytes: size_of::<Params>(),
    params: Params::FIELDS,
    tunables: &[("WG_SIZE", &[256, FEW_PAIRS])],
};

const FEW_PAIRS: u32 = 64;

/// What [`record`] binds.
#[derive(Clone, Copy)]
pub struct Bindings<'a> {
    /// `[T, (H + 2 G) K]` f32: q heads, k heads, v heads. q is rotated in place, k and v stay as they are.
    pub qkv: Slice<'a>,
    /// `[T]` u32, each below P: the caller has checked that.
    pub positions: Slice<'a>,
    /// `[P, K/2]` pairs (cos, sin), from [`rope_table`](crate::reference::rotary::rope_table).
    pub rope_table: Slice<'a>,
    /// `[T]` u32: `block * BLOCK_TOKENS + token in the block`, or [`NO_SLOT`]. No slot occurs twice.
    pub kv_slots: Slice<'a>,
    /// `[T, G, 2, K]` f16: out, per row and head its K, then its V.
    pub kv_rows: Slice<'a>,
    /// `[blocks, G, 2, BLOCK_TOKENS, K]` f16: the slots of these rows are written. Any buffer where every row has no slot.
    pub kv_blocks: Slice<'a>,
}

/// Clamps, rotates the q heads of every row, and writes its rotated k and its v as f16 to `kv_rows` and, where it has a slot, to
/// `kv_blocks`.
pub fn record(recorder: &mut Recorder<'_>, params: Params, bindings: Bindings<'_>) -> Result<(), GpuError> {
    assert!(params.head_width.is_multiple_of(2), "rotary: a head of odd width {} has no pairs", params.head_width);
    let Bindings { qkv, positions, rope_table, kv_slots, kv_rows, kv_blocks } = bindings;
    let pairs = (params.q_heads + 2 * params.kv_heads) * params.head_width / 2;
    // A pair to a lane. A row of few pairs takes a small workgroup: a software adapter runs idle lanes too.
    let variant = Variant::new(Dtype::F32);
    let variant = if pairs <= FEW_PAIRS { variant.with("WG_SIZE", FEW_PAIRS) } else { variant };
    recorder.dispatch(
        &ROTARY,
        &variant,
        &params,
        &[qkv, positions, rope_table, kv_slots, kv_rows, kv_blocks],
        [params.n_rows, pairs.div_ceil(ROTARY.tunable(&variant, "WG_SIZE")), 1],
    )
}
