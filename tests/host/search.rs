//! Predictions and the search over policies, on machines made of data sheets.

use fulmen::checkpoint::Synthetic;
use fulmen::memory::pages::PagePlan;
use fulmen::model::ModelConfig;
use fulmen::model::presets::{NAMES, preset};
use fulmen::plan::cost::{PassRows, Predictor, beside};
use fulmen::plan::hrm::Level;
use fulmen::plan::presets::{ASSUMED, HARDWARE, HardwarePreset, hardware};
use fulmen::plan::report::{binding, flags, gains};
use fulmen::plan::search::{Problem, SearchError};
use fulmen::plan::unbuilt::unbuilt;
use fulmen::plan::workload::Workload;
use fulmen::plan::{MachineLimits, ModelBytes, PlanError, Wishes, fit};
use fulmen::policy::{AttentionPlace, ScheduleKind, SourceKind};
use fulmen::profile::{Curve, Profile};
use fulmen::request::lengths::MT_BENCH_PROMPTS;
use fulmen::schedule::{Lane, build, check, simulate};
use proptest::prelude::*;

const GIB: u64 = 1 << 30;

/// A model with the profile and the limits of a machine by name.
struct Bed {
    config: ModelConfig,
    bytes: ModelBytes,
    profile: Profile,
    limits: MachineLimits,
}

fn bed(shape: &str, machine: &str, layers: Option<usize>) -> Bed {
    let mut config = preset(shape).expect("a shape");
    config.keep_layers(layers.unwrap_or(config.shape.layers));
    let synthetic = Synthetic::new(config.clone());
    let machine = hardware(machine).expect("a machine");
    Bed {
        config,
        bytes: ModelBytes::of(synthetic.inventory()),
        profile: machine.profile(synthetic.inventory()),
        limits: machine.limits(),
    }
}

impl Bed {
    /// With as little to choose from as `wishes` leave.
    fn problem(&self, workload: Workload, wishes: Wishes) -> Problem<'_> {
        let longest = workload.longest.next_multiple_of(64).min(self.config.max_positions);
        Problem {
            config: &self.config,
            bytes: self.bytes,
            profile: &self.profile,
            limits: self.limits,
            margin: 0.0,
            wishes: Wishes { max_model_len: Some(longest), ..wishes },
            workload,
        }
    }
}

#[test]
fn every_shape_has_an_answer_on_every_machine() {
    for shape in NAMES {
        for machine in HARDWARE.map(|machine| machine.name) {
            let bed = bed(shape, machine, None);
            // A coarse grid: the whole one is the command line's to walk.
            let wishes = Wishes {
                micro_batches: Some(2),
                expert_groups: Some(2),
                page_bytes: Some(32 << 20),
                ..Wishes::default()
            };
            let all_resident = |error: &SearchError| {
                matches!(error, SearchError::Plan(PlanError::Option { option: "--page-size", .. }))
            };
            let found = match bed.problem(Workload::uniform(418, 128), wishes).search() {
                Err(error) if all_resident(&error) => {
                    let wishes = Wishes { page_bytes: None, ..wishes };
                    bed.problem(Workload::uniform(418, 128), wishes).search()
                }
                found => found,
            };
            match found {
                Ok(found) => {
                    let best = &found.best;
                    let (memory, limits) = (&best.plan.memory, &bed.limits);
                    assert!(memory.device() <= limits.device_bytes && memory.host() <= limits.host_bytes);
                    assert!(best.tokens_per_second.is_finite() && best.tokens_per_second > 0.0, "{shape} on {machine}");
                    assert!(
                        best.steady.seconds >= best.lanes.longest() * (1.0 - 1e-9),
                        "{shape} on {machine}: {best:?}"
                    );
                }
                Err(error) => {
                    let text = error.to_string();
                    assert!(
                        text.chars().any(|c| c.is_ascii_digit()),
                        "{shape} on {machine} is refused without numbers: {text}"
                    );
                }
            }
        }
    }
}

