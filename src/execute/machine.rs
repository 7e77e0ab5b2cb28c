//! A model on the GPU: its dense weights, the slots of its experts, the buffers of each group, and the kernels of each stage.
//!
//! In: a checkpoint, a [`PagePlan`], extents. Out: what each [`Work`](crate::schedule::Work) task does on the device side; the
//! host side (KV cache, CPU attention, sampling) is the engine's.
//!
//! Always on the GPU: embedding, norms, projections, routers, LM head. Experts come through pages into slots; a slot is the
//! same place in three slabs (gate, up, down). Per group: the residual rows and everything that must outlive a stage;
//! scratch that does not is shared. Nothing is allocated after [`Machine::open`].

use std::collections::HashMap;

use half::f16;

use crate::checkpoint::{Checkpoint, Dtype, TensorView};
use crate::gpu::{Buffer, GpuError, Pipelines, Recorder, Slice, Variant};
use crate::kernels::lm_head_sample::Sample;
use crate::kernels::{
    add_bias, decode_attention, embed, expert_combine, expert_down, expert_gate_up, expert_sort, layer_norm,
    lm_head_sample, matmul, paged_attention, prompt_attention, qk_norm, rms_norm, rotary, router_topk,
    slabs::{Layout, N_SLABS, Place},
};
use crate::memory::kv_cache::{BLOCK_TOKENS, KvLayout};
use crate::memory::pages::{PagePlan, PageShape, PageTable, Piece};
use crate::model::{Activation, ExpertMatrix, ModelConfig, Norm, QkNorm, Role};
use crate::reference::rotary::{rope_table, yarn_rope_table};

/// Extents of everything that is allocated at open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extents {
    pub groups: usize,
    pub rows_per_group: usize,
    /// KV blocks of the GPU workspace.
    pub workspace_blocks: usize,
    /// Positions 0.. that the rotary table covers.
    pub max_positions: usize,
    /// Rows whose logits exist at a time.
    pub head_rows: usize,
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

/// What a group keeps over stages.
struct GroupBuffers {
    ids: Buffer,
    positions: Buffer,
    /// Workspace slot of each row's new key and value, or [`NO_SLOT`].
    kv_slots: Buffer,
    attended_decode: Buffer,
    attended_prompt: Buffer,
    block_table: Buffer,
    sampled: Buffer,
    /// [T, D] residual stream.
    x: Buffer,
    /// [T, D] normed rows: input of the experts.
    normed: Buffer,
    chosen: Buffer,
    chosen_weights: Buffer,
    offsets: Buffer,
    permutation: Buffer,
    /// [T * A, D] expert outputs by assignment.
    expert_out: Buffer,
    n_rows: usize,
    n_sampled: usize,
    n_decode_attended: usize,
    n_prompt_attended: usize,
}

/// Marks a row whose key and value the workspace does not need.
pub const NO_SLOT: u32 = u32::MAX;

/// A row that attends on the GPU.
#[derive(Debug, Clone, Copy)]
pub struct Attended {
    /// Row of the group.
    pub row: usize,
    pub position: usize,
    /// Where its sequence's blocks start in the block table.
    pub blocks_at: usize,
}

/// A group's rows as the device needs them.
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

/// See the module's text.
pub struct Machine {
    pipelines: Pipelines,
    config: ModelConfig,
    extents: Extents,
    dense: HashMap<Role, Dense>,
    expert_dtype: Dtype,
    plan: PagePlan,
    table: PageTable,
    gate: Slabs,
    up: Slabs,
    down: Slabs,
    slots_per_slab: usize,
    /// By [`ExpertMatrix::ALL`].
    matrix_bytes: [u64; 3],
    /// `[H]` of each layer, where the model has sinks.
    sinks: Vec<Vec<f32>>,
    groups: Vec<GroupBuffers>,
    rope_table: Buffer,
    qkv: Buffer,
    kv_rows: Buffer,
    kv_blocks: Buffer,
    /// [T, H, K]
    attention: Buffer,
    router_logits: Buffer,
    /// [T * A, F]
    hidden: Buffer,
    /// `[E]` of gate, and of up in its slabs.
    places: Buffer,
    down_places: Buffer,
    head_rows: Buffer,
    head_normed: Buffer,
    logits: Buffer,
    greedy: Buffer,
}

