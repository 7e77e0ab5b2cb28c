// h[pos, f] = activate(sum over k of x[t, k] * gate[e][f, k] + bias, sum over k of x[t, k] * up[e][f, k] + bias), on cooperative
// matrices, for every sorted position pos, where t = permutation[pos] / A and e is the expert that pos belongs to.
// The loop is src/kernels/cooperative/template.rs's; here are its bindings, where its rows and columns lie, and what becomes of the sums.
// Reference: src/reference/expert_gate_up.rs
struct Params {
    n_assignments: u32, n_experts: u32, n_chosen: u32, d_model: u32, expert_width: u32,
    row_stride: u32, k_stride: u32, up_first: u32, scales_at: u32,
    biased: u32, limit: f32,
}
var<immediate> params: Params;
@group(0) @binding(0) var<storage, read>       x: array<vec4<f16>>;     // [T, D up to a multiple of 256], or by position in groups of fragments
@group(0) @binding(1) var<storage, read>       scales: array<f32>;      // [T], or by position
@group(0) @binding(2) var<storage, read>       permutation: array<u32>; // [T * A] assignment of each sorted position
@group(0) @binding(3) var<storage, read>       offsets: array<u32>;     // [E + 1] first sorted position of each expert
@group(0) @binding(4) var<storage, read>       places: array<vec2<u32>>;// [E] slab and offset in words, of gate and of up
@group(0) @binding(5) var<storage, read_write> h: array<f32>;           // [T * A, F] by sorted position
// Bindings 6 to 9: the slabs of gate, 10 to 13: those of up.
@group(0) @binding(14) var<storage, read>      bias: array<f32>;        // [E, F, 2] of gate and up, where biased

fn terms() -> u32 { return params.d_model; }
fn columns() -> u32 { return params.expert_width; }
fn row_stride() -> u32 { return params.row_stride; }
fn x_row(position: u32) -> u32 {
    if ROWS_BY_POSITION { return position; }
    return permutation[position] / params.n_chosen;
}

fn finish(position: u32, feature: u32, gate_sum: f32, up_sum: f32) {
    let scale = scales[x_row(position)];
    var gate = gate_sum * scale;
    var up = up_sum * scale;
    if params.biased != 0u {
        let b = 2u * (tile.expert * params.expert_width + feature);
        gate += bias[b];
        up += bias[b + 1u];
    }
    h[position * params.expert_width + feature] = activate(vec4(gate), vec4(up)).x;
}
