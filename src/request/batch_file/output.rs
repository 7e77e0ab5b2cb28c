//! Lines of the output, in each endpoint's own shape.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::line::{BatchLine, Endpoint, LineError};
use crate::request::sampler::hash;
use crate::request::tokenizer::Tokenizer;
use crate::request::{Completion, FinishReason, PositionLogprobs, RequestError, StopReason, TokenLogprob};

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
pub(super) fn id_hash(custom_id: &str) -> u128 {
    let half = |start| u128::from(hash(start, custom_id.as_bytes()));
    half(0x6261_7463_685f_6964) << 64 | half(0x6375_7374_6f6d_5f69)
}

fn hex(hash: u128) -> String {
    format!("{hash:032x}")
}
