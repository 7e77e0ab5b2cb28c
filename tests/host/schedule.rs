//! Schedules as data: what any builder makes passes `check`, what is broken does not; and lanes that run as late or as early as
//! they may compute the same.

use std::collections::{HashMap, HashSet};
use std::sync::{Condvar, Mutex};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use fulmen::execute::{Device, Host, Started, run};
use fulmen::policy::{RowPath, ScheduleKind, SpreadLayers};
use fulmen::schedule::{
    ChunkShape, Lane, MicroBatchShape, PassShape, Schedule, ScheduleFault, Task, TaskId, Work, build, check,
};
use proptest::prelude::*;

/// Decode rows that attend on the CPU.
const DECODE: MicroBatchShape =
    MicroBatchShape { gpu_attention: false, cpu_attention: true, kv_to_device: false, sampled: true, workspace: 0 };
/// Decode rows, and a later chunk of a prompt.
const MIXED: MicroBatchShape =
    MicroBatchShape { gpu_attention: true, cpu_attention: true, kv_to_device: true, sampled: true, workspace: 0 };

/// Experts `streamed` of a layer through a ring of `ring`, two pages for each chunk of half a ring; residents in front.
fn chunks(residents: bool, streamed: usize, ring: usize) -> Vec<ChunkShape> {
    let mut chunks = Vec::new();
    if residents || streamed == 0 {
        chunks.push(ChunkShape { pages: Vec::new() });
    }
    let size = (ring / 2).clamp(1, streamed.max(1));
    let mut first = 0;
    while first < streamed {
        let end = (first + size).min(streamed);
        // Two pages that share the expert in the middle.
        let middle = (first + end) / 2;
        chunks.push(ChunkShape { pages: vec![first..middle + 1, middle..end] });
        first = end;
    }
    chunks
}

/// Micro-batches that share so many workspaces in turn.
fn sharing(workspaces: usize, micro_batches: Vec<MicroBatchShape>) -> Vec<MicroBatchShape> {
    let numbered = micro_batches.into_iter().enumerate();
    numbered.map(|(number, rows)| MicroBatchShape { workspace: number % workspaces, ..rows }).collect()
}

/// Two workspaces.
fn shape(
    layers: usize,
    micro_batches: Vec<MicroBatchShape>,
    group_size: usize,
    streamed: usize,
    ring: usize,
) -> PassShape {
    let n = micro_batches.len();
    PassShape {
        layers,
        micro_batches: sharing(2, micro_batches),
        groups: (0..n).step_by(group_size).map(|first| first..(first + group_size).min(n)).collect(),
        chunks: chunks(true, streamed, ring),
        kept: SpreadLayers::default(),
        kept_pages: 0,
        streamed,
        ring: if streamed == 0 { 0 } else { ring },
        loaded_pages: 0,
        load_ahead: true,
        rows: RowPath::Kernels,
        relay: false,
    }
}

/// Three layers of four streamed experts through a ring of two layers.
fn small() -> PassShape {
    shape(3, vec![DECODE, MIXED, DECODE], 1, 4, 8)
}

fn pass_shapes() -> impl Strategy<Value = PassShape> {
    // Micro-batches without rows are left out, so those that share a workspace may be any.
    let micro_batch = (any::<[bool; 4]>(), 0usize..4).prop_map(|(flags, workspace)| {
        let [gpu_attention, cpu_attention, kv_to_device, sampled] = flags;
        // What lies in the host cache goes to the GPU only for somebody who attends there.
        let kv_to_device = kv_to_device && gpu_attention;
        MicroBatchShape { gpu_attention, cpu_attention, kv_to_device, sampled, workspace }
    });
    let micro_batches = prop::collection::vec(micro_batch, 1..6);
    let experts = (any::<bool>(), 0usize..6, 1usize..13);
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), 0usize..5, 0usize..4);
    (1usize..5, micro_batches, 1usize..4, experts, flags).prop_map(
        |(layers, micro_batches, group_size, (residents, streamed, ring), flags)| {
            let (copies, load_ahead, relay, loaded_pages, kept) = flags;
            let ring = ring.min((layers * streamed).max(1));
            let mut shape = shape(layers, micro_batches.clone(), group_size, streamed, ring);
            shape.micro_batches = micro_batches;
            shape.chunks = chunks(residents, streamed, ring);
            if streamed > 0 {
                // Pages of the first streamed expert alone.
                let pages = shape.chunks.iter().flat_map(|chunk| &chunk.pages);
                shape.kept_pages = pages.take_while(|page| page.end == 1).count();
                shape.kept = SpreadLayers { n: kept.min(layers), of: layers };
            }
            shape.rows = if copies { RowPath::Copies } else { RowPath::Kernels };
            (shape.load_ahead, shape.relay) = (true, relay);
            // No more was loaded ahead than fits the ring.
            shape.loaded_pages = loaded_pages.min(shape.pages_ahead());
            shape.load_ahead = load_ahead;
            shape
        },
    )
}

