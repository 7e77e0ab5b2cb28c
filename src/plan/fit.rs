//! The first policy that fits, and where every byte goes.

use std::fmt;

use crate::checkpoint::{Inventory, Placed};
use crate::execute::machine::{Extents, HalfExtents, host_row_bytes, quantised_row_bytes, workspace_block_bytes};
use crate::kernels::slabs::N_SLABS;
use crate::memory::kv_cache::{BLOCK_TOKENS, KvLayout};
use crate::memory::page_source::STAGING_BUFFERS;
use crate::memory::pages::PageShape;
use crate::model::ModelConfig;
use crate::policy::{AttentionPlace, KvDtype, Policy, Precision, RowPath, ScheduleKind, SourceKind};
use crate::units::human_bytes;

/// What the weights of a checkpoint take, which config.json does not say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelBytes {
    /// All that stays on the GPU: embedding, norms, projections, routers, head.
    pub dense: u64,
    /// The largest tensor of those; each has to fit one binding.
    pub largest_dense: u64,
    /// One expert's slots, by `ExpertMatrix::ALL`.
    pub matrix: [u64; 3],
}

impl ModelBytes {
    /// Of a checkpoint whose experts have one type.
    pub fn of(inventory: &Inventory) -> Self {
        let bytes = |tensor: &Placed| match tensor.role.kept_as_f32() {
            true => 4 * tensor.shape.iter().product::<usize>() as u64,
            false => tensor.bytes().next_multiple_of(4), // padded to whole words on the device
        };
        let dense = || inventory.tensors().iter().filter(|tensor| !tensor.role.in_slots()).map(bytes);
        Self {
            dense: dense().sum(),
            largest_dense: dense().max().unwrap_or(0),
            matrix: inventory.slot_bytes().unwrap_or_default(),
        }
    }

    /// Bytes of one expert, without the padding of its slots.
    pub fn expert(&self) -> u64 {
        self.matrix.iter().sum()
    }

    /// Bytes that one expert takes on the device.
    pub fn expert_slots(&self) -> u64 {
        self.matrix.iter().map(|bytes| PageShape::slot_bytes(*bytes)).sum()
    }

    /// The largest slot: all kinds have as many slots in a slab as its kind has.
    pub fn largest_slot(&self) -> u64 {
        self.matrix.iter().map(|bytes| PageShape::slot_bytes(*bytes)).max().expect("three kinds")
    }
}

/// What the machine allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MachineLimits {
    /// Device memory that may be taken.
    pub device_bytes: u64,
    /// Host memory that may be taken.
    pub host_bytes: u64,
    /// Largest storage binding.
    pub binding_bytes: u64,
    pub threads: usize,
    /// Kernels can read and write host memory.
    pub kernels_reach_host: bool,
    /// Kernels can use cooperative matrices.
    pub cooperative: bool,
}

/// What the user asked for; None = choose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Wishes {
    pub schedule: Option<ScheduleKind>,
    pub max_sequences: Option<usize>,
    pub micro_batches: Option<usize>,
    pub expert_groups: Option<usize>,
    /// Rows of a pass, over all groups.
    pub pass_rows: Option<usize>,
    pub prompt_chunk: Option<usize>,
    pub attention: Option<AttentionPlace>,
    pub threads: Option<usize>,
    pub max_model_len: Option<usize>,
    pub kv_bytes: Option<u64>,
    pub kv_dtype: Option<KvDtype>,
    pub resident_experts: Option<usize>,
    pub extra_residents: Option<usize>,
    pub ring_experts: Option<usize>,
    pub page_bytes: Option<u64>,
    pub source: Option<SourceKind>,
    pub rows: Option<RowPath>,
    pub precision: Option<Precision>,
}

