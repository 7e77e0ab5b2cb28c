//! Builders: from the shape of a pass to a schedule.
//!
//! A builder decides the *order* in which tasks are launched; what each waits for follows from [`PassShape::needs`]. Two
//! questions tell the schedules apart: which micro-batch's work stands where in the order, and when pages are sent.
//!
//! | schedule | attention | order | pages |
//! |---|---|---|---|
//! | `serial` | either | one task after the other | when they are due |
//! | `flexgen` (S4) | GPU | micro-batch after micro-batch, the next one's KV on its way; the host waits after each | the next layer's, all at once |
//! | `flexgen-async` | GPU | the same without that wait | the same |
//! | `flexgen-c` (S3) | CPU | micro-batch after micro-batch, nothing beside it | the same |
//! | `fastdecode` (S2) | CPU | CPU two micro-batches ahead | the same |
//! | `cgopipe` (S1) | CPU | CPU two micro-batches ahead | one share between two micro-batches |
//! | `grouped` | CPU | experts over a group of micro-batches at a time, CPU one group ahead | as soon as a slot is free |
//!
//! S1 to S4 are figure 6 and algorithm 1 of MoE-Lightning (arXiv 2411.11217). Where the ring holds less than a layer's streamed
//! experts, the experts of all groups take turns chunk by chunk, so that a page still comes once a pass.

use std::collections::HashMap;

use rustc_hash::FxHashMap;

use super::shape::PassShape;
use super::task::{Lane, Schedule, TaskId, Work};
use crate::policy::ScheduleKind;

/// Builds the schedule that `kind` names.
pub fn build(kind: ScheduleKind, shape: &PassShape) -> Schedule {
    match kind {
        ScheduleKind::Serial => serial(shape),
        ScheduleKind::FlexGen => flexgen(shape, true),
        ScheduleKind::FlexGenAsync => flexgen(shape, false),
        ScheduleKind::FlexGenC => flexgen_c(shape),
        ScheduleKind::FastDecode => pipelined(shape, 2, Pages::WholeLayer),
        ScheduleKind::CgoPipe => pipelined(shape, 2, Pages::Share),
        ScheduleKind::Grouped => grouped(shape),
    }
}

/// When pages are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pages {
    /// A layer's, all at once, when the layer before begins.
    WholeLayer,
    /// A share of the next layer's with each micro-batch.
    Share,
}

/// A schedule in the making.
struct Builder<'s> {
    shape: &'s PassShape,
    schedule: Schedule,
    /// The planner builds thousands of schedules, and spent a fifth of its time in the standard hash.
    ids: FxHashMap<Work, TaskId>,
    last_on_lane: HashMap<Lane, TaskId>,
    /// Next page to send.
    page: usize,
    /// Who attends last in each workspace.
    workspace: HashMap<usize, TaskId>,
    /// All that follows waits for this.
    barrier: Option<TaskId>,
    barriers: usize,
    /// Every task waits for the one before it.
    serial: bool,
}

impl<'s> Builder<'s> {
    fn new(shape: &'s PassShape) -> Self {
        Self {
            shape,
            schedule: Schedule::default(),
            ids: FxHashMap::default(),
            last_on_lane: HashMap::new(),
            page: shape.loaded_pages,
            workspace: HashMap::new(),
            barrier: None,
            barriers: 0,
            serial: false,
        }
    }

    /// Launches a task next.
    fn add(&mut self, work: Work) -> TaskId {
        let needs = self.shape.needs(work);
        let launched = |needed: &Work| *self.ids.get(needed).unwrap_or_else(|| panic!("{work:?} needs {needed:?}"));
        let mut after: Vec<TaskId> = needs.iter().map(|(needed, _)| launched(needed)).collect();
        if let Work::KvToDevice { micro_batch, .. } | Work::PreAttention { micro_batch, .. } = work
            && self.shape.micro_batches[micro_batch].gpu_attention
        {
            after.extend(self.workspace.get(&self.shape.micro_batches[micro_batch].workspace));
        }
        after.extend(self.barrier);
        if self.serial {
            after.extend(self.schedule.tasks.len().checked_sub(1).map(TaskId));
        }
        after.sort_unstable();
        after.dedup();
        let lane = self.shape.lane(work);
        // What the lane orders needs no dependency.
        let on_lane = self.last_on_lane.get(&lane).copied();
        after.retain(|id| Some(*id) == on_lane && self.serial || self.schedule.task(*id).lane != lane);
        let id = self.schedule.push(work, lane, after);
        if let Work::GpuAttention { micro_batch, .. } = work {
            self.workspace.insert(self.shape.micro_batches[micro_batch].workspace, id);
        }
        self.last_on_lane.insert(lane, id);
        self.ids.insert(work, id);
        id
    }

