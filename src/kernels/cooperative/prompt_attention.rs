//! Causal attention of prompt rows over the paged KV of the GPU, on cooperative matrices.

use super::unroll::unroll;
use crate::checkpoint::Dtype;
use crate::gpu::{Access::*, GpuError, Kernel, Part, Recorder, Slice, Variant};
use crate::kernels::paged_attention::{Bindings, MAX_HEAD_WIDTH, Shape};
use crate::kernels::prompt_attention::Params;

pub static PROMPT_ATTENTION: Kernel = Kernel {
    name: "cooperative/prompt_attention",
    parts: &[Part::Template(source)],
    bindings: &[Read, Read, Read, Read, ReadWrite, Read],
    param_bytes: size_of::<Params>(),
    params: Params::FIELDS,
    // WIDTH is the head's: every width that `fits` has its own text.
    tunables: &[("WIDTH", &[128, 64, 16, 24, 256]), ("SUBGROUPS", &[4, 2])],
};

/// Tokens of context between two barriers: part of a row's order of summation, so no tunable.
const KEYS: u32 = 32;

fn source(variant: &Variant) -> String {
    let tunable = |name| PROMPT_ATTENTION.tunable(variant, name);
    let (width, subgroups) = (tunable("WIDTH"), tunable("SUBGROUPS"));
    let fragments = width.div_ceil(16);
    // What of the queries goes through the memory of K at a time: at most 64 elements of each.
    let query_fragments = (1..=4).rfind(|n| fragments.is_multiple_of(*n)).expect("1 divides everything");
    let loads = (KEYS / 4 * width / 4).div_ceil(32 * subgroups);
    let counts = [
        ("FRAGS", fragments),
        ("KEY_FRAGS", KEYS / 16),
        ("KEY_QUADS", KEYS / 4),
        ("KEY_QUADS / 2u", KEYS / 8),
        ("Q_CHUNKS", fragments / query_fragments),
        ("Q_FRAGS", query_fragments),
        ("LOADS", loads),
        ("4u * LOADS", 4 * loads),
    ];
    format!(
        "enable f16;\nenable wgpu_cooperative_matrix;\n\
         const WIDTH: u32 = {width}u;\nconst SUBGROUPS: u32 = {subgroups}u;\nconst KEYS: u32 = {KEYS}u;\n\
         const Q_CHUNKS: u32 = {}u;\nconst PREFETCH: bool = false;\n{}",
        fragments / query_fragments,
        unroll(include_str!("../../../shaders/cooperative/prompt_attention.wgsl"), &counts)
    )
}

/// The kernel has a text for this shape. Others take the portable kernel.
pub fn fits(shape: &Shape) -> bool {
    let vectors = |n: u32| n.is_multiple_of(4);
    vectors(shape.head_width) && vectors(shape.q_stride) && shape.head_width <= MAX_HEAD_WIDTH && tile_tokens(shape) > 0
}

/// As many as there is workgroup memory for.
fn subgroups(shape: &Shape) -> u32 {
    if shape.head_width > 192 { 2 } else { 4 }
}

/// Most tokens of a tile.
pub fn tile_tokens(shape: &Shape) -> u32 {
    16 * subgroups(shape) / shape.group()
}

/// The variant that [`record`] takes.
pub fn variant(shape: &Shape) -> Variant {
    Variant::new(Dtype::F32).with("WIDTH", shape.head_width).with("SUBGROUPS", subgroups(shape))
}

/// As [`prompt_attention`](crate::kernels::prompt_attention::record) has it, where the shape [`fits`].
pub fn record(
    recorder: &mut Recorder<'_>,
    shape: &Shape,
    (list, n_tiles): (Slice<'_>, usize),
    bindings: Bindings<'_>,
) -> Result<(), GpuError> {
    shape.check(PROMPT_ATTENTION.name);
    assert!(fits(shape), "{}: no text for {shape:?}", PROMPT_ATTENTION.name);
    let Bindings { qkv, block_table, kv_blocks, out, sinks } = bindings;
    recorder.dispatch(
        &PROMPT_ATTENTION,
        &variant(shape),
        &Params::new(shape, n_tiles),
        &[qkv, list, block_table, kv_blocks, out, sinks],
        [shape.kv_heads, n_tiles as u32, 1],
    )
}
