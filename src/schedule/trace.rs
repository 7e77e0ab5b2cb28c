//! Timelines to look at: Chrome/Perfetto JSON, and an SVG.

use std::fmt::Write as _;
use std::time::Duration;

use serde_json::{Value, json};

use super::task::{Lane, Work};
use super::timeline::{Span, Timeline};

/// One event for each task, a track for each lane: what chrome://tracing and ui.perfetto.dev open. All timelines count from one
/// origin.
pub fn chrome<'a>(passes: impl IntoIterator<Item = &'a Timeline>) -> Value {
    let microseconds = |at: Duration| at.as_nanos() as f64 / 1e3;
    let track = |lane: Lane| Lane::ALL.iter().position(|other| *other == lane).expect("one of all");
    let mut events: Vec<Value> = Lane::ALL
        .iter()
        .map(|lane| {
            json!({"ph": "M", "name": "thread_name", "pid": 0, "tid": track(*lane), "args": {"name": lane.name()}})
        })
        .collect();
    for (number, timeline) in passes.into_iter().enumerate() {
        for span in &timeline.spans {
            let mut args = json!({"pass": number, "task": span.task.0});
            if let Some(layer) = span.work.layer() {
                args["layer"] = json!(layer);
            }
            if span.bytes > 0 {
                args["bytes"] = json!(span.bytes);
            }
            if span.rows > 0 {
                args["rows"] = json!(span.rows);
            }
            events.push(json!({
                "ph": "X", "name": span.work.to_string(), "cat": span.work.name(), "pid": 0, "tid": track(span.lane),
                "ts": microseconds(span.start), "dur": microseconds(span.end - span.start), "args": args,
            }));
        }
    }
    json!({"displayTimeUnit": "ms", "traceEvents": events})
}

/// The part of a timeline that is worth a picture: two layers in the middle, where nothing begins or ends. All of it where
/// there are fewer than six.
fn steady_part(timeline: &Timeline) -> (Duration, Duration) {
    let layers = timeline.spans.iter().filter_map(|span| match span.work {
        Work::Experts { layer, .. } => Some(layer + 1),
        _ => None,
    });
    let layers = layers.max().unwrap_or(0);
    let all = || {
        let start = timeline.spans.iter().map(|span| span.start).min().unwrap_or_default();
        (start, timeline.spans.iter().map(|span| span.end).max().unwrap_or_default())
    };
    if layers < 6 {
        return all();
    }
    let ends = |wanted: usize| {
        let of =
            timeline.spans.iter().filter(|span| matches!(span.work, Work::Experts { layer, .. } if layer == wanted));
        of.map(|span| span.end).max().unwrap_or_default()
    };
    (ends(layers / 2 - 1), ends(layers / 2 + 1))
}

const WIDTH: f64 = 1180.0;
const LEFT: f64 = 64.0;
const LANE_HEIGHT: f64 = 56.0;
const TOP: f64 = 64.0;

/// Fill of a task's bar.
fn colour(work: Work) -> &'static str {
    match work {
        Work::LoadPage { .. } | Work::PinPage { .. } => "#4c78a8",
        Work::Experts { .. } => "#e45756",
        Work::CpuAttention { .. } | Work::GpuAttention { .. } => "#54a24b",
        Work::PreAttention { .. } => "#f2a93b",
        Work::PostAttention { .. } => "#eeca5a",
        Work::RowsToHost { .. } | Work::RowsToDevice { .. } | Work::KvToDevice { .. } => "#9d7fc1",
        Work::Embed { .. } | Work::Head { .. } | Work::Sample { .. } => "#8a8a8a",
        Work::Barrier { .. } => "none",
    }
}

fn milliseconds(at: Duration) -> String {
    format!("{:.3} ms", at.as_secs_f64() * 1e3)
}

/// What a bar says when the pointer rests on it.
fn title(span: &Span) -> String {
    let mut text = span.work.to_string();
    if let Some(layer) = span.work.layer() {
        let _ = write!(text, ", layer {layer}");
    }
    let _ = write!(text, ": {}", milliseconds(span.end - span.start));
    if span.rows > 0 {
        let _ = write!(text, ", {} rows", span.rows);
    }
    if span.bytes > 0 {
        let seconds = (span.end - span.start).as_secs_f64();
        let _ = write!(text, ", {}", crate::units::human_bytes(span.bytes));
        if seconds > 0.0 {
            let _ = write!(text, " ({:.1} GB/s)", span.bytes as f64 / seconds / 1e9);
        }
    }
    text
}

