//! Planning by search and simulation.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::super::lengths;
use super::super::open::{Text, model_config};
use super::super::{OK, Usage, has_weights, print_line};
use super::{Arguments, Lines};
use crate::checkpoint::{Checkpoint, Inventory, Synthetic};
use crate::plan::cost::{LaneSeconds, Predictor};
use crate::plan::hrm::{Load, human_seconds};
use crate::plan::plot::{self, Picture, three};
use crate::plan::presets::{ASSUMED, hardware};
use crate::plan::report::{Gain, binding, flags, gains, hierarchy, why_behind};
use crate::plan::search::{Choice, Found, PhaseTime, Problem};
use crate::plan::unbuilt::{Unbuilt, unbuilt};
use crate::plan::workload::Workload;
use crate::plan::{MachineLimits, ModelBytes};
use crate::policy::Policy;
use crate::profile::{MachineKey, ModelKey, Profile};
use crate::request::batch_file::{GenerationDefaults, ReadOptions};
use crate::request::chat_template::ChatTemplate;
use crate::request::tokenizer::Tokenizer;
use crate::schedule::{Lane, trace};
use crate::units::human_bytes;

/// What --hardware calls the machine that this runs on.
pub const THIS: &str = "this";

/// All that is said.
struct Answer<'a> {
    name: &'a str,
    machine: String,
    /// Where the machine's numbers come from.
    source: String,
    problem: &'a Problem<'a>,
    found: &'a Found,
    search_seconds: f64,
    prefill: PhaseTime,
    decode: PhaseTime,
    binding: Load,
    gains: Vec<Gain>,
    unbuilt: Vec<Unbuilt>,
    flags: Vec<String>,
}

pub fn run(arguments: &Arguments) -> Result<u8> {
    let (name, inventory) = model(arguments)?;
    let workload = workload(arguments)?;
    let place = arguments.hardware.as_deref().unwrap_or(THIS);
    let (profile, limits, machine, source) = match hardware(place) {
        Some(preset) => {
            let assumed = format!(
                "{}; assumed of them: {:.0} % of the GPU's FLOP/s, {:.0} % of its memory's rate, {:.0} % of the link's, {:.0} % of the \
                 host memory's, {:.0} GB/s from disk",
                preset.source,
                100.0 * ASSUMED.device_flops,
                100.0 * ASSUMED.device_memory,
                100.0 * preset.link_share,
                100.0 * ASSUMED.host_memory,
                ASSUMED.disk_bytes_per_s / 1e9,
            );
            let machine = arguments.engine.machine();
            (preset.profile(&inventory), machine.limited(preset.limits()), preset.title.to_owned(), assumed)
        }
        None => this(arguments, &inventory)?,
    };
    let longest = workload.longest.next_multiple_of(64).min(inventory.config().max_positions);
    let wishes = arguments.engine.wishes();
    let wishes = crate::plan::Wishes { max_model_len: wishes.max_model_len.or(Some(longest)), ..wishes };
    let problem = Problem {
        config: inventory.config(),
        bytes: ModelBytes::of(&inventory),
        profile: &profile,
        limits,
        margin: arguments.engine.margin(),
        wishes,
        workload,
    };
    let started = Instant::now();
    let found = problem.search()?;
    let search_seconds = started.elapsed().as_secs_f64();
    let [prefill, decode] = problem.phases(&found.best.plan)?;
    let answer = Answer {
        name: &name,
        machine,
        source,
        problem: &problem,
        found: &found,
        search_seconds,
        prefill,
        decode,
        binding: binding(&problem, &found.best)?,
        gains: gains(&problem, &found.best)?,
        unbuilt: unbuilt(&problem, &found.best)?,
        // How many threads a machine has no data sheet says.
        flags: flags(&found.best.plan.policy, problem.config)
            .into_iter()
            .filter(|flag| hardware(place).is_none() || !flag.starts_with("--threads"))
            .collect(),
    };
    if let Some(file) = &arguments.svg {
        std::fs::write(file, picture(&answer)?).with_context(|| format!("--svg {}", file.display()))?;
    }
    arguments.engine.keep_policy(&found.best.plan.policy)?;
    if arguments.json {
        print_line(serde_json::to_string_pretty(&object(&answer, arguments.runners_up)?)?)?;
    } else {
        print_line(table(&answer, arguments.runners_up).trim_end())?;
    }
    Ok(OK)
}

