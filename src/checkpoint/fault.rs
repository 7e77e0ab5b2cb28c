//! What can be wrong with a checkpoint, in messages that say which file and tensor, what was needed and what there is.
//!
//! The faults that one look at the folder finds are reported together: a download that broke off leaves several files
//! short, and a user wants to hear of all of them at once.

use std::error::Error;
use std::fmt;
use std::io;
use std::mem::discriminant;
use std::path::PathBuf;

use crate::model::ConfigError;

/// Messages list this many faults of one kind and count the rest, so that no kind hides another.
const SHOWN_OF_A_KIND: usize = 8;

/// Why a folder is not a checkpoint that fulmen can use. The text is complete: it contains the cause that `source()` also
/// gives, because one text speaks for several faults.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("{}: needs model.safetensors or model.safetensors.index.json, has neither", dir.display())]
    NoWeights { dir: PathBuf },
    /// All faults of one step: reading the index, reading the headers, or giving each tensor its role.
    #[error(transparent)]
    Faults(#[from] Faults),
}

/// Faults of one step. Never empty.
#[derive(Debug)]
pub struct Faults(pub Vec<Fault>);

impl Faults {
    /// The first fault's own cause stands for all.
    fn first_cause(&self) -> Option<&(dyn Error + 'static)> {
        self.0.iter().find_map(|fault| fault.source())
    }
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let [fault] = &self.0[..] {
            return write!(f, "{fault}");
        }
        write!(f, "{} faults in the checkpoint", self.0.len())?;
        let mut kinds: Vec<Vec<&Fault>> = Vec::new();
        for fault in &self.0 {
            match kinds.iter_mut().find(|kind| discriminant(kind[0]) == discriminant(fault)) {
                Some(kind) => kind.push(fault),
                None => kinds.push(vec![fault]),
            }
        }
        for kind in kinds {
            kind.iter().take(SHOWN_OF_A_KIND).try_for_each(|fault| write!(f, "\n  {fault}"))?;
            if kind.len() > SHOWN_OF_A_KIND {
                write!(f, "\n  and {} more like these", kind.len() - SHOWN_OF_A_KIND)?;
            }
        }
        Ok(())
    }
}

impl Error for Faults {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.first_cause()
    }
}

/// One thing that is wrong. `file` is a file name within the folder, `tensor` a name as it is on disk.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    // Files.
    #[error("{file}: {source}")]
    Unreadable { file: String, source: io::Error },
    #[error("{file}: is not a safetensors file: needs 8 bytes for the header's length, has {file_bytes} bytes")]
    NoHeader { file: String, file_bytes: u64 },
    #[error("{file}: header length is {header_bytes} bytes, the limit is {limit}")]
    HeaderTooLong { file: String, header_bytes: u64, limit: u64 },
    #[error("{file}: header of 8 + {header_bytes} bytes does not fit the file, which has {file_bytes} bytes")]
    HeaderBeyondFile { file: String, header_bytes: u64, file_bytes: u64 },
    #[error("{file}: header is not UTF-8 text: {source}")]
    HeaderNotText { file: String, source: std::str::Utf8Error },
    #[error("{file}: header is not a JSON object of tensors: {source}")]
    HeaderNotJson { file: String, source: serde_json::Error },
    #[error(
        "{file}: needs {needed} bytes, has {had}: cut short, or its header is wrong (tensors beyond its end: {tensors}, the \
         last one {tensor})"
    )]
    Truncated { file: String, tensors: usize, tensor: String, needed: u64, had: u64 },
    #[error("{file}: bytes {start} to {end} belong to no tensor")]
    Unclaimed { file: String, start: u64, end: u64 },

    // The index.
    #[error("{file}: is not an index of shards: {source}")]
    IndexNotJson { file: String, source: serde_json::Error },
    #[error("{file}: shard name {shard:?} is not a plain file name")]
    ShardName { file: String, shard: String },
    #[error("{file}: tensor {tensor} is listed twice")]
    ListedTwice { file: String, tensor: String },
    #[error("{shard}: is missing; the index puts {tensors} tensors there")]
    MissingShard { shard: String, tensors: usize },
    #[error("{shard}: tensor {tensor} is not there, although the index puts it there")]
    NotInShard { shard: String, tensor: String },

    // Tensors.
    #[error("{file}: tensor {tensor}: its header entry does not parse: {source}")]
    Entry { file: String, tensor: String, source: serde_json::Error },
    #[error("{file}: tensor {tensor}: {shape:?} {dtype} is not a whole number of bytes, or more than there can be")]
    Unsizable { file: String, tensor: String, shape: Vec<usize>, dtype: String },
    #[error("{file}: tensor {tensor}: data_offsets end before they start ({start}, {end})")]
    BackwardOffsets { file: String, tensor: String, start: u64, end: u64 },
    #[error("{file}: tensor {tensor}: {shape:?} {dtype} is {needed} bytes, header gives {had}")]
    WrongSize { file: String, tensor: String, shape: Vec<usize>, dtype: String, needed: u64, had: u64 },
    #[error("{file}: tensors {first} and {second} overlap: the second starts at byte {start}, the first ends at {end}")]
    Overlap { file: String, first: String, second: String, start: u64, end: u64 },
    #[error("tensor {tensor}: is there twice, in {first} and in {second}")]
    Duplicate { tensor: String, first: String, second: String },
    #[error("tensor {tensor}: is missing, needed: {shape:?}")]
    MissingTensor { tensor: String, shape: Vec<usize> },
    #[error("{file}: tensor {tensor}: shape is {had:?}, config.json makes it {needed:?}")]
    WrongShape { file: String, tensor: String, needed: Vec<usize>, had: Vec<usize> },
    #[error("{file}: tensor {tensor}: type {dtype} is not supported (supported: {supported})")]
    UnsupportedDtype { file: String, tensor: String, dtype: String, supported: &'static str },
    #[error("{file}: tensor {tensor}: {why}")]
    Unknown { file: String, tensor: String, why: &'static str },
}

/// A name out of a file, fit for a message: control characters escaped, not longer than a line.
pub(super) fn shown(name: &str) -> String {
    const MAX_CHARS: usize = 160;
    let mut text: String = name.chars().take(MAX_CHARS).flat_map(char::escape_debug).collect();
    if name.chars().nth(MAX_CHARS).is_some() {
        text.push('…');
    }
    text
}
