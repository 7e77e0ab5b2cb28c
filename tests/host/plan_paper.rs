//! The paper's own answers, out of its own model: policies, bounds, figures. Expected values are MoE-Lightning's, from its text and
//! from what its artifact's optimizer returns.

use fulmen::model::presets::NAMES;
use fulmen::model::{Shape, Sizes};
use fulmen::plan::hrm::*;
use fulmen::plan::paper::{PaperError, PaperPlan, Setting};
use fulmen::plan::presets::{HARDWARE, hardware, shape};
use fulmen::plan::published::{self, BOUND_CASES, BOUND_L4, BOUND_T4, PUBLISHED, bound_case};
use fulmen::policy::AttentionPlace;
use proptest::prelude::*;

fn mixtral() -> Shape {
    shape("mixtral-8x7b").unwrap()
}

fn setting(shape_name: &str, hardware_name: &str, prompt_tokens: usize, generated_tokens: usize) -> Setting {
    Setting {
        shape: shape(shape_name).unwrap(),
        hardware: *hardware(hardware_name).unwrap(),
        prompt_tokens,
        generated_tokens,
    }
}

fn near(value: f64, expected: f64, relative: f64) {
    assert!((value / expected - 1.0).abs() <= relative, "{value} should be {expected}");
}

/// One row of the golden table: what the artifact's optimizer returned.
struct Golden {
    micro_batch: usize,
    micro_batches: usize,
    resident_weights: f64,
    step_seconds: f64,
    tokens_per_second: f64,
}

/// The policy that the optimizer returned comes out exactly, or lies on the plateau of exactly equal throughput; its predictions
/// come out to the digits that are known. No row is told from another.
#[track_caller]
fn comes_out(setting: Setting, golden: Golden) {
    let plan = setting.search().unwrap();
    let (first, last) = plan.plateau;
    let policy = (plan.micro_batch, plan.micro_batches, plan.plateau);
    assert_eq!(plan.micro_batch, golden.micro_batch, "{policy:?}");
    assert!(
        (first..=last).contains(&golden.micro_batches),
        "{} micro-batches are not on {policy:?}",
        golden.micro_batches
    );
    assert_eq!((plan.sequences, plan.attention), (plan.micro_batch * first, AttentionPlace::Cpu));
    // r_w and step depend on the place on the plateau: at the golden count they are the golden ones.
    let plan = setting.evaluate(golden.micro_batch, golden.micro_batches, AttentionPlace::Cpu).unwrap();
    let off = (plan.resident_weights - golden.resident_weights).abs();
    assert!(off <= 0.005f64.min(0.06 * golden.resident_weights + 1e-4), "r_w {}", plan.resident_weights);
    near(plan.step_seconds, golden.step_seconds, 0.006);
    near(plan.tokens_per_second, golden.tokens_per_second, 0.006);
    assert!(plan.device_memory.total() <= plan.device_memory.allowed * (1.0 + 1e-12), "{:?}", plan.device_memory);
    assert!(plan.host_memory.total() <= plan.host_memory.allowed * (1.0 + 1e-12), "{:?}", plan.host_memory);
}

macro_rules! golden {
    ($($name:ident: $shape:literal on $hardware:literal, $prompt:literal + $generated:literal =>
       $micro:literal x $batches:literal, $weights:literal, $step:literal, $rate:literal;)*) => {$(
        #[test]
        fn $name() {
            let golden = Golden {
                micro_batch: $micro,
                micro_batches: $batches,
                resident_weights: $weights,
                step_seconds: $step,
                tokens_per_second: $rate,
            };
            comes_out(setting($shape, $hardware, $prompt, $generated), golden);
        }
    )*};
}

mod golden {
    use super::*;

