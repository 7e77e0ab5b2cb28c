//! The tensor lists of published models: each tensor must be claimed by one role, with none left over and none missing.
//!
//! Reads `tensors/*.json`, `mixtral/*config.json` and `mixtral/*.index.json` below the data folder. No weights: the
//! whole-folder trial writes the headers that the lists imply and leaves the weights to holes in sparse files.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use fulmen::checkpoint::{Checkpoint, Inventory, Summary};
use fulmen::model::{ExpertMatrix, ModelConfig, Role, Sizes};
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

#[derive(Deserialize)]
struct ListedTensor {
    name: String,
    shape: Vec<usize>,
    dtype: safetensors::Dtype,
}

/// A published model: files below the data folder, and what is known of it from elsewhere.
struct Published {
    list: &'static str,
    config: &'static str,
    /// Rows of the vocabulary where they differ from the config's: the list is of a sibling.
    vocab: Option<usize>,
    tensors: usize,
    bytes: u64,
    kv_bytes_per_token: u64,
}

const PUBLISHED: [Published; 3] = [
    Published {
        list: "mixtral-8x7b",
        config: "8x7b-config.json",
        vocab: None,
        tensors: 995,
        bytes: 93_405_585_408,
        kv_bytes_per_token: 128 << 10,
    },
    Published {
        list: "mixtral-8x22b",
        config: "8x22b-wizardlm2-config.json",
        vocab: None,
        tensors: 1739,
        bytes: 281_241_268_224,
        kv_bytes_per_token: 224 << 10,
    },
    Published {
        list: "mixtral-8x22b-instruct-v0.1",
        config: "8x22b-wizardlm2-config.json",
        vocab: Some(32768),
        tensors: 1739,
        bytes: 281_260_142_592,
        kv_bytes_per_token: 224 << 10,
    },
];

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
    trials
}

fn load(data: &Path, published: &Published) -> Result<(Value, TensorList), Failed> {
    let mut config: Value = serde_json::from_slice(&fs::read(data.join("mixtral").join(published.config))?)?;
    if let Some(vocab) = published.vocab {
        config["vocab_size"] = json!(vocab);
    }
    let list = data.join("tensors").join(format!("{}.json", published.list));
    Ok((config, serde_json::from_slice(&fs::read(list)?)?))
}

fn roles_and_sizes(data: &Path, published: &Published) -> Result<(), Failed> {
    let (config, list) = load(data, published)?;
    let config = ModelConfig::parse(&config.to_string())?;
    let listed = list.list.iter().map(|tensor| (tensor.name.as_str(), tensor.dtype, &tensor.shape[..]));
    let inventory = Inventory::from_list(config.clone(), listed)?;

    assert_eq!(inventory.tensors().len(), published.tensors);
    assert_eq!(list.list.len(), published.tensors, "none left over");
    assert!(inventory.ignored().is_empty());
    let roles: HashSet<Role> = inventory.tensors().iter().map(|tensor| tensor.role).collect();
    assert_eq!(roles.len(), published.tensors, "no role twice");

    let summary = Summary::new(&inventory);
    assert_eq!((summary.total_bytes, list.bytes), (published.bytes, published.bytes));
    assert_eq!(summary.parameters.total, list.elements);
    assert_eq!(Sizes::bytes(&config, 2), summary.bytes);
    assert_eq!(summary.experts.largest_expert_bytes, list.one_expert_bytes);
    assert_eq!(summary.kv_bytes_per_token.f16, published.kv_bytes_per_token);
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
