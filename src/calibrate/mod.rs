//! Measures this machine: out comes a [`Profile`].
//!
//! ```text
//! link   copies both ways by size and page source, many small pieces, both directions at once
//! disk   pages read from files, as for weights that do not fit the host's memory
//! gpu    the engine's own stages over rows, on one layer of made-up weights of the model's sizes; attention over context
//! cpu    attention by threads and context, storing of new keys and values, plain reads
//! beside pages while the CPU attends, while kernels run, and what those lose
//! host   building and checking schedules
//! ```
//!
//! Everything is measured with memory that is cold where it is cold in a run (pages and keys come from more memory than caches
//! hold), in steady state: the first sample, which compiles and warms, is dropped, and sampling goes on until the last three
//! agree ([`steady`]). Times include what a submission costs, as in a run. No pass is timed and no schedule is run.
//!
//! A machine whose disk cannot be measured has a profile without one: nothing is predicted for weights that are read from files.

mod disk;
mod gpu;
mod host;
mod link;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::checkpoint::ReadError;
use crate::cpu::isa::Isa;
use crate::gpu::{Gpu, GpuError, HostMemoryRefused, Pipelines};
use crate::memory::host_memory;
use crate::memory::kv_cache::KvError;
use crate::memory::page_source::PageError;
use crate::model::ModelConfig;
use crate::plan::PlanError;
use crate::policy::{KvDtype, Precision};
use crate::profile::{Cpu, CurveError, MachineKey, Memory, ModelKey, Profile, VERSION};

