//! A model on the GPU: its dense weights, the slots of its experts, the buffers of its rows, and the kernels of each stage.
//!
//! In: weights, a [`PagePlan`], extents. Out: what each [`Work`](crate::schedule::Work) task does on the device side, handed to
//! the device and not waited for; the host side (KV cache, CPU attention, sampling) is the engine's.
//!
//! Always on the GPU: embedding, norms, projections, routers, LM head. Experts come through pages into slots; a slot is the
//! same place in three slabs (gate, up, down). Rows of the micro-batches of an expert group lie in the group's buffers one
//! region after the other, so that experts see all of them at once; what attention needs is each micro-batch's own, so that one
//! may attend while another is projected.
//!
//! ```text
//! group 0:   x, normed, chosen   [ micro-batch 0 ....··|micro-batch 1 .......|micro-batch 2 ...··· ]   · = no row
//! micro-batch 1:   qkv, attention, ids, …   and on the host: its new keys and values, its queries, its attention output
//! ```
//!
//! Methods may be called from several lanes at a time; what they may not do at the same time the schedule keeps apart. Nothing is
//! allocated on the device after [`Machine::open`].

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::{Arc, Mutex};

use half::f16;

use crate::checkpoint::{Dtype, Reader, Weights};
use crate::gpu::{
    Buffer, CopyRange, Gpu, GpuError, HostBuffer, Line, Pipelines, Preparing, Recorder, Slice, Ticket, Variant,
};
use crate::kernels::cooperative::prompt_attention::Cut;
use crate::kernels::decode_attention::{Parts, SPLIT_TOKENS, parts_of};
use crate::kernels::half_rows::{ByExpert, HalfRows, groups, padded};
use crate::kernels::lm_head_sample::Sample;
use crate::kernels::prompt_attention::Tile;
use crate::kernels::{
    add_bias, cooperative, copy_rows, decode_attention, embed, expert_combine, expert_down, expert_gate_up,
    expert_sort, half_rows, kv_quantise, layer_norm, lm_head_sample, matmul, paged_attention, prompt_attention,
    qk_norm, rms_norm, rotary, router_topk,
    slabs::{Layout, N_SLABS, Place},
};
use crate::memory::kv_cache::{BLOCK_TOKENS, Half, KvLayout};
use crate::memory::page_source::{LoadRequest, PageError, PageSource};
use crate::memory::pages::{PagePlan, PageShape, PageTable, Piece};
use crate::model::{Activation, ExpertMatrix, ModelConfig, Norm, QkNorm, Role, Shape};
use crate::policy::{KvDtype, Precision, RowPath};
use crate::reference::rotary::{rope_table, yarn_rope_table};
use crate::tune::{BY_EXPERT_ROWS, Operation, Tiles};

/// Extents of everything that is allocated at open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extents {
    pub micro_batches: usize,
    /// Expert groups: consecutive micro-batches, as many in each (the last may have fewer).
    pub expert_groups: usize,
    pub rows_per_micro_batch: usize,
    /// KV workspaces, and KV blocks of each.
    pub workspaces: usize,
    pub workspace_blocks: usize,
    /// Positions 0.. that the rotary table covers.
    pub max_positions: usize,
    /// Rows whose logits exist at a time.
    pub head_rows: usize,
    /// How rows cross the link.
    pub rows: RowPath,
    /// Operands of products.
    pub precision: Precision,
    /// Decode rows attend on the GPU.
    pub gpu_decode: bool,
    /// How the host's KV cache keeps an element: its new rows come in that form.
    pub kv_dtype: KvDtype,
}

/// Most parts of decode rows whose sums are kept at a time, unless one row has more: so many keep any GPU busy.
const MOST_PARTS: usize = 1024;

/// A region of a group's buffers starts at a multiple of so many rows: then it starts aligned for a binding whatever a row holds.
const REGION_ROWS: usize = 64;

impl Extents {
    /// Micro-batches of an expert group.
    pub fn group_size(&self) -> usize {
        self.micro_batches.div_ceil(self.expert_groups)
    }

    /// Rows from one region of a group's buffers to the next.
    pub fn region_rows(&self) -> usize {
        if self.group_size() == 1 {
            self.rows_per_micro_batch
        } else {
            self.rows_per_micro_batch.next_multiple_of(REGION_ROWS)
        }
    }

    /// Rows that a group's buffers hold.
    pub fn group_rows(&self) -> usize {
        self.group_size() * self.region_rows()
    }

    /// The group of a micro-batch.
    pub fn group_of(&self, micro_batch: usize) -> usize {
        micro_batch / self.group_size()
    }

    /// The KV workspace of a micro-batch.
    pub fn workspace_of(&self, micro_batch: usize) -> usize {
        micro_batch % self.workspaces
    }

    /// Parts of decode rows in a micro-batch's list.
    fn listed_parts(&self) -> usize {
        if self.gpu_decode {
            2 * self.rows_per_micro_batch + self.workspace_blocks * BLOCK_TOKENS / SPLIT_TOKENS as usize
        } else {
            0
        }
    }

    /// Parts of decode rows whose sums are kept at a time.
    fn kept_parts(&self) -> usize {
        if self.gpu_decode { parts_of(self.max_positions).max(self.listed_parts().min(MOST_PARTS)) } else { 0 }
    }

    /// Bytes of what attention on the GPU needs beside rows and context: for each micro-batch, and once.
    pub fn attention_bytes(&self, shape: &Shape) -> [u64; 2] {
        // A buffer of nothing takes a word.
        let some = |bytes: u64| bytes.max(4);
        let tiles = words(4 * self.rows_per_micro_batch);
        let lists = tiles + some(tiles * self.gpu_decode as u64) + some(words(4 * self.listed_parts()));
        let scratch = decode_attention::scratch_bytes(shape.q_heads, shape.head_width);
        [lists, scratch.iter().map(|bytes| some(self.kept_parts() as u64 * bytes)).sum()]
    }

    fn region_start(&self, micro_batch: usize) -> usize {
        micro_batch % self.group_size() * self.region_rows()
    }
}

/// Columns of the rows that are rounded to f16 before products: none in the f32 class.
#[derive(Debug, Clone, Copy)]
pub struct HalfExtents {
    /// Of rows that projections, router, experts and LM head read.
    rows: usize,
    /// Of the rows between an expert's halves.
    hidden: usize,
    /// A of them for each row.
    chosen: usize,
    experts: usize,
}

impl HalfExtents {
    pub fn of(shape: &Shape, precision: Precision) -> Self {
        let padded = |n: usize| if precision == Precision::F16 { padded(n as u32) as usize } else { 0 };
        let rows = padded(shape.d_model).max(padded(shape.q_width()));
        let (hidden, chosen, experts) = (padded(shape.expert_width), shape.experts_per_token, shape.experts);
        Self { rows, hidden, chosen, experts }
    }

    /// Words of the widest row of a binding, per row of a pass.
    pub fn widest_words(&self) -> usize {
        (self.rows / 2).max(self.chosen * self.hidden / 2)
    }

    /// Rows that are rounded at a time: of a group, of a micro-batch, or of the LM head.
    fn n_rows(extents: &Extents) -> usize {
        extents.group_rows().max(extents.rows_per_micro_batch).max(extents.head_rows)
    }

    /// Device memory.
    pub fn bytes(&self, extents: &Extents) -> u64 {
        if self.rows == 0 {
            return 0;
        }
        let (rows, hidden) = (Self::n_rows(extents), extents.group_rows() * self.chosen);
        let ordered = self.ordered_bytes(extents.group_rows()) + words(self.ordered_rows(extents.group_rows()));
        words(rows * self.rows / 2) + words(rows) + words(hidden * self.hidden / 2) + words(hidden) + ordered
    }

    /// Rows that may lie by expert, of a group of `group_rows`: few to each.
    fn ordered_rows(&self, group_rows: usize) -> usize {
        group_rows.saturating_mul(self.chosen).min((BY_EXPERT_ROWS as usize + 1) * self.experts)
    }

    /// Of a group of 16 rows by expert, or of hidden ones: they take turns.
    fn ordered_group_bytes(&self) -> u64 {
        words(16 * self.rows.max(self.hidden) / 2)
    }

    /// Device memory, bound together, of rows by expert.
    pub fn ordered_bytes(&self, group_rows: usize) -> u64 {
        let groups = groups(self.ordered_rows(group_rows) as u32, self.experts as u32);
        groups as u64 * self.ordered_group_bytes()
    }

    /// The most rows of a group whose rows by expert one binding of so many bytes holds.
    pub fn group_rows_that_bind(&self, binding_bytes: u64) -> usize {
        if self.ordered_bytes(usize::MAX) <= binding_bytes {
            return usize::MAX;
        }
        match (binding_bytes / self.ordered_group_bytes()).checked_sub(self.experts as u64) {
            Some(groups) => (groups as usize * 16 + 15) / self.chosen,
            None => 0,
        }
    }
}

