//! How large the parts of a model are, counted from its own tensor list, so that no formula can disagree with it.

use std::ops::{Index, IndexMut};

use super::{ModelConfig, tensors};

/// A part of a model, as far as memory is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    Embedding,
    Attention,
    Norms,
    Routers,
    Experts,
    /// The LM head. Nothing where it is tied to the embedding.
    Head,
}

impl Kind {
    pub const ALL: [Kind; 6] =
        [Kind::Embedding, Kind::Attention, Kind::Norms, Kind::Routers, Kind::Experts, Kind::Head];
}

/// One amount for each [`Kind`]: parameters or bytes, as its owner says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct Sizes {
    pub embedding: u64,
    pub attention: u64,
    pub norms: u64,
    pub routers: u64,
    pub experts: u64,
    pub head: u64,
}

impl Sizes {
    /// Parameters of each kind.
    pub fn parameters(config: &ModelConfig) -> Sizes {
        let mut sizes = Sizes::default();
        for tensor in tensors(config) {
            sizes[tensor.role.kind()] += tensor.parameters(config);
        }
        sizes
    }

    /// Bytes of each kind when every element takes `element_bytes` (2 for bf16 and f16, 4 for f32). A checkpoint may mix
    /// types; what its files hold is in `checkpoint::Summary`.
    pub fn bytes(config: &ModelConfig, element_bytes: u64) -> Sizes {
        let mut sizes = Sizes::parameters(config);
        for kind in Kind::ALL {
            // At most 2^48 parameters (Shape::MAX_PARAMETERS), so no sensible element overflows.
            sizes[kind] = sizes[kind].saturating_mul(element_bytes);
        }
        sizes
    }

    pub fn total(&self) -> u64 {
        Kind::ALL.into_iter().map(|kind| self[kind]).sum()
    }

    /// The part of it that one token's pass reads: all, with A of E experts in every layer.
    pub fn active(&self, config: &ModelConfig) -> u64 {
        let (chosen, experts) = (config.shape.experts_per_token as u64, config.shape.experts as u64);
        self.total() - self.experts + self.experts / experts * chosen
    }
}

impl Index<Kind> for Sizes {
    type Output = u64;

    fn index(&self, kind: Kind) -> &u64 {
        match kind {
            Kind::Embedding => &self.embedding,
            Kind::Attention => &self.attention,
            Kind::Norms => &self.norms,
            Kind::Routers => &self.routers,
            Kind::Experts => &self.experts,
            Kind::Head => &self.head,
        }
    }
}

impl IndexMut<Kind> for Sizes {
    fn index_mut(&mut self, kind: Kind) -> &mut u64 {
        match kind {
            Kind::Embedding => &mut self.embedding,
            Kind::Attention => &mut self.attention,
            Kind::Norms => &mut self.norms,
            Kind::Routers => &mut self.routers,
            Kind::Experts => &mut self.experts,
            Kind::Head => &mut self.head,
        }
    }
}
