//! Causal grouped-query attention of one row over its context.
//!
//! Softmax subtracts the maximum and sums in f64. Keys and values come as the KV cache stores them (f16, widened).

/// Context and heads of one attended row.
#[derive(Debug, Clone, Copy)]
pub struct AttentionShape {
    /// H
    pub q_heads: usize,
    /// G; divides H. Query head h reads key/value head `h / (H / G)`.
    pub kv_heads: usize,
    /// K
    pub head_width: usize,
    /// Only the last `window` tokens of the context are visible.
    pub window: Option<usize>,
    /// Factor on `q · k`, usually `1 / sqrt(K)`.
    pub scale: f32,
}

/// `q`: `[H, K]`; `keys`, `values`: `[C, G, K]`, the row's own token last; returns `[H, K]`.
pub fn attention(shape: &AttentionShape, q: &[f32], keys: &[f32], values: &[f32]) -> Vec<f32> {
    let AttentionShape { q_heads, kv_heads, head_width, window, scale } = *shape;
    let context = keys.len() / (kv_heads * head_width);
    let first = window.map_or(0, |w| context.saturating_sub(w));
    let mut out = Vec::with_capacity(q_heads * head_width);
    for head in 0..q_heads {
        let kv_head = head / (q_heads / kv_heads);
        let query = &q[head * head_width..][..head_width];
        let row =
            |tensor: &'_ [f32], token: usize, j: usize| tensor[(token * kv_heads + kv_head) * head_width + j] as f64;
        let scores: Vec<f64> = (first..context)
            .map(|token| (0..head_width).map(|j| query[j] as f64 * row(keys, token, j)).sum::<f64>() * scale as f64)
            .collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let exps: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
        let sum: f64 = exps.iter().sum();
        for j in 0..head_width {
            let weighted: f64 = exps.iter().enumerate().map(|(i, e)| e * row(values, first + i, j)).sum();
            out.push((weighted / sum) as f32);
        }
    }
    out
}
