//! What the kernels over experts share on the Rust side: matrices in slabs, and the grid of tiles.
//!
//! An expert's matrix lies contiguous in one of [`N_SLABS`] slabs, from a whole word on. A table of [`Place`]s says where, so
//! one dispatch serves resident and streamed experts alike, and those that are absent are skipped.

use crate::checkpoint::Dtype;
use crate::gpu::{Kernel, Slice, Variant};
use crate::model::expert_layout::Matrix;
use crate::model::{ExpertLayout, ExpertMatrix, Shape};

/// Slab bindings per matrix kind. One layer of any model fits one slab; more hold the ring of layers beside the residents.
pub const N_SLABS: usize = 4;

/// [`Place::slab`] of an expert that is not on the GPU.
pub const ABSENT: u32 = u32::MAX;

/// Where an expert's matrix lies: `vec2<u32>` in the shaders.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, bytemuck::NoUninit)]
pub struct Place {
    /// Which slab, below [`N_SLABS`], or [`ABSENT`].
    pub slab: u32,
    /// Start of the matrix inside the slab, in words of 4 bytes.
    pub offset_words: u32,
}

impl Place {
    pub const ABSENT: Place = Place { slab: ABSENT, offset_words: 0 };
}

/// The slabs of one matrix kind, in order. The same slice may stand in several places, for slabs that hold nothing.
pub type Slabs<'a> = [Slice<'a>; N_SLABS];

/// WGSL that binds the slabs of `tensor` from `first_binding` on and reads them: `<tensor>_quad`, four elements along the sum of a
/// product, `params.k_stride` apart. MXFP4 has their scales from word `params.scales_at` of the matrix on.
pub(super) fn accessor(tensor: &str, first_binding: usize, weights: Dtype) -> String {
    let bindings: String = (0..N_SLABS)
        .map(|slab| {
            let binding = first_binding + slab;
            format!(
                "@group(0) @binding({binding}) var<storage, read> {tensor}_slab_{slab}: array<u32>; // weight words\n"
            )
        })
        .collect();
    let cases: String = (0..N_SLABS)
        .map(|slab| {
            // The last one is the default, for a switch needs one.
            let label = if slab + 1 == N_SLABS { "default".to_owned() } else { format!("case {slab}u") };
            format!("        {label}: {{ return vec2({tensor}_slab_{slab}[i], {tensor}_slab_{slab}[j]); }}\n")
        })
        .collect();
    let quad = match weights {
        Dtype::Mxfp4 => block_quad(tensor),
        Dtype::Bf16 | Dtype::F16 | Dtype::F32 => element_quad(tensor),
    };
    format!(
        "
{bindings}
fn {tensor}_words(slab: u32, i: u32, j: u32) -> vec2<u32> {{
    switch slab {{
{cases}    }}
}}
{quad}"
    )
}

/// Elements that stand alone.
pub(super) fn element_quad(tensor: &str) -> String {
    format!(
        "
// Elements `i`, `i + k_stride` and so on of the matrix at `place`, of which the first `n` (at least 1) exist: the others are 0.
fn {tensor}_quad(place: vec2<u32>, i: u32, n: u32) -> vec4<f32> {{
    if weight_words(2u) == 1u && params.k_stride == 1u && (i & 1u) == 0u && n >= 4u {{ // two words hold the four
        let first = place.y + weight_word_index(i);
        let words = {tensor}_words(place.x, first, first + 1u);
        return vec4(weight_from_word(words.x, i), weight_from_word(words.x, i + 1u),
                    weight_from_word(words.y, i), weight_from_word(words.y, i + 1u));
    }}
    let e = i + min(vec4(0u, 1u, 2u, 3u), vec4(n - 1u)) * params.k_stride; // reads nothing that does not exist
    let xy = {tensor}_words(place.x, place.y + weight_word_index(e.x), place.y + weight_word_index(e.y));
    let zw = {tensor}_words(place.x, place.y + weight_word_index(e.z), place.y + weight_word_index(e.w));
    let quad = vec4(weight_from_word(xy.x, e.x), weight_from_word(xy.y, e.y),
                    weight_from_word(zw.x, e.z), weight_from_word(zw.y, e.w));
    return select(vec4(0.0), quad, vec4(0u, 1u, 2u, 3u) < vec4(n));
}}
"
    )
}

/// MXFP4: rows are whole blocks, so four elements share a scale and none is missing.
fn block_quad(tensor: &str) -> String {
    format!(
        "
// Elements `i` to `i + 3` of the matrix at `place`; i is a multiple of 4.
fn {tensor}_quad(place: vec2<u32>, i: u32, n: u32) -> vec4<f32> {{
    let words = {tensor}_words(place.x, place.y + i / 8u, place.y + params.scales_at + i / 128u);
    return mxfp4_quad(words.x, words.y, i);
}}
"
    )
}

/// How the matrices of an expert lie in their slots, for a kernel's parameters; see
/// [`expert_layout`](crate::model::expert_layout).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Elements from one output's weights to the next one's.
    pub row_stride: u32,
    /// Elements from one term of the sum to the next.
    pub k_stride: u32,
    /// Element with which up begins: not 0 where it lies in gate's slot.
    pub up_first: u32,
    /// Word of the slot with which the scales of MXFP4 begin.
    pub scales_at: u32,
}

impl Layout {
    /// A matrix `[out, n_in]` to a slot, row by row.
    pub fn rows(n_in: u32) -> Self {
        Self { row_stride: n_in, k_stride: 1, up_first: 0, scales_at: 0 }
    }

    /// Of the gate and up matrices of `shape`.
    pub fn gate_up(layout: ExpertLayout, shape: &Shape) -> Self {
        let up = layout.matrix(shape, ExpertMatrix::Up);
        Self { up_first: up.first as u32, ..Self::of(layout, shape, ExpertMatrix::Gate, 2) }
    }

    /// Of the down matrices of `shape`.
    pub fn down(layout: ExpertLayout, shape: &Shape) -> Self {
        Self::of(layout, shape, ExpertMatrix::Down, 1)
    }

    /// `matrices`: how many share the slot where `layout` is MXFP4.
    fn of(layout: ExpertLayout, shape: &Shape, matrix: ExpertMatrix, matrices: usize) -> Self {
        let Matrix { row_stride, k_stride, .. } = layout.matrix(shape, matrix);
        let codes_per_word = 8;
        let scales_at = match layout {
            ExpertLayout::Mxfp4 => matrices * shape.expert_matrix_elements() / codes_per_word,
            _ => 0,
        };
        Self { row_stride: row_stride as u32, k_stride: k_stride as u32, up_first: 0, scales_at: scales_at as u32 }
    }
}

/// Workgroups of a kernel that tiles the sorted positions and `n_columns` outputs: see `row_tile` in
/// `shaders/shared/expert_tile.wgsl`. Most tiles are full; up to E of them are partly or wholly empty.
pub(super) fn tiles([rows, cols]: [u32; 2], n_assignments: u32, n_experts: u32, n_columns: u32) -> [u32; 3] {
    let row_tiles = match n_assignments {
        0 => 0,
        n => n / rows + n_experts,
    };
    [row_tiles, n_columns.div_ceil(cols), 1]
}

/// Rows and columns of a tile of a portable kernel.
pub(super) fn tile(kernel: &Kernel, variant: &Variant) -> [u32; 2] {
    ["TILE_ROWS", "TILE_COLS"].map(|tunable| kernel.tunable(variant, tunable))
}
