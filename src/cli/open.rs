//! Flags that open a model, shared by the commands that run one, and what is said while it opens.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::Args;

use super::Usage;
use super::progress::LoadProgress;
use crate::cpu::isa::Isa;
use crate::engine::{Engine, EngineBuilder, EngineError, Prepared, ProfileChoice, machine_limits};
use crate::gpu::{DeviceChoice, Gpu, OpenOptions, TransferChoice};
use crate::model::ModelConfig;
use crate::plan::hrm::human_seconds;
use crate::plan::workload::Workload;
use crate::plan::{MachineLimits, Wishes};
use crate::policy::{AttentionPlace, KvDtype, Policy, Precision, RowPath, ScheduleKind, SourceKind};
use crate::profile::Profile;
use crate::request::batch_file::GenerationDefaults;
use crate::request::chat_template::{ChatTemplate, ChatTemplateError};
use crate::request::tokenizer::Tokenizer;
use crate::schedule::Lane;
use crate::units::parse_bytes;

/// Where the model is.
#[derive(Debug, Args)]
pub struct ModelArguments {
    /// Folder of a Hugging Face checkpoint (config.json, *.safetensors, tokenizer.json)
    #[arg(short, long, visible_aliases = ["model-path", "model-id"], env = "FULMEN_MODEL", value_name = "FOLDER")]
    pub model: PathBuf,
    /// Jinja template for chat messages, a file or the template itself [default: the checkpoint's]
    #[arg(long, env = "FULMEN_CHAT_TEMPLATE", value_name = "FILE|TEXT")]
    pub chat_template: Option<String>,
}

fn bytes(text: &str) -> Result<u64, String> {
    parse_bytes(text).map_err(|error| error.to_string())
}

/// Which machine, and how much of it.
#[derive(Debug, Args)]
#[command(next_help_heading = "Machine and policy (change time, never tokens)")]
pub struct MachineArguments {
    /// Adapter by number or part of its name, see `fulmen devices` [default: the best]
    #[arg(long, env = "FULMEN_DEVICE", value_name = "N|NAME")]
    device: Option<String>,
    /// Most GPU memory to take, e.g. 14GiB [default: 90 % of the adapter's]
    #[arg(long, env = "FULMEN_GPU_MEMORY", value_parser = bytes, value_name = "SIZE")]
    gpu_memory: Option<u64>,
    /// Most host memory to take beside the mapped weights [default: 80 % of what is available]
    #[arg(long, env = "FULMEN_HOST_MEMORY", value_parser = bytes, value_name = "SIZE")]
    host_memory: Option<u64>,
    /// How bytes get to and from the GPU [default: queues, where the backend is Vulkan]
    #[arg(long, env = "FULMEN_TRANSFER", value_enum)]
    transfer: Option<Transfer>,
    /// Instruction set of the CPU attention [default: the best there is]
    #[arg(long, env = "FULMEN_ISA", value_name = "NAME")]
    isa: Option<String>,
}

impl MachineArguments {
    fn open_options(&self) -> Result<OpenOptions> {
        let mut options = OpenOptions::default();
        if let Some(device) = &self.device {
            options.device = DeviceChoice::from(device.as_str());
        }
        if let Some(Transfer::Plain) = self.transfer {
            options.transfer = TransferChoice::Plain;
        }
        if let Ok(faults) = std::env::var(TEST_FAULTS) {
            options.test_faults = faults.parse().map_err(|error| super::Usage(format!("{TEST_FAULTS}: {error}")))?;
        }
        Ok(options)
    }

    /// Opens the adapter.
    pub fn gpu(&self) -> Result<Arc<Gpu>> {
        Ok(Arc::new(Gpu::open_with(&self.open_options()?)?))
    }

    pub fn isa(&self) -> Result<Isa> {
        match &self.isa {
            None => Ok(Isa::best()),
            Some(name) => Ok(Isa::from_name(name).map_err(|error| super::Usage(format!("--isa: {error}")))?),
        }
    }

    /// What the flags leave of a machine's limits.
    pub fn limited(&self, limits: MachineLimits) -> MachineLimits {
        MachineLimits {
            device_bytes: self.gpu_memory.unwrap_or(limits.device_bytes),
            host_bytes: self.host_memory.unwrap_or(limits.host_bytes),
            ..limits
        }
    }

    /// What an engine may take of it.
    pub fn limits(&self, gpu: &Gpu) -> MachineLimits {
        machine_limits(gpu, self.gpu_memory, self.host_memory)
    }
}

