//! The batcher against an engine without a GPU: it plans micro-batches in any interleaving, "computes" rows by storing keys and values
//! that tell whose they are, and looks at every row that attention would read.

use std::collections::BTreeMap;
use std::path::Path;

use fulmen::memory::kv_cache::{BLOCK_TOKENS, BlockTable, KvCache, KvLayout, SpillFile};
use fulmen::policy::KvDtype;
use fulmen::request::batcher::{BatchCounters, BatchLimits, Batcher, MicroBatchRows, Row, SequenceId};
use half::f16;

use crate::common::{Random, threads};

const LAYOUT: KvLayout = KvLayout { layers: 2, kv_heads: 1, head_width: 2, dtype: KvDtype::F16 };

fn id(request: u64, choice: usize) -> SequenceId {
    SequenceId { request, choice }
}

/// A request, and what will become of it.
#[derive(Debug, Clone)]
struct Ask {
    prompt: usize,
    max_new: usize,
    /// Tokens that each completion generates before it ends.
    lengths: Vec<usize>,
    /// The batcher is told that nothing ends it before `max_new`.
    exact: bool,
    /// This completion fails instead of getting its token of this number.
    fails: Option<(usize, usize)>,
}

#[derive(Debug, Clone)]
struct Case {
    limits: BatchLimits,
    blocks: usize,
    asks: Vec<Ask>,
}

impl Case {
    fn random(random: &mut Random) -> Self {
        let one_to = |random: &mut Random, n: usize| 1 + random.below(n);
        // Half of the cases have short prompts and answers that are longer than admission expects: blocks run out.
        let crowded = random.below(2) == 0;
        let blocks = if crowded { 4 + random.below(4) } else { one_to(random, 9) };
        let longest = 1 + if crowded { 95 + random.below(32) } else { one_to(random, blocks * BLOCK_TOKENS - 1) };
        let rows_per_micro_batch = one_to(random, 40);
        let limits = BatchLimits {
            max_sequences: if crowded { 3 + random.below(6) } else { one_to(random, 8) },
            micro_batches: one_to(random, 3),
            rows_per_micro_batch,
            prompt_chunk: one_to(random, rows_per_micro_batch),
            workspace_blocks: longest.div_ceil(BLOCK_TOKENS) + random.below(6),
            gpu_decode: random.below(2) == 0,
        };
        let asks = (0..one_to(random, 12))
            .map(|_| {
                let prompt = one_to(random, if crowded { 9 } else { longest - 1 });
                let max_new = if crowded { longest - prompt } else { one_to(random, longest - prompt) };
                let n = if random.below(3) == 0 { one_to(random, 4) } else { 1 };
                let shortest = if crowded { max_new - 30 } else { 1 };
                let lengths: Vec<usize> = (0..n).map(|_| shortest + random.below(max_new + 1 - shortest)).collect();
                let choice = random.below(n);
                let fails = (random.below(10) == 0).then(|| (choice, one_to(random, lengths[choice])));
                let exact = lengths.iter().all(|length| *length == max_new) && random.below(2) == 0;
                Ask { prompt, max_new, lengths, exact, fails }
            })
            .collect();
        Self { limits, blocks, asks }
    }
}

