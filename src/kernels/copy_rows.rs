//! Rows of words from device to host memory or back, by a kernel: no copy task, and no waiting behind pages.

use crate::checkpoint::Dtype;
use crate::gpu::{Access::*, GpuError, Kernel, Part, Recorder, Slice, Variant, params};

params! {
    /// Immediates of `shaders/copy_rows.wgsl`.
    pub struct Params {
        pub n_rows: u32,
        /// Words of each row that are copied.
        pub row_words: u32,
        /// Words from one row to the next.
        pub from_stride: u32,
        pub to_stride: u32,
    }
}

/// Words that one workgroup copies.
const WORDS_PER_WORKGROUP: u32 = 256;

pub static COPY_ROWS: Kernel = Kernel {
    name: "copy_rows",
    parts: &[Part::Text(include_str!("../../shaders/copy_rows.wgsl"))],
    bindings: &[Read, ReadWrite],
    param_bytes: size_of::<Params>(),
    params: Params::FIELDS,
    tunables: &[],
};

/// Copies the first `row_words` words of every row.
pub fn record(recorder: &mut Recorder<'_>, params: Params, from: Slice<'_>, to: Slice<'_>) -> Result<(), GpuError> {
    let Params { n_rows, row_words, from_stride, to_stride } = params;
    assert!(row_words <= from_stride.min(to_stride), "copy_rows: {row_words} words of rows of {from_stride} and {to_stride}");
    let workgroups = [n_rows, row_words.div_ceil(WORDS_PER_WORKGROUP), 1];
    recorder.dispatch(&COPY_ROWS, &Variant::new(Dtype::F32), &params, &[from, to], workgroups)
}
