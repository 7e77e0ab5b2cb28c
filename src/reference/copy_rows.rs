//! Rows of words from one place to another, each with its own distance between rows.

/// The first `row_words` of each row of `from`, to the same place of each row of `to`.
pub fn copy_rows(from: &[u32], from_stride: usize, to: &mut [u32], to_stride: usize, row_words: usize) {
    for (from, to) in from.chunks_exact(from_stride).zip(to.chunks_exact_mut(to_stride)) {
        to[..row_words].copy_from_slice(&from[..row_words]);
    }
}
