//! Folders of weights: valid ones read back value by value, and one refusal for every way to be wrong.

use std::error::Error;
use std::path::Path;

use fulmen::checkpoint::header::{Header, MAX_HEADER_BYTES};
use fulmen::checkpoint::{CheckpointError, Dtype, Fault, Faults};
use fulmen::model::{Role, tensors};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::fixtures::{Folder, Tensor, all_tensors, coded, file, file_with, header, index, tiny_config};

fn bf16_tensors() -> Vec<Tensor> {
    all_tensors(&tiny_config(), |_| Dtype::Bf16)
}

/// The three types in turn.
fn mixed_tensors() -> Vec<Tensor> {
    all_tensors(&tiny_config(), |n| Dtype::ALL[n % 3])
}

fn find<'a>(tensors: &'a mut [Tensor], name: &str) -> &'a mut Tensor {
    tensors.iter_mut().find(|tensor| tensor.name == name).unwrap()
}

/// Every tensor of the checkpoint holds the values that the fixture wrote there, by view and by path and range.
fn assert_reads_back(folder: &Folder, dtype: impl Fn(usize) -> Dtype) {
    let checkpoint = folder.open().unwrap();
    let specs = tensors(checkpoint.config());
    assert_eq!(checkpoint.inventory().tensors().len(), specs.len());
    for (n, spec) in specs.iter().enumerate() {
        let view = checkpoint.tensor(spec.role);
        assert_eq!((view.dtype, view.shape), (dtype(n), &spec.shape[..]), "{}", spec.name);
        assert_eq!(view.elements() as u64, spec.elements());
        let expected: Vec<f32> = (0..view.elements()).map(|i| coded(n, i)).collect();
        assert_eq!(view.dtype.read_all(view.bytes), expected, "{}", spec.name);

        let on_disk = std::fs::read(view.path).unwrap();
        assert_eq!(&on_disk[view.range.start as usize..view.range.end as usize], view.bytes);
    }
}

#[test]
fn one_file_of_mixed_types_reads_back() {
    let folder = Folder::single(&tiny_config(), &mixed_tensors());
    assert_reads_back(&folder, |n| Dtype::ALL[n % 3]);
}

/// The fixtures' headers have no padding: with one more byte in the header every tensor moves by one.
#[test]
fn tensors_at_any_alignment_read_back() {
    let tensors = mixed_tensors();
    let data: Vec<u8> = tensors.iter().flat_map(|tensor| tensor.bytes.clone()).collect();
    for padding in 0..4 {
        let folder = Folder::new(&tiny_config());
        folder.write("model.safetensors", file_with(&format!("{}{:padding$}", header(&tensors), ""), &data));
        assert_reads_back(&folder, |n| Dtype::ALL[n % 3]);
    }
}

#[test]
fn shards_read_back() {
    let tensors = mixed_tensors();
    let (first, rest) = tensors.split_at(10);
    let (second, third) = rest.split_at(1);
    let shards = [("model-1.safetensors", first), ("model-2.safetensors", second), ("model-3.safetensors", third)];
    let folder = Folder::sharded(&tiny_config(), &shards);
    assert_reads_back(&folder, |n| Dtype::ALL[n % 3]);

    let checkpoint = folder.open().unwrap();
    let files: Vec<&str> = checkpoint.inventory().files().iter().map(|(file, _)| file.as_str()).collect();
    assert_eq!(files, ["model-1.safetensors", "model-2.safetensors", "model-3.safetensors"]);
    assert_eq!(checkpoint.tensor(Role::Embedding).path, folder.path().join("model-1.safetensors"));
    assert_eq!(checkpoint.dir(), folder.path());
}

/// As transformers does: a folder may keep both forms.
#[test]
fn one_file_goes_before_an_index() {
    let folder = Folder::single(&tiny_config(), &bf16_tensors());
    folder.write("model.safetensors.index.json", "not looked at");
    assert_reads_back(&folder, |_| Dtype::Bf16);
}

