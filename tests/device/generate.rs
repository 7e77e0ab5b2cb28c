//! **A policy changes time, never tokens**: the shipped model, one batch of tasks, many policies, the same answers bit for bit.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::path::Path;

use fulmen::engine::{Engine, Event, RunOptions, RunSummary};
use fulmen::gpu::ShaderPatch;
use fulmen::plan::Wishes;
use fulmen::policy::{AttentionPlace, KvDtype, Precision, RowPath, ScheduleKind};
use fulmen::request::batch_file::{BatchReader, GenerationDefaults, ReadOptions};
use fulmen::request::batcher::MicroBatchRows;
use fulmen::request::chat_template::ChatTemplate;
use fulmen::request::tokenizer::Tokenizer;
use fulmen::request::{Completion, Request, RequestOutput};
use libtest_mimic::{Failed, Trial};

use crate::common::device;
use crate::goldens::Golden;

fn examples(file: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples").join(file)
}

/// The first `limit` tasks of the shipped batch file, and their answers.
pub fn tasks(limit: u64) -> (Vec<Request>, BTreeMap<String, String>) {
    let model = examples("model");
    let tokenizer = Tokenizer::open(&model).expect("shipped tokenizer");
    let template = ChatTemplate::open(&model, None, tokenizer.special_tokens()).expect("shipped template");
    let defaults = GenerationDefaults::open(&model).expect("shipped defaults");
    let options = ReadOptions { limit: Some(limit), ..ReadOptions::default() };
    let requests = BatchReader::open(&examples("tasks.jsonl"), options)
        .expect("shipped tasks")
        .map(|line| {
            let line = line.expect("a good line");
            line.to_request(&tokenizer, Ok(&template), &defaults, tokenizer.vocab_size()).expect("a good request")
        })
        .collect();
    let answers = std::fs::read_to_string(examples("answers.jsonl")).expect("shipped answers");
    let answers = answers
        .lines()
        .map(|line| {
            let value: serde_json::Value = serde_json::from_str(line).expect("JSON");
            let field = |name: &str| value[name].as_str().expect("a string").to_owned();
            (field("custom_id"), field("answer"))
        })
        .collect();
    (requests, answers)
}

/// What a pass of a run held.
pub struct Recorded {
    pub passes: Vec<Vec<MicroBatchRows>>,
    pub outputs: BTreeMap<String, RequestOutput>,
    pub summary: RunSummary,
}

pub struct Setting {
    pub wishes: Wishes,
    pub gpu_memory: Option<u64>,
    pub patches: Vec<ShaderPatch>,
}

impl From<Wishes> for Setting {
    fn from(wishes: Wishes) -> Self {
        Setting { wishes, gpu_memory: None, patches: Vec::new() }
    }
}

pub fn run(model: &Path, setting: Setting, requests: Vec<Request>) -> Recorded {
    // What is patched are the kernels of the f32 class; whatever else holds in the adapter's own.
    let patched = (!setting.patches.is_empty()).then_some(Precision::F32);
    let wishes = Wishes { precision: setting.wishes.precision.or(patched), ..setting.wishes };
    let mut builder = Engine::builder(model)
        .device(device())
        .wishes(wishes)
        .gpu_memory(setting.gpu_memory)
        .shader_patches(setting.patches);
    if let Ok(tokenizer) = Tokenizer::open(model) {
        builder = builder.tokenizer(tokenizer);
    }
    let mut engine = builder.prepare().expect("opens").load(&mut |_, _| {}).expect("loads");
    let (mut passes, mut outputs) = (Vec::new(), BTreeMap::new());
    let summary = engine
        .run(&mut requests.into_iter(), RunOptions::default(), &mut |event| {
            match event {
                Event::Finished(output) => {
                    let before = outputs.insert(output.custom_id.clone(), output);
                    assert!(before.is_none(), "each request is answered once");
                }
                Event::Pass(pass) => passes.push(pass.micro_batches.into_iter().cloned().collect()),
                Event::Text { .. } | Event::Logits { .. } => {}
            }
            ControlFlow::Continue(())
        })
        .expect("the run ends well");
    Recorded { passes, outputs, summary }
}

fn completions(output: &RequestOutput) -> &[Completion] {
    output.result.as_ref().expect("answered")
}

/// Share of tasks answered right.
fn accuracy(outputs: &BTreeMap<String, RequestOutput>, answers: &BTreeMap<String, String>) -> f64 {
    let right = outputs.iter().filter(|(id, output)| {
        let result = output.result.as_ref();
        result.is_ok_and(|completions| completions[0].text.trim() == answers[id.as_str()])
    });
    right.count() as f64 / outputs.len() as f64
}

