//! What each task of a schedule does: the host's part here, the device's in [`Machine`].
//!
//! A decode row's way through one layer, with attention on the CPU:
//!
//! ```text
//! PreAttention   norm, Q K V, rotary on the GPU
//! RowsToHost     its q (f32), new k and v (f16) come to the host
//! CpuAttention   k, v go into the sequence's KV block; q attends over all its blocks
//! RowsToDevice   the output goes back
//! PostAttention  output projection, norm, router: two experts of eight, say
//! LoadPage       those experts' matrices arrive in their slots (for all rows of the pass)
//! Experts        rows sorted by expert, gate · up · down, weighted sum into the residual
//! ```

use half::f16;

use super::WorkError;
use super::answers::{Answers, RowHead};
use crate::checkpoint::Checkpoint;
use crate::cpu::attention::{DecodeRow, attend};
use crate::cpu::isa::Isa;
use crate::execute::machine::{Attended, DeviceRows, NO_SLOT, attention_scale};
use crate::execute::{Machine, Worker};
use crate::kernels::lm_head_sample::Sample;
use crate::memory::kv_cache::BLOCK_TOKENS;
use crate::model::{AttentionShape, ModelConfig};
use crate::policy::AttentionPlace;
use crate::request::batcher::{Batcher, GroupRows, SequenceId};
use crate::schedule::{GroupShape, PassShape, Task, Work};

/// A block of the host cache that a group's GPU attention reads: the same block in every layer.
#[derive(Debug, Clone, Copy)]
pub(super) struct KvUpload {
    /// Block of the GPU workspace.
    to: u32,
    sequence: SequenceId,
    /// Which of the sequence's blocks.
    block: usize,
}

/// Rows that `RowsToHost` brought.
#[derive(Debug, Default)]
pub(super) struct Fetched {
    /// `[T, G, 2, K]`
    kv: Vec<f16>,
    /// `[n_decode, H, K]`
    queries: Vec<f32>,
}

/// What `Head` found.
#[derive(Debug, Default)]
pub(super) struct HeadRows {
    /// Row of the group that each entry of `samples` belongs to.
    rows: Vec<usize>,
    samples: Vec<Sample>,
    /// Index into `rows` of each whole row of `logits`, ascending.
    with_logits: Vec<usize>,
    logits: Vec<f32>,
}

/// Carries out the tasks of one pass. `group` in a task counts the groups that have rows: `groups[group]` is the batcher's.
pub(super) struct PassWorker<'p, 'e> {
    pub checkpoint: &'p Checkpoint,
    pub config: &'p ModelConfig,
    pub attention: AttentionPlace,
    pub isa: Isa,
    pub threads: &'p rayon::ThreadPool,
    pub machine: &'p mut Machine,
    pub batcher: &'p mut Batcher,
    pub answers: &'p mut Answers<'e>,
    pub groups: &'p [usize],
    pub rows: &'p [GroupRows],
    /// By the batcher's number of the group: its rows of the next pass.
    pub next: &'p mut [GroupRows],
    pub every_logit: bool,
    pub uploads: Vec<Vec<KvUpload>>,
    pub fetched: Fetched,
    /// `[n_decode, H, K]`
    pub attended: Vec<f32>,
    pub head: HeadRows,
    pub page_bytes: u64,
}

impl PassWorker<'_, '_> {
    /// Hands every group's rows to the device, and says what the schedule has to cover.
    pub fn begin(&mut self) -> PassShape {
        let mut groups = Vec::with_capacity(self.rows.len());
        for (group, rows) in self.rows.iter().enumerate() {
            let (device_rows, uploads) = self.lay_out(rows);
            self.machine.begin(group, &device_rows);
            groups.push(GroupShape {
                gpu_attention: !(device_rows.prompt.is_empty() && device_rows.decode.is_empty()),
                cpu_attention: self.attention == AttentionPlace::Cpu && rows.n_decode() > 0,
                kv_to_device: !uploads.is_empty(),
                sampled: !device_rows.sampled.is_empty(),
            });
            self.uploads.push(uploads);
        }
        let chunk_pages = self.machine.plan().chunks().iter().map(|chunk| chunk.pages.len()).collect();
        PassShape { layers: self.config.shape.layers, groups, chunk_pages }
    }

    /// Where each row goes on the device, and which blocks of the cache its attention needs there.
    fn lay_out(&self, rows: &GroupRows) -> (DeviceRows, Vec<KvUpload>) {
        let mut out = DeviceRows::default();
        let mut uploads = Vec::new();
        let mut used = 0;
        for run in rows.runs() {
            let (first, last) = (&run[0], &run[run.len() - 1]);
            let on_gpu = !first.decode || self.attention == AttentionPlace::Gpu;
            let blocks_at = out.block_table.len();
            if on_gpu {
                let window = self.config.widest_window().unwrap_or(usize::MAX);
                let first_visible = (first.position + 1).saturating_sub(window) / BLOCK_TOKENS;
                for block in 0..=last.position / BLOCK_TOKENS {
                    if block < first_visible {
                        out.block_table.push(NO_SLOT);
                        continue;
                    }
                    if block * BLOCK_TOKENS < first.position {
                        uploads.push(KvUpload { to: used, sequence: first.sequence, block });
                    }
                    out.block_table.push(used);
                    used += 1;
                }
            }
            for row in run {
                let index = out.ids.len();
                let (block, within) = (row.position / BLOCK_TOKENS, row.position % BLOCK_TOKENS);
                out.ids.push(row.token);
                out.positions.push(row.position as u32);
                out.kv_slots.push(if on_gpu {
                    out.block_table[blocks_at + block] * BLOCK_TOKENS as u32 + within as u32
                } else {
                    NO_SLOT
                });
                if on_gpu {
                    let attended = Attended { row: index, position: row.position, blocks_at };
                    if row.decode { &mut out.decode } else { &mut out.prompt }.push(attended);
                }
                if row.sampled || self.every_logit {
                    out.sampled.push(index as u32);
                }
            }
        }
        (out, uploads)
    }

