//! Which tensor of a checkpoint plays which role.

/// One of the three matrices of an expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ExpertMatrix {
    Gate,
    Up,
    Down,
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

/// A tensor that the family needs: its name on disk and its shape (`[out, in]`, row-major).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    pub role: Role,
    pub name: String,
    pub shape: Vec<usize>,
}
