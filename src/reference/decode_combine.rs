//! Attention over a context put together from attention over its parts.

/// A part of one head's context: a softmax of its own.
#[derive(Debug, Clone, Copy)]
pub struct PartOfHead<'a> {
    /// Its greatest score.
    pub greatest: f32,
    /// Sum of `exp(score - greatest)`.
    pub total: f32,
    /// `[K]`: sum of `exp(score - greatest) * value`.
    pub sums: &'a [f32],
}

/// `[K]`. `sink`: a score that joins the softmax and has no value.
pub fn decode_combine(parts: &[PartOfHead<'_>], sink: Option<f32>) -> Vec<f32> {
    let sink = sink.map_or(f64::NEG_INFINITY, f64::from);
    let greatest = parts.iter().map(|part| part.greatest as f64).fold(sink, f64::max);
    let weight = |part: &PartOfHead<'_>| (part.greatest as f64 - greatest).exp();
    let total: f64 = parts.iter().map(|part| part.total as f64 * weight(part)).sum::<f64>() + (sink - greatest).exp();
    let sum = |j: usize| -> f64 { parts.iter().map(|part| part.sums[j] as f64 * weight(part)).sum() };
    (0..parts[0].sums.len()).map(|j| (sum(j) / total) as f32).collect()
}