    fn upload_kv(&mut self, layer: usize, group: usize) {
        for upload in &self.uploads[group] {
            let id = self.batcher.table(upload.sequence).blocks()[upload.block];
            self.machine.write_kv_block(upload.to, self.batcher.kv().block(layer, id));
        }
    }

    fn cpu_attention(&mut self, layer: usize, group: usize) {
        let rows = &self.rows[group];
        self.batcher.write_rows(layer, &rows.rows, &self.fetched.kv, self.threads);
        if self.attention == AttentionPlace::Gpu {
            return;
        }
        let shape = &self.config.shape;
        let attention = AttentionShape {
            q_heads: shape.q_heads,
            kv_heads: shape.kv_heads,
            head_width: shape.head_width,
            window: self.config.window(layer),
            scale: attention_scale(self.config),
        };
        let width = shape.q_width();
        self.attended.clear();
        self.attended.resize(rows.n_decode() * width, 0.0);
        let mut decode: Vec<DecodeRow> = rows.rows[..rows.n_decode()]
            .iter()
            .zip(self.fetched.queries.chunks_exact(width))
            .zip(self.attended.chunks_exact_mut(width))
            .map(|((row, q), out)| DecodeRow {
                q,
                out,
                context: row.position + 1,
                table: self.batcher.table(row.sequence),
            })
            .collect();
        let sinks = self.machine.sinks(layer);
        attend(self.isa, self.batcher.kv(), layer, &attention, sinks, &mut decode, self.threads);
    }

    fn head(&mut self, group: usize) -> Result<(), WorkError> {
        let rows = &self.rows[group].rows;
        let sampled: Vec<usize> = (0..rows.len()).filter(|row| rows[*row].sampled || self.every_logit).collect();
        let with_logits: Vec<usize> = (0..sampled.len())
            .filter(|index| self.every_logit || self.answers.needs_logits(rows[sampled[*index]].sequence))
            .collect();
        let (samples, logits) = self.machine.head(group, &with_logits)?;
        self.head = HeadRows { rows: sampled, samples, with_logits, logits };
        Ok(())
    }

    fn sample(&mut self, group: usize) -> Result<(), WorkError> {
        let rows = &self.rows[group];
        self.batcher.complete(rows);
        let head = std::mem::take(&mut self.head);
        let vocab = self.config.shape.vocab;
        let mut whole = head.with_logits.iter().copied().zip(head.logits.chunks_exact(vocab)).peekable();
        for (index, (row, sample)) in head.rows.iter().zip(&head.samples).enumerate() {
            let row = &rows.rows[*row];
            let logits = whole.next_if(|(with, _)| *with == index).map(|(_, logits)| logits);
            if let (Some(logits), true) = (logits, self.every_logit) {
                self.answers.tell_logits(row.sequence, row.position, logits);
            }
            // A sibling of a completion that failed in this very pass is gone already.
            if row.sampled && self.batcher.contains(row.sequence) {
                let wanted = logits.filter(|_| self.answers.needs_logits(row.sequence));
                let row_head = RowHead { sample: *sample, logits: wanted, position: row.position };
                self.answers.sampled(row.sequence, row_head, self.batcher);
            }
        }
        // Rows of requests that failed elsewhere were carried along; what is left of them goes now.
        self.answers.sweep(rows, self.batcher);
        // This group's membership of the next pass is fixed here, whatever the other groups still do.
        let number = self.groups[group];
        self.next[number] = self.batcher.plan_group(number)?;
        Ok(())
    }
}

impl Worker for PassWorker<'_, '_> {
    type Error = WorkError;

    fn perform(&mut self, task: &Task) -> Result<(), WorkError> {
        match task.work {
            Work::Embed { group } => self.machine.embed(group)?,
            Work::KvToDevice { layer, group } => self.upload_kv(layer, group),
            Work::PreAttention { layer, group } => self.machine.pre_attention(layer, group)?,
            Work::RowsToHost { group, .. } => {
                let n_decode = if self.attention == AttentionPlace::Cpu { self.rows[group].n_decode() } else { 0 };
                let (kv, queries) = self.machine.read_rows(group, n_decode)?;
                self.fetched = Fetched { kv, queries };
            }
            Work::CpuAttention { layer, group } => self.cpu_attention(layer, group),
            Work::GpuAttention { layer, group } => self.machine.gpu_attention(layer, group)?,
            Work::RowsToDevice { .. } => self.machine.write_attention(&self.attended),
            Work::PostAttention { layer, group } => self.machine.post_attention(layer, group)?,
            Work::LoadPage { layer, chunk, page } => {
                self.page_bytes += self.machine.load_page(self.checkpoint, layer, chunk, page)?;
            }
            Work::Experts { layer, group, chunk } => self.machine.experts(layer, group, chunk)?,
            Work::Head { group } => self.head(group)?,
            Work::Sample { group } => self.sample(group)?,
        }
        Ok(())
    }
}
