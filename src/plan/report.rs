//! What is worth saying of a choice: the roof that binds it, what more of the machine would bring, the flags that ask for it, and
//! why others lost.

use super::cost::Predictor;
use super::hrm::{Hierarchy, Level, Load, Roof, Work, human_seconds};
use super::search::{Choice, Problem, SearchError};
use crate::memory::kv_cache::KvLayout;
use crate::model::ModelConfig;
use crate::policy::{AttentionPlace, KvDtype, Policy, RowPath};
use crate::profile::Profile;
use crate::schedule::Lane;

/// The load of the lane that has most to do in a pass in the middle of the run.
pub fn binding(problem: &Problem<'_>, choice: &Choice) -> Result<Load, SearchError> {
    let predictor = Predictor::new(problem.config, &problem.bytes, &choice.plan, problem.profile)?;
    let rows = problem.steady_rows(choice);
    let lanes = choice.lanes;
    let longest = Lane::ALL
        .into_iter()
        .fold(Lane::HostToDevice, |longest, lane| if lanes.of(lane) > lanes.of(longest) { lane } else { longest });
    let seconds = lanes.of(longest).max(1e-12);
    let load = |roof, amount: f64| Load { roof, amount, rate: amount / seconds };
    Ok(match longest {
        Lane::Gpu => load(Roof::DeviceCompute, flops(problem.config, &choice.plan.policy, choice)),
        Lane::HostToDevice | Lane::DeviceToHost => {
            let blocks: usize = rows.micro_batches.iter().map(|of| of.uploaded_blocks).sum();
            let block = crate::execute::machine::workspace_block_bytes(problem.config);
            let kv = (blocks as u64 * block) as f64 * problem.config.shape.layers as f64;
            load(Roof::Link, (predictor.page_bytes() + kv).max(1.0))
        }
        Lane::Cpu => load(Roof::HostMemory, predictor.attended_on_cpu(&rows).max(1.0)),
    })
}

/// FLOP of a pass in the middle of the run, on the GPU.
fn flops(config: &ModelConfig, policy: &Policy, choice: &Choice) -> f64 {
    let shape = &config.shape;
    let steady = &choice.steady;
    let rows = steady.decode_rows + steady.prompt_rows;
    let (d, q, kv) = (shape.d_model as f64, shape.q_width() as f64, shape.kv_width() as f64);
    let projections = 2.0 * rows * d * (2.0 * q + 2.0 * kv);
    let attention = match policy.attention {
        AttentionPlace::Gpu => Work::decode_attention(shape, steady.decode_rows, steady.context_tokens, 2.0).flops,
        AttentionPlace::Cpu => 0.0,
    };
    let head = 2.0 * steady.decode_rows * d * shape.vocab as f64;
    shape.layers as f64 * (Work::experts(shape, rows, 2.0).flops + projections + attention) + head
}

/// A profile's machine as the roofline sees it: rates that were attained.
pub fn hierarchy(profile: &Profile) -> Hierarchy {
    let model = &profile.model;
    let per_row = 6.0 * (model.experts_per_token * model.d_model * model.expert_width) as f64;
    let best = |points: &[(f64, f64)], of: &dyn Fn(f64) -> f64| {
        points.iter().map(|(x, seconds)| of(*x) / seconds.max(1e-12)).fold(1.0, f64::max)
    };
    let attention = profile.cpu.attention_rate(KvDtype::F16, profile.cpu.best_threads(), 1024.0);
    let pages = profile.link.to_device.first();
    let intensity = model.q_heads as f64 / model.kv_heads as f64;
    Hierarchy {
        device: Level {
            flops_per_s: best(profile.gpu.experts.points(), &|rows| rows * per_row),
            bytes_per_s: profile.gpu.copy_bytes_per_s,
        },
        // What attention attained is all that is known of the CPU's arithmetic.
        host: Level { flops_per_s: attention * intensity, bytes_per_s: attention },
        link_bytes_per_s: pages.map_or(1.0, |pages| best(pages.seconds.points(), &|bytes| bytes)),
    }
}

/// More of something, and what a policy like the best makes of it.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Gain {
    pub what: &'static str,
    /// Tokens per second over those without it.
    pub ratio: f64,
    /// Sequences that run at a time with it.
    pub sequences: usize,
}

