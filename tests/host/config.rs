//! config.json of both generations, and every way in which it can be wrong.

use fulmen::model::{
    ConfigError, ExpertMatrix, Family, Forward, Kind, ModelConfig, Role, Shape, Sizes, TensorSpec, config::ConfigFault,
    tensors,
};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::fixtures::{tiny_config, without};

fn parse(config: &Value) -> Result<ModelConfig, ConfigError> {
    ModelConfig::parse(&config.to_string())
}

/// The tiny config with one field replaced or added.
fn with(field: &str, value: Value) -> Value {
    let mut config = tiny_config();
    config[field] = value;
    config
}

fn message(config: &Value) -> String {
    parse(config).expect_err("should be refused").to_string()
}

#[test]
fn both_generations_read_the_same() {
    let v5 = tiny_config();
    let mut v4 = without(&without(&v5, "rope_parameters"), "dtype");
    v4["rope_theta"] = json!(1e6);
    v4["rope_scaling"] = Value::Null;
    v4["torch_dtype"] = json!("bfloat16");

    let config = parse(&v5).unwrap();
    assert_eq!(config, parse(&v4).unwrap());
    assert_eq!(
        config,
        ModelConfig {
            family: Family::Mixtral,
            shape: Shape {
                layers: 2,
                d_model: 8,
                q_heads: 4,
                kv_heads: 2,
                head_width: 6,
                experts: 4,
                experts_per_token: 2,
                expert_width: 10,
                vocab: 12,
            },
            forward: Forward::default(),
            norm_eps: 1e-5,
            rope_theta: 1e6,
            sliding_window: None,
            max_positions: 64,
            tied_embeddings: false,
            bos_token: Some(1),
            eos_tokens: vec![2],
            declared_dtype: Some("bfloat16".to_owned()),
        }
    );
    // Files in between carry both.
    assert_eq!(config, parse(&with("rope_theta", json!(1_000_000))).unwrap());
}

#[test]
fn optional_fields_have_their_meaning() {
    for config in [with("head_dim", Value::Null), without(&tiny_config(), "head_dim")] {
        assert_eq!(parse(&config).unwrap().shape.head_width, 2, "D / H");
    }
    for (window, parsed) in [(json!(7), Some(7)), (Value::Null, None)] {
        assert_eq!(parse(&with("sliding_window", window)).unwrap().sliding_window, parsed);
    }
    for (eos, parsed) in [(json!(3), vec![3]), (json!([2, 5]), vec![2, 5]), (Value::Null, vec![]), (json!([]), vec![])]
    {
        assert_eq!(parse(&with("eos_token_id", eos)).unwrap().eos_tokens, parsed);
    }
    assert_eq!(parse(&with("bos_token_id", Value::Null)).unwrap().bos_token, None);
    assert!(parse(&with("tie_word_embeddings", json!(true))).unwrap().tied_embeddings);
    assert!(!parse(&without(&tiny_config(), "tie_word_embeddings")).unwrap().tied_embeddings);
    assert!(parse(&without(&tiny_config(), "hidden_act")).is_ok());
    assert!(parse(&without(&tiny_config(), "architectures")).is_ok(), "model_type says it");
    assert_eq!(parse(&with("dtype", json!("torch.float16"))).unwrap().declared_dtype.unwrap(), "float16");
    assert!(parse(&with("rope_scaling", json!({"type": "default"}))).is_ok());
}

#[test]
fn unsupported_architecture_is_named() {
    assert_eq!(
        message(&with("architectures", json!(["LlamaForCausalLM"]))),
        "config.json: architectures [\"LlamaForCausalLM\"] is not supported (supported: MixtralForCausalLM, \
         DbrxForCausalLM, Qwen3MoeForCausalLM, OlmoeForCausalLM, GptOssForCausalLM)"
    );
    let nameless = without(&with("model_type", json!("llama")), "architectures");
    assert_eq!(
        message(&nameless),
        "config.json: no architectures, model_type \"llama\" is not supported (supported: MixtralForCausalLM, \
         DbrxForCausalLM, Qwen3MoeForCausalLM, OlmoeForCausalLM, GptOssForCausalLM)"
    );
    for strange in [json!(7), json!([]), json!([null]), json!({"MixtralForCausalLM": 1})] {
        let config = with("architectures", strange);
        assert!(matches!(parse(&config), Err(ConfigError::UnsupportedArchitecture { .. })), "{config}");
    }
}

