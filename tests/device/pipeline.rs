//! Every schedule, from every page source, through rings of three experts and of two layers: the same tokens, in the order that
//! the schedule's name promises. And what happens when the machine refuses.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;

use fulmen::engine::{Engine, EngineBuilder, EngineError, Event, RunOptions, WarmSequence};
use fulmen::gpu::{CopyRange, Gpu, Line, OpenOptions, TestFaults, TransferChoice};
use fulmen::model::{ModelConfig, presets};
use fulmen::plan::Wishes;
use fulmen::policy::{AttentionPlace, RowPath, ScheduleKind, SourceKind};
use fulmen::request::tokenizer::Tokenizer;
use fulmen::request::{Request, RequestOutput};
use fulmen::schedule::{Lane, Schedule, Work};
use libtest_mimic::{Failed, Trial};

use crate::common::{Random, device};
use crate::generate::tasks;
use crate::goldens::Golden;

fn model() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/model")
}

fn builder(model: &Path, wishes: Wishes) -> EngineBuilder {
    let mut builder = Engine::builder(model).device(device()).wishes(wishes);
    if let Ok(tokenizer) = Tokenizer::open(model) {
        builder = builder.tokenizer(tokenizer);
    }
    builder
}

/// Four short prompts, so three micro-batches have rows, and passes of prompts, of both, of decode rows alone.
fn requests() -> Vec<Request> {
    let short = tasks(60).0.into_iter().filter(|request| request.prompt.len() < 26).take(4);
    let mut requests: Vec<Request> = short.collect();
    assert_eq!(requests.len(), 4, "the shipped tasks have short prompts too");
    for (index, request) in requests.iter_mut().enumerate() {
        (request.params.ignore_eos, request.params.max_tokens) = (true, Some(3 + index));
    }
    requests
}

/// Answers, and the schedule of each pass with the order in which each lane's tasks ran.
type Run = (BTreeMap<String, RequestOutput>, Vec<(Schedule, BTreeMap<Lane, Vec<Work>>)>);

fn run(engine: &mut Engine, requests: Vec<Request>) -> Result<Run, EngineError> {
    let (mut outputs, mut passes) = (BTreeMap::new(), Vec::new());
    engine.run(&mut requests.into_iter(), RunOptions::default(), &mut |event| {
        match event {
            Event::Finished(output) => {
                outputs.insert(output.custom_id.clone(), output);
            }
            Event::Pass(pass) => {
                let mut ran: BTreeMap<Lane, Vec<Work>> = BTreeMap::new();
                let mut spans = pass.timeline.spans.clone();
                spans.sort_by_key(|span| (span.end, span.task));
                spans.iter().for_each(|span| ran.entry(span.lane).or_default().push(span.work));
                passes.push((pass.schedule.clone(), ran));
            }
            _ => {}
        }
        ControlFlow::Continue(())
    })?;
    Ok((outputs, passes))
}

/// The lanes' tasks ran in the schedule's order, and the order is the named schedule's.
fn assert_ran_as(kind: ScheduleKind, passes: &[(Schedule, BTreeMap<Lane, Vec<Work>>)]) {
    for (schedule, ran) in passes {
        for lane in [Lane::Gpu, Lane::Cpu] {
            let planned: Vec<Work> =
                schedule.tasks.iter().filter(|task| task.lane == lane).map(|task| task.work).collect();
            assert_eq!(ran.get(&lane).cloned().unwrap_or_default(), planned, "{kind}: {}", lane.name());
        }
        let works: Vec<Work> = schedule.tasks.iter().map(|task| task.work).collect();
        let n = works.iter().filter(|work| matches!(work, Work::Embed { .. })).count();
        if n < 3 {
            continue; // too few micro-batches to tell schedules apart
        }
        let at = |wanted: &dyn Fn(&Work) -> bool| works.iter().position(wanted).expect("it is there");
        let barriers = works.iter().filter(|work| matches!(work, Work::Barrier { .. })).count();
        let serial = schedule.ids().skip(1).all(|(id, task)| task.after.iter().any(|after| after.0 + 1 == id.0));
        assert_eq!(serial, kind == ScheduleKind::Serial, "{kind}");
        // In the middle of the pass, when micro-batch 0 goes through layer 1.
        let post = at(&|work| *work == Work::PostAttention { layer: 1, micro_batch: 0 });
        let begun = |micro_batch| works[..post].contains(&Work::PreAttention { layer: 1, micro_batch });
        match kind {
            ScheduleKind::Serial => {}
            ScheduleKind::FlexGen => {
                assert!(barriers >= 2 * n, "{barriers} barriers");
                assert!(!begun(1), "one micro-batch after the other");
            }
            ScheduleKind::FlexGenAsync => assert!(barriers == 0 && !begun(1)),
            ScheduleKind::FlexGenC => assert!(barriers >= 2 * n && !begun(1)),
            ScheduleKind::FastDecode | ScheduleKind::CgoPipe => {
                assert!(barriers == 0 && begun(1) && !begun(2), "two micro-batches ahead, no more");
            }
            ScheduleKind::Grouped => assert!(barriers == 0 && begun(1)),
        }
        assert!(works.iter().any(|work| matches!(work, Work::LoadPage { .. })), "experts stream");
    }
    assert!(!passes.is_empty());
}

