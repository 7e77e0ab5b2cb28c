//! Mixtral 8x7B and 8x22B: grouped-query attention with rotary embedding, RMS norms, no biases, top-A experts whose
//! weights are renormalised to sum to one. [`Forward`]'s default is this family.

use super::config::Fields;
use super::{Family, Forward, ModelConfig, TensorSpec, decoder};

/// What `architectures` of config.json says.
pub const ARCHITECTURE: &str = "MixtralForCausalLM";

/// Reads config.json as `MixtralConfig` writes it.
pub(super) fn read_config(fields: &mut Fields) -> Option<ModelConfig> {
    fields.refuse_quantised_weights();
    let rope_theta = fields.rope_theta();
    let sliding_window = fields.optional_axis("sliding_window");
    let names =
        decoder::Names { experts: &["num_local_experts"], expert_width: "intermediate_size", kv_heads_optional: false };
    decoder::read_config(fields, Family::Mixtral, names, rope_theta, sliding_window, Some(Forward::default()))
}

pub(super) fn tensors(config: &ModelConfig) -> Vec<TensorSpec> {
    decoder::tensors(config, "block_sparse_moe.gate", |layer| {
        layer.add_experts(&config.shape, "block_sparse_moe.experts", ["w1", "w3", "w2"]);
    })
}
