//! `fulmen plan`: the policy for a model, a machine and a workload, before any of them is there.
//!
//! Its own mode searches with a measured profile, or with one made of a data sheet, and predicts by simulation ([`own`]);
//! `--paper` plans as the MoE-Lightning paper does.

use std::fmt::{self, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use serde_json::{Value, json};

use super::open::EngineArguments;
use super::{Usage, print_line};
use crate::model::presets::NAMES;
use crate::model::{ModelConfig, Shape};
use crate::plan::hrm::{
    Work, human_seconds, rows_at_intensity, steady_state_bound, turning_point_p1, turning_point_p2,
};
use crate::plan::paper::{DEVICE_SHARE, HOST_SHARE, LayerSeconds, PaperPlan, Setting};
use crate::plan::plot::roofline_svg;
use crate::plan::presets::{HARDWARE, HardwarePreset, hardware, shape};
use crate::plan::published;
use crate::policy::AttentionPlace;
use crate::units::human_bytes;

mod own;

#[derive(Debug, Args)]
pub struct Arguments {
    /// Folder with the model's config.json; no weights are needed
    #[arg(value_name = "MODEL", conflicts_with_all = ["shape", "published"])]
    model: Option<PathBuf>,
    /// A model by name, without any file
    #[arg(long, value_name = "NAME", value_parser = NAMES, ignore_case = true, conflicts_with = "published")]
    shape: Option<String>,
    /// A machine by name, or this one, for which `fulmen calibrate` has to have run [default: this]
    #[arg(long, value_name = "NAME", value_parser = machine_names(), ignore_case = true, conflicts_with = "published")]
    hardware: Option<String>,
    /// Tokens of a prompt: the mean, or the longest where prompts are padded
    #[arg(long, value_name = "TOKENS", conflicts_with = "published")]
    prompt_len: Option<usize>,
    /// Tokens generated for each prompt
    #[arg(long, value_name = "TOKENS", conflicts_with = "published")]
    gen_len: Option<usize>,
    /// Plan by the model and the search of the MoE-Lightning paper, with its constants
    #[arg(long)]
    paper: bool,
    /// All settings of the paper beside its published throughput, as Markdown
    #[arg(long, requires = "paper", conflicts_with_all = ["json", "svg"])]
    published: bool,
    /// One JSON object instead of text
    #[arg(long)]
    json: bool,
    /// Draw the hierarchical roofline with the workload's points into this file, and below it the predicted timeline
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Lengths of the workload: a batch file (.jsonl; needs MODEL's tokenizer), or a trace of lengths (.csv)
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt_len", "gen_len", "paper"])]
    workload: Option<PathBuf>,
    /// Requests in all [default: those of a workload file; with lengths, without an end]
    #[arg(long, value_name = "N", conflicts_with = "paper", value_parser = clap::value_parser!(u64).range(1..))]
    requests: Option<u64>,
    /// Also show so many of the policies that were predicted slower, and why they are
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with = "paper")]
    runners_up: usize,
    #[command(flatten)]
    engine: EngineArguments,
}

/// Names that --hardware takes.
fn machine_names() -> Vec<&'static str> {
    HARDWARE.iter().map(|preset| preset.name).chain([own::THIS]).collect()
}

pub fn run(arguments: Arguments) -> Result<u8> {
    if !arguments.paper {
        return own::run(&arguments);
    }
    if arguments.published {
        print_line(published::page()?.trim_end())?;
        return Ok(super::OK);
    }
    let (name, shape) = arguments.shape()?;
    let names = || HARDWARE.map(|preset| preset.name).join(", ");
    let missing = |option: &str, why: &str| Usage(format!("--paper needs {option}{why}"));
    let machine =
        arguments.hardware.as_deref().ok_or_else(|| missing("--hardware", &format!(", one of {}", names())))?;
    let machine = *hardware(machine).ok_or_else(|| missing("--hardware", &format!(", one of {}", names())))?;
    let prompt_tokens = arguments.prompt_len.ok_or_else(|| missing("--prompt-len", ""))?;
    let generated_tokens = arguments.gen_len.ok_or_else(|| missing("--gen-len", ""))?;
    let setting = Setting { shape, hardware: machine, prompt_tokens, generated_tokens };
    setting.check().map_err(|error| Usage(error.to_string()))?;
    let plan = setting.search()?;

    if let Some(file) = &arguments.svg {
        let title = format!("{name} on {}: {prompt_tokens} prompt + {generated_tokens} generated tokens", machine.name);
        let svg = roofline_svg(&title, &setting, &plan);
        std::fs::write(file, svg).with_context(|| format!("--svg {}", file.display()))?;
    }
    if arguments.json {
        return print_line(serde_json::to_string_pretty(&object(&name, &setting, &plan)?)?).map(|()| super::OK);
    }
    print_line(table(&name, &setting, &plan).trim_end())?;
    Ok(super::OK)
}