/// Rows of f16 and their scales: what the next product reads.
struct HalfBuffers {
    rows: Buffer,
    scales: Buffer,
    hidden: Buffer,
    hidden_scales: Buffer,
    /// By expert.
    ordered: Buffer,
    ordered_scales: Buffer,
}

impl HalfBuffers {
    fn rows(&self) -> HalfRows<'_> {
        HalfRows { rows: self.rows.whole(), scales: self.scales.whole() }
    }

    fn hidden(&self) -> HalfRows<'_> {
        HalfRows { rows: self.hidden.whole(), scales: self.hidden_scales.whole() }
    }

    fn ordered(&self) -> HalfRows<'_> {
        HalfRows { rows: self.ordered.whole(), scales: self.ordered_scales.whole() }
    }
}

/// The left operand of a product.
#[derive(Clone, Copy)]
enum Operand<'a> {
    Full(Slice<'a>),
    Half(HalfRows<'a>),
}

/// A tensor that stays on the GPU.
struct Dense {
    buffer: Buffer,
    dtype: Dtype,
}

/// One matrix kind of all slots.
struct Slabs {
    buffers: Vec<Buffer>,
}

impl Slabs {
    /// Every slab binding of a kernel is filled; those beyond the last slab repeat the first and are never read.
    fn bindings(&self) -> [Slice<'_>; N_SLABS] {
        std::array::from_fn(|slab| self.buffers.get(slab).unwrap_or(&self.buffers[0]).whole())
    }
}

/// Rows that experts see together.
struct GroupBuffers {
    /// [T, D] residual stream.
    x: Buffer,
    /// [T, D] normed rows: input of the projections, then of the experts.
    normed: Buffer,
    chosen: Buffer,
    chosen_weights: Buffer,
    offsets: Buffer,
    permutation: Buffer,
    /// [T * A, D] expert outputs by assignment.
    expert_out: Buffer,
}

/// What one micro-batch keeps over stages.
struct MicroBatchBuffers {
    ids: Buffer,
    positions: Buffer,
    /// Workspace slot of each row's new key and value, or [`NO_SLOT`].
    kv_slots: Buffer,
    /// [`Parts`] of decode rows: the parts, and the rows that they are of.
    decode_parts: Buffer,
    decode_wholes: Buffer,
    prompt_tiles: Buffer,
    block_table: Buffer,
    sampled: Buffer,
    /// [T, (H + 2 G) K]
    qkv: Buffer,
    /// [T, G, 2, K] f16
    kv_rows: Buffer,
    /// The same as the host's cache stores it, where that is not f16.
    quantised_rows: Option<Buffer>,
    /// [T, H, K]
    attention: Buffer,
    /// The same on the host: new keys and values, queries, attention output.
    host_kv: HostBuffer,
    host_queries: HostBuffer,
    host_attention: HostBuffer,
    rows: DeviceRows,
    parts: Parts,
    tiles: Vec<Tile>,
    /// Rows whose queries the host wants.
    n_host_queries: usize,
}

/// Context that GPU attention reads.
struct Workspace {
    /// [blocks, G, 2, BLOCK_TOKENS, K] f16
    blocks: Buffer,
    /// Host memory from which blocks cross the link, where the pool itself cannot be lent to the driver.
    staging: Option<Staging>,
}

struct Staging {
    bytes: HostBuffer,
    /// The last copy out of them.
    last: Mutex<Option<Ticket>>,
}

/// Marks a row whose key and value the workspace does not need.
pub const NO_SLOT: u32 = u32::MAX;

/// A row that attends on the GPU.
#[derive(Debug, Clone, Copy)]
pub struct Attended {
    /// Row of the micro-batch.
    pub row: usize,
    pub position: usize,
    /// Where its sequence's blocks start in the block table.
    pub blocks_at: usize,
}

/// A micro-batch's rows as the device needs them.
#[derive(Debug, Clone, Default)]
pub struct DeviceRows {
    pub ids: Vec<u32>,
    pub positions: Vec<u32>,
    pub kv_slots: Vec<u32>,
    pub decode: Vec<Attended>,
    pub prompt: Vec<Attended>,
    pub block_table: Vec<u32>,
    pub sampled: Vec<u32>,
}

/// What the LM head gives.
#[derive(Debug, Default)]
pub struct Heads {
    pub samples: Vec<Sample>,
    /// Whole rows of logits, `[n, V]`.
    pub logits: Vec<f32>,
}

/// See the module's text.
pub struct Machine {
    pipelines: Arc<Pipelines>,
    config: ModelConfig,
    extents: Extents,
    dense: HashMap<Role, Dense>,
    expert_dtype: Dtype,
    plan: PagePlan,
    source: Option<PageSource>,
    table: Mutex<PageTable>,
    /// Where in the ring this pass begins.
    ring_start: usize,
    gate: Slabs,
    up: Slabs,
    down: Slabs,
    slots_per_slab: usize,
    /// By [`ExpertMatrix::ALL`].
    matrix_bytes: [u64; 3],
    /// `[H]` of each layer, where the model has sinks.
    sinks: Vec<Vec<f32>>,
    groups: Vec<GroupBuffers>,
    micro_batches: Vec<MicroBatchBuffers>,
    workspaces: Vec<Workspace>,
    rope_table: Buffer,
    router_logits: Buffer,
    /// [T * A, F]
    hidden: Buffer,
    /// In the f16 class.
    halves: Option<HalfBuffers>,
    tiles: Tiles,
    /// Threads that compile what may be needed.
    preparing: Option<Preparing>,
    /// Of parts of decode rows.
    attention_states: Buffer,
    attention_sums: Buffer,
    /// `[E]` of gate, and of up in its slabs.
    places: Buffer,
    down_places: Buffer,
    head_rows: Buffer,
    head_normed: Buffer,
    logits: Buffer,
    greedy: Buffer,
    host_heads: HostBuffer,
}

fn words(n: usize) -> u64 {
    4 * n as u64
}

/// Bytes of one KV block of one layer on the GPU, whose blocks are f16 whatever the host's are.
pub fn workspace_block_bytes(config: &ModelConfig) -> u64 {
    let shape = &config.shape;
    KvLayout::new(shape, KvDtype::F16).block_bytes() as u64
}

/// Host memory that the rows of one micro-batch cross the link through.
pub fn host_row_bytes(config: &ModelConfig, kv_dtype: KvDtype, rows: usize) -> u64 {
    let shape = &config.shape;
    let new_rows = (rows * KvLayout::new(shape, kv_dtype).new_row_bytes()) as u64;
    new_rows + words(rows * shape.qkv_width()) + words(rows * shape.q_width())
}

/// Device memory of a new row in the form that the host's cache stores, where that is another than the f16 of the kernels.
pub fn quantised_row_bytes(layout: &KvLayout) -> usize {
    match layout.dtype {
        KvDtype::F16 => 0,
        KvDtype::Int8 => layout.new_row_bytes(),
    }
}

/// Where a KV block of the host lies that goes to a workspace.
#[derive(Debug, Clone, Copy)]
pub struct KvUpload {
    /// Block of the workspace.
    pub to: u32,
    /// Bytes from the start of the pool's layer 0 to the block there.
    pub at: u64,
    /// Tokens of it that are stored.
    pub tokens: usize,
}

/// The host's pool of KV blocks as uploads read it.
pub struct KvPool<'a> {
    /// Start of the pool.
    pub pointer: *const u8,
    /// Bytes from one layer to the next.
    pub layer_bytes: u64,
    /// The pool as the driver knows it, in pieces of [`KV_ARENA_BYTES`]; empty where it could not be lent.
    pub arenas: &'a [HostBuffer],
}

// SAFETY: the pointer is only read through, by `upload_kv`, under the conditions it states.
unsafe impl Sync for KvPool<'_> {}

/// The KV pool is lent to the driver in pieces of this size.
pub const KV_ARENA_BYTES: u64 = 1 << 30;

