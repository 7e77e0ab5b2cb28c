//! A layer's time on the device, kernel by kernel, as the engine records them; attention apart, which has a place of its own.

use super::Tiles;
use super::measure::{ExpertShape, Experts, filled, timed};
use crate::checkpoint::Dtype;
use crate::gpu::{Buffer, GpuError, Pipelines, Recorder, Variant};
use crate::kernels::half_rows::{self, HalfRows, padded};
use crate::kernels::{cooperative, expert_combine, expert_sort, matmul, rms_norm, rotary, router_topk};
use crate::model::Shape;

/// One kernel of a layer.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Share {
    pub kernel: &'static str,
    pub seconds: f64,
}

/// Every kernel of one layer of `shape` over `rows` rows, each timed alone, in the order of a pass. `tiles`: of the f16 class; None: the
/// portable kernels.
pub fn shares(
    pipelines: &Pipelines,
    shape: &Shape,
    rows: usize,
    loads: &[f64],
    tiles: Option<&Tiles>,
) -> Result<Vec<Share>, GpuError> {
    let gpu = pipelines.gpu();
    let words = |n: usize| 4 * n as u64;
    let (d, n) = (shape.d_model, rows as u32);
    let random = |what: &str, n: usize| filled(pipelines, what, Dtype::F32, n as u64, 3, 1.0);
    let weights = |what: &str, n: usize| filled(pipelines, what, Dtype::Bf16, n as u64, 5, 0.05);
    let (x, normed) = (random("residual rows", rows * d)?, random("normed rows", rows * d)?);
    let (gain, attention) = (weights("gain", d)?, random("attention output", rows * shape.q_width())?);
    let qkv = random("projected rows", rows * shape.qkv_width())?;
    let (w_qkv, w_out) = (weights("projections", shape.qkv_width() * d)?, weights("output", shape.q_width() * d)?);
    let w_router = weights("router", shape.experts * d)?;
    let logits = random("router logits", rows * shape.experts)?;
    let widest = padded(d.max(shape.q_width()) as u32) as usize;
    let halves = gpu.buffer("rows of f16", 2 * (rows * widest) as u64)?;
    let scales = gpu.buffer("scales", words(rows))?;
    let half = HalfRows { rows: halves.whole(), scales: scales.whole() };
    let extents = ExpertShape {
        experts: shape.experts,
        chosen: shape.experts_per_token,
        d_model: d,
        expert_width: shape.expert_width,
    };
    let experts = Experts::new(pipelines, extents, Dtype::Bf16, rows)?;
    experts.route(rows, loads)?;
    let per_expert = (rows * shape.experts_per_token / shape.experts) as u32;
    let assignments = rows * shape.experts_per_token;

    let mut shares = Vec::new();
    let mut add = |kernel, record: &mut dyn FnMut(&mut Recorder<'_>) -> Result<(), GpuError>| -> Result<(), GpuError> {
        let seconds = timed(pipelines, |recorder, _| record(recorder))?;
        shares.push(Share { kernel, seconds });
        Ok(())
    };
    let product = |recorder: &mut Recorder<'_>, x: &Buffer, w: &Buffer, y: &Buffer, [n_out, n_in]: [usize; 2]| {
        let (n_out, n_in) = (n_out as u32, n_in as u32);
        match tiles {
            Some(tiles) => {
                let params = cooperative::matmul::Params::dense(n, n_out, n_in);
                let tile = tiles.matmul(n, n_out);
                cooperative::matmul::record(recorder, Dtype::Bf16, tile, params, half, w.whole(), y.whole())
            }
            None => {
                let params = matmul::Params::dense(n, n_out, n_in);
                let variant = Variant::new(Dtype::Bf16);
                matmul::record(recorder, &variant, params, x.whole(), w.whole(), y.whole())
            }
        }
    };
    let halve = |recorder: &mut Recorder<'_>, x: &Buffer, n_in: usize| {
        half_rows::record(recorder, half_rows::Params::dense(n, n_in as u32), x.whole(), half)
    };
    let norm = rms_norm::Params { n_rows: n, d_model: d as u32, eps: 1e-5 };
    add("rms_norm", &mut |r| rms_norm::record(r, Dtype::Bf16, norm, x.whole(), gain.whole(), normed.whole()))?;
    if tiles.is_some() {
        add("half_rows", &mut |r| halve(r, &normed, d))?;
    }
    add("matmul of q, k, v", &mut |r| product(r, &normed, &w_qkv, &qkv, [shape.qkv_width(), d]))?;
    let params = rotary::Params {
        n_rows: n,
        q_heads: shape.q_heads as u32,
        kv_heads: shape.kv_heads as u32,
        head_width: shape.head_width as u32,
        clip: 0.0,
    };
    let positions = gpu.buffer_with("positions", bytemuck::cast_slice(&(0..n).collect::<Vec<_>>()))?;
    let slots = gpu.buffer_with("KV slots", bytemuck::cast_slice(&vec![rotary::NO_SLOT; rows]))?;
    let table = random("rotary table", rows * shape.head_width)?;
    let (kv_rows, kv_blocks) = (gpu.buffer("keys and values", words(rows * shape.kv_width()))?, gpu.buffer("KV", 4)?);
    let bindings = rotary::Bindings {
        qkv: qkv.whole(),
        positions: positions.whole(),
        rope_table: table.whole(),
        kv_slots: slots.whole(),
        kv_rows: kv_rows.whole(),
        kv_blocks: kv_blocks.whole(),
    };
    add("rotary", &mut |r| rotary::record(r, params, bindings))?;
    if tiles.is_some() {
        add("half_rows", &mut |r| halve(r, &attention, shape.q_width()))?;
    }
    add("matmul of the output", &mut |r| product(r, &attention, &w_out, &normed, [d, shape.q_width()]))?;
    add("rms_norm", &mut |r| rms_norm::record(r, Dtype::Bf16, norm, x.whole(), gain.whole(), normed.whole()))?;
    if tiles.is_some() {
        add("half_rows", &mut |r| halve(r, &normed, d))?;
    }
    add("matmul of the router", &mut |r| product(r, &normed, &w_router, &logits, [shape.experts, d]))?;
    let params = router_topk::Params {
        n_rows: n,
        n_experts: shape.experts as u32,
        n_chosen: shape.experts_per_token as u32,
        renormalise: 1,
    };
    let (ids, chosen_weights) = (gpu.buffer("chosen", words(assignments))?, random("expert weights", assignments)?);
    add("router_topk", &mut |r| router_topk::record(r, params, logits.whole(), ids.whole(), chosen_weights.whole()))?;
    let params = expert_sort::Params { n_assignments: assignments as u32, n_experts: shape.experts as u32 };
    let offsets = gpu.buffer("offsets", words(shape.experts + 1))?;
    let permutation = gpu.buffer("permutation", words(assignments))?;
    add("expert_sort", &mut |r| expert_sort::record(r, params, ids.whole(), offsets.whole(), permutation.whole()))?;
    let tile = tiles.map(|tiles| tiles.gate_up(per_expert));
    if let Some(tile) = tile {
        add("half_rows", &mut |r| experts.halve(r, tile.takes_rows_by_expert(), rows))?;
    }
    add("expert_gate_up", &mut |r| experts.gate_up(r, tile, rows))?;
    let tile = tiles.map(|tiles| tiles.down(per_expert));
    if let Some(tile) = tile {
        add("half_rows of experts", &mut |r| experts.halve_hidden(r, tile.takes_rows_by_expert(), assignments))?;
    }
    add("expert_down", &mut |r| experts.down(r, tile, rows))?;
    let params = expert_combine::Params { n_rows: n, n_chosen: shape.experts_per_token as u32, d_model: d as u32 };
    let outputs = random("expert outputs", assignments * d)?;
    add("expert_combine", &mut |r| {
        expert_combine::record(r, params, chosen_weights.whole(), outputs.whole(), x.whole())
    })?;
    Ok(shares)
}
