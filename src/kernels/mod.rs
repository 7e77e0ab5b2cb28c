//! One file per shader, same stem: parameters, bindings, tunables, and `record()`.
//!
//! In: activations (f32), weights as the checkpoint stores them. Out: dispatches on a [`Recorder`](crate::gpu::Recorder).
//! Guarantees: **row independence** – a row's result does not depend on which rows share its dispatch, so every sum has one
//! order that no row count and no tunable changes. Portable versions only: no subgroups, no f16 arithmetic.

pub mod rms_norm;

use crate::gpu::Kernel;

/// Tokens of one block of the paged KV cache: the `BLOCK_TOKENS` of every shader that addresses blocks.
pub const BLOCK_TOKENS: usize = 32;

/// Every kernel there is. Tests walk this list.
pub static ALL: &[&Kernel] = &[&rms_norm::RMS_NORM];