impl Machine {
    /// Allocates everything, uploads the dense weights and the resident experts. `progress(done, total)` in bytes.
    /// `tiles`: of products in the f16 class. `lend_kv`: uploads of context read the pool itself, so nothing is staged. `kept`: experts that
    /// are in host memory are taken from there.
    #[allow(clippy::too_many_arguments, reason = "two callers, each with all of them")]
    pub fn open(
        pipelines: Arc<Pipelines>,
        weights: &Weights,
        plan: PagePlan,
        extents: Extents,
        tiles: Tiles,
        lend_kv: bool,
        kept: Option<&PageSource>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Machine, PageError> {
        let gpu = pipelines.gpu().clone();
        let config = weights.config().clone();
        let shape = config.shape;
        let expert_dtype = weights.inventory().expert_dtype().expect("mixed types were refused before");
        let matrix_bytes = weights.inventory().slot_bytes().expect("mixed types were refused before");
        let slot_bytes = matrix_bytes.map(PageShape::slot_bytes);
        let largest = slot_bytes.into_iter().max().expect("three kinds");
        let slots_per_slab = ((gpu.max_binding_bytes() / largest) as usize).max(1);
        let slabs = |what: &str, slot_bytes: u64| -> Result<Slabs, GpuError> {
            let mut left = plan.n_slots();
            let mut buffers = Vec::new();
            while left > 0 && slot_bytes > 0 {
                let n = left.min(slots_per_slab);
                buffers.push(gpu.shared_buffer(&format!("{what} slab {}", buffers.len()), n as u64 * slot_bytes)?);
                left -= n;
            }
            Ok(Slabs { buffers })
        };
        let [gate, up, down] = slot_bytes;
        let (gate, up, down) = (slabs("gate", gate)?, slabs("up", up)?, slabs("down", down)?);
        let rows = extents.group_rows();
        let assignments = rows * shape.experts_per_token;
        let groups = (0..extents.expert_groups)
            .map(|_| {
                Ok(GroupBuffers {
                    x: gpu.buffer("residual rows", words(rows * shape.d_model))?,
                    normed: gpu.buffer("normed rows", words(rows * shape.d_model))?,
                    chosen: gpu.buffer("chosen experts", words(assignments))?,
                    chosen_weights: gpu.buffer("expert weights of rows", words(assignments))?,
                    offsets: gpu.buffer("expert offsets", words(shape.experts + 1))?,
                    permutation: gpu.buffer("rows by expert", words(assignments))?,
                    expert_out: gpu.buffer("expert outputs", words(assignments * shape.d_model))?,
                })
            })
            .collect::<Result<Vec<_>, GpuError>>()?;
        let rows = extents.rows_per_micro_batch;
        let layout = KvLayout::new(&shape, extents.kv_dtype);
        let micro_batches = (0..extents.micro_batches)
            .map(|_| {
                Ok(MicroBatchBuffers {
                    ids: gpu.buffer("token ids", words(rows))?,
                    positions: gpu.buffer("positions", words(rows))?,
                    kv_slots: gpu.buffer("kv slots", words(rows))?,
                    decode_parts: gpu.buffer("parts of decode rows", words(4 * extents.listed_parts()))?,
                    decode_wholes: gpu
                        .buffer("attended decode rows", if extents.gpu_decode { words(4 * rows) } else { 0 })?,
                    prompt_tiles: gpu.buffer("attended prompt rows", words(4 * rows))?,
                    block_table: gpu.buffer("block table", words(extents.workspace_blocks))?,
                    sampled: gpu.buffer("sampled rows", words(rows))?,
                    qkv: gpu.shared_buffer("projected rows", words(rows * shape.qkv_width()))?,
                    kv_rows: gpu.shared_buffer("new keys and values", words(rows * shape.kv_width()))?,
                    quantised_rows: match quantised_row_bytes(&layout) {
                        0 => None,
                        bytes => Some(gpu.shared_buffer("new keys and values, quantised", (rows * bytes) as u64)?),
                    },
                    attention: gpu.shared_buffer("attention output", words(rows * shape.q_width()))?,
                    host_kv: gpu.host_buffer("new keys and values", (rows * layout.new_row_bytes()) as u64)?,
                    host_queries: gpu.host_buffer("queries", words(rows * shape.qkv_width()))?,
                    host_attention: gpu.host_buffer("attention output", words(rows * shape.q_width()))?,
                    rows: DeviceRows::default(),
                    parts: Parts::default(),
                    tiles: Vec::new(),
                    n_host_queries: 0,
                })
            })
            .collect::<Result<Vec<_>, PageError>>()?;
        let workspace_bytes = extents.workspace_blocks as u64 * workspace_block_bytes(&config);
        let workspaces = (0..extents.workspaces)
            .map(|_| {
                Ok(Workspace {
                    blocks: gpu.shared_buffer("KV workspace", workspace_bytes)?,
                    staging: match lend_kv {
                        true => None,
                        false => Some(Staging {
                            bytes: gpu.host_buffer("KV on its way to the GPU", workspace_bytes)?,
                            last: Mutex::default(),
                        }),
                    },
                })
            })
            .collect::<Result<Vec<_>, PageError>>()?;
        let table = PageTable::new(&plan);
        let rope = rotary_table(&config, extents.max_positions);
        let hidden_rows = extents.group_rows() * shape.experts_per_token;
        let half = HalfExtents::of(&shape, extents.precision);
        let halves = match extents.precision {
            Precision::F32 => None,
            Precision::F16 => Some(HalfBuffers {
                rows: gpu.buffer("rows of f16", words(HalfExtents::n_rows(&extents) * half.rows / 2))?,
                scales: gpu.buffer("scales of rows", words(HalfExtents::n_rows(&extents)))?,
                hidden: gpu.buffer("expert hidden rows of f16", words(hidden_rows * half.hidden / 2))?,
                hidden_scales: gpu.buffer("scales of expert hidden rows", words(hidden_rows))?,
                ordered: gpu.buffer("rows of f16 by expert", half.ordered_bytes(extents.group_rows()))?,
                ordered_scales: gpu
                    .buffer("scales of rows by expert", words(half.ordered_rows(extents.group_rows())))?,
            }),
        };
        let [state_bytes, sum_bytes] = decode_attention::scratch_bytes(shape.q_heads, shape.head_width);
        let n_parts = extents.kept_parts() as u64;
        let mut machine = Machine {
            config,
            extents,
            dense: HashMap::new(),
            expert_dtype,
            table: Mutex::new(table),
            source: None,
            ring_start: 0,
            gate,
            up,
            down,
            slots_per_slab,
            matrix_bytes,
            sinks: Vec::new(),
            groups,
            micro_batches,
            workspaces,
            rope_table: gpu.buffer_with("rotary table", bytemuck::cast_slice(&rope))?,
            router_logits: gpu.buffer("router logits", words(rows * shape.experts))?,
            hidden: gpu.buffer("expert hidden rows", words(hidden_rows * shape.expert_width))?,
            places: gpu.buffer("expert places", words(2 * shape.experts))?,
            down_places: gpu.buffer("expert places of down", words(2 * shape.experts))?,
            head_rows: gpu.buffer("sampled residual rows", words(extents.head_rows * shape.d_model))?,
            head_normed: gpu.buffer("normed sampled rows", words(extents.head_rows * shape.d_model))?,
            logits: gpu.buffer("logits", words(extents.head_rows * shape.vocab))?,
            greedy: gpu.buffer("greedy ids", words(4 * extents.head_rows))?,
            host_heads: gpu.host_buffer("ids and logits", words(extents.head_rows * (4 + shape.vocab)))?,
            halves,
            tiles,
            preparing: None,
            attention_states: gpu.buffer("states of parts of decode rows", n_parts * state_bytes)?,
            attention_sums: gpu.buffer("sums of parts of decode rows", n_parts * sum_bytes)?,
            plan,
            pipelines,
        };
        machine.load(weights, kept, progress)?;
        Ok(machine)
    }

    /// Begins to compile what products in the f16 class may take, while weights are read: a driver takes a second and more for each, and the
    /// first passes would wait for one after the other.
    fn prepare_ahead(&self, dense: &[(Role, Dtype, u64)]) -> Option<Preparing> {
        self.halves.as_ref()?;
        if !self.pipelines.gpu().summary().cooperative {
            // Emulated ones take minutes.
            return None;
        }
        let Shape { d_model, experts, expert_width, experts_per_token, .. } = self.config.shape;
        let most = self.extents.rows_per_micro_batch as u32;
        let dense_tiles =
            [Operation::Matmul, Operation::NarrowMatmul].map(|operation| self.tiles.up_to(operation, most));
        let mut variants = Vec::new();
        for (role, dtype, _) in dense {
            let n_in = match role {
                Role::AttentionOutput { .. } => self.config.shape.q_width(),
                Role::Query { .. } | Role::QueryKeyValue { .. } | Role::Router { .. } | Role::LmHead => d_model,
                _ => continue,
            };
            let of_role = |tile: &cooperative::Tile| cooperative::matmul::kernel(*dtype, *tile, n_in as u32);
            variants.extend(dense_tiles.iter().flatten().map(of_role));
        }
        let assignments = self.extents.group_rows() * experts_per_token;
        let [n, e, a, d, f] = [assignments, experts, experts_per_token, d_model, expert_width].map(|n| n as u32);
        let layout = self.config.forward.experts;
        let shape = &self.config.shape;
        let gate_up = expert_gate_up::Params::plain(n, e, a, d, f).with_layout(Layout::gate_up(layout, shape));
        let down = expert_down::Params::plain(n, e, d, f).with_layout(Layout::down(layout, shape));
        for tile in self.tiles.up_to(Operation::GateUp, n / e) {
            let variant = cooperative::expert_gate_up::variant(self.expert_dtype, tile, &gate_up, true);
            variants.push((&cooperative::expert_gate_up::EXPERT_GATE_UP, variant));
        }
        for tile in self.tiles.up_to(Operation::Down, n / e) {
            let variant = cooperative::expert_down::variant(self.expert_dtype, tile, &down, true);
            variants.push((&cooperative::expert_down::EXPERT_DOWN, variant));
        }
        if let Some(cut) = self.prompt_cut() {
            let variant = cut.variant(&self.attention_shape(0));
            variants.push((&cooperative::prompt_attention::PROMPT_ATTENTION, variant));
        }
        let mut seen = HashSet::new();
        variants.retain(|(kernel, variant)| seen.insert((kernel.name, variant.clone())));
        Some(self.pipelines.prepare_ahead(variants))
    }

    fn load(
        &mut self,
        weights: &Weights,
        kept: Option<&PageSource>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<(), PageError> {
        let shape = self.config.shape;
        let resident: Vec<(usize, usize)> = (0..shape.layers)
            .flat_map(|layer| (0..shape.experts).map(move |expert| (layer, expert)))
            .filter(|(layer, expert)| self.plan.stays(*layer, *expert))
            .collect();
        let dense: Vec<_> = weights
            .inventory()
            .tensors()
            .iter()
            .filter(|tensor| !tensor.role.in_slots())
            .map(|tensor| (tensor.role, tensor.dtype, tensor.bytes()))
            .collect();
        self.preparing = self.prepare_ahead(&dense);
        let total = dense.iter().map(|(_, _, bytes)| *bytes).sum::<u64>()
            + resident.len() as u64 * self.matrix_bytes.iter().sum::<u64>();
        let mut done = 0;
        let gpu = self.pipelines.gpu().clone();
        let reader = Reader::new();
        for (role, dtype, bytes) in dense.iter().copied() {
            let tensor = weights.tensor(&reader, role)?;
            match joined_place(&dense, role, gpu.max_binding_bytes()) {
                Some((joined, at, total)) => {
                    let whole = match self.dense.entry(joined) {
                        Entry::Occupied(entry) => entry.into_mut(),
                        Entry::Vacant(entry) => {
                            let buffer = gpu.buffer(&format!("{joined:?}"), total)?;
                            entry.insert(Dense { buffer, dtype })
                        }
                    };
                    gpu.write(&whole.buffer, at, &tensor);
                }
                None => {
                    let dense = self.upload(role, dtype, &tensor)?;
                    self.dense.insert(role, dense);
                }
            }
            gpu.flush()?;
            done += bytes;
            progress(done, total);
        }
        let mut copied = None;
        for (layer, expert) in resident {
            let slot = self.plan.slot(0, layer, expert);
            let matrices = ExpertMatrix::ALL.into_iter().zip(self.matrix_bytes).filter(|(_, bytes)| *bytes > 0);
            let pieces: Vec<Piece> =
                matrices.map(|(matrix, bytes)| Piece { expert, matrix, bytes: 0..bytes }).collect();
            let target = |piece: &Piece| {
                let (slab, at) = self.slab_place(slot, piece);
                slab.at(at)
            };
            let ticket = match kept {
                Some(source) => source.load_expert(&gpu, layer, &pieces, target)?,
                None => None,
            };
            copied = ticket.or(copied);
            for piece in pieces {
                let n_bytes = piece.bytes.end;
                if ticket.is_none() {
                    let mut bytes = vec![0u8; n_bytes as usize];
                    for source in weights.inventory().slot_sources(layer, expert, piece.matrix, 0..n_bytes) {
                        let length = (source.range.end - source.range.start) as usize;
                        let into = &mut bytes[source.at as usize..][..length];
                        weights.read_by_all(&reader, source.role, source.range, into)?;
                    }
                    let (slab, at) = self.slab_place(slot, &piece);
                    gpu.write(slab, at, &bytes);
                    gpu.flush()?;
                }
                self.table.get_mut().expect("table lock").arrive(slot, layer, &piece, ticket);
                done += n_bytes;
                progress(done, total);
            }
        }
        copied.map_or(Ok(()), |ticket| gpu.wait_for(ticket))?;
        gpu.wait()?;
        Ok(())
    }

    /// A tensor that stays, as the checkpoint has it or, for small ones that are added, in f32.
    fn upload(&mut self, role: Role, dtype: Dtype, bytes: &[u8]) -> Result<Dense, GpuError> {
        let gpu = self.pipelines.gpu();
        let label = format!("{role:?}");
        if !role.kept_as_f32() {
            return Ok(Dense { buffer: gpu.buffer_with(&label, bytes)?, dtype });
        }
        let values = dtype.read_all(bytes);
        let buffer = gpu.buffer_with(&label, bytemuck::cast_slice(&values))?;
        if let Role::Sinks { layer } = role {
            assert_eq!(self.sinks.len(), layer, "tensors come in the order of a forward pass");
            self.sinks.push(values);
        }
        Ok(Dense { buffer, dtype: Dtype::F32 })
    }

    pub fn plan(&self) -> &PagePlan {
        &self.plan
    }

    pub fn extents(&self) -> &Extents {
        &self.extents
    }

    pub fn pipelines(&self) -> &Pipelines {
        &self.pipelines
    }

    pub fn gpu(&self) -> &Gpu {
        self.pipelines.gpu()
    }

    /// Where pages come from. None where nothing streams.
    pub fn source(&self) -> Option<&PageSource> {
        self.source.as_ref()
    }

    /// Gives the device back and keeps the source.
    pub fn into_source(self) -> Option<PageSource> {
        self.source
    }

    pub fn set_source(&mut self, source: PageSource) {
        self.source = Some(source);
    }

    /// The host's KV cache.
    pub fn kv_layout(&self) -> KvLayout {
        KvLayout::new(&self.config.shape, self.extents.kv_dtype)
    }

    fn dense(&self, role: Role) -> &Dense {
        &self.dense[&role.stored_as(&self.config)]
    }

    /// `[H]` scores that join the softmax of a layer's attention and have no value.
    pub fn sinks(&self, layer: usize) -> Option<&[f32]> {
        self.sinks.get(layer).map(Vec::as_slice)
    }

    /// Takes a micro-batch's rows for one pass; the first `n_host_queries` of them attend on the host.
    pub fn begin(&mut self, micro_batch: usize, rows: DeviceRows, n_host_queries: usize) {
        assert!(rows.ids.len() <= self.extents.rows_per_micro_batch, "the batcher keeps to the row limit");
        let attended = |rows: &[Attended]| -> Vec<paged_attention::Row> {
            let row = |a: &Attended| paged_attention::Row {
                row: a.row as u32,
                position: a.position as u32,
                first_block: a.blocks_at as u32,
            };
            rows.iter().map(row).collect()
        };
        let widest_window = self.config.widest_window().unwrap_or(0) as u32;
        let parts = Parts::new(&attended(&rows.decode), widest_window, self.extents.kept_parts());
        let tile_tokens = match self.prompt_cut() {
            Some(cut) => cut.tile_tokens(&self.attention_shape(0)),
            None => prompt_attention::tile_tokens(&self.attention_shape(0)),
        };
        let tiles = prompt_attention::tiles(&attended(&rows.prompt), tile_tokens);
        let buffers = &mut self.micro_batches[micro_batch];
        (buffers.rows, buffers.parts, buffers.tiles) = (rows, parts, tiles);
        buffers.n_host_queries = n_host_queries;
    }

    /// The micro-batch has no rows in this pass.
    pub fn leave_out(&mut self, micro_batch: usize) {
        self.begin(micro_batch, DeviceRows::default(), 0);
    }

    /// The pass has run: the next one begins in the ring where this one ended.
    pub fn end_pass(&mut self) {
        self.ring_start = self.plan.next_ring_start(self.ring_start);
    }

    /// Rows of a micro-batch in this pass.
    pub fn n_rows(&self, micro_batch: usize) -> usize {
        self.micro_batches[micro_batch].rows.ids.len()
    }

    /// The rows of a micro-batch in one of its group's buffers, each row of `width` words.
    fn region<'a>(&self, buffer: &'a Buffer, micro_batch: usize, width: usize) -> Slice<'a> {
        let start = self.extents.region_start(micro_batch);
        buffer.slice(words(start * width)..words((start + self.n_rows(micro_batch)) * width))
    }

