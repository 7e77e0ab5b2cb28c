//! What each task of a pass takes, from a [`Profile`]; and what a pass takes, by simulating its schedule.
//!
//! In: what a model, a policy and a profile say, and which rows each micro-batch of a pass has ([`PassRows`]). Out: the
//! [`PassShape`] whose schedule the engine would run, the [`Cost`] of each of its tasks, and the predicted pass.
//!
//! What lanes share – the link, the host's memory – is divided beforehand, over the pass as a whole: where pages take L seconds
//! alone and attention C seconds, and each slows the other down by a measured factor while both run, the two run beside each
//! other for as long as the shorter one lasts ([`beside`]). So a task's cost does not depend on when it runs, and because lanes are
//! static orders, **a task that gets cheaper never makes the pass longer**: more bandwidth is never predicted to be slower.
//! Given up: contention is spread evenly over a pass, also where the schedule bunches it.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use super::fit::{ModelBytes, Plan};
use crate::execute::machine::workspace_block_bytes;
use crate::memory::kv_cache::{BLOCK_TOKENS, KvLayout};
use crate::memory::pages::{Page, PagePlan};
use crate::model::ModelConfig;
use crate::policy::{AttentionPlace, KvDtype, Policy, RowPath, ScheduleKind, SourceKind};
use crate::profile::{CONTENTION_TOKENS, Curve, Profile, RowTimes};
use crate::schedule::{
    ChunkShape, Cost, Lane, MicroBatchShape, OnItsWay, PassShape, Schedule, SimulatedPass, Timeline, Work, build,
    simulate_pass,
};

/// The rows of one micro-batch in one pass.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct RowsOf {
    pub decode: usize,
    /// Tokens that the decode rows attend to, all of them together; and within a sliding window.
    pub context: f64,
    pub context_in_window: f64,
    pub prompt: usize,
    /// The same of the prompt rows.
    pub prompt_context: f64,
    /// Rows that are sampled.
    pub sampled: usize,
    /// KV blocks of a layer that come to the GPU.
    pub uploaded_blocks: usize,
}

impl RowsOf {
    pub fn rows(&self) -> usize {
        self.decode + self.prompt
    }

    fn shape(&self, attention: AttentionPlace, workspace: usize) -> MicroBatchShape {
        let on_gpu = attention == AttentionPlace::Gpu;
        MicroBatchShape {
            gpu_attention: self.prompt > 0 || on_gpu && self.decode > 0,
            cpu_attention: !on_gpu && self.decode > 0,
            kv_to_device: self.uploaded_blocks > 0,
            sampled: self.sampled > 0,
            workspace,
        }
    }
}

/// The rows of a pass: of each micro-batch that has some, and which of them are an expert group.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct PassRows {
    pub micro_batches: Vec<RowsOf>,
    pub groups: Vec<Range<usize>>,
}

impl PassRows {
    /// `decode` rows of mean context `context` and `prompt` rows of prompts of `prompt_len`, spread evenly.
    pub fn spread(
        config: &ModelConfig,
        policy: &Policy,
        decode: f64,
        context: f64,
        prompt: f64,
        prompt_len: f64,
    ) -> Self {
        let n = policy.micro_batches;
        let share = |total: f64, one: usize| {
            let total = total.round() as usize;
            total / n + usize::from(one < total % n)
        };
        let window = config.widest_window().map_or(f64::INFINITY, |window| window as f64);
        let on_gpu = policy.attention == AttentionPlace::Gpu;
        let all: Vec<RowsOf> = (0..n)
            .map(|one| {
                let (decode, prompt) = (share(decode, one), share(prompt, one));
                let finished = prompt as f64 / prompt_len.max(1.0);
                // A prompt in several pieces: later ones see the earlier ones' keys and values.
                let pieces = (prompt_len / policy.prompt_chunk as f64).ceil().max(1.0);
                let stored = finished * prompt_len * (pieces - 1.0) / 2.0;
                let blocks = |tokens: f64| (tokens / BLOCK_TOKENS as f64).ceil();
                let decode_blocks = if on_gpu { decode as f64 * blocks(context) } else { 0.0 };
                RowsOf {
                    decode,
                    context: decode as f64 * context,
                    context_in_window: decode as f64 * context.min(window),
                    prompt,
                    prompt_context: prompt as f64 * (prompt_len + 1.0) / 2.0,
                    sampled: decode + finished.round() as usize,
                    uploaded_blocks: (decode_blocks + blocks(stored)) as usize,
                }
            })
            .collect();
        let group = super::fit::extents(policy).group_size();
        let there: Vec<usize> = (0..n).filter(|one| all[*one].rows() > 0).collect();
        let mut groups = Vec::new();
        let mut start = 0;
        for members in there.chunk_by(|a, b| a / group == b / group) {
            groups.push(start..start + members.len());
            start += members.len();
        }
        PassRows { micro_batches: there.into_iter().map(|one| all[one]).collect(), groups }
    }

