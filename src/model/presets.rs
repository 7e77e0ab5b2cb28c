//! The published shapes by name, without their files: for plans, benchmarks and made-up weights.
//!
//! Numbers are those of the published config.json of each model (`tests/data` compares where it has the file). DBRX's is restated
//! from its published configuration.

use super::{Activation, ExpertLayout, Family, Forward, ModelConfig, Norm, QkNorm, Shape, Yarn};

/// Every name that [`preset`] answers to, in the order in which they are listed to users.
pub const NAMES: [&str; 6] = ["mixtral-8x7b", "mixtral-8x22b", "dbrx", "qwen3-30b-a3b", "olmoe-1b-7b", "gpt-oss-20b"];

/// The configuration of a published model; `None` for a name that is not in [`NAMES`].
pub fn preset(name: &str) -> Option<ModelConfig> {
    match name {
        "mixtral-8x7b" => Some(mixtral_8x7b()),
        "mixtral-8x22b" => Some(mixtral_8x22b()),
        "dbrx" => Some(dbrx()),
        "qwen3-30b-a3b" => Some(qwen3_30b_a3b()),
        "olmoe-1b-7b" => Some(olmoe_1b_7b()),
        "gpt-oss-20b" => Some(gpt_oss_20b()),
        _ => None,
    }
}

/// Mixtral's proportions in small: for tests and for machines without a GPU.
pub fn mixtral_tiny() -> ModelConfig {
    let large = mixtral_8x7b();
    let shape = Shape {
        layers: 6,
        d_model: 128,
        q_heads: 4,
        kv_heads: 2,
        head_width: 32,
        expert_width: 256,
        vocab: 500,
        ..large.shape
    };
    ModelConfig { shape, max_positions: 2048, ..large }
}

/// mistralai/Mixtral-8x7B-v0.1
fn mixtral_8x7b() -> ModelConfig {
    ModelConfig {
        family: Family::Mixtral,
        shape: Shape {
            layers: 32,
            d_model: 4096,
            q_heads: 32,
            kv_heads: 8,
            head_width: 128,
            experts: 8,
            experts_per_token: 2,
            expert_width: 14336,
            vocab: 32000,
        },
        forward: Forward::default(),
        norm_eps: 1e-5,
        rope_theta: 1e6,
        sliding_window: None,
        max_positions: 32768,
        tied_embeddings: false,
        bos_token: Some(1),
        eos_tokens: vec![2],
        declared_dtype: Some("bfloat16".to_owned()),
    }
}

/// mistralai/Mixtral-8x22B-v0.1
fn mixtral_8x22b() -> ModelConfig {
    let small = mixtral_8x7b();
    let shape = Shape { layers: 56, d_model: 6144, q_heads: 48, expert_width: 16384, ..small.shape };
    ModelConfig { shape, max_positions: 65536, ..small }
}

/// databricks/dbrx-instruct
fn dbrx() -> ModelConfig {
    ModelConfig {
        family: Family::Dbrx,
        shape: Shape {
            layers: 40,
            d_model: 6144,
            q_heads: 48,
            kv_heads: 8,
            head_width: 128,
            experts: 16,
            experts_per_token: 4,
            expert_width: 10752,
            vocab: 100352,
        },
        forward: Forward {
            norm: Norm::Layer,
            fused_qkv: true,
            qkv_clip: Some(8.0),
            experts: ExpertLayout::Stacked,
            ..Forward::default()
        },
        norm_eps: 1e-5,
        rope_theta: 5e5,
        sliding_window: None,
        max_positions: 32768,
        tied_embeddings: false,
        bos_token: None,
        eos_tokens: vec![100257],
        declared_dtype: Some("bfloat16".to_owned()),
    }
}

/// Qwen/Qwen3-30B-A3B
fn qwen3_30b_a3b() -> ModelConfig {
    ModelConfig {
        family: Family::Qwen3Moe,
        shape: Shape {
            layers: 48,
            d_model: 2048,
            q_heads: 32,
            kv_heads: 4,
            head_width: 128,
            experts: 128,
            experts_per_token: 8,
            expert_width: 768,
            vocab: 151936,
        },
        forward: Forward { qk_norm: Some(QkNorm::PerHead), ..Forward::default() },
        norm_eps: 1e-6,
        rope_theta: 1e6,
        sliding_window: None,
        max_positions: 40960,
        tied_embeddings: false,
        bos_token: Some(151643),
        eos_tokens: vec![151645],
        declared_dtype: Some("bfloat16".to_owned()),
    }
}

/// allenai/OLMoE-1B-7B-0125-Instruct
fn olmoe_1b_7b() -> ModelConfig {
    ModelConfig {
        family: Family::Olmoe,
        shape: Shape {
            layers: 16,
            d_model: 2048,
            q_heads: 16,
            kv_heads: 16,
            head_width: 128,
            experts: 64,
            experts_per_token: 8,
            expert_width: 1024,
            vocab: 50304,
        },
        forward: Forward { qk_norm: Some(QkNorm::Whole), renormalise: false, ..Forward::default() },
        norm_eps: 1e-5,
        rope_theta: 1e4,
        sliding_window: None,
        max_positions: 4096,
        tied_embeddings: false,
        bos_token: None,
        eos_tokens: vec![50279],
        declared_dtype: Some("bfloat16".to_owned()),
    }
}

/// openai/gpt-oss-20b
fn gpt_oss_20b() -> ModelConfig {
    let layers = 24;
    ModelConfig {
        family: Family::GptOss,
        shape: Shape {
            layers,
            d_model: 2880,
            q_heads: 64,
            kv_heads: 8,
            head_width: 64,
            experts: 32,
            experts_per_token: 4,
            expert_width: 2880,
            vocab: 201088,
        },
        forward: Forward {
            biases: true,
            sinks: true,
            windowed_layers: (0..layers).map(|layer| layer % 2 == 0).collect(),
            yarn: Some(Yarn {
                factor: 32.0,
                beta_fast: 32.0,
                beta_slow: 1.0,
                original_positions: 4096.0,
                truncate: false,
                attention_factor: Yarn::default_attention_factor(32.0),
            }),
            activation: Activation::ClampedSwiGlu { limit: 7.0 },
            experts: ExpertLayout::Mxfp4,
            ..Forward::default()
        },
        norm_eps: 1e-5,
        rope_theta: 150000.0,
        sliding_window: Some(128),
        max_positions: 131072,
        tied_embeddings: false,
        bos_token: None,
        eos_tokens: vec![200002],
        declared_dtype: None,
    }
}
