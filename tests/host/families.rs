//! What each family reads from config.json, its tensors, and where the bytes of its experts lie.

use fulmen::checkpoint::{Dtype, Inventory, SlotSource};
use fulmen::model::expert_layout::Packing;
use fulmen::model::{
    Activation, ExpertLayout, ExpertMatrix, ExpertPart, Family, Forward, ModelConfig, Norm, QkNorm, Role, Yarn, tensors,
};
use serde_json::{Value, json};

use crate::fixtures::{file_with, without};

/// A small config of each family: L 2, D 64, H 4, G 2, K 16, E 6, A 2, F 32, V 12.
fn config(family: Family) -> Value {
    let common = json!({
        "architectures": [family.architecture()],
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "intermediate_size": 32,
        "vocab_size": 12,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "max_position_embeddings": 64,
        "hidden_act": "silu",
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    });
    let own = match family {
        Family::Mixtral => json!({"num_local_experts": 6}),
        Family::Qwen3Moe => json!({
            "num_experts": 6, "moe_intermediate_size": 32, "intermediate_size": 99, "norm_topk_prob": true,
            "head_dim": 16, "decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": false,
            "sliding_window": 7, "max_window_layers": 2, "attention_bias": false,
        }),
        Family::Olmoe => json!({"num_experts": 6, "norm_topk_prob": false, "clip_qkv": null}),
        Family::GptOss => json!({
            "num_local_experts": 6, "sliding_window": 16, "attention_bias": true, "swiglu_limit": 5.0, "head_dim": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_scaling": {
                "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": false,
                "original_max_position_embeddings": 4096,
            },
            "quantization_config": {"quant_method": "mxfp4"},
        }),
        Family::Dbrx => {
            return json!({
                "architectures": ["DbrxForCausalLM"],
                "n_layers": 2, "d_model": 64, "n_heads": 4, "vocab_size": 12, "max_seq_len": 64, "eos_token_id": 2,
                "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
                "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 6, "moe_top_k": 2},
                "torch_dtype": "bfloat16",
            });
        }
    };
    let mut config = common;
    config.as_object_mut().unwrap().extend(own.as_object().unwrap().clone());
    config
}

fn parse(config: &Value) -> ModelConfig {
    ModelConfig::parse(&config.to_string()).unwrap()
}

fn refusal(config: &Value) -> String {
    ModelConfig::parse(&config.to_string()).expect_err("should be refused").to_string()
}

/// The config of transformers 5 that says the same.
fn in_the_form_of_5(mut config: Value) -> Value {
    let object = config.as_object_mut().unwrap();
    let dtype = object.remove("torch_dtype").unwrap();
    object.insert("dtype".into(), dtype);
    let theta = object.remove("rope_theta").unwrap_or(json!(1e4));
    let mut rope = object.remove("rope_scaling").unwrap_or(json!({"rope_type": "default"}));
    rope["rope_theta"] = theta;
    object.insert("rope_parameters".into(), rope);
    config
}

