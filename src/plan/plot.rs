//! The hierarchical roofline of a plan as an SVG picture: the roofs of device, host and link, the turning points P1 and P2, and
//! where the workload's two computations lie.

use std::fmt::Write;

use super::hrm::{
    Hierarchy, Roof, Work, attainable, attainable_on_device, human_flops, ridge_intensity, turning_point_p1,
    turning_point_p2,
};
use super::paper::{PaperPlan, Setting};
use crate::model::Shape;
use crate::policy::AttentionPlace;
use crate::units::human_bytes;

const WIDTH: f64 = 920.0;
const HEIGHT: f64 = 600.0;
const LEFT: f64 = 96.0;
const RIGHT: f64 = WIDTH - 28.0;
const TOP: f64 = 92.0;
const BOTTOM: f64 = HEIGHT - 62.0;

const HOST: &str = "#1f8a70";
const DEVICE: &str = "#2f56a6";
const LINK: &str = "#cf6420";
const INK: &str = "#20242b";
const FAINT: &str = "#7b828d";

/// Two logarithmic axes over whole decades.
struct Axes {
    x: (f64, f64),
    y: (f64, f64),
}

impl Axes {
    fn px(&self, intensity: f64) -> f64 {
        LEFT + (intensity.log10() - self.x.0) / (self.x.1 - self.x.0) * (RIGHT - LEFT)
    }

    fn py(&self, flops_per_s: f64) -> f64 {
        BOTTOM - (flops_per_s.log10() - self.y.0) / (self.y.1 - self.y.0) * (BOTTOM - TOP)
    }

    /// Degrees by which a memory's roof rises; all of them are parallel.
    fn slope_degrees(&self) -> f64 {
        let (across, up) = ((RIGHT - LEFT) / (self.x.1 - self.x.0), (BOTTOM - TOP) / (self.y.1 - self.y.0));
        up.atan2(across).to_degrees()
    }
}

/// A computation on the picture.
struct Point {
    label: String,
    detail: String,
    intensity: f64,
    flops_per_s: f64,
    colour: &'static str,
}

/// What a picture shows.
#[derive(Debug, Clone)]
pub struct Picture<'a> {
    /// What was planned for, in words, and what came out.
    pub title: &'a str,
    pub subtitle: String,
    pub machine: Hierarchy,
    pub shape: &'a Shape,
    /// Rows of a pass, and those that one expert computation takes.
    pub sequences: usize,
    pub micro_batch: usize,
    /// Bytes of experts that a pass brings over the link.
    pub streamed_bytes: f64,
    pub attention: AttentionPlace,
    /// r_c: share of K and V on the device, where attention is there.
    pub resident_kv: f64,
    /// Tokens that a row attends to.
    pub context: f64,
}

/// The picture of a paper-mode plan. `title` is what was planned for, in words.
pub fn roofline_svg(title: &str, setting: &Setting, plan: &PaperPlan) -> String {
    draw(&Picture {
        title,
        subtitle: format!("{} · {} tokens/s of decode", plan.binding(), three(plan.tokens_per_second)),
        machine: setting.hardware.hierarchy(),
        shape: &setting.shape,
        sequences: plan.sequences,
        micro_batch: plan.micro_batch,
        streamed_bytes: plan.host_memory.experts,
        attention: plan.attention,
        resident_kv: plan.resident_kv,
        context: (setting.prompt_tokens + setting.generated_tokens) as f64,
    })
}

