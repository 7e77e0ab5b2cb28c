//! Which rows of which sequences go into the next pass.
//!
//! In: sequences as they arrive, and the token that each sampled row got. Out: per micro-batch, the rows of its next pass
//! ([`MicroBatchRows`]), with room for their keys and values already reserved in the KV cache.
//!
//! A micro-batch's next rows, in this order: the decode rows of its sequences, oldest first; then prompt rows of those that are still
//! in their prompt; then sequences from the queue, as long as the micro-batch has rows, sequences and KV blocks left. A pass therefore
//! carries any mix, and a prompt longer than the row limit spans passes in chunks.
//!
//! ```text
//! micro-batch 0, 6 rows:   a:17  b:9        c:0 c:1 c:2 c:3      (a, b decode; c's first chunk)
//! next pass:         a:18  b:10       c:4 c:5 d:0 d:1      (c's last chunk is sampled; d came from the queue)
//! ```
//!
//! **When blocks run out**, the youngest sequence that has no rows under way gives up its blocks: they go to the spill file and
//! come back unchanged when there is room (recomputing them would round differently). A sequence that finds no room and may push
//! nobody out just sits out a pass.
//!
//! Guarantees: the oldest sequence always gets on, so everything ends; no sequence is ever dropped; blocks of finished sequences
//! are free at once; membership of a micro-batch is decided when that micro-batch's ids are known, without waiting for other micro-batches.
//!
//! **Admission** looks ahead: a sequence comes in if the blocks that it and the running ones are expected to hold, pass after pass,
//! never exceed the pool. Sequences of spread ages grow and end at different times, so the pool is filled with those that are half
//! grown in the mean, and not with room for the full length of each. How long a sequence gets is known where it cannot end early
//! (`ignore_eos`); else the mean of what finished so far is expected.
//!
//! Given up: expectations fail, so blocks can run out; sequences keep their micro-batch until they end or are preempted.

use std::collections::{BTreeMap, BTreeSet};

use crate::memory::kv_cache::{
    BLOCK_TOKENS, BlockTable, KvCache, KvError, RestoreCause, RestoreError, RowPlace, SpillFile, SpilledTable,
};

/// A completion of a request: the request's ordinal, then 0..n. The order is the order of age.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId {
    pub request: u64,
    pub choice: usize,
}

/// One token of one sequence in one pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    pub sequence: SequenceId,
    pub token: u32,
    pub position: usize,
    /// A generated token; else one of the prompt.
    pub decode: bool,
    /// The next token is chosen from this row's logits.
    pub sampled: bool,
}

/// The rows of one micro-batch in one pass: decode rows, then prompt rows; each sequence's rows together, positions ascending.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MicroBatchRows {
    pub rows: Vec<Row>,
}

impl MicroBatchRows {
    pub fn n_decode(&self) -> usize {
        self.rows.iter().take_while(|row| row.decode).count()
    }

    /// The rows of each sequence, as ranges of `rows`.
    pub fn runs(&self) -> impl Iterator<Item = &[Row]> {
        self.rows.chunk_by(|a, b| a.sequence == b.sequence)
    }
}

/// What bounds a pass. Part of the policy: it changes time, never tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchLimits {
    /// Sequences that run at a time, over all micro-batches.
    pub max_sequences: usize,
    pub micro_batches: usize,
    pub rows_per_micro_batch: usize,
    /// Longest piece of one prompt in one pass.
    pub prompt_chunk: usize,
    /// KV blocks that the GPU workspace holds for one micro-batch.
    pub workspace_blocks: usize,
    /// Decode rows attend on the GPU, so their context needs the workspace too.
    pub gpu_decode: bool,
}

/// Counters of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BatchCounters {
    pub preemptions: u64,
    pub spilled_blocks: u64,
    /// Most sequences that ran in one pass's planning.
    pub peak_running: usize,
}

