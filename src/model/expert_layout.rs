//! Where the weights of one expert lie in a checkpoint, and how they lie in its slots.
//!
//! An expert has up to three slots: gate, up and down. A slot is filled by [`Source`]s, one after the other: each a whole tensor or
//! the expert's share of one. What a slot then holds is a matrix whose element (row, k) is at `first + row * row_stride +
//! k * k_stride` ([`Matrix`]); for MXFP4 that counts 4-bit elements, and the scales follow behind the last of them.
//!
//! | layout | gate slot | up slot | down slot |
//! |---|---|---|---|
//! | [`Separate`](ExpertLayout::Separate) | gate `[F, D]` | up `[F, D]` | down `[D, F]` |
//! | [`Stacked`](ExpertLayout::Stacked) | share of w1 `[E F, D]` | share of v1 `[E F, D]` | share of w2 `[E F, D]`, untransposed |
//! | [`Interleaved`](ExpertLayout::Interleaved) | share of gate_up `[E, D, 2 F]` | – | share of down `[E, F, D]` |
//! | [`Mxfp4`](ExpertLayout::Mxfp4) | shares of gate_up's blocks `[E, 2 F, D]`, scales | – | shares of down's blocks `[E, D, F]`, scales |
//!
//! Gate and up alternate where they share a slot: even rows are gate's, odd ones up's.

use super::{ExpertMatrix, ExpertPart, Role, Shape};

/// Values that share a scale.
pub const MXFP4_BLOCK: usize = 32;

/// How a checkpoint keeps its experts. See the module's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ExpertLayout {
    Separate,
    Stacked,
    Interleaved,
    Mxfp4,
}

/// Part of a slot: bytes of one tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Source {
    pub role: Role,
    /// `None`: the whole tensor. `Some(e)`: the e-th of E equal parts along its first axis.
    pub share: Option<usize>,
}

/// A matrix in a slot: element (row, k) of it is the slot's element `first + row * row_stride + k * k_stride`, where k runs along
/// the sum of a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Matrix {
    pub first: usize,
    pub row_stride: usize,
    pub k_stride: usize,
}

impl ExpertLayout {
    /// What fills the slot of `matrix`, in order. Nothing where gate's slot holds up as well.
    pub fn sources(self, layer: usize, expert: usize, matrix: ExpertMatrix) -> Vec<Source> {
        let share = |part| Source { role: Role::Experts { layer, part }, share: Some(expert) };
        match (self, matrix) {
            (ExpertLayout::Separate, _) => {
                vec![Source { role: Role::Expert { layer, expert, matrix }, share: None }]
            }
            (ExpertLayout::Stacked, ExpertMatrix::Gate) => vec![share(ExpertPart::Gate)],
            (ExpertLayout::Stacked, ExpertMatrix::Up) => vec![share(ExpertPart::Up)],
            (ExpertLayout::Stacked | ExpertLayout::Interleaved, ExpertMatrix::Down) => vec![share(ExpertPart::Down)],
            (ExpertLayout::Interleaved, ExpertMatrix::Gate) => vec![share(ExpertPart::GateUp)],
            (ExpertLayout::Mxfp4, ExpertMatrix::Gate) => {
                vec![share(ExpertPart::GateUp), share(ExpertPart::GateUpScales)]
            }
            (ExpertLayout::Mxfp4, ExpertMatrix::Down) => vec![share(ExpertPart::Down), share(ExpertPart::DownScales)],
            (ExpertLayout::Interleaved | ExpertLayout::Mxfp4, ExpertMatrix::Up) => Vec::new(),
        }
    }

    /// Gate's slot holds up as well.
    pub fn gate_holds_up(self) -> bool {
        matches!(self, ExpertLayout::Interleaved | ExpertLayout::Mxfp4)
    }

    /// Bytes of each slot, by [`ExpertMatrix::ALL`], with elements of `element_bytes` (which MXFP4 does not look at).
    pub fn slot_bytes(self, shape: &Shape, element_bytes: u64) -> [u64; 3] {
        let elements = shape.expert_matrix_elements() as u64;
        let bytes = |elements: u64| match self {
            // Half a byte each, and one for each block's scale.
            ExpertLayout::Mxfp4 => elements / 2 + elements / MXFP4_BLOCK as u64,
            _ => elements * element_bytes,
        };
        if self.gate_holds_up() { [bytes(2 * elements), 0, bytes(elements)] } else { [bytes(elements); 3] }
    }

    /// How `matrix` lies in its slot (up: in gate's, where that holds both).
    pub fn matrix(self, shape: &Shape, matrix: ExpertMatrix) -> Matrix {
        let Shape { d_model: d, expert_width: f, .. } = *shape;
        let (first, row_stride, k_stride) = match (self, matrix) {
            (ExpertLayout::Separate, ExpertMatrix::Down) | (ExpertLayout::Mxfp4, ExpertMatrix::Down) => (0, f, 1),
            (ExpertLayout::Separate | ExpertLayout::Stacked, ExpertMatrix::Gate | ExpertMatrix::Up) => (0, d, 1),
            (ExpertLayout::Stacked | ExpertLayout::Interleaved, ExpertMatrix::Down) => (0, 1, d),
            (ExpertLayout::Interleaved, ExpertMatrix::Gate) => (0, 2, 2 * f),
            (ExpertLayout::Interleaved, ExpertMatrix::Up) => (1, 2, 2 * f),
            (ExpertLayout::Mxfp4, ExpertMatrix::Gate) => (0, 2 * d, 1),
            (ExpertLayout::Mxfp4, ExpertMatrix::Up) => (d, 2 * d, 1),
        };
        Matrix { first, row_stride, k_stride }
    }

    /// How the elements of a tensor are packed.
    pub fn packing(self, role: Role) -> Packing {
        match (self, role) {
            (ExpertLayout::Mxfp4, Role::Experts { part: ExpertPart::GateUp | ExpertPart::Down, .. }) => {
                Packing::Mxfp4Blocks
            }
            (_, Role::Experts { part: ExpertPart::GateUpScales | ExpertPart::DownScales, .. }) => Packing::Mxfp4Scales,
            _ => Packing::Floats,
        }
    }
}

/// How a tensor packs its elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// One after the other, each bf16, f16 or f32.
    Floats,
    /// Two E2M1 values to a byte, the even one in the low half; 32 of them (the last axis) share a scale.
    Mxfp4Blocks,
    /// One E8M0 exponent of 2 (biased by 127) to a block.
    Mxfp4Scales,
}