/// The picture, of 920 by 600 units.
pub fn draw(plan: &Picture<'_>) -> String {
    let (title, machine, shape) = (plan.title, plan.machine, plan.shape);
    let rows = plan.sequences as f64;

    // The experts: their intensity on the device is a micro-batch's, at the host all rows share what crosses the link.
    let at_device = Work::experts(shape, plan.micro_batch as f64, 2.0).intensity();
    let kernel = attainable(&machine.device, at_device);
    let flops = Work::experts(shape, rows, 2.0).flops * shape.layers as f64;
    let streamed = plan.streamed_bytes;
    // Where all experts stay on the device nothing crosses, and its own roof is the only one.
    let at_host = if streamed > 0.0 { flops / streamed } else { at_device };
    let (roof, reached) =
        if streamed > 0.0 { attainable_on_device(&machine, at_device, at_host) } else { (Roof::DeviceMemory, kernel) };
    let experts = Point {
        label: format!("experts, N = {}{}", plan.sequences, if streamed > 0.0 { "" } else { ", all on the GPU" }),
        detail: format!("{} FLOP/B, {}/s, {} roof", three(at_host), human_flops(reached), roof.name()),
        intensity: at_host,
        flops_per_s: reached,
        colour: if roof == Roof::Link { LINK } else { DEVICE },
    };
    let attend = Work::decode_attention(shape, rows, plan.context, 2.0).intensity();
    let (place, reached, colour) = match plan.attention {
        AttentionPlace::Cpu => ("host", attainable(&machine.host, attend), HOST),
        AttentionPlace::Gpu if plan.resident_kv < 1.0 => {
            ("device", attainable_on_device(&machine, attend, attend).1, LINK)
        }
        AttentionPlace::Gpu => ("device", attainable(&machine.device, attend), DEVICE),
    };
    let attention = Point {
        label: format!("attention, on the {place}"),
        detail: format!("{} FLOP/B, {}/s", three(attend), human_flops(reached)),
        intensity: attend,
        flops_per_s: reached,
        colour,
    };
    let (p1, p2) = (turning_point_p1(&machine, at_host), turning_point_p2(&machine, at_device));

    let ridge = ridge_intensity(&machine.device).max(machine.device.flops_per_s / machine.link_bytes_per_s);
    let x_max = ridge.max(p2).max(at_host) * 1.6;
    let y_min = attention.flops_per_s.min(machine.link_bytes_per_s * attend) * 0.5;
    let axes = Axes {
        x: ((attend * 0.5).log10().floor(), x_max.log10().ceil()),
        y: (y_min.log10().floor(), (machine.device.flops_per_s * 1.5).log10().ceil()),
    };
    let mut svg = Svg::new();
    svg.text(LEFT, 34.0, title, &format!("font-size='19' font-weight='600' fill='{INK}'"));
    svg.text(LEFT, 57.0, &plan.subtitle, &format!("font-size='13.5' fill='{FAINT}'"));

    svg.regions(&axes, p1, p2);
    svg.grid(&axes);

    // Roofs, each up its memory's slope and along its processor's peak.
    let [x_low, x_high] = [axes.x.0, axes.x.1].map(|decade| 10f64.powf(decade));
    for (level, colour) in [(&machine.host, HOST), (&machine.device, DEVICE)] {
        let corners = [x_low, ridge_intensity(level), x_high].map(|x| (axes.px(x), axes.py(attainable(level, x))));
        svg.line(&corners, colour, "stroke-width='2.4'");
    }
    let link_ends = [x_low, machine.device.flops_per_s / machine.link_bytes_per_s];
    svg.line(&link_ends.map(|x| (axes.px(x), axes.py(machine.link_bytes_per_s * x))), LINK, "stroke-width='2.4'");

    // The kernel's own limit, to the right of where it matters.
    svg.line(
        &[(axes.px(p2), axes.py(kernel)), (RIGHT, axes.py(kernel))],
        DEVICE,
        "stroke-width='1.4' stroke-dasharray='2 4'",
    );
    let text = format!("experts of µ = {}: {}/s", plan.micro_batch, human_flops(kernel));
    svg.label(RIGHT - 8.0, axes.py(kernel) - 7.0, &text, DEVICE, "text-anchor='end'");

    // Names: along the slopes, and over the flat parts.
    let memory = |name: &str, rate: f64| format!("{name} {}/s", human_bytes(rate as u64));
    let slopes = [
        (memory("GPU memory", machine.device.bytes_per_s), machine.device.bytes_per_s, DEVICE, -7.0),
        (memory("host memory", machine.host.bytes_per_s), machine.host.bytes_per_s, HOST, 17.0),
        (memory("link", machine.link_bytes_per_s), machine.link_bytes_per_s, LINK, 17.0),
    ];
    for (text, rate, colour, below) in slopes {
        // In the middle between where the line enters the picture and the first thing that happens to it.
        let enters = x_low.max(10f64.powf(axes.y.0) / rate).log10();
        let ends = match colour {
            HOST => ridge_intensity(&machine.host),
            DEVICE => ridge_intensity(&machine.device),
            _ => p1,
        };
        let x = 10f64.powf((enters + ends.log10()) / 2.0);
        svg.rotated((axes.px(x), axes.py(rate * x)), -axes.slope_degrees(), below, &text, colour);
    }
    let host_peak = format!("host {}/s", human_flops(machine.host.flops_per_s));
    svg.label(RIGHT - 8.0, axes.py(machine.host.flops_per_s) - 7.0, &host_peak, HOST, "text-anchor='end'");
    let device_peak = format!("GPU {}/s", human_flops(machine.device.flops_per_s));
    svg.label(RIGHT - 8.0, axes.py(machine.device.flops_per_s) - 7.0, &device_peak, DEVICE, "text-anchor='end'");

    for (name, x, y) in [("P1", p1, attainable(&machine.host, p1)), ("P2", p2, kernel)] {
        svg.line(&[(axes.px(x), TOP), (axes.px(x), BOTTOM)], FAINT, "stroke-width='1' stroke-dasharray='5 4'");
        let (px, py) = (axes.px(x), axes.py(y));
        svg.line(
            &[(px, py - 5.0), (px + 5.0, py), (px, py + 5.0), (px - 5.0, py), (px, py - 5.0)],
            INK,
            "stroke-width='1.6'",
        );
        svg.label(px + 6.0, BOTTOM - 8.0, &format!("{name} {}", three(x)), INK, "");
    }
    for point in [&attention, &experts] {
        let (px, py) = (axes.px(point.intensity), axes.py(point.flops_per_s));
        // Below and to the right, where roofs that rise to the right leave room. Under the host's roof runs the link, and room
        // is only below both: a thin line leads there.
        let (mut x, mut y) = (px + 14.0, py + 20.0);
        if point.colour == HOST {
            (x, y) = (px + 8.0, BOTTOM - 48.0);
            svg.line(&[(px, py), (px, y + 16.0)], FAINT, "stroke-width='0.8'");
        }
        svg.dot(px, py, point.colour);
        let anchor = if x + 250.0 > RIGHT { "text-anchor='end'" } else { "" };
        x = if anchor.is_empty() { x } else { px - 14.0 };
        svg.label(x, y, &point.label, INK, &format!("font-weight='600' {anchor}"));
        svg.label(x, y + 16.0, &point.detail, FAINT, anchor);
    }
    svg.end()
}

