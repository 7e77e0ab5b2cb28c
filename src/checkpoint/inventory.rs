//! Which tensor of the files plays which role.
//!
//! In: a [`ModelConfig`] and the tensors that the files list. Out: an [`Inventory`]: for each role that the family needs
//! exactly one tensor of the right shape and a supported type; or all faults together. Pure: reads no file, so a
//! tensor list can be checked without the weights ([`Inventory::from_list`]).

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ops::Range;

use super::fault::{Fault, Faults, shown};
use super::{Dtype, dtype_name};
use crate::model::expert_layout::{Packing, Source};
use crate::model::{ExpertMatrix, ModelConfig, Role, tensors};

/// Roles and where their bytes are. Its fields are private: holding one is the proof that nothing is missing.
#[derive(Debug, Clone)]
pub struct Inventory {
    config: ModelConfig,
    /// Name and length of each file.
    files: Vec<(String, u64)>,
    /// In the order of a forward pass.
    tensors: Vec<Placed>,
    /// Index into `tensors`.
    by_role: HashMap<Role, usize>,
    ignored: Vec<String>,
}

/// A tensor with a role.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    pub role: Role,
    /// Name on disk.
    pub name: String,
    /// Index into [`Inventory::files`].
    pub file: usize,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// From the start of the file.
    pub range: Range<u64>,
}

impl Placed {
    pub fn bytes(&self) -> u64 {
        self.range.end - self.range.start
    }
}

/// Bytes of a tensor that belong in an expert's slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotSource {
    /// The tensor.
    pub role: Role,
    /// From the start of the tensor.
    pub range: Range<u64>,
    /// Where in the slot they go: the first of its bytes.
    pub at: u64,
}

/// A tensor as a file lists it: not believed yet.
#[derive(Debug, Clone)]
pub struct Listed<'a> {
    /// Index into the list of files.
    pub file: usize,
    pub name: &'a str,
    pub dtype: safetensors::Dtype,
    pub shape: &'a [usize],
    pub range: Range<u64>,
}

