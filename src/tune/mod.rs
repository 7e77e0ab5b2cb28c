//! Which tile each product takes on this device: candidates tried once, the choice kept.

pub mod measure;

use crate::kernels::cooperative::Tile;

/// A matrix product that has tiles to choose from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    Matmul,
    GateUp,
    Down,
}