#[test]
fn each_missing_field_is_named() {
    for field in [
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "num_local_experts",
        "num_experts_per_tok",
        "intermediate_size",
        "vocab_size",
        "rms_norm_eps",
        "max_position_embeddings",
    ] {
        assert_eq!(message(&without(&tiny_config(), field)), format!("config.json: {field} is missing"));
        assert_eq!(message(&with(field, Value::Null)), format!("config.json: {field} is missing"));
    }
    assert_eq!(message(&without(&tiny_config(), "rope_parameters")), "config.json: rope_theta is missing");
    assert_eq!(
        message(&with("rope_parameters", json!({"rope_type": "default"}))),
        "config.json: rope_parameters.rope_theta is missing"
    );
}

#[test]
fn all_faults_come_together() {
    let mut config = without(&without(&tiny_config(), "hidden_size"), "vocab_size");
    config["num_hidden_layers"] = json!(-3);
    config["hidden_act"] = json!("gelu");
    config["eos_token_id"] = json!([2, "x", -1]);
    assert_eq!(
        message(&config),
        "config.json: 6 faults\n  \
         num_hidden_layers needs an integer from 1 to 16777216, has -3\n  \
         hidden_size is missing\n  \
         vocab_size is missing\n  \
         eos_token_id needs a token id below 16777216 (the vocabulary), has \"x\"\n  \
         eos_token_id needs a token id below 16777216 (the vocabulary), has -1\n  \
         hidden_act needs [\"silu\"] (nothing else is supported), has \"gelu\""
    );
}

#[test]
fn what_would_change_the_numbers_is_refused() {
    let refused = [
        ("hidden_act", json!("gelu")),
        ("rope_scaling", json!({"type": "linear", "factor": 2.0})),
        ("rope_scaling", json!({"rope_type": "yarn", "factor": 32.0})),
        ("rope_scaling", json!({"factor": 2.0})),
        ("rope_scaling", json!("linear")),
        ("rope_parameters", json!({"rope_theta": 1e6, "rope_type": "llama3", "factor": 8.0})),
        ("rope_parameters", json!({"rope_theta": 1e6, "partial_rotary_factor": 0.5})),
        ("partial_rotary_factor", json!(0.5)),
        ("rope_theta", json!(1e4)), // Disagrees with rope_parameters.
        ("quantization_config", json!({"quant_method": "awq", "bits": 4})),
    ];
    for (field, value) in refused {
        let message = message(&with(field, value.clone()));
        assert!(
            message.contains(field) || message.contains("rope_parameters.rope_theta"),
            "{field} {value}: {message}"
        );
    }
    assert_eq!(
        message(&with("quantization_config", json!({"quant_method": "awq"}))),
        "config.json: quantization_config needs to be absent (weights must be bf16, f16 or f32), has \"awq\""
    );
}

#[test]
fn absurd_numbers_are_refused() {
    let absurd =
        [json!(0), json!(-1), json!(1.5), json!("8"), json!(1u64 << 40), json!(u64::MAX), json!([8]), json!(true)];
    for field in [
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "num_local_experts",
        "num_experts_per_tok",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
        "sliding_window",
    ] {
        for value in &absurd {
            let message = message(&with(field, value.clone()));
            assert!(message.contains(&format!("{field} needs an integer from 1 to 16777216")), "{value}: {message}");
        }
    }
    for (field, values) in [
        ("rms_norm_eps", [json!(0), json!(-1e-5), json!(2), json!(1e-60), json!("1e-5")]),
        ("rope_theta", [json!(0), json!(-1.0), json!(1e300), json!("1e6"), json!({})]),
        ("bos_token_id", [json!(12), json!(-1), json!(0.5), json!("<s>"), json!([1])]),
        ("tie_word_embeddings", [json!(0), json!("false"), json!([]), json!({}), json!(1.0)]),
    ] {
        let base = without(&tiny_config(), "rope_parameters");
        for value in values {
            let mut config = base.clone();
            config["rope_theta"] = json!(1e6);
            config[field] = value;
            assert!(message(&config).contains(&format!("{field} needs")), "{config}");
        }
    }
}