#[test]
fn what_cannot_fit_is_refused_with_numbers() {
    let mut bed = bed("dbrx", "rtx3060", None);
    bed.limits.device_bytes = 3 * GIB;
    let error =
        bed.problem(Workload::uniform(100, 20), Wishes::default()).search().expect_err("DBRX in 3 GiB").to_string();
    assert!(error.contains("3.00 GiB are allowed (--gpu-memory sets it)"), "{error}");
    // A sequence that the pool cannot hold.
    let wishes = Wishes { kv_bytes: Some(64 << 20), ..Wishes::default() };
    let workload = Workload { longest: 4000, ..Workload::uniform(100, 20) };
    let bed = self::bed("mixtral-8x7b", "t4", None);
    let problem = Problem { wishes, ..bed.problem(workload, wishes) };
    let error = problem.search().expect_err("4000 tokens in 64 MiB").to_string();
    assert!(error.contains("125 blocks") || error.contains("4000 tokens"), "{error}");
}

/// A pass of few layers and the repetition of its middle is a pass of all of them.
#[test]
fn layers_in_the_middle_repeat() {
    let bed = bed("mixtral-8x7b", "t4", None);
    for (n, splits, attention, resident) in [
        (512, (2, 2), AttentionPlace::Cpu, 0),
        (504, (14, 14), AttentionPlace::Cpu, 0),
        (256, (4, 2), AttentionPlace::Cpu, 1),
        (64, (2, 2), AttentionPlace::Gpu, 0),
        (8, (1, 1), AttentionPlace::Cpu, 0),
    ] {
        let wishes = Wishes {
            max_sequences: Some(n),
            micro_batches: Some(splits.0),
            expert_groups: Some(splits.1),
            pass_rows: Some(n + 64 * splits.0),
            attention: Some(attention),
            resident_experts: Some(resident),
            max_model_len: Some(640),
            ..Wishes::default()
        };
        let plan = fit(&bed.config, &bed.bytes, &MachineLimits { device_bytes: 32 * GIB, ..bed.limits }, &wishes)
            .expect("a plan");
        let predictor = Predictor::new(&bed.config, &bed.bytes, &plan, &bed.profile).expect("pages were measured");
        let rows = PassRows::spread(&bed.config, &plan.policy, n as f64, 480.0, 40.0, 418.0);
        let short = predictor.pass_seconds(&rows);
        // The third pass of a run, all of its layers one by one.
        let layers = bed.config.shape.layers;
        let (first, _) = predictor.simulate(&rows, &predictor.shape(&rows, layers, false), &[]);
        let shape = predictor.shape(&rows, layers, true);
        let (second, _) = predictor.simulate(&rows, &shape, &first.on_their_way);
        let (third, tasks) = predictor.simulate(&rows, &shape, &second.on_their_way);
        let long = third.seconds + predictor.between(tasks);
        assert!(
            (short / long - 1.0).abs() < 2e-3,
            "{splits:?} {attention:?} {resident}: {short} by repetition, {long} in full"
        );
        assert!(long >= predictor.lanes(&rows).longest(), "no schedule beats its lanes");
    }
}