impl Inventory {
    /// Gives each role its tensor. The ranges of `listed` are taken as they are: [`Header`](super::header::Header)
    /// vouches for them.
    pub fn new<'a>(
        config: ModelConfig,
        files: Vec<(String, u64)>,
        listed: impl IntoIterator<Item = Listed<'a>>,
    ) -> Result<Inventory, Faults> {
        let file_name = |file: usize| files[file].0.clone();
        let mut faults = Vec::new();
        let mut by_name: HashMap<&str, Listed> = HashMap::new();
        for tensor in listed {
            match by_name.entry(tensor.name) {
                Entry::Vacant(vacant) => {
                    vacant.insert(tensor);
                }
                Entry::Occupied(occupied) => faults.push(Fault::Duplicate {
                    tensor: shown(tensor.name),
                    first: file_name(occupied.get().file),
                    second: file_name(tensor.file),
                }),
            }
        }

        let mut placed = Vec::new();
        for spec in tensors(&config) {
            let Some(listed) = by_name.remove(spec.name.as_str()) else {
                faults.push(Fault::MissingTensor { tensor: spec.name, shape: spec.shape });
                continue;
            };
            let packing = config.forward.experts.packing(spec.role);
            let dtype = Dtype::of_safetensors(listed.dtype, packing);
            if dtype.is_none() {
                let (file, dtype) = (file_name(listed.file), dtype_name(listed.dtype));
                let supported = if packing == Packing::Floats { "bf16, f16, f32" } else { "u8: MXFP4" };
                faults.push(Fault::UnsupportedDtype { file, tensor: spec.name.clone(), dtype, supported });
            }
            if listed.shape != spec.shape {
                let (file, tensor, had) = (file_name(listed.file), spec.name, listed.shape.to_vec());
                faults.push(Fault::WrongShape { file, tensor, needed: spec.shape, had });
            } else if let Some(dtype) = dtype {
                let (role, name, shape) = (spec.role, spec.name, spec.shape);
                placed.push(Placed { role, name, file: listed.file, dtype, shape, range: listed.range });
            }
        }

        let mut left: Vec<Listed> = by_name.into_values().collect();
        left.sort_by_key(|tensor| tensor.name);
        let mut ignored = Vec::new();
        for tensor in left {
            if holds_no_weights(tensor.name) {
                ignored.push(tensor.name.to_owned());
            } else {
                let why = if config.tied_embeddings && tensor.name == "lm_head.weight" {
                    "is there although config.json ties the LM head to the embedding (tie_word_embeddings)"
                } else {
                    "is unknown to the model family that config.json names"
                };
                faults.push(Fault::Unknown { file: file_name(tensor.file), tensor: shown(tensor.name), why });
            }
        }

        if faults.is_empty() {
            let by_role = placed.iter().enumerate().map(|(i, tensor)| (tensor.role, i)).collect();
            Ok(Inventory { config, files, tensors: placed, by_role, ignored })
        } else {
            Err(Faults(faults))
        }
    }

    /// The inventory of a list of names, types and shapes, as if one file held them one after the other. For looking at
    /// a model whose weights are elsewhere.
    pub fn from_list<'a>(
        config: ModelConfig,
        list: impl IntoIterator<Item = (&'a str, safetensors::Dtype, &'a [usize])>,
    ) -> Result<Inventory, Faults> {
        let mut end = 0u64;
        let listed: Vec<Listed> = list
            .into_iter()
            .map(|(name, dtype, shape)| {
                let start = end;
                let elements = shape.iter().fold(1u64, |product, &extent| product.saturating_mul(extent as u64));
                // Saturates on absurd shapes, which then are not the config's.
                end = start.saturating_add(elements.saturating_mul(dtype.bitsize() as u64) / 8);
                Listed { file: 0, name, dtype, shape, range: start..end }
            })
            .collect();
        Inventory::new(config, vec![("the list".to_owned(), end)], listed)
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Name and length in bytes of each file.
    pub fn files(&self) -> &[(String, u64)] {
        &self.files
    }

    /// Every tensor that plays a role, in the order of a forward pass.
    pub fn tensors(&self) -> &[Placed] {
        &self.tensors
    }

    /// The tensor that plays `role`; the embedding for a tied LM head; `None` if the model has no such role.
    pub fn find(&self, role: Role) -> Option<&Placed> {
        self.by_role.get(&role.stored_as(&self.config)).map(|&i| &self.tensors[i])
    }

    /// Bytes of each slot of an expert, by [`ExpertMatrix::ALL`]. `None` where experts are not all of one type.
    pub fn slot_bytes(&self) -> Option<[u64; 3]> {
        let dtype = self.expert_dtype()?;
        let element_bytes = if dtype == Dtype::Mxfp4 { 0 } else { dtype.size_bytes() as u64 };
        Some(self.config.forward.experts.slot_bytes(&self.config.shape, element_bytes))
    }

    /// Where `slot`, a range of the bytes of one expert's slot of `matrix`, lies in the tensors, in order.
    ///
    /// # Panics
    ///
    /// If this model has no such expert, or the slot no such bytes.
    pub fn slot_sources(&self, layer: usize, expert: usize, matrix: ExpertMatrix, slot: Range<u64>) -> Vec<SlotSource> {
        let mut sources = Vec::new();
        let mut at = 0; // of the slot, where the next source begins
        for (role, whole) in self.slot_parts(layer, expert, matrix) {
            let end_of_part = at + (whole.end - whole.start);
            let (start, end) = (slot.start.max(at), slot.end.min(end_of_part));
            if start < end {
                sources.push(SlotSource { role, range: whole.start + start - at..whole.start + end - at, at: start });
            }
            at = end_of_part;
        }
        assert!(slot.end <= at, "bytes {slot:?} of the {matrix:?} slot, which has {at}");
        sources
    }

    /// The ranges of tensors that fill one expert's slot of `matrix`, in order.
    pub(super) fn slot_parts(
        &self,
        layer: usize,
        expert: usize,
        matrix: ExpertMatrix,
    ) -> impl Iterator<Item = (Role, Range<u64>)> {
        self.config.forward.experts.sources(layer, expert, matrix).into_iter().map(|Source { role, share }| {
            let tensor = self.find(role).unwrap_or_else(|| panic!("{role:?} is no role of this model"));
            let range = match share {
                None => 0..tensor.bytes(),
                Some(expert) => {
                    let bytes = tensor.bytes() / self.config.shape.experts as u64;
                    expert as u64 * bytes..(expert as u64 + 1) * bytes
                }
            };
            (role, range)
        })
    }

    /// The type that all expert matrices have; None where they differ, which one grouped kernel cannot read.
    pub fn expert_dtype(&self) -> Option<Dtype> {
        let mut dtypes = self.tensors.iter().filter(|t| t.role.in_slots()).map(|t| t.dtype);
        let first = dtypes.next()?;
        dtypes.all(|dtype| dtype == first).then_some(first)
    }

    /// Names of tensors that are there and hold no weights, sorted.
    pub fn ignored(&self) -> &[String] {
        &self.ignored
    }
}

/// Buffers that old versions of transformers saved: computed from config.json, so nothing is lost without them.
fn holds_no_weights(name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq")
}
