//! Rows times a weight matrix.

/// `y[t, n] = sum over k of x[t, k] * w[n, k]` for `x`: `[T, n_in]` and `w`: `[n_out, n_in]`; returns `[T, n_out]`.
pub fn matmul(x: &[f32], w: &[f32], n_in: usize) -> Vec<f32> {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| *a as f64 * *b as f64).sum::<f64>() as f32;
    x.chunks_exact(n_in).flat_map(|row| w.chunks_exact(n_in).map(move |column| dot(row, column))).collect()
}
