//! What the kernels over experts share on the Rust side: matrices in slabs, and the grid of tiles.
//!
//! An expert's matrix lies contiguous in one of [`N_SLABS`] slabs, from a whole word on. A table of [`Place`]s says where, so
//! one dispatch serves resident and streamed experts alike, and those that are absent are skipped.

use crate::gpu::{Kernel, Slice, Variant};

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

/// WGSL that binds the slabs of `tensor` from `first_binding` on and reads them: `<tensor>_quad`.
pub(super) fn accessor(tensor: &str, first_binding: usize) -> String {
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
    format!(
        "
{bindings}
fn {tensor}_words(slab: u32, i: u32, j: u32) -> vec2<u32> {{
    switch slab {{
{cases}    }}
}}

// Elements `i` to `i + 3` of the matrix at `place`, of which the first `n` (at least 1) exist: the others are 0.
fn {tensor}_quad(place: vec2<u32>, i: u32, n: u32) -> vec4<f32> {{
    if weight_words(2u) == 1u && (i & 1u) == 0u && n >= 4u {{ // two words hold the four
        let first = place.y + weight_word_index(i);
        let words = {tensor}_words(place.x, first, first + 1u);
        return vec4(weight_from_word(words.x, i), weight_from_word(words.x, i + 1u),
                    weight_from_word(words.y, i), weight_from_word(words.y, i + 1u));
    }}
    let e = i + min(vec4(0u, 1u, 2u, 3u), vec4(n - 1u)); // reads nothing that does not exist
    let xy = {tensor}_words(place.x, place.y + weight_word_index(e.x), place.y + weight_word_index(e.y));
    let zw = {tensor}_words(place.x, place.y + weight_word_index(e.z), place.y + weight_word_index(e.w));
    let quad = vec4(weight_from_word(xy.x, e.x), weight_from_word(xy.y, e.y),
                    weight_from_word(zw.x, e.z), weight_from_word(zw.y, e.w));
    return select(vec4(0.0), quad, vec4(0u, 1u, 2u, 3u) < vec4(n));
}}
"
    )
}

/// Workgroups of a kernel that tiles the sorted positions and `n_columns` outputs: see `row_tile` in
/// `shaders/shared/expert_tile.wgsl`. Most tiles are full; up to E of them are partly or wholly empty.
pub(super) fn tiles(
    kernel: &Kernel,
    variant: &Variant,
    n_assignments: u32,
    n_experts: u32,
    n_columns: u32,
) -> [u32; 3] {
    let row_tiles = match n_assignments {
        0 => 0,
        n => n / kernel.tunable(variant, "TILE_ROWS") + n_experts,
    };
    [row_tiles, n_columns.div_ceil(kernel.tunable(variant, "TILE_COLS")), 1]
}
