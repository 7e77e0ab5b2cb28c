//! The launcher: each lane walks its tasks of a schedule in the static order, on a thread of its own.
//!
//! ```text
//! gpu lane   start post b0 (after: rows b0 done) ─ start experts g0 (after: pages' tickets) ─ …
//! h2d lane   start page 4.0 ─ start page 4.1 (after: experts' ticket, on the device) ─ …
//! d2h lane   start rows b1 (after: pre b1's ticket) ─ …
//! cpu lane   wait for rows b1's ticket, attention b1 ─ …
//! ```
//!
//! Starting a task of a device lane hands it to the device, with the tickets that the device has to wait for by itself; the lane
//! goes on to its next task at once. What the device cannot wait for, a result of the host, the lane waits for before it starts
//! the task. A task of the host lane is carried out when it starts, after its tickets have been reached.
//!
//! Lanes of the device share a [`Device`]; the host's lane is the calling thread and has its [`Host`] to itself.
//!
//! Guarantees: a task starts only when what it depends on has ended or, between device lanes, has been handed to the device; an
//! error on any lane stops all of them before their next task and names the task; when [`run`] returns, no lane runs any more.

use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::schedule::{Lane, Schedule, Span, Task, TaskId, Timeline, Work};

/// What became of a task that was started.
pub enum Started<T> {
    /// It has ended.
    Done,
    /// It will have ended when the device reaches this.
    Ticket(T),
}

/// Carries out tasks of the device's lanes. Called from their threads: at most one call at a time for each lane.
pub trait Device: Sync {
    type Error: std::error::Error + Send + 'static;
    /// When work on the device will have ended.
    type Ticket: Copy + Send + Sync;

    /// Starts a task. The device waits for `after` by itself.
    fn start(&self, id: TaskId, task: &Task, after: &[Self::Ticket]) -> Result<Started<Self::Ticket>, Self::Error>;

    /// Blocks until the device has reached a ticket.
    fn wait(&self, ticket: Self::Ticket) -> Result<(), Self::Error>;

    /// When the work of each ticket ran. All of it has. None where nobody measured it.
    fn take_spans(&self, tickets: &[Self::Ticket]) -> Result<Vec<Option<(Instant, Instant)>>, Self::Error>;

    /// Bytes that a task moved, and rows that it was about.
    fn size(&self, work: Work) -> (u64, usize);
}

/// Carries out the tasks of the host's lane.
pub trait Host<E> {
    /// What the task depends on has ended; when this returns, so has the task.
    fn perform(&mut self, id: TaskId, task: &Task) -> Result<(), E>;
}

/// The task that failed, and why.
#[derive(Debug, thiserror::Error)]
#[error("{task}: {source}")]
pub struct TaskError<E: std::error::Error + 'static> {
    pub task: String,
    pub source: E,
}

/// How far a task is.
#[derive(Debug, Clone, Copy)]
enum State<T> {
    Waiting,
    /// Handed to the device at a moment.
    Started(T, Instant),
    /// Carried out by the host, from a moment to another.
    Done(Instant, Instant),
}

/// What the lanes tell each other.
struct Board<T, E> {
    states: Vec<State<T>>,
    /// No lane starts another task.
    stopped: bool,
    failed: Option<(TaskId, E)>,
}

struct Launcher<'r, D: Device> {
    schedule: &'r Schedule,
    device: &'r D,
    board: Mutex<Board<D::Ticket, D::Error>>,
    changed: Condvar,
}

/// Another lane has failed.
struct Stopped;

/// A lane that panics takes the others with it instead of leaving them to wait for ever.
struct StopOnPanic<'l, 'r, D: Device>(&'l Launcher<'r, D>);

impl<D: Device> Drop for StopOnPanic<'_, '_, D> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.board().stopped = true;
            self.0.changed.notify_all();
        }
    }
}

