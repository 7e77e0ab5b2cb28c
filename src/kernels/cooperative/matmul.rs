//! Rows times a weight matrix, on cooperative matrices.

use super::{TUNABLES, Tile, template};
use crate::checkpoint::Dtype;
use crate::gpu::{Access::*, GpuError, Kernel, Part, Recorder, Slice, Variant, params};
use crate::kernels::half_rows::HalfRows;

params! {
    /// Immediates of `shaders/cooperative/matmul.wgsl`.
    pub struct Params {
        /// T
        pub n_rows: u32,
        /// Rows of the weight matrix: outputs per row of x.
        pub n_out: u32,
        /// Columns of the weight matrix: terms of each sum.
        pub n_in: u32,
        /// Elements from one row of y to the next.
        pub y_stride: u32,
        /// Column of y that row 0 of the weights makes.
        pub y_offset: u32,
        /// 1: add to what y holds (the residual). 0: overwrite it.
        pub accumulate: u32,
    }
}

impl Params {
    /// `y[T, n_out] = x[T, n_in] · w[n_out, n_in]ᵀ`, rows of y contiguous.
    pub fn dense(n_rows: u32, n_out: u32, n_in: u32) -> Self {
        Self { n_rows, n_out, n_in, y_stride: n_out, y_offset: 0, accumulate: 0 }
    }
}

pub static MATMUL: Kernel = Kernel {
    name: "cooperative/matmul",
    parts: &[Part::Template(source)],
    bindings: &[Read, Read, Read, ReadWrite],
    param_bytes: size_of::<Params>(),
    params: Params::FIELDS,
    tunables: TUNABLES,
};

/// [`Tile::WORKGROUP`], for halves in whole tiles.
pub static WORKGROUP_MATMUL: Kernel = Kernel {
    name: "spirv/matmul",
    parts: &[Part::Spirv(spirv)],
    bindings: &[Read, Read, Read, ReadWrite],
    param_bytes: size_of::<Params>(),
    params: Params::FIELDS,
    tunables: &[],
};

fn spirv(weights: Dtype) -> &'static [u8] {
    match weights {
        Dtype::Bf16 => include_bytes!("../../../shaders/spirv/matmul_bf16.spv"),
        _ => include_bytes!("../../../shaders/spirv/matmul_f16.spv"),
    }
}

/// The SPIR-V is for halves, in whole tiles of weights.
fn takes(weights: Dtype, params: &Params) -> bool {
    let whole = params.n_out.is_multiple_of(Tile::WORKGROUP.cols) && params.n_in.is_multiple_of(Tile::WORKGROUP.depth);
    matches!(weights, Dtype::Bf16 | Dtype::F16) && whole
}

fn source(variant: &Variant) -> String {
    let operation = template::Operation {
        weights: template::Weights::Whole(2),
        text: include_str!("../../../shaders/cooperative/matmul.wgsl"),
    };
    template::source(&MATMUL, &operation, variant)
}

/// The kernel and its variant that [`record`] takes for these weights.
pub fn kernel(weights: Dtype, tile: Tile, n_in: u32) -> (&'static Kernel, Variant) {
    match tile.workgroup {
        true => (&WORKGROUP_MATMUL, Variant::new(weights)),
        false => (&MATMUL, super::variant(weights, tile, n_in, [n_in, 1, 0], true)),
    }
}

/// `y[t, y_offset + n] (+)= sum over k of x[t, k] * w[n, k]`, as [`matmul`](crate::kernels::matmul::record) has it.
pub fn record(
    recorder: &mut Recorder<'_>,
    weights: Dtype,
    tile: Tile,
    params: Params,
    x: HalfRows<'_>,
    w: Slice<'_>,
    y: Slice<'_>,
) -> Result<(), GpuError> {
    let tile = if tile.workgroup && !takes(weights, &params) { Tile::MANY } else { tile };
    let workgroups = [params.n_rows.div_ceil(tile.rows), params.n_out.div_ceil(tile.cols), 1];
    let (kernel, variant) = kernel(weights, tile, params.n_in);
    recorder.dispatch(kernel, &variant, &params, &[x.rows, x.scales, w, y], workgroups)
}
