//! A made-up checkpoint as files: what a benchmark of loading and of streaming from disk needs.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use rayon::prelude::*;
use serde_json::{Map, Value, json};

use super::Synthetic;
use crate::model::{Family, Role};

/// A portion that one thread makes at a time.
const PORTION_BYTES: u64 = 16 << 20;

/// Why no checkpoint was written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    #[error("only Mixtral's shapes can be written as files; {} cannot", .0.name())]
    Family(Family),
    #[error("{path}: {source}")]
    Io { path: String, source: io::Error },
}

impl Synthetic {
    /// Writes config.json and safetensors files, one for each layer, into `dir`, which must not exist. `progress(done, total)` in
    /// bytes.
    pub fn write(&self, dir: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<(), WriteError> {
        if self.config().family != Family::Mixtral {
            return Err(WriteError::Family(self.config().family));
        }
        let io = |path: &Path| {
            let path = path.display().to_string();
            move |source| WriteError::Io { path: path.clone(), source }
        };
        std::fs::create_dir(dir).map_err(io(dir))?;
        let tensors = self.inventory().tensors();
        let total = tensors.iter().map(|tensor| tensor.bytes()).sum();
        let file_of = |role: Role| match role {
            Role::Embedding => 0,
            Role::FinalNorm | Role::LmHead => self.config().shape.layers + 1,
            Role::AttentionNorm { layer }
            | Role::Query { layer }
            | Role::Key { layer }
            | Role::Value { layer }
            | Role::AttentionOutput { layer }
            | Role::ExpertNorm { layer }
            | Role::Router { layer }
            | Role::Expert { layer, .. } => layer + 1,
            other => unreachable!("{other:?} is none of Mixtral's"),
        };
        let n_files = self.config().shape.layers + 2;
        let mut weight_map = Map::new();
        let mut done = 0;
        for number in 0..n_files {
            let name = format!("model-{:05}-of-{n_files:05}.safetensors", number + 1);
            let here: Vec<_> = tensors.iter().filter(|tensor| file_of(tensor.role) == number).collect();
            let mut header = Map::new();
            let mut end = 0;
            for tensor in &here {
                let start = end;
                end += tensor.bytes();
                let entry = json!({"dtype": "BF16", "shape": tensor.shape, "data_offsets": [start, end]});
                header.insert(tensor.name.clone(), entry);
                weight_map.insert(tensor.name.clone(), json!(name));
            }
            let path = dir.join(&name);
            let mut file = BufWriter::new(File::create(&path).map_err(io(&path))?);
            let mut text = Value::Object(header).to_string();
            while !text.len().is_multiple_of(8) {
                text.push(' ');
            }
            let length = (text.len() as u64).to_le_bytes();
            file.write_all(&length).and_then(|()| file.write_all(text.as_bytes())).map_err(io(&path))?;
            for tensor in here {
                let starts: Vec<u64> = (0..tensor.bytes()).step_by(PORTION_BYTES as usize).collect();
                for starts in starts.chunks(rayon::current_num_threads()) {
                    let portions: Vec<Vec<u8>> = starts
                        .par_iter()
                        .map(|start| {
                            let range = *start..(start + PORTION_BYTES).min(tensor.bytes());
                            let mut bytes = vec![0; (range.end - range.start) as usize];
                            self.fill(tensor.role, range, &mut bytes);
                            bytes
                        })
                        .collect();
                    for portion in portions {
                        file.write_all(&portion).map_err(io(&path))?;
                        done += portion.len() as u64;
                    }
                    progress(done, total);
                }
            }
            file.into_inner().map_err(|error| io(&path)(error.into_error()))?.sync_all().map_err(io(&path))?;
        }
        let write = |name: &str, value: Value| {
            let path = dir.join(name);
            std::fs::write(&path, value.to_string()).map_err(io(&path))
        };
        let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
        write("model.safetensors.index.json", index)?;
        write("config.json", self.config_json())
    }

    fn config_json(&self) -> Value {
        let config = self.config();
        let shape = &config.shape;
        json!({
            "architectures": [config.family.architecture()], "model_type": "mixtral", "torch_dtype": "bfloat16",
            "hidden_size": shape.d_model, "intermediate_size": shape.expert_width, "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.q_heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_width,
            "num_local_experts": shape.experts, "num_experts_per_tok": shape.experts_per_token,
            "vocab_size": shape.vocab, "max_position_embeddings": config.max_positions, "rms_norm_eps": config.norm_eps,
            "rope_theta": config.rope_theta, "sliding_window": config.sliding_window, "hidden_act": "silu",
            "tie_word_embeddings": config.tied_embeddings, "bos_token_id": config.bos_token,
            "eos_token_id": config.eos_tokens.first(),
        })
    }
}
