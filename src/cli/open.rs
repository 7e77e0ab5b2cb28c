//! Flags that open a model, shared by the commands that run one, and what is said while it opens.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::progress::LoadProgress;
use crate::cpu::isa::Isa;
use crate::engine::{Engine, EngineBuilder, EngineError, Prepared};
use crate::gpu::{DeviceChoice, TransferChoice};
use crate::plan::Wishes;
use crate::policy::{AttentionPlace, Precision, RowPath, ScheduleKind, SourceKind};
use crate::request::batch_file::GenerationDefaults;
use crate::request::chat_template::{ChatTemplate, ChatTemplateError};
use crate::request::tokenizer::Tokenizer;
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

/// How to run it. None of these changes a token, but --attention and --precision, which may round differently.
#[derive(Debug, Args)]
#[command(next_help_heading = "Machine and policy (change time, never tokens)")]
pub struct EngineArguments {
    /// Adapter by number or part of its name, see `fulmen devices` [default: the best]
    #[arg(long, env = "FULMEN_DEVICE", value_name = "N|NAME")]
    device: Option<String>,
    /// Most GPU memory to take, e.g. 14GiB [default: 90 % of the adapter's]
    #[arg(long, env = "FULMEN_GPU_MEMORY", value_parser = bytes, value_name = "SIZE")]
    gpu_memory: Option<u64>,
    /// Most host memory to take beside the mapped weights [default: 80 % of what is available]
    #[arg(long, env = "FULMEN_HOST_MEMORY", value_parser = bytes, value_name = "SIZE")]
    host_memory: Option<u64>,
    /// Host memory for keys and values [default: what the sequences need, at most half of the host memory]
    #[arg(long, env = "FULMEN_KV_MEMORY", value_parser = bytes, value_name = "SIZE")]
    kv_memory: Option<u64>,
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
    /// How bytes get to and from the GPU [default: queues, where the backend is Vulkan]
    #[arg(long, env = "FULMEN_TRANSFER", value_enum)]
    transfer: Option<Transfer>,
    /// Threads of the CPU attention [default: all cores]
    #[arg(short, long, env = "FULMEN_THREADS", value_name = "N")]
    threads: Option<usize>,
    /// Instruction set of the CPU attention [default: the best there is]
    #[arg(long, env = "FULMEN_ISA", value_name = "NAME")]
    isa: Option<String>,
    /// Folder for the KV blocks of preempted sequences [default: the system's temporary folder]
    #[arg(long, env = "FULMEN_SPILL_DIR", value_name = "FOLDER")]
    spill_dir: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Transfer {
    /// Queues beside the compute queue.
    Queues,
    /// wgpu's own means: no overlap.
    Plain,
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
            anyhow::bail!("--model {}: no such folder", self.model.display());
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
            resident_experts: self.resident_experts,
            ring_experts: self.ring_experts,
            page_bytes: self.page_size,
            source: self.page_source,
            rows: self.rows,
            precision: self.precision,
        }
    }

    /// Adds all that these flags say to a builder.
    pub fn apply(&self, builder: EngineBuilder) -> Result<EngineBuilder> {
        let mut builder = builder.wishes(self.wishes()).gpu_memory(self.gpu_memory).host_memory(self.host_memory);
        if let Some(device) = &self.device {
            builder = builder.device(DeviceChoice::from(device.as_str()));
        }
        if let Some(Transfer::Plain) = self.transfer {
            builder = builder.transfer(TransferChoice::Plain);
        }
        if let Ok(faults) = std::env::var(TEST_FAULTS) {
            let faults = faults.parse().map_err(|error| super::Usage(format!("{TEST_FAULTS}: {error}")))?;
            builder = builder.test_faults(faults);
        }
        if let Some(folder) = &self.spill_dir {
            builder = builder.spill_folder(folder);
        }
        if let Some(name) = &self.isa {
            builder = builder.isa(Isa::from_name(name).map_err(|error| super::Usage(format!("--isa: {error}")))?);
        }
        Ok(builder)
    }

    /// Validates and plans; says where everything goes. Nothing is loaded yet.
    pub fn prepare(&self, model: &ModelArguments, text: &Text) -> Result<Prepared> {
        let builder = Engine::builder(&model.model).tokenizer(text.tokenizer.clone());
        let builder = self.apply(builder)?.more_eos_tokens(&text.defaults.eos_token_ids);
        let prepared = builder.prepare().map_err(|error| match error {
            EngineError::Checkpoint(_) | EngineError::MixedExperts => {
                anyhow::Error::from(error).context(format!("model {}", model.model.display()))
            }
            of_the_machine => of_the_machine.into(),
        })?;
        say_prepared(&prepared);
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
