//! Assignments sorted by expert.

/// `ids`: the expert of each assignment. Returns offsets `[E + 1]` (expert e has the sorted positions
/// `offsets[e]..offsets[e + 1]`) and the permutation: the assignment of each sorted position, ascending within an expert.
pub fn expert_sort(ids: &[u32], n_experts: usize) -> (Vec<u32>, Vec<u32>) {
    let (mut offsets, mut permutation) = (vec![0], Vec::new());
    for expert in 0..n_experts as u32 {
        permutation.extend((0..ids.len() as u32).filter(|assignment| ids[*assignment as usize] == expert));
        offsets.push(permutation.len() as u32);
    }
    (offsets, permutation)
}