/// Where a sequence's keys and values are.
enum Storage {
    Cache(BlockTable),
    Spilled(SpilledTable),
}

struct Sequence {
    tokens: Vec<u32>,
    prompt_len: usize,
    /// Most tokens that it can come to have.
    limit: usize,
    /// It comes to have so many for certain, unless it fails.
    reaches_limit: bool,
    /// Tokens whose keys and values are stored.
    computed: usize,
    storage: Storage,
    /// None: in the queue, new or preempted.
    micro_batch: Option<usize>,
    /// Rows of it are planned and not yet sampled.
    in_flight: bool,
}

impl Sequence {
    fn holds_blocks(&self) -> bool {
        matches!(&self.storage, Storage::Cache(table) if !table.blocks().is_empty())
    }
}

/// See the module's text.
pub struct Batcher {
    limits: BatchLimits,
    kv: KvCache,
    spill: SpillFile,
    sequences: BTreeMap<SequenceId, Sequence>,
    // Who is where, so that planning a pass costs by what it plans and not by the square of what there is.
    /// In no micro-batch.
    queue: BTreeSet<SequenceId>,
    /// By micro-batch.
    members: Vec<BTreeSet<SequenceId>>,
    /// Those that hold blocks and have no rows under way: who can make room.
    idle: BTreeSet<SequenceId>,
    finished: u64,
    finished_tokens: u64,
    counters: BatchCounters,
}

/// Until this many sequences have finished, each is expected to generate so many tokens more.
const FIRST_EXPECTATIONS: u64 = 8;
const FIRST_EXPECTED_TOKENS: usize = 32;

impl Batcher {
    pub fn new(limits: BatchLimits, kv: KvCache, spill: SpillFile) -> Self {
        assert!(
            limits.micro_batches > 0
                && limits.rows_per_micro_batch > 0
                && limits.prompt_chunk > 0
                && limits.max_sequences > 0
        );
        Self {
            limits,
            kv,
            spill,
            sequences: BTreeMap::new(),
            queue: BTreeSet::new(),
            members: vec![BTreeSet::new(); limits.micro_batches],
            idle: BTreeSet::new(),
            finished: 0,
            finished_tokens: 0,
            counters: BatchCounters::default(),
        }
    }

    pub fn kv(&self) -> &KvCache {
        &self.kv
    }

    pub fn counters(&self) -> BatchCounters {
        self.counters
    }

    /// The counters since they were last taken.
    pub fn take_counters(&mut self) -> BatchCounters {
        std::mem::take(&mut self.counters)
    }

    /// Sequences that have not finished.
    pub fn len(&self) -> usize {
        self.sequences.len()
    }

    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Sequences that are in no micro-batch: new or preempted.
    pub fn queued(&self) -> usize {
        self.queue.len()
    }

    /// Puts a sequence into the queue. `max_new` tokens at most will be generated, or exactly as many where nothing can end it
    /// early (`exact`); prompt and those must fit the pool (the engine refuses requests that do not).
    pub fn add(&mut self, id: SequenceId, prompt: Vec<u32>, max_new: usize, exact: bool) {
        let limit = prompt.len() + max_new;
        debug_assert!(!prompt.is_empty() && limit <= self.kv.total_blocks() * BLOCK_TOKENS);
        let sequence = Sequence {
            prompt_len: prompt.len(),
            tokens: prompt,
            limit,
            reaches_limit: exact,
            computed: 0,
            storage: Storage::Cache(BlockTable::default()),
            micro_batch: None,
            in_flight: false,
        };
        let before = self.sequences.insert(id, sequence);
        debug_assert!(before.is_none(), "{id:?} was added before");
        self.queue.insert(id);
    }

