//! `fulmen run-batch`: a file of OpenAI Batch lines in, a line per request out, as each finishes.
//!
//! Lines are read as there is room for them, so memory does not grow with the file. A bad line becomes an error line and the
//! others go on. What is written is whole lines; a run that was stopped goes on with `--resume`. Reading, tokenising, detokenising and
//! writing have threads of their own (`run_batch/exchange.rs`).

use std::cell::RefCell;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::Poll;

use anyhow::{Context, Result, bail};
use clap::Args;

use super::Usage;
use super::open::{EngineArguments, ModelArguments, Text, load};
use super::progress::RunProgress;
use crate::engine::{Event, Requests, RunOptions, RunSummary};
use crate::request::Request;
use crate::request::batch_file::{BatchReader, Existing, ReadOptions, ResultWriter, Shard, validate_all};
use crate::schedule::Lane;
use crate::units::human_bytes;

mod exchange;

use exchange::{Exchange, Outcome};

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    /// File of requests, one JSON object a line; - is stdin
    #[arg(short, long, env = "FULMEN_INPUT_FILE", value_name = "FILE")]
    input_file: PathBuf,
    /// File of results, appended to as requests finish; - is stdout
    #[arg(short, long, env = "FULMEN_OUTPUT_FILE", value_name = "FILE")]
    output_file: PathBuf,
    /// Error lines go here instead of among the results
    #[arg(long, env = "FULMEN_ERROR_FILE", value_name = "FILE")]
    error_file: Option<PathBuf>,
    /// Go on with an output file: what it has is not done again
    #[arg(long, conflicts_with = "overwrite")]
    resume: bool,
    /// Replace an output file that has something in it
    #[arg(long)]
    overwrite: bool,
    /// Take every n-th line, from the i-th; i counts from 0
    #[arg(long, env = "FULMEN_SHARD", value_name = "I/N", default_value = "0/1")]
    shard: Shard,
    /// Take at most so many lines
    #[arg(long, value_name = "N")]
    limit: Option<u64>,
    /// Read the whole input first, and do nothing if any line is bad
    #[arg(long)]
    strict: bool,
    /// Seed of requests that have none
    #[arg(long, env = "FULMEN_SEED", default_value_t = 0, value_name = "N")]
    seed: u64,
    /// Print one JSON object with the run's numbers on stderr at the end
    #[arg(long)]
    json_summary: bool,
    #[command(flatten)]
    engine: EngineArguments,
    #[command(flatten)]
    trace: super::trace::Arguments,
}

/// What Ctrl-C and SIGTERM do: while a model loads they end the process, as nothing is lost; later the first one asks for a
/// stop after the pass and the second one ends the process. Either way the exit code is [`super::INTERRUPTED`].
struct Signals {
    loading: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
}

impl Signals {
    fn register() -> Result<Self> {
        let signals = Signals { loading: Arc::new(AtomicBool::new(true)), stop: Arc::new(AtomicBool::new(false)) };
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
            for end_at_once in [&signals.loading, &signals.stop] {
                signal_hook::flag::register_conditional_shutdown(
                    signal,
                    super::INTERRUPTED.into(),
                    end_at_once.clone(),
                )?;
            }
            // Last: the first signal sets it, the second finds it set.
            signal_hook::flag::register(signal, signals.stop.clone())?;
        }
        Ok(signals)
    }

    fn loaded(&self) {
        self.loading.store(false, Relaxed);
    }

    fn stopped(&self) -> bool {
        self.stop.load(Relaxed)
    }
}

/// Requests as the exchange has them, until somebody stops the run.
struct Incoming<'a> {
    exchange: &'a RefCell<Exchange>,
    signals: &'a Signals,
}

impl Requests for Incoming<'_> {
    fn next_request(&mut self, wait: bool) -> Poll<Option<Request>> {
        self.exchange.borrow_mut().next_request(wait, &|| self.signals.stopped())
    }
}

/// The input can be read twice: not stdin, not a pipe.
fn is_regular(path: &Path) -> Result<bool> {
    if path == Path::new("-") {
        return Ok(false);
    }
    let metadata = std::fs::metadata(path).with_context(|| format!("--input-file {}", path.display()))?;
    if metadata.is_dir() {
        bail!("--input-file {}: is a folder", path.display());
    }
    Ok(metadata.is_file())
}

