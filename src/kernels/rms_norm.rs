//! RMS norm over rows.

use crate::checkpoint::Dtype;
use crate::gpu::{Access::*, GpuError, Kernel, Part, Recorder, Slice, Variant, params};

params! {
    /// Immediates of `shaders/rms_norm.wgsl`.
    pub struct Params {
        pub n_rows: u32,
        pub d_model: u32,
        pub eps: f32,
    }
}

pub static RMS_NORM: Kernel = Kernel {
    name: "rms_norm",
    parts: &[
        Part::Weight,
        Part::Text(include_str!("../../shaders/shared/reduce.wgsl")),
        Part::Text(include_str!("../../shaders/shared/row_quads.wgsl")),
        Part::Text(include_str!("../../shaders/rms_norm.wgsl")),
    ],
    bindings: &[Read, Read, ReadWrite],
    param_bytes: size_of::<Params>(),
    params: Params::FIELDS,
    tunables: &[("WG_SIZE", &[256, NARROW])],
};

/// Rows up to this width take a workgroup of as many lanes. Lanes beyond a row sum nothing but zeros, so the bits are those of the wide
/// workgroup; a software adapter, which runs lanes one after the other, takes a fifth of the time.
const NARROW: u32 = 64;

/// `y[T, D] = x[T, D] / rms(x) * gain[D]`
pub fn record(
    recorder: &mut Recorder<'_>,
    weights: Dtype,
    params: Params,
    x: Slice<'_>,
    gain: Slice<'_>,
    y: Slice<'_>,
) -> Result<(), GpuError> {
    let variant = Variant::new(weights);
    let variant = if params.d_model <= NARROW { variant.with("WG_SIZE", NARROW) } else { variant };
    recorder.dispatch(&RMS_NORM, &variant, &params, &[x, gain, y], [params.n_rows, 1, 1])
}
