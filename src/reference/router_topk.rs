//! Which experts a row goes to (modeling_mixtral.py, the router of MixtralSparseMoeBlock).

/// `logits`: `[T, E]`; returns ids and weights, both `[T, A]` by descending logit, of equal ones the lower index first.
/// The weights are the softmax over all E, divided by the sum of the chosen ones where `renormalise`.
pub fn router_topk(logits: &[f32], n_experts: usize, n_chosen: usize, renormalise: bool) -> (Vec<u32>, Vec<f32>) {
    let (mut ids, mut weights) = (Vec::new(), Vec::new());
    for row in logits.chunks_exact(n_experts) {
        let mut order: Vec<usize> = (0..n_experts).collect();
        // Stable, so equal logits stay in ascending order.
        order.sort_by(|a, b| row[*b].partial_cmp(&row[*a]).expect("the reference takes no NaN"));
        let exps: Vec<f64> = row.iter().map(|logit| (*logit as f64 - row[order[0]] as f64).exp()).collect();
        let chosen = &order[..n_chosen];
        let sum: f64 = if renormalise { chosen.iter().map(|e| exps[*e]).sum() } else { exps.iter().sum() };
        ids.extend(chosen.iter().map(|e| *e as u32));
        weights.extend(chosen.iter().map(|e| (exps[*e] / sum) as f32));
    }
    (ids, weights)
}
