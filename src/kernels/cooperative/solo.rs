//! The text of a kernel over experts of few rows, whose weights are to come at the rate of memory: one subgroup to a workgroup.
//!
//! Its tile is all rows of an expert, if they fit, and a few fragments of columns. There is nobody to wait for at a barrier, many such
//! workgroups share a multiprocessor, and each keeps the loads of a whole step in registers on their way: weights of a few fragments of
//! columns at a time are laid, as f16, into workgroup memory, then the loads of the next step into the registers that are free now are
//! begun, and then they are multiplied. Rows need no workgroup memory: they lie as fragments (see
//! [`record_by_expert`](crate::kernels::half_rows::record_by_expert)) and come from the cache that the workgroups share.
//!
//! The order of summation and what becomes of weights are those of [`template`](super::template).

use super::template::{Weights, Writer};

/// Of workgroup memory: weights of so many fragments of columns, and the sums of a fragment.
pub(super) const fn workgroup_bytes(fragments: u32, depth: u32, pad: u32) -> u32 {
    fragments * 16 * (depth / 4 + pad) * 8 + 16 * 16 * 4
}

/// Fragments of rows that a step keeps in registers where weights are laid in several parts. More are loaded anew for each part.
const KEPT_FRAGMENTS: u32 = 20;

/// One fragment of columns of one matrix.
#[derive(Clone, Copy)]
struct Group {
    matrix: usize,
    column: u32,
}

