//! `fulmen bench throughput`: tokens per second in steady state, the bound beside them, and the rivals' ways on the same machine.
//!
//! **Ours.** Sequences of a workload's lengths are on their way at the first pass, their ages spread as they are after hours
//! ([`Engine::run_warm`]); each that ends is replaced by a new prompt, whose rows ride along with the decode rows. The first passes do
//! not count. Tokens per second are generated tokens over wall time, with all prompts computed in that time as well: FlexGen's
//! metric, for a run without beginning and end.
//!
//! Micro-batches, groups, ring and pages are those of `--policy`, else those that the search finds best for the last workload where the
//! machine was calibrated, else the defaults; flags win. Sequences are as many as the pool holds, half grown in the mean.
//!
//! **The bound** is the link's and the host memory's, for the best policy and not for ours: requests as host memory holds (95 % of
//! it without the experts), a pass in the time in which the experts that do not fit on the GPU cross the link with nothing else
//! running. It counts neither kernels nor attention nor edges. Host memory that holds all experts is the bound's usual assumption, and
//! one can do better: what stays on the GPU needs no place on the host. A second, tighter bound counts that memory as requests'.
//!
//! **Rivals** run one batch from its first prompt to its last token, and reserve room for all tokens that it will have. Their decode
//! passes are timed here at half of the completion, where contexts have their mean; for their prefill they are granted the time
//! that the GPU alone takes for so many prompt rows here, or one trip of the weights over the link if that is longer. `+padded`
//! makes every prompt as long as the longest. Prompts are made up, kernels, pages and host memory are the same for all. One for which
//! there is no room beside the same pages is said to be left out.
//!
//! **Predicted** stands beside measured where the machine was calibrated: ours from the lengths alone, before anything runs, and pass by
//! pass; rivals pass by pass. Nothing is predicted of an emulated machine.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::json;

use super::super::open::{EngineArguments, load, say_prepared};
use super::super::{OK, Usage, print_line, progress};
use super::pipeline::Entry;
use super::shape;
use crate::engine::{Engine, WarmSequence};
use crate::memory::host_memory;
use crate::memory::kv_cache::KvLayout;
use crate::model::ModelConfig;
use crate::plan::Wishes;
use crate::plan::compare::Pair;
use crate::plan::hrm::{Bound, Hierarchy, Level, SteadyState, steady_state_bound};
use crate::plan::workload::Workload as Lengths;
use crate::policy::{Policy, ScheduleKind, SourceKind};
use crate::request::lengths::{self, Length, MT_BENCH_PROMPTS};
use crate::request::{Request, SamplingParams};
use crate::schedule::{Idle, Lane, Timeline, trace};
use crate::units::human_bytes;

#[derive(Debug, Args)]
pub struct Arguments {
    /// Folder of a Hugging Face checkpoint
    #[arg(short, long, env = "FULMEN_MODEL", value_name = "FOLDER", required_unless_present = "synthetic")]
    model: Option<PathBuf>,
    /// Made-up weights of a published shape (mixtral-8x7b, mixtral-8x22b, dbrx, …) or of mixtral-tiny
    #[arg(long, value_name = "SHAPE", conflicts_with = "model")]
    synthetic: Option<String>,
    /// Layers of the made-up model [default: the shape's]
    #[arg(long, value_name = "N", requires = "synthetic")]
    layers: Option<usize>,
    /// Prompt tokens of every request [default: the lengths of MT-Bench's 80 prompts in turn]
    #[arg(long, value_name = "TOKENS")]
    prompt_len: Option<usize>,
    /// Tokens that each request generates; several, each a workload of its own: 32,64,128,256
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', default_value = "128")]
    gen_len: Vec<usize>,
    /// Lengths of prompts and answers from a table: Azure's or Vidur's traces, or columns prompt,generated
    #[arg(long, value_name = "FILE.csv", conflicts_with_all = ["prompt_len", "gen_len"])]
    lengths: Option<PathBuf>,
    /// Lengths of the table times this
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, requires = "lengths")]
    scale_lengths: f64,
    /// Passes that count
    #[arg(long, value_name = "N", default_value_t = 20)]
    passes: usize,
    /// Passes in front of them that do not
    #[arg(long, value_name = "N", default_value_t = 3)]
    warm_up: usize,
    /// Other ways to run it: a schedule's name as in `bench pipeline`, with +mN for N micro-batches, +relay for pages that are pinned one
    /// by one, +padded for prompts of equal length
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    rivals: Vec<Rival>,
    /// Passes of each rival that count
    #[arg(long, value_name = "N", default_value_t = 4)]
    rival_passes: usize,
    /// A machine to imitate: t4 has 16 GB, a link paced to 12 GB/s and 8 threads. Kernels stay as fast as this adapter is
    #[arg(long, value_enum, value_name = "MACHINE", conflicts_with = "gpu_memory")]
    emulate: Option<Emulation>,
    /// One JSON object instead of tables
    #[arg(long)]
    json: bool,
    /// Chrome/Perfetto trace of the counted passes of the last workload
    #[arg(long, value_name = "FILE")]
    trace_file: Option<PathBuf>,
    /// Picture of two layers in the middle of the last workload
    #[arg(long, value_name = "FILE.svg")]
    timeline: Option<PathBuf>,
    #[command(flatten)]
    engine: EngineArguments,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Emulation {
    T4,
}

