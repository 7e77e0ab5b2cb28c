//! The batch file: requests in, results out, one JSON object a line (the OpenAI Batch dialect).
//!
//! ```text
//! {"custom_id":"a","method":"POST","url":"/v1/completions","body":{"prompt":"Hi","max_tokens":8}}           in
//! {"id":"batch_req_…","custom_id":"a","response":{"status_code":200,"request_id":"…","body":{…}},"error":null}      out
//! {"id":"batch_req_…","custom_id":"b","response":null,"error":{"code":"…","message":"…","line":2}}                  out
//! ```
//!
//! In: bytes from anywhere ([`BatchReader`]), the checkpoint's generation_config.json ([`GenerationDefaults`]). Out:
//! [`BatchLine`]s to be made [`Request`]s, and [`OutputLine`]s appended by a [`ResultWriter`] in the order in which they
//! finish. `/v1/chat/completions` and `/v1/completions` may be mixed in one file; without `url` the body tells which is
//! meant; any `model` is accepted, and the one that answered is reported.
//!
//! Guarantees:
//! - A bad line becomes an error line with its number; the others run. No bytes make the reader panic or keep more than
//!   one line (of at most [`MAX_LINE_BYTES`]) and 16 bytes per `custom_id`.
//! - **Nothing is ignored**: a field that fulmen does not know, or cannot honour, is an error that names it. Exceptions:
//!   values that ask for nothing (`"stream": false`, `"tools": []`, null for a known field) and labels for the
//!   provider's books (`user`, `metadata`, `safety_identifier`, `prompt_cache_key`).
//! - Results survive a killed process: each line is one write, the disk is synchronised every few seconds, and
//!   [`Existing::Resume`] reads back what is finished and removes a torn last line. An error line counts as finished.
//! - The same request gives the same line, but for `created`: ids are hashes of the `custom_id`.
//!
//! Given up: a list of several prompts in one line (write one line for each), files with both the same `custom_id` twice
//! in *different* shards (each shard sees its own lines), and keys repeated within one JSON object (the last one counts,
//! as in Python).

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::chat_template::{ChatTemplate, ChatTemplateError, Message, kind};
use super::sampler::hash;
use super::tokenizer::{Tokenizer, TokenizerError, read_json};
use super::{
    Completion, FinishReason, PositionLogprobs, Request, RequestError, SamplingParams, StopReason, TokenLogprob,
};

/// A longer line is an error line.
pub const MAX_LINE_BYTES: usize = 64 << 20;

// ---------------------------------------------------------------------------------------------------- one line

/// Where a request would be posted to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endpoint {
    Chat,
    Completions,
}

impl Endpoint {
    pub fn url(self) -> &'static str {
        match self {
            Endpoint::Chat => "/v1/chat/completions",
            Endpoint::Completions => "/v1/completions",
        }
    }
}

/// What is wrong with a line, for programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LineErrorCode {
    InvalidJson,
    LineTooLong,
    InvalidCustomId,
    DuplicateCustomId,
    InvalidMethod,
    InvalidUrl,
    UnknownField,
    UnsupportedField,
    InvalidValue,
    /// The chat template refused the messages, or there is none.
    ChatTemplate,
}

impl LineErrorCode {
    /// The `code` of an error line; OpenAI's word where it has one.
    pub fn as_str(self) -> &'static str {
        match self {
            LineErrorCode::InvalidJson => "invalid_json_line",
            LineErrorCode::LineTooLong => "line_too_long",
            LineErrorCode::InvalidCustomId => "invalid_custom_id",
            LineErrorCode::DuplicateCustomId => "duplicate_custom_id",
            LineErrorCode::InvalidMethod => "invalid_method",
            LineErrorCode::InvalidUrl => "invalid_url",
            LineErrorCode::UnknownField => "unknown_parameter",
            LineErrorCode::UnsupportedField => "unsupported_parameter",
            LineErrorCode::InvalidValue => "invalid_request",
            LineErrorCode::ChatTemplate => "chat_template",
        }
    }
}

/// A line that cannot run.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("line {line_number}{}: {message}", custom_id.as_ref().map(|id| format!(" ({id})")).unwrap_or_default())]
pub struct LineError {
    /// From 1, blank lines counted.
    pub line_number: u64,
    pub custom_id: Option<String>,
    pub code: LineErrorCode,
    pub message: String,
}