impl Arguments {
    /// The model's name and shape.
    fn shape(&self) -> Result<(String, Shape)> {
        if let Some(name) = &self.shape {
            let shape = shape(name).expect("clap takes known names only");
            return Ok((name.to_ascii_lowercase(), shape));
        }
        let Some(folder) = &self.model else {
            let names = NAMES.join(", ");
            return Err(Usage(format!("a model's folder or --shape is needed, one of {names}")).into());
        };
        let config = ModelConfig::open(folder)?;
        let path = folder.canonicalize().unwrap_or_else(|_| folder.clone());
        let name =
            path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned());
        Ok((name, config.shape))
    }
}

fn object(name: &str, setting: &Setting, plan: &PaperPlan) -> Result<Value> {
    let points = Points::of(setting, plan);
    let mut value = json!({
        "mode": "paper",
        "model": name,
        "hardware": setting.hardware.name,
        "prompt_len": setting.prompt_tokens,
        "gen_len": setting.generated_tokens,
    });
    let fields = value.as_object_mut().expect("an object");
    let Value::Object(plan_fields) = serde_json::to_value(plan)? else { unreachable!("a struct is an object") };
    fields.extend(plan_fields);
    fields["plateau"] = json!({ "first": plan.plateau.0, "last": plan.plateau.1 });
    fields.insert("binding_roof".into(), json!(plan.binding().roof));
    fields.insert("binding".into(), json!(plan.binding().to_string()));
    fields.insert("turning_points".into(), json!({ "p1": points.p1, "p2": points.p2 }));
    fields.insert("expert_intensity".into(), json!({ "host": points.at_host, "device": points.at_device }));
    let bound = setting.steady_state().filter(|_| plan.attention == AttentionPlace::Cpu);
    let bound = bound.map(|state| steady_state_bound(&setting.hardware.hierarchy(), &state));
    fields.insert("steady_state_bound".into(), serde_json::to_value(bound)?);
    fields.insert("machine".into(), serde_json::to_value(setting.hardware)?);
    fields.insert("shape".into(), serde_json::to_value(setting.shape)?);
    Ok(value)
}

/// The roofline's numbers for a plan.
struct Points {
    p1: f64,
    p2: f64,
    /// FLOP per byte of experts: of what crosses the link, of what a micro-batch reads on the device.
    at_host: Option<f64>,
    at_device: f64,
}

impl Points {
    fn of(setting: &Setting, plan: &PaperPlan) -> Points {
        let machine = setting.hardware.hierarchy();
        let at_device = Work::experts(&setting.shape, plan.micro_batch as f64, 2.0).intensity();
        let flops = Work::experts(&setting.shape, plan.sequences as f64, 2.0).flops * setting.shape.layers as f64;
        let at_host = (plan.host_memory.experts > 0.0).then(|| flops / plan.host_memory.experts);
        Points {
            p1: turning_point_p1(&machine, at_host.unwrap_or(f64::INFINITY)),
            p2: turning_point_p2(&machine, at_device),
            at_host,
            at_device,
        }
    }
}

fn bytes(bytes: f64) -> String {
    human_bytes(bytes as u64)
}

/// Lines that a person reads, under labels at their left.
struct Lines(String);

impl Lines {
    fn add(&mut self, label: &str, line: impl fmt::Display) {
        let _ = writeln!(self.0, "{label:<10}{line}");
    }

    /// Memory of one side: in all, then by purpose. What is nothing is left out.
    fn memory(&mut self, label: &str, total: f64, allowed: f64, of: fmt::Arguments<'_>, parts: &[(&str, f64)]) {
        self.add(label, format_args!("{} of {} ({of})", bytes(total), bytes(allowed)));
        for (what, size) in parts.iter().filter(|(_, size)| *size >= 1.0) {
            self.add("", format_args!("{:>10}  {what}", bytes(*size)));
        }
    }
}