    golden! {
        s1_32: "mixtral-8x7b" on "t4", 77 + 32 => 164 x 19, 0.0047, 5.33, 603.0;
        s1_64: "mixtral-8x7b" on "t4", 77 + 64 => 164 x 19, 0.0047, 5.33, 594.0;
        s1_128: "mixtral-8x7b" on "t4", 77 + 128 => 164 x 14, 0.0108, 5.19, 446.0;
        s1_256: "mixtral-8x7b" on "t4", 77 + 256 => 132 x 11, 0.024, 5.12, 285.0;
        s1_padded_32: "mixtral-8x7b" on "t4", 418 + 32 => 36 x 14, 0.0004, 5.25, 99.13;
        s1_padded_64: "mixtral-8x7b" on "t4", 418 + 64 => 36 x 14, 0.0004, 5.25, 97.56;
        s1_padded_128: "mixtral-8x7b" on "t4", 418 + 128 => 36 x 14, 0.0004, 5.25, 96.79;
        s1_padded_256: "mixtral-8x7b" on "t4", 418 + 256 => 36 x 14, 0.0004, 5.25, 96.41;
        s2_32: "mixtral-8x7b" on "l4", 77 + 32 => 324 x 14, 0.0559, 4.96, 945.0;
        s2_64: "mixtral-8x7b" on "l4", 77 + 64 => 228 x 16, 0.084, 4.81, 771.0;
        s2_128: "mixtral-8x7b" on "l4", 77 + 128 => 164 x 16, 0.107, 4.73, 560.0;
        s2_256: "mixtral-8x7b" on "l4", 77 + 256 => 164 x 10, 0.114, 4.65, 354.0;
        s2_padded_32: "mixtral-8x7b" on "l4", 418 + 32 => 68 x 15, 0.038, 5.05, 209.0;
        s2_padded_64: "mixtral-8x7b" on "l4", 418 + 64 => 68 x 14, 0.041, 5.04, 192.0;
        s2_padded_128: "mixtral-8x7b" on "l4", 418 + 128 => 68 x 13, 0.044, 5.02, 177.0;
        s2_padded_256: "mixtral-8x7b" on "l4", 418 + 256 => 68 x 10, 0.052, 4.98, 137.0;
        s6_padded_32: "mixtral-8x22b" on "2xt4", 417 + 32 => 36 x 7, 0.0012, 15.7, 16.5;
        s6_padded_64: "mixtral-8x22b" on "2xt4", 417 + 64 => 36 x 7, 0.0012, 15.7, 16.27;
        s6_padded_128: "mixtral-8x22b" on "2xt4", 417 + 128 => 36 x 7, 0.0012, 15.7, 16.14;
        s6_padded_256: "mixtral-8x22b" on "2xt4", 417 + 256 => 36 x 7, 0.0012, 15.7, 16.1;
        s7_padded_32: "mixtral-8x22b" on "4xt4", 417 + 32 => 36 x 19, 0.057, 14.8, 47.6;
        s7_padded_64: "mixtral-8x22b" on "4xt4", 417 + 64 => 36 x 18, 0.060, 14.8, 44.5;
        s7_padded_128: "mixtral-8x22b" on "4xt4", 417 + 128 => 36 x 16, 0.066, 14.7, 39.5;
        s7_padded_256: "mixtral-8x22b" on "4xt4", 417 + 256 => 36 x 14, 0.071, 14.6, 34.6;
        s8_32: "dbrx" on "2xt4", 77 + 32 => 68 x 39, 0.0018, 15.4, 178.0;
        s8_64: "dbrx" on "2xt4", 77 + 64 => 68 x 39, 0.0018, 15.4, 175.0;
        s8_128: "dbrx" on "2xt4", 77 + 128 => 68 x 35, 0.0039, 14.7, 163.0;
        s8_256: "dbrx" on "2xt4", 77 + 256 => 68 x 22, 0.0108, 14.6, 103.0;
        s9_32: "dbrx" on "4xt4", 77 + 32 => 68 x 68, 0.061, 13.86, 344.0;
        s9_64: "dbrx" on "4xt4", 77 + 64 => 68 x 56, 0.074, 13.67, 283.0;
        s9_128: "dbrx" on "4xt4", 77 + 128 => 68 x 42, 0.089, 13.45, 214.0;
        s9_256: "dbrx" on "4xt4", 77 + 256 => 36 x 53, 0.111, 13.13, 146.0;
        helm_reasoning_s1: "mixtral-8x7b" on "t4", 256 + 50 => 36 x 26, 0.015, 7.28, 131.0;
        helm_reasoning_s2: "mixtral-8x7b" on "l4", 256 + 50 => 100 x 15, 0.051, 4.98, 307.0;
        helm_summarization_s1: "mixtral-8x7b" on "t4", 1984 + 64 => 4 x 19, 0.027, 5.32, 14.5;
        helm_summarization_s2: "mixtral-8x7b" on "l4", 1984 + 64 => 4 x 16, 0.128, 4.72, 13.8;
    }
}