/// One request of the file, every field checked as far as that is possible without the model.
#[derive(Debug, Clone, PartialEq)]
pub struct BatchLine {
    /// From 1, blank lines counted.
    pub line_number: u64,
    pub custom_id: String,
    pub body: Body,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Body {
    Chat(ChatBody),
    Completions(CompletionsBody),
}

#[derive(Debug, Clone, PartialEq)]
pub struct ChatBody {
    pub model: Option<String>,
    pub messages: Vec<Message>,
    pub add_generation_prompt: bool,
    /// `chat_template_kwargs`: further variables of the template.
    pub template_arguments: Map<String, Value>,
    pub sampling: SamplingFields,
}

#[derive(Debug, Clone, PartialEq)]
pub struct CompletionsBody {
    pub model: Option<String>,
    pub prompt: Prompt,
    /// Put the prompt's text in front of each choice's.
    pub echo: bool,
    /// Put what the tokenizer puts around a text (`<s>`) around a text prompt.
    pub add_special_tokens: bool,
    pub sampling: SamplingFields,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
}

/// The fields of [`SamplingParams`] that a request gave.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SamplingFields {
    pub n: Option<usize>,
    pub temperature: Option<f32>,
    pub top_k: Option<usize>,
    pub top_p: Option<f32>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
    pub presence_penalty: Option<f32>,
    pub frequency_penalty: Option<f32>,
    pub seed: Option<u64>,
    pub stop: Vec<String>,
    pub stop_token_ids: Vec<u32>,
    pub include_stop_str_in_output: Option<bool>,
    pub ignore_eos: Option<bool>,
    pub max_tokens: Option<usize>,
    pub min_tokens: Option<usize>,
    pub logprobs: Option<usize>,
    pub logit_bias: Vec<(u32, f32)>,
    pub skip_special_tokens: Option<bool>,
}

/// What is wrong, before it is known where.
#[derive(Debug)]
struct Fault {
    code: LineErrorCode,
    message: String,
}

fn fault<T>(code: LineErrorCode, message: impl Into<String>) -> Result<T, Fault> {
    Err(Fault { code, message: message.into() })
}

fn invalid<T>(message: impl Into<String>) -> Result<T, Fault> {
    fault(LineErrorCode::InvalidValue, message)
}

impl BatchLine {
    /// Reads one line, without its line end.
    pub fn parse(line_number: u64, line: &[u8]) -> Result<Self, LineError> {
        let mut custom_id = None;
        match parse_line(line, &mut custom_id) {
            Ok(body) => Ok(Self { line_number, custom_id: custom_id.unwrap_or_default(), body }),
            Err(Fault { code, message }) => Err(LineError { line_number, custom_id, code, message }),
        }
    }

    pub fn endpoint(&self) -> Endpoint {
        self.body.endpoint()
    }

    /// This line as a faulty one.
    pub fn error(&self, code: LineErrorCode, message: impl Into<String>) -> LineError {
        let custom_id = Some(self.custom_id.clone());
        LineError { line_number: self.line_number, custom_id, code, message: message.into() }
    }

    /// The request's fields, else the checkpoint's, else vLLM's.
    pub fn to_sampling(&self, defaults: &GenerationDefaults) -> Result<SamplingParams, LineError> {
        self.body.to_sampling(defaults).map_err(|message| self.error(LineErrorCode::InvalidValue, message))
    }

    /// The line as a prompt of tokens. `template` is needed by chat lines only: hand over why there is none.
    /// `vocab` = entries of a row of logits.
    pub fn to_request(
        &self,
        tokenizer: &Tokenizer,
        template: Result<&ChatTemplate, &ChatTemplateError>,
        defaults: &GenerationDefaults,
        vocab: usize,
    ) -> Result<Request, LineError> {
        let value = |message: String| self.error(LineErrorCode::InvalidValue, message);
        let encode = |text: &str, special: bool| {
            tokenizer.encode(text, special).map_err(|error: TokenizerError| value(error.to_string()))
        };
        let params = self.to_sampling(defaults)?;
        params.validate(vocab).map_err(value)?;
        let prompt = match &self.body {
            Body::Chat(chat) => {
                let refused = |error: &ChatTemplateError| self.error(LineErrorCode::ChatTemplate, error.to_string());
                let text = template
                    .map_err(refused)?
                    .render(&chat.messages, chat.add_generation_prompt, &chat.template_arguments)
                    .map_err(|error| refused(&error))?;
                encode(&text, false)?
            }
            Body::Completions(completions) => match &completions.prompt {
                Prompt::Text(text) => encode(text, completions.add_special_tokens)?,
                Prompt::Tokens(tokens) => {
                    if let Some(token) = tokens.iter().find(|&&token| token as usize >= vocab) {
                        let message =
                            format!("prompt: token id {token} is out of vocabulary: the model has {vocab} tokens");
                        return Err(value(message));
                    }
                    tokens.clone()
                }
            },
        };
        if prompt.is_empty() {
            return Err(value("the prompt has no tokens".into()));
        }
        Ok(Request { custom_id: self.custom_id.clone(), prompt, params })
    }
}

impl Body {
    pub fn endpoint(&self) -> Endpoint {
        match self {
            Body::Chat(_) => Endpoint::Chat,
            Body::Completions(_) => Endpoint::Completions,
        }
    }

    pub fn sampling(&self) -> &SamplingFields {
        match self {
            Body::Chat(chat) => &chat.sampling,
            Body::Completions(completions) => &completions.sampling,
        }
    }

