//! What is chosen before a run: a [`Policy`]. Plain data that `plan`, `schedule` and `execute` share.
//!
//! **A policy changes time, never tokens**: bit for bit, over schedules, micro-batches and groups, row limits, chunk lengths, ring
//! and pool sizes, page sources. Three exceptions are named: [`AttentionPlace`] moves decode attention to another device, whose sums round
//! differently, [`Precision`] rounds the operands of products, and [`KvDtype`] rounds keys and values themselves. Whatever they are,
//! all else changes no token.

/// Where decode rows attend. Prompt rows always attend on the GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum AttentionPlace {
    #[default]
    Cpu,
    Gpu,
}

impl AttentionPlace {
    pub fn name(self) -> &'static str {
        match self {
            AttentionPlace::Cpu => "CPU",
            AttentionPlace::Gpu => "GPU",
        }
    }
}

/// Where the bytes of expert pages wait: see [`page_source`](crate::memory::page_source).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum SourceKind {
    /// Memory filled once and lent to the driver.
    Imported,
    /// Memory of the driver, filled once.
    Pinned,
    /// The files' own mapping, lent to the driver.
    Mapped,
    /// Read from the files page by page.
    Staged,
    /// Pageable memory, each page copied into pinned memory first: FlexGen's way, for comparison.
    Relay,
}

impl SourceKind {
    pub const ALL: [SourceKind; 5] =
        [SourceKind::Imported, SourceKind::Pinned, SourceKind::Mapped, SourceKind::Staged, SourceKind::Relay];

    pub fn name(self) -> &'static str {
        match self {
            SourceKind::Imported => "imported",
            SourceKind::Pinned => "pinned",
            SourceKind::Mapped => "mapped",
            SourceKind::Staged => "staged",
            SourceKind::Relay => "relay",
        }
    }
}

impl std::fmt::Display for SourceKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// In which order a pass's tasks are launched: see [`schedule::build`](crate::schedule::build()).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum ScheduleKind {
    /// One task after the other.
    Serial,
    /// S4 of the paper: GPU attention, the host waits after each micro-batch. Needs attention on the GPU.
    #[value(name = "flexgen")]
    #[serde(rename = "flexgen")]
    FlexGen,
    /// S4 without that wait. Needs attention on the GPU.
    #[value(name = "flexgen-async")]
    #[serde(rename = "flexgen-async")]
    FlexGenAsync,
    /// S3: CPU attention, nothing beside it.
    #[value(name = "flexgen-c")]
    #[serde(rename = "flexgen-c")]
    FlexGenC,
    /// S2: CPU attention ahead, pages a layer at a time.
    #[value(name = "fastdecode")]
    #[serde(rename = "fastdecode")]
    FastDecode,
    /// S1: CPU attention ahead, pages between micro-batches.
    #[value(name = "cgopipe")]
    #[serde(rename = "cgopipe")]
    CgoPipe,
    /// Experts over groups of micro-batches, pages without a pause.
    Grouped,
}

impl ScheduleKind {
    pub const ALL: [ScheduleKind; 7] = [
        ScheduleKind::Serial,
        ScheduleKind::FlexGen,
        ScheduleKind::FlexGenAsync,
        ScheduleKind::FlexGenC,
        ScheduleKind::FastDecode,
        ScheduleKind::CgoPipe,
        ScheduleKind::Grouped,
    ];

    pub fn name(self) -> &'static str {
        match self {
            ScheduleKind::Serial => "serial",
            ScheduleKind::FlexGen => "flexgen",
            ScheduleKind::FlexGenAsync => "flexgen-async",
            ScheduleKind::FlexGenC => "flexgen-c",
            ScheduleKind::FastDecode => "fastdecode",
            ScheduleKind::CgoPipe => "cgopipe",
            ScheduleKind::Grouped => "grouped",
        }
    }

    /// The schedule's own choice of where decode rows attend; None where it works with either.
    pub fn attention(self) -> Option<AttentionPlace> {
        match self {
            ScheduleKind::Serial | ScheduleKind::Grouped => None,
            ScheduleKind::FlexGen | ScheduleKind::FlexGenAsync => Some(AttentionPlace::Gpu),
            ScheduleKind::FlexGenC | ScheduleKind::FastDecode | ScheduleKind::CgoPipe => Some(AttentionPlace::Cpu),
        }
    }
}

