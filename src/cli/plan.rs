//! `fulmen plan`: the policy for a model, a machine and a workload, before any of them is there.

use std::fmt::Write;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::{Value, json};

use super::{Usage, print_line};
use crate::model::{ModelConfig, Shape};
use crate::plan::hrm::{
    Work, human_seconds, policy_bound, rows_at_intensity, turning_point_p1, turning_point_p2,
};
use crate::plan::paper::{DEVICE_SHARE, HOST_SHARE, PaperPlan, Setting};
use crate::plan::plot::roofline_svg;
use crate::plan::presets::{HARDWARE, HardwarePreset, SHAPES, hardware, shape};
use crate::plan::published;
use crate::policy::AttentionPlace;
use crate::units::human_bytes;

#[derive(Debug, Args)]
pub struct Arguments {
    /// Folder with the model's config.json; no weights are needed
    #[arg(value_name = "MODEL", conflicts_with_all = ["shape", "published"])]
    model: Option<PathBuf>,
    /// A model by name, without any file
    #[arg(long, value_name = "NAME", value_parser = SHAPES.map(|(name, _)| name), ignore_case = true, conflicts_with = "published")]
    shape: Option<String>,
    /// A machine by name
    #[arg(long, env = "FULMEN_HARDWARE", value_name = "NAME", value_parser = HARDWARE.map(|preset| preset.name), ignore_case = true)]
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
    /// Draw the hierarchical roofline with the workload's points into this file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

pub fn run(arguments: Arguments) -> Result<u8> {
    if !arguments.paper {
        bail!(
            "planning from a measured profile of this machine is not there yet; --paper plans by the MoE-Lightning paper's \
             model for a machine by name (--hardware)"
        );
    }
    if arguments.published {
        print_line(published::page()?.trim_end())?;
        return Ok(super::OK);
    }
    let (name, shape) = arguments.shape()?;
    let names = || HARDWARE.map(|preset| preset.name).join(", ");
    let missing = |option: &str, why: &str| Usage(format!("--paper needs {option}{why}"));
    let machine = arguments.hardware.as_deref().ok_or_else(|| missing("--hardware", &format!(", one of {}", names())))?;
    let machine = *hardware(machine).expect("clap takes known names only");
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
            return Ok((name.to_ascii_lowercase(), *shape));
        }
        let Some(folder) = &self.model else {
            let names = SHAPES.map(|(name, _)| name).join(", ");
            return Err(Usage(format!("a model's folder or --shape is needed, one of {names}")).into());
        };
        let config = ModelConfig::open(folder)?;
        let path = folder.canonicalize().unwrap_or_else(|_| folder.clone());
        let name = path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned());
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
        let at_host = (plan.host.experts > 0.0).then(|| flops / plan.host.experts);
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

