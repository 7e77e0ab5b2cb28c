//! The stages of a layer on the GPU: those that the engine runs, over rows.

use std::sync::Arc;
use std::time::Duration;

use super::link::Copies;
use super::{CalibrateError, Request, grid, steady};
use crate::checkpoint::{Synthetic, Weights};
use crate::execute::Machine;
use crate::execute::machine::{Attended, DeviceRows, NO_SLOT};
use crate::gpu::{GpuError, Pipelines, Recorder, Ticket};
use crate::kernels::copy_rows;
use crate::memory::kv_cache::{BLOCK_TOKENS, KvLayout};
use crate::memory::pages::PagePlan;
use crate::model::ModelConfig;
use crate::plan::{MachineLimits, ModelBytes, PlanError, Wishes, extents, fit};
use crate::policy::{AttentionPlace, KvDtype, RowPath, ScheduleKind};
use crate::profile::{Contention, Curve, Gpu as GpuTimes, RowTimes, Surface};
use crate::tune::Tiles;

/// One layer of made-up weights of a model's sizes.
pub fn one_layer(config: &ModelConfig) -> Weights {
    let mut config = config.clone();
    config.keep_layers(1);
    Weights::Synthetic(Synthetic::new(config))
}

/// Contexts that decode attention is measured with; the last ones only where the model and the device have room.
const CONTEXTS: [usize; 3] = [128, 512, 2048];
/// Most rows of a stage that are measured; beyond them time is in proportion.
const MOST_ROWS: usize = 4096;
/// The same where the adapter is a CPU.
const MOST_ROWS_SOFTWARE: usize = 256;

/// A layer on the device, twice: all its experts in one task, and in two, with rows that cross the link by kernels (where they
/// reach host memory) and by copies.
pub struct Stages {
    whole: Machine,
    parts: Machine,
    config: ModelConfig,
    /// Most rows, and most KV blocks that attention can see.
    most_rows: usize,
    most_blocks: usize,
    software: bool,
}