/// Requests of many kinds: the shipped tasks, sampled ones, several completions, penalties, log-probabilities.
fn mixed_requests() -> Vec<Request> {
    let (mut requests, _) = tasks(11);
    for (index, request) in requests.iter_mut().enumerate() {
        let params = &mut request.params;
        match index % 6 {
            1 => (params.temperature, params.seed, params.n) = (0.8, 7, 2),
            2 => (params.temperature, params.top_p, params.ignore_eos, params.max_tokens) = (1.2, 0.9, true, Some(24)),
            3 => (params.repetition_penalty, params.logprobs) = (1.1, Some(3)),
            4 => (params.ignore_eos, params.max_tokens) = (true, Some(40)),
            _ => {}
        }
    }
    requests
}

/// With 8-bit keys and values, against each other: where a chunk ends, who is preempted, on how many threads.
fn int8_policies_change_no_token() -> Result<(), Failed> {
    let model = examples("model");
    let int8 = Wishes { kv_dtype: Some(KvDtype::Int8), ..Wishes::default() };
    let requests = || {
        let mut requests = mixed_requests();
        for request in requests.iter_mut().take(4) {
            (request.params.ignore_eos, request.params.max_tokens) = (true, Some(66));
        }
        requests
    };
    let base = run(&model, int8.into(), requests());
    for (name, wishes) in [
        ("chunks of 7", Wishes { prompt_chunk: Some(7), ..int8 }),
        ("passes of 5 rows", Wishes { pass_rows: Some(5), micro_batches: Some(1), ..int8 }),
        ("rows by copies", Wishes { rows: Some(RowPath::Copies), ..int8 }),
        ("cgopipe", Wishes { schedule: Some(ScheduleKind::CgoPipe), micro_batches: Some(3), threads: Some(1), ..int8 }),
    ] {
        let other = run(&model, wishes.into(), requests());
        assert_eq!(other.outputs, base.outputs, "{name}");
    }
    // Prompts must attend over what the cache will hold: where their own chunk's rows are not rounded, it shows.
    let patch = ShaderPatch {
        kernel: "kv_quantise".to_owned(),
        from: "f16_bits(f32(integer) * scale), finite) << ".to_owned(),
        to: "bits, finite) << ".to_owned(),
    };
    let patched = |wishes| {
        let setting = Setting { wishes, gpu_memory: None, patches: vec![patch.clone()] };
        run(&model, setting, requests()).outputs
    };
    assert_ne!(patched(int8), patched(Wishes { prompt_chunk: Some(7), ..int8 }), "a fault changes nothing");
    // Another precision it is, as the log-probabilities show; the shipped model answers its tasks as well.
    assert_ne!(run(&model, Wishes::default().into(), requests()).outputs, base.outputs);
    let (requests, answers) = tasks(60);
    let of_f16 = accuracy(&run(&model, Wishes::default().into(), requests.clone()).outputs, &answers);
    let of_int8 = accuracy(&run(&model, int8.into(), requests).outputs, &answers);
    assert!(of_int8 >= of_f16 - 1.0 / 60.0, "{of_int8} of tasks answered right, {of_f16} with f16");
    Ok(())
}

fn policies_change_no_token() -> Result<(), Failed> {
    let model = examples("model");
    let base = run(&model, Wishes::default().into(), mixed_requests());
    let wishes = Wishes::default;
    let variants: Vec<(&str, Wishes)> = vec![
        ("three sequences", Wishes { max_sequences: Some(3), ..wishes() }),
        ("chunks of 7", Wishes { prompt_chunk: Some(7), ..wishes() }),
        ("passes of 5 rows", Wishes { pass_rows: Some(5), micro_batches: Some(1), ..wishes() }),
        ("five micro-batches", Wishes { micro_batches: Some(5), ..wishes() }),
        ("a ring of three experts", Wishes { resident_experts: Some(0), ring_experts: Some(3), ..wishes() }),
        ("a ring of two layers", Wishes { resident_experts: Some(0), ring_experts: Some(16), ..wishes() }),
        (
            "three residents, small pages",
            Wishes { resident_experts: Some(3), ring_experts: Some(4), page_bytes: Some(10_000), ..wishes() },
        ),
        ("one thread", Wishes { threads: Some(1), ..wishes() }),
    ];
    for (name, wishes) in variants {
        let streams = wishes.ring_experts.is_some();
        let other = run(&model, wishes.into(), mixed_requests());
        assert_eq!(other.summary.page_bytes > 0, streams, "{name}: experts stream where they should");
        for (id, output) in &base.outputs {
            assert_eq!(other.outputs[id], *output, "{name}: {id}");
        }
        assert_eq!(other.outputs.len(), base.outputs.len(), "{name}: every request is answered");
    }
    Ok(())
}