/// What a token, or a key and value, of a position has to be. A prompt's are the same in all completions.
fn code(ask: &Ask, id: SequenceId, layer: usize, position: usize) -> u64 {
    let choice = if position < ask.prompt { 0 } else { id.choice + 1 };
    let number = ((id.request * 8 + choice as u64) * 8 + layer as u64) * 4096 + position as u64;
    (number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

const TOKEN: usize = 7; // no layer

fn token(ask: &Ask, id: SequenceId, position: usize) -> u32 {
    (code(ask, id, TOKEN, position) >> 32) as u32
}

fn kv_row(ask: &Ask, id: SequenceId, layer: usize, position: usize) -> [u16; 4] {
    bytemuck::cast(code(ask, id, layer, position))
}

/// `[G, 2, K]` as attention finds it.
fn read_row(kv: &KvCache, layer: usize, table: &BlockTable, position: usize) -> [u16; 4] {
    kv.row(layer, table, position).try_into().map(|row: [f16; 4]| row.map(f16::to_bits)).expect("K and V of two")
}

/// A sequence as the engine sees it.
#[derive(Debug, Clone, Copy)]
struct Live {
    tokens: usize,
    /// First position that has not been planned.
    next: usize,
    in_flight: bool,
}

struct Flight {
    rows: MicroBatchRows,
    /// Layers that have run.
    layers: usize,
}

/// The engine's part.
struct World<'c> {
    case: &'c Case,
    batcher: Batcher,
    arrived: usize,
    live: BTreeMap<SequenceId, Live>,
    failed: Vec<bool>,
    flights: Vec<Option<Flight>>,
    ended: usize,
    /// Seen: prompts in several pieces, forks, passes in which prompt and decode rows mix.
    chunks: usize,
    forks: usize,
    mixed: usize,
    /// The oldest sequence, the passes for which it has had no rows, and the most that any had none.
    waited: (Option<SequenceId>, usize),
    longest_wait: usize,
}

impl<'c> World<'c> {
    fn new(case: &'c Case, folder: &Path) -> Self {
        let kv = KvCache::new(LAYOUT, case.blocks).unwrap();
        Self {
            case,
            batcher: Batcher::new(case.limits, kv, SpillFile::new(folder, LAYOUT)),
            arrived: 0,
            live: BTreeMap::new(),
            failed: vec![false; case.asks.len()],
            flights: (0..case.limits.micro_batches).map(|_| None).collect(),
            ended: 0,
            chunks: 0,
            forks: 0,
            mixed: 0,
            waited: (None, 0),
            longest_wait: 0,
        }
    }

    fn ask(&self, id: SequenceId) -> &'c Ask {
        &self.case.asks[id.request as usize]
    }

    fn arrive(&mut self) {
        let Some(ask) = self.case.asks.get(self.arrived) else { return };
        let id = id(self.arrived as u64, 0);
        let prompt = (0..ask.prompt).map(|position| token(ask, id, position)).collect();
        self.batcher.add(id, prompt, ask.max_new, ask.exact);
        self.live.insert(id, Live { tokens: ask.prompt, next: 0, in_flight: false });
        self.arrived += 1;
    }

    /// Plans an idle micro-batch and holds its rows against every limit.
    fn plan(&mut self, micro_batch: usize) {
        assert!(self.flights[micro_batch].is_none());
        let rows = self.batcher.plan_micro_batch(micro_batch).unwrap();
        let limits = self.case.limits;
        assert!(rows.rows.len() <= limits.rows_per_micro_batch);
        assert!(rows.rows[rows.n_decode()..].iter().all(|row| !row.decode), "decode rows come first: {rows:?}");
        assert!(self.batcher.len() - self.batcher.queued() <= limits.max_sequences);
        let mut workspace = 0;
        for run in rows.runs() {
            let id = run[0].sequence;
            let ask = self.ask(id);
            let live = self.live.get_mut(&id).expect("rows belong to sequences that have not ended");
            assert!(!live.in_flight, "{id:?} has rows under way");
            for (row, position) in run.iter().zip(live.next..) {
                let decode = position >= ask.prompt;
                let sampled = position + 1 == live.tokens;
                let expected = Row { sequence: id, token: token(ask, id, position), position, decode, sampled };
                assert_eq!(*row, expected);
            }
            let end = live.next + run.len();
            assert!(run.len() <= if run[0].decode { 1 } else { limits.prompt_chunk });
            assert!(end <= live.tokens);
            if !run[0].decode || limits.gpu_decode {
                workspace += end.div_ceil(BLOCK_TOKENS);
            }
            self.chunks += usize::from(end < ask.prompt);
            (live.next, live.in_flight) = (end, true);
        }
        assert!(workspace <= limits.workspace_blocks, "{workspace} workspace blocks");
        let decode = rows.n_decode();
        self.mixed += usize::from(decode > 0 && decode < rows.rows.len());
        if !rows.rows.is_empty() {
            self.flights[micro_batch] = Some(Flight { rows, layers: 0 });
        }
    }

    /// Runs one layer of a micro-batch's pass, or ends the pass. True where it ended.
    fn step(&mut self, micro_batch: usize, threads: &rayon::ThreadPool) -> bool {
        let Some(flight) = &mut self.flights[micro_batch] else { return false };
        let layer = flight.layers;
        if layer < LAYOUT.layers {
            flight.layers += 1;
            let flight = self.flights[micro_batch].as_ref().expect("looked at above");
            let coded = |row: &Row| kv_row(self.ask(row.sequence), row.sequence, layer, row.position);
            let data: Vec<u16> = flight.rows.rows.iter().flat_map(coded).collect();
            self.batcher.write_rows(layer, &flight.rows.rows, bytemuck::cast_slice(&data), threads);
            for run in flight.rows.runs() {
                let id = run[0].sequence;
                for position in 0..=run[run.len() - 1].position {
                    let found = read_row(self.batcher.kv(), layer, self.batcher.table(id), position);
                    let expected = kv_row(self.ask(id), id, layer, position);
                    assert_eq!(found, expected, "{id:?}, layer {layer}, position {position}");
                }
            }
            return false;
        }
        let rows = self.flights[micro_batch].take().expect("looked at above").rows;
        self.batcher.complete(&rows);
        for run in rows.runs() {
            self.live.get_mut(&run[0].sequence).expect("in flight").in_flight = false;
        }
        for row in rows.rows.iter().filter(|row| row.sampled) {
            if !self.failed[row.sequence.request as usize] {
                self.sampled(row.sequence);
            }
        }
        for run in rows.runs() {
            if self.failed[run[0].sequence.request as usize] {
                self.end_failed(run[0].sequence.request);
            }
        }
        true
    }

    fn sampled(&mut self, sequence: SequenceId) {
        let ask = self.ask(sequence);
        let live = self.live.get_mut(&sequence).expect("a sampled sequence is there");
        let generated = live.tokens + 1 - ask.prompt;
        if ask.fails == Some((sequence.choice, generated)) {
            self.failed[sequence.request as usize] = true;
            return self.end_failed(sequence.request);
        }
        self.batcher.push(sequence, token(ask, sequence, live.tokens));
        live.tokens += 1;
        if sequence.choice == 0 && generated == 1 {
            for choice in 1..ask.lengths.len() {
                let child = id(sequence.request, choice);
                self.batcher.fork(sequence, child);
                // The block of the last prompt token is computed again.
                let next = (ask.prompt - 1) / BLOCK_TOKENS * BLOCK_TOKENS;
                self.live.insert(child, Live { tokens: ask.prompt, next, in_flight: false });
                self.forks += 1;
            }
        }
        if generated == ask.lengths[sequence.choice] {
            self.batcher.remove(sequence);
            self.live.remove(&sequence);
            self.ended += 1;
        }
    }

    /// What of a failed request has no rows under way is removed.
    fn end_failed(&mut self, request: u64) {
        let idle = self.live.iter().filter(|(id, live)| id.request == request && !live.in_flight);
        for id in idle.map(|(id, _)| *id).collect::<Vec<_>>() {
            assert!(!self.batcher.in_flight(id));
            self.batcher.remove(id);
            self.live.remove(&id);
        }
    }

    /// Nothing is under way: when every micro-batch has been planned, somebody has rows.
    fn plan_all_from_rest(&mut self, first: usize) {
        let micro_batches = self.flights.len();
        for micro_batch in 0..micro_batches {
            self.plan((first + micro_batch) % micro_batches);
        }
        let busy = self.flights.iter().any(Option::is_some);
        assert!(busy || self.live.is_empty(), "no micro_batch has rows and {} sequences wait", self.live.len());
    }

    /// Counts the passes in a row that ended while the oldest sequence had no rows under way.
    fn pass_ended(&mut self) {
        let oldest = self.live.first_key_value();
        self.waited = match oldest {
            Some((id, live)) if !live.in_flight && self.waited.0 == Some(*id) => (Some(*id), self.waited.1 + 1),
            _ => (oldest.map(|(id, _)| *id), 0),
        };
        self.longest_wait = self.longest_wait.max(self.waited.1);
    }

    fn run(&mut self, random: &mut Random, threads: &rayon::ThreadPool) {
        let rows: usize = self.case.asks.iter().flat_map(|a| a.lengths.iter().map(|n| a.prompt + n)).sum();
        let mut steps = 0;
        while self.arrived < self.case.asks.len() || !self.live.is_empty() {
            steps += 1;
            assert!(steps < 100 * (rows + 10), "nothing ends: {:?}", self.case);
            let micro_batch = random.below(self.flights.len());
            match random.below(8) {
                0 => self.arrive(),
                _ if self.flights.iter().all(|flight| flight.is_none()) => self.plan_all_from_rest(micro_batch),
                1 if self.flights[micro_batch].is_none() => self.plan(micro_batch),
                // The engine plans a micro-batch in the task that ends its pass.
                _ => {
                    if self.step(micro_batch, threads) {
                        if random.below(4) > 0 {
                            self.plan(micro_batch);
                        }
                        self.pass_ended();
                    }
                }
            }
        }
        let completions = self.case.asks.iter().zip(&self.failed).filter(|(_, failed)| !**failed);
        let wanted: usize = completions.map(|(ask, _)| ask.lengths.len()).sum();
        assert!(self.ended >= wanted, "{} of {wanted} completions ended", self.ended);
        assert!(self.batcher.is_empty());
        assert_eq!(self.batcher.kv().free_blocks(), self.case.blocks, "blocks leaked: {:?}", self.case);
        assert!(self.batcher.counters().peak_running <= self.case.limits.max_sequences);
    }
}

