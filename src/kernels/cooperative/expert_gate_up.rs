//! The first half of every expert, on cooperative matrices.

use super::{TUNABLES, Tile, template};
use crate::checkpoint::Dtype;
use crate::gpu::{Access::*, GpuError, Kernel, Part, Recorder, Slice, Variant, params};
use crate::kernels::expert_gate_up as portable;
use crate::kernels::half_rows::{HalfRows, padded};
use crate::kernels::slabs::{self, N_SLABS, Slabs};

params! {
    /// Immediates of `shaders/cooperative/expert_gate_up.wgsl`: the portable kernel's and the rows'.
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
        /// [`Layout`](slabs::Layout) of gate and up.
        pub row_stride: u32,
        pub k_stride: u32,
        pub up_first: u32,
        pub scales_at: u32,
        /// 1: gate and up have biases.
        pub biased: u32,
        /// Of the clamped SwiGLU; 0: SwiGLU.
        pub limit: f32,
        /// A row of x, in fours of f16.
        pub x_units: u32,
    }
}

impl From<portable::Params> for Params {
    fn from(params: portable::Params) -> Self {
        let portable::Params { n_assignments, n_experts, n_chosen, d_model, expert_width, biased, limit, .. } = params;
        let portable::Params { row_stride, k_stride, up_first, scales_at, .. } = params;
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
            biased,
            limit,
            x_units: padded(d_model) / 4,
        }
    }
}

const GATE: usize = 6;

pub static EXPERT_GATE_UP: Kernel = Kernel {
    name: "cooperative/expert_gate_up",
    parts: &[Part::Template(source)],
    bindings: &[Read, Read, Read, Read, Read, ReadWrite, Read, Read, Read, Read, Read, Read, Read, Read, Read],
    param_bytes: size_of::<Params>(),
    params: Params::FIELDS,
    tunables: TUNABLES,
};

fn source(variant: &Variant) -> String {
    let operation = template::Operation {
        weights: template::Weights::Slabs(&[("gate", GATE), ("up", GATE + N_SLABS)]),
        text: include_str!("../../../shaders/cooperative/expert_gate_up.wgsl"),
    };
    template::source(&EXPERT_GATE_UP, &operation, variant)
}

/// What [`record`] binds.
#[derive(Clone, Copy)]
pub struct Bindings<'a> {
    /// `[T, D]`
    pub x: HalfRows<'a>,
    /// The rest as the portable kernel has it; see [`portable::Bindings`].
    pub permutation: Slice<'a>,
    pub offsets: Slice<'a>,
    pub places: Slice<'a>,
    pub h: Slice<'a>,
    pub gate: Slabs<'a>,
    pub up: Slabs<'a>,
    pub bias: Slice<'a>,
}

/// The variant that [`record`] takes for these weights.
pub fn variant(weights: Dtype, tile: Tile, params: &portable::Params, aligned_slots: bool) -> Variant {
    let strides = [params.row_stride, params.k_stride, params.up_first];
    super::variant(weights, tile, params.d_model, strides, aligned_slots)
}

/// As [`expert_gate_up`](portable::record) has it. `aligned_slots`: every place is at a multiple of 16 bytes.
pub fn record(
    recorder: &mut Recorder<'_>,
    (weights, aligned_slots): (Dtype, bool),
    tile: Tile,
    params: portable::Params,
    bindings: Bindings<'_>,
) -> Result<(), GpuError> {
    let Bindings { x, permutation, offsets, places, h, gate, up, bias } = bindings;
    let slices: Vec<_> =
        [x.rows, x.scales, permutation, offsets, places, h].into_iter().chain(gate).chain(up).chain([bias]).collect();
    let variant = variant(weights, tile, &params, aligned_slots);
    let workgroups = slabs::tiles([tile.rows, tile.cols], params.n_assignments, params.n_experts, params.expert_width);
    recorder.dispatch(&EXPERT_GATE_UP, &variant, &Params::from(params), &slices, workgroups)
}
