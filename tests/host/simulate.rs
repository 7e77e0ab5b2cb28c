//! Predicted timelines, against ones that were worked out by hand, and what must hold for any.

use std::time::{Duration, Instant};

use fulmen::schedule::{Cost, Lane, Resource, Schedule, Task, TaskId, Timeline, Work, simulate};
use proptest::prelude::*;

/// A task of each lane; the number tells them apart.
fn gpu(number: usize) -> Work {
    Work::Experts { layer: number, group: 0, chunk: 0 }
}

fn h2d(number: usize) -> Work {
    Work::LoadPage { layer: number, chunk: 0, page: 0 }
}

fn d2h(number: usize) -> Work {
    Work::RowsToHost { layer: number, micro_batch: 0 }
}

fn cpu(number: usize) -> Work {
    Work::CpuAttention { layer: number, micro_batch: 0 }
}

fn task(work: Work, after: &[usize]) -> Task {
    let lane = match work {
        Work::Experts { .. } => Lane::Gpu,
        Work::LoadPage { .. } => Lane::HostToDevice,
        Work::RowsToHost { .. } => Lane::DeviceToHost,
        Work::CpuAttention { .. } => Lane::Cpu,
        other => unreachable!("{other:?} is not made here"),
    };
    Task { work, lane, after: after.iter().map(|id| TaskId(*id)).collect() }
}

/// Start and end of each task in launch order, in seconds.
fn times(timeline: &Timeline) -> Vec<(f64, f64)> {
    let mut spans = timeline.spans.clone();
    spans.sort_by_key(|span| span.task);
    spans.iter().map(|span| (span.start.as_secs_f64(), span.end.as_secs_f64())).collect()
}

/// Tasks with what they wait for and what they take.
#[track_caller]
fn run(tasks: &[(Work, &[usize], Cost)], expected: &[(f64, f64)]) {
    let schedule = Schedule { tasks: tasks.iter().map(|(work, after, _)| task(*work, after)).collect() };
    let timeline = simulate(&schedule, |work| tasks.iter().find(|(other, ..)| *other == work).expect("a task").2);
    let times = times(&timeline);
    let off = |one: f64, other: f64| (one - other).abs() > 1e-8;
    let wrong = times.iter().zip(expected).any(|(one, other)| off(one.0, other.0) || off(one.1, other.1));
    assert!(times.len() == expected.len() && !wrong, "{times:?} should be {expected:?}");
    assert!(timeline.spans.is_sorted_by_key(|span| span.start));
}

#[test]
fn lanes_run_in_order_beside_each_other() {
    let alone = Cost::alone;
    // Experts wait for their pages, and the second ones for attention too.
    run(
        &[
            (h2d(0), &[], alone(3.0)),
            (gpu(0), &[0], alone(2.0)),
            (h2d(1), &[], alone(4.0)),
            (cpu(0), &[], alone(1.0)),
            (gpu(1), &[2, 3], alone(1.0)),
        ],
        &[(0.0, 3.0), (3.0, 5.0), (3.0, 7.0), (0.0, 1.0), (7.0, 8.0)],
    );
    // What could start waits for what was launched before it on its lane.
    run(
        &[(h2d(0), &[], alone(5.0)), (gpu(0), &[0], alone(1.0)), (gpu(1), &[], alone(2.0)), (d2h(0), &[2], alone(0.5))],
        &[(0.0, 5.0), (5.0, 6.0), (6.0, 8.0), (8.0, 8.5)],
    );
    // Tasks that take nothing end as they start, whole chains of them.
    run(
        &[
            (cpu(0), &[], alone(0.0)),
            (gpu(0), &[0], alone(0.0)),
            (cpu(1), &[1], alone(2.0)),
            (gpu(1), &[2], alone(0.0)),
        ],
        &[(0.0, 0.0), (0.0, 0.0), (0.0, 2.0), (2.0, 2.0)],
    );
    run(&[], &[]);
}