    /// The host waits for everything launched so far.
    fn barrier(&mut self) {
        let work = Work::Barrier { number: self.barriers };
        self.barriers += 1;
        let lane = self.shape.lane(work);
        let mut after: Vec<TaskId> =
            self.last_on_lane.iter().filter(|(other, _)| **other != lane).map(|(_, id)| *id).collect();
        after.sort_unstable();
        let id = self.schedule.push(work, lane, after);
        self.last_on_lane.insert(lane, id);
        self.barrier = Some(id);
    }

    /// Pages that were just pinned were pinned by the thread that launches everything: what follows waits for it.
    fn wait_for_pins(&mut self) {
        if let (true, Some(cpu)) = (self.shape.relay, self.last_on_lane.get(&Lane::Cpu)) {
            self.barrier = Some(*cpu);
        }
    }

    fn embed_all(&mut self) {
        for micro_batch in 0..self.shape.micro_batches.len() {
            self.add(Work::Embed { micro_batch });
        }
    }

    fn kv_to_device(&mut self, layer: usize, micro_batch: usize) {
        let upload = Work::KvToDevice { layer, micro_batch };
        if self.shape.micro_batches[micro_batch].kv_to_device && !self.ids.contains_key(&upload) {
            self.add(upload);
        }
    }

    /// Projection and attention, up to what the CPU does. The context is on its way to the GPU already.
    fn attend(&mut self, layer: usize, micro_batch: usize) {
        self.add(Work::PreAttention { layer, micro_batch });
        self.add(Work::RowsToHost { layer, micro_batch });
        self.add(Work::CpuAttention { layer, micro_batch });
        if self.shape.micro_batches[micro_batch].gpu_attention {
            self.add(Work::GpuAttention { layer, micro_batch });
        }
    }

    fn begin(&mut self, layer: usize, micro_batch: usize) {
        self.kv_to_device(layer, micro_batch);
        self.attend(layer, micro_batch);
    }

    fn rows_to_device(&mut self, layer: usize, micro_batch: usize) {
        if self.shape.micro_batches[micro_batch].cpu_attention {
            self.add(Work::RowsToDevice { layer, micro_batch });
        }
    }

    fn post_attention(&mut self, layer: usize, micro_batch: usize) {
        self.rows_to_device(layer, micro_batch);
        self.add(Work::PostAttention { layer, micro_batch });
    }

    fn experts(&mut self, layer: usize, group: usize, chunk: usize) {
        self.send_for(layer, chunk);
        self.add(Work::Experts { layer, group, chunk });
    }

    fn send_page(&mut self) {
        let (page, loads) = (self.shape.page(self.page), self.shape.loads(self.page));
        self.page += 1;
        if !loads {
            return;
        }
        if self.shape.relay {
            self.add(page.pin());
        }
        self.add(page.load());
    }

    /// Sends pages up to number `end`, as far as the tasks that free their slots have been launched.
    fn send_until(&mut self, end: usize) {
        let end = end.min(self.shape.page_numbers().end);
        while self.page < end {
            let page = self.shape.page(self.page);
            if !self.shape.loads(self.page) {
                self.page += 1;
                continue;
            }
            let free = self
                .shape
                .needs(page.load())
                .iter()
                .all(|(needed, _)| self.ids.contains_key(needed) || matches!(needed, Work::PinPage { .. }));
            if !free {
                return;
            }
            self.send_page();
        }
    }

    /// Sends what is still to be sent of a chunk's pages.
    fn send_for(&mut self, layer: usize, chunk: usize) {
        let of_layer: usize = self.shape.chunks[..=chunk].iter().map(|chunk| chunk.pages.len()).sum();
        let end = layer * self.shape.pages_per_layer() + of_layer;
        while self.page < end {
            self.send_page();
        }
    }

    /// Pages of the layers up to and with `layer`.
    fn pages_through(&self, layer: usize) -> usize {
        (layer + 1) * self.shape.pages_per_layer()
    }