    /// Queues another completion of a sequence whose prompt is done. It shares the prompt's full blocks; the last few prompt
    /// tokens, which lie in a block that each completion goes on to write, it computes again, to the same bits.
    pub fn fork(&mut self, parent: SequenceId, child: SequenceId) {
        let from = &self.sequences[&parent];
        debug_assert!(from.computed >= from.prompt_len, "a fork shares a computed prompt");
        let shared = (from.prompt_len - 1) / BLOCK_TOKENS * BLOCK_TOKENS;
        let storage = match &from.storage {
            Storage::Cache(table) => {
                Storage::Cache(self.kv.fork(table, shared).expect("whole blocks are shared, none is taken"))
            }
            Storage::Spilled(_) => unreachable!("a sequence that was just sampled is in the cache"),
        };
        let sequence = Sequence {
            tokens: from.tokens[..from.prompt_len].to_vec(),
            prompt_len: from.prompt_len,
            limit: from.limit,
            reaches_limit: from.reaches_limit,
            computed: shared,
            storage,
            micro_batch: None,
            in_flight: false,
        };
        if sequence.holds_blocks() {
            self.idle.insert(child);
        }
        self.sequences.insert(child, sequence);
        self.queue.insert(child);
    }

    /// Makes every queued sequence one that has been decoding: of its tokens, `generated(request)` are of its completion, and all
    /// but the last have made-up keys and values, which depend on the sequence and the position alone.
    pub fn warm_up(&mut self, generated: &dyn Fn(u64) -> usize, threads: &rayon::ThreadPool) -> Result<(), KvError> {
        let mut tables = Vec::new();
        for (id, sequence) in &mut self.sequences {
            let Storage::Cache(table) = &mut sequence.storage else { unreachable!("nothing was spilled yet") };
            let stored = sequence.tokens.len() - 1;
            assert!(
                (1..=stored).contains(&generated(id.request)),
                "a warm sequence has a prompt, and feeds its own token"
            );
            (sequence.computed, sequence.prompt_len) = (stored, sequence.tokens.len() - generated(id.request));
            self.kv.reserve(table, stored).map_err(KvError::Warm)?;
            tables.push((id.request, &*table));
            self.idle.insert(*id);
        }
        self.kv.make_up(&tables, threads);
        Ok(())
    }

    /// Ends the batcher and keeps its cache.
    pub fn into_cache(mut self) -> KvCache {
        self.clear();
        self.kv
    }

    /// The sequence has not ended.
    pub fn contains(&self, id: SequenceId) -> bool {
        self.sequences.contains_key(&id)
    }

    /// The blocks of a sequence that has rows under way.
    pub fn table(&self, id: SequenceId) -> &BlockTable {
        match &self.sequences[&id].storage {
            Storage::Cache(table) => table,
            Storage::Spilled(_) => unreachable!("a sequence with rows under way is in the cache"),
        }
    }

    /// Stores the keys and values of a micro-batch's rows for one layer: `data` has a
    /// [new row](crate::memory::kv_cache::KvLayout::new_row_bytes) for each.
    pub fn write_rows(&mut self, layer: usize, rows: &[Row], data: &[u8], threads: &rayon::ThreadPool) {
        let places: Vec<RowPlace> = rows
            .iter()
            .map(|row| {
                let Storage::Cache(table) = &self.sequences[&row.sequence].storage else {
                    unreachable!("a sequence with rows under way is in the cache")
                };
                RowPlace { table, position: row.position }
            })
            .collect();
        self.kv.write_rows(layer, &places, data, threads);
    }

    /// The rows of a micro-batch's pass have run: their keys and values are stored.
    pub fn complete(&mut self, rows: &MicroBatchRows) {
        for row in &rows.rows {
            // A sequence that failed in this pass is gone.
            if let Some(sequence) = self.sequences.get_mut(&row.sequence) {
                sequence.computed = row.position + 1;
                sequence.in_flight = false;
                self.idle.insert(row.sequence);
            }
        }
    }

    /// The token that follows the last one.
    pub fn push(&mut self, id: SequenceId, token: u32) {
        self.sequences.get_mut(&id).expect("a sampled sequence is there").tokens.push(token);
    }

