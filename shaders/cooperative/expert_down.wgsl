// y[a, d] = sum over f of h[pos, f] * down[e][d, f] + bias, on cooperative matrices,
// for every sorted position pos, where a = permutation[pos] and e is the expert that pos belongs to.
// The loop is src/kernels/cooperative/template.rs's; here are its bindings, where its rows and columns lie, and what becomes of a sum.
// Reference: src/reference/expert_down.rs
struct Params {
    n_assignments: u32, n_experts: u32, d_model: u32, expert_width: u32,
    row_stride: u32, k_stride: u32, scales_at: u32,
    biased: u32,
}
var<immediate> params: Params;
@group(0) @binding(0) var<storage, read>       x: array<vec4<f16>>;     // [T * A, F up to a multiple of 256] of h, by sorted position; or groups of fragments
@group(0) @binding(1) var<storage, read>       scales: array<f32>;      // [T * A]
@group(0) @binding(2) var<storage, read>       permutation: array<u32>; // [T * A] assignment of each sorted position
@group(0) @binding(3) var<storage, read>       offsets: array<u32>;     // [E + 1] first sorted position of each expert
@group(0) @binding(4) var<storage, read>       places: array<vec2<u32>>;// [E] slab and offset in words
@group(0) @binding(5) var<storage, read_write> y: array<f32>;           // [T * A, D] by assignment
// Bindings 6 to 9: the slabs of down.
@group(0) @binding(10) var<storage, read>      bias: array<f32>;        // [E, D], where biased

fn terms() -> u32 { return params.expert_width; }
fn columns() -> u32 { return params.d_model; }
fn row_stride() -> u32 { return params.row_stride; }
fn x_row(position: u32) -> u32 { return position; }

fn finish(position: u32, output: u32, sum: f32) {
    var value = sum * scales[position];
    if params.biased != 0u { value += bias[tile.expert * params.d_model + output]; }
    y[permutation[position] * params.d_model + output] = value;
}
