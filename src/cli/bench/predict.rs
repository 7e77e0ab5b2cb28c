//! `fulmen bench predict`: predictions against the clock, and the chosen policy against its neighbours.
//!
//! Decode in steady state ([`Engine::run_warm`]) under policies that are drawn by a printed seed, then under the policy that the
//! search chooses for such decoding and under its neighbours, one step in each direction of the grid. Each is predicted from the
//! profile before it is measured. All experts are loaded into host memory once, also those that a policy keeps on the GPU, and all
//! policies run from there; the pool is what is left.
//!
//! The most device memory that buffers had at a time is held against what was planned: a policy that takes more fails the run.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::json;

use super::super::open::{EngineArguments, load, model_config};
use super::super::{OK, Usage, print_line};
use crate::checkpoint::synthetic::Random;
use crate::engine::{Engine, WarmSequence};
use crate::memory::kv_cache::KvLayout;
use crate::model::ModelConfig;
use crate::plan::cost::{PassRows, Predictor};
use crate::plan::search::{PAGES, Problem, SPLITS, sequence_grid};
use crate::plan::workload::Workload;
use crate::plan::{MachineLimits, ModelBytes, Plan, Wishes, fit};
use crate::policy::{AttentionPlace, KvDtype, Policy};
use crate::profile::Profile;
use crate::schedule::Lane;
use crate::units::human_bytes;

#[derive(Debug, Args)]
pub struct Arguments {
    /// Made-up weights of a published shape (mixtral-8x7b, …) or of mixtral-tiny
    #[arg(long, value_name = "SHAPE")]
    synthetic: String,
    /// Layers of the made-up model [default: the shape's]
    #[arg(long, value_name = "N")]
    layers: Option<usize>,
    /// Prompt tokens of every sequence
    #[arg(long, value_name = "TOKENS", default_value_t = 418)]
    prompt_len: usize,
    /// Tokens that a sequence generates: ages are spread evenly from none to all but one
    #[arg(long, value_name = "TOKENS", default_value_t = 128)]
    gen_len: usize,
    /// Policies to draw
    #[arg(long, value_name = "N", default_value_t = 6)]
    policies: usize,
    /// Seed that they are drawn by
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Most sequences of a drawn policy
    #[arg(long, value_name = "N", default_value_t = 2048)]
    most_sequences: usize,
    /// Also the policy that the search chooses, and its neighbours
    #[arg(long)]
    sweep: bool,
    /// Passes that count
    #[arg(long, value_name = "N", default_value_t = 4)]
    passes: usize,
    /// Passes in front of them that do not
    #[arg(long, value_name = "N", default_value_t = 2)]
    warm_up: usize,
    /// Begin no policy after so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    seconds: u64,
    /// One JSON object instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    engine: EngineArguments,
}

/// A policy to run, and what it is.
struct Case {
    label: String,
    wishes: Wishes,
    /// Of the sweep around the choice.
    swept: bool,
}

/// The policy that the search chose; it runs first, and again after others.
const CHOSEN: [&str; 2] = ["chosen", "chosen, again"];

/// What became of it.
struct Outcome {
    label: String,
    swept: bool,
    plan: Plan,
    predicted: f64,
    measured: f64,
    /// Predicted over measured time of each lane.
    lanes: Vec<(Lane, Option<f64>)>,
    /// Most device memory that buffers had at a time, and what the driver counts at the end, for everything.
    peak: u64,
    used: Option<u64>,
}

impl Outcome {
    fn rate(&self, seconds: f64) -> f64 {
        self.plan.policy.max_sequences as f64 / seconds
    }
}

/// All that a case is predicted and run with.
struct Bench<'a> {
    config: &'a ModelConfig,
    bytes: ModelBytes,
    limits: MachineLimits,
    profile: &'a Profile,
    arguments: &'a Arguments,
}

