// The parts of each decode row's attention put together, in ascending order.   One workgroup per row and head.
// Reference: src/reference/decode_combine.rs
struct Params { n_rows: u32, first_row: u32, q_heads: u32, head_width: u32, has_sinks: u32 }
var<immediate> params: Params;
@group(0) @binding(0) var<storage, read>       rows: array<vec4<u32>>;   // row t, its first part, number of its parts, unused
@group(0) @binding(1) var<storage, read>       states: array<vec2<f32>>; // [parts, H] greatest score, sum of weights
@group(0) @binding(2) var<storage, read>       sums: array<f32>;         // [parts, H, K]
@group(0) @binding(3) var<storage, read>       sinks: array<f32>;        // [H] scores without a value, where has_sinks
@group(0) @binding(4) var<storage, read_write> out: array<f32>;          // [T, H, K]

const WG_SIZE: u32 = 64u;

@compute @workgroup_size(WG_SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = rows[params.first_row + workgroup.x];
    let head = workgroup.y;
    // Every lane does the few parts' states for itself.
    var greatest = states[row.y * params.q_heads + head].x;
    for (var part = 1u; part < row.z; part++) { greatest = max(greatest, states[(row.y + part) * params.q_heads + head].x); }
    if params.has_sinks != 0u { greatest = max(greatest, sinks[head]); }
    var total = 0.0;
    if params.has_sinks != 0u { total = exp(sinks[head] - greatest); }
    for (var part = 0u; part < row.z; part++) {
        let state = states[(row.y + part) * params.q_heads + head];
        total = fma(state.y, exp(state.x - greatest), total);
    }
    for (var j = lane; j < params.head_width; j += WG_SIZE) {
        var sum = 0.0;
        for (var part = 0u; part < row.z; part++) {
            let at = (row.y + part) * params.q_heads + head;
            sum = fma(sums[at * params.head_width + j], exp(states[at].x - greatest), sum);
        }
        out[(row.x * params.q_heads + head) * params.head_width + j] = sum / total;
    }
}
