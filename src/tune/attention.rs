//! Attention on the device over made-up sequences: checked against the reference, then timed.

use super::measure::{MeasureError, filled, spread, timed};
use crate::checkpoint::Dtype;
use crate::gpu::{Buffer, GpuError, Pipelines, Recorder};
use crate::kernels::cooperative::prompt_attention::Cut;
use crate::kernels::decode_attention::{self, Parts, Scratch, parts_of};
use crate::kernels::paged_attention::{Bindings, Row, Shape as Attention};
use crate::kernels::{BLOCK_TOKENS, cooperative, prompt_attention};
use crate::model::{AttentionShape, Shape};
use crate::reference::attention::attention;

/// One way to attend over one set of sequences.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Reading {
    pub kernel: &'static str,
    pub sequences: usize,
    pub rows: usize,
    pub seconds: f64,
    /// Pairs of a row and a token that it sees.
    pub pairs: f64,
    /// Multiplications and additions of those pairs, in all query heads.
    pub operations: f64,
    /// K and V of every sequence, once.
    pub bytes: f64,
    /// Of the sampled heads, the greatest difference from the reference.
    pub worst_error: f32,
}

/// Sequences of `lengths` tokens, whose keys and values are on the device.
pub struct Sequences<'p> {
    pipelines: &'p Pipelines,
    shape: Attention,
    lengths: Vec<usize>,
    /// Entry of the table where each begins.
    tables: Vec<u32>,
    block_table: Buffer,
    kv_blocks: Buffer,
}

/// How far an output may be off where operands are f32: scores of size 10 or so, sums of values below 1.
const ALLOWED: f32 = 1.0 / (1 << 12) as f32;

/// Where they are f16: queries of size 4 put each term of a score off by up to 4 * 2^-12, weights are rounded to 11 bits.
const HALF_ALLOWED: f32 = 1.0 / (1 << 7) as f32;

/// Heads that are checked.
const SAMPLES: usize = 12;

impl<'p> Sequences<'p> {
    pub fn new(pipelines: &'p Pipelines, shape: &Shape, lengths: &[usize]) -> Result<Self, GpuError> {
        let tables: Vec<u32> = lengths
            .iter()
            .scan(0, |next, length| {
                let first = *next;
                *next += length.div_ceil(BLOCK_TOKENS) as u32;
                Some(first)
            })
            .collect();
        let n_blocks: usize = lengths.iter().map(|length| length.div_ceil(BLOCK_TOKENS)).sum();
        // A step that shares no factor with the number of blocks: none is followed by its neighbour.
        let step = (n_blocks / 3..).find(|step| gcd(*step, n_blocks) == 1).expect("1 more than a multiple shares none");
        let table: Vec<u32> = (0..n_blocks).map(|block| (block * step % n_blocks) as u32).collect();
        let elements = n_blocks * BLOCK_TOKENS * 2 * shape.kv_width();
        let attention = Attention {
            q_heads: shape.q_heads as u32,
            kv_heads: shape.kv_heads as u32,
            head_width: shape.head_width as u32,
            q_stride: shape.qkv_width() as u32,
            window: 0,
            scale: 1.0 / (shape.head_width as f32).sqrt(),
            has_sinks: false,
        };
        Ok(Self {
            pipelines,
            shape: attention,
            lengths: lengths.to_vec(),
            tables,
            block_table: pipelines.gpu().buffer_with("block table", bytemuck::cast_slice(&table))?,
            kv_blocks: filled(pipelines, "keys and values", Dtype::F16, elements as u64, 17, 1.0)?,
        })
    }

    /// Of their heads.
    pub fn shape(&self) -> &Attention {
        &self.shape
    }

    /// All tokens as rows of prompts; with cooperative matrices where a cut is given that fits.
    pub fn measure_prompts(&self, cut: Option<Cut>) -> Result<Reading, MeasureError> {
        let rows: Vec<Row> = self
            .lengths
            .iter()
            .zip(&self.tables)
            .flat_map(|(length, table)| (0..*length as u32).map(|position| (position, *table)))
            .zip(0..)
            .map(|((position, first_block), row)| Row { row, position, first_block })
            .collect();
        let shape = &self.shape;
        let cut = cut.filter(|cut| cut.fits(shape));
        let tile_tokens = cut.map_or_else(|| prompt_attention::tile_tokens(shape), |cut| cut.tile_tokens(shape));
        let tiles = prompt_attention::tiles(&rows, tile_tokens);
        let list = self.pipelines.gpu().buffer_with("tiles", bytemuck::cast_slice(&tiles))?;
        let tiles = (list.whole(), tiles.len());
        match cut {
            Some(cut) => self.measure("prompt, f16", &rows, HALF_ALLOWED, |recorder, bindings| {
                cooperative::prompt_attention::record(recorder, shape, cut, tiles, bindings)
            }),
            None => self.measure("prompt", &rows, ALLOWED, |recorder, bindings| {
                prompt_attention::record(recorder, shape, tiles, bindings)
            }),
        }
    }

