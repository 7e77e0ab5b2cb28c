//! One row of logits → one token.
//!
//! In: the row as the model gave it (f32, one per vocabulary entry), [`SamplingParams`], what the sequence holds so far
//! ([`TokenCounts`]), the position, and the completion's own stream of random numbers. Out: a token, and the
//! log-probabilities that were asked for. The steps and their order are vLLM's:
//!
//! ```text
//! logits ─▶ logit_bias ─▶ min_tokens ─▶ penalties ─▶ ÷ temperature ─▶ min_p ─▶ top_k ─▶ top_p ─▶ draw
//!    └────▶ log-softmax: the reported log-probabilities, before all of these
//! ```
//!
//! Guarantees:
//! - The token is a function of (logits, params, the sequence's own tokens, seed, custom_id, n, position) and of nothing
//!   else. The random numbers are counter-based ([`uniform`]): no state survives a token, so batch, order, preemption,
//!   sharding and resume cannot change a sample.
//! - Ties go to the lowest id, in greedy choice, cuts and log-probabilities alike; `top_k` keeps exactly k tokens (vLLM
//!   keeps all that tie with the k-th).
//! - A cut never removes the likeliest token; a cut that removes nothing does not change the draw.
//! - NaN is an error. `-inf` is a token that cannot be chosen. `+inf` takes all the probability (shared equally).
//!
//! Given up: speed tricks. Everything after the f32 logits is computed in f64 over the whole row (a few hundred
//! microseconds for 32,000 entries); rows with [`SamplingParams::needs_logits`] false never come here.

use std::cmp::Ordering;
use std::collections::{HashMap, HashSet};

use super::{PositionLogprobs, SamplingParams, TokenLogprob};

/// The most `logprobs` that a request may ask for (vLLM's default limit, OpenAI's for chat).
pub const MAX_LOGPROBS: usize = 20;
/// The most completions of one prompt (vLLM's limit).
pub const MAX_N: usize = 16_384;
/// Below this temperature vLLM chooses greedily, and so do we.
const GREEDY_BELOW: f32 = 1e-5;

/// What was chosen for one position.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    pub token: u32,
    /// Where the request asked for them; of the untouched logits.
    pub logprobs: Option<PositionLogprobs>,
}

/// Why no token could be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LogitsError {
    #[error("the logit of token {token} is not a number (NaN)")]
    NotANumber { token: u32 },
    #[error("no token is left to choose: the logits of all {vocab} are -inf or masked by min_tokens")]
    NothingLeft { vocab: usize },
}

/// What a sequence holds, as far as penalties and `min_tokens` ask: which tokens its prompt has, and how often each was
/// generated. Costs memory per distinct token, so keep one only where [`SamplingParams::needs_counts`].
#[derive(Debug, Clone, Default)]
pub struct TokenCounts {
    prompt: HashSet<u32>,
    generated: HashMap<u32, u32>,
}

impl TokenCounts {
    pub fn new(prompt: &[u32]) -> Self {
        Self { prompt: prompt.iter().copied().collect(), generated: HashMap::new() }
    }

    /// Counts one generated token.
    pub fn push(&mut self, token: u32) {
        *self.generated.entry(token).or_insert(0) += 1;
    }
}

/// The stream of random numbers of completion `n` of the request named `custom_id`: a 64-bit hash of the three.
pub fn stream_seed(seed: u64, custom_id: &str, n: usize) -> u64 {
    mix(hash(mix(seed), custom_id.as_bytes()) ^ mix(n as u64 ^ 0xd1b5_4a32_d192_ed03))
}

