//! DBRX: layer norms, one projection for queries, keys and values that is clipped, and the experts of a layer stacked in three
//! tensors. Its config.json and its tensors have names of their own.

use super::config::Fields;
use super::{ExpertLayout, ExpertPart, Family, Forward, ModelConfig, Norm, Role, Shape, TensorSpec};

/// What `architectures` of config.json says.
pub const ARCHITECTURE: &str = "DbrxForCausalLM";

/// That of torch's layer norm: config.json has none.
const NORM_EPS: f32 = 1e-5;

/// Reads config.json as `DbrxConfig` writes it.
pub(super) fn read_config(fields: &mut Fields) -> Option<ModelConfig> {
    fields.refuse_quantised_weights();
    // All fields are read before the first `?`, so that one run names every fault.
    let layers = fields.axis("n_layers");
    let d_model = fields.axis("d_model");
    let q_heads = fields.axis("n_heads");
    let head_width = fields.head_share("n_heads", d_model, q_heads);
    let kv_heads = fields.axis("attn_config.kv_n_heads");
    let qkv_clip = fields.optional_clip("attn_config.clip_qkv");
    let rope_theta = fields.rope_theta_below("attn_config.rope_theta");
    let experts = fields.axis("ffn_config.moe_num_experts");
    let experts_per_token = fields.axis("ffn_config.moe_top_k");
    let expert_width = fields.axis("ffn_config.ffn_hidden_size");
    fields.only("ffn_config.ffn_act_fn.name", &["silu"]);
    let renormalise = fields.divides_by_sum("ffn_config", "moe_normalize_expert_weights");
    let vocab = fields.axis("vocab_size");
    let max_positions = fields.axis("max_seq_len");
    let bos_token = fields.optional_token("bos_token_id", vocab);
    let eos_tokens = fields.tokens("eos_token_id", vocab);
    let tied_embeddings = fields.flag("tie_word_embeddings", false);

    Some(ModelConfig {
        family: Family::Dbrx,
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
        forward: Forward {
            norm: Norm::Layer,
            fused_qkv: true,
            qkv_clip: qkv_clip?,
            renormalise: renormalise?,
            experts: ExpertLayout::Stacked,
            ..Forward::default()
        },
        norm_eps: NORM_EPS,
        rope_theta: rope_theta?,
        sliding_window: None,
        max_positions: max_positions?,
        tied_embeddings: tied_embeddings?,
        bos_token: bos_token?,
        eos_tokens: eos_tokens?,
        declared_dtype: fields.declared_dtype(),
    })
}

/// w1, v1 and w2 are all `[E * F, D]`: expert e has the rows from `e * F` on, and w2 is used as it lies, `h w2`.
pub(super) fn tensors(config: &ModelConfig) -> Vec<TensorSpec> {
    let Shape { layers, d_model: d, experts: e, expert_width: f, vocab, .. } = config.shape;
    let (q, qkv) = (config.shape.q_width(), config.shape.qkv_width());

    let mut specs = vec![TensorSpec::new(Role::Embedding, "transformer.wte.weight", [vocab, d])];
    for layer in 0..layers {
        let mut add = |role, name: &str, shape: &[usize]| {
            specs.push(TensorSpec::new(role, format!("transformer.blocks.{layer}.{name}"), shape));
        };
        add(Role::AttentionNorm { layer }, "norm_attn_norm.norm_1.weight", &[d]);
        add(Role::QueryKeyValue { layer }, "norm_attn_norm.attn.Wqkv.weight", &[qkv, d]);
        add(Role::AttentionOutput { layer }, "norm_attn_norm.attn.out_proj.weight", &[d, q]);
        add(Role::ExpertNorm { layer }, "norm_attn_norm.norm_2.weight", &[d]);
        add(Role::Router { layer }, "ffn.router.layer.weight", &[e, d]);
        for (part, name) in [(ExpertPart::Gate, "w1"), (ExpertPart::Up, "v1"), (ExpertPart::Down, "w2")] {
            add(Role::Experts { layer, part }, &format!("ffn.experts.mlp.{name}"), &[e * f, d]);
        }
    }
    specs.push(TensorSpec::new(Role::FinalNorm, "transformer.norm_f.weight", [d]));
    if !config.tied_embeddings {
        specs.push(TensorSpec::new(Role::LmHead, "lm_head.weight", [vocab, d]));
    }
    specs
}