/// Pages that a pass leaves on their way are the next one's first work, and none is loaded twice or forgotten.
#[test]
fn passes_hand_their_pages_on() {
    let bed = bed("mixtral-8x7b", "t4", Some(4));
    let wishes = Wishes {
        max_sequences: Some(64),
        pass_rows: Some(64),
        resident_experts: Some(0),
        max_model_len: Some(640),
        ..Wishes::default()
    };
    let plan = fit(&bed.config, &bed.bytes, &bed.limits, &wishes).expect("a plan");
    let predictor = Predictor::new(&bed.config, &bed.bytes, &plan, &bed.profile).expect("pages were measured");
    let rows = PassRows::spread(&bed.config, &plan.policy, 64.0, 300.0, 0.0, 1.0);
    let (first, _) = predictor.simulate(&rows, &predictor.shape(&rows, 4, false), &[]);
    assert!(!first.on_their_way.is_empty(), "the link is the slowest here");
    let (second, _) = predictor.simulate(&rows, &predictor.shape(&rows, 4, true), &first.on_their_way);
    let (third, _) = predictor.simulate(&rows, &predictor.shape(&rows, 4, true), &second.on_their_way);
    // In steady state the link never pauses: a pass takes as long as its pages.
    let pages: f64 = predictor.lanes(&rows).to_device;
    let costs = predictor.costs(&rows);
    let _ = costs;
    assert!((third.seconds / pages - 1.0).abs() < 0.02, "a pass of {} with {pages} of pages", third.seconds);
    assert!(first.seconds > third.seconds, "the first one has nothing loaded for it");
    // Without its pages on their way the second pass would seem faster.
    let (unreal, _) = predictor.simulate(&rows, &predictor.shape(&rows, 4, true), &[]);
    assert!(unreal.seconds < second.seconds);
}

#[test]
fn a_policy_asks_for_itself() {
    for (shape, machine) in [("mixtral-8x7b", "t4"), ("qwen3-30b-a3b", "rtx3060"), ("olmoe-1b-7b", "a40")] {
        let bed = bed(shape, machine, None);
        let wishes = Wishes { micro_batches: Some(2), expert_groups: Some(2), ..Wishes::default() };
        let plan = bed.problem(Workload::uniform(200, 50), wishes).search().expect("a policy").best.plan;
        let again =
            fit(&bed.config, &bed.bytes, &bed.limits, &Wishes::of(&plan.policy, &bed.config)).expect("the same");
        assert_eq!(again, plan);
        let text = serde_json::to_string(&plan.policy).expect("plain data");
        let back: fulmen::policy::Policy = serde_json::from_str(&text).expect("a policy");
        assert_eq!(back, plan.policy);
        assert!(flags(&plan.policy, &bed.config).contains(&format!("--max-num-seqs {}", plan.policy.max_sequences)));
    }
}

/// What is pruned cannot win: the choice is that of looking at every policy.
#[test]
fn pruning_keeps_the_best() {
    // Little room, so that there is less to look at.
    let mut bed = bed("mixtral-8x7b", "l4", Some(4));
    bed.limits.host_bytes = 13 * GIB;
    for (workload, n) in [
        (Workload::uniform(418, 128), None),
        (Workload { requests: Some(3000), ..Workload::uniform(77, 64) }, Some(800)),
    ] {
        let wishes = Wishes {
            page_bytes: Some(32 << 20),
            attention: Some(AttentionPlace::Cpu),
            expert_groups: Some(2),
            max_sequences: n,
            ..Wishes::default()
        };
        let problem = bed.problem(workload, wishes);
        let found = problem.search().expect("a policy");
        let best =
            problem.every_policy().into_iter().map(|plan| problem.predict(&plan).expect("a time").tokens_per_second);
        let best = best.fold(0.0, f64::max);
        assert!(
            (found.best.tokens_per_second / best - 1.0).abs() < 1e-12,
            "{} of {best}",
            found.best.tokens_per_second
        );
        assert!(found.simulated < found.fitting, "something was pruned");
    }
}

/// Rates as they were measured on a server card behind a link of 48 GB/s: attention at 77 GB/s, products at 135 TFLOP/s.
fn server(config: &ModelConfig) -> Bed {
    let synthetic = Synthetic::new(config.clone());
    let machine = HardwarePreset {
        device_bytes: 16.0 * GIB as f64,
        device: Level { flops_per_s: 135e12 / ASSUMED.device_flops, bytes_per_s: 2.7e12 / ASSUMED.device_memory },
        host_bytes: 125.0 * GIB as f64,
        host: Level { flops_per_s: 3e12, bytes_per_s: 77e9 / ASSUMED.host_memory },
        link_bytes_per_s: 48e9,
        link_share: 1.0,
        ..*hardware("rtx4090").expect("a machine")
    };
    let limits = MachineLimits { device_bytes: 16 * GIB, host_bytes: 120 * GIB, ..machine.limits() };
    let bytes = ModelBytes::of(synthetic.inventory());
    Bed { config: config.clone(), bytes, profile: machine.profile(synthetic.inventory()), limits }
}

