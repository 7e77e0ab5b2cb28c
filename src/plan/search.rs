//! The best policy for a workload on a machine, of all on a grid: by branch and bound.
//!
//! ```text
//! grid ─▶ memory: fit() refuses what cannot be there ─▶ bound: no lane is faster than its own work ─▶ best first:
//!         simulate, until no bound is better than the best simulated
//! ```
//!
//! In: a model, a [`Profile`], what may be taken of the machine, what the user fixed ([`Wishes`]), and a [`Workload`]. Out: the
//! chosen [`Choice`], the runners-up, and how many were looked at.
//!
//! Guarantees: memory is a hard limit, counted buffer by buffer by the same [`fit`] that the engine opens with. The choice is the
//! best of the grid: a bound is never above what simulation gives, so what is pruned cannot win. The grid does not depend on the
//! machine, what fits a machine fits a larger one, and costs only fall where a machine is faster ([`cost`](super::cost)): **more memory or
//! bandwidth never predicts less**. Given up: the grid's steps; in sequences a sixteenth of an octave, and where it can matter an eighth
//! of that. What fulmen does not do is not in the grid: see [`unbuilt`](super::unbuilt).

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};

use rayon::prelude::*;

use super::cost::{CostError, Cut, CutKey, LaneSeconds, PassRows, Predictor, Schedules};
use super::fit::{MachineLimits, ModelBytes, Plan, PlanError, Wishes, fit};
use super::workload::Workload;
use crate::memory::kv_cache::{BLOCK_TOKENS, KvLayout};
use crate::memory::pages::PagePlan;
use crate::model::ModelConfig;
use crate::policy::{AttentionPlace, Policy, ScheduleKind, SourceKind};
use crate::profile::Profile;

/// What is planned for.
#[derive(Debug, Clone)]
pub struct Problem<'a> {
    pub config: &'a ModelConfig,
    pub bytes: ModelBytes,
    pub profile: &'a Profile,
    pub limits: MachineLimits,
    /// Share of both memories that stays free beside what the limits leave.
    pub margin: f64,
    /// What is fixed already.
    pub wishes: Wishes,
    pub workload: Workload,
}

/// A policy with what is predicted for it.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    pub plan: Plan,
    /// Generated tokens per second: of the whole run where the number of requests is known, else without an end.
    pub tokens_per_second: f64,
    /// Seconds of the whole run, where it has an end.
    pub run_seconds: Option<f64>,
    /// A pass in the middle of the run: its rows and what it takes.
    pub steady: PhaseTime,
    /// What each lane has to do in it.
    pub lanes: LaneSeconds,
}

/// A kind of pass.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize)]
pub struct PhaseTime {
    pub decode_rows: f64,
    pub prompt_rows: f64,
    pub context_tokens: f64,
    pub seconds: f64,
}

/// What was found.
#[derive(Debug, Clone)]
pub struct Found {
    pub best: Choice,
    /// Others that were simulated, best first.
    pub runners_up: Vec<Choice>,
    /// Policies of the grid that fit, and how many of them were simulated.
    pub fitting: usize,
    pub simulated: usize,
}

/// Nothing was found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SearchError {
    /// What stands in the way of the smallest policy.
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Cost(#[from] CostError),
    #[error(
        "no policy fits: one sequence of {tokens} tokens (a mean one of the workload) needs {needed} blocks of keys and values, {there} have \
         room (--host-memory, --kv-memory)"
    )]
    Sequence { tokens: usize, needed: usize, there: usize },
}

/// Micro-batches and expert groups that are tried.
pub const SPLITS: [(usize, usize); 13] =
    [(1, 1), (2, 1), (2, 2), (3, 3), (4, 2), (4, 4), (6, 2), (6, 3), (8, 2), (8, 4), (8, 8), (16, 4), (16, 16)];
/// How experts are placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Placement {
    /// A ring of two layers of those that stream, and as many residents as have room; or none, so that a layer's experts are one task.
    TwoLayers { residents: bool },
    /// A ring of so many quarters of a layer, and residents from the rest.
    Quarters(usize),
    /// The least there can be.
    OneSlot,
}

