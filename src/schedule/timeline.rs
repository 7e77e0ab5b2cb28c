//! When each task of a schedule ran.

use std::time::Duration;

use super::task::{Lane, TaskId, Work};

/// One task's time, counted from the start of its pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    pub task: TaskId,
    pub work: Work,
    pub start: Duration,
    pub end: Duration,
}

/// Start and end of every task of a pass.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Timeline {
    pub spans: Vec<Span>,
}

impl Timeline {
    /// From the first start to the last end.
    pub fn duration(&self) -> Duration {
        let end = self.spans.iter().map(|span| span.end).max().unwrap_or_default();
        end.saturating_sub(self.spans.iter().map(|span| span.start).min().unwrap_or_default())
    }

    /// Time in which a lane ran a task.
    pub fn busy(&self, lane: Lane) -> Duration {
        self.spans.iter().filter(|span| span.work.lane() == lane).map(|span| span.end - span.start).sum()
    }
}
