//! Layer norm of rows with a gain and no bias (modeling_dbrx.py, nn.LayerNorm with bias=False).

/// `y[t, j] = (x[t, j] - mean) / sqrt(variance + eps) * gain[j]`, mean and variance over j, for `x`: `[T, D]`.
pub fn layer_norm(x: &[f32], gain: &[f32], eps: f32) -> Vec<f32> {
    let d_model = gain.len();
    let mut y = Vec::with_capacity(x.len());
    for row in x.chunks_exact(d_model) {
        let mean = row.iter().map(|v| *v as f64).sum::<f64>() / d_model as f64;
        let variance = row.iter().map(|v| (*v as f64 - mean).powi(2)).sum::<f64>() / d_model as f64;
        let scale = 1.0 / (variance + eps as f64).sqrt();
        y.extend(row.iter().zip(gain).map(|(v, g)| ((*v as f64 - mean) * scale * *g as f64) as f32));
    }
    y
}
