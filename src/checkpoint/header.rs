//! The header of one safetensors file, validated.
//!
//! ```text
//! byte 0        8            8 + n                                   end of file
//!      │ n: u64 │ JSON header │ tensor │ tensor │ …            tensor │
//! ```
//!
//! In: the bytes of a file. Out: a [`Header`] whose ranges are inside those bytes, or every fault of the file.
//!
//! Guarantees, established by [`Header::parse`] alone (the fields are private): the entries' ranges lie inside the file,
//! do not overlap, leave no byte between header and end unclaimed, and each is as long as its shape and type say; no name
//! occurs twice. Whatever it accepts the `safetensors` crate accepts too, with the same ranges (a property test); the
//! crate's own reader is not used because its errors name neither file nor tensor nor numbers, and because of two entries
//! of one name it keeps the last.
//!
//! A range may start at any byte: readers must not assume alignment.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;

use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde_json::value::RawValue;

use super::fault::{Fault, shown};
use super::json_entries::Entries;

/// The limit of the format's reference reader. A header of 18,867 tensors (Qwen3-30B-A3B) has about 2.5 MB.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Bytes of the length in front of the header.
const LENGTH_BYTES: u64 = 8;

/// A validated header; holding one is the proof of the module's guarantees.
#[derive(Debug, Clone)]
pub struct Header {
    entries: Vec<Entry>,
    file_bytes: u64,
}

/// A tensor as its file declares it, of any type that safetensors knows.
#[derive(Debug, Clone)]
pub struct Entry {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    range: Range<u64>,
}

impl Header {
    /// Reads and checks the header of the file with these `bytes`. `file` is the name for messages.
    pub fn parse(file: &str, bytes: &[u8]) -> Result<Header, Vec<Fault>> {
        let text = header_text(file, bytes).map_err(|fault| vec![fault])?;
        let data_start = LENGTH_BYTES + text.len() as u64;
        let file_bytes = bytes.len() as u64;

        let not_json = |source| vec![Fault::HeaderNotJson { file: file.to_owned(), source }];
        let raw: Entries<&RawValue> = serde_json::from_str(text).map_err(not_json)?;
        let mut faults = Vec::new();
        let mut entries = Vec::with_capacity(raw.0.len());
        let mut seen: HashSet<&str> = HashSet::with_capacity(raw.0.len());
        for (name, value) in &raw.0 {
            if !seen.insert(name) {
                let file = file.to_owned();
                faults.push(Fault::Duplicate { tensor: shown(name), first: file.clone(), second: file });
            } else if name == "__metadata__" {
                // Free text that nothing here reads; the format wants a map of strings all the same.
                serde_json::from_str::<Option<BTreeMap<String, String>>>(value.get()).map_err(not_json)?;
            } else {
                match entry(file, name, value, data_start) {
                    Ok(entry) => entries.push(entry),
                    Err(fault) => faults.push(fault),
                }
            }
        }
        if faults.is_empty() {
            entries.sort_by_key(|entry| (entry.range.start, entry.range.end));
            check_layout(file, &entries, data_start, file_bytes, &mut faults);
        }
        if faults.is_empty() { Ok(Header { entries, file_bytes }) } else { Err(faults) }
    }

    /// The tensors in the order in which they lie in the file.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Length of the file that this is the header of.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }
}

impl Entry {
    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Where its bytes are, from the start of the file.
    pub fn range(&self) -> Range<u64> {
        self.range.clone()
    }
}

/// The JSON text between the length and the data.
fn header_text<'a>(file: &str, bytes: &'a [u8]) -> Result<&'a str, Fault> {
    let file_bytes = bytes.len() as u64;
    let Some((length, rest)) = bytes.split_first_chunk() else {
        return Err(Fault::NoHeader { file: file.to_owned(), file_bytes });
    };
    let header_bytes = u64::from_le_bytes(*length);
    if header_bytes > MAX_HEADER_BYTES {
        return Err(Fault::HeaderTooLong { file: file.to_owned(), header_bytes, limit: MAX_HEADER_BYTES });
    }
    let Some(text) = rest.get(..header_bytes as usize) else {
        return Err(Fault::HeaderBeyondFile { file: file.to_owned(), header_bytes, file_bytes });
    };
    std::str::from_utf8(text).map_err(|source| Fault::HeaderNotText { file: file.to_owned(), source })
}

/// One entry, with its range moved from the start of the data to the start of the file.
fn entry(file: &str, name: &str, value: &RawValue, data_start: u64) -> Result<Entry, Fault> {
    let (file, tensor) = (|| file.to_owned(), || shown(name));
    let info: TensorInfo =
        serde_json::from_str(value.get()).map_err(|source| Fault::Entry { file: file(), tensor: tensor(), source })?;
    let (start, end) = (info.data_offsets.0 as u64, info.data_offsets.1 as u64);
    let Some(had) = end.checked_sub(start) else {
        return Err(Fault::BackwardOffsets { file: file(), tensor: tensor(), start, end });
    };
    let (shape, dtype) = (info.shape, info.dtype);
    let range = start.checked_add(data_start).zip(end.checked_add(data_start));
    match (byte_size(&shape, dtype), range) {
        (Some(needed), Some((start, end))) if needed == had => {
            Ok(Entry { name: name.to_owned(), dtype, shape, range: start..end })
        }
        (Some(needed), _) if needed != had => {
            let dtype = super::dtype_name(dtype);
            Err(Fault::WrongSize { file: file(), tensor: tensor(), shape, dtype, needed, had })
        }
        _ => Err(Fault::Unsizable { file: file(), tensor: tensor(), shape, dtype: super::dtype_name(dtype) }),
    }
}

/// Bytes of a tensor; `None` where that overflows or is not whole (types of less than a byte).
fn byte_size(shape: &[usize], dtype: Dtype) -> Option<u64> {
    let elements = shape.iter().try_fold(1u64, |product, &extent| product.checked_mul(extent as u64))?;
    let bits = elements.checked_mul(dtype.bitsize() as u64)?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

/// `entries`, sorted by range, must cover the bytes from `data_start` to `file_bytes`, each once.
fn check_layout(file: &str, entries: &[Entry], data_start: u64, file_bytes: u64, faults: &mut Vec<Fault>) {
    let file_name = || file.to_owned();
    let beyond = entries.iter().filter(|entry| entry.range.end > file_bytes);
    if let Some(last) = beyond.clone().max_by_key(|entry| entry.range.end) {
        faults.push(Fault::Truncated {
            file: file_name(),
            tensors: beyond.count(),
            tensor: shown(&last.name),
            needed: last.range.end,
            had: file_bytes,
        });
    }
    // What ends furthest so far, and the tensor that does.
    let (mut end, mut furthest) = (data_start, None::<&Entry>);
    for entry in entries {
        if entry.range.start > end {
            faults.push(Fault::Unclaimed { file: file_name(), start: end, end: entry.range.start });
        }
        if let (true, Some(furthest)) = (entry.range.start < end, furthest) {
            faults.push(Fault::Overlap {
                file: file_name(),
                first: shown(&furthest.name),
                second: shown(&entry.name),
                start: entry.range.start,
                end,
            });
        }
        if entry.range.end > end {
            (end, furthest) = (entry.range.end, Some(entry));
        }
    }
    if end < file_bytes {
        faults.push(Fault::Unclaimed { file: file_name(), start: end, end: file_bytes });
    }
}
