// The A experts of each row with the largest logits, and their softmax weights.   One workgroup per row.
// A lane finds an expert's rank by counting the experts before it. The order is total (keys, then indices), so the ranks
// are a permutation: ids are distinct and below E whatever the logits hold, and no pass depends on the one before.
// Reference: src/reference/router_topk.rs      Needs: shared/reduce (workgroup_sum)
struct Params { n_rows: u32, n_experts: u32, n_chosen: u32, renormalise: u32 }
var<immediate> params: Params;
@group(0) @binding(0) var<storage, read>       logits: array<f32>;  // [T, E]
@group(0) @binding(1) var<storage, read_write> ids: array<u32>;     // [T, A] by descending logit
@group(0) @binding(2) var<storage, read_write> weights: array<f32>; // [T, A]

// Part of the order of summation: lane l sums the exponentials of experts l, l + WG_SIZE, .... Chosen by E alone
// (src/kernels/router_topk.rs).
override WG_SIZE: u32 = 64u;

const MAX_EXPERTS: u32 = 256u;
const MAX_CHOSEN: u32 = 16u;
const KEY_QUADS: u32 = MAX_EXPERTS / 4u;
var<workgroup> keys: array<vec4<u32>, KEY_QUADS>; // of four experts each, 0 beyond the last
var<workgroup> chosen: array<u32, MAX_CHOSEN>;

// Unsigned integers in the order of the logits, above 0: both zeros alike, every NaN alike and above infinity.
fn key(logit: f32) -> u32 {
    let bits = bitcast<u32>(logit);
    let magnitude = bits & 0x7fffffffu;
    if magnitude > 0x7f800000u { return 0xffffffffu; }
    if magnitude == 0u { return 0x80000000u; }
    return select(bits | 0x80000000u, ~bits, bits != magnitude);
}

fn key_of(base: u32, e: u32) -> u32 {
    if e >= params.n_experts { return 0u; }
    return key(logits[base + e]);
}

@compute @workgroup_size(WG_SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let base = workgroup.x * params.n_experts;
    let n_quads = (params.n_experts + 3u) / 4u;
    for (var i = lane; i < n_quads; i += WG_SIZE) {
        keys[i] = vec4(key_of(base, 4u * i), key_of(base, 4u * i + 1u), key_of(base, 4u * i + 2u), key_of(base, 4u * i + 3u));
    }
    workgroupBarrier();
    for (var e = lane; e < params.n_experts; e += WG_SIZE) {
        let own = vec4(keys[e / 4u][e % 4u]);
        var before = vec4(0u);
        for (var i = 0u; i < n_quads; i++) {
            let others = keys[i];
            let earlier = vec4(4u * i) + vec4(0u, 1u, 2u, 3u) < vec4(e);
            before += vec4<u32>((others > own) | ((others == own) & earlier));
        }
        let rank = before.x + before.y + before.z + before.w;
        if rank < params.n_chosen { chosen[rank] = e; }
    }
    workgroupBarrier();
    let greatest = logits[base + chosen[0]];
    var sum = 0.0;
    for (var e = lane; e < params.n_experts; e += WG_SIZE) { sum += exp(logits[base + e] - greatest); }
    let total = workgroup_sum(sum, lane);
    if lane < params.n_chosen {
        var weight = exp(logits[base + chosen[lane]] - greatest) / total;
        if params.renormalise != 0u {
            // Each lane sums for itself, in ascending order: A is small.
            var share = 0.0;
            for (var rank = 0u; rank < params.n_chosen; rank++) { share += exp(logits[base + chosen[rank]] - greatest) / total; }
            weight /= share;
        }
        let at = workgroup.x * params.n_chosen + lane;
        ids[at] = chosen[lane];
        weights[at] = weight;
    }
}