/// Schedules of one source and one ring, on one engine that is reopened.
fn schedules_give_the_same_tokens(source: SourceKind, ring: usize) -> Result<(), Failed> {
    let wishes = Wishes {
        resident_experts: Some(1),
        ring_experts: Some(ring),
        page_bytes: Some(20_000),
        micro_batches: Some(3),
        max_sequences: Some(6),
        kv_bytes: Some(64 * 32 * 1024),
        source: Some(source),
        max_model_len: Some(256),
        ..Wishes::default()
    };
    let base = run(&mut builder(&model(), Wishes::default()).prepare()?.load(&mut |_, _| {})?, requests())?.0;
    let texts = |outputs: &BTreeMap<String, RequestOutput>| -> Vec<String> {
        let text = |output: &RequestOutput| output.result.as_ref().expect("answered")[0].text.clone();
        outputs.values().map(text).collect()
    };
    let mut engine = builder(&model(), wishes).prepare()?.load(&mut |_, _| {})?;
    for (number, kind) in ScheduleKind::ALL.into_iter().enumerate() {
        // Both ways for one source; in turns for the others, which know nothing of rows.
        let both = [RowPath::Kernels, RowPath::Copies];
        let ways = if source == SourceKind::Imported { &both[..] } else { &both[number % 2..][..1] };
        for rows in ways.iter().copied() {
            engine = engine.reopen(Wishes { schedule: Some(kind), rows: Some(rows), ..wishes })?;
            assert_eq!(engine.page_source().expect("experts stream").kind(), source, "no silent fallback");
            let (outputs, passes) = run(&mut engine, requests())?;
            assert_ran_as(kind, &passes);
            if kind.attention() == Some(AttentionPlace::Gpu) {
                // Rounded differently; greedy answers of this model are far from ties.
                assert_eq!(texts(&outputs), texts(&base), "{kind}");
            } else {
                assert_eq!(outputs, base, "{kind}, rows by {rows:?}");
            }
        }
    }
    Ok(())
}

/// Of a golden's continuation: enough for passes of prompts, of both and of decode rows alone.
const GOLDEN_TOKENS: usize = 3;