#[test]
fn each_family_sets_what_differs_and_nothing_else() {
    let plain = Forward::default();
    let expected = [
        (Family::Mixtral, plain.clone()),
        (
            Family::Dbrx,
            Forward {
                norm: Norm::Layer,
                fused_qkv: true,
                qkv_clip: Some(8.0),
                experts: ExpertLayout::Stacked,
                ..plain.clone()
            },
        ),
        (Family::Qwen3Moe, Forward { qk_norm: Some(QkNorm::PerHead), ..plain.clone() }),
        (Family::Olmoe, Forward { qk_norm: Some(QkNorm::Whole), renormalise: false, ..plain.clone() }),
        (
            Family::GptOss,
            Forward {
                biases: true,
                sinks: true,
                windowed_layers: vec![true, false],
                yarn: Some(Yarn {
                    factor: 32.0,
                    beta_fast: 32.0,
                    beta_slow: 1.0,
                    original_positions: 4096.0,
                    truncate: false,
                    attention_factor: 0.1 * 32f64.ln() + 1.0,
                }),
                activation: Activation::ClampedSwiGlu { limit: 5.0 },
                experts: ExpertLayout::Mxfp4,
                ..plain
            },
        ),
    ];
    assert_eq!(expected.each_ref().map(|(family, _)| *family), Family::ALL);
    for (family, forward) in expected {
        let parsed = parse(&config(family));
        assert_eq!((parsed.family, &parsed.forward), (family, &forward));
        let shape = parsed.shape;
        assert_eq!((shape.layers, shape.d_model, shape.q_heads, shape.kv_heads, shape.head_width), (2, 64, 4, 2, 16));
        assert_eq!((shape.experts, shape.experts_per_token, shape.expert_width, shape.vocab), (6, 2, 32, 12));
        assert_eq!((parsed.rope_theta, parsed.max_positions, &parsed.eos_tokens[..]), (1e4, 64, &[2][..]));
        assert_eq!(parsed, parse(&in_the_form_of_5(config(family))), "{family:?}: both generations");
        let mut by_type = without(&config(family), "architectures");
        by_type["model_type"] = json!(family.name());
        assert_eq!(parsed, parse(&by_type));
    }
    let gpt_oss = parse(&config(Family::GptOss));
    assert_eq!([0, 1].map(|layer| gpt_oss.window(layer)), [Some(16), None]);
    assert_eq!(gpt_oss.widest_window(), None, "a layer sees all");
    assert_eq!(parse(&config(Family::Qwen3Moe)).sliding_window, None, "use_sliding_window is false");
    assert_eq!(parse(&config(Family::Dbrx)).norm_eps, 1e-5, "torch's default");
}

#[test]
fn fields_that_may_be_absent_have_the_family_s_default() {
    let edited = |family: Family, edit: &dyn Fn(&mut Value)| {
        let mut config = config(family);
        edit(&mut config);
        parse(&config)
    };
    let remove = |config: &mut Value, field: &str| config.as_object_mut().unwrap().remove(field);
    let olmoe = edited(Family::Olmoe, &|c| drop(remove(c, "num_key_value_heads")));
    assert_eq!(olmoe.shape.kv_heads, 4, "as many as query heads");
    assert_eq!(edited(Family::Olmoe, &|c| c["clip_qkv"] = json!(3)).forward.qkv_clip, Some(3.0));
    assert!(!edited(Family::Qwen3Moe, &|c| drop(remove(c, "norm_topk_prob"))).forward.renormalise);
    // transformers 5.17 writes Qwen3-MoE's experts under another name.
    let renamed = edited(Family::Qwen3Moe, &|c| {
        let experts = remove(c, "num_experts").unwrap();
        c["num_local_experts"] = experts;
    });
    assert_eq!(renamed, parse(&config(Family::Qwen3Moe)));
    let gpt_oss = edited(Family::GptOss, &|c| {
        remove(c, "layer_types");
        remove(c, "swiglu_limit");
        remove(c, "quantization_config");
    });
    assert_eq!(gpt_oss.forward.windowed_layers, [true, false]);
    assert_eq!(gpt_oss.forward.activation, Activation::ClampedSwiGlu { limit: 7.0 });
    assert_eq!(gpt_oss.forward.experts, ExpertLayout::Interleaved);
    let scaled = edited(Family::GptOss, &|c| c["rope_scaling"]["attention_factor"] = json!(1.25));
    assert_eq!(scaled.forward.yarn.unwrap().attention_factor, 1.25);
    assert_eq!(edited(Family::GptOss, &|c| drop(remove(c, "rope_scaling"))).forward.yarn, None);
    let unnormalised = edited(Family::Dbrx, &|c| c["ffn_config"]["moe_normalize_expert_weights"] = Value::Null);
    assert!(!unnormalised.forward.renormalise);
}