impl Emulation {
    fn gpu_memory(self) -> u64 {
        match self {
            Emulation::T4 => 16_000_000_000,
        }
    }

    /// Bytes per second to the GPU.
    fn link(self) -> u64 {
        match self {
            Emulation::T4 => 12_000_000_000,
        }
    }

    fn threads(self) -> usize {
        match self {
            Emulation::T4 => 8,
        }
    }
}

/// Another way to run the same requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rival {
    entry: Entry,
    padded: bool,
}

impl std::str::FromStr for Rival {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let padded = text.split('+').any(|word| word == "padded");
        let rest: Vec<&str> = text.split('+').filter(|word| *word != "padded").collect();
        Ok(Rival { entry: rest.join("+").parse()?, padded })
    }
}

impl std::fmt::Display for Rival {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{}", self.entry, if self.padded { "+padded" } else { "" })
    }
}

/// Requests by their lengths.
#[derive(Debug, Clone)]
struct Workload {
    name: String,
    lengths: Vec<Length>,
}

impl Workload {
    fn longest_prompt(&self) -> usize {
        self.lengths.iter().map(|length| length.prompt).max().expect("a workload has lengths")
    }

    fn longest(&self) -> usize {
        self.lengths.iter().map(|length| length.prompt + length.generated).max().expect("a workload has lengths")
    }

    fn generated(&self) -> usize {
        self.lengths.iter().map(|length| length.generated).sum()
    }

    /// Prompt tokens per generated token.
    fn prompt_share(&self) -> f64 {
        self.lengths.iter().map(|length| length.prompt).sum::<usize>() as f64 / self.generated() as f64
    }

    /// A mean over what runs at a moment: a request is there as long as it generates.
    fn mean_running(&self, of: impl Fn(&Length) -> f64) -> f64 {
        self.lengths.iter().map(|length| of(length) * length.generated as f64).sum::<f64>() / self.generated() as f64
    }

    /// What a plan is made for.
    fn as_planned(&self) -> Option<Lengths> {
        Lengths::of(self.lengths.iter().map(|length| (length.prompt, length.generated)), None)
    }

    /// KV blocks of a running request, at all ages alike.
    fn mean_blocks(&self) -> f64 {
        self.mean_running(|length| {
            let blocks = (0..length.generated).map(|age| KvLayout::blocks_for(length.prompt + age + 1));
            blocks.sum::<usize>() as f64 / length.generated as f64
        })
    }

    /// `wishes`, with as many sequences as so many KV blocks hold, and room for their rows.
    fn wishes(&self, wishes: &Wishes, kv_blocks: usize) -> Wishes {
        let n = wishes.max_sequences.unwrap_or((kv_blocks as f64 / self.mean_blocks()) as usize).max(2);
        let micro_batches = wishes.micro_batches.unwrap_or(4).min(n);
        // Room for the prompts that replace what ends, and half as many again where several end at once.
        let rows = (n as f64 * (1.0 + 1.5 * self.prompt_share())) as usize + 2 * self.longest_prompt();
        Wishes {
            max_sequences: Some(n),
            micro_batches: Some(micro_batches),
            expert_groups: wishes.expert_groups.or(Some(2.min(micro_batches))),
            pass_rows: wishes.pass_rows.or(Some(rows.next_multiple_of(64 * micro_batches))),
            ..*wishes
        }
    }

    /// `n` requests as they are on their way at some moment: each length as often as it generates, ages spread evenly. In an order
    /// that gives each micro-batch all kinds.
    fn running(&self, n: usize) -> Vec<WarmSequence> {
        let total = self.generated() as f64;
        let mut at = (0, 0);
        let mut running: Vec<WarmSequence> = (0..n)
            .map(|number| {
                let point = ((number as f64 + 0.5) / n as f64 * total) as usize;
                while at.1 + self.lengths[at.0].generated <= point {
                    at = (at.0 + 1, at.1 + self.lengths[at.0].generated);
                }
                let Length { prompt, generated } = self.lengths[at.0];
                // The first token comes with the prompt's pass.
                let age = (point - at.1 + 1).min(generated.max(2) - 1);
                WarmSequence { prompt, generated: age, left: generated.max(2) - age }
            })
            .collect();
        // A fixed shuffle.
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        for last in (1..running.len()).rev() {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            running.swap(last, (state >> 33) as usize % (last + 1));
        }
        running
    }