    pub fn decode(&self) -> usize {
        self.micro_batches.iter().map(|of| of.decode).sum()
    }

    pub fn prompt(&self) -> usize {
        self.micro_batches.iter().map(|of| of.prompt).sum()
    }
}

/// The shape of a pass: what the engine runs, and what is simulated.
pub fn pass_shape(
    config: &ModelConfig,
    policy: &Policy,
    pages: &PagePlan,
    micro_batches: Vec<MicroBatchShape>,
    groups: Vec<Range<usize>>,
    relay: bool,
) -> PassShape {
    let resident = config.shape.experts - pages.streamed();
    let experts_of = |page: &Page| {
        let experts = page.pieces.iter().map(|piece| piece.expert - resident);
        experts.clone().min().unwrap_or(0)..experts.max().map_or(0, |last| last + 1)
    };
    PassShape {
        layers: config.shape.layers,
        micro_batches,
        groups,
        chunks: pages
            .chunks()
            .iter()
            .map(|chunk| ChunkShape { pages: chunk.pages.iter().map(experts_of).collect() })
            .collect(),
        kept: pages.shape().extra_layers(),
        kept_pages: pages.extra_pages(),
        streamed: pages.streamed(),
        ring: pages.ring(),
        loaded_pages: 0,
        load_ahead: policy.schedule != ScheduleKind::Serial,
        rows: policy.rows,
        relay,
    }
}

/// Why a time cannot be predicted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CostError {
    #[error("the profile has no times of {0} pages, so passes that stream them cannot be predicted")]
    NoPages(SourceKind),
}

/// Seconds that each lane has to work in a pass, whatever the order: no schedule is faster than the longest of them.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize)]
pub struct LaneSeconds {
    pub gpu: f64,
    pub to_device: f64,
    pub to_host: f64,
    pub cpu: f64,
}

impl LaneSeconds {
    pub fn longest(&self) -> f64 {
        self.gpu.max(self.to_device).max(self.to_host).max(self.cpu)
    }

    pub fn of(&self, lane: Lane) -> f64 {
        match lane {
            Lane::Gpu => self.gpu,
            Lane::HostToDevice => self.to_device,
            Lane::DeviceToHost => self.to_host,
            Lane::Cpu => self.cpu,
        }
    }
}

/// Seconds that work of `mine` seconds takes beside other work of `theirs`, where each slows down by its factor while both
/// run: until the shorter one has ended, alone from then on.
///
/// Never less where either has more to do.
pub fn beside(mine: f64, theirs: f64, my_factor: f64, their_factor: f64) -> f64 {
    // The other one ends first: by then `theirs * their_factor / my_factor` of mine is done.
    let longer = mine + theirs * their_factor * (1.0 - 1.0 / my_factor);
    (mine * my_factor).min(longer)
}

/// How the experts of a layer come in pages, and what each of those takes. Many policies share one.
#[derive(Debug)]
pub struct Cut {
    pages: PagePlan,
    /// Seconds of a page, by its number among its layer's, and its bytes. Nothing beside it.
    page_seconds: Vec<f64>,
    page_bytes: Vec<u64>,
    /// Seconds and bytes of the pages of all layers, those left out that some layers never load.
    pass_seconds: f64,
    pass_bytes: u64,
    /// Pages of the chunks in front of each chunk.
    first_page: Vec<usize>,
    relay: bool,
}

/// What a [`Cut`] depends on, beside model and profile.
pub type CutKey = (usize, usize, usize, u64, Option<SourceKind>);