/// Where a plateau is known, its ends come out too; elsewhere the policy stands alone.
#[test]
fn plateaus_of_equal_throughput() {
    for (setting, micro_batch, plateau) in [
        (setting("mixtral-8x7b", "t4", 256, 50), 36, (19, 41)),
        (setting("dbrx", "2xt4", 77, 32), 68, (38, 42)),
        (setting("dbrx", "2xt4", 77, 64), 68, (38, 42)),
        (setting("mixtral-8x7b", "t4", 418, 128), 36, (14, 14)),
        (setting("mixtral-8x7b", "l4", 77, 32), 324, (14, 14)),
    ] {
        let plan = setting.search().unwrap();
        assert_eq!((plan.micro_batch, plan.micro_batches, plan.plateau), (micro_batch, plateau.0, plateau));
        // Equal on it, less just outside.
        let rate = |n: usize| setting.evaluate(micro_batch, n, AttentionPlace::Cpu).map(|plan| plan.tokens_per_second);
        for n in plateau.0..=plateau.1 {
            near(rate(n).unwrap(), plan.tokens_per_second, 1e-9);
        }
        assert!(rate(plateau.0 - 1).unwrap() < plan.tokens_per_second * (1.0 - 1e-6));
        assert!(rate(plateau.1 + 1).is_none_or(|rate| rate < plan.tokens_per_second * (1.0 - 1e-6)));
    }
}

/// No policy of a wide scan is better than what the search returns.
#[test]
fn the_search_misses_nothing() {
    for setting in [
        setting("mixtral-8x7b", "t4", 77, 128),
        setting("dbrx", "4xt4", 77, 256),
        setting("mixtral-8x7b", "l4", 1984, 64),
    ] {
        let best = setting.search().unwrap().tokens_per_second;
        let mut fitting = 0;
        for micro_batch in [1, 2, 3, 4].into_iter().chain((36..700).step_by(32)) {
            for micro_batches in 1..200 {
                for attention in [AttentionPlace::Cpu, AttentionPlace::Gpu] {
                    if let Some(plan) = setting.evaluate(micro_batch, micro_batches, attention) {
                        assert!(plan.tokens_per_second <= best * (1.0 + 1e-9), "{micro_batch} x {micro_batches}");
                        fitting += 1;
                    }
                }
            }
        }
        assert!(fitting > 100, "{fitting} policies fit");
    }
}

/// Free host memory anywhere in the range that is known gives the same policies.
#[test]
fn policies_do_not_hang_on_the_last_tenth_of_free_memory() {
    for runs in PUBLISHED.iter().filter(|runs| ["t4", "l4"].contains(&runs.hardware)) {
        for run in runs.runs {
            let policies = [184.2, 184.3, 184.4, 184.5].map(|gib: f64| {
                let mut setting = runs.setting(run);
                setting.hardware.host_bytes = gib * (1u64 << 30) as f64;
                let plan = setting.search().unwrap();
                (plan.micro_batch, plan.micro_batches, plan.plateau)
            });
            assert!(policies.iter().all(|policy| *policy == policies[0]), "{} {run:?}: {policies:?}", runs.name);
        }
    }
}

