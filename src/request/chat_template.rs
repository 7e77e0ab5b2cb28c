//! Messages → the one text that the model was trained to continue.
//!
//! In: a checkpoint folder (or what `--chat-template` says), its special tokens, messages. Out: the prompt's text, to be
//! encoded **without** special tokens, because the template writes them itself.
//!
//! Templates are Jinja as transformers runs it: `trim_blocks`, `lstrip_blocks`, `break`/`continue`, Python's string and
//! dict methods, `raise_exception`, `strftime_now`, `tojson` without HTML escapes, `{% generation %}` blocks (which mark
//! training targets and here mean nothing). The first of these is used:
//!
//! ```text
//! --chat-template FILE or string  ▸  chat_template.jinja  ▸  tokenizer_config.json: chat_template  ▸  chat_template.json
//! ```
//!
//! Guarantees: a template can read nothing but its variables, and its `raise_exception` is the user's error message.
//! Given up: tools, documents and images (refused where messages are read); `strftime_now` is UTC, and makes the prompt
//! depend on the day, as it does everywhere; a message's list of text parts reaches the template as one string, the parts
//! joined by newlines, as vLLM does for templates that take strings.

use std::error::Error as _;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, ValueKind};
use minijinja::{Environment, ErrorKind};
use serde::Serialize;
use serde_json::{Map, Value};

use super::tokenizer::{SpecialTokens, TokenizerError, read_json};

/// Why there is no prompt text.
#[derive(Debug, thiserror::Error)]
pub enum ChatTemplateError {
    #[error(
        "{folder}: no chat template (looked for chat_template.jinja, for `chat_template` in tokenizer_config.json, and \
         for chat_template.json): probably a base model. Give a template with --chat-template FILE, or send plain \
         prompts to /v1/completions"
    )]
    Missing { folder: PathBuf },
    #[error("--chat-template {given}: no such file, and not a template either (a template has a {{{{ or {{% in it)")]
    NotATemplate { given: String },
    #[error(
        "{origin}: several chat templates and none of them is called \"default\": {names}; choose one with --chat-template FILE"
    )]
    NoDefault { origin: String, names: String },
    #[error("{path}: cannot be read")]
    Read { path: PathBuf, source: io::Error },
    #[error("{origin}: {message}")]
    Malformed { origin: String, message: String },
    #[error(transparent)]
    File(#[from] TokenizerError),
    /// `raise_exception`, in the template's own words.
    #[error("the model's chat template refuses these messages: {0}")]
    Raised(String),
    #[error("{origin}: {message}")]
    Render { origin: String, message: String },
    #[error(
        "chat template argument {0:?} is taken: messages, add_generation_prompt and the special tokens are set by fulmen"
    )]
    ReservedArgument(String),
}

/// One turn. The template decides which roles there are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Message {
    pub role: String,
    pub content: String,
    /// `name` of the speaker, for templates that show it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// An earlier answer's reasoning, for templates that keep it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
}

impl Message {
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into(), name: None, reasoning_content: None }
    }

    /// From the JSON of an OpenAI message. What cannot be shown to the model is refused by name.
    pub fn from_json(value: &Value) -> Result<Self, String> {
        let Value::Object(map) = value else {
            return Err(format!("a message must be an object with role and content, got {}", kind(value)));
        };
        let mut message = Message::new("", "");
        let mut content = None;
        for (field, value) in map {
            match (field.as_str(), value) {
                ("role", Value::String(role)) => message.role = role.clone(),
                ("content", value) => content = Some(content_text(value)?),
                ("name", Value::String(name)) => message.name = Some(name.clone()),
                ("reasoning_content", Value::String(text)) => message.reasoning_content = Some(text.clone()),
                ("role" | "name" | "reasoning_content", Value::Null) if field != "role" => {}
                ("role" | "name" | "reasoning_content", other) => {
                    return Err(format!("{field} must be a string, got {}", kind(other)));
                }
                // Answers that were recorded with the OpenAI library carry these, empty.
                ("tool_calls" | "function_call" | "refusal" | "audio" | "annotations", Value::Null) => {}
                ("tool_calls" | "annotations", Value::Array(list)) if list.is_empty() => {}
                (field, _) => return Err(format!("{field} is not supported in a message")),
            }
        }
        if message.role.is_empty() {
            return Err("role is missing or empty".into());
        }
        message.content = content.ok_or("content is missing")?;
        Ok(message)
    }
}

