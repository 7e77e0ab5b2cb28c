//! Damaged and foreign checkpoints: what is wrong is said with file and tensor, what was needed and what there is.

use std::path::{Path, PathBuf};

use fulmen::request::tokenizer::Tokenizer;
use libtest_mimic::{Failed, Trial};
use serde_json::{Map, Value, json};

use crate::common::*;

const FIRST_SHARD: &str = "model-00001-of-00002.safetensors";
const SECOND_SHARD: &str = "model-00002-of-00002.safetensors";

/// Both commands that open a checkpoint refuse it, with the same words.
#[track_caller]
fn refused<const N: usize>(model: &Path, parts: [&str; N]) {
    let folder = model.display().to_string();
    let ran = fulmen(["generate", "--prompt", "X"]).path("--model", model).run().ends(1).prints_nothing();
    ran.says(parts).says(["error: ", &folder]);
    fulmen(["inspect"]).path("--model", model).run().ends(1).prints_nothing().says(parts);
}

/// Rewrites a shard from its header and its data.
fn edit_shard(model: &Path, shard: &str, edit: impl FnOnce(&mut Map<String, Value>, &mut Vec<u8>)) {
    let path = model.join(shard);
    let bytes = std::fs::read(&path).expect("a shard");
    let header_bytes = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    let mut header: Map<String, Value> = serde_json::from_slice(&bytes[8..8 + header_bytes]).expect("a header");
    let mut data = bytes[8 + header_bytes..].to_vec();
    edit(&mut header, &mut data);
    let text = Value::Object(header).to_string();
    let mut file = (text.len() as u64).to_le_bytes().to_vec();
    file.extend(text.bytes());
    file.extend(data);
    std::fs::write(&path, file).expect("written");
}

/// Where the bytes of a tensor are in its shard's data.
fn extent(header: &Map<String, Value>, tensor: &str) -> std::ops::Range<usize> {
    let offset = |index: usize| header[tensor]["data_offsets"][index].as_u64().expect("an offset") as usize;
    offset(0)..offset(1)
}

/// The shard that has a tensor.
fn shard_of(model: &Path, tensor: &str) -> String {
    let index = std::fs::read(model.join("model.safetensors.index.json")).expect("an index");
    let index: Value = serde_json::from_slice(&index).expect("JSON");
    index["weight_map"][tensor].as_str().expect("a shard").to_owned()
}

fn edit_config(model: &Path, edit: impl FnOnce(&mut Map<String, Value>)) {
    let path = model.join("config.json");
    let mut config: Map<String, Value> = serde_json::from_slice(&std::fs::read(&path).expect("read")).expect("JSON");
    edit(&mut config);
    std::fs::write(&path, Value::Object(config).to_string()).expect("written");
}

fn shard_is_missing() -> Result<(), Failed> {
    let folder = Folder::new();
    let model = folder.model();
    std::fs::remove_file(model.join(SECOND_SHARD))?;
    refused(&model, [SECOND_SHARD, "is missing", "tensors there"]);
    Ok(())
}

fn shard_is_cut_short() -> Result<(), Failed> {
    let folder = Folder::new();
    let model = folder.model();
    let bytes = std::fs::read(model.join(FIRST_SHARD))?;
    let (had, needed) = (bytes.len() - 1000, bytes.len());
    std::fs::write(model.join(FIRST_SHARD), &bytes[..had])?;
    refused(&model, [FIRST_SHARD, &format!("needs {needed} bytes, has {had}"), "cut short"]);
    // So short that not even the header is whole, and nothing at all.
    std::fs::write(model.join(FIRST_SHARD), &bytes[..100])?;
    refused(&model, [FIRST_SHARD, "does not fit the file, which has 100 bytes"]);
    std::fs::write(model.join(FIRST_SHARD), [])?;
    refused(&model, [FIRST_SHARD, "has 0 bytes"]);
    Ok(())
}

