// y[t, y_offset + n] (+)= sum over k of x[t, k] * w[n, k], on cooperative matrices.
// The loop is src/kernels/cooperative/template.rs's; here are its bindings, where its rows and columns lie, and what becomes of a sum.
// Reference: src/reference/matmul.rs
struct Params {
    n_rows: u32, n_out: u32, n_in: u32,
    y_stride: u32, y_offset: u32,
    accumulate: u32,
}
var<immediate> params: Params;
@group(0) @binding(0) var<storage, read>       x: array<vec4<f16>>;   // [T, n_in up to a multiple of 256]
@group(0) @binding(1) var<storage, read>       scales: array<f32>;    // [T]
@group(0) @binding(3) var<storage, read_write> y: array<f32>;         // [T, y_stride], columns y_offset .. y_offset + n_out

fn terms() -> u32 { return params.n_in; }
fn columns() -> u32 { return params.n_out; }
fn row_stride() -> u32 { return params.n_in; }

fn finish(row: u32, column: u32, sum: f32) {
    let at = row * params.y_stride + params.y_offset + column;
    let value = sum * scales[row];
    if params.accumulate != 0u { y[at] += value; } else { y[at] = value; }
}
