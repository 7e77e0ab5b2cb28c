//! Text → tokens, and tokens → text while they arrive.
//!
//! In: a checkpoint folder's tokenizer.json, and tokenizer_config.json / special_tokens_map.json for the names of the
//! special tokens. Out: a [`Tokenizer`], cheap to clone, and per completion a [`CompletionText`] that turns one token
//! at a time into text that is certain, and cuts at stop strings:
//!
//! ```text
//! token ─▶ TextStream ─▶ StopMatcher ─▶ text          Mixtral, 🚀 as four byte tokens, stop string "\n\n"
//!          holds back     holds back what     Go      ▸ "Go"
//!          half a         may begin a         <0xF0>  ▸ ""       <0x9F> ▸ ""     <0x9A> ▸ ""     <0x80> ▸ "🚀"
//!          character      stop string         \n      ▸ ""       \n     ▸ stop
//! ```
//!
//! Guarantees:
//! - What a stream has given out is never taken back; the pieces joined are the completion's text, and that text is a
//!   function of the tokens alone. It equals [`Tokenizer::decode`] of all the tokens wherever those are valid UTF-8.
//! - Each token costs two decodings of a window of at most 64 recent tokens, whatever came before.
//! - A stop string is found wherever the pieces are cut.
//!
//! Given up: in a run of *invalid* UTF-8 bytes, `decode` of a byte-fallback vocabulary makes every byte of the run `�`,
//! also those that were a whole character; a stream has given that character out already, and marks only the rest.
//! The file's truncation and padding settings are switched off: fulmen cuts or pads no prompt.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use super::StopReason;

/// Why a tokenizer could not be opened, or refused a text.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    #[error(
        "{folder}: no tokenizer.json (looked for {path}){also}; fulmen reads the Hugging Face form, which \
         transformers' AutoTokenizer.from_pretrained(…).save_pretrained(…) writes"
    )]
    Missing { folder: PathBuf, path: PathBuf, also: String },
    #[error("{path}: cannot be read")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path}: {message}")]
    Malformed { path: PathBuf, message: String },
    #[error("the tokenizer cannot {what}: {message}")]
    Failed { what: &'static str, message: String },
}

/// Token names of tokenizer_config.json and special_tokens_map.json: `bos_token` → `<s>`, in the order of names. A chat
/// template sees them as variables.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecialTokens(BTreeMap<String, String>);

impl SpecialTokens {
    /// The token's text, where the checkpoint names one: `get("eos_token")`.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, text)| (name.as_str(), text.as_str()))
    }

    /// Reads both files of a folder; either may be missing. tokenizer_config.json wins where both name a token.
    pub fn open(folder: &Path) -> Result<Self, TokenizerError> {
        let mut tokens = BTreeMap::new();
        for file in ["special_tokens_map.json", "tokenizer_config.json"] {
            let path = folder.join(file);
            let Some(value) = read_json(&path)? else { continue };
            let Value::Object(map) = value else {
                return Err(TokenizerError::Malformed { path, message: "is not a JSON object".into() });
            };
            for (name, value) in map {
                if !name.ends_with("_token") {
                    continue; // add_bos_token ends so too, but is a bool
                }
                let text = match &value {
                    Value::String(text) => text,
                    Value::Object(token) => match token.get("content") {
                        Some(Value::String(text)) => text,
                        _ => {
                            let message = format!("{name}: an object without a string `content`");
                            return Err(TokenizerError::Malformed { path, message });
                        }
                    },
                    Value::Null | Value::Bool(_) => continue,
                    _ => {
                        let message = format!("{name}: needs a string or an object with `content`, is {value}");
                        return Err(TokenizerError::Malformed { path, message });
                    }
                };
                tokens.insert(name, text.clone());
            }
        }
        Ok(Self(tokens))
    }
}