impl<D: Device> Launcher<'_, D> {
    fn board(&self) -> MutexGuard<'_, Board<D::Ticket, D::Error>> {
        self.board.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Tickets of what `task` depends on; host results have been waited for when this returns.
    fn dependencies(&self, task: &Task) -> Result<Vec<D::Ticket>, Stopped> {
        let mut board = self.board();
        loop {
            if board.stopped {
                return Err(Stopped);
            }
            let mut tickets = Vec::with_capacity(task.after.len());
            let all_there = task.after.iter().all(|id| match board.states[id.0] {
                State::Waiting => false,
                State::Started(ticket, _) => {
                    tickets.push(ticket);
                    true
                }
                State::Done(..) => true,
            });
            if all_there {
                return Ok(tickets);
            }
            board = self.changed.wait(board).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
    }

    fn set(&self, id: TaskId, state: State<D::Ticket>) {
        self.board().states[id.0] = state;
        self.changed.notify_all();
    }

    /// Walks a lane's tasks until its end or a failure.
    fn run_lane(
        &self,
        lane: Lane,
        mut perform: impl FnMut(TaskId, &Task, &[D::Ticket]) -> Result<State<D::Ticket>, D::Error>,
    ) {
        let _guard = StopOnPanic(self);
        for (id, task) in self.schedule.ids().filter(|(_, task)| task.lane == lane) {
            let Ok(tickets) = self.dependencies(task) else { return };
            match perform(id, task, &tickets) {
                Ok(state) => self.set(id, state),
                Err(error) => {
                    let mut board = self.board();
                    board.stopped = true;
                    board.failed.get_or_insert((id, error));
                    self.changed.notify_all();
                    return;
                }
            }
        }
    }

    fn run_device_lane(&self, lane: Lane) {
        self.run_lane(lane, |id, task, tickets| {
            let begun = Instant::now();
            Ok(match self.device.start(id, task, tickets)? {
                Started::Done => State::Done(begun, Instant::now()),
                Started::Ticket(ticket) => State::Started(ticket, begun),
            })
        });
    }

    fn run_host_lane(&self, host: &mut impl Host<D::Error>) {
        self.run_lane(Lane::Cpu, |id, task, tickets| {
            for ticket in tickets {
                self.device.wait(*ticket)?;
            }
            let begun = Instant::now();
            host.perform(id, task)?;
            Ok(State::Done(begun, Instant::now()))
        });
    }
}

/// A task of an earlier pass that was still under way on the device when that pass ended.
#[derive(Debug, Clone, Copy)]
pub struct Carried<T> {
    id: TaskId,
    work: Work,
    lane: Lane,
    ticket: T,
    begun: Instant,
}

/// Runs every task of `schedule`. Pages of the next pass, those of layers from `layers` on, may still be under way when this
/// returns; they join `carried`. All other tasks have ended, and so have those that `carried` held before. The timeline counts
/// from `origin` and has everything that ended.
pub fn run<D: Device>(
    schedule: &Schedule,
    device: &D,
    host: &mut impl Host<D::Error>,
    origin: Instant,
    layers: usize,
    carried: &mut Vec<Carried<D::Ticket>>,
) -> Result<Timeline, TaskError<D::Error>> {
    let ahead = |work: Work| matches!(work, Work::LoadPage { layer, .. } if layer >= layers);
    let board = Board { states: vec![State::Waiting; schedule.tasks.len()], stopped: false, failed: None };
    let launcher = Launcher { schedule, device, board: Mutex::new(board), changed: Condvar::new() };
    std::thread::scope(|scope| {
        for lane in Lane::ALL.into_iter().filter(|lane| !lane.is_host()) {
            if schedule.tasks.iter().any(|task| task.lane == lane) {
                let launcher = &launcher;
                let spawned = std::thread::Builder::new().name(format!("{} lane", lane.name()));
                spawned.spawn_scoped(scope, move || launcher.run_device_lane(lane)).expect("a thread for each lane");
            }
        }
        launcher.run_host_lane(host);
    });
    let Launcher { board, .. } = launcher;
    let Board { states, failed, .. } = board.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    let named = |work: Work, source| {
        let layer = work.layer().map_or(String::new(), |layer| format!(" of layer {layer}"));
        TaskError { task: format!("{work}{layer}"), source }
    };
    // Whatever was handed to the device ends before anything else happens to its memory, also after a failure.
    let mut under_way = std::mem::take(carried);
    for ((id, task), state) in schedule.ids().zip(&states) {
        if let State::Started(ticket, begun) = *state {
            let (work, lane) = (task.work, task.lane);
            let list = if ahead(work) && failed.is_none() { &mut *carried } else { &mut under_way };
            list.push(Carried { id, work, lane, ticket, begun });
        }
    }
    let mut waited = Ok(());
    for task in &under_way {
        waited = waited.and(device.wait(task.ticket).map_err(|error| named(task.work, error)));
    }
    let ended = Instant::now();
    if let Some((id, error)) = failed {
        return Err(named(schedule.task(id).work, error));
    }
    waited?;
    let tickets: Vec<D::Ticket> = under_way.iter().map(|task| task.ticket).collect();
    let measured = device.take_spans(&tickets).map_err(|error| named(Work::Barrier { number: 0 }, error))?;
    let since = |at: Instant| at.checked_duration_since(origin).unwrap_or(Duration::ZERO);
    let mut spans = Vec::with_capacity(states.len());
    let mut span = |id: TaskId, work: Work, lane: Lane, (start, end): (Instant, Instant)| {
        let (bytes, rows) = device.size(work);
        spans.push(Span { task: id, work, lane, start: since(start), end: since(end), bytes, rows });
    };
    for (task, measured) in under_way.iter().zip(measured) {
        // Without a clock of the device: from when it was handed over to when all was over.
        span(task.id, task.work, task.lane, measured.unwrap_or((task.begun, ended)));
    }
    for ((id, task), state) in schedule.ids().zip(&states) {
        if let State::Done(begun, end) = state {
            span(id, task.work, task.lane, (*begun, *end));
        }
    }
    spans.sort_by_key(|span| (span.start, span.task));
    Ok(Timeline { spans })
}
