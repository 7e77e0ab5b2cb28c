//! Matrix products and attention on cooperative matrices: operands f16, sums f32.
//!
//! In: rows that [`half_rows`](super::half_rows) made, weights as the checkpoint stores them. Out: what the portable kernels of the same
//! operation give, to f16's rounding of the operands. Only where [`Gpu::cooperative`](crate::gpu::Gpu::cooperative) says so.
//!
//! A [`Tile`] changes time and never bits (see `template`), so that one may be picked for every count of rows. Small ones read each
//! weight once, those of an expert with few rows near the rate of memory (see `solo`); large ones share weights and rows between many
//! products.
//!
//! One tile of dense products, [`Tile::WORKGROUP`], is no text of the template but SPIR-V, for adapters that hold matrices in a whole
//! workgroup ([`Gpu::workgroup_matrices`](crate::gpu::Gpu::workgroup_matrices)). Its bits are those of the others.

mod solo;
mod template;
mod unroll;

pub mod expert_down;
pub mod expert_gate_up;
pub mod matmul;
pub mod prompt_attention;

use crate::checkpoint::Dtype;
use crate::gpu::{Kernel, Variant};
use crate::kernels::slabs;

/// Every product on cooperative matrices, each cut into [`Tile`]s. Tests walk this list; [`prompt_attention`] is cut otherwise.
pub static ALL: &[&Kernel] = &[&matmul::MATMUL, &expert_gate_up::EXPERT_GATE_UP, &expert_down::EXPERT_DOWN];

/// Workgroup memory of the devices that have cooperative matrices.
const WORKGROUP_BYTES: u32 = 48 << 10;

/// How a kernel's work is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct Tile {
    /// Outputs of a workgroup. Where a kernel multiplies with two matrices, `cols` of each.
    pub rows: u32,
    pub cols: u32,
    /// Terms of each sum between two barriers.
    pub depth: u32,
    /// Outputs of a subgroup.
    pub subgroup_rows: u32,
    pub subgroup_cols: u32,
    /// At least so many subgroups: more than multiply, where loads need the lanes.
    pub least_subgroups: u32,
    /// Terms that a lane loads together, 4 or 8, of weights that allow it: of bf16 and f16 loads of 8 or 16 bytes.
    pub unit: u32,
    /// Units of 8 bytes between the rows of a tile in workgroup memory, against bank conflicts.
    pub pad: u32,
    /// The next step is on its way to registers while this one is multiplied.
    pub prefetch: bool,
    /// Tiles in workgroup memory: 2 save a barrier a step.
    pub buffers: u32,
    /// Of [`Tile::WORKGROUP`] alone.
    pub workgroup: bool,
    /// Not 0: one subgroup alone computes all of it, for experts of few rows. Rows by expert, as
    /// [`record_by_expert`](super::half_rows::record_by_expert) lays them out, are taken as fragments from memory, and weights go through
    /// workgroup memory, so many fragments of 16 columns between two barriers.
    pub solo: u32,
    /// Rows by expert are taken as fragments by several subgroups as well, and weights alone go through workgroup memory.
    pub direct: bool,
}

/// What a tile is to a kernel, with the defaults.
const TUNABLES: &[(&str, &[u32])] = &[
    ("ROWS", &[16]),
    ("COLS", &[64]),
    ("DEPTH", &[64]),
    ("SUBGROUP_ROWS", &[16]),
    ("SUBGROUP_COLS", &[16]),
    ("LEAST_SUBGROUPS", &[4]),
    ("UNIT", &[4]),
    ("PAD", &[2]),
    ("PREFETCH", &[1]),
    ("BUFFERS", &[1]),
    ("SOLO", &[0]),
    ("DIRECT", &[0]),
    ("WIDE", &[1]),
    ("TAIL", &[0]),
];

impl Tile {
    /// The tile of `shaders/spirv/matmul.comp`. Weights that it does not take are multiplied with [`Tile::MANY`].
    pub const WORKGROUP: Tile =
        Tile { pad: 0, prefetch: false, workgroup: true, unit: 8, ..Tile::new(128, 256, 64, 64, 64) };