    fn group(&self, micro_batch: usize) -> &GroupBuffers {
        &self.groups[self.extents.group_of(micro_batch)]
    }

    pub fn embed(&self, micro_batch: usize, after: &[Ticket]) -> Result<Ticket, GpuError> {
        let d_model = self.config.shape.d_model;
        let buffers = &self.micro_batches[micro_batch];
        let rows = &buffers.rows;
        let table = self.dense(Role::Embedding);
        let mut recorder = Recorder::timed(&self.pipelines);
        let r = &mut recorder;
        r.upload(&buffers.ids, 0, bytemuck::cast_slice(&rows.ids))?;
        r.upload(&buffers.positions, 0, bytemuck::cast_slice(&rows.positions))?;
        r.upload(&buffers.kv_slots, 0, bytemuck::cast_slice(&rows.kv_slots))?;
        r.upload(&buffers.decode_parts, 0, bytemuck::cast_slice(&buffers.parts.parts))?;
        r.upload(&buffers.decode_wholes, 0, bytemuck::cast_slice(&buffers.parts.wholes))?;
        r.upload(&buffers.prompt_tiles, 0, bytemuck::cast_slice(&buffers.tiles))?;
        r.upload(&buffers.block_table, 0, bytemuck::cast_slice(&rows.block_table))?;
        r.upload(&buffers.sampled, 0, bytemuck::cast_slice(&rows.sampled))?;
        let params = embed::Params { n_rows: rows.ids.len() as u32, d_model: d_model as u32 };
        let x = self.region(&self.group(micro_batch).x, micro_batch, d_model);
        embed::record(r, table.dtype, params, buffers.ids.whole(), table.buffer.whole(), x)?;
        recorder.submit_after(after)
    }

