//! Rows as f16 with a power of two each: what the kernels on cooperative matrices read.
//!
//! In: rows of f32. Out: the same rows padded with zeros, as they come ([`record`], [`record_between`]) or by the expert that takes them, as
//! the fragments that tiles of few rows load ([`record_by_expert`]); a row's numbers are the same in either.

use crate::checkpoint::Dtype;
use crate::gpu::{Access::*, GpuError, Kernel, Part, Recorder, Slice, Variant, params};

params! {
    /// Immediates of `shaders/half_rows.wgsl`.
    pub struct Params {
        /// T
        pub n_rows: u32,
        /// Columns that are read.
        pub n_in: u32,
        /// Columns of a row of f16: [`padded`] of `n_in`.
        pub n_padded: u32,
        /// Elements from one row of x to the next.
        pub x_stride: u32,
        /// Column of x that becomes column 0.
        pub x_offset: u32,
        /// Only the rows between these two entries of a list of bounds. Both 0: all of them.
        pub first_bound: u32,
        pub end_bound: u32,
        /// Not 0: rows are sorted positions and lie by expert, as [`record_by_expert`] says.
        pub n_experts: u32,
        /// Not 0: position t has row `permutation[t] / n_chosen` of x.
        pub n_chosen: u32,
    }
}

/// Columns of a row of f16 with `n_in` that count. The rest is 0, as far as the deepest step along a sum reaches.
pub const fn padded(n_in: u32) -> u32 {
    n_in.next_multiple_of(256)
}

impl Params {
    /// All of rows `[T, n_in]`.
    pub fn dense(n_rows: u32, n_in: u32) -> Self {
        let n_padded = padded(n_in);
        Self {
            n_rows,
            n_in,
            n_padded,
            x_stride: n_in,
            x_offset: 0,
            first_bound: 0,
            end_bound: 0,
            n_experts: 0,
            n_chosen: 0,
        }
    }
}

pub static HALF_ROWS: Kernel = Kernel {
    name: "half_rows",
    parts: &[
        Part::Text(include_str!("../../shaders/shared/f16.wgsl")),
        Part::Text(include_str!("../../shaders/half_rows.wgsl")),
        Part::Text(include_str!("../../shaders/shared/expert_groups.wgsl")),
    ],
    bindings: &[Read, ReadWrite, ReadWrite, Read, Read],
    param_bytes: size_of::<Params>(),
    params: Params::FIELDS,
    tunables: &[],
};

/// Groups of 16 rows that `n_rows` rows of `n_experts` experts take, each expert's own.
pub const fn groups(n_rows: u32, n_experts: u32) -> u32 {
    n_rows / 16 + n_experts
}

/// Rows of f16, `[T, n_padded]` or by expert, and the power of two that each is to be multiplied by, `[T]`.
#[derive(Clone, Copy)]
pub struct HalfRows<'a> {
    pub rows: Slice<'a>,
    pub scales: Slice<'a>,
}

/// `halves[t, k] = x[t, x_offset + k] / scales[t]`; see [`reference`](crate::reference::half_rows).
pub fn record(recorder: &mut Recorder<'_>, params: Params, x: Slice<'_>, halves: HalfRows<'_>) -> Result<(), GpuError> {
    // No bounds, so any buffer will do for them.
    record_between(recorder, params, [0, 0], x, x, halves)
}

/// The same of rows `bounds[first] .. bounds[end]` alone, of which the device alone knows where they are. `[0, 0]`: of all.
pub fn record_between(
    recorder: &mut Recorder<'_>,
    params: Params,
    [first_bound, end_bound]: [u32; 2],
    bounds: Slice<'_>,
    x: Slice<'_>,
    halves: HalfRows<'_>,
) -> Result<(), GpuError> {
    let params = Params { first_bound, end_bound, ..params };
    // As they come, so any buffer will do for a permutation.
    dispatch(recorder, params, [x, halves.rows, halves.scales, bounds, bounds])
}

/// Which rows a product over experts takes, and in which order.
#[derive(Clone, Copy)]
pub struct ByExpert<'a> {
    pub n_experts: u32,
    /// Only the rows of these experts.
    pub experts: [u32; 2],
    /// `[E + 1]` u32 from [`expert_sort`](super::expert_sort).
    pub offsets: Slice<'a>,
    /// `[T]` u32 of it, and how many of them share a row of x. Without it position t has row t.
    pub permutation: Option<(Slice<'a>, u32)>,
}

/// Rows by sorted position, laid out as fragments for the products of few rows: row i of expert e is row `i % 16` of group
/// `offsets[e] / 16 + e + i / 16`, of [`groups`] in all; a group is `n_padded / 16` fragments of 16 columns, each `[16, 16]`. Scales are by
/// position. What no row falls to is left as it is.
pub fn record_by_expert(
    recorder: &mut Recorder<'_>,
    params: Params,
    order: ByExpert<'_>,
    x: Slice<'_>,
    halves: HalfRows<'_>,
) -> Result<(), GpuError> {
    let ByExpert { n_experts, experts: [first_bound, end_bound], offsets, permutation } = order;
    let (permutation, n_chosen) = permutation.unwrap_or((offsets, 0));
    let params = Params { first_bound, end_bound, n_experts, n_chosen, ..params };
    dispatch(recorder, params, [x, halves.rows, halves.scales, offsets, permutation])
}

fn dispatch(recorder: &mut Recorder<'_>, params: Params, slices: [Slice<'_>; 5]) -> Result<(), GpuError> {
    let workgroups = [params.n_rows.min(recorder.max_workgroups()), 1, 1];
    recorder.dispatch(&HALF_ROWS, &Variant::new(Dtype::F32), &params, &slices, workgroups)
}
