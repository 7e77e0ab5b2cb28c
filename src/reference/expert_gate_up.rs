//! The first half of every expert (modeling_mixtral.py, MixtralBlockSparseTop2MLP: `silu(w1 x) * w3 x`;
//! modeling_gpt_oss.py, GptOssExperts).

use crate::model::Activation;

/// What comes after the two products.
#[derive(Debug, Clone, Copy)]
pub struct Finish<'a> {
    /// `[E, F, 2]`, of gate and of up.
    pub bias: Option<&'a [f32]>,
    pub activation: Activation,
}

impl Finish<'_> {
    /// SwiGLU without biases.
    pub const PLAIN: Finish<'static> = Finish { bias: None, activation: Activation::SwiGlu };
}

/// `x`: `[T, D]`; `gate[e]`, `up[e]`: `[F, D]`. Assignment a is of row `a / n_chosen`; `offsets` and `permutation` are from
/// [`expert_sort`](super::expert_sort::expert_sort). Returns `[T * A, F]` by sorted position.
pub fn expert_gate_up(
    x: &[f32],
    d_model: usize,
    n_chosen: usize,
    offsets: &[u32],
    permutation: &[u32],
    [gate, up]: [&[Vec<f32>]; 2],
    Finish { bias, activation }: Finish<'_>,
) -> Vec<f32> {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| *a as f64 * *b as f64).sum::<f64>();
    let mut h = Vec::new();
    for (expert, (gate, up)) in gate.iter().zip(up).enumerate() {
        for position in offsets[expert]..offsets[expert + 1] {
            let row = permutation[position as usize] as usize / n_chosen;
            let x = &x[row * d_model..][..d_model];
            let expert_width = gate.len() / d_model;
            for (f, (gate, up)) in gate.chunks_exact(d_model).zip(up.chunks_exact(d_model)).enumerate() {
                let bias = |which| bias.map_or(0.0, |bias| bias[(expert * expert_width + f) * 2 + which] as f64);
                h.push(activate(activation, dot(x, gate) + bias(0), dot(x, up) + bias(1)) as f32);
            }
        }
    }
    h
}

fn activate(activation: Activation, gate: f64, up: f64) -> f64 {
    match activation {
        Activation::SwiGlu => gate / (1.0 + (-gate).exp()) * up,
        Activation::ClampedSwiGlu { limit } => {
            let limit = limit as f64;
            // Not f64::min, which drops a NaN.
            let (gate, up) = (if gate > limit { limit } else { gate }, up.clamp(-limit, limit));
            (up + 1.0) * gate / (1.0 + (-1.702 * gate).exp())
        }
    }
}