    /// The request's fields, else the checkpoint's, else vLLM's; checked but for token ids.
    pub fn to_sampling(&self, defaults: &GenerationDefaults) -> Result<SamplingParams, String> {
        let given = self.sampling();
        let otherwise = SamplingParams::default();
        let until = match self.endpoint() {
            Endpoint::Chat => None,
            Endpoint::Completions => otherwise.max_tokens,
        };
        let params = SamplingParams {
            n: given.n.unwrap_or(otherwise.n),
            temperature: given.temperature.or(defaults.temperature).unwrap_or(otherwise.temperature),
            top_k: given.top_k.or(defaults.top_k).unwrap_or(otherwise.top_k),
            top_p: given.top_p.or(defaults.top_p).unwrap_or(otherwise.top_p),
            min_p: given.min_p.or(defaults.min_p).unwrap_or(otherwise.min_p),
            repetition_penalty: given
                .repetition_penalty
                .or(defaults.repetition_penalty)
                .unwrap_or(otherwise.repetition_penalty),
            presence_penalty: given.presence_penalty.unwrap_or(otherwise.presence_penalty),
            frequency_penalty: given.frequency_penalty.unwrap_or(otherwise.frequency_penalty),
            seed: given.seed.unwrap_or(defaults.seed),
            stop: given.stop.clone(),
            stop_token_ids: given.stop_token_ids.clone(),
            include_stop_str_in_output: given.include_stop_str_in_output.unwrap_or(false),
            ignore_eos: given.ignore_eos.unwrap_or(false),
            max_tokens: given.max_tokens.or(defaults.max_new_tokens).or(until),
            min_tokens: given.min_tokens.unwrap_or(0),
            logprobs: given.logprobs,
            logit_bias: given.logit_bias.clone(),
            skip_special_tokens: given.skip_special_tokens.unwrap_or(true),
        };
        params.validate_values()?;
        Ok(params)
    }

    /// What `echo` puts in front of each choice.
    fn echo(&self, tokenizer: &Tokenizer) -> String {
        match self {
            Body::Completions(CompletionsBody { echo: true, prompt: Prompt::Text(text), .. }) => text.clone(),
            Body::Completions(CompletionsBody { echo: true, prompt: Prompt::Tokens(tokens), .. }) => {
                tokenizer.decode(tokens, true).unwrap_or_default()
            }
            _ => String::new(),
        }
    }
}

fn parse_line(line: &[u8], custom_id: &mut Option<String>) -> Result<Body, Fault> {
    let text = std::str::from_utf8(line).map_err(|error| Fault {
        code: LineErrorCode::InvalidJson,
        message: format!("not UTF-8 at byte {} of the line", error.valid_up_to()),
    })?;
    let value: Value = serde_json::from_str(text)
        .map_err(|error| Fault { code: LineErrorCode::InvalidJson, message: format!("not JSON: {error}") })?;
    let Value::Object(map) = value else {
        return fault(LineErrorCode::InvalidJson, format!("needs a JSON object, is {}", kind(&value)));
    };
    let mut fields = Fields(map);
    match fields.take("custom_id") {
        Some(Value::String(id)) if !id.is_empty() => *custom_id = Some(id),
        Some(Value::String(_)) => return fault(LineErrorCode::InvalidCustomId, "custom_id is empty"),
        Some(other) => {
            return fault(LineErrorCode::InvalidCustomId, format!("custom_id must be a string, got {}", kind(&other)));
        }
        None => return fault(LineErrorCode::InvalidCustomId, "custom_id is missing"),
    }
    match fields.take("method") {
        None => {}
        Some(Value::String(method)) if method == "POST" => {}
        Some(other) => return fault(LineErrorCode::InvalidMethod, format!("method must be \"POST\", got {other}")),
    }
    let url = fields.take("url");
    let body = match fields.take("body") {
        Some(Value::Object(body)) => body,
        Some(other) => return invalid(format!("body must be an object, got {}", kind(&other))),
        None => return invalid("body is missing"),
    };
    fields.finish("beside custom_id, method, url and body")?;
    let endpoint = match url {
        Some(Value::String(url)) if url == Endpoint::Chat.url() => Endpoint::Chat,
        Some(Value::String(url)) if url == Endpoint::Completions.url() => Endpoint::Completions,
        Some(other) => {
            let (chat, completions) = (Endpoint::Chat.url(), Endpoint::Completions.url());
            return fault(LineErrorCode::InvalidUrl, format!("url must be {chat:?} or {completions:?}, got {other}"));
        }
        None => match (body.contains_key("messages"), body.contains_key("prompt")) {
            (true, false) => Endpoint::Chat,
            (false, true) => Endpoint::Completions,
            (true, true) => {
                return invalid("body has both messages (chat) and prompt (completions): say which with url");
            }
            (false, false) => return invalid("body has neither messages (chat) nor prompt (completions)"),
        },
    };
    let body = parse_body(endpoint, Fields(body))?;
    // Out-of-range values are found here, before any model is at hand.
    match body.to_sampling(&GenerationDefaults::default()) {
        Ok(_) => Ok(body),
        Err(message) => invalid(message),
    }
}