/// What was chosen by hand after many runs (four micro-batches in two groups, pages of 64 MiB, a ring of two layers, as many sequences as
/// fit) is not predicted to be better than what the search finds.
#[test]
fn the_search_is_no_worse_than_a_hand() {
    let bed = server(&preset("mixtral-8x7b").expect("a shape"));
    let lengths = MT_BENCH_PROMPTS.map(|prompt| (prompt, 128));
    let problem = bed.problem(Workload::of(lengths, None).expect("lengths"), Wishes::default());
    let by_hand = Wishes {
        micro_batches: Some(4),
        expert_groups: Some(2),
        ring_experts: Some(16),
        page_bytes: Some(64 << 20),
        attention: Some(AttentionPlace::Cpu),
        ..problem.wishes
    };
    let hand = Problem { wishes: by_hand, ..problem.clone() }.search().expect("it fits").best;
    let hand = problem.fullest(&hand.plan.policy).unwrap_or(hand);
    let found = problem.search().expect("a policy").best;
    let (ours, theirs) = (found.tokens_per_second, hand.tokens_per_second);
    assert!(ours >= 0.995 * theirs, "{ours} tok/s found, {theirs} by hand\n{}\n{}", found.plan, hand.plan);
}

/// Where the host has no room for the experts they come from disk: at its rate, and not at all where nobody knows it.
#[test]
fn more_weights_than_memory_are_predicted_from_disk() {
    let mut bed = bed("mixtral-8x7b", "t4", None);
    bed.limits.host_bytes = 24 * GIB;
    let workload = Workload::uniform(100, 50);
    let wishes = Wishes { micro_batches: Some(2), expert_groups: Some(2), ..Wishes::default() };
    let found = bed.problem(workload, wishes).search().expect("a policy").best;
    assert_eq!(found.plan.memory.host_weights, 0);
    let disk = found.plan.streamed_bytes_per_pass as f64 / ASSUMED.disk_bytes_per_s;
    let seconds = found.steady.seconds;
    assert!(seconds >= disk * (1.0 - 1e-9) && seconds < 1.1 * disk, "{seconds} s a pass, {disk} s from disk");
    // A slower link than disk is what then binds.
    bed.profile.link.to_device.iter_mut().for_each(|pages| pages.seconds = Curve::linear(0.0, 1e9));
    let slow = bed.problem(workload, wishes).search().expect("a policy").best;
    assert!(slow.steady.seconds > 1.9 * slow.plan.streamed_bytes_per_pass as f64 / ASSUMED.disk_bytes_per_s);
    bed.profile.disk = None;
    let error = bed.problem(workload, wishes).search().expect_err("nobody knows the disk").to_string();
    assert!(error.contains("no times of staged pages"), "{error}");
}

/// Experts read from disk leave the host's memory to keys and values, where that is the better use of it.
#[test]
fn a_fast_disk_can_be_better_than_memory() {
    let mut bed = bed("mixtral-8x7b", "t4", Some(8));
    bed.limits.host_bytes = 14 * GIB;
    bed.profile.disk.as_mut().expect("assumed").page_seconds = Curve::linear(0.0, 1e12);
    let wishes = Wishes { micro_batches: Some(2), expert_groups: Some(2), ..Wishes::default() };
    let workload = Workload::uniform(418, 128);
    let found = bed.problem(workload, wishes).search().expect("a policy").best;
    assert_eq!(found.plan.policy.source, Some(SourceKind::Staged), "{}", found.plan);
    let kept = Wishes { source: Some(SourceKind::Imported), ..wishes };
    let kept = bed.problem(workload, kept).search().expect("a policy").best;
    assert!(found.tokens_per_second > 1.1 * kept.tokens_per_second);
}