    fn sample_all(&mut self) {
        for (micro_batch, rows) in self.shape.micro_batches.iter().enumerate() {
            if rows.sampled {
                self.add(Work::Head { micro_batch });
            }
            self.add(Work::Sample { micro_batch });
        }
    }

    fn finish(mut self) -> Schedule {
        self.send_until(usize::MAX);
        debug_assert_eq!(self.page, self.shape.page_numbers().end, "every page was sent");
        self.schedule
    }

    /// The ring holds all streamed experts of a layer.
    fn layer_fits(&self) -> bool {
        self.shape.chunks.iter().filter(|chunk| !chunk.pages.is_empty()).count() <= 1
    }
}

/// One task after the other: every task depends on the one before it. All micro-batches attend before the first expert runs,
/// so that each page is loaded once per pass also where the ring holds fewer experts than a layer has.
pub fn serial(shape: &PassShape) -> Schedule {
    let mut b = Builder::new(shape);
    b.serial = true;
    b.embed_all();
    for layer in 0..shape.layers {
        for micro_batch in 0..shape.micro_batches.len() {
            b.begin(layer, micro_batch);
            b.post_attention(layer, micro_batch);
        }
        for chunk in 0..shape.chunks.len() {
            for group in 0..shape.groups.len() {
                b.experts(layer, group, chunk);
            }
        }
    }
    b.sample_all();
    b.finish()
}

/// FlexGen's zig-zag loop: layer by layer, micro-batch by micro-batch; the next micro-batch's context is on its way while this
/// one computes. With `barrier` the host waits for everything after each, as its `synchronize()` does.
fn flexgen(shape: &PassShape, barrier: bool) -> Schedule {
    let mut b = Builder::new(shape);
    b.embed_all();
    let n = shape.micro_batches.len();
    let steps = shape.layers * n;
    let at = |step: usize| (step / n, step % n);
    if steps > 0 {
        b.kv_to_device(0, 0);
    }
    for step in 0..steps {
        let (layer, micro_batch) = at(step);
        if micro_batch == 0 {
            b.send_until(b.pages_through(layer + 1));
            b.wait_for_pins();
        }
        // With one workspace, and across layers of one micro-batch, the context can only come when it is due.
        let next = (step + 1 < steps).then(|| at(step + 1));
        let workspace = |micro_batch: usize| shape.micro_batches[micro_batch].workspace;
        let ahead = next.filter(|(_, other)| workspace(*other) != workspace(micro_batch));
        if let Some((layer, micro_batch)) = ahead {
            b.kv_to_device(layer, micro_batch);
        }
        b.attend(layer, micro_batch);
        b.post_attention(layer, micro_batch);
        experts_of(&mut b, layer, micro_batch);
        if let (Some((layer, micro_batch)), None) = (next, ahead) {
            b.kv_to_device(layer, micro_batch);
        }
        if barrier {
            b.barrier();
        }
    }
    b.sample_all();
    b.finish()
}

/// FlexGen with attention on the CPU: everything of a micro-batch waits for the thing before it.
fn flexgen_c(shape: &PassShape) -> Schedule {
    let mut b = Builder::new(shape);
    b.embed_all();
    for layer in 0..shape.layers {
        for micro_batch in 0..shape.micro_batches.len() {
            if micro_batch == 0 {
                b.send_until(b.pages_through(layer + 1));
                b.wait_for_pins();
            }
            b.begin(layer, micro_batch);
            b.post_attention(layer, micro_batch);
            experts_of(&mut b, layer, micro_batch);
            b.barrier();
        }
    }
    b.sample_all();
    b.finish()
}

/// The experts of a micro-batch, when it is the last of its group to be there; chunk by chunk over all groups, after the last
/// micro-batch, where the ring holds less than a layer.
fn experts_of(b: &mut Builder<'_>, layer: usize, micro_batch: usize) {
    let shape = b.shape;
    if b.layer_fits() {
        let group = shape.group_of(micro_batch);
        if shape.groups[group].end == micro_batch + 1 {
            (0..shape.chunks.len()).for_each(|chunk| b.experts(layer, group, chunk));
        }
    } else if micro_batch + 1 == shape.micro_batches.len() {
        for chunk in 0..shape.chunks.len() {
            (0..shape.groups.len()).for_each(|group| b.experts(layer, group, chunk));
        }
    }
}

