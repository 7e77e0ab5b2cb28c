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
//!
//! [`Pass`] is what the device's lanes see: fixed before the pass begins. [`HostLane`] is the host's lane: it alone touches the
//! batcher and the answers. A schedule names micro-batches by their place among those that have rows; [`MicroBatch`] has the
//! batcher's number of each.

use std::sync::Mutex;
use std::time::Instant;

use rayon::prelude::*;

use super::WorkError;
use super::answers::{Answers, Draw, RowHead};
use crate::checkpoint::Weights;
use crate::cpu::attention::{DecodeRow, attend};
use crate::cpu::isa::Isa;
use crate::execute::machine::{Attended, DeviceRows, Heads, KvPool, KvUpload, NO_SLOT, attention_scale};
use crate::execute::{Device, Host, Machine, Started};
use crate::gpu::Ticket;
use crate::memory::kv_cache::BLOCK_TOKENS;
use crate::model::{AttentionShape, ModelConfig};
use crate::plan::cost::{PassRows, RowsOf, pass_shape};
use crate::policy::{AttentionPlace, Policy};
use crate::request::batcher::{Batcher, MicroBatchRows};
use crate::request::sampler::{LogitsError, Sampled};
use crate::schedule::{MicroBatchShape, PassShape, Task, TaskId, Work};

/// A micro-batch of this pass.
pub(super) struct MicroBatch {
    /// The batcher's number of it.
    number: usize,
    pub rows: MicroBatchRows,
    uploads: Vec<KvUpload>,
    /// Rows that are sampled.
    sampled: Vec<usize>,
    /// Which of those need whole rows of logits, ascending.
    with_logits: Vec<usize>,
    /// What the LM head found.
    heads: Mutex<Heads>,
}

/// All that the device's lanes need to know of one pass.
pub(super) struct Pass<'p> {
    pub weights: &'p Weights,
    pub config: &'p ModelConfig,
    pub machine: &'p Machine,
    pub threads: &'p rayon::ThreadPool,
    pub pool: KvPool<'p>,
    pub micro_batches: &'p [MicroBatch],
    /// The schedule's expert groups by the machine's numbers.
    pub groups: &'p [usize],
}

impl Pass<'_> {
    /// The rows of this pass as a prediction needs them.
    pub fn rows(&self, shape: &PassShape) -> PassRows {
        let window = self.config.widest_window().unwrap_or(usize::MAX);
        let of = |of: &MicroBatch| {
            let mut rows = RowsOf {
                sampled: of.sampled.len(),
                uploaded_blocks: of.uploads.len(),
                decode: of.rows.n_decode(),
                prompt: of.rows.rows.len() - of.rows.n_decode(),
                ..RowsOf::default()
            };
            for (number, row) in of.rows.rows.iter().enumerate() {
                let context = row.position + 1;
                if number < rows.decode {
                    rows.context += context as f64;
                    rows.context_in_window += context.min(window) as f64;
                } else {
                    rows.prompt_context += context as f64;
                }
            }
            rows
        };
        PassRows { micro_batches: self.micro_batches.iter().map(of).collect(), groups: shape.groups.clone() }
    }
}