/// Any arrivals, lengths, limits and interleavings of micro-batches: each sequence's rows come once and in order, within every limit,
/// and find the keys and values of all rows before them.
#[test]
fn every_sequence_is_computed_once_and_finds_its_own_rows() {
    let folder = tempfile::tempdir().unwrap();
    let threads = threads(1);
    let (mut seen, mut chunks, mut forks, mut mixed) = (BatchCounters::default(), 0, 0, 0);
    let (mut spilling_cases, mut longest_wait) = (0, 0);
    // Inside the pool, so that storing rows costs no change of threads.
    threads.install(|| {
        for seed in 0..400 {
            let mut random = Random::new(seed);
            let case = Case::random(&mut random);
            let mut world = World::new(&case, folder.path());
            world.run(&mut random, &threads);
            let counters = world.batcher.counters();
            longest_wait = longest_wait.max(world.longest_wait);
            seen.preemptions += counters.preemptions;
            seen.spilled_blocks += counters.spilled_blocks;
            spilling_cases += usize::from(counters.preemptions > 0);
            (chunks, forks, mixed) = (chunks + world.chunks, forks + world.forks, mixed + world.mixed);
        }
    });
    println!(
        "{seen:?} in {spilling_cases} cases, {chunks} chunks, {forks} forks, {mixed} mixed, waited {longest_wait}"
    );
    assert!(spilling_cases > 50 && seen.spilled_blocks > 500, "{seen:?} in {spilling_cases} cases");
    assert!(chunks > 1000 && forks > 200 && mixed > 500, "{chunks} chunks, {forks} forks, {mixed} mixed passes");
}