/// All schedules on a golden checkpoint, from one source through a ring of three experts or of two layers: transformers' tokens.
fn schedules_hold_a_golden(folder: &Path, source: SourceKind, two_layers: bool) -> Result<(), Failed> {
    let ring = if two_layers { 2 * ModelConfig::open(folder)?.shape.experts } else { 3 };
    let golden = Golden::open(folder);
    let mut request = golden.request("golden");
    request.params.max_tokens = Some(GOLDEN_TOKENS);
    let second = Request { custom_id: "second".into(), ..request.clone() };
    let wishes = Wishes {
        resident_experts: Some(0),
        ring_experts: Some(ring),
        page_bytes: Some(3000),
        micro_batches: Some(2),
        prompt_chunk: Some(33),
        source: Some(source),
        ..Wishes::default()
    };
    let mut engine = builder(folder, wishes).prepare()?.load(&mut |_, _| {})?;
    for kind in ScheduleKind::ALL {
        for attention in [AttentionPlace::Cpu, AttentionPlace::Gpu] {
            // Where a schedule leaves the choice, both for one source; the others know nothing of attention.
            let place = kind.attention().or((source != SourceKind::Imported).then_some(AttentionPlace::Cpu));
            if place.is_some_and(|place| place != attention) {
                continue;
            }
            engine = engine.reopen(Wishes { schedule: Some(kind), attention: Some(attention), ..wishes })?;
            assert_eq!(engine.page_source().expect("experts stream").kind(), source, "no silent fallback");
            let (outputs, _) = run(&mut engine, vec![request.clone(), second.clone()])?;
            for output in outputs.values() {
                let tokens = &output.result.as_ref().expect("answered")[0].token_ids;
                let wanted = &golden.ids[golden.prompt.len()..][..GOLDEN_TOKENS];
                assert_eq!(tokens, wanted, "{kind}, attention on the {}", attention.name());
            }
        }
    }
    Ok(())
}

/// wgpu's own means alone.
fn plain_transfers_give_the_same_tokens() -> Result<(), Failed> {
    let wishes =
        Wishes { resident_experts: Some(1), ring_experts: Some(5), page_bytes: Some(20_000), ..Wishes::default() };
    let base = run(&mut builder(&model(), wishes).prepare()?.load(&mut |_, _| {})?, requests())?.0;
    for kind in [ScheduleKind::Grouped, ScheduleKind::CgoPipe, ScheduleKind::FlexGenC] {
        let wishes = Wishes { schedule: Some(kind), micro_batches: Some(3), ..wishes };
        let prepared = builder(&model(), wishes).transfer(TransferChoice::Plain).prepare()?;
        assert_eq!(prepared.plan().policy.rows, RowPath::Copies, "kernels do not reach host memory");
        let (outputs, passes) = run(&mut prepared.load(&mut |_, _| {})?, requests())?;
        assert_eq!(outputs, base, "{kind}");
        assert_ran_as(kind, &passes);
    }
    let kernels = Wishes { rows: Some(RowPath::Kernels), ..wishes };
    let refused = builder(&model(), kernels).transfer(TransferChoice::Plain).prepare().err().expect("refused");
    assert!(refused.to_string().contains("cannot reach host memory"), "{refused}");
    Ok(())
}

/// Copies of odd sizes there and back, each waiting for the one before, by both implementations.
fn copies_keep_their_order() -> Result<(), Failed> {
    for transfer in [TransferChoice::Best, TransferChoice::Plain] {
        let gpu = Gpu::open_with(&OpenOptions { device: device(), transfer, ..OpenOptions::default() })?;
        let mut random = Random::new(11);
        let (there, back) = (gpu.pinned("there", 4096)?, gpu.pinned("back", 4096)?);
        let buffer = gpu.shared_buffer("in between", 4096)?;
        for round in 0..300 {
            let words: Vec<u32> = (0..1024).map(|_| random.bits() as u32).collect();
            // SAFETY: the copies of the round before have been waited for.
            unsafe { there.slice_mut::<u32>(0..4096).copy_from_slice(&words) };
            let at = 4 * random.below(500) as u64;
            let bytes = 4 * (1 + random.below(500) as u64);
            let up = CopyRange::new(there.at(at), buffer.at(2048), bytes.min(2048));
            let arrived = gpu.copy(Line::ToDevice, &[up], &[])?;
            let down = CopyRange::new(buffer.at(2048), back.at(0), bytes.min(2048));
            let returned = gpu.copy(Line::ToHost, &[down], &[arrived])?;
            gpu.wait_for(returned)?;
            // SAFETY: the copy has been waited for.
            let got = unsafe { back.slice::<u32>(0..bytes.min(2048)) };
            let first = at as usize / 4;
            assert_eq!(got, &words[first..first + got.len()], "round {round} by {transfer:?}");
        }
    }
    Ok(())
}