/// The CPU works `ahead` micro-batches in front of the GPU, across layers (algorithm 1 of the paper).
fn pipelined(shape: &PassShape, ahead: usize, pages: Pages) -> Schedule {
    let mut b = Builder::new(shape);
    b.embed_all();
    let n = shape.micro_batches.len();
    let steps = shape.layers * n;
    let at = |step: usize| (step / n, step % n);
    let mut begun = 0;
    // A micro-batch begins a layer only after its experts of the layer before.
    let can_begin = |b: &Builder<'_>, step: usize| {
        let (layer, micro_batch) = at(step);
        layer == 0 || {
            let (group, chunk) = (shape.group_of(micro_batch), shape.chunks.len() - 1);
            b.ids.contains_key(&Work::Experts { layer: layer - 1, group, chunk })
        }
    };
    for step in 0..steps {
        let (layer, micro_batch) = at(step);
        while begun < steps && begun < step + ahead && can_begin(&b, begun) {
            let (layer, micro_batch) = at(begun);
            b.begin(layer, micro_batch);
            begun += 1;
        }
        b.rows_to_device(layer, micro_batch);
        let end = match pages {
            Pages::WholeLayer => b.pages_through(layer + 1),
            Pages::Share => {
                let per_layer = shape.pages_per_layer();
                b.pages_through(layer) + per_layer * (micro_batch + 1) / n
            }
        };
        b.send_until(end);
        b.add(Work::PostAttention { layer, micro_batch });
        experts_of(&mut b, layer, micro_batch);
    }
    b.sample_all();
    b.finish()
}

/// Experts over a group of micro-batches at a time. While the GPU computes one group's experts, the CPU attends for the next.
///
/// ```text
/// gpu  post g0 · experts g0 · pre g0 (next layer) │ post g1 · experts g1 · pre g1 │ post g0 …
/// cpu  attention g1                               │ attention g0 (next layer)     │ attention g1 …
/// h2d  pages of the next layer, without a pause
/// ```
///
/// The context of a prompt that goes on is sent a layer early, between the pages of two layers: behind a whole layer of pages it
/// would come late, and the GPU wait for it.
fn grouped(shape: &PassShape) -> Schedule {
    let mut b = Builder::new(shape);
    b.embed_all();
    b.send_until(usize::MAX);
    let mut early = Vec::new();
    for micro_batch in 0..shape.micro_batches.len() {
        b.begin(0, micro_batch);
        early.push((1, micro_batch));
    }
    for layer in 0..shape.layers {
        let layer_fits = b.layer_fits();
        for (group, members) in shape.groups.iter().enumerate() {
            members.clone().for_each(|micro_batch| b.post_attention(layer, micro_batch));
            if layer_fits {
                (0..shape.chunks.len()).for_each(|chunk| b.experts(layer, group, chunk));
                begin_next(&mut b, layer, group, &mut early);
                send_with_context(&mut b, &mut early);
            }
        }
        if !layer_fits {
            for chunk in 0..shape.chunks.len() {
                for group in 0..shape.groups.len() {
                    b.experts(layer, group, chunk);
                    if chunk + 1 == shape.chunks.len() {
                        begin_next(&mut b, layer, group, &mut early);
                    }
                }
                send_with_context(&mut b, &mut early);
            }
        }
    }
    b.sample_all();
    b.finish()
}

/// A group goes on to the next layer. What it will need in the one after that may follow early.
fn begin_next(b: &mut Builder<'_>, layer: usize, group: usize, early: &mut Vec<(usize, usize)>) {
    if layer + 1 < b.shape.layers {
        for micro_batch in b.shape.groups[group].clone() {
            b.begin(layer + 1, micro_batch);
            early.push((layer + 2, micro_batch));
        }
    }
}

/// Sends the pages whose slots are free, and after half a layer of them the contexts that can come `early`: those micro-batches
/// have just begun to attend, and pages need not wait until they have.
fn send_with_context(b: &mut Builder<'_>, early: &mut Vec<(usize, usize)>) {
    b.send_until(b.page + b.shape.pages_per_layer().div_ceil(2));
    for (layer, micro_batch) in early.drain(..) {
        if layer < b.shape.layers && b.shape.has_own_workspace(micro_batch) {
            b.kv_to_device(layer, micro_batch);
        }
    }
    b.send_until(usize::MAX);
}
