//! Which experts a row goes to, and with what weights.

use super::MAX_EXPERTS;
use crate::checkpoint::Dtype;
use crate::gpu::{Access::*, GpuError, Kernel, Part, Recorder, Slice, Variant, params};

params! {
    /// Immediates of `shaders/router_topk.wgsl`.
    pub struct Params {
        /// T
        pub n_rows: u32,
        /// E, at most [`MAX_EXPERTS`]
        pub n_experts: u32,
        /// A, at most [`MAX_CHOSEN`] and at most E
        pub n_chosen: u32,
        /// 1: the weights of a row sum to 1. 0: they are left as the softmax over all E gives them.
        pub renormalise: u32,
    }
}

/// Most experts per token.
pub const MAX_CHOSEN: u32 = 16;

pub static ROUTER_TOPK: Kernel = Kernel {
    name: "router_topk",
    parts: &[
        Part::Text(include_str!("../../shaders/shared/reduce.wgsl")),
        Part::Text(include_str!("../../shaders/router_topk.wgsl")),
    ],
    bindings: &[Read, ReadWrite, ReadWrite],
    param_bytes: size_of::<Params>(),
    params: Params::FIELDS,
    tunables: &[("WG_SIZE", &[64, FEW_EXPERTS])],
};

/// So many experts take a workgroup of as many lanes. Lanes without an expert sum nothing but zeros, so the bits are those of the wide
/// workgroup; a software adapter, which runs lanes one after the other, takes a fifth of the time.
const FEW_EXPERTS: u32 = 8;

/// `ids[T, A]` (u32) of the A largest of `logits[T, E]` (f32), largest first, of equal ones the lower index first; and their
/// `weights[T, A]` (f32). Where a row has a NaN its weights are NaN, and its ids are still distinct and below E.
pub fn record(
    recorder: &mut Recorder<'_>,
    params: Params,
    logits: Slice<'_>,
    ids: Slice<'_>,
    weights: Slice<'_>,
) -> Result<(), GpuError> {
    let Params { n_rows, n_experts, n_chosen, .. } = params;
    assert!(n_experts <= MAX_EXPERTS, "router_topk: {n_experts} experts, at most {MAX_EXPERTS}");
    assert!(
        (1..=n_experts.min(MAX_CHOSEN)).contains(&n_chosen),
        "router_topk: {n_chosen} of {n_experts} experts, at most {MAX_CHOSEN}"
    );
    let variant = Variant::new(Dtype::F32);
    let variant = if n_experts <= FEW_EXPERTS { variant.with("WG_SIZE", FEW_EXPERTS) } else { variant };
    recorder.dispatch(&ROUTER_TOPK, &variant, &params, &[logits, ids, weights], [n_rows, 1, 1])
}