/// The published runs had N within 3 micro-batches of the optimizer's, or the plateau's, where the two use the same µ.
#[test]
fn published_batches_are_near() {
    // S9 ran with less free memory than the 408 GiB that all other settings of that machine agree on, and summarization on the
    // L4 was set by hand.
    let known =
        |runs: &published::PublishedRuns| runs.name == "S9" || (runs.hardware == "l4" && runs.prompt_tokens == 1984);
    for runs in PUBLISHED.iter().filter(|runs| !known(runs)) {
        for run in runs.runs {
            let plan = runs.setting(run).search().unwrap();
            let published = run.sequences as f64 / plan.micro_batch as f64;
            let (first, last) = plan.plateau;
            let off = (first as f64 - published).max(published - last as f64);
            assert!(off <= 3.0, "{} {} {run:?}: {:?}", runs.name, runs.workload, (plan.micro_batch, plan.plateau));
        }
    }
}

/// Peaks of the artifact's log: 147 GB of host memory, 12.9 GB of device memory on a T4, 20.64 on an L4 (GB of 2^30).
#[test]
fn memory_peaks() {
    let gib = |bytes: f64| bytes / (1u64 << 30) as f64;
    let plan = setting("mixtral-8x7b", "t4", 77, 128).search().unwrap();
    near(gib(plan.device_memory.total()), 12.9, 1e-3);
    near(gib(plan.host_memory.total()), 147.0, 5e-3);
    let plan = setting("mixtral-8x7b", "l4", 77, 32).search().unwrap();
    near(gib(plan.device_memory.total()), 20.64, 1e-4);
    near(gib(plan.host_memory.total()), 147.3, 2e-3);
    let plan = setting("mixtral-8x7b", "t4", 418, 128).search().unwrap();
    assert!((118.0..132.0).contains(&gib(plan.host_memory.total())), "{}", gib(plan.host_memory.total()));
}

/// All experts of a layer, by the shapes: 84.0, 252 and 236 GiB in all; K and V of a token 128, 224 and 160 KiB.
#[test]
fn shapes_have_their_known_sizes() {
    let expected = [
        ("mixtral-8x7b", 84.0, 128, 46.70, 12.88),
        ("mixtral-8x22b", 252.0, 224, 140.6, 39.2),
        ("dbrx", 236.25, 160, 131.6, 36.5),
        ("qwen3-30b-a3b", 54.0, 96, 30.53, 3.35),
        ("olmoe-1b-7b", 12.0, 128, 6.92, 1.28),
        ("gpt-oss-20b", 35.6, 48, 20.9, 4.19),
    ];
    for (name, (known, experts, kv_kib, total, active)) in NAMES.into_iter().zip(expected) {
        let shape = shape(name).unwrap();
        assert_eq!((name, shape.faults()), (known, Vec::new()));
        let gib = 2.0 * layer_expert_elements(&shape) * shape.layers as f64 / (1u64 << 30) as f64;
        near(gib, experts, 2e-3);
        assert_eq!(2 * shape.kv_elements_per_token(), kv_kib << 10);
        let [total_here, active_here] = [shape.experts, shape.experts_per_token].map(|experts| {
            let layer = shape.d_model * (2 * shape.q_width() + 2 * shape.kv_width() + shape.experts)
                + experts * 3 * shape.expert_matrix_elements();
            (shape.layers * layer + 2 * shape.vocab * shape.d_model) as f64 / 1e9
        });
        near(total_here, total, 2e-3);
        near(active_here, active, 4e-3);
    }
    let _ = Sizes::parameters; // the crate's own count, which needs a whole config
}

/// The hierarchy of the paper's roofline figures: an L4 with its data sheet's numbers.
fn figure() -> Hierarchy {
    Hierarchy {
        device: Level { flops_per_s: 242e12, bytes_per_s: 300e9 },
        host: Level { flops_per_s: 1.3e12, bytes_per_s: 100e9 },
        link_bytes_per_s: 16e9,
    }
}

