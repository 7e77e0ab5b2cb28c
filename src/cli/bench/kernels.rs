//! `fulmen bench kernels`: matrix products and attention against what the adapter can do at most.
//!
//! First the ceilings, measured in this run: streaming reads, a copy, multiply-adds in registers. Then every product of a Mixtral-shaped
//! layer at several numbers of rows: sampled elements are checked against plain sums, then it is timed by the device's clock. Then a
//! layer's time kernel by kernel, and attention. Where the adapter has cooperative matrices their tiles are tried once ([`tune`]) and the
//! choice is kept; `--retune` tries again.
//!
//! [`tune`]: crate::tune

use std::sync::Arc;

use anyhow::Result;
use clap::Args;
use serde_json::json;

use super::super::{OK, print_line};
use super::attention_cases;
use crate::checkpoint::{Dtype, synthetic};
use crate::gpu::{DeviceChoice, Gpu, Pipelines};
use crate::kernels::cooperative::Tile;
use crate::model::{Shape, presets};
use crate::tune::measure::{Ceilings, Dense, ExpertShape, Experts, Reading};
use crate::tune::{self, Kept, Operation, layer};

#[derive(Debug, Args)]
pub struct Arguments {
    /// Adapter by number or part of its name, see `fulmen devices` [default: the best]
    #[arg(long, env = "FULMEN_DEVICE", value_name = "N|NAME")]
    device: Option<String>,
    /// One JSON object instead of tables
    #[arg(long)]
    json: bool,
    /// Try the tiles of the f16 class again and keep the best
    #[arg(long)]
    retune: bool,
}

/// What fits an adapter: a GPU takes Mixtral 8x7B's layer, a software driver one of a few thousandths of its weights.
struct Sizes {
    shape: Shape,
    rows: &'static [usize],
    memory_bytes: u64,
    workgroups: u32,
    steps: u32,
    /// What was scaled, in words.
    note: &'static str,
}

impl Sizes {
    fn of(gpu: &Gpu) -> Self {
        let mixtral = presets::preset("mixtral-8x7b").expect("a preset").shape;
        if gpu.summary().kind != "cpu" && gpu.memory_bytes().is_some_and(|bytes| bytes > 12 << 30) {
            let rows = &[1, 8, 64, 256, 1024, 4096];
            let note = "Mixtral 8x7B's layer at full size";
            return Self { shape: mixtral, rows, memory_bytes: 1 << 30, workgroups: 2112, steps: 4000, note };
        }
        let (d_model, expert_width) = (512, 1024);
        let shape = Shape { d_model, expert_width, q_heads: 4, kv_heads: 1, vocab: 2048, ..mixtral };
        let note = "sizes scaled to a slow adapter: a layer of width 512, up to 256 rows";
        Self { shape, rows: &[1, 8, 64, 256], memory_bytes: 16 << 20, workgroups: 16, steps: 100, note }
    }
}

pub fn run(arguments: Arguments) -> Result<u8> {
    let choice = arguments.device.as_deref().map_or(DeviceChoice::Best, DeviceChoice::from);
    let gpu = Arc::new(Gpu::open(&choice)?);
    let pipelines = Pipelines::new(gpu.clone());
    let sizes = Sizes::of(&gpu);
    let (adapter, driver) = (gpu.summary().name.clone(), gpu.summary().driver.clone());
    say!("{adapter}, {driver}: {}", sizes.note);
    let ceilings = Ceilings::measure(&pipelines, sizes.memory_bytes, sizes.workgroups, sizes.steps)?;
    let loads = synthetic::routing::loads(sizes.shape.experts, 0);
    let experts = ExpertShape {
        experts: sizes.shape.experts,
        chosen: sizes.shape.experts_per_token,
        d_model: sizes.shape.d_model,
        expert_width: sizes.shape.expert_width,
    };
    let kept = match gpu.cooperative() {
        false => None,
        true => Some(kept(&pipelines, experts, &loads, arguments.retune)?),
    };
    let tiles = kept.as_ref().map(|kept| &kept.tiles);
    if !arguments.json {
        print_ceilings(&ceilings)?;
        print_head()?;
    }
    let mut readings = Vec::new();
    let mut keep = |reading: Reading| {
        if !arguments.json {
            print_reading(&ceilings, &reading)?;
        }
        readings.push(reading);
        Ok::<_, anyhow::Error>(())
    };
    let shape = &sizes.shape;
    let most = *sizes.rows.last().expect("some rows");
    let head_rows = most.min(256);
    for ([n_out, n_in], most) in [
        ([shape.qkv_width(), shape.d_model], most),
        ([shape.d_model, shape.q_width()], most),
        ([shape.kv_width(), shape.d_model], most),
        ([shape.experts, shape.d_model], most),
        ([shape.vocab, shape.d_model], head_rows),
    ] {
        let dense = Dense::new(&pipelines, (n_out, n_in), Dtype::Bf16, most, sizes.memory_bytes / 4)?;
        for rows in sizes.rows.iter().copied().filter(|rows| *rows <= most) {
            keep(dense.measure(tiles.map(|tiles| tiles.matmul(rows as u32, n_out as u32)), rows)?)?;
        }
    }
    if gpu.cooperative() && most >= 4096 {
        // What libraries are compared by, in each of the ways for many rows.
        let square = Dense::new(&pipelines, (4096, 4096), Dtype::F16, 4096, sizes.memory_bytes / 4)?;
        for tile in [Tile::MANY].into_iter().chain(gpu.workgroup_matrices().then_some(Tile::WORKGROUP)) {
            keep(square.measure(Some(tile), 4096)?)?;
        }
    }
    {
        let layer = Experts::new(&pipelines, experts, Dtype::Bf16, most)?;
        let tile = |operation, rows: usize| -> Option<Tile> {
            let per_expert = rows * experts.chosen / experts.experts;
            tiles.map(|tiles| tiles.get(operation, per_expert as u32))
        };
        for rows in sizes.rows.iter().copied() {
            let routing = layer.route(rows, &loads)?;
            keep(layer.measure_gate_up(tile(Operation::GateUp, rows), rows, &routing)?)?;
            keep(layer.measure_down(tile(Operation::Down, rows), rows, &routing)?)?;
        }
    }
    let mut layers = Vec::new();
    for rows in [256, most] {
        if layers.iter().all(|(before, _)| *before != rows) {
            layers.push((rows, layer::shares(&pipelines, shape, rows, &loads, tiles)?));
        }
    }
    let attention = attention_cases::readings(&pipelines, shape, sizes.workgroups < 100)?;
    if arguments.json {
        let layers: Vec<_> = layers.iter().map(|(rows, shares)| json!({"rows": rows, "kernels": shares})).collect();
        let object = json!({
            "adapter": adapter, "driver": driver, "sizes": sizes.note, "ceilings": ceilings,
            "tuning": kept, "readings": readings, "layers": layers, "attention": attention,
        });
        print_line(object)?;
    } else {
        for (rows, shares) in &layers {
            print_layer(shares, *rows)?;
        }
        attention_cases::print(&ceilings, &attention)?;
    }
    Ok(OK)
}

