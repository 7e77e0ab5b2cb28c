//! `fulmen bench pipeline`: schedules side by side.
//!
//! One model, real or made up, one set of pages in host memory, one set of sequences whose ages are spread evenly and whose keys
//! and values are made up ([`Engine::run_warm`]); each schedule decodes them from there. The first passes are not counted. What
//! must come out the same is compared: bit for bit where only the order changes, and for schedules that attend on another device
//! within themselves.
//!
//! The rate of the link alone is measured with the same pages and nothing else running; a schedule's pages over its wall time
//! are held against it.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::json;

use super::super::open::{EngineArguments, load, say_prepared};
use super::super::{OK, Usage, print_line, progress};
use crate::engine::{Engine, WarmSequence, WarmTokens};
use crate::model::{ModelConfig, presets};
use crate::plan::compare::Comparison;
use crate::policy::{AttentionPlace, RowPath, ScheduleKind, SourceKind};
use crate::request::lengths::MT_BENCH_PROMPTS;
use crate::schedule::{Lane, Timeline, trace};

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
    /// Prompt tokens of every sequence [default: the lengths of MT-Bench's 80 prompts in turn]
    #[arg(long, value_name = "TOKENS")]
    prompt_len: Option<usize>,
    /// Tokens that a sequence generates: ages are spread evenly from none to all but one
    #[arg(long, value_name = "TOKENS", default_value_t = 128)]
    gen_len: usize,
    /// Passes that count
    #[arg(long, value_name = "N", default_value_t = 20)]
    passes: usize,
    /// Passes in front of them that do not
    #[arg(long, value_name = "N", default_value_t = 3)]
    warm_up: usize,
    /// Schedules to run, in order: a schedule's name, with +relay for pages that are pinned one by one, +copies or +kernels for how
    /// rows cross the link, +mN for N micro-batches [default: all that there are]
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    schedules: Vec<Entry>,
    /// One JSON object instead of a table
    #[arg(long)]
    json: bool,
    /// Chrome/Perfetto trace of every pass of the last schedule
    #[arg(long, value_name = "FILE")]
    trace_file: Option<PathBuf>,
    /// Picture of two layers of each schedule; {} in the name stands for the schedule
    #[arg(long, value_name = "FILE.svg")]
    timeline: Option<String>,
    #[command(flatten)]
    engine: EngineArguments,
}

/// One line of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    pub kind: ScheduleKind,
    pub relay: bool,
    pub rows: Option<RowPath>,
    pub micro_batches: Option<usize>,
}

impl std::str::FromStr for Entry {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = text.split('+');
        let name = words.next().unwrap_or_default();
        let kind = ScheduleKind::ALL.into_iter().find(|kind| kind.name() == name);
        let names = || ScheduleKind::ALL.map(ScheduleKind::name).join(", ");
        let kind = kind.ok_or_else(|| format!("'{name}' is no schedule; there are {}", names()))?;
        let mut entry = Entry { kind, relay: false, rows: None, micro_batches: None };
        for word in words {
            match word {
                "relay" => entry.relay = true,
                "copies" => entry.rows = Some(RowPath::Copies),
                "kernels" => entry.rows = Some(RowPath::Kernels),
                _ => match word.strip_prefix('m').and_then(|n| n.parse().ok()) {
                    Some(n) => entry.micro_batches = Some(n),
                    None => return Err(format!("'+{word}' is not one of +relay, +copies, +kernels, +mN")),
                },
            }
        }
        Ok(entry)
    }
}

impl std::fmt::Display for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.kind)?;
        if self.relay {
            write!(f, "+relay")?;
        }
        match self.rows {
            Some(RowPath::Copies) => write!(f, "+copies")?,
            Some(RowPath::Kernels) => write!(f, "+kernels")?,
            None => {}
        }
        self.micro_batches.map_or(Ok(()), |n| write!(f, "+m{n}"))
    }
}

/// What one schedule did.
struct Outcome {
    entry: Entry,
    policy: crate::policy::Policy,
    wall: Duration,
    /// Of each counted pass.
    steps: Vec<Duration>,
    generated: usize,
    page_bytes: u64,
    link_bytes: u64,
    /// Share of the wall time in which each lane ran a task, and any lane.
    busy: Vec<(Lane, f64)>,
    busy_any: f64,
    tokens: WarmTokens,
    /// How well its passes were predicted, where the machine was measured.
    comparison: Option<Comparison>,
}

