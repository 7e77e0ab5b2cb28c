//! Tasks, lanes, and the schedule that orders them.

/// What runs one task at a time, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Lane {
    Gpu,
    HostToDevice,
    DeviceToHost,
    Cpu,
}

impl Lane {
    pub const ALL: [Lane; 4] = [Lane::Gpu, Lane::HostToDevice, Lane::DeviceToHost, Lane::Cpu];

    pub fn name(self) -> &'static str {
        match self {
            Lane::Gpu => "gpu",
            Lane::HostToDevice => "h2d",
            Lane::DeviceToHost => "d2h",
            Lane::Cpu => "cpu",
        }
    }
}

/// What a task does. `group` counts the groups that have rows in this pass, `chunk` the expert chunks of a layer and
/// `page` the pages of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Work {
    /// Token ids to residual rows.
    Embed { group: usize },
    /// The KV blocks that this group's GPU attention reads, from the host cache to the GPU workspace.
    KvToDevice { layer: usize, group: usize },
    /// Norm, QKV projection, rotary; new keys and values also go to the GPU workspace.
    PreAttention { layer: usize, group: usize },
    /// New keys and values of all rows, and queries of the decode rows, to the host.
    RowsToHost { layer: usize, group: usize },
    /// New keys and values into the cache; decode rows attend where the policy says CPU.
    CpuAttention { layer: usize, group: usize },
    /// Prompt rows attend; decode rows too where the policy says GPU.
    GpuAttention { layer: usize, group: usize },
    /// Attention output of decode rows to the GPU.
    RowsToDevice { layer: usize, group: usize },
    /// Output projection, residual, norm, router, sort by expert.
    PostAttention { layer: usize, group: usize },
    /// One page of expert weights into its slots.
    LoadPage { layer: usize, chunk: usize, page: usize },
    /// The experts of one chunk over one group's rows; the last chunk combines.
    Experts { layer: usize, group: usize, chunk: usize },
    /// Final norm, LM head and greedy ids of the rows that are sampled.
    Head { group: usize },
    /// Next tokens chosen, finished sequences leave, the group's next pass is fixed.
    Sample { group: usize },
}

impl Work {
    pub fn lane(self) -> Lane {
        match self {
            Work::Embed { .. }
            | Work::PreAttention { .. }
            | Work::GpuAttention { .. }
            | Work::PostAttention { .. }
            | Work::Experts { .. }
            | Work::Head { .. } => Lane::Gpu,
            Work::KvToDevice { .. } | Work::RowsToDevice { .. } | Work::LoadPage { .. } => Lane::HostToDevice,
            Work::RowsToHost { .. } => Lane::DeviceToHost,
            Work::CpuAttention { .. } | Work::Sample { .. } => Lane::Cpu,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Work::Embed { .. } => "embed",
            Work::KvToDevice { .. } => "kv_to_device",
            Work::PreAttention { .. } => "pre_attention",
            Work::RowsToHost { .. } => "rows_to_host",
            Work::CpuAttention { .. } => "attention",
            Work::GpuAttention { .. } => "gpu_attention",
            Work::RowsToDevice { .. } => "rows_to_device",
            Work::PostAttention { .. } => "post_attention",
            Work::LoadPage { .. } => "page",
            Work::Experts { .. } => "experts",
            Work::Head { .. } => "head",
            Work::Sample { .. } => "sample",
        }
    }

    pub fn layer(self) -> Option<usize> {
        match self {
            Work::Embed { .. } | Work::Head { .. } | Work::Sample { .. } => None,
            Work::KvToDevice { layer, .. }
            | Work::PreAttention { layer, .. }
            | Work::RowsToHost { layer, .. }
            | Work::CpuAttention { layer, .. }
            | Work::GpuAttention { layer, .. }
            | Work::RowsToDevice { layer, .. }
            | Work::PostAttention { layer, .. }
            | Work::LoadPage { layer, .. }
            | Work::Experts { layer, .. } => Some(layer),
        }
    }
}

/// Position of a task in its schedule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TaskId(pub usize);

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    pub work: Work,
    /// Tasks that must have ended before this one starts.
    pub after: Vec<TaskId>,
}

/// The tasks of one pass in launch order. Each lane runs its own tasks in this order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Schedule {
    pub tasks: Vec<Task>,
}

impl Schedule {
    pub fn ids(&self) -> impl Iterator<Item = (TaskId, &Task)> {
        self.tasks.iter().enumerate().map(|(index, task)| (TaskId(index), task))
    }

    pub fn task(&self, id: TaskId) -> &Task {
        &self.tasks[id.0]
    }

    pub(super) fn push(&mut self, work: Work, after: impl IntoIterator<Item = TaskId>) -> TaskId {
        self.tasks.push(Task { work, after: after.into_iter().collect() });
        TaskId(self.tasks.len() - 1)
    }
}
