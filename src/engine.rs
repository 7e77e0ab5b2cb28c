//! Opens a model and answers requests: the only module that sees all others.
//!
//! ```text
//! Engine::builder(folder) ─ prepare() ─▶ Prepared ─ load() ─▶ Engine ─ run(requests) ─▶ events
//!                           checkpoint, adapter, plan           weights on the GPU
//! ```
//!
//! One pass: each group's rows are fixed ([`Batcher::plan_group`]), a [`Schedule`](crate::schedule::Schedule) is built for
//! them, and [`execute::run`](crate::execute::run) hands its tasks to the pass worker (`engine/pass.rs`), which does the host's part itself and
//! leaves the device's to the [`Machine`]. When a group's ids are known its finished sequences leave, and its rows of the next
//! pass are fixed at once.
//!
//! Guarantees: requests are taken one by one as there is room, so memory does not grow with their number; each is answered
//! exactly once; one that fails (too long, not a number, …) does not disturb the others.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::cpu::isa::Isa;
use crate::execute::machine::Extents;
use crate::execute::{Machine, TaskError, run as run_schedule};
use crate::gpu::{DeviceChoice, Gpu, GpuError, Pipelines, ShaderPatch};
use crate::memory::host_memory;
use crate::memory::kv_cache::{KvCache, KvError, KvLayout, SpillFile};
use crate::memory::pages::{PagePlan, PageShape};
use crate::model::ModelConfig;
use crate::plan::{MachineLimits, ModelBytes, Plan, PlanError, Wishes, fit};
use crate::policy::AttentionPlace;
use crate::request::batcher::{BatchCounters, BatchLimits, Batcher, GroupRows};
use crate::request::tokenizer::Tokenizer;
use crate::request::{Request, RequestOutput};
use crate::schedule::{Lane, Timeline, check, serial};

mod answers;
mod pass;

