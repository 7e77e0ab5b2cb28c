//! The parts of decode rows' attention put together.

use super::decode_attention::Scratch;
use crate::checkpoint::Dtype;
use crate::gpu::{Access::*, GpuError, Kernel, Part, Recorder, Slice, Variant, params};

params! {
    /// Immediates of `shaders/decode_combine.wgsl`.
    pub struct Params {
        pub n_rows: u32,
        /// The first entry of the list of rows.
        pub first_row: u32,
        /// H
        pub q_heads: u32,
        /// K
        pub head_width: u32,
        /// 1: there are sinks.
        pub has_sinks: u32,
    }
}

pub static DECODE_COMBINE: Kernel = Kernel {
    name: "decode_combine",
    parts: &[Part::Text(include_str!("../../shaders/decode_combine.wgsl"))],
    bindings: &[Read, Read, Read, Read, ReadWrite],
    param_bytes: size_of::<Params>(),
    params: Params::FIELDS,
    tunables: &[],
};

/// `out[t, H, K]` of the rows in `wholes` ([`Whole`](super::decode_attention::Whole)), from the scratch that `decode_attention` filled.
pub fn record(
    recorder: &mut Recorder<'_>,
    params: Params,
    wholes: Slice<'_>,
    scratch: Scratch<'_>,
    sinks: Slice<'_>,
    out: Slice<'_>,
) -> Result<(), GpuError> {
    let Scratch { states, sums } = scratch;
    let workgroups = [params.n_rows, params.q_heads, 1];
    recorder.dispatch(
        &DECODE_COMBINE,
        &Variant::new(Dtype::F32),
        &params,
        &[wholes, states, sums, sinks, out],
        workgroups,
    )
}
