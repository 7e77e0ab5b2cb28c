//! New rows of K and V to what an 8-bit KV cache stores: integers and scales for the host, and in the GPU's own blocks the f16
//! values that these stand for, so that prompt rows attend over what the cache will hold.

use crate::checkpoint::Dtype;
use crate::gpu::{Access::*, GpuError, Kernel, Part, Recorder, Slice, Variant, params};

params! {
    /// Immediates of `shaders/kv_quantise.wgsl`.
    pub struct Params {
        /// T
        pub n_rows: u32,
        /// G
        pub kv_heads: u32,
        /// K, even
        pub head_width: u32,
    }
}

pub static KV_QUANTISE: Kernel = Kernel {
    name: "kv_quantise",
    parts: &[
        Part::Text(include_str!("../../shaders/shared/f16.wgsl")),
        Part::Text(include_str!("../../shaders/kv_quantise.wgsl")),
    ],
    bindings: &[Read, Read, ReadWrite, ReadWrite],
    param_bytes: size_of::<Params>(),
    params: Params::FIELDS,
    tunables: &[],
};

/// What [`record`] binds.
#[derive(Clone, Copy)]
pub struct Bindings<'a> {
    /// `[T, G, 2, K]` f16, as [`rotary`](super::rotary) leaves them.
    pub kv_rows: Slice<'a>,
    /// `[T]` u32: `block * BLOCK_TOKENS + token in the block`, or [`NO_SLOT`](super::rotary::NO_SLOT).
    pub kv_slots: Slice<'a>,
    /// `[T, G, 2, K/4 + 1]` u32, K/4 rounded up: out, the [new rows](crate::memory::kv_cache::KvLayout::new_row_bytes) of the
    /// host's cache.
    pub new_rows: Slice<'a>,
    /// `[blocks, G, 2, BLOCK_TOKENS, K]` f16: the slots of these rows are written. Any buffer where every row has no slot.
    pub kv_blocks: Slice<'a>,
}

/// Quantises every row.
pub fn record(recorder: &mut Recorder<'_>, params: Params, bindings: Bindings<'_>) -> Result<(), GpuError> {
    assert!(params.head_width.is_multiple_of(2), "kv_quantise: a head of odd width {} has no pairs", params.head_width);
    let Bindings { kv_rows, kv_slots, new_rows, kv_blocks } = bindings;
    recorder.dispatch(
        &KV_QUANTISE,
        &Variant::new(Dtype::F32),
        &params,
        &[kv_rows, kv_slots, new_rows, kv_blocks],
        [params.n_rows, 2 * params.kv_heads, 1],
    )
}
