//! What must hold for any schedule of a pass, whoever built it.
//!
//! [`PassShape::needs`] says what each task has to wait for; here it is proved that a schedule waits for it, by whatever chain of
//! dependencies and lanes, and that it can end: every dependency points backwards in launch order, and a lane runs its tasks in
//! launch order, so the earliest task that has not run can always run. That covers the rule of the GPU queue too: a submission
//! that needs a result of the CPU comes after it.

use std::collections::HashMap;

use super::shape::{PassShape, Why};
use super::task::{Lane, Schedule, TaskId, Work};

/// A schedule that would compute something wrong or never end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ScheduleFault {
    #[error("task {task} ({work}) waits for task {after}, which comes later in launch order: they would wait for ever")]
    WaitsForLater { task: usize, work: Work, after: usize },
    #[error("{work:?} is missing")]
    Missing { work: Work },
    #[error("{work:?} is there {count} times")]
    Repeated { work: Work, count: usize },
    #[error("task {task} ({work:?}) is nothing that the pass needs")]
    NotNeeded { task: usize, work: Work },
    #[error("task {task} ({work:?}) is on lane {}, it belongs on {}", .lane.name(), .right.name())]
    WrongLane { task: usize, work: Work, lane: Lane, right: Lane },
    #[error("{work:?} may start before {needed:?}, whose result it reads, has ended")]
    ResultNotThere { work: Work, needed: Work },
    #[error("{work:?} may overwrite device rows that {reader:?} still reads")]
    DeviceRowsOverwritten { work: Work, reader: Work },
    #[error("{work:?} may overwrite host rows that {reader:?} still reads")]
    HostRowsOverwritten { work: Work, reader: Work },
    #[error("{work:?} may rewrite a slot that {reader:?} still reads")]
    SlotRewritten { work: Work, reader: Work },
    #[error("{work:?} may compute before {page:?} has arrived")]
    PageNotThere { work: Work, page: Work },
    #[error("{work:?} may overwrite the KV workspace that {reader:?} still reads")]
    WorkspaceOverwritten { work: Work, reader: Work },
    #[error("{work:?} may add up before {before:?}: a row's sum would depend on the ring")]
    ChunksOutOfOrder { work: Work, before: Work },
    #[error("{work:?} may come before {before:?}: pieces of an expert arrive in order")]
    PagesOutOfOrder { work: Work, before: Work },
    #[error("{work:?} may come before {before:?} has stored its keys and values")]
    NotStored { work: Work, before: Work },
    #[error("{work:?} may run across {barrier:?}")]
    BarrierCrossed { work: Work, barrier: Work },
}

fn fault(work: Work, needed: Work, why: Why) -> ScheduleFault {
    match why {
        Why::Result => ScheduleFault::ResultNotThere { work, needed },
        Why::DeviceRows => ScheduleFault::DeviceRowsOverwritten { work, reader: needed },
        Why::HostRows => ScheduleFault::HostRowsOverwritten { work, reader: needed },
        Why::Slot => ScheduleFault::SlotRewritten { work, reader: needed },
        Why::Page => ScheduleFault::PageNotThere { work, page: needed },
        Why::Workspace => ScheduleFault::WorkspaceOverwritten { work, reader: needed },
        Why::ChunkOrder => ScheduleFault::ChunksOutOfOrder { work, before: needed },
        Why::PageOrder => ScheduleFault::PagesOutOfOrder { work, before: needed },
        Why::Stored => ScheduleFault::NotStored { work, before: needed },
    }
}

/// Which tasks have ended when each task starts: by its dependencies, its place on its lane, and all that follows from those.
#[derive(Debug)]
pub struct Before {
    words: usize,
    bits: Vec<u64>,
}