impl Cut {
    pub fn key(plan: &Plan) -> CutKey {
        let Policy { resident_experts, extra_residents, ring_experts, page_bytes, .. } = plan.policy;
        (resident_experts, extra_residents, ring_experts, page_bytes, Cut::source(plan))
    }

    /// Where pages come from, as far as it is known before they are loaded. Without memory for them they are read from their files.
    fn source(plan: &Plan) -> Option<SourceKind> {
        plan.policy.source.or((plan.memory.host_weights == 0).then_some(SourceKind::Staged))
    }

    pub fn new(plan: &Plan, pages: PagePlan, profile: &Profile) -> Result<Cut, CostError> {
        let source = Cut::source(plan);
        let relay = source == Some(SourceKind::Relay);
        let no_times = || CostError::NoPages(source.unwrap_or(SourceKind::Pinned));
        let looked_for = match source {
            // They cross the link as pinned ones.
            Some(SourceKind::Relay | SourceKind::Staged) => Some(SourceKind::Pinned),
            other => other,
        };
        // While some pages are read others cross the link: the slower of the two is what a page takes.
        let disk = match source {
            Some(SourceKind::Staged) => Some(&profile.disk.as_ref().ok_or_else(no_times)?.page_seconds),
            _ => None,
        };
        let all: Vec<&Page> = pages.chunks().iter().flat_map(|chunk| &chunk.pages).collect();
        let mut page_seconds = Vec::with_capacity(all.len());
        if !all.is_empty() {
            let curve = profile.link.pages(looked_for);
            let curve = &curve.ok_or_else(no_times)?.seconds;
            page_seconds.extend(all.iter().map(|page| {
                let read = disk.map_or(0.0, |disk| disk.at(page.bytes() as f64));
                page_time(curve, &profile.link.pieces, page).max(read)
            }));
        }
        let page_bytes: Vec<u64> = all.iter().map(|page| page.bytes()).collect();
        let first_page = pages
            .chunks()
            .iter()
            .scan(0, |sum, chunk| {
                let first = *sum;
                *sum += chunk.pages.len();
                Some(first)
            })
            .collect();
        let (layers, extra) = (pages.shape().layers, pages.shape().extra);
        let left_out: f64 = page_seconds[..pages.extra_pages()].iter().sum();
        let pass_seconds = layers as f64 * page_seconds.iter().sum::<f64>() - extra as f64 * left_out;
        let pass_bytes = pages.bytes_per_pass();
        Ok(Cut { pages, page_seconds, page_bytes, pass_seconds, pass_bytes, first_page, relay })
    }
}

/// Schedules that were built, for passes of the same shape: those of policies that differ in rows alone.
#[derive(Debug, Default)]
pub struct Schedules(Mutex<HashMap<(ScheduleKind, PassShape), Arc<Schedule>>>);

impl Schedules {
    /// So many are kept, then all are forgotten: one has thousands of tasks.
    const MOST: usize = 48;

    fn build(&self, kind: ScheduleKind, shape: PassShape) -> Arc<Schedule> {
        let built = || self.0.lock().expect("nobody panics with it");
        let key = (kind, shape);
        if let Some(schedule) = built().get(&key) {
            return schedule.clone();
        }
        let schedule = Arc::new(build(kind, &key.1));
        let mut built = built();
        if built.len() >= Self::MOST {
            built.clear();
        }
        built.insert(key, schedule.clone());
        schedule
    }
}

/// A model under a policy on a machine: predicts passes.
pub struct Predictor<'a> {
    schedules: Arc<Schedules>,
    config: &'a ModelConfig,
    profile: &'a Profile,
    policy: Policy,
    cut: Arc<Cut>,
    rows: &'a RowTimes,
    /// A layer with a sliding window and one without, where there are such, and how many of each.
    kinds: [(Option<usize>, f64); 2],
}

/// Seconds of work of a kind in a pass, alone.
#[derive(Debug, Clone, Copy, Default)]
struct PassWork {
    pages: f64,
    uploads: f64,
    kernels: f64,
    /// Rows that cross the link: by kernels, or by copies either way.
    row_kernels: f64,
    copies_in: f64,
    copies_out: f64,
    attention: f64,
    /// What the host's lane does beside attending.
    cpu_beside: f64,
}

