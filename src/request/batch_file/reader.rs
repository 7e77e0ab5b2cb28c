//! Reads a batch file lazily: shards, limits, duplicates, and what earlier runs finished.

use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::Path;
use std::str::FromStr;

use super::MAX_LINE_BYTES;
use super::line::{BatchLine, LineError, LineErrorCode};
use super::output::id_hash;

/// Every `count`-th line, from the `index`-th (from 0): blank lines and bad JSON do not shift it, so the shards of
/// one file are disjoint and together complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    index: u64,
    count: u64,
}

impl Shard {
    pub const ALL: Shard = Shard { index: 0, count: 1 };

    pub fn index(self) -> u64 {
        self.index
    }

    pub fn count(self) -> u64 {
        self.count
    }

    /// Whether this shard has the line with `ordinal` non-blank lines before it.
    fn has(self, ordinal: u64) -> bool {
        ordinal % self.count == self.index
    }
}

impl FromStr for Shard {
    type Err = String;

    /// `i/n`, i from 0.
    fn from_str(text: &str) -> Result<Self, String> {
        let numbers = text.split_once('/').and_then(|(i, n)| Some((i.parse::<u64>().ok()?, n.parse::<u64>().ok()?)));
        match numbers {
            None => Err(format!("a shard is written i/n, as in 0/4, got {text:?}")),
            Some((_, 0)) => Err(format!("shard {text}: there are no shards of none")),
            Some((index, count)) if index >= count => {
                Err(format!("shard {text}: shards count from 0, so the last one of {count} is {}/{count}", count - 1))
            }
            Some((index, count)) => Ok(Self { index, count }),
        }
    }
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.index, self.count)
    }
}

/// What earlier runs finished: `custom_id`s of results, input lines of errors.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Finished {
    pub(super) ids: HashSet<u128>,
    pub(super) lines: HashSet<u64>,
}

impl Finished {
    /// How many lines are finished.
    pub fn len(&self) -> usize {
        self.ids.len() + self.lines.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn has_result(&self, custom_id: &str) -> bool {
        self.ids.contains(&id_hash(custom_id))
    }

    /// Some line ended in an error.
    pub fn any_error(&self) -> bool {
        !self.lines.is_empty()
    }

    pub fn has_error(&self, line_number: u64) -> bool {
        self.lines.contains(&line_number)
    }
}

/// Which lines of a file to take.
#[derive(Debug, Clone)]
pub struct ReadOptions {
    pub shard: Shard,
    /// At most this many lines of the shard, finished and bad ones counted, so that a resumed run stops where the first
    /// would have.
    pub limit: Option<u64>,
    pub finished: Finished,
    pub max_line_bytes: usize,
}

impl Default for ReadOptions {
    fn default() -> Self {
        Self { shard: Shard::ALL, limit: None, finished: Finished::default(), max_line_bytes: MAX_LINE_BYTES }
    }
}

/// Why [`BatchReader`] has no request at this place.
#[derive(Debug, thiserror::Error)]
pub enum BatchReadError {
    /// This line; reading goes on.
    #[error(transparent)]
    Line(#[from] LineError),
    /// The input itself; reading is over.
    #[error("the input cannot be read after line {after_line}")]
    Io { after_line: u64, source: io::Error },
}

/// Reads a batch file lazily. Memory: one line, and 16 bytes (about 36 with the table's slack) per line for duplicates.
#[derive(Debug)]
pub struct BatchReader<R> {
    input: R,
    options: ReadOptions,
    line_number: u64,
    /// Non-blank lines so far, of all shards.
    ordinal: u64,
    /// Lines of this shard so far.
    taken: u64,
    already_finished: u64,
    seen: HashSet<u128>,
    buffer: Vec<u8>,
    over: bool,
}

impl BatchReader<Box<dyn BufRead + Send>> {
    /// A file, or standard input for `-`.
    pub fn open(path: &Path, options: ReadOptions) -> io::Result<Self> {
        let input: Box<dyn BufRead + Send> = if path == Path::new("-") {
            Box::new(BufReader::new(io::stdin()))
        } else {
            Box::new(BufReader::with_capacity(1 << 16, File::open(path)?))
        };
        Ok(BatchReader::new(input, options))
    }
}

impl<R: BufRead> BatchReader<R> {
    pub fn new(input: R, options: ReadOptions) -> Self {
        Self {
            input,
            options,
            line_number: 0,
            ordinal: 0,
            taken: 0,
            already_finished: 0,
            seen: HashSet::new(),
            buffer: Vec::new(),
            over: false,
        }
    }

    /// Lines of this shard read so far: given out, faulty, and finished earlier.
    pub fn taken(&self) -> u64 {
        self.taken
    }

