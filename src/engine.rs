//! Opens a model and answers requests: the only module that sees all others.
//!
//! ```text
//! Engine::builder(folder) ─ prepare() ─▶ Prepared ─ load() ─▶ Engine ─ run(requests) ─▶ events
//!                           checkpoint, adapter, plan           weights on the GPU
//! ```
//!
//! One pass: each micro-batch's rows are fixed ([`Batcher::plan_micro_batch`]), a [`Schedule`] is
//! built for them and checked, and [`execute::run`](crate::execute::run) walks it, a thread for each lane: the device's lanes
//! start what `engine/pass.rs` says on the [`Machine`], the host's lane attends and samples. When a micro-batch's ids are known
//! its finished sequences leave, and its rows of the next pass are fixed at once. Pages of the next pass are on their way when
//! a pass ends.
//!
//! Guarantees: requests are taken one by one as there is room, so memory does not grow with their number; each is answered
//! exactly once; one that fails (too long, not a number, …) does not disturb the others.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use crate::checkpoint::{Checkpoint, CheckpointError, Inventory, Synthetic, Weights};
use crate::cpu::isa::Isa;
use crate::execute::machine::{KV_ARENA_BYTES, KvPool};
use crate::execute::{Carried, Machine, TaskError, run as run_schedule};
use crate::gpu::{
    DeviceChoice, Gpu, GpuError, HostBuffer, OpenOptions, Pipelines, ShaderPatch, TestFaults, Ticket, TransferChoice,
};
use crate::memory::host_memory;
use crate::memory::kv_cache::{KvCache, KvError, KvLayout, SpillFile};
use crate::memory::page_source::{PageError, PageSource, SourceRequest};
use crate::memory::pages::PagePlan;
use crate::model::ModelConfig;
use crate::plan::compare::{Comparison, Phase, Side};
use crate::plan::cost::{Cut, PassRows, Predictor};
use crate::plan::search::{Choice, Found, Problem, SearchError};
use crate::plan::workload::Workload;
use crate::plan::{MachineLimits, ModelBytes, Plan, PlanError, Wishes, extents, fit};
use crate::policy::{AttentionPlace, Policy, Precision};
use crate::profile::{MachineKey, ModelKey, Profile, ProfileError};
use crate::request::batcher::{BatchCounters, BatchLimits, Batcher, MicroBatchRows};
use crate::request::tokenizer::Tokenizer;
use crate::request::{Request, RequestOutput};
use crate::schedule::{Lane, OnItsWay, Schedule, ScheduleFault, Timeline, Work, build, check, simulate_pass};
use crate::tune::Tiles;

mod answers;
mod pass;
mod warm;

use answers::Answers;
use pass::{HostLane, Pass};
pub use warm::{WarmSequence, WarmTokens};