/// Placements that are tried. Each is the same on every machine that has room for it, but for residents, of which more never harm.
const PLACEMENTS: [Placement; 7] = [
    Placement::TwoLayers { residents: true },
    Placement::TwoLayers { residents: false },
    Placement::Quarters(6),
    Placement::Quarters(4),
    Placement::Quarters(2),
    Placement::Quarters(1),
    Placement::OneSlot,
];
/// Page sizes that are tried.
pub const PAGES: [u64; 4] = [64 << 20, 32 << 20, 128 << 20, 8 << 20];
/// Prompt rows of a pass that are tried: what the workload brings in steady state, times these. Decode rows come on top. Not as many as it
/// brings on average: prompts come as sequences happen to end, and where they have to wait for room the places of those stay empty.
const PROMPT_ROOM: [f64; 2] = [1.5, 3.0];

/// Blocks over the mean load of the pool that have to be there: sequences are not all of mean length at a time, but the more there
/// are the nearer they come to it together.
fn fluctuation(sequences: usize) -> f64 {
    1.0 + (1.0 / (sequences.max(1) as f64).sqrt()).min(0.06)
}

/// Steps of the grid of sequences in an octave.
const STEPS: u32 = 16;
/// Parts of such a step that are looked at where they can matter.
const BETWEEN: usize = 8;

/// Numbers of sequences that are tried: so many to an octave, whole, and multiples of 16 from 32 on.
pub fn sequence_grid() -> Vec<usize> {
    let mut grid: Vec<usize> = (0..=STEPS * 17)
        .map(|step| {
            let n = f64::powf(2.0, f64::from(step) / f64::from(STEPS));
            if n < 32.0 { n.round() as usize } else { (n / 16.0).round() as usize * 16 }
        })
        .collect();
    grid.dedup();
    grid
}

impl Wishes {
    /// All that a policy says: [`fit`] gives it again, where the machine allows it.
    pub fn of(policy: &Policy, config: &ModelConfig) -> Wishes {
        let shape = &config.shape;
        let layout = KvLayout::new(shape, policy.kv_dtype);
        let streams = policy.resident_experts < shape.experts;
        Wishes {
            schedule: Some(policy.schedule),
            max_sequences: Some(policy.max_sequences),
            micro_batches: Some(policy.micro_batches),
            expert_groups: Some(policy.expert_groups),
            pass_rows: Some(policy.micro_batches * policy.rows_per_micro_batch),
            prompt_chunk: Some(policy.prompt_chunk),
            attention: Some(policy.attention),
            threads: Some(policy.threads),
            max_model_len: Some(policy.max_model_len),
            kv_bytes: Some(policy.kv_blocks as u64 * layout.bytes_per_block() as u64),
            kv_dtype: Some(policy.kv_dtype),
            resident_experts: Some(policy.resident_experts),
            extra_residents: Some(policy.extra_residents),
            ring_experts: streams.then_some(policy.ring_experts),
            page_bytes: streams.then_some(policy.page_bytes),
            source: policy.source.filter(|_| streams),
            rows: Some(policy.rows),
            precision: Some(policy.precision),
        }
    }
}

impl Wishes {
    /// These, and where they say nothing those of a policy; but what follows from other sequences, rows or micro-batches than the
    /// policy's is chosen anew.
    pub fn or_of(self, policy: &Policy, config: &ModelConfig) -> Wishes {
        let mut of = Wishes::of(policy, config);
        if self.max_sequences.or(self.micro_batches).or(self.pass_rows).is_some() {
            of.prompt_chunk = None;
            of.expert_groups = of.expert_groups.filter(|_| self.micro_batches.is_none());
            of.micro_batches = of.micro_batches.map(|n| n.min(self.max_sequences.unwrap_or(n)));
            of.max_sequences =
                of.max_sequences.map(|n| n.min(self.pass_rows.unwrap_or(n)).max(self.micro_batches.unwrap_or(1)));
            let least = self.max_sequences.or(of.max_sequences).unwrap_or(1);
            of.pass_rows = of.pass_rows.map(|rows| rows.max(least));
        }
        self.or(of)
    }

