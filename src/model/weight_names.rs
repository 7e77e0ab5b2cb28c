//! Which tensor of a checkpoint plays which role.
//!
//! In: a [`ModelConfig`]. Out: one [`TensorSpec`] for every tensor that the family keeps on disk, no role twice, no name
//! twice. Where the embedding table is also the LM head, [`Role::LmHead`] has no tensor of its own:
//! [`Role::stored_as`] says where its bytes are.
//!
//! Given up: one tensor plays one role. DBRX keeps all experts of a layer in one tensor; its file will need specs that
//! name a range of rows, and only [`TensorSpec`] and `checkpoint::inventory` will see the difference.

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

/// What a tensor is for. Layers and experts count from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    Embedding,
    FinalNorm,
    LmHead,
    AttentionNorm { layer: usize },
    Query { layer: usize },
    Key { layer: usize },
    Value { layer: usize },
    AttentionOutput { layer: usize },
    ExpertNorm { layer: usize },
    Router { layer: usize },
    Expert { layer: usize, expert: usize, matrix: ExpertMatrix },
}

impl Role {
    /// The part of the model that this role counts towards.
    pub fn kind(self) -> Kind {
        match self {
            Role::Embedding => Kind::Embedding,
            Role::FinalNorm | Role::AttentionNorm { .. } | Role::ExpertNorm { .. } => Kind::Norms,
            Role::LmHead => Kind::Head,
            Role::Query { .. } | Role::Key { .. } | Role::Value { .. } | Role::AttentionOutput { .. } => {
                Kind::Attention
            }
            Role::Router { .. } => Kind::Routers,
            Role::Expert { .. } => Kind::Experts,
        }
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
}

/// Every tensor that a checkpoint of this model must have, in the order of a forward pass.
pub fn tensors(config: &ModelConfig) -> Vec<TensorSpec> {
    config.family.tensors(config)
}