/// Why a model could not be opened, or a run had to stop. Requests that fail do not stop a run.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error("the experts have several types (see `fulmen inspect`); all must have one")]
    MixedExperts,
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Gpu(#[from] GpuError),
    #[error(transparent)]
    Page(#[from] PageError),
    #[error(transparent)]
    Kv(#[from] KvError),
    #[error("{0} worker threads could not be started: {1}")]
    Threads(usize, String),
    #[error(
        "experts in host memory and the KV pool stay where they are, so no other experts can stream and the pool cannot change"
    )]
    OtherPages,
    #[error("the schedule is wrong, which is a bug: {0}")]
    Schedule(#[from] ScheduleFault),
    #[error(transparent)]
    Task(#[from] TaskError<WorkError>),
    #[error(transparent)]
    Profile(#[from] ProfileError),
}

impl EngineError {
    /// The device is gone; what is finished is safe and the rest can be run again.
    pub fn device_lost(&self) -> bool {
        let gpu = match self {
            EngineError::Gpu(error) | EngineError::Page(PageError::Gpu(error)) => error,
            EngineError::Task(TaskError {
                source: WorkError::Gpu(error) | WorkError::Page(PageError::Gpu(error)),
                ..
            }) => error,
            _ => return false,
        };
        matches!(gpu, GpuError::Lost(_))
    }
}

/// What a task can fail with.
#[derive(Debug, thiserror::Error)]
pub enum WorkError {
    #[error(transparent)]
    Gpu(#[from] GpuError),
    #[error(transparent)]
    Page(#[from] PageError),
    #[error(transparent)]
    Kv(#[from] KvError),
}

/// What to open.
#[derive(Debug, Clone)]
enum Model {
    Folder(PathBuf),
    Synthetic(Box<ModelConfig>),
}

/// Where what was measured of the machine comes from.
#[derive(Debug, Clone, Default)]
pub enum ProfileChoice {
    /// Nothing was: passes are not predicted, and policies are not searched for.
    #[default]
    None,
    /// The user's cache folder, where it has one of this machine and this kind of layers.
    Cached,
    /// This one; refused where it is of another machine or other layers.
    Given(Arc<Profile>),
}

/// How to open a model. Made by [`Engine::builder`].
#[derive(Debug, Clone)]
pub struct EngineBuilder {
    model: Model,
    tokenizer: Option<Tokenizer>,
    open: OpenOptions,
    wishes: Wishes,
    gpu_memory: Option<u64>,
    host_memory: Option<u64>,
    spill_folder: PathBuf,
    isa: Option<Isa>,
    more_eos_tokens: Vec<u32>,
    patches: Vec<ShaderPatch>,
    tiles: Option<Tiles>,
    profile: ProfileChoice,
    workload: Option<Workload>,
    margin: f64,
    policy: Option<Policy>,
}

impl EngineBuilder {
    /// Makes texts of tokens. Without it completions have tokens only, and stop strings are refused.
    pub fn tokenizer(mut self, tokenizer: Tokenizer) -> Self {
        self.tokenizer = Some(tokenizer);
        self
    }

    /// How the device is opened, as a whole.
    pub fn open_options(mut self, options: OpenOptions) -> Self {
        self.open = options;
        self
    }

    pub fn device(mut self, choice: DeviceChoice) -> Self {
        self.open.device = choice;
        self
    }

    /// How bytes get to and from the device. Default: the best that the adapter has.
    pub fn transfer(mut self, choice: TransferChoice) -> Self {
        self.open.transfer = choice;
        self
    }

    /// Copies to the device at no more than so many bytes per second: how a slower link is imitated. Rows cross it by copies then.
    pub fn link_pace(mut self, bytes_per_s: u64) -> Self {
        self.open.link_pace = Some(bytes_per_s);
        self
    }

    /// Plants faults of the machine: how tests see that they are met.
    pub fn test_faults(mut self, faults: TestFaults) -> Self {
        self.open.test_faults = faults;
        self
    }

    pub fn wishes(mut self, wishes: Wishes) -> Self {
        self.wishes = wishes;
        self
    }

    /// Most device memory to take, in bytes. Default: 90 % of what the adapter has.
    pub fn gpu_memory(mut self, bytes: Option<u64>) -> Self {
        self.gpu_memory = bytes;
        self
    }

    /// Most host memory to take, in bytes: weights that stream, keys and values, rows and pages on their way. Default: 80 % of what is available.
    pub fn host_memory(mut self, bytes: Option<u64>) -> Self {
        self.host_memory = bytes;
        self
    }

    /// Where blocks of preempted sequences go. Default: the system's folder for temporary files.
    pub fn spill_folder(mut self, folder: impl Into<PathBuf>) -> Self {
        self.spill_folder = folder.into();
        self
    }

    /// Instruction set of the CPU attention. Default: the best that this CPU has.
    pub fn isa(mut self, isa: Isa) -> Self {
        self.isa = Some(isa);
        self
    }

    /// End-of-sequence tokens beside config.json's: generation_config.json may name more.
    pub fn more_eos_tokens(mut self, tokens: &[u32]) -> Self {
        self.more_eos_tokens = tokens.to_vec();
        self
    }

    /// Changes shaders before they are compiled: how tests plant a fault.
    pub fn shader_patches(mut self, patches: Vec<ShaderPatch>) -> Self {
        self.patches = patches;
        self
    }

    /// Tiles of the f16 class, instead of those kept for the adapter.
    pub fn tiles(mut self, tiles: Tiles) -> Self {
        self.tiles = Some(tiles);
        self
    }

    /// What predictions are made from. Default: none are made.
    pub fn profile(mut self, choice: ProfileChoice) -> Self {
        self.profile = choice;
        self
    }

    /// Searches for the policy that answers such requests fastest, within the wishes, where there is a profile. `margin`: share of
    /// both memories that it leaves free.
    pub fn plan_for(mut self, workload: Option<Workload>, margin: f64) -> Self {
        (self.workload, self.margin) = (workload, margin);
        self
    }

    /// This policy, as far as no wish says otherwise: nothing is searched for.
    pub fn policy(mut self, policy: Option<Policy>) -> Self {
        self.policy = policy;
        self
    }

    /// The profile of this machine and these layers, if there is one.
    fn find_profile(&self, gpu: &Gpu, inventory: &Inventory) -> Result<Option<Arc<Profile>>, EngineError> {
        let machine = MachineKey::of(gpu.summary(), self.isa.unwrap_or_else(Isa::best));
        let model = ModelKey::of(inventory, self.wishes.precision.unwrap_or_else(|| default_precision(gpu)));
        match &self.profile {
            ProfileChoice::None => Ok(None),
            ProfileChoice::Given(profile) => {
                profile.check(&machine, &model)?;
                Ok(Some(profile.clone()))
            }
            // A cache that cannot be read is no reason not to run.
            ProfileChoice::Cached => match Profile::cached(&machine, &model) {
                Ok(profile) => Ok(profile.map(Arc::new)),
                Err(error) => {
                    tracing::warn!("{error}; running without a profile");
                    Ok(None)
                }
            },
        }
    }

    /// The policy that was searched for, else the first one that fits.
    fn choose(
        &self,
        weights: &Weights,
        limits: &MachineLimits,
        profile: Option<&Profile>,
    ) -> Result<(Plan, Option<Arc<Found>>), EngineError> {
        let bytes = ModelBytes::of(weights.inventory());
        if let Some(policy) = &self.policy {
            let wishes = self.wishes.or_of(policy, weights.config());
            return Ok((fit(weights.config(), &bytes, limits, &wishes)?, None));
        }
        if let (Some(profile), Some(workload)) = (profile, self.workload) {
            let problem = Problem {
                config: weights.config(),
                bytes,
                profile,
                limits: *limits,
                margin: self.margin,
                wishes: self.wishes,
                workload,
            };
            match problem.search() {
                Ok(found) => return Ok((found.best.plan, Some(Arc::new(found)))),
                Err(SearchError::Plan(error)) => return Err(error.into()),
                Err(error) => tracing::warn!("{error}; taking the defaults"),
            }
        }
        Ok((fit(weights.config(), &bytes, limits, &self.wishes)?, None))
    }

    /// The plan alone.
    pub fn plan_only(self) -> Result<Plan, EngineError> {
        Ok(self.prepare()?.plan)
    }

    /// Validates the checkpoint, opens the adapter and plans. Loads nothing.
    pub fn prepare(self) -> Result<Prepared, EngineError> {
        let weights = match &self.model {
            Model::Folder(folder) => Weights::Files(Checkpoint::open(folder)?),
            Model::Synthetic(config) => Weights::Synthetic(Synthetic::new((**config).clone())),
        };
        let weights = Arc::new(weights);
        let gpu = Arc::new(Gpu::open_with(&self.open)?);
        let limits = machine_limits(&gpu, self.gpu_memory, self.host_memory);
        if weights.inventory().expert_dtype().is_none() {
            return Err(EngineError::MixedExperts);
        }
        let profile = self.find_profile(&gpu, weights.inventory())?;
        let (plan, found) = self.choose(&weights, &limits, profile.as_deref())?;
        Ok(Prepared { builder: self, weights, gpu, limits, profile, plan, found })
    }
}

/// Operands of matrix products where nobody says.
pub fn default_precision(gpu: &Gpu) -> Precision {
    if gpu.cooperative() { Precision::F16 } else { Precision::F32 }
}

/// What may be taken of a machine, where nobody says how much: 90 % of the device's memory, 80 % of what the host has available.
pub fn machine_limits(gpu: &Gpu, gpu_memory: Option<u64>, host_memory: Option<u64>) -> MachineLimits {
    MachineLimits {
        device_bytes: gpu_memory.unwrap_or_else(|| gpu.memory_bytes().unwrap_or(2 << 30) / 10 * 9),
        host_bytes: host_memory.unwrap_or_else(|| host_memory::available_bytes().unwrap_or(4 << 30) / 10 * 8),
        binding_bytes: gpu.max_binding_bytes(),
        threads: std::thread::available_parallelism().map_or(1, |n| n.get()),
        kernels_reach_host: gpu.kernels_reach_host(),
        cooperative: gpu.cooperative(),
    }
}

/// A validated checkpoint, an open adapter and a plan: what is known before anything is loaded.
pub struct Prepared {
    builder: EngineBuilder,
    weights: Arc<Weights>,
    gpu: Arc<Gpu>,
    limits: MachineLimits,
    profile: Option<Arc<Profile>>,
    plan: Plan,
    found: Option<Arc<Found>>,
}

impl Prepared {
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The plan for other wishes, on the same adapter.
    pub fn plan_for(&self, wishes: &Wishes) -> Result<Plan, EngineError> {
        let bytes = ModelBytes::of(self.weights.inventory());
        Ok(fit(self.weights.config(), &bytes, &self.limits, wishes)?)
    }

    /// Takes those wishes.
    pub fn replan(&mut self, wishes: Wishes) -> Result<(), EngineError> {
        self.plan = self.plan_for(&wishes)?;
        self.builder.wishes = wishes;
        Ok(())
    }

    /// What the search found that made the plan; None where it was not searched for.
    pub fn found(&self) -> Option<&Found> {
        self.found.as_deref()
    }

    /// What was measured of this machine, where somebody asked for it and it is there.
    pub fn profile(&self) -> Option<&Arc<Profile>> {
        self.profile.as_ref()
    }

    /// What may be taken of the machine.
    pub fn limits(&self) -> &MachineLimits {
        &self.limits
    }

    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    pub fn config(&self) -> &ModelConfig {
        self.weights.config()
    }

    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Allocates everything and brings the weights that stay to the GPU. `progress(done, total)` in bytes, once for those and
    /// once for the weights that stream, where they are kept in memory.
    ///
    /// Where the device has less memory than it said, the plan is made again for what it has, with a smaller ring; the new
    /// plan is the engine's.
    pub fn load(mut self, progress: &mut dyn FnMut(u64, u64)) -> Result<Engine, EngineError> {
        loop {
            let refused = match self.load_once(progress) {
                Err(EngineError::Page(PageError::Gpu(refused @ GpuError::OutOfMemory { .. }))) => refused,
                result => return result,
            };
            let GpuError::OutOfMemory { taken, .. } = &refused else { unreachable!("matched above") };
            // What was taken when the next buffer was refused is what there is.
            let there = (*taken).min(self.plan.memory.device() - 1);
            let limits = MachineLimits { device_bytes: there, ..self.limits };
            let Ok((plan, found)) = self.builder.choose(&self.weights, &limits, self.profile.as_deref()) else {
                return Err(refused.into());
            };
            tracing::warn!(%refused, "the device has less memory than it said; planning again with a smaller ring:\n{plan}");
            (self.plan, self.limits, self.found) = (plan, limits, found);
        }
    }

    fn load_once(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<Engine, EngineError> {
        let Prepared { builder, weights, gpu, limits, profile, plan, .. } = self;
        let opened = Opened {
            builder: builder.clone(),
            weights: weights.clone(),
            gpu: gpu.clone(),
            pipelines: Arc::new(Pipelines::with_patches(gpu.clone(), builder.patches.clone())),
            limits: *limits,
            profile: profile.clone(),
        };
        opened.assemble(*plan, None, progress)
    }
}

/// What an engine is made of whatever its policy.
struct Opened {
    builder: EngineBuilder,
    weights: Arc<Weights>,
    gpu: Arc<Gpu>,
    /// Compiled once, whatever the policy.
    pipelines: Arc<Pipelines>,
    limits: MachineLimits,
    profile: Option<Arc<Profile>>,
}

/// What is dear to make and survives a change of policy.
struct Kept {
    kv: KvCache,
    kv_arenas: Vec<HostBuffer>,
    source: Option<PageSource>,
}

impl Opened {
    fn assemble(
        self,
        plan: Plan,
        kept: Option<Kept>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Engine, EngineError> {
        let (builder, gpu, weights) = (&self.builder, &self.gpu, &self.weights);
        let (config, policy) = (weights.config().clone(), plan.policy);
        let shape = config.shape;
        let layout = KvLayout::new(&shape, policy.kv_dtype);
        let limits = BatchLimits {
            max_sequences: policy.max_sequences,
            micro_batches: policy.micro_batches,
            rows_per_micro_batch: policy.rows_per_micro_batch,
            prompt_chunk: policy.prompt_chunk,
            workspace_blocks: policy.workspace_blocks,
            gpu_decode: policy.attention == AttentionPlace::Gpu,
        };
        let (kv, mut kv_arenas, source) = match kept {
            Some(Kept { kv, kv_arenas, source }) => (kv, kv_arenas, source),
            None => (KvCache::new(layout, policy.kv_blocks)?, Vec::new(), None),
        };
        // Only where all context crosses the link every pass: lending pins the whole pool.
        if policy.attention == AttentionPlace::Gpu && kv_arenas.is_empty() {
            kv_arenas = lend_pool(gpu, &kv);
        }
        let batcher = Batcher::new(limits, kv, SpillFile::new(&builder.spill_folder, layout));
        let threads = attention_threads(policy.threads)?;
        let page_plan = page_plan(&config, weights, &plan);
        let extents = extents(&policy);
        let pipelines = self.pipelines.clone();
        let lent = !kv_arenas.is_empty();
        let tiles = builder.tiles.clone().unwrap_or_else(|| Tiles::for_device(gpu));
        let mut machine =
            Machine::open(pipelines, weights, page_plan, extents, tiles, lent, source.as_ref(), progress)?;
        if let Some(source) = source {
            machine.set_source(source);
        } else if machine.plan().streamed() > 0 {
            let request = SourceRequest {
                gpu,
                weights,
                plan: machine.plan(),
                layers: shape.layers,
                wish: policy.source,
                host_bytes: plan.memory.host_weights,
                threads: &threads,
            };
            let source = PageSource::open(&request, progress)?;
            machine.set_source(source);
        }
        let mut eos_tokens = config.eos_tokens.clone();
        eos_tokens.extend(&builder.more_eos_tokens);
        Ok(Engine {
            config,
            plan,
            machine,
            batcher,
            kv_arenas,
            threads,
            isa: builder.isa.unwrap_or_else(Isa::best),
            tokenizer: builder.tokenizer.clone(),
            eos_tokens,
            loaded_pages: 0,
            on_their_way: Vec::new(),
            opened: self,
        })
    }
}

fn page_plan(config: &ModelConfig, weights: &Weights, plan: &Plan) -> PagePlan {
    PagePlan::new(plan.page_shape(config, &ModelBytes::of(weights.inventory())))
}

/// The pool as the driver knows it, in pieces; empty where it does not take it.
fn lend_pool(gpu: &Arc<Gpu>, kv: &KvCache) -> Vec<HostBuffer> {
    let (start, bytes, keep) = kv.memory();
    let mut arenas = Vec::new();
    for at in (0..bytes).step_by(KV_ARENA_BYTES as usize) {
        let piece = (bytes - at).min(KV_ARENA_BYTES);
        // SAFETY: the pool is that long, and `keep` owns it; uploads are ordered against what writes it.
        match unsafe { gpu.import("the KV pool", start.add(at as usize).cast_mut(), piece, keep.clone()) } {
            Ok(arena) => arenas.push(arena),
            Err(error) => {
                tracing::info!(%error, "the KV pool is not lent to the driver: context is staged");
                return Vec::new();
            }
        }
    }
    arenas
}

/// The CPU lane's threads, each on a core of its own where the system lets it.
fn attention_threads(n: usize) -> Result<rayon::ThreadPool, EngineError> {
    rayon::ThreadPoolBuilder::new()
        .num_threads(n)
        .thread_name(|index| format!("attention {index}"))
        .start_handler(crate::cpu::pin_thread)
        .build()
        .map_err(|error| EngineError::Threads(n, error.to_string()))
}

/// What happens in a run, told as it happens.
pub enum Event<'a> {
    /// More text of a completion is certain.
    Text {
        custom_id: &'a str,
        index: usize,
        text: &'a str,
    },
    Finished(RequestOutput),
    /// A pass has run.
    Pass(PassReport<'a>),
    /// A row's logits, where [`RunOptions::every_logit`] asked for all of them.
    Logits {
        custom_id: &'a str,
        index: usize,
        position: usize,
        logits: &'a [f32],
    },
}

/// One pass: its rows by micro-batch, what was launched, and when each task ran.
pub struct PassReport<'a> {
    pub micro_batches: Vec<&'a MicroBatchRows>,
    pub schedule: &'a Schedule,
    /// Counted from the start of the run. Pages that were loaded ahead are in the pass in which they arrived.
    pub timeline: &'a Timeline,
    /// Sequences in the queue, new and preempted.
    pub queued: usize,
    /// How well the run's passes were predicted up to this one, where there is a profile.
    pub comparison: Option<&'a Comparison>,
}

/// Passes of a run that are all predicted; of later ones, which are like them, every so manyth. A prediction takes milliseconds.
const ALL_COMPARED: u64 = 64;
const SOME_COMPARED: u64 = 16;

/// What a run does beside answering.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RunOptions {
    /// Hand out every row's logits as [`Event::Logits`].
    pub every_logit: bool,
    /// Make no text that decides nothing: completions without stop strings have tokens only, and no [`Event::Text`] tells of them.
    /// [`RequestOutput::make_texts`] makes their texts later, on whatever thread.
    pub leave_texts: bool,
}

/// Where a run's requests come from. An iterator of requests is one that always has the next at hand.
pub trait Requests {
    /// The next one, None at the end, pending where it is not there yet: then the run asks again after its next pass. With `wait` there is
    /// nothing else to do until it is there.
    fn next_request(&mut self, wait: bool) -> Poll<Option<Request>>;
}

impl<I: Iterator<Item = Request>> Requests for I {
    fn next_request(&mut self, _wait: bool) -> Poll<Option<Request>> {
        Poll::Ready(self.next())
    }
}

/// A run in numbers.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RunSummary {
    pub requests: u64,
    pub failed: u64,
    pub passes: u64,
    /// Prompt rows computed. Completions that share a prompt compute only its last few tokens again.
    pub prompt_tokens: u64,
    pub generated_tokens: u64,
    pub elapsed: Duration,
    /// Time in which each lane ran a task.
    pub busy: BTreeMap<Lane, Duration>,
    /// The same by what the tasks did ("experts", "page", …).
    pub busy_by_stage: BTreeMap<&'static str, Duration>,
    /// Expert bytes sent to the GPU.
    pub page_bytes: u64,
    /// Bytes that each lane moved. The host's own (pages relayed from memory to memory) do not cross the link.
    pub lane_bytes: BTreeMap<Lane, u64>,
    /// Time in which at least one lane ran a task.
    pub busy_any: Duration,
    pub batch: BatchCounters,
    /// The receiver of the events broke off; some requests are not answered.
    pub interrupted: bool,
    /// How well its passes were predicted, where there is a profile.
    pub comparison: Option<Comparison>,
}

/// A loaded model.
pub struct Engine {
    // Before what it may still be copying from.
    machine: Machine,
    opened: Opened,
    config: ModelConfig,
    plan: Plan,
    batcher: Batcher,
    /// The KV pool as the driver knows it, where it was lent.
    kv_arenas: Vec<HostBuffer>,
    threads: rayon::ThreadPool,
    isa: Isa,
    tokenizer: Option<Tokenizer>,
    eos_tokens: Vec<u32>,
    /// Pages of the next pass that are loaded or on their way.
    loaded_pages: usize,
    /// Those that are predicted to be on their way still.
    on_their_way: Vec<OnItsWay>,
}

impl Engine {
    /// A folder of files.
    pub fn builder(model: impl AsRef<Path>) -> EngineBuilder {
        Self::builder_of(Model::Folder(model.as_ref().to_owned()))
    }

    /// Made-up weights of a given shape.
    pub fn synthetic(config: ModelConfig) -> EngineBuilder {
        Self::builder_of(Model::Synthetic(Box::new(config)))
    }

    fn builder_of(model: Model) -> EngineBuilder {
        EngineBuilder {
            model,
            tokenizer: None,
            open: OpenOptions::default(),
            wishes: Wishes::default(),
            gpu_memory: None,
            host_memory: None,
            spill_folder: std::env::temp_dir(),
            isa: None,
            more_eos_tokens: Vec::new(),
            patches: Vec::new(),
            tiles: None,
            profile: ProfileChoice::None,
            workload: None,
            margin: 0.0,
            policy: None,
        }
    }

    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What is predicted for requests like those of `workload` without an end under this engine's policy, also one that nobody searched for:
    /// tokens per second, and a pass in the middle, prompt and decode rows together. None where there is no profile, or none of these
    /// pages.
    pub fn predict(&self, workload: Workload) -> Option<Choice> {
        let problem = Problem {
            config: &self.config,
            bytes: ModelBytes::of(self.opened.weights.inventory()),
            profile: self.opened.profile.as_deref()?,
            limits: self.opened.limits,
            margin: 0.0,
            wishes: Wishes::of(&self.plan.policy, &self.config),
            workload: Workload { requests: None, ..workload },
        };
        problem.predict(&self.plan).ok()
    }

    /// Bytes of all experts, those that stay among them.
    pub fn expert_bytes(&self) -> u64 {
        let shape = &self.config.shape;
        (shape.layers * shape.experts) as u64 * ModelBytes::of(self.opened.weights.inventory()).expert()
    }

    /// What the plan had to keep to.
    pub fn limits(&self) -> &MachineLimits {
        &self.opened.limits
    }

    /// Device memory in live buffers: what the plan's [`MemoryUse::device`](crate::plan::MemoryUse::device) foretold.
    pub fn device_bytes_taken(&self) -> u64 {
        self.machine.pipelines().gpu().taken_bytes()
    }

    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Where pages come from, and why not from a better place. None where nothing streams.
    pub fn page_source(&self) -> Option<&PageSource> {
        self.machine.source()
    }

    pub fn gpu(&self) -> &Gpu {
        self.machine.gpu()
    }

    /// Brings all pages of a pass, twice, with nothing else running; the second time as bytes and duration. None where nothing
    /// streams. What the slots held is gone.
    pub fn measure_pages(&mut self) -> Result<Option<(u64, Duration)>, EngineError> {
        self.loaded_pages = 0;
        if self.machine.plan().streamed() == 0 {
            return Ok(None);
        }
        let layers = self.config.shape.layers;
        let mut measured = (0, Duration::ZERO);
        for _ in 0..2 {
            let started = Instant::now();
            let (mut bytes, mut last) = (0, None);
            for layer in 0..layers {
                let pages = self.machine.plan().chunks().iter().enumerate();
                let pages =
                    pages.flat_map(|(chunk, of)| (0..of.pages.len()).map(move |page| (chunk, page))).enumerate();
                for (number, (chunk, page)) in pages {
                    if self.machine.plan().loads(layer, number) {
                        self.machine.pin_page(&self.opened.weights, &self.threads, layer, chunk, page)?;
                        let (weights, threads) = (&self.opened.weights, &self.threads);
                        last = Some(self.machine.load_page(weights, threads, layer, chunk, page, &[])?);
                        bytes += self.machine.page_bytes(chunk, page);
                    }
                }
            }
            last.map_or(Ok(()), |ticket| self.machine.gpu().wait_for(ticket))?;
            measured = (bytes, started.elapsed());
        }
        Ok(Some(measured))
    }

    /// The plan that [`reopen`](Self::reopen) would open.
    pub fn plan_again(&self, wishes: &Wishes) -> Result<Plan, EngineError> {
        let bytes = ModelBytes::of(self.opened.weights.inventory());
        let pool_bytes = Some(self.plan.memory.kv_pool);
        let asked = Wishes { source: None, kv_bytes: wishes.kv_bytes.or(pool_bytes), ..*wishes };
        let plan = fit(&self.config, &bytes, &self.opened.limits, &asked)?;
        let pages = page_plan(&self.config, &self.opened.weights, &plan);
        let served = || self.machine.source().is_some_and(|source| source.serves(&pages));
        let pool = |plan: &Plan| (plan.policy.kv_blocks, plan.policy.kv_dtype);
        if pages.streamed() > 0 && !served() || pool(&plan) != pool(&self.plan) {
            return Err(EngineError::OtherPages);
        }
        Ok(plan)
    }

    /// The same model under another policy: how schedules are compared. Experts in host memory and the KV pool stay where they are, so
    /// nothing else may stream than did, and the pool may not change; weights that stay are brought to the GPU again.
    pub fn reopen(self, wishes: Wishes) -> Result<Engine, EngineError> {
        let mut plan = self.plan_again(&wishes)?;
        let Engine { machine, opened, batcher, kv_arenas, .. } = self;
        plan.policy.source = wishes.source;
        let source = machine.into_source();
        // Memory of dropped buffers comes back when wgpu has looked.
        opened.gpu.flush()?;
        opened.gpu.wait()?;
        opened.gpu.flush()?;
        opened.gpu.take_peak_bytes(); // of the policy before
        let source = match (source.filter(|_| plan.streamed_bytes_per_pass > 0), wishes.source) {
            (Some(source), Some(wish)) => Some(source.used_as(wish)?),
            (source, _) => source,
        };
        opened.assemble(plan, Some(Kept { kv: batcher.into_cache(), kv_arenas, source }), &mut |_, _| {})
    }

    /// Answers every request. They are taken as there is room, and their events come in the order in which
    /// things happen; `on` ends the run early by breaking off. Requests that are under way then, or when a fault of the device or the
    /// disk ends the run with an error, have no [`Event::Finished`].
    pub fn run(
        &mut self,
        requests: &mut dyn Requests,
        options: RunOptions,
        on: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
    ) -> Result<RunSummary, EngineError> {
        let started = Instant::now();
        let mut summary = RunSummary::default();
        let result = self.run_passes(requests, options, on, &mut summary);
        // An interrupted or failed run leaves sequences behind.
        self.batcher.clear();
        self.on_their_way.clear();
        summary.elapsed = started.elapsed();
        summary.batch = self.batcher.take_counters();
        result.map(|()| summary)
    }

    fn run_passes(
        &mut self,
        requests: &mut dyn Requests,
        options: RunOptions,
        on: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
        summary: &mut RunSummary,
    ) -> Result<(), EngineError> {
        let origin = Instant::now();
        let mut answers = Answers::new(self, options, on);
        let mut exhausted = false;
        // What each micro-batch does next. Its Sample task fills it in; one that had no rows is planned below.
        let mut next = vec![MicroBatchRows::default(); self.plan.policy.micro_batches];
        let mut carried = Vec::new();
        loop {
            // Enough in the queue that a whole pass of sequences can be replaced at once.
            while !exhausted && !answers.broken_off() && self.batcher.queued() < self.plan.policy.max_sequences {
                match requests.next_request(self.batcher.is_empty()) {
                    Poll::Ready(Some(request)) => answers.accept(request, &mut self.batcher),
                    Poll::Ready(None) => exhausted = true,
                    Poll::Pending => break,
                }
            }
            (summary.requests, summary.failed) = (answers.accepted(), answers.failed());
            if answers.broken_off() {
                summary.interrupted = true;
                return Ok(());
            }
            for (number, rows) in next.iter_mut().enumerate() {
                if rows.rows.is_empty() {
                    *rows = self.batcher.plan_micro_batch(number)?;
                }
            }
            if next.iter().all(|rows| rows.rows.is_empty()) {
                assert!(self.batcher.is_empty(), "the oldest sequence always gets rows");
                if exhausted {
                    return Ok(());
                }
                continue; // all that was read so far has been refused, or nothing was there yet
            }
            self.run_pass(&mut next, options, origin, &mut answers, &mut carried, summary)?;
        }
    }

    /// Predicts the pass that has just run, and holds the prediction against it.
    fn compare(&mut self, rows: &PassRows, schedule: &Schedule, measured: Side<'_>, summary: &mut RunSummary) {
        let Some(profile) = &self.opened.profile else { return };
        // Pages that were never measured have no prediction.
        let Ok(cut) = Cut::new(&self.plan, self.machine.plan().clone(), profile) else { return };
        let predictor = Predictor::with_cut(&self.config, &self.plan, Arc::new(cut), profile);
        let costs = predictor.costs(rows);
        let layers = self.config.shape.layers;
        let pass = simulate_pass(schedule, layers, |work| costs.of(work), &self.on_their_way);
        let seconds = pass.seconds + predictor.between(schedule.tasks.len());
        let comparison = summary.comparison.get_or_insert_default();
        comparison.add(Phase::of(rows), Side { seconds, timeline: &pass.timeline }, measured);
        self.on_their_way = pass.on_their_way;
    }

    /// One pass over the rows of `next`, which holds those of the following one afterwards.
    fn run_pass(
        &mut self,
        next: &mut [MicroBatchRows],
        options: RunOptions,
        origin: Instant,
        answers: &mut Answers<'_>,
        carried: &mut Vec<Carried<Ticket>>,
        summary: &mut RunSummary,
    ) -> Result<(), EngineError> {
        let (policy, every_logit) = (self.plan.policy, options.every_logit);
        let begun = Instant::now();
        let rows = next.iter_mut().map(std::mem::take).collect();
        let (machine, config) = (&mut self.machine, &self.config);
        let (micro_batches, groups, mut shape) =
            pass::lay_out(machine, config, &policy, &self.batcher, answers, every_logit, rows);
        shape.loaded_pages = std::mem::take(&mut self.loaded_pages);
        let schedule = build(policy.schedule, &shape);
        check(&schedule, &shape)?;
        let (start, bytes, _keep) = self.batcher.kv().memory();
        let pool =
            KvPool { pointer: start, layer_bytes: bytes / self.config.shape.layers as u64, arenas: &self.kv_arenas };
        let pass = Pass {
            weights: &self.opened.weights,
            config: &self.config,
            machine: &self.machine,
            threads: &self.threads,
            pool,
            micro_batches: &micro_batches,
            groups: &groups,
        };
        let mut host = HostLane {
            pass: &pass,
            attention: policy.attention,
            isa: self.isa,
            batcher: &mut self.batcher,
            answers,
            next,
            every_logit,
        };
        pass.machine.gpu().begin_pass();
        let ran = run_schedule(&schedule, &pass, &mut host, origin, self.config.shape.layers, carried);
        pass.machine.gpu().end_pass();
        let timeline = ran?;
        let pass_rows = self.opened.profile.is_some().then(|| pass.rows(&shape));
        summary.page_bytes += schedule
            .tasks
            .iter()
            .filter(|task| matches!(task.work, Work::LoadPage { .. }))
            .map(|task| crate::execute::Device::size(&pass, task.work).0)
            .sum::<u64>();
        self.machine.end_pass();
        self.loaded_pages = shape.pages_ahead();
        self.machine.gpu().reap()?;
        let seconds = begun.elapsed().as_secs_f64();

        summary.passes += 1;
        if let Some(rows) =
            pass_rows.filter(|_| summary.passes <= ALL_COMPARED || summary.passes.is_multiple_of(SOME_COMPARED))
        {
            self.compare(&rows, &schedule, Side { seconds, timeline: &timeline }, summary);
        }
        let decode: usize = micro_batches.iter().map(|of| of.rows.n_decode()).sum();
        let all: usize = micro_batches.iter().map(|of| of.rows.rows.len()).sum();
        summary.prompt_tokens += (all - decode) as u64;
        summary.generated_tokens = answers.generated();
        for lane in Lane::ALL {
            *summary.busy.entry(lane).or_default() += timeline.busy(lane);
            *summary.lane_bytes.entry(lane).or_default() += timeline.bytes(lane);
        }
        summary.busy_any += timeline.busy_any();
        for span in &timeline.spans {
            *summary.busy_by_stage.entry(span.work.name()).or_default() += span.end - span.start;
        }
        let queued = self.batcher.queued();
        tracing::debug!(
            pass = summary.passes,
            decode_rows = decode,
            prompt_rows = all - decode,
            queued,
            milliseconds = timeline.duration().as_millis() as u64,
            "pass has run"
        );
        let micro_batches = micro_batches.iter().map(|of| &of.rows).collect();
        let comparison = summary.comparison.as_ref();
        let report = PassReport { micro_batches, schedule: &schedule, timeline: &timeline, queued, comparison };
        answers.tell(Event::Pass(report));
        Ok(())
    }
}