/// What is not built is modelled: experts on the CPU pay where the link binds and the CPU has time, not where it has none.
#[test]
fn what_is_not_built_is_modelled() {
    let mut bed = bed("mixtral-8x7b", "t4", None);
    let few = Wishes { max_sequences: Some(4), micro_batches: Some(2), expert_groups: Some(2), ..Wishes::default() };
    let many = Wishes { max_sequences: Some(800), micro_batches: Some(4), expert_groups: Some(2), ..Wishes::default() };
    let of = |bed: &Bed, wishes: Wishes| {
        let problem = bed.problem(Workload::uniform(418, 128), wishes);
        let best = problem.search().expect("a policy").best;
        let options = unbuilt(&problem, &best).expect("the same pages");
        for option in &options {
            assert!(
                option.ratio >= 1.0 && option.ratio.is_finite() && (0.0..=1.0).contains(&option.share),
                "{option:?}"
            );
        }
        options
    };
    // Few rows: the CPU reads weights faster than the link brings them. Many rows: its arithmetic is too slow.
    let options = of(&bed, few);
    let names = ["attention in both places", "experts on the CPU", "keys and values on the GPU"];
    assert_eq!(options.iter().map(|option| option.option).collect::<Vec<_>>(), names);
    assert!(options[1].ratio > 2.0 && options[1].share > 0.3, "{options:?}");
    assert!(of(&bed, many)[1].share < 0.1);
    // Reads of host memory that take for ever, and nothing to gain.
    bed.profile.cpu.dram_read = Curve::flat(1e6);
    let options = of(&bed, few);
    assert_eq!((options[1].share, options[1].ratio), (0.0, 1.0), "{options:?}");
    // A CPU that attends slowly: the GPU takes a share of that.
    bed.profile.cpu.attention.iter_mut().for_each(|of| of.bytes_per_s = Curve::flat(4e9));
    let attention = &of(&bed, Wishes { attention: Some(AttentionPlace::Cpu), ..many })[0];
    assert!(attention.ratio > 1.02 && (0.05..1.0).contains(&attention.share), "{attention:?}");
}

/// The schedule that is simulated is the one that would run, and it is sound.
#[test]
fn simulated_schedules_are_sound() {
    let bed = bed("mixtral-8x7b", "t4", Some(3));
    for kind in ScheduleKind::ALL {
        let wishes = Wishes {
            schedule: Some(kind),
            max_sequences: Some(60),
            micro_batches: Some(3),
            pass_rows: Some(90),
            max_model_len: Some(640),
            ..Wishes::default()
        };
        let plan = fit(&bed.config, &bed.bytes, &bed.limits, &wishes).expect("a plan");
        let predictor = Predictor::new(&bed.config, &bed.bytes, &plan, &bed.profile).expect("pages were measured");
        let rows = PassRows::spread(&bed.config, &plan.policy, 50.0, 300.0, 30.0, 418.0);
        for loaded in [false, true] {
            let shape = predictor.shape(&rows, 3, loaded);
            let schedule = build(kind, &shape);
            check(&schedule, &shape).expect("a sound schedule");
            let costs = predictor.costs(&rows);
            let timeline = simulate(&schedule, |work| costs.of(work));
            assert_eq!(timeline.spans.len(), schedule.tasks.len());
        }
        // The costs of the tasks add up to what each lane has to do, contention aside.
        let mut calm = bed.profile.clone();
        calm.contention = fulmen::profile::Contention::NONE;
        calm.link.to_host = calm.link.to_host.scaled(0.0);
        let predictor = Predictor::new(&bed.config, &bed.bytes, &plan, &calm).expect("pages were measured");
        let costs = predictor.costs(&rows);
        let lanes = predictor.lanes(&rows);
        let schedule = build(kind, &predictor.shape(&rows, 3, true));
        for lane in [Lane::Gpu, Lane::HostToDevice] {
            let sum: f64 =
                schedule.tasks.iter().filter(|task| task.lane == lane).map(|task| costs.of(task.work).seconds).sum();
            assert!(
                (sum / lanes.of(lane) - 1.0).abs() < 1e-9,
                "{kind} {lane:?}: {sum} in tasks, {} in all",
                lanes.of(lane)
            );
        }
    }
}