/// How to run it. None of these changes a token, but --attention, --precision and --kv-dtype, which round differently.
#[derive(Debug, Args)]
#[command(next_help_heading = "Machine and policy (change time, never tokens)")]
pub struct EngineArguments {
    #[command(flatten)]
    machine: MachineArguments,
    /// Host memory for keys and values [default: what the sequences need, at most half of the host memory]
    #[arg(long, env = "FULMEN_KV_MEMORY", value_parser = bytes, value_name = "SIZE")]
    kv_memory: Option<u64>,
    /// How keys and values are kept on the host; int8 takes half the memory and rounds: other tokens than f16 [default: f16]
    #[arg(long, env = "FULMEN_KV_DTYPE", value_enum, value_name = "NAME")]
    kv_dtype: Option<KvDtype>,
    /// Tokens of a sequence, prompt and completion [default: the model's positions, at most 8192, or what the KV pool holds]
    #[arg(short = 'c', long, visible_alias = "ctx-size", env = "FULMEN_MAX_MODEL_LEN", value_name = "TOKENS")]
    max_model_len: Option<usize>,
    /// Sequences that run at a time [default: 256]
    #[arg(long, visible_aliases = ["np", "max-running-requests"], env = "FULMEN_MAX_NUM_SEQS", value_name = "N")]
    max_num_seqs: Option<usize>,
    /// Rows of a pass, decode and prompt rows together [default: 1024, or one per sequence]
    #[arg(long, env = "FULMEN_MAX_NUM_BATCHED_TOKENS", value_name = "N")]
    max_num_batched_tokens: Option<usize>,
    /// Longest piece of one prompt in a pass [default: as long as the pass has room]
    #[arg(long, env = "FULMEN_PROMPT_CHUNK", value_name = "TOKENS")]
    prompt_chunk: Option<usize>,
    /// Order in which a pass's work is launched [default: grouped]
    #[arg(long, env = "FULMEN_SCHEDULE", value_enum, value_name = "NAME")]
    schedule: Option<ScheduleKind>,
    /// Micro-batches into which the sequences of a pass are split; each attends on its own [default: 2]
    #[arg(long, env = "FULMEN_MICRO_BATCHES", value_name = "N")]
    micro_batches: Option<usize>,
    /// Groups of micro-batches whose rows experts take together [default: 2; one per micro-batch where the schedule is another than grouped]
    #[arg(long, env = "FULMEN_EXPERT_GROUPS", value_name = "N")]
    expert_groups: Option<usize>,
    /// Where decode rows attend [default: the schedule's place, else cpu]
    #[arg(long, env = "FULMEN_ATTENTION", value_enum)]
    attention: Option<AttentionPlace>,
    /// Experts of each layer that stay on the GPU [default: as many as fit]
    #[arg(long, env = "FULMEN_RESIDENT_EXPERTS", value_name = "N")]
    resident_experts: Option<usize>,
    /// Layers, spread evenly, of which one more expert stays on the GPU [default: as many as fit; none with --resident-experts]
    #[arg(long, env = "FULMEN_EXTRA_RESIDENTS", value_name = "N")]
    extra_residents: Option<usize>,
    /// Slots on the GPU for experts that stream [default: two layers' worth, or what fits]
    #[arg(long, env = "FULMEN_RING_EXPERTS", value_name = "N")]
    ring_experts: Option<usize>,
    /// Bytes of expert weights in one transfer [default: 32MiB]
    #[arg(long, env = "FULMEN_PAGE_SIZE", value_parser = bytes, value_name = "SIZE")]
    page_size: Option<u64>,
    /// Where expert pages come from [default: the first of imported, pinned, mapped, staged that the machine grants]
    #[arg(long, env = "FULMEN_PAGE_SOURCE", value_enum, value_name = "NAME")]
    page_source: Option<SourceKind>,
    /// How q, k, v and attention output cross the link [default: kernels, where they reach host memory]
    #[arg(long, env = "FULMEN_ROWS", value_enum)]
    rows: Option<RowPath>,
    /// Operands of matrix products; f16 rounds rows and weights, and needs cooperative matrices [default: f16 where the adapter has them, else f32]
    #[arg(long, env = "FULMEN_PRECISION", value_enum)]
    precision: Option<Precision>,
    /// Threads of the CPU attention [default: all cores]
    #[arg(short, long, env = "FULMEN_THREADS", value_name = "N")]
    threads: Option<usize>,
    /// Folder for the KV blocks of preempted sequences [default: the system's temporary folder]
    #[arg(long, env = "FULMEN_SPILL_DIR", value_name = "FOLDER")]
    spill_dir: Option<PathBuf>,
    /// What `fulmen calibrate` measured of this machine [default: what it left in the user's cache folder]
    #[arg(long, env = "FULMEN_PROFILE", value_name = "FILE")]
    profile: Option<PathBuf>,
    /// Policy to run, as --save-policy wrote it; flags that say otherwise win
    #[arg(long, env = "FULMEN_POLICY", value_name = "FILE")]
    policy: Option<PathBuf>,
    /// Write the policy that is run into this file
    #[arg(long, value_name = "FILE")]
    save_policy: Option<PathBuf>,
    /// Percent of both memories that a searched policy leaves free
    #[arg(long, env = "FULMEN_MARGIN", value_name = "PERCENT", default_value_t = 0.0, value_parser = percent)]
    margin: f64,
}