fn parse_body(endpoint: Endpoint, mut fields: Fields) -> Result<Body, Fault> {
    let model = fields.string("model")?;
    let mut sampling = parse_sampling(&mut fields)?;
    let body = match endpoint {
        Endpoint::Chat => {
            let messages = match fields.take("messages") {
                Some(Value::Array(messages)) if !messages.is_empty() => messages,
                Some(Value::Array(_)) => return invalid("messages is empty"),
                Some(other) => return invalid(format!("messages must be a list, got {}", kind(&other))),
                None => return invalid("messages is missing"),
            };
            let mut turns = Vec::with_capacity(messages.len());
            for (i, message) in messages.iter().enumerate() {
                match Message::from_json(message) {
                    Ok(turn) => turns.push(turn),
                    Err(message) => return invalid(format!("messages[{i}]: {message}")),
                }
            }
            let template_arguments = match fields.take("chat_template_kwargs") {
                None => Map::new(),
                Some(Value::Object(map)) => map,
                Some(other) => return invalid(format!("chat_template_kwargs must be an object, got {}", kind(&other))),
            };
            let logprobs = fields.boolean("logprobs")?.unwrap_or(false);
            let top_logprobs = fields.count("top_logprobs")?;
            if !logprobs && top_logprobs.is_some_and(|top| top > 0) {
                return invalid("top_logprobs needs logprobs: true");
            }
            sampling.logprobs = logprobs.then(|| top_logprobs.unwrap_or(0));
            // The newer name wins nothing: two names for one number must agree.
            if let Some(newer) = fields.count("max_completion_tokens")? {
                if sampling.max_tokens.is_some_and(|older| older != newer) {
                    return invalid("max_tokens and max_completion_tokens differ");
                }
                sampling.max_tokens = Some(newer);
            }
            let add_generation_prompt = fields.boolean("add_generation_prompt")?.unwrap_or(true);
            Body::Chat(ChatBody { model, messages: turns, add_generation_prompt, template_arguments, sampling })
        }
        Endpoint::Completions => {
            let prompt = parse_prompt(fields.take("prompt"))?;
            sampling.logprobs = fields.count("logprobs")?;
            let echo = fields.boolean("echo")?.unwrap_or(false);
            if echo && sampling.logprobs.is_some() {
                let message = "echo with logprobs is not supported: the prompt's log-probabilities are not computed";
                return fault(LineErrorCode::UnsupportedField, message);
            }
            let add_special_tokens = fields.boolean("add_special_tokens")?.unwrap_or(true);
            Body::Completions(CompletionsBody { model, prompt, echo, add_special_tokens, sampling })
        }
    };
    for label in ["user", "safety_identifier", "prompt_cache_key"] {
        fields.string(label)?;
    }
    match fields.take("metadata") {
        None | Some(Value::Object(_)) => {}
        Some(other) => return invalid(format!("metadata must be an object, got {}", kind(&other))),
    }
    fields.refuse_unsupported()?;
    fields.finish(&format!("of {}", endpoint.url()))?;
    Ok(body)
}

fn parse_sampling(fields: &mut Fields) -> Result<SamplingFields, Fault> {
    Ok(SamplingFields {
        n: fields.count("n")?,
        temperature: fields.number("temperature")?,
        top_k: match fields.take("top_k") {
            Some(Value::Number(k)) if k.as_i64() == Some(-1) => Some(0), // vLLM's older word for "all"
            Some(value) => Some(count("top_k", &value)?),
            None => None,
        },
        top_p: fields.number("top_p")?,
        min_p: fields.number("min_p")?,
        repetition_penalty: fields.number("repetition_penalty")?,
        presence_penalty: fields.number("presence_penalty")?,
        frequency_penalty: fields.number("frequency_penalty")?,
        seed: match fields.take("seed") {
            None => None,
            Some(value) => match value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned)) {
                Some(seed) => Some(seed),
                None => return invalid(format!("seed must be an integer of 64 bits, got {value}")),
            },
        },
        stop: match fields.take("stop") {
            None => Vec::new(),
            Some(Value::String(stop)) => vec![stop],
            Some(Value::Array(stops)) => {
                let strings = stops.iter().map(|stop| stop.as_str().map(String::from)).collect::<Option<_>>();
                match strings {
                    Some(strings) => strings,
                    None => return invalid("stop must be a string or a list of strings"),
                }
            }
            Some(other) => return invalid(format!("stop must be a string or a list of strings, got {}", kind(&other))),
        },
        stop_token_ids: match fields.take("stop_token_ids") {
            None => Vec::new(),
            Some(Value::Array(ids)) => token_ids("stop_token_ids", &ids)?,
            Some(other) => return invalid(format!("stop_token_ids must be a list of token ids, got {}", kind(&other))),
        },
        include_stop_str_in_output: fields.boolean("include_stop_str_in_output")?,
        ignore_eos: fields.boolean("ignore_eos")?,
        max_tokens: fields.count("max_tokens")?,
        min_tokens: fields.count("min_tokens")?,
        logprobs: None, // chat and completions each have their own
        logit_bias: match fields.take("logit_bias") {
            None => Vec::new(),
            Some(Value::Object(map)) => parse_logit_bias(&map)?,
            Some(other) => {
                return invalid(format!("logit_bias must be an object of token id: bias, got {}", kind(&other)));
            }
        },
        skip_special_tokens: fields.boolean("skip_special_tokens")?,
    })
}