#[test]
fn axes_must_fit_each_other() {
    for (field, value, needed) in [
        ("num_key_value_heads", json!(3), "G (KV heads) 3 does not divide H (query heads) 4"),
        ("head_dim", json!(5), "K (head width) 5 is odd: rotary embedding needs pairs"),
        ("num_experts_per_tok", json!(5), "A (experts per token) 5 is more than E (experts) 4"),
        ("num_local_experts", json!(1 << 18), "L (layers) 2 times E (experts) 262144 is more than 262144"),
    ] {
        assert_eq!(message(&with(field, value)), format!("config.json: {needed}"));
    }
    let mut large = with("hidden_size", json!(1 << 24));
    large["intermediate_size"] = json!(1 << 24);
    let message = message(&large);
    assert!(message.ends_with(" parameters in all, the limit is 281474976710656"), "{message}");

    let mut indivisible = without(&tiny_config(), "head_dim");
    indivisible["hidden_size"] = json!(9);
    let error = parse(&indivisible).unwrap_err().to_string();
    assert!(error.contains("4 query heads do not divide a model width of 9"), "{error}");
}

#[test]
fn text_that_is_no_object_is_refused() {
    for text in ["", "{", "[]", "null", "7", "{\"a\": }", "\u{0}", &"[".repeat(100_000)] {
        assert!(matches!(ModelConfig::parse(text), Err(ConfigError::Json(_))));
    }
}

#[test]
fn files_that_cannot_be_read_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    let message = || ModelConfig::open(dir.path()).unwrap_err().to_string();
    assert!(message().starts_with(&path.display().to_string()), "{}", message());
    std::fs::create_dir(&path).unwrap();
    assert_eq!(message(), format!("{}: not a regular file", path.display()));
    std::fs::remove_dir(&path).unwrap();
    std::fs::write(&path, vec![b' '; (1 << 20) + 1]).unwrap();
    assert_eq!(message(), format!("{}: longer than 1048576 bytes", path.display()));
    std::fs::write(&path, b"{\"architectures\": \"\xff\"}").unwrap();
    assert!(message().contains("invalid utf-8"), "{}", message());
    std::fs::write(&path, tiny_config().to_string()).unwrap();
    assert_eq!(ModelConfig::open(dir.path()).unwrap(), parse(&tiny_config()).unwrap());
}

/// Names and shapes are fixed by files in the world; the whole lists of the published models are compared in tests/data.
#[test]
fn tensors_of_the_tiny_model() {
    let config = parse(&tiny_config()).unwrap();
    let specs = tensors(&config);
    assert_eq!(specs.len(), 3 + 2 * (7 + 4 * 3));
    let of = |role| specs.iter().find(|spec| spec.role == role).unwrap();
    let expect = |role, name: &str, shape: &[usize]| {
        assert_eq!(of(role), &TensorSpec { role, name: name.to_owned(), shape: shape.to_vec() });
    };
    expect(Role::Embedding, "model.embed_tokens.weight", &[12, 8]);
    expect(Role::Query { layer: 1 }, "model.layers.1.self_attn.q_proj.weight", &[24, 8]);
    expect(Role::Value { layer: 0 }, "model.layers.0.self_attn.v_proj.weight", &[12, 8]);
    expect(Role::AttentionOutput { layer: 1 }, "model.layers.1.self_attn.o_proj.weight", &[8, 24]);
    let down = Role::Expert { layer: 1, expert: 3, matrix: ExpertMatrix::Down };
    expect(down, "model.layers.1.block_sparse_moe.experts.3.w2.weight", &[8, 10]);
    let up = Role::Expert { layer: 1, expert: 3, matrix: ExpertMatrix::Up };
    expect(up, "model.layers.1.block_sparse_moe.experts.3.w3.weight", &[10, 8]);
    expect(Role::LmHead, "lm_head.weight", &[12, 8]);

    let mut names: Vec<_> = specs.iter().map(|spec| &spec.name).collect();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), specs.len(), "no name twice");

    let tied = parse(&with("tie_word_embeddings", json!(true))).unwrap();
    assert!(tensors(&tied).iter().all(|spec| spec.role != Role::LmHead));
    assert_eq!(Role::LmHead.stored_as(&tied), Role::Embedding);
    assert_eq!(Role::LmHead.stored_as(&config), Role::LmHead);
}

