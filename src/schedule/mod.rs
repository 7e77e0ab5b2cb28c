//! The work of one pass as data: tasks on lanes with dependencies. Pure; nothing here touches hardware.
//!
//! In: how many layers, which groups have rows of which kind, how a layer's experts are cut into chunks and pages
//! ([`PassShape`]). Out: a [`Schedule`], which prints as a table, is checked by [`check()`], and is run and timed by
//! [`execute`](crate::execute). A [`Timeline`] holds when each task ran, or, given what each takes, will run ([`simulate()`]).
//!
//! One layer of the serial schedule, two groups, experts in two chunks of one page each:
//!
//! ```text
//! kv_to_device b0 · pre_attention b0 · rows_to_host b0 · attention b0 · rows_to_device b0 · post_attention b0
//! … the same for b1 …
//! page 0.0 · experts b0 · experts b1 · page 0.1 · experts b0 · experts b1
//! ```
//!
//! Guarantees: a task comes after everything it depends on; an `experts` task runs only when the pages of its chunk are
//! there; a page is loaded only when nobody reads its slots any more. Given up for now: the one builder, [`serial`], does one
//! thing at a time; builders that overlap lanes use the same tasks.

mod build;
mod check;
mod render;
mod simulate;
mod task;
mod timeline;

pub use build::{GroupShape, PassShape, serial};
pub use check::{ScheduleFault, check};
pub use simulate::{Cost, Resource, simulate};
pub use task::{Lane, Schedule, Task, TaskId, Work};
pub use timeline::{Span, Timeline};
