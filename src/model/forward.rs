//! What families do differently in the one forward pass that they share: plain data, which `execute` consults.
//!
//! The default is Mixtral's. A family's own file sets what differs and nothing else; a new kind of difference is a field here, its
//! meaning in `execute::machine`, and nothing anywhere else.

use super::ExpertLayout;

/// Switches of the forward pass.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Forward {
    pub norm: Norm,
    /// Query, key and value projections are one tensor, `[(H + 2 G) K, D]`.
    pub fused_qkv: bool,
    /// Queries, keys and values are clamped to ±this before the rotary embedding (after a q/k norm).
    pub qkv_clip: Option<f32>,
    pub qk_norm: Option<QkNorm>,
    /// Projections of attention, router and experts have biases.
    pub biases: bool,
    /// Each query head has a logit that joins its softmax and has no value.
    pub sinks: bool,
    /// Which layers have the sliding window, L of them; empty: all, if there is a window.
    pub windowed_layers: Vec<bool>,
    pub yarn: Option<Yarn>,
    /// The chosen experts' weights are divided by their sum: the softmax over the chosen alone. Else that over all E.
    pub renormalise: bool,
    pub activation: Activation,
    pub experts: ExpertLayout,
}

impl Default for Forward {
    fn default() -> Forward {
        Forward {
            norm: Norm::Rms,
            fused_qkv: false,
            qkv_clip: None,
            qk_norm: None,
            biases: false,
            sinks: false,
            windowed_layers: Vec::new(),
            yarn: None,
            renormalise: true,
            activation: Activation::SwiGlu,
            experts: ExpertLayout::Separate,
        }
    }
}

/// The norm in front of attention, experts and LM head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Norm {
    Rms,
    /// With a gain and no bias.
    Layer,
}

/// RMS norm of queries and keys, before the rotary embedding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum QkNorm {
    /// Each head on its own, all with one gain `[K]`.
    PerHead,
    /// All heads together: gains `[H K]` and `[G K]`.
    Whole,
}

/// What an expert does with its gate and up products.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `silu(gate) * up`
    SwiGlu,
    /// `(up' + 1) * gate' * sigmoid(1.702 gate')` with `gate' = min(gate, limit)` and `up' = clamp(up, ±limit)`.
    ClampedSwiGlu { limit: f32 },
}

/// YaRN: rotary frequencies stretched for long contexts (arXiv 2309.00071), at every position alike.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Yarn {
    /// How much slower the slow pairs turn.
    pub factor: f64,
    /// Pairs that turn at least so many times over the original positions keep their frequency.
    pub beta_fast: f64,
    /// Pairs that turn at most so many times are stretched by the whole factor.
    pub beta_slow: f64,
    /// Positions that the model knew before it was stretched.
    pub original_positions: f64,
    /// The bounds between these are rounded to whole pairs.
    pub truncate: bool,
    /// Factor on cosine and sine; q · k grows by its square.
    pub attention_factor: f64,
}

impl Yarn {
    /// The factor on cosine and sine where config.json names none.
    pub fn default_attention_factor(factor: f64) -> f64 {
        if factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 }
    }
}
