//! A schedule's timeline, predicted: the same schedule that runs, with the time of each task given.
//!
//! In: a [`Schedule`], and for each task its [`Cost`]: the time that it takes undisturbed, and the share of each shared resource
//! that it uses meanwhile. Out: the [`Timeline`] that [`execute`](crate::execute) would measure.
//!
//! A lane runs its tasks one at a time, in launch order; a task starts when its lane is free and everything that it waits for has
//! ended. Lanes also share what lies between them – the link in each direction, host memory – and what they share they divide:
//! where the shares of the running tasks add up to more than one, all of them slow down by that sum.
//!
//! ```text
//! h2d  page (all of the link)            ████████████████████    alone 8, with the rows beside it 10
//! gpu  rows_to_device (all of it too)            ████████        alone 2, at half speed 4
//!                                        0       4       8   10
//! ```
//!
//! Several passes follow each other with pages on their way between them ([`simulate_pass`]): each begins with what the one
//! before left.
//!
//! Guarantees: pure, and the same for the same input; a task never runs faster than alone, and no resource is used beyond what
//! there is. Given up: a cost does not depend on what ran before (a cold cache), and sharing is fair, which hardware need not be.
//! With shares a faster task can make the whole later, because what follows it starts to disturb something more important;
//! without them more speed is never slower.

use std::collections::HashMap;
use std::time::Duration;

use super::shape::PageId;
use super::task::{Lane, Schedule, Task, TaskId, Work};
use super::timeline::{Span, Timeline};

/// What several lanes use at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resource {
    LinkToDevice,
    LinkToHost,
    HostMemory,
}

impl Resource {
    pub const ALL: [Resource; 3] = [Resource::LinkToDevice, Resource::LinkToHost, Resource::HostMemory];
}

/// What a task takes.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Cost {
    /// Time that it takes when nothing disturbs it. Finite and not negative.
    pub seconds: f64,
    /// Share of each [`Resource`], in the order of [`Resource::ALL`], that it uses meanwhile: 0 to 1.
    pub shares: [f64; 3],
    /// Bytes that it moves and rows that it is about, for the timeline.
    pub bytes: u64,
    pub rows: usize,
}

impl Cost {
    /// A task that shares nothing.
    pub fn alone(seconds: f64) -> Cost {
        Cost { seconds, ..Cost::default() }
    }

    /// Bytes over an own way at so many per second.
    pub fn moving(bytes: f64, bytes_per_s: f64) -> Cost {
        Cost { bytes: bytes as u64, ..Cost::alone(bytes / bytes_per_s) }
    }

    /// The same, using a share of a resource.
    pub fn using(mut self, resource: Resource, share: f64) -> Cost {
        self.shares[resource as usize] = share;
        self
    }
}

/// A task that has started and not ended.
#[derive(Clone, Copy)]
struct Running {
    task: usize,
    start: f64,
    /// Seconds of undisturbed work that are left.
    left: f64,
    cost: Cost,
}

impl Running {
    /// Undisturbed seconds done per second, beside tasks whose shares add up to `load`.
    fn speed(&self, load: &[f64; 3]) -> f64 {
        let used = self.cost.shares.iter().zip(load).filter(|(share, _)| **share > 0.0);
        used.map(|(_, load)| 1.0 / load.max(1.0)).fold(1.0, f64::min)
    }
}

/// The timeline of a schedule in which every task takes what `cost` says. The schedule must be sound
/// ([`check`](super::check())): one that would wait for ever is a bug of its builder.
pub fn simulate(schedule: &Schedule, cost: impl Fn(Work) -> Cost) -> Timeline {
    simulate_pass(schedule, usize::MAX, cost, &[]).timeline
}

/// A page of a pass that was still on its way when the pass before ended.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OnItsWay {
    /// As the pass that computes with it counts: layer 0 is its first one.
    pub page: PageId,
    /// What is left of its transfer.
    pub seconds: f64,
}

/// One of several passes, as predicted.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct SimulatedPass {
    /// Counted from the end of the pass before. Pages of the next pass are in it, to their end.
    pub timeline: Timeline,
    /// When all of it had ended but pages of the next pass.
    pub seconds: f64,
    /// Those that were on their way then, in order.
    pub on_their_way: Vec<OnItsWay>,
}