/// Why a machine could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum CalibrateError {
    #[error(transparent)]
    Gpu(#[from] GpuError),
    #[error(transparent)]
    Page(#[from] PageError),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Memory(#[from] HostMemoryRefused),
    #[error(transparent)]
    Kv(#[from] KvError),
    #[error("one layer does not fit the device: {0}")]
    Plan(#[from] PlanError),
    #[error("{0} worker threads could not be started: {1}")]
    Threads(usize, String),
    #[error("a measurement of {what} makes no sense: {cause}")]
    Curve { what: &'static str, cause: CurveError },
}

/// What to measure.
pub struct Request<'a> {
    pub gpu: Arc<Gpu>,
    /// Whose layers.
    pub config: &'a ModelConfig,
    pub isa: Isa,
    /// Operands of matrix products.
    pub precision: Precision,
    /// Device and host memory that may be taken.
    pub device_bytes: u64,
    pub host_bytes: u64,
    /// Folder whose disk is measured: by reading the weights in it, else a temporary file.
    pub disk: &'a Path,
    /// About how long it may take. Coarser grids where there is less.
    pub budget: Duration,
}

impl Request<'_> {
    /// Longest time for one point of a curve.
    fn point(&self) -> Duration {
        self.budget / 400
    }

    /// The adapter is a CPU: what it "transfers" it copies itself.
    fn software(&self) -> bool {
        self.gpu.summary().kind == "cpu"
    }
}

/// Seconds of one run of `work`, in steady state: `work(n)` does it `n` times back to back and waits for the end.
///
/// The first run is dropped. Then samples of about ten milliseconds are taken until the last three lie within 4 % of each other
/// or `most` is over, not counting that first one, which may compile for longer; the answer is the median of those three.
pub fn steady<E>(most: Duration, mut work: impl FnMut(usize) -> Result<(), E>) -> Result<f64, E> {
    let mut sample = |n: usize| -> Result<f64, E> {
        let begun = Instant::now();
        work(n)?;
        Ok(begun.elapsed().as_secs_f64() / n as f64)
    };
    sample(1)?;
    let started = Instant::now();
    let once = sample(1)?;
    let n = (0.01 / once.max(1e-9)).clamp(1.0, 48.0) as usize;
    let mut last = Vec::new();
    // One sample alone may be the one that something else disturbed.
    while started.elapsed() < most || last.len() < 3 && started.elapsed() < 4 * most || last.is_empty() {
        last.push(sample(n)?);
        if let [.., a, b, c] = last[..] {
            let (low, high) = (a.min(b).min(c), a.max(b).max(c));
            if high <= 1.04 * low || last.len() >= 24 {
                break;
            }
        }
    }
    let mut tail = last[last.len().saturating_sub(3)..].to_vec();
    tail.sort_by(f64::total_cmp);
    // Of two the shorter one: what disturbs only adds.
    Ok(tail[(tail.len() - 1) / 2])
}

/// A pool like the engine's.
fn pool(threads: usize) -> Result<rayon::ThreadPool, CalibrateError> {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .start_handler(crate::cpu::pin_thread)
        .build()
        .map_err(|error| CalibrateError::Threads(threads, error.to_string()))
}

/// Threads that this process may run at a time.
fn all_threads() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

/// Sizes from `first` on, each `factor` times the one before, up to `last`, which is among them.
fn grid(first: f64, factor: f64, last: f64) -> Vec<f64> {
    let mut sizes: Vec<f64> = std::iter::successors(Some(first), |size| Some(size * factor))
        .take_while(|size| *size < last * 0.99)
        .map(f64::round)
        .collect();
    sizes.push(last);
    sizes
}

/// Measures everything. `progress` hears what is measured next.
pub fn calibrate(request: &Request<'_>, progress: &mut dyn FnMut(&str)) -> Result<Profile, CalibrateError> {
    let gpu = &request.gpu;
    let weights = gpu::one_layer(request.config);
    let machine = MachineKey::of(gpu.summary(), request.isa);
    let model = ModelKey::of(weights.inventory(), request.precision);
    let memory = Memory {
        device_bytes: gpu.memory_bytes().unwrap_or(request.device_bytes),
        device_free_bytes: gpu.free_memory_bytes().or(gpu.memory_bytes()).unwrap_or(request.device_bytes),
        host_free_bytes: host_memory::available_bytes().unwrap_or(request.host_bytes),
        binding_bytes: gpu.max_binding_bytes(),
        kernels_reach_host: gpu.kernels_reach_host(),
    };
    progress("pages read from disk");
    // A read-only folder, a full disk: only what comes from files goes without a prediction.
    let not_measured = |cause: &dyn std::fmt::Display| tracing::warn!(folder = %request.disk.display(), "the disk is not measured: {cause}");
    let files = disk::Files::of(request).inspect_err(|error| not_measured(error)).ok();
    let disk = match files.as_ref().map(|files| files.measure(request)) {
        Some(Err(CalibrateError::Read(error))) => {
            not_measured(&error);
            None
        }
        Some(measured) => Some(measured?),
        None => None,
    };
    progress("copies between host and device");
    let mut copies = link::Copies::open(request, files.as_ref())?;
    let link = copies.measure(request)?;
    let pipelines = Arc::new(Pipelines::new(gpu.clone()));
    progress("stages of a layer on the GPU");
    let mut stages = gpu::Stages::open(request, &pipelines, &weights)?;
    let (gpu_times, beside) = stages.measure(request, &mut copies, progress)?;
    drop(stages);
    progress("attention on the CPU");
    let all = machine.threads;
    let mut attention = host::Attention::open(request, KvDtype::F16)?;
    let (in_f16, task_seconds) = attention.rates(request, all)?;
    let store = attention.store(request, all)?;
    let attention_int8 = host::Attention::open(request, KvDtype::Int8)?.rates(request, all)?.0;
    let dram_read = host::reads(request, all)?;
    let cpu = Cpu { attention: in_f16, attention_int8, task_seconds, store, dram_read };
    progress("the CPU's reads beside copies");
    let contention = attention.beside(request, cpu.best_threads(), &copies, beside)?;
    progress("schedules");
    let host = host::schedules(request);
    Ok(Profile { version: VERSION, machine, model, memory, link, disk, gpu: gpu_times, cpu, contention, host })
}