/// A pool of six blocks, and four sequences that come to need three each: some are preempted, spilled and restored.
fn preemption_changes_no_token() -> Result<(), Failed> {
    let model = examples("model");
    let requests = || -> Vec<Request> {
        let mut short: Vec<Request> =
            tasks(120).0.into_iter().filter(|request| request.prompt.len() < 26).take(4).collect();
        assert_eq!(short.len(), 4, "the shipped tasks have short prompts too");
        for request in &mut short {
            (request.params.ignore_eos, request.params.max_tokens) = (true, Some(66));
            // None of them says it, but then nobody knows beforehand how long they get, and they are let in.
            request.params.stop = vec!["\u{1f980}".to_owned()];
        }
        short
    };
    // Six blocks of 32 tokens: L · G · 2 · K elements of 2 bytes each, or of 1 and 2 for each row's scale.
    for (kv_dtype, token_bytes) in [(KvDtype::F16, 4 * 2 * 2 * 64), (KvDtype::Int8, 4 * 2 * 2 * 34)] {
        let wishes = Wishes { kv_dtype: Some(kv_dtype), ..Wishes::default() };
        let base = run(&model, wishes.into(), requests());
        assert_eq!(base.summary.batch.preemptions, 0);
        let small = Wishes { kv_bytes: Some(6 * 32 * token_bytes), ..wishes };
        for wishes in [small, Wishes { micro_batches: Some(1), prompt_chunk: Some(7), ..small }] {
            let other = run(&model, wishes.into(), requests());
            assert!(other.summary.batch.preemptions > 0, "{wishes:?}: sequences are preempted");
            assert_eq!(other.outputs, base.outputs, "{wishes:?}");
        }
    }
    Ok(())
}

/// The same for decode attention on the GPU, within itself: against the CPU only rounding differs.
fn gpu_attention_changes_no_token_within_itself() -> Result<(), Failed> {
    let model = examples("model");
    let gpu = Wishes { attention: Some(AttentionPlace::Gpu), ..Wishes::default() };
    let base = run(&model, gpu.into(), mixed_requests());
    for wishes in
        [Wishes { max_sequences: Some(3), prompt_chunk: Some(7), ..gpu }, Wishes { kv_bytes: Some(256 * 1024), ..gpu }]
    {
        let other = run(&model, wishes.into(), mixed_requests());
        assert_eq!(other.outputs, base.outputs, "{wishes:?}");
    }
    // Greedy answers of the shipped model are far from ties: the place of attention does not change them.
    let cpu = run(&model, Wishes::default().into(), tasks(30).0);
    let on_gpu = run(&model, gpu.into(), tasks(30).0);
    for (id, output) in &cpu.outputs {
        assert_eq!(completions(&on_gpu.outputs[id])[0].text, completions(output)[0].text, "{id}");
    }
    Ok(())
}

/// Goldens that stream through three slots, in chunks of 7: transformers' tokens still.
fn goldens_hold_under_small_rings() -> Result<(), Failed> {
    for folder in Golden::all() {
        let golden = Golden::open(&folder);
        let wishes = Wishes {
            resident_experts: Some(0),
            ring_experts: Some(3),
            prompt_chunk: Some(7),
            page_bytes: Some(1000),
            precision: Some(Precision::F32),
            ..Wishes::default()
        };
        let answer = run(&folder, wishes.into(), vec![golden.request("golden")]);
        assert!(answer.summary.page_bytes > 0, "experts stream");
        let tokens = &completions(&answer.outputs["golden"])[0].token_ids;
        assert_eq!(tokens, &golden.ids[golden.prompt.len()..], "{}", folder.display());
    }
    Ok(())
}

/// Passes are mixed: prompt chunks beside decode rows of different ages, and a prompt that spans passes.
fn passes_mix_prompt_and_decode_rows() -> Result<(), Failed> {
    let wishes = Wishes { prompt_chunk: Some(16), pass_rows: Some(48), ..Wishes::default() };
    let recorded = run(&examples("model"), wishes.into(), tasks(60).0);
    let mixed = recorded.passes.iter().any(|groups| {
        let rows = || groups.iter().flat_map(|group| &group.rows);
        let contexts: BTreeSet<usize> = rows().filter(|row| row.decode).map(|row| row.position + 1).collect();
        let chunks: BTreeSet<_> = rows().filter(|row| !row.decode).map(|row| row.sequence).collect();
        contexts.len() >= 2 && chunks.len() >= 2
    });
    assert!(mixed, "some pass holds two prompt chunks and two decode rows of different context lengths");
    let mut passes_of_prompt: BTreeMap<_, usize> = BTreeMap::new();
    for groups in &recorded.passes {
        let prompts: BTreeSet<_> =
            groups.iter().flat_map(|group| &group.rows).filter(|row| !row.decode).map(|row| row.sequence).collect();
        for sequence in prompts {
            *passes_of_prompt.entry(sequence).or_default() += 1;
        }
    }
    assert!(passes_of_prompt.values().any(|passes| *passes >= 3), "some prompt spans three passes");
    Ok(())
}