/// Four lanes over time, two layers of steady state; pauses of the link that carries pages are marked in red.
pub fn svg(timeline: &Timeline, heading: &str) -> String {
    let (from, to) = steady_part(timeline);
    let length = (to.saturating_sub(from)).as_secs_f64().max(1e-9);
    let x = |at: Duration| {
        let inside = at.clamp(from, to).saturating_sub(from).as_secs_f64();
        LEFT + inside / length * (WIDTH - LEFT - 16.0)
    };
    let height = TOP + Lane::ALL.len() as f64 * LANE_HEIGHT + 76.0;
    let mut out = String::new();
    let escaped = heading.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let _ = writeln!(
        out,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="system-ui, sans-serif" font-size="12">
<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>
<text x="{LEFT}" y="24" font-size="16" fill="#222222">{escaped}</text>"##
    );
    let bottom = TOP + Lane::ALL.len() as f64 * LANE_HEIGHT;
    for (index, lane) in Lane::ALL.into_iter().enumerate() {
        let y = TOP + index as f64 * LANE_HEIGHT;
        let share = visible(timeline, from, to).filter(|span| span.lane == lane).cloned().collect::<Vec<_>>();
        let busy = Timeline { spans: share }.busy(lane).as_secs_f64() / length;
        let _ = writeln!(
            out,
            r##"<rect x="{LEFT}" y="{y}" width="{}" height="{}" fill="#f5f5f5"/>
<text x="8" y="{}" fill="#222222">{}</text><text x="8" y="{}" fill="#777777" font-size="11">{:.0} %</text>"##,
            WIDTH - LEFT - 16.0,
            LANE_HEIGHT - 8.0,
            y + 20.0,
            lane.name(),
            y + 36.0,
            100.0 * busy.min(1.0)
        );
        for span in visible(timeline, from, to).filter(|span| span.lane == lane) {
            let (left, right) = (x(span.start), x(span.end));
            let width = (right - left).max(0.4);
            let _ = writeln!(
                out,
                r##"<rect x="{left:.2}" y="{y}" width="{width:.2}" height="{}" fill="{}" stroke="#ffffff" stroke-width="0.4"><title>{}</title></rect>"##,
                LANE_HEIGHT - 8.0,
                colour(span.work),
                title(span)
            );
            if width > 7.0 * span.work.to_string().len() as f64 {
                let middle = y + LANE_HEIGHT / 2.0;
                let _ = writeln!(
                    out,
                    r##"<text x="{:.2}" y="{middle}" fill="#ffffff" font-size="11" pointer-events="none">{}</text>"##,
                    left + 4.0,
                    span.work
                );
            }
        }
        if lane == Lane::HostToDevice {
            for (start, end) in timeline.gaps(lane, Duration::from_secs_f64(length / 400.0)) {
                if end > from && start < to {
                    let (left, right) = (x(start), x(end));
                    let _ = writeln!(
                        out,
                        r##"<rect x="{left:.2}" y="{}" width="{:.2}" height="5" fill="#d62728"><title>the link is idle for {}</title></rect>"##,
                        y + LANE_HEIGHT - 8.0,
                        (right - left).max(0.6),
                        milliseconds(end - start)
                    );
                }
            }
        }
    }
    axis(&mut out, length, bottom);
    legend(&mut out, bottom + 52.0);
    out.push_str("</svg>\n");
    out
}

fn visible(timeline: &Timeline, from: Duration, to: Duration) -> impl Iterator<Item = &Span> {
    timeline
        .spans
        .iter()
        .filter(move |span| span.end > from && span.start < to && !matches!(span.work, Work::Barrier { .. }))
}

/// Ticks at round numbers of milliseconds.
fn axis(out: &mut String, length: f64, y: f64) {
    let raw = length * 1e3 / 8.0;
    let power = 10f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power).into_iter().find(|step| *step >= raw).unwrap_or(raw);
    let mut at = 0.0;
    while at <= length * 1e3 + 1e-9 {
        let x = LEFT + at / (length * 1e3) * (WIDTH - LEFT - 16.0);
        let label = if step < 1.0 { format!("{at:.2}") } else { format!("{at:.0}") };
        let _ = writeln!(
            out,
            r##"<line x1="{x:.1}" y1="{TOP}" x2="{x:.1}" y2="{y}" stroke="#dddddd" stroke-width="0.5"/>
<text x="{x:.1}" y="{}" fill="#777777" font-size="11" text-anchor="middle">{label}{}</text>"##,
            y + 12.0,
            if at == 0.0 { " ms" } else { "" }
        );
        at += step;
    }
}

fn legend(out: &mut String, y: f64) {
    let entries = [
        ("pages", "#4c78a8"),
        ("pre-attention", "#f2a93b"),
        ("rows, KV across the link", "#9d7fc1"),
        ("attention", "#54a24b"),
        ("post-attention", "#eeca5a"),
        ("experts", "#e45756"),
        ("link idle", "#d62728"),
    ];
    let mut x = LEFT;
    for (name, colour) in entries {
        let _ = writeln!(
            out,
            r##"<rect x="{x}" y="{}" width="11" height="11" fill="{colour}"/><text x="{}" y="{y}" fill="#444444">{name}</text>"##,
            y - 10.0,
            x + 16.0
        );
        x += 40.0 + 7.0 * name.len() as f64;
    }
}
