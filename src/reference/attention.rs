//! Causal grouped-query attention of one row over its context.
//!
//! Softmax subtracts the maximum and sums in f64. Keys and values come as the KV cache stores them (f16, widened).

use crate::model::AttentionShape;

/// `q`: `[H, K]`; `keys`, `values`: `[C, G, K]`, the row's own token last; returns `[H, K]`.
///
/// `sinks`: `[H]`, a score of each query head that joins its softmax and has no value (modeling_gpt_oss.py,
/// eager_attention_forward).
///
/// NaN in a visible key or in the query makes its heads' outputs NaN, NaN in a value its column.
pub fn attention(shape: &AttentionShape, sinks: Option<&[f32]>, q: &[f32], keys: &[f32], values: &[f32]) -> Vec<f32> {
    let AttentionShape { q_heads, kv_heads, head_width, scale, .. } = *shape;
    let context = keys.len() / (kv_heads * head_width);
    let first = shape.first_visible(context);
    let mut out = Vec::with_capacity(q_heads * head_width);
    for head in 0..q_heads {
        let kv_head = head / shape.heads_per_group();
        let query = &q[head * head_width..][..head_width];
        let row =
            |tensor: &'_ [f32], token: usize, j: usize| tensor[(token * kv_heads + kv_head) * head_width + j] as f64;
        let scores: Vec<f64> = (first..context)
            .map(|token| (0..head_width).map(|j| query[j] as f64 * row(keys, token, j)).sum::<f64>() * scale as f64)
            .collect();
        let sink = sinks.map_or(f64::NEG_INFINITY, |sinks| sinks[head] as f64);
        let max = scores.iter().copied().fold(sink, f64::max);
        let exps: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
        let sum: f64 = exps.iter().sum::<f64>() + (sink - max).exp();
        for j in 0..head_width {
            let weighted: f64 = exps.iter().enumerate().map(|(i, e)| e * row(values, first + i, j)).sum();
            out.push((weighted / sum) as f32);
        }
    }
    out
}
