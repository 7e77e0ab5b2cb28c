//! What `inspect` shows of a checkpoint: numbers only, as a value that prints as text and serialises as JSON.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use super::{Dtype, Inventory};
use crate::model::{ExpertMatrix, Family, Forward, Kind, Shape, Sizes};
use crate::units::{human_bytes, human_count};

/// A checkpoint in numbers. The JSON form has the same fields under the same names; sizes are bytes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    pub family: Family,
    pub architecture: &'static str,
    pub shape: Shape,
    /// What this model does otherwise than Mixtral.
    pub forward: Forward,
    pub norm_eps: f32,
    pub rope_theta: f64,
    pub sliding_window: Option<usize>,
    pub max_positions: usize,
    pub tied_embeddings: bool,
    pub bos_token: Option<u32>,
    pub eos_tokens: Vec<u32>,
    /// What config.json announces; `dtypes` says what the files hold.
    pub declared_dtype: Option<String>,
    pub parameters: Parameters,
    /// Bytes of each kind as they are in the files.
    pub bytes: Sizes,
    pub total_bytes: u64,
    pub experts: Experts,
    pub kv_bytes_per_token: KvBytes,
    /// What the files hold, by type name.
    pub dtypes: BTreeMap<&'static str, Held>,
    pub shards: Vec<ShardSummary>,
    /// Tensors that are there and hold no weights.
    pub ignored_tensors: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Parameters {
    pub total: u64,
    /// Those that one token's pass reads.
    pub active: u64,
    pub by_kind: Sizes,
}

/// The experts in all. Where types differ among them, sizes differ too: `largest` is what a slot must hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Experts {
    pub count: u64,
    pub smallest_expert_bytes: u64,
    pub largest_expert_bytes: u64,
    /// Slots of one expert: three, or two where gate and up share one.
    pub matrices: u64,
    /// One of them: the piece in which pages carry experts.
    pub smallest_matrix_bytes: u64,
    pub largest_matrix_bytes: u64,
}

