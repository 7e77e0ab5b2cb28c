//! Rows times a weight matrix: projections, router logits, LM head.

use crate::gpu::{Access::*, GpuError, Kernel, Part, Recorder, Slice, Variant, params};

params! {
    /// Immediates of `shaders/matmul.wgsl`.
    pub struct Params {
        /// T
        pub n_rows: u32,
        /// Rows of the weight matrix: outputs per row of x.
        pub n_out: u32,
        /// Columns of the weight matrix: terms of each sum.
        pub n_in: u32,
        /// Elements from one row of x to the next.
        pub x_stride: u32,
        /// Column of x that meets column 0 of the weights.
        pub x_offset: u32,
        /// Elements from one row of y to the next.
        pub y_stride: u32,
        /// Column of y that row 0 of the weights makes.
        pub y_offset: u32,
        /// 1: add to what y holds (the residual). 0: overwrite it.
        pub accumulate: u32,
    }
}

impl Params {
    /// `y[T, n_out] = x[T, n_in] · w[n_out, n_in]ᵀ`, all rows contiguous.
    pub fn dense(n_rows: u32, n_out: u32, n_in: u32) -> Self {
        Self { n_rows, n_out, n_in, x_stride: n_in, x_offset: 0, y_stride: n_out, y_offset: 0, accumulate: 0 }
    }
}

pub static MATMUL: Kernel = Kernel {
    name: "matmul",
    parts: &[Part::Weight, Part::Text(include_str!("../../shaders/matmul.wgsl"))],
    bindings: &[Read, Read, ReadWrite],
    param_bytes: size_of::<Params>(),
    params: Params::FIELDS,
    // Defaults as measured on lavapipe 22.3; a GPU wants the large tile.
    tunables: &[("TILE_ROWS", &[16, 64]), ("TILE_COLS", &[64, 32, 128])],
};

/// `y[t, y_offset + n] (+)= sum over k of x[t, x_offset + k] * w[n, k]`, where x is `[T, x_stride]`, w `[n_out, n_in]` of
/// the variant's weights, y `[T, y_stride]`. Other columns of y are left as they are. x and y lie in different buffers.
pub fn record(
    recorder: &mut Recorder<'_>,
    variant: &Variant,
    params: Params,
    x: Slice<'_>,
    w: Slice<'_>,
    y: Slice<'_>,
) -> Result<(), GpuError> {
    let tiles = |n: u32, tunable: &str| n.div_ceil(MATMUL.tunable(variant, tunable));
    let workgroups = [tiles(params.n_rows, "TILE_ROWS"), tiles(params.n_out, "TILE_COLS"), 1];
    recorder.dispatch(&MATMUL, variant, &params, &[x, w, y], workgroups)
}