impl Outcome {
    fn tokens_per_second(&self) -> f64 {
        self.generated as f64 / self.wall.as_secs_f64()
    }

    fn page_rate(&self) -> f64 {
        self.page_bytes as f64 / self.wall.as_secs_f64()
    }

    fn median_step(&self) -> Duration {
        let mut steps = self.steps.clone();
        steps.sort_unstable();
        steps.get(steps.len() / 2).copied().unwrap_or_default()
    }
}

/// A shape by name.
pub fn shape(name: &str, layers: Option<usize>) -> Result<ModelConfig> {
    let mut config = match name {
        "mixtral-tiny" => presets::mixtral_tiny(),
        name => presets::preset(name).ok_or_else(|| {
            let names = presets::NAMES.join(", ");
            Usage(format!("--synthetic {name}: there are {names} and mixtral-tiny"))
        })?,
    };
    if let Some(layers) = layers {
        if layers == 0 || layers > config.shape.layers {
            let most = config.shape.layers;
            bail!(Usage(format!("--layers is {layers}; {name} has {most}, so it must be 1 to {most}")));
        }
        config.keep_layers(layers);
    }
    Ok(config)
}

pub fn run(arguments: Arguments) -> Result<u8> {
    arguments.engine.refuse_policies("bench pipeline")?;
    let builder = match (&arguments.model, &arguments.synthetic) {
        (_, Some(name)) => Engine::synthetic(shape(name, arguments.layers)?),
        (Some(folder), None) => Engine::builder(folder),
        (None, None) => unreachable!("one of them is required"),
    };
    let base = arguments.engine.wishes();
    let n = base.max_sequences.unwrap_or(256);
    let passes = arguments.warm_up + arguments.passes;
    if arguments.passes == 0 || arguments.gen_len == 0 {
        bail!(Usage("--passes and --gen-len must be at least 1".to_owned()));
    }
    let sequences: Vec<WarmSequence> = (0..n)
        .map(|number| {
            let prompt = arguments.prompt_len.unwrap_or(MT_BENCH_PROMPTS[number % MT_BENCH_PROMPTS.len()]).max(1);
            // 0, 1/n, 2/n … of all ages, in an order that gives each micro-batch old and young ones.
            let age = number * 7919 % n * arguments.gen_len / n;
            WarmSequence { prompt, generated: age + 1, left: passes + 1 }
        })
        .collect();
    let longest = sequences.iter().map(|sequence| sequence.context()).max().unwrap_or(1) + passes + 2;
    let mut wishes = crate::plan::Wishes {
        max_sequences: Some(n),
        pass_rows: base.pass_rows.or(Some(n.next_multiple_of(base.micro_batches.unwrap_or(2)))),
        max_model_len: base.max_model_len.or(Some(longest)),
        ..base
    };
    if wishes.kv_bytes.is_none() {
        // Blocks that these sequences fill, rather than the longest each.
        let config = match (&arguments.model, &arguments.synthetic) {
            (_, Some(name)) => shape(name, arguments.layers)?,
            (Some(folder), None) => ModelConfig::open(folder)?,
            (None, None) => unreachable!("one of them is required"),
        };
        let layout = crate::memory::kv_cache::KvLayout::new(&config.shape, wishes.kv_dtype.unwrap_or_default());
        let blocks: usize = sequences
            .iter()
            .map(|sequence| crate::memory::kv_cache::KvLayout::blocks_for(sequence.context() + passes + 2))
            .sum();
        wishes.kv_bytes = Some(((blocks + 1) * layout.bytes_per_block()) as u64);
    }
    let entries = match arguments.schedules.is_empty() {
        false => arguments.schedules.clone(),
        true => ["flexgen", "flexgen-async", "flexgen-c", "fastdecode+copies", "cgopipe+copies", "cgopipe", "grouped"]
            .map(|name| name.parse().expect("a schedule"))
            .to_vec(),
    };
    let of = |entry: &Entry| crate::plan::Wishes {
        schedule: Some(entry.kind),
        rows: entry.rows.or(wishes.rows),
        attention: entry.kind.attention().or(wishes.attention),
        micro_batches: entry.micro_batches.or(wishes.micro_batches),
        expert_groups: if entry.kind == ScheduleKind::Grouped { wishes.expert_groups } else { None },
        source: if entry.relay { Some(SourceKind::Relay) } else { None },
        ..wishes
    };
    // One cut of the experts for all of them: what the hungriest schedule leaves.
    let builder = arguments.engine.apply(builder)?;
    let (resident, ring) = common_experts(&builder, entries.iter().map(of))?;
    let of = |entry: &Entry| crate::plan::Wishes {
        resident_experts: Some(resident),
        ring_experts: (ring > 0).then_some(ring),
        ..of(entry)
    };
    let first = crate::plan::Wishes { source: wishes.source, ..of(&entries[0]) };
    let prepared = builder.wishes(first).prepare()?;
    say_prepared(&prepared);
    let mut engine = load(prepared)?;
    let link = engine.measure_pages()?;
    if let Some((bytes, time)) = link {
        let rate = bytes as f64 / time.as_secs_f64();
        say!("link    {:.1} GB/s with these pages and nothing else running", rate / 1e9);
    }
    let link_rate = link.map(|(bytes, time)| bytes as f64 / time.as_secs_f64());

    let mut outcomes: Vec<Outcome> = Vec::new();
    for (index, entry) in entries.iter().enumerate() {
        let mut asked = of(entry);
        if !entry.relay {
            asked.source = engine.page_source().map(|source| match source.kind() {
                SourceKind::Relay => SourceKind::Imported,
                kind => kind,
            });
        }
        engine = engine.reopen(asked)?;
        let last = index + 1 == entries.len();
        let (outcome, timelines) = measure(&mut engine, *entry, &sequences, &arguments)?;
        if let Some(name) = &arguments.timeline {
            let name = name.replace("{}", &entry.to_string());
            let text = trace::svg(&timelines[timelines.len() / 2], &heading(&engine, entry));
            std::fs::write(&name, text).with_context(|| format!("--timeline {name}"))?;
        }
        if let (Some(path), true) = (&arguments.trace_file, last) {
            let text = serde_json::to_string(&trace::chrome(&timelines))?;
            std::fs::write(path, text).with_context(|| format!("--trace-file {}", path.display()))?;
        }
        if !arguments.json {
            if index == 0 {
                print_line(HEADINGS)?;
            }
            print_line(line(&outcome, outcomes.first().unwrap_or(&outcome), link_rate))?;
            if let Some(comparison) = &outcome.comparison {
                say!("{entry}: {}", comparison.line());
            }
        }
        outcomes.push(outcome);
    }
    compare(&outcomes)?;
    if arguments.json {
        print_line(serde_json::to_string_pretty(&document(&outcomes, link_rate, &engine))?)?;
    }
    Ok(OK)
}

