//! The command line. One file per subcommand; the only code that prints.
//!
//! stdout carries data, stderr everything else. Exit codes are stable: 0 ok · 1 fatal · 2 usage · 3 finished with failed lines ·
//! 75 interrupted or device lost, run again with `--resume`.

mod devices;
mod generate;
mod inspect;
mod open;
mod progress;
mod run_batch;
mod score;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

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
    /// Log filter, as for RUST_LOG (error, warn, info, debug).
    #[arg(long, global = true, env = "FULMEN_LOG_LEVEL", default_value = "warn")]
    log_level: String,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Continue a prompt or answer a chat message, text shown as it comes.
    Generate(generate::Arguments),
    /// Answer a file of OpenAI Batch lines.
    RunBatch(run_batch::Arguments),
    /// Show a model's shape, sizes and chat template. Loads no weights.
    Inspect(inspect::Arguments),
    /// List the graphics adapters.
    Devices(devices::Arguments),
    /// Score a results file against known answers.
    Score(score::Arguments),
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
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .or_else(|_| tracing_subscriber::EnvFilter::try_new(&arguments.log_level));
    match filter {
        Ok(filter) => tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init(),
        Err(error) => {
            eprintln!("error: --log-level: {error}");
            return ExitCode::from(USAGE);
        }
    }
    let result = match arguments.command {
        Command::Generate(arguments) => generate::run(arguments),
        Command::RunBatch(arguments) => run_batch::run(arguments),
        Command::Inspect(arguments) => inspect::run(arguments),
        Command::Devices(arguments) => devices::run(arguments),
        Command::Score(arguments) => score::run(arguments),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("error: {error:#}");
            let code = if error.is::<Usage>() {
                USAGE
            } else if error.downcast_ref::<crate::engine::EngineError>().is_some_and(|error| error.device_lost()) {
                INTERRUPTED
            } else {
                FATAL
            };
            ExitCode::from(code)
        }
    }
}

/// A command line that parses and still makes no sense.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Usage(String);
