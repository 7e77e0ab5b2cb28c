//! The weight files of a folder: `model.safetensors`, or the shards that `model.safetensors.index.json` names.
//!
//! In: a folder. Out: every shard, mapped, with its validated header, sorted by name; or the faults of the first step
//! that found any (index, then files and headers, then what the index says of them). Where both kinds of file are there,
//! `model.safetensors` is used, as transformers does.
//!
//! Guarantees: no file outside the folder is opened on an index's word. (A symbolic link in the folder may lead out: that
//! is how the hub's cache is built, and whoever can place a link can place a file.)

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};

use memmap2::{Mmap, MmapOptions};

use super::fault::{CheckpointError, Fault, Faults, shown};
use super::header::Header;
use super::json_entries::Entries;

const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";

/// The largest index that is read. That of Qwen3-30B-A3B (18,867 tensors) has 1.7 MB.
const MAX_INDEX_BYTES: u64 = 100_000_000;

/// One mapped file.
#[derive(Debug)]
pub(super) struct Shard {
    /// Name within the folder.
    pub file: String,
    pub path: PathBuf,
    pub map: std::sync::Arc<Mmap>,
    pub header: Header,
}

/// What the index says: tensor names by shard.
type Index = BTreeMap<String, Vec<String>>;

/// Maps all weight files of `dir` and validates their headers.
pub(super) fn open(dir: &Path) -> Result<Vec<Shard>, CheckpointError> {
    let faults = |faults| CheckpointError::from(Faults(faults));
    // What cannot be asked about counts as being there: opening it will say why.
    let exists = |file: &str| dir.join(file).try_exists().unwrap_or(true);
    let index = if exists(SINGLE_FILE) {
        Index::from([(SINGLE_FILE.to_owned(), Vec::new())])
    } else if exists(INDEX_FILE) {
        read_index(dir).map_err(faults)?
    } else {
        return Err(CheckpointError::NoWeights { dir: dir.to_owned() });
    };

    let mut shards = Vec::with_capacity(index.len());
    let mut found = Vec::new();
    for (file, tensors) in &index {
        match open_shard(dir, file, tensors.len()) {
            Ok(shard) => shards.push(shard),
            Err(mut faults) => found.append(&mut faults),
        }
    }
    if found.is_empty() {
        check_promises(&index, &shards, &mut found);
    }
    if found.is_empty() { Ok(shards) } else { Err(faults(found)) }
}

/// Reads the index: which shards there are, and which tensors it puts into each.
fn read_index(dir: &Path) -> Result<Index, Vec<Fault>> {
    #[derive(serde::Deserialize)]
    struct Document {
        weight_map: Entries<String>,
    }

    let file = || INDEX_FILE.to_owned();
    let unreadable = |source| vec![Fault::Unreadable { file: file(), source }];
    let mut text = Vec::new();
    let (index_file, _) = open_regular(&dir.join(INDEX_FILE)).map_err(unreadable)?;
    index_file.take(MAX_INDEX_BYTES + 1).read_to_end(&mut text).map_err(unreadable)?;
    if text.len() as u64 > MAX_INDEX_BYTES {
        return Err(unreadable(io::Error::other(format!("longer than {MAX_INDEX_BYTES} bytes"))));
    }
    let document: Document =
        serde_json::from_slice(&text).map_err(|source| vec![Fault::IndexNotJson { file: file(), source }])?;

    let mut index = Index::new();
    let mut faults = Vec::new();
    let mut listed = HashSet::new();
    for (tensor, shard) in document.weight_map.0 {
        if !listed.insert(tensor.clone()) {
            faults.push(Fault::ListedTwice { file: file(), tensor: shown(&tensor) });
        }
        index.entry(shard).or_default().push(tensor);
    }
    for shard in index.keys().filter(|shard| !is_plain_file_name(shard)) {
        faults.push(Fault::ShardName { file: file(), shard: shard.clone() });
    }
    if faults.is_empty() { Ok(index) } else { Err(faults) }
}

/// Whether `name` joined to a folder is a file directly in that folder, on any platform.
fn is_plain_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(_)), None))
        && !name.contains(['/', '\\', ':'])
        && !name.contains(char::is_control)
}

/// Maps one file and validates its header. `tensors` is how many the index puts there.
fn open_shard(dir: &Path, file: &str, tensors: usize) -> Result<Shard, Vec<Fault>> {
    let path = dir.join(file);
    let map = match map_file(&path) {
        Ok(map) => map,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(vec![Fault::MissingShard { shard: file.to_owned(), tensors }]);
        }
        Err(source) => return Err(vec![Fault::Unreadable { file: file.to_owned(), source }]),
    };
    let header = Header::parse(file, &map)?;
    Ok(Shard { file: file.to_owned(), path, map: std::sync::Arc::new(map), header })
}

/// The file and its length. Anything but a regular file is refused: opening a pipe would wait for its writer.
fn open_regular(path: &Path) -> io::Result<(File, u64)> {
    if !path.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let file = File::open(path)?;
    let file_bytes = file.metadata()?.len();
    Ok((file, file_bytes))
}

fn map_file(path: &Path) -> io::Result<Mmap> {
    let (file, file_bytes) = open_regular(path)?;
    let map_bytes = usize::try_from(file_bytes)
        .map_err(|_| io::Error::other(format!("{file_bytes} bytes do not fit this machine's addresses")))?;
    // SAFETY: the mapping is read-only, so this process cannot change it, and `file_bytes` is the length that the open
    // file has. That no other process changes or shortens the file is not ours to enforce; every mapped reader relies on
    // it, and the module doc of `checkpoint` says so to users.
    unsafe { MmapOptions::new().len(map_bytes).map(&file) }
}

/// Every tensor that the index puts into a shard must be there. Whether one is also elsewhere is seen when roles are given.
fn check_promises(index: &Index, shards: &[Shard], faults: &mut Vec<Fault>) {
    let held: HashMap<&str, HashSet<&str>> = shards
        .iter()
        .map(|shard| (shard.file.as_str(), shard.header.entries().iter().map(|entry| entry.name()).collect()))
        .collect();
    for (shard, tensors) in index {
        for tensor in tensors {
            if !held.get(shard.as_str()).is_some_and(|names| names.contains(tensor.as_str())) {
                faults.push(Fault::NotInShard { shard: shard.clone(), tensor: shown(tensor) });
            }
        }
    }
}
