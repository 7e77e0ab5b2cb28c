//! Numbers and names of a model: what its config.json says, in fulmen's own terms. Holds no bytes.
//!
//! ```text
//! config.json ─▶ ModelConfig { family, shape, … } ─▶ tensors(&config): names and shapes on disk, each with its Role
//!                                                 └▶ Sizes: parameters of each Kind, total and active
//! ```
//!
//! Names of other ecosystems (`num_local_experts`) stop in [`config`] and the family's own file; tensor names stop in
//! [`weight_names`] and that same file. Everything past this module speaks of the axes L, T, C, D, H, G, K, E, A, F and V.
//!
//! A family is one file with three items: the architecture string it answers to, how its config.json is read, and its
//! tensor names. To add one: write the file, add a [`Family`] variant, and follow the compiler through the four `match`es
//! of `impl Family` below.

pub mod config;
pub mod mixtral;
pub mod shape;
pub mod sizes;
pub mod weight_names;

pub use config::{ConfigError, ModelConfig};
pub use shape::{AttentionShape, Shape};
pub use sizes::{Kind, Sizes};
pub use weight_names::{ExpertMatrix, Role, TensorSpec, tensors};

/// The model families that this crate knows. One file per family says what only that family does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    Mixtral,
}

impl Family {
    /// Every family, in the order in which they are listed to users.
    pub const ALL: [Family; 1] = [Family::Mixtral];

    /// The name that messages and JSON use.
    pub fn name(self) -> &'static str {
        match self {
            Family::Mixtral => "mixtral",
        }
    }

    /// What `architectures` of config.json says.
    pub fn architecture(self) -> &'static str {
        match self {
            Family::Mixtral => mixtral::ARCHITECTURE,
        }
    }

    /// Reads the fields of config.json. `None` where `fields` has recorded a fault.
    fn read_config(self, fields: &mut config::Fields) -> Option<ModelConfig> {
        match self {
            Family::Mixtral => mixtral::read_config(fields),
        }
    }

    /// The tensors of a checkpoint, in the order of a forward pass.
    fn tensors(self, config: &ModelConfig) -> Vec<TensorSpec> {
        match self {
            Family::Mixtral => mixtral::tensors(config),
        }
    }
}