pub fn run(arguments: Arguments) -> Result<u8> {
    arguments.engine.refuse_policies("bench predict")?;
    if arguments.passes == 0 || arguments.gen_len == 0 || arguments.prompt_len == 0 || arguments.most_sequences == 0 {
        bail!(Usage("--passes, --gen-len, --prompt-len and --most-sequences must be at least 1".to_owned()));
    }
    let config = model_config(None, Some(&arguments.synthetic), arguments.layers)?;
    let builder = arguments.engine.apply(Engine::synthetic(config.clone()))?;
    // The least there can be: only what the machine is and may give is asked for.
    let least = Wishes { max_sequences: Some(1), pass_rows: Some(1), micro_batches: Some(1), ..Wishes::default() };
    let prepared = builder.clone().wishes(least).prepare()?;
    let Some(profile) = prepared.profile().cloned() else {
        bail!(
            "nothing was measured on this machine for this model: run `fulmen calibrate --synthetic {}`",
            arguments.synthetic
        );
    };
    let (limits, bytes) = (*prepared.limits(), ModelBytes::of(prepared.weights().inventory()));
    drop(prepared);
    let bench = Bench { config: &config, bytes, limits, profile: &profile, arguments: &arguments };
    let mut cases = bench.drawn()?;
    if arguments.sweep {
        // The choice and its nearest neighbours go first, what is further away last: there may be no time for all. What is drawn
        // stands between, and the choice once more behind it.
        let mut swept = bench.around_the_choice()?;
        let near = swept.len().min(10);
        cases.extend(swept.pop_if(|case| case.label == CHOSEN[1]));
        swept.splice(near..near, cases);
        cases = swept;
    }
    say!("seed {}: {} policies", arguments.seed, cases.len());
    let started = Instant::now();
    let mut outcomes: Vec<Outcome> = Vec::new();
    if !arguments.json {
        print_line(HEADINGS)?;
    }
    // One pool for all of them.
    let mut planned: Vec<(Case, Plan)> = Vec::new();
    for case in cases {
        match fit(&config, &bytes, &limits, &case.wishes) {
            Ok(plan) if !bench.attends(&plan) => say!("{}: its contexts do not fit a workspace on the GPU", case.label),
            Ok(plan) if plan.memory.kv_pool > bench.pool_bytes() => {
                let (needed, there) = (human_bytes(plan.memory.kv_pool), human_bytes(bench.pool_bytes()));
                say!("{}: {needed} of keys and values, {there} are left beside all experts", case.label);
            }
            Ok(plan) => planned.push((case, plan)),
            Err(error) => say!("{}: {error}", case.label),
        }
    }
    let pool = planned.iter().map(|(_, plan)| plan.memory.kv_pool).max();
    let pool = Wishes { kv_bytes: pool, ..Wishes::default() };
    // Experts of all layers stream from the host's memory where none stays; how is each policy's own affair.
    let all = Wishes { resident_experts: Some(0), ring_experts: Some(1), ..least };
    let builder = builder.wishes(Wishes { kv_bytes: pool.kv_bytes, ..all });
    let prepared = builder.prepare()?;
    if prepared.plan().memory.host_weights == 0 {
        bail!(
            "beside {} of keys and values the host's memory has no room for the experts (--host-memory, --most-sequences)",
            human_bytes(pool.kv_bytes.unwrap_or(0))
        );
    }
    let mut engine = load(prepared)?;
    let source = engine.page_source().map(|source| source.kind());
    for (case, plan) in planned {
        if started.elapsed() > Duration::from_secs(arguments.seconds) {
            say!("{}: left out, the time is over", case.label);
            continue;
        }
        let streams = plan.streamed_bytes_per_pass > 0;
        let wishes = Wishes { kv_bytes: pool.kv_bytes, source: source.filter(|_| streams), ..case.wishes };
        if let Err(error) = fit(&config, &bytes, &limits, &Wishes { source: None, ..wishes }) {
            say!("{}: beside the others' keys and values: {error}", case.label);
            continue;
        }
        engine = engine.reopen(wishes).with_context(|| case.label.clone())?;
        let outcome = bench.measure(&mut engine, &case)?;
        if !arguments.json {
            print_line(line(&outcome))?;
        }
        outcomes.push(outcome);
    }
    conclude(&outcomes);
    if arguments.json {
        let rows: Vec<_> = outcomes.iter().map(row).collect();
        print_line(serde_json::to_string_pretty(&json!({ "seed": arguments.seed, "policies": rows }))?)?;
    }
    if let Some(o) = outcomes.iter().find(|o| o.peak > o.plan.memory.device()) {
        bail!(
            "{}: {} of device memory were taken, {} planned",
            o.label,
            human_bytes(o.peak),
            human_bytes(o.plan.memory.device())
        );
    }
    Ok(OK)
}

