//! The text of a kernel on cooperative matrices: one loop for all of them, unrolled for a [`Tile`].
//!
//! A workgroup computes `rows x cols` outputs (`cols` of each matrix where it multiplies with two). For every `depth` terms of the
//! sums it lays its rows and its weights, as f16, into workgroup memory; every subgroup then multiplies its own
//! `subgroup_rows x subgroup_cols` of them, 16 terms at a time. While it does, what the next step needs is on its way to registers.
//!
//! A [direct](Tile::direct) one, for experts of few rows, lays weights alone: rows lie in memory as the fragments that matrices are loaded
//! from, and come from the cache that workgroups share, a step ahead too. What a workgroup takes of its memory decides how many of them
//! have loads on their way beside each other, and weights are what is to come at the rate of memory.
//!
//! **Order of summation**: an output is one accumulator, `acc = x[k..k + 16] * w[k..k + 16] + acc` with k ascending from 0, whatever the
//! tile, so a tile changes time and never bits. Terms past the end are zeros.
//!
//! Weights become f16 on their way: f16 ones as they are; bf16 and f32 ones rounded to nearest, so that those above f16's greatest number
//! (65,504) are infinite, and those below its normal ones (2^-14) are off by up to 2^-25, or by up to 2^-14 where a device flushes
//! them to 0.

use crate::checkpoint::Dtype;
use crate::gpu::{Kernel, Variant};
use crate::kernels::slabs::{self, N_SLABS};

use super::Tile;

/// Most workgroup memory that sums on their way out take.
pub(super) const SUMS_BYTES: u32 = 4 << 10;

/// Where a kernel's weights are.
pub(super) enum Weights {
    /// One matrix, at this binding.
    Whole(usize),
    /// Of experts: matrices by name, each in slabs from a binding on.
    Slabs(&'static [(&'static str, usize)]),
}

/// What one kernel puts into the text.
pub(super) struct Operation {
    pub weights: Weights,
    /// Bindings, parameters, `finish` and what it says about rows and columns.
    pub text: &'static str,
}

impl Operation {
    pub fn matrices(&self) -> usize {
        match self.weights {
            Weights::Whole(_) => 1,
            Weights::Slabs(matrices) => matrices.len(),
        }
    }
}

pub(super) struct Writer<'a> {
    pub operation: &'a Operation,
    pub tile: Tile,
    dtype: Dtype,
    /// Terms that a lane loads together, 4 or 8; they are stored by fours.
    pub unit: u32,
    /// Rows of weights are contiguous, and every unit of them starts at a multiple of its size.
    pub wide: bool,
    /// The number of terms is no multiple of the depth.
    pub tail: bool,
    /// Where experts' weights are, in the text being written.
    pub slab: usize,
    out: String,
}

/// The whole text of `variant`.
pub(super) fn source(kernel: &Kernel, operation: &Operation, variant: &Variant) -> String {
    let mut writer = Writer {
        operation,
        tile: Tile::of(kernel, variant),
        dtype: variant.weights,
        unit: kernel.tunable(variant, "UNIT"),
        wide: kernel.tunable(variant, "WIDE") == 1,
        tail: kernel.tunable(variant, "TAIL") == 1,
        slab: 0,
        out: String::new(),
    };
    match writer.tile.is_solo() {
        true => writer.solo(),
        false => writer.all(),
    }
    writer.out
}

/// Statements over `for_each(i)` of `n` items spread over lanes, those of the last round under a condition where they do not fill it.
fn rounds(items: u32, lanes: u32) -> Vec<(u32, bool)> {
    (0..items.div_ceil(lanes)).map(|i| (i, (i + 1) * lanes > items)).collect()
}

