//! The second half of every expert: the down projection.

use super::slabs::{self, Layout, Slabs};
use crate::gpu::{Access::*, GpuError, Kernel, Part, Recorder, Slice, Variant, params};

params! {
    /// Immediates of `shaders/expert_down.wgsl`.
    pub struct Params {
        /// T * A
        pub n_assignments: u32,
        /// E
        pub n_experts: u32,
        /// D
        pub d_model: u32,
        /// F
        pub expert_width: u32,
        /// [`Layout`] of down.
        pub row_stride: u32,
        pub k_stride: u32,
        pub scales_at: u32,
        /// 1: there are biases.
        pub biased: u32,
    }
}

impl Params {
    /// Over down `[D, F]`, without biases.
    pub fn plain(n_assignments: u32, n_experts: u32, d_model: u32, expert_width: u32) -> Self {
        let Layout { row_stride, k_stride, scales_at, .. } = Layout::rows(expert_width);
        Self { n_assignments, n_experts, d_model, expert_width, row_stride, k_stride, scales_at, biased: 0 }
    }

    /// The same over matrices that lie otherwise.
    pub fn with_layout(self, layout: Layout) -> Self {
        let Layout { row_stride, k_stride, scales_at, .. } = layout;
        Self { row_stride, k_stride, scales_at, ..self }
    }
}

pub static EXPERT_DOWN: Kernel = Kernel {
    name: "expert_down",
    parts: &[
        Part::Weight,
        Part::MadeFor(|weights| slabs::accessor("down", 5, weights)),
        Part::Text(include_str!("../../shaders/shared/expert_tile.wgsl")),
        Part::Text(include_str!("../../shaders/expert_down.wgsl")),
    ],
    bindings: &[Read, Read, Read, Read, ReadWrite, Read, Read, Read, Read, Read],
    param_bytes: size_of::<Params>(),
    params: Params::FIELDS,
    tunables: &[("TILE_ROWS", &[16, 32, 64]), ("TILE_COLS", &[64, 32, 128])],
};

/// What [`record`] binds.
#[derive(Clone, Copy)]
pub struct Bindings<'a, H = Slice<'a>> {
    /// `[T * A, F]` by sorted position, from [`expert_gate_up`](super::expert_gate_up): f32 in a slice, or f16 in
    /// [`HalfRows`](super::half_rows::HalfRows).
    pub h: H,
    /// `[T * A]` u32 from [`expert_sort`](super::expert_sort).
    pub permutation: Slice<'a>,
    /// `[E + 1]` u32 from [`expert_sort`](super::expert_sort).
    pub offsets: Slice<'a>,
    /// `[E]` [`Place`](slabs::Place) of the expert's down in `down`.
    pub places: Slice<'a>,
    /// `[T * A, D]` f32, by assignment, so that what follows does not depend on the sort: out. Rows of absent experts are
    /// left as they are.
    pub y: Slice<'a>,
    /// Per expert `[D, F]` of the variant's weights, as the parameters lay them out.
    pub down: Slabs<'a>,
    /// `[E, D]` f32. Any buffer where there are none.
    pub bias: Slice<'a>,
}

/// `y[permutation[pos]] = down[e] · h[pos] + bias[e]` for each sorted position whose expert e is present.
pub fn record(
    recorder: &mut Recorder<'_>,
    variant: &Variant,
    params: Params,
    bindings: Bindings<'_>,
) -> Result<(), GpuError> {
    let Bindings { h, permutation, offsets, places, y, down, bias } = bindings;
    let slices: Vec<_> = [h, permutation, offsets, places, y].into_iter().chain(down).chain([bias]).collect();
    let workgroups =
        slabs::tiles(slabs::tile(&EXPERT_DOWN, variant), params.n_assignments, params.n_experts, params.d_model);
    recorder.dispatch(&EXPERT_DOWN, variant, &params, &slices, workgroups)
}
