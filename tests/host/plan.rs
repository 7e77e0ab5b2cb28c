//! Any limits and wishes give a plan that fits them or an error with numbers, and the plan's bytes are those that are allocated.

use fulmen::checkpoint::Inventory;
use fulmen::kernels::MAX_EXPERTS;
use fulmen::kernels::paged_attention::MAX_HEAD_WIDTH;
use fulmen::kernels::router_topk::MAX_CHOSEN;
use fulmen::kernels::slabs::N_SLABS;
use fulmen::memory::kv_cache::{BLOCK_TOKENS, KvLayout};
use fulmen::memory::pages::{PagePlan, PageShape};
use fulmen::model::expert_layout::Packing;
use fulmen::model::presets;
use fulmen::model::{Family, Forward, ModelConfig, Shape, tensors};
use fulmen::plan::{MachineLimits, ModelBytes, Plan, PlanError, Wishes, fit};
use fulmen::policy::{AttentionPlace, KvDtype, Precision, RowPath, ScheduleKind, SourceKind};
use proptest::prelude::*;

const GIB: u64 = 1 << 30;

fn config(shape: Shape, max_positions: usize) -> ModelConfig {
    assert_eq!(shape.faults(), Vec::<String>::new());
    ModelConfig {
        family: Family::Mixtral,
        shape,
        forward: Forward::default(),
        norm_eps: 1e-5,
        rope_theta: 1e6,
        sliding_window: None,
        max_positions,
        tied_embeddings: false,
        bos_token: Some(1),
        eos_tokens: vec![2],
        declared_dtype: None,
    }
}

fn mixtral_8x7b() -> ModelConfig {
    let shape = Shape {
        layers: 32,
        d_model: 4096,
        q_heads: 32,
        kv_heads: 8,
        head_width: 128,
        experts: 8,
        experts_per_token: 2,
        expert_width: 14336,
        vocab: 32000,
    };
    config(shape, 32768)
}

/// Of a checkpoint in bf16.
fn bytes(config: &ModelConfig) -> ModelBytes {
    let dense = || {
        let tensors = tensors(config).into_iter().filter(|tensor| !tensor.role.in_slots());
        tensors.map(|tensor| (2 * tensor.elements()).next_multiple_of(4))
    };
    let matrix = [2 * config.shape.expert_matrix_elements() as u64; 3];
    ModelBytes { dense: dense().sum(), largest_dense: dense().max().expect("an embedding"), matrix }
}