/// A string, or a list of text parts.
fn content_text(value: &Value) -> Result<String, String> {
    let parts = match value {
        Value::String(text) => return Ok(text.clone()),
        Value::Array(parts) => parts,
        other => return Err(format!("content must be a string or a list of text parts, got {}", kind(other))),
    };
    let mut texts = Vec::new();
    for part in parts {
        match (part.get("type").and_then(Value::as_str), part.get("text").and_then(Value::as_str)) {
            (Some("text"), Some(text)) => texts.push(text),
            (Some("text"), None) => return Err("a content part of type text needs a string `text`".into()),
            (Some(other), _) => {
                return Err(format!("content parts of type {other:?} are not supported, only \"text\""));
            }
            (None, _) => return Err("a content part must be an object with type and text".into()),
        }
    }
    Ok(texts.join("\n"))
}

/// What a JSON value is, for messages.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A compiled template with the special tokens it may name.
pub struct ChatTemplate {
    environment: Environment<'static>,
    special: SpecialTokens,
    source: String,
    /// Where it came from, for messages.
    origin: String,
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatTemplate").field("origin", &self.origin).finish_non_exhaustive()
    }
}

const NAME: &str = "chat";

impl ChatTemplate {
    /// Finds the template of a folder; `given` is what `--chat-template` said: a file, or the template itself.
    pub fn open(folder: &Path, given: Option<&str>, special: &SpecialTokens) -> Result<Self, ChatTemplateError> {
        let (origin, source) = match given {
            Some(given) => find_given(given)?,
            None => find_in(folder)?,
        };
        Self::from_source(origin, &source, special.clone())
    }

    /// Compiles a template; `origin` names it in messages.
    pub fn from_source(origin: String, source: &str, special: SpecialTokens) -> Result<Self, ChatTemplateError> {
        let mut environment = Environment::new();
        let malformed = |error| ChatTemplateError::Malformed { origin: origin.clone(), message: in_words(&error) };
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(malformed)?;
        environment.set_syntax(syntax);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(Raised(message)))
        });
        environment.add_function("strftime_now", |format: String| {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
            strftime(&format, now).map_err(|message| minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_filter("tojson", tojson);
        environment.set_formatter(|out, state, value| match value.kind() {
            ValueKind::None => Ok(out.write_str("None")?), // as Python prints them
            ValueKind::Bool => Ok(out.write_str(if value.is_true() { "True" } else { "False" })?),
            _ => minijinja::escape_formatter(out, state, value),
        });
        environment.add_template_owned(NAME, without_generation_blocks(source)).map_err(malformed)?;
        Ok(Self { environment, special, source: source.to_owned(), origin })
    }

    /// The prompt's text. `add_generation_prompt` opens the assistant's turn; `arguments` are further variables
    /// (`enable_thinking`), which a template that does not know them ignores.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        arguments: &Map<String, Value>,
    ) -> Result<String, ChatTemplateError> {
        let mut variables = Map::new();
        variables.insert("tools".into(), Value::Null);
        variables.insert("documents".into(), Value::Null);
        let settable = |name: &str| !RESERVED.contains(&name) && self.special.get(name).is_none();
        for (name, value) in arguments {
            if !settable(name) {
                return Err(ChatTemplateError::ReservedArgument(name.clone()));
            }
            variables.insert(name.clone(), value.clone());
        }
        variables.extend(self.special.iter().map(|(name, text)| (name.to_string(), Value::from(text))));
        variables.insert("add_generation_prompt".into(), add_generation_prompt.into());
        let failed = |message: String| ChatTemplateError::Render { origin: self.origin.clone(), message };
        let messages = serde_json::to_value(messages).map_err(|error| failed(error.to_string()))?;
        variables.insert("messages".into(), messages);

        let template = self.environment.get_template(NAME).map_err(|error| failed(in_words(&error)))?;
        template.render(minijinja::Value::from(Serde(variables))).map_err(|error| match raised(&error) {
            Some(message) => ChatTemplateError::Raised(message),
            None => failed(in_words(&error)),
        })
    }

    /// The template itself.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Where the template came from.
    pub fn origin(&self) -> &str {
        &self.origin
    }
}