/// Bytes by purpose. Printed before anything is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct MemoryUse {
    pub dense_weights: u64,
    pub expert_slots: u64,
    pub activations: u64,
    pub kv_workspace: u64,
    pub logits: u64,
    pub rotary_table: u64,
    /// Host memory: the KV pool.
    pub kv_pool: u64,
    /// Host memory: expert weights that stream, kept where copies reach them; 0 where they come from their files.
    pub host_weights: u64,
    /// Host memory: rows that cross the link, context on its way, and pages on theirs.
    pub staging: u64,
}

impl MemoryUse {
    pub fn device(&self) -> u64 {
        self.dense_weights + self.expert_slots + self.activations + self.kv_workspace + self.logits + self.rotary_table
    }

    pub fn host(&self) -> u64 {
        self.kv_pool + self.host_weights + self.staging
    }
}

/// A policy and what it takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    pub policy: Policy,
    pub memory: MemoryUse,
    /// Expert bytes that every pass brings to the GPU.
    pub streamed_bytes_per_pass: u64,
    pub experts_per_layer: usize,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    #[error("{option} is {value}; it must be {allowed}")]
    Option { option: &'static str, value: usize, allowed: String },
    #[error("{option} {value} does not go with {with}")]
    Conflict { option: &'static str, value: String, with: String },
    #[error(
        "no policy fits: {what} {} of {side} memory, {} are allowed ({option} sets it)",
        human_bytes(*.needed), human_bytes(*.allowed)
    )]
    Memory { what: String, needed: u64, side: &'static str, allowed: u64, option: &'static str },
    #[error("{what} needs {} in one binding, the adapter allows {}; lower {option}", human_bytes(*.needed), human_bytes(*.limit))]
    Binding { what: &'static str, needed: u64, limit: u64, option: &'static str },
}

/// What a policy asks of the device's buffers.
pub fn extents(policy: &Policy) -> Extents {
    Extents {
        micro_batches: policy.micro_batches,
        expert_groups: policy.expert_groups,
        rows_per_micro_batch: policy.rows_per_micro_batch,
        workspaces: policy.workspaces,
        workspace_blocks: policy.workspace_blocks,
        max_positions: policy.max_model_len,
        head_rows: policy.head_rows,
        rows: policy.rows,
        precision: policy.precision,
        gpu_decode: policy.attention == AttentionPlace::Gpu,
        kv_dtype: policy.kv_dtype,
    }
}

impl Plan {
    /// How the experts of a layer are cut into pages.
    pub fn page_shape(&self, config: &ModelConfig, bytes: &ModelBytes) -> PageShape {
        PageShape {
            experts: config.shape.experts,
            resident: self.policy.resident_experts,
            extra: self.policy.extra_residents,
            ring: self.policy.ring_experts,
            matrix_bytes: bytes.matrix,
            page_bytes: self.policy.page_bytes,
            layers: config.shape.layers,
        }
    }
}

/// Most sequences at a time where nobody says.
const DEFAULT_SEQUENCES: usize = 256;
/// Rows of a pass where nobody says: enough to fill the matrix units, little enough for small cards.
const DEFAULT_PASS_ROWS: usize = 1024;
/// Prompts so short that the blocks they leave half empty bound a pass, and not its rows, are not planned for.
const SHORT_PROMPT_TOKENS: usize = 8;
/// One attends on the CPU while the GPU computes the other's experts.
const DEFAULT_MICRO_BATCHES: usize = 2;
/// Middle of the 16-128 MiB over which copies run at full rate.
pub const DEFAULT_PAGE_BYTES: u64 = 32 << 20;
/// Longest context planned for where nobody says: a pool for more is rarely used.
const DEFAULT_MAX_MODEL_LEN: usize = 8192;

/// A wish below 1 or above `max` is refused; a default is lowered to it.
fn option(option: &'static str, value: Option<usize>, default: usize, max: usize) -> Result<usize, PlanError> {
    match value {
        Some(value) if value == 0 || value > max => {
            Err(PlanError::Option { option, value, allowed: format!("1 to {max}") })
        }
        Some(value) => Ok(value),
        None => Ok(default.min(max)),
    }
}

