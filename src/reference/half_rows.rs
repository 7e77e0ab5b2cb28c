//! Rows as f16 with a scale each.

use half::f16;

/// `x`: `[T, n_in]`. Returns `[T, n_padded]` (0 from `n_in` on) and the powers of two `[T]` by which its rows are to be multiplied: those
/// that bring the greatest magnitude of a row into `2^14 .. 2^15`, at least `2^-100`; 1 for a row that is 0 or not finite.
pub fn half_rows(x: &[f32], n_in: usize, n_padded: usize) -> (Vec<f16>, Vec<f32>) {
    let (mut halves, mut scales) = (Vec::new(), Vec::new());
    for row in x.chunks_exact(n_in) {
        let finite = row.iter().all(|v| v.is_finite());
        let greatest = row.iter().fold(0.0f32, |greatest, v| greatest.max(v.abs()));
        // From the bits: a subnormal's exponent is below -100 in any case.
        let exponent = match greatest.to_bits() {
            0 => 0,
            _ if !finite => 0,
            bits => ((bits >> 23) as i32 - 127 - 14).max(-100),
        };
        let scale = f32::from_bits(((127 + exponent) as u32) << 23);
        let inverse = f32::from_bits(((127 - exponent) as u32) << 23);
        halves.extend(row.iter().map(|v| f16::from_f32(v * inverse)));
        halves.extend(std::iter::repeat_n(f16::ZERO, n_padded - n_in));
        scales.push(scale);
    }
    (halves, scales)
}

/// Where element `k` of a sorted position lies among the fragments that rows by expert are made of: row `i % 16` of group
/// `offsets[e] / 16 + e + i / 16` for row i of expert e, a group being `n_padded / 16` fragments `[16, 16]`.
pub fn place_by_expert(offsets: &[u32], position: usize, k: usize, n_padded: usize) -> usize {
    let expert = offsets.partition_point(|offset| *offset as usize <= position) - 1;
    let first = offsets[expert] as usize;
    let (group, row) = (first / 16 + expert + (position - first) / 16, (position - first) % 16);
    ((group * (n_padded / 16) + k / 16) * 16 + row) * 16 + k % 16
}
