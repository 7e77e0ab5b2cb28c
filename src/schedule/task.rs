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

    /// Tasks of this lane have ended when they have been carried out; those of the others run on after they were started.
    pub fn is_host(self) -> bool {
        self == Lane::Cpu
    }
}

/// What a task does. `micro_batch` counts the micro-batches that have rows in this pass, `group` their expert groups, `chunk` the
/// expert chunks of a layer and `page` the pages of a chunk. Pages of layers from L on are the next pass's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Work {
    /// Token ids to residual rows.
    Embed { micro_batch: usize },
    /// The KV blocks that GPU attention reads, from the host cache to a GPU workspace.
    KvToDevice { layer: usize, micro_batch: usize },
    /// Norm, QKV projection, rotary; new keys and values also go to the GPU workspace.
    PreAttention { layer: usize, micro_batch: usize },
    /// New keys and values of all rows, and queries of the decode rows, to the host.
    RowsToHost { layer: usize, micro_batch: usize },
    /// New keys and values into the cache; decode rows attend where the policy says CPU.
    CpuAttention { layer: usize, micro_batch: usize },
    /// Prompt rows attend; decode rows too where the policy says GPU.
    GpuAttention { layer: usize, micro_batch: usize },
    /// Attention output of decode rows to the GPU.
    RowsToDevice { layer: usize, micro_batch: usize },
    /// Output projection, residual, norm, router.
    PostAttention { layer: usize, micro_batch: usize },
    /// One page of expert weights copied into pinned memory: only where nothing is pinned before.
    PinPage { layer: usize, chunk: usize, page: usize },
    /// One page of expert weights into its slots.
    LoadPage { layer: usize, chunk: usize, page: usize },
    /// Rows sorted by expert, and the experts of one chunk over a group's rows; the last chunk combines.
    Experts { layer: usize, group: usize, chunk: usize },
    /// Final norm, LM head and greedy ids of the rows that are sampled.
    Head { micro_batch: usize },
    /// Next tokens chosen, finished sequences leave, the micro-batch's next pass is fixed.
    Sample { micro_batch: usize },
    /// The host waits for all that was started before: FlexGen's `synchronize()`.
    Barrier { number: usize },
}

impl Work {
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
            Work::PinPage { .. } => "pin",
            Work::LoadPage { .. } => "page",
            Work::Experts { .. } => "experts",
            Work::Head { .. } => "head",
            Work::Sample { .. } => "sample",
            Work::Barrier { .. } => "barrier",
        }
    }

    pub fn layer(self) -> Option<usize> {
        match self {
            Work::Embed { .. } | Work::Head { .. } | Work::Sample { .. } | Work::Barrier { .. } => None,
            Work::KvToDevice { layer, .. }
            | Work::PreAttention { layer, .. }
            | Work::RowsToHost { layer, .. }
            | Work::CpuAttention { layer, .. }
            | Work::GpuAttention { layer, .. }
            | Work::RowsToDevice { layer, .. }
            | Work::PostAttention { layer, .. }
            | Work::PinPage { layer, .. }
            | Work::LoadPage { layer, .. }
            | Work::Experts { layer, .. } => Some(layer),
        }
    }

    /// The micro-batch whose rows it is about, where it is about one.
    pub fn micro_batch(self) -> Option<usize> {
        match self {
            Work::Embed { micro_batch }
            | Work::KvToDevice { micro_batch, .. }
            | Work::PreAttention { micro_batch, .. }
            | Work::RowsToHost { micro_batch, .. }
            | Work::CpuAttention { micro_batch, .. }
            | Work::GpuAttention { micro_batch, .. }
            | Work::RowsToDevice { micro_batch, .. }
            | Work::PostAttention { micro_batch, .. }
            | Work::Head { micro_batch }
            | Work::Sample { micro_batch } => Some(micro_batch),
            Work::PinPage { .. } | Work::LoadPage { .. } | Work::Experts { .. } | Work::Barrier { .. } => None,
        }
    }
}

/// Position of a task in its schedule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TaskId(pub usize);

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    pub work: Work,
    pub lane: Lane,
    /// Tasks that must have ended before this one starts, beside the one before it on its lane.
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

    pub(super) fn push(&mut self, work: Work, lane: Lane, after: impl IntoIterator<Item = TaskId>) -> TaskId {
        self.tasks.push(Task { work, lane, after: after.into_iter().collect() });
        TaskId(self.tasks.len() - 1)
    }
}
