//! Reads of files, as the staged page source makes them: in portions, by all threads, past the page cache.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use memmap2::{Mmap, MmapOptions};
use rayon::prelude::*;

use super::{CalibrateError, Request, grid, pool, steady};
use crate::checkpoint::{ReadError, Reader};
use crate::memory::page_source::PORTION_BYTES;
use crate::profile::{Curve, Disk};

/// What is read: a folder's weights, else a temporary file in it, which ends with this.
pub struct Files {
    what: String,
    files: Vec<(PathBuf, u64)>,
    /// Keeps the file in its folder.
    _temporary: Option<tempfile::NamedTempFile>,
}

/// The largest page that is read.
const PAGE_BYTES: u64 = 128 << 20;

impl Files {
    pub fn of(request: &Request<'_>) -> io::Result<Files> {
        let folder = request.disk;
        let mut weights = Vec::new();
        for entry in std::fs::read_dir(folder)? {
            let (path, bytes) = entry.and_then(|entry| Ok((entry.path(), entry.path().metadata()?.len())))?;
            if path.extension().is_some_and(|ending| ending == "safetensors") && bytes >= PORTION_BYTES {
                weights.push((path, bytes));
            }
        }
        if !weights.is_empty() {
            weights.sort();
            return Ok(Files { what: format!("weights in {}", folder.display()), files: weights, _temporary: None });
        }
        let most: u64 = if request.software() { 64 << 20 } else { 4 * PAGE_BYTES };
        let file = write(folder, most, request.budget / 20)?;
        let (path, bytes) = (file.path().to_owned(), file.as_file().metadata()?.len());
        let what = format!("a temporary file in {}", folder.display());
        Ok(Files { what, files: vec![(path, bytes)], _temporary: Some(file) })
    }

    /// The first bytes of a file in memory, as the mapped source has them: whole pages, at most so many bytes.
    pub fn mapping(&self, most: u64) -> io::Result<Mmap> {
        let (path, bytes) = &self.files[0];
        let whole = (*bytes).min(most) / 4096 * 4096;
        // SAFETY: weights are only read while they are measured, as by the engine; a temporary file is ours.
        unsafe { MmapOptions::new().len(whole as usize).map(&std::fs::File::open(path)?) }
    }

    /// Seconds of pages by their bytes.
    pub fn measure(&self, request: &Request<'_>) -> Result<Disk, CalibrateError> {
        let threads = pool(super::all_threads())?;
        let reader = Reader::new();
        // Every portion once before any comes again.
        let places: Vec<(&Path, u64)> = self
            .files
            .iter()
            .flat_map(|(path, bytes)| (0..bytes / PORTION_BYTES).map(move |at| (path.as_path(), at * PORTION_BYTES)))
            .collect();
        let mut next = 0;
        let most = PAGE_BYTES.min(places.len() as u64 * PORTION_BYTES);
        let mut memory = vec![0u8; most as usize];
        let mut points = Vec::new();
        for bytes in grid(65536.0, 4.0, most as f64) {
            let page = &mut memory[..bytes as usize];
            let seconds = steady(request.point(), |n| {
                for _ in 0..n {
                    let portions = page.chunks_mut(PORTION_BYTES as usize).enumerate();
                    let work: Vec<_> = portions.map(|(i, into)| (places[(next + i) % places.len()], into)).collect();
                    next += work.len();
                    threads.install(|| {
                        work.into_par_iter().try_for_each(|((path, at), into)| reader.read(path, at, into))
                    })?;
                }
                Ok::<(), ReadError>(())
            })?;
            points.push((bytes, seconds));
        }
        let page_seconds = Curve::rising(points).map_err(|cause| CalibrateError::Curve { what: "the disk", cause })?;
        Ok(Disk { what: self.what.clone(), direct: !reader.uses_cache(), page_seconds })
    }
}

/// A file of noise, which no file system makes smaller; of fewer bytes where writing them takes longer than `time`.
fn write(folder: &Path, bytes: u64, time: std::time::Duration) -> io::Result<tempfile::NamedTempFile> {
    let mut file = tempfile::Builder::new().prefix("fulmen-").tempfile_in(folder)?;
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut portion = vec![0u8; PORTION_BYTES as usize];
    let begun = Instant::now();
    for number in 0..bytes / PORTION_BYTES {
        if number >= 4 && begun.elapsed() > time {
            break;
        }
        for word in portion.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        file.write_all(&portion)?;
        // What is written comes to the disk as it goes, so that the clock sees it.
        file.as_file().sync_data()?;
    }
    crate::checkpoint::give_back_cache(file.as_file(), 0, 0);
    Ok(file)
}