#[test]
fn turning_points_of_the_figure() {
    let (machine, shape) = (figure(), mixtral());
    let intensity = |rows: f64| Work::experts(&shape, rows, 2.0).intensity();
    for (rows, expected) in [(32.0, 8.0), (128.0, 31.95), (1024.0, 252.6), (16384.0, 3373.0)] {
        near(intensity(rows), expected, 5e-4);
    }
    // P1: the host's 1.3 TFLOP/s over the link.
    assert_eq!(turning_point_p1(&machine, intensity(326.0)), 81.25);
    let rows = rows_at_intensity(&shape, 81.25, 2.0).unwrap();
    near(rows, 326.0, 2e-3);
    near(intensity(rows), 81.25, 1e-12);
    // P2 of a kernel over 128 rows.
    let kernel = attainable(&machine.device, intensity(128.0));
    near(kernel, 9.58e12, 1e-3);
    let p2 = turning_point_p2(&machine, intensity(128.0));
    near(p2, 599.0, 1e-3);
    near(rows_at_intensity(&shape, p2, 2.0).unwrap(), 2474.0, 1e-3);
    // The device's memory limits that kernel, so the balance (11) is at the same place.
    assert_eq!(balance_intensity(&machine, intensity(128.0)), p2);
    assert_eq!(balanced_micro_batches(&machine, 0.0), 18.75);
    near(balanced_micro_batches(&machine, 0.25), 14.0625, 1e-12);
    // Rows' own traffic bounds the intensity: 6 A D F over 2 (D + F).
    assert_eq!(rows_at_intensity(&shape, 20_000.0, 2.0), None);
}

/// f16 and 4-bit K and V lie below P1 whatever the batch: attention stays on the host.
#[test]
fn decode_attention_is_below_p1() {
    let machine = figure();
    for (kv_bytes, expected) in [(2.0, 4.0), (0.5, 16.0)] {
        for (sequences, context) in [(1.0, 1.0), (504.0, 546.0), (4000.0, 100.0)] {
            let intensity = Work::decode_attention(&mixtral(), sequences, context, kv_bytes).intensity();
            assert_eq!(intensity, expected);
            let p1 = turning_point_p1(&machine, intensity);
            assert!(intensity < p1, "{intensity} against {p1}");
            // On the host it reaches more than over the link.
            let (roof, over_link) = attainable_on_device(&machine, intensity, intensity);
            assert_eq!((roof, over_link), (Roof::Link, 16e9 * expected));
            assert!(attainable(&machine.host, intensity) > over_link);
        }
    }
}

/// (1) to (8) by hand, with each roof binding once.
#[test]
fn each_roof_binds_in_its_place() {
    let machine = figure();
    near(ridge_intensity(&machine.device), 242e12 / 300e9, 1e-15);
    assert_eq!(ridge_intensity(&machine.host), 13.0);
    assert_eq!(memory_roof(300e9, 4.0), 1.2e12);
    assert_eq!(attainable(&machine.host, 12.0), 1.2e12);
    assert_eq!(attainable(&machine.host, 14.0), 1.3e12);
    assert_eq!(attainable_on_device(&machine, 31.0, 100.0), (Roof::Link, 1.6e12));
    assert_eq!(attainable_on_device(&machine, 31.0, 1000.0), (Roof::DeviceMemory, 9.3e12));
    assert_eq!(attainable_on_device(&machine, 1000.0, 20_000.0), (Roof::DeviceCompute, 242e12));
    // At P2 link and device are level, below it the link is the lower.
    let p2 = turning_point_p2(&machine, 31.0);
    near(attainable_on_device(&machine, 31.0, p2).1, 9.3e12, 1e-15);
    assert_eq!(attainable_on_device(&machine, 31.0, 0.99 * p2).0, Roof::Link);
    assert_eq!(attainable_on_device(&machine, 31.0, 1.01 * p2).0, Roof::DeviceMemory);
}

