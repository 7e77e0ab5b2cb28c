//! Runs a [`Schedule`](crate::schedule::Schedule) and records its [`Timeline`](crate::schedule::Timeline).
//!
//! [`executor`] walks the tasks and times them; what a task *does* is behind [`Worker`], so the walk is tested without a GPU.
//! [`machine`] is the worker's hardware half: the GPU buffers of a model and the kernels recorded for each stage.

pub mod executor;
pub mod machine;

pub use executor::{TaskError, Worker, run};
pub use machine::Machine;
