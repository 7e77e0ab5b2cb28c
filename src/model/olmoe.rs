//! OLMoE: an RMS norm over all heads of the queries and of the keys together, and expert weights that are left as the softmax over
//! all experts gives them.

use super::config::Fields;
use super::{Family, Forward, ModelConfig, QkNorm, TensorSpec, decoder};

/// What `architectures` of config.json says.
pub const ARCHITECTURE: &str = "OlmoeForCausalLM";

/// Reads config.json as `OlmoeConfig` writes it.
pub(super) fn read_config(fields: &mut Fields) -> Option<ModelConfig> {
    fields.refuse_quantised_weights();
    fields.only_flag("attention_bias", false);
    let rope_theta = fields.rope_theta();
    let renormalise = fields.flag("norm_topk_prob", false);
    let qkv_clip = fields.optional_clip("clip_qkv");
    let forward = renormalise.zip(qkv_clip).map(|(renormalise, qkv_clip)| Forward {
        qk_norm: Some(QkNorm::Whole),
        qkv_clip,
        renormalise,
        ..Forward::default()
    });
    let names =
        decoder::Names { experts: &["num_experts"], expert_width: "intermediate_size", kv_heads_optional: true };
    decoder::read_config(fields, Family::Olmoe, names, rope_theta, Some(None), forward)
}

/// The names are those of Qwen3-MoE.
pub(super) fn tensors(config: &ModelConfig) -> Vec<TensorSpec> {
    super::qwen3_moe::tensors(config)
}
