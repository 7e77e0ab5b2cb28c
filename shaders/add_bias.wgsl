// y[t, y_offset + j] += bias[j].   One invocation per element.
// Reference: src/reference/add_bias.rs
struct Params { n_rows: u32, n_columns: u32, y_stride: u32, y_offset: u32 }
var<immediate> params: Params;
@group(0) @binding(0) var<storage, read>       bias: array<f32>; // [n_columns]
@group(0) @binding(1) var<storage, read_write> y: array<f32>;    // [T, y_stride], columns y_offset .. y_offset + n_columns

const WG_SIZE: u32 = 256u;

@compute @workgroup_size(WG_SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let column = workgroup.y * WG_SIZE + lane;
    if column >= params.n_columns { return; }
    y[workgroup.x * params.y_stride + params.y_offset + column] += bias[column];
}