impl Bench<'_> {
    /// Of sequences whose ages are spread evenly.
    fn mean_context(&self) -> f64 {
        self.arguments.prompt_len as f64 + self.arguments.gen_len as f64 / 2.0
    }

    /// Tokens of the longest sequence, with what the passes add.
    fn longest(&self) -> usize {
        let Arguments { prompt_len, gen_len, passes, warm_up, .. } = self.arguments;
        prompt_len + gen_len + passes + warm_up + 2
    }

    /// What a policy of `n` decoding sequences asks for, beside its cut of the experts.
    fn decoding(&self, n: usize, splits: (usize, usize), attention: AttentionPlace) -> Wishes {
        let shape = &self.config.shape;
        let layout = KvLayout::new(shape, KvDtype::F16);
        Wishes {
            max_sequences: Some(n),
            micro_batches: Some(splits.0),
            expert_groups: Some(splits.1),
            pass_rows: Some(n.next_multiple_of(splits.0)),
            attention: Some(attention),
            max_model_len: Some(self.longest().next_multiple_of(64).min(self.config.max_positions)),
            kv_bytes: Some(((self.blocks(n) + 1) * layout.bytes_per_block()) as u64),
            threads: Some(self.profile.cpu.best_threads().min(self.limits.threads).max(1)),
            ..Wishes::default()
        }
    }

    /// What the host's memory has for keys and values beside the experts of all layers: asked for, else what is left. A part goes to
    /// rows and pages on their way.
    fn pool_bytes(&self) -> u64 {
        let all = (self.config.shape.layers * self.config.shape.experts) as u64 * self.bytes.expert();
        let left = self.limits.host_bytes.saturating_sub(all);
        self.arguments.engine.wishes().kv_bytes.unwrap_or(left / 16 * 15)
    }

    /// Blocks that `n` sequences fill in the end, of ages spread evenly.
    fn blocks(&self, n: usize) -> usize {
        let Arguments { prompt_len, gen_len, passes, warm_up, .. } = self.arguments;
        let end = |number: usize| prompt_len + number * 7919 % n * gen_len / n + passes + warm_up + 2;
        (0..n).map(|number| KvLayout::blocks_for(end(number))).sum()
    }

    /// The workspace has room for all that attends on the GPU at a time.
    fn attends(&self, plan: &Plan) -> bool {
        let policy = &plan.policy;
        // Micro-batches are alike but for a sequence or two.
        let blocks = self.blocks(policy.max_sequences).div_ceil(policy.micro_batches);
        let blocks = (blocks + 2 * KvLayout::blocks_for(self.longest())).min(policy.kv_blocks);
        policy.attention == AttentionPlace::Cpu || blocks <= policy.workspace_blocks
    }

    /// Policies drawn by the seed, which differ at least twofold in all that they may.
    fn drawn(&self) -> Result<Vec<Case>> {
        let mut random = Random::new(self.arguments.seed);
        let mut pick = |n: usize| (random.bits() % n as u64) as usize;
        let most = self.arguments.most_sequences;
        let pages = [8u64 << 20, 32 << 20, 128 << 20]; // far apart
        let mut cases = Vec::new();
        // The extremes are always among them: sequences, splits and pages go through all of their values in a drawn order.
        let (first, step) = (pick(4), [1, 3][pick(2)]);
        for number in 0..self.arguments.policies {
            let n = (most >> ((first + number * step) % 4)).max(1);
            let split = SPLITS[(pick(SPLITS.len()) + number) % SPLITS.len()];
            let attention = if (number + first).is_multiple_of(3) { AttentionPlace::Gpu } else { AttentionPlace::Cpu };
            let page_bytes = pages[(first + number) % pages.len()];
            let experts = self.config.shape.experts;
            let wishes = |n: usize| Wishes {
                page_bytes: Some(page_bytes),
                resident_experts: Some(0),
                ring_experts: Some((2 * experts).min(self.config.shape.layers * experts)),
                ..self.decoding(n, if split.0 > n { (1, 1) } else { split }, attention)
            };
            // As many as fit, also in a workspace on the GPU.
            let mut n = n;
            while n > 1
                && !fit(self.config, &self.bytes, &self.limits, &wishes(n)).is_ok_and(|plan| self.attends(&plan))
            {
                n /= 2;
            }
            let wishes = wishes(n);
            cases.push(Case { label: format!("drawn {}", number + 1), wishes, swept: false });
        }
        Ok(cases)
    }

    /// The choice for decoding, and its neighbours.
    fn around_the_choice(&self) -> Result<Vec<Case>> {
        // As good as no prompt rows: these sequences have theirs.
        let workload = Workload {
            prompt_tokens: 1.0,
            generated_tokens: 1e6,
            context_tokens: self.mean_context(),
            longest: self.longest(),
            requests: None,
        };
        let longest = self.longest().next_multiple_of(64).min(self.config.max_positions);
        let problem = Problem {
            config: self.config,
            bytes: self.bytes,
            profile: self.profile,
            limits: self.limits,
            margin: self.arguments.engine.margin(),
            wishes: Wishes {
                max_model_len: Some(longest),
                kv_bytes: Some(self.pool_bytes()),
                ..self.arguments.engine.wishes()
            },
            workload,
        };
        let started = Instant::now();
        let found = problem.search()?;
        let policy = found.best.plan.policy;
        say!(
            "the search chose among {} in {:.1} s: {:.1} tok/s predicted\n{}",
            found.fitting,
            started.elapsed().as_secs_f64(),
            found.best.tokens_per_second,
            found.best.plan
        );
        let split = (policy.micro_batches, policy.expert_groups);
        let streams = policy.resident_experts < self.config.shape.experts;
        // As many residents as each has room for.
        let of = |n: usize, split: (usize, usize), attention: AttentionPlace| Wishes {
            ring_experts: streams.then_some(policy.ring_experts),
            page_bytes: streams.then_some(policy.page_bytes),
            ..self.decoding(n, split, attention)
        };
        // As many of them as these ages leave room for: the search knows their mean alone.
        let mut n = policy.max_sequences;
        let block_bytes = KvLayout::new(&self.config.shape, KvDtype::F16).bytes_per_block() as u64;
        while n > policy.micro_batches && (self.blocks(n) + 1) as u64 * block_bytes > self.pool_bytes() {
            n -= policy.micro_batches;
        }
        let residents = Wishes {
            resident_experts: Some(policy.resident_experts),
            extra_residents: Some(policy.extra_residents),
            ..of(n, split, policy.attention)
        };
        let mut cases = vec![Case { label: CHOSEN[0].into(), wishes: residents, swept: true }];
        let mut add = |label: String, wishes: Wishes| cases.push(Case { label, wishes, swept: true });
        // One step each way first, then further away, as far as there is time.
        let ordered = |mut values: Vec<u64>, own: u64| {
            values.sort_unstable();
            values.retain(|value| *value != own);
            let above = values.partition_point(|value| *value < own);
            let next = [above.checked_sub(1), Some(above)].into_iter().flatten();
            next.filter_map(|at| values.get(at).copied()).collect::<Vec<u64>>()
        };
        let grid = sequence_grid();
        let at = grid.partition_point(|other| *other < n);
        let place = SPLITS.iter().position(|other| *other == split).unwrap_or(0);
        let mut splits: Vec<usize> =
            (0..SPLITS.len()).filter(|other| *other != place && SPLITS[*other].0 <= n).collect();
        splits.sort_by_key(|other| other.abs_diff(place));
        let (near, far) = splits.split_at(splits.len().min(2));
        for other in
            [at.wrapping_sub(1), at + 1].into_iter().filter_map(|index| grid.get(index)).filter(|other| **other != n)
        {
            add(format!("{other} sequences"), of(*other, split, policy.attention));
        }
        let split_into = |other: &usize| {
            let (micro_batches, groups) = SPLITS[*other];
            (format!("{micro_batches} micro-batches, {groups} groups"), of(n, SPLITS[*other], policy.attention))
        };
        near.iter().map(split_into).for_each(|(label, wishes)| add(label, wishes));
        let wishes = of(n, split, policy.attention);
        if streams {
            for page in ordered(PAGES.to_vec(), policy.page_bytes) {
                add(format!("pages of {}", human_bytes(page)), Wishes { page_bytes: Some(page), ..wishes });
            }
            let experts = self.config.shape.experts as u64;
            let rings = [1, 2, 4, 6, 8].map(|quarters| (quarters * experts).div_ceil(4)).to_vec();
            for ring in ordered(rings, policy.ring_experts as u64) {
                add(format!("a ring of {ring}"), Wishes { ring_experts: Some(ring as usize), ..wishes });
            }
        }
        let other = match policy.attention {
            AttentionPlace::Cpu => AttentionPlace::Gpu,
            AttentionPlace::Gpu => AttentionPlace::Cpu,
        };
        add(format!("attention on the {}", other.name()), of(n, split, other));
        far.iter().take(6).map(split_into).for_each(|(label, wishes)| add(label, wishes));
        if let Some(other) = at.checked_sub(12).map(|index| grid[index]) {
            add(format!("{other} sequences"), of(other, split, policy.attention));
        }
        add(CHOSEN[1].into(), residents);
        Ok(cases)
    }

    fn measure(&self, engine: &mut Engine, case: &Case) -> Result<Outcome> {
        let Arguments { prompt_len, gen_len, passes, warm_up, .. } = self.arguments;
        let plan = *engine.plan();
        let n = plan.policy.max_sequences;
        let predictor = Predictor::new(self.config, &self.bytes, &plan, self.profile)?;
        let context = self.mean_context() + (warm_up + passes / 2) as f64;
        let rows = PassRows::spread(self.config, &plan.policy, n as f64, context, 0.0, 1.0);
        let predicted = predictor.pass_seconds(&rows);
        let sequences: Vec<WarmSequence> = (0..n)
            .map(|number| WarmSequence {
                prompt: *prompt_len,
                generated: 1 + number * 7919 % n * gen_len / n,
                left: warm_up + passes + 1,
            })
            .collect();
        let mut ends = Vec::new();
        let (summary, _) = engine
            .run_warm(&sequences, &mut std::iter::empty(), warm_up + passes, &mut |_| ends.push(Instant::now()))?;
        let mut steps: Vec<f64> =
            ends[warm_up.saturating_sub(1)..].windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect();
        steps.sort_by(f64::total_cmp);
        let measured = steps.get(steps.len() / 2).copied().unwrap_or(summary.elapsed.as_secs_f64());
        let comparison = summary.comparison.unwrap_or_default();
        let lanes = comparison.lanes.iter().map(|(lane, pair)| (*lane, pair.ratio())).collect();
        let (peak, used) = (engine.gpu().take_peak_bytes(), engine.gpu().used_memory_bytes());
        Ok(Outcome { label: case.label.clone(), swept: case.swept, plan, predicted, measured, lanes, peak, used })
    }
}