    /// Brings one layer of KV blocks of the host's pool to the micro-batch's workspace.
    ///
    /// # Safety
    /// * The blocks and the first `tokens` tokens of each stay as they are until the ticket is reached.
    pub unsafe fn upload_kv(
        &self,
        micro_batch: usize,
        layer: usize,
        uploads: &[KvUpload],
        pool: &KvPool<'_>,
        after: &[Ticket],
    ) -> Result<Ticket, GpuError> {
        let bytes = workspace_block_bytes(&self.config);
        let workspace = &self.workspaces[self.extents.workspace_of(micro_batch)];
        let Some(staging) = &workspace.staging else {
            let copies: Vec<CopyRange<'_>> = uploads
                .iter()
                .map(|upload| {
                    let at = layer as u64 * pool.layer_bytes + upload.at;
                    let from = pool.arenas[(at / KV_ARENA_BYTES) as usize].at(at % KV_ARENA_BYTES);
                    CopyRange::new(from, workspace.blocks.at(upload.to as u64 * bytes), bytes)
                })
                .collect();
            return self.gpu().copy(Line::ToDevice, &copies, after);
        };
        let (layout, head_width) = (self.kv_layout(), self.config.shape.head_width);
        let half_elements = BLOCK_TOKENS * head_width;
        let mut last = staging.last.lock().expect("staging lock");
        if let Some(ticket) = last.take() {
            self.gpu().wait_for(ticket)?;
        }
        let mut copies = Vec::with_capacity(uploads.len());
        for upload in uploads {
            let to = upload.to as u64 * bytes;
            // SAFETY: the last copy out of these bytes has run, and the lock keeps others out; only stored tokens of the pool are
            // read, which the caller vouches for.
            unsafe {
                let block = pool.pointer.add((layer as u64 * pool.layer_bytes + upload.at) as usize);
                let into = staging.bytes.slice_mut::<f16>(to..to + bytes);
                for (index, into) in into.chunks_exact_mut(half_elements).enumerate() {
                    let into = &mut into[..upload.tokens * head_width];
                    layout.read_half_at(index / 2, Half::BOTH[index % 2], block, upload.tokens, into);
                }
            }
            copies.push(CopyRange::new(staging.bytes.at(to), workspace.blocks.at(to), bytes));
        }
        let ticket = self.gpu().copy(Line::ToDevice, &copies, after)?;
        *last = Some(ticket);
        Ok(ticket)
    }

    fn norm(
        &self,
        recorder: &mut Recorder<'_>,
        role: Role,
        n_rows: usize,
        x: Slice<'_>,
        y: Slice<'_>,
    ) -> Result<(), GpuError> {
        let gain = self.dense(role);
        let (n_rows, d_model, eps) = (n_rows as u32, self.config.shape.d_model as u32, self.config.norm_eps);
        match self.config.forward.norm {
            Norm::Rms => {
                let params = rms_norm::Params { n_rows, d_model, eps };
                rms_norm::record(recorder, gain.dtype, params, x, gain.buffer.whole(), y)
            }
            Norm::Layer => {
                let params = layer_norm::Params { n_rows, d_model, eps };
                layer_norm::record(recorder, gain.dtype, params, x, gain.buffer.whole(), y)
            }
        }
    }

    /// `y[.., y_offset ..] += bias`, where the model has biases.
    fn add_bias(
        &self,
        recorder: &mut Recorder<'_>,
        role: Role,
        n_rows: usize,
        y: Slice<'_>,
        (y_stride, y_offset): (usize, usize),
    ) -> Result<(), GpuError> {
        if !self.config.forward.biases {
            return Ok(());
        }
        let bias = &self.dense(role).buffer;
        let params = add_bias::Params {
            n_rows: n_rows as u32,
            n_columns: (bias.size() / 4) as u32,
            y_stride: y_stride as u32,
            y_offset: y_offset as u32,
        };
        add_bias::record(recorder, params, bias.whole(), y)
    }

