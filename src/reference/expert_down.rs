//! The second half of every expert (modeling_mixtral.py, MixtralBlockSparseTop2MLP: `w2 h`).

/// `h`: `[T * A, F]` by sorted position; `down[e]`: `[D, F]`; `bias`: `[E, D]`; `offsets` and `permutation` are from
/// [`expert_sort`](super::expert_sort::expert_sort). Returns `[T * A, D]` by assignment.
pub fn expert_down(
    h: &[f32],
    expert_width: usize,
    d_model: usize,
    offsets: &[u32],
    permutation: &[u32],
    down: &[Vec<f32>],
    bias: Option<&[f32]>,
) -> Vec<f32> {
    let mut y = vec![0.0; permutation.len() * d_model];
    for (expert, down) in down.iter().enumerate() {
        for position in offsets[expert] as usize..offsets[expert + 1] as usize {
            let h = &h[position * expert_width..][..expert_width];
            let y = &mut y[permutation[position] as usize * d_model..][..d_model];
            for (d, (y, down)) in y.iter_mut().zip(down.chunks_exact(expert_width)).enumerate() {
                let bias = bias.map_or(0.0, |bias| bias[expert * d_model + d] as f64);
                *y = (h.iter().zip(down).map(|(h, w)| *h as f64 * *w as f64).sum::<f64>() + bias) as f32;
            }
        }
    }
    y
}
