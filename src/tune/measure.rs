//! Kernels on made-up data: checked on sampled elements, then timed.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::{NARROW, Operation, Tile};
use crate::checkpoint::Dtype;
use crate::gpu::{Buffer, Gpu, GpuError, Pipelines, Recorder, Slice, Variant};
use crate::kernels::half_rows::{self, ByExpert, HalfRows, groups, padded};
use crate::kernels::slabs::{N_SLABS, Place};
use crate::kernels::{cooperative, expert_down, expert_gate_up, expert_sort, matmul, probes};

/// One kernel on one shape.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Reading {
    pub operation: Operation,
    /// Of the matrices: outputs x terms, and their dtype.
    pub shape: String,
    pub rows: usize,
    /// The tile; None: the portable kernel.
    pub tile: Option<Tile>,
    pub seconds: f64,
    /// Multiplications and additions.
    pub operations: f64,
    /// Weights that the rows need, each once, with rows in and out.
    pub bytes: f64,
    /// Of the sampled elements, the worst error against what f16 operands may be off by. Above 1 the kernel is wrong.
    pub worst_error: f64,
}

/// Wraps what can go wrong with what was tried.
#[derive(Debug, thiserror::Error)]
pub enum MeasureError {
    #[error(transparent)]
    Gpu(#[from] GpuError),
    #[error("{what} gives {got} where {wanted} is right: {error:.1} times what its operands' rounding allows")]
    Wrong { what: String, got: f64, wanted: f64, error: f64 },
}

/// Median seconds of what `record` records, each of `samples` times over `repeats` of it in one submission, by the device's clock
/// where it has one.
pub fn time(
    pipelines: &Pipelines,
    (samples, repeats): (usize, usize),
    mut record: impl FnMut(&mut Recorder<'_>, usize) -> Result<(), GpuError>,
) -> Result<f64, GpuError> {
    let gpu = pipelines.gpu();
    let mut times = Vec::with_capacity(samples);
    for sample in 0..=samples {
        let mut recorder = Recorder::timed(pipelines);
        for repeat in 0..repeats {
            record(&mut recorder, sample * repeats + repeat)?;
        }
        let start = Instant::now();
        let ticket = recorder.submit_after(&[])?;
        gpu.wait_for(ticket)?;
        let waited = start.elapsed();
        let spans = gpu.take_spans(&[ticket])?;
        gpu.reap()?;
        let span = spans[0].map_or(waited, |(start, end)| end - start);
        times.push(span.as_secs_f64() / repeats as f64);
    }
    // The first one compiles and warms up.
    times.remove(0);
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

/// So many repeats that a sample takes about `target` seconds, by one trial.
fn repeats(
    pipelines: &Pipelines,
    target: f64,
    record: &mut impl FnMut(&mut Recorder<'_>, usize) -> Result<(), GpuError>,
) -> Result<usize, GpuError> {
    let once = time(pipelines, (1, 1), &mut *record)?;
    Ok(((target / once.max(1e-6)) as usize).clamp(1, 50))
}

pub(super) fn timed(
    pipelines: &Pipelines,
    mut record: impl FnMut(&mut Recorder<'_>, usize) -> Result<(), GpuError>,
) -> Result<f64, GpuError> {
    // Compiles, if nobody has yet.
    let mut repeats = self::repeats(pipelines, 4e-3, &mut record)?;
    let last = *LAST_TIMED.lock().expect("a plain value");
    if last.is_none_or(|last| last.elapsed() > Duration::from_millis(100)) {
        warm_up(pipelines)?;
        repeats = self::repeats(pipelines, 4e-3, &mut record)?;
    }
    let seconds = time(pipelines, (5, repeats), record)?;
    *LAST_TIMED.lock().expect("a plain value") = Some(Instant::now());
    Ok(seconds)
}

/// When the last of what was [`timed`] ended.
static LAST_TIMED: Mutex<Option<Instant>> = Mutex::new(None);

/// Keeps a GPU busy for a second. One that idled, while memory was taken or a kernel compiled, was seen (an H200) to take two to eight times
/// as long for everything in the half second after that. CPUs do not need it.
fn warm_up(pipelines: &Pipelines) -> Result<(), GpuError> {
    if pipelines.gpu().summary().kind == "cpu" {
        return Ok(());
    }
    let buffer = pipelines.gpu().buffer("warm-up", 256 << 20)?;
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(1) {
        let mut recorder = Recorder::new(pipelines);
        for seed in 0..16 {
            probes::fill(&mut recorder, Dtype::F32, seed, 1.0, buffer.whole())?;
        }
        recorder.submit()?;
        pipelines.gpu().wait()?;
    }
    Ok(())
}

pub(super) fn filled(
    pipelines: &Pipelines,
    what: &str,
    dtype: Dtype,
    elements: u64,
    seed: u32,
    amplitude: f32,
) -> Result<Buffer, GpuError> {
    let bytes = elements * dtype.size_bytes() as u64;
    let buffer = pipelines.gpu().buffer(what, bytes)?;
    let mut recorder = Recorder::new(pipelines);
    probes::fill(&mut recorder, dtype, seed, amplitude, buffer.whole())?;
    recorder.submit()?;
    pipelines.gpu().wait()?;
    Ok(buffer)
}

fn floats(gpu: &Gpu, slices: &[Slice<'_>], dtype: Dtype) -> Result<Vec<Vec<f32>>, GpuError> {
    Ok(gpu.read_many(slices)?.iter().map(|bytes| dtype.read_all(bytes)).collect())
}

/// Indices spread over `0..n` without a pattern that tiles could have.
pub(super) fn spread(i: usize, n: usize) -> usize {
    if i == 0 { n - 1 } else { i.wrapping_mul(0x9e37_79b9).wrapping_add(0x7f4a_7c15) % 0x7fff_ffff % n }
}

/// A sum of products and what it may be off by: operands are rounded to 11 bits, each product is off by up to 2^-11, and independent of
/// the others; sums of f32.
fn dot(x: &[f32], w: &[f32]) -> (f64, f64) {
    let (mut sum, mut squares, mut magnitudes) = (0.0, 0.0, 0.0);
    for (x, w) in x.iter().zip(w) {
        let product = *x as f64 * *w as f64;
        sum += product;
        squares += product * product;
        magnitudes += product.abs();
    }
    (sum, 2f64.powi(-9) * f64::sqrt(squares) + 2f64.powi(-19) * magnitudes)
}

/// How many elements of each answer are checked.
const SAMPLES: usize = 24;

struct Check {
    what: String,
    worst: f64,
}

impl Check {
    fn element(&mut self, got: f32, wanted: f64, allowed: f64) -> Result<(), MeasureError> {
        let error = (got as f64 - wanted).abs() / allowed;
        if error <= 1.0 {
            self.worst = self.worst.max(error);
            return Ok(());
        }
        Err(MeasureError::Wrong { what: self.what.clone(), got: got as f64, wanted, error })
    }
}

/// A dense matrix with room for rows.
pub struct Dense<'p> {
    pipelines: &'p Pipelines,
    n_out: usize,
    n_in: usize,
    weights: Dtype,
    /// Several of the matrix, so that none is still in a cache when its turn comes.
    w: Vec<Buffer>,
    x: Buffer,
    halves: Buffer,
    scales: Buffer,
    y: Buffer,
}

impl<'p> Dense<'p> {
    /// Up to `rows` rows; copies of the matrix take about `cold_bytes` in all.
    pub fn new(
        pipelines: &'p Pipelines,
        (n_out, n_in): (usize, usize),
        weights: Dtype,
        rows: usize,
        cold_bytes: u64,
    ) -> Result<Self, GpuError> {
        let gpu = pipelines.gpu();
        let elements = (n_out * n_in) as u64;
        let copies = cold_bytes.div_ceil(elements * weights.size_bytes() as u64).clamp(1, 16);
        let w = (0..copies)
            .map(|copy| filled(pipelines, "matrix", weights, elements, 7 + copy as u32, 0.1))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            pipelines,
            n_out,
            n_in,
            weights,
            w,
            x: filled(pipelines, "rows", Dtype::F32, (rows * n_in) as u64, 3, 2.0)?,
            halves: gpu.buffer("rows of f16", (rows as u64) * padded(n_in as u32) as u64 * 2)?,
            scales: gpu.buffer("scales of rows", rows as u64 * 4)?,
            y: gpu.buffer("products", (rows * n_out) as u64 * 4)?,
        })
    }

    fn halves(&self) -> HalfRows<'_> {
        HalfRows { rows: self.halves.whole(), scales: self.scales.whole() }
    }

    /// `rows` of them to f16.
    pub fn halve(&self, recorder: &mut Recorder<'_>, rows: usize) -> Result<(), GpuError> {
        let params = half_rows::Params::dense(rows as u32, self.n_in as u32);
        half_rows::record(recorder, params, self.x.whole(), self.halves())
    }

    /// `rows` of them with `tile`, or with the portable kernel.
    pub fn measure(&self, tile: Option<Tile>, rows: usize) -> Result<Reading, MeasureError> {
        let (n_rows, n_out, n_in) = (rows as u32, self.n_out as u32, self.n_in as u32);
        let halves = self.halves();
        let product = |recorder: &mut Recorder<'_>, w: &Buffer| match tile {
            Some(tile) => {
                let params = cooperative::matmul::Params::dense(n_rows, n_out, n_in);
                cooperative::matmul::record(recorder, self.weights, tile, params, halves, w.whole(), self.y.whole())
            }
            None => {
                let params = matmul::Params::dense(n_rows, n_out, n_in);
                let variant = portable(self.weights, rows);
                matmul::record(recorder, &variant, params, self.x.whole(), w.whole(), self.y.whole())
            }
        };
        let mut recorder = Recorder::new(self.pipelines);
        self.halve(&mut recorder, rows)?;
        product(&mut recorder, &self.w[0])?;
        recorder.submit()?;
        let worst_error = self.check(tile, rows)?;
        let seconds = timed(self.pipelines, |recorder, i| product(recorder, &self.w[i % self.w.len()]))?;
        let elements = (self.n_out * self.n_in) as f64;
        Ok(Reading {
            operation: if (self.n_out as u32) < NARROW { Operation::NarrowMatmul } else { Operation::Matmul },
            shape: format!("{}x{} {}", self.n_out, self.n_in, self.weights.name()),
            rows,
            tile,
            seconds,
            operations: 2.0 * rows as f64 * elements,
            bytes: elements * self.weights.size_bytes() as f64
                + rows as f64 * (2.0 * self.n_in as f64 + 4.0 * self.n_out as f64),
            worst_error,
        })
    }

    fn check(&self, tile: Option<Tile>, rows: usize) -> Result<f64, MeasureError> {
        let gpu = self.pipelines.gpu();
        let row_bytes = self.n_in as u64 * self.weights.size_bytes() as u64;
        let places: Vec<_> = (0..SAMPLES).map(|i| (spread(i, rows), spread(i + 100, self.n_out))).collect();
        let (mut x, mut w, mut y) = (Vec::new(), Vec::new(), Vec::new());
        for (row, column) in &places {
            let (row, column) = (*row as u64, *column as u64);
            let (n_in, n_out) = (self.n_in as u64, self.n_out as u64);
            x.push(self.x.slice(4 * row * n_in..4 * (row + 1) * n_in));
            w.push(self.w[0].slice(column * row_bytes..(column + 1) * row_bytes));
            y.push(self.y.slice(4 * (row * n_out + column)..4 * (row * n_out + column + 1)));
        }
        let (x, y) = (floats(gpu, &x, Dtype::F32)?, floats(gpu, &y, Dtype::F32)?);
        let w = floats(gpu, &w, self.weights)?;
        let mut check = Check { what: named("matmul", tile, rows), worst: 0.0 };
        for i in 0..SAMPLES {
            let (wanted, allowed) = dot(&x[i], &w[i]);
            check.element(y[i][0], wanted, allowed)?;
        }
        Ok(check.worst)
    }
}

fn named(kernel: &str, tile: Option<Tile>, rows: usize) -> String {
    match tile {
        Some(tile) => format!("{kernel} of {rows} rows, {tile}"),
        None => format!("portable {kernel} of {rows} rows"),
    }
}

/// The portable kernels' tile for so many rows: the default one, or a GPU's.
fn portable(weights: Dtype, rows: usize) -> Variant {
    let variant = Variant::new(weights);
    if rows > 16 { variant.with("TILE_ROWS", 64) } else { variant }
}

/// Extents of one layer's experts.
#[derive(Debug, Clone, Copy)]
pub struct ExpertShape {
    pub experts: usize,
    pub chosen: usize,
    pub d_model: usize,
    pub expert_width: usize,
}

/// One layer's experts with room for rows.
pub struct Experts<'p> {
    pipelines: &'p Pipelines,
    shape: ExpertShape,
    weights: Dtype,
    gate: Buffer,
    up: Buffer,
    down: Buffer,
    places: Buffer,
    x: Buffer,
    halves: Buffer,
    scales: Buffer,
    chosen: Buffer,
    offsets: Buffer,
    permutation: Buffer,
    h: Buffer,
    h_halves: Buffer,
    h_scales: Buffer,
    /// Rows by expert, for tiles that want them so: of x, and hidden ones.
    x_groups: Buffer,
    x_group_scales: Buffer,
    h_groups: Buffer,
    h_group_scales: Buffer,
    y: Buffer,
}