impl Writer<'_> {
    /// Loads of a lane for one group and step.
    fn loads(&self) -> u32 {
        16 * self.row_units() / 32
    }

    fn groups(&self) -> Vec<Group> {
        let columns = self.tile.cols / 16;
        let of = |matrix| (0..columns).map(move |column| Group { matrix, column });
        (0..self.operation.matrices()).flat_map(of).collect()
    }

    /// What the variables of a group begin with.
    fn prefix(&self, Group { matrix, column }: Group) -> String {
        format!("{}{column}", self.matrix_names()[matrix])
    }

    /// Those whose weights lie in workgroup memory together.
    fn parts(&self) -> Vec<Vec<Group>> {
        self.groups().chunks(self.tile.solo as usize).map(<[_]>::to_vec).collect()
    }

    fn rows_are_kept(&self) -> bool {
        self.parts().len() > 1 && self.row_fragments() * (self.tile.depth / 16) <= KEPT_FRAGMENTS
    }

    /// The whole text.
    pub(super) fn solo(&mut self) {
        assert!(matches!(self.operation.weights, Weights::Slabs(_)), "only experts have few rows of many matrices");
        self.head("vec4<f16>");
        self.line(format!("var<workgroup> w_tile: array<vec4<f16>, {}>;", self.tile.solo * 16 * self.pitch()));
        self.line("var<workgroup> sums: array<f32, 256>;");
        // Neighbours have the same rows and other columns.
        self.line(
            "@compute @workgroup_size(32)\nfn main(@builtin(workgroup_id) grid: vec3<u32>, \
             @builtin(local_invocation_index) lane: u32) {\nlet workgroup = grid.yx;",
        );
        self.rows_of_tile();
        self.starts();
        self.for_each_slab(Self::solo_steps);
        self.sums();
        self.line("}");
    }

    /// Where the rows' fragments and each lane's weights begin, and the accumulators.
    fn starts(&mut self) {
        let (units, unit) = (self.row_units(), self.unit);
        self.start_of_fragments("0u");
        let kind = self.staged();
        for group in self.groups() {
            let name = self.prefix(group);
            let first = if group.matrix == 1 { " + params.up_first" } else { "" };
            for i in 0..self.loads() {
                let item = format!("(lane + {}u)", i * 32);
                let column = format!("min(first_col + {}u + {item} / {units}u, columns() - 1u)", group.column * 16);
                let start = match self.wide {
                    true => {
                        let words = self.unit_words();
                        format!("place.y / {words}u + ({column} * row_stride(){first}) / {unit}u")
                    }
                    false => format!("{column} * row_stride(){first}"),
                };
                self.line(format!("let {name}_start{i} = {start};\nvar {name}_{i}: {kind};"));
            }
            for r in 0..self.row_fragments() {
                self.line(format!("var {name}_acc{r} = coop_mat16x16<f32, C>();"));
            }
        }
    }

    /// Starts the loads of a group's step at term `k`.
    fn load_group(&mut self, group: Group, k: &str) {
        let (name, matrix) = (self.prefix(group), self.matrix_names()[group.matrix].clone());
        let (units, unit, slab) = (self.row_units(), self.unit, self.slab);
        for i in 0..self.loads() {
            let own = format!("(lane + {}u) % {units}u", i * 32);
            self.line(match (self.wide, self.tail) {
                (true, false) => format!("{name}_{i} = {matrix}_slab_{slab}[{name}_start{i} + {k} / {unit}u + {own}];"),
                (true, true) => format!(
                    "{name}_{i} = {matrix}_slab_{slab}[{name}_start{i} + min({k} / {unit}u + {own}, n_units - 1u)];"
                ),
                (false, _) => format!(
                    "{{ let k = {k} + {own} * 4u; {name}_{i} = vec4<f16>(0.0); if k < n_terms {{ {name}_{i} = \
                     vec4<f16>({matrix}_quad(vec2({slab}u, place.y), {name}_start{i} + k * params.k_stride, n_terms - k)); }} }}"
                ),
            });
        }
    }

    /// Lays a group's step, at term `k`, into place `place` of workgroup memory.
    fn store_group(&mut self, group: Group, place: u32, k: &str) {
        let name = self.prefix(group);
        let (units, unit, pitch) = (self.row_units(), self.unit, self.pitch());
        for i in 0..self.loads() {
            let item = format!("(lane + {}u)", i * 32);
            let at = format!("{item} / {units}u * {pitch}u + {item} % {units}u * {}u", unit / 4);
            for (half, mut value) in self.fours(&format!("{name}_{i}"), true).into_iter().enumerate() {
                if self.wide && self.tail {
                    value = format!("select(vec4<f16>(0.0), {value}, {k} / {unit}u + {item} % {units}u < n_units)");
                }
                self.line(format!("w_tile[{at} + {}u] = {value};", place * 16 * pitch + half as u32));
            }
        }
    }

    /// The loop over the terms, with weights from one slab.
    fn solo_steps(&mut self) {
        let (depth, pitch) = (self.tile.depth, self.pitch());
        self.line("{");
        for group in self.groups() {
            self.load_group(group, "0u");
        }
        self.line(format!("}}\nfor (var k0 = 0u; k0 < n_terms; k0 += {depth}u) {{"));
        // After the last step whole ones are loaded again, others are cut off by `load_group`: no branch around loads.
        match self.wide && !self.tail {
            true => self.line(format!("let k1 = min(k0 + {depth}u, n_terms - {depth}u);")),
            false => self.line(format!("let k1 = k0 + {depth}u;")),
        }
        if self.rows_are_kept() {
            (0..depth / 16).for_each(|step| self.load_fragments("let fx", step, "k0"));
        }
        for part in self.parts() {
            for (place, group) in part.iter().enumerate() {
                self.store_group(*group, place as u32, "k0");
            }
            self.line("workgroupBarrier();");
            for group in &part {
                self.load_group(*group, "k1");
            }
            for step in 0..depth / 16 {
                self.line("{");
                if !self.rows_are_kept() {
                    self.load_fragments("let fx", step, "k0");
                }
                for (place, group) in part.iter().enumerate() {
                    let at = place as u32 * 16 * pitch + step * 4;
                    self.line(format!("let fw{place} = coopLoad<coop_mat16x16<f16, B>>(&w_tile[{at}u], {pitch}u);"));
                    let name = self.prefix(*group);
                    for r in 0..self.row_fragments() {
                        self.line(format!("{name}_acc{r} = coopMultiplyAdd(fx{step}_{r}, fw{place}, {name}_acc{r});"));
                    }
                }
                self.line("}");
            }
            self.line("workgroupBarrier();");
        }
        self.line("}");
    }

    /// Sums through workgroup memory, a fragment at a time, to `finish`.
    fn sums(&mut self) {
        for r in 0..self.row_fragments() {
            for column in 0..self.tile.cols / 16 {
                self.line("{");
                let last = self.operation.matrices() - 1;
                for matrix in 0..=last {
                    let name = self.prefix(Group { matrix, column });
                    self.line(format!("coopStoreT({name}_acc{r}, &sums[0u], 16u);\nworkgroupBarrier();"));
                    if matrix < last {
                        // Kept until the other matrix's sums are there.
                        for i in 0..8 {
                            self.line(format!("let sum{i} = sums[lane + {}u];", i * 32));
                        }
                        self.line("workgroupBarrier();");
                    }
                }
                self.line(format!("let column = first_col + {}u + lane % 16u;", column * 16));
                for i in 0..8 {
                    let first = if last > 0 { format!("sum{i}, ") } else { String::new() };
                    self.line(format!(
                        "{{ let row = first_row + {}u + lane / 16u; if row < end_row && column < columns() {{ finish(row, \
                         column, {first}sums[lane + {}u]); }} }}",
                        r * 16 + i * 2,
                        i * 32
                    ));
                }
                self.line("workgroupBarrier();\n}");
            }
        }
    }
}
