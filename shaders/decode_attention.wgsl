// Attention of decode rows over their paged context, a part of SPLIT_TOKENS tokens at a time.
// One workgroup per part of a row and four query heads of a KV head (a vec4 holds one value of each), which share every load of K and V.
// A part is a softmax of its own: its greatest scores, the sum of its weights, and its weighted values, which decode_combine puts
// together. Parts begin at multiples of SPLIT_TOKENS, so a row's result depends on its position, its window and its context alone.
// Lanes next to each other take 8 elements next to each other, 16 bytes, so that whole rows of K and V are loaded at once.
// Reference: src/reference/decode_attention.rs      Needs: shared/kv_octets (load_octet, bindings 3 and 4)
struct Params {
    n_parts: u32, first_part: u32, q_heads: u32, kv_heads: u32, head_width: u32, q_stride: u32, window: u32, scale: f32,
}
var<immediate> params: Params;
@group(0) @binding(0) var<storage, read>       qkv: array<f32>;          // [T, q_stride], each row's H query heads of K first
@group(0) @binding(1) var<storage, read>       parts: array<vec4<u32>>;  // row t, position, first entry of block_table, number of the part
@group(0) @binding(2) var<storage, read>       block_table: array<u32>;  // block of context tokens 32 i .. 32 i + 32
@group(0) @binding(5) var<storage, read_write> states: array<vec2<f32>>; // [parts of a batch, H] greatest score, sum of weights
@group(0) @binding(6) var<storage, read_write> sums: array<f32>;         // [n_parts, H, K] of weight * V

const BLOCK_TOKENS: u32 = 32u;
const SPLIT_TOKENS: u32 = 256u;
const LANES: u32 = 128u;
const PARTIALS: u32 = 544u; // 32 tokens of 16 octets or 16 of 32, and a vec4 after each
// Below every score: the finite one, since an infinite one minus itself is no number.
const LOWEST: f32 = -3.4028234e38;

var<workgroup> partials: array<vec4<f32>, PARTIALS>;
var<workgroup> scores: array<vec4<f32>, SPLIT_TOKENS>; // then the weights
var<workgroup> of_lanes: array<vec4<f32>, 32>;

// K or V of a token: 8 elements of it, still packed. Zeros where the token is not seen: its memory may hold anything.
fn load_seen(kv_head: u32, first_block: u32, side: u32, token: u32, begin: u32, end: u32, octet: u32) -> vec4<u32> {
    if token < begin || token >= end { return vec4(0u); }
    let block = (block_table[first_block + token / BLOCK_TOKENS] * params.kv_heads + kv_head) * 2u + side;
    return load_octet((block * BLOCK_TOKENS + token % BLOCK_TOKENS) * params.head_width + 8u * octet, params.head_width - 8u * octet);
}

fn product(octet: vec4<u32>, q: array<vec4<f32>, 8>) -> vec4<f32> {
    let k01 = unpack2x16float(octet.x);
    let k23 = unpack2x16float(octet.y);
    let k45 = unpack2x16float(octet.z);
    let k67 = unpack2x16float(octet.w);
    var sum = q[0] * k01.x;
    sum = fma(q[1], vec4(k01.y), sum);
    sum = fma(q[2], vec4(k23.x), sum);
    sum = fma(q[3], vec4(k23.y), sum);
    sum = fma(q[4], vec4(k45.x), sum);
    sum = fma(q[5], vec4(k45.y), sum);
    sum = fma(q[6], vec4(k67.x), sum);
    return fma(q[7], vec4(k67.y), sum);
}

