//! The experts' outputs, weighted, onto the residual stream.

use crate::checkpoint::Dtype;
use crate::gpu::{Access::*, GpuError, Kernel, Part, Recorder, Slice, Variant, params};

params! {
    /// Immediates of `shaders/expert_combine.wgsl`.
    pub struct Params {
        /// T
        pub n_rows: u32,
        /// A
        pub n_chosen: u32,
        /// D
        pub d_model: u32,
    }
}

/// Elements of a row that one workgroup takes.
const COLUMNS_PER_WORKGROUP: u32 = 256;

pub static EXPERT_COMBINE: Kernel = Kernel {
    name: "expert_combine",
    parts: &[Part::Text(include_str!("../../shaders/expert_combine.wgsl"))],
    bindings: &[Read, Read, ReadWrite],
    param_bytes: size_of::<Params>(),
    params: Params::FIELDS,
    tunables: &[],
};

/// `x[t] += Σ over rank of weights[t, rank] * y[t * A + rank]`: `weights` is `[T, A]`, `y` `[T * A, D]` by assignment, `x`
/// `[T, D]`, all f32.
pub fn record(
    recorder: &mut Recorder<'_>,
    params: Params,
    weights: Slice<'_>,
    y: Slice<'_>,
    x: Slice<'_>,
) -> Result<(), GpuError> {
    let workgroups = [params.n_rows, params.d_model.div_ceil(COLUMNS_PER_WORKGROUP), 1];
    recorder.dispatch(&EXPERT_COMBINE, &Variant::new(Dtype::F32), &params, &[weights, y, x], workgroups)
}