fn kinds() -> impl Strategy<Value = ScheduleKind> {
    prop::sample::select(ScheduleKind::ALL.to_vec())
}

fn position(schedule: &Schedule, work: Work) -> TaskId {
    TaskId(schedule.tasks.iter().position(|task| task.work == work).unwrap_or_else(|| panic!("no {work:?}")))
}

/// Behind a whole layer of pages a context would come late, and the GPU wait for it.
#[test]
fn contexts_come_in_front_of_a_layer_of_pages() {
    for (group_size, ring) in [(1, 16), (2, 16), (2, 8), (4, 16), (2, 6)] {
        let mut shape = shape(6, vec![MIXED; 4], group_size, 8, ring);
        shape.micro_batches = sharing(4, shape.micro_batches);
        let schedule = build(ScheduleKind::Grouped, &shape);
        let half_a_layer = shape.pages_per_layer().div_ceil(2);
        for (layer, micro_batch) in (1..shape.layers).flat_map(|layer| (0..4).map(move |b| (layer, b))) {
            let attended = position(&schedule, Work::GpuAttention { layer: layer - 1, micro_batch });
            let upload = position(&schedule, Work::KvToDevice { layer, micro_batch });
            assert!(attended.0 < upload.0, "the workspace is free by then");
            let between = &schedule.tasks[attended.0..upload.0];
            let pages = between.iter().filter(|task| matches!(task.work, Work::LoadPage { .. })).count();
            assert!(pages <= half_a_layer, "{pages} pages in front of layer {layer}'s, ring of {ring}:\n{schedule}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]
    #[test]
    fn every_builder_is_sound_for_any_pass(shape in pass_shapes(), kind in kinds()) {
        let schedule = build(kind, &shape);
        if let Err(fault) = check(&schedule, &shape) {
            prop_assert!(false, "{}: {}\n{}", kind, fault, schedule);
        }
        // Pages come once a pass, whatever the number of micro-batches and groups.
        let pages = schedule.tasks.iter().filter(|task| matches!(task.work, Work::LoadPage { .. })).count();
        prop_assert_eq!(pages, shape.page_numbers().filter(|number| shape.loads(*number)).count());
    }

    /// Without any one of its tasks, or with it twice, a schedule is refused.
    #[test]
    fn every_task_counts(shape in pass_shapes(), kind in kinds(), at in any::<prop::sample::Index>()) {
        let schedule = build(kind, &shape);
        let at = at.index(schedule.tasks.len());
        let work = schedule.tasks[at].work;
        prop_assume!(!matches!(work, Work::Barrier { .. }));
        let mut without = Schedule::default();
        for (id, task) in schedule.ids().filter(|(id, _)| id.0 != at) {
            let moved = |after: &TaskId| if after.0 > at { TaskId(after.0 - 1) } else { *after };
            let after = task.after.iter().filter(|after| after.0 != at).map(moved).collect();
            let _ = id;
            without.tasks.push(Task { after, ..task.clone() });
        }
        prop_assert_eq!(check(&without, &shape).err(), Some(ScheduleFault::Missing { work }));
        let mut twice = schedule.clone();
        twice.tasks.push(Task { after: Vec::new(), ..schedule.tasks[at].clone() });
        prop_assert_eq!(check(&twice, &shape).err(), Some(ScheduleFault::Repeated { work, count: 2 }));
    }

    /// Without its dependencies a task of a lane may run before what it needs, unless its own lane or what is needed orders it.
    #[test]
    fn a_dependency_that_no_other_implies_counts(shape in pass_shapes(), kind in kinds(), at in any::<prop::sample::Index>()) {
        let schedule = build(kind, &shape);
        let with: Vec<usize> = (0..schedule.tasks.len()).filter(|task| !schedule.tasks[*task].after.is_empty()).collect();
        prop_assume!(!with.is_empty());
        let task = with[at.index(with.len())];
        let mut broken = schedule.clone();
        broken.tasks[task].after.clear();
        let order = check(&schedule, &shape).expect("sound");
        if let Ok(still) = check(&broken, &shape) {
            // Then the lane alone orders all that this task needs.
            for (needed, _) in shape.needs(schedule.tasks[task].work) {
                let needed = position(&schedule, needed);
                prop_assert!(still.orders(needed, TaskId(task)) && order.orders(needed, TaskId(task)));
            }
        }
    }

    /// The model of a pass below computes the same under any builder and any lanes' timing, and what a page brings is what experts read.
    #[test]
    fn lanes_that_dawdle_compute_the_same(shape in pass_shapes(), kind in kinds(), seed in any::<u64>()) {
        let schedule = build(kind, &shape);
        let mut model = Model::new(&shape);
        let mut random = seed | 1;
        let mut next: HashMap<Lane, usize> = HashMap::new();
        let lanes: HashMap<Lane, Vec<usize>> = Lane::ALL.into_iter().map(|lane| {
            (lane, (0..schedule.tasks.len()).filter(|task| schedule.tasks[*task].lane == lane).collect())
        }).collect();
        let mut ended = vec![false; schedule.tasks.len()];
        while ended.iter().any(|ended| !ended) {
            let ready: Vec<Lane> = Lane::ALL.into_iter().filter(|lane| {
                let at = next.get(lane).copied().unwrap_or(0);
                lanes[lane].get(at).is_some_and(|task| schedule.tasks[*task].after.iter().all(|after| ended[after.0]))
            }).collect();
            prop_assert!(!ready.is_empty(), "the lanes wait for each other");
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let lane = ready[(random >> 33) as usize % ready.len()];
            let at = next.entry(lane).or_default();
            let task = lanes[&lane][*at];
            *at += 1;
            model.perform(schedule.tasks[task].work);
            ended[task] = true;
        }
        let serial = build(ScheduleKind::Serial, &shape);
        let mut reference = Model::new(&shape);
        serial.tasks.iter().for_each(|task| reference.perform(task.work));
        prop_assert_eq!(model.results, reference.results);
    }
}

/// A pass in numbers: each buffer holds what was last written to it, and whatever reads folds that into what it writes. A task that
/// runs before what it needs, or after somebody has overwritten it, ends in another number.
struct Model<'s> {
    shape: &'s PassShape,
    /// By slot of the ring: layer and expert (of the streamed), parts of it that have come.
    ring: Vec<(usize, usize, u64)>,
    cells: HashMap<(&'static str, usize), u64>,
    results: HashMap<usize, u64>,
}

impl<'s> Model<'s> {
    fn new(shape: &'s PassShape) -> Self {
        let mut model = Self {
            shape,
            ring: vec![(usize::MAX, 0, 0); shape.ring.max(1)],
            cells: HashMap::new(),
            results: HashMap::new(),
        };
        (0..shape.loaded_pages).for_each(|number| model.load(shape.page(number).load()));
        model
    }

    fn get(&self, name: &'static str, at: usize) -> u64 {
        self.cells.get(&(name, at)).copied().unwrap_or(0)
    }

    fn set(&mut self, name: &'static str, at: usize, parts: &[u64]) {
        let value = parts
            .iter()
            .fold(0xcbf2_9ce4_8422_2325u64, |h, part| (h ^ part).wrapping_mul(0x100_0000_01b3).rotate_left(23));
        self.cells.insert((name, at), value);
    }

    fn load(&mut self, work: Work) {
        let Work::LoadPage { layer, chunk, page } = work else { unreachable!() };
        for expert in self.shape.chunks[chunk].pages[page].clone() {
            let slot = (layer * self.shape.streamed + expert) % self.shape.ring;
            let held = &mut self.ring[slot];
            if (held.0, held.1) != (layer, expert) {
                *held = (layer, expert, 0);
            }
            held.2 = held.2 * 31 + 1 + page as u64;
        }
    }

    fn perform(&mut self, work: Work) {
        match work {
            Work::Embed { micro_batch: b } => self.set("x", b, &[b as u64]),
            Work::KvToDevice { layer, micro_batch: b } => {
                self.set("workspace", self.shape.micro_batches[b].workspace, &[layer as u64, b as u64]);
            }
            Work::PreAttention { layer, micro_batch: b } => {
                let x = self.get("x", b);
                self.set("qkv", b, &[layer as u64, x]);
                if self.shape.micro_batches[b].gpu_attention {
                    let workspace = self.shape.micro_batches[b].workspace;
                    // Without an upload the workspace begins anew.
                    let before =
                        if self.shape.micro_batches[b].kv_to_device { self.get("workspace", workspace) } else { 7 };
                    let qkv = self.get("qkv", b);
                    self.set("workspace", workspace, &[before, qkv]);
                }
            }
            Work::RowsToHost { micro_batch: b, .. } => {
                let qkv = self.get("qkv", b);
                self.set("host rows", b, &[qkv]);
            }
            Work::CpuAttention { layer, micro_batch: b } => {
                let rows = self.get("host rows", b);
                let cache = self.get("cache", b);
                self.set("cache", b, &[cache, layer as u64, rows]);
                let cache = self.get("cache", b);
                self.set("host attention", b, &[rows, cache]);
            }
            Work::GpuAttention { micro_batch: b, .. } => {
                let (workspace, qkv) =
                    (self.get("workspace", self.shape.micro_batches[b].workspace), self.get("qkv", b));
                self.set("gpu attention", b, &[workspace, qkv]);
            }
            Work::RowsToDevice { micro_batch: b, .. } => {
                let attention = self.get("host attention", b);
                self.set("device attention", b, &[attention]);
            }
            Work::PostAttention { layer, micro_batch: b } => {
                let rows = self.shape.micro_batches[b];
                let gpu = if rows.gpu_attention { self.get("gpu attention", b) } else { 0 };
                let cpu = if rows.cpu_attention { self.get("device attention", b) } else { 0 };
                let x = self.get("x", b);
                self.set("x", b, &[x, layer as u64, gpu, cpu]);
            }
            Work::LoadPage { .. } => self.load(work),
            Work::Experts { layer, group, chunk } => {
                let mut weights = 0u64;
                for page in &self.shape.chunks[chunk].pages {
                    for expert in page.clone() {
                        let held = self.ring[(layer * self.shape.streamed + expert) % self.shape.ring];
                        weights =
                            weights.wrapping_mul(1_000_003) ^ (held.0 as u64) << 40 ^ (held.1 as u64) << 20 ^ held.2;
                    }
                }
                for b in self.shape.groups[group].clone() {
                    let x = self.get("x", b);
                    self.set("x", b, &[x, chunk as u64, weights]);
                }
            }
            Work::Head { micro_batch: b } => {
                let x = self.get("x", b);
                self.set("head", b, &[x]);
            }
            Work::Sample { micro_batch: b } => {
                let (head, cache, x) = (self.get("head", b), self.get("cache", b), self.get("x", b));
                self.set("result", b, &[head, cache, x]);
                self.results.insert(b, self.get("result", b));
            }
            Work::PinPage { .. } | Work::Barrier { .. } => {}
        }
    }
}

/// What each kind of break is called. Every one is a schedule that somebody could write.
#[test]
fn broken_schedules_are_refused_by_name() {
    let shape = small();
    let base = build(ScheduleKind::Grouped, &shape);
    assert!(check(&base, &shape).is_ok());
    let name = |schedule: &Schedule, shape: &PassShape| {
        let fault = check(schedule, shape).expect_err("broken");
        format!("{fault:?}").split([' ', '{']).next().expect("a name").to_owned()
    };
    // A copy of `base` in which `work` no longer waits for `needed`, by whatever chain: everything else runs as it did.
    let loosened = |kind: ScheduleKind, shape: &PassShape, work: Work, needed: Work| {
        let mut schedule = build(kind, shape);
        let (work, needed) = (position(&schedule, work), position(&schedule, needed));
        schedule.tasks[work.0].after.retain(|after| {
            let order = check(&build(kind, shape), shape).expect("sound");
            *after != needed && !order.orders(needed, *after)
        });
        schedule
    };
    let (b0, b1) = (0, 1);
    let mut cases: Vec<(&str, Schedule, PassShape)> = Vec::new();
    let mut case = |name, schedule| cases.push((name, schedule, shape.clone()));

    let mut broken = base.clone();
    let last = TaskId(broken.tasks.len() - 1);
    broken.tasks[0].after.push(last);
    case("WaitsForLater", broken);

    let mut broken = base.clone();
    broken.tasks.pop();
    case("Missing", broken);

    let mut broken = base.clone();
    broken.tasks.push(broken.tasks[0].clone());
    case("Repeated", broken);

    let mut broken = base.clone();
    broken.tasks.push(Task { work: Work::Embed { micro_batch: 9 }, lane: Lane::Gpu, after: Vec::new() });
    case("NotNeeded", broken);

    let mut broken = base.clone();
    let moved = position(&broken, Work::CpuAttention { layer: 1, micro_batch: b0 });
    broken.tasks[moved.0].lane = Lane::Gpu;
    case("WrongLane", broken);

    let (rows, attention) =
        (Work::RowsToHost { layer: 1, micro_batch: b0 }, Work::CpuAttention { layer: 1, micro_batch: b0 });
    case("ResultNotThere", loosened(ScheduleKind::Grouped, &shape, attention, rows));

    let load = Work::LoadPage { layer: 2, chunk: 1, page: 0 };
    let reader = Work::Experts { layer: 0, group: 2, chunk: 1 };
    case("SlotRewritten", loosened(ScheduleKind::Grouped, &shape, load, reader));

    // Two pages change places on their lane.
    let mut broken = base.clone();
    let first = position(&broken, Work::LoadPage { layer: 0, chunk: 1, page: 0 });
    let second = position(&broken, Work::LoadPage { layer: 0, chunk: 1, page: 1 });
    let (a, b) = (broken.tasks[first.0].work, broken.tasks[second.0].work);
    (broken.tasks[first.0].work, broken.tasks[second.0].work) = (b, a);
    case("PagesOutOfOrder", broken);

    // The streamed chunk before the residents.
    let mut broken = base.clone();
    let first = position(&broken, Work::Experts { layer: 0, group: 0, chunk: 0 });
    let second = position(&broken, Work::Experts { layer: 0, group: 0, chunk: 1 });
    let after = broken.tasks[second.0].after.clone();
    broken.tasks[first.0].work = Work::Experts { layer: 0, group: 0, chunk: 1 };
    broken.tasks[first.0].after.extend(after.into_iter().filter(|after| *after < first));
    broken.tasks[second.0].work = Work::Experts { layer: 0, group: 0, chunk: 0 };
    case("ChunksOutOfOrder", broken);

    // A prompt without decode rows: nothing but the rule keeps its rows from being overwritten.
    let prompt = MicroBatchShape { cpu_attention: false, ..MIXED };
    let mut prompts = PassShape { micro_batches: sharing(2, vec![prompt; 2]), rows: RowPath::Copies, ..shape.clone() };
    prompts.groups = vec![0..1, 1..2];
    let mut case = |name, schedule| cases.push((name, schedule, prompts.clone()));
    let (pre, out) = (Work::PreAttention { layer: 1, micro_batch: b0 }, Work::RowsToHost { layer: 0, micro_batch: b0 });
    case("DeviceRowsOverwritten", loosened(ScheduleKind::Grouped, &prompts, pre, out));
    let (out, store) =
        (Work::RowsToHost { layer: 1, micro_batch: b0 }, Work::CpuAttention { layer: 0, micro_batch: b0 });
    case("HostRowsOverwritten", loosened(ScheduleKind::Grouped, &prompts, out, store));
    // In the last layer nothing else waits for what is stored.
    let (sample, store) = (Work::Sample { micro_batch: b1 }, Work::CpuAttention { layer: 2, micro_batch: b1 });
    let mut broken = build(ScheduleKind::Grouped, &prompts);
    let (sample, store) = (position(&broken, sample), position(&broken, store));
    // The store moves behind the sample on the host's lane.
    let work = broken.tasks[store.0].work;
    broken.tasks[store.0] = broken.tasks[sample.0].clone();
    broken.tasks[store.0].after.clear();
    broken.tasks[sample.0] = Task { work, lane: Lane::Cpu, after: Vec::new() };
    cases.push(("ResultNotThere", broken, prompts.clone()));
    let one = PassShape { micro_batches: vec![prompt; 2], ..prompts.clone() };
    let (upload, attends) =
        (Work::KvToDevice { layer: 0, micro_batch: b1 }, Work::GpuAttention { layer: 0, micro_batch: b0 });
    cases.push(("WorkspaceOverwritten", loosened(ScheduleKind::Grouped, &one, upload, attends), one.clone()));

    // Nothing but pages on the copy lane, so that no other copy orders them by the way.
    let decode = PassShape { micro_batches: vec![DECODE; 3], ..shape.clone() };
    let (experts, page) =
        (Work::Experts { layer: 1, group: 0, chunk: 1 }, Work::LoadPage { layer: 1, chunk: 1, page: 1 });
    cases.push(("PageNotThere", loosened(ScheduleKind::Grouped, &decode, experts, page), decode));

    // FlexGen's barrier: something is launched behind it that does not wait.
    let mut broken = build(ScheduleKind::FlexGen, &prompts);
    let barrier = position(&broken, Work::Barrier { number: 0 });
    let crossing = broken
        .ids()
        .find(|(id, task)| *id > barrier && task.lane == Lane::HostToDevice && task.after.contains(&barrier))
        .map(|(id, _)| id)
        .expect("a copy waits for the barrier");
    broken.tasks[crossing.0].after.retain(|after| *after != barrier);
    cases.push(("BarrierCrossed", broken, prompts.clone()));

    assert!(cases.len() >= 14);
    for (wanted, schedule, shape) in cases {
        assert!(check(&schedule, &shape).is_err(), "{wanted} goes unnoticed:\n{schedule}");
        assert_eq!(name(&schedule, &shape), wanted, "\n{schedule}");
    }
}

/// The printed schedules: layer 1 of three, when the pipeline is full.
#[test]
fn schedules_print_like_this() {
    let shape = PassShape { micro_batches: vec![DECODE; 3], groups: vec![0..1, 1..2, 2..3], ..small() };
    let shape = PassShape { chunks: chunks(false, 4, 8), rows: RowPath::Copies, ..shape };
    let layer_1 = |kind| {
        let text = build(kind, &shape).to_string();
        let lines = text.lines().enumerate().filter(|(number, line)| {
            *number == 0 || line.split_whitespace().nth(1) == Some("1") || line.contains(" page 2.")
        });
        lines.map(|(_, line)| &line[6..]).collect::<Vec<_>>().join("\n")
    };
    insta::assert_snapshot!("cgopipe", layer_1(ScheduleKind::CgoPipe));
    insta::assert_snapshot!("fastdecode", layer_1(ScheduleKind::FastDecode));
    insta::assert_snapshot!("flexgen_c", layer_1(ScheduleKind::FlexGenC));
    insta::assert_snapshot!("grouped", layer_1(ScheduleKind::Grouped));
    let on_gpu = MicroBatchShape { cpu_attention: false, ..MIXED };
    let shape = PassShape { micro_batches: sharing(2, vec![on_gpu; 3]), ..shape.clone() };
    let text = build(ScheduleKind::FlexGen, &shape).to_string();
    let middle: Vec<&str> = text.lines().skip_while(|line| !line.contains("barrier 2")).skip(1).take(24).collect();
    insta::assert_snapshot!("flexgen", middle.iter().map(|line| &line[6..]).collect::<Vec<_>>().join("\n"));
}

/// A device that notes what it is handed, in order; one task may fail.
struct Fake<'s> {
    schedule: &'s Schedule,
    fails: Option<Work>,
    started: Mutex<Vec<(TaskId, Instant)>>,
    /// Something was started.
    changed: Condvar,
    /// The thread that may wait for it: the host's lane.
    host: ThreadId,
}

#[derive(Debug, thiserror::Error)]
#[error("it broke")]
struct Broke;

/// Far longer than it takes to start a few dozen tasks on any machine: then they never would.
const NEVER: Duration = Duration::from_secs(60);

impl<'s> Fake<'s> {
    fn new(schedule: &'s Schedule, fails: Option<Work>) -> Self {
        let host = std::thread::current().id();
        Self { schedule, fails, started: Mutex::default(), changed: Condvar::new(), host }
    }

    /// Blocks until every task of `wanted` has been started.
    fn wait_for(&self, wanted: &[TaskId], meanwhile: &Task) {
        let missing = |started: &[(TaskId, Instant)]| {
            wanted
                .iter()
                .find(|id| started.iter().all(|(other, _)| other != *id))
                .map(|id| self.schedule.task(*id).work)
        };
        let started = self.started.lock().unwrap();
        let waited = self.changed.wait_timeout_while(started, NEVER, |started| missing(started).is_some());
        if let Some(work) = missing(&waited.unwrap().0) {
            panic!("{work} does not start while {} runs, on which it does not depend", meanwhile.work);
        }
    }
}

impl Device for Fake<'_> {
    type Error = Broke;
    type Ticket = usize;

    fn start(&self, id: TaskId, task: &Task, after: &[usize]) -> Result<Started<usize>, Broke> {
        if self.fails == Some(task.work) {
            return Err(Broke);
        }
        let mut started = self.started.lock().unwrap();
        for ticket in after {
            assert_ne!(self.schedule.tasks[*ticket].lane, Lane::Cpu, "results of the host have no ticket");
            assert!(started.iter().any(|(other, _)| other.0 == *ticket), "the device has what {} waits for", task.work);
        }
        started.push((id, Instant::now()));
        self.changed.notify_all();
        Ok(Started::Ticket(id.0))
    }

    fn wait(&self, ticket: usize) -> Result<(), Broke> {
        assert_eq!(std::thread::current().id(), self.host, "no lane of the device waits for the device");
        assert!(self.started.lock().unwrap().iter().any(|(other, _)| other.0 == ticket));
        Ok(())
    }

    fn take_spans(&self, tickets: &[usize]) -> Result<Vec<Option<(Instant, Instant)>>, Broke> {
        let started: HashMap<usize, Instant> =
            self.started.lock().unwrap().iter().map(|(id, at)| (id.0, *at)).collect();
        Ok(tickets.iter().map(|ticket| Some((started[ticket], started[ticket]))).collect())
    }

    fn size(&self, work: Work) -> (u64, usize) {
        (if matches!(work, Work::LoadPage { .. }) { 1000 } else { 0 }, 1)
    }
}

struct FakeHost<'f> {
    fails: Option<Work>,
    done: Vec<Work>,
    device: &'f Fake<'f>,
}

