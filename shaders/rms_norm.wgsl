// RMS norm over rows.   One workgroup per row; lanes stride over the row, then a tree sum.
// Reference: src/reference/rms_norm.rs      Needs: shared/weight_*, shared/reduce (workgroup_sum), shared/row_quads
struct Params { n_rows: u32, d_model: u32, eps: f32 }
var<immediate> params: Params;
@group(0) @binding(0) var<storage, read>       x: array<f32>;    // [T, D] residual stream
@group(0) @binding(1) var<storage, read>       gain: array<u32>; // [D] weights
@group(0) @binding(2) var<storage, read_write> y: array<f32>;    // [T, D]

// Part of the order of summation: lane l sums elements l, l + WG_SIZE, .... Chosen by D alone (src/kernels/rms_norm.rs).
override WG_SIZE: u32 = 256u;

fn gain_at(j: u32) -> f32 {
    if j >= params.d_model { return 0.0; }
    return weight_from_word(gain[weight_word_index(j)], j);
}

fn gain_quad(j: u32) -> vec4<f32> {
    return vec4(gain_at(j), gain_at(j + WG_SIZE), gain_at(j + 2u * WG_SIZE), gain_at(j + 3u * WG_SIZE));
}

fn store(base: u32, j: u32, quad: vec4<f32>) {
    if j < params.d_model { y[base + j] = quad.x; }
    if j + WG_SIZE < params.d_model { y[base + j + WG_SIZE] = quad.y; }
    if j + 2u * WG_SIZE < params.d_model { y[base + j + 2u * WG_SIZE] = quad.z; }
    if j + 3u * WG_SIZE < params.d_model { y[base + j + 3u * WG_SIZE] = quad.w; }
}

@compute @workgroup_size(WG_SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let base = workgroup.x * params.d_model;
    var squares = 0.0;
    for (var j = lane; j < params.d_model; j += 4u * WG_SIZE) {
        squares = add_squares(squares, row_quad(base, j, params.d_model));
    }
    let mean = workgroup_sum(squares, lane) / f32(params.d_model);
    let scale = inverseSqrt(mean + params.eps);
    for (var j = lane; j < params.d_model; j += 4u * WG_SIZE) {
        let quad = row_quad(base, j, params.d_model);
        store(base, j, quad * scale * gain_quad(j));
    }
}