    /// New requests without end, their lengths in turn.
    fn fresh(&self, vocab: usize) -> impl Iterator<Item = Request> + '_ {
        self.lengths.iter().cycle().enumerate().map(move |(number, length)| {
            let token = |position: usize| {
                let mixed = (number as u64 * 0x85eb_ca77 + position as u64 + 7).wrapping_mul(0xc2b2_ae3d_27d4_eb4f);
                ((mixed >> 33) % vocab as u64) as u32
            };
            let params = SamplingParams {
                temperature: 0.0,
                ignore_eos: true,
                max_tokens: Some(length.generated),
                ..SamplingParams::default()
            };
            let prompt = (0..length.prompt).map(token).collect();
            Request { custom_id: format!("fresh {number}"), prompt, params }
        })
    }
}

fn workloads(arguments: &Arguments) -> Result<Vec<Workload>> {
    if let Some(path) = &arguments.lengths {
        if !(arguments.scale_lengths > 0.0 && arguments.scale_lengths.is_finite()) {
            bail!(Usage(format!("--scale-lengths is {}; it must be above 0", arguments.scale_lengths)));
        }
        let scaled = |tokens: usize| ((tokens as f64 * arguments.scale_lengths).round() as usize).max(1);
        let lengths = lengths::read(path)?
            .into_iter()
            .map(|length| Length { prompt: scaled(length.prompt), generated: scaled(length.generated) })
            .collect();
        let name = path.file_stem().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        return Ok(vec![Workload { name, lengths }]);
    }
    let prompts = match arguments.prompt_len {
        Some(0) => bail!(Usage("--prompt-len must be at least 1".to_owned())),
        Some(tokens) => vec![tokens],
        None => MT_BENCH_PROMPTS.to_vec(),
    };
    let of = |generated: &usize| Workload {
        name: format!("gen {generated}"),
        lengths: prompts.iter().map(|prompt| Length { prompt: *prompt, generated: *generated }).collect(),
    };
    if arguments.gen_len.contains(&0) {
        bail!(Usage("--gen-len must be at least 1".to_owned()));
    }
    Ok(arguments.gen_len.iter().map(of).collect())
}

/// What counted of a workload's passes.
struct Outcome {
    workload: Workload,
    sequences: usize,
    wall: Duration,
    passes: usize,
    prompt_rows: usize,
    decode_rows: usize,
    generated: usize,
    page_bytes: u64,
    busy: Vec<(Lane, f64)>,
    busy_any: f64,
    idle: Idle,
    preemptions: u64,
    bound: Bound,
    bound_sequences: f64,
    /// With no host copy of the experts that stay on the GPU.
    tight_bound: Bound,
    /// Tokens per second as predicted from the lengths, before anything ran; None where the machine was not measured.
    predicted: Option<f64>,
    /// The passes that count as they were, predicted one by one.
    comparison: Option<Pair>,
}

impl Outcome {
    fn per_second(&self, n: usize) -> f64 {
        n as f64 / self.wall.as_secs_f64()
    }

    fn tokens_per_second(&self) -> f64 {
        self.per_second(self.generated)
    }

    /// Without experts that must cross the link for want of room, the link bounds nothing.
    fn is_bounded(&self) -> bool {
        self.bound.tokens_per_second.is_finite()
    }
}

/// What a rival's batch takes.
struct RivalOutcome {
    rival: Rival,
    sequences: usize,
    micro_batches: usize,
    step: Duration,
    prefill: Duration,
    total: Duration,
    generated: usize,
    busy: Vec<(Lane, f64)>,
    comparison: Option<Pair>,
}

impl RivalOutcome {
    fn tokens_per_second(&self) -> f64 {
        self.generated as f64 / self.total.as_secs_f64()
    }
}