impl Before {
    fn new(schedule: &Schedule) -> Self {
        let words = schedule.tasks.len().div_ceil(64);
        let mut before = Self { words, bits: vec![0; schedule.tasks.len() * words] };
        let mut last: HashMap<Lane, usize> = HashMap::new();
        for (TaskId(task), body) in schedule.ids() {
            let on_lane = last.insert(body.lane, task);
            for after in body.after.iter().map(|id| id.0).chain(on_lane) {
                let (earlier, this) = before.bits.split_at_mut(task * words);
                for (word, more) in this[..words].iter_mut().zip(&earlier[after * words..]) {
                    *word |= more;
                }
                this[after / 64] |= 1 << (after % 64);
            }
        }
        before
    }

    /// `first` has ended when `second` starts.
    pub fn orders(&self, first: TaskId, second: TaskId) -> bool {
        self.bits[second.0 * self.words + first.0 / 64] >> (first.0 % 64) & 1 == 1
    }
}

/// See the module's text. Returns the order that the schedule guarantees.
pub fn check(schedule: &Schedule, shape: &PassShape) -> Result<Before, ScheduleFault> {
    let works = shape.works();
    let needed: std::collections::HashSet<Work> = works.iter().copied().collect();
    let mut ids: HashMap<Work, Vec<TaskId>> = HashMap::new();
    for (id, task) in schedule.ids() {
        let is_barrier = matches!(task.work, Work::Barrier { .. });
        if !is_barrier && !needed.contains(&task.work) {
            return Err(ScheduleFault::NotNeeded { task: id.0, work: task.work });
        }
        let right = shape.lane(task.work);
        if task.lane != right {
            return Err(ScheduleFault::WrongLane { task: id.0, work: task.work, lane: task.lane, right });
        }
        if let Some(after) = task.after.iter().find(|after| **after >= id) {
            return Err(ScheduleFault::WaitsForLater { task: id.0, work: task.work, after: after.0 });
        }
        ids.entry(task.work).or_default().push(id);
    }
    let find = |work: Work| match ids.get(&work).map(Vec::as_slice) {
        Some([id]) => Ok(*id),
        Some(more) => Err(ScheduleFault::Repeated { work, count: more.len() }),
        None => Err(ScheduleFault::Missing { work }),
    };
    let before = Before::new(schedule);
    for work in &works {
        let id = find(*work)?;
        for (needs, why) in shape.needs(*work) {
            if !before.orders(find(needs)?, id) {
                return Err(fault(*work, needs, why));
            }
        }
    }
    check_workspaces(schedule, shape, &before, &find)?;
    for (id, barrier) in schedule.ids().filter(|(_, task)| matches!(task.work, Work::Barrier { .. })) {
        for (other, task) in schedule.ids() {
            let ordered = match other.cmp(&id) {
                std::cmp::Ordering::Less => before.orders(other, id),
                std::cmp::Ordering::Equal => true,
                std::cmp::Ordering::Greater => before.orders(id, other),
            };
            if !ordered {
                return Err(ScheduleFault::BarrierCrossed { work: task.work, barrier: barrier.work });
            }
        }
    }
    Ok(before)
}

/// Whoever writes a workspace next does so after the one before has attended.
fn check_workspaces(
    schedule: &Schedule,
    shape: &PassShape,
    before: &Before,
    find: &dyn Fn(Work) -> Result<TaskId, ScheduleFault>,
) -> Result<(), ScheduleFault> {
    let mut reader: HashMap<usize, Work> = HashMap::new();
    for (_, task) in schedule.ids() {
        let Work::PreAttention { layer, micro_batch } = task.work else { continue };
        let rows = shape.micro_batches[micro_batch];
        if !rows.gpu_attention {
            continue;
        }
        let attends = Work::GpuAttention { layer, micro_batch };
        if let Some(earlier) = reader.insert(rows.workspace, attends) {
            let upload = Work::KvToDevice { layer, micro_batch };
            for writer in rows.kv_to_device.then_some(upload).into_iter().chain([task.work]) {
                if !before.orders(find(earlier)?, find(writer)?) {
                    return Err(fault(writer, earlier, Why::Workspace));
                }
            }
        }
    }
    Ok(())
}
