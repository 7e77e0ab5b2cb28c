//! The first half of every expert: gate and up projections, SiLU, product.

use super::slabs::{self, N_SLABS, Slabs};
use crate::gpu::{Access::*, GpuError, Kernel, Part, Recorder, Slice, Variant, params};

params! {
    /// Immediates of `shaders/expert_gate_up.wgsl`.
    pub struct Params {
        /// T * A
        pub n_assignments: u32,
        /// E
        pub n_experts: u32,
        /// A
        pub n_chosen: u32,
        /// D
        pub d_model: u32,
        /// F
        pub expert_width: u32,
    }
}

const GATE: usize = 5;

pub static EXPERT_GATE_UP: Kernel = Kernel {
    name: "expert_gate_up",
    parts: &[
        Part::Weight,
        Part::Made(|| slabs::accessor("gate", GATE)),
        Part::Made(|| slabs::accessor("up", GATE + N_SLABS)),
        Part::Text(include_str!("../../shaders/shared/expert_tile.wgsl")),
        Part::Text(include_str!("../../shaders/expert_gate_up.wgsl")),
    ],
    bindings: &[Read, Read, Read, Read, ReadWrite, Read, Read, Read, Read, Read, Read, Read, Read],
    param_bytes: size_of::<Params>(),
    params: Params::FIELDS,
    tunables: &[("TILE_ROWS", &[16, 32, 64]), ("TILE_COLS", &[64, 32])],
};

/// What [`record`] binds.
#[derive(Clone, Copy)]
pub struct Bindings<'a> {
    /// `[T, D]` f32
    pub x: Slice<'a>,
    /// `[T * A]` u32 from [`expert_sort`](super::expert_sort).
    pub permutation: Slice<'a>,
    /// `[E + 1]` u32 from [`expert_sort`](super::expert_sort).
    pub offsets: Slice<'a>,
    /// `[E]` [`Place`](slabs::Place): of the expert's gate in `gate` and of its up in `up`.
    pub places: Slice<'a>,
    /// `[T * A, F]` f32, by sorted position: out. Rows of absent experts are left as they are.
    pub h: Slice<'a>,
    /// Per expert `[F, D]` of the variant's weights.
    pub gate: Slabs<'a>,
    /// Per expert `[F, D]` of the variant's weights.
    pub up: Slabs<'a>,
}

/// `h[pos] = silu(gate[e] · x[t]) * (up[e] · x[t])` for each sorted position whose expert e is present, t being the row of
/// `permutation[pos]`.
pub fn record(
    recorder: &mut Recorder<'_>,
    variant: &Variant,
    params: Params,
    bindings: Bindings<'_>,
) -> Result<(), GpuError> {
    let Bindings { x, permutation, offsets, places, h, gate, up } = bindings;
    let slices: Vec<_> = [x, permutation, offsets, places, h].into_iter().chain(gate).chain(up).collect();
    let workgroups =
        slabs::tiles(&EXPERT_GATE_UP, variant, params.n_assignments, params.n_experts, params.expert_width);
    recorder.dispatch(&EXPERT_GATE_UP, variant, &params, &slices, workgroups)
}
