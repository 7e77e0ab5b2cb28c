//! Numbers and names of a model: what its config.json says, in fulmen's own terms. Holds no bytes.
//!
//! Names of other ecosystems (`num_local_experts`) stop in [`config`]; tensor names stop in [`weight_names`] and the
//! family's own file. Everything past this module speaks of the axes L, T, C, D, H, G, K, E, A, F and V.

pub mod config;
pub mod mixtral;
pub mod shape;
pub mod weight_names;

pub use config::{ConfigError, ModelConfig};
pub use shape::{AttentionShape, Shape};
pub use weight_names::{ExpertMatrix, Role, TensorSpec};

/// The model families that this crate knows. One file per family says what only that family does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    Mixtral,
}