/// Refuses a wish for more than another choice leaves room for: it would have no effect.
fn at_most(option: &'static str, wish: Option<usize>, max: usize, what: &str) -> Result<(), PlanError> {
    match wish.filter(|wish| *wish > max) {
        Some(value) => Err(PlanError::Option { option, value, allowed: format!("1 to {max}, {what}") }),
        None => Ok(()),
    }
}

/// Fills in what was not wished and sees whether it fits. A wish is obeyed or refused, also where it would have no effect.
pub fn fit(
    config: &ModelConfig,
    bytes: &ModelBytes,
    machine: &MachineLimits,
    wishes: &Wishes,
) -> Result<Plan, PlanError> {
    // Experts that stay on the device need no host memory. How many stay hardly depends on the host: with the largest pool there can
    // be, the workspaces are largest and fewest stay.
    let all_experts = (config.shape.layers * config.shape.experts) as u64 * bytes.expert();
    let plenty = MachineLimits { host_bytes: u64::MAX / 4, ..*machine };
    let streamed = match fit_with_pool(config, bytes, &plenty, wishes, u64::MAX, all_experts) {
        Ok(plan) => plan.streamed_bytes_per_pass,
        Err(_) => all_experts, // said below, with what the machine has
    };
    let mut most_pool = u64::MAX;
    loop {
        let plan = fit_with_pool(config, bytes, machine, wishes, most_pool, streamed)?;
        let (needed, allowed) = (plan.memory.host(), machine.host_bytes);
        if needed <= allowed {
            return Ok(plan);
        }
        // What the workspaces take on the host depends on the pool, so only now it is known to be too large.
        if wishes.kv_bytes.is_some() || plan.memory.kv_pool < needed - allowed {
            return Err(PlanError::Memory {
                what: "the KV pool, weights kept, rows, context and pages on their way need".into(),
                needed,
                side: "host",
                allowed,
                option: "--host-memory",
            });
        }
        most_pool = plan.memory.kv_pool - (needed - allowed);
    }
}