    /// These, and where they say nothing the others.
    fn or(self, other: Wishes) -> Wishes {
        Wishes {
            schedule: self.schedule.or(other.schedule),
            max_sequences: self.max_sequences.or(other.max_sequences),
            micro_batches: self.micro_batches.or(other.micro_batches),
            expert_groups: self.expert_groups.or(other.expert_groups),
            pass_rows: self.pass_rows.or(other.pass_rows),
            prompt_chunk: self.prompt_chunk.or(other.prompt_chunk),
            attention: self.attention.or(other.attention),
            threads: self.threads.or(other.threads),
            max_model_len: self.max_model_len.or(other.max_model_len),
            kv_bytes: self.kv_bytes.or(other.kv_bytes),
            kv_dtype: self.kv_dtype.or(other.kv_dtype),
            resident_experts: self.resident_experts.or(other.resident_experts),
            extra_residents: self.extra_residents.or(other.extra_residents),
            ring_experts: self.ring_experts.or(other.ring_experts),
            page_bytes: self.page_bytes.or(other.page_bytes),
            source: self.source.or(other.source),
            rows: self.rows.or(other.rows),
            precision: self.precision.or(other.precision),
        }
    }
}

/// A point of the grid.
#[derive(Clone, Copy)]
struct Candidate {
    wishes: Wishes,
    /// Only with a ring of two layers: smaller ones are candidates of their own.
    whole_ring: bool,
    /// Prompt rows of a pass over those that the workload brings in steady state.
    room: f64,
}

/// Cuts of the experts that policies share.
type Cuts = Mutex<HashMap<CutKey, Arc<Cut>>>;

/// A candidate that fits, and what no schedule of it can beat.
struct Bounded {
    /// Its number among its like.
    candidate: usize,
    plan: Plan,
    bound: f64,
}

/// How far a search has come.
#[derive(Default)]
struct Walk {
    cuts: Cuts,
    schedules: Arc<Schedules>,
    seen: HashSet<Policy>,
    choices: Vec<Choice>,
    /// Tokens per second of the best of them.
    best: f64,
}

