//! Steady state at once: passes over sequences of given ages whose keys and values are made up.
//!
//! What such sequences say means nothing, but they cost what real ones of their age cost, and they say the same under every
//! policy that computes the same. A benchmark needs no hour of prefill to see a full pipeline.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::time::Instant;

use super::answers::Answers;
use super::{Engine, EngineError, Event, PassReport, RunOptions, RunSummary};
use crate::request::batcher::MicroBatchRows;
use crate::request::{Request, SamplingParams};

/// A sequence in the middle of its completion. Keys and values of all its tokens but the last are there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WarmSequence {
    /// Prompt tokens; at least 1.
    pub prompt: usize,
    /// Tokens that it has generated; at least 1.
    pub generated: usize,
    /// Tokens that it will generate; at least 1.
    pub left: usize,
}

impl WarmSequence {
    /// Tokens whose keys and values are there.
    pub fn context(&self) -> usize {
        self.prompt + self.generated - 1
    }
}

/// Tokens that each sequence generated, by its place in the list.
pub type WarmTokens = BTreeMap<u64, Vec<u32>>;

/// A token that sequence `number` has at `position`.
fn token(number: usize, position: usize, vocab: usize) -> u32 {
    let mixed = (number as u64 * 0x9e37_79b9 + position as u64 + 1).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    ((mixed >> 33) % vocab as u64) as u32
}

impl Engine {
    /// Runs `passes` passes from the state in which `sequences` are on their way; those that end are replaced by `fresh` requests,
    /// whose prompt rows ride along, as far as there are any. `on` hears of each pass; its timeline counts from the first pass's
    /// start. The tokens are those of sequences and requests that have not ended.
    pub fn run_warm(
        &mut self,
        sequences: &[WarmSequence],
        fresh: &mut dyn Iterator<Item = Request>,
        passes: usize,
        on: &mut dyn FnMut(&PassReport<'_>),
    ) -> Result<(RunSummary, WarmTokens), EngineError> {
        let mut summary = RunSummary::default();
        let result = self.warm_passes(sequences, fresh, passes, on, &mut summary);
        self.batcher.clear();
        self.on_their_way.clear();
        summary.batch = self.batcher.take_counters();
        result.map(|tokens| (summary, tokens))
    }

    fn warm_passes(
        &mut self,
        sequences: &[WarmSequence],
        fresh: &mut dyn Iterator<Item = Request>,
        passes: usize,
        on: &mut dyn FnMut(&PassReport<'_>),
        summary: &mut RunSummary,
    ) -> Result<WarmTokens, EngineError> {
        let mut hear = |event: Event<'_>| {
            if let Event::Pass(report) = event {
                on(&report);
            }
            ControlFlow::Continue(())
        };
        let mut answers = Answers::new(self, RunOptions::default(), &mut hear);
        let vocab = self.config.shape.vocab;
        for (number, sequence) in sequences.iter().enumerate() {
            let params = SamplingParams {
                temperature: 0.0,
                ignore_eos: true,
                max_tokens: Some(sequence.left),
                ..SamplingParams::default()
            };
            // The last one is the token that the first pass feeds.
            let prompt = (0..=sequence.context()).map(|position| token(number, position, vocab)).collect();
            answers.accept(Request { custom_id: number.to_string(), prompt, params }, &mut self.batcher);
        }
        assert_eq!(answers.failed(), 0, "warm sequences fit the policy's longest context");
        self.batcher.warm_up(&|request| sequences[request as usize].generated, &self.threads)?;
        let mut next = vec![MicroBatchRows::default(); self.plan.policy.micro_batches];
        let mut carried = Vec::new();
        let origin = Instant::now();
        for _ in 0..passes {
            while self.batcher.queued() < self.plan.policy.max_sequences {
                let Some(request) = fresh.next() else { break };
                answers.accept(request, &mut self.batcher);
            }
            for (number, rows) in next.iter_mut().enumerate() {
                if rows.rows.is_empty() {
                    *rows = self.batcher.plan_micro_batch(number)?;
                }
            }
            self.run_pass(&mut next, RunOptions::default(), origin, &mut answers, &mut carried, summary)?;
        }
        summary.elapsed = origin.elapsed();
        Ok(answers.tokens_so_far())
    }
}