/// A machine, and the same with more of something.
fn richer(bed: &Bed, what: usize, factor: f64) -> Bed {
    let mut profile = bed.profile.clone();
    let mut limits = bed.limits;
    match what {
        0 => limits.device_bytes = (limits.device_bytes as f64 * factor) as u64,
        1 => limits.host_bytes = (limits.host_bytes as f64 * factor) as u64,
        2 => profile.link.to_device.iter_mut().for_each(|pages| pages.seconds = pages.seconds.scaled(1.0 / factor)),
        3 => profile.cpu.attention.iter_mut().for_each(|of| of.bytes_per_s = of.bytes_per_s.scaled(factor)),
        4 => {
            let gpu = &mut profile.gpu;
            for curve in [&mut gpu.experts, &mut gpu.pre_attention, &mut gpu.post_attention, &mut gpu.head] {
                *curve = curve.scaled(1.0 / factor);
            }
            gpu.prompt_attention = gpu.prompt_attention.scaled(1.0 / factor);
        }
        5 => {
            let disk = profile.disk.as_mut().expect("assumed");
            disk.page_seconds = disk.page_seconds.scaled(1.0 / factor);
        }
        _ => {
            let gpu = &mut profile.gpu;
            gpu.rows_by_kernels = gpu.rows_by_kernels.take().map(|mut rows| {
                (rows.to_host, rows.to_device) =
                    (rows.to_host.scaled(1.0 / factor), rows.to_device.scaled(1.0 / factor));
                rows
            });
        }
    }
    Bed { config: bed.config.clone(), bytes: bed.bytes, profile, limits }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]

    /// More memory or bandwidth never predicts less.
    #[test]
    fn more_is_never_less(
        machine in prop::sample::select(HARDWARE.map(|machine| machine.name).to_vec()),
        what in 0usize..7,
        factor in 1.01..2.5f64,
        share in 0.5..1.5f64,
        beside in 1.0..1.5f64,
        prompt in 20usize..600,
        generated in 8usize..200,
        requests in prop::option::of(1u64..5000),
    ) {
        let mut bed = bed("mixtral-8x7b", machine, Some(6));
        bed.limits.device_bytes = (bed.limits.device_bytes as f64 * share) as u64;
        // So little that memory is what there is too little of.
        bed.limits.host_bytes = 20 * GIB + (6.0 * GIB as f64 * share) as u64;
        bed.profile.contention.kernels_beside_pages = beside;
        bed.profile.contention.pages_beside_kernels = beside;
        bed.profile.contention.rows_beside_pages = beside;
        if beside > 1.25 {
            // Measured where attention asked for more than these contexts do.
            (bed.profile.contention.attention_bytes_per_s, bed.profile.contention.page_bytes_per_s) = (90e9, 20e9);
        }
        if what == 5 {
            bed.limits.host_bytes = (7.0 * GIB as f64 * share) as u64; // experts come from disk
        }
        let workload = Workload { requests, ..Workload::uniform(prompt, generated) };
        let wishes = Wishes { page_bytes: Some(32 << 20), expert_groups: Some(2), ..Wishes::default() };
        let poor = bed.problem(workload, wishes).search();
        let bed = richer(&bed, what, factor);
        let rich = bed.problem(workload, wishes).search();
        let all_resident = |error: &SearchError| matches!(error, SearchError::Plan(PlanError::Option { .. }));
        if let Ok(poor) = poor {
            match rich {
                Ok(rich) => {
                    let (before, after) = (poor.best.tokens_per_second, rich.best.tokens_per_second);
                    prop_assert!(after >= before * (1.0 - 1e-9), "{before} tok/s become {after}\n{}\n{}", poor.best.plan, rich.best.plan);
                }
                Err(error) => prop_assert!(all_resident(&error), "what fitted is refused: {error}"),
            }
        }
    }

    /// Work beside other work: never faster than alone, never slower than all the way beside it, and more of either takes longer.
    #[test]
    fn working_beside(mine in 0.0..10.0f64, theirs in 0.0..10.0f64, f in 1.0..4.0f64, g in 1.0..4.0f64, more in 0.0..5.0f64) {
        let time = beside(mine, theirs, f, g);
        prop_assert!(time >= mine - 1e-12 && time <= mine * f + 1e-12);
        prop_assert!(beside(mine + more, theirs, f, g) >= time - 1e-12);
        prop_assert!(beside(mine, theirs + more, f, g) >= time - 1e-12);
        // The one that ends first has been beside the other all the time.
        let other = beside(theirs, mine, g, f);
        prop_assert!((time - mine * f).abs() < 1e-9 || (other - theirs * g).abs() < 1e-9);
    }
}