impl<'p> Experts<'p> {
    pub fn new(pipelines: &'p Pipelines, shape: ExpertShape, weights: Dtype, rows: usize) -> Result<Self, GpuError> {
        let gpu = pipelines.gpu();
        let ExpertShape { experts, chosen, d_model, expert_width } = shape;
        let elements = (experts * d_model * expert_width) as u64;
        let matrix = |what, seed| filled(pipelines, what, weights, elements, seed, 0.05);
        let words = (d_model * expert_width) as u32 * weights.size_bytes() as u32 / 4;
        let places: Vec<Place> =
            (0..experts as u32).map(|expert| Place { slab: 0, offset_words: expert * words }).collect();
        let assignments = (rows * chosen) as u64;
        let half_bytes = |rows: u64, n: usize| rows * padded(n as u32) as u64 * 2;
        let group_rows = 16 * groups(assignments as u32, experts as u32) as u64;
        Ok(Self {
            pipelines,
            shape,
            weights,
            gate: matrix("gate", 11)?,
            up: matrix("up", 12)?,
            down: matrix("down", 13)?,
            places: gpu.buffer_with("places", bytemuck::cast_slice(&places))?,
            x: filled(pipelines, "rows", Dtype::F32, (rows * d_model) as u64, 3, 2.0)?,
            halves: gpu.buffer("rows of f16", half_bytes(rows as u64, d_model))?,
            scales: gpu.buffer("scales of rows", rows as u64 * 4)?,
            chosen: gpu.buffer("chosen experts", assignments * 4)?,
            offsets: gpu.buffer("offsets", (experts as u64 + 1) * 4)?,
            permutation: gpu.buffer("permutation", assignments * 4)?,
            h: gpu.buffer("hidden rows", assignments * expert_width as u64 * 4)?,
            h_halves: gpu.buffer("hidden rows of f16", half_bytes(assignments, expert_width))?,
            h_scales: gpu.buffer("scales of hidden rows", assignments * 4)?,
            x_groups: gpu.buffer("rows by expert", half_bytes(group_rows, d_model))?,
            x_group_scales: gpu.buffer("scales of rows by expert", assignments * 4)?,
            h_groups: gpu.buffer("hidden rows by expert", half_bytes(group_rows, expert_width))?,
            h_group_scales: gpu.buffer("scales of hidden rows by expert", assignments * 4)?,
            y: gpu.buffer("products", assignments * d_model as u64 * 4)?,
        })
    }

