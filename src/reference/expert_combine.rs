//! The experts' outputs, weighted, onto the residual stream.

/// `x[t] + Σ over r of weights[t, r] * y[t * A + r]`; `x`: `[T, D]`, `weights`: `[T, A]`, `y`: `[T * A, D]` by assignment.
pub fn expert_combine(x: &[f32], weights: &[f32], y: &[f32], n_chosen: usize, d_model: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len());
    for (t, row) in x.chunks_exact(d_model).enumerate() {
        for (d, x) in row.iter().enumerate() {
            let experts = (t * n_chosen..(t + 1) * n_chosen).map(|a| weights[a] as f64 * y[a * d_model + d] as f64);
            out.push((*x as f64 + experts.sum::<f64>()) as f32);
        }
    }
    out
}