use answers::Answers;
use pass::PassWorker;

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
    Kv(#[from] KvError),
    #[error("{0} worker threads could not be started: {1}")]
    Threads(usize, String),
    #[error(transparent)]
    Task(#[from] TaskError<WorkError>),
}

impl EngineError {
    /// The device is gone; what is finished is safe and the rest can be run again.
    pub fn device_lost(&self) -> bool {
        matches!(
            self,
            EngineError::Gpu(GpuError::Lost(_))
                | EngineError::Task(TaskError { source: WorkError::Gpu(GpuError::Lost(_)), .. })
        )
    }
}

/// What a task can fail with.
#[derive(Debug, thiserror::Error)]
pub enum WorkError {
    #[error(transparent)]
    Gpu(#[from] GpuError),
    #[error(transparent)]
    Kv(#[from] KvError),
}

/// How to open a model. Made by [`Engine::builder`].
#[derive(Debug, Clone)]
pub struct EngineBuilder {
    model: PathBuf,
    tokenizer: Option<Tokenizer>,
    device: DeviceChoice,
    wishes: Wishes,
    gpu_memory: Option<u64>,
    host_memory: Option<u64>,
    spill_folder: PathBuf,
    isa: Option<Isa>,
    more_eos_tokens: Vec<u32>,
    patches: Vec<ShaderPatch>,
}

impl EngineBuilder {
    /// Makes texts of tokens. Without it completions have tokens only, and stop strings are refused.
    pub fn tokenizer(mut self, tokenizer: Tokenizer) -> Self {
        self.tokenizer = Some(tokenizer);
        self
    }

    pub fn device(mut self, choice: DeviceChoice) -> Self {
        self.device = choice;
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

    /// Most host memory to take beside the mapped checkpoint, in bytes. Default: 80 % of what is available.
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

    /// Validates the checkpoint, opens the adapter and plans. Loads nothing.
    pub fn prepare(self) -> Result<Prepared, EngineError> {
        let checkpoint = Checkpoint::open(&self.model)?;
        let gpu = Arc::new(Gpu::open(&self.device)?);
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        let limits = MachineLimits {
            device_bytes: self.gpu_memory.unwrap_or_else(|| gpu.memory_bytes().unwrap_or(2 << 30) / 10 * 9),
            host_bytes: self.host_memory.unwrap_or_else(|| host_memory::available_bytes().unwrap_or(4 << 30) / 10 * 8),
            binding_bytes: gpu.max_binding_bytes(),
            threads,
        };
        if checkpoint.inventory().expert_dtype().is_none() {
            return Err(EngineError::MixedExperts);
        }
        let plan = fit(checkpoint.config(), &ModelBytes::of(checkpoint.inventory()), &limits, &self.wishes)?;
        Ok(Prepared { builder: self, checkpoint, gpu, plan })
    }
}

/// A validated checkpoint, an open adapter and a plan: what is known before anything is loaded.
pub struct Prepared {
    builder: EngineBuilder,
    checkpoint: Checkpoint,
    gpu: Arc<Gpu>,
    plan: Plan,
}

impl Prepared {
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// Allocates everything and brings the weights that stay to the GPU. `progress(done, total)` in bytes.
    pub fn load(self, progress: &mut dyn FnMut(u64, u64)) -> Result<Engine, EngineError> {
        let Prepared { builder, checkpoint, gpu, plan } = self;
        let (config, policy) = (checkpoint.config().clone(), plan.policy);
        let shape = config.shape;
        let layout = KvLayout { layers: shape.layers, kv_heads: shape.kv_heads, head_width: shape.head_width };
        let limits = BatchLimits {
            max_sequences: policy.max_sequences,
            groups: policy.groups,
            rows_per_group: policy.rows_per_group,
            prompt_chunk: policy.prompt_chunk,
            workspace_blocks: policy.workspace_blocks,
            gpu_decode: policy.attention == AttentionPlace::Gpu,
        };
        let kv = KvCache::new(layout, policy.kv_blocks)?;
        let batcher = Batcher::new(limits, kv, SpillFile::new(&builder.spill_folder, layout));
        let threads = rayon::ThreadPoolBuilder::new()
            .num_threads(policy.threads)
            .thread_name(|index| format!("attention {index}"))
            .build()
            .map_err(|error| EngineError::Threads(policy.threads, error.to_string()))?;
        let page_plan = PagePlan::new(PageShape {
            experts: shape.experts,
            resident: policy.resident_experts,
            ring: policy.ring_experts,
            matrix_bytes: ModelBytes::of(checkpoint.inventory()).matrix,
            page_bytes: policy.page_bytes,
            layers: shape.layers,
        });
        let extents = Extents {
            groups: policy.groups,
            rows_per_group: policy.rows_per_group,
            workspace_blocks: policy.workspace_blocks,
            max_positions: policy.max_model_len,
            head_rows: policy.head_rows,
        };
        let pipelines = Pipelines::with_patches(gpu, builder.patches);
        let machine = Machine::open(pipelines, &checkpoint, page_plan, extents, progress)?;
        let mut eos_tokens = config.eos_tokens.clone();
        eos_tokens.extend(&builder.more_eos_tokens);
        Ok(Engine {
            checkpoint,
            config,
            plan,
            machine,
            batcher,
            threads,
            isa: builder.isa.unwrap_or_else(Isa::best),
            tokenizer: builder.tokenizer,
            eos_tokens,
        })
    }
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

/// One pass: its rows by group, and when each task ran.
pub struct PassReport<'a> {
    pub groups: &'a [GroupRows],
    pub timeline: &'a Timeline,
    /// Sequences in the queue, new and preempted.
    pub queued: usize,
}

/// What a run does beside answering.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RunOptions {
    /// Hand out every row's logits as [`Event::Logits`].
    pub every_logit: bool,
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
    /// Expert bytes brought to the GPU.
    pub page_bytes: u64,
    pub batch: BatchCounters,
    /// The receiver of the events broke off; some requests are not answered.
    pub interrupted: bool,
}

/// A loaded model.
pub struct Engine {
    checkpoint: Checkpoint,
    config: ModelConfig,
    plan: Plan,
    machine: Machine,
    batcher: Batcher,
    threads: rayon::ThreadPool,
    isa: Isa,
    tokenizer: Option<Tokenizer>,
    eos_tokens: Vec<u32>,
}

impl Engine {
    pub fn builder(model: impl AsRef<Path>) -> EngineBuilder {
        EngineBuilder {
            model: model.as_ref().to_owned(),
            tokenizer: None,
            device: DeviceChoice::Best,
            wishes: Wishes::default(),
            gpu_memory: None,
            host_memory: None,
            spill_folder: std::env::temp_dir(),
            isa: None,
            more_eos_tokens: Vec::new(),
            patches: Vec::new(),
        }
    }

    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Device memory in live buffers: what the plan's [`MemoryUse::device`](crate::plan::MemoryUse::device) foretold.
    pub fn device_bytes_taken(&self) -> u64 {
        self.machine.pipelines().gpu().taken_bytes()
    }

    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Answers every request. They are taken from the iterator as there is room, and their events come in the order in which
    /// things happen; `on` ends the run early by breaking off. Requests that are under way then, or when a fault of the device or the
    /// disk ends the run with an error, have no [`Event::Finished`].
    pub fn run(
        &mut self,
        requests: &mut dyn Iterator<Item = Request>,
        options: RunOptions,
        on: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
    ) -> Result<RunSummary, EngineError> {
        let started = Instant::now();
        let mut summary = RunSummary::default();
        let result = self.run_passes(requests, options, on, &mut summary);
        // An interrupted or failed run leaves sequences behind.
        self.batcher.clear();
        summary.elapsed = started.elapsed();
        summary.batch = self.batcher.take_counters();
        result.map(|()| summary)
    }

    fn run_passes(
        &mut self,
        requests: &mut dyn Iterator<Item = Request>,
        options: RunOptions,
        on: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
        summary: &mut RunSummary,
    ) -> Result<(), EngineError> {
        let mut answers = Answers::new(self, on);
        let mut exhausted = false;
        // What each group does next. A group's Sample task fills it in; one that had no rows is planned below.
        let mut next = vec![GroupRows::default(); self.plan.policy.groups];
        loop {
            // Enough in the queue that a whole pass of sequences can be replaced at once.
            while !exhausted && !answers.broken_off() && self.batcher.queued() < self.plan.policy.max_sequences {
                match requests.next() {
                    Some(request) => answers.accept(request, &mut self.batcher),
                    None => exhausted = true,
                }
            }
            (summary.requests, summary.failed) = (answers.accepted(), answers.failed());
            if answers.broken_off() {
                summary.interrupted = true;
                return Ok(());
            }
            for (group, rows) in next.iter_mut().enumerate() {
                if rows.rows.is_empty() {
                    *rows = self.batcher.plan_group(group)?;
                }
            }
            let groups: Vec<usize> = (0..next.len()).filter(|group| !next[*group].rows.is_empty()).collect();
            if groups.is_empty() {
                assert!(self.batcher.is_empty(), "the oldest sequence always gets rows");
                if exhausted {
                    return Ok(());
                }
                continue; // all that was read so far has been refused
            }
            let rows: Vec<GroupRows> = groups.iter().map(|group| std::mem::take(&mut next[*group])).collect();
            let mut worker = PassWorker {
                checkpoint: &self.checkpoint,
                config: &self.config,
                attention: self.plan.policy.attention,
                isa: self.isa,
                threads: &self.threads,
                machine: &mut self.machine,
                batcher: &mut self.batcher,
                answers: &mut answers,
                groups: &groups,
                rows: &rows,
                next: &mut next,
                every_logit: options.every_logit,
                uploads: Vec::new(),
                fetched: Default::default(),
                attended: Vec::new(),
                head: Default::default(),
                page_bytes: 0,
            };
            let shape = worker.begin();
            let schedule = serial(&shape);
            debug_assert_eq!(check(&schedule, &shape), Ok(()));
            let ran = run_schedule(&schedule, &mut worker);
            summary.page_bytes += worker.page_bytes;
            let timeline = ran?;
            summary.passes += 1;
            let decode: usize = rows.iter().map(GroupRows::n_decode).sum();
            let all: usize = rows.iter().map(|group| group.rows.len()).sum();
            summary.prompt_tokens += (all - decode) as u64;
            summary.generated_tokens = answers.generated();
            for lane in Lane::ALL {
                *summary.busy.entry(lane).or_default() += timeline.busy(lane);
            }
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
            answers.tell(Event::Pass(PassReport { groups: &rows, timeline: &timeline, queued }));
        }
    }
}