#[test]
fn a_bound_says_which_roof_in_words() {
    let setting = setting("mixtral-8x7b", "t4", 418, 128);
    let plan = setting.search().unwrap();
    assert_eq!(plan.binding().to_string(), "link-bound: 84.0 GiB over 16.0 GiB/s take 5.25 s");
    let bound = policy_bound(&setting.hardware.hierarchy(), &setting.shape, &plan.point(&setting));
    assert_eq!(bound.binding().to_string(), plan.binding().to_string());
    near(bound.tokens_per_second, 504.0 / 5.248, 1e-3);
    // Ten times as many micro-batches: the experts are read from device memory ten times as often.
    let point = PolicyPoint { micro_batches: 140, ..plan.point(&setting) };
    let bound = policy_bound(&setting.hardware.hierarchy(), &setting.shape, &point);
    assert_eq!(bound.binding().to_string(), "device-memory-bound: 11.5 TiB over 300 GiB/s take 39.2 s");
    // Attention on the device brings K and V over the link.
    let point = PolicyPoint { attention_on_device: true, ..plan.point(&setting) };
    let bound = policy_bound(&setting.hardware.hierarchy(), &setting.shape, &point);
    assert_eq!(bound.binding().to_string(), "link-bound: 118 GiB over 16.0 GiB/s take 7.35 s");
    let host = Load { roof: Roof::HostCompute, amount: 2.5e12, rate: 0.8e12 };
    assert_eq!(host.to_string(), "host-compute-bound: 2.50 TFLOP at 800 GFLOP/s take 3.12 s");
}

/// The steady-state bound, against the figures worked out by hand for Mixtral 8x7B and 77-token prompts.
#[test]
fn steady_state_bounds() {
    let rows: [(Hierarchy, usize, [f64; 4]); 6] = [
        (BOUND_L4, 0, [569.0, 575.0, 445.0, 306.0]),
        (BOUND_L4, 1, [569.0, 843.0, 652.0, 448.0]),
        (BOUND_L4, 2, [569.0, 880.0, 1210.0, 897.0]),
        (BOUND_L4, 3, [569.0, 880.0, 1210.0, 1490.0]),
        (BOUND_T4, 0, [284.0, 440.0, 432.0, 297.0]),
        (BOUND_T4, 1, [284.0, 440.0, 605.0, 436.0]),
    ];
    for (machine, case, expected) in rows {
        let (title, weights, kv, memory) = BOUND_CASES[case];
        for (generated, expected) in [32.0, 64.0, 128.0, 256.0].into_iter().zip(expected) {
            let bound = steady_state_bound(&machine, &bound_case(weights, kv, memory, 77.0, generated));
            assert!((bound.tokens_per_second / expected - 1.0).abs() < 2e-3, "{title}, {generated}: {bound:?}");
        }
    }
    // Where the device binds, the ceiling is P / (F (1 + s/g)) whatever the memory.
    let bound = steady_state_bound(&BOUND_L4, &bound_case(2.0, 2.0, 60e9, 77.0, 32.0));
    assert_eq!(bound.binding().roof, Roof::DeviceCompute);
    near(bound.tokens_per_second, 50e12 / (25.8e9 * (1.0 + 77.0 / 32.0)), 1e-12);
}

/// Effective rates of the published runs, as least squares have them.
#[test]
fn fitted_rates_of_published_runs() {
    let fitted = |name, padded| {
        let runs = PUBLISHED.iter().find(|runs| runs.name == name && runs.padded == padded).unwrap();
        runs.fitted_rates().unwrap()
    };
    for (name, padded, prefill, step) in [
        ("S1", true, 334.0, 12.1),
        ("S1", false, 210.0, 14.2),
        ("S2", true, 1143.0, 8.7),
        ("S2", false, 899.0, 9.0),
        ("S6", true, 154.0, 25.6),
        ("S7", true, 304.0, 15.3),
        ("S8", false, 236.0, 57.0),
        ("S9", false, 300.0, 27.0),
    ] {
        let (prefill_here, step_here) = fitted(name, padded);
        near(prefill_here, prefill, 0.012);
        near(step_here, step, 0.012);
    }
}