impl Host<Broke> for FakeHost<'_> {
    /// Does not end before the device has been handed all that need not wait for it.
    fn perform(&mut self, id: TaskId, task: &Task) -> Result<(), Broke> {
        if self.fails == Some(task.work) {
            return Err(Broke);
        }
        if self.fails.is_none() && self.device.fails.is_none() {
            let later = that_wait_for(self.device.schedule, id);
            let beside: Vec<TaskId> =
                self.device.schedule.ids().filter(|(_, task)| !task.lane.is_host()).map(|(id, _)| id).collect();
            let beside: Vec<TaskId> = beside.into_iter().filter(|id| !later.contains(id)).collect();
            self.device.wait_for(&beside, task);
            let started = self.device.started.lock().unwrap();
            let early = started.iter().find(|(id, _)| later.contains(id));
            assert!(early.is_none(), "{early:?} starts before the end of {}", task.work);
        }
        self.done.push(task.work);
        Ok(())
    }
}

/// Tasks that cannot start before `id` has ended: what depends on it, what comes after it on its lane, and so on.
fn that_wait_for(schedule: &Schedule, id: TaskId) -> HashSet<TaskId> {
    let mut later = HashSet::from([id]);
    let mut lanes = HashSet::from([schedule.task(id).lane]);
    // In the static order a task comes after what it depends on.
    for (other, task) in schedule.ids().skip_while(|(other, _)| *other != id).skip(1) {
        if lanes.contains(&task.lane) || task.after.iter().any(|after| later.contains(after)) {
            lanes.insert(task.lane);
            later.insert(other);
        }
    }
    later
}

