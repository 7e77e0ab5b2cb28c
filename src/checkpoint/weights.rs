//! Where a model's bytes come from: the files of a folder, or a formula.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::synthetic::Synthetic;
use super::{Checkpoint, Inventory};
use crate::model::{ModelConfig, Role};

/// The weights of a model.
#[derive(Debug)]
pub enum Weights {
    Files(Checkpoint),
    Synthetic(Synthetic),
}

/// A tensor's bytes could not be read.
#[derive(Debug, thiserror::Error)]
#[error("{}: reading {bytes} bytes at offset {offset}", path.display())]
pub struct ReadError {
    pub path: PathBuf,
    pub offset: u64,
    pub bytes: usize,
    pub source: io::Error,
}

impl Weights {
    pub fn config(&self) -> &ModelConfig {
        match self {
            Weights::Files(checkpoint) => checkpoint.config(),
            Weights::Synthetic(synthetic) => synthetic.config(),
        }
    }

    pub fn inventory(&self) -> &Inventory {
        match self {
            Weights::Files(checkpoint) => checkpoint.inventory(),
            Weights::Synthetic(synthetic) => synthetic.inventory(),
        }
    }

    /// The folder of files; None for made-up weights.
    pub fn files(&self) -> Option<&Checkpoint> {
        match self {
            Weights::Files(checkpoint) => Some(checkpoint),
            Weights::Synthetic(_) => None,
        }
    }

    /// Bytes `range` of the tensor that plays `role`, from the file by `reader` or by formula.
    pub fn read(&self, reader: &Reader, role: Role, range: Range<u64>, into: &mut [u8]) -> Result<(), ReadError> {
        match self {
            Weights::Synthetic(synthetic) => {
                synthetic.fill(role, range, into);
                Ok(())
            }
            Weights::Files(checkpoint) => {
                let view = checkpoint.tensor(role);
                reader.read(view.path, view.range.start + range.start, into)
            }
        }
    }

    /// All bytes of the tensor that plays `role`.
    pub fn tensor(&self, reader: &Reader, role: Role) -> Result<Vec<u8>, ReadError> {
        let tensor = self.inventory().find(role).unwrap_or_else(|| panic!("{role:?} is no role of this model"));
        let mut bytes = vec![0; tensor.bytes() as usize];
        self.read_by_all(reader, role, 0..tensor.bytes(), &mut bytes)?;
        Ok(bytes)
    }

    /// As [`read`](Self::read), by many threads: one alone is slower than disks are.
    pub fn read_by_all(
        &self,
        reader: &Reader,
        role: Role,
        range: Range<u64>,
        into: &mut [u8],
    ) -> Result<(), ReadError> {
        into.par_chunks_mut(BOUNCE_BYTES).enumerate().try_for_each(|(number, into)| {
            let start = range.start + (number * BOUNCE_BYTES) as u64;
            self.read(reader, role, start..start + into.len() as u64, into)
        })
    }
}

/// Blocks of a direct read: larger than any device's sector.
const ALIGNMENT: u64 = 4096;
/// A thread's buffer for direct reads.
const BOUNCE_BYTES: usize = 4 << 20;

/// Reads files past the page cache where the file system can (O_DIRECT), so that weights are not in memory twice; else gives
/// the cache back afterwards.
#[derive(Debug, Default)]
pub struct Reader {
    files: std::sync::Mutex<std::collections::HashMap<PathBuf, std::sync::Arc<Opened>>>,
}

#[derive(Debug)]
struct Opened {
    file: File,
    direct: bool,
}

impl Reader {
    pub fn new() -> Self {
        Self::default()
    }

    /// Some file is read through the page cache, as its file system has no direct reads.
    pub fn uses_cache(&self) -> bool {
        self.files.lock().expect("files lock").values().any(|opened| !opened.direct)
    }

    fn open(&self, path: &Path) -> io::Result<std::sync::Arc<Opened>> {
        let mut files = self.files.lock().expect("files lock");
        if let Some(opened) = files.get(path) {
            return Ok(opened.clone());
        }
        let opened = std::sync::Arc::new(open_direct(path)?);
        files.insert(path.to_owned(), opened.clone());
        Ok(opened)
    }