fn percent(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(percent) if (0.0..100.0).contains(&percent) => Ok(percent),
        _ => Err("a number from 0 to below 100 is needed".to_owned()),
    }
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Transfer {
    /// Queues beside the compute queue.
    Queues,
    /// wgpu's own means: no overlap.
    Plain,
}

/// The config of a folder or of a made-up model, with all layers or the first ones.
pub fn model_config(model: Option<&Path>, synthetic: Option<&str>, layers: Option<usize>) -> Result<ModelConfig> {
    match (model, synthetic) {
        (_, Some(name)) => super::bench::shape(name, layers),
        (Some(folder), None) => Ok(ModelConfig::open(folder)?),
        (None, None) => unreachable!("clap asks for one of them"),
    }
}

/// All that turns requests into tokens and back.
pub struct Text {
    pub tokenizer: Tokenizer,
    pub template: Result<ChatTemplate, ChatTemplateError>,
    pub defaults: GenerationDefaults,
}

impl ModelArguments {
    /// Reads the small files: tokenizer, template, defaults.
    pub fn open_text(&self) -> Result<Text> {
        if !self.model.is_dir() {
            bail!("--model {}: no such folder", self.model.display());
        }
        let tokenizer = Tokenizer::open(&self.model)?;
        // A model without a template can still complete prompts; chat requests then say what is missing.
        let template = ChatTemplate::open(&self.model, self.chat_template.as_deref(), tokenizer.special_tokens());
        let template = match template {
            Err(error) if self.chat_template.is_some() => return Err(error.into()),
            other => other,
        };
        let defaults = GenerationDefaults::open(&self.model)?;
        Ok(Text { tokenizer, template, defaults })
    }

    /// Name of the model in answers: its folder's.
    pub fn served_name(&self) -> String {
        let path = self.model.canonicalize().unwrap_or_else(|_| self.model.clone());
        path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
    }
}

impl EngineArguments {
    /// The flags as wishes of a policy.
    pub fn wishes(&self) -> Wishes {
        Wishes {
            schedule: self.schedule,
            max_sequences: self.max_num_seqs,
            micro_batches: self.micro_batches,
            expert_groups: self.expert_groups,
            pass_rows: self.max_num_batched_tokens,
            prompt_chunk: self.prompt_chunk,
            attention: self.attention,
            threads: self.threads,
            max_model_len: self.max_model_len,
            kv_bytes: self.kv_memory,
            kv_dtype: self.kv_dtype,
            resident_experts: self.resident_experts,
            extra_residents: self.extra_residents,
            ring_experts: self.ring_experts,
            page_bytes: self.page_size,
            source: self.page_source,
            rows: self.rows,
            precision: self.precision,
        }
    }

    /// `--host-memory`
    pub fn host_memory(&self) -> Option<u64> {
        self.machine.host_memory
    }

    /// What predictions are made from.
    pub fn profile_choice(&self) -> Result<ProfileChoice> {
        Ok(match &self.profile {
            Some(file) => ProfileChoice::Given(Arc::new(Profile::read(file)?)),
            None => ProfileChoice::Cached,
        })
    }

    /// --policy.
    pub fn policy(&self) -> Result<Option<Policy>> {
        let Some(file) = &self.policy else { return Ok(None) };
        let named = || format!("--policy {}", file.display());
        let text = std::fs::read_to_string(file).with_context(named)?;
        Ok(Some(serde_json::from_str(&text).with_context(named)?))
    }

    /// For a command that has policies of its own.
    pub fn refuse_policies(&self, command: &str) -> Result<()> {
        for (option, given) in [("--policy", &self.policy), ("--save-policy", &self.save_policy)] {
            if given.is_some() {
                bail!(Usage(format!(
                    "{option}: `{command}` has policies of its own; single flags of a policy hold for them"
                )));
            }
        }
        Ok(())
    }