/// Every buffer of a policy as `Machine::open` allocates it, but for the weights that stay.
fn buffers(config: &ModelConfig, bytes: &ModelBytes, plan: &Plan, binding: u64) -> Vec<(&'static str, u64)> {
    let (shape, policy) = (config.shape, plan.policy);
    let words = |n: usize| 4 * n as u64;
    let group_size = policy.micro_batches.div_ceil(policy.expert_groups);
    let region =
        if group_size == 1 { policy.rows_per_micro_batch } else { policy.rows_per_micro_batch.next_multiple_of(64) };
    let assignments = group_size * region * shape.experts_per_token;
    let mut buffers = Vec::new();
    for _ in 0..policy.expert_groups {
        let rows = group_size * region;
        buffers.extend([
            ("residual rows", words(rows * shape.d_model)),
            ("normed rows", words(rows * shape.d_model)),
            ("chosen experts", words(assignments)),
            ("expert weights of rows", words(assignments)),
            ("expert offsets", words(shape.experts + 1)),
            ("rows by expert", words(assignments)),
            ("expert outputs", words(assignments * shape.d_model)),
        ]);
    }
    let rows = policy.rows_per_micro_batch;
    // A part has up to 256 tokens of a decode row's context; a row more than its blocks fill has two at most.
    let gpu_decode = policy.attention == AttentionPlace::Gpu;
    let listed_parts = if gpu_decode { 2 * rows + policy.workspace_blocks * BLOCK_TOKENS / 256 } else { 0 };
    for _ in 0..policy.micro_batches {
        buffers.extend([
            ("token ids", words(rows)),
            ("positions", words(rows)),
            ("kv slots", words(rows)),
            ("attended decode rows", if gpu_decode { words(4 * rows) } else { 4 }),
            ("parts of decode rows", words(4 * listed_parts).max(4)),
            ("attended prompt rows", words(4 * rows)),
            ("block table", words(policy.workspace_blocks)),
            ("sampled rows", words(rows)),
            ("projected rows", words(rows * shape.qkv_width())),
            ("new keys and values", words(rows * shape.kv_width())),
            (
                "new keys and values, quantised",
                match policy.kv_dtype {
                    KvDtype::F16 => 0,
                    KvDtype::Int8 => words(rows * 2 * shape.kv_heads * (shape.head_width.div_ceil(4) + 1)),
                },
            ),
            ("attention output", words(rows * shape.q_width())),
        ]);
    }
    let one_layer = KvLayout { layers: 1, ..KvLayout::new(&shape, KvDtype::F16) };
    buffers.extend([
        ("rotary table", words(policy.max_model_len * shape.head_width)),
        ("router logits", words(rows * shape.experts)),
        ("expert hidden rows", words(assignments * shape.expert_width)),
        ("expert places", words(2 * shape.experts)),
        ("expert places of down", words(2 * shape.experts)),
        ("sampled residual rows", words(policy.head_rows * shape.d_model)),
        ("normed sampled rows", words(policy.head_rows * shape.d_model)),
        ("logits", words(policy.head_rows * shape.vocab)),
        ("greedy ids", words(4 * policy.head_rows)),
    ]);
    // Of each part, a greatest score and a sum of weights for every head, and weighted values.
    let longest = policy.max_model_len.div_ceil(256);
    let kept_parts = if gpu_decode { longest.max(listed_parts.min(1024)) } else { 0 };
    buffers.extend([
        ("states of parts of decode rows", words(kept_parts * 2 * shape.q_heads).max(4)),
        ("sums of parts of decode rows", words(kept_parts * shape.q_width()).max(4)),
    ]);
    if policy.precision == Precision::F16 {
        // A row of f16 is padded to 256, and has a scale.
        let half = |n: usize| n.next_multiple_of(256) / 2;
        let rows = (group_size * region).max(rows).max(policy.head_rows);
        buffers.extend([
            ("rows of f16", words(rows * half(shape.d_model).max(half(shape.q_width())))),
            ("scales of rows", words(rows)),
            ("expert hidden rows of f16", words(assignments * half(shape.expert_width))),
            ("scales of expert hidden rows", words(assignments)),
        ]);
        // Where experts have up to 64 rows on average, they lie by expert, in groups of 16; hidden ones in turn.
        let ordered = assignments.min(65 * shape.experts);
        let widest = half(shape.d_model).max(half(shape.q_width())).max(half(shape.expert_width));
        buffers.extend([
            ("rows of f16 by expert", words((ordered / 16 + shape.experts) * 16 * widest)),
            ("scales of rows by expert", words(ordered)),
        ]);
    }
    let workspace = (policy.workspace_blocks * one_layer.bytes_per_block()) as u64;
    buffers.extend((0..policy.workspaces).map(|_| ("KV workspace", workspace)));
    let slot_bytes = bytes.matrix.map(PageShape::slot_bytes);
    let slots_per_slab = (binding / slot_bytes.iter().max().unwrap()) as usize;
    for (slab, slot_bytes) in ["gate slab", "up slab", "down slab"].into_iter().zip(slot_bytes) {
        let mut left = pages(config, bytes, plan).n_slots();
        while left > 0 && slot_bytes > 0 {
            let n = left.min(slots_per_slab);
            buffers.push((slab, n as u64 * slot_bytes));
            left -= n;
        }
    }
    buffers
}