    /// Chooses experts for `rows` rows with the given loads, sorts, and makes the rows' f16. Returns the offsets and the
    /// permutation.
    pub fn route(&self, rows: usize, loads: &[f64]) -> Result<(Vec<u32>, Vec<u32>), GpuError> {
        let ExpertShape { experts, chosen, .. } = self.shape;
        let mut random = 0x1234_5678_9abc_def1u64;
        let mut ids = Vec::with_capacity(rows * chosen);
        for _ in 0..rows {
            // The largest of load-weighted exponential draws: without replacement, in proportion to the loads.
            let mut draws: Vec<(f64, u32)> = (0..experts as u32)
                .map(|expert| {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    let unit = ((random >> 11) as f64 + 1.0) / (1u64 << 53) as f64;
                    (unit.ln() / loads[expert as usize].max(1e-9), expert)
                })
                .collect();
            draws.sort_by(|a, b| b.0.total_cmp(&a.0));
            ids.extend(draws[..chosen].iter().map(|(_, expert)| *expert));
        }
        let gpu = self.pipelines.gpu();
        gpu.write(&self.chosen, 0, bytemuck::cast_slice(&ids));
        let mut recorder = Recorder::new(self.pipelines);
        let params = expert_sort::Params { n_assignments: ids.len() as u32, n_experts: experts as u32 };
        let permutation = self.permutation.slice(0..4 * ids.len() as u64);
        expert_sort::record(&mut recorder, params, self.chosen.whole(), self.offsets.whole(), permutation)?;
        self.halve(&mut recorder, false, rows)?;
        self.halve(&mut recorder, true, rows)?;
        recorder.submit()?;
        let read = gpu.read_many(&[self.offsets.whole(), permutation])?;
        Ok((bytemuck::pod_collect_to_vec(&read[0]), bytemuck::pod_collect_to_vec(&read[1])))
    }

