//! One file per shader, same stem: parameters, bindings, tunables, and `record()`.
//!
//! In: activations (f32), weights as the checkpoint stores them. Out: dispatches on a [`Recorder`](crate::gpu::Recorder).
//! Guarantees: **row independence** – a row's result does not depend on which rows share its dispatch, so every sum has one
//! order that no row count and no tunable changes. Portable versions, without subgroups and f16 arithmetic; matrix products also
//! on [`cooperative`] matrices, a precision class of its own that a run takes or leaves as a whole.
//!
//! Given up: more rows in a dispatch than workgroups fit in one dimension (65,535 on most drivers) where a kernel gives each
//! row a workgroup. The recorder panics there; a pass stays far below.

pub mod add_bias;
pub mod cooperative;
pub mod copy_rows;
pub mod decode_attention;
pub mod decode_combine;
pub mod embed;
pub mod expert_combine;
pub mod expert_down;
pub mod expert_gate_up;
pub mod expert_sort;
pub mod half_rows;
pub mod kv_quantise;
pub mod layer_norm;
pub mod lm_head_sample;
pub mod matmul;
pub mod paged_attention;
pub mod probes;
pub mod prompt_attention;
pub mod qk_norm;
pub mod rms_norm;
pub mod rotary;
pub mod router_topk;
pub mod slabs;

use crate::gpu::Kernel;

/// Tokens of one block of the paged KV cache: the `BLOCK_TOKENS` of every shader that addresses blocks.
pub const BLOCK_TOKENS: usize = 32;

/// Most experts per layer that the router and the sort have workgroup memory for.
pub const MAX_EXPERTS: u32 = 256;

/// Every kernel there is. Tests walk this list.
pub static ALL: &[&Kernel] = &[
    &add_bias::ADD_BIAS,
    &copy_rows::COPY_ROWS,
    &decode_attention::DECODE_ATTENTION,
    &decode_combine::DECODE_COMBINE,
    &embed::EMBED,
    &expert_combine::EXPERT_COMBINE,
    &expert_down::EXPERT_DOWN,
    &expert_gate_up::EXPERT_GATE_UP,
    &expert_sort::EXPERT_SORT,
    &half_rows::HALF_ROWS,
    &kv_quantise::KV_QUANTISE,
    &layer_norm::LAYER_NORM,
    &lm_head_sample::LM_HEAD_SAMPLE,
    &matmul::MATMUL,
    &prompt_attention::PROMPT_ATTENTION,
    &qk_norm::QK_NORM,
    &rms_norm::RMS_NORM,
    &rotary::ROTARY,
    &router_topk::ROUTER_TOPK,
];
