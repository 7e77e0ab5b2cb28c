//! Field and tensor names that Mixtral, Qwen3-MoE, OLMoE and gpt-oss have in common; DBRX has its own.

use super::config::Fields;
use super::{ExpertMatrix, Family, Forward, ModelConfig, QkNorm, Role, Shape, TensorSpec};

/// Fields of config.json that are spelt differently.
pub(super) struct Names {
    /// The first one that is there.
    pub experts: &'static [&'static str],
    pub expert_width: &'static str,
    /// Without `num_key_value_heads` there are as many as query heads.
    pub kv_heads_optional: bool,
}

/// Reads config.json as transformers 4 or 5 writes it. `forward` and `rope_theta` are what the family has read already.
pub(super) fn read_config(
    fields: &mut Fields,
    family: Family,
    names: Names,
    rope_theta: Option<f64>,
    sliding_window: Option<Option<usize>>,
    forward: Option<Forward>,
) -> Option<ModelConfig> {
    // All fields are read before the first `?`, so that one run names every fault.
    let layers = fields.axis("num_hidden_layers");
    let d_model = fields.axis("hidden_size");
    let q_heads = fields.axis("num_attention_heads");
    let kv_heads = match names.kv_heads_optional {
        true => fields.optional_axis("num_key_value_heads").and_then(|given| given.or(q_heads)),
        false => fields.axis("num_key_value_heads"),
    };
    let head_width = fields.head_width("head_dim", d_model, q_heads);
    let experts = fields.axis_of(names.experts);
    let experts_per_token = fields.axis("num_experts_per_tok");
    let expert_width = fields.axis(names.expert_width);
    let vocab = fields.axis("vocab_size");
    let norm_eps = fields.norm_eps("rms_norm_eps");
    let max_positions = fields.axis("max_position_embeddings");
    let bos_token = fields.optional_token("bos_token_id", vocab);
    let eos_tokens = fields.tokens("eos_token_id", vocab);
    let tied_embeddings = fields.flag("tie_word_embeddings", false);
    fields.only("hidden_act", &["silu"]);

    Some(ModelConfig {
        family,
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
        forward: forward?,
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

/// The tensors of a layer while a family adds its own: their names lie below `model.layers.{layer}`.
pub(super) struct Layer<'s> {
    pub layer: usize,
    specs: &'s mut Vec<TensorSpec>,
}

impl Layer<'_> {
    pub fn add(&mut self, role: Role, name: &str, shape: &[usize]) {
        self.specs.push(TensorSpec::new(role, format!("model.layers.{}.{name}", self.layer), shape));
    }

    /// A tensor for each matrix of each expert: `{prefix}.{expert}.{name of gate, up or down}.weight`.
    pub fn add_experts(&mut self, shape: &Shape, prefix: &str, [gate, up, down]: [&str; 3]) {
        let Shape { d_model: d, expert_width: f, experts, .. } = *shape;
        for expert in 0..experts {
            for (matrix, name, shape) in
                [(ExpertMatrix::Gate, gate, [f, d]), (ExpertMatrix::Up, up, [f, d]), (ExpertMatrix::Down, down, [d, f])]
            {
                let role = Role::Expert { layer: self.layer, expert, matrix };
                self.add(role, &format!("{prefix}.{expert}.{name}.weight"), &shape);
            }
        }
    }
}

/// Names as both generations of transformers write them to disk; `experts` adds what comes after a layer's router.
/// Shapes are `[out, in]`.
pub(super) fn tensors(config: &ModelConfig, router: &str, experts: impl Fn(&mut Layer)) -> Vec<TensorSpec> {
    let Shape { layers, d_model: d, q_heads, head_width, experts: e, vocab, .. } = config.shape;
    let (q, kv) = (config.shape.q_width(), config.shape.kv_width());
    let forward = &config.forward;

    let mut specs = vec![TensorSpec::new(Role::Embedding, "model.embed_tokens.weight", [vocab, d])];
    for layer in 0..layers {
        let mut list = Layer { layer, specs: &mut specs };
        let mut add = |role, name: &str, shape: &[usize]| list.add(role, name, shape);
        add(Role::AttentionNorm { layer }, "input_layernorm.weight", &[d]);
        for (role, bias, name, width, n_in) in [
            (Role::Query { layer }, Role::QueryBias { layer }, "q", q, d),
            (Role::Key { layer }, Role::KeyBias { layer }, "k", kv, d),
            (Role::Value { layer }, Role::ValueBias { layer }, "v", kv, d),
            (Role::AttentionOutput { layer }, Role::AttentionOutputBias { layer }, "o", d, q),
        ] {
            add(role, &format!("self_attn.{name}_proj.weight"), &[width, n_in]);
            if forward.biases {
                add(bias, &format!("self_attn.{name}_proj.bias"), &[width]);
            }
        }
        if let Some(norm) = forward.qk_norm {
            let widths = match norm {
                QkNorm::PerHead => [head_width; 2],
                QkNorm::Whole => [q, kv],
            };
            add(Role::QueryNorm { layer }, "self_attn.q_norm.weight", &widths[..1]);
            add(Role::KeyNorm { layer }, "self_attn.k_norm.weight", &widths[1..]);
        }
        if forward.sinks {
            add(Role::Sinks { layer }, "self_attn.sinks", &[q_heads]);
        }
        add(Role::ExpertNorm { layer }, "post_attention_layernorm.weight", &[d]);
        add(Role::Router { layer }, &format!("{router}.weight"), &[e, d]);
        if forward.biases {
            add(Role::RouterBias { layer }, &format!("{router}.bias"), &[e]);
        }
        experts(&mut list);
    }
    specs.push(TensorSpec::new(Role::FinalNorm, "model.norm.weight", [d]));
    if !config.tied_embeddings {
        specs.push(TensorSpec::new(Role::LmHead, "lm_head.weight", [vocab, d]));
    }
    specs
}
