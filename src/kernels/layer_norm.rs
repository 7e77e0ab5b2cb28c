//! Layer norm over rows (gain, no bias), as DBRX has it.

use crate::checkpoint::Dtype;
use crate::gpu::{Access::*, GpuError, Kernel, Part, Recorder, Slice, Variant, params};

params! {
    /// Immediates of `shaders/layer_norm.wgsl`.
    pub struct Params {
        pub n_rows: u32,
        pub d_model: u32,
        pub eps: f32,
    }
}

pub static LAYER_NORM: Kernel = Kernel {
    name: "layer_norm",
    parts: &[
        Part::Weight,
        Part::Text(include_str!("../../shaders/shared/reduce.wgsl")),
        Part::Text(include_str!("../../shaders/shared/row_quads.wgsl")),
        Part::Text(include_str!("../../shaders/layer_norm.wgsl")),
    ],
    bindings: &[Read, Read, ReadWrite],
    param_bytes: size_of::<Params>(),
    params: Params::FIELDS,
    tunables: &[],
};

/// `y[T, D] = (x[T, D] - mean(x)) / deviation(x) * gain[D]`
pub fn record(
    recorder: &mut Recorder<'_>,
    weights: Dtype,
    params: Params,
    x: Slice<'_>,
    gain: Slice<'_>,
    y: Slice<'_>,
) -> Result<(), GpuError> {
    recorder.dispatch(&LAYER_NORM, &Variant::new(weights), &params, &[x, gain, y], [params.n_rows, 1, 1])
}