fn limits(max_sequences: usize, micro_batches: usize) -> BatchLimits {
    BatchLimits {
        max_sequences,
        micro_batches,
        rows_per_micro_batch: 64,
        prompt_chunk: 32,
        workspace_blocks: 4,
        gpu_decode: false,
    }
}

fn ask(prompt: usize, length: usize) -> Ask {
    Ask { prompt, max_new: length, lengths: vec![length], exact: false, fails: None }
}

/// Three sequences for which six blocks were expected to be enough; each comes to need a third one.
fn three_that_outgrow_the_pool(micro_batches: usize) -> Case {
    Case { limits: limits(3, micro_batches), blocks: 6, asks: vec![ask(1, 90); 3] }
}

impl World<'_> {
    /// One pass of a micro-batch, from plan to end; the requests that had rows.
    fn pass(&mut self, micro_batch: usize, threads: &rayon::ThreadPool) -> Vec<u64> {
        if self.flights[micro_batch].is_none() {
            self.plan(micro_batch);
        }
        let rows = self.flights[micro_batch].as_ref().map(|flight| flight.rows.clone()).unwrap_or_default();
        while self.flights[micro_batch].is_some() {
            self.step(micro_batch, threads);
        }
        rows.runs().map(|run| run[0].sequence.request).collect()
    }
}

#[test]
fn the_youngest_makes_room_and_comes_back() {
    let (folder, threads) = (tempfile::tempdir().unwrap(), threads(1));
    let case = three_that_outgrow_the_pool(1);
    let mut world = World::new(&case, folder.path());
    (0..3).for_each(|_| world.arrive());
    for position in 0..64 {
        assert_eq!(world.pass(0, &threads), [0, 1, 2], "position {position}");
    }
    assert_eq!((world.batcher.kv().free_blocks(), world.batcher.queued()), (0, 0));
    // The first of them that needs a block pushes the last one out, whose two are enough for two.
    while world.ended < 2 {
        assert_eq!(world.pass(0, &threads), [0, 1]);
        assert_eq!(world.batcher.queued(), 1);
    }
    let counters = world.batcher.counters();
    assert_eq!((counters.preemptions, counters.spilled_blocks, counters.peak_running), (1, 2, 3));
    while !world.live.is_empty() {
        assert_eq!(world.pass(0, &threads), [2]);
    }
    assert_eq!((world.ended, world.batcher.kv().free_blocks()), (3, 6));
}