/// The costs of one pass's tasks.
pub struct PassCosts<'a, 'p> {
    predictor: &'a Predictor<'p>,
    rows: &'a PassRows,
    /// What the work of a kind takes beside what else is in the pass, over what it takes alone.
    pages: f64,
    copies_out: f64,
    kernels: f64,
    row_kernels: f64,
    attention: f64,
}

impl<'a> Predictor<'a> {
    pub fn new(
        config: &'a ModelConfig,
        bytes: &ModelBytes,
        plan: &Plan,
        profile: &'a Profile,
    ) -> Result<Self, CostError> {
        let pages = PagePlan::new(plan.page_shape(config, bytes));
        Ok(Self::with_cut(config, plan, Arc::new(Cut::new(plan, pages, profile)?), profile))
    }

    /// The same with the pages at hand.
    pub fn with_cut(config: &'a ModelConfig, plan: &Plan, cut: Arc<Cut>, profile: &'a Profile) -> Self {
        let policy = plan.policy;
        let rows = match (policy.rows, &profile.gpu.rows_by_kernels) {
            (RowPath::Kernels, Some(kernels)) => kernels,
            _ => &profile.gpu.rows_by_copies,
        };
        let layers = || 0..config.shape.layers;
        let kind = |windowed: bool| {
            let of = || layers().filter(move |layer| config.window(*layer).is_some() == windowed);
            (of().next(), of().count() as f64)
        };
        Self { schedules: Arc::default(), config, profile, policy, cut, rows, kinds: [kind(true), kind(false)] }
    }

    /// The same, with schedules that others have built.
    pub fn sharing(self, schedules: &Arc<Schedules>) -> Self {
        Self { schedules: schedules.clone(), ..self }
    }

    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Bytes of pages that a pass streams.
    pub fn page_bytes(&self) -> f64 {
        self.cut.pass_bytes as f64
    }

    /// Seconds in which those of a pass cross the link, nothing beside them.
    pub fn page_seconds(&self) -> f64 {
        self.cut.pass_seconds
    }

    /// What the decode rows of a pass would take in either place, whatever the policy's is: seconds of attention on the CPU, of attention
    /// on the GPU, and in which their contexts cross the link to it.
    pub fn decode_attention(&self, rows: &PassRows) -> [f64; 3] {
        let layers = self.config.shape.layers as f64;
        let (mut on_cpu, mut on_gpu, mut contexts) = (0.0, 0.0, 0.0);
        for of in rows.micro_batches.iter().filter(|of| of.decode > 0) {
            let context = of.context / of.decode as f64;
            on_cpu +=
                self.kinds.iter().map(|(layer, n)| layer.map_or(0.0, |layer| n * self.attends(of, layer))).sum::<f64>();
            on_gpu += layers * self.profile.gpu.decode_attention.at(of.decode as f64, context);
            let blocks = of.decode as f64 * (context / BLOCK_TOKENS as f64).ceil();
            contexts += layers * blocks * self.profile.link.pieces.at(workspace_block_bytes(self.config) as f64);
        }
        [on_cpu, on_gpu, contexts]
    }

    /// Bytes of keys and values that a layer's attention of a micro-batch reads.
    fn attended_bytes(&self, of: &RowsOf, layer: usize) -> f64 {
        let shape = &self.config.shape;
        let layout = KvLayout::new(shape, self.policy.kv_dtype);
        let tokens = if self.config.window(layer).is_some() { of.context_in_window } else { of.context };
        tokens * (layout.block_bytes() / BLOCK_TOKENS) as f64
    }

    /// The same of a whole pass, where the CPU attends.
    pub fn attended_on_cpu(&self, rows: &PassRows) -> f64 {
        if self.policy.attention == AttentionPlace::Gpu {
            return 0.0;
        }
        let layers = 0..self.config.shape.layers;
        layers.map(|layer| rows.micro_batches.iter().map(|of| self.attended_bytes(of, layer)).sum::<f64>()).sum()
    }

    /// Seconds of attention on the CPU alone.
    fn cpu_attention(&self, of: &RowsOf, layer: usize) -> f64 {
        if self.policy.attention == AttentionPlace::Gpu { 0.0 } else { self.attends(of, layer) }
    }

