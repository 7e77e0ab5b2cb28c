//! Which [`Tile`] each product takes on a device: candidates tried once ([`tune`]), the choice kept in the user's cache folder with what the
//! losers took. Without one, [`Tiles::default`] has what was best on an NVIDIA H100
//! or H200.
//!
//! A tile changes time and never bits, so this needs no say in what is computed.

pub mod attention;
pub mod candidates;
pub mod layer;
pub mod measure;

use std::path::PathBuf;

use crate::gpu::{AdapterSummary, Gpu};
use crate::kernels::cooperative::Tile;
use crate::profile::cache_folder;

pub use candidates::{Tried, tune};

/// A matrix product that has tiles to choose from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// A dense matrix of at least [`NARROW`] outputs.
    Matmul,
    /// One of fewer: keys, values, routers.
    NarrowMatmul,
    /// Both halves of the first step of an expert.
    GateUp,
    /// An expert's second step.
    Down,
}

impl Operation {
    pub const ALL: [Operation; 4] = [Operation::Matmul, Operation::NarrowMatmul, Operation::GateUp, Operation::Down];

    pub fn name(self) -> &'static str {
        match self {
            Operation::Matmul => "matmul",
            Operation::NarrowMatmul => "narrow matmul",
            Operation::GateUp => "expert gate+up",
            Operation::Down => "expert down",
        }
    }
}

/// From so many outputs on a dense matrix fills a device with tiles of many columns.
pub const NARROW: u32 = 3072;

/// Products of up to so many rows (of an expert, on average) take one tile; more rows than the last take another.
pub const ROW_CLASSES: [u32; 5] = [8, 16, 32, 64, 256];

/// Experts with at most so many rows on average may take tiles that read [rows by expert](Tile::takes_rows_by_expert): room is kept for those.
pub const BY_EXPERT_ROWS: u32 = 64;

/// A tile for every operation and class of rows.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Tiles {
    /// By [`Operation`], then by class.
    tiles: [[Tile; ROW_CLASSES.len() + 1]; 4],
}

/// Where among [`ROW_CLASSES`] so many rows belong.
fn class(rows: u32) -> usize {
    ROW_CLASSES.iter().position(|most| rows <= *most).unwrap_or(ROW_CLASSES.len())
}

/// Tiles that take rows by expert are for few of them.
fn is_allowed(operation: Operation, class: usize, tile: Tile) -> bool {
    let few = ROW_CLASSES.get(class).is_some_and(|most| *most <= BY_EXPERT_ROWS);
    !tile.takes_rows_by_expert() || few && matches!(operation, Operation::GateUp | Operation::Down)
}

impl Tiles {
    pub fn get(&self, operation: Operation, rows: u32) -> Tile {
        self.tiles[operation as usize][class(rows)]
    }

    /// By class.
    pub fn all(&self, operation: Operation) -> [Tile; ROW_CLASSES.len() + 1] {
        self.tiles[operation as usize]
    }

    pub fn set(&mut self, operation: Operation, rows: u32, tile: Tile) {
        self.tiles[operation as usize][class(rows)] = tile;
    }

    /// One tile for gate and up, one for down, and one for every other product, whatever the rows; more than [`BY_EXPERT_ROWS`] keep the
    /// default's where the tile takes rows by expert.
    pub fn forced(gate_up: Tile, down: Tile, other: Tile) -> Self {
        let mut tiles = Self::default();
        for (operation, tile) in Operation::ALL.into_iter().zip([other, other, gate_up, down]) {
            let classes = &mut tiles.tiles[operation as usize];
            classes
                .iter_mut()
                .enumerate()
                .filter(|(i, _)| is_allowed(operation, *i, tile))
                .for_each(|(_, kept)| *kept = tile);
        }
        tiles
    }

    /// None needs what `gpu` lacks, or was opened without.
    pub fn run_on(&self, gpu: &Gpu) -> bool {
        gpu.workgroup_matrices() || !self.tiles.iter().flatten().any(|tile| tile.workgroup)
    }

    /// Kernels can run them all.
    fn are_possible(&self) -> bool {
        Operation::ALL.iter().all(|operation| {
            let matrices = if *operation == Operation::GateUp { 2 } else { 1 };
            let dense = matches!(operation, Operation::Matmul | Operation::NarrowMatmul);
            let mut classes = self.tiles[*operation as usize].iter().enumerate();
            classes.all(|(i, tile)| {
                tile.is_possible(matrices) && is_allowed(*operation, i, *tile) && (dense || !tile.workgroup)
            })
        })
    }

    /// Of a dense matrix with `n_out` outputs.
    pub fn matmul(&self, rows: u32, n_out: u32) -> Tile {
        self.get(if n_out < NARROW { Operation::NarrowMatmul } else { Operation::Matmul }, rows)
    }

    /// For `rows` rows of an expert on average.
    pub fn gate_up(&self, rows: u32) -> Tile {
        self.get(Operation::GateUp, rows)
    }