    fn x_halves(&self, by_expert: bool) -> HalfRows<'_> {
        match by_expert {
            true => HalfRows { rows: self.x_groups.whole(), scales: self.x_group_scales.whole() },
            false => HalfRows { rows: self.halves.whole(), scales: self.scales.whole() },
        }
    }

    fn h_halves(&self, by_expert: bool) -> HalfRows<'_> {
        match by_expert {
            true => HalfRows { rows: self.h_groups.whole(), scales: self.h_group_scales.whole() },
            false => HalfRows { rows: self.h_halves.whole(), scales: self.h_scales.whole() },
        }
    }

    fn order<'a>(&'a self, permutation: Option<(Slice<'a>, u32)>) -> ByExpert<'a> {
        let n_experts = self.shape.experts as u32;
        ByExpert { n_experts, experts: [0, n_experts], offsets: self.offsets.whole(), permutation }
    }

    /// Rows to f16, as they come or by expert.
    pub fn halve(&self, recorder: &mut Recorder<'_>, by_expert: bool, rows: usize) -> Result<(), GpuError> {
        let ExpertShape { chosen, d_model, .. } = self.shape;
        let (x, halves) = (self.x.whole(), self.x_halves(by_expert));
        let n_rows = if by_expert { rows * chosen } else { rows };
        let params = half_rows::Params::dense(n_rows as u32, d_model as u32);
        match by_expert {
            true => {
                let order = self.order(Some((self.permutation.whole(), chosen as u32)));
                half_rows::record_by_expert(recorder, params, order, x, halves)
            }
            false => half_rows::record(recorder, params, x, halves),
        }
    }

    /// Hidden rows to f16, as they come or by expert.
    pub fn halve_hidden(
        &self,
        recorder: &mut Recorder<'_>,
        by_expert: bool,
        assignments: usize,
    ) -> Result<(), GpuError> {
        let params = half_rows::Params::dense(assignments as u32, self.shape.expert_width as u32);
        let (h, halves) = (self.h.whole(), self.h_halves(by_expert));
        match by_expert {
            true => half_rows::record_by_expert(recorder, params, self.order(None), h, halves),
            false => half_rows::record(recorder, params, h, halves),
        }
    }

    pub fn gate_up(&self, recorder: &mut Recorder<'_>, tile: Option<Tile>, rows: usize) -> Result<(), GpuError> {
        let ExpertShape { experts, chosen, d_model, expert_width } = self.shape;
        let [n, e, a, d, f] = [rows * chosen, experts, chosen, d_model, expert_width].map(|n| n as u32);
        let params = expert_gate_up::Params::plain(n, e, a, d, f);
        let (gate, up) = ([self.gate.whole(); N_SLABS], [self.up.whole(); N_SLABS]);
        let (permutation, offsets, places) = (self.permutation.whole(), self.offsets.whole(), self.places.whole());
        let (h, bias) = (self.h.whole(), self.places.whole());
        match tile {
            Some(tile) => {
                let x = self.x_halves(tile.takes_rows_by_expert());
                let bindings = expert_gate_up::Bindings { x, permutation, offsets, places, h, gate, up, bias };
                cooperative::expert_gate_up::record(recorder, (self.weights, true), tile, params, bindings)
            }
            None => {
                let x = self.x.whole();
                let bindings = expert_gate_up::Bindings { x, permutation, offsets, places, h, gate, up, bias };
                expert_gate_up::record(recorder, &portable(self.weights, rows * chosen / experts), params, bindings)
            }
        }
    }

    pub fn down(&self, recorder: &mut Recorder<'_>, tile: Option<Tile>, rows: usize) -> Result<(), GpuError> {
        let ExpertShape { experts, chosen, d_model, expert_width } = self.shape;
        let [n, e, d, f] = [rows * chosen, experts, d_model, expert_width].map(|n| n as u32);
        let params = expert_down::Params::plain(n, e, d, f);
        let down = [self.down.whole(); N_SLABS];
        let (permutation, offsets, places) = (self.permutation.whole(), self.offsets.whole(), self.places.whole());
        let (y, bias) = (self.y.whole(), self.places.whole());
        match tile {
            Some(tile) => {
                let h = self.h_halves(tile.takes_rows_by_expert());
                let bindings = expert_down::Bindings { h, permutation, offsets, places, y, down, bias };
                cooperative::expert_down::record(recorder, (self.weights, true), tile, params, bindings)
            }
            None => {
                let h = self.h.whole();
                let bindings = expert_down::Bindings { h, permutation, offsets, places, y, down, bias };
                expert_down::record(recorder, &portable(self.weights, rows * chosen / experts), params, bindings)
            }
        }
    }

    fn reading(
        &self,
        operation: Operation,
        tile: Option<Tile>,
        rows: usize,
        offsets: &[u32],
        timed: (f64, f64),
    ) -> Reading {
        let ExpertShape { chosen, d_model, expert_width, .. } = self.shape;
        let (d, f, n) = (d_model as f64, expert_width as f64, (rows * chosen) as f64);
        let used = offsets.windows(2).filter(|pair| pair[0] < pair[1]).count() as f64;
        let dtype = self.weights.name();
        let (shape, matrices, io) = match operation {
            Operation::GateUp => (format!("{expert_width}x{d_model} {dtype}"), 2.0, n * (2.0 * d + 4.0 * f)),
            _ => (format!("{d_model}x{expert_width} {dtype}"), 1.0, n * (2.0 * f + 4.0 * d)),
        };
        Reading {
            operation,
            shape,
            rows,
            tile,
            seconds: timed.0,
            operations: 2.0 * n * d * f * matrices,
            bytes: used * d * f * matrices * self.weights.size_bytes() as f64 + io,
            worst_error: timed.1,
        }
    }

    /// The first half of the experts over `rows` rows, routed as `routing` says.
    pub fn measure_gate_up(
        &self,
        tile: Option<Tile>,
        rows: usize,
        routing: &(Vec<u32>, Vec<u32>),
    ) -> Result<Reading, MeasureError> {
        let mut recorder = Recorder::new(self.pipelines);
        self.gate_up(&mut recorder, tile, rows)?;
        recorder.submit()?;
        let gpu = self.pipelines.gpu();
        let ExpertShape { chosen, d_model, expert_width, .. } = self.shape;
        let places = self.places(&routing.0, rows * chosen, expert_width);
        let (mut x, mut gate, mut up, mut h) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (position, expert, feature) in &places {
            let row = routing.1[*position] as u64 / chosen as u64;
            let d = d_model as u64;
            x.push(self.x.slice(4 * row * d..4 * (row + 1) * d));
            gate.push(self.weight_row(&self.gate, expert * expert_width + feature, d_model));
            up.push(self.weight_row(&self.up, expert * expert_width + feature, d_model));
            let at = 4 * (position * expert_width + feature) as u64;
            h.push(self.h.slice(at..at + 4));
        }
        let (x, h) = (floats(gpu, &x, Dtype::F32)?, floats(gpu, &h, Dtype::F32)?);
        let (gate, up) = (floats(gpu, &gate, self.weights)?, floats(gpu, &up, self.weights)?);
        let mut check = Check { what: named("expert_gate_up", tile, rows), worst: 0.0 };
        for i in 0..SAMPLES {
            let ((gate, gate_off), (up, up_off)) = (dot(&x[i], &gate[i]), dot(&x[i], &up[i]));
            let silu = gate / (1.0 + (-gate).exp());
            let allowed = 1.1 * gate_off * up.abs() + up_off * (silu.abs() + gate_off) + 1e-5 * (silu * up).abs();
            check.element(h[i][0], silu * up, allowed)?;
        }
        let seconds = timed(self.pipelines, |recorder, _| self.gate_up(recorder, tile, rows))?;
        Ok(self.reading(Operation::GateUp, tile, rows, &routing.0, (seconds, check.worst)))
    }

    /// The second half, over what hidden rows there are.
    pub fn measure_down(
        &self,
        tile: Option<Tile>,
        rows: usize,
        routing: &(Vec<u32>, Vec<u32>),
    ) -> Result<Reading, MeasureError> {
        let ExpertShape { chosen, d_model, expert_width, .. } = self.shape;
        let mut recorder = Recorder::new(self.pipelines);
        self.halve_hidden(&mut recorder, tile.is_some_and(|tile| tile.takes_rows_by_expert()), rows * chosen)?;
        self.down(&mut recorder, tile, rows)?;
        recorder.submit()?;
        let gpu = self.pipelines.gpu();
        let places = self.places(&routing.0, rows * chosen, d_model);
        let (mut h, mut down, mut y) = (Vec::new(), Vec::new(), Vec::new());
        for (position, expert, output) in &places {
            let f = expert_width as u64;
            h.push(self.h.slice(4 * *position as u64 * f..4 * (*position as u64 + 1) * f));
            down.push(self.weight_row(&self.down, expert * d_model + output, expert_width));
            let at = 4 * (routing.1[*position] as u64 * d_model as u64 + *output as u64);
            y.push(self.y.slice(at..at + 4));
        }
        let (h, y) = (floats(gpu, &h, Dtype::F32)?, floats(gpu, &y, Dtype::F32)?);
        let down = floats(gpu, &down, self.weights)?;
        let mut check = Check { what: named("expert_down", tile, rows), worst: 0.0 };
        for i in 0..SAMPLES {
            let (wanted, allowed) = dot(&h[i], &down[i]);
            check.element(y[i][0], wanted, allowed)?;
        }
        let seconds = timed(self.pipelines, |recorder, _| self.down(recorder, tile, rows))?;
        Ok(self.reading(Operation::Down, tile, rows, &routing.0, (seconds, check.worst)))
    }

    /// Sampled (position, its expert, output).
    fn places(&self, offsets: &[u32], positions: usize, outputs: usize) -> Vec<(usize, usize, usize)> {
        (0..SAMPLES)
            .map(|i| {
                let position = spread(i, positions);
                let expert = offsets.partition_point(|offset| *offset as usize <= position) - 1;
                (position, expert, spread(i + 100, outputs))
            })
            .collect()
    }

    fn weight_row<'b>(&self, buffer: &'b Buffer, row: usize, n: usize) -> Slice<'b> {
        let bytes = n as u64 * self.weights.size_bytes() as u64;
        buffer.slice(row as u64 * bytes..(row as u64 + 1) * bytes)
    }
}