/// What one more GiB of either memory, and one more GB/s of the link or of the host's memory in attention, would bring: with the
/// best policy's splits and as many sequences and residents as then have room.
pub fn gains(problem: &Problem<'_>, best: &Choice) -> Result<Vec<Gain>, SearchError> {
    const GIB: u64 = 1 << 30;
    let (faster_link, faster_host) =
        (problem.profile.with_faster_link(1e9), problem.profile.with_faster_attention(1e9));
    let limits = problem.limits;
    let more = |device: u64, host: u64| {
        let mut richer = problem.clone();
        richer.limits.device_bytes = limits.device_bytes + device;
        richer.limits.host_bytes = limits.host_bytes + host;
        richer
    };
    let cases = [
        ("1 GiB more of host memory", more(0, GIB)),
        ("1 GiB more of device memory", more(GIB, 0)),
        ("1 GB/s more over the link", Problem { profile: &faster_link, ..problem.clone() }),
        ("1 GB/s more in attention on the CPU", Problem { profile: &faster_host, ..problem.clone() }),
    ];
    let policy = &best.plan.policy;
    let fullest = |problem: &Problem<'_>| match problem.fullest(policy) {
        Some(choice) => Ok(choice),
        // Sequences are not what there is too little room for.
        None => problem.predict(&best.plan),
    };
    let now = fullest(problem)?;
    cases
        .into_iter()
        .map(|(what, richer)| {
            let then = fullest(&richer)?;
            let ratio = then.tokens_per_second / now.tokens_per_second;
            Ok(Gain { what, ratio, sequences: then.plan.policy.max_sequences })
        })
        .collect()
}

/// The flags that give a policy on the machine that it was planned for.
pub fn flags(policy: &Policy, config: &ModelConfig) -> Vec<String> {
    let shape = &config.shape;
    let layout = KvLayout::new(shape, policy.kv_dtype);
    let mut flags = vec![
        format!("--schedule {}", policy.schedule),
        format!("--max-num-seqs {}", policy.max_sequences),
        format!("--micro-batches {}", policy.micro_batches),
        format!("--expert-groups {}", policy.expert_groups),
        format!("--max-num-batched-tokens {}", policy.micro_batches * policy.rows_per_micro_batch),
        format!("--prompt-chunk {}", policy.prompt_chunk),
        format!("--attention {}", policy.attention.name().to_lowercase()),
        format!("--threads {}", policy.threads),
        format!("--max-model-len {}", policy.max_model_len),
        format!("--kv-memory {}", policy.kv_blocks as u64 * layout.bytes_per_block() as u64),
        format!("--resident-experts {}", policy.resident_experts),
        format!("--precision {}", policy.precision.name()),
        format!("--rows {}", if policy.rows == RowPath::Copies { "copies" } else { "kernels" }),
    ];
    if policy.extra_residents > 0 {
        flags.push(format!("--extra-residents {}", policy.extra_residents));
    }
    if policy.kv_dtype != KvDtype::default() {
        flags.push(format!("--kv-dtype {}", policy.kv_dtype));
    }
    if policy.resident_experts < shape.experts {
        flags.push(format!("--ring-experts {}", policy.ring_experts));
        flags.push(format!("--page-size {}", policy.page_bytes));
        flags.extend(policy.source.map(|source| format!("--page-source {source}")));
    }
    flags
}

/// Why another choice is behind the best: what its longest lane does in a pass, against its tokens.
pub fn why_behind(best: &Choice, other: &Choice) -> String {
    let name = |choice: &Choice| {
        let lanes = choice.lanes;
        let longest = Lane::ALL.into_iter().max_by(|a, b| lanes.of(*a).total_cmp(&lanes.of(*b))).expect("four lanes");
        (longest, lanes.of(longest))
    };
    let ((lane, seconds), pass) = (name(other), other.steady.seconds);
    let rows = |choice: &Choice| choice.steady.decode_rows + choice.steady.prompt_rows;
    let fewer = rows(other) / rows(best).max(1.0);
    let share = 100.0 * seconds / pass;
    let mut why = format!(
        "its {} works {} of a pass of {} ({share:.0} %)",
        lane.name(),
        human_seconds(seconds),
        human_seconds(pass)
    );
    if fewer < 0.995 {
        why += &format!(", which has {:.0} % fewer rows", 100.0 * (1.0 - fewer));
    } else if share < 97.0 {
        why += ", and lanes wait for each other in the rest";
    }
    why
}