impl std::fmt::Display for ScheduleKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// How q, k, v and attention output cross the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum RowPath {
    /// Copies on the lanes of the link, between pages.
    Copies,
    /// Kernels that read and write host memory: no copy task, no waiting behind pages.
    Kernels,
}

/// Operands of matrix products: what the GPU rounds weights and rows to before it multiplies. Sums are f32 in either case, and each class
/// has one order of summation, so that within a class no policy changes a bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// As they are, on kernels that run everywhere.
    F32,
    /// f16, rows with a power of two each, on cooperative matrices. Where the adapter has them.
    F16,
}

impl Precision {
    pub fn name(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::F16 => "f16",
        }
    }
}

impl std::fmt::Display for Precision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// How the host's KV cache keeps an element of K or V.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum KvDtype {
    #[default]
    F16,
    /// An integer of 8 bits, and one scale for each row of each head: half the bytes, so twice the tokens in the pool, and up to 1.9 times in a
    /// second of CPU attention. A value is off by at most 9/16 of 1/127 of the largest in its row: other tokens than with f16.
    Int8,
}

impl KvDtype {
    pub const ALL: [KvDtype; 2] = [KvDtype::F16, KvDtype::Int8];

    pub fn name(self) -> &'static str {
        match self {
            KvDtype::F16 => "f16",
            KvDtype::Int8 => "int8",
        }
    }
}

impl std::fmt::Display for KvDtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Everything that `execute` and the batcher need to know beside the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct Policy {
    pub schedule: ScheduleKind,
    /// N: sequences that run at a time.
    pub max_sequences: usize,
    /// Micro-batches into which they are split: each has its own rows, ids and attention.
    pub micro_batches: usize,
    /// Expert groups into which the micro-batches are put, the same number in each: one expert computation takes the rows of one
    /// group.
    pub expert_groups: usize,
    /// Most rows of a micro-batch in a pass, decode and prompt rows together.
    pub rows_per_micro_batch: usize,
    /// Most rows of one prompt in a pass.
    pub prompt_chunk: usize,
    pub attention: AttentionPlace,
    /// Threads of the CPU lane.
    pub threads: usize,
    /// Tokens, prompt and completion, that a sequence can have.
    pub max_model_len: usize,
    /// How the host's KV cache keeps an element.
    pub kv_dtype: KvDtype,
    /// Blocks of the host KV pool.
    pub kv_blocks: usize,
    /// KV workspaces on the GPU; more than one where one micro-batch's context comes while another attends.
    pub workspaces: usize,
    /// KV blocks of one layer that each holds for the GPU attention of one micro-batch.
    pub workspace_blocks: usize,
    /// Experts of each layer that never leave the GPU.
    pub resident_experts: usize,
    /// Layers, spread evenly, of which one more expert never leaves the GPU.
    #[serde(default)]
    pub extra_residents: usize,
    /// Slots for streamed experts.
    pub ring_experts: usize,
    /// Most bytes of one transfer of expert weights.
    pub page_bytes: u64,
    /// Where pages come from; None: the best that the machine grants.
    pub source: Option<SourceKind>,
    /// How q, k, v and attention output cross the link.
    pub rows: RowPath,
    /// Operands of matrix products.
    pub precision: Precision,
    /// Rows whose logits exist on the GPU at a time.
    pub head_rows: usize,
}

/// Some of the layers, spread evenly over all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct SpreadLayers {
    pub n: usize,
    pub of: usize,
}

impl SpreadLayers {
    /// How many of them lie below a layer.
    pub fn below(&self, layer: usize) -> usize {
        if self.n == 0 { 0 } else { layer * self.n / self.of }
    }

    /// A layer is one of them. Layers from `of` on are those of the next pass.
    pub fn contains(&self, layer: usize) -> bool {
        self.n > 0 && self.below(layer % self.of) < self.below(layer % self.of + 1)
    }
}
