// y[a, d] = sum over f of h[pos, f] * down[e][d, f] + bias
// for every sorted position pos, where a = permutation[pos] and e is the expert that pos belongs to.
// Tiles as in expert_gate_up: TILE_ROWS positions of one expert x TILE_COLS outputs to a workgroup, 8 rows x 4 outputs to an
// invocation.
// Reference: src/reference/expert_down.rs      Needs: shared/weight_*, kernels/slabs.rs (down_quad), shared/expert_tile
struct Params {
    n_assignments: u32, n_experts: u32, d_model: u32, expert_width: u32,
    row_stride: u32, k_stride: u32, scales_at: u32,
    biased: u32,
}
var<immediate> params: Params;
@group(0) @binding(0) var<storage, read>       h: array<f32>;           // [T * A, F] by sorted position
@group(0) @binding(1) var<storage, read>       permutation: array<u32>; // [T * A] assignment of each sorted position
@group(0) @binding(2) var<storage, read>       offsets: array<u32>;     // [E + 1] first sorted position of each expert
@group(0) @binding(3) var<storage, read>       places: array<vec2<u32>>;// [E] slab and offset in words
@group(0) @binding(4) var<storage, read_write> y: array<f32>;           // [T * A, D] by assignment
// Bindings 5 to 8: the slabs of down; element (d, f) of an expert's down is weight d * row_stride + f * k_stride of its place.
@group(0) @binding(9) var<storage, read>       bias: array<f32>;        // [E, D], where biased

override TILE_ROWS: u32 = 16u; // a multiple of 8
override TILE_COLS: u32 = 64u; // a multiple of 4

const STEP: u32 = 16u;
const STEP_QUADS: u32 = STEP / 4u;
override COL_LANES: u32 = TILE_COLS / 4u;
override LANES: u32 = COL_LANES * (TILE_ROWS / 8u);
// Two vec4 more than a multiple of eight from one k to the next: lanes that fill neighbouring k meet different banks.
override ROW_PITCH: u32 = TILE_ROWS + 2u;
override COL_PITCH: u32 = TILE_COLS + 2u;

var<workgroup> tile: RowTile;
var<workgroup> h_tile: array<vec4<f32>, STEP_QUADS * ROW_PITCH>;    // [STEP / 4][rows], four k to a vec4
var<workgroup> down_tile: array<vec4<f32>, STEP_QUADS * COL_PITCH>; // [STEP / 4][outputs], four k to a vec4

// Elements k to k + 3 of a row of h, 0 from beyond the row. k is below F.
fn h_quad(position: u32, k: u32) -> vec4<f32> {
    let n = params.expert_width - k;
    let e = position * params.expert_width + k + min(vec4(0u, 1u, 2u, 3u), vec4(n - 1u));
    return select(vec4(0.0), vec4(h[e.x], h[e.y], h[e.z], h[e.w]), vec4(0u, 1u, 2u, 3u) < vec4(n));
}

// Columns of one invocation lie COL_LANES apart, so neighbouring lanes read and write neighbouring ones.
fn store(position: u32, output: u32, values: vec4<f32>) {
    if position >= tile.end { return; }
    var sums = values;
    if params.biased != 0u {
        let outputs = vec4(output) + vec4(0u, 1u, 2u, 3u) * COL_LANES;
        let b = tile.expert * params.d_model + min(outputs, vec4(params.d_model - 1u));
        sums += vec4(bias[b.x], bias[b.y], bias[b.z], bias[b.w]);
    }
    let at = permutation[position] * params.d_model + output;
    if output < params.d_model { y[at] = sums.x; }
    if output + COL_LANES < params.d_model { y[at + COL_LANES] = sums.y; }
    if output + 2u * COL_LANES < params.d_model { y[at + 2u * COL_LANES] = sums.z; }
    if output + 3u * COL_LANES < params.d_model { y[at + 3u * COL_LANES] = sums.w; }
}

@compute @workgroup_size(COL_LANES, TILE_ROWS / 8u)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(local_invocation_id) local: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    if lane == 0u { tile = row_tile(workgroup.x); }
    workgroupBarrier();
    if tile.first >= tile.end { return; }
    let first_output = workgroup.y * TILE_COLS;

    let row = local.y * 8u;
    let col = local.x;
    var acc0 = vec4(0.0); var acc1 = vec4(0.0); var acc2 = vec4(0.0); var acc3 = vec4(0.0);
    var acc4 = vec4(0.0); var acc5 = vec4(0.0); var acc6 = vec4(0.0); var acc7 = vec4(0.0);
    for (var first_k = 0u; first_k < params.expert_width; first_k += STEP) {
        // Neighbouring lanes take neighbouring k. What lies outside is 0, as in expert_gate_up.
        for (var i = lane; i < STEP_QUADS * TILE_ROWS; i += LANES) {
            let k = first_k + i % STEP_QUADS * 4u;
            let position = tile.first + i / STEP_QUADS;
            var quad = vec4(0.0);
            if position < tile.end && k < params.expert_width { quad = h_quad(position, k); }
            h_tile[i % STEP_QUADS * ROW_PITCH + i / STEP_QUADS] = quad;
        }
        for (var i = lane; i < STEP_QUADS * TILE_COLS; i += LANES) {
            // Along a row of weights where it is contiguous, else across rows.
            let along_k = params.k_stride == 1u;
            let quad_k = select(i / TILE_COLS, i % STEP_QUADS, along_k);
            let tile_col = select(i % TILE_COLS, i / STEP_QUADS, along_k);
            let k = first_k + quad_k * 4u;
            let output = first_output + tile_col;
            var quad = vec4(0.0);
            if output < params.d_model && k < params.expert_width {
                let element = output * params.row_stride + k * params.k_stride;
                quad = down_quad(tile.place, element, params.expert_width - k);
            }
            down_tile[quad_k * COL_PITCH + tile_col] = quad;
        }
        workgroupBarrier();
        for (var quad = 0u; quad < STEP_QUADS; quad++) {
            let c = quad * COL_PITCH + col;
            let w = transpose(mat4x4(down_tile[c], down_tile[c + COL_LANES],
                                     down_tile[c + 2u * COL_LANES], down_tile[c + 3u * COL_LANES]));
            // By hand: accumulators in an array that a loop indexes would leave the registers.
            let r = quad * ROW_PITCH + row;
            acc0 = accumulate(acc0, h_tile[r], w);
            acc1 = accumulate(acc1, h_tile[r + 1u], w);
            acc2 = accumulate(acc2, h_tile[r + 2u], w);
            acc3 = accumulate(acc3, h_tile[r + 3u], w);
            acc4 = accumulate(acc4, h_tile[r + 4u], w);
            acc5 = accumulate(acc5, h_tile[r + 5u], w);
            acc6 = accumulate(acc6, h_tile[r + 6u], w);
            acc7 = accumulate(acc7, h_tile[r + 7u], w);
        }
        workgroupBarrier();
    }
    let position = tile.first + row;
    let output = first_output + col;
    store(position, output, acc0);
    store(position + 1u, output, acc1);
    store(position + 2u, output, acc2);
    store(position + 3u, output, acc3);
    store(position + 4u, output, acc4);
    store(position + 5u, output, acc5);
    store(position + 6u, output, acc6);
    store(position + 7u, output, acc7);
}
