//! What fulmen does not do, and what it would bring: three options of the design space that are modelled here, from the same profile, and
//! not built. They show whether building one would pay on a machine.
//!
//! | option | the lanes' work with a share of it |
//! |---|---|
//! | attention in both places | so much less attention on the CPU, those contexts over the link and attention on the GPU, a workspace instead of residents |
//! | experts on the CPU | so many fewer pages, their weights read from host memory by the CPU instead, their rows over the link and back |
//! | keys and values on the GPU | those sequences run beside the others and attend on the GPU, their keys and values instead of residents |
//!
//! In: a [`Choice`]. Out: for each option the best share, and what the choice's rate becomes if its pass shrinks as its busiest lane
//! does. Given up: no schedule is simulated, so what lanes wait for each other stays in proportion.

use super::cost::{LaneSeconds, Predictor};
use super::report::hierarchy;
use super::search::{Choice, Problem, SearchError};
use crate::execute::machine::workspace_block_bytes;
use crate::memory::kv_cache::BLOCK_TOKENS;
use crate::policy::AttentionPlace;

/// An option and what its best share brings.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Unbuilt {
    pub option: &'static str,
    /// What it is a share of.
    pub of: &'static str,
    /// 0 where none of it is best.
    pub share: f64,
    /// Tokens per second over the choice's.
    pub ratio: f64,
}

/// Shares that are tried.
const STEPS: usize = 100;

/// The lanes with a share of an option, and the rows of the pass over the choice's. None: there is no room for it.
type With<'a> = &'a dyn Fn(f64) -> Option<(LaneSeconds, f64)>;

/// All three, for a choice.
pub fn unbuilt(problem: &Problem<'_>, choice: &Choice) -> Result<Vec<Unbuilt>, SearchError> {
    let (config, profile) = (problem.config, problem.profile);
    let predictor = Predictor::new(config, &problem.bytes, &choice.plan, profile)?;
    let policy = &choice.plan.policy;
    let shape = &config.shape;
    let layers = shape.layers as f64;
    let rows = problem.steady_rows(choice);
    let [on_cpu, on_gpu, contexts] = predictor.decode_attention(&rows);
    // Without any decode attention, wherever it is now.
    let mut rest = choice.lanes;
    match policy.attention {
        AttentionPlace::Cpu => rest.cpu -= on_cpu,
        AttentionPlace::Gpu => {
            rest.gpu -= on_gpu;
            rest.to_device -= contexts;
        }
    }
    // Residents make room for other things, and stream then.
    let residents = (shape.layers * policy.resident_experts + policy.extra_residents) as f64;
    let room = residents * problem.bytes.expert_slots() as f64;
    let byte_seconds = match predictor.page_bytes() {
        bytes if bytes > 0.0 => predictor.page_seconds() / bytes,
        _ => profile.link.pages(None).map_or(0.0, |pages| pages.seconds.at(1e9) / 1e9),
    };
    let streams = |bytes: f64| (bytes <= room).then_some(bytes * byte_seconds);

    let block_bytes = workspace_block_bytes(config) as f64;
    let blocks = (problem.workload.context_tokens / BLOCK_TOKENS as f64).ceil();
    let sequences = policy.max_sequences as f64;
    let split = |on_the_gpu: f64| {
        let kept = match policy.attention {
            AttentionPlace::Cpu => {
                policy.workspaces as f64
                    * (sequences / policy.micro_batches as f64 * on_the_gpu).ceil()
                    * blocks
                    * block_bytes
            }
            AttentionPlace::Gpu => 0.0, // its workspaces have room for all
        };
        let lanes = LaneSeconds {
            cpu: rest.cpu + (1.0 - on_the_gpu) * on_cpu,
            gpu: rest.gpu + on_the_gpu * on_gpu,
            to_device: rest.to_device + on_the_gpu * contexts + streams(kept)?,
            ..rest
        };
        Some((lanes, 1.0))
    };
    let own = if policy.attention == AttentionPlace::Gpu { 1.0 } else { 0.0 };

    let machine = hierarchy(profile);
    let n = (rows.decode() + rows.prompt()) as f64;
    let streamed = predictor.page_bytes();
    let reads = profile.cpu.dram_read.points().iter().map(|point| point.1).fold(1.0, f64::max);
    let on_the_cpu = |share: f64| {
        let bytes = share * streamed;
        let of_all = bytes / (layers * shape.experts as f64 * problem.bytes.expert() as f64);
        let flops = 6.0 * n * of_all * layers * (shape.experts_per_token * shape.d_model * shape.expert_width) as f64;
        let crossing = if share > 0.0 { 4.0 * layers * n * shape.d_model as f64 } else { 0.0 };
        let experts = layers * profile.gpu.experts.at(n);
        let lanes = LaneSeconds {
            cpu: choice.lanes.cpu + (bytes / reads).max(flops / machine.host.flops_per_s),
            gpu: (choice.lanes.gpu - of_all * experts).max(0.0),
            to_device: choice.lanes.to_device - bytes * byte_seconds
                + profile.link.pages(None).map_or(0.0, |pages| pages.seconds.at(crossing)),
            to_host: choice.lanes.to_host + profile.link.to_host.at(crossing),
        };
        Some((lanes, 1.0))
    };

    let each = (blocks + 0.5) * layers * block_bytes;
    let kept = |share: f64| {
        let there = (share * room / each).floor();
        let more = 1.0 + there / sequences;
        let lanes = LaneSeconds {
            cpu: more * rest.cpu + if policy.attention == AttentionPlace::Cpu { on_cpu } else { 0.0 },
            gpu: more * rest.gpu + on_gpu * if own > 0.0 { more } else { more - 1.0 },
            to_device: choice.lanes.to_device + streams(there * each)?,
            to_host: more * choice.lanes.to_host,
        };
        Some((lanes, more))
    };

    let best = |option, of, now: f64, with: With<'_>| {
        let rate = |share: f64| with(share).map(|(lanes, more)| more / lanes.longest().max(1e-12));
        let before = 1.0 / choice.lanes.longest().max(1e-12);
        let mut best = Unbuilt { option, of, share: now, ratio: 1.0 };
        for share in (0..=STEPS).map(|step| step as f64 / STEPS as f64) {
            match rate(share).map(|rate| rate / before) {
                // What cannot be told apart is not worth building.
                Some(ratio) if ratio > best.ratio * (1.0 + 1e-6) => best = Unbuilt { share, ratio, ..best },
                _ => {}
            }
        }
        best
    };
    let mut all = vec![best("attention in both places", "decode rows on the GPU", own, &split)];
    // Weights that come from disk would come from there for the CPU too.
    if streamed > 0.0 && choice.plan.memory.host_weights > 0 {
        all.push(best("experts on the CPU", "streamed experts", 0.0, &on_the_cpu));
    }
    all.push(best("keys and values on the GPU", "residents' memory", 0.0, &kept));
    Ok(all)
}