const RESERVED: [&str; 4] = ["messages", "add_generation_prompt", "tools", "documents"];

fn find_given(given: &str) -> Result<(String, String), ChatTemplateError> {
    let path = Path::new(given);
    match std::fs::read_to_string(path) {
        Ok(source) => Ok((given.into(), source)),
        Err(_) if given.contains("{{") || given.contains("{%") => Ok(("--chat-template".into(), given.into())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(ChatTemplateError::NotATemplate { given: given.into() })
        }
        Err(source) => Err(ChatTemplateError::Read { path: path.into(), source }),
    }
}

fn find_in(folder: &Path) -> Result<(String, String), ChatTemplateError> {
    let path = folder.join("chat_template.jinja");
    match std::fs::read_to_string(&path) {
        Ok(source) => return Ok((path.display().to_string(), source)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(source) => return Err(ChatTemplateError::Read { path, source }),
    }
    for file in ["tokenizer_config.json", "chat_template.json"] {
        let path = folder.join(file);
        let Some(config) = read_json(&path)? else { continue };
        let origin = format!("{}: chat_template", path.display());
        match config.get("chat_template") {
            None | Some(Value::Null) => {}
            Some(Value::String(source)) => return Ok((origin, source.clone())),
            Some(Value::Array(list)) => return default_of(list, origin),
            Some(other) => {
                let message = format!("needs a string or a list of named templates, is {}", kind(other));
                return Err(ChatTemplateError::Malformed { origin, message });
            }
        }
    }
    Err(ChatTemplateError::Missing { folder: folder.into() })
}

/// `[{"name": "default", "template": …}, {"name": "tool_use", …}]`
fn default_of(list: &[Value], origin: String) -> Result<(String, String), ChatTemplateError> {
    let mut names = Vec::new();
    for entry in list {
        let (Some(name), Some(template)) =
            (entry.get("name").and_then(Value::as_str), entry.get("template").and_then(Value::as_str))
        else {
            let message = "a named template needs a string `name` and a string `template`".into();
            return Err(ChatTemplateError::Malformed { origin, message });
        };
        if name == "default" {
            return Ok((origin, template.into()));
        }
        names.push(name);
    }
    Err(ChatTemplateError::NoDefault { origin, names: names.join(", ") })
}

/// Travels from `raise_exception` through the interpreter's error.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raised(error: &minijinja::Error) -> Option<String> {
    let mut source = error.source();
    while let Some(error) = source {
        if let Some(Raised(message)) = error.downcast_ref() {
            return Some(message.clone());
        }
        source = error.source();
    }
    None
}

/// The interpreter's error without its debugging print-out.
fn in_words(error: &minijinja::Error) -> String {
    let mut words = match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    };
    if let Some(line) = error.line() {
        words += &format!(" (template line {line})");
    }
    words
}

/// `{% generation %}` … `{% endgeneration %}`, transformers' mark for training, becomes `{% if true %}` … `{% endif %}`.
fn without_generation_blocks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start + 2);
        out.push_str(before);
        rest = tag;
        let Some(end) = tag.find("%}") else { break };
        let inside = &tag[..end];
        let word = inside.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim();
        let instead = match word {
            "generation" => "if true",
            "endgeneration" => "endif",
            _ => continue,
        };
        out.push_str(&inside.replacen(word, instead, 1));
        rest = &tag[end..];
    }
    out.push_str(rest);
    out
}