/// What is refused is said, and the next best is taken.
fn refused_memory_falls_back_aloud() -> Result<(), Failed> {
    let wishes =
        Wishes { resident_experts: Some(0), ring_experts: Some(3), page_bytes: Some(20_000), ..Wishes::default() };
    let base = run(&mut builder(&model(), wishes).prepare()?.load(&mut |_, _| {})?, requests())?.0;
    let no_import = TestFaults { import_refused: true, ..TestFaults::default() };
    let mut engine = builder(&model(), wishes).test_faults(no_import).prepare()?.load(&mut |_, _| {})?;
    let source = engine.page_source().expect("experts stream");
    assert_eq!(source.kind(), SourceKind::Pinned);
    assert!(source.why().join(" ").contains("not imported"), "{:?}", source.why());
    assert_eq!(run(&mut engine, requests())?.0, base);

    // Too little memory for weights: they are read from their files page by page.
    let mut engine = builder(&model(), Wishes { kv_bytes: Some(20 * 32 * 1024), ..wishes })
        .host_memory(Some(4_200_000))
        .test_faults(no_import)
        .prepare()?
        .load(&mut |_, _| {})?;
    assert_eq!(engine.plan().memory.host_weights, 0);
    let source = engine.page_source().expect("experts stream");
    assert_eq!(source.kind(), SourceKind::Staged, "{:?}", source.why());
    assert!(source.why().join(" ").contains("are left for weights"), "{:?}", source.why());
    assert_eq!(run(&mut engine, requests())?.0, base);

    let no_pinned = TestFaults { pinned_refused: true, ..TestFaults::default() };
    let wanted = Wishes { source: Some(SourceKind::Pinned), ..wishes };
    let error = builder(&model(), wanted).test_faults(no_pinned).prepare()?.load(&mut |_, _| {}).err();
    let message = error.expect("a wish is obeyed or refused").to_string();
    assert!(message.contains("page source pinned was asked for") && message.contains("refused"), "{message}");
    Ok(())
}

/// A device with less memory than it said: the ring shrinks, the answers stay.
fn a_device_with_less_memory_gets_a_smaller_ring() -> Result<(), Failed> {
    let wishes = Wishes { page_bytes: None, ..Wishes::default() };
    let base = run(&mut builder(&model(), wishes).prepare()?.load(&mut |_, _| {})?, requests())?.0;
    let prepared = builder(&model(), wishes).prepare()?;
    let most = prepared.plan().memory.device() - prepared.plan().memory.expert_slots / 2;
    let faults = TestFaults { device_bytes: Some(most), ..TestFaults::default() };
    let mut engine = builder(&model(), wishes).test_faults(faults).prepare()?.load(&mut |_, _| {})?;
    assert!(engine.plan().memory.expert_slots < prepared.plan().memory.expert_slots, "{}", engine.plan());
    assert!(engine.plan().streamed_bytes_per_pass > 0);
    assert_eq!(run(&mut engine, requests())?.0, base);
    // Where a wish forbids that, the error says what was needed and what is taken.
    let fixed = Wishes { resident_experts: Some(8), ..wishes };
    let message = builder(&model(), fixed).test_faults(faults).prepare()?.load(&mut |_, _| {}).err().expect("refused");
    assert!(message.to_string().contains("out of device memory"), "{message}");
    Ok(())
}

/// A file that shrinks in the middle of a run: the error names it and the place, and nothing panics.
fn a_source_that_fails_names_file_and_offset() -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    for entry in std::fs::read_dir(model())? {
        let entry = entry?;
        std::fs::copy(entry.path(), folder.path().join(entry.file_name()))?;
    }
    let wishes = Wishes {
        resident_experts: Some(0),
        ring_experts: Some(3),
        page_bytes: Some(20_000),
        source: Some(SourceKind::Staged),
        ..Wishes::default()
    };
    let mut engine = builder(folder.path(), wishes).prepare()?.load(&mut |_, _| {})?;
    let shard = folder.path().join("model-00002-of-00002.safetensors");
    std::fs::File::options().write(true).open(&shard)?.set_len(1 << 20)?;
    let error = run(&mut engine, requests()).expect_err("the file is shorter");
    let message = format!("{error}");
    assert!(message.contains("model-00002-of-00002.safetensors") && message.contains("offset"), "{message}");
    assert!(message.starts_with("page "), "the task is named: {message}");
    assert!(!error.device_lost());
    Ok(())
}