#[test]
fn sizes_add_up() {
    let config = parse(&tiny_config()).unwrap();
    let sizes = Sizes::parameters(&config);
    let attention = 2 * (24 * 8 + 2 * 12 * 8 + 8 * 24);
    let experts = 2 * 4 * 3 * 10 * 8;
    let expected = Sizes { embedding: 96, attention, norms: 2 * 2 * 8 + 8, routers: 2 * 4 * 8, experts, head: 96 };
    assert_eq!(sizes, expected);
    assert_eq!(sizes.total(), Kind::ALL.into_iter().map(|kind| sizes[kind]).sum::<u64>());
    assert_eq!(sizes.active(&config), sizes.total() - experts / 2, "A is half of E");
    assert_eq!(Sizes::bytes(&config, 4).total(), 4 * sizes.total());
    assert_eq!(config.shape.kv_elements_per_token(), 2 * 2 * 2 * 6);

    let tied = parse(&with("tie_word_embeddings", json!(true))).unwrap();
    assert_eq!(Sizes::parameters(&tied), Sizes { head: 0, ..sizes });
}

/// Any JSON, not too deep.
fn json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (0u64..40).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "\\PC{0,12}".prop_map(Value::from),
        Just(json!("default")),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec(("rope_theta|rope_type|type|\\PC{0,6}", inner), 0..4)
                .prop_map(|entries| Value::Object(entries.into_iter().collect())),
        ]
    })
}

proptest! {
    /// Also: what is accepted has sizes that can be computed, for which `Shape::faults` answers.
    #[test]
    fn a_changed_config_never_panics(changes in prop::collection::vec((any::<prop::sample::Index>(), json()), 1..5)) {
        let mut config = tiny_config();
        let fields: Vec<String> = config.as_object().unwrap().keys().cloned().chain(["rope_scaling".into()]).collect();
        for (index, value) in changes {
            config[index.get(&fields).as_str()] = value;
        }
        match parse(&config) {
            Ok(config) => {
                prop_assert!(config.shape.faults().is_empty());
                prop_assert!(Sizes::bytes(&config, 8).total() > 0);
            }
            Err(ConfigError::Fields(faults)) => prop_assert!(!faults.0.is_empty()),
            Err(error) => prop_assert!(!error.to_string().is_empty()),
        }
    }

    #[test]
    fn any_json_never_panics(value in json(), text in "\\PC*") {
        let _ = parse(&value);
        let _ = ModelConfig::parse(&text);
    }

    /// The bounds hold for every combination of large axes: nothing overflows where the shape is called sound.
    #[test]
    fn sound_shapes_have_sizes(axes in prop::collection::vec(prop_oneof![0usize..300, 0usize..=1 << 25], 9)) {
        let shape = Shape {
            layers: axes[0], d_model: axes[1], q_heads: axes[2], kv_heads: axes[3], head_width: axes[4],
            experts: axes[5], experts_per_token: axes[6], expert_width: axes[7], vocab: axes[8],
        };
        if shape.faults().is_empty() {
            let bound = Shape::MAX_PARAMETERS as usize;
            prop_assert!(shape.qkv_width().checked_mul(shape.d_model).unwrap() <= 2 * bound);
            prop_assert!(shape.kv_elements_per_token() <= 2 * bound);
            prop_assert!(shape.expert_matrix_elements() <= bound);
        }
    }
}

#[test]
fn faults_can_be_matched() {
    let Err(ConfigError::Fields(faults)) = parse(&without(&tiny_config(), "hidden_size")) else {
        panic!("hidden_size is needed");
    };
    assert_eq!(faults.0, [ConfigFault::Missing { field: "hidden_size".to_owned() }]);
}
