//! `fulmen calibrate`: measures this machine for a model's kind of layers, and keeps the profile.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;
use indicatif::HumanDuration;

use super::open::{MachineArguments, model_config};
use super::print_line;
use crate::calibrate::{Request, calibrate};
use crate::engine::default_precision;
use crate::policy::{KvDtype, Precision};
use crate::profile::Profile;
use crate::units::human_bytes;

#[derive(Debug, Args)]
pub struct Arguments {
    /// Folder with the model's config.json; no weights are needed
    #[arg(value_name = "MODEL", required_unless_present = "synthetic")]
    model: Option<PathBuf>,
    /// A published shape by name instead (mixtral-8x7b, …), or mixtral-tiny
    #[arg(long, value_name = "SHAPE", conflicts_with = "model")]
    synthetic: Option<String>,
    /// Operands of matrix products [default: f16 where the adapter has cooperative matrices, else f32]
    #[arg(long, env = "FULMEN_PRECISION", value_enum)]
    precision: Option<Precision>,
    /// About how many seconds it may take
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
    /// Folder whose disk is measured, for weights that do not fit the host's memory [default: MODEL where its weights are, else the
    /// system's temporary folder]
    #[arg(long, value_name = "FOLDER")]
    disk: Option<PathBuf>,
    /// Write the profile here [default: the user's cache folder]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Print the profile as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    machine: MachineArguments,
}

pub fn run(arguments: Arguments) -> Result<u8> {
    let config = model_config(arguments.model.as_deref(), arguments.synthetic.as_deref(), None)?;
    let (gpu, isa) = (arguments.machine.gpu()?, arguments.machine.isa()?);
    let limits = arguments.machine.limits(&gpu);
    let adapter = gpu.summary();
    say!("adapter {} ({}, {}); copies on {}", adapter.name, adapter.kind, adapter.driver, gpu.transfer_words());
    let has_weights = |folder: &&PathBuf| super::has_weights(folder);
    let disk = arguments.disk.or_else(|| arguments.model.as_ref().filter(has_weights).cloned());
    let disk = disk.unwrap_or_else(std::env::temp_dir);
    let request = Request {
        gpu: gpu.clone(),
        config: &config,
        isa,
        precision: arguments.precision.unwrap_or_else(|| default_precision(&gpu)),
        device_bytes: limits.device_bytes,
        host_bytes: limits.host_bytes,
        disk: &disk,
        budget: Duration::from_secs(arguments.seconds),
    };
    let started = Instant::now();
    let profile = calibrate(&request, &mut |what| say!("{:>6.1} s  {what}", started.elapsed().as_secs_f64()))?;
    let path = match arguments.output {
        Some(path) => path,
        None => Profile::cache_path(&profile.machine, &profile.model)?,
    };
    profile.write(&path)?;
    say!("{}", summary(&profile));
    say!("profile {} after {}", path.display(), HumanDuration(started.elapsed()));
    if arguments.json {
        print_line(serde_json::to_string_pretty(&profile)?)?;
    }
    Ok(super::OK)
}

/// What a person wants to see of a profile.
fn summary(profile: &Profile) -> String {
    let Profile { link, disk, gpu, cpu, contention, model, memory, host, .. } = profile;
    let rate = |curve: &crate::profile::Curve| {
        let (bytes, seconds) = curve.points()[curve.points().len() - 1];
        bytes / seconds / 1e9
    };
    let sources: Vec<String> =
        link.to_device.iter().map(|pages| format!("{} {:.1}", pages.source, rate(&pages.seconds))).collect();
    let last = |curve: &crate::profile::Curve| curve.points()[curve.points().len() - 1];
    let (rows, seconds) = last(&gpu.experts);
    let flops = 6.0 * rows * (model.experts_per_token * model.d_model * model.expert_width) as f64;
    let threads = cpu.best_threads();
    let read = cpu.dram_read.points().iter().map(|point| point.1).fold(0.0, f64::max);
    let disk = disk.as_ref().map_or("not measured".to_owned(), |disk| {
        let cache = if disk.direct { "" } else { ", its cache emptied first" };
        format!("pages at {:.2} GB/s from {}{cache}", rate(&disk.page_seconds), disk.what)
    });
    format!(
        "link    {} GB/s to the device, {:.1} to the host; small copies {:.0} us\n\
         disk    {disk}\n\
         gpu     {:.0} GB/s in copies; experts over {rows:.0} rows {:.2} ms ({:.2} TFLOP/s); a submission {:.0} us, its wait {:.0} us\n\
         cpu     attention {:.1} GB/s with {threads} threads ({:.1} where keys and values are int8), plain reads {:.1} GB/s; a task {:.0} us\n\
         beside  pages slow down by {:.2} beside attention, {:.2} beside kernels; attention by {:.2}, kernels by {:.2} and rows by {:.2} beside pages\n\
         host    a schedule of {:.0} tasks {:.2} ms, a hand-over {:.0} us; {} of host memory and {} of device memory free",
        sources.join(", "),
        rate(&link.to_host),
        link.small_seconds * 1e6,
        gpu.copy_bytes_per_s / 1e9,
        seconds * 1e3,
        flops / seconds / 1e12,
        gpu.submit_seconds * 1e6,
        gpu.wait_seconds * 1e6,
        cpu.attention_rate(KvDtype::F16, threads, 1024.0) / 1e9,
        cpu.attention_rate(KvDtype::Int8, threads, 1024.0) / 1e9,
        read / 1e9,
        cpu.task_seconds * 1e6,
        contention.pages_beside_attention,
        contention.pages_beside_kernels,
        contention.attention_beside_pages,
        contention.kernels_beside_pages,
        contention.rows_beside_pages,
        last(&host.schedule).0,
        last(&host.schedule).1 * 1e3,
        host.task_seconds * 1e6,
        human_bytes(memory.host_free_bytes),
        human_bytes(memory.device_free_bytes),
    )
}
