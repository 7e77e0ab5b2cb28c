//! Rows sorted by expert: where each expert's rows start, and which they are.

use super::MAX_EXPERTS;
use crate::checkpoint::Dtype;
use crate::gpu::{Access::*, GpuError, Kernel, Part, Recorder, Slice, Variant, params};

params! {
    /// Immediates of `shaders/expert_sort.wgsl`.
    pub struct Params {
        /// T * A
        pub n_assignments: u32,
        /// E, at most [`MAX_EXPERTS`]
        pub n_experts: u32,
    }
}

pub static EXPERT_SORT: Kernel = Kernel {
    name: "expert_sort",
    parts: &[Part::Text(include_str!("../../shaders/expert_sort.wgsl"))],
    bindings: &[Read, ReadWrite, ReadWrite],
    param_bytes: size_of::<Params>(),
    params: Params::FIELDS,
    tunables: &[],
};

/// `permutation[T * A]` (u32): the assignments `t * A + rank` in ascending order of (`ids[T * A]`, assignment), and
/// `offsets[E + 1]` (u32): the sorted positions of expert e are `offsets[e]..offsets[e + 1]`. Every id is below E.
pub fn record(
    recorder: &mut Recorder<'_>,
    params: Params,
    ids: Slice<'_>,
    offsets: Slice<'_>,
    permutation: Slice<'_>,
) -> Result<(), GpuError> {
    let n_experts = params.n_experts;
    assert!(n_experts <= MAX_EXPERTS, "expert_sort: {n_experts} experts, at most {MAX_EXPERTS}");
    recorder.dispatch(&EXPERT_SORT, &Variant::new(Dtype::F32), &params, &[ids, offsets, permutation], [n_experts, 1, 1])
}
