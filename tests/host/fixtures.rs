//! Checkpoints that tests write: valid ones, and ones broken in one place.

use std::fs;
use std::path::Path;

use fulmen::checkpoint::{Checkpoint, CheckpointError, Dtype};
use fulmen::model::{ModelConfig, TensorSpec, tensors};
use serde_json::{Value, json};
use tempfile::TempDir;

/// config.json of a model with every axis of another length: L 2, D 8, H 4, G 2, K 6, E 4, A 2, F 10, V 12.
pub fn tiny_config() -> Value {
    json!({
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_hidden_layers": 2,
        "hidden_size": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 10,
        "vocab_size": 12,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
        "sliding_window": null,
        "max_position_embeddings": 64,
        "hidden_act": "silu",
        "tie_word_embeddings": false,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
    })
}

/// `object` without one field.
pub fn without(object: &Value, field: &str) -> Value {
    let mut object = object.clone();
    object.as_object_mut().unwrap().remove(field).expect("the field is there");
    object
}

/// A tensor about to be written. What the header says of it can be changed without changing its bytes.
#[derive(Debug, Clone)]
pub struct Tensor {
    pub name: String,
    /// As safetensors spells it.
    pub dtype: String,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// Element `i` of the `n`-th tensor: never zero, and an integer below 256, which all three types hold exactly.
pub fn coded(n: usize, i: usize) -> f32 {
    let magnitude = (1 + (17 * n + i) % 251) as f32;
    if (n + i).is_multiple_of(2) { magnitude } else { -magnitude }
}

/// The `n`-th tensor with position-coded values.
pub fn tensor(n: usize, spec: &TensorSpec, dtype: Dtype) -> Tensor {
    let values = (0..spec.elements() as usize).map(|i| coded(n, i));
    let bytes = match dtype {
        Dtype::Bf16 => values.flat_map(|x| half::bf16::from_f32(x).to_le_bytes()).collect(),
        Dtype::F16 => values.flat_map(|x| half::f16::from_f32(x).to_le_bytes()).collect(),
        Dtype::F32 => values.flat_map(f32::to_le_bytes).collect(),
        Dtype::Mxfp4 => panic!("its values need scales"),
    };
    Tensor { name: spec.name.clone(), dtype: dtype.name().to_uppercase(), shape: spec.shape.clone(), bytes }
}

/// All tensors of the model that `config` describes, `dtype` of the `n`-th.
pub fn all_tensors(config: &Value, dtype: impl Fn(usize) -> Dtype) -> Vec<Tensor> {
    let config = ModelConfig::parse(&config.to_string()).unwrap();
    tensors(&config).iter().enumerate().map(|(n, spec)| tensor(n, spec, dtype(n))).collect()
}

/// The header that describes `tensors` lying one after the other.
pub fn header(tensors: &[Tensor]) -> Value {
    let mut header = json!({"__metadata__": {"format": "pt"}});
    let mut start = 0;
    for tensor in tensors {
        let end = start + tensor.bytes.len();
        header[&tensor.name] = json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]});
        start = end;
    }
    header
}

/// A file with any header text and any data.
pub fn file_with(header: &str, data: &[u8]) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(data);
    file
}

/// A valid safetensors file. Its header has no padding, so data starts wherever it falls.
pub fn file(tensors: &[Tensor]) -> Vec<u8> {
    let data: Vec<u8> = tensors.iter().flat_map(|tensor| tensor.bytes.clone()).collect();
    file_with(&header(tensors).to_string(), &data)
}

/// The index of `shards`.
pub fn index(shards: &[(&str, &[Tensor])]) -> Value {
    let mut map = json!({});
    for (shard, tensors) in shards {
        for tensor in *tensors {
            map[&tensor.name] = json!(shard);
        }
    }
    json!({"metadata": {"total_size": 0}, "weight_map": map})
}

/// A model folder that goes away with the value.
pub struct Folder(TempDir);

impl Folder {
    /// With config.json only.
    pub fn new(config: &Value) -> Folder {
        let folder = Folder(tempfile::tempdir().unwrap());
        folder.write("config.json", config.to_string());
        folder
    }

    /// With config.json and one file of these tensors.
    pub fn single(config: &Value, tensors: &[Tensor]) -> Folder {
        let folder = Folder::new(config);
        folder.write("model.safetensors", file(tensors));
        folder
    }

    /// With config.json, these shards, and their index.
    pub fn sharded(config: &Value, shards: &[(&str, &[Tensor])]) -> Folder {
        let folder = Folder::new(config);
        for (shard, tensors) in shards {
            folder.write(shard, file(tensors));
        }
        folder.write("model.safetensors.index.json", index(shards).to_string());
        folder
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        fs::write(self.0.path().join(name), bytes).unwrap();
    }

    pub fn remove(&self, name: &str) {
        fs::remove_file(self.0.path().join(name)).unwrap();
    }

    pub fn open(&self) -> Result<Checkpoint, CheckpointError> {
        Checkpoint::open(self.0.path())
    }

    /// The message with which the folder is refused.
    pub fn refusal(&self) -> String {
        match self.open() {
            Ok(_) => panic!("the folder should be refused"),
            Err(error) => error.to_string(),
        }
    }
}