impl<N: Into<String>, T: Into<String>> FromIterator<(N, T)> for SpecialTokens {
    fn from_iter<I: IntoIterator<Item = (N, T)>>(tokens: I) -> Self {
        Self(tokens.into_iter().map(|(name, text)| (name.into(), text.into())).collect())
    }
}

/// The JSON of a file; `None` if there is no such file.
pub(super) fn read_json(path: &Path) -> Result<Option<Value>, TokenizerError> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(TokenizerError::Read { path: path.into(), source }),
    };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|error| TokenizerError::Malformed { path: path.into(), message: format!("is not JSON: {error}") })
}

/// How a vocabulary entry spells bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spelling {
    /// One character per byte (GPT-2's table).
    ByteLevel,
    /// `▁` for a space, `<0x41>` for a byte.
    SentencePiece,
    Other,
}

/// A checkpoint's tokenizer. Clones share it.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

struct Inner {
    tokenizer: tokenizers::Tokenizer,
    spelling: Spelling,
    special: SpecialTokens,
    /// Ids that `skip_special` leaves out.
    special_ids: HashSet<u32>,
    vocab_size: usize,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.inner.vocab_size)
            .field("spelling", &self.inner.spelling)
            .field("special", &self.inner.special)
            .finish()
    }
}

impl Tokenizer {
    /// Opens the tokenizer of a checkpoint folder.
    pub fn open(folder: &Path) -> Result<Self, TokenizerError> {
        let path = folder.join("tokenizer.json");
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let others = ["tokenizer.model", "vocab.json", "tiktoken.model"];
                let also = match others.iter().find(|name| folder.join(name).exists()) {
                    Some(name) => format!("; there is a {name}, which is another form"),
                    None if !folder.is_dir() => "; there is no such folder".into(),
                    None => String::new(),
                };
                return Err(TokenizerError::Missing { folder: folder.into(), path, also });
            }
            Err(source) => return Err(TokenizerError::Read { path, source }),
        };
        Self::from_json(&bytes, SpecialTokens::open(folder)?).map_err(|error| match error {
            TokenizerError::Failed { message, .. } => TokenizerError::Malformed { path, message },
            error => error,
        })
    }

    /// From the bytes of a tokenizer.json.
    pub fn from_json(json: &[u8], special: SpecialTokens) -> Result<Self, TokenizerError> {
        let mut tokenizer =
            guarded("be opened", || tokenizers::Tokenizer::from_bytes(json).map_err(|error| error.to_string()))?;
        guarded("be opened", || {
            tokenizer.with_padding(None);
            tokenizer.with_truncation(None).map(|_| ()).map_err(|error| error.to_string())
        })?;
        let decoder = serde_json::to_string(&tokenizer.get_decoder()).unwrap_or_default();
        let spelling = if decoder.contains("\"ByteLevel\"") {
            Spelling::ByteLevel
        } else if decoder.contains("\"ByteFallback\"") || decoder.contains("\"Metaspace\"") {
            Spelling::SentencePiece
        } else {
            Spelling::Other
        };
        let special_ids = tokenizer
            .get_added_tokens_decoder()
            .into_iter()
            .filter_map(|(id, token)| token.special.then_some(id))
            .collect();
        // Ids may have gaps: the size is one past the largest id, not the number of entries.
        let vocab_size = tokenizer.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        Ok(Self { inner: Arc::new(Inner { tokenizer, spelling, special, special_ids, vocab_size }) })
    }

    /// Text → ids. `add_special` adds what tokenizer.json's post-processor adds around a text (Mixtral: `<s>` in
    /// front): true for plain prompts, false for a chat template's output, which writes its special tokens itself.
    /// Special tokens spelled out in the text are recognised either way.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        guarded("encode this text", || {
            let encoding = self.inner.tokenizer.encode_fast(text, add_special).map_err(|error| error.to_string())?;
            Ok(encoding.get_ids().to_vec())
        })
    }

    /// Ids → text; ids outside the vocabulary say nothing.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TokenizerError> {
        guarded("decode these ids", || {
            self.inner.tokenizer.decode(ids, skip_special).map_err(|error| error.to_string())
        })
    }

    /// The bytes that a token stands for in the middle of a text: a space for `▁`, one byte for `<0x41>` or half a
    /// character. `None` outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        let entry = self.inner.tokenizer.id_to_token(id)?;
        if self.inner.special_ids.contains(&id) {
            return Some(entry.into_bytes());
        }
        Some(match self.inner.spelling {
            Spelling::ByteLevel => match entry.chars().map(byte_of_char).collect::<Option<Vec<u8>>>() {
                Some(bytes) => bytes,
                None => entry.into_bytes(),
            },
            Spelling::SentencePiece => match byte_of_name(&entry) {
                Some(byte) => vec![byte],
                None => entry.replace('▁', " ").into_bytes(),
            },
            Spelling::Other => self.decode(&[id], false).unwrap_or(entry).into_bytes(),
        })
    }

    /// [`Self::token_bytes`] as text, `�` for what is not UTF-8 alone.
    pub fn token_text(&self, id: u32) -> Option<String> {
        Some(String::from_utf8_lossy(&self.token_bytes(id)?).into_owned())
    }

    /// The id of a vocabulary entry by its exact spelling (`<s>`, `▁the`).
    pub fn token_id(&self, entry: &str) -> Option<u32> {
        self.inner.tokenizer.token_to_id(entry)
    }

    /// One past the largest id. The model's vocabulary may be larger (padded), never smaller.
    pub fn vocab_size(&self) -> usize {
        self.inner.vocab_size
    }

    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.inner.special
    }

    /// Whether `skip_special` leaves this id out.
    pub fn is_special(&self, id: u32) -> bool {
        self.inner.special_ids.contains(&id)
    }
}

