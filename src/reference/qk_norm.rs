//! RMS norm of queries or keys (modeling_qwen3_moe.py: of each head; modeling_olmoe.py: of all heads together).

use super::rms_norm::rms_norm;

/// `x`: `[T, stride]`; from column `offset` on each row has `n_segments` segments as long as `gain`, and each becomes its
/// [`rms_norm`]. Other columns as they are.
pub fn qk_norm(x: &[f32], gain: &[f32], eps: f32, n_segments: usize, stride: usize, offset: usize) -> Vec<f32> {
    let mut y = x.to_vec();
    for row in y.chunks_exact_mut(stride) {
        let segments = &mut row[offset..][..n_segments * gain.len()];
        let normed = rms_norm(segments, gain, eps);
        segments.copy_from_slice(&normed);
    }
    y
}
