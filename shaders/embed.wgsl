// Gathers rows of a table.   One invocation per element of y.
// Reference: src/reference/embed.rs      Needs: shared/weight_*
struct Params { n_rows: u32, d_model: u32 }
var<immediate> params: Params;
@group(0) @binding(0) var<storage, read>       ids: array<u32>;   // [T], each below V
@group(0) @binding(1) var<storage, read>       table: array<u32>; // [V, D] weights
@group(0) @binding(2) var<storage, read_write> y: array<f32>;     // [T, D]

const WG_SIZE: u32 = 256u;

@compute @workgroup_size(WG_SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = workgroup.x;
    let column = workgroup.y * WG_SIZE + lane;
    if column >= params.d_model { return; }
    // V * D stays below 2^32 elements: a binding has fewer bytes than that.
    let element = ids[row] * params.d_model + column;
    y[row * params.d_model + column] = weight_from_word(table[weight_word_index(element)], element);
}
