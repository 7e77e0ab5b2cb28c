//! `fulmen bench`: how fast this machine is, held against what it could do.

mod attention_cases;
mod kernels;
mod pipeline;
mod predict;
mod throughput;

pub use pipeline::shape;

use anyhow::Result;
use clap::{Args, Subcommand};

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Matrix products and attention against what the adapter can do at most, and a layer's time kernel by kernel.
    Kernels(kernels::Arguments),
    /// Decode in steady state under one schedule after the other: same model, same pages, same sequences.
    Pipeline(pipeline::Arguments),
    /// Tokens per second in steady state, beside the bound and the rivals' ways.
    Throughput(throughput::Arguments),
    /// Predicted against measured passes, and the chosen policy against its neighbours.
    Predict(predict::Arguments),
}

pub fn run(arguments: Arguments) -> Result<u8> {
    match arguments.what {
        What::Kernels(arguments) => kernels::run(arguments),
        What::Pipeline(arguments) => pipeline::run(arguments),
        What::Throughput(arguments) => throughput::run(arguments),
        What::Predict(arguments) => predict::run(arguments),
    }
}