/// Random number `position` of a stream, uniform in [0, 1): output `position` of the SplitMix64 generator that starts
/// at `stream_seed`, its upper 53 bits.
pub fn uniform(stream_seed: u64, position: usize) -> f64 {
    let counter = stream_seed.wrapping_add((position as u64).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    (mix(counter) >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

/// The finaliser of SplitMix64 (Stafford's variant 13): a bijection of 64 bits in which every input bit flips every
/// output bit with probability close to one half.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Bytes → 64 bits, the same on every machine: eight bytes at a time through [`mix`], then the length. For names and
/// sets of names, not against an adversary.
pub(crate) fn hash(start: u64, bytes: &[u8]) -> u64 {
    let mut state = start ^ 0x2545_f491_4f6c_dd1d;
    for chunk in bytes.chunks(8) {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        // The addition keeps a chunk of zeros from being a step that a shorter text could imitate.
        state = mix((state ^ u64::from_le_bytes(word)).wrapping_add(0x9e37_79b9_7f4a_7c15));
    }
    mix(state ^ bytes.len() as u64)
}

impl SamplingParams {
    /// Whether the likeliest token is taken, without chance.
    pub fn is_greedy(&self) -> bool {
        self.temperature < GREEDY_BELOW
    }

    /// Whether [`sample`] looks at the tokens so far.
    pub fn needs_counts(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    /// Whether the whole row of logits is needed. False where the id of the largest logit (the lowest id among equals)
    /// is the answer.
    pub fn needs_logits(&self) -> bool {
        !self.is_greedy()
            || self.needs_counts()
            || !self.logit_bias.is_empty()
            || self.logprobs.is_some()
            || self.min_tokens > 0
    }

    /// Checks every value and every token id, in the words that vLLM's users know. `vocab` = entries of a row of logits.
    pub fn validate(&self, vocab: usize) -> Result<(), String> {
        self.validate_values()?;
        for &(token, _) in &self.logit_bias {
            in_vocabulary("logit_bias", token, vocab)?;
        }
        for &token in &self.stop_token_ids {
            in_vocabulary("stop_token_ids", token, vocab)?;
        }
        Ok(())
    }

    /// The part of [`Self::validate`] that needs no vocabulary.
    pub fn validate_values(&self) -> Result<(), String> {
        let finite = |name: &str, value: f32| {
            if value.is_finite() { Ok(()) } else { Err(format!("{name} must be a finite number, got {value}.")) }
        };
        if !(1..=MAX_N).contains(&self.n) {
            return Err(format!("n must be at least 1 and at most {MAX_N}, got {}.", self.n));
        }
        finite("temperature", self.temperature)?;
        if self.temperature < 0.0 {
            return Err(format!("temperature must be non-negative, got {}.", self.temperature));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(format!("top_p must be in (0, 1], got {}.", self.top_p));
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return Err(format!("min_p must be in [0, 1], got {}.", self.min_p));
        }
        finite("repetition_penalty", self.repetition_penalty)?;
        if self.repetition_penalty <= 0.0 {
            return Err(format!("repetition_penalty must be greater than zero, got {}.", self.repetition_penalty));
        }
        for (name, value) in
            [("presence_penalty", self.presence_penalty), ("frequency_penalty", self.frequency_penalty)]
        {
            if !(-2.0..=2.0).contains(&value) {
                return Err(format!("{name} must be in [-2, 2], got {value}."));
            }
        }
        if self.stop.iter().any(String::is_empty) {
            return Err("stop cannot contain an empty string.".into());
        }
        if let Some(max_tokens) = self.max_tokens {
            if max_tokens == 0 {
                return Err("max_tokens must be at least 1, got 0.".into());
            }
            if self.min_tokens > max_tokens {
                return Err(format!(
                    "min_tokens must be less than or equal to max_tokens={max_tokens}, got {}.",
                    self.min_tokens
                ));
            }
        }
        if let Some(logprobs) = self.logprobs
            && logprobs > MAX_LOGPROBS
        {
            return Err(format!(
                "Requested sample logprobs of {logprobs}, which is greater than max allowed: {MAX_LOGPROBS}"
            ));
        }
        for &(token, bias) in &self.logit_bias {
            if !(-100.0..=100.0).contains(&bias) {
                return Err(format!("logit_bias values must be in [-100, 100], got {bias} for token {token}."));
            }
        }
        Ok(())
    }
}

fn in_vocabulary(field: &str, token: u32, vocab: usize) -> Result<(), String> {
    if (token as usize) < vocab {
        return Ok(());
    }
    Err(format!("token_id {token} in {field} is out of vocabulary: the model has {vocab} tokens."))
}

/// Chooses the token at generated position `position` (0 = the first one). `end_tokens` are the model's end-of-sequence
/// ids, which with `stop_token_ids` may not come before `min_tokens`.
///
/// `params` are taken as validated; ids beyond the row are skipped.
pub fn sample(
    logits: &[f32],
    params: &SamplingParams,
    counts: &TokenCounts,
    end_tokens: &[u32],
    position: usize,
    stream_seed: u64,
) -> Result<Sampled, LogitsError> {
    if let Some(token) = logits.iter().position(|x| x.is_nan()) {
        return Err(LogitsError::NotANumber { token: token as u32 });
    }
    let mut row = logits.to_vec();
    adjust(&mut row, params, counts, end_tokens, position);
    let best = greedy(&row).ok_or(LogitsError::NothingLeft { vocab: logits.len() })?;
    let token = if params.is_greedy() { best } else { draw(&row, best, params, uniform(stream_seed, position)) };
    let logprobs = params.logprobs.map(|top| raw_logprobs(logits, token, top));
    Ok(Sampled { token, logprobs })
}

/// logit_bias, min_tokens and penalties. Each touches a token at most once, so the order of the maps does not matter.
fn adjust(row: &mut [f32], params: &SamplingParams, counts: &TokenCounts, end_tokens: &[u32], position: usize) {
    for &(token, bias) in &params.logit_bias {
        if let Some(x) = row.get_mut(token as usize) {
            *x += bias;
        }
    }
    if position < params.min_tokens {
        for &token in end_tokens.iter().chain(&params.stop_token_ids) {
            if let Some(x) = row.get_mut(token as usize) {
                *x = f32::NEG_INFINITY;
            }
        }
    }
    if params.repetition_penalty != 1.0 {
        let only_prompt = counts.prompt.iter().filter(|token| !counts.generated.contains_key(token));
        for &token in counts.generated.keys().chain(only_prompt) {
            if let Some(x) = row.get_mut(token as usize) {
                *x = if *x > 0.0 { *x / params.repetition_penalty } else { *x * params.repetition_penalty };
            }
        }
    }
    for (&token, &count) in &counts.generated {
        if let Some(x) = row.get_mut(token as usize) {
            *x -= params.frequency_penalty * count as f32;
            *x -= params.presence_penalty;
        }
    }
}

/// The first of the largest values; `None` if all are -inf (or there are none).
fn greedy(row: &[f32]) -> Option<u32> {
    let mut best = None;
    let mut largest = f32::NEG_INFINITY;
    for (token, &x) in row.iter().enumerate() {
        if x > largest {
            largest = x;
            best = Some(token as u32);
        }
    }
    best
}

/// exp((x - largest) / temperature), where +inf stands above all numbers.
fn weight(x: f32, largest: f32, temperature: f64) -> f64 {
    if x == largest { 1.0 } else { ((f64::from(x) - f64::from(largest)) / temperature).exp() }
}

/// Likeliest first, the lowest id first among equals: a total order.
fn likelier(row: &[f32]) -> impl Fn(&u32, &u32) -> Ordering + '_ {
    // Without NaN, `partial_cmp` always answers; unlike `total_cmp` it holds -0 and 0 for equal, as the greedy choice does.
    |&a, &b| row[b as usize].partial_cmp(&row[a as usize]).unwrap_or(Ordering::Equal).then(a.cmp(&b))
}

/// Cuts, then the inverse of the cumulative distribution over what is left, in the order of ids.
fn draw(row: &[f32], best: u32, params: &SamplingParams, uniform: f64) -> u32 {
    let largest = row[best as usize];
    let temperature = f64::from(params.temperature);
    let weight_of = |token: u32| weight(row[token as usize], largest, temperature);

    let mut left: Vec<u32> = (0..row.len() as u32).filter(|&token| row[token as usize] > f32::NEG_INFINITY).collect();
    if params.min_p > 0.0 {
        let least = f64::from(params.min_p); // of the largest weight, which is 1
        left.retain(|&token| weight_of(token) >= least);
    }
    if params.top_k > 0 && params.top_k < left.len() {
        left.select_nth_unstable_by(params.top_k - 1, likelier(row));
        left.truncate(params.top_k);
    }
    if params.top_p < 1.0 {
        cut_top_p(&mut left, row, f64::from(params.top_p), weight_of);
    }
    left.sort_unstable();

    let weights: Vec<f64> = left.iter().map(|&token| weight_of(token)).collect();
    let target = uniform * weights.iter().sum::<f64>();
    let mut sum = 0.0;
    let mut chosen = best;
    for (token, w) in left.into_iter().zip(weights) {
        sum += w;
        if w > 0.0 {
            chosen = token;
        }
        if sum > target {
            break;
        }
    }
    chosen
}

/// Keeps the shortest run of likeliest tokens whose share of the sum reaches `top_p`, at least one. Sorts only as many
/// as it needs: the head is found by selection and quadrupled until it holds the share.
fn cut_top_p(left: &mut Vec<u32>, row: &[f32], top_p: f64, weight_of: impl Fn(u32) -> f64) {
    // Selection moves tokens about, so the sum is taken in the order of ids once, before: same bits whatever was cut.
    left.sort_unstable();
    let enough = top_p * left.iter().map(|&token| weight_of(token)).sum::<f64>();
    let mut head = 64;
    loop {
        let whole = head >= left.len();
        if !whole {
            left.select_nth_unstable_by(head - 1, likelier(row));
        }
        let sorted = head.min(left.len());
        left[..sorted].sort_unstable_by(likelier(row));
        let mut sum = 0.0;
        for (i, &token) in left[..sorted].iter().enumerate() {
            sum += weight_of(token);
            if sum >= enough {
                left.truncate(i + 1);
                return;
            }
        }
        if whole {
            return; // rounding: the share is only reached by all of them
        }
        head *= 4;
    }
}

/// Log-softmax of the untouched row: the chosen token's and the `top` likeliest.
fn raw_logprobs(logits: &[f32], chosen: u32, top: usize) -> PositionLogprobs {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let log_sum = logits.iter().map(|&x| weight(x, largest, 1.0)).sum::<f64>().ln();
    let logprob = |token: u32| {
        let x = logits[token as usize];
        let above = if x == largest { 0.0 } else { f64::from(x) - f64::from(largest) };
        TokenLogprob { token, logprob: (above - log_sum) as f32 }
    };
    let mut tokens: Vec<u32> = (0..logits.len() as u32).collect();
    let top = top.min(tokens.len());
    if top > 0 && top < tokens.len() {
        tokens.select_nth_unstable_by(top - 1, likelier(logits));
    }
    tokens.truncate(top);
    tokens.sort_unstable_by(likelier(logits));
    PositionLogprobs { chosen: logprob(chosen), top: tokens.into_iter().map(logprob).collect() }
}