fn header_is_longer_than_the_file() -> Result<(), Failed> {
    let folder = Folder::new();
    let model = folder.model();
    let mut bytes = std::fs::read(model.join(FIRST_SHARD))?;
    bytes[..8].copy_from_slice(&50_000_000u64.to_le_bytes());
    std::fs::write(model.join(FIRST_SHARD), &bytes)?;
    refused(&model, [FIRST_SHARD, "header of 8 + 50000000 bytes", &format!("{} bytes", bytes.len())]);
    bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    std::fs::write(model.join(FIRST_SHARD), &bytes)?;
    refused(&model, [FIRST_SHARD, "header length is 18446744073709551615 bytes, the limit is"]);
    Ok(())
}

fn shape_disagrees_with_config() -> Result<(), Failed> {
    let folder = Folder::new();
    let model = folder.model();
    edit_config(&model, |config| {
        config.insert("intermediate_size".into(), json!(200));
    });
    // Eight of the 96 matrices are shown, the others counted.
    refused(&model, ["experts.0.w1.weight", "shape is [192, 128], config.json makes it [200, 128]", "more like these"]);
    Ok(())
}

fn type_is_not_supported() -> Result<(), Failed> {
    let folder = Folder::new();
    let model = folder.model();
    let tensor = "model.norm.weight";
    edit_shard(&model, &shard_of(&model, tensor), |header, _| header[tensor]["dtype"] = json!("I16"));
    refused(&model, [tensor, "type i16 is not supported", "bf16, f16, f32"]);
    Ok(())
}

fn architecture_is_not_supported() -> Result<(), Failed> {
    let folder = Folder::new();
    let model = folder.model();
    edit_config(&model, |config| {
        config.insert("architectures".into(), json!(["BertForMaskedLM"]));
        config.insert("model_type".into(), json!("bert"));
    });
    refused(&model, ["config.json", "BertForMaskedLM", "not supported", "MixtralForCausalLM"]);
    Ok(())
}

fn config_lacks_a_field() -> Result<(), Failed> {
    let folder = Folder::new();
    let model = folder.model();
    edit_config(&model, |config| {
        config.shift_remove("num_local_experts");
        config.insert("num_hidden_layers".into(), json!("four"));
    });
    refused(&model, ["config.json", "num_local_experts is missing", "num_hidden_layers", "four"]);
    std::fs::write(model.join("config.json"), "{\"architectures\": [")?;
    refused(&model, ["config.json", "JSON"]);
    std::fs::remove_file(model.join("config.json"))?;
    refused(&model, ["config.json", "No such file"]);
    Ok(())
}

/// A model without a tokenizer can be inspected, and cannot read a prompt.
fn tokenizer_is_missing() -> Result<(), Failed> {
    let folder = Folder::new();
    let model = folder.model();
    std::fs::remove_file(model.join("tokenizer.json"))?;
    let ran = fulmen(["generate", "--prompt", "X"]).path("--model", &model).run().ends(1).prints_nothing();
    ran.says(["error: ", "tokenizer.json"]);
    fulmen(["inspect"]).path("--model", &model).run().ends(0).prints(["MixtralForCausalLM", "tokenizer   none: "]);
    std::fs::write(model.join("tokenizer.json"), "{}")?;
    fulmen(["generate", "--prompt", "X"]).path("--model", &model).run().ends(1).says(["tokenizer.json"]);
    Ok(())
}

fn folder_is_no_model() -> Result<(), Failed> {
    let folder = Folder::new();
    let nowhere = folder.path("nowhere");
    for command in ["generate", "inspect"] {
        let ran = fulmen([command]).path("--model", &nowhere).stdin("X").run().ends(1).prints_nothing();
        ran.says([nowhere.to_str().expect("text")]);
    }
    Ok(())
}

/// Overwrites tensor bytes with NaN. `rows` of the first axis, or all.
fn poison(model: &Path, tensor: &str, rows: Option<(usize, usize)>) {
    edit_shard(model, &shard_of(model, tensor), |header, data| {
        let mut bytes = extent(header, tensor);
        if let Some((first, n)) = rows {
            let n_rows = header[tensor]["shape"][0].as_u64().expect("a shape") as usize;
            let row_bytes = bytes.len() / n_rows;
            bytes.start += first * row_bytes;
            bytes.end = bytes.start + n * row_bytes;
        }
        for value in data[bytes].chunks_exact_mut(2) {
            value.copy_from_slice(&0x7fc0u16.to_le_bytes());
        }
    });
}

