// h[pos, f] = activate(sum over k of x[t, k] * gate[e][f, k] + bias, sum over k of x[t, k] * up[e][f, k] + bias)
// for every sorted position pos, where t = permutation[pos] / A and e is the expert that pos belongs to.
// One workgroup per tile of TILE_ROWS positions of one expert x TILE_COLS features. For every STEP values of k it lays the x,
// gate and up of its tile into workgroup memory, four k to a vec4; an invocation owns 8 rows x 4 features of both products,
// so that 16 vec4 loads feed 256 multiply-adds.
// Reference: src/reference/expert_gate_up.rs      Needs: shared/weight_*, kernels/slabs.rs (gate_quad, up_quad), shared/expert_tile,
// shared/expert_activation
struct Params {
    n_assignments: u32, n_experts: u32, n_chosen: u32, d_model: u32, expert_width: u32,
    row_stride: u32, k_stride: u32, up_first: u32, scales_at: u32,
    biased: u32, limit: f32,
}
var<immediate> params: Params;
@group(0) @binding(0) var<storage, read>       x: array<f32>;           // [T, D]
@group(0) @binding(1) var<storage, read>       permutation: array<u32>; // [T * A] assignment of each sorted position
@group(0) @binding(2) var<storage, read>       offsets: array<u32>;     // [E + 1] first sorted position of each expert
@group(0) @binding(3) var<storage, read>       places: array<vec2<u32>>;// [E] slab and offset in words, of gate and of up
@group(0) @binding(4) var<storage, read_write> h: array<f32>;           // [T * A, F] by sorted position
// Bindings 5 to 8: the slabs of gate, 9 to 12: those of up; element (f, k) of an expert's gate is weight
// f * row_stride + k * k_stride of its place, of its up that plus up_first.
@group(0) @binding(13) var<storage, read>      bias: array<f32>;        // [E, F, 2] of gate and up, where biased

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
var<workgroup> x_first: array<u32, TILE_ROWS>;                     // where each row starts in x
var<workgroup> x_tile: array<vec4<f32>, STEP_QUADS * ROW_PITCH>;    // [STEP / 4][rows], four k to a vec4
var<workgroup> gate_tile: array<vec4<f32>, STEP_QUADS * COL_PITCH>; // [STEP / 4][features], four k to a vec4
var<workgroup> up_tile: array<vec4<f32>, STEP_QUADS * COL_PITCH>;

// Elements k to k + 3 of a row of the tile, 0 from beyond the row. k is below D.
fn x_quad(row: u32, k: u32) -> vec4<f32> {
    let n = params.d_model - k;
    let e = x_first[row] + k + min(vec4(0u, 1u, 2u, 3u), vec4(n - 1u));
    return select(vec4(0.0), vec4(x[e.x], x[e.y], x[e.z], x[e.w]), vec4(0u, 1u, 2u, 3u) < vec4(n));
}

// Columns of one invocation lie COL_LANES apart, so neighbouring lanes read and write neighbouring ones.
fn store(position: u32, feature: u32, gate: vec4<f32>, up: vec4<f32>) {
    if position >= tile.end { return; }
    let features = vec4(feature) + vec4(0u, 1u, 2u, 3u) * COL_LANES;
    var gate_bias = vec4(0.0);
    var up_bias = vec4(0.0);
    if params.biased != 0u {
        let b = 2u * (tile.expert * params.expert_width + min(features, vec4(params.expert_width - 1u)));
        gate_bias = vec4(bias[b.x], bias[b.y], bias[b.z], bias[b.w]);
        up_bias = vec4(bias[b.x + 1u], bias[b.y + 1u], bias[b.z + 1u], bias[b.w + 1u]);
    }
    let values = activate(gate + gate_bias, up + up_bias);
    let at = position * params.expert_width + feature;
    if feature < params.expert_width { h[at] = values.x; }
    if feature + COL_LANES < params.expert_width { h[at + COL_LANES] = values.y; }
    if feature + 2u * COL_LANES < params.expert_width { h[at + 2u * COL_LANES] = values.z; }
    if feature + 3u * COL_LANES < params.expert_width { h[at + 3u * COL_LANES] = values.w; }
}