#[test]
fn the_roof_that_binds_is_named_with_numbers() {
    let bed = bed("mixtral-8x7b", "t4", None);
    let problem = bed.problem(
        Workload::uniform(418, 128),
        Wishes { micro_batches: Some(2), expert_groups: Some(2), ..Wishes::default() },
    );
    let found = problem.search().expect("a policy");
    let load = binding(&problem, &found.best).expect("a roof");
    assert!(load.seconds() <= found.best.steady.seconds * (1.0 + 1e-9), "{load}");
    assert!((load.seconds() - found.best.lanes.longest()).abs() < 1e-9, "{load}");
    for gain in gains(&problem, &found.best).expect("more fits") {
        assert!(gain.ratio >= 1.0 - 1e-9, "{}: {}", gain.what, gain.ratio);
    }
}

#[test]
fn workloads_come_from_traces() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("trace.csv");
    std::fs::write(&path, "TIMESTAMP,ContextTokens,GeneratedTokens\nnow,100,10\nthen,300,30\n").expect("a file");
    let workload = Workload::from_trace(&path).expect("a trace");
    assert_eq!((workload.prompt_tokens, workload.generated_tokens), (200.0, 20.0));
    assert_eq!((workload.longest, workload.requests), (330, Some(2)));
    // The longer one is three times as long in a pass.
    assert_eq!(workload.context_tokens, (10.0 * 105.0 + 30.0 * 315.0) / 40.0);
    for (text, words) in [
        ("a,b\n1,2\n", "no column names"),
        ("num_prefill_tokens,num_decode_tokens\n1,x\n", "line 2: 'x' is no number of tokens"),
        ("prompt,output\n5\n", "line 2: '' is no number of tokens"),
        ("prompt,output\n5,0\n", "no request"),
        ("", "no request"),
    ] {
        std::fs::write(&path, text).expect("a file");
        let error = Workload::from_trace(&path).expect_err(text).to_string();
        assert!(error.contains(words), "{text:?}: {error}");
    }
}

/// Pages are cut for a prediction as for the run.
#[test]
fn a_prediction_streams_what_the_plan_says() {
    let bed = bed("gpt-oss-20b", "t4", None);
    let plan = fit(&bed.config, &bed.bytes, &bed.limits, &Wishes { resident_experts: Some(3), ..Wishes::default() })
        .expect("a plan");
    let predictor = Predictor::new(&bed.config, &bed.bytes, &plan, &bed.profile).expect("pages were measured");
    assert_eq!(predictor.page_bytes() as u64, plan.streamed_bytes_per_pass);
    assert_eq!(PagePlan::new(plan.page_shape(&bed.config, &bed.bytes)).bytes_per_pass(), plan.streamed_bytes_per_pass);
}
