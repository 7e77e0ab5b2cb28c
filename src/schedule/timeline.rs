//! When each task of a schedule ran, or will run.

use std::time::Duration;

use super::task::{Lane, TaskId, Work};

/// One task's time, counted from an origin that all spans of a timeline share (a run's first moment, or a pass's).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    pub task: TaskId,
    pub work: Work,
    pub lane: Lane,
    pub start: Duration,
    pub end: Duration,
    /// Bytes that it moved.
    pub bytes: u64,
    /// Rows that it was about.
    pub rows: usize,
}

/// Start and end of the tasks of a pass, in order of their starts. Predicted and measured ones are the same type.
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

    /// Time in which a lane ran at least one task. Copies of a lane may overlap at their edges; that is counted once.
    pub fn busy(&self, lane: Lane) -> Duration {
        total(&merged(self.spans.iter().filter(|span| span.lane == lane && !matches!(span.work, Work::Barrier { .. }))))
    }

    /// Time in which some lane ran a task.
    pub fn busy_any(&self) -> Duration {
        total(&merged(self.spans.iter().filter(|span| !matches!(span.work, Work::Barrier { .. }))))
    }

    /// Bytes that tasks of a lane moved.
    pub fn bytes(&self, lane: Lane) -> u64 {
        self.spans.iter().filter(|span| span.lane == lane).map(|span| span.bytes).sum()
    }

    /// Bytes of expert pages.
    pub fn page_bytes(&self) -> u64 {
        self.spans.iter().filter(|span| matches!(span.work, Work::LoadPage { .. })).map(|span| span.bytes).sum()
    }

    /// Pauses of a lane longer than `shortest`, between its first and its last task.
    pub fn gaps(&self, lane: Lane, shortest: Duration) -> Vec<(Duration, Duration)> {
        let busy = merged(self.spans.iter().filter(|span| span.lane == lane));
        let between = busy.windows(2).map(|pair| (pair[0].1, pair[1].0));
        between.filter(|(from, to)| *to > *from + shortest).collect()
    }
}

/// What ran while a lane had nothing under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Idle {
    /// The GPU computed: pages wait for slots that it still reads.
    pub gpu_busy: Duration,
    /// Only the CPU did: the GPU waits for attention or for sampled ids, and pages for the GPU.
    pub cpu_busy: Duration,
    /// Neither: it is the launcher's.
    pub none_busy: Duration,
}

impl Timeline {
    /// The pauses of the lane to the GPU from its first task to its last, by what ran meanwhile.
    pub fn link_idle(&self) -> Idle {
        let pauses = self.gaps(Lane::HostToDevice, Duration::ZERO);
        let of = |lane: Lane| merged(self.spans.iter().filter(|span| span.lane == lane));
        let gpu = of(Lane::Gpu);
        let gpu_busy = total(&common(&pauses, &gpu));
        let with_cpu = common(&pauses, &of(Lane::Cpu));
        let cpu_busy = total(&with_cpu) - total(&common(&with_cpu, &gpu));
        Idle { gpu_busy, cpu_busy, none_busy: total(&pauses) - gpu_busy - cpu_busy }
    }
}

/// From a moment to another.
type Interval = (Duration, Duration);

/// Time in which some span ran, in intervals that do not overlap, ascending.
fn merged<'a>(spans: impl Iterator<Item = &'a Span>) -> Vec<Interval> {
    let mut spans: Vec<_> = spans.map(|span| (span.start, span.end)).collect();
    spans.sort_unstable();
    let mut merged: Vec<Interval> = Vec::new();
    for (start, end) in spans {
        match merged.last_mut() {
            Some(last) if start <= last.1 => last.1 = last.1.max(end),
            _ => merged.push((start, end)),
        }
    }
    merged
}

/// What two lists of such intervals have in common, in one sweep over both.
fn common(a: &[Interval], b: &[Interval]) -> Vec<Interval> {
    let (mut a, mut b) = (a.iter().peekable(), b.iter().peekable());
    let mut common = Vec::new();
    while let (Some(one), Some(other)) = (a.peek(), b.peek()) {
        let (start, end) = (one.0.max(other.0), one.1.min(other.1));
        if start < end {
            common.push((start, end));
        }
        // Whichever ends first meets nothing more.
        if one.1 < other.1 {
            a.next()
        } else {
            b.next()
        };
    }
    common
}

fn total(intervals: &[Interval]) -> Duration {
    intervals.iter().map(|(start, end)| end.saturating_sub(*start)).sum()
}