impl Writer<'_> {
    pub(super) fn line(&mut self, text: impl AsRef<str>) {
        self.out.push_str(text.as_ref());
        self.out.push('\n');
    }

    fn lanes(&self) -> u32 {
        self.tile.subgroups() * 32
    }

    /// Units of a row of a step.
    pub(super) fn row_units(&self) -> u32 {
        self.tile.depth / self.unit
    }

    /// `vec4<f16>` from one row of a tile to the next.
    pub(super) fn pitch(&self) -> u32 {
        self.tile.depth / 4 + self.tile.pad
    }

    /// None where rows come as fragments.
    fn x_units(&self) -> u32 {
        if self.tile.direct { 0 } else { self.tile.rows * self.row_units() }
    }

    /// Of one matrix.
    fn w_units(&self) -> u32 {
        self.tile.cols * self.row_units()
    }

    fn x_tile_len(&self) -> u32 {
        if self.tile.direct { 0 } else { self.tile.rows * self.pitch() }
    }

    fn w_tile_len(&self) -> u32 {
        self.tile.cols * self.operation.matrices() as u32 * self.pitch()
    }

    /// How many subgroups' sums, and how many column fragments of each, lie in workgroup memory at a time: few, for what a workgroup
    /// takes of that memory decides how many of them run beside each other.
    fn sums_shape(&self) -> (u32, u32) {
        let matrices = self.operation.matrices() as u32;
        let divisor = |of: u32, most: u32| (1..=most.max(1)).rev().find(|n| of.is_multiple_of(*n)).expect("1 divides");
        let fragments = divisor(self.tile.subgroup_cols / 16, 2 / matrices);
        (divisor(self.tile.computing(), SUMS_BYTES / (fragments * matrices * 1024)), fragments)
    }

    /// Words of a unit of weights.
    pub(super) fn unit_words(&self) -> u32 {
        if self.dtype == Dtype::F32 { self.unit } else { self.unit / 2 }
    }

    /// A unit of weights in registers.
    pub(super) fn staged(&self) -> &'static str {
        match (self.wide, self.dtype) {
            (true, Dtype::Bf16) if self.unit == 4 => "vec2<u32>",
            (true, Dtype::F32) => "vec4<u32>",
            (true, _) if self.unit == 8 => "vec4<u32>",
            _ => "vec4<f16>",
        }
    }

    /// A unit of rows in registers.
    fn staged_x(&self) -> &'static str {
        if self.unit == 8 { "vec4<u32>" } else { "vec4<f16>" }
    }

    fn all(&mut self) {
        let by_expert = matches!(self.operation.weights, Weights::Slabs(_));
        assert!(by_expert || !self.tile.direct, "only experts have rows as fragments");
        // Rows come in units too, or as fragments.
        self.head(if self.tile.direct { "vec4<f16>" } else { self.staged_x() });
        let buffers = self.tile.buffers;
        let (x_len, w_len) = (buffers * self.x_tile_len(), buffers * self.w_tile_len());
        if x_len > 0 {
            self.line(format!("var<workgroup> x_tile: array<vec4<f16>, {x_len}>;"));
        }
        self.line(format!("var<workgroup> w_tile: array<vec4<f16>, {w_len}>;"));
        let (slots, fragments) = self.sums_shape();
        let sums = slots * fragments * self.operation.matrices() as u32 * 256;
        self.line(format!("var<workgroup> sums: array<f32, {sums}>;"));
        self.line(format!(
            "@compute @workgroup_size({})\nfn main(@builtin(workgroup_id) grid: vec3<u32>, \
             @builtin(local_invocation_index) lane: u32) {{",
            self.lanes()
        ));
        // Neighbours have the same columns and other rows, or the same rows where those come from the cache.
        self.line(if self.tile.direct { "let workgroup = grid.yx;" } else { "let workgroup = grid.xy;" });
        self.rows_of_tile();
        self.start_of_units();
        self.main_loop();
        self.finish();
        self.line("}");
    }

    /// All that stands before the variables of a workgroup, with rows of `element`.
    pub(super) fn head(&mut self, element: &str) {
        let (Tile { rows, cols, .. }, by_expert) = (self.tile, self.tile.takes_rows_by_expert());
        self.line("enable f16;\nenable wgpu_cooperative_matrix;");
        self.line(format!("const TILE_ROWS: u32 = {rows}u;\nconst TILE_COLS: u32 = {cols}u;"));
        self.line(format!("const ROWS_BY_POSITION: bool = {by_expert};"));
        if by_expert {
            self.line(include_str!("../../../shaders/shared/expert_groups.wgsl"));
        }
        let rows = "x: array<vec4<f16>>";
        assert!(self.operation.text.contains(rows), "the rows are vec4<f16>");
        self.line(self.operation.text.replace(rows, &format!("x: array<{element}>")));
        self.bindings();
        if let Weights::Slabs(_) = self.operation.weights {
            self.line(include_str!("../../../shaders/shared/expert_tile.wgsl"));
            if self.operation.matrices() == 2 {
                self.line(include_str!("../../../shaders/shared/expert_activation.wgsl"));
            }
            self.line("var<workgroup> tile: RowTile;");
        }
    }

    fn bindings(&mut self) {
        let element = if self.wide { self.staged() } else { "u32" };
        match self.operation.weights {
            Weights::Whole(binding) => {
                self.line(format!("@group(0) @binding({binding}) var<storage, read> w: array<{element}>;"));
                if !self.wide {
                    self.line(slabs::element_quad("w").replace("params.k_stride", "1u"));
                    self.line("fn w_words(slab: u32, i: u32, j: u32) -> vec2<u32> { return vec2(w[i], w[j]); }");
                }
            }
            Weights::Slabs(matrices) => {
                for (name, first) in matrices {
                    if !self.wide {
                        self.line(slabs::accessor(name, *first, self.dtype));
                        continue;
                    }
                    for slab in 0..N_SLABS {
                        let binding = first + slab;
                        self.line(format!(
                            "@group(0) @binding({binding}) var<storage, read> {name}_slab_{slab}: array<{element}>;"
                        ));
                    }
                }
            }
        }
        if !self.wide {
            self.line(match self.dtype {
                Dtype::Bf16 => include_str!("../../../shaders/shared/weight_bf16.wgsl"),
                Dtype::F16 => include_str!("../../../shaders/shared/weight_f16.wgsl"),
                Dtype::F32 => include_str!("../../../shaders/shared/weight_f32.wgsl"),
                Dtype::Mxfp4 => include_str!("../../../shaders/shared/weight_mxfp4.wgsl"),
            });
        }
        if self.unit == 8 {
            self.line(
                "fn f16s(a: vec2<u32>) -> vec4<f16> { return vec4<f16>(vec4(unpack2x16float(a.x), unpack2x16float(a.y))); }",
            );
        }
        if self.wide && self.dtype == Dtype::Bf16 {
            self.line(
                "fn halves(a: vec2<u32>) -> vec4<f16> {\n    return vec4<f16>(bitcast<vec4<f32>>(vec4(a.x << 16u, a.x & \
                 0xffff0000u, a.y << 16u, a.y & 0xffff0000u)));\n}",
            );
        }
    }

    /// `first_row`, `end_row`, `first_col`, and the end of those without work.
    pub(super) fn rows_of_tile(&mut self) {
        match self.operation.weights {
            Weights::Whole(_) => {
                self.line("let first_row = workgroup.x * TILE_ROWS;");
                self.line("let end_row = min(first_row + TILE_ROWS, params.n_rows);");
            }
            Weights::Slabs(_) => {
                self.line("if lane == 0u { tile = row_tile(workgroup.x); }\nworkgroupBarrier();");
                self.line("let first_row = tile.first;\nlet end_row = tile.end;\nlet place = tile.place;");
                self.line("if first_row >= end_row { return; }");
            }
        }
        self.line("let first_col = workgroup.y * TILE_COLS;\nlet n_terms = terms();");
        if self.wide {
            self.line(format!("let n_units = n_terms / {}u;", self.unit));
        }
    }

    /// Where each lane's units start: `a<i>` of x, `<matrix><i>` of weights. Rows and columns past the end repeat the last
    /// one: what comes of them is not stored.
    fn start_of_units(&mut self) {
        let (units, unit, lanes) = (self.row_units(), self.unit, self.lanes());
        let row_of = match self.operation.weights {
            Weights::Whole(_) => "row",
            Weights::Slabs(_) => "x_row(row)",
        };
        // As rows of f16 are padded.
        self.line(format!("let x_pitch = (n_terms + 255u) / 256u * {}u;", 256 / self.unit));
        for (i, _) in rounds(self.x_units(), lanes) {
            let item = format!("(lane + {}u)", i * lanes);
            self.line(format!("var a{i} = 0u;\n{{ let row = min(first_row + {item} / {units}u, end_row - 1u);"));
            self.line(format!("a{i} = {row_of} * x_pitch + {item} % {units}u; }}\nvar x{i}: {};", self.staged_x()));
        }
        let kind = self.staged();
        for name in self.matrix_names() {
            for (i, _) in rounds(self.w_units(), lanes) {
                let item = format!("(lane + {}u)", i * lanes);
                let column = format!("min(first_col + {item} / {units}u, columns() - 1u)");
                let first = if name == "up" { " + params.up_first" } else { "" };
                let start = match (self.wide, &self.operation.weights) {
                    (true, Weights::Whole(_)) => format!("{column} * (row_stride() / {unit}u)"),
                    (true, Weights::Slabs(_)) => {
                        let words = self.unit_words();
                        format!("place.y / {words}u + ({column} * row_stride(){first}) / {unit}u")
                    }
                    (false, _) => format!("{column} * row_stride(){first}"),
                };
                self.line(format!("let {name}_start{i} = {start};\nvar {name}{i}: {kind};"));
            }
        }
        self.line("let subgroup = lane / 32u;");
        let across = self.tile.cols / self.tile.subgroup_cols;
        let computing = self.tile.computing();
        self.line(format!("let place_of_subgroup = subgroup % {computing}u;"));
        let (rows, cols) = (self.tile.subgroup_rows, self.tile.subgroup_cols);
        self.line(format!("let own_row = place_of_subgroup / {across}u * {rows}u;"));
        self.line(format!("let own_col = place_of_subgroup % {across}u * {cols}u;"));
        let pitch = self.pitch();
        self.line(format!("let x_from = own_row * {pitch}u;\nlet w_from = own_col * {pitch}u;"));
        if self.tile.direct {
            self.start_of_fragments("own_row");
        }
    }

    /// Where each fragment of a subgroup's rows starts, from row `own` of the tile on: `x_start<r>`.
    pub(super) fn start_of_fragments(&mut self, own: &str) {
        // Of a group of rows, in vec4<f16>.
        self.line("let group_pitch = (n_terms + 255u) / 256u * 1024u;");
        self.line(format!("let group = first_group(tile.expert) + (first_row + {own} - offsets[tile.expert]) / 16u;"));
        self.line("let last_group = params.n_assignments / 16u + params.n_experts - 1u;");
        for r in 0..self.row_fragments() {
            // Fragments beyond the expert's rows have others' or none: what comes of them is not stored.
            self.line(format!("let x_start{r} = min(group + {r}u, last_group) * group_pitch;"));
        }
    }

    /// Of a subgroup.
    pub(super) fn row_fragments(&self) -> u32 {
        self.tile.subgroup_rows / 16
    }

    /// Loads the rows' fragments number `step` of those from term `k` on, as `<name><step>_<r>`.
    pub(super) fn load_fragments(&mut self, name: &str, step: u32, k: &str) {
        for r in 0..self.row_fragments() {
            let at = format!("x_start{r} + {k} * 4u + {}u", step * 64);
            self.line(format!("{name}{step}_{r} = coopLoadT<coop_mat16x16<f16, A>>(&x[{at}], 4u);"));
        }
    }

    pub(super) fn matrix_names(&self) -> Vec<String> {
        match self.operation.weights {
            Weights::Whole(_) => vec!["w".to_owned()],
            Weights::Slabs(matrices) => matrices.iter().map(|(name, _)| (*name).to_owned()).collect(),
        }
    }

    /// Starts the loads of the step at term `k`.
    fn load(&mut self, k: &str) {
        let (units, unit, lanes) = (self.row_units(), self.unit, self.lanes());
        for (i, partial) in rounds(self.x_units(), lanes) {
            self.under(partial, i, self.x_units(), &format!("x{i} = x[a{i} + {k} / {unit}u];"));
        }
        for name in self.matrix_names() {
            if !self.wide {
                let (place, step) = match self.operation.weights {
                    Weights::Whole(_) => ("vec2(0u)".to_owned(), ""),
                    Weights::Slabs(_) => (format!("vec2({}u, place.y)", self.slab), " * params.k_stride"),
                };
                for (i, partial) in rounds(self.w_units(), lanes) {
                    let text = format!(
                        "{{ let k = {k} + (lane + {}u) % {units}u * 4u; {name}{i} = vec4<f16>(0.0); if k < n_terms {{ \
                         {name}{i} = vec4<f16>({name}_quad({place}, {name}_start{i} + k{step}, n_terms - k)); }} }}",
                        i * lanes
                    );
                    self.under(partial, i, self.w_units(), &text);
                }
                continue;
            }
            for (i, _) in rounds(self.w_units(), lanes) {
                let own = format!("{k} / {unit}u + (lane + {}u) % {units}u", i * lanes);
                let unit = if self.tail { format!("min({own}, n_units - 1u)") } else { own };
                self.line(format!("let {name}_at{i} = {name}_start{i} + {unit};"));
            }
            let from = match self.operation.weights {
                Weights::Whole(_) => name.clone(),
                Weights::Slabs(_) => format!("{name}_slab_{}", self.slab),
            };
            for (i, partial) in rounds(self.w_units(), lanes) {
                self.under(partial, i, self.w_units(), &format!("{name}{i} = {from}[{name}_at{i}];"));
            }
        }
    }

    /// `text`, for the lanes that have an item in round `i`.
    fn under(&mut self, partial: bool, i: u32, items: u32, text: &str) {
        match partial {
            true => self.line(format!("if lane + {}u < {items}u {{ {text} }}", i * self.lanes())),
            false => self.line(text),
        }
    }

    /// The fours of f16 that a loaded unit becomes.
    pub(super) fn fours(&self, name: &str, of_weights: bool) -> Vec<String> {
        let halves = |function: &str| ["xy", "zw"].map(|half| format!("{function}({name}.{half})")).to_vec();
        match (of_weights, self.wide, self.dtype, self.unit) {
            (true, true, Dtype::Bf16, 8) => halves("halves"),
            (_, _, _, 8) => halves("f16s"),
            (true, true, Dtype::Bf16, _) => vec![format!("halves({name})")],
            (true, true, Dtype::F32, _) => vec![format!("vec4<f16>(bitcast<vec4<f32>>({name}))")],
            _ => vec![name.to_owned()],
        }
    }

    /// Lays the loaded step, at term `k`, into tile `buffer` (an expression, 0 or 1).
    fn store(&mut self, k: &str, buffer: Option<&str>) {
        let (units, pitch, lanes, fours) = (self.row_units(), self.pitch(), self.lanes(), self.unit / 4);
        let offset = |len: u32| buffer.map_or(String::new(), |b| format!(" + {b} * {len}u"));
        let put = |tile: &str, first: u32, len: u32, i: u32, values: &[String]| {
            let item = format!("(lane + {}u)", i * lanes);
            let at = format!("{first}u + {item} / {units}u * {pitch}u + {item} % {units}u * {fours}u{}", offset(len));
            match values {
                [value] => format!("{tile}[{at}] = {value};"),
                [low, high] => format!("{{ let at = {at}; {tile}[at] = {low}; {tile}[at + 1u] = {high}; }}"),
                _ => unreachable!("a unit is one or two fours"),
            }
        };
        for (i, partial) in rounds(self.x_units(), lanes) {
            let text = put("x_tile", 0, self.x_tile_len(), i, &self.fours(&format!("x{i}"), false));
            self.under(partial, i, self.x_units(), &text);
        }
        for (m, name) in self.matrix_names().iter().enumerate() {
            let first = m as u32 * self.tile.cols * pitch;
            for (i, partial) in rounds(self.w_units(), lanes) {
                let mut values = self.fours(&format!("{name}{i}"), true);
                if self.wide && self.tail {
                    let there = format!("{k} / {}u + (lane + {}u) % {units}u < n_units", self.unit, i * lanes);
                    values.iter_mut().for_each(|value| *value = format!("select(vec4<f16>(0.0), {value}, {there})"));
                }
                let text = put("w_tile", first, self.w_tile_len(), i, &values);
                self.under(partial, i, self.w_units(), &text);
            }
        }
    }

    /// (matrix, row fragment, column fragment) of every accumulator of a subgroup.
    fn accumulators(&self) -> Vec<(usize, u32, u32)> {
        let (rows, cols) = (self.tile.subgroup_rows / 16, self.tile.subgroup_cols / 16);
        (0..self.operation.matrices())
            .flat_map(|m| (0..rows).flat_map(move |r| (0..cols).map(move |c| (m, r, c))))
            .collect()
    }

    /// Multiplies what lies in tile `buffer`.
    fn multiply(&mut self, buffer: Option<&str>) {
        let pitch = self.pitch();
        let (rows, cols) = (self.tile.subgroup_rows / 16, self.tile.subgroup_cols / 16);
        let (x_len, w_len) = (self.x_tile_len(), self.w_tile_len());
        let offset = |len: u32| buffer.map_or(String::new(), |b| format!(" + {b} * {len}u"));
        for step in 0..self.tile.depth / 16 {
            self.line("{");
            let from_tile = if self.tile.direct { 0 } else { rows };
            for r in 0..from_tile {
                let at = r * 16 * pitch + step * 4;
                let base = offset(x_len);
                self.line(format!(
                    "let fx{step}_{r} = coopLoadT<coop_mat16x16<f16, A>>(&x_tile[x_from + {at}u{base}], {pitch}u);"
                ));
            }
            for m in 0..self.operation.matrices() {
                for c in 0..cols {
                    let at = (m as u32 * self.tile.cols + c * 16) * pitch + step * 4;
                    let base = offset(w_len);
                    self.line(format!(
                        "let fw{m}_{c} = coopLoad<coop_mat16x16<f16, B>>(&w_tile[w_from + {at}u{base}], {pitch}u);"
                    ));
                    for r in 0..rows {
                        self.line(format!(
                            "acc{m}_{r}_{c} = coopMultiplyAdd(fx{step}_{r}, fw{m}_{c}, acc{m}_{r}_{c});"
                        ));
                    }
                }
            }
            self.line("}");
        }
    }

    fn main_loop(&mut self) {
        for (m, r, c) in self.accumulators() {
            self.line(format!("var acc{m}_{r}_{c} = coop_mat16x16<f32, C>();"));
        }
        match self.operation.weights {
            Weights::Whole(_) => self.steps(),
            Weights::Slabs(_) => self.for_each_slab(Self::steps),
        }
    }

    /// A loop for each slab. With the choice at every load a third of the time is lost on an H200: loads no longer run beside products, so
    /// it seems.
    pub(super) fn for_each_slab(&mut self, steps: fn(&mut Self)) {
        self.line("switch place.x {");
        for slab in 0..N_SLABS {
            // The last one is the default, for a switch needs one.
            let label = if slab + 1 == N_SLABS { "default".to_owned() } else { format!("case {slab}u") };
            self.line(format!("{label}: {{"));
            self.slab = slab;
            steps(self);
            self.line("}");
        }
        self.line("}");
    }

    /// Every step of the sums.
    fn steps(&mut self) {
        let depth = self.tile.depth;
        match (self.tile.buffers, self.tile.prefetch) {
            (1, false) => {
                self.line(format!("for (var k0 = 0u; k0 < n_terms; k0 += {depth}u) {{"));
                self.load("k0");
                self.store("k0", None);
                self.line("workgroupBarrier();");
                self.multiply(None);
                self.line("workgroupBarrier();\n}");
            }
            (1, true) => {
                self.line("{");
                self.load("0u");
                self.line("}\n{");
                let steps = if self.tile.direct { 0..depth / 16 } else { 0..0 };
                steps.clone().for_each(|step| self.load_fragments("var next", step, "0u"));
                self.line(format!("for (var k0 = 0u; k0 < n_terms; k0 += {depth}u) {{"));
                self.store("k0", None);
                self.line(format!("workgroupBarrier();\nlet k1 = k0 + {depth}u;\nif k1 < n_terms {{"));
                self.load("k1");
                self.line("}");
                // Fragments too, or each step waits for them. Not in the branch, where no matrix may be loaded: after the last step
                // the same ones again.
                self.line("let k_next = select(k0, k1, k1 < n_terms);");
                for step in steps {
                    for r in 0..self.row_fragments() {
                        self.line(format!("let fx{step}_{r} = next{step}_{r};"));
                    }
                    self.load_fragments("next", step, "k_next");
                }
                self.multiply(None);
                self.line("workgroupBarrier();\n}\n}");
            }
            _ => {
                self.line("{");
                self.load("0u");
                self.line("}");
                self.store("0u", Some("0u"));
                self.line(format!(
                    "workgroupBarrier();\nvar now = 0u;\nfor (var k0 = 0u; k0 < n_terms; k0 += {depth}u) {{"
                ));
                self.line(format!("let k1 = k0 + {depth}u;\nif k1 < n_terms {{"));
                self.load("k1");
                self.line("}");
                self.multiply(Some("now"));
                self.line("now = 1u - now;");
                self.store("k1", Some("now"));
                self.line("workgroupBarrier();\n}");
            }
        }
    }

    /// Sums to workgroup memory, those of a few fragments at a time, and from there to `finish`.
    fn finish(&mut self) {
        let (slots, fragments) = self.sums_shape();
        let matrices = self.operation.matrices() as u32;
        let width = fragments * 16;
        let pitch = width * matrices;
        let across = self.tile.cols / self.tile.subgroup_cols;
        let (rows, cols) = (self.tile.subgroup_rows, self.tile.subgroup_cols);
        for first_subgroup in (0..self.tile.computing()).step_by(slots as usize) {
            for r in 0..rows / 16 {
                for first in (0..cols / 16).step_by(fragments as usize) {
                    // Subgroups that only load repeat others' products, and keep them to themselves.
                    self.line(format!("if subgroup >= {first_subgroup}u && subgroup < {}u {{", first_subgroup + slots));
                    self.line(format!("let out = (subgroup - {first_subgroup}u) * {}u;", 16 * pitch));
                    for m in 0..matrices {
                        for c in 0..fragments {
                            let at = (m * fragments + c) * 16;
                            self.line(format!("coopStoreT(acc{m}_{r}_{}, &sums[out + {at}u], {pitch}u);", first + c));
                        }
                    }
                    self.line("}\nworkgroupBarrier();");
                    let (items, lanes) = (slots * 16 * width, self.lanes());
                    self.line(format!("for (var i = lane; i < {items}u; i += {lanes}u) {{"));
                    self.line(format!("let owner = {first_subgroup}u + i / {}u;", 16 * width));
                    self.line(format!(
                        "let row = first_row + owner / {across}u * {rows}u + {}u + i / {width}u % 16u;",
                        r * 16
                    ));
                    self.line(format!(
                        "let column = first_col + owner % {across}u * {cols}u + {}u + i % {width}u;",
                        first * 16
                    ));
                    self.line(format!("let at = i / {width}u * {pitch}u + i % {width}u;"));
                    let values: Vec<String> = (0..matrices).map(|m| format!("sums[at + {}u]", m * width)).collect();
                    self.line(format!(
                        "if row < end_row && column < columns() {{ finish(row, column, {}); }}\n}}\nworkgroupBarrier();",
                        values.join(", ")
                    ));
                }
            }
        }
    }
}