/// The model's name and tensors: of its checkpoint, or as its config.json alone promises them.
fn model(arguments: &Arguments) -> Result<(String, Inventory)> {
    let (name, _) = arguments.shape()?;
    let inventory = match &arguments.model {
        Some(folder) if has_weights(folder) => Checkpoint::open(folder)?.inventory().clone(),
        folder => {
            let config = model_config(folder.as_deref(), arguments.shape.as_deref(), None)?;
            Synthetic::new(config).inventory().clone()
        }
    };
    Ok((name, inventory))
}

/// This machine: its profile, and what may be taken of it.
fn this(arguments: &Arguments, inventory: &Inventory) -> Result<(Profile, MachineLimits, String, String)> {
    let flags = arguments.engine.machine();
    let gpu = flags.gpu()?;
    let precision = arguments.engine.wishes().precision.unwrap_or_else(|| crate::engine::default_precision(&gpu));
    let (machine, model) = (MachineKey::of(gpu.summary(), flags.isa()?), ModelKey::of(inventory, precision));
    let profile = match arguments.engine.profile_choice()? {
        crate::engine::ProfileChoice::Given(profile) => {
            profile.check(&machine, &model)?;
            (*profile).clone()
        }
        _ => match Profile::cached(&machine, &model)? {
            Some(profile) => profile,
            None => bail!(
                "nothing was measured on this machine for this kind of model: run `fulmen calibrate` with the same model, or name a \
                 machine with --hardware"
            ),
        },
    };
    let title = format!("this one: {} with {} threads of {}", machine.adapter, machine.threads, machine.cpu);
    Ok((profile, flags.limits(&gpu), title, "as `fulmen calibrate` measured it".to_owned()))
}

fn workload(arguments: &Arguments) -> Result<Workload> {
    let mut workload = match (&arguments.workload, arguments.prompt_len, arguments.gen_len) {
        (Some(file), _, _) if file.extension().is_some_and(|ending| ending == "csv") => Workload::from_trace(file)?,
        (Some(file), _, _) => batch_file(arguments, file)?,
        (None, Some(prompt), Some(generated)) if prompt > 0 && generated > 0 => Workload::uniform(prompt, generated),
        (None, Some(_), Some(_)) => bail!(Usage("--prompt-len and --gen-len must be at least 1".into())),
        _ => bail!(Usage("a workload is needed: --prompt-len and --gen-len, or --workload FILE".into())),
    };
    workload.requests = arguments.requests.or(workload.requests);
    Ok(workload)
}

fn batch_file(arguments: &Arguments, file: &Path) -> Result<Workload> {
    let Some(folder) = &arguments.model else {
        bail!(Usage(format!("--workload {}: lengths of texts need MODEL's tokenizer, so a folder", file.display())));
    };
    let tokenizer = Tokenizer::open(folder)?;
    let template = ChatTemplate::open(folder, None, tokenizer.special_tokens());
    let text = Text { tokenizer, template, defaults: GenerationDefaults::open(folder)? };
    let lines = std::fs::read_to_string(file).with_context(|| format!("--workload {}", file.display()))?;
    let lines = lines.lines().filter(|line| !line.trim().is_empty()).count() as u64;
    let workload = lengths::of_batch(file, ReadOptions::default(), &text, Some(lines))?;
    workload.with_context(|| format!("--workload {}: no line is a request", file.display()))
}

fn share(lanes: &LaneSeconds, pass: f64) -> String {
    Lane::ALL.map(|lane| format!("{} {:.0} %", lane.name(), 100.0 * lanes.of(lane) / pass)).join(", ")
}