/// What the device can do at most, measured in the same run.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub struct Ceilings {
    /// Bytes/s of a streaming read in loads of 64 and of 128 bits.
    pub read_64: f64,
    pub read_128: f64,
    /// Bytes/s read and written by a copy.
    pub copy: f64,
    /// f32 operations/s of multiply-adds in registers.
    pub fma: f64,
    /// f16 operations/s of cooperative matrices in registers.
    pub cooperative: Option<f64>,
}

impl Ceilings {
    /// Over `bytes` of memory; `steps` of arithmetic in each of `workgroups`.
    pub fn measure(pipelines: &Pipelines, bytes: u64, workgroups: u32, steps: u32) -> Result<Self, GpuError> {
        let gpu = pipelines.gpu();
        let data = filled(pipelines, "data to read", Dtype::F32, bytes / 4, 5, 1.0)?;
        let other = gpu.buffer("copied data", bytes)?;
        let sums = gpu.buffer("sums", 4096)?;
        let rate = |amount: f64, seconds: f64| amount / seconds;
        let read = |wide| {
            let seconds = timed(pipelines, |recorder, _| probes::read(recorder, wide, data.whole(), sums.whole()))?;
            Ok::<_, GpuError>(rate(bytes as f64, seconds))
        };
        let (read_64, read_128) = (read(false)?, read(true)?);
        let seconds = timed(pipelines, |recorder, _| probes::copy(recorder, data.whole(), other.whole()))?;
        let copy = rate(2.0 * bytes as f64, seconds);
        let mut operations = 0.0;
        let seconds = timed(pipelines, |recorder, _| {
            operations = probes::fma(recorder, workgroups, steps, sums.whole())?;
            Ok(())
        })?;
        let fma = rate(operations, seconds);
        let cooperative = match gpu.cooperative() {
            false => None,
            true => {
                let seconds = timed(pipelines, |recorder, _| {
                    operations = probes::cooperative(recorder, workgroups, steps, sums.whole())?;
                    Ok(())
                })?;
                Some(rate(operations, seconds))
            }
        };
        Ok(Self { read_64, read_128, copy, fma, cooperative })
    }

    /// Seconds that a reading would take at these rates.
    pub fn least_seconds(&self, reading: &Reading) -> f64 {
        let arithmetic = match reading.tile {
            Some(_) => self.cooperative.unwrap_or(self.fma),
            None => self.fma,
        };
        (reading.operations / arithmetic).max(reading.bytes / self.read_128.max(self.read_64))
    }
}