    /// Bytes of a file from `offset` on.
    pub fn read(&self, path: &Path, offset: u64, into: &mut [u8]) -> Result<(), ReadError> {
        let fail = |source| ReadError { path: path.to_owned(), offset, bytes: into.len(), source };
        let opened = self.open(path).map_err(fail)?;
        if !opened.direct {
            read_exact_at(&opened.file, into, offset).map_err(|source| ReadError {
                path: path.to_owned(),
                offset,
                bytes: into.len(),
                source,
            })?;
            give_back_cache(&opened.file, offset, into.len() as u64);
            return Ok(());
        }
        let length = into.len();
        read_direct(&opened.file, offset, into).map_err(|source| ReadError {
            path: path.to_owned(),
            offset,
            bytes: length,
            source,
        })
    }
}

#[cfg(target_os = "linux")]
fn open_direct(path: &Path) -> io::Result<Opened> {
    use std::os::unix::fs::OpenOptionsExt;
    let direct = File::options().read(true).custom_flags(libc::O_DIRECT).open(path);
    match direct {
        Ok(file) => {
            // Some file systems open and then refuse to read.
            let mut probe = Bounce::new();
            let readable = read_at(&file, &mut probe.bytes()[..ALIGNMENT as usize], 0).is_ok();
            if readable {
                return Ok(Opened { file, direct: true });
            }
            Ok(Opened { file: File::open(path)?, direct: false })
        }
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            Ok(Opened { file: File::open(path)?, direct: false })
        }
        Err(error) => Err(error),
    }
}

#[cfg(not(target_os = "linux"))]
fn open_direct(path: &Path) -> io::Result<Opened> {
    Ok(Opened { file: File::open(path)?, direct: false })
}

#[cfg(unix)]
fn read_at(file: &File, into: &mut [u8], offset: u64) -> io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, into, offset)
}

#[cfg(windows)]
fn read_at(file: &File, into: &mut [u8], offset: u64) -> io::Result<usize> {
    std::os::windows::fs::FileExt::seek_read(file, into, offset)
}

fn short() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the file ends before that; it has become shorter since it was opened")
}

fn read_exact_at(file: &File, mut into: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !into.is_empty() {
        match read_at(file, into, offset) {
            Ok(0) => return Err(short()),
            Ok(n) => (into, offset) = (&mut into[n..], offset + n as u64),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// A buffer that starts at a multiple of [`ALIGNMENT`].
struct Bounce(memmap2::MmapMut);

impl Bounce {
    fn new() -> Self {
        Self(memmap2::MmapMut::map_anon(BOUNCE_BYTES).expect("4 MiB of memory"))
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

thread_local! {
    static BOUNCE: std::cell::RefCell<Bounce> = std::cell::RefCell::new(Bounce::new());
}

/// Whole blocks into this thread's buffer, from there what was asked for.
fn read_direct(file: &File, offset: u64, into: &mut [u8]) -> io::Result<()> {
    BOUNCE.with_borrow_mut(|bounce| {
        let mut done = 0;
        while done < into.len() {
            let at = offset + done as u64;
            let skip = (at % ALIGNMENT) as usize;
            let wanted = (skip + into.len() - done).next_multiple_of(ALIGNMENT as usize).min(BOUNCE_BYTES);
            let read = match read_at(file, &mut bounce.bytes()[..wanted], at - skip as u64) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                read => read?,
            };
            // The end of the file is the one place where a block may come short.
            let n = read.saturating_sub(skip).min(into.len() - done);
            if n == 0 {
                return Err(short());
            }
            into[done..done + n].copy_from_slice(&bounce.bytes()[skip..skip + n]);
            done += n;
        }
        Ok(())
    })
}

/// Asks the system to keep no part of a file in memory, from `offset` on; 0 bytes: all that follow.
#[cfg(target_os = "linux")]
pub(crate) fn give_back_cache(file: &File, offset: u64, bytes: u64) {
    use std::os::fd::AsRawFd;
    // SAFETY: an open file; the call only advises.
    unsafe {
        libc::posix_fadvise(file.as_raw_fd(), offset as libc::off_t, bytes as libc::off_t, libc::POSIX_FADV_DONTNEED)
    };
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn give_back_cache(_file: &File, _offset: u64, _bytes: u64) {}
