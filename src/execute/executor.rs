//! The launcher: walks a schedule in its static order.
//!
//! Guarantees: a task starts only when everything it depends on has ended; an error stops the pass and names the task.
//! Given up for now: every task is waited for before the next one starts, so lanes do not overlap.

use std::time::Instant;

use crate::schedule::{Schedule, Span, Task, Timeline};

/// Carries out tasks. An implementation returns when the task's results can be read.
pub trait Worker {
    type Error;

    fn perform(&mut self, task: &Task) -> Result<(), Self::Error>;
}

/// The task that failed, and why.
#[derive(Debug, thiserror::Error)]
#[error("{task}: {source}")]
pub struct TaskError<E: std::error::Error + 'static> {
    pub task: String,
    pub source: E,
}

/// Runs every task of `schedule`; returns when each of them ran.
pub fn run<W: Worker>(schedule: &Schedule, worker: &mut W) -> Result<Timeline, TaskError<W::Error>>
where
    W::Error: std::error::Error + 'static,
{
    let origin = Instant::now();
    let mut timeline = Timeline::default();
    for (id, task) in schedule.ids() {
        debug_assert!(task.after.iter().all(|before| *before < id), "a checked schedule waits only for earlier tasks");
        let start = origin.elapsed();
        worker.perform(task).map_err(|source| {
            let layer = task.work.layer().map_or(String::new(), |layer| format!(" of layer {layer}"));
            TaskError { task: format!("{}{layer}", task.work), source }
        })?;
        timeline.spans.push(Span { task: id, work: task.work, start, end: origin.elapsed() });
    }
    Ok(timeline)
}