/// Residents and ring that every entry's plan has room for.
fn common_experts(
    builder: &crate::engine::EngineBuilder,
    entries: impl Iterator<Item = crate::plan::Wishes>,
) -> Result<(usize, usize)> {
    let mut least = (usize::MAX, usize::MAX);
    for wishes in entries {
        let plan = builder.clone().wishes(crate::plan::Wishes { source: None, ..wishes }).plan_only()?;
        least.0 = least.0.min(plan.policy.resident_experts);
        least.1 = least.1.min(plan.policy.ring_experts);
    }
    Ok(least)
}

fn heading(engine: &Engine, entry: &Entry) -> String {
    let policy = engine.plan().policy;
    format!(
        "{entry}: {} sequences in {} micro-batches and {} expert groups, on {}",
        policy.max_sequences,
        policy.micro_batches,
        policy.expert_groups,
        engine.gpu().summary().name,
    )
}

fn measure(
    engine: &mut Engine,
    entry: Entry,
    sequences: &[WarmSequence],
    arguments: &Arguments,
) -> Result<(Outcome, Vec<Timeline>)> {
    let mut ends = Vec::new();
    let mut timelines: Vec<Timeline> = Vec::new();
    let passes = arguments.warm_up + arguments.passes;
    let mut bar = progress::PassProgress::new(&entry.to_string(), passes);
    let started = Instant::now();
    let (summary, tokens) = engine.run_warm(sequences, &mut std::iter::empty(), passes, &mut |report| {
        ends.push(Instant::now());
        bar.update(ends.len());
        if ends.len() > arguments.warm_up {
            timelines.push(report.timeline.clone());
        }
    })?;
    bar.finish();
    let begun = if arguments.warm_up == 0 { started } else { ends[arguments.warm_up - 1] };
    let wall = *ends.last().expect("at least one pass") - begun;
    let mut before = begun;
    let steps = ends[arguments.warm_up..]
        .iter()
        .map(|end| {
            let step = *end - before;
            before = *end;
            step
        })
        .collect();
    let all = Timeline { spans: timelines.iter().flat_map(|timeline| timeline.spans.iter().copied()).collect() };
    let share = |busy: Duration| busy.as_secs_f64() / wall.as_secs_f64();
    let outcome = Outcome {
        entry,
        policy: engine.plan().policy,
        wall,
        steps,
        generated: sequences.len() * arguments.passes,
        page_bytes: all.page_bytes(),
        // What the host copies from memory to memory does not cross the link.
        link_bytes: all.spans.iter().filter(|span| !span.lane.is_host()).map(|span| span.bytes).sum(),
        busy: Lane::ALL.map(|lane| (lane, share(all.busy(lane)))).to_vec(),
        busy_any: share(all.busy_any()),
        tokens,
        comparison: summary.comparison,
    };
    Ok((outcome, timelines))
}