    /// The same if the CPU attends.
    fn attends(&self, of: &RowsOf, layer: usize) -> f64 {
        let bytes = self.attended_bytes(of, layer);
        if bytes == 0.0 {
            return 0.0;
        }
        let context = of.context / of.decode as f64;
        bytes / self.profile.cpu.attention_rate(self.policy.kv_dtype, self.policy.threads, context)
    }

    /// The same over all layers, which differ by their window alone.
    fn cpu_attention_of_all(&self, of: &RowsOf) -> f64 {
        self.kinds.iter().map(|(layer, n)| layer.map_or(0.0, |layer| n * self.cpu_attention(of, layer))).sum()
    }

    /// What the host's lane does beside attending: being woken, storing, waking others.
    fn cpu_beside(&self, of: &RowsOf) -> f64 {
        let Profile { gpu, cpu, host, .. } = self.profile;
        gpu.wait_seconds + cpu.task_seconds + cpu.store.at(of.rows() as f64) + host.task_seconds
    }

    fn gpu_attention(&self, of: &RowsOf) -> f64 {
        let gpu = &self.profile.gpu;
        let mut seconds = 0.0;
        if of.prompt > 0 {
            // A row of a prompt sees half of it on average.
            seconds += gpu.prompt_attention.at(of.prompt as f64, 2.0 * of.prompt_context / of.prompt as f64);
        }
        if self.policy.attention == AttentionPlace::Gpu && of.decode > 0 {
            seconds += gpu.decode_attention.at(of.decode as f64, of.context / of.decode as f64);
        }
        seconds
    }

    /// Keys and values of prompt rows cross without queries.
    fn rows_to_host(&self, of: &RowsOf) -> f64 {
        let shape = &self.config.shape;
        let (kv, q) = (shape.kv_width() as f64, shape.q_width() as f64);
        let on_cpu = self.policy.attention == AttentionPlace::Cpu;
        let queries = if on_cpu { of.decode as f64 } else { 0.0 };
        self.rows.to_host.at((of.rows() as f64 * kv + queries * q) / (kv + q))
    }

    fn rows_to_device(&self, of: &RowsOf) -> f64 {
        self.rows.to_device.at(of.decode as f64)
    }

    fn upload(&self, of: &RowsOf) -> f64 {
        of.uploaded_blocks as f64 * self.profile.link.pieces.at(workspace_block_bytes(self.config) as f64)
    }

    fn group_rows(rows: &PassRows, group: usize) -> usize {
        rows.micro_batches[rows.groups[group].clone()].iter().map(RowsOf::rows).sum()
    }

    fn experts(&self, rows: usize, chunk: usize) -> f64 {
        let gpu = &self.profile.gpu;
        let all = gpu.experts.at(rows as f64);
        if self.cut.pages.chunks().len() == 1 {
            return all;
        }
        let share = self.cut.pages.chunks()[chunk].experts.len() as f64 / self.config.shape.experts as f64;
        all * share + gpu.experts_part.at(rows as f64)
    }

    /// What a pass has to do, by kind of work, alone.
    fn work(&self, rows: &PassRows) -> PassWork {
        let layers = self.config.shape.layers as f64;
        let gpu = &self.profile.gpu;
        let on_cpu = self.policy.attention == AttentionPlace::Cpu;
        let mut work = PassWork { pages: self.cut.pass_seconds, ..PassWork::default() };
        let (mut rows_in, mut rows_out) = (0.0, 0.0);
        for of in &rows.micro_batches {
            let n = of.rows() as f64;
            work.kernels += gpu.embed.at(n) + gpu.head.at(of.sampled as f64);
            work.kernels += layers * (gpu.pre_attention.at(n) + gpu.post_attention.at(n) + self.gpu_attention(of));
            rows_out += layers * self.rows_to_host(of);
            rows_in += layers * if on_cpu { self.rows_to_device(of) } else { 0.0 };
            work.uploads += layers * self.upload(of);
            work.attention += self.cpu_attention_of_all(of);
            work.cpu_beside += layers * self.cpu_beside(of);
        }
        for group in 0..rows.groups.len() {
            let n = Self::group_rows(rows, group);
            work.kernels +=
                layers * (0..self.cut.pages.chunks().len()).map(|chunk| self.experts(n, chunk)).sum::<f64>();
        }
        match self.policy.rows {
            RowPath::Kernels => work.row_kernels = rows_in + rows_out,
            RowPath::Copies => (work.copies_in, work.copies_out) = (rows_in, rows_out),
        }
        work
    }

