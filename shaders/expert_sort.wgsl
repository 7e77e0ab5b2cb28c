// Assignments sorted by expert, stable: a counting sort by one workgroup.
// WG_SIZE assignments at a time, each sets a bit of its expert's mask; the bits below it count the equal ones before it.
// Atomic adds and ors of integers commute, so the result does not depend on the order in which lanes run.
// An id that is no expert's marks a row that is not there: it goes nowhere.
// Reference: src/reference/expert_sort.rs
struct Params { n_assignments: u32, n_experts: u32 }
var<immediate> params: Params;
@group(0) @binding(0) var<storage, read>       ids: array<u32>;         // [T * A] expert of each assignment
@group(0) @binding(1) var<storage, read_write> offsets: array<u32>;     // [E + 1] first sorted position of each expert
@group(0) @binding(2) var<storage, read_write> permutation: array<u32>; // [T * A] assignment of each sorted position

const WG_SIZE: u32 = 256u;
const MAX_EXPERTS: u32 = 256u;
const MASK_WORDS: u32 = WG_SIZE / 32u;

var<workgroup> counts: array<atomic<u32>, MAX_EXPERTS>;
var<workgroup> next: array<u32, MAX_EXPERTS>;                      // where each expert's next assignment goes
var<workgroup> masks: array<atomic<u32>, MASK_WORDS * MAX_EXPERTS>; // [E][MASK_WORDS] one bit per lane

@compute @workgroup_size(WG_SIZE)
fn main(@builtin(local_invocation_index) lane: u32) {
    for (var e = lane; e < params.n_experts; e += WG_SIZE) { atomicStore(&counts[e], 0u); }
    for (var i = lane; i < MASK_WORDS * params.n_experts; i += WG_SIZE) { atomicStore(&masks[i], 0u); }
    workgroupBarrier();
    for (var a = lane; a < params.n_assignments; a += WG_SIZE) {
        if ids[a] < params.n_experts { atomicAdd(&counts[ids[a]], 1u); }
    }
    workgroupBarrier();
    if lane == 0u {
        var sum = 0u;
        for (var e = 0u; e < params.n_experts; e++) {
            next[e] = sum;
            sum += atomicLoad(&counts[e]);
        }
        offsets[params.n_experts] = sum;
    }
    workgroupBarrier();
    for (var e = lane; e < params.n_experts; e += WG_SIZE) { offsets[e] = next[e]; }
    workgroupBarrier();

    let word = lane / 32u;
    let bit = 1u << (lane % 32u);
    for (var first = 0u; first < params.n_assignments; first += WG_SIZE) {
        let a = first + lane;
        var id = 0xffffffffu;
        if a < params.n_assignments { id = ids[a]; }
        let here = id < params.n_experts;
        if here {
            atomicOr(&masks[id * MASK_WORDS + word], bit);
        }
        workgroupBarrier();
        if here {
            var before = countOneBits(atomicLoad(&masks[id * MASK_WORDS + word]) & (bit - 1u));
            for (var w = 0u; w < word; w++) { before += countOneBits(atomicLoad(&masks[id * MASK_WORDS + w])); }
            permutation[next[id] + before] = a;
        }
        workgroupBarrier();
        for (var e = lane; e < params.n_experts; e += WG_SIZE) {
            for (var w = 0u; w < MASK_WORDS; w++) {
                next[e] += countOneBits(atomicExchange(&masks[e * MASK_WORDS + w], 0u));
            }
        }
        workgroupBarrier();
    }
}