fn pages(config: &ModelConfig, bytes: &ModelBytes, plan: &Plan) -> PagePlan {
    PagePlan::new(PageShape {
        experts: config.shape.experts,
        resident: plan.policy.resident_experts,
        extra: plan.policy.extra_residents,
        ring: plan.policy.ring_experts,
        matrix_bytes: bytes.matrix,
        page_bytes: plan.policy.page_bytes,
        layers: config.shape.layers,
    })
}

/// What must hold of any plan, whoever wished for what.
fn hold(config: &ModelConfig, bytes: &ModelBytes, machine: &MachineLimits, wishes: &Wishes, plan: &Plan) {
    let (policy, memory) = (&plan.policy, &plan.memory);
    assert!(memory.device() <= machine.device_bytes, "{} of device memory", memory.device());
    assert!(memory.host() <= machine.host_bytes, "{} of host memory", memory.host());

    let buffers = buffers(config, bytes, plan, machine.binding_bytes);
    let allocated: u64 = buffers.iter().map(|(_, bytes)| bytes).sum();
    assert_eq!(allocated + bytes.dense, memory.device(), "allocated and planned");
    let too_large: Vec<_> = buffers.iter().filter(|(_, bytes)| *bytes > machine.binding_bytes).collect();
    assert!(too_large.is_empty(), "{too_large:?} in bindings of {}", machine.binding_bytes);
    assert!(bytes.largest_dense <= machine.binding_bytes);
    let slabs = |slab: &str| buffers.iter().filter(|(name, _)| *name == slab).count();
    assert!((1..=N_SLABS).contains(&slabs("gate slab")), "{} slabs", slabs("gate slab"));

    let streamed = config.shape.experts - policy.resident_experts;
    assert_eq!(policy.ring_experts > 0, streamed > 0, "a ring where something streams, and only there");
    assert_eq!(plan.streamed_bytes_per_pass, pages(config, bytes, plan).bytes_per_pass());
    let layout = KvLayout::new(&config.shape, policy.kv_dtype);
    assert_eq!(memory.kv_pool, (policy.kv_blocks * layout.bytes_per_block()) as u64);
    assert!(policy.max_model_len >= 1 && policy.max_model_len <= config.max_positions);
    let longest = policy.max_model_len.div_ceil(BLOCK_TOKENS);
    assert!(policy.kv_blocks >= longest, "the pool holds the longest sequence");
    assert!(policy.workspace_blocks >= longest, "the workspace holds the longest sequence");
    assert!(policy.micro_batches >= 1 && policy.micro_batches <= policy.max_sequences);
    assert!(
        policy.rows_per_micro_batch >= policy.max_sequences.div_ceil(policy.micro_batches),
        "each sequence can have a row"
    );
    assert!((1..=policy.rows_per_micro_batch).contains(&policy.prompt_chunk));
    assert!(policy.head_rows > 0 && policy.head_rows.is_multiple_of(64));
    assert!(policy.threads >= 1 && policy.page_bytes >= 4);

    // A wish is obeyed, or it was refused.
    let obeyed = [
        wishes.max_sequences.is_none_or(|n| n == policy.max_sequences),
        wishes.micro_batches.is_none_or(|n| n == policy.micro_batches),
        wishes.pass_rows.is_none_or(|n| n / policy.micro_batches == policy.rows_per_micro_batch),
        wishes.prompt_chunk.is_none_or(|n| n == policy.prompt_chunk),
        wishes.attention.is_none_or(|place| place == policy.attention),
        wishes.schedule.is_none_or(|kind| kind == policy.schedule),
        wishes.expert_groups.is_none_or(|n| n >= policy.expert_groups),
        wishes.source == policy.source && wishes.rows.is_none_or(|rows| rows == policy.rows),
        wishes.threads.is_none_or(|n| n == policy.threads),
        wishes.max_model_len.is_none_or(|n| n == policy.max_model_len),
        wishes.kv_bytes.is_none_or(|n| n - memory.kv_pool < layout.bytes_per_block() as u64),
        wishes.resident_experts.is_none_or(|n| n == policy.resident_experts),
        wishes.ring_experts.is_none_or(|n| n == policy.ring_experts),
        wishes.page_bytes.is_none_or(|n| n == policy.page_bytes && streamed > 0),
    ];
    assert_eq!(obeyed, [true; 14], "{wishes:?}\n{policy:?}");
}