/// The hub's cache is made of symbolic links.
#[cfg(unix)]
#[test]
fn linked_files_are_followed() {
    let elsewhere = Folder::single(&tiny_config(), &bf16_tensors());
    let folder = Folder::new(&tiny_config());
    std::os::unix::fs::symlink(elsewhere.path().join("model.safetensors"), folder.path().join("model.safetensors"))
        .unwrap();
    assert_reads_back(&folder, |_| Dtype::Bf16);
}

#[test]
fn tied_head_is_the_embedding() {
    let mut config = tiny_config();
    config["tie_word_embeddings"] = json!(true);
    let checkpoint = Folder::single(&config, &all_tensors(&config, |_| Dtype::F16)).open().unwrap();
    assert_eq!(checkpoint.tensor(Role::LmHead).range, checkpoint.tensor(Role::Embedding).range);

    let folder = Folder::single(&config, &bf16_tensors());
    assert_eq!(
        folder.refusal(),
        "model.safetensors: tensor lm_head.weight: is there although config.json ties the LM head to the embedding \
         (tie_word_embeddings)"
    );
}

#[test]
fn roles_that_the_model_lacks_are_not_found() {
    let checkpoint = Folder::single(&tiny_config(), &bf16_tensors()).open().unwrap();
    assert!(checkpoint.find(Role::Router { layer: 2 }).is_none());
    assert!(checkpoint.find(Role::Router { layer: 1 }).is_some());
}

// Folders and shards.

#[test]
fn folder_without_weights() {
    let folder = Folder::new(&tiny_config());
    let dir = folder.path().display();
    assert_eq!(
        folder.refusal(),
        format!("{dir}: needs model.safetensors or model.safetensors.index.json, has neither")
    );
}

#[test]
fn folder_without_config() {
    let folder = Folder::single(&tiny_config(), &bf16_tensors());
    folder.remove("config.json");
    assert!(matches!(folder.open(), Err(CheckpointError::Config(_))));
    assert!(folder.refusal().contains("config.json"), "{}", folder.refusal());
}

#[test]
fn what_is_no_regular_file_is_not_opened() {
    let folder = Folder::new(&tiny_config());
    std::fs::create_dir(folder.path().join("model.safetensors")).unwrap();
    assert_eq!(folder.refusal(), "model.safetensors: not a regular file");
    assert!(folder.open().err().unwrap().source().is_some());
}

fn two_shards() -> Folder {
    let tensors = bf16_tensors();
    let (first, second) = tensors.split_at(10);
    Folder::sharded(&tiny_config(), &[("a.safetensors", first), ("b.safetensors", second)])
}

#[test]
fn missing_shards_are_all_named() {
    let folder = two_shards();
    folder.remove("a.safetensors");
    assert_eq!(folder.refusal(), "a.safetensors: is missing; the index puts 10 tensors there");
    folder.remove("b.safetensors");
    assert_eq!(
        folder.refusal(),
        "2 faults in the checkpoint\n  \
         a.safetensors: is missing; the index puts 10 tensors there\n  \
         b.safetensors: is missing; the index puts 31 tensors there"
    );
}

#[test]
fn index_that_puts_a_tensor_into_the_wrong_shard() {
    let tensors = bf16_tensors();
    let (first, second) = tensors.split_at(10);
    let folder = two_shards();
    let mut lying = index(&[("a.safetensors", first), ("b.safetensors", second)]);
    lying["weight_map"]["lm_head.weight"] = json!("a.safetensors");
    folder.write("model.safetensors.index.json", lying.to_string());
    assert_eq!(folder.refusal(), "a.safetensors: tensor lm_head.weight is not there, although the index puts it there");
}

