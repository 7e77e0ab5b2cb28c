//! What is chosen before a run: a [`Policy`]. Plain data that `plan`, `schedule` and `execute` share.
//!
//! **A policy changes time, never tokens**: bit for bit, over group counts, row limits, chunk lengths, ring and pool sizes. The
//! one exception is named: [`AttentionPlace`] moves decode attention to another device, whose sums round differently.

/// Where decode rows attend. Prompt rows always attend on the GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AttentionPlace {
    #[default]
    Cpu,
    Gpu,
}

/// Everything that `execute` and the batcher need to know beside the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Policy {
    /// N: sequences that run at a time.
    pub max_sequences: usize,
    /// Groups into which they are split; each has its own rows, ids and buffers.
    pub groups: usize,
    /// Most rows of a group in a pass, decode and prompt rows together.
    pub rows_per_group: usize,
    /// Most rows of one prompt in a pass.
    pub prompt_chunk: usize,
    pub attention: AttentionPlace,
    /// Threads of the CPU lane.
    pub threads: usize,
    /// Tokens, prompt and completion, that a sequence can have.
    pub max_model_len: usize,
    /// Blocks of the host KV pool.
    pub kv_blocks: usize,
    /// KV blocks of one layer that the GPU workspace holds for GPU attention of one group.
    pub workspace_blocks: usize,
    /// Experts of each layer that never leave the GPU.
    pub resident_experts: usize,
    /// Slots for streamed experts.
    pub ring_experts: usize,
    /// Most bytes of one transfer of expert weights.
    pub page_bytes: u64,
    /// Rows whose logits exist on the GPU at a time.
    pub head_rows: usize,
}
