// Rows by expert in groups of 16, whose fragments matrices are loaded from.
// Needs offsets (sorted positions of expert e: offsets[e] .. offsets[e + 1]).

// As tiles of 16 rows are numbered (shared/expert_tile): every expert has enough groups, and the last number is below n / 16 + E.
fn first_group(expert: u32) -> u32 { return offsets[expert] / 16u + expert; }

// Group of a sorted position, and its row there.
fn place_of(position: u32, n_experts: u32) -> vec2<u32> {
    // The last expert that starts at or before it, empty ones passed over.
    var expert = 0u;
    var beyond = n_experts;
    while beyond - expert > 1u {
        let middle = (expert + beyond) / 2u;
        if offsets[middle] <= position { expert = middle; } else { beyond = middle; }
    }
    let own = position - offsets[expert];
    return vec2(first_group(expert) + own / 16u, own % 16u);
}