@compute @workgroup_size(COL_LANES, TILE_ROWS / 8u)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(local_invocation_id) local: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    // Row tiles run fastest, so the workgroups that share features of an expert are neighbours and they leave DRAM once.
    if lane == 0u { tile = row_tile(workgroup.x); }
    workgroupBarrier();
    if tile.first >= tile.end { return; }
    let n_rows = tile.end - tile.first;
    let first_feature = workgroup.y * TILE_COLS;
    for (var row = lane; row < n_rows; row += LANES) {
        x_first[row] = permutation[tile.first + row] / params.n_chosen * params.d_model;
    }
    workgroupBarrier();

    let row = local.y * 8u;
    let col = local.x;
    var gate0 = vec4(0.0); var gate1 = vec4(0.0); var gate2 = vec4(0.0); var gate3 = vec4(0.0);
    var gate4 = vec4(0.0); var gate5 = vec4(0.0); var gate6 = vec4(0.0); var gate7 = vec4(0.0);
    var up0 = vec4(0.0); var up1 = vec4(0.0); var up2 = vec4(0.0); var up3 = vec4(0.0);
    var up4 = vec4(0.0); var up5 = vec4(0.0); var up6 = vec4(0.0); var up7 = vec4(0.0);
    for (var first_k = 0u; first_k < params.d_model; first_k += STEP) {
        // Neighbouring lanes take neighbouring k: rows of x and of the weights are contiguous in memory. What lies outside
        // is 0: a zero from beyond D meets only zeros, and rows and features from beyond the result are not stored.
        for (var i = lane; i < STEP_QUADS * TILE_ROWS; i += LANES) {
            let k = first_k + i % STEP_QUADS * 4u;
            var quad = vec4(0.0);
            if i / STEP_QUADS < n_rows && k < params.d_model { quad = x_quad(i / STEP_QUADS, k); }
            x_tile[i % STEP_QUADS * ROW_PITCH + i / STEP_QUADS] = quad;
        }
        for (var i = lane; i < STEP_QUADS * TILE_COLS; i += LANES) {
            // Along a row of weights where it is contiguous, else across rows.
            let along_k = params.k_stride == 1u;
            let quad_k = select(i / TILE_COLS, i % STEP_QUADS, along_k);
            let tile_col = select(i % TILE_COLS, i / STEP_QUADS, along_k);
            let k = first_k + quad_k * 4u;
            let feature = first_feature + tile_col;
            var gate_k = vec4(0.0);
            var up_k = vec4(0.0);
            if feature < params.expert_width && k < params.d_model {
                let element = feature * params.row_stride + k * params.k_stride;
                gate_k = gate_quad(tile.place, element, params.d_model - k);
                up_k = up_quad(tile.place, element + params.up_first, params.d_model - k);
            }
            gate_tile[quad_k * COL_PITCH + tile_col] = gate_k;
            up_tile[quad_k * COL_PITCH + tile_col] = up_k;
        }
        workgroupBarrier();
        for (var quad = 0u; quad < STEP_QUADS; quad++) {
            let c = quad * COL_PITCH + col;
            let gate_w = transpose(mat4x4(gate_tile[c], gate_tile[c + COL_LANES],
                                          gate_tile[c + 2u * COL_LANES], gate_tile[c + 3u * COL_LANES]));
            let up_w = transpose(mat4x4(up_tile[c], up_tile[c + COL_LANES],
                                        up_tile[c + 2u * COL_LANES], up_tile[c + 3u * COL_LANES]));
            // By hand: accumulators in an array that a loop indexes would leave the registers.
            let r = quad * ROW_PITCH + row;
            let x0 = x_tile[r];      gate0 = accumulate(gate0, x0, gate_w); up0 = accumulate(up0, x0, up_w);
            let x1 = x_tile[r + 1u]; gate1 = accumulate(gate1, x1, gate_w); up1 = accumulate(up1, x1, up_w);
            let x2 = x_tile[r + 2u]; gate2 = accumulate(gate2, x2, gate_w); up2 = accumulate(up2, x2, up_w);
            let x3 = x_tile[r + 3u]; gate3 = accumulate(gate3, x3, gate_w); up3 = accumulate(up3, x3, up_w);
            let x4 = x_tile[r + 4u]; gate4 = accumulate(gate4, x4, gate_w); up4 = accumulate(up4, x4, up_w);
            let x5 = x_tile[r + 5u]; gate5 = accumulate(gate5, x5, gate_w); up5 = accumulate(up5, x5, up_w);
            let x6 = x_tile[r + 6u]; gate6 = accumulate(gate6, x6, gate_w); up6 = accumulate(up6, x6, up_w);
            let x7 = x_tile[r + 7u]; gate7 = accumulate(gate7, x7, gate_w); up7 = accumulate(up7, x7, up_w);
        }
        workgroupBarrier();
    }
    let position = tile.first + row;
    let feature = first_feature + col;
    store(position, feature, gate0, up0);
    store(position + 1u, feature, gate1, up1);
    store(position + 2u, feature, gate2, up2);
    store(position + 3u, feature, gate3, up3);
    store(position + 4u, feature, gate4, up4);
    store(position + 5u, feature, gate5, up5);
    store(position + 6u, feature, gate6, up6);
    store(position + 7u, feature, gate7, up7);
}