fn shapes() -> impl Strategy<Value = Shape> {
    let widths = (1usize..5, 1usize..64, (1usize..4, 1usize..4), 1usize..20);
    let experts = (1usize..20, 1usize..20, 1usize..80, 1usize..500);
    (widths, experts).prop_map(|((layers, d, (kv_heads, per), half), (experts, chosen, expert_width, vocab))| Shape {
        layers,
        d_model: 4 * d,
        q_heads: kv_heads * per,
        kv_heads,
        head_width: 2 * half,
        experts,
        experts_per_token: chosen.min(experts),
        expert_width,
        vocab,
    })
}

/// Bytes of every order of magnitude up to 2^`most`.
fn any_bytes(most: u32) -> impl Strategy<Value = u64> {
    (0..=most).prop_flat_map(|bits| 0..=1u64 << bits)
}

fn machines() -> impl Strategy<Value = MachineLimits> {
    (any_bytes(30), any_bytes(30), any_bytes(28), 1usize..64).prop_map(
        |(device_bytes, host_bytes, binding_bytes, threads)| MachineLimits {
            device_bytes: 4 * device_bytes,
            host_bytes: 4 * host_bytes,
            binding_bytes,
            threads,
            kernels_reach_host: device_bytes % 2 == 0,
            cooperative: device_bytes % 3 == 0,
        },
    )
}

