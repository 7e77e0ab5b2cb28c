//! **fulmen** runs Mixture-of-Experts language models whose weights do not fit on the GPU, for throughput.
//!
//! (The figure and the tour of a decode row go here.)

pub mod checkpoint;
pub mod cli;
pub mod cpu;
pub mod engine;
pub mod execute;
pub mod gpu;
pub mod kernels;
pub mod memory;
pub mod model;
pub mod plan;
pub mod policy;
pub mod reference;
pub mod request;
pub mod schedule;
pub mod units;
