//! RMS norm of queries and keys, in place: of each head, or of all heads together.

use crate::checkpoint::Dtype;
use crate::gpu::{Access::*, GpuError, Kernel, Part, Recorder, Slice, Variant, params};

params! {
    /// Immediates of `shaders/qk_norm.wgsl`.
    pub struct Params {
        /// T
        pub n_rows: u32,
        /// Segments of a row: heads, or 1.
        pub n_segments: u32,
        /// Elements of a segment.
        pub width: u32,
        /// Elements from one row to the next.
        pub stride: u32,
        /// Column of the first segment.
        pub offset: u32,
        pub eps: f32,
    }
}

const SEGMENTS_PER_WORKGROUP: u32 = 4;

pub static QK_NORM: Kernel = Kernel {
    name: "qk_norm",
    parts: &[Part::Weight, Part::Text(include_str!("../../shaders/qk_norm.wgsl"))],
    bindings: &[Read, ReadWrite],
    param_bytes: size_of::<Params>(),
    params: Params::FIELDS,
    tunables: &[],
};

/// `segment = segment / rms(segment) * gain[width]` for each segment of `x[T, stride]` (f32). Other columns are left as they are.
pub fn record(
    recorder: &mut Recorder<'_>,
    weights: Dtype,
    params: Params,
    gain: Slice<'_>,
    x: Slice<'_>,
) -> Result<(), GpuError> {
    let workgroups = [params.n_rows, params.n_segments.div_ceil(SEGMENTS_PER_WORKGROUP), 1];
    recorder.dispatch(&QK_NORM, &Variant::new(weights), &params, &[gain, x], workgroups)
}