/// The library's errors, and its panics (some decoders index past the end on settings that no real file has).
fn guarded<T>(what: &'static str, run: impl FnOnce() -> Result<T, String>) -> Result<T, TokenizerError> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(result) => result.map_err(|message| TokenizerError::Failed { what, message }),
        Err(_) => Err(TokenizerError::Failed { what, message: "the tokenizers library gave up (a panic)".into() }),
    }
}

/// GPT-2's table backwards: printable Latin-1 stands for itself, the other 68 bytes are U+0100 and up, in order.
fn byte_of_char(c: char) -> Option<u8> {
    let itself = |code: u32| matches!(code, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let code = c as u32;
    match code {
        _ if itself(code) => u8::try_from(code).ok(),
        0x100.. => (0..=255).filter(|&byte| !itself(byte)).nth((code - 0x100) as usize).map(|byte| byte as u8),
        _ => None,
    }
}

/// `<0x41>` → 0x41.
fn byte_of_name(entry: &str) -> Option<u8> {
    let hex = entry.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() == 2 { u8::from_str_radix(hex, 16).ok() } else { None }
}

const REPLACEMENT: char = '\u{FFFD}';
/// At most three bytes, so at most three `�`, can be the beginning of a character that later bytes complete.
const MAX_OPEN: usize = 3 * REPLACEMENT.len_utf8();
/// A window without an end is cut to its last `KEPT` tokens beyond `LONG`, and dropped beyond `LONGEST`.
const KEPT: usize = 8;
const LONG: usize = 16;
const LONGEST: usize = 64;

/// Tokens of one completion → text, as early as it is certain. See the module's doc.
///
/// A decoder looks at its neighbours (a leading space is stripped, bytes join to characters), so a token is not decoded
/// alone but in a window that begins before it, and what the window said before is subtracted.
#[derive(Debug, Clone)]
pub struct TextStream {
    tokenizer: Tokenizer,
    skip_special: bool,
    window: Vec<u32>,
    /// A prefix of the window's text: what has been given out.
    given: String,
    /// The first token of the window that is not wholly given out.
    open: usize,
}

impl TextStream {
    pub fn new(tokenizer: &Tokenizer, skip_special: bool) -> Self {
        let tokenizer = tokenizer.clone();
        Self { tokenizer, skip_special, window: Vec::new(), given: String::new(), open: 0 }
    }

    /// Takes the next token; the text that it makes certain, if any.
    pub fn push(&mut self, token: u32) -> Option<String> {
        if self.skip_special && self.tokenizer.is_special(token) {
            return None;
        }
        self.window.push(token);
        let text = self.text(0);
        let certain = text.trim_end_matches(REPLACEMENT).len();
        let whole = certain == text.len();
        let new = if text.starts_with(&self.given) {
            let until = certain.max(text.len().saturating_sub(MAX_OPEN)).max(self.given.len());
            let new = text[self.given.len()..until].to_string();
            self.given.push_str(&new);
            new
        } else if whole || self.window.len() > LONG {
            // Only in invalid UTF-8: the window reads differently now than when its beginning was given out.
            let new = self.text(self.open);
            self.restart();
            return some(new);
        } else {
            return None; // a longer run of bytes may yet read as before
        };
        if whole {
            self.window.drain(..self.open);
            self.open = self.window.len();
            self.given = self.text(0);
        } else {
            self.open = self.open.max(self.window.len().saturating_sub(3));
            if self.window.len() > LONG {
                self.shorten(&text);
            }
        }
        some(new)
    }

    /// The rest, after the last token: half a character comes out as `�`.
    pub fn finish(&mut self) -> Option<String> {
        let text = self.text(0);
        let rest = match text.strip_prefix(&self.given) {
            Some(rest) => rest.to_string(),
            None => self.text(self.open),
        };
        self.window.clear();
        self.restart();
        some(rest)
    }

    fn text(&self, from: usize) -> String {
        // Decoding fails for no ids that a model can give; a token that cannot be decoded has no text.
        self.tokenizer.decode(&self.window[from..], false).unwrap_or_default()
    }

    fn restart(&mut self) {
        self.window.drain(..self.open.min(self.window.len()));
        if self.window.len() > LONG {
            self.window.clear();
        }
        self.open = self.window.len();
        self.given = self.text(0);
    }

    /// Some vocabularies have tokens that all end in the middle of a character: the window then finds no end, and loses
    /// its beginning instead, as soon as its end reads the same without it.
    fn shorten(&mut self, text: &str) {
        let cut = self.window.len() - KEPT;
        let shorter = self.text(cut);
        if let Some(given) = shorter.strip_suffix(&text[self.given.len()..]) {
            self.given = given.to_string();
            self.open = self.open.saturating_sub(cut);
            self.window.drain(..cut);
        } else if self.window.len() > LONGEST {
            self.window.clear();
            self.restart();
        }
    }
}

fn some(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

/// Finds the first stop string in a text that comes in pieces.
///
/// "First" is the one that is complete first, reading character by character; among those complete at the same place,
/// the longest. So the answer does not depend on where the pieces are cut, and no text is withheld for a match
/// that can no longer win.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    stops: Vec<Stop>,
    include: bool,
    /// Not given out: as long as the longest beginning of a stop string that the text ends with.
    held: String,
    stopped: bool,
}

#[derive(Debug, Clone)]
struct Stop {
    text: String,
    /// `fallback[i]`: length of the longest proper prefix of `text[..=i]` that is its suffix (Knuth-Morris-Pratt).
    fallback: Vec<usize>,
    /// How many bytes of `text` the text so far ends with.
    matched: usize,
}

/// What a piece of text gave.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StopStep {
    pub text: String,
    /// The stop string that ended the text.
    pub stopped: Option<String>,
}