/// Two micro-batches, two layers, attention one micro-batch ahead: a pipeline drawn on paper.
///
/// ```text
/// gpu  a0 a1 .. b0 .. b1     pre_attention 1 each, experts 3 each
/// ```
#[test]
fn a_pipeline_on_paper() {
    let (pre, experts, attention) = (Cost::alone(1.0), Cost::alone(3.0), Cost::alone(2.0));
    run(
        &[
            (gpu(0), &[], pre),        // 0-1   pre b0
            (cpu(0), &[0], attention), // 1-3   attention b0
            (gpu(1), &[], pre),        // 1-2   pre b1
            (cpu(1), &[2], attention), // 3-5   attention b1, behind b0's
            (gpu(2), &[1], experts),   // 3-6   experts b0
            (gpu(3), &[4], pre),       // 6-7   pre b0, next layer
            (cpu(2), &[5], attention), // 7-9
            (gpu(4), &[3], experts),   // 7-10  experts b1
            (gpu(5), &[6], experts),   // 10-13 experts b0, next layer
        ],
        &[
            (0.0, 1.0),
            (1.0, 3.0),
            (1.0, 2.0),
            (3.0, 5.0),
            (3.0, 6.0),
            (6.0, 7.0),
            (7.0, 9.0),
            (7.0, 10.0),
            (10.0, 13.0),
        ],
    );
}

#[test]
fn what_is_shared_is_divided() {
    use Resource::{HostMemory, LinkToDevice, LinkToHost};
    // The picture of the module: a kernel reads its rows over the link while a page comes.
    run(
        &[
            (h2d(0), &[], Cost::alone(8.0).using(LinkToDevice, 1.0)),
            (cpu(0), &[], Cost::alone(4.0)),
            (gpu(0), &[1], Cost::alone(2.0).using(LinkToDevice, 1.0)),
        ],
        &[(0.0, 10.0), (0.0, 4.0), (4.0, 8.0)],
    );
    // 0.75 + 0.5 = 1.25: both at 0.8 of their speed, until one has ended.
    run(
        &[
            (h2d(0), &[], Cost::alone(4.0).using(HostMemory, 0.75)),
            (cpu(0), &[], Cost::alone(8.0).using(HostMemory, 0.5)),
        ],
        &[(0.0, 5.0), (0.0, 9.0)],
    );
    // 0.5 + 0.5: nobody is disturbed. Two directions of a link are two resources.
    run(
        &[
            (h2d(0), &[], Cost::alone(3.0).using(HostMemory, 0.5).using(LinkToDevice, 1.0)),
            (d2h(0), &[], Cost::alone(3.0).using(LinkToHost, 1.0)),
            (cpu(0), &[], Cost::alone(3.0).using(HostMemory, 0.5)),
        ],
        &[(0.0, 3.0), (0.0, 3.0), (0.0, 3.0)],
    );
    // A task that uses two resources runs at the slower one's speed: here 1/2 by the link, not 1/1.5 by memory. The page does 1
    // of its 3 in 2 s, then has the link to itself.
    run(
        &[
            (h2d(0), &[], Cost::alone(3.0).using(LinkToDevice, 1.0).using(HostMemory, 0.75)),
            (gpu(0), &[], Cost::alone(1.0).using(LinkToDevice, 1.0)),
            (cpu(0), &[], Cost::alone(1.0).using(HostMemory, 0.75)),
        ],
        &[(0.0, 4.0), (0.0, 2.0), (0.0, 1.5)],
    );
}

/// Seconds and shares of every task of a random schedule.
type RandomTask = (usize, u32, Vec<usize>, [u32; 3]);

fn random_tasks() -> impl Strategy<Value = Vec<RandomTask>> {
    let task = (0usize..4, 0u32..50, prop::collection::vec(any::<usize>(), 0..4), [0u32..5, 0u32..5, 0u32..5]);
    prop::collection::vec(task, 1..80)
}

fn schedule(tasks: &[RandomTask]) -> Schedule {
    let works = [gpu, h2d, d2h, cpu];
    let tasks = tasks.iter().enumerate().map(|(id, (lane, _, after, _))| {
        let after: Vec<usize> = after.iter().filter(|_| id > 0).map(|before| before % id.max(1)).collect();
        task(works[*lane](id), &after)
    });
    Schedule { tasks: tasks.collect() }
}

