// RMS norm of equal segments of every row, in place: each head of the queries or keys, or all of them as one segment.
// One workgroup per row and four segments, 64 lanes each; lanes stride over their segment, then a tree sum.
// Reference: src/reference/qk_norm.rs      Needs: shared/weight_*
struct Params { n_rows: u32, n_segments: u32, width: u32, stride: u32, offset: u32, eps: f32 }
var<immediate> params: Params;
@group(0) @binding(0) var<storage, read>       gain: array<u32>; // [width] weights
@group(0) @binding(1) var<storage, read_write> x: array<f32>;    // [T, stride], from column offset on n_segments of width

// No tunable: lane l sums elements l, l + LANES, ..., so their number is part of the order of summation.
const LANES: u32 = 64u;
const SEGMENTS: u32 = 4u;

var<workgroup> sums: array<f32, LANES * SEGMENTS>;

@compute @workgroup_size(LANES, SEGMENTS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(local_invocation_id) local: vec3<u32>,
    @builtin(local_invocation_index) at: u32,
) {
    let lane = local.x;
    let segment = workgroup.y * SEGMENTS + local.y;
    let base = workgroup.x * params.stride + params.offset + segment * params.width;
    // A segment beyond the last has no elements.
    let width = select(0u, params.width, segment < params.n_segments);
    var squares = 0.0;
    for (var j = lane; j < width; j += LANES) {
        let v = x[base + j];
        squares = fma(v, v, squares);
    }
    sums[at] = squares;
    workgroupBarrier();
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        if lane < half { sums[at] += sums[at + half]; }
        workgroupBarrier();
    }
    let mean = sums[local.y * LANES] / f32(params.width);
    let scale = inverseSqrt(mean + params.eps);
    for (var j = lane; j < width; j += LANES) {
        x[base + j] = x[base + j] * scale * weight_from_word(gain[weight_word_index(j)], j);
    }
}