/// Which rows go where, and what the schedule has to cover. `rows`: by the batcher's number of the micro-batch.
pub(super) fn lay_out(
    machine: &mut Machine,
    config: &ModelConfig,
    policy: &Policy,
    batcher: &Batcher,
    answers: &Answers<'_>,
    every_logit: bool,
    rows: Vec<MicroBatchRows>,
) -> (Vec<MicroBatch>, Vec<usize>, PassShape) {
    let mut micro_batches = Vec::new();
    let mut shapes = Vec::new();
    for (number, rows) in rows.into_iter().enumerate() {
        if rows.rows.is_empty() {
            machine.leave_out(number);
            continue;
        }
        let on_host = policy.attention == AttentionPlace::Cpu;
        let (device_rows, uploads) = device_rows(config, on_host, batcher, every_logit, &rows);
        shapes.push(MicroBatchShape {
            gpu_attention: !(device_rows.prompt.is_empty() && device_rows.decode.is_empty()),
            cpu_attention: on_host && rows.n_decode() > 0,
            kv_to_device: !uploads.is_empty(),
            sampled: !device_rows.sampled.is_empty(),
            workspace: machine.extents().workspace_of(number),
        });
        let sampled: Vec<usize> = device_rows.sampled.iter().map(|row| *row as usize).collect();
        let with_logits = (0..sampled.len())
            .filter(|index| every_logit || answers.needs_logits(rows.rows[sampled[*index]].sequence))
            .collect();
        machine.begin(number, device_rows, if on_host { rows.n_decode() } else { 0 });
        micro_batches.push(MicroBatch { number, rows, uploads, sampled, with_logits, heads: Mutex::default() });
    }
    // Micro-batches of one of the machine's groups stand next to each other.
    let group_of = |micro_batch: &MicroBatch| machine.extents().group_of(micro_batch.number);
    let mut groups = Vec::new();
    let mut start = 0;
    for members in micro_batches.chunk_by(|a, b| group_of(a) == group_of(b)) {
        groups.push((group_of(&members[0]), start..start + members.len()));
        start += members.len();
    }
    let relay = machine.source().is_some_and(|source| source.kind() == crate::policy::SourceKind::Relay);
    let members = groups.iter().map(|(_, members)| members.clone()).collect();
    let shape = pass_shape(config, policy, machine.plan(), shapes, members, relay);
    (micro_batches, groups.into_iter().map(|(group, _)| group).collect(), shape)
}