/// Two pictures in one, the second below the first and as wide.
pub fn below(first: &str, second: &str) -> String {
    // Each keeps its own coordinates; where it lies is said in front of them.
    let placed = |picture: &str, place: &str| picture.replacen("<svg ", &format!("<svg {place} "), 1);
    let first = first.replacen(&format!(" width='{WIDTH}' height='{HEIGHT}'"), "", 1);
    let lower = 380.0;
    let height = HEIGHT + lower;
    format!(
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' width='{WIDTH}' height='{height}'>\n{}{}</svg>\n",
        placed(&first, &format!("x='0' y='0' width='{WIDTH}' height='{HEIGHT}'")),
        placed(second, &format!("x='0' y='{HEIGHT}' width='{WIDTH}' height='{lower}'")),
    )
}

/// Three significant digits without an exponent.
pub fn three(value: f64) -> String {
    let decimals = if value < 9.995 { 2 } else { usize::from(value < 99.95) };
    format!("{value:.decimals$}")
}

/// Text of a picture under way.
struct Svg(String);

impl Svg {
    fn new() -> Self {
        Svg(format!(
            "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' width='{WIDTH}' height='{HEIGHT}' \
             font-family='Inter, Helvetica, Arial, DejaVu Sans, sans-serif'>\n\
             <rect width='{WIDTH}' height='{HEIGHT}' fill='#ffffff'/>\n"
        ))
    }

    fn end(mut self) -> String {
        self.0.push_str("</svg>\n");
        self.0
    }

    fn text(&mut self, x: f64, y: f64, text: &str, style: &str) {
        let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
        let _ = writeln!(self.0, "<text x='{x:.1}' y='{y:.1}' {style}>{text}</text>");
    }

    /// Text with a white edge, so that lines behind it do not cross it.
    fn label(&mut self, x: f64, y: f64, text: &str, colour: &str, style: &str) {
        let edge = "stroke='#ffffff' stroke-width='4' stroke-linejoin='round' paint-order='stroke'";
        self.text(x, y, text, &format!("font-size='12.5' fill='{colour}' {edge} {style}"));
    }