pub fn run(arguments: Arguments) -> Result<u8> {
    if arguments.passes == 0 || arguments.rival_passes == 0 {
        bail!(Usage("--passes and --rival-passes must be at least 1".to_owned()));
    }
    let (builder, config) = match (&arguments.model, &arguments.synthetic) {
        (_, Some(name)) => {
            let config = shape(name, arguments.layers)?;
            (Engine::synthetic(config.clone()), config)
        }
        (Some(folder), None) => (Engine::builder(folder), ModelConfig::open(folder)?),
        (None, None) => unreachable!("one of them is required"),
    };
    let workloads = workloads(&arguments)?;
    let mut builder = arguments.engine.apply(builder)?;
    let mut wishes = arguments.engine.wishes();
    if let Some(machine) = arguments.emulate {
        builder = builder.gpu_memory(Some(machine.gpu_memory())).link_pace(machine.link());
        wishes.threads = wishes.threads.or(Some(machine.threads()));
        say!(
            "an emulation: {} of GPU memory, the link paced to {:.0} GB/s, {} threads; the GPU computes as fast as it can",
            human_bytes(machine.gpu_memory()),
            machine.link() as f64 / 1e9,
            machine.threads()
        );
    }
    let passes = arguments.warm_up + arguments.passes;
    let longest = workloads.iter().map(Workload::longest).max().expect("one workload") + passes + 2;
    let total_host = host_memory::total_bytes().context("this system does not say how much memory it has")?;
    // The pool leaves 5 % of the host's memory alone; what rivals need beside the same pool comes out of those.
    let mut left_alone = 0;
    if arguments.engine.host_memory().is_none() {
        let free = host_memory::available_bytes().unwrap_or(total_host) / 100 * 98;
        left_alone = free.saturating_sub(total_host / 100 * 95);
        builder = builder.host_memory(Some(free));
    }
    wishes.max_model_len = wishes.max_model_len.or(Some(longest.min(config.max_positions)));
    // How the work is cut: as in the policy that is given, else as the search has it for the last workload where the machine was
    // measured. How many sequences there are follows from the pool.
    let last = workloads.last().expect("one workload");
    let searched = last.as_planned().filter(|_| arguments.emulate.is_none());
    let mut prepared = builder.wishes(wishes).plan_for(searched, arguments.engine.margin()).prepare()?;
    if let Some(policy) = arguments.engine.policy()? {
        wishes = wishes.or_of(&policy, &config);
    } else if let Some(found) = prepared.found() {
        let Policy { micro_batches, expert_groups, ring_experts, page_bytes, .. } = found.best.plan.policy;
        wishes = Wishes {
            micro_batches: Some(micro_batches),
            expert_groups: Some(expert_groups),
            // None where nothing streams in that policy.
            ring_experts: Some(ring_experts).filter(|slots| *slots > 0),
            page_bytes: Some(page_bytes),
            ..wishes
        };
        say!(
            "policy  micro-batches, groups, ring and pages of the best among {} that fit, for {}",
            found.fitting,
            last.name
        );
    }
    // The pool depends on what rows take on the host, and they on the sequences, and those on the pool.
    let widest = |wishes: &Wishes, blocks: usize| {
        let each = workloads.iter().map(|workload| workload.wishes(wishes, blocks));
        each.max_by_key(|wishes| wishes.pass_rows).expect("one workload")
    };
    let everything =
        Wishes { max_sequences: Some(1 << 16), pass_rows: Some(1 << 16), micro_batches: Some(64), ..wishes };
    let mut blocks =
        prepared.plan_for(&everything).map(|plan| plan.policy.kv_blocks).unwrap_or(prepared.plan().policy.kv_blocks);
    if prepared.plan_for(&widest(&wishes, blocks)).is_err() {
        // More rows than the GPU has room for beside that cut.
        let searched = prepared.found().map(|found| found.best.plan.policy);
        wishes.max_sequences = wishes.max_sequences.or(searched.map(|policy| policy.max_sequences));
        wishes.pass_rows =
            wishes.pass_rows.or(searched.map(|policy| policy.rows_per_micro_batch * policy.micro_batches));
    }
    for _ in 0..3 {
        let plan = prepared.plan_for(&widest(&wishes, blocks))?;
        let kept = if wishes.kv_bytes.is_some() { 0 } else { left_alone };
        let pool = plan.memory.kv_pool.saturating_sub(kept).max(plan.memory.kv_pool / plan.policy.kv_blocks as u64);
        prepared.replan(Wishes { kv_bytes: Some(pool), ..widest(&wishes, blocks) })?;
        blocks = prepared.plan().policy.kv_blocks;
    }
    say_prepared(&prepared);
    arguments.engine.keep_policy(&prepared.plan().policy)?;
    let mut engine = load(prepared)?;
    let (pages, time) = engine.measure_pages()?.context("all experts stay on the GPU: nothing streams")?;
    let link_rate = pages as f64 / time.as_secs_f64();
    say!("link    {:.1} GB/s with these pages and nothing else running", link_rate / 1e9);

    let kept = engine.plan().policy;
    let layout = KvLayout::new(&config.shape, kept.kv_dtype);
    let fixed = |asked: Wishes| Wishes {
        kv_bytes: Some((blocks * layout.bytes_per_block()) as u64),
        resident_experts: Some(kept.resident_experts),
        extra_residents: Some(kept.extra_residents),
        ring_experts: Some(kept.ring_experts),
        source: None,
        ..asked
    };
    let mut outcomes = Vec::new();
    for (index, workload) in workloads.iter().enumerate() {
        let mut asked = fixed(workload.wishes(&wishes, blocks));
        asked.source = engine.page_source().map(|source| source.kind());
        engine = engine.reopen(asked)?;
        let (outcome, timelines) = steady_state(&mut engine, workload, &config, link_rate, total_host, &arguments)?;
        if index + 1 == workloads.len() {
            write_pictures(&engine, &timelines, &arguments)?;
        }
        if !arguments.json {
            print_outcome(&outcome, link_rate, arguments.emulate.is_some(), index == 0)?;
        }
        outcomes.push(outcome);
    }
    let mut rivals = Vec::new();
    if !arguments.rivals.is_empty() {
        let ours = outcomes.last().expect("one workload");
        let gpu_seconds_per_row = gpu_seconds_per_prompt_row(&mut engine, &ours.workload)?;
        for (index, rival) in arguments.rivals.iter().enumerate() {
            let (lengths, asked) = rival_batch(&engine, *rival, &ours.workload, &fixed, &wishes);
            if let Err(cause) = engine.plan_again(&asked) {
                say!(
                    "{rival} cannot run beside the same pages: {cause}; more micro-batches (+mN) or fewer residents make room"
                );
                continue;
            }
            engine = engine.reopen(asked)?;
            let measured = run_rival(&mut engine, *rival, &lengths, gpu_seconds_per_row, link_rate, &arguments)?;
            if !arguments.json {
                print_rival(&measured, rivals.last(), ours, index == 0)?;
            }
            rivals.push(measured);
        }
    }
    if arguments.json {
        print_line(serde_json::to_string_pretty(&document(&outcomes, &rivals, link_rate, &engine, &arguments))?)?;
    }
    Ok(OK)
}

