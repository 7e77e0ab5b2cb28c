//! What a timeline says of its lanes, against the same counted nanosecond by nanosecond.

use std::time::Duration;

use fulmen::schedule::{Idle, Lane, Span, TaskId, Timeline, Work};

use crate::common::Random;

fn timeline(spans: &[(Lane, u64, u64)]) -> Timeline {
    let span = |(number, (lane, start, end)): (usize, &(Lane, u64, u64))| Span {
        task: TaskId(number),
        work: Work::Sample { micro_batch: 0 },
        lane: *lane,
        start: Duration::from_nanos(*start),
        end: Duration::from_nanos(*end),
        bytes: 0,
        rows: 0,
    };
    Timeline { spans: spans.iter().enumerate().map(span).collect() }
}

/// Nanosecond by nanosecond: what ran in each of the link's pauses.
fn looked_at_one_by_one(timeline: &Timeline) -> Idle {
    let runs = |lane: Lane, at: u64| {
        let at = Duration::from_nanos(at);
        timeline.spans.iter().any(|span| span.lane == lane && span.start <= at && at < span.end)
    };
    let link = timeline.spans.iter().filter(|span| span.lane == Lane::HostToDevice);
    let first = link.clone().map(|span| span.start.as_nanos() as u64).min().unwrap_or(0);
    let last = link.map(|span| span.end.as_nanos() as u64).max().unwrap_or(0);
    let mut idle = Idle::default();
    for at in (first..last).filter(|at| !runs(Lane::HostToDevice, *at)) {
        let side = match (runs(Lane::Gpu, at), runs(Lane::Cpu, at)) {
            (true, _) => &mut idle.gpu_busy,
            (false, true) => &mut idle.cpu_busy,
            (false, false) => &mut idle.none_busy,
        };
        *side += Duration::from_nanos(1);
    }
    idle
}

#[test]
fn pauses_of_the_link_have_their_causes() {
    use Lane::{Cpu, Gpu, HostToDevice as Link};
    let pauses = [(Link, 0, 10), (Gpu, 5, 14), (Cpu, 12, 17), (Link, 20, 30), (Link, 30, 31), (Cpu, 31, 40)];
    let ns = Duration::from_nanos;
    let idle = Idle { gpu_busy: ns(4), cpu_busy: ns(3), none_busy: ns(3) };
    assert_eq!(timeline(&pauses).link_idle(), idle);
    assert_eq!(timeline(&[(Gpu, 0, 9), (Cpu, 0, 9)]).link_idle(), Idle::default());
    // Any spans, overlapping and empty ones among them.
    let mut random = Random::new(1);
    let mut below = |n: usize| random.below(n) as u64;
    for _ in 0..500 {
        let spans: Vec<_> = (0..below(40))
            .map(|_| {
                let start = below(300);
                ([Link, Gpu, Cpu, Lane::DeviceToHost][below(4) as usize], start, start + below(25))
            })
            .collect();
        let timeline = timeline(&spans);
        assert_eq!(timeline.link_idle(), looked_at_one_by_one(&timeline), "{spans:?}");
        let alone: u64 = (0..400).filter(|at| spans.iter().any(|(_, s, e)| s <= at && at < e)).count() as u64;
        assert_eq!(timeline.busy_any(), ns(alone));
    }
}

/// A run's worth of spans takes no time to speak of: 2 s where each pause was held against every span.
#[test]
fn pauses_of_a_long_run_are_found_in_one_sweep() {
    let spans: Vec<_> = (0..100_000u64)
        .flat_map(|n| [(Lane::HostToDevice, 10 * n, 10 * n + 4), (Lane::Gpu, 10 * n + 3, 10 * n + 8)])
        .collect();
    let idle = timeline(&spans).link_idle();
    assert_eq!(idle.gpu_busy, Duration::from_nanos(4 * 99_999));
    assert_eq!(idle.none_busy, Duration::from_nanos(2 * 99_999));
}
