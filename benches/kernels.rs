//! Matrix products in small, checked on sampled elements and then timed, against what the adapter can do at most.
//!
//! The small version of `fulmen bench kernels`, which takes the real shapes on a GPU: sizes here suit Mesa's software driver, at about
//! 4 GFLOP/s. Where the adapter has cooperative matrices they are measured beside the portable kernels.

use fulmen::checkpoint::{Dtype, synthetic};
use fulmen::gpu::{DeviceChoice, Gpu, Pipelines, list_adapters};
use fulmen::tune::Tiles;
use fulmen::tune::measure::{Ceilings, Dense, ExpertShape, Experts, Reading};

const DENSE: (usize, usize) = (512, 512);
const EXPERTS: ExpertShape = ExpertShape { experts: 8, chosen: 2, d_model: 256, expert_width: 512 };
const ROWS: [usize; 3] = [1, 8, 64];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    if list_adapters().is_empty() {
        println!("kernels: no Vulkan adapter answers, nothing is measured");
        return Ok(());
    }
    let gpu = std::sync::Arc::new(Gpu::open(&DeviceChoice::Best)?);
    let pipelines = Pipelines::new(gpu.clone());
    println!("{}", gpu.summary().name);
    let ceilings = Ceilings::measure(&pipelines, 16 << 20, 16, 100)?;
    println!("read {:.2} GB/s, f32 {:.1} GFLOP/s", ceilings.read_128 * 1e-9, ceilings.fma * 1e-9);
    let tiles = gpu.cooperative().then(Tiles::default);
    let classes = [None].into_iter().chain(tiles.as_ref().map(Some));
    let show = |reading: &Reading| {
        println!(
            "{:<16}{:>10}{:>5} rows{:>11.1} us{:>9.2} GFLOP/s{:>7.2} GB/s{:>7.1} % of the roof   {}",
            reading.operation.name(),
            reading.shape,
            reading.rows,
            reading.seconds * 1e6,
            reading.operations / reading.seconds * 1e-9,
            reading.bytes / reading.seconds * 1e-9,
            100.0 * ceilings.least_seconds(reading) / reading.seconds,
            reading.tile.map_or("portable".to_owned(), |tile| tile.to_string()),
        );
    };
    let loads = synthetic::routing::loads(EXPERTS.experts, 0);
    let dense = Dense::new(&pipelines, DENSE, Dtype::Bf16, 64, 4 << 20)?;
    let experts = Experts::new(&pipelines, EXPERTS, Dtype::Bf16, 64)?;
    for tiles in classes {
        for rows in ROWS {
            show(&dense.measure(tiles.map(|tiles| tiles.matmul(rows as u32, DENSE.0 as u32)), rows)?);
            let routing = experts.route(rows, &loads)?;
            let per_expert = (rows * EXPERTS.chosen / EXPERTS.experts) as u32;
            show(&experts.measure_gate_up(tiles.map(|tiles| tiles.gate_up(per_expert)), rows, &routing)?);
            show(&experts.measure_down(tiles.map(|tiles| tiles.down(per_expert)), rows, &routing)?);
        }
    }
    Ok(())
}