/// Where each row goes on the device, and which blocks of the cache its attention needs there.
fn device_rows(
    config: &ModelConfig,
    decode_on_host: bool,
    batcher: &Batcher,
    every_logit: bool,
    rows: &MicroBatchRows,
) -> (DeviceRows, Vec<KvUpload>) {
    let mut out = DeviceRows::default();
    let mut uploads = Vec::new();
    let mut used = 0;
    let block_bytes = batcher.kv().layout().block_bytes() as u64;
    for run in rows.runs() {
        let (first, last) = (&run[0], &run[run.len() - 1]);
        let on_gpu = !(first.decode && decode_on_host);
        let blocks_at = out.block_table.len();
        if on_gpu {
            let window = config.widest_window().unwrap_or(usize::MAX);
            let first_visible = (first.position + 1).saturating_sub(window) / BLOCK_TOKENS;
            let blocks = batcher.table(first.sequence).blocks();
            for (block, id) in blocks.iter().enumerate().take(last.position / BLOCK_TOKENS + 1) {
                if block < first_visible {
                    out.block_table.push(NO_SLOT);
                    continue;
                }
                let stored = first.position.saturating_sub(block * BLOCK_TOKENS).min(BLOCK_TOKENS);
                if stored > 0 {
                    uploads.push(KvUpload { to: used, at: id.index() as u64 * block_bytes, tokens: stored });
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
            if row.sampled || every_logit {
                out.sampled.push(index as u32);
            }
        }
    }
    (out, uploads)
}

impl Device for Pass<'_> {
    type Error = WorkError;
    type Ticket = Ticket;

    fn start(&self, _id: TaskId, task: &Task, after: &[Ticket]) -> Result<Started<Ticket>, WorkError> {
        let machine = self.machine;
        let number = |micro_batch: usize| self.micro_batches[micro_batch].number;
        let ticket = match task.work {
            Work::Embed { micro_batch } => machine.embed(number(micro_batch), after)?,
            Work::KvToDevice { layer, micro_batch } => {
                let uploads = &self.micro_batches[micro_batch].uploads;
                // SAFETY: blocks of sequences that have rows in this pass stay theirs to its end, and this pass writes only
                // tokens behind those that are stored.
                unsafe { machine.upload_kv(number(micro_batch), layer, uploads, &self.pool, after)? }
            }
            Work::PreAttention { layer, micro_batch } => machine.pre_attention(layer, number(micro_batch), after)?,
            Work::RowsToHost { micro_batch, .. } => machine.rows_to_host(number(micro_batch), after)?,
            Work::GpuAttention { layer, micro_batch } => machine.gpu_attention(layer, number(micro_batch), after)?,
            Work::RowsToDevice { micro_batch, .. } => machine.rows_to_device(number(micro_batch), after)?,
            Work::PostAttention { layer, micro_batch } => machine.post_attention(layer, number(micro_batch), after)?,
            Work::LoadPage { layer, chunk, page } => {
                machine.load_page(self.weights, self.threads, layer, chunk, page, after)?
            }
            Work::Experts { layer, group, chunk } => machine.experts(layer, self.groups[group], chunk, after)?,
            Work::Head { micro_batch } => {
                let of = &self.micro_batches[micro_batch];
                *of.heads.lock().expect("heads lock") = machine.head(of.number, &of.with_logits, after)?;
                return Ok(Started::Done);
            }
            Work::CpuAttention { .. } | Work::Sample { .. } | Work::PinPage { .. } | Work::Barrier { .. } => {
                unreachable!("{:?} is the host's", task.work)
            }
        };
        Ok(Started::Ticket(ticket))
    }

    fn wait(&self, ticket: Ticket) -> Result<(), WorkError> {
        Ok(self.machine.gpu().wait_for(ticket)?)
    }

    fn take_spans(&self, tickets: &[Ticket]) -> Result<Vec<Option<(Instant, Instant)>>, WorkError> {
        Ok(self.machine.gpu().take_spans(tickets)?)
    }

    fn size(&self, work: Work) -> (u64, usize) {
        let shape = &self.config.shape;
        let rows = work.micro_batch().map_or(0, |micro_batch| self.micro_batches[micro_batch].rows.rows.len());
        let decode = work.micro_batch().map_or(0, |micro_batch| self.micro_batches[micro_batch].rows.n_decode());
        let words = |n: usize| 4 * n as u64;
        match work {
            Work::LoadPage { chunk, page, .. } | Work::PinPage { chunk, page, .. } => {
                (self.machine.page_bytes(chunk, page), 0)
            }
            Work::KvToDevice { micro_batch, .. } => {
                let blocks = self.micro_batches[micro_batch].uploads.len() as u64;
                (blocks * crate::execute::machine::workspace_block_bytes(self.config), rows)
            }
            Work::RowsToHost { .. } => {
                let new_rows = rows * self.machine.kv_layout().new_row_bytes();
                (new_rows as u64 + words(decode * shape.q_width()), rows)
            }
            Work::RowsToDevice { .. } => (words(decode * shape.q_width()), decode),
            Work::Experts { group, .. } => (0, self.machine.group_rows(self.groups[group])),
            _ => (0, rows),
        }
    }
}

/// The host's lane of one pass.
pub(super) struct HostLane<'p, 'e> {
    pub pass: &'p Pass<'p>,
    pub attention: AttentionPlace,
    pub isa: Isa,
    pub batcher: &'p mut Batcher,
    pub answers: &'p mut Answers<'e>,
    /// By the batcher's number of the micro-batch: its rows of the next pass.
    pub next: &'p mut [MicroBatchRows],
    pub every_logit: bool,
}

impl HostLane<'_, '_> {
    fn attend(&mut self, layer: usize, micro_batch: usize) {
        let (pass, of) = (self.pass, &self.pass.micro_batches[micro_batch]);
        // SAFETY: the schedule was checked: this layer's rows have come, and the next layer's come after this task.
        let kv = unsafe { pass.machine.host_kv(of.number) };
        self.batcher.write_rows(layer, &of.rows.rows, kv, pass.threads);
        if self.attention == AttentionPlace::Gpu {
            return;
        }
        let shape = &pass.config.shape;
        let attention = AttentionShape {
            q_heads: shape.q_heads,
            kv_heads: shape.kv_heads,
            head_width: shape.head_width,
            window: pass.config.window(layer),
            scale: attention_scale(pass.config),
        };
        // SAFETY: as above; the output of the layer before went to the device before this task.
        let (queries, out) = unsafe { (pass.machine.host_queries(of.number), pass.machine.host_attention(of.number)) };
        let mut decode: Vec<DecodeRow> = of.rows.rows[..of.rows.n_decode()]
            .iter()
            .zip(queries.chunks_exact(shape.qkv_width()))
            .zip(out.chunks_exact_mut(shape.q_width()))
            .map(|((row, projected), out)| DecodeRow {
                q: &projected[..shape.q_width()],
                out,
                context: row.position + 1,
                table: self.batcher.table(row.sequence),
            })
            .collect();
        let sinks = pass.machine.sinks(layer);
        attend(self.isa, self.batcher.kv(), layer, &attention, sinks, &mut decode, pass.threads);
    }

    fn sample(&mut self, micro_batch: usize) -> Result<(), WorkError> {
        let of = &self.pass.micro_batches[micro_batch];
        let rows = &of.rows;
        self.batcher.complete(rows);
        let heads = std::mem::take(&mut *of.heads.lock().expect("heads lock"));
        let vocab = self.pass.config.shape.vocab;
        let whole = || of.with_logits.iter().copied().zip(heads.logits.chunks_exact(vocab));
        // Drawing from a row of logits takes up to a millisecond, so all threads draw.
        let draws: Vec<Option<(Draw, &[f32])>> = whole()
            .map(|(index, logits)| {
                let row = &rows.rows[of.sampled[index]];
                Some((self.answers.draw(row.sequence).filter(|_| row.sampled)?, logits))
            })
            .collect();
        let drawn: Vec<Option<Result<Sampled, LogitsError>>> = self
            .pass
            .threads
            .install(|| draws.par_iter().map(|draw| draw.as_ref().map(|(draw, logits)| draw.choose(logits))).collect());
        let mut whole = whole().zip(drawn).peekable();
        for (index, (row, sample)) in of.sampled.iter().zip(&heads.samples).enumerate() {
            let row = &rows.rows[*row];
            let (logits, drawn) =
                whole.next_if(|((with, _), _)| *with == index).map(|((_, logits), drawn)| (logits, drawn)).unzip();
            if let (Some(logits), true) = (logits, self.every_logit) {
                self.answers.tell_logits(row.sequence, row.position, logits);
            }
            // A sibling of a completion that failed in this very pass is gone already.
            if row.sampled && self.batcher.contains(row.sequence) {
                let row_head = RowHead { sample: *sample, drawn: drawn.flatten(), position: row.position };
                self.answers.sampled(row.sequence, row_head, self.batcher);
            }
        }
        // Rows of requests that failed elsewhere were carried along; what is left of them goes now.
        self.answers.sweep(rows, self.batcher);
        // This micro-batch's membership of the next pass is fixed here, whatever the others still do.
        self.next[of.number] = self.batcher.plan_micro_batch(of.number)?;
        Ok(())
    }
}

impl Host<WorkError> for HostLane<'_, '_> {
    fn perform(&mut self, _id: TaskId, task: &Task) -> Result<(), WorkError> {
        match task.work {
            Work::CpuAttention { layer, micro_batch } => self.attend(layer, micro_batch),
            Work::Sample { micro_batch } => self.sample(micro_batch)?,
            Work::PinPage { layer, chunk, page } => {
                self.pass.machine.pin_page(self.pass.weights, self.pass.threads, layer, chunk, page)?;
            }
            // The launcher has waited for all that was started before.
            Work::Barrier { .. } => {}
            other => unreachable!("{other:?} is the device's"),
        }
        Ok(())
    }
}