fn words(n: usize) -> u64 {
    4 * n as u64
}

/// Bytes of one KV block of one layer.
pub fn workspace_block_bytes(config: &ModelConfig) -> u64 {
    let shape = &config.shape;
    let layout = KvLayout { layers: 1, kv_heads: shape.kv_heads, head_width: shape.head_width };
    layout.bytes_per_block() as u64
}

impl Machine {
    /// Allocates everything, uploads the dense weights and the resident experts. `progress(done, total)` in bytes.
    pub fn open(
        pipelines: Pipelines,
        checkpoint: &Checkpoint,
        plan: PagePlan,
        extents: Extents,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Machine, GpuError> {
        let gpu = pipelines.gpu().clone();
        let config = checkpoint.config().clone();
        let shape = config.shape;
        let expert_dtype = checkpoint.inventory().expert_dtype().expect("mixed types were refused before");
        let matrix_bytes = checkpoint.inventory().slot_bytes().expect("mixed types were refused before");
        let slot_bytes = matrix_bytes.map(PageShape::slot_bytes);
        let largest = slot_bytes.into_iter().max().expect("three kinds");
        let slots_per_slab = ((gpu.max_binding_bytes() / largest) as usize).max(1);
        let slabs = |what: &str, slot_bytes: u64| -> Result<Slabs, GpuError> {
            let mut left = plan.n_slots();
            let mut buffers = Vec::new();
            while left > 0 && slot_bytes > 0 {
                let n = left.min(slots_per_slab);
                buffers.push(gpu.buffer(&format!("{what} slab {}", buffers.len()), n as u64 * slot_bytes)?);
                left -= n;
            }
            Ok(Slabs { buffers })
        };
        let [gate, up, down] = slot_bytes;
        let (gate, up, down) = (slabs("gate", gate)?, slabs("up", up)?, slabs("down", down)?);
        let rows = extents.rows_per_group;
        let assignments = rows * shape.experts_per_token;
        let groups = (0..extents.groups)
            .map(|_| {
                Ok(GroupBuffers {
                    ids: gpu.buffer("token ids", words(rows))?,
                    positions: gpu.buffer("positions", words(rows))?,
                    kv_slots: gpu.buffer("kv slots", words(rows))?,
                    attended_decode: gpu.buffer("attended decode rows", words(4 * rows))?,
                    attended_prompt: gpu.buffer("attended prompt rows", words(4 * rows))?,
                    block_table: gpu.buffer("block table", words(extents.workspace_blocks))?,
                    sampled: gpu.buffer("sampled rows", words(rows))?,
                    x: gpu.buffer("residual rows", words(rows * shape.d_model))?,
                    normed: gpu.buffer("normed rows", words(rows * shape.d_model))?,
                    chosen: gpu.buffer("chosen experts", words(assignments))?,
                    chosen_weights: gpu.buffer("expert weights of rows", words(assignments))?,
                    offsets: gpu.buffer("expert offsets", words(shape.experts + 1))?,
                    permutation: gpu.buffer("rows by expert", words(assignments))?,
                    expert_out: gpu.buffer("expert outputs", words(assignments * shape.d_model))?,
                    n_rows: 0,
                    n_sampled: 0,
                    n_decode_attended: 0,
                    n_prompt_attended: 0,
                })
            })
            .collect::<Result<Vec<_>, GpuError>>()?;
        let table = PageTable::new(&plan);
        let rope = rotary_table(&config, extents.max_positions);
        let mut machine = Machine {
            config,
            extents,
            dense: HashMap::new(),
            expert_dtype,
            table,
            gate,
            up,
            down,
            slots_per_slab,
            matrix_bytes,
            sinks: Vec::new(),
            groups,
            rope_table: gpu.buffer_with("rotary table", bytemuck::cast_slice(&rope))?,
            qkv: gpu.buffer("projected rows", words(rows * shape.qkv_width()))?,
            kv_rows: gpu.buffer("new keys and values", words(rows * shape.kv_width()))?,
            kv_blocks: gpu
                .buffer("KV workspace", extents.workspace_blocks as u64 * workspace_block_bytes(checkpoint.config()))?,
            attention: gpu.buffer("attention output", words(rows * shape.q_width()))?,
            router_logits: gpu.buffer("router logits", words(rows * shape.experts))?,
            hidden: gpu.buffer("expert hidden rows", words(assignments * shape.expert_width))?,
            places: gpu.buffer("expert places", words(2 * shape.experts))?,
            down_places: gpu.buffer("expert places of down", words(2 * shape.experts))?,
            head_rows: gpu.buffer("sampled residual rows", words(extents.head_rows * shape.d_model))?,
            head_normed: gpu.buffer("normed sampled rows", words(extents.head_rows * shape.d_model))?,
            logits: gpu.buffer("logits", words(extents.head_rows * shape.vocab))?,
            greedy: gpu.buffer("greedy ids", words(4 * extents.head_rows))?,
            plan,
            pipelines,
        };
        machine.load(checkpoint, progress)?;
        Ok(machine)
    }

    fn load(&mut self, checkpoint: &Checkpoint, progress: &mut dyn FnMut(u64, u64)) -> Result<(), GpuError> {
        let shape = self.config.shape;
        let resident: Vec<(usize, usize)> = (0..shape.layers)
            .flat_map(|layer| {
                let first = self.plan.chunks()[0].clone();
                let experts = if first.pages.is_empty() { first.experts } else { 0..0 };
                experts.map(move |expert| (layer, expert))
            })
            .collect();
        let placed = checkpoint.inventory().tensors();
        let dense: Vec<Role> = placed.iter().map(|tensor| tensor.role).filter(|role| !role.in_slots()).collect();
        let total = dense.iter().map(|role| checkpoint.tensor(*role).bytes.len() as u64).sum::<u64>()
            + resident.len() as u64 * self.matrix_bytes.iter().sum::<u64>();
        let mut done = 0;
        let gpu = self.pipelines.gpu().clone();
        for role in dense {
            let view = checkpoint.tensor(role);
            let dense = self.upload(role, &view)?;
            gpu.flush()?;
            self.dense.insert(role, dense);
            done += view.bytes.len() as u64;
            progress(done, total);
        }
        for (layer, expert) in resident {
            for (matrix, bytes) in ExpertMatrix::ALL.into_iter().zip(self.matrix_bytes) {
                let piece = Piece { expert, matrix, bytes: 0..bytes };
                self.write_piece(checkpoint, layer, &piece);
                gpu.flush()?;
                done += bytes;
                progress(done, total);
            }
        }
        Ok(())
    }

    /// A tensor that stays, as the checkpoint has it or, for small ones that are added, in f32.
    fn upload(&mut self, role: Role, view: &TensorView<'_>) -> Result<Dense, GpuError> {
        let gpu = self.pipelines.gpu();
        let label = format!("{role:?}");
        if !role.kept_as_f32() {
            return Ok(Dense { buffer: gpu.buffer_with(&label, view.bytes)?, dtype: view.dtype });
        }
        let values = view.dtype.read_all(view.bytes);
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

    fn dense(&self, role: Role) -> &Dense {
        &self.dense[&role.stored_as(&self.config)]
    }

    /// `[H]` scores that join the softmax of a layer's attention and have no value.
    pub fn sinks(&self, layer: usize) -> Option<&[f32]> {
        self.sinks.get(layer).map(Vec::as_slice)
    }

    /// Takes a group's rows for one pass.
    pub fn begin(&mut self, group: usize, rows: &DeviceRows) {
        let gpu = self.pipelines.gpu();
        let buffers = &mut self.groups[group];
        assert!(rows.ids.len() <= self.extents.rows_per_group, "the batcher keeps to the row limit");
        let attended = |rows: &[Attended]| -> Vec<[u32; 4]> {
            rows.iter().map(|a| [a.row as u32, a.position as u32, a.blocks_at as u32, 0]).collect()
        };
        gpu.write(&buffers.ids, 0, bytemuck::cast_slice(&rows.ids));
        gpu.write(&buffers.positions, 0, bytemuck::cast_slice(&rows.positions));
        gpu.write(&buffers.kv_slots, 0, bytemuck::cast_slice(&rows.kv_slots));
        gpu.write(&buffers.attended_decode, 0, bytemuck::cast_slice(&attended(&rows.decode)));
        gpu.write(&buffers.attended_prompt, 0, bytemuck::cast_slice(&attended(&rows.prompt)));
        gpu.write(&buffers.block_table, 0, bytemuck::cast_slice(&rows.block_table));
        gpu.write(&buffers.sampled, 0, bytemuck::cast_slice(&rows.sampled));
        buffers.n_rows = rows.ids.len();
        buffers.n_sampled = rows.sampled.len();
        buffers.n_decode_attended = rows.decode.len();
        buffers.n_prompt_attended = rows.prompt.len();
    }

    fn finish(&self, recorder: Recorder<'_>) -> Result<(), GpuError> {
        recorder.submit()?;
        self.pipelines.gpu().wait()
    }

    pub fn embed(&self, group: usize) -> Result<(), GpuError> {
        let buffers = &self.groups[group];
        let table = self.dense(Role::Embedding);
        let mut recorder = Recorder::new(&self.pipelines);
        let params = embed::Params { n_rows: buffers.n_rows as u32, d_model: self.config.shape.d_model as u32 };
        embed::record(
            &mut recorder,
            table.dtype,
            params,
            buffers.ids.whole(),
            table.buffer.whole(),
            buffers.x.whole(),
        )?;
        self.finish(recorder)
    }

    /// Brings a KV block of the host cache to block `at` of the workspace.
    pub fn write_kv_block(&self, at: u32, block: &[f16]) {
        let bytes = workspace_block_bytes(&self.config);
        self.pipelines.gpu().write(&self.kv_blocks, at as u64 * bytes, bytemuck::cast_slice(block));
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

    /// Queries, keys and values of a group's rows into `qkv`: projected, with biases, and normed.
    fn project_qkv(
        &self,
        recorder: &mut Recorder<'_>,
        layer: usize,
        n_rows: usize,
        x: Slice<'_>,
    ) -> Result<(), GpuError> {
        let shape = &self.config.shape;
        let (q, kv, all) = (shape.q_width(), shape.kv_width(), shape.qkv_width());
        let qkv = self.qkv.whole();
        if self.config.forward.fused_qkv {
            let (role, extents) = (Role::QueryKeyValue { layer }, (shape.d_model, all));
            self.project(recorder, role, n_rows, extents, x, qkv, (all, 0), false)?;
        } else {
            for (role, bias, width, offset) in [
                (Role::Query { layer }, Role::QueryBias { layer }, q, 0),
                (Role::Key { layer }, Role::KeyBias { layer }, kv, q),
                (Role::Value { layer }, Role::ValueBias { layer }, kv, q + kv),
            ] {
                self.project(recorder, role, n_rows, (shape.d_model, width), x, qkv, (all, offset), false)?;
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
        x: Slice<'_>,
        y: Slice<'_>,
        (y_stride, y_offset): (usize, usize),
        accumulate: bool,
    ) -> Result<(), GpuError> {
        let weight = self.dense(role);
        let params = matmul::Params {
            n_rows: n_rows as u32,
            n_out: n_out as u32,
            n_in: n_in as u32,
            x_stride: n_in as u32,
            x_offset: 0,
            y_stride: y_stride as u32,
            y_offset: y_offset as u32,
            accumulate: accumulate as u32,
        };
        matmul::record(recorder, &Variant::new(weight.dtype), params, x, weight.buffer.whole(), y)
    }

    pub fn pre_attention(&self, layer: usize, group: usize) -> Result<(), GpuError> {
        let shape = &self.config.shape;
        let buffers = &self.groups[group];
        let n = buffers.n_rows;
        let mut recorder = Recorder::new(&self.pipelines);
        let r = &mut recorder;
        self.norm(r, Role::AttentionNorm { layer }, n, buffers.x.whole(), buffers.normed.whole())?;
        self.project_qkv(r, layer, n, buffers.normed.whole())?;
        let params = rotary::Params {
            n_rows: n as u32,
            q_heads: shape.q_heads as u32,
            kv_heads: shape.kv_heads as u32,
            head_width: shape.head_width as u32,
            clip: self.config.forward.qkv_clip.unwrap_or(0.0),
        };
        let bindings = rotary::Bindings {
            qkv: self.qkv.whole(),
            positions: buffers.positions.whole(),
            rope_table: self.rope_table.whole(),
            kv_slots: buffers.kv_slots.whole(),
            kv_rows: self.kv_rows.whole(),
            kv_blocks: self.kv_blocks.whole(),
        };
        rotary::record(r, params, bindings)?;
        self.finish(recorder)
    }

    /// New keys and values of all rows, `[T, G, 2, K]`, and the projected rows of the first `n_decode` rows, `[n_decode, H, K]`.
    pub fn read_rows(&self, group: usize, n_decode: usize) -> Result<(Vec<f16>, Vec<f32>), GpuError> {
        let shape = &self.config.shape;
        let n = self.groups[group].n_rows;
        let kv = self.kv_rows.slice(0..words(n * shape.kv_width()));
        let projected = self.qkv.slice(0..words(n_decode * shape.qkv_width()));
        let mut read = self.pipelines.gpu().read_many(&[kv, projected])?.into_iter();
        let (kv, projected) = (read.next().expect("two slices"), read.next().expect("two slices"));
        let kv: Vec<f16> = bytemuck::pod_collect_to_vec(&kv);
        let projected: Vec<f32> = bytemuck::pod_collect_to_vec(&projected);
        let queries =
            projected.chunks_exact(shape.qkv_width()).flat_map(|row| row[..shape.q_width()].iter().copied()).collect();
        Ok((kv, queries))
    }

    /// Prompt rows, and decode rows where [`DeviceRows::decode`] named any, attend over the workspace.
    pub fn gpu_attention(&self, layer: usize, group: usize) -> Result<(), GpuError> {
        let shape = &self.config.shape;
        let buffers = &self.groups[group];
        let mut recorder = Recorder::new(&self.pipelines);
        let params = |n_rows: usize| paged_attention::Params {
            n_rows: n_rows as u32,
            q_heads: shape.q_heads as u32,
            kv_heads: shape.kv_heads as u32,
            head_width: shape.head_width as u32,
            q_stride: shape.qkv_width() as u32,
            window: self.config.window(layer).unwrap_or(0) as u32,
            scale: attention_scale(&self.config),
            has_sinks: self.config.forward.sinks as u32,
        };
        let bindings = |rows| paged_attention::Bindings {
            qkv: self.qkv.whole(),
            rows,
            block_table: buffers.block_table.whole(),
            kv_blocks: self.kv_blocks.whole(),
            out: self.attention.whole(),
            sinks: self.where_there(self.config.forward.sinks, Role::Sinks { layer }),
        };
        // Nothing of an attention kernel depends on a weight type.
        let (r, variant) = (&mut recorder, Variant::new(Dtype::F32));
        let decode = params(buffers.n_decode_attended);
        decode_attention::record(r, &variant, decode, bindings(buffers.attended_decode.whole()))?;
        let prompt = params(buffers.n_prompt_attended);
        prompt_attention::record(r, &variant, prompt, bindings(buffers.attended_prompt.whole()))?;
        self.finish(recorder)
    }

    /// Attention output of the first rows of a group, `[n, H, K]`.
    pub fn write_attention(&self, rows: &[f32]) {
        self.pipelines.gpu().write(&self.attention, 0, bytemuck::cast_slice(rows));
    }

    pub fn post_attention(&self, layer: usize, group: usize) -> Result<(), GpuError> {
        let shape = &self.config.shape;
        let buffers = &self.groups[group];
        let n = buffers.n_rows;
        let mut recorder = Recorder::new(&self.pipelines);
        let r = &mut recorder;
        let output = (shape.q_width(), shape.d_model);
        let (x, role) = (buffers.x.whole(), Role::AttentionOutput { layer });
        self.project(r, role, n, output, self.attention.whole(), x, (shape.d_model, 0), true)?;
        self.add_bias(r, Role::AttentionOutputBias { layer }, n, x, (shape.d_model, 0))?;
        self.norm(r, Role::ExpertNorm { layer }, n, x, buffers.normed.whole())?;
        let (normed, logits) = (buffers.normed.whole(), self.router_logits.whole());
        let router = (shape.d_model, shape.experts);
        self.project(r, Role::Router { layer }, n, router, normed, logits, (shape.experts, 0), false)?;
        self.add_bias(r, Role::RouterBias { layer }, n, logits, (shape.experts, 0))?;
        let params = router_topk::Params {
            n_rows: n as u32,
            n_experts: shape.experts as u32,
            n_chosen: shape.experts_per_token as u32,
            renormalise: self.config.forward.renormalise as u32,
        };
        router_topk::record(r, params, logits, buffers.chosen.whole(), buffers.chosen_weights.whole())?;
        let params = expert_sort::Params {
            n_assignments: (n * shape.experts_per_token) as u32,
            n_experts: shape.experts as u32,
        };
        expert_sort::record(r, params, buffers.chosen.whole(), buffers.offsets.whole(), buffers.permutation.whole())?;
        self.finish(recorder)
    }

    /// Brings one page of a layer's chunk from the checkpoint's mapping into its slots. Returns its bytes.
    pub fn load_page(
        &mut self,
        checkpoint: &Checkpoint,
        layer: usize,
        chunk: usize,
        page: usize,
    ) -> Result<u64, GpuError> {
        let page = self.plan.chunks()[chunk].pages[page].clone();
        for piece in &page.pieces {
            self.write_piece(checkpoint, layer, piece);
        }
        // Staging memory of a page is given back when its copy has run.
        self.pipelines.gpu().flush()?;
        Ok(page.bytes())
    }

    fn write_piece(&mut self, checkpoint: &Checkpoint, layer: usize, piece: &Piece) {
        let slot = self.plan.slot(layer, piece.expert);
        let slabs = match piece.matrix {
            ExpertMatrix::Gate => &self.gate,
            ExpertMatrix::Up => &self.up,
            ExpertMatrix::Down => &self.down,
        };
        let first = self.place(slot, piece.matrix).offset_words as u64 * 4;
        for source in checkpoint.inventory().slot_sources(layer, piece.expert, piece.matrix, piece.bytes.clone()) {
            let tensor = checkpoint.tensor(source.role);
            let bytes = &tensor.bytes[source.range.start as usize..source.range.end as usize];
            self.pipelines.gpu().write(&slabs.buffers[slot / self.slots_per_slab], first + source.at, bytes);
        }
        self.table.arrive(slot, layer, piece);
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

    /// The experts of one chunk over a group's rows; after the last chunk, their weighted sum into the residual rows.
    pub fn experts(&self, layer: usize, group: usize, chunk: usize) -> Result<(), GpuError> {
        let shape = &self.config.shape;
        let buffers = &self.groups[group];
        let n_assignments = (buffers.n_rows * shape.experts_per_token) as u32;
        let mut places = vec![Place::ABSENT; shape.experts];
        let mut down_places = places.clone();
        for expert in self.plan.chunks()[chunk].experts.clone() {
            let slot = self.plan.slot(layer, expert);
            assert!(self.table.holds(slot, layer, expert), "expert {expert} of layer {layer} is in slot {slot}");
            places[expert] = self.place(slot, ExpertMatrix::Gate);
            down_places[expert] = self.place(slot, ExpertMatrix::Down);
        }
        self.pipelines.gpu().write(&self.places, 0, bytemuck::cast_slice(&places));
        self.pipelines.gpu().write(&self.down_places, 0, bytemuck::cast_slice(&down_places));
        let forward = &self.config.forward;
        let biased = forward.biases as u32;
        let mut recorder = Recorder::new(&self.pipelines);
        let r = &mut recorder;
        let (n_experts, n_chosen) = (shape.experts as u32, shape.experts_per_token as u32);
        let (d_model, expert_width) = (shape.d_model as u32, shape.expert_width as u32);
        let limit = match forward.activation {
            Activation::SwiGlu => 0.0,
            Activation::ClampedSwiGlu { limit } => limit,
        };
        let params = expert_gate_up::Params::plain(n_assignments, n_experts, n_chosen, d_model, expert_width)
            .with_layout(Layout::gate_up(forward.experts, shape));
        let params = expert_gate_up::Params { biased, limit, ..params };
        let bindings = expert_gate_up::Bindings {
            x: buffers.normed.whole(),
            permutation: buffers.permutation.whole(),
            offsets: buffers.offsets.whole(),
            places: self.places.whole(),
            h: self.hidden.whole(),
            gate: self.gate.bindings(),
            up: if forward.experts.gate_holds_up() { self.gate.bindings() } else { self.up.bindings() },
            bias: self.where_there(forward.biases, Role::GateUpBias { layer }),
        };
        let variant = Variant::new(self.expert_dtype);
        expert_gate_up::record(r, &variant, params, bindings)?;
        let params = expert_down::Params::plain(n_assignments, n_experts, d_model, expert_width)
            .with_layout(Layout::down(forward.experts, shape));
        let params = expert_down::Params { biased, ..params };
        let bindings = expert_down::Bindings {
            h: self.hidden.whole(),
            permutation: buffers.permutation.whole(),
            offsets: buffers.offsets.whole(),
            places: self.down_places.whole(),
            y: buffers.expert_out.whole(),
            down: self.down.bindings(),
            bias: self.where_there(forward.biases, Role::DownBias { layer }),
        };
        expert_down::record(r, &variant, params, bindings)?;
        if chunk + 1 == self.plan.chunks().len() {
            let params = expert_combine::Params {
                n_rows: buffers.n_rows as u32,
                n_chosen: shape.experts_per_token as u32,
                d_model: shape.d_model as u32,
            };
            expert_combine::record(
                r,
                params,
                buffers.chosen_weights.whole(),
                buffers.expert_out.whole(),
                buffers.x.whole(),
            )?;
        }
        self.finish(recorder)
    }

    /// Final norm and LM head over the sampled rows; greedy ids of all of them, whole logits of those in `wants_logits`
    /// (ascending indices into the sampled rows), `[n, V]`.
    pub fn head(&self, group: usize, wants_logits: &[usize]) -> Result<(Vec<Sample>, Vec<f32>), GpuError> {
        let shape = &self.config.shape;
        let buffers = &self.groups[group];
        let (d_model, vocab) = (shape.d_model, shape.vocab);
        let mut greedy = Vec::with_capacity(buffers.n_sampled);
        let mut logits = Vec::with_capacity(wants_logits.len() * vocab);
        // The list of sampled rows is bound at each portion's start: portions are multiples of the binding alignment.
        for first in (0..buffers.n_sampled).step_by(self.extents.head_rows) {
            let n = (buffers.n_sampled - first).min(self.extents.head_rows);
            let mut recorder = Recorder::new(&self.pipelines);
            let r = &mut recorder;
            let (rows, normed) = (self.head_rows.whole(), self.head_normed.whole());
            let sampled = buffers.sampled.slice(words(first)..words(first + n));
            let gather = embed::Params { n_rows: n as u32, d_model: d_model as u32 };
            embed::record(r, Dtype::F32, gather, sampled, buffers.x.whole(), rows)?;
            self.norm(r, Role::FinalNorm, n, rows, normed)?;
            self.project(r, Role::LmHead, n, (d_model, vocab), normed, self.logits.whole(), (vocab, 0), false)?;
            let params = lm_head_sample::Params { n_rows: n as u32, vocab: vocab as u32 };
            lm_head_sample::record(r, params, self.logits.whole(), self.greedy.whole())?;
            recorder.submit()?;
            let mut wanted = vec![self.greedy.slice(0..words(4 * n))];
            for index in wants_logits.iter().filter(|index| (first..first + n).contains(*index)) {
                let row = index - first;
                wanted.push(self.logits.slice(words(row * vocab)..words((row + 1) * vocab)));
            }
            let mut read = self.pipelines.gpu().read_many(&wanted)?.into_iter();
            greedy.extend(bytemuck::pod_collect_to_vec::<u8, Sample>(&read.next().expect("the ids")));
            for row in read {
                logits.extend(bytemuck::pod_collect_to_vec::<u8, f32>(&row));
            }
        }
        Ok((greedy, logits))
    }
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