    pub fn down(&self, rows: u32) -> Tile {
        self.get(Operation::Down, rows)
    }

    /// The choice kept for this device, else the defaults.
    pub fn for_device(gpu: &Gpu) -> Self {
        match Kept::read(gpu.summary()) {
            Ok(Some(kept)) if kept.tiles.run_on(gpu) => kept.tiles,
            Ok(_) => Self::default(),
            Err(error) => {
                tracing::warn!(%error, "the kept tiles are left aside: run `fulmen bench kernels --retune`");
                Self::default()
            }
        }
    }
}

impl Default for Tiles {
    fn default() -> Self {
        let t = Tile::new;
        let wide = |tile| Tile { unit: 8, ..tile };
        let many = Tile::MANY;
        Self {
            tiles: [
                [
                    t(16, 32, 128, 16, 16),
                    t(16, 32, 128, 16, 16),
                    t(32, 32, 128, 16, 16),
                    t(64, 64, 128, 32, 32),
                    wide(t(128, 128, 64, 64, 32)),
                    many,
                ],
                [
                    t(16, 16, 256, 16, 16),
                    t(16, 16, 256, 16, 16),
                    t(32, 32, 256, 16, 16),
                    t(64, 32, 128, 32, 16),
                    t(64, 64, 128, 32, 32),
                    many,
                ],
                [
                    Tile::solo(16, 32, 128, 1),
                    Tile::solo(32, 16, 64, 1),
                    Tile::solo(48, 16, 64, 1),
                    Tile::direct(96, 64, 64, 48, 32),
                    wide(t(128, 128, 32, 64, 32)),
                    wide(t(128, 128, 32, 64, 32)),
                ],
                [
                    Tile::direct(16, 64, 128, 16, 16),
                    Tile::direct(32, 64, 128, 16, 32),
                    Tile::direct(48, 128, 64, 48, 32),
                    Tile::direct(80, 128, 64, 80, 32),
                    wide(t(128, 128, 64, 64, 32)),
                    wide(t(128, 128, 64, 64, 32)),
                ],
            ],
        }
    }
}

/// What [`tune`] found, with what else it tried: a file for each adapter and driver.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct Kept {
    pub adapter: String,
    pub driver: String,
    /// Of this crate: kernels change.
    pub version: String,
    pub tiles: Tiles,
    pub tried: Vec<Tried>,
}

/// What can be wrong with the file of [`Kept`].
#[derive(Debug, thiserror::Error)]
pub enum KeptError {
    #[error("there is no folder for caches: neither FULMEN_CACHE_DIR nor XDG_CACHE_HOME nor HOME is set")]
    NoFolder,
    #[error("{}: {cause}", path.display())]
    Io { path: PathBuf, cause: std::io::Error },
    #[error("{}: {cause}", path.display())]
    Json { path: PathBuf, cause: serde_json::Error },
}

impl Kept {
    pub fn new(summary: &AdapterSummary, tiles: Tiles, tried: Vec<Tried>) -> Self {
        let (adapter, driver) = (summary.name.clone(), summary.driver.clone());
        Self { adapter, driver, version: env!("CARGO_PKG_VERSION").to_owned(), tiles, tried }
    }

    /// In `tiles` below the folder for caches.
    pub fn path(summary: &AdapterSummary) -> Result<PathBuf, KeptError> {
        let folder = cache_folder().ok_or(KeptError::NoFolder)?;
        let name = format!("{} {}", summary.name, summary.driver);
        let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
        let word: String = name.chars().map(plain).take(120).collect();
        Ok(folder.join("tiles").join(format!("{word}.json")))
    }

    /// None where nothing (or nothing that could run) was kept for this adapter, driver and version.
    pub fn read(summary: &AdapterSummary) -> Result<Option<Self>, KeptError> {
        let Ok(path) = Self::path(summary) else { return Ok(None) };
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(cause) => return Err(KeptError::Io { path, cause }),
        };
        let kept: Kept = serde_json::from_str(&text).map_err(|cause| KeptError::Json { path, cause })?;
        let same = (kept.adapter.as_str(), kept.driver.as_str(), kept.version.as_str())
            == (summary.name.as_str(), summary.driver.as_str(), env!("CARGO_PKG_VERSION"));
        Ok((same && kept.tiles.are_possible()).then_some(kept))
    }

    /// Returns where.
    pub fn write(&self, summary: &AdapterSummary) -> Result<PathBuf, KeptError> {
        let path = Self::path(summary)?;
        let io = |cause| KeptError::Io { path: path.clone(), cause };
        std::fs::create_dir_all(path.parent().expect("it lies in a folder")).map_err(io)?;
        let text = serde_json::to_string_pretty(self).expect("plain data");
        // First beside it: whoever reads meanwhile sees the old one or the new one.
        let beside = path.with_extension(format!("{}.part", std::process::id()));
        std::fs::write(&beside, text).map_err(io)?;
        std::fs::rename(&beside, &path).map_err(io)?;
        Ok(path)
    }
}
