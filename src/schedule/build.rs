//! Builders: from the shape of a pass to a schedule.

use super::task::{Schedule, TaskId, Work};

/// What one group brings to a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupShape {
    /// Some rows attend on the GPU.
    pub gpu_attention: bool,
    /// Some rows attend on the CPU.
    pub cpu_attention: bool,
    /// Some context that the GPU attends to lies in the host cache.
    pub kv_to_device: bool,
    /// Some rows are sampled.
    pub sampled: bool,
}

/// Everything that a builder has to know about a pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PassShape {
    pub layers: usize,
    /// The groups that have rows in this pass.
    pub groups: Vec<GroupShape>,
    /// Pages per chunk of experts; every layer is cut alike. 0 pages: the chunk's experts are resident.
    pub chunk_pages: Vec<usize>,
}

/// One task after the other: every task depends on the one before it.
///
/// All groups attend before the first expert runs, so that each page is loaded once per pass whatever the number of groups,
/// also where the ring holds fewer experts than a layer has.
pub fn serial(shape: &PassShape) -> Schedule {
    let mut schedule = Schedule::default();
    let mut last: Option<TaskId> = None;
    let mut next = |work| last = Some(schedule.push(work, last));
    for group in 0..shape.groups.len() {
        next(Work::Embed { group });
    }
    for layer in 0..shape.layers {
        for (group, rows) in shape.groups.iter().enumerate() {
            if rows.kv_to_device {
                next(Work::KvToDevice { layer, group });
            }
            next(Work::PreAttention { layer, group });
            next(Work::RowsToHost { layer, group });
            next(Work::CpuAttention { layer, group });
            if rows.gpu_attention {
                next(Work::GpuAttention { layer, group });
            }
            if rows.cpu_attention {
                next(Work::RowsToDevice { layer, group });
            }
            next(Work::PostAttention { layer, group });
        }
        for (chunk, pages) in shape.chunk_pages.iter().enumerate() {
            for page in 0..*pages {
                next(Work::LoadPage { layer, chunk, page });
            }
            for group in 0..shape.groups.len() {
                next(Work::Experts { layer, group, chunk });
            }
        }
    }
    for (group, rows) in shape.groups.iter().enumerate() {
        if rows.sampled {
            next(Work::Head { group });
        }
        next(Work::Sample { group });
    }
    schedule
}