#[test]
fn index_names_that_lead_out_of_the_folder() {
    let outside = Folder::single(&tiny_config(), &bf16_tensors());
    let inside = outside.path().join("model");
    std::fs::create_dir(&inside).unwrap();
    std::fs::write(inside.join("config.json"), tiny_config().to_string()).unwrap();
    let absolute = outside.path().join("model.safetensors").display().to_string();
    for name in [
        "../model.safetensors",
        "..",
        ".",
        "",
        "sub/model.safetensors",
        "./model.safetensors",
        "model.safetensors/",
        "..\\model.safetensors",
        "C:model.safetensors",
        "model\u{0}.safetensors",
        "model\n.safetensors",
        &absolute,
    ] {
        let index = json!({"weight_map": {"lm_head.weight": name}});
        std::fs::write(inside.join("model.safetensors.index.json"), index.to_string()).unwrap();
        let error = fulmen::checkpoint::Checkpoint::open(&inside).err().unwrap();
        assert_eq!(
            error.to_string(),
            format!("model.safetensors.index.json: shard name {name:?} is not a plain file name")
        );
    }
}

#[test]
fn broken_index() {
    let folder = two_shards();
    for text in ["", "{", "[]", "{}", "{\"weight_map\": []}", "{\"weight_map\": {\"a\": 1}}", "\u{0}"] {
        folder.write("model.safetensors.index.json", text);
        let message = folder.refusal();
        assert!(message.starts_with("model.safetensors.index.json: is not an index of shards: "), "{message}");
    }
    folder.write(
        "model.safetensors.index.json",
        "{\"weight_map\": {\"x\": \"a.safetensors\", \"x\": \"b.safetensors\"}}",
    );
    assert_eq!(folder.refusal(), "model.safetensors.index.json: tensor x is listed twice");
    folder.write("model.safetensors.index.json", "{\"weight_map\": {}}");
    assert!(
        folder.refusal().starts_with("41 faults in the checkpoint\n  tensor model.embed_tokens.weight: is missing")
    );
}

#[test]
fn a_tensor_in_two_shards() {
    let tensors = bf16_tensors();
    let folder =
        Folder::sharded(&tiny_config(), &[("a.safetensors", &tensors[..11]), ("b.safetensors", &tensors[10..])]);
    let name = &tensors[10].name;
    assert_eq!(folder.refusal(), format!("tensor {name}: is there twice, in a.safetensors and in b.safetensors"));
}

// Headers.

fn refusal_of_file(bytes: impl AsRef<[u8]>) -> String {
    let folder = Folder::new(&tiny_config());
    folder.write("model.safetensors", bytes);
    folder.refusal()
}

#[test]
fn files_too_short_for_a_header() {
    for n in 0..8 {
        assert_eq!(
            refusal_of_file(vec![1; n]),
            format!(
                "model.safetensors: is not a safetensors file: needs 8 bytes for the header's length, has {n} bytes"
            )
        );
    }
}

#[test]
fn header_longer_than_its_file() {
    let mut bytes = file(&bf16_tensors());
    let file_bytes = bytes.len();
    bytes[..8].copy_from_slice(&(file_bytes as u64 - 7).to_le_bytes());
    assert_eq!(
        refusal_of_file(&bytes),
        format!(
            "model.safetensors: header of 8 + {} bytes does not fit the file, which has {file_bytes} bytes",
            file_bytes - 7
        )
    );
}

#[test]
fn absurd_header_length() {
    let mut bytes = file(&bf16_tensors());
    for length in [u64::MAX, u64::MAX - 7, 1 << 63, MAX_HEADER_BYTES + 1] {
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        assert_eq!(
            refusal_of_file(&bytes),
            format!("model.safetensors: header length is {length} bytes, the limit is 100000000")
        );
    }
}

#[test]
fn truncated_files_are_all_named() {
    let folder = two_shards();
    let mut message = String::from("2 faults in the checkpoint");
    for shard in ["a.safetensors", "b.safetensors"] {
        let whole = std::fs::read(folder.path().join(shard)).unwrap();
        folder.write(shard, &whole[..whole.len() - 1]);
        let tensors = bf16_tensors();
        let last = if shard == "a.safetensors" { &tensors[9] } else { &tensors[40] };
        message += &format!(
            "\n  {shard}: needs {} bytes, has {}: cut short, or its header is wrong (tensors beyond its end: 1, the last one {})",
            whole.len(),
            whole.len() - 1,
            last.name,
        );
    }
    assert_eq!(folder.refusal(), message);
}