const HEADINGS: &str = "policy                      sequences  micro-b. groups  attention  pages      resident ring   predicted    measured   ratio     tok/s   peak of planned        lanes";

fn line(o: &Outcome) -> String {
    let p = &o.plan.policy;
    let ratio = |ratio: Option<f64>| ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.2}"));
    let lanes: Vec<String> = o.lanes.iter().map(|(lane, of)| format!("{} {}", lane.name(), ratio(*of))).collect();
    format!(
        "{:<28}{:>9}{:>10}{:>7}  {:<11}{:<11}{:>8}{:>5}{:>9.1} ms{:>9.1} ms{:>8.3}{:>10.1}   {} of {}   {}",
        o.label,
        p.max_sequences,
        p.micro_batches,
        p.expert_groups,
        p.attention.name(),
        human_bytes(p.page_bytes),
        format!("{}+{}", p.resident_experts, p.extra_residents),
        p.ring_experts,
        o.predicted * 1e3,
        o.measured * 1e3,
        o.predicted / o.measured,
        o.rate(o.measured),
        human_bytes(o.peak),
        human_bytes(o.plan.memory.device()),
        lanes.join(", "),
    )
}

fn row(o: &Outcome) -> serde_json::Value {
    let lanes: serde_json::Map<_, _> =
        o.lanes.iter().map(|(lane, ratio)| (lane.name().to_owned(), json!(ratio))).collect();
    json!({
        "label": o.label, "swept": o.swept, "policy": o.plan.policy, "predicted_seconds": o.predicted,
        "measured_seconds": o.measured, "ratio": o.predicted / o.measured, "tokens_per_second": o.rate(o.measured),
        "lane_ratios": lanes, "device_bytes_peak": o.peak, "device_bytes_planned": o.plan.memory.device(),
        "device_bytes_by_driver": o.used,
    })
}

