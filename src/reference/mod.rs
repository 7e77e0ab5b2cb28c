//! One file per op, same stem as its kernel: plain loops, f64 sums. The oracle for `kernels/` and `cpu/`, and the clearest code here.

pub mod add_bias;
pub mod attention;
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
pub mod mxfp4;
pub mod paged_attention;
pub mod prompt_attention;
pub mod qk_norm;
pub mod rms_norm;
pub mod rotary;
pub mod router_topk;