fn wishes() -> impl Strategy<Value = Wishes> {
    let count = |most: usize| {
        let values = prop_oneof![20 => 1..most, 1 => Just(0), 1 => Just(usize::MAX)];
        prop_oneof![3 => Just(None), 1 => values.prop_map(Some)]
    };
    let bytes = || prop_oneof![3 => Just(None), 1 => any_bytes(30).prop_map(Some), 1 => Just(Some(u64::MAX))];
    let batch = (count(300), count(8), count(2000), count(400), any::<bool>(), count(40));
    let memory = (count(9000), bytes(), count(20), count(60), bytes());
    (batch, memory, 0usize..80, count(4), count(5)).prop_map(|(batch, memory, pick, expert_groups, extra_residents)| {
        let (max_sequences, groups, pass_rows, prompt_chunk, on_gpu, threads) = batch;
        let (max_model_len, kv_bytes, resident_experts, ring_experts, page_bytes) = memory;
        let attention = on_gpu.then_some(AttentionPlace::Gpu);
        let kinds = [None, None, Some(ScheduleKind::CgoPipe), Some(ScheduleKind::FlexGen), Some(ScheduleKind::Serial)];
        let sources = [None, None, Some(SourceKind::Imported), Some(SourceKind::Staged)];
        let rows = [None, None, Some(RowPath::Copies), Some(RowPath::Kernels)];
        let kv_dtypes = [None, Some(KvDtype::F16), Some(KvDtype::Int8)];
        Wishes {
            kv_dtype: kv_dtypes[pick % 7 % kv_dtypes.len()],
            schedule: kinds[pick % kinds.len()],
            source: sources[pick / 5 % sources.len()],
            rows: rows[pick / 20 % rows.len()],
            precision: [None, None, Some(Precision::F32), Some(Precision::F16)][pick / 7 % 4],
            expert_groups,
            max_sequences,
            micro_batches: groups,
            pass_rows,
            prompt_chunk,
            attention,
            threads,
            max_model_len,
            kv_bytes,
            resident_experts,
            extra_residents,
            ring_experts,
            page_bytes,
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]
    #[test]
    fn any_limits_give_a_plan_that_fits_or_an_error_with_numbers(
        shape in shapes(),
        max_positions in 1usize..9000,
        machine in machines(),
        wishes in prop_oneof![Just(Wishes::default()), wishes()],
    ) {
        let config = config(shape, max_positions);
        let bytes = bytes(&config);
        match fit(&config, &bytes, &machine, &wishes) {
            Ok(plan) => hold(&config, &bytes, &machine, &wishes, &plan),
            Err(error) => {
                let message = error.to_string();
                let in_words = matches!(error, PlanError::Conflict { .. });
                prop_assert!(in_words || message.contains(|c: char| c.is_ascii_digit()), "{}", message);
                let needs_more = match error {
                    PlanError::Option { .. } | PlanError::Conflict { .. } => true,
                    PlanError::Memory { needed, allowed, .. } => needed > allowed,
                    PlanError::Binding { needed, limit, .. } => needed > limit,
                };
                prop_assert!(needs_more, "what is needed is there: {}", message);
            }
        }
    }
}

fn machine(device_bytes: u64) -> MachineLimits {
    // The largest storage binding of NVIDIA's driver.
    MachineLimits {
        device_bytes,
        host_bytes: 64 * GIB,
        binding_bytes: (1 << 31) - 4,
        threads: 8,
        kernels_reach_host: true,
        cooperative: false,
    }
}

/// The inventory that a published checkpoint of `config` has: bf16, and bytes where MXFP4 is.
fn inventory(config: &ModelConfig) -> Inventory {
    let specs = tensors(config);
    let list = specs.iter().map(|spec| {
        let floats = config.forward.experts.packing(spec.role) == Packing::Floats;
        let dtype = if floats { safetensors::Dtype::BF16 } else { safetensors::Dtype::U8 };
        (spec.name.as_str(), dtype, &spec.shape[..])
    });
    Inventory::from_list(config.clone(), list).unwrap()
}

/// A layer of experts fits one slab for each kind, and a plan for a T4 and for a large card binds all that it allocates.
#[test]
fn the_six_published_shapes_stay_within_bindings() {
    // Bytes of an expert's gate, up and down slots.
    let slots = [
        ("mixtral-8x7b", [117_440_512; 3]),
        ("mixtral-8x22b", [201_326_592; 3]),
        ("dbrx", [132_120_576; 3]),
        ("qwen3-30b-a3b", [3_145_728; 3]),
        ("olmoe-1b-7b", [4_194_304; 3]),
        ("gpt-oss-20b", [8_812_800, 0, 4_406_400]),
    ];
    assert_eq!(slots.map(|(name, _)| name), presets::NAMES);
    for (name, matrix) in slots {
        let config = presets::preset(name).unwrap();
        assert_eq!(config.shape.faults(), Vec::<String>::new(), "{name}");
        let bytes = ModelBytes::of(&inventory(&config));
        assert_eq!(bytes.matrix, matrix, "{name}");
        assert_eq!(config.forward.experts.slot_bytes(&config.shape, 2), matrix, "{name}");
        let layer = config.shape.experts as u64 * bytes.largest_slot();
        assert!(layer <= machine(0).binding_bytes, "{name}: a layer of {layer} bytes");
        assert!(config.shape.experts <= MAX_EXPERTS as usize && config.shape.head_width <= MAX_HEAD_WIDTH as usize);
        assert!(config.shape.experts_per_token <= MAX_CHOSEN as usize);
        // A T4 has 15 GiB for programs; the default takes nine tenths of them. An H200 has 139 GiB.
        for device_bytes in [15 * GIB / 10 * 9, 139 * GIB / 10 * 9] {
            let machine = machine(device_bytes);
            let plan = fit(&config, &bytes, &machine, &Wishes::default()).unwrap_or_else(|e| panic!("{name}: {e}"));
            hold(&config, &bytes, &machine, &Wishes::default(), &plan);
            let streamed = config.shape.experts - plan.policy.resident_experts;
            assert!(streamed == 0 || plan.policy.ring_experts >= 4, "{name}: a ring of {}", plan.policy.ring_experts);
        }
        // lavapipe binds 128 MiB.
        let small = MachineLimits { binding_bytes: 128 << 20, ..machine(139 * GIB) };
        let error = fit(&config, &bytes, &small, &Wishes::default()).unwrap_err();
        assert!(matches!(error, PlanError::Binding { needed, limit, .. } if needed > limit), "{name}: {error}");
    }
    assert_eq!(presets::preset("mixtral-8x7B"), None);
}

#[test]
fn mixtral_8x7b_runs_on_small_cards() {
    let config = mixtral_8x7b();
    let bytes = bytes(&config);
    assert_eq!((bytes.dense, bytes.matrix), (3_211_272_192, [112 << 20; 3]));
    // GiB, residents of each layer, slots of the ring
    for (device, resident, ring) in [(24, 1, 14), (16, 0, 16), (8, 0, 14), (6, 0, 8), (4, 0, 2)] {
        let machine = machine(device * GIB);
        let plan = fit(&config, &bytes, &machine, &Wishes::default()).unwrap();
        hold(&config, &bytes, &machine, &Wishes::default(), &plan);
        let found = (plan.policy.resident_experts, plan.policy.ring_experts);
        assert_eq!(found, (resident, ring), "{device} GiB\n{plan}");
    }
    let error = fit(&config, &bytes, &machine(3 * GIB), &Wishes::default()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "no policy fits: weights that stay 2.99 GiB, activations 207 MiB, KV workspace 128 MiB and 1 expert slots of 336 MiB \
         need 3.65 GiB of device memory, 3.00 GiB are allowed (--gpu-memory sets it)"
    );
    // Four slabs of 2 GiB bind 72 experts of the 256, however much memory there is.
    let plan = fit(&config, &bytes, &machine(80 * GIB), &Wishes::default()).unwrap();
    assert_eq!((plan.policy.resident_experts, plan.policy.ring_experts), (1, 14));
    let wishes = Wishes { resident_experts: Some(7), ..Wishes::default() };
    let error = fit(&config, &bytes, &machine(80 * GIB), &wishes).unwrap_err();
    assert_eq!(
        error.to_string(),
        "a quarter of the expert slots needs 6.23 GiB in one binding, the adapter allows 2.00 GiB; \
         lower --resident-experts or --ring-experts"
    );
    // Attention over the contexts of 128 sequences on the GPU leaves room for experts.
    let wishes = Wishes { attention: Some(AttentionPlace::Gpu), ..Wishes::default() };
    for device in [6, 16] {
        let plan = fit(&config, &bytes, &machine(device * GIB), &wishes).unwrap();
        hold(&config, &bytes, &machine(device * GIB), &wishes, &plan);
    }
    // 128 MiB in one binding do not hold the embedding.
    let error =
        fit(&config, &bytes, &MachineLimits { binding_bytes: 128 << 20, ..machine(80 * GIB) }, &Wishes::default());
    let message = error.unwrap_err().to_string();
    assert_eq!(
        message,
        "the largest tensor that stays needs 250 MiB in one binding, the adapter allows 128 MiB; lower (another adapter is needed)"
    );
}

#[test]
fn a_wish_that_cannot_be_obeyed_is_refused() {
    let config = mixtral_8x7b();
    let bytes = bytes(&config);
    let none = Wishes::default;
    for (wishes, message) in [
        (Wishes { max_sequences: Some(0), ..none() }, "--max-num-seqs is 0; it must be 1 to 1048576"),
        (Wishes { micro_batches: Some(257), ..none() }, "--micro-batches is 257; it must be 1 to 256"),
        (
            Wishes { micro_batches: Some(5), max_sequences: Some(4), ..none() },
            "--micro-batches is 5; it must be 1 to 4, the sequences that run at a time",
        ),
        (
            Wishes { max_sequences: Some(50), pass_rows: Some(40), ..none() },
            "--max-num-seqs is 50; it must be 1 to 40, the rows of a pass (--max-num-batched-tokens)",
        ),
        (
            Wishes { prompt_chunk: Some(513), ..none() },
            "--prompt-chunk is 513; it must be 1 to 512, the rows of a micro-batch in a pass",
        ),
        (Wishes { max_model_len: Some(32769), ..none() }, "--max-model-len is 32769; it must be 1 to 32768"),
        (
            Wishes { resident_experts: Some(9), ..none() },
            "--resident-experts is 9; it must be 0 to 8, the experts of a layer",
        ),
        (
            Wishes { ring_experts: Some(0), ..none() },
            "--ring-experts is 0; it must be 1 to 256, the experts that stream",
        ),
        (
            Wishes { ring_experts: Some(97), resident_experts: Some(5), ..none() },
            "--ring-experts is 97; it must be 1 to 96, the experts that stream",
        ),
        (
            Wishes { ring_experts: Some(16), resident_experts: Some(8), ..none() },
            "--ring-experts is 16; it must be left out: all experts stay on the GPU",
        ),
        (
            Wishes { kv_dtype: Some(KvDtype::Int8), attention: Some(AttentionPlace::Gpu), ..none() },
            "--kv-dtype int8 does not go with decode attention on the GPU, whose kernels read blocks of f16",
        ),
        (Wishes { page_bytes: Some(3), ..none() }, "--page-size is 3; it must be at least 4 bytes"),
        (
            Wishes { page_bytes: Some(1000), ..none() },
            "--page-size is 1000; it must be left out: all experts stay on the GPU, so nothing comes in pages",
        ),
        (
            Wishes { kv_bytes: Some(65 * GIB), ..none() },
            "no policy fits: the KV pool, weights kept, staging rows and pages need 65.2 GiB of host memory, 64.0 GiB are allowed (--host-memory sets it)",
        ),
        (
            Wishes { kv_bytes: Some(GIB), max_model_len: Some(8193), ..none() },
            "no policy fits: one sequence of 8193 tokens needs 1.00 GiB of KV memory, 1.00 GiB are allowed (--kv-memory sets it)",
        ),
        (
            Wishes { pass_rows: Some(1 << 20), micro_batches: Some(1), ..none() },
            "a group's expert rows needs 112 GiB in one binding, the adapter allows 2.00 GiB; lower --max-num-batched-tokens (or raise --expert-groups)",
        ),
    ] {
        // Room for all experts in memory, and in four slabs.
        let machine = MachineLimits {
            binding_bytes: if wishes.page_bytes == Some(1000) { 64 * GIB } else { (1 << 31) - 4 },
            ..machine(200 * GIB)
        };
        let error = fit(&config, &bytes, &machine, &wishes).expect_err(message);
        assert_eq!(error.to_string(), message);
    }
}

/// As many slots as the residents take: the streamed experts need one more, which is asked for and not forgotten.
#[test]
fn residents_that_leave_no_room_for_a_ring_are_refused() {
    let shape = Shape { layers: 3, experts: 4, vocab: 64, expert_width: 128, ..mixtral_8x7b().shape };
    let shape = Shape { d_model: 64, q_heads: 2, kv_heads: 1, head_width: 16, ..shape };
    let config = config(shape, 256);
    let bytes = bytes(&config);
    let wishes = Wishes { resident_experts: Some(2), ..Wishes::default() };
    let one_more = fit(&config, &bytes, &machine(GIB), &Wishes { ring_experts: Some(1), ..wishes }).unwrap();
    assert_eq!(one_more.policy.ring_experts, 1);
    let enough = one_more.memory.device();
    let expert_bytes = one_more.memory.expert_slots / 7;
    assert_eq!(fit(&config, &bytes, &machine(enough), &wishes).unwrap().policy.ring_experts, 1);
    let error = fit(&config, &bytes, &machine(enough - expert_bytes), &wishes).unwrap_err();
    assert!(matches!(error, PlanError::Memory { needed, .. } if needed == enough), "{error}");
}
