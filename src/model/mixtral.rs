//! Mixtral 8x7B and 8x22B: grouped-query attention with rotary embedding, RMS norms, no biases, top-A experts whose
//! weights are renormalised to sum to one.

use super::config::Fields;
use super::{ExpertMatrix, Family, ModelConfig, Role, Shape, TensorSpec};

/// What `architectures` of config.json says.
pub const ARCHITECTURE: &str = "MixtralForCausalLM";

/// Reads config.json as `MixtralConfig` of transformers 4 or 5 writes it.
pub(super) fn read_config(fields: &mut Fields) -> Option<ModelConfig> {
    // All fields are read before the first `?`, so that one run names every fault.
    let layers = fields.axis("num_hidden_layers");
    let d_model = fields.axis("hidden_size");
    let q_heads = fields.axis("num_attention_heads");
    let kv_heads = fields.axis("num_key_value_heads");
    let head_width = fields.head_width("head_dim", d_model, q_heads);
    let experts = fields.axis("num_local_experts");
    let experts_per_token = fields.axis("num_experts_per_tok");
    let expert_width = fields.axis("intermediate_size");
    let vocab = fields.axis("vocab_size");
    let norm_eps = fields.norm_eps("rms_norm_eps");
    let rope_theta = fields.rope_theta();
    let max_positions = fields.axis("max_position_embeddings");
    let sliding_window = fields.optional_axis("sliding_window");
    let bos_token = fields.optional_token("bos_token_id", vocab);
    let eos_tokens = fields.tokens("eos_token_id", vocab);
    let tied_embeddings = fields.flag("tie_word_embeddings", false);
    fields.only("hidden_act", &["silu"]);

    Some(ModelConfig {
        family: Family::Mixtral,
        shape: Shape {
            layers: layers?,
            d_model: d_model?,
            q_heads: q_heads?,
            kv_heads: kv_heads?,
            head_width: head_width?,
            experts: experts?,
            experts_per_token: experts_per_token?,
            expert_width: expert_width?,
            vocab: vocab?,
        },
        norm_eps: norm_eps?,
        rope_theta: rope_theta?,
        sliding_window: sliding_window?,
        max_positions: max_positions?,
        tied_embeddings: tied_embeddings?,
        bos_token: bos_token?,
        eos_tokens: eos_tokens?,
        declared_dtype: fields.declared_dtype(),
    })
}

/// Names as both generations of transformers write them to disk. Shapes are `[out, in]`.
pub(super) fn tensors(config: &ModelConfig) -> Vec<TensorSpec> {
    let Shape { layers, d_model: d, experts, expert_width: f, vocab, .. } = config.shape;
    let (q, kv) = (config.shape.q_width(), config.shape.kv_width());

    let mut specs = vec![TensorSpec::new(Role::Embedding, "model.embed_tokens.weight", [vocab, d])];
    for layer in 0..layers {
        let mut add = |role, name: &str, shape: &[usize]| {
            specs.push(TensorSpec::new(role, format!("model.layers.{layer}.{name}.weight"), shape));
        };
        add(Role::AttentionNorm { layer }, "input_layernorm", &[d]);
        add(Role::Query { layer }, "self_attn.q_proj", &[q, d]);
        add(Role::Key { layer }, "self_attn.k_proj", &[kv, d]);
        add(Role::Value { layer }, "self_attn.v_proj", &[kv, d]);
        add(Role::AttentionOutput { layer }, "self_attn.o_proj", &[d, q]);
        add(Role::ExpertNorm { layer }, "post_attention_layernorm", &[d]);
        add(Role::Router { layer }, "block_sparse_moe.gate", &[experts, d]);
        for expert in 0..experts {
            for (matrix, name, shape) in [
                (ExpertMatrix::Gate, "w1", [f, d]),
                (ExpertMatrix::Up, "w3", [f, d]),
                (ExpertMatrix::Down, "w2", [d, f]),
            ] {
                let role = Role::Expert { layer, expert, matrix };
                add(role, &format!("block_sparse_moe.experts.{expert}.{name}"), &shape);
            }
        }
    }
    specs.push(TensorSpec::new(Role::FinalNorm, "model.norm.weight", [d]));
    if !config.tied_embeddings {
        specs.push(TensorSpec::new(Role::LmHead, "lm_head.weight", [vocab, d]));
    }
    specs
}
