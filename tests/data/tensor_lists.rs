//! The tensor lists of published models: each tensor must be claimed by one role, with none left over and none missing.
//!
//! Reads `tensors/*.json`, `*/*config.json` and `mixtral/*.index.json` below the data folder. No weights: the
//! whole-folder trial writes the headers that the lists imply and leaves the weights to holes in sparse files.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use fulmen::checkpoint::{Checkpoint, Inventory, Summary};
use fulmen::model::{ExpertMatrix, ModelConfig, Role, Shape, Sizes, presets};
use libtest_mimic::{Completion, Failed, Trial};
use serde::Deserialize;
use serde_json::{Value, json};

/// A list as the data folder keeps it.
#[derive(Deserialize)]
struct TensorList {
    elements: u64,
    bytes: u64,
    one_expert_bytes: u64,
    list: Vec<ListedTensor>,
}

#[derive(Clone, Deserialize)]
struct ListedTensor {
    name: String,
    shape: Vec<usize>,
    dtype: safetensors::Dtype,
}

/// A published model: files below the data folder, and what is known of it from elsewhere.
struct Published {
    list: &'static str,
    /// Below the data folder; DBRX's is restated here.
    config: Option<&'static str>,
    /// The shape in `model::presets`.
    preset: &'static str,
    /// Rows of the vocabulary where they differ from the config's: the list is of a sibling.
    vocab: Option<usize>,
    tensors: usize,
    bytes: u64,
    parameters: u64,
    kv_bytes_per_token: u64,
}

const PUBLISHED: [Published; 7] = [
    Published {
        list: "mixtral-8x7b",
        config: Some("mixtral/8x7b-config.json"),
        preset: "mixtral-8x7b",
        vocab: None,
        tensors: 995,
        bytes: 93_405_585_408,
        parameters: 46_702_792_704,
        kv_bytes_per_token: 128 << 10,
    },
    Published {
        list: "mixtral-8x22b",
        config: Some("mixtral/8x22b-wizardlm2-config.json"),
        preset: "mixtral-8x22b",
        vocab: None,
        tensors: 1739,
        bytes: 281_241_268_224,
        parameters: 140_620_634_112,
        kv_bytes_per_token: 224 << 10,
    },
    Published {
        list: "mixtral-8x22b-instruct-v0.1",
        config: Some("mixtral/8x22b-wizardlm2-config.json"),
        preset: "mixtral-8x22b",
        vocab: Some(32768),
        tensors: 1739,
        bytes: 281_260_142_592,
        parameters: 140_630_071_296,
        kv_bytes_per_token: 224 << 10,
    },
    Published {
        list: "dbrx",
        config: None,
        preset: "dbrx",
        vocab: None,
        tensors: 323,
        bytes: 263_193_047_040,
        parameters: 131_596_523_520,
        kv_bytes_per_token: 160 << 10,
    },
    Published {
        list: "qwen3-30b-a3b",
        config: Some("qwen3_moe/config.json"),
        preset: "qwen3-30b-a3b",
        vocab: None,
        tensors: 18_867,
        bytes: 61_064_245_248,
        parameters: 30_532_122_624,
        kv_bytes_per_token: 96 << 10,
    },
    Published {
        list: "olmoe-1b-7b",
        config: Some("olmoe/config.json"),
        preset: "olmoe-1b-7b",
        vocab: None,
        tensors: 3219,
        bytes: 13_838_323_712,
        parameters: 6_919_161_856,
        kv_bytes_per_token: 128 << 10,
    },
    Published {
        list: "gpt-oss-20b",
        config: Some("gpt_oss/config.json"),
        preset: "gpt-oss-20b",
        vocab: None,
        tensors: 459,
        bytes: 13_761_264_768,
        // Two to a byte of blocks: 24 * 32 * 3 * 2880^2 of the experts' matrices, and what the list has beside them.
        parameters: 20_914_757_184,
        kv_bytes_per_token: 48 << 10,
    },
];

/// DBRX's config.json in the form in which it was published, numbers restated.
fn dbrx_config() -> Value {
    json!({
        "architectures": ["DbrxForCausalLM"],
        "model_type": "dbrx",
        "n_layers": 40,
        "d_model": 6144,
        "n_heads": 48,
        "vocab_size": 100352,
        "max_seq_len": 32768,
        "eos_token_id": 100257,
        "attn_config": {"kv_n_heads": 8, "clip_qkv": 8, "rope_theta": 500000},
        "ffn_config": {
            "ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4, "moe_jitter_eps": 0,
            "moe_loss_weight": 0.05,
        },
        "tie_word_embeddings": false,
        "torch_dtype": "bfloat16",
    })
}