fn write_pictures(engine: &Engine, timelines: &[Timeline], arguments: &Arguments) -> Result<()> {
    if let Some(path) = &arguments.timeline {
        let text = trace::svg(&timelines[timelines.len() / 2], &super::super::open::heading(engine));
        std::fs::write(path, text).with_context(|| format!("--timeline {}", path.display()))?;
    }
    if let Some(path) = &arguments.trace_file {
        let text = serde_json::to_string(&trace::chrome(timelines))?;
        std::fs::write(path, text).with_context(|| format!("--trace-file {}", path.display()))?;
    }
    Ok(())
}

/// Our way, in the middle of an endless run.
fn steady_state(
    engine: &mut Engine,
    workload: &Workload,
    config: &ModelConfig,
    link_rate: f64,
    total_host: u64,
    arguments: &Arguments,
) -> Result<(Outcome, Vec<Timeline>)> {
    let passes = arguments.warm_up + arguments.passes;
    // The profile is of the machine as it is.
    let lengths = workload.as_planned().filter(|_| arguments.emulate.is_none());
    let predicted = lengths.and_then(|lengths| engine.predict(lengths));
    let sequences = workload.running(engine.plan().policy.max_sequences);
    let mut bar = progress::PassProgress::new(&workload.name, passes);
    let started = Instant::now();
    let (mut ends, mut timelines) = (Vec::new(), Vec::new());
    let (mut prompt_rows, mut decode_rows, mut generated) = (0, 0, 0);
    let mut fresh = workload.fresh(config.shape.vocab);
    let mut warm = Pair::default();
    let (summary, _) = engine.run_warm(&sequences, &mut fresh, passes, &mut |report| {
        ends.push(Instant::now());
        bar.update(ends.len());
        if ends.len() <= arguments.warm_up {
            warm = report.comparison.map_or(warm, |comparison| comparison.all);
            return;
        }
        timelines.push(report.timeline.clone());
        for rows in &report.micro_batches {
            decode_rows += rows.n_decode();
            prompt_rows += rows.rows.len() - rows.n_decode();
            generated += rows.rows.iter().filter(|row| row.sampled).count();
        }
    })?;
    bar.finish();
    let begun = if arguments.warm_up == 0 { started } else { ends[arguments.warm_up - 1] };
    let wall = *ends.last().expect("at least one pass") - begun;
    let all = Timeline { spans: timelines.iter().flat_map(|timeline| timeline.spans.iter().copied()).collect() };
    let share = |busy: Duration| busy.as_secs_f64() / wall.as_secs_f64();
    let plan = engine.plan();
    let experts = engine.expert_bytes() as f64;
    let room = (engine.limits().device_bytes - plan.memory.dense_weights) as f64;
    let state = SteadyState {
        weight_bytes: experts - room.min(experts),
        kv_bytes_per_token: KvLayout::new(&config.shape, plan.policy.kv_dtype).bytes_per_token() as f64,
        kv_memory_bytes: (0.95 * total_host as f64 - experts).max(0.0),
        flops_per_token: 0.0,
        prompt_tokens: workload.mean_running(|length| length.prompt as f64),
        generated_tokens: workload.mean_running(|length| length.generated as f64),
    };
    let unbounded = Level { flops_per_s: f64::INFINITY, bytes_per_s: f64::INFINITY };
    let hierarchy = Hierarchy { device: unbounded, host: unbounded, link_bytes_per_s: link_rate };
    let tight = SteadyState { kv_memory_bytes: (0.95 * total_host as f64 - state.weight_bytes).max(0.0), ..state };
    let outcome = Outcome {
        workload: workload.clone(),
        sequences: sequences.len(),
        wall,
        passes: arguments.passes,
        prompt_rows,
        decode_rows,
        generated,
        page_bytes: all.page_bytes(),
        busy: Lane::ALL.map(|lane| (lane, share(all.busy(lane)))).to_vec(),
        busy_any: share(all.busy_any()),
        idle: all.link_idle(),
        preemptions: summary.batch.preemptions,
        bound: steady_state_bound(&hierarchy, &state),
        bound_sequences: state.requests(),
        tight_bound: steady_state_bound(&hierarchy, &tight),
        predicted: predicted.map(|choice| choice.tokens_per_second),
        comparison: summary.comparison.map(|comparison| comparison.all.since(warm)),
    };
    Ok((outcome, timelines))
}

