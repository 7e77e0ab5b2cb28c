//! Attention of decode rows over the paged KV of the GPU.

use super::paged_attention::{self, ACCESS, TUNABLES};
pub use super::paged_attention::{Bindings, MAX_HEAD_WIDTH, Params, Row};
use crate::gpu::{GpuError, Kernel, Part, Recorder, Variant};

pub static DECODE_ATTENTION: Kernel = Kernel {
    name: "decode_attention",
    parts: &[
        Part::Text(include_str!("../../shaders/shared/paged_attention.wgsl")),
        Part::Text(include_str!("../../shaders/decode_attention.wgsl")),
    ],
    bindings: ACCESS,
    param_bytes: size_of::<Params>(),
    params: Params::FIELDS,
    tunables: TUNABLES,
};

/// Attends every row of `rows` over its visible tokens, with the bits that `prompt_attention` would give it.
pub fn record(
    recorder: &mut Recorder<'_>,
    variant: &Variant,
    params: Params,
    bindings: Bindings<'_>,
) -> Result<(), GpuError> {
    paged_attention::record(&DECODE_ATTENTION, recorder, variant, params, bindings)
}
