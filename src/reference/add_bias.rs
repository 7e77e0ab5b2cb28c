//! A bias for every row.

/// `y[t, y_offset + j] + bias[j]` for `y`: `[T, y_stride]`; other columns as they are.
pub fn add_bias(y: &[f32], bias: &[f32], y_stride: usize, y_offset: usize) -> Vec<f32> {
    let mut out = y.to_vec();
    for row in out.chunks_exact_mut(y_stride) {
        for (y, bias) in row[y_offset..].iter_mut().zip(bias) {
            *y = (*y as f64 + *bias as f64) as f32;
        }
    }
    out
}
