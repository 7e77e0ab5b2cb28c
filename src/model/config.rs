//! config.json of a Hugging Face folder, both generations, into [`ModelConfig`].

use super::{Family, Shape};

/// What config.json says, validated, in fulmen's terms.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    pub family: Family,
    pub shape: Shape,
    pub norm_eps: f32,
    pub rope_theta: f64,
    /// Keys further back than this many tokens are invisible (`i - window < j <= i`).
    pub sliding_window: Option<usize>,
    /// Positions that the model was trained for.
    pub max_positions: usize,
    /// The LM head is the embedding table.
    pub tied_embeddings: bool,
    pub bos_token: Option<u32>,
    pub eos_tokens: Vec<u32>,
}

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {}