/// Whatever the length at which a download broke off, it is refused.
#[test]
fn every_truncation_is_refused() {
    let whole = file(&bf16_tensors());
    for n in (0..whole.len()).step_by(7) {
        assert!(Header::parse("f", &whole[..n]).is_err(), "{n} of {}", whole.len());
    }
}

#[test]
fn header_that_is_no_header() {
    assert!(refusal_of_file(file_with("", b"")).contains("header is not a JSON object of tensors"));
    assert!(refusal_of_file(file_with("[1, 2]", b"")).contains("header is not a JSON object of tensors"));
    assert!(refusal_of_file(file_with("{\"a\": }", b"")).contains("header is not a JSON object of tensors"));
    let mut not_text = file_with("{\"a\": 1}", b"");
    not_text[9] = 0xff;
    assert!(refusal_of_file(not_text).contains("header is not UTF-8 text"));
    // A git-lfs pointer where the weights should be is what a clone without git-lfs leaves.
    assert!(refusal_of_file("version https://git-lfs.github.com/spec/v1").contains("header length is"));
    assert!(refusal_of_file(file_with("{\"__metadata__\": {\"a\": 1}}", b"")).contains("JSON"));
}

/// The header of the tiny model with one tensor's entry changed.
fn with_entry(name: &str, change: impl FnOnce(&mut Value)) -> String {
    let tensors = bf16_tensors();
    let mut header = header(&tensors);
    change(&mut header[name]);
    let data: Vec<u8> = tensors.iter().flat_map(|tensor| tensor.bytes.clone()).collect();
    refusal_of_file(file_with(&header.to_string(), &data))
}

#[test]
fn entries_that_do_not_parse() {
    let message = with_entry("lm_head.weight", |entry| entry["dtype"] = json!("Q4_K"));
    assert!(
        message
            .starts_with("model.safetensors: tensor lm_head.weight: its header entry does not parse: unknown variant"),
        "{message}"
    );
    for (field, value) in [
        ("dtype", json!(7)),
        ("shape", json!([-12, 8])),
        ("shape", json!([1.5])),
        ("shape", json!("12x8")),
        ("data_offsets", json!([0])),
        ("data_offsets", json!([0, 1, 2])),
        ("data_offsets", json!([-1, 2])),
    ] {
        let message = with_entry("lm_head.weight", |entry| entry[field] = value);
        assert!(message.contains("tensor lm_head.weight: its header entry does not parse"), "{message}");
    }
    assert!(with_entry("lm_head.weight", |entry| *entry = json!([])).contains("does not parse"));
}

#[test]
fn size_that_shape_and_type_contradict() {
    let message = with_entry("lm_head.weight", |entry| entry["shape"] = json!([12, 9]));
    assert_eq!(message, "model.safetensors: tensor lm_head.weight: [12, 9] bf16 is 216 bytes, header gives 192");
    let message = with_entry("lm_head.weight", |entry| entry["shape"] = json!([u64::MAX, 2]));
    assert!(message.contains("is not a whole number of bytes, or more than there can be"), "{message}");
    let message =
        with_entry("lm_head.weight", |entry| *entry = json!({"dtype": "F4", "shape": [1], "data_offsets": [0, 1]}));
    assert!(message.contains("[1] f4 is not a whole number of bytes"), "{message}");
}

#[test]
fn offsets_out_of_the_file() {
    let message = with_entry("lm_head.weight", |entry| entry["data_offsets"] = json!([9, 2]));
    assert_eq!(message, "model.safetensors: tensor lm_head.weight: data_offsets end before they start (9, 2)");

    let far = 1u64 << 40;
    let message = with_entry("lm_head.weight", |entry| entry["data_offsets"] = json!([far, far + 192]));
    assert!(message.contains("(tensors beyond its end: 1, the last one lm_head.weight)"), "{message}");

    let message = with_entry("lm_head.weight", |entry| entry["data_offsets"] = json!([u64::MAX - 192, u64::MAX]));
    assert!(
        message.contains("tensor lm_head.weight: [12, 8] bf16 is not a whole number of bytes, or more"),
        "{message}"
    );
}