/// Non-blank lines of a file that this run will take; None where only reading them once would tell.
fn count_lines(arguments: &Arguments) -> Result<Option<u64>> {
    if !is_regular(&arguments.input_file)? {
        return Ok(None);
    }
    let file = File::open(&arguments.input_file)
        .with_context(|| format!("--input-file {}", arguments.input_file.display()))?;
    let mut lines = 0u64;
    for line in BufReader::with_capacity(1 << 20, file).split(b'\n') {
        let line = line.with_context(|| arguments.input_file.display().to_string())?;
        lines += !line.iter().all(u8::is_ascii_whitespace) as u64;
    }
    let (index, count) = (arguments.shard.index(), arguments.shard.count());
    let own = lines.saturating_sub(index).div_ceil(count);
    Ok(Some(arguments.limit.map_or(own, |limit| own.min(limit))))
}

/// --strict: every fault of the input, before anything is loaded.
fn validate(arguments: &Arguments, options: &ReadOptions, text: &Text, vocab: usize) -> Result<()> {
    let reader = BatchReader::open(&arguments.input_file, options.clone())?;
    let validation = validate_all(reader, |line| {
        line.to_request(&text.tokenizer, text.template.as_ref(), &text.defaults, vocab).map(|_| ())
    })?;
    if validation.faults.is_empty() {
        return Ok(());
    }
    const SHOWN: usize = 20;
    for fault in validation.faults.iter().take(SHOWN) {
        say!("{fault}");
    }
    let (n, lines) = (validation.faults.len(), validation.lines);
    bail!("--strict: {n} of {lines} lines are bad{}", if n > SHOWN { " (the first 20 are shown)" } else { "" })
}