/// The same with a pool of at most `most_pool` bytes, which may leave too little room for what else the host has, and at most
/// `streamed_weights` bytes of experts that stream.
fn fit_with_pool(
    config: &ModelConfig,
    bytes: &ModelBytes,
    machine: &MachineLimits,
    wishes: &Wishes,
    most_pool: u64,
    streamed_weights: u64,
) -> Result<Plan, PlanError> {
    let shape = &config.shape;
    let words = |n: usize| 4 * n as u64;
    let default_rows = DEFAULT_PASS_ROWS.max(wishes.max_sequences.unwrap_or(0));
    let pass_rows = option("--max-num-batched-tokens", wishes.pass_rows, default_rows, 1 << 20)?;
    let max_sequences = option("--max-num-seqs", wishes.max_sequences, DEFAULT_SEQUENCES.min(pass_rows), 1 << 20)?;
    let schedule = wishes.schedule.unwrap_or(ScheduleKind::Grouped);
    let attention = match (schedule.attention(), wishes.attention) {
        (Some(place), Some(wish)) if place != wish => {
            let (value, with) =
                (wish.name().to_owned(), format!("--schedule {schedule}, which attends on the {}", place.name()));
            return Err(PlanError::Conflict { option: "--attention", value, with });
        }
        (place, wish) => place.or(wish).unwrap_or_default(),
    };
    let rows = match (wishes.rows, machine.kernels_reach_host) {
        (Some(RowPath::Kernels), false) => {
            let with = "this adapter, whose kernels cannot reach host memory".to_owned();
            return Err(PlanError::Conflict { option: "--rows", value: "kernels".to_owned(), with });
        }
        (Some(rows), _) => rows,
        (None, true) => RowPath::Kernels,
        (None, false) => RowPath::Copies,
    };
    let precision = match (wishes.precision, machine.cooperative) {
        (Some(Precision::F16), false) => {
            let with = "this adapter, which has no 16x16x16 cooperative matrices of f16".to_owned();
            return Err(PlanError::Conflict { option: "--precision", value: "f16".to_owned(), with });
        }
        (Some(precision), _) => precision,
        (None, true) => Precision::F16,
        (None, false) => Precision::F32,
    };
    let micro_batches = option("--micro-batches", wishes.micro_batches, DEFAULT_MICRO_BATCHES.min(max_sequences), 256)?;
    at_most("--micro-batches", wishes.micro_batches, max_sequences, "the sequences that run at a time")?;
    let default_groups = match schedule {
        ScheduleKind::Grouped => 2.min(micro_batches),
        _ => micro_batches,
    };
    let expert_groups = option("--expert-groups", wishes.expert_groups, default_groups, micro_batches)?;
    let group_size = micro_batches.div_ceil(expert_groups);
    // As many groups as it takes: 3 groups of 5 micro-batches would leave one empty.
    let expert_groups = micro_batches.div_ceil(group_size);
    at_most("--max-num-seqs", wishes.max_sequences, pass_rows, "the rows of a pass (--max-num-batched-tokens)")?;
    let threads = option("--threads", wishes.threads, machine.threads, 1024)?;

    // Rows per micro-batch: what one binding of each row-wise buffer holds, those of a group together.
    let widest = (shape.experts_per_token * shape.expert_width.max(shape.d_model)).max(shape.qkv_width());
    let widest = widest.max(shape.experts).max(4); // router logits; an attended row
    let half = HalfExtents::of(shape, precision);
    let widest = widest.max(half.widest_words());
    let rows_that_bind = (machine.binding_bytes / words(widest)) as usize;
    let rows_that_bind = rows_that_bind.min(half.group_rows_that_bind(machine.binding_bytes)) / group_size;
    // Regions of a group's buffers are padded.
    let padded = |rows: usize| if group_size > 1 { rows.next_multiple_of(64) } else { rows };
    let rows_that_bind = if group_size > 1 { rows_that_bind / 64 * 64 } else { rows_that_bind };
    let wished_rows = pass_rows / micro_batches;
    if wishes.pass_rows.is_some() && wished_rows > rows_that_bind || rows_that_bind == 0 {
        let group_rows = padded(wished_rows.max(1)) * group_size;
        return Err(PlanError::Binding {
            what: "a group's expert rows",
            needed: (words(widest) * group_rows as u64).max(half.ordered_bytes(group_rows)),
            limit: machine.binding_bytes,
            option: "--max-num-batched-tokens (or raise --expert-groups)",
        });
    }
    let rows_per_micro_batch = wished_rows.min(rows_that_bind);
    let most_rows = micro_batches * rows_per_micro_batch;
    at_most("--max-num-seqs", wishes.max_sequences, most_rows, "the rows of a pass that bind")?;
    let max_sequences = max_sequences.min(most_rows);
    let most = rows_per_micro_batch;
    at_most("--prompt-chunk", wishes.prompt_chunk, most, "the rows of a micro-batch in a pass")?;
    let prompt_chunk = option("--prompt-chunk", wishes.prompt_chunk, most, most)?;

    // The host side: rows and pages on their way, weights that stream, and the KV pool from what is left.
    let kv_dtype = wishes.kv_dtype.unwrap_or_default();
    if kv_dtype == KvDtype::Int8 && attention == AttentionPlace::Gpu {
        let with = "decode attention on the GPU, whose kernels read blocks of f16".to_owned();
        return Err(PlanError::Conflict { option: "--kv-dtype", value: kv_dtype.to_string(), with });
    }
    let layout = KvLayout::new(shape, kv_dtype);
    let block_bytes = layout.bytes_per_block() as u64;
    let row_bytes = host_row_bytes(config, kv_dtype, rows_per_micro_batch);
    let page_bytes = wishes.page_bytes.unwrap_or(DEFAULT_PAGE_BYTES);
    if page_bytes < 4 {
        let allowed = "at least 4 bytes".to_owned();
        return Err(PlanError::Option { option: "--page-size", value: page_bytes as usize, allowed });
    }
    let expert_weights = bytes.expert();
    let all_experts = (shape.layers * shape.experts) as u64 * expert_weights;
    let in_flight = page_bytes.min(all_experts).saturating_mul(STAGING_BUFFERS as u64);
    let staging = (row_bytes * micro_batches as u64).saturating_add(in_flight);
    if staging.saturating_add(block_bytes) > machine.host_bytes {
        return Err(PlanError::Memory {
            what: "rows and pages on their way and one KV block need".into(),
            needed: staging.saturating_add(block_bytes),
            side: "host",
            allowed: machine.host_bytes,
            option: "--host-memory",
        });
    }
    let host_left = machine.host_bytes - staging;
    let longest = option("--max-model-len", wishes.max_model_len, DEFAULT_MAX_MODEL_LEN, config.max_positions)?;
    let blocks_for = |tokens: usize| tokens.div_ceil(BLOCK_TOKENS);
    // Weights that stream are kept in memory where they leave room for keys and values, else they are read from their files.
    let kept = match wishes.source {
        None | Some(SourceKind::Imported | SourceKind::Pinned | SourceKind::Relay) => streamed_weights,
        Some(SourceKind::Mapped | SourceKind::Staged) => 0,
    };
    let least_pool = wishes.kv_bytes.unwrap_or(block_bytes);
    let keep = kept > 0 && kept.saturating_add(least_pool) <= host_left;
    let host_left = if keep { host_left - kept } else { host_left };
    // Half of what is free by default where weights are read from their files: the page cache wants the rest.
    let pool_bytes = wishes.kv_bytes.unwrap_or_else(|| {
        let all = (max_sequences as u64 * blocks_for(longest) as u64).saturating_mul(block_bytes);
        let share = if keep { host_left } else { host_left / 2 };
        all.min(share).max(block_bytes.min(host_left)).min(most_pool)
    });
    if pool_bytes > host_left {
        return Err(PlanError::Memory {
            what: "the KV pool, weights kept, staging rows and pages need".into(),
            needed: pool_bytes.saturating_add(staging).saturating_add(if keep { kept } else { 0 }),
            side: "host",
            allowed: machine.host_bytes,
            option: "--host-memory",
        });
    }
    let kv_blocks = (pool_bytes / block_bytes) as usize;
    let needed_blocks = if wishes.max_model_len.is_some() { blocks_for(longest) } else { 1 };
    if kv_blocks < needed_blocks {
        let what = format!("one sequence of {} tokens needs", if needed_blocks == 1 { BLOCK_TOKENS } else { longest });
        return Err(PlanError::Memory {
            what,
            needed: needed_blocks as u64 * block_bytes,
            side: "KV",
            allowed: pool_bytes,
            option: "--kv-memory",
        });
    }
    // The workspace holds at least one sequence, and the rotary table every position, in one binding each.
    let layer_block_bytes = workspace_block_bytes(config);
    let workspace_binds = (machine.binding_bytes / layer_block_bytes) as usize;
    let positions_that_bind = (machine.binding_bytes / words(shape.head_width)) as usize;
    let longest_that_binds = positions_that_bind.min(workspace_binds * BLOCK_TOKENS);
    if longest_that_binds < if wishes.max_model_len.is_some() { longest } else { 1 } {
        return Err(PlanError::Binding {
            what: "the KV of one sequence's layer, or its rotary table,",
            needed: words(longest * shape.head_width).max(blocks_for(longest) as u64 * layer_block_bytes),
            limit: machine.binding_bytes,
            option: "--max-model-len",
        });
    }
    let max_model_len = longest.min(kv_blocks * BLOCK_TOKENS).min(longest_that_binds);

    // The device side.
    if bytes.largest_dense > machine.binding_bytes {
        return Err(PlanError::Binding {
            what: "the largest tensor that stays",
            needed: bytes.largest_dense,
            limit: machine.binding_bytes,
            option: "(another adapter is needed)",
        });
    }
    let sequences_each = max_sequences.div_ceil(micro_batches);
    let one_sequence = blocks_for(max_model_len);
    // One micro-batch's context comes while another attends. Where only prompts attend on the GPU their contexts are few: where a
    // workspace for each takes next to nothing, they come a layer ahead.
    // Two prompts of full length side by side; and as many short ones as fill the rows of a pass: each takes a block.
    let few = (2 * one_sequence).max(rows_per_micro_batch.div_ceil(SHORT_PROMPT_TOKENS));
    let for_each = attention == AttentionPlace::Cpu
        && (micro_batches * few) as u64 * layer_block_bytes <= machine.device_bytes / 64;
    let workspaces = if for_each { micro_batches } else { 2.min(micro_batches) };
    let workspace_wanted = match attention {
        AttentionPlace::Cpu => few,
        // All contexts of a micro-batch, in a quarter of the memory: the rest is for experts.
        AttentionPlace::Gpu => ((sequences_each + 1) * one_sequence)
            .min((machine.device_bytes / 4 / workspaces as u64 / layer_block_bytes) as usize)
            .max(one_sequence),
    };
    let most_used = kv_blocks + rows_per_micro_batch;
    let workspace_blocks = workspace_wanted.min(most_used).min(workspace_binds);
    let head_width = shape.vocab.max(shape.d_model).max(HalfExtents::of(shape, precision).widest_words());
    let head_rows_that_bind = (machine.binding_bytes / words(head_width)) as usize;
    // A multiple of 64 rows keeps every portion's start aligned for a binding.
    let head_rows = rows_per_micro_batch.next_multiple_of(64).min(256).min(head_rows_that_bind / 64 * 64);
    if head_rows == 0 {
        return Err(PlanError::Binding {
            what: "64 rows of logits",
            needed: 64 * words(head_width),
            limit: machine.binding_bytes,
            option: "(a smaller vocabulary is needed)",
        });
    }
    let policy = Policy {
        schedule,
        max_sequences,
        micro_batches,
        expert_groups,
        rows_per_micro_batch,
        prompt_chunk,
        attention,
        threads,
        max_model_len,
        kv_blocks,
        workspaces,
        workspace_blocks,
        resident_experts: 0,
        extra_residents: 0,
        ring_experts: 0,
        page_bytes,
        source: wishes.source,
        rows,
        precision,
        kv_dtype,
        head_rows,
    };
    let extents = extents(&policy);
    let [attention_lists, attention_scratch] = extents.attention_bytes(shape);
    let group_rows = extents.group_rows();
    let assignments = group_rows * shape.experts_per_token;
    let per_group = 2 * words(group_rows * shape.d_model) // residual, normed
        + 3 * words(assignments) // chosen experts, weights, permutation
        + words(shape.experts + 1)
        + words(assignments * shape.d_model); // expert outputs
    let per_micro_batch = words(rows_per_micro_batch) * 4 // ids, positions, KV slots, sampled rows
        + attention_lists
        + words(workspace_blocks)
        + words(rows_per_micro_batch * (shape.qkv_width() + shape.kv_width() + shape.q_width()))
        + (rows_per_micro_batch * quantised_row_bytes(&layout)) as u64;
    let shared = words(rows_per_micro_batch * shape.experts)
        + words(assignments * shape.expert_width)
        + words(4 * shape.experts)
        + attention_scratch
        + HalfExtents::of(shape, precision).bytes(&extents);
    let kv_workspace = (workspaces * workspace_blocks) as u64 * layer_block_bytes;
    let mut memory = MemoryUse {
        dense_weights: bytes.dense,
        expert_slots: 0,
        activations: expert_groups as u64 * per_group + micro_batches as u64 * per_micro_batch + shared,
        kv_workspace,
        logits: words(head_rows * (2 * shape.d_model + shape.vocab + 4)),
        rotary_table: words(max_model_len * shape.head_width),
        kv_pool: kv_blocks as u64 * block_bytes,
        host_weights: 0,
        staging: staging + kv_workspace + words(head_rows * (4 + shape.vocab)),
    };
    let fixed = memory.device();
    let slot_bytes = bytes.largest_slot();
    let expert_bytes = bytes.expert_slots();
    let slots_that_bind = N_SLABS * (machine.binding_bytes / slot_bytes) as usize;
    if slots_that_bind == 0 {
        return Err(PlanError::Binding {
            what: "one expert matrix",
            needed: slot_bytes,
            limit: machine.binding_bytes,
            option: "(another adapter is needed)",
        });
    }
    let slots = ((machine.device_bytes.saturating_sub(fixed) / expert_bytes) as usize).min(slots_that_bind);
    let (resident_experts, extra_residents, ring_experts) = place_experts(config, slots, wishes)?;
    let streamed = shape.experts - resident_experts;
    let n_slots = shape.layers * resident_experts + extra_residents + if streamed == 0 { 0 } else { ring_experts };
    if wishes.page_bytes.is_some() && streamed == 0 {
        let allowed = "left out: all experts stay on the GPU, so nothing comes in pages".to_owned();
        return Err(PlanError::Option { option: "--page-size", value: page_bytes as usize, allowed });
    }
    memory.expert_slots = n_slots as u64 * expert_bytes;
    if keep {
        memory.host_weights = (shape.layers * streamed - extra_residents) as u64 * expert_weights;
    }
    if let (Some(source), 0) = (wishes.source, streamed) {
        let with = "this policy: all experts stay on the GPU, so nothing comes in pages".to_owned();
        let value = source.to_string();
        return Err(PlanError::Conflict { option: "--page-source", value, with });
    }
    if memory.device() <= machine.device_bytes && n_slots > slots_that_bind {
        return Err(PlanError::Binding {
            what: "a quarter of the expert slots",
            needed: n_slots.div_ceil(N_SLABS) as u64 * slot_bytes,
            limit: machine.binding_bytes,
            option: "--resident-experts or --ring-experts",
        });
    }
    if memory.device() > machine.device_bytes {
        return Err(PlanError::Memory {
            what: format!(
                "weights that stay {}, activations {}, KV workspace {} and {} expert slots of {} need",
                human_bytes(bytes.dense),
                human_bytes(memory.activations + memory.logits + memory.rotary_table),
                human_bytes(memory.kv_workspace),
                n_slots,
                human_bytes(expert_bytes),
            ),
            needed: memory.device(),
            side: "device",
            allowed: machine.device_bytes,
            option: "--gpu-memory",
        });
    }
    Ok(Plan {
        policy: Policy { resident_experts, extra_residents, ring_experts, ..policy },
        memory,
        streamed_bytes_per_pass: (shape.layers * streamed - extra_residents) as u64 * bytes.expert(),
        experts_per_layer: shape.experts,
    })
}