#[test]
fn what_a_family_does_not_do_is_refused() {
    let refused = [
        (
            Family::Qwen3Moe,
            "decoder_sparse_step",
            json!(2),
            "decoder_sparse_step needs 1 (nothing else is supported), has 2",
        ),
        (
            Family::Qwen3Moe,
            "mlp_only_layers",
            json!([1]),
            "mlp_only_layers needs [] (nothing else is supported), has [1]",
        ),
        (Family::Qwen3Moe, "use_sliding_window", json!(true), "use_sliding_window needs false"),
        (Family::Qwen3Moe, "attention_bias", json!(true), "attention_bias needs false"),
        (Family::Olmoe, "attention_bias", json!(true), "attention_bias needs false"),
        (Family::Olmoe, "clip_qkv", json!(-1), "clip_qkv needs a number above 1e-6"),
        (
            Family::Olmoe,
            "quantization_config",
            json!({"quant_method": "mxfp4"}),
            "quantization_config needs to be absent",
        ),
        (
            Family::GptOss,
            "quantization_config",
            json!({"quant_method": "awq"}),
            "quantization_config needs to be absent",
        ),
        (Family::GptOss, "attention_bias", json!(false), "attention_bias needs true"),
        (Family::GptOss, "hidden_size", json!(66), "hidden_size needs a multiple of 32, the block of MXFP4, has 66"),
        (Family::GptOss, "intermediate_size", json!(48), "intermediate_size needs a multiple of 32"),
        (Family::GptOss, "layer_types", json!(["full_attention"]), "for each of 2 layers, has [\"full_attention\"]"),
        (
            Family::GptOss,
            "layer_types",
            json!(["chunked", "full_attention"]),
            "layer_types needs \"sliding_attention\" or",
        ),
        (Family::GptOss, "swiglu_limit", json!("7"), "swiglu_limit needs a number above"),
    ];
    for (family, field, value, message) in refused {
        let mut config = config(family);
        config[field] = value;
        let refusal = refusal(&config);
        assert!(refusal.contains(message), "{message}\n{refusal}");
    }
    for (field, value, message) in [
        ("factor", Value::Null, "rope_scaling.factor is missing"),
        ("factor", json!(0), "rope_scaling.factor needs a number above"),
        ("original_max_position_embeddings", Value::Null, "original_max_position_embeddings is missing"),
        ("truncate", json!("no"), "rope_scaling.truncate needs true or false"),
        ("mscale", json!(1.0), "rope_scaling.mscale needs to be absent"),
        ("type", json!("linear"), "rope_scaling.type needs [\"yarn\"]"),
    ] {
        let mut config = config(Family::GptOss);
        config["rope_scaling"][field] = value;
        let refusal = refusal(&config);
        assert!(refusal.contains(message), "{message}\n{refusal}");
    }
    for (group, field, value, message) in [
        ("attn_config", "rope_theta", Value::Null, "attn_config.rope_theta is missing"),
        ("attn_config", "kv_n_heads", json!(3), "G (KV heads) 3 does not divide H (query heads) 4"),
        ("attn_config", "clip_qkv", json!(0), "attn_config.clip_qkv needs a number"),
        ("ffn_config", "moe_normalize_expert_weights", json!(2), "needs 1 or null"),
        ("ffn_config", "ffn_act_fn", json!({"name": "gelu"}), "ffn_config.ffn_act_fn.name needs [\"silu\"]"),
        ("ffn_config", "moe_num_experts", Value::Null, "ffn_config.moe_num_experts is missing"),
    ] {
        let mut config = config(Family::Dbrx);
        config[group][field] = value;
        let refusal = refusal(&config);
        assert!(refusal.contains(message), "{message}\n{refusal}");
    }
}

/// The list that a checkpoint of `config` has.
fn list(config: &ModelConfig) -> Vec<(String, safetensors::Dtype, Vec<usize>)> {
    let specs = tensors(config).into_iter().map(|spec| {
        let floats = config.forward.experts.packing(spec.role) == Packing::Floats;
        (spec.name, if floats { safetensors::Dtype::BF16 } else { safetensors::Dtype::U8 }, spec.shape)
    });
    specs.collect()
}