/// The trials; ignored where there is no data folder.
pub fn trials(data: Option<&Path>) -> Vec<Trial> {
    let trial = |name: String, run: fn(&Path, &Published) -> Result<(), Failed>, published: &'static Published| {
        let Some(data) = data.map(Path::to_owned) else {
            return Trial::ignorable_test(name, || Ok(Completion::ignored_with("needs FULMEN_DATA")));
        };
        Trial::test(name, move || run(&data, published))
    };
    let mut trials = Vec::new();
    for published in &PUBLISHED {
        trials.push(trial(format!("tensor_lists::{}", published.list), roles_and_sizes, published));
    }
    trials.push(trial("tensor_lists::folder_of_mixtral-8x7b".to_owned(), opens_as_a_folder, &PUBLISHED[0]));
    for published in PUBLISHED.iter().filter(|published| ["dbrx", "gpt-oss-20b"].contains(&published.list)) {
        trials.push(trial(format!("tensor_lists::file_of_{}", published.list), opens_as_a_file, published));
    }
    trials
}

fn load(data: &Path, published: &Published) -> Result<(Value, TensorList), Failed> {
    let mut config: Value = match published.config {
        Some(path) => serde_json::from_slice(&fs::read(data.join(path))?)?,
        None => dbrx_config(),
    };
    if let Some(vocab) = published.vocab {
        config["vocab_size"] = json!(vocab);
    }
    let list = data.join("tensors").join(format!("{}.json", published.list));
    Ok((config, serde_json::from_slice(&fs::read(list)?)?))
}

fn roles_and_sizes(data: &Path, published: &Published) -> Result<(), Failed> {
    let (config, list) = load(data, published)?;
    let config = ModelConfig::parse(&config.to_string())?;
    let inventory_of = |list: &[ListedTensor]| {
        let listed = list.iter().map(|tensor| (tensor.name.as_str(), tensor.dtype, &tensor.shape[..]));
        Inventory::from_list(config.clone(), listed)
    };
    let inventory = inventory_of(&list.list)?;

    assert_eq!(inventory.tensors().len(), published.tensors);
    assert_eq!(list.list.len(), published.tensors, "none left over");
    assert!(inventory.ignored().is_empty());
    let roles: HashSet<Role> = inventory.tensors().iter().map(|tensor| tensor.role).collect();
    assert_eq!(roles.len(), published.tensors, "no role twice");

    let summary = Summary::new(&inventory);
    assert_eq!((summary.total_bytes, list.bytes), (published.bytes, published.bytes));
    assert_eq!(summary.parameters.total, published.parameters);
    let bias_bytes = if config.forward.biases {
        // Of one expert, in bf16: they stay on the GPU and are in no slot.
        2 * (2 * config.shape.expert_width + config.shape.d_model) as u64
    } else {
        assert_eq!(list.elements, published.parameters);
        assert_eq!(Sizes::bytes(&config, 2), summary.bytes);
        0
    };
    assert_eq!(summary.experts.largest_expert_bytes + bias_bytes, list.one_expert_bytes);
    assert_eq!(summary.kv_bytes_per_token.f16, published.kv_bytes_per_token);

    // The shape that is known without files is this one.
    let preset = presets::preset(published.preset).ok_or("no such preset")?;
    let shape = Shape { vocab: published.vocab.unwrap_or(preset.shape.vocab), ..preset.shape };
    let declared_dtype = config.declared_dtype.clone();
    assert_eq!(config, ModelConfig { shape, declared_dtype, ..preset });

    // One that is missing, wrong or too many is named.
    let odd = list.list.len() * 2 / 3;
    let refusal = |list: &[ListedTensor]| inventory_of(list).expect_err("should be refused").to_string();
    let mut changed = list.list.clone();
    let removed = changed.remove(odd);
    assert_eq!(refusal(&changed), format!("tensor {}: is missing, needed: {:?}", removed.name, removed.shape));
    changed.insert(odd, ListedTensor { shape: [&removed.shape[..], &[1]].concat(), ..removed.clone() });
    let wrong = refusal(&changed);
    assert!(wrong.contains(&removed.name) && wrong.contains("config.json makes it"), "{wrong}");
    changed[odd] = removed.clone();
    changed.push(ListedTensor { name: format!("{}.extra", removed.name), ..removed });
    let extra = refusal(&changed);
    assert!(extra.contains(".extra: is unknown to the model family"), "{extra}");
    Ok(())
}