    /// --save-policy.
    pub fn keep_policy(&self, policy: &Policy) -> Result<()> {
        let Some(file) = &self.save_policy else { return Ok(()) };
        std::fs::write(file, serde_json::to_string_pretty(policy)?)
            .with_context(|| format!("--save-policy {}", file.display()))
    }

    /// The machine's flags.
    pub fn machine(&self) -> &MachineArguments {
        &self.machine
    }

    /// Share of both memories that stays free.
    pub fn margin(&self) -> f64 {
        self.margin / 100.0
    }

    /// Adds all that these flags say to a builder.
    pub fn apply(&self, builder: EngineBuilder) -> Result<EngineBuilder> {
        let machine = &self.machine;
        let mut builder = builder.wishes(self.wishes()).gpu_memory(machine.gpu_memory).host_memory(machine.host_memory);
        builder = builder.open_options(machine.open_options()?).isa(machine.isa()?);
        builder = builder.profile(self.profile_choice()?).policy(self.policy()?);
        if let Some(folder) = &self.spill_dir {
            builder = builder.spill_folder(folder);
        }
        Ok(builder)
    }

    /// Validates and plans, for requests like those of `workload` where it is known; says where everything goes. Nothing is loaded
    /// yet.
    pub fn prepare(&self, model: &ModelArguments, text: &Text, workload: Option<Workload>) -> Result<Prepared> {
        let builder = Engine::builder(&model.model).tokenizer(text.tokenizer.clone());
        let builder = self.apply(builder)?.more_eos_tokens(&text.defaults.eos_token_ids);
        let builder = builder.plan_for(workload, self.margin());
        let prepared = builder.prepare().map_err(|error| match error {
            EngineError::Checkpoint(_) | EngineError::MixedExperts => {
                anyhow::Error::from(error).context(format!("model {}", model.model.display()))
            }
            of_the_machine => of_the_machine.into(),
        })?;
        say_prepared(&prepared);
        if let Some(workload) = workload.filter(|_| self.policy.is_none()) {
            say_search(&prepared, &workload);
        }
        self.keep_policy(&prepared.plan().policy)?;
        Ok(prepared)
    }
}

/// Faults of the machine that a test plants through the environment: see `gpu::TestFaults`.
const TEST_FAULTS: &str = "FULMEN_TEST_FAULTS";

/// The adapter, and the plan.
pub fn say_prepared(prepared: &Prepared) {
    let adapter = prepared.gpu().summary();
    say!(
        "adapter {} ({}, {}); copies on {}",
        adapter.name,
        adapter.kind,
        adapter.backend,
        prepared.gpu().transfer_words()
    );
    say!("{}", prepared.plan());
}

/// What the search found, or why there was none.
fn say_search(prepared: &Prepared, workload: &Workload) {
    let Some(found) = prepared.found() else {
        if prepared.profile().is_none() {
            say!(
                "policy  the defaults: nothing was measured here for this model yet; after `fulmen calibrate` they are searched for"
            );
        }
        return;
    };
    let best = &found.best;
    let share = |lane: Lane| format!("{} {:.0} %", lane.name(), 100.0 * best.lanes.of(lane) / best.steady.seconds);
    say!(
        "policy  best of {} that fit, for {:.0} prompt and {:.0} generated tokens: {:.1} tok/s predicted, a pass {}; busy: {}",
        found.fitting,
        workload.prompt_tokens,
        workload.generated_tokens,
        best.tokens_per_second,
        human_seconds(best.steady.seconds),
        Lane::ALL.map(share).join(", "),
    );
}

/// What a picture of a run says above it.
pub fn heading(engine: &Engine) -> String {
    let policy = engine.plan().policy;
    format!(
        "{}: {} sequences in {} micro-batches and {} expert groups, on {}",
        policy.schedule,
        policy.max_sequences,
        policy.micro_batches,
        policy.expert_groups,
        engine.gpu().summary().name,
    )
}

/// Loads with progress.
pub fn load(prepared: Prepared) -> Result<Engine> {
    let mut progress = LoadProgress::new();
    let planned = *prepared.plan();
    let engine = prepared.load(&mut |done, total| progress.update(done, total))?;
    progress.finish();
    if *engine.plan() != planned {
        say!("the device has less memory than it said; the plan is now\n{}", engine.plan());
    }
    if let Some(source) = engine.page_source() {
        let why = source.why().join("; ");
        say!(
            "pages   from {} memory{}",
            source.kind(),
            if why.is_empty() { String::new() } else { format!(" ({why})") }
        );
    }
    Ok(engine)
}
