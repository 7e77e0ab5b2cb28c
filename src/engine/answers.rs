//! From sampled rows to finished requests: which token comes next, what text it makes, when a completion ends.
//!
//! In: requests, and what the LM head says of their sampled rows. Out: tokens for the [`Batcher`], [`Event`]s for the caller.
//! Guarantees: every accepted request ends in exactly one [`Event::Finished`]; which token is chosen depends on the row's
//! logits, the request and the position alone.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use super::{Engine, Event, RunOptions};
use crate::kernels::lm_head_sample::Sample as HeadSample;
use crate::request::batcher::{Batcher, MicroBatchRows, SequenceId};
use crate::request::sampler::{LogitsError, Sampled, TokenCounts, sample, stream_seed};
use crate::request::tokenizer::{CompletionText, Tokenizer};
use crate::request::{
    Completion, FinishReason, PositionLogprobs, Request, RequestError, RequestOutput, SamplingParams, StopReason,
};

/// A request that is not finished.
struct Asked {
    request: Request,
    /// Tokens that each completion may generate.
    max_new: usize,
    choices: Vec<Choice>,
    /// Set by the first completion that fails; the others end when their rows in flight have run.
    error: Option<RequestError>,
}

/// One completion on its way.
struct Choice {
    seed: u64,
    counts: TokenCounts,
    text: Option<CompletionText>,
    /// Bytes of the text that have been told.
    told: usize,
    tokens: Vec<u32>,
    logprobs: Vec<PositionLogprobs>,
    done: Option<Completion>,
}

/// See the module's text.
pub(super) struct Answers<'e> {
    asked: BTreeMap<u64, Asked>,
    vocab: usize,
    max_model_len: usize,
    tokenizer: Option<Tokenizer>,
    eos_tokens: Vec<u32>,
    leave_texts: bool,
    on: &'e mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
    broken_off: bool,
    accepted: u64,
    failed: u64,
    generated: u64,
}

/// What the choice of a token from whole logits takes beside them. Nothing of it changes with other rows, so many are drawn at a time.
pub(super) struct Draw<'a> {
    params: &'a SamplingParams,
    counts: &'a TokenCounts,
    end_tokens: &'a [u32],
    position: usize,
    seed: u64,
}

impl Draw<'_> {
    pub fn choose(&self, logits: &[f32]) -> Result<Sampled, LogitsError> {
        sample(logits, self.params, self.counts, self.end_tokens, self.position, self.seed)
    }
}

/// What there is to choose of a sampled row.
pub(super) struct RowHead {
    pub sample: HeadSample,
    /// There where [`Answers::draw`] was.
    pub drawn: Option<Result<Sampled, LogitsError>>,
    pub position: usize,
}

