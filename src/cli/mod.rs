//! The command line. One file per subcommand; the only code that prints.
//!
//! stdout carries data, stderr everything else. Exit codes are stable: 0 ok · 1 fatal · 2 usage · 3 finished with failed lines ·
//! 75 interrupted or device lost, run again with `--resume`.

/// A line on stderr. One that nobody can read any more (a closed pipe) does not end a run, as `eprintln!` would.
macro_rules! say {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr().lock(), $($text)*);
    }};
}

mod bench;
mod calibrate;
mod devices;
mod generate;
mod inspect;
mod lengths;
mod open;
mod plan;
mod progress;
mod run_batch;
mod score;
mod synthesize;
mod trace;

use std::fmt;
use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};

use crate::engine::EngineError;
use crate::plan::PlanError;
use crate::plan::search::SearchError;

/// Everything was done.
pub const OK: u8 = 0;
/// Nothing more can be done: the message says why.
pub const FATAL: u8 = 1;
/// The command line is wrong.
pub const USAGE: u8 = 2;
/// Done, but some lines failed; their errors are written.
pub const FAILED_LINES: u8 = 3;
/// Stopped in the middle (signal, device lost); `--resume` goes on.
pub const INTERRUPTED: u8 = 75;

/// High-throughput inference of Mixture-of-Experts models whose weights do not fit on the GPU.
#[derive(Debug, Parser)]
#[command(name = "fulmen", version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// Log filter: error, warn, info, debug, or as RUST_LOG has it [default: RUST_LOG, else warn]
    #[arg(long, global = true, env = "FULMEN_LOG_LEVEL", value_name = "FILTER")]
    log_level: Option<String>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Continue a prompt or answer a chat message, text shown as it comes.
    Generate(generate::Arguments),
    /// Answer a file of OpenAI Batch lines.
    RunBatch(run_batch::Arguments),
    /// Measure this machine for a model's kind of layers: what plans predict from.
    Calibrate(calibrate::Arguments),
    /// Predict the best policy for a model, a machine and a workload. Needs neither weights nor adapter.
    Plan(plan::Arguments),
    /// Show a model's shape, sizes and chat template. Loads no weights.
    Inspect(inspect::Arguments),
    /// List the graphics adapters.
    Devices(devices::Arguments),
    /// Measure this machine.
    Bench(bench::Arguments),
    /// Write a checkpoint of made-up weights.
    Synthesize(synthesize::Arguments),
    /// Score a results file against known answers.
    Score(score::Arguments),
}

/// To be called first, while the process has one thread.
///
/// Workaround: Mesa's device-select layer (22.3) prints "error: XDG_RUNTIME_DIR is invalid" for every instance where the variable
/// is not set, as in containers. It only looks for a display there. Remove with that Mesa.
pub fn quiet_mesa() {
    if std::env::var_os("XDG_RUNTIME_DIR").is_none() {
        // SAFETY: no other thread runs yet.
        unsafe { std::env::set_var("XDG_RUNTIME_DIR", std::env::temp_dir()) };
    }
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version come this way too, on stdout and with code 0.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { USAGE } else { OK });
        }
    };
    let (option, filter) = match (arguments.log_level, std::env::var("RUST_LOG")) {
        (Some(filter), _) => ("--log-level", filter),
        (None, Ok(filter)) if !filter.is_empty() => ("RUST_LOG", filter),
        _ => ("--log-level", "warn".into()),
    };
    match tracing_subscriber::EnvFilter::try_new(&filter) {
        Ok(filter) => tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init(),
        Err(error) => {
            say!("error: {option} {filter}: {error}");
            return ExitCode::from(USAGE);
        }
    }
    let result = match arguments.command {
        Command::Generate(arguments) => generate::run(arguments),
        Command::RunBatch(arguments) => run_batch::run(arguments),
        Command::Calibrate(arguments) => calibrate::run(arguments),
        Command::Plan(arguments) => plan::run(arguments),
        Command::Inspect(arguments) => inspect::run(arguments),
        Command::Devices(arguments) => devices::run(arguments),
        Command::Bench(arguments) => bench::run(arguments),
        Command::Synthesize(arguments) => synthesize::run(arguments),
        Command::Score(arguments) => score::run(arguments),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            say!("error: {}", with_causes(&error));
            ExitCode::from(exit_code(&error))
        }
    }
}

fn exit_code(error: &anyhow::Error) -> u8 {
    let engine = error.downcast_ref::<EngineError>();
    match engine {
        _ if error.is::<Usage>() => USAGE,
        _ if matches!(
            error.downcast_ref(),
            Some(SearchError::Plan(PlanError::Option { .. } | PlanError::Conflict { .. }))
        ) =>
        {
            USAGE
        }
        Some(EngineError::Plan(PlanError::Option { .. } | PlanError::Conflict { .. })) => USAGE,
        Some(error) if error.device_lost() => INTERRUPTED,
        _ => FATAL,
    }
}

/// An error and its causes in one text. A message that tells its cause itself is not followed by the cause again.
fn with_causes(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// A line of data on stdout.
fn print_line(line: impl fmt::Display) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{line}").and_then(|()| stdout.flush()).context("writing to stdout")
}

/// A folder has files of weights.
fn has_weights(folder: &std::path::Path) -> bool {
    let names = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    names.into_iter().any(|path| path.extension().is_some_and(|ending| ending == "safetensors"))
}

/// A command line that parses and still makes no sense.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Usage(String);