fn run_damaged(model: &Path, folder: &Folder, lines: &[Value]) -> (Ran, Results) {
    let (input, output): (PathBuf, PathBuf) = (folder.lines("in.jsonl", lines), folder.path("out.jsonl"));
    let call = fulmen(["run-batch", "--overwrite"]).path("--model", model).path("-i", &input).path("-o", &output);
    let ran = call.run();
    (ran, results(&output))
}

/// One row of the embedding is NaN: requests with that token fail and say so, the others have the answers they always have.
fn damaged_weights_fail_the_requests_that_meet_them() -> Result<(), Failed> {
    let folder = Folder::new();
    let model = folder.model();
    let tokenizer = Tokenizer::open(&model)?;
    let prompt = |word: &str| format!("Rule: X +\nReplace: X by {word}\nAnswer:");
    let tokens = |word: &str| tokenizer.encode(&prompt(word), true).expect("encodes");
    let other = tokens("fig");
    let token = tokens("plum").into_iter().find(|token| !other.contains(token)).expect("a token of its own");
    poison(&model, "model.embed_tokens.weight", Some((token as usize, 1)));
    let line = |id: &str, word: &str, more: Value| {
        let mut body = json!({"prompt": prompt(word), "temperature": 0, "max_tokens": 8});
        body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        completion(id, body)
    };
    let lines = [
        line("good 1", "fig", json!({})),
        line("bad greedy", "plum", json!({})),
        line("bad sampled", "plum", json!({"temperature": 1, "n": 3})),
        line("bad with logprobs", "plum", json!({"logprobs": 2})),
        line("good 2", "fig", json!({})),
    ];
    let (ran, results) = run_damaged(&model, &folder, &lines);
    ran.ends(3).says(["5 lines answered, 3 of them with errors"]);
    for (id, result) in &results {
        if id.starts_with("good") {
            assert_eq!(text(result).trim(), "fig +", "{id} is right beside the bad ones");
        } else {
            let message = result["error"]["message"].as_str().expect("a message");
            assert!(message.contains("NaN") && message.contains("damaged"), "{result}");
        }
    }
    assert_eq!(results.len(), lines.len());

    // Alone, the request is the run.
    let ran = fulmen(["generate", "--prompt", &prompt("plum")]).path("--model", &model).run();
    ran.ends(1).says(["error: ", "NaN", "damaged"]);
    Ok(())
}

/// Everything is NaN from the first layer on: every line is answered all the same.
fn weights_that_are_all_nan_fail_every_request() -> Result<(), Failed> {
    let folder = Folder::new();
    let model = folder.model();
    poison(&model, "model.layers.0.block_sparse_moe.gate.weight", None);
    poison(&model, "model.layers.1.input_layernorm.weight", None);
    let lines = short_tasks(4);
    let (ran, results) = run_damaged(&model, &folder, &lines);
    ran.ends(3).says(["4 lines answered, 4 of them with errors"]);
    assert_eq!(results.len(), 4);
    for result in results.values() {
        assert_eq!(result["error"]["code"], "not_a_number", "{result}");
    }
    Ok(())
}

pub fn anywhere() -> Vec<Trial> {
    vec![
        Trial::test("damage::shard_is_missing", shard_is_missing),
        Trial::test("damage::shard_is_cut_short", shard_is_cut_short),
        Trial::test("damage::header_is_longer_than_the_file", header_is_longer_than_the_file),
        Trial::test("damage::shape_disagrees_with_config", shape_disagrees_with_config),
        Trial::test("damage::type_is_not_supported", type_is_not_supported),
        Trial::test("damage::architecture_is_not_supported", architecture_is_not_supported),
        Trial::test("damage::config_lacks_a_field", config_lacks_a_field),
        Trial::test("damage::tokenizer_is_missing", tokenizer_is_missing),
        Trial::test("damage::folder_is_no_model", folder_is_no_model),
    ]
}

pub fn on_adapter() -> Vec<Trial> {
    vec![
        Trial::test(
            "damage::damaged_weights_fail_the_requests_that_meet_them",
            damaged_weights_fail_the_requests_that_meet_them,
        ),
        Trial::test("damage::weights_that_are_all_nan_fail_every_request", weights_that_are_all_nan_fail_every_request),
    ]
}
