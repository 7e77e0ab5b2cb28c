//! A measured machine: its profile, policies searched for with it, and what running them takes.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use fulmen::calibrate::{Request as CalibrateRequest, calibrate};
use fulmen::cpu::isa::Isa;
use fulmen::engine::{Engine, EngineError, Event, ProfileChoice, RunOptions, machine_limits};
use fulmen::gpu::Gpu;
use fulmen::model::presets::mixtral_tiny;
use fulmen::plan::Wishes;
use fulmen::plan::workload::Workload;
use fulmen::policy::{AttentionPlace, KvDtype, Precision};
use fulmen::profile::Profile;
use fulmen::request::{Request, SamplingParams};
use libtest_mimic::{Failed, Trial};

use crate::common::device;

/// This adapter, measured once for all trials, in little time: noise does not matter here.
fn profile() -> Arc<Profile> {
    static PROFILE: OnceLock<Arc<Profile>> = OnceLock::new();
    let measure = || {
        let gpu = Arc::new(Gpu::open(&device()).expect("the adapter opens"));
        let limits = machine_limits(&gpu, None, None);
        let request = CalibrateRequest {
            gpu,
            config: &mixtral_tiny(),
            isa: Isa::best(),
            precision: Precision::F32,
            device_bytes: limits.device_bytes,
            host_bytes: limits.host_bytes,
            disk: &std::env::temp_dir(),
            budget: Duration::from_secs(2),
        };
        let mut said = Vec::new();
        let profile = calibrate(&request, &mut |what| said.push(what.to_owned())).expect("a profile");
        assert!(said.len() >= 6, "progress is told: {said:?}");
        Arc::new(profile)
    };
    PROFILE.get_or_init(measure).clone()
}

/// Times make sense, and a profile survives its file.
fn a_machine_is_measured() -> Result<(), Failed> {
    let profile = profile();
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("profile.json");
    profile.write(&path)?;
    let back = Profile::read(&path)?;
    back.check(&profile.machine, &profile.model)?;
    for (what, curve) in [
        ("experts", &back.gpu.experts),
        ("projections", &back.gpu.pre_attention),
        ("the head", &back.gpu.head),
        ("copies to the host", &back.link.to_host),
        ("pages", &back.link.to_device[0].seconds),
        ("pages from disk", &back.disk.as_ref().expect("the temporary folder can be written").page_seconds),
    ] {
        let points = curve.points();
        assert!(points.len() > 1, "{what} is a curve: {points:?}");
        let (first, last) = (points[0], points[points.len() - 1]);
        assert!(first.1 > 0.0 && last.1 >= first.1 && last.1 < 10.0, "{what}: {points:?}");
        // Far more of anything takes longer.
        assert!(curve.at(last.0 * 100.0) > 10.0 * first.1, "{what}: {points:?}");
    }
    assert!(back.cpu.attention_rate(KvDtype::Int8, 1, 512.0) > 1e6 && back.cpu.best_threads() >= 1);
    let factors = &back.contention;
    for factor in [factors.pages_beside_attention, factors.attention_beside_pages, factors.kernels_beside_pages] {
        assert!(factor >= 1.0 && factor.is_finite(), "{factors:?}");
    }
    Ok(())
}

fn requests(n: usize) -> Vec<Request> {
    (0..n)
        .map(|number| Request {
            custom_id: number.to_string(),
            prompt: (0..20 + number as u32 % 30).map(|at| (at * 7 + number as u32) % 200).collect(),
            params: SamplingParams {
                temperature: 0.0,
                max_tokens: Some(6),
                ignore_eos: true,
                ..SamplingParams::default()
            },
        })
        .collect()
}

/// Under caps of any size a policy is found, a run takes no more than it says, its passes are predicted, and its tokens are those of
/// the defaults.
fn searched_policies_keep_their_word() -> Result<(), Failed> {
    const N: usize = 40;
    let workload = Workload::of((0..N).map(|number| (20 + number % 30, 6)), Some(N as u64));
    let mut answers: Option<BTreeMap<String, Vec<u32>>> = None;
    let mut residents = Vec::new();
    for (gpu_memory, searched) in
        [(None, false), (Some(4_000_000), true), (Some(7_000_000), true), (Some(60_000_000), true)]
    {
        let mut builder = Engine::synthetic(mixtral_tiny()).device(device()).gpu_memory(gpu_memory).wishes(Wishes {
            attention: Some(AttentionPlace::Cpu),
            precision: Some(Precision::F32),
            max_model_len: Some(128),
            ..Wishes::default()
        });
        if searched {
            builder = builder.profile(ProfileChoice::Given(profile())).plan_for(workload, 0.0);
        }
        let prepared = builder.prepare()?;
        assert_eq!(prepared.found().is_some(), searched);
        if let Some(found) = prepared.found() {
            assert_eq!(found.best.plan, *prepared.plan());
            assert!(found.best.tokens_per_second > 0.0 && found.fitting > 0);
            residents.push(prepared.plan().policy.resident_experts);
        }
        let planned = prepared.plan().memory.device();
        let mut engine = prepared.load(&mut |_, _| {})?;
        let mut tokens = BTreeMap::new();
        let summary = engine.run(&mut requests(N).into_iter(), RunOptions::default(), &mut |event| {
            if let Event::Finished(output) = event {
                let completions = output.result.expect("every request is answered");
                tokens.insert(output.custom_id, completions[0].token_ids.clone());
            }
            ControlFlow::Continue(())
        })?;
        let peak = engine.gpu().take_peak_bytes();
        assert!(peak <= planned, "a run took {peak} bytes of the device, {planned} were planned");
        assert!(gpu_memory.is_none_or(|cap| peak <= cap), "{peak} bytes under a cap of {gpu_memory:?}");
        assert_eq!(tokens.len(), N);
        assert_eq!(*answers.get_or_insert_with(|| tokens.clone()), tokens, "a policy changes time, never tokens");
        match summary.comparison {
            Some(comparison) => {
                assert!(searched && comparison.passes > 0 && comparison.all.measured > 0.0);
                assert!(comparison.all.ratio().is_some_and(|ratio| ratio > 0.0 && ratio.is_finite()), "{comparison:?}");
                assert!(comparison.lanes.len() >= 2, "{comparison:?}");
                assert!(comparison.line().starts_with("predicted / measured"));
            }
            None => assert!(!searched, "a run with a profile is predicted"),
        }
    }
    assert!(residents.is_sorted() && residents[0] < residents[2], "more memory holds more: {residents:?}");
    Ok(())
}

/// A profile of another machine is no ground for a plan.
fn another_machines_profile_is_refused() -> Result<(), Failed> {
    let mut other = (*profile()).clone();
    other.machine.driver = "of another machine".into();
    let builder = Engine::synthetic(mixtral_tiny())
        .device(device())
        .wishes(Wishes { precision: Some(Precision::F32), ..Wishes::default() })
        .profile(ProfileChoice::Given(Arc::new(other)));
    match builder.prepare() {
        Err(EngineError::Profile(error)) => {
            let message = error.to_string();
            assert!(message.contains("another machine: driver of another machine (here:"), "{message}");
        }
        Err(error) => panic!("another error: {error}"),
        Ok(_) => panic!("it was taken"),
    }
    Ok(())
}

pub fn trials() -> Vec<Trial> {
    vec![
        Trial::test("planning::a_machine_is_measured", a_machine_is_measured),
        Trial::test("planning::searched_policies_keep_their_word", searched_policies_keep_their_word),
        Trial::test("planning::another_machines_profile_is_refused", another_machines_profile_is_refused),
    ]
}