impl Stages {
    pub fn open(
        request: &Request<'_>,
        pipelines: &Arc<Pipelines>,
        weights: &Weights,
    ) -> Result<Stages, CalibrateError> {
        let config = weights.config().clone();
        let software = request.software();
        let mut rows = if software { MOST_ROWS_SOFTWARE } else { MOST_ROWS };
        let by_kernels = request.gpu.kernels_reach_host();
        loop {
            let path = if by_kernels { RowPath::Kernels } else { RowPath::Copies };
            let opened = open(request, pipelines, weights, rows, config.shape.experts, path).and_then(|whole| {
                // A model of one expert has no parts.
                let half = (config.shape.experts / 2).max(1);
                Ok((whole, open(request, pipelines, weights, rows, half, RowPath::Copies)?))
            });
            match opened {
                Ok((whole, parts)) => {
                    let most_blocks = whole.extents().workspace_blocks;
                    return Ok(Stages { whole, parts, config, most_rows: rows, most_blocks, software });
                }
                // Fewer rows take less memory and narrower bindings.
                Err(CalibrateError::Plan(PlanError::Memory { .. } | PlanError::Binding { .. })) if rows > 64 => {
                    rows /= 2
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// `rows` rows that attend nowhere and are all sampled.
    fn plain_rows(&self, rows: usize) -> DeviceRows {
        let vocab = self.config.shape.vocab as u32;
        DeviceRows {
            // Spread over the vocabulary, so that rows choose different experts.
            ids: (0..rows as u32).map(|row| row.wrapping_mul(2_654_435_761) % vocab).collect(),
            positions: vec![0; rows],
            kv_slots: vec![NO_SLOT; rows],
            sampled: (0..rows as u32).collect(),
            ..DeviceRows::default()
        }
    }

    /// `rows` sequences of `context` tokens each, whose last token attends.
    fn decode_rows(&self, rows: usize, context: usize) -> DeviceRows {
        let blocks = context.div_ceil(BLOCK_TOKENS);
        DeviceRows {
            positions: vec![context as u32 - 1; rows],
            decode: (0..rows).map(|row| Attended { row, position: context - 1, blocks_at: row * blocks }).collect(),
            block_table: (0..(rows * blocks) as u32).collect(),
            ..self.plain_rows(rows)
        }
    }

    /// Prompts of `length` tokens, `rows` rows in all.
    fn prompt_rows(&self, rows: usize, length: usize) -> DeviceRows {
        let blocks = length.div_ceil(BLOCK_TOKENS);
        let place = |row: usize| (row / length, row % length);
        DeviceRows {
            positions: (0..rows).map(|row| place(row).1 as u32).collect(),
            prompt: (0..rows)
                .map(|row| Attended { row, position: place(row).1, blocks_at: place(row).0 * blocks })
                .collect(),
            block_table: (0..(rows.div_ceil(length) * blocks) as u32).collect(),
            ..self.plain_rows(rows)
        }
    }

    pub fn measure(
        &mut self,
        request: &Request<'_>,
        copies: &mut Copies,
        progress: &mut dyn FnMut(&str),
    ) -> Result<(GpuTimes, Contention), CalibrateError> {
        let point = request.point();
        let rising =
            |what: &'static str, points| Curve::rising(points).map_err(|cause| CalibrateError::Curve { what, cause });
        // By stage: embed, pre, post, experts in one, half of them, head, rows to and from the host twice.
        let mut points: [Vec<(f64, f64)>; 10] = Default::default();
        for rows in row_grid(self.most_rows) {
            let plain = self.plain_rows(rows);
            self.whole.begin(0, plain.clone(), rows);
            self.parts.begin(0, plain, rows);
            let (whole, parts) = (&self.whole, &self.parts);
            // Rows that the stages after find there.
            run(whole, 1, || whole.embed(0, &[]))?;
            run(parts, 1, || parts.embed(0, &[]))?;
            let times = [
                stage(whole, point, || whole.embed(0, &[]))?,
                stage(whole, point, || whole.pre_attention(0, 0, &[]))?,
                stage(whole, point, || whole.post_attention(0, 0, &[]))?,
                stage(whole, point, || whole.experts(0, 0, 0, &[]))?,
                {
                    run(parts, 1, || parts.pre_attention(0, 0, &[]))?;
                    run(parts, 1, || parts.post_attention(0, 0, &[]))?;
                    stage(parts, point, || parts.experts(0, 0, 0, &[]))?
                },
                head(whole, point)?,
                stage(whole, point, || whole.rows_to_host(0, &[]))?,
                stage(whole, point, || whole.rows_to_device(0, &[]))?,
                stage(parts, point, || parts.rows_to_host(0, &[]))?,
                stage(parts, point, || parts.rows_to_device(0, &[]))?,
            ];
            for (points, seconds) in points.iter_mut().zip(times) {
                points.push((rows as f64, seconds));
            }
        }
        progress("attention on the GPU");
        let (decode_attention, prompt_attention) = self.attention(point)?;
        progress("stages beside copies");
        let contention = self.beside(request, copies)?;
        let [embed, pre, post, experts, half, head, kernels_out, kernels_in, copies_out, copies_in] = points;
        // What two halves take more than the whole.
        let in_half = self.parts.plan().chunks()[0].experts.len() as f64 / self.config.shape.experts as f64;
        let part = experts.iter().zip(&half).map(|(whole, half)| (whole.0, (half.1 - in_half * whole.1).max(0.0)));
        let by_copies = |[out, back]: [Vec<(f64, f64)>; 2]| -> Result<RowTimes, CalibrateError> {
            Ok(RowTimes { to_host: rising("rows to the host", out)?, to_device: rising("rows to the device", back)? })
        };
        let (submit_seconds, wait_seconds) = self.latency(point)?;
        let times = GpuTimes {
            copy_bytes_per_s: self.copy_rate(point)?,
            submit_seconds,
            wait_seconds,
            embed: rising("embedding", embed)?,
            pre_attention: rising("projections in front of attention", pre)?,
            post_attention: rising("projections behind attention", post)?,
            experts: rising("experts", experts.clone())?,
            experts_part: rising("parts of the experts", part.collect())?,
            head: rising("the LM head", head)?,
            rows_by_copies: by_copies([copies_out, copies_in])?,
            rows_by_kernels: match self.whole.extents().rows {
                RowPath::Kernels => Some(by_copies([kernels_out, kernels_in])?),
                RowPath::Copies => None,
            },
            decode_attention,
            prompt_attention,
        };
        Ok((times, contention))
    }

    /// Decode and prompt attention, as far as the workspace has room.
    fn attention(&mut self, point: Duration) -> Result<(Surface, Surface), CalibrateError> {
        let longest = self.whole.extents().max_positions;
        let mut surfaces = Vec::new();
        for prompts in [false, true] {
            let mut curves = Vec::new();
            for length in CONTEXTS.into_iter().filter(|length| *length <= longest) {
                let blocks = length.div_ceil(BLOCK_TOKENS);
                let most_sequences = (self.most_blocks / blocks).max(1);
                // A prompt is measured whole: so many rows at least.
                let first = if prompts { length } else { 1 };
                let most = if prompts { most_sequences * length } else { most_sequences }.min(self.most_rows);
                if first > most {
                    continue;
                }
                let mut points = Vec::new();
                for rows in grid(first as f64, 4.0, most as f64).into_iter().map(|rows| rows as usize) {
                    let of = if prompts { self.prompt_rows(rows, length) } else { self.decode_rows(rows, length) };
                    self.whole.begin(0, of, 0);
                    let whole = &self.whole;
                    run(whole, 1, || whole.embed(0, &[]))?;
                    points.push((rows as f64, stage(whole, point, || whole.gpu_attention(0, 0, &[]))?));
                }
                let curve = Curve::rising(points)
                    .map_err(|cause| CalibrateError::Curve { what: "attention on the GPU", cause })?;
                curves.push((length as f64, curve));
            }
            let surface = Surface::try_from(curves)
                .map_err(|cause| CalibrateError::Curve { what: "attention on the GPU", cause })?;
            surfaces.push(surface);
        }
        let prompt = surfaces.pop().expect("two surfaces");
        Ok((surfaces.pop().expect("two surfaces"), prompt))
    }

    /// An interval between submissions that do next to nothing, and the wait for one beyond it.
    fn latency(&mut self, point: Duration) -> Result<(f64, f64), CalibrateError> {
        let plain = self.plain_rows(1);
        self.whole.begin(0, plain, 1);
        let whole = &self.whole;
        let submit = stage(whole, point, || whole.post_attention(0, 0, &[]))?.min(stage(whole, point, || {
            // A submission with hardly anything in it.
            Recorder::timed(whole.pipelines()).submit_after(&[])
        })?);
        let round = steady(point, |n| {
            (0..n).try_for_each(|_| run(whole, 1, || Recorder::timed(whole.pipelines()).submit_after(&[])))
        })?;
        Ok((submit, (round - submit).max(0.0)))
    }

    /// Bytes read and written per second by a copying kernel.
    fn copy_rate(&self, point: Duration) -> Result<f64, CalibrateError> {
        let gpu = self.whole.gpu();
        let most: u64 = if self.software { 16 << 20 } else { 512 << 20 };
        let bytes = most.min(gpu.max_binding_bytes()) / 4096 * 4096;
        let (from, to) = (gpu.buffer("to copy from", bytes)?, gpu.buffer("to copy to", bytes)?);
        let row_words = 1024;
        let params = copy_rows::Params {
            n_rows: ((bytes / 4) as u32 / row_words).min(gpu.max_workgroups()),
            row_words,
            from_stride: row_words,
            to_stride: row_words,
        };
        let copied = 4.0 * f64::from(params.n_rows) * f64::from(row_words);
        let seconds = stage(&self.whole, point, || {
            let mut recorder = Recorder::timed(self.whole.pipelines());
            copy_rows::record(&mut recorder, params, from.whole(), to.whole())?;
            recorder.submit_after(&[])
        })?;
        Ok(2.0 * copied / seconds)
    }

    /// What kernels and pages lose beside each other.
    fn beside(&mut self, request: &Request<'_>, copies: &Copies) -> Result<Contention, CalibrateError> {
        let point = request.point();
        let rows = self.most_rows.min(512);
        let plain = self.plain_rows(rows);
        self.whole.begin(0, plain, rows);
        let whole = &self.whole;
        run(whole, 1, || whole.embed(0, &[]))?;
        run(whole, 1, || whole.pre_attention(0, 0, &[]))?;
        run(whole, 1, || whole.post_attention(0, 0, &[]))?;
        let page = copies.page_seconds();
        let experts = || stage(whole, point, || whole.experts(0, 0, 0, &[]));
        let rows = || {
            let there = stage(whole, point, || whole.rows_to_host(0, &[]))?;
            Ok(there + stage(whole, point, || whole.rows_to_device(0, &[]))?)
        };
        let (experts_alone, rows_alone): (f64, f64) = (experts()?, rows()?);
        let (experts_beside, page_beside) = copies.beside(experts)?;
        let (rows_beside, _) = copies.beside(rows)?;
        Ok(Contention {
            kernels_beside_pages: (experts_beside / experts_alone).max(1.0),
            pages_beside_kernels: page_beside.map_or(1.0, |beside| (beside / page).max(1.0)),
            rows_beside_pages: (rows_beside / rows_alone).max(1.0),
            ..Contention::NONE
        })
    }
}

/// Few rows closely (they fill tiles), many rows in steps that interpolate.
fn row_grid(most: usize) -> Vec<usize> {
    let all = [1, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072];
    all.into_iter().filter(|rows| *rows < most).chain([most]).collect()
}

/// A machine of one micro-batch, with so many experts of the layer on the device and one slot for the others.
fn open(
    request: &Request<'_>,
    pipelines: &Arc<Pipelines>,
    weights: &Weights,
    rows: usize,
    resident: usize,
    path: RowPath,
) -> Result<Machine, CalibrateError> {
    let config = weights.config();
    let bytes = ModelBytes::of(weights.inventory());
    let shape = &config.shape;
    let longest = CONTEXTS[CONTEXTS.len() - 1].min(config.max_positions);
    let block_bytes = KvLayout::new(shape, KvDtype::F16).block_bytes() as u64;
    // Keys and values of more sequences than caches hold.
    let contexts: u64 = if request.software() { 4 } else { 64 };
    let limits = MachineLimits {
        device_bytes: request.device_bytes.saturating_sub(request.gpu.taken_bytes()),
        host_bytes: request.host_bytes,
        binding_bytes: request.gpu.max_binding_bytes(),
        threads: 1,
        kernels_reach_host: request.gpu.kernels_reach_host(),
        cooperative: request.gpu.cooperative(),
    };
    let wishes = Wishes {
        schedule: Some(ScheduleKind::Grouped),
        max_sequences: Some(rows),
        micro_batches: Some(1),
        expert_groups: Some(1),
        pass_rows: Some(rows),
        attention: Some(AttentionPlace::Gpu),
        max_model_len: Some(longest),
        kv_bytes: Some(contexts * longest.div_ceil(BLOCK_TOKENS) as u64 * block_bytes),
        resident_experts: Some(resident),
        ring_experts: (resident < shape.experts).then_some(1),
        rows: Some(path),
        precision: Some(request.precision),
        ..Wishes::default()
    };
    let plan = fit(config, &bytes, &limits, &wishes)?;
    let pages = PagePlan::new(plan.page_shape(config, &bytes));
    // Nothing is uploaded, so nothing has to be staged.
    let tiles = Tiles::for_device(&request.gpu);
    Ok(Machine::open(pipelines.clone(), weights, pages, extents(&plan.policy), tiles, true, None, &mut |_, _| {})?)
}

/// `n` submissions, waited for.
fn run(
    machine: &Machine,
    n: usize,
    mut submit: impl FnMut() -> Result<Ticket, GpuError>,
) -> Result<(), CalibrateError> {
    let gpu = machine.gpu();
    gpu.begin_pass();
    let mut last = None;
    for _ in 0..n {
        last = Some(submit()?);
    }
    last.map_or(Ok(()), |ticket| gpu.wait_for(ticket))?;
    gpu.end_pass();
    Ok(())
}

/// Seconds of one stage, back to back with others like it.
fn stage(
    machine: &Machine,
    most: Duration,
    mut submit: impl FnMut() -> Result<Ticket, GpuError>,
) -> Result<f64, CalibrateError> {
    let seconds = steady(most, |n| run(machine, n, &mut submit))?;
    // Lets go of what the clock and the submissions kept.
    machine.gpu().take_spans(&[])?;
    machine.gpu().reap()?;
    Ok(seconds)
}

/// The LM head over all rows; it waits for itself.
fn head(machine: &Machine, most: Duration) -> Result<f64, CalibrateError> {
    let gpu = machine.gpu();
    let seconds = steady(most, |n| {
        gpu.begin_pass();
        (0..n).try_for_each(|_| machine.head(0, &[], &[]).map(|_| ()))?;
        gpu.end_pass();
        Ok::<(), GpuError>(())
    })?;
    gpu.take_spans(&[])?;
    gpu.reap()?;
    Ok(seconds)
}
