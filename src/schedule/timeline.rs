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
        union(self.spans.iter().filter(|span| span.lane == lane && !matches!(span.work, Work::Barrier { .. })))
    }

    /// Time in which some lane ran a task.
    pub fn busy_any(&self) -> Duration {
        union(self.spans.iter().filter(|span| !matches!(span.work, Work::Barrier { .. })))
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
        let mut spans: Vec<_> =
            self.spans.iter().filter(|span| span.lane == lane).map(|span| (span.start, span.end)).collect();
        spans.sort_unstable();
        let mut gaps = Vec::new();
        let mut end = spans.first().map_or(Duration::ZERO, |span| span.1);
        for (start, until) in spans {
            if start > end + shortest {
                gaps.push((end, start));
            }
            end = end.max(until);
        }
        gaps
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
        let mut idle = Idle::default();
        let merged = |lane: Lane| {
            let mut spans: Vec<_> =
                self.spans.iter().filter(|span| span.lane == lane).map(|span| (span.start, span.end)).collect();
            spans.sort_unstable();
            spans
        };
        let (gpu, cpu) = (merged(Lane::Gpu), merged(Lane::Cpu));
        for (from, to) in self.gaps(Lane::HostToDevice, Duration::ZERO) {
            // Pieces of the pause between starts and ends of others.
            let inside = |at: &Duration| (from..to).contains(at);
            let mut cuts: Vec<Duration> =
                gpu.iter().chain(&cpu).flat_map(|span| [span.0, span.1]).filter(inside).collect();
            cuts.extend([from, to]);
            cuts.sort_unstable();
            for piece in cuts.windows(2) {
                let covered = |spans: &[(Duration, Duration)]| {
                    spans.iter().any(|(start, end)| *start <= piece[0] && piece[1] <= *end)
                };
                let length = piece[1] - piece[0];
                if covered(&gpu) {
                    idle.gpu_busy += length;
                } else if covered(&cpu) {
                    idle.cpu_busy += length;
                } else {
                    idle.none_busy += length;
                }
            }
        }
        idle
    }
}

fn union<'a>(spans: impl Iterator<Item = &'a Span>) -> Duration {
    let mut spans: Vec<_> = spans.map(|span| (span.start, span.end)).collect();
    spans.sort_unstable();
    let (mut total, mut end) = (Duration::ZERO, Duration::ZERO);
    for (start, until) in spans {
        total += until.saturating_sub(start.max(end));
        end = end.max(until);
    }
    total
}