fn policy_words(policy: &Policy, experts: usize) -> String {
    let streamed = match experts - policy.resident_experts {
        0 => "all experts on the GPU".to_owned(),
        _ => format!(
            "{} of {experts} experts resident, ring of {}, pages of {}",
            policy.resident_experts,
            policy.ring_experts,
            human_bytes(policy.page_bytes)
        ),
    };
    format!(
        "{} sequences in {} micro-batches and {} expert groups, up to {} rows a pass, attention on the {}, {streamed}",
        policy.max_sequences,
        policy.micro_batches,
        policy.expert_groups,
        policy.micro_batches * policy.rows_per_micro_batch,
        policy.attention.name(),
    )
}

fn phase_words(phase: &PhaseTime) -> String {
    let rows = match (phase.decode_rows.round() as u64, phase.prompt_rows.round() as u64) {
        (decode, 0) => format!("{decode} decode rows"),
        (0, prompt) => format!("{prompt} prompt rows"),
        (decode, prompt) => format!("{decode} decode and {prompt} prompt rows"),
    };
    let rate = (phase.decode_rows + phase.prompt_rows) / phase.seconds.max(1e-12);
    format!("{} a pass of {rows}, {rate:.0} rows/s", human_seconds(phase.seconds))
}

fn table(answer: &Answer<'_>, runners_up: usize) -> String {
    let Problem { config, limits, workload, .. } = answer.problem;
    let Found { best, runners_up: others, fitting, simulated } = answer.found;
    let (policy, memory) = (&best.plan.policy, &best.plan.memory);
    let mut lines = Lines(String::new());
    lines.add("model", answer.name);
    lines.add("machine", &answer.machine);
    lines.add("", format_args!("({})", answer.source));
    let Workload { prompt_tokens, generated_tokens, context_tokens, requests, .. } = workload;
    let requests = requests.map_or("without an end".to_owned(), |requests| format!("{requests} requests"));
    lines.add(
        "workload",
        format_args!("{prompt_tokens:.0} prompt tokens, {generated_tokens:.0} generated, {requests}; running ones attend to {context_tokens:.0} tokens"),
    );
    lines.add("policy", policy_words(policy, config.shape.experts));
    lines.add(
        "",
        format_args!(
            "(best of {fitting} that fit, {simulated} of them simulated, in {})",
            human_seconds(answer.search_seconds)
        ),
    );
    let m = memory;
    lines.memory(
        "device",
        m.device() as f64,
        limits.device_bytes as f64,
        format_args!("what may be taken"),
        &[
            ("weights that stay", m.dense_weights as f64),
            ("expert slots", m.expert_slots as f64),
            ("activations", m.activations as f64),
            ("KV workspace", m.kv_workspace as f64),
            ("logits", m.logits as f64),
            ("rotary table", m.rotary_table as f64),
        ],
    );
    lines.memory(
        "host",
        m.host() as f64,
        limits.host_bytes as f64,
        format_args!("what may be taken"),
        &[
            ("KV pool", m.kv_pool as f64),
            ("experts that stream", m.host_weights as f64),
            ("rows, context and pages on their way", m.staging as f64),
        ],
    );
    let total = best.run_seconds.map_or(String::new(), |seconds| format!(", all of it in {}", human_seconds(seconds)));
    lines.add("predicted", format_args!("{:.1} tok/s{total}", best.tokens_per_second));
    lines.add("", format_args!("in the middle: {}", phase_words(&best.steady)));
    lines.add("", format_args!("prompts alone: {}", phase_words(&answer.prefill)));
    lines.add("", format_args!("decode alone:  {}", phase_words(&answer.decode)));
    lines.add("lanes", format_args!("{} of a pass in the middle", share(&best.lanes, best.steady.seconds)));
    lines.add("", answer.binding);
    for (index, gain) in answer.gains.iter().enumerate() {
        let label = if index == 0 { "gains" } else { "" };
        lines.add(label, format_args!("{}: {:+.1} %", gain.what, 100.0 * (gain.ratio - 1.0)));
    }
    for (index, of) in answer.unbuilt.iter().enumerate() {
        let label = if index == 0 { "not built" } else { "" };
        lines.add(
            label,
            format_args!(
                "{}: modelled with {:.0} % of the {}, {:+.1} %",
                of.option,
                100.0 * of.share,
                of.of,
                100.0 * (of.ratio - 1.0)
            ),
        );
    }
    lines.add("flags", answer.flags.join(" "));
    for (index, other) in others.iter().take(runners_up).enumerate() {
        let behind = 100.0 * (1.0 - other.tokens_per_second / best.tokens_per_second);
        let label = if index == 0 { "behind" } else { "" };
        lines.add(label, format_args!("{behind:.2} %: {}", policy_words(&other.plan.policy, config.shape.experts)));
        lines.add("", format_args!("        {}", why_behind(best, other)));
    }
    lines.0
}

