//! The second half of every expert, on cooperative matrices.

use super::{TUNABLES, Tile, template};
use crate::checkpoint::Dtype;
use crate::gpu::{Access::*, GpuError, Kernel, Part, Recorder, Slice, Variant, params};
use crate::kernels::expert_down as portable;
use crate::kernels::half_rows::{HalfRows, padded};
use crate::kernels::slabs::{self, Slabs};

params! {
    /// Immediates of `shaders/cooperative/expert_down.wgsl`: the portable kernel's and the rows'.
    pub struct Params {
        /// T * A
        pub n_assignments: u32,
        /// E
        pub n_experts: u32,
        /// D
        pub d_model: u32,
        /// F
        pub expert_width: u32,
        /// [`Layout`](slabs::Layout) of down.
        pub row_stride: u32,
        pub k_stride: u32,
        pub scales_at: u32,
        /// 1: there are biases.
        pub biased: u32,
        /// A row of h, in fours of f16.
        pub x_units: u32,
    }
}

impl From<portable::Params> for Params {
    fn from(params: portable::Params) -> Self {
        let portable::Params { n_assignments, n_experts, d_model, expert_width, row_stride, k_stride, .. } = params;
        let portable::Params { scales_at, biased, .. } = params;
        let x_units = padded(expert_width) / 4;
        Self { n_assignments, n_experts, d_model, expert_width, row_stride, k_stride, scales_at, biased, x_units }
    }
}

pub static EXPERT_DOWN: Kernel = Kernel {
    name: "cooperative/expert_down",
    parts: &[Part::Template(source)],
    bindings: &[Read, Read, Read, Read, Read, ReadWrite, Read, Read, Read, Read, Read],
    param_bytes: size_of::<Params>(),
    params: Params::FIELDS,
    tunables: TUNABLES,
};

fn source(variant: &Variant) -> String {
    let operation = template::Operation {
        weights: template::Weights::Slabs(&[("down", 6)]),
        text: include_str!("../../../shaders/cooperative/expert_down.wgsl"),
    };
    template::source(&EXPERT_DOWN, &operation, variant)
}

/// What [`record`] binds.
#[derive(Clone, Copy)]
pub struct Bindings<'a> {
    /// `[T * A, F]` by sorted position.
    pub h: HalfRows<'a>,
    /// The rest as the portable kernel has it; see [`portable::Bindings`].
    pub permutation: Slice<'a>,
    pub offsets: Slice<'a>,
    pub places: Slice<'a>,
    pub y: Slice<'a>,
    pub down: Slabs<'a>,
    pub bias: Slice<'a>,
}

/// The variant that [`record`] takes for these weights.
pub fn variant(weights: Dtype, tile: Tile, params: &portable::Params, aligned_slots: bool) -> Variant {
    let strides = [params.row_stride, params.k_stride, 0];
    super::variant(weights, tile, params.expert_width, strides, aligned_slots)
}

/// As [`expert_down`](portable::record) has it. `aligned_slots`: every place is at a multiple of 16 bytes.
pub fn record(
    recorder: &mut Recorder<'_>,
    (weights, aligned_slots): (Dtype, bool),
    tile: Tile,
    params: portable::Params,
    bindings: Bindings<'_>,
) -> Result<(), GpuError> {
    let Bindings { h, permutation, offsets, places, y, down, bias } = bindings;
    let slices: Vec<_> =
        [h.rows, h.scales, permutation, offsets, places, y].into_iter().chain(down).chain([bias]).collect();
    let variant = variant(weights, tile, &params, aligned_slots);
    let workgroups = slabs::tiles([tile.rows, tile.cols], params.n_assignments, params.n_experts, params.d_model);
    recorder.dispatch(&EXPERT_DOWN, &variant, &Params::from(params), &slices, workgroups)
}
