//! Text ⇄ tokens ⇄ rows: what the user asked, and what they get back.
//!
//! ```text
//! file line ─▶ BatchLine ─▶ chat template ─▶ tokenizer ─▶ Request ─▶ (the engine) ─▶ logits ─▶ sampler ─▶ token
//!    batch_file               chat_template      tokenizer                                                   │
//! file line ◀─ OutputLine ◀─ RequestOutput ◀─ Completion ◀──────── CompletionText (detokenises, stops) ◀────┘
//! ```
//!
//! Nothing here knows of a GPU, and nothing here can be made to panic by a file: a bad line, a bad template or a bad
//! tokenizer is a value that says what is wrong.

pub mod batch_file;
pub mod batcher;
pub mod chat_template;
pub mod lengths;
pub mod sampler;
pub mod tokenizer;

/// How tokens are chosen: vLLM's field names and defaults. What a request leaves open has been filled in already: by
/// the checkpoint's generation_config.json ([`batch_file::GenerationDefaults`]), else by the default below.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// Completions per prompt. They share the prompt's KV blocks.
    pub n: usize,
    /// 0 = greedy.
    pub temperature: f32,
    /// Keep the k likeliest tokens; 0 = all.
    pub top_k: usize,
    /// Keep the smallest set of tokens whose probabilities sum to this; 1 = all.
    pub top_p: f32,
    /// Drop tokens below this share of the likeliest one's probability; 0 = none.
    pub min_p: f32,
    pub repetition_penalty: f32,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    /// Seed of the run unless the request has its own; the stream of a completion is
    /// a hash of (seed, custom_id, n), so order and batch do not matter.
    pub seed: u64,
    pub stop: Vec<String>,
    pub stop_token_ids: Vec<u32>,
    pub include_stop_str_in_output: bool,
    pub ignore_eos: bool,
    /// `None` = until the model's last position.
    pub max_tokens: Option<usize>,
    /// No end-of-sequence or stop token before this many are generated.
    pub min_tokens: usize,
    /// Report the log-probability of each chosen token and of this many likeliest ones.
    pub logprobs: Option<usize>,
    /// Added to the logits of these tokens before anything else; -100..=100.
    pub logit_bias: Vec<(u32, f32)>,
    pub skip_special_tokens: bool,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            n: 1,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            include_stop_str_in_output: false,
            ignore_eos: false,
            max_tokens: Some(16),
            min_tokens: 0,
            logprobs: None,
            logit_bias: Vec::new(),
            skip_special_tokens: true,
        }
    }
}

/// One prompt, as tokens, with how to continue it.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The user's name for it; unique in a batch.
    pub custom_id: String,
    pub prompt: Vec<u32>,
    pub params: SamplingParams,
}

/// Why a completion ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// End-of-sequence token, stop string or stop token.
    Stop,
    /// max_tokens, or the model's last position.
    Length,
}

/// What stopped it, where that was a stop string or a token other than end-of-sequence.
#[derive(Debug, Clone, PartialEq)]
pub enum StopReason {
    Text(String),
    Token(u32),
}

/// A token with its log-probability (natural logarithm, of the distribution before temperature and cuts).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenLogprob {
    pub token: u32,
    pub logprob: f32,
}

/// Log-probabilities at one generated position: the chosen token, and the likeliest ones, likeliest first.
#[derive(Debug, Clone, PartialEq)]
pub struct PositionLogprobs {
    pub chosen: TokenLogprob,
    pub top: Vec<TokenLogprob>,
}

/// One finished continuation.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    /// 0..n.
    pub index: usize,
    /// The continuation alone: `echo` is the batch file's business. Empty where it was left to [`RequestOutput::make_texts`].
    pub text: String,
    pub token_ids: Vec<u32>,
    pub finish_reason: FinishReason,
    pub stop_reason: Option<StopReason>,
    /// One entry per generated token where the request asked for log-probabilities.
    pub logprobs: Option<Vec<PositionLogprobs>>,
}

/// What became of one request.
#[derive(Debug, Clone, PartialEq)]
pub struct RequestOutput {
    pub custom_id: String,
    /// The request's.
    pub params: SamplingParams,
    pub prompt_tokens: usize,
    pub result: Result<Vec<Completion>, RequestError>,
}

impl RequestOutput {
    /// Makes the texts that a run left
    /// ([`RunOptions::leave_texts`](crate::engine::RunOptions::leave_texts)): those of completions that no stop string could end.
    pub fn make_texts(&mut self, tokenizer: &tokenizer::Tokenizer) {
        if !self.params.stop.is_empty() {
            return;
        }
        for completion in self.result.iter_mut().flatten() {
            // The token that ended a completion has no text.
            let n = completion.token_ids.len() - usize::from(completion.finish_reason == FinishReason::Stop);
            let mut text = tokenizer::CompletionText::new(tokenizer, &self.params);
            completion.token_ids[..n].iter().for_each(|token| drop(text.push(*token)));
            completion.text = text.finish().0;
        }
    }
}

/// Why one request failed while the others went on.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum RequestError {
    #[error("{0}")]
    Invalid(String),
    #[error("prompt of {needed} tokens does not fit: {limit}")]
    TooLong { needed: usize, limit: String },
    #[error("the model's logits are not numbers (NaN) at position {position}: {hint}")]
    NotANumber { position: usize, hint: &'static str },
}

impl RequestError {
    /// The `code` of an error line.
    pub fn code(&self) -> &'static str {
        match self {
            RequestError::Invalid(_) => "invalid_request",
            RequestError::TooLong { .. } => "context_length_exceeded",
            RequestError::NotANumber { .. } => "not_a_number",
        }
    }
}