    /// A sequence has ended, well or not: its blocks are free.
    pub fn remove(&mut self, id: SequenceId) {
        let sequence = self.sequences.remove(&id).expect("a finished sequence is there");
        self.idle.remove(&id);
        match sequence.micro_batch {
            Some(micro_batch) => self.members[micro_batch].remove(&id),
            None => self.queue.remove(&id),
        };
        self.finished += 1;
        self.finished_tokens += (sequence.tokens.len() - sequence.prompt_len) as u64;
        self.give_back(sequence.storage);
    }

    /// Drops every sequence: the run is over, whatever became of them.
    pub fn clear(&mut self) {
        for sequence in std::mem::take(&mut self.sequences).into_values() {
            self.give_back(sequence.storage);
        }
        self.queue.clear();
        self.members.iter_mut().for_each(BTreeSet::clear);
        self.idle.clear();
    }

    fn give_back(&mut self, storage: Storage) {
        match storage {
            Storage::Cache(table) => self.kv.release(table),
            Storage::Spilled(spilled) => self.spill.discard(spilled),
        }
    }

    /// The sequence has rows in a pass that has not been completed.
    pub fn in_flight(&self, id: SequenceId) -> bool {
        self.sequences.get(&id).is_some_and(|sequence| sequence.in_flight)
    }

    /// The rows of `micro_batch`'s next pass. Call when the ids of its last pass are known (or it had none).
    pub fn plan_micro_batch(&mut self, micro_batch: usize) -> Result<MicroBatchRows, KvError> {
        let mut plan = Plan { rows: Vec::new(), workspace: self.limits.workspace_blocks, workspace_short: false };
        let members: Vec<SequenceId> = self.members[micro_batch].iter().copied().collect();
        let decoding = |s: &Sequence| s.computed >= s.prompt_len;
        // A member may be pushed out by an older one while this runs, so each is looked at anew.
        for decode in [true, false] {
            for id in &members {
                if self.sequences.get(id).is_some_and(|s| s.micro_batch == Some(micro_batch) && decoding(s) == decode) {
                    self.take_rows(*id, &mut plan)?;
                }
            }
        }
        let quota = self.limits.max_sequences.div_ceil(self.limits.micro_batches);
        let queue: Vec<SequenceId> = self.queue.iter().copied().collect();
        let mut forecast = None;
        for id in queue {
            let (in_micro_batch, running) = (self.members[micro_batch].len(), self.running());
            // Where blocks and not the quota bound it, the micro-batch that is planned first must not take what all free.
            let fair = running.div_ceil(self.limits.micro_batches) + 1;
            if plan.rows.len() >= self.limits.rows_per_micro_batch
                || in_micro_batch >= quota
                || running >= self.limits.max_sequences
                || (in_micro_batch >= fair && self.members.iter().all(|members| !members.is_empty()))
                // Else a stream of short sequences could keep a long one waiting for ever.
                || plan.workspace_short
            {
                break;
            }
            if !self.admit(id, &mut forecast)? {
                break; // the queue is served in order of age
            }
            self.sequences.get_mut(&id).expect("queued").micro_batch = Some(micro_batch);
            self.queue.remove(&id);
            self.members[micro_batch].insert(id);
            self.take_rows(id, &mut plan)?;
        }
        self.counters.peak_running = self.counters.peak_running.max(self.running());
        // Admitted sequences may have brought decode rows behind prompt rows; kernels want them in front.
        plan.rows.sort_by_key(|row| !row.decode);
        Ok(MicroBatchRows { rows: plan.rows })
    }

    fn running(&self) -> usize {
        self.members.iter().map(BTreeSet::len).sum()
    }

