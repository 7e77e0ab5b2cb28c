//! What may be the best tile, and which one is.

use super::measure::{Dense, ExpertShape, Experts, MeasureError, Reading};
use super::{NARROW, Operation, ROW_CLASSES, Tiles};
use crate::checkpoint::Dtype;
use rayon::iter::{ParallelBridge, ParallelIterator};

use crate::gpu::{Gpu, Pipelines};
use crate::kernels::cooperative::{self, Tile};
use crate::kernels::{expert_down, expert_gate_up};

/// A candidate and what it took.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct Tried {
    pub operation: Operation,
    pub rows: u32,
    pub tile: Tile,
    /// None: it did not compile, or its answer was wrong.
    pub seconds: Option<f64>,
}

/// Tiles with a chance, for products of one or of two matrices, with up to about `rows` rows.
fn candidates(operation: Operation, rows: u32) -> Vec<Tile> {
    let t = Tile::new;
    let wide = |tile| Tile { unit: 8, ..tile };
    // Rows for what experts have where some are more popular than others: most weights are to be read once.
    let (solo, direct) = (Tile::solo, Tile::direct);
    match (operation, rows) {
        (Operation::GateUp, 0..=8) => {
            vec![solo(16, 32, 128, 1), solo(16, 16, 64, 1), direct(16, 64, 64, 16, 16), wide(t(16, 32, 64, 16, 16))]
        }
        (Operation::GateUp, 9..=16) => {
            vec![solo(32, 16, 64, 1), solo(32, 16, 128, 1), direct(32, 64, 64, 16, 32), wide(t(32, 64, 128, 16, 16))]
        }
        (Operation::GateUp, 17..=32) => {
            vec![solo(48, 16, 64, 1), solo(48, 16, 128, 1), direct(48, 64, 64, 48, 16), wide(t(64, 32, 64, 32, 16))]
        }
        (Operation::GateUp, 33..=64) => vec![
            direct(96, 64, 64, 48, 32),
            direct(80, 64, 64, 80, 16),
            direct(96, 128, 64, 48, 32),
            solo(80, 16, 64, 1),
            wide(t(128, 64, 64, 32, 32)),
        ],
        (Operation::GateUp, _) => vec![
            t(64, 64, 32, 32, 32),
            t(96, 64, 32, 48, 32),
            t(128, 64, 32, 64, 32),
            Tile { prefetch: false, ..t(128, 64, 64, 64, 32) },
            t(128, 64, 64, 32, 32),
            t(128, 128, 32, 64, 32),
            t(128, 128, 32, 32, 64),
            wide(t(96, 64, 64, 48, 32)),
            wide(t(128, 64, 64, 32, 32)),
            wide(t(128, 128, 32, 64, 32)),
        ],
        (Operation::Down, 0..=8) => {
            vec![direct(16, 64, 128, 16, 16), direct(16, 128, 64, 16, 32), solo(16, 32, 64, 1), t(16, 128, 128, 16, 32)]
        }
        (Operation::Down, 9..=16) => {
            vec![direct(32, 64, 128, 16, 32), direct(32, 128, 64, 32, 32), solo(32, 32, 64, 1), t(16, 128, 128, 16, 32)]
        }
        (Operation::Down, 17..=32) => {
            vec![direct(48, 128, 64, 48, 32), direct(48, 64, 128, 48, 16), solo(48, 32, 64, 1), t(64, 128, 64, 32, 32)]
        }
        (Operation::Down, 33..=64) => vec![
            direct(80, 128, 64, 80, 32),
            direct(96, 128, 64, 48, 64),
            direct(96, 64, 128, 48, 32),
            solo(80, 32, 128, 2),
            wide(t(128, 128, 64, 64, 32)),
        ],
        (_, 0..=16) => vec![
            t(16, 16, 256, 16, 16),
            t(16, 32, 128, 16, 16),
            t(16, 64, 64, 16, 16),
            t(16, 128, 128, 16, 32),
            t(32, 32, 128, 16, 16),
            t(32, 64, 64, 32, 16),
            wide(t(16, 32, 64, 16, 16)),
        ],
        (_, 17..=32) => vec![
            t(32, 32, 128, 16, 16),
            t(32, 32, 256, 16, 16),
            t(32, 64, 64, 32, 16),
            t(32, 64, 128, 32, 16),
            t(64, 128, 64, 32, 32),
        ],
        (_, 33..=64) => vec![
            t(64, 32, 128, 32, 16),
            t(64, 64, 64, 64, 16),
            t(64, 64, 128, 32, 32),
            t(64, 128, 64, 32, 32),
            t(128, 128, 64, 64, 32),
            wide(t(64, 64, 64, 32, 32)),
            wide(t(128, 128, 64, 64, 32)),
        ],
        (_, _) => vec![
            t(64, 64, 128, 32, 32),
            t(64, 128, 64, 32, 32),
            t(128, 96, 32, 64, 48),
            t(128, 128, 64, 32, 64),
            t(128, 128, 64, 64, 32),
            t(256, 128, 32, 64, 64),
            wide(t(128, 128, 32, 64, 64)),
            wide(t(128, 128, 64, 64, 32)),
            wide(t(128, 128, 64, 32, 64)),
            wide(t(128, 256, 32, 64, 64)),
            wide(t(256, 128, 32, 64, 64)),
            Tile { buffers: 2, ..wide(t(256, 128, 16, 64, 64)) },
        ],
    }
}