fn add_values(values: ptr<function, array<vec4<f32>, 8>>, weight: vec4<f32>, octet: vec4<u32>) {
    let v01 = unpack2x16float(octet.x);
    let v23 = unpack2x16float(octet.y);
    let v45 = unpack2x16float(octet.z);
    let v67 = unpack2x16float(octet.w);
    (*values)[0] = fma(weight, vec4(v01.x), (*values)[0]);
    (*values)[1] = fma(weight, vec4(v01.y), (*values)[1]);
    (*values)[2] = fma(weight, vec4(v23.x), (*values)[2]);
    (*values)[3] = fma(weight, vec4(v23.y), (*values)[3]);
    (*values)[4] = fma(weight, vec4(v45.x), (*values)[4]);
    (*values)[5] = fma(weight, vec4(v45.y), (*values)[5]);
    (*values)[6] = fma(weight, vec4(v67.x), (*values)[6]);
    (*values)[7] = fma(weight, vec4(v67.y), (*values)[7]);
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let part = parts[params.first_part + workgroup.x];
    let width = params.head_width;
    let octets = (width + 7u) / 8u;
    let group = params.q_heads / params.kv_heads;
    let quads = (group + 3u) / 4u;
    let kv_head = workgroup.y / quads;
    let first_in_group = workgroup.y % quads * 4u;
    let first_head = kv_head * group + first_in_group;
    let n_heads = min(4u, group - first_in_group);
    // Heads beyond the group's last are the last one again, and never written.
    let heads = first_head + min(vec4(0u, 1u, 2u, 3u), vec4(n_heads - 1u));

    let end = min(part.y + 1u, (part.w + 1u) * SPLIT_TOKENS);
    let visible_from = select(0u, part.y + 1u - params.window, params.window != 0u && part.y + 1u > params.window);
    let begin = max(visible_from, part.w * SPLIT_TOKENS);
    let first_token = part.w * SPLIT_TOKENS;

    // A lane has one octet of every tokens_at_once-th token.
    let tokens_at_once = LANES / octets;
    let octet = lane % octets;
    let lane_token = lane / octets;
    let busy = lane_token < tokens_at_once;
    let q_at = part.x * params.q_stride + heads * width + 8u * octet;
    var q: array<vec4<f32>, 8>;
    for (var j = 0u; j < 8u; j++) {
        q[j] = vec4(0.0);
        if 8u * octet + j < width { q[j] = vec4(qkv[q_at.x + j], qkv[q_at.y + j], qkv[q_at.z + j], qkv[q_at.w + j]); }
    }

    let batch = select(16u, 32u, octets <= 16u);
    let pitch = octets + 1u;
    for (var batch_start = begin / batch * batch; batch_start < end; batch_start += batch) {
        // Four loads at a time are under way together.
        for (var t = lane_token; busy && t < batch; t += 4u * tokens_at_once) {
            let token = batch_start + t;
            let at = t * pitch + octet;
            let step = tokens_at_once;
            let k0 = load_seen(kv_head, part.z, 0u, token, begin, end, octet);
            let k1 = load_seen(kv_head, part.z, 0u, token + step, begin, min(end, batch_start + batch), octet);
            let k2 = load_seen(kv_head, part.z, 0u, token + 2u * step, begin, min(end, batch_start + batch), octet);
            let k3 = load_seen(kv_head, part.z, 0u, token + 3u * step, begin, min(end, batch_start + batch), octet);
            partials[at] = product(k0, q);
            if t + step < batch { partials[at + step * pitch] = product(k1, q); }
            if t + 2u * step < batch { partials[at + 2u * step * pitch] = product(k2, q); }
            if t + 3u * step < batch { partials[at + 3u * step * pitch] = product(k3, q); }
        }
        workgroupBarrier();
        // One lane per token and head; its sum over octets ascends.
        for (var i = lane; i < 4u * batch; i += LANES) {
            let token = batch_start + i / 4u;
            if token >= begin && token < end {
                var sum = partials[i / 4u * pitch][i % 4u];
                for (var o = 1u; o < octets; o++) { sum += partials[i / 4u * pitch + o][i % 4u]; }
                scores[token - first_token][i % 4u] = sum * params.scale;
            }
        }
        workgroupBarrier();
    }

    // A maximum has no order; the sum of weights goes by lanes, then over 32 lanes ascending.
    if lane < 32u {
        var greatest = vec4(LOWEST);
        for (var token = first_token + lane; token < end; token += 32u) {
            if token >= begin { greatest = max(greatest, scores[token - first_token]); }
        }
        of_lanes[lane] = greatest;
    }
    workgroupBarrier();
    var greatest = of_lanes[0];
    for (var i = 1u; i < 32u; i++) { greatest = max(greatest, of_lanes[i]); }
    workgroupBarrier();
    for (var token = first_token + lane; token < end; token += LANES) {
        if token >= begin { scores[token - first_token] = exp(scores[token - first_token] - greatest); }
    }
    workgroupBarrier();
    if lane < 32u {
        var total = vec4(0.0);
        for (var token = first_token + lane; token < end; token += 32u) {
            if token >= begin { total += scores[token - first_token]; }
        }
        of_lanes[lane] = total;
    }

    // Values: each lane sums its octet of every tokens_at_once-th token, counted from the part's start.
    var values = array<vec4<f32>, 8>();
    for (var token = first_token + lane_token; busy && token < end; token += 4u * tokens_at_once) {
        let step = tokens_at_once;
        let v0 = load_seen(kv_head, part.z, 1u, token, begin, end, octet);
        let v1 = load_seen(kv_head, part.z, 1u, token + step, begin, end, octet);
        let v2 = load_seen(kv_head, part.z, 1u, token + 2u * step, begin, end, octet);
        let v3 = load_seen(kv_head, part.z, 1u, token + 3u * step, begin, end, octet);
        let i = token - first_token;
        if token >= begin { add_values(&values, scores[i], v0); }
        if token + step >= begin && token + step < end { add_values(&values, scores[i + step], v1); }
        if token + 2u * step >= begin && token + 2u * step < end { add_values(&values, scores[i + 2u * step], v2); }
        if token + 3u * step >= begin && token + 3u * step < end { add_values(&values, scores[i + 3u * step], v3); }
    }
    let part_idx = workgroup.x;
    for (var half = 0u; half < 2u; half++) {
        workgroupBarrier();
        for (var j = 0u; j < 4u; j++) { partials[j * LANES + lane] = select(values[4u + j], values[j], half == 0u); }
        workgroupBarrier();
        for (var i = lane; i < 4u * octets; i += LANES) {
            let j = i / octets;
            let o = i % octets;
            var sum = partials[j * LANES + o];
            for (var t = 1u; t < tokens_at_once; t++) { sum += partials[j * LANES + t * octets + o]; }
            let column = 8u * o + 4u * half + j;
            if column < width {
                for (var h = 0u; h < n_heads; h++) { sums[(part_idx * params.q_heads + first_head + h) * width + column] = sum[h]; }
            }
        }
    }
    if lane < n_heads {
        var total = of_lanes[0][lane];
        for (var i = 1u; i < 32u; i++) { total += of_lanes[i][lane]; }
        states[part_idx * params.q_heads + first_head + lane] = vec2(greatest[lane], total);
    }
}