    /// The best of the template's for many rows of a dense matrix on an H200.
    pub const MANY: Tile = Tile { unit: 8, ..Tile::new(128, 128, 64, 64, 32) };

    /// `rows x cols x depth` in subgroups of `subgroup_rows x subgroup_cols`.
    pub const fn new(rows: u32, cols: u32, depth: u32, subgroup_rows: u32, subgroup_cols: u32) -> Self {
        let least_subgroups = 4;
        let (unit, pad, prefetch, buffers, workgroup, solo, direct) = (4, 2, true, 1, false, 0, false);
        Self {
            rows,
            cols,
            depth,
            subgroup_rows,
            subgroup_cols,
            least_subgroups,
            unit,
            pad,
            prefetch,
            buffers,
            workgroup,
            solo,
            direct,
        }
    }

    /// `rows x cols` outputs of one subgroup, for experts: `depth` terms of `fragments` of columns between two barriers.
    pub const fn solo(rows: u32, cols: u32, depth: u32, fragments: u32) -> Self {
        Self { least_subgroups: 1, unit: 8, solo: fragments, ..Self::new(rows, cols, depth, rows, cols) }
    }

    /// The same of as many subgroups as that takes, each with `subgroup_rows x subgroup_cols` of all weights of a step.
    pub const fn direct(rows: u32, cols: u32, depth: u32, subgroup_rows: u32, subgroup_cols: u32) -> Self {
        let tile = Self::new(rows, cols, depth, subgroup_rows, subgroup_cols);
        Self { least_subgroups: 1, unit: 8, direct: true, ..tile }
    }

    /// One subgroup alone, with the text of `solo`.
    const fn is_solo(&self) -> bool {
        self.solo > 0
    }

    /// Takes rows by expert, of [`record_by_expert`](super::half_rows::record_by_expert).
    pub const fn takes_rows_by_expert(&self) -> bool {
        self.is_solo() || self.direct
    }

    /// Can be run by a kernel that multiplies with so many matrices: whole fragments everywhere, and no more workgroup memory than there is.
    /// NVIDIA's driver 580 takes a pipeline with more than that and hangs when it runs.
    pub fn is_possible(&self, matrices: u32) -> bool {
        if self.workgroup {
            return matrices == 1 && *self == Self::WORKGROUP;
        }
        let Self { rows, cols, depth, subgroup_rows, subgroup_cols, pad, buffers, .. } = *self;
        let whole = [subgroup_rows, subgroup_cols, depth].iter().all(|n| *n > 0 && n.is_multiple_of(16))
            && rows.is_multiple_of(subgroup_rows.max(1))
            && cols.is_multiple_of(subgroup_cols.max(1))
            && 256 % depth.max(1) == 0
            && [4, 8].contains(&self.unit)
            && pad.is_multiple_of(2) // rows of a tile start at multiples of 16 bytes
            && [rows, cols, buffers].iter().all(|n| (1..=1024).contains(n));
        let bytes = || match self.solo {
            1.. => solo::workgroup_bytes(self.solo, depth, pad),
            0 => {
                let rows = if self.direct { 0 } else { rows };
                8 * buffers * (rows + matrices * cols) * (depth / 4 + pad) + template::SUMS_BYTES
            }
        };
        let alone = || {
            let one = self.subgroups() == 1 && buffers == 1 && self.prefetch && !self.direct;
            !self.is_solo() || one && (matrices * cols / 16).is_multiple_of(self.solo)
        };
        let direct = || !self.direct || buffers == 1 && self.prefetch && self.subgroups() == self.computing();
        whole && alone() && direct() && (1..=32).contains(&self.subgroups()) && bytes() + 32 <= WORKGROUP_BYTES
    }

    fn of(kernel: &Kernel, variant: &Variant) -> Self {
        let get = |name| kernel.tunable(variant, name);
        Self {
            rows: get("ROWS"),
            cols: get("COLS"),
            depth: get("DEPTH"),
            subgroup_rows: get("SUBGROUP_ROWS"),
            subgroup_cols: get("SUBGROUP_COLS"),
            least_subgroups: get("LEAST_SUBGROUPS"),
            unit: get("UNIT"),
            pad: get("PAD"),
            prefetch: get("PREFETCH") == 1,
            buffers: get("BUFFERS"),
            workgroup: false,
            solo: get("SOLO"),
            direct: get("DIRECT") == 1,
        }
    }

