// RMS norm of equal segments of every row, in place: each head of the queries or keys, or all of them as one segment.
// One workgroup per row and segment; lanes stride over it, then a tree sum.
// Reference: src/reference/qk_norm.rs      Needs: shared/weight_*, shared/reduce (workgroup_sum)
struct Params { n_rows: u32, n_segments: u32, width: u32, stride: u32, offset: u32, eps: f32 }
var<immediate> params: Params;
@group(0) @binding(0) var<storage, read>       gain: array<u32>; // [width] weights
@group(0) @binding(1) var<storage, read_write> x: array<f32>;    // [T, stride], from column offset on n_segments of width

// No tunable: lane l sums elements l, l + WG_SIZE, ..., so the width is part of the order of summation.
const WG_SIZE: u32 = 64u;

@compute @workgroup_size(WG_SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let base = workgroup.x * params.stride + params.offset + workgroup.y * params.width;
    var squares = 0.0;
    for (var j = lane; j < params.width; j += WG_SIZE) {
        let v = x[base + j];
        squares = fma(v, v, squares);
    }
    let mean = workgroup_sum(squares, lane) / f32(params.width);
    let scale = inverseSqrt(mean + params.eps);
    for (var j = lane; j < params.width; j += WG_SIZE) {
        x[base + j] = x[base + j] * scale * weight_from_word(gain[weight_word_index(j)], j);
    }
}
