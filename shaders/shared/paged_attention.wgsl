// Attention of one row over its paged context, for up to four query heads of one KV head (a vec4 holds one value of each),
// which share every load of K and V. Softmax runs online over the blocks of the context in ascending order: a row's result
// depends on its position, its window and its context alone, so no cut of a prompt and no other row changes a bit of it.
// Needs: workgroup_id as (entry of rows, KV head and four of its query heads), params, the bindings below.
struct Params {
    n_rows: u32, q_heads: u32, kv_heads: u32, head_width: u32, q_stride: u32, window: u32, scale: f32, has_sinks: u32,
}
var<immediate> params: Params;
@group(0) @binding(0) var<storage, read>       qkv: array<f32>;         // [T, q_stride], each row's H query heads of K first
@group(0) @binding(1) var<storage, read>       rows: array<vec4<u32>>;  // [R] row t, position, first entry of block_table, unused
@group(0) @binding(2) var<storage, read>       block_table: array<u32>; // block of context tokens 32 i .. 32 i + 32
@group(0) @binding(3) var<storage, read>       kv_blocks: array<u32>;   // [blocks, G, 2, BLOCK_TOKENS, K] f16, two to a word
@group(0) @binding(4) var<storage, read_write> out: array<f32>;         // [T, H, K]
@group(0) @binding(5) var<storage, read>       sinks: array<f32>;       // [H] scores without a value, where has_sinks

override WG_SIZE: u32 = 32u; // at least BLOCK_TOKENS

const BLOCK_TOKENS: u32 = 32u;
const MAX_HEAD_WIDTH: u32 = 256u;
// Words of each K row that are staged at a time; the pitch is odd, so lanes that read neighbouring rows meet different banks.
const STAGE_WORDS: u32 = 32u;
const STAGE_PITCH: u32 = STAGE_WORDS + 1u;
const MAXIMA: u32 = BLOCK_TOKENS / 4u;
// Below every score: the finite one, since an infinite one minus itself is no number.
const LOWEST: f32 = -3.4028234e38;

var<workgroup> query: array<vec4<f32>, MAX_HEAD_WIDTH>;           // [K]
var<workgroup> sums: array<vec4<f32>, MAX_HEAD_WIDTH>;            // [K] of exp(score - greatest) * V so far
var<workgroup> scores: array<vec4<f32>, BLOCK_TOKENS>;
var<workgroup> maxima: array<vec4<f32>, MAXIMA>;                  // of four scores each
var<workgroup> exps: array<vec4<f32>, BLOCK_TOKENS>;
var<workgroup> stage: array<u32, BLOCK_TOKENS * STAGE_PITCH>;     // [BLOCK_TOKENS][STAGE_WORDS] of K