    /// Plans the rows that `id` can have in this pass, with room for their keys and values.
    fn take_rows(&mut self, id: SequenceId, plan: &mut Plan) -> Result<(), KvError> {
        let sequence = &self.sequences[&id];
        let decode = sequence.computed >= sequence.prompt_len;
        let left = self.limits.rows_per_micro_batch - plan.rows.len();
        let uses_workspace = !decode || self.limits.gpu_decode;
        let workspace_rows =
            if uses_workspace { (plan.workspace * BLOCK_TOKENS).saturating_sub(sequence.computed) } else { usize::MAX };
        plan.workspace_short |= workspace_rows == 0;
        let wanted = sequence.tokens.len() - sequence.computed;
        let n = wanted.min(left).min(self.limits.prompt_chunk).min(workspace_rows);
        if n == 0 {
            return Ok(());
        }
        let (first, end) = (sequence.computed, sequence.computed + n);
        if !self.make_room(id, end)? {
            return Ok(());
        }
        let sequence = self.sequences.get_mut(&id).expect("still there");
        sequence.in_flight = true;
        self.idle.remove(&id);
        if uses_workspace {
            plan.workspace -= end.div_ceil(BLOCK_TOKENS);
        }
        plan.rows.extend((first..end).map(|position| Row {
            sequence: id,
            token: sequence.tokens[position],
            position,
            decode,
            sampled: position + 1 == sequence.tokens.len(),
        }));
        Ok(())
    }

    /// Reserves blocks for the first `tokens` tokens of `id`, pushing others out where that is allowed.
    fn make_room(&mut self, id: SequenceId, tokens: usize) -> Result<bool, KvError> {
        loop {
            let sequence = self.sequences.get_mut(&id).expect("there");
            let Storage::Cache(table) = &mut sequence.storage else { unreachable!("restored before rows are planned") };
            if self.kv.reserve(table, tokens).is_ok() {
                return Ok(true);
            }
            if !self.preempt_for(id)? {
                return Ok(false);
            }
        }
    }

    /// Spills the youngest sequence that may make room for `id`: younger than it, or in no micro-batch, and with no rows under way.
    /// False where there is none.
    fn preempt_for(&mut self, id: SequenceId) -> Result<bool, KvError> {
        let victim =
            self.idle.iter().rev().find(|other| **other > id || **other != id && self.queue.contains(other)).copied();
        match victim {
            Some(victim) => self.preempt(victim).map(|()| true),
            None => Ok(false),
        }
    }

    fn preempt(&mut self, id: SequenceId) -> Result<(), KvError> {
        let sequence = self.sequences.get_mut(&id).expect("a victim is there");
        let Storage::Cache(table) = &mut sequence.storage else { unreachable!("victims hold blocks") };
        let table = std::mem::take(table);
        let blocks = table.blocks().len() as u64;
        match self.kv.spill(table, &mut self.spill) {
            Ok(spilled) => {
                tracing::info!(
                    request = id.request,
                    choice = id.choice,
                    blocks,
                    "out of KV blocks: sequence preempted"
                );
                self.counters.preemptions += 1;
                self.counters.spilled_blocks += blocks;
                if let Some(micro_batch) = sequence.micro_batch.take() {
                    self.members[micro_batch].remove(&id);
                    self.queue.insert(id);
                }
                self.idle.remove(&id);
                sequence.storage = Storage::Spilled(spilled);
                Ok(())
            }
            Err(failed) => {
                sequence.storage = Storage::Cache(failed.table);
                Err(failed.cause)
            }
        }
    }

    /// What the sequences that run are expected to hold, pass after pass.
    fn forecast(&self) -> Forecast {
        let mut forecast = Forecast {
            mean: match self.finished {
                0..FIRST_EXPECTATIONS => FIRST_EXPECTED_TOKENS,
                finished => (self.finished_tokens / finished) as usize + 1,
            },
            taken: (self.kv.total_blocks() - self.kv.free_blocks()) as isize,
            changes: vec![0],
            preemptions: self.counters.preemptions,
        };
        for id in self.members.iter().flatten() {
            forecast.join(&self.sequences[id], &self.kv);
        }
        forecast
    }