    /// What each lane has to do in a pass, alone.
    pub fn lanes(&self, rows: &PassRows) -> LaneSeconds {
        let work = self.work(rows);
        LaneSeconds {
            gpu: work.kernels + work.row_kernels,
            to_device: work.pages + work.copies_in + work.uploads,
            to_host: work.copies_out,
            cpu: work.attention + work.cpu_beside,
        }
    }

    /// The same beside what else is in the pass: no schedule of it is faster than the longest.
    pub fn lanes_beside(&self, rows: &PassRows) -> LaneSeconds {
        let work = self.work(rows);
        let costs = self.costs_of(rows, &work);
        LaneSeconds {
            gpu: costs.kernels * work.kernels + costs.row_kernels * work.row_kernels,
            to_device: costs.pages * (work.pages + work.uploads) + work.copies_in,
            to_host: costs.copies_out * work.copies_out,
            cpu: costs.attention * work.attention + work.cpu_beside,
        }
    }

    /// The costs of a pass's tasks, what lanes share divided among them.
    pub fn costs<'b>(&'b self, rows: &'b PassRows) -> PassCosts<'b, 'a> {
        self.costs_of(rows, &self.work(rows))
    }

    fn costs_of<'b>(&'b self, rows: &'b PassRows, work: &PassWork) -> PassCosts<'b, 'a> {
        let PassWork { pages, attention, kernels, row_kernels, copies_out, .. } = *work;
        let c = &self.profile.contention;
        let over = |seconds: f64, alone: f64| if alone > 0.0 { seconds / alone } else { 1.0 };
        // Short contexts, and those of 8 bits, ask less of the host's memory than what this was measured with.
        let (threads, tokens) = (self.policy.threads, CONTENTION_TOKENS as f64);
        let most = self.profile.cpu.attention_rate(KvDtype::F16, threads, tokens);
        let share = self.attended_on_cpu(rows) / attention.max(1e-12) / most;
        let (pages_factor, attention_factor) = c.of_attention(share);
        let beside_attention = beside(pages, attention, pages_factor, attention_factor);
        let beside_kernels = beside(pages, kernels, c.pages_beside_kernels, c.kernels_beside_pages);
        let link = &self.profile.link;
        let beside_copies = beside(pages, copies_out, link.to_device_beside_to_host, link.to_host_beside_to_device);
        // What rows take of the link is not there for pages: kernels are on it for that long.
        let crossing = match self.policy.rows {
            RowPath::Copies => 0.0,
            RowPath::Kernels => self.row_bytes_to_device(rows) * link.to_host.at(1e8) / 1e8,
        };
        let beside_pages = |mine: f64, factor: f64, theirs: f64| over(beside(mine, pages, factor, theirs), mine);
        PassCosts {
            predictor: self,
            rows,
            pages: over(beside_attention, pages)
                * over(beside_kernels, pages)
                * over(beside_copies, pages)
                * over(pages + crossing, pages),
            copies_out: beside_pages(copies_out, link.to_host_beside_to_device, link.to_device_beside_to_host),
            kernels: beside_pages(kernels, c.kernels_beside_pages, c.pages_beside_kernels),
            row_kernels: beside_pages(row_kernels, c.rows_beside_pages, 1.0),
            attention: beside_pages(attention, attention_factor, pages_factor),
        }
    }

    /// Bytes of attention output that a pass brings to the device.
    fn row_bytes_to_device(&self, rows: &PassRows) -> f64 {
        if self.policy.attention == AttentionPlace::Gpu {
            return 0.0;
        }
        let shape = &self.config.shape;
        4.0 * (shape.q_width() * shape.layers * rows.decode()) as f64
    }

    /// The shape of a pass, its first pages loaded by the one before as far as `loaded` says.
    pub fn shape(&self, rows: &PassRows, layers: usize, loaded: bool) -> PassShape {
        let workspace = |number: usize| number % self.policy.workspaces;
        let numbered = rows.micro_batches.iter().enumerate();
        let micro_batches = numbered.map(|(number, of)| of.shape(self.policy.attention, workspace(number))).collect();
        let mut shape =
            pass_shape(self.config, &self.policy, &self.cut.pages, micro_batches, rows.groups.clone(), self.cut.relay);
        shape.layers = layers;
        if loaded {
            shape.loaded_pages = shape.pages_ahead();
        }
        shape
    }

    /// What the host does between two passes: the schedule, built and checked.
    pub fn between(&self, tasks: usize) -> f64 {
        self.profile.host.schedule.at(tasks as f64) + 4.0 * self.profile.host.task_seconds
    }

    /// One pass as simulated: on the schedule that runs, with pages on their way from the pass before.
    pub fn simulate(&self, rows: &PassRows, shape: &PassShape, on_their_way: &[OnItsWay]) -> (SimulatedPass, usize) {
        let costs = self.costs(rows);
        let schedule = build(self.policy.schedule, shape);
        let pass = simulate_pass(&schedule, shape.layers, |work| costs.of(work), on_their_way);
        (pass, schedule.tasks.len())
    }

    /// A pass among others like it, in seconds: simulated with the pages that the one before left on their way.
    ///
    /// Layers in the middle repeat each other, so a few of them are simulated and the others added, where the last few took
    /// exactly the same; else all of them.
    pub fn pass_seconds(&self, rows: &PassRows) -> f64 {
        if rows.micro_batches.is_empty() {
            return 0.0;
        }
        let layers = self.config.shape.layers;
        let per_layer = self.cut.pages.streamed().max(1);
        let few = 6 + 2 * self.cut.pages.ring().div_ceil(per_layer);
        // Where some layers keep one more expert no layer is like the one before.
        if few < layers
            && self.policy.extra_residents == 0
            && let Some(seconds) = self.steady_pass(rows, few, layers)
        {
            return seconds;
        }
        self.steady_pass(rows, layers, layers).expect("nothing is left out")
    }

    /// The same with `few` of the layers; None where they do not repeat each other.
    fn steady_pass(&self, rows: &PassRows, few: usize, layers: usize) -> Option<f64> {
        let (costs, schedule) =
            (self.costs(rows), self.schedules.build(self.policy.schedule, self.shape(rows, few, true)));
        let (mut pass, mut tasks, mut way) = (SimulatedPass::default(), schedule.tasks.len(), Vec::new());
        // What one pass leaves on its way the next one leaves too, after one or two.
        for _ in 0..5 {
            let before = std::mem::take(&mut way);
            pass = simulate_pass(&schedule, few, |work| costs.of(work), &before);
            way = std::mem::take(&mut pass.on_their_way);
            if same(&before, &way) {
                break;
            }
        }
        let mut seconds = pass.seconds;
        if few < layers {
            let ends = layer_ends(&pass.timeline, few);
            let steps: Vec<f64> = ends.windows(2).map(|pair| pair[1] - pair[0]).collect();
            let middle = &steps[steps.len() - 4..steps.len() - 1];
            let step = middle.iter().sum::<f64>() / middle.len() as f64;
            if middle.iter().any(|one| (one - step).abs() > 1e-6 * step.max(1e-9) + 2e-9) {
                return None;
            }
            seconds += step * (layers - few) as f64;
            tasks = tasks * layers / few;
        }
        Some(seconds + self.between(tasks))
    }

    /// The timeline of a pass among others like it, all layers.
    pub fn timeline(&self, rows: &PassRows) -> Timeline {
        let layers = self.config.shape.layers;
        let first = self.simulate(rows, &self.shape(rows, layers, false), &[]).0;
        self.simulate(rows, &self.shape(rows, layers, true), &first.on_their_way).0.timeline
    }
}