impl Problem<'_> {
    fn limits(&self) -> MachineLimits {
        let left = |bytes: u64| (bytes as f64 * (1.0 - self.margin)) as u64;
        MachineLimits {
            device_bytes: left(self.limits.device_bytes),
            host_bytes: left(self.limits.host_bytes),
            ..self.limits
        }
    }

    fn layout(&self) -> KvLayout {
        KvLayout::new(&self.config.shape, self.wishes.kv_dtype.unwrap_or_default())
    }

    /// Most sequences that are of any use.
    fn most_sequences(&self) -> usize {
        self.workload.requests.map_or(usize::MAX, |requests| requests.max(1) as usize)
    }

    /// Rows of a pass in which `sequences` of the workload are under way, with room for so many times its prompt rows; or what is fixed.
    fn pass_rows(&self, sequences: usize, times: f64) -> usize {
        let begun = sequences as f64 / self.workload.passes(usize::MAX);
        let rows = begun * (self.workload.rows() + (times - 1.0) * self.workload.prompt_tokens);
        self.wishes.pass_rows.unwrap_or(rows.max(sequences as f64).ceil() as usize)
    }

    /// The same policies as those of `grid` that `wanted` picks, with the numbers of sequences between theirs and the grid's next.
    fn between_steps(&self, grid: &[Candidate], wanted: impl Fn(usize, f64) -> bool) -> Vec<Candidate> {
        if self.wishes.max_sequences.is_some() {
            return Vec::new();
        }
        let (steps, most) = (sequence_grid(), self.most_sequences());
        let mut closer = Vec::new();
        for (number, candidate) in grid.iter().enumerate() {
            let n = candidate.wishes.max_sequences.expect("the grid's");
            let next = steps.get(steps.partition_point(|step| *step <= n)).copied().unwrap_or(n).min(most);
            if next <= n || !wanted(number, next as f64 / n as f64) {
                continue;
            }
            let step = ((next - n) / BETWEEN).next_multiple_of(if n < 32 { 1 } else { 16 });
            for n in (n..next).step_by(step.max(1)).skip(1) {
                let micro_batches = candidate.wishes.micro_batches.expect("the grid's");
                let pass_rows =
                    self.wishes.pass_rows.or(Some(self.pass_rows(n, candidate.room).next_multiple_of(micro_batches)));
                let wishes = Wishes { max_sequences: Some(n), pass_rows, ..candidate.wishes };
                closer.push(Candidate { wishes, ..*candidate });
            }
        }
        closer
    }

    /// The candidates that `wanted` picks, with experts that are read from disk instead of kept in the host's memory: those of which that
    /// can give more than `best` tokens per second.
    fn staged(&self, grid: &[Candidate], best: f64, wanted: impl Fn(usize) -> bool) -> Vec<Candidate> {
        let Some(disk) = self.profile.disk.as_ref().filter(|_| self.wishes.source.is_none()) else { return Vec::new() };
        let shape = &self.config.shape;
        let all = (shape.layers * shape.experts) as u64 * self.bytes.expert();
        let streamed = all.saturating_sub(self.limits.device_bytes) as f64;
        // The disk's best rate; each sequence gives a token a pass at most.
        let byte_seconds =
            disk.page_seconds.points().iter().map(|(bytes, seconds)| seconds / bytes).fold(f64::INFINITY, f64::min);
        let beats = |n: usize| n as f64 > best * streamed * byte_seconds;
        let those = grid
            .iter()
            .enumerate()
            .filter(|(number, one)| one.wishes.max_sequences.is_some_and(beats) && wanted(*number));
        those
            .map(|(_, one)| Candidate { wishes: Wishes { source: Some(SourceKind::Staged), ..one.wishes }, ..*one })
            .collect()
    }

    /// The grid, with what is fixed.
    fn grid(&self) -> Vec<Candidate> {
        let fixed = &self.wishes;
        let mut all = Vec::new();
        let sequences = match fixed.max_sequences {
            Some(n) => vec![n],
            None => {
                let most = self.most_sequences();
                let mut grid: Vec<usize> = sequence_grid().into_iter().filter(|n| *n < most).collect();
                if most <= 1 << 17 {
                    grid.push(most);
                }
                // More than the host's memory has keys and values for; the smallest one stays, to be refused with numbers.
                let one = self.workload.context_tokens * self.layout().bytes_per_token() as f64;
                let room = self.limits().host_bytes as f64 / one;
                grid.retain(|n| *n == 1 || *n as f64 <= room);
                grid
            }
        };
        let places: &[AttentionPlace] = match fixed.attention.or(fixed.schedule.and_then(ScheduleKind::attention)) {
            Some(AttentionPlace::Cpu) => &[AttentionPlace::Cpu],
            Some(AttentionPlace::Gpu) => &[AttentionPlace::Gpu],
            None => &[AttentionPlace::Cpu, AttentionPlace::Gpu],
        };
        for n in sequences {
            let mut room = PROMPT_ROOM.map(|times| (times, self.pass_rows(n, times))).to_vec();
            room.dedup_by_key(|(_, rows)| *rows);
            for (micro_batches, expert_groups) in SPLITS {
                let micro_batches = fixed.micro_batches.unwrap_or(micro_batches);
                let expert_groups = fixed.expert_groups.unwrap_or(expert_groups);
                if micro_batches > n || expert_groups > micro_batches {
                    continue;
                }
                for (times, pass_rows) in &room {
                    for attention in places {
                        let with = Wishes {
                            max_sequences: Some(n),
                            micro_batches: Some(micro_batches),
                            expert_groups: Some(expert_groups),
                            // As many in each micro-batch.
                            pass_rows: Some(match fixed.pass_rows {
                                Some(rows) => rows,
                                None => pass_rows.next_multiple_of(micro_batches),
                            }),
                            attention: Some(*attention),
                            threads: fixed.threads.or(Some(self.threads())),
                            ..*fixed
                        };
                        self.add_placements(&with, *times, &mut all);
                    }
                }
                if fixed.micro_batches.is_some() && fixed.expert_groups.is_some() {
                    break;
                }
            }
        }
        all
    }

    /// The same with every placement of experts and every size of pages.
    fn add_placements(&self, with: &Wishes, room: f64, all: &mut Vec<Candidate>) {
        let experts = self.config.shape.experts;
        let fixed = self.wishes.resident_experts.is_some() || self.wishes.ring_experts.is_some();
        let pages: &[u64] = if self.wishes.page_bytes.is_some() { &[0] } else { &PAGES };
        for placement in PLACEMENTS.into_iter().take(if fixed { 1 } else { PLACEMENTS.len() }) {
            let (resident, ring) = match placement {
                _ if fixed => (with.resident_experts, with.ring_experts),
                Placement::TwoLayers { residents: true } => (None, None),
                Placement::TwoLayers { residents: false } => (Some(0), Some(2 * experts)),
                Placement::Quarters(quarters) => (None, Some((quarters * experts).div_ceil(4))),
                Placement::OneSlot => (None, Some(1)),
            };
            for page in pages {
                let page_bytes = self.wishes.page_bytes.or(Some(*page));
                let wishes = Wishes { resident_experts: resident, ring_experts: ring, page_bytes, ..*with };
                all.push(Candidate { wishes, whole_ring: !fixed && placement == PLACEMENTS[0], room });
            }
        }
    }

    /// Threads of the CPU lane: those that attend fastest.
    fn threads(&self) -> usize {
        self.profile.cpu.best_threads().min(self.limits.threads).max(1)
    }

    /// Fits a candidate; where all experts stay on the device, a page's size has nothing to say.
    fn fit(&self, wishes: &Wishes) -> Result<Plan, PlanError> {
        let limits = self.limits();
        let plan = fit(self.config, &self.bytes, &limits, wishes);
        match plan {
            Err(PlanError::Option { option: "--page-size" | "--ring-experts", .. }) => {
                let none =
                    Wishes { page_bytes: self.wishes.page_bytes, ring_experts: self.wishes.ring_experts, ..*wishes };
                fit(self.config, &self.bytes, &limits, &none)
            }
            plan => plan,
        }
    }

    /// The pool holds the sequences, and a workspace the contexts that attend on the GPU.
    fn holds(&self, plan: &Plan) -> Result<(), SearchError> {
        let policy = &plan.policy;
        // The last block of a sequence is half full.
        let tokens = self.workload.context_tokens + BLOCK_TOKENS as f64 / 2.0;
        let sequences = policy.max_sequences.min(self.most_sequences());
        let blocks = |sequences: usize| {
            (sequences as f64 * tokens / BLOCK_TOKENS as f64 * fluctuation(sequences)).ceil() as usize
        };
        let longest = self.workload.longest.div_ceil(BLOCK_TOKENS);
        let needed = blocks(sequences).max(longest);
        if needed > policy.kv_blocks {
            return Err(SearchError::Sequence { tokens: self.workload.longest, needed, there: policy.kv_blocks });
        }
        let attends = match policy.attention {
            AttentionPlace::Cpu => 1,
            AttentionPlace::Gpu => sequences.div_ceil(policy.micro_batches),
        };
        let needed = blocks(attends).min(policy.kv_blocks).max(longest);
        if needed > policy.workspace_blocks {
            let there = policy.workspace_blocks;
            return Err(SearchError::Sequence { tokens: self.workload.longest, needed, there });
        }
        Ok(())
    }

    /// Rows of a pass in the middle of an endless run.
    fn steady(&self, policy: &Policy) -> PhaseTime {
        let workload = &self.workload;
        let most_rows = (policy.micro_batches * policy.rows_per_micro_batch) as f64;
        let sequences = policy.max_sequences.min(self.most_sequences()) as f64;
        let begun = (sequences / workload.passes(policy.prompt_chunk)).min(most_rows / workload.rows());
        PhaseTime {
            decode_rows: begun * (workload.generated_tokens - 1.0),
            prompt_rows: begun * workload.prompt_tokens,
            context_tokens: workload.context_tokens,
            seconds: 0.0,
        }
    }

    /// Rows of a pass that only begins prompts, and of one that only decodes.
    fn ramp(&self, policy: &Policy) -> (PhaseTime, PhaseTime) {
        let workload = &self.workload;
        let sequences = policy.max_sequences.min(self.most_sequences()) as f64;
        let most_rows = (policy.micro_batches * policy.rows_per_micro_batch) as f64;
        let prompt_rows = most_rows.min(sequences * workload.prompt_tokens);
        let context_tokens = workload.context_tokens;
        let of = |decode_rows, prompt_rows| PhaseTime { decode_rows, prompt_rows, context_tokens, seconds: 0.0 };
        (of(0.0, prompt_rows), of(sequences, 0.0))
    }

    /// Tokens per second, seconds of the run, and the pass in the middle, where a pass takes what `seconds` says.
    fn rate(&self, policy: &Policy, seconds: &dyn Fn(&PhaseTime) -> f64) -> (f64, Option<f64>, PhaseTime) {
        let workload = &self.workload;
        let timed = |mut phase: PhaseTime| {
            phase.seconds = seconds(&phase);
            phase
        };
        let steady = timed(self.steady(policy));
        // Of the requests, so many are in each pass with a share of their rows.
        let begun = steady.prompt_rows / workload.prompt_tokens;
        let Some(requests) = workload.requests.map(|requests| requests as f64) else {
            return (begun * workload.generated_tokens / steady.seconds, None, steady);
        };
        let sequences = (policy.max_sequences as f64).min(requests);
        let (prefill, decode) = self.ramp(policy);
        let (prefill, decode) = (timed(prefill), timed(decode));
        // The first sequences begin together; when no request is left their number falls to none over a completion's passes.
        let first = (sequences * workload.prompt_tokens / prefill.prompt_rows).ceil() * prefill.seconds;
        let middle = (requests - sequences) / begun * steady.seconds;
        let last = workload.generated_tokens - 1.0;
        let last = if requests > sequences {
            let half = timed(PhaseTime { decode_rows: sequences / 2.0, ..decode });
            last * half.seconds
        } else {
            last * decode.seconds
        };
        let total = first + middle + last;
        (requests * workload.generated_tokens / total, Some(total), if middle > 0.0 { steady } else { decode })
    }

    fn rows(&self, policy: &Policy, phase: &PhaseTime) -> PassRows {
        PassRows::spread(
            self.config,
            policy,
            phase.decode_rows,
            phase.context_tokens,
            phase.prompt_rows,
            self.workload.prompt_tokens,
        )
    }

    /// A plan with what is predicted for it.
    pub fn predict(&self, plan: &Plan) -> Result<Choice, CostError> {
        self.predict_sharing(plan, &Arc::default())
    }

    fn predict_sharing(&self, plan: &Plan, schedules: &Arc<Schedules>) -> Result<Choice, CostError> {
        let predictor = Predictor::new(self.config, &self.bytes, plan, self.profile)?.sharing(schedules);
        let policy = &plan.policy;
        let (tokens_per_second, run_seconds, steady) =
            self.rate(policy, &|phase| predictor.pass_seconds(&self.rows(policy, phase)).max(1e-9));
        let lanes = predictor.lanes(&self.rows(policy, &steady));
        Ok(Choice { plan: *plan, tokens_per_second, run_seconds, steady, lanes })
    }

    /// Seconds of a pass that begins prompts alone, and of one that decodes alone.
    pub fn phases(&self, plan: &Plan) -> Result<[PhaseTime; 2], CostError> {
        let predictor = Predictor::new(self.config, &self.bytes, plan, self.profile)?;
        let (prefill, decode) = self.ramp(&plan.policy);
        Ok([prefill, decode].map(|mut phase| {
            phase.seconds = predictor.pass_seconds(&self.rows(&plan.policy, &phase));
            phase
        }))
    }

    /// A policy like `policy` with the most sequences that have room, to the last one, and what is predicted for it. None where the
    /// number of sequences is not what memory limits.
    pub fn fullest(&self, policy: &Policy) -> Option<Choice> {
        let with = |n: usize| -> Option<Plan> {
            let rows = (n as f64 * (policy.micro_batches * policy.rows_per_micro_batch) as f64
                / policy.max_sequences as f64)
                .ceil();
            let wishes = Wishes {
                max_sequences: Some(n),
                pass_rows: Some((rows as usize).next_multiple_of(policy.micro_batches)),
                // Memory that is more shall be used.
                kv_bytes: self.wishes.kv_bytes,
                resident_experts: None,
                extra_residents: None,
                prompt_chunk: self.wishes.prompt_chunk,
                ..Wishes::of(policy, self.config)
            };
            let plan = self.fit(&wishes).ok()?;
            self.holds(&plan).is_ok().then_some(plan)
        };
        let (mut fits, mut too_many) = (policy.max_sequences, 2 * policy.max_sequences);
        with(fits)?;
        if with(too_many).is_some() || too_many > self.most_sequences() {
            return None;
        }
        while too_many - fits > 1 {
            let middle = fits.midpoint(too_many);
            *(if with(middle).is_some() { &mut fits } else { &mut too_many }) = middle;
        }
        self.predict(&with(fits)?).ok()
    }

    /// The rows of a choice's pass in the middle.
    pub fn steady_rows(&self, choice: &Choice) -> PassRows {
        self.rows(&choice.plan.policy, &choice.steady)
    }

    /// Fits a candidate, and bounds it where it has room for the workload.
    fn bound(&self, number: usize, candidate: &Candidate, cuts: &Cuts) -> Result<Bounded, SearchError> {
        let plan = self.fit(&candidate.wishes)?;
        let Policy { resident_experts, ring_experts, .. } = plan.policy;
        let streamed = self.config.shape.experts - resident_experts;
        if candidate.whole_ring && ring_experts < 2 * streamed {
            let (option, value) = ("--ring-experts", ring_experts);
            let allowed = format!("{} with {resident_experts} residents, two layers' worth", 2 * streamed);
            return Err(PlanError::Option { option, value, allowed }.into());
        }
        self.holds(&plan)?;
        let cut = self.cut(&plan, cuts)?;
        let predictor = Predictor::with_cut(self.config, &plan, cut, self.profile);
        let policy = &plan.policy;
        let longest = |phase: &PhaseTime| predictor.lanes_beside(&self.rows(policy, phase)).longest().max(1e-9);
        let bound = self.rate(policy, &longest).0;
        Ok(Bounded { candidate: number, plan, bound })
    }

    fn cut(&self, plan: &Plan, cuts: &Cuts) -> Result<Arc<Cut>, CostError> {
        let key = Cut::key(plan);
        if let Some(cut) = cuts.lock().expect("nobody panics with it").get(&key) {
            return Ok(cut.clone());
        }
        let cut = Arc::new(Cut::new(plan, PagePlan::new(plan.page_shape(self.config, &self.bytes)), self.profile)?);
        cuts.lock().expect("nobody panics with it").insert(key, cut.clone());
        Ok(cut)
    }

    /// Every policy of the grid, and between its steps, that fits and has room for the workload.
    pub fn every_policy(&self) -> Vec<Plan> {
        let mut walk = Walk::default();
        let mut grid = self.grid();
        grid.extend(self.staged(&grid, 0.0, |_| true));
        grid.extend(self.between_steps(&grid, |_, _| true));
        self.bounded(&grid, &mut walk).0.into_iter().map(|one| one.plan).collect()
    }

    /// The best policy of the grid, and between its steps.
    pub fn search(&self) -> Result<Found, SearchError> {
        let mut walk = Walk::default();
        let mut grid = self.grid();
        let (mut fitting, refused) = self.bounded(&grid, &mut walk);
        self.simulate(&fitting, &mut walk)?;
        // Where the host has no memory for experts beside so many sequences, they can be read from disk.
        let kept: HashSet<usize> = fitting.iter().map(|one| one.candidate).collect();
        let from_disk = self.staged(&grid, walk.best, |number| !kept.contains(&number));
        let first = grid.len();
        let (mut others, _) = self.bounded(&from_disk, &mut walk);
        self.simulate(&others, &mut walk)?;
        others.iter_mut().for_each(|one| one.candidate += first);
        grid.extend(from_disk);
        fitting.extend(others);
        // So many more sequences bring at most so many more tokens.
        let best = walk.best;
        let mut bounds = vec![0.0f64; grid.len()];
        fitting.iter().for_each(|one| bounds[one.candidate] = one.bound);
        let closer = self.between_steps(&grid, |number, more| bounds[number] * more > best);
        let (closer, _) = self.bounded(&closer, &mut walk);
        self.simulate(&closer, &mut walk)?;

        let (n_fitting, simulated) = (fitting.len() + closer.len(), walk.choices.len());
        walk.choices.sort_by(|one, other| other.tokens_per_second.total_cmp(&one.tokens_per_second));
        let mut choices = walk.choices.into_iter();
        match (choices.next(), refused) {
            (Some(best), _) => Ok(Found { best, runners_up: choices.collect(), fitting: n_fitting, simulated }),
            (None, Some(error)) => Err(error),
            // An empty grid: what is fixed contradicts itself.
            (None, None) => Err(PlanError::Option {
                option: "--micro-batches",
                value: self.wishes.micro_batches.unwrap_or(1),
                allowed: "at most the sequences that run at a time".into(),
            }
            .into()),
        }
    }

    /// The candidates that fit and have room for the workload, each policy once. Beside them what stands in the way of the first one,
    /// if anything does: of the smallest policy with the smallest ring, and so of all.
    fn bounded(&self, candidates: &[Candidate], walk: &mut Walk) -> (Vec<Bounded>, Option<SearchError>) {
        let numbered = candidates.par_iter().enumerate();
        let bounded: Vec<_> = numbered.map(|(number, one)| self.bound(number, one, &walk.cuts)).collect();
        let size = |candidate: &Candidate| {
            let Wishes { max_sequences, micro_batches, attention, .. } = candidate.wishes;
            (max_sequences, micro_batches, attention)
        };
        let smallest = candidates.first().map(size);
        let (mut fitting, mut refused) = (Vec::new(), None);
        for (candidate, bounded) in candidates.iter().zip(bounded) {
            match bounded {
                // Several wishes can come to the same policy.
                Ok(bounded) if walk.seen.insert(bounded.plan.policy) => fitting.push(bounded),
                Ok(_) => {}
                Err(error) if smallest == Some(size(candidate)) => refused = Some(error),
                Err(_) => {}
            }
        }
        (fitting, refused)
    }

    /// Simulates those that can beat the best so far, best bound first.
    fn simulate(&self, fitting: &[Bounded], walk: &mut Walk) -> Result<(), SearchError> {
        let mut fitting: Vec<&Bounded> = fitting.iter().collect();
        // Stable: among equals the earlier of the grid stays first.
        fitting.sort_by(|one, other| other.bound.total_cmp(&one.bound));
        const AT_ONCE: usize = 16;
        for some in fitting.chunks(AT_ONCE) {
            let some: Vec<&&Bounded> = some.iter().filter(|one| one.bound > walk.best).collect();
            if some.is_empty() {
                break;
            }
            let predicted: Vec<_> =
                some.par_iter().map(|one| self.predict_sharing(&one.plan, &walk.schedules)).collect();
            for choice in predicted {
                let choice = choice?;
                walk.best = walk.best.max(choice.tokens_per_second);
                walk.choices.push(choice);
            }
        }
        Ok(())
    }
}