    /// May a queued sequence run now? If so its spilled blocks are back.
    fn admit(&mut self, id: SequenceId, forecast: &mut Option<Forecast>) -> Result<bool, KvError> {
        let known = forecast.take().filter(|known| known.preemptions == self.counters.preemptions);
        let known = known.unwrap_or_else(|| self.forecast());
        let mut joined = known.clone();
        joined.join(&self.sequences[&id], &self.kv);
        let fits = joined.peak_blocks() <= self.kv.total_blocks();
        // The oldest of all may always come in: whoever runs is younger and can be pushed out.
        let oldest = self.members.iter().all(|members| members.first().is_none_or(|first| *first > id));
        if !fits && !oldest {
            return Ok(false);
        }
        *forecast = Some(joined);
        loop {
            let sequence = self.sequences.get_mut(&id).expect("queued");
            let Storage::Spilled(_) = sequence.storage else { return Ok(true) };
            let taken = std::mem::replace(&mut sequence.storage, Storage::Cache(BlockTable::default()));
            let Storage::Spilled(spilled) = taken else { unreachable!("matched above") };
            match self.kv.restore(spilled, &mut self.spill) {
                Ok(table) => {
                    sequence.storage = Storage::Cache(table);
                    return Ok(true);
                }
                Err(RestoreError { cause, spilled }) => {
                    sequence.storage = Storage::Spilled(spilled);
                    if let RestoreCause::Io(error) = cause {
                        return Err(error);
                    }
                }
            }
            if !self.preempt_for(id)? {
                return Ok(false);
            }
        }
    }
}

/// Blocks that sequences are expected to hold, pass after pass. Blocks that they take as expected change nothing about it.
#[derive(Clone)]
struct Forecast {
    /// Tokens that a sequence generates in the mean.
    mean: usize,
    /// Blocks taken when it was made.
    taken: isize,
    /// What changes after so many passes.
    changes: Vec<isize>,
    /// Preemptions when it was made: another one makes it wrong.
    preemptions: u64,
}

impl Forecast {
    fn change(&mut self, pass: usize, blocks: isize) {
        self.changes.resize(self.changes.len().max(pass + 1), 0);
        self.changes[pass] += blocks;
    }

    /// A sequence goes on running from now.
    fn join(&mut self, s: &Sequence, kv: &KvCache) {
        // Shared blocks outlive it.
        let (held, shared) = match &s.storage {
            Storage::Cache(table) => (table.blocks().len(), kv.shared_blocks(table)),
            Storage::Spilled(_) => (0, 0),
        };
        let (tokens, generated) = (s.tokens.len(), s.tokens.len() - s.prompt_len);
        let left = match s.reaches_limit {
            true => s.limit - tokens,
            // Older than the mean: who knows; half of it again.
            false => self.mean.checked_sub(generated).unwrap_or(self.mean / 2).min(s.limit - tokens),
        };
        let last = (tokens + left).div_ceil(BLOCK_TOKENS).max(held);
        let now = tokens.div_ceil(BLOCK_TOKENS).max(held);
        self.change(0, (now - held) as isize);
        for block in now..last {
            // The pass that computes the block's first token.
            self.change(block * BLOCK_TOKENS + 1 - tokens, 1);
        }
        self.change(left + 1, shared as isize - last as isize);
    }

    /// Most blocks that are taken at any time, if nobody else comes in.
    fn peak_blocks(&self) -> usize {
        let mut taken = self.taken;
        let peak = self.changes.iter().map(|change| {
            taken += change;
            taken
        });
        peak.max().unwrap_or(0).max(0) as usize
    }
}

struct Plan {
    rows: Vec<Row>,
    /// Workspace blocks not yet given away.
    workspace: usize,
    /// Some sequence of the micro-batch gets no rows because its context does not fit what is left of the workspace.
    workspace_short: bool,
}