impl Stop {
    fn new(text: &str) -> Self {
        let bytes = text.as_bytes();
        let mut fallback = vec![0; bytes.len()];
        let mut matched = 0;
        for i in 1..bytes.len() {
            while matched > 0 && bytes[i] != bytes[matched] {
                matched = fallback[matched - 1];
            }
            if bytes[i] == bytes[matched] {
                matched += 1;
            }
            fallback[i] = matched;
        }
        Self { text: text.into(), fallback, matched: 0 }
    }

    /// Whether the text ends with the stop string after this byte. Not called again once it does.
    fn push(&mut self, byte: u8) -> bool {
        let bytes = self.text.as_bytes();
        while self.matched > 0 && byte != bytes[self.matched] {
            self.matched = self.fallback[self.matched - 1];
        }
        if byte == bytes[self.matched] {
            self.matched += 1;
        }
        self.matched == bytes.len()
    }
}

impl StopMatcher {
    /// Empty stop strings are left out (they would stop everything; [`super::SamplingParams::validate`] refuses them).
    /// `include` keeps the stop string in the text.
    pub fn new(stops: &[String], include: bool) -> Self {
        let stops = stops.iter().filter(|stop| !stop.is_empty()).map(|stop| Stop::new(stop)).collect();
        Self { stops, include, held: String::new(), stopped: false }
    }