/// Lanes overlap: while a task of the host runs, every task of the device that does not wait for it is started, and none that
/// does. Every dependency is kept, in measured time.
#[test]
fn lanes_run_side_by_side() {
    let shape = small();
    for kind in [ScheduleKind::Grouped, ScheduleKind::CgoPipe] {
        let schedule = build(kind, &shape);
        let fake = Fake::new(&schedule, None);
        let mut host = FakeHost { fails: None, done: Vec::new(), device: &fake };
        let mut carried = Vec::new();
        let timeline =
            run(&schedule, &fake, &mut host, Instant::now(), shape.layers, &mut carried).expect("nothing fails");
        assert_eq!(carried.len(), shape.pages_ahead(), "{kind}: pages of the next pass may go on");
        assert_eq!(timeline.spans.len() + carried.len(), schedule.tasks.len());
        let at: HashMap<TaskId, (Duration, Duration)> =
            timeline.spans.iter().map(|span| (span.task, (span.start, span.end))).collect();
        for (id, task) in schedule.ids().filter(|(id, _)| at.contains_key(id)) {
            for after in &task.after {
                assert!(at[after].1 <= at[&id].0, "{kind}: {} before its time", task.work);
            }
        }
        assert_eq!(timeline.page_bytes(), 1000 * (shape.page_numbers().len() - shape.pages_ahead()) as u64);

        // The next pass finds them loaded, and their times are in its timeline.
        let next = PassShape { loaded_pages: shape.pages_ahead(), ..shape.clone() };
        let schedule = build(kind, &next);
        assert!(check(&schedule, &next).is_ok());
    }
}