fn object(answer: &Answer<'_>, runners_up: usize) -> Result<Value> {
    let Problem { limits, workload, .. } = answer.problem;
    let Found { best, runners_up: others, fitting, simulated } = answer.found;
    let of = |choice: &Choice| {
        json!({
            "policy": choice.plan.policy, "tokens_per_second": choice.tokens_per_second,
            "step_seconds": choice.steady.seconds, "lanes": choice.lanes,
        })
    };
    let behind: Vec<Value> = others
        .iter()
        .take(runners_up)
        .map(|other| {
            let mut value = of(other);
            value["why"] = json!(why_behind(best, other));
            value
        })
        .collect();
    let memory = &best.plan.memory;
    Ok(json!({
        "mode": "own",
        "model": answer.name,
        "machine": answer.machine,
        "source": answer.source,
        "workload": workload,
        "policy": best.plan.policy,
        "flags": answer.flags,
        "sequences": best.plan.policy.max_sequences,
        "tokens_per_second": best.tokens_per_second,
        "run_seconds": best.run_seconds,
        "step_seconds": best.steady.seconds,
        "steady": best.steady,
        "prefill": answer.prefill,
        "decode": answer.decode,
        "lanes": best.lanes,
        "binding_roof": answer.binding.roof,
        "binding": answer.binding.to_string(),
        "memory": memory,
        "device_bytes": { "needed": memory.device(), "allowed": limits.device_bytes },
        "host_bytes": { "needed": memory.host(), "allowed": limits.host_bytes },
        "gains": answer.gains,
        "modelled_not_built": answer.unbuilt,
        "search": { "fitting": fitting, "simulated": simulated, "seconds": answer.search_seconds },
        "runners_up": behind,
    }))
}

/// The roofline, and below it two layers of a pass in the middle of the run.
fn picture(answer: &Answer<'_>) -> Result<String> {
    let problem = answer.problem;
    let best = &answer.found.best;
    let policy = &best.plan.policy;
    let rows = problem.steady_rows(best);
    let predictor = Predictor::new(problem.config, &problem.bytes, &best.plan, problem.profile)?;
    let machine = hierarchy(problem.profile);
    let n = rows.decode() + rows.prompt();
    let title = format!(
        "{} on {}: {:.0} prompt + {:.0} generated tokens",
        answer.name, answer.machine, problem.workload.prompt_tokens, problem.workload.generated_tokens
    );
    let roofline = plot::draw(&Picture {
        title: &title,
        subtitle: format!("{} · {} tokens/s predicted", answer.binding, three(best.tokens_per_second)),
        machine,
        shape: &problem.config.shape,
        sequences: n.max(1),
        micro_batch: n.div_ceil(policy.expert_groups).max(1),
        streamed_bytes: predictor.page_bytes(),
        attention: policy.attention,
        resident_kv: 0.0,
        context: problem.workload.context_tokens,
    });
    let timeline = predictor.timeline(&rows);
    let lanes = trace::svg(&timeline, &format!("predicted: {}", policy_words(policy, problem.config.shape.experts)));
    Ok(plot::below(&roofline, &lanes))
}