/// One more of many rows, where the device can run it.
fn in_spirv(gpu: &Gpu, operation: Operation) -> Option<Tile> {
    (operation == Operation::Matmul && gpu.workgroup_matrices()).then_some(Tile::WORKGROUP)
}

/// Every tile that is a candidate for an operation at any number of rows on any device, each once.
pub fn all(operation: Operation) -> Vec<Tile> {
    let mut tiles = Vec::new();
    for rows in ROW_CLASSES.into_iter().chain([u32::MAX]) {
        for tile in candidates(operation, rows) {
            if !tiles.contains(&tile) {
                tiles.push(tile);
            }
        }
    }
    tiles
}

/// Compiles what [`tune`] measures, on all cores: a driver takes about a second for a large tile. What does not compile is found out when it is
/// measured.
fn compile(pipelines: &Pipelines, shape: ExpertShape) {
    let ExpertShape { experts, chosen, d_model, expert_width } = shape;
    let [e, a, d, f] = [experts, chosen, d_model, expert_width].map(|n| n as u32);
    let (gate_up, down) = (expert_gate_up::Params::plain(1, e, a, d, f), expert_down::Params::plain(1, e, d, f));
    let variant_of = |operation, tile: Tile| match operation {
        Operation::Matmul | Operation::NarrowMatmul => cooperative::matmul::kernel(Dtype::Bf16, tile, d),
        Operation::GateUp => (
            &cooperative::expert_gate_up::EXPERT_GATE_UP,
            cooperative::expert_gate_up::variant(Dtype::Bf16, tile, &gate_up, true),
        ),
        Operation::Down => {
            (&cooperative::expert_down::EXPERT_DOWN, cooperative::expert_down::variant(Dtype::Bf16, tile, &down, true))
        }
    };
    Operation::ALL
        .into_iter()
        .flat_map(|operation| {
            all(operation).into_iter().chain(in_spirv(pipelines.gpu(), operation)).map(move |tile| (operation, tile))
        })
        .par_bridge()
        .for_each(|(operation, tile)| {
            let (kernel, variant) = variant_of(operation, tile);
            let _ = pipelines.prepare(kernel, &variant);
        });
}

/// Tries every candidate on weights of bf16, at each class of rows, and returns the best ones and all that was tried. `progress` sees each.
pub fn tune(
    pipelines: &Pipelines,
    shape: ExpertShape,
    loads: &[f64],
    progress: &mut dyn FnMut(&Tried),
) -> Result<(Tiles, Vec<Tried>), MeasureError> {
    compile(pipelines, shape);
    let mut tiles = Tiles::default();
    let mut tried = Vec::new();
    let mut best_of = |operation: Operation,
                       rows: u32,
                       measure: &mut dyn FnMut(Tile) -> Result<Reading, MeasureError>|
     -> Result<(), MeasureError> {
        let mut best: Option<(f64, Tile)> = None;
        for tile in
            candidates(operation, rows).into_iter().chain(in_spirv(pipelines.gpu(), operation).filter(|_| rows > 64))
        {
            let seconds = match measure(tile) {
                Ok(reading) => Some(reading.seconds),
                Err(error) => {
                    // A lost device would fail them all.
                    pipelines.gpu().check()?;
                    tracing::warn!(%error, "a candidate is left out");
                    None
                }
            };
            let one = Tried { operation, rows, tile, seconds };
            progress(&one);
            tried.push(one);
            best = match (best, seconds) {
                (Some((least, _)), Some(seconds)) if seconds < least => Some((seconds, tile)),
                (None, Some(seconds)) => Some((seconds, tile)),
                (best, _) => best,
            };
        }
        if let Some((_, tile)) = best {
            tiles.set(operation, rows, tile);
        }
        Ok(())
    };
    let classes = ROW_CLASSES.into_iter().chain([4 * ROW_CLASSES[ROW_CLASSES.len() - 1]]);
    let most = 4 * ROW_CLASSES[ROW_CLASSES.len() - 1] as usize;
    for (operation, n_out) in [(Operation::Matmul, 2 * NARROW as usize), (Operation::NarrowMatmul, NARROW as usize / 3)]
    {
        let dense = Dense::new(pipelines, (n_out, shape.d_model), Dtype::Bf16, most, 256 << 20)?;
        for rows in classes.clone() {
            best_of(operation, rows, &mut |tile| dense.measure(Some(tile), rows as usize))?;
        }
    }
    let per_expert = |rows: u32| rows as usize * shape.experts / shape.chosen;
    let experts = Experts::new(pipelines, shape, Dtype::Bf16, per_expert(most as u32))?;
    for rows in classes {
        let routing = experts.route(per_expert(rows), loads)?;
        best_of(Operation::GateUp, rows, &mut |tile| experts.measure_gate_up(Some(tile), per_expert(rows), &routing))?;
        best_of(Operation::Down, rows, &mut |tile| experts.measure_down(Some(tile), per_expert(rows), &routing))?;
    }
    Ok((tiles, tried))
}
