//! RMS norm of rows (modeling_mixtral.py, MixtralRMSNorm).

/// `y[t, j] = x[t, j] / sqrt(mean_j(x[t, j]^2) + eps) * gain[j]` for `x`: `[T, D]`.
pub fn rms_norm(x: &[f32], gain: &[f32], eps: f32) -> Vec<f32> {
    let d_model = gain.len();
    let mut y = Vec::with_capacity(x.len());
    for row in x.chunks_exact(d_model) {
        let mean = row.iter().map(|v| (*v as f64).powi(2)).sum::<f64>() / d_model as f64;
        let scale = 1.0 / (mean + eps as f64).sqrt();
        y.extend(row.iter().zip(gain).map(|(v, g)| (*v as f64 * scale * *g as f64) as f32));
    }
    y
}
