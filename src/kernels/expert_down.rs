//! The second half of every expert: the down projection.

use super::slabs::{self, Slabs};
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
    }
}

pub static EXPERT_DOWN: Kernel = Kernel {
    name: "expert_down",
    parts: &[
        Part::Weight,
        Part::Made(|| slabs::accessor("down", 5)),
        Part::Text(include_str!("../../shaders/shared/expert_tile.wgsl")),
        Part::Text(include_str!("../../shaders/expert_down.wgsl")),
    ],
    bindings: &[Read, Read, Read, Read, ReadWrite, Read, Read, Read, Read],
    param_bytes: size_of::<Params>(),
    params: Params::FIELDS,
    tunables: &[("TILE_ROWS", &[16, 32, 64]), ("TILE_COLS", &[64, 32, 128])],
};

/// What [`record`] binds.
#[derive(Clone, Copy)]
pub struct Bindings<'a> {
    /// `[T * A, F]` f32, by sorted position, from [`expert_gate_up`](super::expert_gate_up).
    pub h: Slice<'a>,
    /// `[T * A]` u32 from [`expert_sort`](super::expert_sort).
    pub permutation: Slice<'a>,
    /// `[E + 1]` u32 from [`expert_sort`](super::expert_sort).
    pub offsets: Slice<'a>,
    /// `[E]` [`Place`](slabs::Place) of the expert's down in `down`.
    pub places: Slice<'a>,
    /// `[T * A, D]` f32, by assignment, so that what follows does not depend on the sort: out. Rows of absent experts are
    /// left as they are.
    pub y: Slice<'a>,
    /// Per expert `[D, F]` of the variant's weights.
    pub down: Slabs<'a>,
}

/// `y[permutation[pos]] = down[e] · h[pos]` for each sorted position whose expert e is present.
pub fn record(
    recorder: &mut Recorder<'_>,
    variant: &Variant,
    params: Params,
    bindings: Bindings<'_>,
) -> Result<(), GpuError> {
    let Bindings { h, permutation, offsets, places, y, down } = bindings;
    let slices: Vec<_> = [h, permutation, offsets, places, y].into_iter().chain(down).collect();
    let workgroups = slabs::tiles(&EXPERT_DOWN, variant, params.n_assignments, params.n_experts, params.d_model);
    recorder.dispatch(&EXPERT_DOWN, variant, &params, &slices, workgroups)
}