/// One file with the header that the list implies, as long as all shards together.
fn opens_as_a_file(data: &Path, published: &Published) -> Result<(), Failed> {
    let (config, list) = load(data, published)?;
    let folder = tempfile::tempdir()?;
    fs::write(folder.path().join("config.json"), config.to_string())?;
    let (mut header, mut end) = (json!({}), 0);
    for tensor in &list.list {
        let start = end;
        end += tensor.shape.iter().product::<usize>() as u64 * tensor.dtype.bitsize() as u64 / 8;
        header[&tensor.name] = json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]});
    }
    let header = header.to_string();
    let mut file = File::create(folder.path().join("model.safetensors"))?;
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    file.set_len(8 + header.len() as u64 + end)?; // A hole: takes no room on the disk.

    let checkpoint = Checkpoint::open(folder.path())?;
    let (last_layer, last_expert) = (checkpoint.config().shape.layers - 1, checkpoint.config().shape.experts - 1);
    let slots = checkpoint.inventory().slot_bytes().ok_or("experts of one type")?;
    for (matrix, bytes) in ExpertMatrix::ALL.into_iter().zip(slots) {
        let sources = checkpoint.inventory().slot_sources(last_layer, last_expert, matrix, 0..bytes);
        let there = sources.into_iter().map(|source| {
            checkpoint.tensor(source.role).bytes[source.range.start as usize..source.range.end as usize].len() as u64
        });
        assert_eq!(there.sum::<u64>(), bytes, "{matrix:?}");
    }
    let printed = checkpoint.summary().to_string();
    let lines: &[&str] = match published.list {
        "dbrx" => &[
            "parameters  132 billion total, 36.5 billion active per token",
            "forward     layer norms, fused QKV, q, k and v clipped to ±8, experts of a layer stacked",
            "expert      378 MiB each, 3 matrices of 126 MiB; 640 in all",
        ],
        _ => &[
            "parameters  20.9 billion total, 4.19 billion active per token",
            "positions   131072, sliding window 128 in 12 of 24 layers",
            "expert      12.6 MiB each, 2 matrices of 4.20 MiB to 8.40 MiB; 768 in all",
        ],
    };
    for line in lines {
        assert!(printed.lines().any(|printed| printed == *line), "{line}\n{printed}");
    }
    Ok(())
}

/// The published index and the headers that its shards must have, in files as long as the real ones.
fn opens_as_a_folder(data: &Path, published: &Published) -> Result<(), Failed> {
    let (config, list) = load(data, published)?;
    let index = fs::read(data.join("mixtral/8x7b-model.safetensors.index.json"))?;
    let shard_of: BTreeMap<String, String> =
        serde_json::from_value(serde_json::from_slice::<Value>(&index)?["weight_map"].clone())?;

    let folder = tempfile::tempdir()?;
    fs::write(folder.path().join("config.json"), config.to_string())?;
    fs::write(folder.path().join("model.safetensors.index.json"), &index)?;
    let mut shards: BTreeMap<&str, Vec<&ListedTensor>> = BTreeMap::new();
    for tensor in &list.list {
        shards.entry(&shard_of[&tensor.name]).or_default().push(tensor);
    }
    for (shard, tensors) in &shards {
        let mut header = json!({});
        let mut end = 0;
        for tensor in tensors {
            let start = end;
            end += tensor.shape.iter().product::<usize>() as u64 * 2;
            let entry = json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]});
            header[&tensor.name] = entry;
        }
        let header = header.to_string();
        let mut file = File::create(folder.path().join(shard))?;
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        file.set_len(8 + header.len() as u64 + end)?; // A hole: takes no room on the disk.
    }

    let checkpoint = Checkpoint::open(folder.path())?;
    let down = checkpoint.tensor(Role::Expert { layer: 31, expert: 7, matrix: ExpertMatrix::Down });
    assert_eq!((down.shape, down.bytes.len()), (&[4096, 14336][..], 117_440_512));
    let summary = checkpoint.summary();
    assert_eq!(summary.total_bytes, published.bytes);
    let printed = summary.to_string();
    for line in [
        "parameters  46.7 billion total, 12.9 billion active per token",
        "weights     87.0 GiB (93405585408 bytes)",
        "            experts     84.0 GiB",
        "expert      336 MiB each, 3 matrices of 112 MiB; 256 in all",
        "KV cache    128 KiB per token in f16, 256 KiB in f32",
        "files       19 shards, model-00001-of-00019.safetensors to model-00019-of-00019.safetensors, 87.0 GiB",
    ] {
        assert!(printed.lines().any(|printed| printed == line), "{line}\n{printed}");
    }
    Ok(())
}
