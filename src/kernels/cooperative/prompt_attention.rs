//! Causal attention of prompt rows over the paged KV of the GPU, on cooperative matrices.

use super::unroll::unroll;
use crate::checkpoint::Dtype;
use crate::gpu::{Access::*, GpuError, Kernel, Part, Recorder, Slice, Variant};
use crate::kernels::BLOCK_TOKENS;
use crate::kernels::paged_attention::{Bindings, MAX_HEAD_WIDTH, Shape};
use crate::kernels::prompt_attention::Params;

pub static PROMPT_ATTENTION: Kernel = Kernel {
    name: "cooperative/prompt_attention",
    parts: &[Part::Template(source)],
    bindings: &[Read, Read, Read, Read, ReadWrite, Read],
    param_bytes: size_of::<Params>(),
    params: Params::FIELDS,
    // WIDTH is the head's: every width that `fits` has its own text.
    tunables: &[("WIDTH", &[128, 64, 16, 24, 256]), ("SUBGROUPS", &[4, 2, 1, 8]), ("PREFETCH", &[1, 0])],
};

/// Tokens of context between two barriers: part of a row's order of summation, so no tunable.
const KEYS: u32 = BLOCK_TOKENS as u32;

fn source(variant: &Variant) -> String {
    let tunable = |name| PROMPT_ATTENTION.tunable(variant, name);
    let (width, subgroups, prefetch) = (tunable("WIDTH"), tunable("SUBGROUPS"), tunable("PREFETCH") == 1);
    let fragments = width.div_ceil(16);
    // What of the queries goes through the memory of K at a time: no more than K takes itself.
    let query_fragments = (1..=fragments)
        .rfind(|n| {
            fragments.is_multiple_of(*n)
                && 16 * subgroups * (2 * n + 1) <= (KEYS * (2 * fragments + 1)).max(48 * subgroups)
        })
        .expect("1 divides everything");
    let counts = [
        ("FRAGS", fragments),
        ("KEY_FRAGS", KEYS / 16),
        ("KEYS / 4u", KEYS / 4),
        ("KEYS / 8u", KEYS / 8),
        ("Q_CHUNKS", fragments / query_fragments),
        ("Q_FRAGS", query_fragments),
        ("LOADS", (KEYS * width / 4).div_ceil(32 * subgroups)),
    ];
    format!(
        "enable f16;\nenable wgpu_cooperative_matrix;\n\
         const WIDTH: u32 = {width}u;\nconst SUBGROUPS: u32 = {subgroups}u;\nconst KEYS: u32 = {KEYS}u;\n\
         const Q_CHUNKS: u32 = {}u;\nconst PREFETCH: bool = {prefetch};\n{}",
        fragments / query_fragments,
        unroll(include_str!("../../../shaders/cooperative/prompt_attention.wgsl"), &counts)
    )
}

/// How the kernel's work is cut. Changes time and never bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// Of 16 rows each, a row being a token and a query head.
    pub subgroups: u32,
    /// The next step's K and V are on their way to registers while this one's are multiplied.
    pub prefetch: bool,
}

impl Cut {
    /// As many rows as there is workgroup memory for, which share what is read: on an NVIDIA H200 twice as fast with 8 subgroups as with 4,
    /// at 2,048 tokens.
    pub fn of(shape: &Shape) -> Self {
        let subgroups = match shape.head_width {
            0..=128 => 8,
            129..=192 => 4,
            _ => 2,
        };
        Self { subgroups, prefetch: true }
    }

    /// The kernel has a text for this shape. Others take the portable kernel.
    pub fn fits(&self, shape: &Shape) -> bool {
        shape.head_width.is_multiple_of(4)
            && shape.q_stride.is_multiple_of(4)
            && shape.head_width <= MAX_HEAD_WIDTH
            && self.tile_tokens(shape) > 0
    }

    /// Most tokens of a tile.
    pub fn tile_tokens(&self, shape: &Shape) -> u32 {
        16 * self.subgroups / shape.group()
    }

    /// The variant that [`record`] takes.
    pub fn variant(&self, shape: &Shape) -> Variant {
        Variant::new(Dtype::F32)
            .with("WIDTH", shape.head_width)
            .with("SUBGROUPS", self.subgroups)
            .with("PREFETCH", self.prefetch as u32)
    }
}

/// As [`prompt_attention`](crate::kernels::prompt_attention::record) has it, where the cut [fits](Cut::fits) the shape.
pub fn record(
    recorder: &mut Recorder<'_>,
    shape: &Shape,
    cut: Cut,
    (list, n_tiles): (Slice<'_>, usize),
    bindings: Bindings<'_>,
) -> Result<(), GpuError> {
    shape.check(PROMPT_ATTENTION.name);
    assert!(cut.fits(shape), "{}: no text for {shape:?} by {cut:?}", PROMPT_ATTENTION.name);
    let Bindings { qkv, block_table, kv_blocks, out, sinks } = bindings;
    recorder.dispatch(
        &PROMPT_ATTENTION,
        &cut.variant(shape),
        &Params::new(shape, n_tiles),
        &[qkv, list, block_table, kv_blocks, out, sinks],
        [shape.kv_heads, n_tiles as u32, 1],
    )
}