    /// The last token of each as a decode row.
    pub fn measure_decode(&self) -> Result<Reading, MeasureError> {
        let rows: Vec<Row> = (0..)
            .zip(self.lengths.iter().zip(&self.tables))
            .map(|(row, (length, table))| Row { row, position: *length as u32 - 1, first_block: *table })
            .collect();
        let longest = self.lengths.iter().max().map_or(1, |length| parts_of(*length));
        let most_parts = longest.max(1024);
        let parts = Parts::new(&rows, 0, most_parts);
        let gpu = self.pipelines.gpu();
        let [states, sums] =
            decode_attention::scratch_bytes(self.shape.q_heads as usize, self.shape.head_width as usize)
                .map(|bytes| gpu.buffer("parts of decode rows", bytes * most_parts as u64));
        let (states, sums) = (states?, sums?);
        let list = gpu.buffer_with("parts", bytemuck::cast_slice(&parts.parts))?;
        let wholes = gpu.buffer_with("rows", bytemuck::cast_slice(&parts.wholes))?;
        let scratch = Scratch { states: states.whole(), sums: sums.whole() };
        self.measure("decode", &rows, ALLOWED, |recorder, bindings| {
            let lists = [list.whole(), wholes.whole()];
            decode_attention::record(recorder, &self.shape, &parts.batches, lists, scratch, bindings)
        })
    }

    fn measure(
        &self,
        kernel: &'static str,
        rows: &[Row],
        allowed: f32,
        record: impl Fn(&mut Recorder<'_>, Bindings<'_>) -> Result<(), GpuError>,
    ) -> Result<Reading, MeasureError> {
        let gpu = self.pipelines.gpu();
        let Attention { q_heads, kv_heads, head_width, q_stride, .. } = self.shape;
        let qkv = filled(self.pipelines, "queries", Dtype::F32, rows.len() as u64 * q_stride as u64, 19, 4.0)?;
        let out = gpu.buffer("attention output", 4 * rows.len() as u64 * (q_heads * head_width) as u64)?;
        let bindings = Bindings {
            qkv: qkv.whole(),
            block_table: self.block_table.whole(),
            kv_blocks: self.kv_blocks.whole(),
            out: out.whole(),
            sinks: self.block_table.whole(),
        };
        let seconds = timed(self.pipelines, |recorder, _| record(recorder, bindings))?;
        let table: Vec<u32> = bytemuck::pod_collect_to_vec(&gpu.read(self.block_table.whole())?);
        let mut worst_error = 0f32;
        for sample in 0..SAMPLES {
            let row = rows[spread(sample, rows.len())];
            let head = spread(sample, q_heads as usize);
            self.check((kernel, allowed), &table, row, head, (&qkv, &out), &mut worst_error)?;
        }
        let pairs: f64 = rows.iter().map(|row| row.position as f64 + 1.0).sum();
        let tokens: usize = self.lengths.iter().sum();
        Ok(Reading {
            kernel,
            sequences: self.lengths.len(),
            rows: rows.len(),
            seconds,
            pairs,
            operations: pairs * 4.0 * (q_heads * head_width) as f64,
            bytes: tokens as f64 * 4.0 * (kv_heads * head_width) as f64,
            worst_error,
        })
    }

    /// One head of one row against the reference.
    #[allow(clippy::too_many_arguments)]
    fn check(
        &self,
        (kernel, allowed): (&'static str, f32),
        table: &[u32],
        row: Row,
        head: usize,
        (qkv, out): (&Buffer, &Buffer),
        worst_error: &mut f32,
    ) -> Result<(), MeasureError> {
        let gpu = self.pipelines.gpu();
        let (width, kv_heads) = (self.shape.head_width as usize, self.shape.kv_heads as usize);
        let kv_head = head / self.shape.group() as usize;
        let bytes = |start: usize, n: usize, size: usize| (start * size) as u64..((start + n) * size) as u64;
        let q = qkv.slice(bytes(row.row as usize * self.shape.q_stride as usize + head * width, width, 4));
        let got = out.slice(bytes((row.row * self.shape.q_heads) as usize * width + head * width, width, 4));
        let context = row.position as usize + 1;
        let half = BLOCK_TOKENS * width;
        let blocks = &table[row.first_block as usize..][..context.div_ceil(BLOCK_TOKENS)];
        let blocks = blocks.iter().map(|block| (*block as usize * kv_heads + kv_head) * 2 * half);
        let slices: Vec<_> =
            [q, got].into_iter().chain(blocks.map(|at| self.kv_blocks.slice(bytes(at, 2 * half, 2)))).collect();
        let read = gpu.read_many(&slices)?;
        let (q, got) = (Dtype::F32.read_all(&read[0]), Dtype::F32.read_all(&read[1]));
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for block in &read[2..] {
            let elements = Dtype::F16.read_all(block);
            keys.extend_from_slice(&elements[..half]);
            values.extend_from_slice(&elements[half..]);
        }
        keys.truncate(context * width);
        values.truncate(context * width);
        let scale = self.shape.scale;
        let one = AttentionShape { q_heads: 1, kv_heads: 1, head_width: width, window: None, scale };
        let wanted = attention(&one, None, &q, &keys, &values);
        for (got, wanted) in got.iter().zip(&wanted) {
            let error = (got - wanted).abs();
            if error.is_nan() || error > allowed {
                let what = format!("{kernel} attention, row {}, head {head}", row.row);
                let (got, wanted, error) = (*got as f64, *wanted as f64, (error / allowed) as f64);
                return Err(MeasureError::Wrong { what, got, wanted, error });
            }
            *worst_error = worst_error.max(error);
        }
        Ok(())
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}