/// GPU time of a prompt row where passes hold as many as they can.
fn gpu_seconds_per_prompt_row(engine: &mut Engine, workload: &Workload) -> Result<f64> {
    let vocab = engine.config().shape.vocab;
    let mut prompts = workload.fresh(vocab).map(|mut request| {
        request.params.max_tokens = Some(1);
        request
    });
    let (mut rows, mut busy) = (0, Duration::ZERO);
    let mut pass = 0;
    engine.run_warm(&[], &mut prompts, 3, &mut |report| {
        pass += 1;
        if pass > 1 {
            rows += report.micro_batches.iter().map(|rows| rows.rows.len()).sum::<usize>();
            busy += report.timeline.busy(Lane::Gpu);
        }
    })?;
    Ok(busy.as_secs_f64() / rows as f64)
}

/// A rival's batch, as the pool has room for it to the last token, and the policy that it runs under.
fn rival_batch(
    engine: &Engine,
    rival: Rival,
    workload: &Workload,
    fixed: &dyn Fn(Wishes) -> Wishes,
    wishes: &Wishes,
) -> (Vec<Length>, Wishes) {
    let kv_blocks = engine.plan().policy.kv_blocks;
    let longest_prompt = workload.longest_prompt();
    let mut taken = 0;
    let lengths: Vec<Length> = workload
        .lengths
        .iter()
        .cycle()
        .map(|length| Length { prompt: if rival.padded { longest_prompt } else { length.prompt }, ..*length })
        .take_while(|length| {
            taken += KvLayout::blocks_for(length.prompt + length.generated);
            taken <= kv_blocks
        })
        .take(wishes.max_sequences.unwrap_or(usize::MAX))
        .collect();
    let entry = rival.entry;
    let micro_batches = entry.micro_batches.or(wishes.micro_batches).unwrap_or(4).min(lengths.len().max(1));
    let mut asked = fixed(Wishes {
        schedule: Some(entry.kind),
        rows: entry.rows.or(wishes.rows),
        attention: entry.kind.attention().or(wishes.attention),
        max_sequences: Some(lengths.len()),
        micro_batches: Some(micro_batches),
        expert_groups: if entry.kind == ScheduleKind::Grouped { wishes.expert_groups } else { None },
        pass_rows: Some(lengths.len().next_multiple_of(micro_batches)),
        ..*wishes
    });
    asked.source = engine.page_source().map(|source| match (entry.relay, source.kind()) {
        (true, _) => SourceKind::Relay,
        (false, SourceKind::Relay) => SourceKind::Imported,
        (false, kind) => kind,
    });
    (lengths, asked)
}

