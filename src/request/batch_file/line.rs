//! One line of the input, every field checked as far as that is possible without the model.

use serde_json::{Map, Value};

use super::defaults::GenerationDefaults;
use super::fields::{Fault, Fields, count, fault, invalid, token_ids};
use crate::request::chat_template::{ChatTemplate, ChatTemplateError, Message, kind};
use crate::request::tokenizer::{Tokenizer, TokenizerError};
use crate::request::{Request, SamplingParams};

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
    pub(super) fn echo(&self, tokenizer: &Tokenizer) -> String {
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