impl<'e> Answers<'e> {
    pub fn new(engine: &Engine, options: RunOptions, on: &'e mut dyn FnMut(Event<'_>) -> ControlFlow<()>) -> Self {
        Self {
            asked: BTreeMap::new(),
            vocab: engine.config.shape.vocab,
            max_model_len: engine.plan.policy.max_model_len,
            tokenizer: engine.tokenizer.clone(),
            eos_tokens: engine.eos_tokens.clone(),
            leave_texts: options.leave_texts,
            on,
            broken_off: false,
            accepted: 0,
            failed: 0,
            generated: 0,
        }
    }

    pub fn broken_off(&self) -> bool {
        self.broken_off
    }

    pub fn accepted(&self) -> u64 {
        self.accepted
    }

    pub fn failed(&self) -> u64 {
        self.failed
    }

    /// Tokens of the first completion of each request that is not finished.
    pub fn tokens_so_far(&self) -> BTreeMap<u64, Vec<u32>> {
        self.asked.iter().map(|(ordinal, asked)| (*ordinal, asked.choices[0].tokens.clone())).collect()
    }

    pub fn generated(&self) -> u64 {
        self.generated
    }

    pub fn tell(&mut self, event: Event<'_>) {
        if (self.on)(event).is_break() {
            self.broken_off = true;
        }
    }

    /// Queues a request, or refuses it at once.
    pub fn accept(&mut self, request: Request, batcher: &mut Batcher) {
        let ordinal = self.accepted;
        self.accepted += 1;
        let max_new = match self.tokens_allowed(&request) {
            Ok(max_new) => max_new,
            Err(error) => {
                self.failed += 1;
                let Request { custom_id, prompt, params } = request;
                let output = RequestOutput { custom_id, params, prompt_tokens: prompt.len(), result: Err(error) };
                self.tell(Event::Finished(output));
                return;
            }
        };
        let leave_text = self.leave_texts && request.params.stop.is_empty();
        let tokenizer = self.tokenizer.as_ref().filter(|_| !leave_text);
        let choices = (0..request.params.n)
            .map(|n| Choice {
                seed: stream_seed(request.params.seed, &request.custom_id, n),
                counts: if request.params.needs_counts() {
                    TokenCounts::new(&request.prompt)
                } else {
                    Default::default()
                },
                text: tokenizer.map(|tokenizer| CompletionText::new(tokenizer, &request.params)),
                told: 0,
                tokens: Vec::new(),
                logprobs: Vec::new(),
                done: None,
            })
            .collect();
        let params = &request.params;
        let exact = params.ignore_eos && params.stop.is_empty() && params.stop_token_ids.is_empty();
        batcher.add(SequenceId { request: ordinal, choice: 0 }, request.prompt.clone(), max_new, exact);
        self.asked.insert(ordinal, Asked { request, max_new, choices, error: None });
    }

    /// How many tokens each completion of a request may have, or why it cannot run.
    fn tokens_allowed(&self, request: &Request) -> Result<usize, RequestError> {
        let invalid = |message: String| Err(RequestError::Invalid(message));
        request.params.validate(self.vocab).map_err(RequestError::Invalid)?;
        if request.prompt.is_empty() {
            return invalid("the prompt is empty: it has no token to continue from".into());
        }
        if let Some(token) = request.prompt.iter().find(|token| **token as usize >= self.vocab) {
            return invalid(format!("the prompt has token {token}; the vocabulary has {} tokens", self.vocab));
        }
        if self.tokenizer.is_none() && !request.params.stop.is_empty() {
            return invalid("stop strings need a tokenizer, and this model was opened without one".into());
        }
        if request.prompt.len() >= self.max_model_len {
            let limit = format!(
                "a sequence has room for {} tokens, prompt and completion together (max-model-len, the model's positions or the KV pool)",
                self.max_model_len
            );
            return Err(RequestError::TooLong { needed: request.prompt.len(), limit });
        }
        let room = self.max_model_len - request.prompt.len();
        Ok(request.params.max_tokens.map_or(room, |wished| wished.min(room)))
    }

    /// The row's choice of token needs its whole logits.
    pub fn needs_logits(&self, id: SequenceId) -> bool {
        self.asked.get(&id.request).is_some_and(|asked| asked.request.params.needs_logits())
    }

    /// There where [`needs_logits`](Self::needs_logits) says so.
    pub fn draw(&self, id: SequenceId) -> Option<Draw<'_>> {
        let Asked { request, choices, .. } = self.asked.get(&id.request)?;
        let (params, choice) = (&request.params, &choices[id.choice]);
        params.needs_logits().then_some(Draw {
            params,
            counts: &choice.counts,
            end_tokens: &self.eos_tokens,
            position: choice.tokens.len(),
            seed: choice.seed,
        })
    }

    /// A row's logits, for those who asked for all.
    pub fn tell_logits(&mut self, id: SequenceId, position: usize, logits: &[f32]) {
        if let Some(asked) = self.asked.get(&id.request) {
            let event = Event::Logits { custom_id: &asked.request.custom_id, index: id.choice, position, logits };
            if (self.on)(event).is_break() {
                self.broken_off = true;
            }
        }
    }

    /// Chooses the token that follows a sampled row and does what follows from it.
    pub fn sampled(&mut self, id: SequenceId, head: RowHead, batcher: &mut Batcher) {
        let asked = self.asked.get_mut(&id.request).expect("a sampled row has a request");
        if asked.error.is_some() {
            batcher.remove(id);
            self.close(id.request, batcher);
            return;
        }
        let params = &asked.request.params;
        let choice = &mut asked.choices[id.choice];
        let chosen = match head.drawn {
            Some(Ok(sampled)) => Ok((sampled.token, sampled.logprobs)),
            Some(Err(error)) => Err(logits_error(error, head.position)),
            None if head.sample.nan != 0 => Err(RequestError::NotANumber { position: head.position, hint: NAN_HINT }),
            None => Ok((head.sample.id, None)),
        };
        let (token, logprobs) = match chosen {
            Ok(chosen) => chosen,
            Err(error) => {
                asked.error = Some(error);
                batcher.remove(id);
                self.close(id.request, batcher);
                return;
            }
        };
        self.generated += 1;
        if params.needs_counts() {
            choice.counts.push(token);
        }
        choice.tokens.push(token);
        choice.logprobs.extend(logprobs);
        batcher.push(id, token);

        let old_enough = choice.tokens.len() > params.min_tokens;
        let mut finish: Option<(FinishReason, Option<StopReason>)> = None;
        if old_enough && !params.ignore_eos && self.eos_tokens.contains(&token) {
            finish = Some((FinishReason::Stop, None));
        } else if old_enough && params.stop_token_ids.contains(&token) {
            finish = Some((FinishReason::Stop, Some(StopReason::Token(token))));
        } else if let Some(text) = &mut choice.text {
            if let Some(stop) = text.push(token) {
                finish = Some((FinishReason::Stop, Some(stop)));
            }
            let certain = text.text();
            if certain.len() > choice.told {
                let (custom_id, index) = (&asked.request.custom_id, id.choice);
                let event = Event::Text { custom_id, index, text: &certain[choice.told..] };
                if (self.on)(event).is_break() {
                    self.broken_off = true;
                }
                choice.told = certain.len();
            }
        }
        if finish.is_none() && choice.tokens.len() >= asked.max_new {
            finish = Some((FinishReason::Length, None));
        }
        // The prompt is done when its first completion has a token: the others share it from here.
        if id.choice == 0 && choice.tokens.len() == 1 {
            for n in 1..asked.request.params.n {
                batcher.fork(id, SequenceId { request: id.request, choice: n });
            }
        }
        if let Some((mut reason, mut stop)) = finish {
            let choice = &mut asked.choices[id.choice];
            let (text, late_stop) = choice.text.take().map(CompletionText::finish).unwrap_or_default();
            if let (Some(late), FinishReason::Length) = (late_stop, reason) {
                (reason, stop) = (FinishReason::Stop, Some(late));
            }
            if text.len() > choice.told {
                let (custom_id, index) = (&asked.request.custom_id, id.choice);
                let event = Event::Text { custom_id, index, text: &text[choice.told..] };
                if (self.on)(event).is_break() {
                    self.broken_off = true;
                }
            }
            choice.done = Some(Completion {
                index: id.choice,
                text,
                token_ids: std::mem::take(&mut choice.tokens),
                finish_reason: reason,
                stop_reason: stop,
                logprobs: asked.request.params.logprobs.map(|_| std::mem::take(&mut choice.logprobs)),
            });
            batcher.remove(id);
            self.close(id.request, batcher);
        }
    }

    /// Ends what was in flight in a micro-batch for requests that have failed meanwhile.
    pub fn sweep(&mut self, rows: &MicroBatchRows, batcher: &mut Batcher) {
        for run in rows.runs() {
            let id = run[0].sequence;
            if self.asked.get(&id.request).is_some_and(|asked| asked.error.is_some()) && batcher.contains(id) {
                batcher.remove(id);
                self.close(id.request, batcher);
            }
        }
    }

    /// Tells a request's end when it has come: all completions done, or one failed and none of its rows in flight.
    fn close(&mut self, ordinal: u64, batcher: &mut Batcher) {
        let asked = &self.asked[&ordinal];
        let siblings = || (0..asked.choices.len()).map(|choice| SequenceId { request: ordinal, choice });
        if asked.error.is_some() {
            for id in siblings().filter(|id| batcher.contains(*id) && !batcher.in_flight(*id)).collect::<Vec<_>>() {
                batcher.remove(id);
            }
            if siblings().any(|id| batcher.contains(id)) {
                return; // its rows in this pass still need it
            }
        } else if asked.choices.iter().any(|choice| choice.done.is_none()) {
            return;
        }
        let asked = self.asked.remove(&ordinal).expect("looked at above");
        let result = match asked.error {
            Some(error) => {
                self.failed += 1;
                Err(error)
            }
            None => Ok(asked.choices.into_iter().map(|choice| choice.done.expect("all are done")).collect()),
        };
        let Request { custom_id, prompt, params } = asked.request;
        self.tell(Event::Finished(RequestOutput { custom_id, params, prompt_tokens: prompt.len(), result }));
    }
}

const NAN_HINT: &str = "some weights or activations are NaN or infinite; the checkpoint may be damaged";

fn logits_error(error: LogitsError, position: usize) -> RequestError {
    match error {
        LogitsError::NotANumber { .. } => RequestError::NotANumber { position, hint: NAN_HINT },
        LogitsError::NothingLeft { .. } => RequestError::Invalid(format!("at position {position}, {error}")),
    }
}