/// Residents of every layer, layers with one more, and ring for `slots` slots: all resident if they fit, else a ring of two layers
/// and residents from the rest; what is left then goes to extra ones, if nobody said how many stay. Where some stream the ring has a slot at least, whether it fits or not.
fn place_experts(config: &ModelConfig, slots: usize, wishes: &Wishes) -> Result<(usize, usize, usize), PlanError> {
    let (layers, experts) = (config.shape.layers, config.shape.experts);
    if let Some(resident) = wishes.resident_experts.filter(|resident| *resident > experts) {
        let allowed = format!("0 to {experts}, the experts of a layer");
        return Err(PlanError::Option { option: "--resident-experts", value: resident, allowed });
    }
    let most_streamed = layers * (experts - wishes.resident_experts.unwrap_or(0));
    if let Some(ring) = wishes.ring_experts.filter(|ring| *ring == 0 || *ring > most_streamed) {
        let allowed = match most_streamed {
            0 => "left out: all experts stay on the GPU".to_owned(),
            most => format!("1 to {most}, the experts that stream"),
        };
        return Err(PlanError::Option { option: "--ring-experts", value: ring, allowed });
    }
    let resident = wishes.resident_experts.unwrap_or_else(|| match wishes.ring_experts {
        // A ring was asked for, so there is something to stream through all of it.
        Some(ring) => (slots.saturating_sub(ring) / layers).min(experts - ring.div_ceil(layers)),
        None if slots >= layers * experts => experts,
        None => (slots.saturating_sub(2 * experts) / layers).min(experts - 1),
    });
    let streamed = experts - resident;
    let left = slots.saturating_sub(layers * resident);
    let ring = wishes.ring_experts.unwrap_or(left.max(1).min(2 * streamed));
    if let Some(extra) = wishes.extra_residents.filter(|extra| *extra > 0 && (streamed == 0 || *extra > layers)) {
        let allowed =
            if streamed == 0 { "0, as all experts stay".into() } else { format!("0 to {layers}, the layers") };
        return Err(PlanError::Option { option: "--extra-residents", value: extra, allowed });
    }
    let extra = wishes.extra_residents.unwrap_or(match wishes.resident_experts {
        Some(_) => 0,
        None if streamed == 0 => 0,
        None => left.saturating_sub(ring).min(layers - 1),
    });
    Ok((resident, extra, ring))
}

