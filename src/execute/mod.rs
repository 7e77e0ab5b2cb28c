//! Runs a [`Schedule`](crate::schedule::Schedule) and records its [`Timeline`](crate::schedule::Timeline).
//!
//! [`executor`] walks the tasks, a thread for each lane, and times them; what a task *does* is behind [`Device`] and [`Host`],
//! so the walk is tested without a GPU. [`machine`] is the model on the device: its buffers, and the kernels of each stage.

pub mod executor;
pub mod machine;

pub use executor::{Carried, Device, Host, Started, TaskError, run};
pub use machine::Machine;
