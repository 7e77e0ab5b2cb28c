//! The attention table of `fulmen bench kernels`: prompts and decode rows of several lengths, against what the adapter can do at most.

use anyhow::Result;

use super::super::print_line;
use crate::gpu::Pipelines;
use crate::kernels::cooperative::prompt_attention::Cut;
use crate::model::Shape;
use crate::request::lengths::MT_BENCH_PROMPTS;
use crate::tune::attention::{Reading, Sequences};
use crate::tune::measure::Ceilings;

/// Prompts of one length, of another, and of MT-Bench's lengths, which nothing pads; then decode rows of several contexts. `scaled`: for a
/// slow adapter.
pub fn readings(pipelines: &Pipelines, shape: &Shape, scaled: bool) -> Result<Vec<Reading>> {
    let few = |large: usize, small: usize| if scaled { small } else { large };
    let mut readings = Vec::new();
    let mt_bench: Vec<usize> = MT_BENCH_PROMPTS.iter().copied().cycle().take(few(160, 8)).collect();
    for lengths in [vec![few(2048, 256); few(4, 1)], vec![77; few(160, 8)], mt_bench] {
        let sequences = Sequences::new(pipelines, shape, &lengths)?;
        readings.push(sequences.measure_prompts(None)?);
        if pipelines.gpu().cooperative() {
            readings.push(sequences.measure_prompts(Some(Cut::of(sequences.shape())))?);
        }
    }
    for (n, context) in [(few(256, 8), few(512, 64)), (few(64, 4), few(2048, 300)), (few(4, 1), few(16384, 600))] {
        readings.push(Sequences::new(pipelines, shape, &vec![context; n])?.measure_decode()?);
    }
    Ok(readings)
}

pub fn print(ceilings: &Ceilings, readings: &[Reading]) -> Result<()> {
    print_line(format_args!(
        "{:<18}{:>10}{:>8}{:>12}{:>10}{:>9}{:>8}{:>14}{:>10}",
        "attention", "sequences", "rows", "time", "TFLOP/s", "GB/s", "% read", "ns/1000 pairs", "error"
    ))?;
    let read = ceilings.read_64.max(ceilings.read_128);
    for reading in readings {
        let Reading { kernel, sequences, rows, seconds, pairs, operations, bytes, worst_error } = reading;
        print_line(format_args!(
            "{kernel:<18}{sequences:>10}{rows:>8}{:>9.1} us{:>10.3}{:>9.1}{:>8.1}{:>14.3}{worst_error:>10.1e}",
            seconds * 1e6,
            operations / seconds * 1e-12,
            bytes / seconds * 1e-9,
            100.0 * bytes / seconds / read,
            seconds * 1e12 / pairs,
        ))?;
    }
    Ok(())
}