/// Token 7 embeds as NaN and is what every completion begins with: the request fails as soon as the first of its three
/// completions meets it, with the others on their way in the same pass, and disturbs nobody.
fn a_failing_completion_ends_its_request_alone() -> Result<(), Failed> {
    let (mut requests, answers) = tasks(6);
    let doomed = requests[2].custom_id.clone();
    let params = &mut requests[2].params;
    (params.n, params.temperature, params.logit_bias) = (3, 1.0, vec![(7, 100.0)]);
    let read = "weight_from_word(table[weight_word_index(element)], element)";
    // Only in the embedding, 450 x 128 bf16 values in words: the same kernel also gathers residual rows for the LM head.
    let patch = ShaderPatch {
        kernel: "embed".to_owned(),
        from: read.to_owned(),
        to: format!(
            "bitcast<f32>(select(bitcast<u32>({read}), 0x7fc00000u, ids[row] == 7u && arrayLength(&table) == 28800u))"
        ),
    };
    for micro_batches in [1, 2] {
        let wishes = Wishes { micro_batches: Some(micro_batches), ..Wishes::default() };
        let setting = Setting { wishes, gpu_memory: None, patches: vec![patch.clone()] };
        let recorded = run(&examples("model"), setting, requests.clone());
        assert_eq!((recorded.outputs.len(), recorded.summary.failed), (6, 1));
        for (id, output) in &recorded.outputs {
            match &output.result {
                Ok(completions) => assert_eq!(completions[0].text.trim(), answers[id.as_str()]),
                Err(error) => {
                    assert_eq!(*id, doomed);
                    assert!(error.to_string().contains("NaN"), "{error}");
                }
            }
        }
    }
    Ok(())
}

/// What the plan says is what is taken, to the byte, and a cap below it is refused with numbers.
fn the_plan_foretells_device_memory() -> Result<(), Failed> {
    for folder in Golden::all().into_iter().chain([examples("model")]) {
        for wishes in [
            Wishes::default(),
            Wishes { kv_dtype: Some(KvDtype::Int8), ..Wishes::default() },
            Wishes { resident_experts: Some(1), ring_experts: Some(3), micro_batches: Some(3), ..Wishes::default() },
        ] {
            let prepared = Engine::builder(&folder).device(device()).wishes(wishes).prepare()?;
            let foretold = prepared.plan().memory.device();
            let engine = prepared.load(&mut |_, _| {})?;
            assert_eq!(engine.device_bytes_taken(), foretold, "{}: {wishes:?}", folder.display());
        }
        let refused = Engine::builder(&folder).device(device()).gpu_memory(Some(100_000)).prepare();
        let message = refused.err().expect("100 kB do not hold a model").to_string();
        assert!(message.contains("97.7 KiB are allowed"), "{message}");
    }
    Ok(())
}

pub fn trials() -> Vec<Trial> {
    vec![
        Trial::test("generate::the_plan_foretells_device_memory", the_plan_foretells_device_memory),
        Trial::test(
            "generate::a_failing_completion_ends_its_request_alone",
            a_failing_completion_ends_its_request_alone,
        ),
        Trial::test("generate::policies_change_no_token", policies_change_no_token),
        Trial::test("generate::preemption_changes_no_token", preemption_changes_no_token),
        Trial::test("generate::int8_policies_change_no_token", int8_policies_change_no_token),
        Trial::test(
            "generate::gpu_attention_changes_no_token_within_itself",
            gpu_attention_changes_no_token_within_itself,
        ),
        Trial::test("generate::goldens_hold_under_small_rings", goldens_hold_under_small_rings),
        Trial::test("generate::passes_mix_prompt_and_decode_rows", passes_mix_prompt_and_decode_rows),
    ]
    .into_iter()
    .chain(crate::faults::trials())
    .collect()
}

pub fn accuracy_with(patches: Vec<ShaderPatch>, attention: AttentionPlace, n_tasks: u64) -> f64 {
    let (requests, answers) = tasks(n_tasks);
    let setting =
        Setting { wishes: Wishes { attention: Some(attention), ..Wishes::default() }, gpu_memory: None, patches };
    accuracy(&run(&examples("model"), setting, requests).outputs, &answers)
}