/// A task that fails, on whatever lane, is named, and no lane starts anything more.
#[test]
fn a_task_that_fails_is_named_and_stops_all_lanes() {
    let shape = small();
    let schedule = build(ScheduleKind::Grouped, &shape);
    for (work, name) in [
        (Work::PostAttention { layer: 1, micro_batch: 1 }, "post_attention b1 of layer 1"),
        (Work::LoadPage { layer: 1, chunk: 1, page: 0 }, "page 1.1.0 of layer 1"),
        (Work::CpuAttention { layer: 1, micro_batch: 2 }, "attention b2 of layer 1"),
    ] {
        let on_host = matches!(work, Work::CpuAttention { .. });
        let fake = Fake::new(&schedule, (!on_host).then_some(work));
        let mut host = FakeHost { fails: on_host.then_some(work), done: Vec::new(), device: &fake };
        let error = run(&schedule, &fake, &mut host, Instant::now(), shape.layers, &mut Vec::new()).unwrap_err();
        assert_eq!(error.to_string(), format!("{name}: it broke"));
        let started = fake.started.lock().unwrap();
        let started = started.iter().map(|(id, _)| schedule.task(*id).work);
        let ran: Vec<Work> = started.chain(host.done).collect();
        assert!(ran.iter().all(|work| !matches!(work, Work::Sample { .. } | Work::Head { .. })));
    }
}
