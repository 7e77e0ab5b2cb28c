//! Which tensor of a checkpoint plays which role.
//!
//! In: a [`ModelConfig`]. Out: one [`TensorSpec`] for every tensor that the family keeps on disk, no role twice, no name
//! twice. Where the embedding table is also the LM head, [`Role::LmHead`] has no tensor of its own:
//! [`Role::stored_as`] says where its bytes are. Where a tensor holds all experts of a layer, [`ExpertLayout`] says which part of
//! it is one expert's.
//!
//! [`ExpertLayout`]: super::ExpertLayout

use super::expert_layout::Packing;
use super::{Kind, ModelConfig};

/// One of the three matrices of an expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ExpertMatrix {
    /// `[F, D]`, goes through the activation.
    Gate,
    /// `[F, D]`, multiplies it.
    Up,
    /// `[D, F]`, brings the product back to the model width.
    Down,
}

impl ExpertMatrix {
    pub const ALL: [ExpertMatrix; 3] = [ExpertMatrix::Gate, ExpertMatrix::Up, ExpertMatrix::Down];
}

/// A tensor that holds something of all experts of a layer. Its first axis counts experts, or is a multiple of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ExpertPart {
    Gate,
    Up,
    Down,
    /// Gate and up, row by row in turns.
    GateUp,
    GateUpScales,
    DownScales,
}

/// What a tensor is for. Layers and experts count from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    Embedding,
    FinalNorm,
    LmHead,
    AttentionNorm {
        layer: usize,
    },
    Query {
        layer: usize,
    },
    Key {
        layer: usize,
    },
    Value {
        layer: usize,
    },
    /// Query, Key and Value in one.
    QueryKeyValue {
        layer: usize,
    },
    QueryBias {
        layer: usize,
    },
    KeyBias {
        layer: usize,
    },
    ValueBias {
        layer: usize,
    },
    QueryNorm {
        layer: usize,
    },
    KeyNorm {
        layer: usize,
    },
    /// One logit per query head.
    Sinks {
        layer: usize,
    },
    AttentionOutput {
        layer: usize,
    },
    AttentionOutputBias {
        layer: usize,
    },
    ExpertNorm {
        layer: usize,
    },
    Router {
        layer: usize,
    },
    RouterBias {
        layer: usize,
    },
    Expert {
        layer: usize,
        expert: usize,
        matrix: ExpertMatrix,
    },
    Experts {
        layer: usize,
        part: ExpertPart,
    },
    /// `[E, 2 F]`, gate and up in turns. Stays on the GPU.
    GateUpBias {
        layer: usize,
    },
    /// `[E, D]`. Stays on the GPU.
    DownBias {
        layer: usize,
    },
}

impl Role {
    /// The part of the model that this role counts towards.
    pub fn kind(self) -> Kind {
        match self {
            Role::Embedding => Kind::Embedding,
            Role::FinalNorm
            | Role::AttentionNorm { .. }
            | Role::ExpertNorm { .. }
            | Role::QueryNorm { .. }
            | Role::KeyNorm { .. } => Kind::Norms,
            Role::LmHead => Kind::Head,
            Role::Query { .. }
            | Role::Key { .. }
            | Role::Value { .. }
            | Role::QueryKeyValue { .. }
            | Role::QueryBias { .. }
            | Role::KeyBias { .. }
            | Role::ValueBias { .. }
            | Role::Sinks { .. }
            | Role::AttentionOutput { .. }
            | Role::AttentionOutputBias { .. } => Kind::Attention,
            Role::Router { .. } | Role::RouterBias { .. } => Kind::Routers,
            Role::Expert { .. } | Role::Experts { .. } | Role::GateUpBias { .. } | Role::DownBias { .. } => {
                Kind::Experts
            }
        }
    }

    /// Its bytes go through expert slots; everything else stays on the GPU as a buffer of its own.
    pub fn in_slots(self) -> bool {
        matches!(self, Role::Expert { .. } | Role::Experts { .. })
    }

    /// Small numbers that are added one by one: kept as f32 whatever the checkpoint has.
    pub fn kept_as_f32(self) -> bool {
        matches!(
            self,
            Role::QueryBias { .. }
                | Role::KeyBias { .. }
                | Role::ValueBias { .. }
                | Role::Sinks { .. }
                | Role::AttentionOutputBias { .. }
                | Role::RouterBias { .. }
                | Role::GateUpBias { .. }
                | Role::DownBias { .. }
        )
    }

    /// The role under which the bytes of this one are stored: itself, or the embedding for a tied LM head.
    pub fn stored_as(self, config: &ModelConfig) -> Role {
        if self == Role::LmHead && config.tied_embeddings { Role::Embedding } else { self }
    }
}

/// A tensor that the family needs: its name on disk and its shape (`[out, in]`, row-major).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    pub role: Role,
    pub name: String,
    pub shape: Vec<usize>,
}

impl TensorSpec {
    pub(super) fn new(role: Role, name: impl Into<String>, shape: impl Into<Vec<usize>>) -> TensorSpec {
        TensorSpec { role, name: name.into(), shape: shape.into() }
    }

    /// Elements of the tensor. Fits, because the shape came out of a validated config.
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&extent| extent as u64).product()
    }

    /// Weights that the elements stand for.
    pub fn parameters(&self, config: &ModelConfig) -> u64 {
        match config.forward.experts.packing(self.role) {
            Packing::Floats => self.elements(),
            Packing::Mxfp4Blocks => 2 * self.elements(),
            Packing::Mxfp4Scales => 0,
        }
    }
}

/// Every tensor that a checkpoint of this model must have, in the order of a forward pass.
pub fn tensors(config: &ModelConfig) -> Vec<TensorSpec> {
    config.family.tensors(config)
}
