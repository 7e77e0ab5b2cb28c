//! Rows of a table by number.

/// `y[t, j] = table[ids[t], j]` for `table`: `[V, D]`.
pub fn embed(ids: &[u32], table: &[f32], d_model: usize) -> Vec<f32> {
    ids.iter().flat_map(|id| &table[*id as usize * d_model..][..d_model]).copied().collect()
}