#[test]
fn a_sequence_with_rows_under_way_is_not_pushed_out() {
    let (folder, threads) = (tempfile::tempdir().unwrap(), threads(1));
    let case = three_that_outgrow_the_pool(2);
    let mut world = World::new(&case, folder.path());
    (0..3).for_each(|_| world.arrive());
    for _ in 0..64 {
        assert_eq!(world.pass(0, &threads), [0, 1]);
        assert_eq!(world.pass(1, &threads), [2]);
    }
    assert_eq!(world.batcher.kv().free_blocks(), 0);
    // Group 1 cannot go on: its sequence is the youngest of all. It is no victim either while it has rows under way.
    world.plan(1);
    assert!(world.flights[1].is_none(), "nobody is younger");
    let case = Case { asks: vec![ask(1, 90), ask(1, 90), ask(3, 90)], ..case };
    let mut world = World::new(&case, folder.path());
    (0..3).for_each(|_| world.arrive());
    for _ in 0..61 {
        assert_eq!(world.pass(0, &threads), [0, 1]);
        assert_eq!(world.pass(1, &threads), [2]);
    }
    (0..3).for_each(|_| drop(world.pass(0, &threads)));
    world.plan(1); // position 63, the last of its second block
    assert_eq!(world.pass(0, &threads), [0], "1 made room for 0, because 2 has rows under way");
    assert_eq!(world.batcher.counters().preemptions, 1);
    assert_eq!(world.pass(1, &threads), [2]);
    assert!(world.batcher.contains(id(1, 0)) && world.batcher.queued() == 1);
}

/// Of lengths that come to 2 to 6 blocks, 4 in the mean, a pool of 24 holds 6 in full. Where they are known, more run at a time,
/// since they are not all full at once, and none is ever pushed out.
#[test]
fn the_pool_is_filled_with_sequences_that_are_half_grown() {
    let (folder, threads) = (tempfile::tempdir().unwrap(), threads(1));
    let asks = (0..200).map(|number| Ask { exact: true, ..ask(5, 59 + 32 * (number * 3 % 5)) }).collect();
    let case = Case { limits: limits(20, 2), blocks: 24, asks };
    let mut world = World::new(&case, folder.path());
    (0..200).for_each(|_| world.arrive());
    let (mut passes, mut rows) = (0, 0);
    while world.ended < 150 {
        rows += (0..2).map(|micro_batch| world.pass(micro_batch, &threads).len()).sum::<usize>();
        passes += 1;
    }
    assert_eq!(world.batcher.counters().preemptions, 0);
    assert!(rows as f64 > 7.0 * passes as f64, "{:.2} sequences in the mean", rows as f64 / passes as f64);
}

/// Short requests never stop coming and decode on the GPU, in whose workspace the old one's long context has no place beside
/// three of theirs.
#[test]
fn an_old_long_prompt_is_not_starved_by_a_stream_of_short_requests() {
    let (folder, threads) = (tempfile::tempdir().unwrap(), threads(1));
    // One of three ends every four passes, so that two of them always run.
    let mut asks = vec![ask(5, 12); 200];
    (asks[0], asks[1], asks[2]) = (ask(120, 2), ask(5, 4), ask(5, 8));
    let case = Case { limits: BatchLimits { gpu_decode: true, ..limits(4, 1) }, blocks: 64, asks };
    let mut world = World::new(&case, folder.path());
    (0..200).for_each(|_| world.arrive());
    let passes = (1..).find(|_| {
        world.pass(0, &threads);
        !world.live.contains_key(&id(0, 0))
    });
    assert!(passes < Some(100), "the oldest sequence ended after {passes:?} passes, {} others before", world.ended - 1);
}

#[test]
fn a_spill_folder_that_takes_nothing_is_an_error_and_loses_no_block() {
    let threads = threads(1);
    let case = three_that_outgrow_the_pool(1);
    let mut world = World::new(&case, Path::new("/nonexistent/spill"));
    (0..3).for_each(|_| world.arrive());
    (0..64).for_each(|_| drop(world.pass(0, &threads)));
    let error = world.batcher.plan_micro_batch(0).unwrap_err().to_string();
    assert_eq!(error, "the KV spill file in /nonexistent/spill: creating it");
    assert_eq!(world.batcher.counters(), BatchCounters { peak_running: 3, ..Default::default() });
    world.batcher.clear();
    assert!(world.batcher.is_empty());
    assert_eq!(world.batcher.kv().free_blocks(), 6);
}
