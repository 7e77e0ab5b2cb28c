//! SIMD code for the CPU lane: attention of decode rows over the host KV cache.

pub mod attention;
pub mod isa;
