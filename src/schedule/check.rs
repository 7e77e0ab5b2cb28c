//! What must hold for any schedule of a pass, whoever built it.

use super::build::PassShape;
use super::task::{Schedule, TaskId, Work};

/// A schedule that would compute something wrong or never end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ScheduleFault {
    #[error("task {task} ({work:?}) waits for task {after}, which comes later in launch order")]
    WaitsForLater { task: usize, work: Work, after: usize },
    #[error("{work:?} is there {count} times")]
    Count { work: Work, count: usize },
    #[error("task {task} ({work:?}) is nothing that the pass needs")]
    NotNeeded { task: usize, work: Work },
    #[error("task {task} ({work:?}) may start before {needed:?} has ended")]
    Unordered { task: usize, work: Work, needed: Work },
}

/// Every task that the pass needs is there once and no other, and each is ordered after those whose results it reads.
///
/// A doubt: what it overwrites is not looked at – expert slots that an earlier chunk still reads, and the scratch buffers that
/// groups share ([`Machine`](crate::execute::Machine)). [`serial`](super::serial) orders everything; a builder that overlaps
/// needs a check of that as well.
pub fn check(schedule: &Schedule, shape: &PassShape) -> Result<(), ScheduleFault> {
    let n = schedule.tasks.len();
    if let Some((TaskId(task), body)) = schedule.ids().find(|(_, body)| !needs(shape, body.work)) {
        return Err(ScheduleFault::NotNeeded { task, work: body.work });
    }
    // `before[t]` = the set of tasks that have ended when t starts, as a bit row.
    let words = n.div_ceil(64);
    let mut before = vec![0u64; n * words];
    for (TaskId(task), body) in schedule.ids() {
        for TaskId(after) in body.after.iter().copied() {
            if after >= task {
                return Err(ScheduleFault::WaitsForLater { task, work: body.work, after });
            }
            for word in 0..words {
                before[task * words + word] |= before[after * words + word];
            }
            before[task * words + after / 64] |= 1 << (after % 64);
        }
    }
    let find = |work: Work| -> Result<usize, ScheduleFault> {
        let mut places =
            schedule.tasks.iter().enumerate().filter(|(_, task)| task.work == work).map(|(index, _)| index);
        match (places.next(), places.count()) {
            (Some(place), 0) => Ok(place),
            (first, more) => Err(ScheduleFault::Count { work, count: first.map_or(0, |_| 1 + more) }),
        }
    };
    let ordered = |first: Work, second: Work| -> Result<(), ScheduleFault> {
        let (from, to) = (find(first)?, find(second)?);
        if before[to * words + from / 64] >> (from % 64) & 1 == 1 {
            Ok(())
        } else {
            Err(ScheduleFault::Unordered { task: to, work: second, needed: first })
        }
    };
    let chunks = shape.chunk_pages.len();
    for (group, rows) in shape.groups.iter().enumerate() {
        for layer in 0..shape.layers {
            let pre = Work::PreAttention { layer, group };
            let post = Work::PostAttention { layer, group };
            if layer == 0 {
                ordered(Work::Embed { group }, pre)?;
            } else {
                ordered(Work::Experts { layer: layer - 1, group, chunk: chunks - 1 }, pre)?;
            }
            if rows.kv_to_device {
                // The new rows' keys are written over the slots that the upload brought.
                ordered(Work::KvToDevice { layer, group }, pre)?;
            }
            ordered(pre, Work::RowsToHost { layer, group })?;
            ordered(Work::RowsToHost { layer, group }, Work::CpuAttention { layer, group })?;
            if rows.gpu_attention {
                ordered(pre, Work::GpuAttention { layer, group })?;
                ordered(Work::GpuAttention { layer, group }, post)?;
            }
            if rows.cpu_attention {
                ordered(Work::CpuAttention { layer, group }, Work::RowsToDevice { layer, group })?;
                ordered(Work::RowsToDevice { layer, group }, post)?;
            }
            for chunk in 0..chunks {
                let experts = Work::Experts { layer, group, chunk };
                ordered(post, experts)?;
                for page in 0..shape.chunk_pages[chunk] {
                    ordered(Work::LoadPage { layer, chunk, page }, experts)?;
                }
                if chunk > 0 {
                    // Chunks add up in order: the order of a row's sum must not depend on the ring.
                    ordered(Work::Experts { layer, group, chunk: chunk - 1 }, experts)?;
                }
            }
        }
        let last = Work::Experts { layer: shape.layers - 1, group, chunk: chunks - 1 };
        if rows.sampled {
            ordered(last, Work::Head { group })?;
            ordered(Work::Head { group }, Work::Sample { group })?;
        }
        ordered(last, Work::Sample { group })?;
        for layer in 0..shape.layers {
            // When its ids are known a group's sequences may end, move to the spill file or get their next rows.
            ordered(Work::CpuAttention { layer, group }, Work::Sample { group })?;
        }
    }
    Ok(())
}

fn needs(shape: &PassShape, work: Work) -> bool {
    let has_layer = work.layer().is_none_or(|layer| layer < shape.layers);
    let group = |group: usize| shape.groups.get(group);
    has_layer
        && match work {
            Work::LoadPage { chunk, page, .. } => shape.chunk_pages.get(chunk).is_some_and(|pages| page < *pages),
            Work::Experts { group, chunk, .. } => group < shape.groups.len() && chunk < shape.chunk_pages.len(),
            Work::Embed { group: g }
            | Work::PreAttention { group: g, .. }
            | Work::RowsToHost { group: g, .. }
            | Work::CpuAttention { group: g, .. }
            | Work::PostAttention { group: g, .. }
            | Work::Sample { group: g } => group(g).is_some(),
            Work::KvToDevice { group: g, .. } => group(g).is_some_and(|rows| rows.kv_to_device),
            Work::GpuAttention { group: g, .. } => group(g).is_some_and(|rows| rows.gpu_attention),
            Work::RowsToDevice { group: g, .. } => group(g).is_some_and(|rows| rows.cpu_attention),
            Work::Head { group: g } => group(g).is_some_and(|rows| rows.sampled),
        }
}