fn inventory(config: &ModelConfig, list: &[(String, safetensors::Dtype, Vec<usize>)]) -> Result<Inventory, String> {
    let list = list.iter().map(|(name, dtype, shape)| (name.as_str(), *dtype, &shape[..]));
    Inventory::from_list(config.clone(), list).map_err(|faults| faults.to_string())
}

/// Every byte of every expert tensor goes to exactly one slot of one expert, and every slot is filled from end to end.
#[test]
fn slots_take_every_byte_of_the_experts_once() {
    let mut configs: Vec<Value> = Family::ALL.into_iter().map(config).collect();
    configs.push(without(&config(Family::GptOss), "quantization_config"));
    for config in configs {
        let config = parse(&config);
        let layout = config.forward.experts;
        let inventory = inventory(&config, &list(&config)).unwrap();
        let slot_bytes = inventory.slot_bytes().unwrap();
        assert_eq!(slot_bytes[1] == 0, layout.gate_holds_up(), "{layout:?}");
        let mut claimed = vec![0u8; inventory.files()[0].1 as usize];
        for (layer, expert) in (0..2).flat_map(|layer| (0..6).map(move |expert| (layer, expert))) {
            for (matrix, bytes) in ExpertMatrix::ALL.into_iter().zip(slot_bytes) {
                // In three portions, whatever the seams.
                let cuts = [0, bytes / 3 / 4 * 4, bytes / 5 * 4 / 4 * 4, bytes];
                let mut next = 0;
                for portion in cuts.windows(2).map(|cut| cut[0]..cut[1]) {
                    for source in inventory.slot_sources(layer, expert, matrix, portion) {
                        assert_eq!(source.at, next, "{layout:?} {matrix:?}: the next byte of the slot");
                        next += source.range.end - source.range.start;
                        let start = inventory.find(source.role).unwrap().range.start;
                        for byte in source.range {
                            claimed[(start + byte) as usize] += 1;
                        }
                    }
                }
                assert_eq!(next, bytes, "{layout:?} {matrix:?}");
            }
        }
        for tensor in inventory.tensors() {
            let wanted = u8::from(tensor.role.in_slots());
            let range = tensor.range.start as usize..tensor.range.end as usize;
            assert!(claimed[range].iter().all(|n| *n == wanted), "{layout:?}: {}", tensor.name);
        }
    }
}

/// Experts of one tensor are equal parts of it, in order; MXFP4 has an expert's scales behind its blocks.
#[test]
fn an_expert_has_its_share_of_a_stacked_tensor() {
    let config = parse(&config(Family::GptOss));
    let inventory = inventory(&config, &list(&config)).unwrap();
    let (blocks, scales) = (64 * 64 / 2, 64 * 64 / 32);
    let sources = inventory.slot_sources(1, 4, ExpertMatrix::Gate, 0..blocks + scales);
    let found = |sources: &[SlotSource]| -> Vec<_> {
        sources.iter().map(|source| (source.at, source.role, source.range.clone())).collect()
    };
    let [codes, exponents] =
        [ExpertPart::GateUp, ExpertPart::GateUpScales].map(|part| Role::Experts { layer: 1, part });
    let (first, second) = (4 * blocks, 4 * scales);
    assert_eq!(found(&sources), [(0, codes, first..first + blocks), (blocks, exponents, second..second + scales)]);
    let middle = inventory.slot_sources(1, 4, ExpertMatrix::Gate, blocks - 8..blocks + 4);
    let expected = [(blocks - 8, codes, first + blocks - 8..first + blocks), (blocks, exponents, second..second + 4)];
    assert_eq!(found(&middle), expected);
    assert_eq!(inventory.slot_sources(1, 4, ExpertMatrix::Up, 0..0), []);
    assert_eq!(inventory.expert_dtype(), Some(Dtype::Mxfp4));
}

