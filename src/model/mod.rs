//! Numbers and names of a model: what its config.json says, in fulmen's own terms. Holds no bytes.
//!
//! ```text
//! config.json ─▶ ModelConfig { family, shape, forward, … } ─▶ tensors(&config): names and shapes on disk, each with its Role
//!                                                          └▶ Sizes: parameters of each Kind, total and active
//! ```
//!
//! Names of other ecosystems (`num_local_experts`) stop in [`config`], [`decoder`] and the family's own file; tensor names stop in
//! the same files. Everything past this module speaks of the axes L, T, C, D, H, G, K, E, A, F and V, and of the switches in
//! [`Forward`]: nothing outside asks which family it is.
//!
//! A family is one file with three items: the architecture string it answers to, how its config.json is read, and its
//! tensor names. To add one: write the file, add a [`Family`] variant, and follow the compiler through the four `match`es
//! of `impl Family` below.

pub mod config;
pub mod dbrx;
pub mod decoder;
pub mod expert_layout;
pub mod forward;
pub mod gpt_oss;
pub mod mixtral;
pub mod olmoe;
pub mod presets;
pub mod qwen3_moe;
pub mod shape;
pub mod sizes;
pub mod weight_names;

pub use config::{ConfigError, ModelConfig};
pub use expert_layout::ExpertLayout;
pub use forward::{Activation, Forward, Norm, QkNorm, Yarn};
pub use shape::{AttentionShape, Shape};
pub use sizes::{Kind, Sizes};
pub use weight_names::{ExpertMatrix, ExpertPart, Role, TensorSpec, tensors};

/// The model families that this crate knows. One file per family says what only that family does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    Mixtral,
    Dbrx,
    Qwen3Moe,
    Olmoe,
    GptOss,
}

impl Family {
    /// Every family, in the order in which they are listed to users.
    pub const ALL: [Family; 5] = [Family::Mixtral, Family::Dbrx, Family::Qwen3Moe, Family::Olmoe, Family::GptOss];

    /// The name that messages and JSON use, and `model_type` of config.json.
    pub fn name(self) -> &'static str {
        match self {
            Family::Mixtral => "mixtral",
            Family::Dbrx => "dbrx",
            Family::Qwen3Moe => "qwen3_moe",
            Family::Olmoe => "olmoe",
            Family::GptOss => "gpt_oss",
        }
    }

    /// What `architectures` of config.json says.
    pub fn architecture(self) -> &'static str {
        match self {
            Family::Mixtral => mixtral::ARCHITECTURE,
            Family::Dbrx => dbrx::ARCHITECTURE,
            Family::Qwen3Moe => qwen3_moe::ARCHITECTURE,
            Family::Olmoe => olmoe::ARCHITECTURE,
            Family::GptOss => gpt_oss::ARCHITECTURE,
        }
    }

    /// Reads the fields of config.json. `None` where `fields` has recorded a fault.
    fn read_config(self, fields: &mut config::Fields) -> Option<ModelConfig> {
        match self {
            Family::Mixtral => mixtral::read_config(fields),
            Family::Dbrx => dbrx::read_config(fields),
            Family::Qwen3Moe => qwen3_moe::read_config(fields),
            Family::Olmoe => olmoe::read_config(fields),
            Family::GptOss => gpt_oss::read_config(fields),
        }
    }

    /// The tensors of a checkpoint, in the order of a forward pass.
    fn tensors(self, config: &ModelConfig) -> Vec<TensorSpec> {
        match self {
            Family::Mixtral => mixtral::tensors(config),
            Family::Dbrx => dbrx::tensors(config),
            Family::Qwen3Moe => qwen3_moe::tensors(config),
            Family::Olmoe => olmoe::tensors(config),
            Family::GptOss => gpt_oss::tensors(config),
        }
    }
}