#[test]
fn overlapping_tensors() {
    let tensors = bf16_tensors();
    let data_start = 8 + header(&tensors).to_string().len();
    // The first two tensors are the embedding (192 bytes) and the first norm (16 bytes). Same digits, same header length.
    let message = with_entry(&tensors[1].name, |entry| entry["data_offsets"] = json!([191, 207]));
    assert!(
        message.contains(&format!(
            "model.safetensors: tensors model.embed_tokens.weight and {} overlap: the second starts at byte {}, the first \
             ends at {}",
            tensors[1].name,
            data_start + 191,
            data_start + 192
        )),
        "{message}"
    );
    // One inside the other, and two at the same place.
    let message = with_entry(&tensors[1].name, |entry| entry["data_offsets"] = json!([100, 116]));
    assert!(message.contains("overlap"), "{message}");
    let message = with_entry("lm_head.weight", |entry| entry["data_offsets"] = json!([0, 192]));
    assert!(message.contains("overlap"), "{message}");
}

#[test]
fn bytes_that_belong_to_no_tensor() {
    let mut tensors = bf16_tensors();
    let mut bytes = file(&tensors);
    let end = bytes.len();
    bytes.push(7);
    assert_eq!(refusal_of_file(bytes), format!("model.safetensors: bytes {end} to {} belong to no tensor", end + 1));

    // A hole where the header no longer names the tensor; that it is missing would be the next step's fault.
    let data: Vec<u8> = tensors.iter().flat_map(|tensor| tensor.bytes.clone()).collect();
    let mut header = header(&tensors);
    header.as_object_mut().unwrap().remove(&tensors.remove(1).name);
    let start = 8 + header.to_string().len();
    assert_eq!(
        refusal_of_file(file_with(&header.to_string(), &data)),
        format!("model.safetensors: bytes {} to {} belong to no tensor", start + 192, start + 208)
    );
}

#[test]
fn a_name_twice_in_one_header() {
    let tensors = &bf16_tensors()[..2];
    let entry = |tensor: &Tensor, start: usize| {
        let end = start + tensor.bytes.len();
        format!("\"twice\": {}", json!({"dtype": "BF16", "shape": tensor.shape, "data_offsets": [start, end]}))
    };
    let header = format!("{{{}, {}}}", entry(&tensors[0], 0), entry(&tensors[1], tensors[0].bytes.len()));
    let data: Vec<u8> = tensors.iter().flat_map(|tensor| tensor.bytes.clone()).collect();
    assert_eq!(
        refusal_of_file(file_with(&header, &data)),
        "tensor twice: is there twice, in model.safetensors and in model.safetensors"
    );
}

// Tensors against config.json.

#[test]
fn wrong_shapes_are_all_named() {
    let mut tensors = bf16_tensors();
    find(&mut tensors, "lm_head.weight").shape = vec![8, 12];
    find(&mut tensors, "model.norm.weight").shape = vec![2, 4];
    assert_eq!(
        refusal_of_file(file(&tensors)),
        "2 faults in the checkpoint\n  \
         model.safetensors: tensor model.norm.weight: shape is [2, 4], config.json makes it [8]\n  \
         model.safetensors: tensor lm_head.weight: shape is [8, 12], config.json makes it [12, 8]"
    );
}

#[test]
fn unsupported_types() {
    for (dtype, extent) in [("I16", 8), ("U8", 16), ("F64", 2), ("F8_E4M3", 16), ("BOOL", 16)] {
        let mut tensors = bf16_tensors();
        let norm = find(&mut tensors, "model.norm.weight");
        (norm.dtype, norm.shape) = (dtype.to_owned(), vec![extent]);
        let message = refusal_of_file(file(&tensors));
        let expected = format!(
            "model.safetensors: tensor model.norm.weight: type {} is not supported (supported: bf16, f16, f32)",
            dtype.to_lowercase()
        );
        assert!(message.contains(&expected), "{message}");
    }
}