pub fn run(arguments: Arguments) -> Result<u8> {
    let signals = Signals::register()?;
    if arguments.strict && !is_regular(&arguments.input_file)? {
        bail!(Usage("--strict reads the input twice, so it must be a file, not a pipe or stdin".into()));
    }
    let existing = match (arguments.resume, arguments.overwrite) {
        (true, _) => Existing::Resume,
        (_, true) => Existing::Overwrite,
        _ => Existing::Refuse,
    };
    let total = count_lines(&arguments)?;
    let mut text = arguments.model.open_text()?;
    text.defaults.seed = arguments.seed;
    let text = Arc::new(text);
    let workload = match is_regular(&arguments.input_file)? {
        true => {
            let options = ReadOptions { shard: arguments.shard, limit: arguments.limit, ..ReadOptions::default() };
            super::lengths::of_batch(&arguments.input_file, options, &text, total)?
        }
        // A pipe can be read only once, so nobody knows its lengths.
        false => None,
    };
    let prepared = arguments.engine.prepare(&arguments.model, &text, workload)?;
    let vocab = prepared.config().shape.vocab;
    if arguments.strict {
        let options = ReadOptions { shard: arguments.shard, limit: arguments.limit, ..ReadOptions::default() };
        validate(&arguments, &options, &text, vocab)?;
    }
    // Opened last of what can fail at once: --overwrite empties it.
    let error_file = arguments.error_file.as_deref();
    let (writer, finished) = ResultWriter::open(&arguments.output_file, error_file, &arguments.input_file, existing)?;
    if arguments.resume {
        say!("resuming: {} lines are finished already", finished.len());
    }
    // The exit code speaks of the whole file, also of what earlier runs wrote.
    let failed_before = finished.any_error();
    let options = ReadOptions { shard: arguments.shard, limit: arguments.limit, finished, ..ReadOptions::default() };
    let reader = BatchReader::open(&arguments.input_file, options)
        .with_context(|| format!("--input-file {}", arguments.input_file.display()))?;
    let mut trace = arguments.trace.open()?;
    // The first lines are tokenised while weights load.
    let exchange = RefCell::new(Exchange::start(reader, writer, text, vocab, arguments.model.served_name())?);
    let mut engine = load(prepared)?;
    signals.loaded();

    let mut incoming = Incoming { exchange: &exchange, signals: &signals };
    let mut progress = RunProgress::new(total);
    let mut generated = 0u64;
    let options = RunOptions { leave_texts: true, ..RunOptions::default() };
    let result = engine.run(&mut incoming, options, &mut |event| {
        let mut exchange = exchange.borrow_mut();
        match event {
            Event::Finished(output) => exchange.finished(output),
            Event::Pass(pass) => {
                trace.pass(&pass);
                generated += pass.micro_batches.iter().flat_map(|of| &of.rows).filter(|row| row.sampled).count() as u64;
                progress.update(exchange.answered(), exchange.already_finished(), generated);
            }
            Event::Text { .. } | Event::Logits { .. } => {}
        }
        if signals.stopped() || exchange.broken() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    let exchange = exchange.into_inner();
    let already = exchange.already_finished();
    let outcome = exchange.finish();
    progress.finish();
    let summary = result?;
    if let Some(fault) = outcome.fault {
        return Err(fault);
    }
    report(&arguments, &summary, &outcome, already)?;
    trace.finish(&super::open::heading(&engine))?;
    if signals.stopped() {
        say!("interrupted; the same command with --resume goes on");
        return Ok(super::INTERRUPTED);
    }
    Ok(if failed_before || outcome.failed > 0 { super::FAILED_LINES } else { super::OK })
}

fn report(arguments: &Arguments, summary: &RunSummary, outcome: &Outcome, already: u64) -> Result<()> {
    let seconds = summary.elapsed.as_secs_f64();
    let rate = summary.generated_tokens as f64 / seconds.max(1e-9);
    if arguments.json_summary {
        type Seconds = std::collections::BTreeMap<&'static str, f64>;
        let busy: Seconds = summary.busy.iter().map(|(lane, busy)| (lane.name(), busy.as_secs_f64())).collect();
        let stages: Seconds = summary.busy_by_stage.iter().map(|(stage, busy)| (*stage, busy.as_secs_f64())).collect();
        say!(
            "{}",
            serde_json::json!({
                "answered": outcome.answered, "failed": outcome.failed, "already_finished": already,
                "interrupted": summary.interrupted, "passes": summary.passes, "prompt_tokens": summary.prompt_tokens,
                "generated_tokens": summary.generated_tokens, "elapsed_seconds": seconds,
                "generated_tokens_per_second": rate, "busy_seconds": busy, "stage_seconds": stages, "page_bytes": summary.page_bytes,
                "lane_bytes": summary.lane_bytes.iter().map(|(lane, bytes)| (lane.name(), *bytes)).collect::<std::collections::BTreeMap<_, _>>(),
                "any_busy_seconds": summary.busy_any.as_secs_f64(),
                "preemptions": summary.batch.preemptions, "spilled_blocks": summary.batch.spilled_blocks,
                "peak_sequences": summary.batch.peak_running,
                "prediction": summary.comparison.as_ref().map(crate::plan::compare::Comparison::json),
            })
        );
        return Ok(());
    }
    say!(
        "{} lines answered, {} of them with errors, in {seconds:.1} s: {} prompt and {} generated tokens, {rate:.1} generated tok/s",
        outcome.answered,
        outcome.failed,
        summary.prompt_tokens,
        summary.generated_tokens,
    );
    let wall = seconds.max(1e-9);
    let share = |busy: std::time::Duration| 100.0 * busy.as_secs_f64() / wall;
    let lanes: Vec<_> = Lane::ALL
        .iter()
        .map(|lane| format!("{} {:.0}%", lane.name(), share(summary.busy.get(lane).copied().unwrap_or_default())))
        .collect();
    say!(
        "{} passes of up to {} sequences, {} of expert pages, {} preemptions; busy: {}",
        summary.passes,
        summary.batch.peak_running,
        human_bytes(summary.page_bytes),
        summary.batch.preemptions,
        lanes.join(", "),
    );
    let crossed: u64 = summary.lane_bytes.iter().filter(|(lane, _)| !lane.is_host()).map(|(_, bytes)| bytes).sum();
    say!(
        "across the link: {} a generated token, pages at {:.2} GB/s over the whole run; no lane busy {:.0}% of the time",
        human_bytes(crossed / summary.generated_tokens.max(1)),
        summary.page_bytes as f64 / wall / 1e9,
        100.0 - share(summary.busy_any),
    );
    if let Some(comparison) = &summary.comparison {
        say!("{}", comparison.line());
    }
    Ok(())
}
