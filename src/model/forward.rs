//! What families do differently in the one forward pass that they share: plain data, which `execute` consults.
//!
//! The default is Mixtral's. A family's own file sets what differs and nothing else; a new kind of difference is a field here, its
//! meaning in `execute::machine`, and nothing anywhere else.

use std::fmt;

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

/// What differs from the default, for people: nothing where nothing does. Windows are told where their width is.
impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut told = Vec::new();
        let mut tell = |differs: bool, text: String| told.extend(differs.then_some(text));
        tell(self.norm == Norm::Layer, "layer norms".into());
        tell(self.fused_qkv, "fused QKV".into());
        if let Some(norm) = self.qk_norm {
            let of = if norm == QkNorm::PerHead { "each head" } else { "all heads together" };
            tell(true, format!("norm of q and k over {of}"));
        }
        tell(self.qkv_clip.is_some(), format!("q, k and v clipped to ±{}", self.qkv_clip.unwrap_or_default()));
        tell(self.biases, "biases".into());
        tell(self.sinks, "attention sinks".into());
        if let Some(yarn) = self.yarn {
            tell(true, format!("YaRN x{} from {} positions", yarn.factor, yarn.original_positions));
        }
        tell(!self.renormalise, "expert weights not renormalised".into());
        if let Activation::ClampedSwiGlu { limit } = self.activation {
            tell(true, format!("SwiGLU clamped at {limit}"));
        }
        let layout = match self.experts {
            ExpertLayout::Separate => "",
            ExpertLayout::Stacked => "experts of a layer stacked",
            ExpertLayout::Interleaved => "gate and up interleaved",
            ExpertLayout::Mxfp4 => "gate and up interleaved, experts in MXFP4",
        };
        tell(!layout.is_empty(), layout.into());
        f.write_str(&told.join(", "))
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