#[test]
fn missing_and_unknown_tensors_come_together() {
    let mut tensors = bf16_tensors();
    find(&mut tensors, "lm_head.weight").name = "output.weight".to_owned();
    assert_eq!(
        refusal_of_file(file(&tensors)),
        "2 faults in the checkpoint\n  \
         tensor lm_head.weight: is missing, needed: [12, 8]\n  \
         model.safetensors: tensor output.weight: is unknown to the model family that config.json names"
    );
}

/// A foreign prefix makes every tensor both missing and unknown: the message shows some of each kind.
#[test]
fn long_lists_of_faults_are_cut_by_kind() {
    let mut tensors = bf16_tensors();
    for tensor in &mut tensors {
        tensor.name.insert_str(0, "base.");
    }
    let message = refusal_of_file(file(&tensors));
    assert!(message.starts_with("82 faults in the checkpoint\n"), "{message}");
    assert_eq!(message.lines().count(), 1 + 2 * (8 + 1));
    assert_eq!(message.matches("\n  and 33 more like these").count(), 2);
}

#[test]
fn tensors_that_hold_no_weights_are_ignored() {
    let mut tensors = bf16_tensors();
    let name = "model.layers.0.self_attn.rotary_emb.inv_freq";
    tensors.push(Tensor { name: name.into(), dtype: "I64".into(), shape: vec![1], bytes: vec![9; 8] });
    let checkpoint = Folder::single(&tiny_config(), &tensors).open().unwrap();
    assert_eq!(checkpoint.inventory().ignored(), [name]);
}

#[test]
fn names_in_messages_are_harmless() {
    let mut tensors = bf16_tensors();
    find(&mut tensors, "lm_head.weight").name = format!("\u{1b}[2J{}", "x".repeat(1000));
    let message = refusal_of_file(file(&tensors));
    assert!(!message.contains('\u{1b}') && message.contains("\\u{1b}[2Jxxx"), "{message}");
    assert!(message.len() < 500, "{message}");
}

// Summary.

#[test]
fn summary_of_mixed_shards() {
    let tensors = mixed_tensors();
    let (first, second) = tensors.split_at(20);
    let folder = Folder::sharded(&tiny_config(), &[("a.safetensors", first), ("b.safetensors", second)]);
    let summary = folder.open().unwrap().summary();

    let bytes = |tensors: &[Tensor]| tensors.iter().map(|tensor| tensor.bytes.len() as u64).sum::<u64>();
    assert_eq!(summary.total_bytes, bytes(&tensors));
    assert_eq!(summary.bytes.total(), summary.total_bytes);
    assert_eq!(summary.dtypes.values().map(|held| held.bytes).sum::<u64>(), summary.total_bytes);
    assert_eq!(summary.shards.iter().map(|shard| shard.tensors).collect::<Vec<_>>(), [20, 21]);
    assert_eq!(summary.experts.count, 8);
    // One matrix of three is f32; 80 elements each.
    assert_eq!((summary.experts.smallest_matrix_bytes, summary.experts.largest_matrix_bytes), (160, 320));
    assert_eq!((summary.experts.smallest_expert_bytes, summary.experts.largest_expert_bytes), (640, 640));
    assert_eq!(summary.kv_bytes_per_token.f32, 2 * summary.kv_bytes_per_token.f16);

    let json = serde_json::to_value(&summary).unwrap();
    assert_eq!(json["family"], "mixtral");
    assert_eq!(json["shape"]["kv_heads"], 2);
    assert_eq!(json["parameters"]["by_kind"]["embedding"], 96);
    assert_eq!(json["dtypes"]["f16"]["tensors"], 14);
    assert_eq!(json["eos_tokens"], json!([2]));
    assert_eq!(json["shards"][1]["file"], "b.safetensors");
}