const HEADINGS: &str = "schedule              attention  micro-b. groups      step      tok/s   ratio   pages GB/s  of link     gpu    h2d    d2h    cpu   none";

fn line(o: &Outcome, first: &Outcome, link: Option<f64>) -> String {
    let percent = |share: f64| format!("{:.0} %", 100.0 * share);
    let busy: String = o.busy.iter().map(|(_, share)| format!("{:>7}", percent(*share))).collect();
    format!(
        "{:<22}{:<11}{:>8}{:>7}{:>10}{:>11.1}{:>8.2}{:>13.1}{:>9}{busy}{:>7}",
        o.entry.to_string(),
        o.policy.attention.name(),
        o.policy.micro_batches,
        o.policy.expert_groups,
        format!("{:.1} ms", o.median_step().as_secs_f64() * 1e3),
        o.tokens_per_second(),
        o.tokens_per_second() / first.tokens_per_second(),
        o.page_rate() / 1e9,
        link.map_or("-".to_owned(), |rate| percent(o.page_rate() / rate)),
        percent(1.0 - o.busy_any),
    )
}

/// Same tokens wherever only the order differs.
fn compare(outcomes: &[Outcome]) -> Result<()> {
    for place in [AttentionPlace::Cpu, AttentionPlace::Gpu] {
        let mut same = outcomes.iter().filter(|outcome| outcome.policy.attention == place);
        let Some(first) = same.next() else { continue };
        for other in same {
            if other.tokens != first.tokens {
                bail!("{} and {} do not give the same tokens", first.entry, other.entry);
            }
        }
    }
    let on = |place| outcomes.iter().find(|outcome| outcome.policy.attention == place);
    if let (Some(cpu), Some(gpu)) = (on(AttentionPlace::Cpu), on(AttentionPlace::Gpu)) {
        let pairs = || cpu.tokens.iter().zip(&gpu.tokens);
        let same = pairs().filter(|(a, b)| a == b).count();
        say!(
            "same tokens under every schedule that attends on the same device; between CPU and GPU attention, which round differently, \
             {same} of {} sequences have all tokens alike",
            pairs().count()
        );
    } else {
        say!("same tokens under every schedule");
    }
    Ok(())
}

fn document(outcomes: &[Outcome], link: Option<f64>, engine: &Engine) -> serde_json::Value {
    let rows: Vec<_> = outcomes
        .iter()
        .map(|o| {
            let busy: serde_json::Map<_, _> =
                o.busy.iter().map(|(lane, share)| (lane.name().to_owned(), json!(share))).collect();
            json!({
                "schedule": o.entry.to_string(), "policy": o.policy, "wall_seconds": o.wall.as_secs_f64(),
                "median_step_seconds": o.median_step().as_secs_f64(), "passes": o.steps.len(),
                "step_seconds": o.steps.iter().map(Duration::as_secs_f64).collect::<Vec<_>>(),
                "generated_tokens": o.generated, "tokens_per_second": o.tokens_per_second(),
                "ratio_to_first": o.tokens_per_second() / outcomes[0].tokens_per_second(),
                "page_bytes": o.page_bytes, "page_bytes_per_second": o.page_rate(),
                "link_bytes_per_token": o.link_bytes as f64 / o.generated as f64,
                "share_of_link": link.map(|rate| o.page_rate() / rate), "busy_share": busy, "any_busy_share": o.busy_any,
                "prediction": o.comparison.as_ref().map(Comparison::json),
            })
        })
        .collect();
    json!({
        "adapter": engine.gpu().summary(), "link_bytes_per_second": link,
        "page_source": engine.page_source().map(|source| source.kind()), "schedules": rows,
    })
}