/// How far policies differ.
fn ranges(of: &[&Outcome]) -> String {
    let range = |what: fn(&Policy) -> u64| {
        let values = of.iter().map(|o| what(&o.plan.policy));
        (values.clone().min().unwrap_or(0), values.max().unwrap_or(0))
    };
    let (fewest, most) = range(|policy| policy.max_sequences as u64);
    let (micro_batch, largest) = range(|policy| policy.max_sequences.div_ceil(policy.micro_batches) as u64);
    let (group, groups) = range(|policy| policy.expert_groups as u64);
    let (page, pages) = range(|policy| policy.page_bytes);
    let on_cpu = of.iter().filter(|o| o.plan.policy.attention == AttentionPlace::Cpu).count();
    format!(
        "{fewest} to {most} sequences in micro-batches of {micro_batch} to {largest} and {group} to {groups} groups, pages of {} to {}, {on_cpu} \
         attend on the CPU",
        human_bytes(page),
        human_bytes(pages),
    )
}

/// The worst prediction, and how far the choice is from the best of its sweep.
fn conclude(outcomes: &[Outcome]) {
    let off = |o: &&Outcome| (o.predicted / o.measured - 1.0).abs();
    for (what, swept) in [("drawn", false), ("swept", true)] {
        let of: Vec<&Outcome> = outcomes.iter().filter(|o| o.swept == swept).collect();
        if let Some(worst) = of.iter().max_by(|a, b| off(a).total_cmp(&off(b))) {
            let mean = of.iter().map(off).sum::<f64>() / of.len() as f64;
            say!(
                "{} {what} ({}): predictions are off by {:.1} % on average, at most by {:.1} % ({})",
                of.len(),
                ranges(&of),
                100.0 * mean,
                100.0 * off(worst),
                worst.label
            );
        }
    }
    let swept = || outcomes.iter().filter(|o| o.swept);
    let best = swept().max_by(|a, b| a.rate(a.measured).total_cmp(&b.rate(b.measured)));
    let chosen: Vec<f64> = swept().filter(|o| CHOSEN.contains(&o.label.as_str())).map(|o| o.rate(o.measured)).collect();
    if let (Some(best), false) = (best, chosen.is_empty()) {
        let (top, own) = (best.rate(best.measured), chosen.iter().sum::<f64>() / chosen.len() as f64);
        say!(
            "chosen: {own:.1} tok/s, {:.1} % below the best of {} ({}, {top:.1} tok/s)",
            100.0 * (1.0 - own / top),
            swept().count() + 1 - chosen.len(),
            best.label
        );
    }
}
