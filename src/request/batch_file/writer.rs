//! Appends whole lines, survives kills and full disks, and reads back what earlier runs wrote.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, BufReader, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Deserialize;

use super::output::{OutputLine, id_hash};
use super::reader::{Finished, LineRead, read_line};

/// What to do with an output file that already holds something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    Refuse,
    Resume,
    Overwrite,
}

/// Why results cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum WriterError {
    #[error("{path}: cannot be opened for writing{hint}")]
    Open { path: PathBuf, hint: String, source: io::Error },
    #[error("{path}: exists and has {bytes} bytes; --resume continues it, --overwrite replaces it")]
    Exists { path: PathBuf, bytes: u64 },
    #[error("{path}: is both {one} and {other}")]
    SameFile { path: PathBuf, one: &'static str, other: &'static str },
    #[error("{path}: another process is writing it")]
    Locked { path: PathBuf },
    #[error("standard output cannot be resumed: give --resume an output file")]
    ResumeStdout,
    #[error("{path}: line {line} is not a result of a batch, so --resume will not append to it ({message})")]
    NotResults { path: PathBuf, line: u64, message: String },
    #[error("{path}: cannot be read for --resume")]
    Scan { path: PathBuf, source: io::Error },
    #[error("{path}: writing failed")]
    Write { path: PathBuf, source: io::Error },
}

/// Lines that may be lost with the machine's power, and for how long.
const SYNC_LINES: u32 = 256;
const SYNC_EVERY: Duration = Duration::from_secs(5);

/// Appends output lines, each with one write. Error lines go to the error file where there is one.
#[derive(Debug)]
pub struct ResultWriter {
    results: Sink,
    errors: Option<Sink>,
}

impl ResultWriter {
    /// Opens, and locks, what will be written, so that a wrong path is found before a model is loaded. `-` is standard
    /// output. `input` is looked at only to make sure that it is none of the others.
    pub fn open(
        output: &Path,
        error_file: Option<&Path>,
        input: &Path,
        existing: Existing,
    ) -> Result<(Self, Finished), WriterError> {
        let names = [(Some(input), "the input"), (Some(output), "the output"), (error_file, "the error file")];
        for (i, &(one, one_name)) in names.iter().enumerate() {
            for &(other, other_name) in &names[i + 1..] {
                // `-` is standard input in one place and standard output in the other.
                if let (Some(one), Some(other)) = (one, other)
                    && same_file(one, other)
                {
                    return Err(WriterError::SameFile { path: other.into(), one: one_name, other: other_name });
                }
            }
        }
        let mut finished = Finished::default();
        let mut results = Sink::open(output, existing)?;
        let mut errors = error_file.map(|path| Sink::open(path, existing)).transpose()?;
        for sink in [Some(&mut results), errors.as_mut()].into_iter().flatten() {
            match existing {
                Existing::Refuse => {}
                Existing::Resume => sink.scan(&mut finished)?,
                Existing::Overwrite => sink.truncate(0)?,
            }
        }
        Ok((Self { results, errors }, finished))
    }

    /// Appends one line. After an error the file ends with the last whole line, as far as the disk allows.
    pub fn write(&mut self, line: &OutputLine) -> Result<(), WriterError> {
        let sink = match &mut self.errors {
            Some(errors) if line.error.is_some() => errors,
            _ => &mut self.results,
        };
        sink.write(line)
    }

    /// Puts everything written on the disk.
    pub fn sync(&mut self) -> Result<(), WriterError> {
        self.results.sync()?;
        self.errors.as_mut().map_or(Ok(()), Sink::sync)
    }
}

/// Whether both paths lead to one file.
fn same_file(one: &Path, other: &Path) -> bool {
    let real = |path: &Path| if path == Path::new("-") { None } else { std::fs::canonicalize(path).ok() };
    match (real(one), real(other)) {
        (Some(one), Some(other)) => one == other && one.is_file(),
        // Neither exists yet: output and error file, spelled alike.
        (None, None) => one == other && one != Path::new("-"),
        _ => false,
    }
}

#[derive(Debug)]
struct Sink {
    path: PathBuf,
    /// `None` = standard output.
    file: Option<File>,
    /// Can be truncated and synchronised; a pipe or a terminal cannot.
    regular: bool,
    /// Length up to the last whole line.
    length: u64,
    lines_since_sync: u32,
    synced: Instant,
}