    /// A label along a line, so far below it.
    fn rotated(&mut self, (x, y): (f64, f64), degrees: f64, below: f64, text: &str, colour: &str) {
        let style = format!("text-anchor='middle' transform='rotate({degrees:.1} {x:.1} {y:.1}) translate(0 {below})'");
        self.label(x, y, text, colour, &style);
    }

    fn line(&mut self, points: &[(f64, f64)], colour: &str, style: &str) {
        // Lines are cut at the frame by their own ends; only the slopes may start below it.
        let points: Vec<(f64, f64)> = match points {
            [(x0, y0), (x1, y1), rest @ ..] if *y0 > BOTTOM => {
                let x = x0 + (x1 - x0) * (y0 - BOTTOM) / (y0 - y1);
                [&[(x, BOTTOM), (*x1, *y1)], rest].concat()
            }
            points => points.to_vec(),
        };
        let list: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let list = list.join(" ");
        let _ = writeln!(
            self.0,
            "<polyline points='{list}' fill='none' stroke='{colour}' stroke-linejoin='round' stroke-linecap='round' {style}/>"
        );
    }

    fn dot(&mut self, x: f64, y: f64, colour: &str) {
        let _ = writeln!(
            self.0,
            "<circle cx='{x:.1}' cy='{y:.1}' r='6.5' fill='{colour}' stroke='#ffffff' stroke-width='2'/>"
        );
    }

    /// What to do with data of an intensity: three bands between the turning points.
    fn regions(&mut self, axes: &Axes, p1: f64, p2: f64) {
        let edges = [LEFT, axes.px(p1).clamp(LEFT, RIGHT), axes.px(p2).clamp(LEFT, RIGHT), RIGHT];
        let bands = [("compute on the host", HOST), ("link-bound", LINK), ("GPU-bound", DEVICE)];
        for (ends, (text, colour)) in edges.windows(2).zip(bands) {
            let width = ends[1] - ends[0];
            if width <= 0.0 {
                continue;
            }
            let height = BOTTOM - TOP;
            let _ = writeln!(
                self.0,
                "<rect x='{:.1}' y='{TOP}' width='{width:.1}' height='{height}' fill='{colour}' fill-opacity='0.05'/>",
                ends[0]
            );
            // Names stand above the frame; one that is wider than its band would run into the next.
            if width > 7.2 * text.len() as f64 {
                let style = format!("font-size='12.5' fill='{colour}' text-anchor='middle'");
                self.text((ends[0] + ends[1]) / 2.0, TOP - 9.0, text, &style);
            }
        }
    }

    fn grid(&mut self, axes: &Axes) {
        let tick = format!("font-size='12' fill='{FAINT}'");
        for decade in axes.x.0 as i32..=axes.x.1 as i32 {
            let x = axes.px(10f64.powi(decade));
            self.line(&[(x, TOP), (x, BOTTOM)], "#d5d9df", "stroke-width='0.8'");
            let text = if decade < 0 { format!("{}", 10f64.powi(decade)) } else { thousands(10u64.pow(decade as u32)) };
            self.text(x, BOTTOM + 19.0, &text, &format!("{tick} text-anchor='middle'"));
        }
        for decade in axes.y.0 as i32..=axes.y.1 as i32 {
            let y = axes.py(10f64.powi(decade));
            self.line(&[(LEFT, y), (RIGHT, y)], "#d5d9df", "stroke-width='0.8'");
            let text = match decade {
                ..9 => format!("{} MFLOP/s", 10f64.powi(decade - 6)),
                9..12 => format!("{} GFLOP/s", 10f64.powi(decade - 9)),
                12..15 => format!("{} TFLOP/s", 10f64.powi(decade - 12)),
                15.. => format!("{} PFLOP/s", 10f64.powi(decade - 15)),
            };
            self.text(LEFT - 8.0, y + 4.0, &text, &format!("{tick} text-anchor='end'"));
        }
        let style = format!("font-size='13' fill='{INK}' text-anchor='middle'");
        self.text((LEFT + RIGHT) / 2.0, HEIGHT - 16.0, "operational intensity: FLOP per byte read at the host", &style);
    }
}

/// `1,000`
fn thousands(value: u64) -> String {
    let digits = value.to_string();
    let groups: Vec<&str> =
        digits.as_bytes().rchunks(3).rev().map(|group| std::str::from_utf8(group).expect("digits")).collect();
    groups.join(",")
}