/// One batch by another way: its decode passes at half of their completion.
fn run_rival(
    engine: &mut Engine,
    rival: Rival,
    lengths: &[Length],
    gpu_seconds_per_row: f64,
    link_rate: f64,
    arguments: &Arguments,
) -> Result<RivalOutcome> {
    let passes = 1 + arguments.rival_passes;
    let sequences: Vec<WarmSequence> = lengths
        .iter()
        .map(|length| {
            let age = (length.generated / 2).max(1);
            WarmSequence { prompt: length.prompt, generated: age, left: passes + 1 }
        })
        .collect();
    let mut bar = progress::PassProgress::new(&rival.to_string(), passes);
    let mut ends = vec![Instant::now()];
    let (mut timelines, mut warm) = (Vec::new(), Pair::default());
    let (summary, _) = engine.run_warm(&sequences, &mut std::iter::empty(), passes, &mut |report| {
        ends.push(Instant::now());
        bar.update(ends.len() - 1);
        if ends.len() > 2 {
            timelines.push(report.timeline.clone());
        } else {
            warm = report.comparison.map_or(warm, |comparison| comparison.all);
        }
    })?;
    bar.finish();
    let wall = *ends.last().expect("passes ran") - ends[1];
    let mut steps: Vec<Duration> = ends[1..].windows(2).map(|pair| pair[1] - pair[0]).collect();
    steps.sort_unstable();
    let step = steps[steps.len() / 2];
    let all = Timeline { spans: timelines.iter().flat_map(|timeline| timeline.spans.iter().copied()).collect() };
    let prompt_rows: usize = lengths.iter().map(|length| length.prompt).sum();
    let generated: usize = lengths.iter().map(|length| length.generated).sum();
    // A batch is done when its longest answer is; all its rows stay to the end.
    let decode_passes = lengths.iter().map(|length| length.generated).max().unwrap_or(1) - 1;
    let prefill = Duration::from_secs_f64(prompt_rows as f64 * gpu_seconds_per_row);
    // One trip of the weights over the link at least. A relay takes as long for it as in a pass of decode rows.
    let trip = if rival.entry.relay {
        step
    } else {
        Duration::from_secs_f64(engine.plan().streamed_bytes_per_pass as f64 / link_rate)
    };
    let prefill = prefill.max(trip);
    Ok(RivalOutcome {
        rival,
        sequences: lengths.len(),
        micro_batches: engine.plan().policy.micro_batches,
        step,
        prefill,
        total: prefill + step * decode_passes as u32,
        generated,
        busy: Lane::ALL.map(|lane| (lane, all.busy(lane).as_secs_f64() / wall.as_secs_f64())).to_vec(),
        comparison: summary.comparison.map(|comparison| comparison.all.since(warm)),
    })
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

fn lanes(busy: &[(Lane, f64)]) -> String {
    busy.iter().map(|(lane, share)| format!("{} {:.0} %", lane.name(), 100.0 * share)).collect::<Vec<_>>().join(" · ")
}

const HEADINGS: &str = "workload        requests     prompt rows  decode rows     a pass      tok/s  prompt tok/s   bound tok/s  of bound   pages GB/s  of link";

fn print_outcome(o: &Outcome, link_rate: f64, emulated: bool, first: bool) -> Result<()> {
    if first {
        print_line(HEADINGS)?;
    }
    let each = |n: usize| format!("{:.0} a pass", n as f64 / o.passes as f64);
    let pages = o.page_bytes as f64 / o.wall.as_secs_f64();
    print_line(format!(
        "{:<16}{:>8}{:>16}{:>13}{:>11}{:>11.1}{:>14.1}{:>14}{:>10}{:>13.1}{:>9}",
        o.workload.name,
        o.sequences,
        each(o.prompt_rows),
        each(o.decode_rows),
        format!("{:.3} s", o.wall.as_secs_f64() / o.passes as f64),
        o.tokens_per_second(),
        o.per_second(o.prompt_rows),
        if o.is_bounded() { format!("{:.1}", o.bound.tokens_per_second) } else { "none".to_owned() },
        if o.is_bounded() { percent(o.tokens_per_second() / o.bound.tokens_per_second) } else { String::new() },
        pages / 1e9,
        percent(pages / link_rate),
    ))?;
    if let Some(predicted) = o.predicted {
        let passes = o
            .comparison
            .and_then(|passes| passes.ratio())
            .map_or_else(String::new, |ratio| format!("; the passes as they came, {ratio:.3} x"));
        print_line(format!(
            "    predicted from the lengths: {predicted:.1} tok/s, {:.3} x what was measured{passes}",
            predicted / o.tokens_per_second()
        ))?;
    }
    if emulated {
        return Ok(()); // copies that were held back are not seen as such
    }
    let wall = o.wall.as_secs_f64();
    let share = |idle: Duration| percent(idle.as_secs_f64() / wall);
    let bound = if o.is_bounded() {
        let (n, seconds) = (o.bound_sequences, o.bound.pass_seconds);
        let (roof, tight) = (o.bound.binding().roof.name(), o.tight_bound.tokens_per_second);
        let share = percent(o.tokens_per_second() / tight);
        format!(
            "{n:.0} requests in passes of {seconds:.3} s, the {roof} binds; {tight:.1} tok/s if what stays on the GPU has no copy on the host ({share})"
        )
    } else {
        "none, all experts would fit on the GPU".to_owned()
    };
    print_line(format!(
        "    bound: {bound}; busy: {}; no lane {}; preemptions {}",
        lanes(&o.busy),
        percent(1.0 - o.busy_any),
        o.preemptions,
    ))?;
    print_line(format!(
        "    link idle while the GPU computes {}, while only the CPU does {}, while neither does {}",
        share(o.idle.gpu_busy),
        share(o.idle.cpu_busy),
        share(o.idle.none_busy),
    ))
}

/// Listed from the slowest to the fastest, each line's ratio to the one above is what one more change gives.
fn print_rival(r: &RivalOutcome, above: Option<&RivalOutcome>, ours: &Outcome, first: bool) -> Result<()> {
    if first {
        print_line(format!("\nrivals on {}, one batch each", ours.workload.name))?;
        print_line(
            "way                        sequences  micro-b.   decode pass   prefill     batch      tok/s  above x   ours is  predicted",
        )?;
    }
    print_line(format!(
        "{:<27}{:>9}{:>10}{:>14}{:>10}{:>10}{:>11.1}{:>9}{:>10}{:>11}   {}",
        r.rival.to_string(),
        r.sequences,
        r.micro_batches,
        format!("{:.3} s", r.step.as_secs_f64()),
        format!("{:.1} s", r.prefill.as_secs_f64()),
        format!("{:.0} s", r.total.as_secs_f64()),
        r.tokens_per_second(),
        above.map_or_else(String::new, |above| format!("{:.2}", r.tokens_per_second() / above.tokens_per_second())),
        format!("{:.2} x", ours.tokens_per_second() / r.tokens_per_second()),
        r.comparison.and_then(|passes| passes.ratio()).map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2} x")),
        lanes(&r.busy),
    ))
}