#[test]
fn missing_extra_and_misshaped_tensors_are_named() {
    for family in Family::ALL {
        let config = parse(&config(family));
        let all = list(&config);
        for index in 0..all.len() {
            let mut short = all.clone();
            let (name, _, shape) = short.remove(index);
            let message = inventory(&config, &short).unwrap_err();
            assert_eq!(message, format!("tensor {name}: is missing, needed: {shape:?}"));

            let mut wrong = all.clone();
            wrong[index].2[0] += 1;
            let had = wrong[index].2.clone();
            let message = inventory(&config, &wrong).unwrap_err();
            assert_eq!(message, format!("the list: tensor {name}: shape is {had:?}, config.json makes it {shape:?}"));

            let mut typed = all.clone();
            let (needed, given) = match typed[index].1 {
                safetensors::Dtype::U8 => ("u8: MXFP4", safetensors::Dtype::BF16),
                _ => ("bf16, f16, f32", safetensors::Dtype::U8),
            };
            typed[index].1 = given;
            let message = inventory(&config, &typed).unwrap_err();
            assert!(message.contains(&name) && message.ends_with(&format!("(supported: {needed})")), "{message}");
        }
        let mut long = all.clone();
        long.push(("model.layers.0.mlp.extra".into(), safetensors::Dtype::BF16, vec![1]));
        let message = inventory(&config, &long).unwrap_err();
        assert_eq!(
            message,
            "the list: tensor model.layers.0.mlp.extra: is unknown to the model family that config.json names"
        );
    }
}

/// What `inspect` tells of a model beside its shape.
#[test]
fn summaries_tell_what_differs() {
    let summary = |family: Family| {
        let config = config(family);
        let tensors = list(&parse(&config));
        let (mut header, mut end) = (json!({}), 0);
        for (name, dtype, shape) in &tensors {
            let start = end;
            end += shape.iter().product::<usize>() * dtype.bitsize() / 8;
            header[name] = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]});
        }
        let folder = crate::fixtures::Folder::new(&config);
        folder.write("model.safetensors", file_with(&header.to_string(), &vec![1; end]));
        folder.open().unwrap().summary()
    };
    let printed = Family::ALL.map(|family| summary(family).to_string());
    let line = |of: usize, label: &str| printed[of].lines().find(|line| line.starts_with(label)).unwrap_or("");
    assert_eq!(line(0, "forward"), "", "Mixtral is what others differ from");
    assert_eq!(
        line(1, "forward"),
        "forward     layer norms, fused QKV, q, k and v clipped to ±8, experts of a layer stacked"
    );
    assert_eq!(line(2, "forward"), "forward     norm of q and k over each head");
    assert_eq!(
        line(3, "forward"),
        "forward     norm of q and k over all heads together, expert weights not renormalised"
    );
    assert_eq!(
        line(4, "forward"),
        "forward     biases, attention sinks, YaRN x32 from 4096 positions, SwiGLU clamped at 5, gate and up interleaved, \
         experts in MXFP4"
    );
    assert_eq!(line(4, "positions"), "positions   64, sliding window 16 in 1 of 2 layers");
    assert_eq!(line(4, "expert "), "expert      3.19 KiB each, 2 matrices of 1.06 KiB to 2.12 KiB; 12 in all");
    assert_eq!(line(1, "expert "), "expert      12.0 KiB each, 3 matrices of 4.00 KiB; 12 in all");
    assert!(line(4, "types").contains("mxfp4 (8 tensors, 38.2 KiB)"), "{}", line(4, "types"));
    let json = serde_json::to_value(summary(Family::GptOss)).unwrap();
    assert_eq!(json["forward"]["experts"], "mxfp4");
    assert_eq!(json["forward"]["activation"]["clamped_swi_glu"]["limit"], 5.0);
    assert_eq!(json["experts"]["matrices"], 2);
    // Values that the blocks stand for, not their bytes: 2 layers of 6 experts of 3 * 64 * 32, and biases.
    assert_eq!(json["parameters"]["by_kind"]["experts"], 2 * 6 * (3 * 64 * 32 + 2 * 32 + 64));
}