/// Every shape on every machine: a policy within memory, or a refusal that says what is needed and what there is.
#[test]
fn every_shape_on_every_machine() {
    let (mut fit, mut refused) = (0, 0);
    for name in NAMES {
        let shape = shape(name).unwrap();
        for hardware in HARDWARE {
            for (prompt_tokens, generated_tokens) in [(77, 128), (1984, 64)] {
                let setting = Setting { shape, hardware, prompt_tokens, generated_tokens };
                match setting.search() {
                    Ok(plan) => {
                        holds(&setting, &plan);
                        if plan.attention == AttentionPlace::Cpu {
                            let state = setting.steady_state().expect("a policy fits");
                            let best = steady_state_bound(&hardware.hierarchy(), &state);
                            assert!(plan.run_tokens_per_second <= best.tokens_per_second, "{best:?} {plan:?}");
                        }
                        fit += 1;
                    }
                    Err(PaperError::Memory { needed, allowed, .. }) => {
                        assert!(needed > allowed, "{name} on {}", hardware.name);
                        refused += 1;
                    }
                    Err(error) => panic!("{name} on {}: {error}", hardware.name),
                }
            }
        }
    }
    assert!(fit > 60 && refused > 10, "{fit} fit, {refused} are refused");
    let refused = setting("mixtral-8x22b", "rtx3060", 77, 128).search().unwrap_err().to_string();
    assert_eq!(
        refused,
        "no policy fits rtx3060: one sequence of 205 tokens needs 18.2 GiB of device memory (projections 9.19 GiB, two layers of \
         experts 9.00 GiB, rows and scratch 22.8 MiB); 10.3 GiB are allowed, 86 % of 12.0 GiB"
    );
    let refused = setting("mixtral-8x22b", "l4", 77, 128).search().unwrap_err().to_string();
    assert!(
        refused.contains("of host memory (experts 2") && refused.contains("147 GiB are allowed, 80 % of 184 GiB"),
        "{refused}"
    );
    let refused = setting("mixtral-8x7b", "t4", 77, 1).search().unwrap_err();
    assert_eq!(refused.to_string(), "--gen-len is 1; it must be 2 to 16777216");
}

fn holds(setting: &Setting, plan: &PaperPlan) {
    let rounding = 1.0 + 1e-9;
    assert!(plan.device_memory.total() <= plan.device_memory.allowed * rounding, "{plan:?}");
    assert!(plan.host_memory.total() <= plan.host_memory.allowed * rounding, "{plan:?}");
    assert!((0.0..=1.0).contains(&plan.resident_weights) && (0.0..=1.0).contains(&plan.resident_kv));
    assert_eq!(plan.sequences, plan.micro_batch * plan.micro_batches);
    let longest = plan.layer_seconds.link.max(plan.layer_seconds.device).max(plan.layer_seconds.host);
    near(plan.step_seconds, longest * setting.shape.layers as f64, 1e-12);
    near(plan.binding().seconds(), plan.step_seconds, if plan.attention == AttentionPlace::Cpu { 1e-9 } else { 0.5 });
    // The bound of a policy is not above what the policy is predicted to do, but for the n/(n-1) of the objective, and for
    // attention, which the paper counts at half its FLOP.
    let bound = policy_bound(&setting.hardware.hierarchy(), &setting.shape, &plan.point(setting));
    if plan.attention == AttentionPlace::Cpu && bound.binding().roof != Roof::HostCompute {
        let n = setting.generated_tokens as f64;
        assert!(plan.tokens_per_second * (n - 1.0) / n <= bound.tokens_per_second * rounding, "{bound:?} {plan:?}");
    }
}

/// `docs/predictions.md` is what the command prints.
#[test]
fn the_page_of_predictions_is_up_to_date() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/predictions.md");
    let page = published::page().unwrap();
    let there = std::fs::read_to_string(file).unwrap_or_default();
    assert!(
        there == page,
        "docs/predictions.md differs; write it with `fulmen plan --paper --published > docs/predictions.md`"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    /// More memory or a faster part never makes the prediction worse, and nothing panics.
    #[test]
    fn more_hardware_is_never_slower(
        shape_idx in 0..NAMES.len(),
        hardware_idx in 0..HARDWARE.len(),
        prompt_tokens in 1usize..3000,
        generated_tokens in 2usize..600,
        part in 0usize..6,
        factor in 1.0f64..2.0,
    ) {
        let mut setting = Setting { shape: shape(NAMES[shape_idx]).unwrap(), hardware: HARDWARE[hardware_idx], prompt_tokens, generated_tokens };
        let before = setting.search();
        let hardware = &mut setting.hardware;
        let rate = [
            &mut hardware.device_bytes,
            &mut hardware.host_bytes,
            &mut hardware.link_bytes_per_s,
            &mut hardware.device.bytes_per_s,
            &mut hardware.device.flops_per_s,
            &mut hardware.host.bytes_per_s,
        ];
        *rate.into_iter().nth(part).unwrap() *= factor;
        let after = setting.search();
        match (before, after) {
            (Ok(before), Ok(after)) => {
                holds(&setting, &after);
                prop_assert!(after.tokens_per_second >= before.tokens_per_second * (1.0 - 1e-9), "{before:?} {after:?}");
            }
            (Ok(before), Err(error)) => prop_assert!(false, "{before:?}, and with more: {error}"),
            (Err(error), _) => prop_assert!(error.to_string().contains("no policy fits"), "{error}"),
        }
    }
}