fn a_lost_device_is_an_error() -> Result<(), Failed> {
    for transfer in [TransferChoice::Best, TransferChoice::Plain] {
        let faults = TestFaults { lost_after: Some(60), ..TestFaults::default() };
        let mut engine = builder(&model(), Wishes::default())
            .transfer(transfer)
            .test_faults(faults)
            .prepare()?
            .load(&mut |_, _| {})?;
        let error = run(&mut engine, requests()).expect_err("the device is lost");
        assert!(error.device_lost(), "{error}");
        assert!(error.to_string().contains("the device was lost"), "{error}");
    }
    Ok(())
}

/// Experts in host memory serve any cut of those that were loaded, bit for bit; others are refused.
fn another_cut_needs_no_load() -> Result<(), Failed> {
    let wishes = Wishes {
        micro_batches: Some(3),
        max_sequences: Some(6),
        kv_bytes: Some(64 * 32 * 1024),
        max_model_len: Some(256),
        ..Wishes::default()
    };
    let base = run(&mut builder(&model(), wishes).prepare()?.load(&mut |_, _| {})?, requests())?.0;
    let cut = |source, resident, extra, ring, page| Wishes {
        source: Some(source),
        resident_experts: Some(resident),
        extra_residents: Some(extra),
        ring_experts: Some(ring),
        page_bytes: Some(page),
        ..wishes
    };
    for source in [SourceKind::Pinned, SourceKind::Relay] {
        let mut engine = builder(&model(), cut(source, 0, 0, 1, 20_000)).prepare()?.load(&mut |_, _| {})?;
        for (resident, extra, ring, page) in [(0, 1, 5, 7_004), (2, 0, 3, 300_000), (1, 2, 2, 50_000)] {
            engine = engine.reopen(cut(source, resident, extra, ring, page))?;
            let policy = engine.plan().policy;
            assert_eq!((policy.resident_experts, policy.extra_residents, policy.ring_experts), (resident, extra, ring));
            assert_eq!(
                run(&mut engine, requests())?.0,
                base,
                "{source}: {resident}+{extra} residents, ring {ring}, pages of {page}"
            );
        }
    }
    let engine = builder(&model(), cut(SourceKind::Pinned, 2, 0, 4, 20_000)).prepare()?.load(&mut |_, _| {})?;
    match engine.reopen(cut(SourceKind::Pinned, 1, 0, 4, 20_000)) {
        Err(EngineError::OtherPages) => Ok(()),
        Err(error) => panic!("another error: {error}"),
        Ok(_) => panic!("experts that were never loaded stream"),
    }
}

/// Made-up weights: finite, balanced as real routers are, the same tokens whatever the schedule.
fn made_up_weights_run() -> Result<(), Failed> {
    let sequences: Vec<WarmSequence> =
        (0..12).map(|age| WarmSequence { prompt: 5 + 3 * age, generated: 1 + 4 * age, left: 9 }).collect();
    let config = presets::mixtral_tiny();
    let wishes = Wishes {
        resident_experts: Some(2),
        ring_experts: Some(12),
        page_bytes: Some(100_000),
        micro_batches: Some(3),
        max_sequences: Some(12),
        max_model_len: Some(128),
        ..Wishes::default()
    };
    let mut engine = Engine::synthetic(config).device(device()).wishes(wishes).prepare()?.load(&mut |_, _| {})?;
    let mut tokens = Vec::new();
    for kind in [ScheduleKind::Serial, ScheduleKind::CgoPipe, ScheduleKind::Grouped] {
        engine = engine.reopen(Wishes { schedule: Some(kind), ..wishes })?;
        let mut page_bytes = 0;
        let (summary, generated) = engine
            .run_warm(&sequences, &mut std::iter::empty(), 4, &mut |pass| page_bytes += pass.timeline.page_bytes())?;
        assert_eq!(summary.generated_tokens, 48);
        assert!(page_bytes > 0 && generated.values().all(|tokens| tokens.len() == 4));
        tokens.push(generated);
    }
    assert!(tokens.windows(2).all(|pair| pair[0] == pair[1]), "the same tokens");
    let distinct: std::collections::BTreeSet<u32> = tokens[0].values().flatten().copied().collect();
    assert!(distinct.len() > 10, "a model that always says the same computes nothing: {distinct:?}");
    Ok(())
}

