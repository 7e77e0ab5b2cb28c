//! The first half of every expert: gate and up projections, biases, activation.

use super::slabs::{self, Layout, N_SLABS, Slabs};
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
        /// [`Layout`] of gate and up.
        pub row_stride: u32,
        pub k_stride: u32,
        pub up_first: u32,
        pub scales_at: u32,
        /// 1: gate and up have biases.
        pub biased: u32,
        /// Of the clamped SwiGLU; 0: SwiGLU.
        pub limit: f32,
    }
}

impl Params {
    /// SwiGLU without biases over gate and up `[F, D]`, each in its own slot.
    pub fn plain(n_assignments: u32, n_experts: u32, n_chosen: u32, d_model: u32, expert_width: u32) -> Self {
        let Layout { row_stride, k_stride, up_first, scales_at } = Layout::rows(d_model);
        Self {
            n_assignments,
            n_experts,
            n_chosen,
            d_model,
            expert_width,
            row_stride,
            k_stride,
            up_first,
            scales_at,
            biased: 0,
            limit: 0.0,
        }
    }

    /// The same over matrices that lie otherwise.
    pub fn with_layout(self, layout: Layout) -> Self {
        let Layout { row_stride, k_stride, up_first, scales_at } = layout;
        Self { row_stride, k_stride, up_first, scales_at, ..self }
    }
}

const GATE: usize = 5;

pub static EXPERT_GATE_UP: Kernel = Kernel {
    name: "expert_gate_up",
    parts: &[
        Part::Weight,
        Part::MadeFor(|weights| slabs::accessor("gate", GATE, weights)),
        Part::MadeFor(|weights| slabs::accessor("up", GATE + N_SLABS, weights)),
        Part::Text(include_str!("../../shaders/shared/expert_tile.wgsl")),
        Part::Text(include_str!("../../shaders/shared/expert_activation.wgsl")),
        Part::Text(include_str!("../../shaders/expert_gate_up.wgsl")),
    ],
    bindings: &[Read, Read, Read, Read, ReadWrite, Read, Read, Read, Read, Read, Read, Read, Read, Read],
    param_bytes: size_of::<Params>(),
    params: Params::FIELDS,
    tunables: &[("TILE_ROWS", &[16, 32, 64]), ("TILE_COLS", &[64, 32])],
};

/// What [`record`] binds.
#[derive(Clone, Copy)]
pub struct Bindings<'a, X = Slice<'a>> {
    /// `[T, D]`, f32 in a slice or f16 in [`HalfRows`](super::half_rows::HalfRows).
    pub x: X,
    /// `[T * A]` u32 from [`expert_sort`](super::expert_sort).
    pub permutation: Slice<'a>,
    /// `[E + 1]` u32 from [`expert_sort`](super::expert_sort).
    pub offsets: Slice<'a>,
    /// `[E]` [`Place`](slabs::Place): of the expert's gate in `gate` and of its up in `up`.
    pub places: Slice<'a>,
    /// `[T * A, F]` f32, by sorted position: out. Rows of absent experts are left as they are.
    pub h: Slice<'a>,
    /// Per expert `[F, D]` of the variant's weights, as the parameters lay them out.
    pub gate: Slabs<'a>,
    /// Likewise; gate's where they hold up as well.
    pub up: Slabs<'a>,
    /// `[E, F, 2]` f32, of gate and of up. Any buffer where there are none.
    pub bias: Slice<'a>,
}

/// `h[pos] = activate(gate[e] · x[t] + bias, up[e] · x[t] + bias)` for each sorted position whose expert e is present, t being the row of
/// `permutation[pos]`.
pub fn record(
    recorder: &mut Recorder<'_>,
    variant: &Variant,
    params: Params,
    bindings: Bindings<'_>,
) -> Result<(), GpuError> {
    let Bindings { x, permutation, offsets, places, h, gate, up, bias } = bindings;
    let slices: Vec<_> = [x, permutation, offsets, places, h].into_iter().chain(gate).chain(up).chain([bias]).collect();
    let workgroups = slabs::tiles(
        slabs::tile(&EXPERT_GATE_UP, variant),
        params.n_assignments,
        params.n_experts,
        params.expert_width,
    );
    recorder.dispatch(&EXPERT_GATE_UP, variant, &params, &slices, workgroups)
}
