//! A bias onto some columns of every row. Of its own, so that a projection's kernel need not know of it.

use crate::checkpoint::Dtype;
use crate::gpu::{Access::*, GpuError, Kernel, Part, Recorder, Slice, Variant, params};

params! {
    /// Immediates of `shaders/add_bias.wgsl`.
    pub struct Params {
        /// T
        pub n_rows: u32,
        pub n_columns: u32,
        /// Elements from one row of y to the next.
        pub y_stride: u32,
        /// Column of y that the first bias goes to.
        pub y_offset: u32,
    }
}

/// Elements of a row that one workgroup takes.
const COLUMNS_PER_WORKGROUP: u32 = 256;

pub static ADD_BIAS: Kernel = Kernel {
    name: "add_bias",
    parts: &[Part::Text(include_str!("../../shaders/add_bias.wgsl"))],
    bindings: &[Read, ReadWrite],
    param_bytes: size_of::<Params>(),
    params: Params::FIELDS,
    tunables: &[],
};

/// `y[t, y_offset + j] += bias[j]`: `y` is `[T, y_stride]`, `bias` `[n_columns]`, both f32. Other columns are left as they are.
pub fn record(recorder: &mut Recorder<'_>, params: Params, bias: Slice<'_>, y: Slice<'_>) -> Result<(), GpuError> {
    let workgroups = [params.n_rows, params.n_columns.div_ceil(COLUMNS_PER_WORKGROUP), 1];
    recorder.dispatch(&ADD_BIAS, &Variant::new(Dtype::F32), &params, &[bias, y], workgroups)
}
