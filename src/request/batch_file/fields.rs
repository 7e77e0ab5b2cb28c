//! Fields of a JSON object, taken one by one with their type, so that what is left over is known to be unknown.

use serde_json::{Map, Value};

use super::line::LineErrorCode;
use crate::request::chat_template::kind;

/// What is wrong, before it is known where.
#[derive(Debug)]
pub(super) struct Fault {
    pub(super) code: LineErrorCode,
    pub(super) message: String,
}

pub(super) fn fault<T>(code: LineErrorCode, message: impl Into<String>) -> Result<T, Fault> {
    Err(Fault { code, message: message.into() })
}

pub(super) fn invalid<T>(message: impl Into<String>) -> Result<T, Fault> {
    fault(LineErrorCode::InvalidValue, message)
}

pub(super) fn token_ids(field: &str, values: &[Value]) -> Result<Vec<u32>, Fault> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match values.iter().find(|value| id(value).is_none()) {
        Some(wrong) => invalid(format!("{field}: {} is not a token id", shortened(wrong))),
        None => Ok(values.iter().filter_map(id).collect()),
    }
}

pub(super) fn count(field: &str, value: &Value) -> Result<usize, Fault> {
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
pub(super) struct Fields(pub(super) Map<String, Value>);

impl Fields {
    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        self.0.shift_remove(name).filter(|value| !value.is_null())
    }

    pub(super) fn string(&mut self, name: &str) -> Result<Option<String>, Fault> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => invalid(format!("{name} must be a string, got {}", kind(&other))),
        }
    }

    pub(super) fn boolean(&mut self, name: &str) -> Result<Option<bool>, Fault> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(yes)) => Ok(Some(yes)),
            Some(other) => invalid(format!("{name} must be true or false, got {}", shortened(&other))),
        }
    }

    pub(super) fn number(&mut self, name: &str) -> Result<Option<f32>, Fault> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Number(number)) => Ok(number.as_f64().map(|number| number as f32)),
            Some(other) => invalid(format!("{name} must be a number, got {}", kind(&other))),
        }
    }

    pub(super) fn count(&mut self, name: &str) -> Result<Option<usize>, Fault> {
        self.take(name).map(|value| count(name, &value)).transpose()
    }

    /// Fields that OpenAI or vLLM know and fulmen does not: let through where their value asks for nothing.
    pub(super) fn refuse_unsupported(&mut self) -> Result<(), Fault> {
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
    pub(super) fn finish(self, of: &str) -> Result<(), Fault> {
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
