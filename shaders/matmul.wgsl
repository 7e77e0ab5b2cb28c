// y[t, y_offset + n] (+)= sum over k of x[t, x_offset + k] * w[n, k].
// One workgroup per tile of TILE_ROWS x TILE_COLS outputs. For every STEP values of k it lays the x and w of its tile into
// workgroup memory, k first; an invocation owns 16 rows x 4 columns, so that five vec4 loads feed 64 multiply-adds.
// Each output is one chain acc = fma(x, w, acc) with k ascending, whatever the tile: the tile changes time, never bits.
// Reference: src/reference/matmul.rs      Needs: shared/weight_*
struct Params {
    n_rows: u32, n_out: u32, n_in: u32,
    x_stride: u32, x_offset: u32,
    y_stride: u32, y_offset: u32,
    accumulate: u32,
}
var<immediate> params: Params;
@group(0) @binding(0) var<storage, read>       x: array<f32>; // [T, x_stride], columns x_offset .. x_offset + n_in
@group(0) @binding(1) var<storage, read>       w: array<u32>; // [n_out, n_in] weights
@group(0) @binding(2) var<storage, read_write> y: array<f32>; // [T, y_stride], columns y_offset .. y_offset + n_out

override TILE_ROWS: u32 = 16u; // a multiple of 16
override TILE_COLS: u32 = 64u; // a multiple of 4

const STEP: u32 = 16u;
override ROW_QUADS: u32 = TILE_ROWS / 4u;
override COL_QUADS: u32 = TILE_COLS / 4u;
override LANES: u32 = COL_QUADS * (TILE_ROWS / 16u);
// An odd number of vec4 from one k to the next: lanes that fill neighbouring k then meet different banks.
override COL_PITCH: u32 = COL_QUADS + 1u;

var<workgroup> x_tile: array<vec4<f32>, STEP * ROW_QUADS>; // [STEP][ROW_QUADS], four rows to a vec4
var<workgroup> w_tile: array<vec4<f32>, STEP * COL_PITCH>; // [STEP][COL_PITCH], four columns to a vec4

// Zero outside: a zero from beyond n_in meets only zeros, and rows and columns from beyond the result are not stored.
fn x_at(row: u32, k: u32) -> f32 {
    if row >= params.n_rows || k >= params.n_in { return 0.0; }
    return x[row * params.x_stride + params.x_offset + k];
}

fn w_at(column: u32, k: u32) -> f32 {
    if column >= params.n_out || k >= params.n_in { return 0.0; }
    let element = column * params.n_in + k;
    return weight_from_word(w[weight_word_index(element)], element);
}

// Four rows (the components of `a`) times the four columns of `b`, into accumulators `first` and on. All indices of `acc`
// are constants once the calls are inlined, so it stays in registers.
fn multiply_add(acc: ptr<function, array<vec4<f32>, 16>>, first: u32, a: vec4<f32>, b: vec4<f32>) {
    (*acc)[first] = fma(vec4(a.x), b, (*acc)[first]);
    (*acc)[first + 1u] = fma(vec4(a.y), b, (*acc)[first + 1u]);
    (*acc)[first + 2u] = fma(vec4(a.z), b, (*acc)[first + 2u]);
    (*acc)[first + 3u] = fma(vec4(a.w), b, (*acc)[first + 3u]);
}

fn store(row: u32, column: u32, value: f32) {
    if row >= params.n_rows || column >= params.n_out { return; }
    let at = row * params.y_stride + params.y_offset + column;
    if params.accumulate != 0u { y[at] += value; } else { y[at] = value; }
}

fn store_row(row: u32, column: u32, values: vec4<f32>) {
    store(row, column, values.x);
    store(row, column + 1u, values.y);
    store(row, column + 2u, values.z);
    store(row, column + 3u, values.w);
}

@compute @workgroup_size(COL_QUADS, TILE_ROWS / 16u)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(local_invocation_id) local: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    // Row tiles run fastest, so the workgroups that share columns of w are neighbours and w leaves DRAM once.
    let first_row = workgroup.x * TILE_ROWS;
    let first_column = workgroup.y * TILE_COLS;
    let row_quad = local.y * 4u;
    let col_quad = local.x;
    var acc = array<vec4<f32>, 16>();
    for (var first_k = 0u; first_k < params.n_in; first_k += STEP) {
        // Neighbouring lanes take neighbouring k: one row of x or w is contiguous in memory.
        for (var i = lane; i < STEP * ROW_QUADS; i += LANES) {
            let row = first_row + (i / STEP) * 4u;
            let k = first_k + i % STEP;
            x_tile[(i % STEP) * ROW_QUADS + i / STEP] =
                vec4(x_at(row, k), x_at(row + 1u, k), x_at(row + 2u, k), x_at(row + 3u, k));
        }
        for (var i = lane; i < STEP * COL_QUADS; i += LANES) {
            let column = first_column + (i / STEP) * 4u;
            let k = first_k + i % STEP;
            w_tile[(i % STEP) * COL_PITCH + i / STEP] =
                vec4(w_at(column, k), w_at(column + 1u, k), w_at(column + 2u, k), w_at(column + 3u, k));
        }
        workgroupBarrier();
        // Left as a loop: unrolled by hand it ran no faster on lavapipe 22.3, whose loads bind it, and took twice as long to
        // compile (2.7 s against 1.3 s). All loops together make 2.6 iterations per k with the smallest tile, below lavapipe's
        // 65,535 per invocation up to an n_in of 25,000.
        for (var k = 0u; k < STEP; k++) {
            let b = w_tile[k * COL_PITCH + col_quad];
            multiply_add(&acc, 0u, x_tile[k * ROW_QUADS + row_quad], b);
            multiply_add(&acc, 4u, x_tile[k * ROW_QUADS + row_quad + 1u], b);
            multiply_add(&acc, 8u, x_tile[k * ROW_QUADS + row_quad + 2u], b);
            multiply_add(&acc, 12u, x_tile[k * ROW_QUADS + row_quad + 3u], b);
        }
        workgroupBarrier();
    }
    let row = first_row + local.y * 16u;
    let column = first_column + col_quad * 4u;
    store_row(row, column, acc[0]);
    store_row(row + 1u, column, acc[1]);
    store_row(row + 2u, column, acc[2]);
    store_row(row + 3u, column, acc[3]);
    store_row(row + 4u, column, acc[4]);
    store_row(row + 5u, column, acc[5]);
    store_row(row + 6u, column, acc[6]);
    store_row(row + 7u, column, acc[7]);
    store_row(row + 8u, column, acc[8]);
    store_row(row + 9u, column, acc[9]);
    store_row(row + 10u, column, acc[10]);
    store_row(row + 11u, column, acc[11]);
    store_row(row + 12u, column, acc[12]);
    store_row(row + 13u, column, acc[13]);
    store_row(row + 14u, column, acc[14]);
    store_row(row + 15u, column, acc[15]);
}
