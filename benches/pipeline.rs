//! Schedules side by side on a made-up model in small, from a warm start: answers compared, then times.
//!
//! The small version of `fulmen bench pipeline`, which runs a shape of any size: sizes here suit Mesa's software driver, where
//! copies and kernels take turns, so what it shows is that every schedule runs and what the launcher costs, not overlap.

use fulmen::engine::{Engine, WarmSequence};
use fulmen::gpu::list_adapters;
use fulmen::model::presets;
use fulmen::plan::Wishes;
use fulmen::policy::ScheduleKind;

const SEQUENCES: usize = 12;
const PASSES: usize = 6;
/// Not counted: pipelines are compiled in the first one.
const WARM_UP: usize = 2;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    if list_adapters().is_empty() {
        println!("pipeline: no Vulkan adapter answers, nothing is measured");
        return Ok(());
    }
    let sequences: Vec<WarmSequence> =
        (0..SEQUENCES).map(|age| WarmSequence { prompt: 20 + 4 * age, generated: 1 + 4 * age, left: 64 }).collect();
    let wishes = Wishes {
        resident_experts: Some(0),
        ring_experts: Some(16),
        micro_batches: Some(3),
        max_sequences: Some(SEQUENCES),
        max_model_len: Some(256),
        ..Wishes::default()
    };
    let mut engine = Engine::synthetic(presets::mixtral_tiny()).wishes(wishes).prepare()?.load(&mut |_, _| {})?;
    println!("{}, {SEQUENCES} sequences in 3 micro-batches", engine.gpu().summary().name);
    let (bytes, time) = engine.measure_pages()?.expect("experts stream");
    println!("link alone: {:.2} GB/s", bytes as f64 / time.as_secs_f64() / 1e9);
    let mut by_attention = std::collections::BTreeMap::new();
    let mut first = None;
    for kind in ScheduleKind::ALL {
        engine = engine.reopen(Wishes { schedule: Some(kind), ..wishes })?;
        let mut ends = Vec::new();
        let (_, tokens) = engine.run_warm(&sequences, &mut std::iter::empty(), WARM_UP + PASSES, &mut |_| {
            ends.push(std::time::Instant::now())
        })?;
        let place = engine.plan().policy.attention.name();
        let same = by_attention.entry(place).or_insert_with(|| tokens.clone());
        assert_eq!(*same, tokens, "{kind} gives the tokens of the other schedules that attend on the {place}");
        let mut steps: Vec<_> = ends.windows(2).skip(WARM_UP - 1).map(|pair| pair[1] - pair[0]).collect();
        steps.sort_unstable();
        let median = steps[steps.len() / 2].as_secs_f64();
        let base = *first.get_or_insert(median);
        println!(
            "{:<14} attention on the {place}   {:>8.2} ms a pass   {:>8.1} tok/s   {:>5.2} x serial",
            kind.name(),
            median * 1e3,
            SEQUENCES as f64 / median,
            base / median
        );
    }
    Ok(())
}