fn document(
    outcomes: &[Outcome],
    rivals: &[RivalOutcome],
    link_rate: f64,
    engine: &Engine,
    arguments: &Arguments,
) -> serde_json::Value {
    let shares = |busy: &[(Lane, f64)]| -> serde_json::Map<_, _> {
        busy.iter().map(|(lane, share)| (lane.name().to_owned(), json!(share))).collect()
    };
    let ours: Vec<_> = outcomes
        .iter()
        .map(|o| {
            let wall = o.wall.as_secs_f64();
            let requests = o.generated as f64
                / (o.workload.generated() as f64 / o.workload.lengths.len() as f64);
            json!({
                "workload": o.workload.name, "sequences": o.sequences, "passes": o.passes,
                // The keys of vLLM's throughput benchmark. Requests are counted by their tokens, since none begins and ends here.
                "elapsed_time": wall, "num_requests": requests, "total_num_tokens": o.prompt_rows + o.generated,
                "requests_per_second": requests / wall,
                "tokens_per_second": (o.prompt_rows + o.generated) as f64 / wall,
                "output_tokens_per_second": o.tokens_per_second(), "prompt_tokens_per_second": o.per_second(o.prompt_rows),
                // The columns of llama.cpp's batched benchmark, of a mean request: prefill and decode share their passes here.
                "pp": o.workload.mean_running(|length| length.prompt as f64),
                "tg": o.workload.mean_running(|length| length.generated as f64), "pl": o.sequences,
                "speed_pp": o.per_second(o.prompt_rows), "speed_tg": o.tokens_per_second(), "t": wall,
                "speed": (o.prompt_rows + o.generated) as f64 / wall,
                "bound": o.bound, "bound_sequences": o.bound_sequences,
                "share_of_bound": o.tokens_per_second() / o.bound.tokens_per_second, "tight_bound": o.tight_bound,
                "predicted_tokens_per_second": o.predicted,
                "prediction": o.comparison,
                "page_bytes": o.page_bytes, "share_of_link": o.page_bytes as f64 / wall / link_rate,
                "busy_share": shares(&o.busy), "any_busy_share": o.busy_any,
                "link_idle_seconds": {
                    "gpu_busy": o.idle.gpu_busy.as_secs_f64(), "cpu_busy": o.idle.cpu_busy.as_secs_f64(),
                    "none_busy": o.idle.none_busy.as_secs_f64(),
                },
                "preemptions": o.preemptions,
            })
        })
        .collect();
    let rivals: Vec<_> = rivals
        .iter()
        .map(|r| {
            json!({
                "way": r.rival.to_string(), "sequences": r.sequences, "micro_batches": r.micro_batches,
                "decode_pass_seconds": r.step.as_secs_f64(), "prefill_seconds": r.prefill.as_secs_f64(),
                "batch_seconds": r.total.as_secs_f64(), "tokens_per_second": r.tokens_per_second(),
                "busy_share": shares(&r.busy), "prediction": r.comparison,
            })
        })
        .collect();
    json!({
        "adapter": engine.gpu().summary(), "link_bytes_per_second": link_rate, "emulated": arguments.emulate.map(|_| "t4"),
        "policy": engine.plan().policy, "workloads": ours, "rivals": rivals,
    })
}
