// The A experts of each row with the largest logits, and their softmax weights.   One workgroup per row.
// A lane finds an expert's rank by counting the experts before it. The order is total (keys, then indices), so the ranks
// are a permutation: ids are distinct and below E whatever the logits hold, and no pass depends on the one before.
// Reference: src/reference/router_topk.rs
struct Params { n_rows: u32, n_experts: u32, n_chosen: u32, renormalise: u32 }
var<immediate> params: Params;
@group(0) @binding(0) var<storage, read>       logits: array<f32>;  // [T, E]
@group(0) @binding(1) var<storage, read_write> ids: array<u32>;     // [T, A] by descending logit
@group(0) @binding(2) var<storage, read_write> weights: array<f32>; // [T, A]

const WG_SIZE: u32 = 64u;

const MAX_EXPERTS: u32 = 256u;
const MAX_CHOSEN: u32 = 16u;
var<workgroup> keys: array<u32, MAX_EXPERTS>;
var<workgroup> exps: array<f32, MAX_EXPERTS>;
var<workgroup> chosen: array<u32, MAX_CHOSEN>;

// Unsigned integers in the order of the logits: both zeros alike, every NaN alike and above infinity.
fn key(logit: f32) -> u32 {
    let bits = bitcast<u32>(logit);
    let magnitude = bits & 0x7fffffffu;
    if magnitude > 0x7f800000u { return 0xffffffffu; }
    if magnitude == 0u { return 0x80000000u; }
    return select(bits | 0x80000000u, ~bits, bits != magnitude);
}

@compute @workgroup_size(WG_SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let base = workgroup.x * params.n_experts;
    for (var e = lane; e < params.n_experts; e += WG_SIZE) { keys[e] = key(logits[base + e]); }
    workgroupBarrier();
    for (var e = lane; e < params.n_experts; e += WG_SIZE) {
        let own = keys[e];
        var rank = 0u;
        for (var other = 0u; other < params.n_experts; other++) {
            rank += u32(keys[other] > own || (keys[other] == own && other < e));
        }
        if rank < params.n_chosen { chosen[rank] = e; }
    }
    workgroupBarrier();
    let greatest = logits[base + chosen[0]];
    for (var e = lane; e < params.n_experts; e += WG_SIZE) { exps[e] = exp(logits[base + e] - greatest); }
    workgroupBarrier();
    if lane < params.n_chosen {
        // Each lane sums for itself, in ascending order: E and A are small.
        var total = 0.0;
        for (var e = 0u; e < params.n_experts; e++) { total += exps[e]; }
        var weight = exps[chosen[lane]] / total;
        if params.renormalise != 0u {
            var share = 0.0;
            for (var rank = 0u; rank < params.n_chosen; rank++) { share += exps[chosen[rank]] / total; }
            weight /= share;
        }
        let at = workgroup.x * params.n_chosen + lane;
        ids[at] = chosen[lane];
        weights[at] = weight;
    }
}
