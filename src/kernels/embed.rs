//! Rows of a table by number: token embeddings, or a gather of rows of the residual stream (an f32 "table").

use crate::checkpoint::Dtype;
use crate::gpu::{Access::*, GpuError, Kernel, Part, Recorder, Slice, Variant, params};

params! {
    /// Immediates of `shaders/embed.wgsl`.
    pub struct Params {
        pub n_rows: u32,
        pub d_model: u32,
    }
}

/// Elements of a row that one workgroup copies.
const COLUMNS_PER_WORKGROUP: u32 = 256;

pub static EMBED: Kernel = Kernel {
    name: "embed",
    parts: &[Part::Weight, Part::Text(include_str!("../../shaders/embed.wgsl"))],
    bindings: &[Read, Read, ReadWrite],
    param_bytes: size_of::<Params>(),
    params: Params::FIELDS,
    tunables: &[],
};

/// `y[T, D] = table[ids[T], D]`, where `table` is `[V, D]` of `weights`. The caller has checked that every id is below V.
pub fn record(
    recorder: &mut Recorder<'_>,
    weights: Dtype,
    params: Params,
    ids: Slice<'_>,
    table: Slice<'_>,
    y: Slice<'_>,
) -> Result<(), GpuError> {
    let workgroups = [params.n_rows, params.d_model.div_ceil(COLUMNS_PER_WORKGROUP), 1];
    recorder.dispatch(&EMBED, &Variant::new(weights), &params, &[ids, table, y], workgroups)
}