#[test]
fn summary_prints_as_a_table() {
    let summary = Folder::single(&tiny_config(), &bf16_tensors()).open().unwrap().summary();
    insta::assert_snapshot!(summary.to_string(), @r"
    family      mixtral (MixtralForCausalLM)
    layers      L 2
    width       D 8
    heads       H 4 query, G 2 key/value, K 6 wide
    experts     E 4 per layer, A 2 per token, F 10 wide
    vocabulary  V 12
    positions   64
    parameters  3.37 thousand total, 2.41 thousand active per token
    weights     6.58 KiB (6736 bytes)
                embedding      192 B
                attention   2.25 KiB
                norms           80 B
                routers        128 B
                experts     3.75 KiB
                LM head        192 B
    expert      480 B each, 3 matrices of 160 B; 8 in all
    KV cache    96 B per token in f16, 192 B in f32
    types       bf16 (41 tensors, 6.58 KiB)
    files       model.safetensors, 10.9 KiB
    ");
}

// Properties.

/// Whatever a parsed header promises holds, and the safetensors crate agrees.
fn check_header(bytes: &[u8]) -> Result<(), TestCaseError> {
    let Ok(header) = Header::parse("f", bytes) else { return Ok(()) };
    let oracle = safetensors::SafeTensors::deserialize(bytes);
    prop_assert!(oracle.is_ok(), "safetensors refuses: {:?}", oracle.err());
    let oracle = oracle.unwrap();
    prop_assert_eq!(oracle.len(), header.entries().len());
    let mut end = None;
    for entry in header.entries() {
        let range = entry.range();
        prop_assert!(end.is_none_or(|end| end == range.start), "gap or overlap before {}", entry.name());
        end = Some(range.end);
        let view = oracle.tensor(entry.name()).unwrap();
        let slice = bytes.get(range.start as usize..range.end as usize).expect("inside the file");
        prop_assert_eq!((view.dtype(), view.shape()), (entry.dtype(), entry.shape()));
        prop_assert!(std::ptr::eq(view.data(), slice) || slice.is_empty());
    }
    prop_assert!(end.is_none_or(|end| end == bytes.len() as u64));
    Ok(())
}

/// JSON that looks like a header of a few bytes of data: any numbers, and often tensors that are right one by one.
fn header_like() -> impl Strategy<Value = String> {
    let dtype = prop::sample::select(vec!["F32", "BF16", "F16", "U8", "F4", "F64", "Q4"]);
    let number = prop_oneof![0u64..20, any::<u64>(), Just(u64::MAX)];
    let any_entry = (dtype, prop::collection::vec(number.clone(), 0..3), number.clone(), number)
        .prop_map(|(dtype, shape, start, end)| json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]}));
    let right_entry = (0u64..4, 0u64..4)
        .prop_map(|(start, n)| json!({"dtype": "U8", "shape": [n], "data_offsets": [start, start + n]}));
    let entry = ("[a-d]|__metadata__", prop_oneof![1 => any_entry, 4 => right_entry]);
    prop::collection::vec(entry, 0..4).prop_map(|entries| {
        let entries: Vec<String> = entries.iter().map(|(name, entry)| format!("\"{name}\": {entry}")).collect();
        format!("{{{}}}", entries.join(", "))
    })
}

/// What one byte-level accident does to a file.
#[derive(Debug, Clone)]
enum Accident {
    Overwrite(prop::sample::Index, u8),
    Insert(prop::sample::Index, u8),
    Cut(prop::sample::Index, prop::sample::Index),
    Truncate(prop::sample::Index),
}

fn accident() -> impl Strategy<Value = Accident> {
    use Accident::*;
    // Digits and brackets in the header change what it says; random bytes mostly end its being JSON.
    let byte = || prop_oneof![any::<u8>(), prop::sample::select(b"0123456789,[]{}\":-F".to_vec())];
    prop_oneof![
        8 => (any::<prop::sample::Index>(), byte()).prop_map(|(at, byte)| Overwrite(at, byte)),
        2 => (any::<prop::sample::Index>(), byte()).prop_map(|(at, byte)| Insert(at, byte)),
        1 => (any::<prop::sample::Index>(), any::<prop::sample::Index>()).prop_map(|(from, to)| Cut(from, to)),
        1 => any::<prop::sample::Index>().prop_map(Truncate),
    ]
}