    /// What products read of rows `x`, `[n_rows, n_in]`; until the next rows are asked for.
    fn operand<'a>(
        &'a self,
        recorder: &mut Recorder<'_>,
        n_rows: usize,
        n_in: usize,
        x: Slice<'a>,
    ) -> Result<Operand<'a>, GpuError> {
        let Some(halves) = &self.halves else { return Ok(Operand::Full(x)) };
        half_rows::record(recorder, half_rows::Params::dense(n_rows as u32, n_in as u32), x, halves.rows())?;
        Ok(Operand::Half(halves.rows()))
    }

    /// Queries, keys and values of rows into `qkv`: projected, with biases, and normed.
    fn project_qkv(
        &self,
        recorder: &mut Recorder<'_>,
        layer: usize,
        n_rows: usize,
        x: Operand<'_>,
        qkv: Slice<'_>,
    ) -> Result<(), GpuError> {
        let shape = &self.config.shape;
        let (q, kv, all) = (shape.q_width(), shape.kv_width(), shape.qkv_width());
        let joined = Role::QueryKeyValue { layer };
        let is_joined = self.dense.contains_key(&joined);
        if is_joined {
            self.project(recorder, joined, n_rows, (shape.d_model, all), x, qkv, (all, 0), false)?;
        }
        if !self.config.forward.fused_qkv {
            for (role, bias, width, offset) in [
                (Role::Query { layer }, Role::QueryBias { layer }, q, 0),
                (Role::Key { layer }, Role::KeyBias { layer }, kv, q),
                (Role::Value { layer }, Role::ValueBias { layer }, kv, q + kv),
            ] {
                if !is_joined {
                    self.project(recorder, role, n_rows, (shape.d_model, width), x, qkv, (all, offset), false)?;
                }
                self.add_bias(recorder, bias, n_rows, qkv, (all, offset))?;
            }
        }
        let Some(norm) = self.config.forward.qk_norm else { return Ok(()) };
        for (role, width, offset) in [(Role::QueryNorm { layer }, q, 0), (Role::KeyNorm { layer }, kv, q)] {
            let segment = match norm {
                QkNorm::PerHead => shape.head_width,
                QkNorm::Whole => width,
            };
            let params = qk_norm::Params {
                n_rows: n_rows as u32,
                n_segments: (width / segment) as u32,
                width: segment as u32,
                stride: all as u32,
                offset: offset as u32,
                eps: self.config.norm_eps,
            };
            let gain = self.dense(role);
            qk_norm::record(recorder, gain.dtype, params, gain.buffer.whole(), qkv)?;
        }
        Ok(())
    }

    /// `y[.., y_offset ..] = x W^T`, or `+=` with `accumulate`.
    #[allow(clippy::too_many_arguments)]
    fn project(
        &self,
        recorder: &mut Recorder<'_>,
        role: Role,
        n_rows: usize,
        (n_in, n_out): (usize, usize),
        x: Operand<'_>,
        y: Slice<'_>,
        (y_stride, y_offset): (usize, usize),
        accumulate: bool,
    ) -> Result<(), GpuError> {
        let weight = self.dense(role);
        let w = weight.buffer.whole();
        let (n_rows, n_out, n_in) = (n_rows as u32, n_out as u32, n_in as u32);
        let (y_stride, y_offset, accumulate) = (y_stride as u32, y_offset as u32, accumulate as u32);
        match x {
            Operand::Full(x) => {
                let params =
                    matmul::Params { y_stride, y_offset, accumulate, ..matmul::Params::dense(n_rows, n_out, n_in) };
                matmul::record(recorder, &Variant::new(weight.dtype), params, x, w, y)
            }
            Operand::Half(x) => {
                let params = cooperative::matmul::Params {
                    y_stride,
                    y_offset,
                    accumulate,
                    ..cooperative::matmul::Params::dense(n_rows, n_out, n_in)
                };
                let tile = self.tiles.matmul(n_rows, n_out);
                cooperative::matmul::record(recorder, weight.dtype, tile, params, x, w, y)
            }
        }
    }

    pub fn pre_attention(&self, layer: usize, micro_batch: usize, after: &[Ticket]) -> Result<Ticket, GpuError> {
        let shape = &self.config.shape;
        let buffers = &self.micro_batches[micro_batch];
        let group = self.group(micro_batch);
        let n = self.n_rows(micro_batch);
        let mut recorder = Recorder::timed(&self.pipelines);
        let r = &mut recorder;
        let x = self.region(&group.x, micro_batch, shape.d_model);
        let normed = self.region(&group.normed, micro_batch, shape.d_model);
        self.norm(r, Role::AttentionNorm { layer }, n, x, normed)?;
        let normed = self.operand(r, n, shape.d_model, normed)?;
        self.project_qkv(r, layer, n, normed, buffers.qkv.whole())?;
        let params = rotary::Params {
            n_rows: n as u32,
            q_heads: shape.q_heads as u32,
            kv_heads: shape.kv_heads as u32,
            head_width: shape.head_width as u32,
            clip: self.config.forward.qkv_clip.unwrap_or(0.0),
        };
        let bindings = rotary::Bindings {
            qkv: buffers.qkv.whole(),
            positions: buffers.positions.whole(),
            rope_table: self.rope_table.whole(),
            kv_slots: buffers.kv_slots.whole(),
            kv_rows: buffers.kv_rows.whole(),
            kv_blocks: self.workspaces[self.extents.workspace_of(micro_batch)].blocks.whole(),
        };
        rotary::record(r, params, bindings)?;
        if let Some(new_rows) = &buffers.quantised_rows {
            let params = kv_quantise::Params {
                n_rows: n as u32,
                kv_heads: shape.kv_heads as u32,
                head_width: shape.head_width as u32,
            };
            let rotary::Bindings { kv_rows, kv_slots, kv_blocks, .. } = bindings;
            let bindings = kv_quantise::Bindings { kv_rows, kv_slots, new_rows: new_rows.whole(), kv_blocks };
            kv_quantise::record(r, params, bindings)?;
        }
        recorder.submit_after(after)
    }

    /// New keys and values of all rows, and the queries of those that the host attends for, to host memory.
    pub fn rows_to_host(&self, micro_batch: usize, after: &[Ticket]) -> Result<Ticket, GpuError> {
        let shape = &self.config.shape;
        let buffers = &self.micro_batches[micro_batch];
        let (n, n_queries) = (self.n_rows(micro_batch), buffers.n_host_queries);
        let (q, all) = (shape.q_width(), shape.qkv_width());
        let new_rows = buffers.quantised_rows.as_ref().unwrap_or(&buffers.kv_rows);
        let kv = self.kv_layout().new_row_bytes() / 4;
        match self.extents.rows {
            RowPath::Copies => {
                let kv = CopyRange::new(new_rows.at(0), buffers.host_kv.at(0), words(n * kv));
                let q = CopyRange::new(buffers.qkv.at(0), buffers.host_queries.at(0), words(n_queries * all));
                self.gpu().copy(Line::ToHost, &[kv, q], after)
            }
            RowPath::Kernels => {
                let mut recorder = Recorder::timed(&self.pipelines);
                let r = &mut recorder;
                let params = |n_rows: usize, row_words: usize, stride: usize| copy_rows::Params {
                    n_rows: n_rows as u32,
                    row_words: row_words as u32,
                    from_stride: stride as u32,
                    to_stride: stride as u32,
                };
                copy_rows::record(r, params(n, kv, kv), new_rows.whole(), buffers.host_kv.bound())?;
                copy_rows::record(r, params(n_queries, q, all), buffers.qkv.whole(), buffers.host_queries.bound())?;
                recorder.submit_after(after)
            }
        }
    }

    /// New keys and values of a micro-batch on the host: a [new row](KvLayout::new_row_bytes) of each of its rows.
    ///
    /// # Safety
    /// * [`rows_to_host`](Self::rows_to_host) of this layer has been waited for, and none of a later one has started.
    pub unsafe fn host_kv(&self, micro_batch: usize) -> &[u8] {
        let bytes = (self.n_rows(micro_batch) * self.kv_layout().new_row_bytes()) as u64;
        // SAFETY: the caller's.
        unsafe { self.micro_batches[micro_batch].host_kv.slice(0..bytes) }
    }

    /// Projected rows of those that attend on the host, `[n, (H + 2 G) K]`, of which the queries, `H K`, are there.
    ///
    /// # Safety
    /// * As for [`host_kv`](Self::host_kv).
    pub unsafe fn host_queries(&self, micro_batch: usize) -> &[f32] {
        let buffers = &self.micro_batches[micro_batch];
        let bytes = words(buffers.n_host_queries * self.config.shape.qkv_width());
        // SAFETY: the caller's.
        unsafe { buffers.host_queries.slice(0..bytes) }
    }

    /// Where the host puts its attention output, `[n, H, K]`.
    ///
    /// # Safety
    /// * The last [`rows_to_device`](Self::rows_to_device) of the micro-batch has ended, and the next one starts after this.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn host_attention(&self, micro_batch: usize) -> &mut [f32] {
        let buffers = &self.micro_batches[micro_batch];
        let bytes = words(buffers.n_host_queries * self.config.shape.q_width());
        // SAFETY: the caller's.
        unsafe { buffers.host_attention.slice_mut(0..bytes) }
    }

    fn attention_shape(&self, layer: usize) -> paged_attention::Shape {
        let shape = &self.config.shape;
        paged_attention::Shape {
            q_heads: shape.q_heads as u32,
            kv_heads: shape.kv_heads as u32,
            head_width: shape.head_width as u32,
            q_stride: shape.qkv_width() as u32,
            window: self.config.window(layer).unwrap_or(0) as u32,
            scale: attention_scale(&self.config),
            has_sinks: self.config.forward.sinks,
        }
    }

    /// How prompt rows attend on cooperative matrices: in the f16 class, where their kernel has a text for these heads.
    fn prompt_cut(&self) -> Option<Cut> {
        let shape = self.attention_shape(0);
        self.halves.as_ref().map(|_| Cut::of(&shape)).filter(|cut| cut.fits(&shape))
    }

    /// Prompt rows, and decode rows where [`DeviceRows::decode`] named any, attend over the workspace.
    pub fn gpu_attention(&self, layer: usize, micro_batch: usize, after: &[Ticket]) -> Result<Ticket, GpuError> {
        let buffers = &self.micro_batches[micro_batch];
        let mut recorder = Recorder::timed(&self.pipelines);
        let r = &mut recorder;
        let shape = self.attention_shape(layer);
        let bindings = paged_attention::Bindings {
            qkv: buffers.qkv.whole(),
            block_table: buffers.block_table.whole(),
            kv_blocks: self.workspaces[self.extents.workspace_of(micro_batch)].blocks.whole(),
            out: buffers.attention.whole(),
            sinks: self.where_there(self.config.forward.sinks, Role::Sinks { layer }),
        };
        let scratch =
            decode_attention::Scratch { states: self.attention_states.whole(), sums: self.attention_sums.whole() };
        let lists = [buffers.decode_parts.whole(), buffers.decode_wholes.whole()];
        decode_attention::record(r, &shape, &buffers.parts.batches, lists, scratch, bindings)?;
        let tiles = (buffers.prompt_tiles.whole(), buffers.tiles.len());
        match self.prompt_cut() {
            Some(cut) => cooperative::prompt_attention::record(r, &shape, cut, tiles, bindings)?,
            None => prompt_attention::record(r, &shape, tiles, bindings)?,
        }
        recorder.submit_after(after)
    }

    /// The host's attention output to the GPU: the first rows of the micro-batch.
    pub fn rows_to_device(&self, micro_batch: usize, after: &[Ticket]) -> Result<Ticket, GpuError> {
        let width = self.config.shape.q_width();
        let buffers = &self.micro_batches[micro_batch];
        let n = buffers.n_host_queries;
        match self.extents.rows {
            RowPath::Copies => {
                let copy = CopyRange::new(buffers.host_attention.at(0), buffers.attention.at(0), words(n * width));
                self.gpu().copy(Line::ToDevice, &[copy], after)
            }
            RowPath::Kernels => {
                let mut recorder = Recorder::timed(&self.pipelines);
                let params = copy_rows::Params {
                    n_rows: n as u32,
                    row_words: width as u32,
                    from_stride: width as u32,
                    to_stride: width as u32,
                };
                let (from, to) = (buffers.host_attention.bound(), buffers.attention.whole());
                copy_rows::record(&mut recorder, params, from, to)?;
                recorder.submit_after(after)
            }
        }
    }

    pub fn post_attention(&self, layer: usize, micro_batch: usize, after: &[Ticket]) -> Result<Ticket, GpuError> {
        let shape = &self.config.shape;
        let buffers = &self.micro_batches[micro_batch];
        let group = self.group(micro_batch);
        let n = self.n_rows(micro_batch);
        let mut recorder = Recorder::timed(&self.pipelines);
        let r = &mut recorder;
        let output = (shape.q_width(), shape.d_model);
        let x = self.region(&group.x, micro_batch, shape.d_model);
        let normed = self.region(&group.normed, micro_batch, shape.d_model);
        let role = Role::AttentionOutput { layer };
        let attention = self.operand(r, n, shape.q_width(), buffers.attention.whole())?;
        self.project(r, role, n, output, attention, x, (shape.d_model, 0), true)?;
        self.add_bias(r, Role::AttentionOutputBias { layer }, n, x, (shape.d_model, 0))?;
        self.norm(r, Role::ExpertNorm { layer }, n, x, normed)?;
        let router = (shape.d_model, shape.experts);
        let logits = self.router_logits.whole();
        let normed = self.operand(r, n, shape.d_model, normed)?;
        self.project(r, Role::Router { layer }, n, router, normed, logits, (shape.experts, 0), false)?;
        self.add_bias(r, Role::RouterBias { layer }, n, logits, (shape.experts, 0))?;
        let params = router_topk::Params {
            n_rows: n as u32,
            n_experts: shape.experts as u32,
            n_chosen: shape.experts_per_token as u32,
            renormalise: self.config.forward.renormalise as u32,
        };
        let chosen = self.region(&group.chosen, micro_batch, shape.experts_per_token);
        let chosen_weights = self.region(&group.chosen_weights, micro_batch, shape.experts_per_token);
        router_topk::record(r, params, logits, chosen, chosen_weights)?;
        recorder.submit_after(after)
    }

    /// The slab of a piece's matrix, and where in it a slot's piece starts.
    fn slab_place(&self, slot: usize, piece: &Piece) -> (&Buffer, u64) {
        let slabs = match piece.matrix {
            ExpertMatrix::Gate => &self.gate,
            ExpertMatrix::Up => &self.up,
            ExpertMatrix::Down => &self.down,
        };
        let at = self.place(slot, piece.matrix).offset_words as u64 * 4 + piece.bytes.start;
        (&slabs.buffers[slot / self.slots_per_slab], at)
    }

    /// Where the slab of `matrix` has a slot.
    fn place(&self, slot: usize, matrix: ExpertMatrix) -> Place {
        let slot_bytes = PageShape::slot_bytes(self.matrix_bytes[matrix as usize]);
        let word = (slot % self.slots_per_slab) as u64 * slot_bytes / 4;
        Place { slab: (slot / self.slots_per_slab) as u32, offset_words: word as u32 }
    }

    /// The buffer of a role that not every model has; else any, for a binding that is not read.
    fn where_there(&self, there: bool, role: Role) -> Slice<'_> {
        if there { self.dense(role).buffer.whole() } else { self.places.whole() }
    }

    /// Number of a page among its layer's.
    fn page_number(&self, chunk: usize, page: usize) -> usize {
        self.plan.chunks()[..chunk].iter().map(|chunk| chunk.pages.len()).sum::<usize>() + page
    }

    fn load_request<'a>(
        &'a self,
        weights: &'a Weights,
        threads: &'a rayon::ThreadPool,
        layer: usize,
        number: usize,
    ) -> LoadRequest<'a> {
        let layer = layer % self.config.shape.layers;
        LoadRequest { gpu: self.gpu(), weights, plan: &self.plan, threads, layer, number }
    }

    /// Relay: copies a page into pinned memory.
    pub fn pin_page(
        &self,
        weights: &Weights,
        threads: &rayon::ThreadPool,
        layer: usize,
        chunk: usize,
        page: usize,
    ) -> Result<(), PageError> {
        let source = self.source.as_ref().expect("where experts stream there is a source");
        source.pin(&self.load_request(weights, threads, layer, self.page_number(chunk, page)))
    }

    /// Brings one page of a layer's chunk into its slots.
    pub fn load_page(
        &self,
        weights: &Weights,
        threads: &rayon::ThreadPool,
        layer: usize,
        chunk: usize,
        page: usize,
        after: &[Ticket],
    ) -> Result<Ticket, PageError> {
        let source = self.source.as_ref().expect("where experts stream there is a source");
        let request = self.load_request(weights, threads, layer, self.page_number(chunk, page));
        let slot = |piece: &Piece| self.plan.slot(self.ring_start, layer, piece.expert);
        let target = |piece: &Piece| {
            let (slab, at) = self.slab_place(slot(piece), piece);
            slab.at(at)
        };
        let ticket = source.load(&request, target, after)?;
        let mut table = self.table.lock().expect("table lock");
        for piece in &self.plan.chunks()[chunk].pages[page].pieces {
            table.arrive(slot(piece), request.layer, piece, Some(ticket));
        }
        Ok(ticket)
    }

    /// Bytes of a page.
    pub fn page_bytes(&self, chunk: usize, page: usize) -> u64 {
        self.plan.chunks()[chunk].pages[page].bytes()
    }

    /// Rows of a group's buffers up to the last one that is there.
    fn group_extent(&self, group: usize) -> usize {
        let end = |micro_batch: usize| match self.n_rows(micro_batch) {
            0 => 0,
            n => self.extents.region_start(micro_batch) + n,
        };
        self.members(group).map(end).max().unwrap_or(0)
    }

    fn members(&self, group: usize) -> Range<usize> {
        let size = self.extents.group_size();
        group * size..((group + 1) * size).min(self.extents.micro_batches)
    }

    /// Rows of a group in this pass.
    pub fn group_rows(&self, group: usize) -> usize {
        self.members(group).map(|micro_batch| self.n_rows(micro_batch)).sum()
    }

    /// The experts of one chunk over a group's rows; before the first chunk the rows are sorted by expert, after the last one
    /// their weighted sum joins the residual rows.
    pub fn experts(&self, layer: usize, group: usize, chunk: usize, after: &[Ticket]) -> Result<Ticket, GpuError> {
        let shape = &self.config.shape;
        let buffers = &self.groups[group];
        let n_chosen = shape.experts_per_token;
        let extent = self.group_extent(group);
        let n_assignments = (extent * n_chosen) as u32;
        let mut recorder = Recorder::timed(&self.pipelines);
        let r = &mut recorder;
        if chunk == 0 {
            self.mark_gaps(r, group, extent)?;
            let params = expert_sort::Params { n_assignments, n_experts: shape.experts as u32 };
            let (chosen, offsets) = (buffers.chosen.whole(), buffers.offsets.whole());
            expert_sort::record(r, params, chosen, offsets, buffers.permutation.whole())?;
        }
        let (places, down_places, mut tickets) = self.places(layer, chunk);
        tickets.extend(after);
        r.upload(&self.places, 0, bytemuck::cast_slice(&places))?;
        r.upload(&self.down_places, 0, bytemuck::cast_slice(&down_places))?;
        let forward = &self.config.forward;
        let biased = forward.biases as u32;
        let (n_experts, n_chosen_u32) = (shape.experts as u32, n_chosen as u32);
        let (d_model, expert_width) = (shape.d_model as u32, shape.expert_width as u32);
        let limit = match forward.activation {
            Activation::SwiGlu => 0.0,
            Activation::ClampedSwiGlu { limit } => limit,
        };
        let params = expert_gate_up::Params::plain(n_assignments, n_experts, n_chosen_u32, d_model, expert_width)
            .with_layout(Layout::gate_up(forward.experts, shape));
        let params = expert_gate_up::Params { biased, limit, ..params };
        let down_params = expert_down::Params::plain(n_assignments, n_experts, d_model, expert_width)
            .with_layout(Layout::down(forward.experts, shape));
        let down_params = expert_down::Params { biased, ..down_params };
        let (permutation, offsets) = (buffers.permutation.whole(), buffers.offsets.whole());
        let (places, h, gate) = (self.places.whole(), self.hidden.whole(), self.gate.bindings());
        let up = if forward.experts.gate_holds_up() { gate } else { self.up.bindings() };
        let bias = self.where_there(forward.biases, Role::GateUpBias { layer });
        let (down_places, y, down) = (self.down_places.whole(), buffers.expert_out.whole(), self.down.bindings());
        let down_bias = self.where_there(forward.biases, Role::DownBias { layer });
        match &self.halves {
            None => {
                let x = buffers.normed.whole();
                let variant = Variant::new(self.expert_dtype);
                let bindings = expert_gate_up::Bindings { x, permutation, offsets, places, h, gate, up, bias };
                expert_gate_up::record(r, &variant, params, bindings)?;
                let (places, bias) = (down_places, down_bias);
                let bindings = expert_down::Bindings { h, permutation, offsets, places, y, down, bias };
                expert_down::record(r, &variant, down_params, bindings)?;
            }
            Some(halves) => {
                // Slots start at multiples of 256 bytes.
                let weights = (self.expert_dtype, true);
                let per_expert = n_assignments / n_experts;
                // Of this chunk's experts: other chunks' rows have been there, or will be.
                let experts = &self.plan.chunks()[chunk].experts;
                let experts = [experts.start as u32, experts.end as u32];
                let order = |permutation| ByExpert { n_experts, experts, offsets, permutation };
                let tile = self.tiles.gate_up(per_expert);
                let (x, params_of_x) = (buffers.normed.whole(), |n| half_rows::Params::dense(n, d_model));
                let x = if tile.takes_rows_by_expert() {
                    let order = order(Some((permutation, n_chosen_u32)));
                    half_rows::record_by_expert(r, params_of_x(n_assignments), order, x, halves.ordered())?;
                    halves.ordered()
                } else {
                    half_rows::record(r, params_of_x(extent as u32), x, halves.rows())?;
                    halves.rows()
                };
                let bindings = expert_gate_up::Bindings { x, permutation, offsets, places, h, gate, up, bias };
                cooperative::expert_gate_up::record(r, weights, tile, params, bindings)?;
                let tile = self.tiles.down(per_expert);
                let params = half_rows::Params::dense(n_assignments, expert_width);
                let h = if tile.takes_rows_by_expert() {
                    half_rows::record_by_expert(r, params, order(None), h, halves.ordered())?;
                    halves.ordered()
                } else {
                    half_rows::record_between(r, params, experts, offsets, h, halves.hidden())?;
                    halves.hidden()
                };
                let (places, bias) = (down_places, down_bias);
                let bindings = expert_down::Bindings { h, permutation, offsets, places, y, down, bias };
                cooperative::expert_down::record(r, weights, tile, down_params, bindings)?;
            }
        }
        if chunk + 1 == self.plan.chunks().len() {
            let params = expert_combine::Params {
                n_rows: extent as u32,
                n_chosen: n_chosen as u32,
                d_model: shape.d_model as u32,
            };
            let (weights, outputs) = (buffers.chosen_weights.whole(), buffers.expert_out.whole());
            expert_combine::record(r, params, weights, outputs, buffers.x.whole())?;
        }
        recorder.submit_after(&tickets)
    }

    /// Where the experts of a chunk lie (gate and up, then down), and when the last of them will be there.
    fn places(&self, layer: usize, chunk: usize) -> (Vec<Place>, Vec<Place>, Vec<Ticket>) {
        let mut places = vec![Place::ABSENT; self.config.shape.experts];
        let mut down_places = places.clone();
        let mut tickets = Vec::new();
        let table = self.table.lock().expect("table lock");
        for expert in self.plan.chunks()[chunk].experts.clone() {
            let slot = self.plan.slot(self.ring_start, layer, expert);
            let held = table.holds(slot, layer, expert);
            tickets.extend(held.unwrap_or_else(|| panic!("expert {expert} of layer {layer} is not in slot {slot}")));
            places[expert] = self.place(slot, ExpertMatrix::Gate);
            down_places[expert] = self.place(slot, ExpertMatrix::Down);
        }
        (places, down_places, tickets)
    }

    /// Between the regions of a group's micro-batches there are rows that nobody computed: no expert takes them.
    fn mark_gaps(&self, r: &mut Recorder<'_>, group: usize, extent: usize) -> Result<(), GpuError> {
        let n_chosen = self.config.shape.experts_per_token;
        for micro_batch in self.members(group) {
            let start = self.extents.region_start(micro_batch) + self.n_rows(micro_batch);
            let end = (self.extents.region_start(micro_batch) + self.extents.region_rows()).min(extent);
            if start < end {
                let nobody = vec![u32::MAX; (end - start) * n_chosen];
                r.upload(&self.groups[group].chosen, words(start * n_chosen), bytemuck::cast_slice(&nobody))?;
            }
        }
        Ok(())
    }

    /// Final norm and LM head over the sampled rows; greedy ids of all of them, whole logits of those in `wants_logits`
    /// (ascending indices into the sampled rows), `[n, V]`. Waits for them.
    pub fn head(&self, micro_batch: usize, wants_logits: &[usize], after: &[Ticket]) -> Result<Heads, GpuError> {
        let shape = &self.config.shape;
        let (d_model, vocab) = (shape.d_model, shape.vocab);
        let buffers = &self.micro_batches[micro_batch];
        let n_sampled = buffers.rows.sampled.len();
        let x = self.region(&self.group(micro_batch).x, micro_batch, d_model);
        let mut heads = Heads::default();
        heads.samples.reserve(n_sampled);
        heads.logits.reserve(wants_logits.len() * vocab);
        // The list of sampled rows is bound at each portion's start: portions are multiples of the binding alignment.
        for first in (0..n_sampled).step_by(self.extents.head_rows) {
            let n = (n_sampled - first).min(self.extents.head_rows);
            let mut recorder = Recorder::timed(&self.pipelines);
            let r = &mut recorder;
            let (rows, normed) = (self.head_rows.whole(), self.head_normed.whole());
            let sampled = buffers.sampled.slice(words(first)..words(first + n));
            let gather = embed::Params { n_rows: n as u32, d_model: d_model as u32 };
            embed::record(r, Dtype::F32, gather, sampled, x, rows)?;
            self.norm(r, Role::FinalNorm, n, rows, normed)?;
            let normed = self.operand(r, n, d_model, normed)?;
            self.project(r, Role::LmHead, n, (d_model, vocab), normed, self.logits.whole(), (vocab, 0), false)?;
            let params = lm_head_sample::Params { n_rows: n as u32, vocab: vocab as u32 };
            lm_head_sample::record(r, params, self.logits.whole(), self.greedy.whole())?;
            r.download(self.greedy.slice(0..words(4 * n)), &self.host_heads, 0);
            let mut end = words(4 * n);
            for index in wants_logits.iter().filter(|index| (first..first + n).contains(*index)) {
                let row = index - first;
                r.download(self.logits.slice(words(row * vocab)..words((row + 1) * vocab)), &self.host_heads, end);
                end += words(vocab);
            }
            let ticket = recorder.submit_after(after)?;
            self.gpu().wait_for(ticket)?;
            // SAFETY: the downloads have been waited for, and only this lane uses the buffer.
            unsafe {
                heads.samples.extend_from_slice(self.host_heads.slice::<Sample>(0..words(4 * n)));
                heads.logits.extend_from_slice(self.host_heads.slice::<f32>(words(4 * n)..end));
            }
        }
        Ok(heads)
    }
}

