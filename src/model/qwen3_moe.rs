//! Qwen3-MoE (30B-A3B, Coder-30B-A3B): an RMS norm over each head of the queries and keys; many small experts.

use super::config::Fields;
use super::{Family, Forward, ModelConfig, QkNorm, TensorSpec, decoder};

/// What `architectures` of config.json says.
pub const ARCHITECTURE: &str = "Qwen3MoeForCausalLM";

/// transformers 4 writes the first, transformers 5.17 the second.
const EXPERTS: &[&str] = &["num_experts", "num_local_experts"];

/// Reads config.json as `Qwen3MoeConfig` writes it. `intermediate_size` is that of dense layers, of which there must be none.
pub(super) fn read_config(fields: &mut Fields) -> Option<ModelConfig> {
    fields.refuse_quantised_weights();
    fields.only_flag("attention_bias", false);
    fields.only_flag("use_sliding_window", false); // sliding_window and max_window_layers mean nothing without it.
    fields.only_number("decoder_sparse_step", 1);
    fields.empty_list("mlp_only_layers");
    let rope_theta = fields.rope_theta();
    // transformers' own default is false; the published models say true.
    let renormalise = fields.flag("norm_topk_prob", false);
    let forward =
        renormalise.map(|renormalise| Forward { qk_norm: Some(QkNorm::PerHead), renormalise, ..Forward::default() });
    let names = decoder::Names { experts: EXPERTS, expert_width: "moe_intermediate_size", kv_heads_optional: false };
    decoder::read_config(fields, Family::Qwen3Moe, names, rope_theta, Some(None), forward)
}

pub(super) fn tensors(config: &ModelConfig) -> Vec<TensorSpec> {
    decoder::tensors(config, "mlp.gate", |layer| {
        layer.add_experts(&config.shape, "mlp.experts", ["gate_proj", "up_proj", "down_proj"]);
    })
}
