//! The second half of every expert, on cooperative matrices.

use super::{TUNABLES, Tile, template};
use crate::checkpoint::Dtype;
use crate::gpu::{Access::*, GpuError, Kernel, Part, Recorder, Variant};
use crate::kernels::expert_down::{Bindings, Params};
use crate::kernels::half_rows::HalfRows;

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

/// The variant that [`record`] takes for these weights.
pub fn variant(weights: Dtype, tile: Tile, params: &Params, aligned_slots: bool) -> Variant {
    let strides = [params.row_stride, params.k_stride, 0];
    super::variant(weights, tile, params.expert_width, strides, aligned_slots)
}

/// As [`expert_down`](crate::kernels::expert_down::record) has it. `aligned_slots`: every place is at a multiple of 16 bytes. A
/// tile may [take rows by expert](Tile::takes_rows_by_expert), from [`record_by_expert`](crate::kernels::half_rows::record_by_expert).
pub fn record(
    recorder: &mut Recorder<'_>,
    (weights, aligned_slots): (Dtype, bool),
    tile: Tile,
    params: Params,
    bindings: Bindings<'_, HalfRows<'_>>,
) -> Result<(), GpuError> {
    let Bindings { h, permutation, offsets, places, y, down, bias } = bindings;
    let slices: Vec<_> =
        [h.rows, h.scales, permutation, offsets, places, y].into_iter().chain(down).chain([bias]).collect();
    let variant = variant(weights, tile, &params, aligned_slots);
    let workgroups = super::workgroups(tile, params.n_assignments, params.n_experts, params.d_model);
    recorder.dispatch(&EXPERT_DOWN, &variant, &params, &slices, workgroups)
}