/// Query, key and value projections of a layer lie one after the other where they can, so that one product makes all three: the role of
/// the joined tensor, where in it `role` starts, and its bytes.
fn joined_place(dense: &[(Role, Dtype, u64)], role: Role, binding_bytes: u64) -> Option<(Role, u64, u64)> {
    let (Role::Query { layer } | Role::Key { layer } | Role::Value { layer }) = role else { return None };
    let part = |role| dense.iter().find(|(other, ..)| *other == role);
    let [q, k, v] = [part(Role::Query { layer })?, part(Role::Key { layer })?, part(Role::Value { layer })?];
    let whole_words = [q, k, v].iter().all(|(_, dtype, bytes)| *dtype == q.1 && bytes.is_multiple_of(4));
    let at = match role {
        Role::Query { .. } => 0,
        Role::Key { .. } => q.2,
        _ => q.2 + k.2,
    };
    let total = q.2 + k.2 + v.2;
    (whole_words && total <= binding_bytes).then_some((Role::QueryKeyValue { layer }, at, total))
}

/// Cosine and sine of every position and pair, as the model turns its queries and keys.
fn rotary_table(config: &ModelConfig, n_positions: usize) -> Vec<f32> {
    let (head_width, theta) = (config.shape.head_width, config.rope_theta as f32);
    match &config.forward.yarn {
        Some(yarn) => yarn_rope_table(head_width, theta, yarn, n_positions),
        None => rope_table(head_width, theta, n_positions),
    }
}

/// Factor on `q · k`.
pub fn attention_scale(config: &ModelConfig) -> f32 {
    1.0 / (config.shape.head_width as f32).sqrt()
}

/// Blocks that hold `tokens` tokens.
pub fn blocks_for(tokens: usize) -> usize {
    tokens.div_ceil(BLOCK_TOKENS)
}
