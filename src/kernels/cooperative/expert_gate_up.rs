//! The first half of every expert, on cooperative matrices.

use super::{TUNABLES, Tile, template};
use crate::checkpoint::Dtype;
use crate::gpu::{Access::*, GpuError, Kernel, Part, Recorder, Variant};
use crate::kernels::expert_gate_up::{Bindings, Params};
use crate::kernels::half_rows::HalfRows;
use crate::kernels::slabs::N_SLABS;

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

/// The variant that [`record`] takes for these weights.
pub fn variant(weights: Dtype, tile: Tile, params: &Params, aligned_slots: bool) -> Variant {
    let strides = [params.row_stride, params.k_stride, params.up_first];
    super::variant(weights, tile, params.d_model, strides, aligned_slots)
}

/// As [`expert_gate_up`](crate::kernels::expert_gate_up::record) has it. `aligned_slots`: every place is at a multiple of 16 bytes. A
/// tile may [take rows by expert](Tile::takes_rows_by_expert), from [`record_by_expert`](crate::kernels::half_rows::record_by_expert).
pub fn record(
    recorder: &mut Recorder<'_>,
    (weights, aligned_slots): (Dtype, bool),
    tile: Tile,
    params: Params,
    bindings: Bindings<'_, HalfRows<'_>>,
) -> Result<(), GpuError> {
    let Bindings { x, permutation, offsets, places, h, gate, up, bias } = bindings;
    let slices: Vec<_> =
        [x.rows, x.scales, permutation, offsets, places, h].into_iter().chain(gate).chain(up).chain([bias]).collect();
    let variant = variant(weights, tile, &params, aligned_slots);
    let workgroups = super::workgroups(tile, params.n_assignments, params.n_experts, params.expert_width);
    recorder.dispatch(&EXPERT_GATE_UP, &variant, &params, &slices, workgroups)
}