/// The four schedules in the paper's setting S1, with no constant but the preset's and the relay's rate: the direction of its
/// ablation, 1.79x by the schedule and 1.77x by the policy.
///
/// What is left between the two: the measured steps are longer (12.1 s against 5.4 s for CGOPipe, by least squares over the
/// published runs), because the model knows neither launch overheads nor that the link carries 12 GB/s rather than 16 GiB/s, and
/// the published gains are of whole runs, whose prefill is the same for both. With weights relayed at 5.43 GB/s FlexGen's schedule
/// loses more than was measured, with weights pinned once a little less: its wait after each micro-batch lets the next layer's
/// weights come beside one micro-batch only.
#[test]
fn the_ablation_has_its_direction() {
    use fulmen::plan::ablation::{CASES, Case, RELAY_BYTES_PER_S, setting};
    use fulmen::policy::ScheduleKind::{CgoPipe, FastDecode, FlexGen, FlexGenAsync, FlexGenC};
    use fulmen::schedule::{build, check};
    let setting = setting();
    println!("{}", serde_json::to_string(&setting.hardware).unwrap());
    println!("relay {RELAY_BYTES_PER_S} bytes/s");
    let rate = |case: &Case| {
        let pass = case.pass(&setting);
        check(&build(case.kind, &pass), &pass).unwrap_or_else(|fault| panic!("{case:?}: {fault}"));
        let rate = case.tokens_per_second(&setting);
        println!("{case:?}: {:.2} s a step, {rate:.1} tok/s", case.sequences() as f64 / rate);
        rate
    };
    let rates: Vec<(Case, f64)> = CASES.iter().map(|case| (*case, rate(case))).collect();
    let of = |kind, micro_batch, n, relay| {
        let found = rates.iter().find(|(case, _)| {
            (case.kind, case.micro_batch, case.micro_batches, case.relay) == (kind, micro_batch, n, relay)
        });
        found.expect("a case").1
    };
    let cgopipe = of(CgoPipe, 36, 14, false);
    for relay in [false, true] {
        let same_policy = of(FlexGen, 36, 14, relay);
        let own_policy = of(FlexGen, 8, 139, relay);
        let larger = of(FlexGen, 36, 31, relay);
        let (schedule_gain, policy_gain) = (cgopipe / same_policy, same_policy / own_policy);
        println!(
            "relay {relay}: schedule gain {schedule_gain:.2} (published 1.79), policy gain {policy_gain:.2} (1.77)"
        );
        assert!(schedule_gain > 1.3 && policy_gain > 1.1, "{schedule_gain} {policy_gain}");
        // More sequences help FlexGen, and do not bring it to CGOPipe: 9.5 < 16.8 < 20.7 < 30.1.
        assert!(
            own_policy < same_policy && same_policy < larger && larger < cgopipe,
            "{own_policy} {same_policy} {larger}"
        );
    }
    // S1 is ahead of all others; the relay only costs.
    for kind in [FastDecode, FlexGenC, FlexGenAsync, FlexGen] {
        assert!(of(kind, 36, 14, false) < cgopipe, "{kind:?}");
    }
    assert!(of(FlexGenC, 36, 14, false) < of(FastDecode, 36, 14, false));
    assert!(of(FlexGen, 36, 14, true) < of(FlexGen, 36, 14, false));
    // CGOPipe hides everything behind the link, but for the first and last micro-batch of a pass.
    near(504.0 / cgopipe, 5.25, 0.05);
}
