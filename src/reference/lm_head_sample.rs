//! Greedy id, maximum and log-sum-exp of rows of logits.

/// What is left of one row. Logits that are NaN are left out of everything but `nan`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample {
    /// Of the first greatest logit; `None` where all are NaN.
    pub id: Option<u32>,
    /// Whether any logit is NaN.
    pub nan: bool,
    /// Minus infinity where all are NaN.
    pub max: f32,
    pub log_sum_exp: f64,
}

/// `logits`: `[R, V]`; returns `[R]`.
pub fn lm_head_sample(logits: &[f32], vocab: usize) -> Vec<Sample> {
    logits.chunks_exact(vocab).map(sample).collect()
}

fn sample(logits: &[f32]) -> Sample {
    let nan = logits.iter().any(|logit| logit.is_nan());
    let mut id = None;
    let mut max = f32::NEG_INFINITY;
    for (i, logit) in logits.iter().enumerate().filter(|(_, logit)| !logit.is_nan()) {
        if id.is_none() || *logit > max {
            (id, max) = (Some(i as u32), *logit);
        }
    }
    let log_sum_exp = if max.is_infinite() {
        max as f64
    } else {
        let sum: f64 = logits.iter().filter(|l| !l.is_nan()).map(|l| (*l as f64 - max as f64).exp()).sum();
        max as f64 + sum.ln()
    };
    Sample { id, nan, max, log_sum_exp }
}