fn cost_of(tasks: &[RandomTask], shared: bool) -> impl Fn(Work) -> Cost {
    move |work| {
        let id = work.layer().expect("all have their number there");
        let (_, seconds, _, shares) = &tasks[id];
        let shares = shares.map(|share| if shared { f64::from(share) / 4.0 } else { 0.0 });
        Cost { shares, ..Cost::alone(f64::from(*seconds)) }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]
    #[test]
    fn any_timeline_keeps_the_schedule(tasks in random_tasks(), shared in any::<bool>()) {
        let schedule = schedule(&tasks);
        let timeline = simulate(&schedule, cost_of(&tasks, shared));
        let times = times(&timeline);
        prop_assert_eq!(times.len(), tasks.len());
        let rounding = 1e-6;
        let mut last_on_lane = [0.0; 4];
        for (id, body) in schedule.ids() {
            let (start, end) = times[id.0];
            let ready = body.after.iter().map(|before| times[before.0].1).fold(last_on_lane[tasks[id.0].0], f64::max);
            prop_assert!((start - ready).abs() < rounding, "{} starts at {}, could at {}", id.0, start, ready);
            let seconds = f64::from(tasks[id.0].1);
            prop_assert!(end - start > seconds - rounding, "never faster than alone");
            prop_assert!(shared || end - start < seconds + rounding, "undisturbed, exactly so long");
            last_on_lane[tasks[id.0].0] = end;
        }
        // Between the busiest lane and one task after the other.
        let total: f64 = tasks.iter().map(|task| f64::from(task.1)).sum();
        let duration = times.iter().map(|time| time.1).fold(0.0, f64::max);
        prop_assert!(duration < total + rounding);
        for lane_of in Lane::ALL {
            let busy: f64 = timeline.spans.iter().filter(|span| span.lane == lane_of).map(|span| (span.end - span.start).as_secs_f64()).sum();
            prop_assert!(duration > busy - rounding);
        }
    }

    /// Where nothing is shared, a task that takes less never makes anything later.
    #[test]
    fn faster_is_never_slower(tasks in random_tasks(), which in any::<prop::sample::Index>(), new in 0u32..50) {
        let schedule = schedule(&tasks);
        let before = times(&simulate(&schedule, cost_of(&tasks, false)));
        let mut faster = tasks.clone();
        let seconds = &mut faster[which.index(tasks.len())].1;
        *seconds = new.min(*seconds);
        let after = times(&simulate(&schedule, cost_of(&faster, false)));
        for (before, after) in before.iter().zip(&after) {
            prop_assert!(after.1 <= before.1 + 1e-6);
        }
    }
}

/// 32 layers of 16 micro-batches, as large as a real pass: the search simulates many of them.
#[test]
fn a_whole_pass_is_simulated_in_milliseconds() {
    let mut tasks = Vec::new();
    for step in 0..32 * 16 {
        let ids = tasks.len();
        tasks.push(task(gpu(step), &[]));
        tasks.push(task(d2h(step), &[ids]));
        tasks.push(task(cpu(step), &[ids + 1]));
        tasks.push(task(h2d(step), &[ids + 2]));
        tasks.push(task(gpu(1000 + step), &[ids + 3]));
        tasks.push(task(h2d(1000 + step), &[]));
    }
    let schedule = Schedule { tasks };
    let cost = |work| match work {
        Work::LoadPage { .. } => Cost::alone(3e-3).using(Resource::LinkToDevice, 1.0).using(Resource::HostMemory, 0.3),
        Work::CpuAttention { .. } => Cost::alone(2e-3).using(Resource::HostMemory, 0.9),
        _ => Cost::alone(1e-3),
    };
    let timeline = simulate(&schedule, cost);
    assert_eq!(timeline.spans.len(), 6 * 512);
    let started = Instant::now();
    let again = simulate(&schedule, cost);
    let took = started.elapsed();
    assert_eq!(again, timeline);
    assert!(took < Duration::from_millis(50), "{took:?}");
}
