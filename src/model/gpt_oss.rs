//! gpt-oss: biases everywhere, attention sinks, a sliding window in every other layer, YaRN, a clamped SwiGLU with gate and up in
//! turns, and experts that the published checkpoints keep in MXFP4.

use super::config::Fields;
use super::expert_layout::MXFP4_BLOCK;
use super::{Activation, ExpertLayout, ExpertPart, Family, Forward, ModelConfig, Role, Shape, TensorSpec, decoder};

/// What `architectures` of config.json says.
pub const ARCHITECTURE: &str = "GptOssForCausalLM";

/// Where config.json has none, as transformers has it.
const SWIGLU_LIMIT: f32 = 7.0;

/// Reads config.json as `GptOssConfig` writes it.
pub(super) fn read_config(fields: &mut Fields) -> Option<ModelConfig> {
    let experts = if fields.is_mxfp4() { ExpertLayout::Mxfp4 } else { ExpertLayout::Interleaved };
    fields.only_flag("attention_bias", true);
    let rope = fields.rope_with_yarn();
    let sliding_window = fields.optional_axis("sliding_window");
    let windowed_layers = fields.windowed_layers("layer_types", "num_hidden_layers");
    let limit = fields.optional_clip("swiglu_limit");
    let forward = (|| {
        let (_, yarn) = rope?;
        Some(Forward {
            biases: true,
            sinks: true,
            windowed_layers: windowed_layers?,
            yarn,
            activation: Activation::ClampedSwiGlu { limit: limit?.unwrap_or(SWIGLU_LIMIT) },
            experts,
            ..Forward::default()
        })
    })();
    if experts == ExpertLayout::Mxfp4 {
        fields.multiple_of("hidden_size", MXFP4_BLOCK);
        fields.multiple_of("intermediate_size", MXFP4_BLOCK);
    }
    let names =
        decoder::Names { experts: &["num_local_experts"], expert_width: "intermediate_size", kv_heads_optional: true };
    decoder::read_config(fields, Family::GptOss, names, rope.map(|(theta, _)| theta), sliding_window, forward)
}

pub(super) fn tensors(config: &ModelConfig) -> Vec<TensorSpec> {
    let Shape { d_model: d, expert_width: f, experts: e, .. } = config.shape;
    decoder::tensors(config, "mlp.router", |list| {
        let layer = list.layer;
        let part = |part| Role::Experts { layer, part };
        if config.forward.experts == ExpertLayout::Mxfp4 {
            let block_bytes = MXFP4_BLOCK / 2;
            let (d_blocks, f_blocks) = (d / MXFP4_BLOCK, f / MXFP4_BLOCK);
            let gate_up = [e, 2 * f, d_blocks, block_bytes];
            list.add(part(ExpertPart::GateUp), "mlp.experts.gate_up_proj_blocks", &gate_up);
            list.add(part(ExpertPart::GateUpScales), "mlp.experts.gate_up_proj_scales", &gate_up[..3]);
            let down = [e, d, f_blocks, block_bytes];
            list.add(part(ExpertPart::Down), "mlp.experts.down_proj_blocks", &down);
            list.add(part(ExpertPart::DownScales), "mlp.experts.down_proj_scales", &down[..3]);
        } else {
            list.add(part(ExpertPart::GateUp), "mlp.experts.gate_up_proj", &[e, d, 2 * f]);
            list.add(part(ExpertPart::Down), "mlp.experts.down_proj", &[e, f, d]);
        }
        list.add(Role::GateUpBias { layer }, "mlp.experts.gate_up_proj_bias", &[e, 2 * f]);
        list.add(Role::DownBias { layer }, "mlp.experts.down_proj_bias", &[e, d]);
    })
}