fn parse_logit_bias(map: &Map<String, Value>) -> Result<Vec<(u32, f32)>, Fault> {
    let mut biases = Vec::with_capacity(map.len());
    for (key, value) in map {
        let Some(token) = key.parse::<u32>().ok().filter(|token| token.to_string() == *key) else {
            return invalid(format!("logit_bias: {key:?} is not a token id"));
        };
        let Some(bias) = value.as_f64() else {
            return invalid(format!("logit_bias: the bias of token {token} must be a number, got {}", kind(value)));
        };
        biases.push((token, bias as f32));
    }
    Ok(biases)
}

fn parse_prompt(value: Option<Value>) -> Result<Prompt, Fault> {
    let list = match value {
        None => return invalid("prompt is missing"),
        Some(Value::String(text)) if text.is_empty() => return invalid("prompt is empty"),
        Some(Value::String(text)) => return Ok(Prompt::Text(text)),
        Some(Value::Array(list)) => list,
        Some(other) => {
            return invalid(format!("prompt must be a string or a list of token ids, got {}", kind(&other)));
        }
    };
    match list.first() {
        None => invalid("prompt is empty"),
        Some(Value::Number(_)) => Ok(Prompt::Tokens(token_ids("prompt", &list)?)),
        Some(Value::String(_) | Value::Array(_)) if list.len() > 1 => fault(
            LineErrorCode::UnsupportedField,
            format!("prompt is a list of {} prompts: write one line for each", list.len()),
        ),
        // A list of one prompt is that prompt; nested deeper it is not.
        Some(one @ Value::String(_)) => parse_prompt(Some(one.clone())),
        Some(Value::Array(ids)) if ids.is_empty() => invalid("prompt is empty"),
        Some(Value::Array(ids)) => Ok(Prompt::Tokens(token_ids("prompt", ids)?)),
        Some(other) => {
            invalid(format!("prompt must be a string or a list of token ids, got a list with {}", kind(other)))
        }
    }
}

fn token_ids(field: &str, values: &[Value]) -> Result<Vec<u32>, Fault> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match values.iter().find(|value| id(value).is_none()) {
        Some(wrong) => invalid(format!("{field}: {} is not a token id", shortened(wrong))),
        None => Ok(values.iter().filter_map(id).collect()),
    }
}

fn count(field: &str, value: &Value) -> Result<usize, Fault> {
    match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
        Some(n) => Ok(n),
        None => invalid(format!("{field} must be an integer of at least 0, got {}", shortened(value))),
    }
}

/// A value as JSON, for a message.
fn shortened(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((cut, _)) => format!("{}…", &text[..cut]),
        None => text,
    }
}

/// An object whose fields are taken out one by one; null counts as not given.
struct Fields(Map<String, Value>);

impl Fields {
    fn take(&mut self, name: &str) -> Option<Value> {
        self.0.shift_remove(name).filter(|value| !value.is_null())
    }

    fn string(&mut self, name: &str) -> Result<Option<String>, Fault> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => invalid(format!("{name} must be a string, got {}", kind(&other))),
        }
    }

    fn boolean(&mut self, name: &str) -> Result<Option<bool>, Fault> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(yes)) => Ok(Some(yes)),
            Some(other) => invalid(format!("{name} must be true or false, got {}", shortened(&other))),
        }
    }

    fn number(&mut self, name: &str) -> Result<Option<f32>, Fault> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Number(number)) => Ok(number.as_f64().map(|number| number as f32)),
            Some(other) => invalid(format!("{name} must be a number, got {}", kind(&other))),
        }
    }

    fn count(&mut self, name: &str) -> Result<Option<usize>, Fault> {
        self.take(name).map(|value| count(name, &value)).transpose()
    }

    /// Fields that OpenAI or vLLM know and fulmen does not: let through where their value asks for nothing.
    fn refuse_unsupported(&mut self) -> Result<(), Fault> {
        for &(name, asks_for_nothing, why) in UNSUPPORTED {
            if let Some(value) = self.take(name)
                && !asks_for_nothing(&value)
            {
                let message = format!("{name}: {} is not supported{why}", shortened(&value));
                return fault(LineErrorCode::UnsupportedField, message);
            }
        }
        Ok(())
    }

    /// What is left has not been asked for by anybody.
    fn finish(self, of: &str) -> Result<(), Fault> {
        let names: Vec<String> = self.0.keys().take(8).map(|name| format!("{:?}", shortened_name(name))).collect();
        match names.as_slice() {
            [] => Ok(()),
            [one] => fault(LineErrorCode::UnknownField, format!("unknown field {one} {of}")),
            many => fault(LineErrorCode::UnknownField, format!("unknown fields {} {of}", many.join(", "))),
        }
    }
}