    /// Takes the next piece. After a stop nothing more comes out.
    pub fn push(&mut self, piece: &str) -> StopStep {
        if self.stopped {
            return StopStep::default();
        }
        self.held.push_str(piece);
        let before = self.held.len() - piece.len();
        for (i, byte) in piece.bytes().enumerate() {
            // Every matcher takes the byte, then the longest of the complete ones wins.
            let mut found: Option<&str> = None;
            for stop in &mut self.stops {
                if stop.push(byte) && found.is_none_or(|other| stop.text.len() > other.len()) {
                    found = Some(&stop.text);
                }
            }
            if let Some(stop) = found {
                let stop = stop.to_string();
                let end = before + i + 1;
                self.held.truncate(if self.include { end } else { end - stop.len() });
                return StopStep { text: self.finish(), stopped: Some(stop) };
            }
        }
        // A beginning of a stop string starts and ends where characters do: both texts are UTF-8.
        let keep = self.stops.iter().map(|stop| stop.matched).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        StopStep { text: std::mem::replace(&mut self.held, rest), stopped: None }
    }

    /// The text that was withheld, after the last piece.
    pub fn finish(&mut self) -> String {
        self.stopped = true;
        std::mem::take(&mut self.held)
    }
}

/// The text of one completion: [`TextStream`] and [`StopMatcher`] in a row.
///
/// Push every generated token except the one that ended the completion by being an end-of-sequence or stop token: such
/// tokens have no text.
#[derive(Debug, Clone)]
pub struct CompletionText {
    stream: TextStream,
    stops: StopMatcher,
    text: String,
}

impl CompletionText {
    pub fn new(tokenizer: &Tokenizer, params: &super::SamplingParams) -> Self {
        Self {
            stream: TextStream::new(tokenizer, params.skip_special_tokens),
            stops: StopMatcher::new(&params.stop, params.include_stop_str_in_output),
            text: String::new(),
        }
    }

    /// Takes the next token; says so if its text completed a stop string, after which the completion is over.
    pub fn push(&mut self, token: u32) -> Option<StopReason> {
        let piece = self.stream.push(token)?;
        let step = self.stops.push(&piece);
        self.text.push_str(&step.text);
        step.stopped.map(StopReason::Text)
    }

    /// The text that is certain so far: what a stream of events may show.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The whole text, and the stop string if it was the last, till then uncertain, characters that completed one (a
    /// stop string with `�` in it can).
    pub fn finish(mut self) -> (String, Option<StopReason>) {
        let mut stopped = None;
        if let Some(piece) = self.stream.finish() {
            let step = self.stops.push(&piece);
            self.text.push_str(&step.text);
            stopped = step.stopped.map(StopReason::Text);
        }
        self.text.push_str(&self.stops.finish());
        (self.text, stopped)
    }
}