fn table(name: &str, setting: &Setting, plan: &PaperPlan) -> String {
    let HardwarePreset { title, source, .. } = setting.hardware;
    let (device, host) = (&plan.device, &plan.host);
    let mut text = String::new();
    let mut row = |label: &str, line: String| {
        let _ = writeln!(text, "{label:<10}{line}");
    };
    row("model", format!("{name}, every weight, key and value in 2 bytes"));
    row("machine", title.to_owned());
    row("", format!("({source})"));
    row("workload", format!("{} prompt tokens, {} generated", setting.prompt_tokens, setting.generated_tokens));

    let experts = setting.shape.experts;
    let whole = (experts as f64 * plan.resident_weights + 1e-9) as usize;
    row(
        "policy",
        format!("{} sequences in {} micro-batches of {}", plan.sequences, plan.micro_batches, plan.micro_batch),
    );
    let (first, last) = plan.plateau;
    if last > first {
        row("", format!("({first} to {last} micro-batches are predicted exactly equal; the fewest are taken)"));
    }
    row("", match plan.attention {
        AttentionPlace::Cpu => "decode attention on the CPU, experts on the GPU".into(),
        AttentionPlace::Gpu => {
            format!("decode attention on the GPU, {:.2} % of K and V stay there; experts on the GPU", 100.0 * plan.resident_kv)
        }
    });
    row(
        "",
        format!(
            "{:.2} % of the experts stay on the GPU ({whole} whole {} of {experts} a layer)",
            100.0 * plan.resident_weights,
            if whole == 1 { "expert" } else { "experts" }
        ),
    );
    row(
        "device",
        format!(
            "{} of {} ({:.0} % of {})",
            bytes(device.total()),
            bytes(device.allowed),
            100.0 * DEVICE_SHARE,
            bytes(setting.hardware.all_device_bytes())
        ),
    );
    let mut parts = |parts: &[(&str, f64)]| {
        for (what, size) in parts.iter().filter(|(_, size)| *size >= 1.0) {
            row("", format!("{:>10}  {what}", bytes(*size)));
        }
    };
    parts(&[
        ("attention projections", device.projections),
        ("experts that stay", device.resident_experts),
        ("two layers of experts that stream", device.expert_buffers),
        ("keys and values that stay", device.resident_kv),
        ("rows", device.rows),
        ("scratch of the experts in prefill", device.expert_scratch),
    ]);
    row(
        "host",
        format!(
            "{} of {} ({:.0} % of {} that are free)",
            bytes(host.total()),
            bytes(host.allowed),
            100.0 * HOST_SHARE,
            bytes(setting.hardware.host_bytes)
        ),
    );
    let mut parts = |parts: &[(&str, f64)]| {
        for (what, size) in parts.iter().filter(|(_, size)| *size >= 1.0) {
            row("", format!("{:>10}  {what}", bytes(*size)));
        }
    };
    parts(&[
        ("experts", host.experts),
        ("two layers of experts, pinned", host.staging),
        ("keys and values", host.kv),
        ("rows of prefill", host.rows),
    ]);

    row(
        "predicted",
        format!(
            "{:.1} tok/s in decode, {} a step; {:.1} tok/s with {} of prefill",
            plan.tokens_per_second,
            human_seconds(plan.step_seconds),
            plan.run_tokens_per_second,
            human_seconds(plan.prefill_seconds)
        ),
    );
    let layers = setting.shape.layers as f64;
    let seconds = plan.layer_seconds;
    let [link, gpu, cpu] = [seconds.link, seconds.device, seconds.host].map(|seconds| human_seconds(seconds * layers));
    row("", format!("a step is link {link}, GPU {gpu}, CPU {cpu}, side by side"));
    row("roof", plan.binding().to_string());
    let points = Points::of(setting, plan);
    let rows = |intensity: f64| match rows_at_intensity(&setting.shape, intensity, 2.0) {
        Some(rows) => format!("{} rows", rows.ceil()),
        None => "no number of rows".into(),
    };
    row(
        "",
        format!(
            "experts pay the way from {} on (P1, {:.1} FLOP/B), and the GPU is the limit from {} on (P2 at µ = {}, {:.0} FLOP/B)",
            rows(points.p1),
            points.p1,
            rows(points.p2),
            plan.micro_batch,
            points.p2
        ),
    );
    let bound = policy_bound(&setting.hardware.hierarchy(), &setting.shape, &plan.point(setting));
    row("", format!("no schedule of this policy beats {:.1} tok/s: {}", bound.tokens_per_second, bound.binding()));
    for (index, (what, richer)) in setting.with_more().iter().enumerate() {
        let label = if index == 0 { "gains" } else { "" };
        let gain = match richer.search() {
            Ok(richer) => {
                let gain = 100.0 * (richer.tokens_per_second / plan.tokens_per_second - 1.0);
                let (micro_batch, micro_batches) = (richer.micro_batch, richer.micro_batches);
                format!("{gain:+.1} % ({micro_batch} x {micro_batches})")
            }
            Err(error) => error.to_string(), // cannot be: more never fits less
        };
        row(label, format!("{what}: {gain}"));
    }
    text
}
