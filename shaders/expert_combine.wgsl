// x[t, d] += sum over rank r of weights[t, r] * y[t * A + r, d], r ascending.   One invocation per element of x.
// Reference: src/reference/expert_combine.rs
struct Params { n_rows: u32, n_chosen: u32, d_model: u32 }
var<immediate> params: Params;
@group(0) @binding(0) var<storage, read>       weights: array<f32>; // [T, A]
@group(0) @binding(1) var<storage, read>       y: array<f32>;       // [T * A, D] by assignment
@group(0) @binding(2) var<storage, read_write> x: array<f32>;       // [T, D] residual stream

const WG_SIZE: u32 = 256u;

@compute @workgroup_size(WG_SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let d = workgroup.y * WG_SIZE + lane;
    if d >= params.d_model { return; }
    let first = workgroup.x * params.n_chosen;
    var sum = 0.0;
    for (var rank = 0u; rank < params.n_chosen; rank++) {
        sum = fma(weights[first + rank], y[(first + rank) * params.d_model + d], sum);
    }
    x[workgroup.x * params.d_model + d] += sum;
}