/// K and V of one token in all layers, by the type that the cache keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct KvBytes {
    /// The same for bf16.
    pub f16: u64,
    pub f32: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Held {
    pub tensors: u64,
    pub bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ShardSummary {
    pub file: String,
    /// Length of the file, header included.
    pub file_bytes: u64,
    pub tensors: u64,
}

impl Summary {
    pub fn new(inventory: &Inventory) -> Summary {
        let config = inventory.config();
        let shape = config.shape;

        let mut bytes = Sizes::default();
        let mut dtypes: BTreeMap<&str, Held> = BTreeMap::new();
        let mut shards: Vec<ShardSummary> = inventory
            .files()
            .iter()
            .map(|(file, file_bytes)| ShardSummary { file: file.clone(), file_bytes: *file_bytes, tensors: 0 })
            .collect();
        for tensor in inventory.tensors() {
            bytes[tensor.role.kind()] += tensor.bytes();
            shards[tensor.file].tensors += 1;
            let held = dtypes.entry(tensor.dtype.name()).or_default();
            held.tensors += 1;
            held.bytes += tensor.bytes();
        }
        // Biases of experts are not among them: they stay on the GPU.
        let (mut experts, mut matrices) = (Vec::new(), Vec::new());
        for (layer, expert) in (0..shape.layers).flat_map(|layer| (0..shape.experts).map(move |e| (layer, e))) {
            let slots = ExpertMatrix::ALL.map(|matrix| {
                inventory.slot_parts(layer, expert, matrix).map(|(_, range)| range.end - range.start).sum::<u64>()
            });
            experts.push(slots.iter().sum::<u64>());
            matrices.extend(slots.into_iter().filter(|bytes| *bytes > 0));
        }
        let parameters = Sizes::parameters(config);
        let kv_elements = shape.kv_elements_per_token() as u64;
        let kv_bytes = |dtype: Dtype| kv_elements * dtype.size_bytes() as u64;

        Summary {
            family: config.family,
            architecture: config.family.architecture(),
            shape,
            forward: config.forward.clone(),
            norm_eps: config.norm_eps,
            rope_theta: config.rope_theta,
            sliding_window: config.sliding_window,
            max_positions: config.max_positions,
            tied_embeddings: config.tied_embeddings,
            bos_token: config.bos_token,
            eos_tokens: config.eos_tokens.clone(),
            declared_dtype: config.declared_dtype.clone(),
            parameters: Parameters {
                total: parameters.total(),
                active: parameters.active(config),
                by_kind: parameters,
            },
            bytes,
            total_bytes: bytes.total(),
            experts: Experts {
                count: experts.len() as u64,
                smallest_expert_bytes: experts.iter().copied().min().unwrap_or(0),
                largest_expert_bytes: experts.iter().copied().max().unwrap_or(0),
                matrices: if config.forward.experts.gate_holds_up() { 2 } else { 3 },
                smallest_matrix_bytes: matrices.iter().copied().min().unwrap_or(0),
                largest_matrix_bytes: matrices.iter().copied().max().unwrap_or(0),
            },
            kv_bytes_per_token: KvBytes { f16: kv_bytes(Dtype::F16), f32: kv_bytes(Dtype::F32) },
            dtypes,
            shards,
            ignored_tensors: inventory.ignored().to_vec(),
        }
    }
}

/// A table of two columns, without a newline at the end.
impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Shape { layers, d_model, q_heads, kv_heads, head_width, experts, experts_per_token, expert_width, vocab } =
            self.shape;
        let line = |f: &mut fmt::Formatter<'_>, label: &str, text: String| writeln!(f, "{label:<12}{text}");

        line(f, "family", format!("{} ({})", self.family.name(), self.architecture))?;
        line(f, "layers", format!("L {layers}"))?;
        line(f, "width", format!("D {d_model}"))?;
        line(f, "heads", format!("H {q_heads} query, G {kv_heads} key/value, K {head_width} wide"))?;
        line(f, "experts", format!("E {experts} per layer, A {experts_per_token} per token, F {expert_width} wide"))?;
        line(f, "vocabulary", format!("V {vocab}{}", if self.tied_embeddings { ", LM head tied to it" } else { "" }))?;
        let windowed = self.forward.windowed_layers.iter().filter(|windowed| **windowed).count();
        let of_layers = match windowed {
            0 => String::new(),
            n => format!(" in {n} of {layers} layers"),
        };
        let window =
            self.sliding_window.map_or(String::new(), |window| format!(", sliding window {window}{of_layers}"));
        line(f, "positions", format!("{}{window}", self.max_positions))?;
        let differences = self.forward.to_string();
        if !differences.is_empty() {
            line(f, "forward", differences)?;
        }

        let Parameters { total, active, .. } = self.parameters;
        line(f, "parameters", format!("{} total, {} active per token", human_count(total), human_count(active)))?;
        line(f, "weights", format!("{} ({} bytes)", human_bytes(self.total_bytes), self.total_bytes))?;
        for kind in Kind::ALL {
            let name = match kind {
                Kind::Embedding => "embedding",
                Kind::Attention => "attention",
                Kind::Norms => "norms",
                Kind::Routers => "routers",
                Kind::Experts => "experts",
                Kind::Head => "LM head",
            };
            line(f, "", format!("{name:<10}{:>10}", human_bytes(self.bytes[kind])))?;
        }
        let range = |smallest: u64, largest: u64| {
            if smallest == largest {
                human_bytes(largest)
            } else {
                format!("{} to {}", human_bytes(smallest), human_bytes(largest))
            }
        };
        let Experts { count, matrices, .. } = self.experts;
        let one = range(self.experts.smallest_expert_bytes, self.experts.largest_expert_bytes);
        let matrix = range(self.experts.smallest_matrix_bytes, self.experts.largest_matrix_bytes);
        line(f, "expert", format!("{one} each, {matrices} matrices of {matrix}; {count} in all"))?;
        let KvBytes { f16, f32 } = self.kv_bytes_per_token;
        line(f, "KV cache", format!("{} per token in f16, {} in f32", human_bytes(f16), human_bytes(f32)))?;

        let dtypes: Vec<String> = self
            .dtypes
            .iter()
            .map(|(name, held)| format!("{name} ({} tensors, {})", held.tensors, human_bytes(held.bytes)))
            .collect();
        line(f, "types", dtypes.join(", "))?;
        if !self.ignored_tensors.is_empty() {
            line(f, "ignored", format!("{} tensors without weights", self.ignored_tensors.len()))?;
        }
        let on_disk = self.shards.iter().map(|shard| shard.file_bytes).sum();
        match &self.shards[..] {
            [one] => write!(f, "{:<12}{}, {}", "files", one.file, human_bytes(on_disk)),
            [first, .., last] => {
                let n = self.shards.len();
                write!(f, "{:<12}{n} shards, {} to {}, {}", "files", first.file, last.file, human_bytes(on_disk))
            }
            [] => write!(f, "{:<12}none", "files"),
        }
    }
}