fn damage(mut bytes: Vec<u8>, accidents: &[Accident]) -> Vec<u8> {
    for accident in accidents {
        if bytes.is_empty() {
            break;
        }
        let n = bytes.len();
        match accident {
            Accident::Overwrite(at, byte) => bytes[at.index(n)] = *byte,
            Accident::Insert(at, byte) => bytes.insert(at.index(n), *byte),
            Accident::Cut(from, to) => {
                let (from, to) = (from.index(n), to.index(n));
                bytes.drain(from.min(to)..from.max(to));
            }
            Accident::Truncate(at) => bytes.truncate(at.index(n)),
        }
    }
    bytes
}

/// Opening either fails with a message or gives views that are inside their files and of the right size.
fn check_folder(dir: &Path) -> Result<(), TestCaseError> {
    match fulmen::checkpoint::Checkpoint::open(dir) {
        Err(error) => prop_assert!(!error.to_string().is_empty()),
        Ok(checkpoint) => {
            for spec in tensors(checkpoint.config()) {
                let view = checkpoint.tensor(spec.role);
                let file_bytes = view.path.metadata().unwrap().len();
                prop_assert!(view.range.start <= view.range.end && view.range.end <= file_bytes);
                prop_assert_eq!(view.range.end - view.range.start, view.bytes.len() as u64);
                prop_assert_eq!(view.bytes.len() as u64, spec.elements() * view.dtype.size_bytes() as u64);
            }
            prop_assert!(!checkpoint.summary().to_string().is_empty());
        }
    }
    Ok(())
}

proptest! {
    // Few of these are right in all but one thing, and they are cheap.
    #![proptest_config(ProptestConfig::with_cases(8192))]

    #[test]
    fn any_entries_as_a_header(header in header_like(), data in prop::collection::vec(any::<u8>(), 0..8)) {
        check_header(&file_with(&header, &data))?;
    }
}

proptest! {
    #[test]
    fn any_bytes_as_a_file(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
        check_header(&bytes)?;
    }

    #[test]
    fn any_bytes_as_a_header(header in prop::collection::vec(any::<u8>(), 0..64), data in prop::collection::vec(any::<u8>(), 0..16)) {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(&header);
        bytes.extend(&data);
        check_header(&bytes)?;
    }

    #[test]
    fn a_damaged_file(accidents in prop::collection::vec(accident(), 0..4)) {
        let bytes = damage(file(&mixed_tensors()), &accidents);
        check_header(&bytes)?;
        let folder = Folder::new(&tiny_config());
        folder.write("model.safetensors", bytes);
        check_folder(folder.path())?;
    }

    /// Accidents in the first shard's header only: the data is most of a file, the header most of what can go wrong.
    #[test]
    fn a_damaged_header(accidents in prop::collection::vec(accident(), 1..3)) {
        let tensors = &bf16_tensors()[..4];
        let data: Vec<u8> = tensors.iter().flat_map(|tensor| tensor.bytes.clone()).collect();
        let text = damage(header(tensors).to_string().into_bytes(), &accidents);
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend(text);
        bytes.extend(data);
        check_header(&bytes)?;
    }

    #[test]
    fn a_damaged_index(accidents in prop::collection::vec(accident(), 0..4)) {
        let folder = two_shards();
        let path = folder.path().join("model.safetensors.index.json");
        std::fs::write(&path, damage(std::fs::read(&path).unwrap(), &accidents)).unwrap();
        check_folder(folder.path())?;
    }
}

#[test]
fn faults_can_be_matched() {
    let error = Folder::single(&tiny_config(), &bf16_tensors()[1..]).open().err().unwrap();
    let CheckpointError::Faults(Faults(faults)) = &error else { panic!("{error}") };
    assert!(matches!(&faults[..], [Fault::MissingTensor { tensor, .. }] if tensor == "model.embed_tokens.weight"));
}
