// Per row of logits: the greedy id, the maximum, the log of the sum of exponentials, and whether any logit is NaN.
// One workgroup per row; lanes stride over the row, then trees.
// Reference: src/reference/lm_head_sample.rs      Needs: shared/reduce (workgroup_sum)
struct Params { n_rows: u32, vocab: u32 }
struct Sample { id: u32, nan: u32, max: f32, log_sum_exp: f32 }
var<immediate> params: Params;
@group(0) @binding(0) var<storage, read>       logits: array<u32>;     // [R, V] bits of f32
@group(0) @binding(1) var<storage, read_write> samples: array<Sample>; // [R]

// Part of the order of summation: lane l sums elements l, l + WG_SIZE, .... Chosen by V alone (src/kernels/lm_head_sample.rs).
override WG_SIZE: u32 = 256u;
const NO_ID: u32 = 0xffffffffu;
const INFINITY_BITS: u32 = 0x7f800000u;

// Best logit of the lanes so far, as key and id.
var<workgroup> keys: array<u32, WG_SIZE>;
var<workgroup> ids: array<u32, WG_SIZE>;
var<workgroup> nans: atomic<u32>;

// Everything but the sum looks at bits: a compiler may assume that floats are never NaN, and it may flush subnormals.
fn is_nan(bits: u32) -> bool { return (bits & 0x7fffffffu) > INFINITY_BITS; }

// Integers in the order of the floats, above 0; both zeros have one key.
fn order_key(bits: u32) -> u32 {
    if (bits & 0x7fffffffu) == 0u { return 0x80000000u; }
    return select(bits | 0x80000000u, ~bits, (bits & 0x80000000u) != 0u);
}

fn bits_of_key(key: u32) -> u32 {
    return select(~key, key & 0x7fffffffu, (key & 0x80000000u) != 0u);
}

// The best of a lane so far.
struct Best { key: u32, id: u32, nan: u32 }

// With one more logit. Beyond the vocabulary there are NaNs, which do not count.
fn better(best: Best, bits: u32, id: u32) -> Best {
    if is_nan(bits) { return Best(best.key, best.id, best.nan | u32(id < params.vocab)); }
    if order_key(bits) > best.key { return Best(order_key(bits), id, best.nan); }
    return best;
}

fn add_exp(sum: f32, bits: u32, max: f32) -> f32 {
    if is_nan(bits) { return sum; }
    return sum + exp(bitcast<f32>(bits) - max);
}

// Four logits that a lane takes at a time, so that their loads are under way together; NaN beyond the vocabulary.
fn logit_quad(base: u32, first: u32) -> vec4<u32> {
    var quad = vec4(logits[base + first], 0xffffffffu, 0xffffffffu, 0xffffffffu);
    if first + WG_SIZE < params.vocab { quad.y = logits[base + first + WG_SIZE]; }
    if first + 2u * WG_SIZE < params.vocab { quad.z = logits[base + first + 2u * WG_SIZE]; }
    if first + 3u * WG_SIZE < params.vocab { quad.w = logits[base + first + 3u * WG_SIZE]; }
    return quad;
}

@compute @workgroup_size(WG_SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let base = workgroup.x * params.vocab;
    if lane == 0u { atomicStore(&nans, 0u); }
    workgroupBarrier();
    // Ids ascend, so "greater" alone keeps the first of equals.
    var best = Best(0u, NO_ID, 0u);
    for (var first = lane; first < params.vocab; first += 4u * WG_SIZE) {
        let quad = logit_quad(base, first);
        best = better(best, quad.x, first);
        best = better(best, quad.y, first + WG_SIZE);
        best = better(best, quad.z, first + 2u * WG_SIZE);
        best = better(best, quad.w, first + 3u * WG_SIZE);
    }
    keys[lane] = best.key;
    ids[lane] = best.id;
    if best.nan != 0u { atomicOr(&nans, 1u); }
    workgroupBarrier();
    for (var half = WG_SIZE / 2u; half > 0u; half /= 2u) {
        if lane < half {
            let other = lane + half;
            if keys[other] > keys[lane] || (keys[other] == keys[lane] && ids[other] < ids[lane]) {
                keys[lane] = keys[other];
                ids[lane] = ids[other];
            }
        }
        workgroupBarrier();
    }
    // A row without any number has no maximum; it is reported as minus infinity.
    let max_bits = select(0xff800000u, bits_of_key(keys[0]), ids[0] != NO_ID);
    let max = bitcast<f32>(max_bits);

    var sum = 0.0;
    for (var first = lane; first < params.vocab; first += 4u * WG_SIZE) {
        let quad = logit_quad(base, first);
        sum = add_exp(sum, quad.x, max);
        sum = add_exp(sum, quad.y, max);
        sum = add_exp(sum, quad.z, max);
        sum = add_exp(sum, quad.w, max);
    }
    let total = workgroup_sum(sum, lane);
    if lane == 0u {
        var log_sum_exp = max + log(total);
        // Infinity minus infinity would be NaN.
        if (max_bits & 0x7fffffffu) == INFINITY_BITS { log_sum_exp = max; }
        samples[workgroup.x] = Sample(ids[0], atomicLoad(&nans), max, log_sum_exp);
    }
}