/// What goes where, and what it needs.
impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (p, m) = (&self.policy, &self.memory);
        let attention = p.attention.name();
        writeln!(
            f,
            "device  {:>10}   weights that stay {}, expert slots {}, activations {}, KV workspace {}, logits {}, rotary table {}",
            human_bytes(m.device()),
            human_bytes(m.dense_weights),
            human_bytes(m.expert_slots),
            human_bytes(m.activations),
            human_bytes(m.kv_workspace),
            human_bytes(m.logits),
            human_bytes(m.rotary_table),
        )?;
        writeln!(
            f,
            "host    {:>10}   KV pool {} ({} blocks of {BLOCK_TOKENS} tokens in {}), experts that stream {}, rows and pages on their way {}",
            human_bytes(m.host()),
            human_bytes(m.kv_pool),
            p.kv_blocks,
            p.kv_dtype,
            match m.host_weights {
                0 if self.streamed_bytes_per_pass > 0 => "from their files".to_owned(),
                bytes => human_bytes(bytes),
            },
            human_bytes(m.staging),
        )?;
        if self.streamed_bytes_per_pass == 0 {
            writeln!(f, "experts all {} of each layer stay on the GPU", self.experts_per_layer)?;
        } else {
            writeln!(
                f,
                "experts {} of {} of each layer{} stay on the GPU; the others go through a ring of {} slots, {} a pass in pages of up to {}",
                p.resident_experts,
                self.experts_per_layer,
                match p.extra_residents {
                    0 => String::new(),
                    extra => format!(", and one more of {extra} layers,"),
                },
                p.ring_experts,
                human_bytes(self.streamed_bytes_per_pass),
                human_bytes(p.page_bytes),
            )?;
        }
        write!(
            f,
            "batch   up to {} sequences in {} micro-batches of {} rows a pass, {} expert groups, prompts in pieces of up to {}, contexts up to {} tokens, decode attention on the {attention}, products of {}, schedule {}",
            p.max_sequences,
            p.micro_batches,
            p.rows_per_micro_batch,
            p.expert_groups,
            p.prompt_chunk,
            p.max_model_len,
            p.precision.name(),
            p.schedule,
        )
    }
}