fn attend(row: vec4<u32>, heads: u32, lane: u32) {
    let width = params.head_width;
    let words = width / 2u;
    let group = params.q_heads / params.kv_heads;
    let quads = (group + 3u) / 4u;
    let kv_head = heads / quads;
    let first_in_group = heads % quads * 4u;
    let first_head = kv_head * group + first_in_group;
    let n_heads = min(4u, group - first_in_group);

    // Heads beyond the group's last are zeros, and never written.
    let there = vec4(0u, 1u, 2u, 3u) < vec4(n_heads);
    for (var j = lane; j < width; j += WG_SIZE) {
        let q = row.x * params.q_stride + first_head * width + j + min(vec4(0u, 1u, 2u, 3u), vec4(n_heads - 1u)) * width;
        query[j] = select(vec4(0.0), vec4(qkv[q.x], qkv[q.y], qkv[q.z], qkv[q.w]), there);
        sums[j] = vec4(0.0);
    }

    let end = row.y + 1u;
    let begin = select(0u, end - params.window, params.window != 0u && end > params.window);
    var greatest = vec4(LOWEST);
    var total = vec4(0.0);
    if params.has_sinks != 0u {
        // As if a token before all others had the sink for a score, and zeros for a value.
        let h = first_head + min(vec4(0u, 1u, 2u, 3u), vec4(n_heads - 1u));
        greatest = max(vec4(sinks[h.x], sinks[h.y], sinks[h.z], sinks[h.w]), vec4(LOWEST));
        total = vec4(1.0);
    }
    for (var block = begin / BLOCK_TOKENS; block * BLOCK_TOKENS < end; block++) {
        // The visible tokens of the block. The others are never read: they may hold anything.
        let first = max(begin, block * BLOCK_TOKENS) - block * BLOCK_TOKENS;
        let beyond = min(end - block * BLOCK_TOKENS, BLOCK_TOKENS);
        let keys = (block_table[row.z + block] * params.kv_heads + kv_head) * 2u * BLOCK_TOKENS * words;
        let values = keys + BLOCK_TOKENS * words;

        // Scores: one lane per token, its chain of fma over j ascending. K goes through workgroup memory, since lanes that
        // each walk along a row of their own would touch a line each with every load.
        var score = vec4(0.0);
        for (var first_word = 0u; first_word < words; first_word += STAGE_WORDS) {
            workgroupBarrier();
            let n = min(words - first_word, STAGE_WORDS);
            for (var i = first * n + lane; i < beyond * n; i += WG_SIZE) {
                stage[i / n * STAGE_PITCH + i % n] = kv_blocks[keys + i / n * words + first_word + i % n];
            }
            workgroupBarrier();
            if lane >= first && lane < beyond {
                for (var word = 0u; word < n; word++) {
                    let k = unpack2x16float(stage[lane * STAGE_PITCH + word]);
                    let j = 2u * (first_word + word);
                    score = fma(query[j + 1u], vec4(k.y), fma(query[j], vec4(k.x), score));
                }
            }
        }
        if lane < BLOCK_TOKENS {
            scores[lane] = select(vec4(LOWEST), score * params.scale, lane >= first && lane < beyond);
        }
        workgroupBarrier();
        // A maximum has no order, so this may be split over lanes.
        if lane < MAXIMA {
            maxima[lane] = max(max(scores[lane], scores[lane + MAXIMA]),
                               max(scores[lane + 2u * MAXIMA], scores[lane + 3u * MAXIMA]));
        }
        workgroupBarrier();
        let before = greatest;
        greatest = max(greatest, max(max(max(maxima[0], maxima[1]), max(maxima[2], maxima[3])),
                                     max(max(maxima[4], maxima[5]), max(maxima[6], maxima[7]))));
        if lane < BLOCK_TOKENS { exps[lane] = exp(scores[lane] - greatest); }
        workgroupBarrier();

        // Values: one lane per two of the K columns. Every lane that has some sums the exps for itself as it goes.
        let rescale = exp(before - greatest);
        let total_before = total * rescale;
        for (var word = lane; word < words; word += WG_SIZE) {
            var low = sums[2u * word] * rescale;
            var high = sums[2u * word + 1u] * rescale;
            total = total_before;
            for (var token = first; token < beyond; token++) {
                let v = unpack2x16float(kv_blocks[values + token * words + word]);
                let p = exps[token];
                total += p;
                low = fma(p, vec4(v.x), low);
                high = fma(p, vec4(v.y), high);
            }
            sums[2u * word] = low;
            sums[2u * word + 1u] = high;
        }
    }

    // Each lane reads only sums that it wrote.
    for (var word = lane; word < words; word += WG_SIZE) {
        let low = sums[2u * word] / total;
        let high = sums[2u * word + 1u] / total;
        let at = (row.x * params.q_heads + first_head) * width + 2u * word;
        if there.x { out[at] = low.x; out[at + 1u] = high.x; }
        if there.y { out[at + width] = low.y; out[at + width + 1u] = high.y; }
        if there.z { out[at + 2u * width] = low.z; out[at + 2u * width + 1u] = high.z; }
        if there.w { out[at + 3u * width] = low.w; out[at + 3u * width + 1u] = high.w; }
    }
}