/// The tiles that were kept, or the best of all candidates, which are kept then.
fn kept(pipelines: &Pipelines, shape: ExpertShape, loads: &[f64], again: bool) -> Result<Kept> {
    let summary = pipelines.gpu().summary();
    if !again
        && let Ok(Some(kept)) = Kept::read(summary)
        && kept.tiles.run_on(pipelines.gpu())
    {
        return Ok(kept);
    }
    let (tiles, tried) = tune::tune(pipelines, shape, loads, &mut |tried| {
        let took = tried.seconds.map_or("left out".to_owned(), |seconds| format!("{:.1} us", seconds * 1e6));
        say!("{} of {} rows, {}: {took}", tried.operation.name(), tried.rows, tried.tile);
    })?;
    let kept = Kept::new(summary, tiles, tried);
    let path = kept.write(summary)?;
    say!("kept in {}", path.display());
    Ok(kept)
}

fn print_ceilings(ceilings: &Ceilings) -> Result<()> {
    let Ceilings { read_64, read_128, copy, fma, cooperative } = ceilings;
    print_line(format_args!(
        "ceilings: read {:.0} GB/s in loads of 64 bits, {:.0} of 128; copy {:.0}; f32 {:.2} TFLOP/s{}",
        read_64 * 1e-9,
        read_128 * 1e-9,
        copy * 1e-9,
        fma * 1e-12,
        cooperative.map_or(String::new(), |rate| format!("; cooperative matrices {:.0} TFLOP/s", rate * 1e-12)),
    ))
}

fn print_head() -> Result<()> {
    print_line(format_args!(
        "{:<16}{:>18}{:>7}{:>12}{:>10}{:>9}{:>8}{:>8}  tile",
        "product", "shape", "rows", "time", "TFLOP/s", "GB/s", "% roof", "error"
    ))
}

fn print_reading(ceilings: &Ceilings, reading: &Reading) -> Result<()> {
    let Reading { operation, shape, rows, tile, seconds, operations, bytes, worst_error } = reading;
    print_line(format_args!(
        "{:<16}{shape:>18}{rows:>7}{:>9.1} us{:>10.3}{:>9.1}{:>8.1}{worst_error:>8.3}  {}",
        operation.name(),
        seconds * 1e6,
        operations / seconds * 1e-12,
        bytes / seconds * 1e-9,
        100.0 * ceilings.least_seconds(reading) / seconds,
        tile.map_or("portable".to_owned(), |tile| tile.to_string()),
    ))
}

fn print_layer(shares: &[layer::Share], rows: usize) -> Result<()> {
    let total: f64 = shares.iter().map(|share| share.seconds).sum();
    print_line(format_args!("a layer of {rows} rows, without attention: {:.1} us", total * 1e6))?;
    for layer::Share { kernel, seconds } in shares {
        print_line(format_args!("{kernel:<24}{:>9.1} us{:>7.1} %", seconds * 1e6, 100.0 * seconds / total))?;
    }
    Ok(())
}