/// Python's `json.dumps(value, ensure_ascii=False)`: `, ` and `: ` between, and nothing escaped for HTML.
fn tojson(value: minijinja::Value, options: Kwargs) -> Result<minijinja::Value, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    let _: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let failed = |error: serde_json::Error| minijinja::Error::new(ErrorKind::BadSerialization, error.to_string());
    let mut bytes = Vec::new();
    match indent {
        Some(indent) => {
            let spaces = " ".repeat(indent.min(64));
            let formatter = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, formatter)).map_err(failed)?;
        }
        None => {
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, OneLine)).map_err(failed)?;
        }
    }
    let text = String::from_utf8(bytes)
        .map_err(|_| minijinja::Error::new(ErrorKind::BadSerialization, "serde_json wrote bytes that are not UTF-8"))?;
    Ok(minijinja::Value::from_safe_string(text))
}

struct OneLine;

impl serde_json::ser::Formatter for OneLine {
    fn begin_array_value<W: io::Write + ?Sized>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: io::Write + ?Sized>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: io::Write + ?Sized>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// The directives of strftime that templates use, in UTC, in English; any other is an error.
fn strftime(format: &str, seconds_since_1970: u64) -> Result<String, String> {
    let (days, second) = (seconds_since_1970 / 86_400, seconds_since_1970 % 86_400);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let (year, month, day) = civil(days);
    let weekday = ((days + 4) % 7) as usize; // 1970-01-01 was a Thursday
    let hour12 = (hour + 11) % 12 + 1;
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next();
        let unpadded = directive == Some('-');
        if unpadded {
            directive = chars.next();
        }
        let two = |n: u64| if unpadded { n.to_string() } else { format!("{n:02}") };
        out += &match directive {
            Some('Y') => year.to_string(),
            Some('y') => two(year % 100),
            Some('m') => two(month as u64 + 1),
            Some('B') => MONTHS[month].into(),
            Some('b') => MONTHS[month][..3].into(),
            Some('d') => two(day),
            Some('e') => format!("{day:2}"),
            Some('A') => DAYS[weekday].into(),
            Some('a') => DAYS[weekday][..3].into(),
            Some('H') => two(hour),
            Some('I') => two(hour12),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.into(),
            Some('M') => two(minute),
            Some('S') => two(second),
            Some('F') => format!("{year}-{:02}-{day:02}", month + 1),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('Z') => "UTC".into(),
            Some('z') => "+0000".into(),
            Some('%') => "%".into(),
            Some(other) => return Err(format!("strftime_now: %{other} is not supported")),
            None => return Err("strftime_now: the format ends with %".into()),
        };
    }
    Ok(out)
}

/// Days since 1970-01-01 → year, month (0 = January), day of the month.
fn civil(days: u64) -> (u64, usize, u64) {
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let (mut year, mut left) = (1970, days);
    while left >= 365 + u64::from(leap(year)) {
        left -= 365 + u64::from(leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while left >= lengths[month] {
        left -= lengths[month];
        month += 1;
    }
    (year, month, left + 1)
}

#[cfg(test)]
mod tests {
    use super::strftime;

    #[test]
    fn dates() {
        let at = |format, seconds| strftime(format, seconds).unwrap();
        assert_eq!(at("%d %b %Y", 0), "01 Jan 1970");
        assert_eq!(at("%A %-d %B %Y, %H:%M:%S (%I %p)", 1_709_210_096), "Thursday 29 February 2024, 12:34:56 (12 PM)");
        assert_eq!(at("%F %a", 4_102_444_799), "2099-12-31 Thu");
        assert!(strftime("%q", 0).unwrap_err().contains("%q"));
        assert!(strftime("%", 0).is_err());
    }
}