impl Sink {
    fn open(path: &Path, existing: Existing) -> Result<Self, WriterError> {
        let sink = |file, regular, length| Self {
            path: path.into(),
            file,
            regular,
            length,
            lines_since_sync: 0,
            synced: Instant::now(),
        };
        if path == Path::new("-") {
            return if existing == Existing::Resume {
                Err(WriterError::ResumeStdout)
            } else {
                Ok(sink(None, false, 0))
            };
        }
        let failed = |source| {
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty() && !folder.exists());
            let hint = folder.map(|folder| format!(" (there is no folder {})", folder.display())).unwrap_or_default();
            WriterError::Open { path: path.into(), hint, source }
        };
        let mut options = OpenOptions::new();
        options.create(true).append(true).read(existing == Existing::Resume);
        let file = options.open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        let regular = metadata.is_file();
        if regular {
            match file.try_lock() {
                Err(TryLockError::WouldBlock) => return Err(WriterError::Locked { path: path.into() }),
                // Not every file system has locks; a second writer is then the user's own care.
                Ok(()) | Err(TryLockError::Error(_)) => {}
            }
            if existing == Existing::Refuse && metadata.len() > 0 {
                return Err(WriterError::Exists { path: path.into(), bytes: metadata.len() });
            }
        }
        Ok(sink(Some(file), regular, metadata.len()))
    }

    fn failed(&self, source: io::Error) -> WriterError {
        WriterError::Write { path: self.path.clone(), source }
    }

    fn truncate(&mut self, length: u64) -> Result<(), WriterError> {
        if let (Some(file), true) = (&self.file, self.regular) {
            file.set_len(length).map_err(|source| self.failed(source))?;
            self.length = length;
        }
        Ok(())
    }

    fn write(&mut self, line: &OutputLine) -> Result<(), WriterError> {
        let mut bytes = serde_json::to_vec(line).map_err(|error| self.failed(error.into()))?;
        bytes.push(b'\n');
        let written = match &mut self.file {
            Some(file) => file.write_all(&bytes),
            None => {
                let mut stdout = io::stdout().lock();
                stdout.write_all(&bytes).and_then(|()| stdout.flush())
            }
        };
        if let Err(source) = written {
            // A full disk took half a line: take it back. Should that fail too, --resume will.
            let _ = self.truncate(self.length);
            return Err(self.failed(source));
        }
        self.length += bytes.len() as u64;
        self.lines_since_sync += 1;
        if self.lines_since_sync >= SYNC_LINES || self.synced.elapsed() >= SYNC_EVERY { self.sync() } else { Ok(()) }
    }

    fn sync(&mut self) -> Result<(), WriterError> {
        if let (Some(file), true) = (&self.file, self.regular)
            && self.lines_since_sync > 0
        {
            file.sync_data().map_err(|source| self.failed(source))?;
        }
        self.lines_since_sync = 0;
        self.synced = Instant::now();
        Ok(())
    }

    /// Reads back what earlier runs wrote; removes a torn last line.
    fn scan(&mut self, finished: &mut Finished) -> Result<(), WriterError> {
        let (Some(file), true) = (&self.file, self.regular) else { return Ok(()) };
        let unreadable = |source| WriterError::Scan { path: self.path.clone(), source };
        let mut input = BufReader::with_capacity(1 << 20, file);
        let mut buffer = Vec::new();
        let (mut good, mut line_number) = (0u64, 0);
        let mut repair = None;
        while let LineRead::Line { length, terminated } =
            read_line(&mut input, &mut buffer, usize::MAX).map_err(unreadable)?
        {
            line_number += 1;
            let scanned = scan_line(&buffer, finished);
            match scanned {
                Ok(()) if terminated => good += length as u64 + 1,
                Ok(()) => repair = Some(Repair::EndLine),
                // Cut by a kill, or zeros that a crashed file system left.
                Err(_) if !terminated && matches!(buffer.first(), Some(b'{' | 0)) => repair = Some(Repair::Cut),
                Err(message) => {
                    return Err(WriterError::NotResults { path: self.path.clone(), line: line_number, message });
                }
            }
        }
        match repair {
            None => {}
            Some(Repair::Cut) => self.truncate(good)?,
            Some(Repair::EndLine) => {
                let mut file = file;
                file.write_all(b"\n").map_err(|source| self.failed(source))?;
                self.length += 1;
            }
        }
        Ok(())
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        // The caller who wants to know calls `ResultWriter::sync` first.
        let _ = self.sync();
    }
}

enum Repair {
    Cut,
    EndLine,
}

/// Notes one output line as finished.
fn scan_line(line: &[u8], finished: &mut Finished) -> Result<(), String> {
    #[derive(Deserialize)]
    struct Scanned {
        custom_id: Option<String>,
        response: Option<serde::de::IgnoredAny>,
        error: Option<ScannedError>,
    }
    #[derive(Deserialize)]
    struct ScannedError {
        line: Option<u64>,
    }
    if line.iter().all(u8::is_ascii_whitespace) {
        return Ok(());
    }
    let scanned: Scanned = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    match (scanned.response, scanned.error, scanned.custom_id) {
        // By line and not by name: two lines may have one name, and only the second is the error.
        (_, Some(ScannedError { line: Some(line) }), _) => {
            finished.lines.insert(line);
        }
        (Some(_), _, Some(id)) | (None, Some(_), Some(id)) => {
            finished.ids.insert(id_hash(&id));
        }
        (None, None, _) => return Err("it has neither a response nor an error".into()),
        (_, _, None) => return Err("it has no custom_id".into()),
    }
    Ok(())
}