fn shortened_name(name: &str) -> String {
    name.chars().take(60).collect()
}

/// Name, the values that ask for nothing, and what to do instead.
type Unsupported = (&'static str, fn(&Value) -> bool, &'static str);

const UNSUPPORTED: &[Unsupported] = &[
    ("stream", is_false, ": a batch file's results are lines, written when they are finished"),
    ("stream_options", never, ""),
    ("tools", is_empty, ""),
    ("tool_choice", |value| matches!(value.as_str(), Some("none" | "auto")), ""),
    ("parallel_tool_calls", Value::is_boolean, ""),
    ("functions", is_empty, ""),
    ("function_call", |value| matches!(value.as_str(), Some("none" | "auto")), ""),
    ("response_format", |value| value.get("type").and_then(Value::as_str) == Some("text"), ""),
    ("structured_outputs", never, ""),
    ("guided_json", never, ""),
    ("guided_regex", never, ""),
    ("guided_choice", never, ""),
    ("guided_grammar", never, ""),
    ("reasoning_effort", never, ": give what the template understands in chat_template_kwargs"),
    ("chat_template", never, ": one template for all lines, --chat-template"),
    ("continue_final_message", is_false, ""),
    ("documents", is_empty, ""),
    ("modalities", |value| value.as_array().is_some_and(|list| list.len() == 1 && list[0] == "text"), ""),
    ("audio", never, ""),
    ("prediction", never, ""),
    ("web_search_options", never, ""),
    ("store", is_false, ": there is no place to store completions but the output file"),
    ("service_tier", |value| matches!(value.as_str(), Some("auto" | "default")), ""),
    ("best_of", |value| *value == 1, ": ask for n completions"),
    ("suffix", |value| *value == "", ""),
    ("use_beam_search", is_false, ""),
    ("length_penalty", |value| value.as_f64() == Some(1.0), ""),
    ("early_stopping", is_false, ""),
    ("top_logprobs", |value| *value == 0, ": logprobs is the number of alternatives here"),
    ("max_completion_tokens", never, ": the name is max_tokens here"),
    ("prompt_logprobs", never, ""),
    ("echo", is_false, ""),
    ("add_special_tokens", is_false, ": the chat template writes them"),
    ("truncate_prompt_tokens", never, ": a prompt is never cut"),
    ("allowed_token_ids", never, ""),
    ("bad_words", is_empty, ""),
    ("detokenize", is_true, ""),
    ("spaces_between_special_tokens", Value::is_boolean, ""),
    ("return_token_ids", is_false, ""),
    ("return_tokens_as_token_ids", is_false, ""),
    ("repetition_detection", never, ""),
    ("thinking_token_budget", never, ""),
    ("priority", |value| *value == 0, ""),
];

fn never(_: &Value) -> bool {
    false
}

fn is_false(value: &Value) -> bool {
    *value == false
}

fn is_true(value: &Value) -> bool {
    *value == true
}

fn is_empty(value: &Value) -> bool {
    value.as_array().is_some_and(Vec::is_empty)
}

// ---------------------------------------------------------------------------------------------------- defaults

/// generation_config.json: what the checkpoint's makers recommend, and what ends a completion.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationDefaults {
    /// 0 where the file says `do_sample: false`, whose other sampling numbers then mean nothing.
    pub temperature: Option<f32>,
    pub top_k: Option<usize>,
    pub top_p: Option<f32>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
    pub max_new_tokens: Option<usize>,
    /// Together with config.json's, the tokens that end a completion.
    pub eos_token_ids: Vec<u32>,
    /// The run's seed, for requests that have none. Not in the file.
    pub seed: u64,
}

/// generation_config.json is there and unusable.
#[derive(Debug, thiserror::Error)]
pub enum GenerationConfigError {
    #[error(transparent)]
    File(#[from] TokenizerError),
    #[error("{path}: {message}")]
    Invalid { path: PathBuf, message: String },
}

impl GenerationDefaults {
    /// Reads a folder's generation_config.json; without one, no defaults. Fields for other ways of generating
    /// (`num_beams`, `max_length`, …) are not fulmen's to judge, as this is the makers' file and not the user's.
    pub fn open(folder: &Path) -> Result<Self, GenerationConfigError> {
        let path = folder.join("generation_config.json");
        let Some(value) = read_json(&path)? else { return Ok(Self::default()) };
        Self::from_json(value).map_err(|message| GenerationConfigError::Invalid { path, message })
    }

    /// From the parsed file.
    pub fn from_json(value: Value) -> Result<Self, String> {
        let Value::Object(map) = value else {
            return Err(format!("needs a JSON object, is {}", kind(&value)));
        };
        Self::from_fields(Fields(map)).map_err(|fault| fault.message)
    }