/// Made-up weights in the other families' layouts: stacked, interleaved, MXFP4.
fn every_family_runs_on_made_up_weights() -> Result<(), Failed> {
    let sequences: Vec<WarmSequence> =
        (0..4).map(|age| WarmSequence { prompt: 3 + 5 * age, generated: 1 + 4 * age, left: 9 }).collect();
    for name in ["dbrx", "qwen3_moe", "olmoe", "gpt_oss", "gpt_oss_mxfp4"] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name);
        let config = ModelConfig::open(&folder)?;
        let wishes =
            Wishes { resident_experts: Some(0), ring_experts: Some(3), page_bytes: Some(3000), ..Wishes::default() };
        let mut engine = Engine::synthetic(config).device(device()).wishes(wishes).prepare()?.load(&mut |_, _| {})?;
        let (summary, tokens) = engine.run_warm(&sequences, &mut std::iter::empty(), 5, &mut |_| {})?;
        assert_eq!(summary.generated_tokens, 20, "{name}");
        let distinct: std::collections::BTreeSet<u32> = tokens.values().flatten().copied().collect();
        assert!(distinct.len() > 2, "{name} always says {distinct:?}");
    }
    Ok(())
}

/// The driver of a discrete GPU may refuse a file's mapping, if it says so; Mesa's software driver takes it, so there the trial
/// must run.
fn said_if_mapped(source: SourceKind, result: Result<(), Failed>) -> Result<(), Failed> {
    match result {
        Err(error) if source == SourceKind::Mapped && format!("{error:?}").contains("was asked for") => {
            assert_ne!(Gpu::open(&device())?.summary().kind, "cpu", "the software driver takes mappings: {error:?}");
            eprintln!("mapped: {error:?}");
            Ok(())
        }
        result => result,
    }
}

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![
        Trial::test("pipeline::every_family_runs_on_made_up_weights", every_family_runs_on_made_up_weights),
        Trial::test("pipeline::copies_keep_their_order", copies_keep_their_order),
        Trial::test("pipeline::plain_transfers_give_the_same_tokens", plain_transfers_give_the_same_tokens),
        Trial::test("pipeline::refused_memory_falls_back_aloud", refused_memory_falls_back_aloud),
        Trial::test(
            "pipeline::a_device_with_less_memory_gets_a_smaller_ring",
            a_device_with_less_memory_gets_a_smaller_ring,
        ),
        Trial::test("pipeline::a_source_that_fails_names_file_and_offset", a_source_that_fails_names_file_and_offset),
        Trial::test("pipeline::a_lost_device_is_an_error", a_lost_device_is_an_error),
        Trial::test("pipeline::another_cut_needs_no_load", another_cut_needs_no_load),
        Trial::test("pipeline::made_up_weights_run", made_up_weights_run),
    ];
    for source in SourceKind::ALL {
        // The shipped model streams seven experts of a layer here.
        for (name, ring) in [("three_experts", 3), ("two_layers", 14)] {
            let name = format!("pipeline::schedules_give_the_same_tokens::{source}_through_a_ring_of_{name}");
            trials
                .push(Trial::test(name, move || said_if_mapped(source, schedules_give_the_same_tokens(source, ring))));
        }
    }
    // Every golden from every source through both rings takes minutes: `make test-everything`. Else sources in turn, so that each meets
    // several checkpoints.
    let every = std::env::var_os("FULMEN_EVERYTHING").is_some();
    for (number, folder) in Golden::all().into_iter().enumerate() {
        let name = folder.file_name().expect("a folder").to_string_lossy().into_owned();
        for (place, source) in SourceKind::ALL.into_iter().enumerate() {
            if !every && place != number % SourceKind::ALL.len() {
                continue;
            }
            let folder = folder.clone();
            trials.push(Trial::test(format!("pipeline::schedules_hold_a_golden::{name}_{source}"), move || {
                let result =
                    [false, true].into_iter().try_for_each(|two| schedules_hold_a_golden(&folder, source, two));
                said_if_mapped(source, result)
            }));
        }
    }
    trials
}