    /// Subgroups that multiply.
    const fn computing(&self) -> u32 {
        self.rows / self.subgroup_rows * (self.cols / self.subgroup_cols)
    }

    /// Subgroups of a workgroup.
    pub const fn subgroups(&self) -> u32 {
        let computing = self.computing();
        if computing > self.least_subgroups { computing } else { self.least_subgroups }
    }

    /// The variant of a kernel with this tile. `wide`: rows of weights are contiguous, and every unit of terms starts at a multiple of its
    /// size; else they are taken by fours. `tail`: the number of terms is no multiple of the depth.
    pub fn variant(&self, weights: Dtype, wide: bool, tail: bool) -> Variant {
        let halves = matches!(weights, Dtype::Bf16 | Dtype::F16);
        Variant {
            weights,
            tunables: vec![
                ("ROWS", self.rows),
                ("COLS", self.cols),
                ("DEPTH", self.depth),
                ("SUBGROUP_ROWS", self.subgroup_rows),
                ("SUBGROUP_COLS", self.subgroup_cols),
                ("LEAST_SUBGROUPS", self.least_subgroups),
                ("UNIT", if wide && halves { self.unit } else { 4 }),
                ("PAD", self.pad),
                ("PREFETCH", self.prefetch as u32),
                ("BUFFERS", self.buffers),
                ("SOLO", self.solo),
                ("DIRECT", self.direct as u32),
                ("WIDE", wide as u32),
                ("TAIL", tail as u32),
            ],
        }
    }
}

impl std::fmt::Display for Tile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Tile { rows, cols, depth, subgroup_rows, subgroup_cols, unit, pad, .. } = self;
        if self.workgroup {
            return write!(f, "{rows}x{cols}x{depth} by the whole workgroup");
        }
        if self.is_solo() {
            return write!(f, "{rows}x{cols}x{depth} solo by {}, pad {pad}", self.solo);
        }
        write!(
            f,
            "{rows}x{cols}x{depth} by {subgroup_rows}x{subgroup_cols}, {} subgroups, units of {unit}, pad {pad}",
            self.subgroups()
        )?;
        if self.prefetch {
            write!(f, ", prefetch")?;
        }
        if self.buffers > 1 {
            write!(f, ", {} buffers", self.buffers)?;
        }
        if self.direct {
            write!(f, ", rows from memory")?;
        }
        Ok(())
    }
}

/// Workgroups of an operation over experts with `n_columns` outputs.
fn workgroups(tile: Tile, n_assignments: u32, n_experts: u32, n_columns: u32) -> [u32; 3] {
    let [row_tiles, column_tiles, one] = slabs::tiles([tile.rows, tile.cols], n_assignments, n_experts, n_columns);
    // Columns first where neighbours are to find the same rows in their cache.
    if tile.takes_rows_by_expert() { [column_tiles, row_tiles, one] } else { [row_tiles, column_tiles, one] }
}

/// The variant for weights of `n_terms` terms that lie as `strides` (row, k, first) say.
fn variant(weights: Dtype, tile: Tile, n_terms: u32, strides: [u32; 3], aligned_slots: bool) -> Variant {
    let unit = if is_wide(weights, 8, n_terms, strides, aligned_slots) { tile.unit } else { 4 };
    let wide = is_wide(weights, unit, n_terms, strides, aligned_slots);
    Tile { unit, ..tile }.variant(weights, wide, wide && !n_terms.is_multiple_of(tile.depth))
}

/// Rows of weights are contiguous, and every `unit` terms start at a multiple of their size.
fn is_wide(weights: Dtype, unit: u32, n_terms: u32, strides: [u32; 3], aligned_slots: bool) -> bool {
    let [row_stride, k_stride, first] = strides;
    let whole = [n_terms, row_stride, first].iter().all(|n| n.is_multiple_of(unit));
    weights != Dtype::Mxfp4 && aligned_slots && k_stride == 1 && whole
}