    /// Of these, lines skipped because an earlier run finished them.
    pub fn already_finished(&self) -> u64 {
        self.already_finished
    }

    /// The next line of this shard as it stands; `None` at the end.
    fn next_line(&mut self) -> io::Result<Option<Result<BatchLine, LineError>>> {
        loop {
            if self.options.limit.is_some_and(|limit| self.taken >= limit) {
                return Ok(None);
            }
            let length = match read_line(&mut self.input, &mut self.buffer, self.options.max_line_bytes)? {
                LineRead::End => return Ok(None),
                LineRead::Line { length, .. } => length,
            };
            self.line_number += 1;
            if self.line_number == 1 && self.buffer.starts_with(b"\xef\xbb\xbf") {
                self.buffer.drain(..3); // a byte order mark, from Windows
            }
            let too_long = length > self.options.max_line_bytes;
            if !too_long && self.buffer.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            let ordinal = self.ordinal;
            self.ordinal += 1;
            if !self.options.shard.has(ordinal) {
                continue;
            }
            self.taken += 1;
            if too_long {
                let message = format!("{length} bytes long; at most {} are read", self.options.max_line_bytes);
                let code = LineErrorCode::LineTooLong;
                return Ok(Some(Err(LineError { line_number: self.line_number, custom_id: None, code, message })));
            }
            return Ok(Some(BatchLine::parse(self.line_number, &self.buffer)));
        }
    }

    /// Marks the line's name as seen; a second line of that name is faulty.
    fn check_duplicate(&mut self, line: Result<BatchLine, LineError>) -> Result<BatchLine, LineError> {
        match line {
            Ok(line) if self.seen.insert(id_hash(&line.custom_id)) => Ok(line),
            Ok(line) => Err(line.error(LineErrorCode::DuplicateCustomId, "custom_id was used by an earlier line")),
            Err(error) => {
                if let Some(id) = &error.custom_id {
                    self.seen.insert(id_hash(id));
                }
                Err(error)
            }
        }
    }
}

impl<R: BufRead> Iterator for BatchReader<R> {
    type Item = Result<BatchLine, BatchReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.over {
            let line = match self.next_line() {
                Ok(Some(line)) => self.check_duplicate(line),
                Ok(None) => break,
                Err(source) => {
                    self.over = true;
                    return Some(Err(BatchReadError::Io { after_line: self.line_number, source }));
                }
            };
            let finished = self.options.finished.has_error(self.line_number)
                || line.as_ref().is_ok_and(|line| self.options.finished.has_result(&line.custom_id));
            if !finished {
                return Some(line.map_err(BatchReadError::Line));
            }
            self.already_finished += 1;
        }
        self.over = true;
        None
    }
}

pub(super) enum LineRead {
    End,
    /// Bytes of the line, its end not counted. More than the limit: the rest was passed over.
    Line {
        length: usize,
        terminated: bool,
    },
}

/// Reads up to and including the next line feed into `buffer` (without it), keeping at most `limit` bytes.
pub(super) fn read_line(input: &mut impl BufRead, buffer: &mut Vec<u8>, limit: usize) -> io::Result<LineRead> {
    buffer.clear();
    let mut length = 0;
    loop {
        let chunk = match input.fill_buf() {
            Ok(chunk) => chunk,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        if chunk.is_empty() {
            return Ok(if length == 0 { LineRead::End } else { LineRead::Line { length, terminated: false } });
        }
        let line_end = chunk.iter().position(|&byte| byte == b'\n');
        let part = &chunk[..line_end.unwrap_or(chunk.len())];
        buffer.extend_from_slice(&part[..part.len().min(limit - buffer.len())]);
        length += part.len();
        let used = part.len() + usize::from(line_end.is_some());
        input.consume(used);
        if line_end.is_some() {
            return Ok(LineRead::Line { length, terminated: true });
        }
    }
}

/// What `--strict` finds before anything runs.
#[derive(Debug, Default)]
pub struct Validation {
    pub lines: u64,
    pub faults: Vec<LineError>,
}

/// Reads the whole input; `check` judges what needs the model ([`BatchLine::to_request`]).
pub fn validate_all<R: BufRead>(
    reader: BatchReader<R>,
    mut check: impl FnMut(&BatchLine) -> Result<(), LineError>,
) -> Result<Validation, BatchReadError> {
    let mut validation = Validation::default();
    for line in reader {
        validation.lines += 1;
        match line {
            Ok(line) => validation.faults.extend(check(&line).err()),
            Err(BatchReadError::Line(error)) => validation.faults.push(error),
            Err(error) => return Err(error),
        }
    }
    Ok(validation)
}