    fn from_fields(mut fields: Fields) -> Result<Self, Fault> {
        let eos_token_ids = match fields.take("eos_token_id") {
            None => Vec::new(),
            Some(Value::Array(ids)) => token_ids("eos_token_id", &ids)?,
            Some(id) => token_ids("eos_token_id", std::slice::from_ref(&id))?,
        };
        let mut defaults = Self {
            temperature: fields.number("temperature")?,
            top_k: fields.count("top_k")?,
            top_p: fields.number("top_p")?,
            min_p: fields.number("min_p")?,
            repetition_penalty: fields.number("repetition_penalty")?,
            max_new_tokens: fields.count("max_new_tokens")?,
            eos_token_ids,
            seed: 0,
        };
        if fields.boolean("do_sample")? == Some(false) {
            defaults.temperature = Some(0.0);
            (defaults.top_k, defaults.top_p, defaults.min_p) = (None, None, None);
        }
        let nothing_said = SamplingFields::default();
        let body = CompletionsBody {
            model: None,
            prompt: Prompt::Tokens(Vec::new()),
            echo: false,
            add_special_tokens: true,
            sampling: nothing_said,
        };
        match Body::Completions(body).to_sampling(&defaults) {
            Ok(_) => Ok(defaults),
            Err(message) => invalid(message),
        }
    }
}

// ---------------------------------------------------------------------------------------------------- output lines

/// One line of the output.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OutputLine {
    pub id: String,
    /// Null where the input line had none.
    pub custom_id: Option<String>,
    pub response: Option<Response>,
    pub error: Option<OutputError>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Response {
    pub status_code: u16,
    pub request_id: String,
    pub body: ResponseBody,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OutputError {
    pub code: String,
    pub message: String,
    /// Number of the input line (fulmen's extension; resuming uses it).
    pub line: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ResponseBody {
    Chat(ResponseOf<ChatChoice>),
    Completions(ResponseOf<TextChoice>),
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ResponseOf<Choice> {
    pub id: String,
    /// `chat.completion` or `text_completion`.
    pub object: String,
    /// Seconds since 1970.
    pub created: u64,
    pub model: String,
    pub choices: Vec<Choice>,
    pub usage: Usage,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    pub prompt_tokens: usize,
    pub completion_tokens: usize,
    pub total_tokens: usize,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ChatChoice {
    pub index: usize,
    pub message: ChatAnswer,
    pub logprobs: Option<ChatLogprobs>,
    pub finish_reason: String,
    /// vLLM's extension: the stop string or token.
    pub stop_reason: Option<StopReasonJson>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatAnswer {
    pub role: String,
    pub content: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TextChoice {
    pub index: usize,
    pub text: String,
    pub logprobs: Option<TextLogprobs>,
    pub finish_reason: String,
    pub stop_reason: Option<StopReasonJson>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum StopReasonJson {
    Token(u32),
    Text(String),
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ChatLogprobs {
    pub content: Vec<ChatLogprob>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ChatLogprob {
    pub token: String,
    pub logprob: f32,
    pub bytes: Vec<u8>,
    pub top_logprobs: Vec<TopLogprob>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TopLogprob {
    pub token: String,
    pub logprob: f32,
    pub bytes: Vec<u8>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TextLogprobs {
    /// Where each token begins, in characters of the choice's text.
    pub text_offset: Vec<usize>,
    pub token_logprobs: Vec<f32>,
    pub tokens: Vec<String>,
    /// The likeliest tokens and the chosen one; of tokens with the same text (parts of characters) the likeliest.
    pub top_logprobs: Vec<BTreeMap<String, f32>>,
}

/// Seconds since 1970, for `created`.
pub fn now_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

impl OutputLine {
    /// The result of a line. `model` is the name that was served, `created` see [`now_seconds`].
    pub fn success(
        line: &BatchLine,
        completions: &[Completion],
        prompt_tokens: usize,
        tokenizer: &Tokenizer,
        model: &str,
        created: u64,
    ) -> Self {
        let completion_tokens = completions.iter().map(|completion| completion.token_ids.len()).sum();
        let usage = Usage { prompt_tokens, completion_tokens, total_tokens: prompt_tokens + completion_tokens };
        let name = hex(id_hash(&line.custom_id));
        let model = model.to_string();
        let body = match line.endpoint() {
            Endpoint::Chat => ResponseBody::Chat(ResponseOf {
                id: format!("chatcmpl-{name}"),
                object: "chat.completion".into(),
                created,
                model,
                choices: completions.iter().map(|completion| chat_choice(completion, tokenizer)).collect(),
                usage,
            }),
            Endpoint::Completions => {
                let echo = line.body.echo(tokenizer);
                ResponseBody::Completions(ResponseOf {
                    id: format!("cmpl-{name}"),
                    object: "text_completion".into(),
                    created,
                    model,
                    choices: completions.iter().map(|completion| text_choice(completion, &echo, tokenizer)).collect(),
                    usage,
                })
            }
        };
        let response = Response { status_code: 200, request_id: format!("req_{name}"), body };
        let custom_id = Some(line.custom_id.clone());
        Self { id: format!("batch_req_{name}"), custom_id, response: Some(response), error: None }
    }

    /// The line of a request that the engine could not finish.
    pub fn failure(line: &BatchLine, error: &RequestError) -> Self {
        Self::error(Some(line.custom_id.clone()), line.line_number, error.code(), error.to_string())
    }

    fn error(custom_id: Option<String>, line: u64, code: &str, message: String) -> Self {
        let name = match &custom_id {
            Some(id) => hex(id_hash(id)),
            None => hex(id_hash(&format!("line {line}"))),
        };
        let error = OutputError { code: code.into(), message, line };
        Self { id: format!("batch_req_{name}"), custom_id, response: None, error: Some(error) }
    }
}

impl From<&LineError> for OutputLine {
    fn from(error: &LineError) -> Self {
        Self::error(error.custom_id.clone(), error.line_number, error.code.as_str(), error.message.clone())
    }
}

fn finish_reason(reason: FinishReason) -> String {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
    .into()
}

fn stop_reason(reason: &Option<StopReason>) -> Option<StopReasonJson> {
    reason.as_ref().map(|reason| match reason {
        StopReason::Text(text) => StopReasonJson::Text(text.clone()),
        StopReason::Token(token) => StopReasonJson::Token(*token),
    })
}

fn chat_choice(completion: &Completion, tokenizer: &Tokenizer) -> ChatChoice {
    let logprobs = completion.logprobs.as_ref().map(|positions| ChatLogprobs {
        content: positions.iter().map(|position| chat_logprob(position, tokenizer)).collect(),
    });
    ChatChoice {
        index: completion.index,
        message: ChatAnswer { role: "assistant".into(), content: completion.text.clone() },
        logprobs,
        finish_reason: finish_reason(completion.finish_reason),
        stop_reason: stop_reason(&completion.stop_reason),
    }
}

fn chat_logprob(position: &PositionLogprobs, tokenizer: &Tokenizer) -> ChatLogprob {
    let entry = |entry: &TokenLogprob| {
        let bytes = tokenizer.token_bytes(entry.token).unwrap_or_default();
        let token = String::from_utf8_lossy(&bytes).into_owned();
        TopLogprob { token, logprob: written(entry.logprob), bytes }
    };
    let TopLogprob { token, logprob, bytes } = entry(&position.chosen);
    ChatLogprob { token, logprob, bytes, top_logprobs: position.top.iter().map(entry).collect() }
}

fn text_choice(completion: &Completion, echo: &str, tokenizer: &Tokenizer) -> TextChoice {
    let text_of = |token: u32| tokenizer.token_text(token).unwrap_or_default();
    let logprobs = completion.logprobs.as_ref().map(|positions| {
        let mut offset = echo.chars().count();
        let mut all = TextLogprobs {
            text_offset: Vec::new(),
            token_logprobs: Vec::new(),
            tokens: Vec::new(),
            top_logprobs: Vec::new(),
        };
        for position in positions {
            let token = text_of(position.chosen.token);
            all.text_offset.push(offset);
            offset += token.chars().count();
            all.tokens.push(token);
            all.token_logprobs.push(written(position.chosen.logprob));
            let mut top = BTreeMap::new();
            for entry in position.top.iter().chain([&position.chosen]) {
                top.entry(text_of(entry.token)).or_insert(written(entry.logprob));
            }
            all.top_logprobs.push(top);
        }
        all
    });
    TextChoice {
        index: completion.index,
        text: format!("{echo}{}", completion.text),
        logprobs,
        finish_reason: finish_reason(completion.finish_reason),
        stop_reason: stop_reason(&completion.stop_reason),
    }
}

/// JSON has no -inf; OpenAI and vLLM write this number for "very unlikely".
fn written(logprob: f32) -> f32 {
    logprob.max(-9999.0)
}

/// A `custom_id` in a set: 128 bits, so that a billion different ones collide with probability below 10⁻²⁰.
fn id_hash(custom_id: &str) -> u128 {
    let half = |start| u128::from(hash(start, custom_id.as_bytes()));
    half(0x6261_7463_685f_6964) << 64 | half(0x6375_7374_6f6d_5f69)
}

fn hex(hash: u128) -> String {
    format!("{hash:032x}")
}

// ---------------------------------------------------------------------------------------------------- reading

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
    ids: HashSet<u128>,
    lines: HashSet<u64>,
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

impl BatchReader<Box<dyn BufRead>> {
    /// A file, or standard input for `-`.
    pub fn open(path: &Path, options: ReadOptions) -> io::Result<Self> {
        let input: Box<dyn BufRead> = if path == Path::new("-") {
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

enum LineRead {
    End,
    /// Bytes of the line, its end not counted. More than the limit: the rest was passed over.
    Line {
        length: usize,
        terminated: bool,
    },
}

/// Reads up to and including the next line feed into `buffer` (without it), keeping at most `limit` bytes.
fn read_line(input: &mut impl BufRead, buffer: &mut Vec<u8>, limit: usize) -> io::Result<LineRead> {
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

// ---------------------------------------------------------------------------------------------------- writing

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