/// The same for one pass of several: it begins with pages of its own on their way, and ends when all but the pages that it loads
/// ahead have, those of layers from `layers` on.
pub fn simulate_pass(
    schedule: &Schedule,
    layers: usize,
    cost: impl Fn(Work) -> Cost,
    on_their_way: &[OnItsWay],
) -> SimulatedPass {
    let n = schedule.tasks.len();
    let mut waits: Vec<usize> = schedule.tasks.iter().map(|task| task.after.len()).collect();
    let mut waiters: Vec<Vec<usize>> = vec![Vec::new(); n + on_their_way.len()];
    let mut queues: [Vec<usize>; Lane::ALL.len()] = Default::default();
    for (TaskId(id), task) in schedule.ids() {
        task.after.iter().for_each(|TaskId(before)| waiters[*before].push(id));
        queues[task.lane as usize].push(id);
    }
    // Pages on their way are tasks from number n on, in front of all others of their lane.
    let link = &mut queues[Lane::HostToDevice as usize];
    link.splice(0..0, n..n + on_their_way.len());
    let mut carried: HashMap<(usize, usize), Vec<usize>> = HashMap::new();
    for (number, on_its_way) in on_their_way.iter().enumerate() {
        carried.entry((on_its_way.page.layer, on_its_way.page.chunk)).or_default().push(n + number);
    }
    if !carried.is_empty() {
        for (TaskId(id), task) in schedule.ids() {
            if let Work::Experts { layer, chunk, .. } = task.work {
                for page in carried.get(&(layer, chunk)).into_iter().flatten() {
                    waiters[*page].push(id);
                    waits[id] += 1;
                }
            }
        }
    }
    queues.iter_mut().for_each(|queue| queue.reverse());

    let mut running: [Option<Running>; Lane::ALL.len()] = [None; Lane::ALL.len()];
    let mut spans = Vec::with_capacity(n);
    let (mut now, mut ended, mut pass_end) = (0.0, 0, 0.0);
    let mut ahead: Vec<(PageId, f64, f64)> = Vec::new();
    while ended < n + on_their_way.len() {
        for (queue, slot) in queues.iter_mut().zip(&mut running) {
            if let Some(id) = queue.last().copied().filter(|id| slot.is_none() && (*id >= n || waits[*id] == 0)) {
                queue.pop();
                let cost = match id.checked_sub(n) {
                    Some(number) => Cost::alone(on_their_way[number].seconds),
                    None => cost(schedule.tasks[id].work),
                };
                *slot = Some(Running { task: id, start: now, left: cost.seconds, cost });
            }
        }
        let mut load = [0.0; 3];
        for task in running.iter().flatten() {
            load.iter_mut().zip(task.cost.shares).for_each(|(load, share)| *load += share);
        }
        let until_end = |task: &Running| task.left / task.speed(&load);
        let step = running.iter().flatten().map(until_end).fold(f64::INFINITY, f64::min);
        assert!(step.is_finite(), "a sound schedule never stands still, and a task takes a finite time");
        now += step;
        for slot in &mut running {
            let Some(task) = slot else { continue };
            // The one that set the step has ended, whatever rounding leaves of it.
            if until_end(task) <= step * (1.0 + 1e-12) {
                if let Some(&Task { work, lane, .. }) = schedule.tasks.get(task.task) {
                    let [start, end] = [task.start, now].map(Duration::from_secs_f64);
                    let Cost { bytes, rows, .. } = task.cost;
                    spans.push(Span { task: TaskId(task.task), work, lane, start, end, bytes, rows });
                    match work {
                        Work::LoadPage { layer, chunk, page } if layer >= layers => {
                            ahead.push((PageId { layer: layer - layers, chunk, page }, task.start, now));
                        }
                        _ => pass_end = now,
                    }
                }
                waiters[task.task].iter().for_each(|waiter| waits[*waiter] -= 1);
                ended += 1;
                *slot = None;
            } else {
                task.left -= step * task.speed(&load);
            }
        }
    }
    spans.sort_by_key(|span| (span.start, span.task));
    let late = ahead.into_iter().filter(|(_, _, end)| *end > pass_end);
    let left = |(page, start, end): (PageId, f64, f64)| OnItsWay { page, seconds: end - f64::max(start, pass_end) };
    SimulatedPass { timeline: Timeline { spans }, seconds: pass_end, on_their_way: late.map(left).collect() }
}
