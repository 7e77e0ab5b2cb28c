//! What is chosen before a run: a [`Policy`]. Plain data that `schedule` and `execute` share.
//!
//! **A policy changes time, never tokens.**

/// Where decode rows attend. Prompt rows always attend on the GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AttentionPlace {
    Cpu,
    Gpu,
}
