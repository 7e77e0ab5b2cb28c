//! A Hugging Face folder, validated and mapped.
//!
//! ```text
//! config.json ────────────────────────────────▶ ModelConfig ─▶ tensors(): what must be there
//! model.safetensors                                                    │
//!   or model.safetensors.index.json ─▶ shards ─▶ header of each ─▶ inventory: role → type, shape, file, byte range
//!                                        └─ mapping of each ─────────────────┴─▶ TensorView
//! ```
//!
//! In: a folder. Out: a [`Checkpoint`], or a [`CheckpointError`] that names the files and tensors with what was needed
//! and what there is; the faults of one step come together.
//!
//! Guarantees of a [`Checkpoint`]:
//! * every tensor that the family needs is there once, with the shape that config.json implies, as bf16, f16 or f32
//!   (types may differ from tensor to tensor), or as the bytes of MXFP4 where config.json says so;
//! * no tensor is there that the family does not know, except those known to hold nothing (`rotary_emb.inv_freq`);
//! * every view lies inside its file, overlaps no other, and is exactly as long as its shape and type say;
//! * what the index says is true: its shards exist, are plain names within the folder, and hold the tensors it puts there;
//! * nothing of a tensor's bytes has been read or copied: opening touches the headers only.
//!
//! Given up:
//! * A file that another process shortens while it is mapped ends this one with SIGBUS, and one that changes changes the
//!   weights; nothing here can prevent either. Download beside, then rename.
//! * The values are not looked at: NaNs in the weights are the model's own.
//! * The index's `total_size` is not compared: published files disagree on what it counts.
//! * A tied model with an `lm_head.weight` of its own is refused, because writers disagree on which of the two counts.

pub mod dtype;
pub mod fault;
pub mod header;
pub mod inventory;
mod json_entries;
mod shards;
pub mod summary;
pub mod synthetic;
pub mod weights;

use std::ops::Range;
use std::path::{Path, PathBuf};

pub use dtype::Dtype;
pub use fault::{CheckpointError, Fault, Faults};
pub use inventory::{Inventory, Placed, SlotSource};
pub use summary::Summary;
pub use synthetic::Synthetic;
pub(crate) use weights::give_back_cache;
pub use weights::{ReadError, Reader, Weights};

use crate::model::{ModelConfig, Role};
use inventory::Listed;
use shards::Shard;

/// A folder with config.json and weights, checked (see the module) and mapped. Owns the mappings.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    inventory: Inventory,
    /// In the order of `inventory.files()`.
    shards: Vec<Shard>,
}

/// A tensor in its file. Borrows the checkpoint's mapping.
#[derive(Debug, Clone)]
pub struct TensorView<'a> {
    pub dtype: Dtype,
    /// `[out, in]`, row-major.
    pub shape: &'a [usize],
    /// Little-endian elements, at any alignment.
    pub bytes: &'a [u8],
    /// The file, and where in it `bytes` lie: what a reader that bypasses the mapping needs.
    pub path: &'a Path,
    pub range: Range<u64>,
}

impl Checkpoint {
    /// Opens the folder `dir`: reads config.json, the index and the headers, and checks all that the module promises.
    pub fn open(dir: &Path) -> Result<Checkpoint, CheckpointError> {
        let config = ModelConfig::open(dir)?;
        let shards = shards::open(dir)?;
        let files = shards.iter().map(|shard| (shard.file.clone(), shard.header.file_bytes())).collect();
        let listed = shards.iter().enumerate().flat_map(|(file, shard)| {
            shard.header.entries().iter().map(move |entry| Listed {
                file,
                name: entry.name(),
                dtype: entry.dtype(),
                shape: entry.shape(),
                range: entry.range(),
            })
        });
        let inventory = Inventory::new(config, files, listed)?;
        Ok(Checkpoint { dir: dir.to_owned(), inventory, shards })
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn config(&self) -> &ModelConfig {
        self.inventory.config()
    }

    /// What lies where, without the bytes.
    pub fn inventory(&self) -> &Inventory {
        &self.inventory
    }

    /// Each file's path and mapping.
    pub fn mappings(&self) -> impl Iterator<Item = (&Path, &std::sync::Arc<memmap2::Mmap>)> {
        self.shards.iter().map(|shard| (shard.path.as_path(), &shard.map))
    }

    /// What `inspect` shows.
    pub fn summary(&self) -> Summary {
        Summary::new(&self.inventory)
    }

    /// The tensor that plays `role`, or `None` if this model has no such role. A tied LM head is the embedding.
    pub fn find(&self, role: Role) -> Option<TensorView<'_>> {
        let tensor = self.inventory.find(role)?;
        let shard = &self.shards[tensor.file];
        // `Header::parse` saw these very bytes and put every range inside them, so they fit a usize as well.
        let bytes = &shard.map[tensor.range.start as usize..tensor.range.end as usize];
        let range = tensor.range.clone();
        Some(TensorView { dtype: tensor.dtype, shape: &tensor.shape, bytes, path: &shard.path, range })
    }

    /// The tensor that plays `role`.
    ///
    /// # Panics
    ///
    /// If this model has no such role: a layer or an expert out of bounds. No file can cause that.
    pub fn tensor(&self, role: Role) -> TensorView<'_> {
        self.find(role).unwrap_or_else(|| panic!("{role:?} is no role of this model: {:?}", self.config().shape))
    }
}

impl TensorView<'_> {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// The name of any safetensors type, spelt as [`Dtype::name`] spells the supported ones.
fn dtype_name(dtype: safetensors::Dtype) -> String {
    dtype.to_string().to_lowercase()
}
