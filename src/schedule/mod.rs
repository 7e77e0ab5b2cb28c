//! The work of one pass as data: tasks on lanes with dependencies. Pure; nothing here touches hardware.
//!
//! In: how many layers, which micro-batches have rows of which kind, how they form expert groups, how a layer's experts are cut
//! into chunks and pages ([`PassShape`]). Out: a [`Schedule`], made by a builder ([`build()`]), which prints as a table, is checked
//! by [`check()`], and is run and timed by [`execute`](crate::execute). A [`Timeline`] holds when each task ran, or will
//! run ([`simulate()`], given what each task takes); [`trace`] draws it.
//!
//! A layer of `grouped` with two groups of one micro-batch each, while the pages of layer 4 arrive:
//!
//! ```text
//! gpu                   cpu             h2d
//! post_attention b0     attention b1    page 4.0.0
//! experts g0 c0         ·               page 4.0.1
//! pre_attention b0      ·               page 4.0.2      (layer 4)
//! post_attention b1     attention b0    page 4.0.3
//! experts g1 c0         ·               page 4.0.4
//! ```
//!
//! Guarantees of a checked schedule: a task starts only after everything whose results it reads has ended; no slot, no row and no
//! workspace is overwritten while somebody reads it; an `experts` task runs only when the pages of its chunk are there; the
//! launcher cannot wait for ever. Given up: a pass ends before the next one begins (but for pages, which are loaded ahead), so a
//! group waits for the slowest one once a pass.

mod build;
mod check;
mod render;
mod shape;
mod simulate;
mod task;
mod timeline;
pub mod trace;

pub use build::build;
pub use check::{Before, ScheduleFault, check};
pub use shape::{ChunkShape, MicroBatchShape, PageId, PassShape, Why};
pub use simulate::{Cost, OnItsWay, Resource, SimulatedPass, simulate, simulate_pass};
pub use task::{Lane, Schedule, Task, TaskId, Work};
pub use timeline::{Idle, Span, Timeline};