fn same(one: &[OnItsWay], other: &[OnItsWay]) -> bool {
    let close = |(a, b): (&OnItsWay, &OnItsWay)| a.page == b.page && (a.seconds - b.seconds).abs() < 1e-9;
    one.len() == other.len() && one.iter().zip(other).all(close)
}

/// When the last experts of each layer had run.
fn layer_ends(timeline: &Timeline, layers: usize) -> Vec<f64> {
    let mut ends = vec![0.0f64; layers];
    for span in &timeline.spans {
        if let Work::Experts { layer, .. } = span.work {
            ends[layer] = ends[layer].max(span.end.as_secs_f64());
        }
    }
    ends
}

/// Seconds of one page: as a copy of its size; one of many small pieces as those take.
fn page_time(whole: &Curve, pieces: &Curve, page: &Page) -> f64 {
    const SMALL: f64 = 1e6;
    let bytes = page.bytes() as f64;
    let n = page.pieces.len() as f64;
    let at_once = whole.at(bytes);
    if bytes / n < SMALL { at_once.max(n * pieces.at(bytes / n)) } else { at_once }
}

impl PassCosts<'_, '_> {
    /// What a task takes.
    pub fn of(&self, work: Work) -> Cost {
        let Predictor { profile, policy, .. } = self.predictor;
        let (gpu, predictor) = (&profile.gpu, self.predictor);
        let of = |micro_batch: usize| &self.rows.micro_batches[micro_batch];
        let rows = |micro_batch: usize| of(micro_batch).rows() as f64;
        let kernel = |seconds: f64, n: usize| Cost { rows: n, ..Cost::alone(self.kernels * seconds) };
        let by_rows = |curve: &Curve, micro_batch: usize| kernel(curve.at(rows(micro_batch)), of(micro_batch).rows());
        let crossing = |seconds: f64, micro_batch: usize| {
            // A copy is waited for by another queue; a kernel stands in line.
            let seconds = match policy.rows {
                RowPath::Copies => seconds + profile.link.small_seconds,
                RowPath::Kernels => self.row_kernels * seconds,
            };
            Cost { rows: of(micro_batch).rows(), ..Cost::alone(seconds) }
        };
        let page_number = |chunk: usize, page: usize| predictor.cut.first_page[chunk] + page;
        match work {
            Work::Embed { micro_batch } => by_rows(&gpu.embed, micro_batch),
            Work::PreAttention { micro_batch, .. } => by_rows(&gpu.pre_attention, micro_batch),
            Work::PostAttention { micro_batch, .. } => by_rows(&gpu.post_attention, micro_batch),
            Work::GpuAttention { micro_batch, .. } => {
                kernel(predictor.gpu_attention(of(micro_batch)), of(micro_batch).rows())
            }
            Work::RowsToHost { micro_batch, .. } => {
                let copies = if policy.rows == RowPath::Copies { self.copies_out } else { 1.0 };
                crossing(copies * predictor.rows_to_host(of(micro_batch)), micro_batch)
            }
            Work::RowsToDevice { micro_batch, .. } => crossing(predictor.rows_to_device(of(micro_batch)), micro_batch),
            Work::CpuAttention { layer, micro_batch } => {
                let of = of(micro_batch);
                let seconds = self.attention * predictor.cpu_attention(of, layer) + predictor.cpu_beside(of);
                Cost { rows: of.rows(), ..Cost::alone(seconds) }
            }
            Work::KvToDevice { micro_batch, .. } => {
                let bytes = of(micro_batch).uploaded_blocks as u64 * workspace_block_bytes(predictor.config);
                Cost { bytes, ..Cost::alone(self.pages * predictor.upload(of(micro_batch))) }
            }
            Work::LoadPage { chunk, page, .. } => {
                let number = page_number(chunk, page);
                let seconds = self.pages * predictor.cut.page_seconds[number];
                Cost { bytes: predictor.cut.page_bytes[number], ..Cost::alone(seconds) }
            }
            Work::PinPage { chunk, page, .. } => {
                // Read and written by the one thread that launches.
                let rate = profile.cpu.dram_read.points()[0].1;
                let bytes = predictor.cut.page_bytes[page_number(chunk, page)];
                Cost { bytes, ..Cost::alone(2.0 * bytes as f64 / rate) }
            }
            Work::Experts { group, chunk, .. } => {
                let rows = Predictor::group_rows(self.rows, group);
                kernel(predictor.experts(rows, chunk), rows)
            }
            Work::Head { micro_batch } => {
                let of = of(micro_batch);
                kernel(gpu.head.at(of.sampled as f64), of.rows())
            }
            Work::Sample { micro_batch } => {
                Cost { rows: of(micro_batch).rows(), ..Cost::alone(profile.host.task_seconds) }
            }
            Work::Barrier { .. } => Cost::alone(gpu.wait_seconds),
        }
    }
}