fn table(name: &str, setting: &Setting, plan: &PaperPlan) -> String {
    let HardwarePreset { title, source, .. } = setting.hardware;
    let mut lines = Lines(String::new());
    lines.add("model", format_args!("{name}, every weight, key and value in 2 bytes"));
    lines.add("machine", title);
    lines.add("", format_args!("({source})"));
    lines.add(
        "workload",
        format_args!("{} prompt tokens, {} generated", setting.prompt_tokens, setting.generated_tokens),
    );

    let PaperPlan { micro_batch, micro_batches, sequences, plateau: (first, last), .. } = plan;
    lines.add("policy", format_args!("{sequences} sequences in {micro_batches} micro-batches of {micro_batch}"));
    if last > first {
        lines.add(
            "",
            format_args!("({first} to {last} micro-batches are predicted exactly equal; the fewest are taken)"),
        );
    }
    let attention = match plan.attention {
        AttentionPlace::Cpu => "CPU".to_owned(),
        AttentionPlace::Gpu => format!("GPU, where {:.2} % of keys and values stay", 100.0 * plan.resident_kv),
    };
    lines.add("", format_args!("experts on the GPU, decode attention on the {attention}"));
    let experts = setting.shape.experts;
    let whole = (experts as f64 * plan.resident_weights + 1e-9) as usize;
    let share = 100.0 * plan.resident_weights;
    lines
        .add("", format_args!("{share:.2} % of the experts stay on the GPU: {whole} whole of {experts} in each layer"));

    let (device, host) = (&plan.device_memory, &plan.host_memory);
    let (of_device, of_host) = (bytes(setting.hardware.all_device_bytes()), bytes(setting.hardware.host_bytes));
    lines.memory(
        "device",
        device.total(),
        device.allowed,
        format_args!("{:.0} % of {of_device}", 100.0 * DEVICE_SHARE),
        &[
            ("attention projections", device.projections),
            ("experts that stay", device.resident_experts),
            ("two layers of experts that stream", device.expert_buffers),
            ("keys and values that stay", device.resident_kv),
            ("rows", device.rows),
            ("scratch of the experts in prefill", device.expert_scratch),
        ],
    );
    lines.memory(
        "host",
        host.total(),
        host.allowed,
        format_args!("{:.0} % of {of_host} that are free", 100.0 * HOST_SHARE),
        &[
            ("experts", host.experts),
            ("two layers of experts, pinned", host.staging),
            ("keys and values", host.kv),
            ("rows of prefill", host.rows),
        ],
    );

    let layers = setting.shape.layers as f64;
    let LayerSeconds { link, device, host } = plan.layer_seconds;
    let [link, gpu, cpu] = [link, device, host].map(|seconds| human_seconds(seconds * layers));
    let (step, prefill) = (human_seconds(plan.step_seconds), human_seconds(plan.prefill_seconds));
    let (decode, run) = (plan.tokens_per_second, plan.run_tokens_per_second);
    lines.add("predicted", format_args!("{decode:.1} tok/s in decode, {run:.1} tok/s with {prefill} of prefill"));
    lines.add("", format_args!("{step} a step: link {link}, GPU {gpu}, CPU {cpu}, side by side"));
    lines.add("", plan.binding());
    let points = Points::of(setting, plan);
    let rows = |intensity: f64| match rows_at_intensity(&setting.shape, intensity, 2.0) {
        Some(rows) => format!("from {} rows on", rows.ceil()),
        None => "with no number of rows".into(),
    };
    let (moves, gpu_bound) = (rows(points.p1), rows(points.p2));
    lines.add("roofline", format_args!("experts pay their way over the link {moves} (P1, {:.1} FLOP/B)", points.p1));
    let p2 = points.p2;
    lines.add(
        "",
        format_args!("the GPU is the limit, not the link, {gpu_bound} (P2, {p2:.0} FLOP/B at µ = {micro_batch})"),
    );
    if let Some(state) = setting.steady_state().filter(|_| plan.attention == AttentionPlace::Cpu) {
        let bound = steady_state_bound(&setting.hardware.hierarchy(), &state);
        let (best, roof) = (bound.tokens_per_second, bound.binding());
        lines.add("", format_args!("no policy whatever beats {best:.0} tok/s with its prefill: {roof}"));
    }
    for (index, (what, richer)) in setting.with_more().iter().enumerate() {
        let gain = match richer.search() {
            Ok(richer) => {
                let gain = 100.0 * (richer.tokens_per_second / decode - 1.0);
                format!("{gain:+.1} %, {} x {}", richer.micro_batches, richer.micro_batch)
            }
            Err(error) => error.to_string(), // cannot be: what fits still fits where there is more
        };
        lines.add(if index == 0 { "gains" } else { "" }, format_args!("{what}: {gain}"));
    }
    lines.0
}
