//! The first half of every expert (modeling_mixtral.py, MixtralBlockSparseTop2MLP: `silu(w1 x) * w3 x`).

/// `x`: `[T, D]`; `gate[e]`, `up[e]`: `[F, D]`. Assignment a is of row `a / n_chosen`; `offsets` and `permutation` are from
/// [`expert_sort`](super::expert_sort::expert_sort). Returns `[T * A, F]` by sorted position.
pub fn expert_gate_up(
    x: &[f32],
    d_model: usize,
    n_chosen: usize,
    offsets: &[u32],
    permutation: &[u32],
    gate: &[Vec<f32>],
    up: &[Vec<f32>],
) -> Vec<f32> {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| *a as f64 * *b as f64).sum::<f64>();
    let mut h = Vec::new();
    for (expert, (gate, up)) in gate.iter().zip(up).enumerate() {
        for position in offsets[expert]..offsets[expert + 1] {
            let row = permutation[position as usize] as usize / n_chosen;
            let x = &x[row * d_model..][..d_model];
            for (gate, up) in gate.chunks_exact(d_model).zip(up.chunks_exact(d_model)) {
                let (gate, up) = (dot(x, gate), dot(x, up));
                h.push((gate / (1.0 + (-gate).exp()) * up) as f32);
            }
        }
    }
    h
}
