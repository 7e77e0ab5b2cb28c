// Causal attention of prompt rows over their paged context.   One workgroup per KV head and tile; a tile is some consecutive tokens of
// one sequence, with the query heads of the KV head (with some of them, where they are more than TILE_ROWS): row m of it is token
// m / heads, head m % heads. Its rows share every load of K and V.
// Softmax runs online over the blocks of the context in ascending order, each score is one chain over the head's elements and each sum
// one chain over tokens: a row's result depends on its position, its window and its context alone, so no cut of a prompt and no other
// row changes a bit of it. K and V are read as the cache stores them, the row's own chunk included.
// lavapipe 22.3 ends an invocation after 65,535 loop iterations: about 12,000 tokens of context at head width 128.
// Reference: src/reference/prompt_attention.rs      Needs: shared/kv_words (load_kv)
struct Params {
    n_tiles: u32, q_heads: u32, kv_heads: u32, head_width: u32, q_stride: u32, window: u32, scale: f32, has_sinks: u32,
}
var<immediate> params: Params;
@group(0) @binding(0) var<storage, read>       qkv: array<f32>;         // [T, q_stride], each row's H query heads of K first
@group(0) @binding(1) var<storage, read>       tiles: array<vec4<u32>>; // first row t, its position, first entry of block_table, tokens
@group(0) @binding(2) var<storage, read>       block_table: array<u32>; // block of context tokens 32 i .. 32 i + 32
@group(0) @binding(3) var<storage, read>       kv_blocks: array<u32>;   // [blocks, G, 2, BLOCK_TOKENS, K] f16, two to a word
@group(0) @binding(4) var<storage, read_write> out: array<f32>;         // [T, H, K]
@group(0) @binding(5) var<storage, read>       sinks: array<f32>;       // [H] scores without a value, where has_sinks

const BLOCK_TOKENS: u32 = 32u;
const TILE_ROWS: u32 = 32u;
const ROW_QUADS: u32 = 8u;
const LANES: u32 = 128u;
const COLUMN_GROUPS: u32 = 16u; // LANES / ROW_QUADS
// Elements of each query and key that are staged at a time.
const STEP: u32 = 32u;
const MAX_HEAD_WIDTH: u32 = 256u;
const SUMS: u32 = MAX_HEAD_WIDTH / COLUMN_GROUPS; // columns of a lane, four rows each
const KEY_PITCH: u32 = BLOCK_TOKENS + 2u;
const QUERY_PITCH: u32 = ROW_QUADS + 1u;
// Below every score: the finite one, since an infinite one minus itself is no number.
const LOWEST: f32 = -3.4028234e38;

var<workgroup> query_tile: array<vec4<f32>, STEP * QUERY_PITCH>;         // [STEP][ROW_QUADS]
var<workgroup> key_tile: array<f32, STEP * KEY_PITCH>;                   // [STEP][BLOCK_TOKENS]
var<workgroup> weights: array<vec4<f32>, BLOCK_TOKENS * ROW_QUADS>;      // [BLOCK_TOKENS][ROW_QUADS]
var<workgroup> of_groups: array<vec4<f32>, COLUMN_GROUPS * ROW_QUADS>;   // [COLUMN_GROUPS][ROW_QUADS] maxima, at last sums

// Which of four rows see a token.
fn visible(token: u32, begin: vec4<u32>, end: vec4<u32>) -> vec4<bool> { return (vec4(token) >= begin) & (vec4(token) < end); }

// Two columns' sums, of four rows each: one more token. All indices are constants once the calls are inlined.
fn add_value(sums: ptr<function, array<vec4<f32>, SUMS>>, i: u32, weight: vec4<f32>, v: vec2<f32>) {
    (*sums)[2u * i] = fma(weight, vec4(v.x), (*sums)[2u * i]);
    (*sums)[2u * i + 1u] = fma(weight, vec4(v.y), (*sums)[2u * i + 1u]);
}

// The same for rows of which some do not see the token: its value may be anything to them.
fn add_value_to(sums: ptr<function, array<vec4<f32>, SUMS>>, i: u32, weight: vec4<f32>, v: vec2<f32>, seen: vec4<bool>) {
    (*sums)[2u * i] = select((*sums)[2u * i], fma(weight, vec4(v.x), (*sums)[2u * i]), seen);
    (*sums)[2u * i + 1u] = select((*sums)[2u * i + 1u], fma(weight, vec4(v.y), (*sums)[2u * i + 1u]), seen);
}

@compute @workgroup_size(LANES)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let width = params.head_width;
    let words = width / 2u;
    let group = params.q_heads / params.kv_heads;
    let kv_head = workgroup.x;
    let tile = tiles[workgroup.y];
    let heads_each = (group + workgroups.z - 1u) / workgroups.z;
    let first_head = kv_head * group + workgroup.z * heads_each;
    let heads = min(heads_each, group - workgroup.z * heads_each);
    let n_rows = tile.w * heads;
    // A lane owns four rows: of two tokens' scores, then of some columns' sums.
    let row_quad = lane % ROW_QUADS;
    let column_group = lane / ROW_QUADS;
    let rows = vec4(4u * row_quad) + vec4(0u, 1u, 2u, 3u);
    let there = rows < vec4(n_rows);
    // A row sees tokens begin .. end of its sequence, the tile as a whole first .. last. Rows beyond the tile's last see nothing.
    let ends = vec4(tile.y + 1u) + rows / heads;
    let end = select(vec4(0u), ends, there);
    let windowed = vec4(params.window != 0u) & (ends > vec4(params.window));
    let begin = select(vec4(0u), ends - params.window, windowed);
    let last = tile.y + tile.w;
    let first = select(0u, tile.y + 1u - params.window, params.window != 0u && tile.y + 1u > params.window);
    let last_begin = select(0u, last - params.window, params.window != 0u && last > params.window);

    var sums = array<vec4<f32>, SUMS>();
    var greatest = vec4(LOWEST);
    var total = vec4(0.0);
    for (var block = first / BLOCK_TOKENS; block * BLOCK_TOKENS < last; block++) {
        let first_token = block * BLOCK_TOKENS;
        let keys = (block_table[tile.z + block] * params.kv_heads + kv_head) * 2u * BLOCK_TOKENS * words;
        let token = first_token + 2u * column_group;
        var scores_low = vec4(0.0);
        var scores_high = vec4(0.0);
        for (var first_word = 0u; first_word < words; first_word += STEP / 2u) {
            let n_words = min(words - first_word, STEP / 2u);
            workgroupBarrier();
            // Zeros where no row of the tile sees the token, which may hold anything.
            for (var i = lane; i < BLOCK_TOKENS * n_words; i += LANES) {
                let line = i / n_words;
                let word = i % n_words;
                var k = vec2(0.0);
                if first_token + line >= first && first_token + line < last {
                    k = load_kv(keys + line * words + first_word + word);
                }
                key_tile[2u * word * KEY_PITCH + line] = k.x;
                key_tile[(2u * word + 1u) * KEY_PITCH + line] = k.y;
            }
            for (var i = lane; i < 2u * n_words * ROW_QUADS; i += LANES) {
                let j = i % (2u * n_words);
                let quad = i / (2u * n_words);
                var q = vec4(0.0);
                for (var r = 0u; r < 4u; r++) {
                    let row = 4u * quad + r;
                    if row < n_rows {
                        let at = (tile.x + row / heads) * params.q_stride + (first_head + row % heads) * width;
                        q[r] = qkv[at + 2u * first_word + j];
                    }
                }
                query_tile[j * QUERY_PITCH + quad] = q;
            }
            workgroupBarrier();
            for (var j = 0u; j < 2u * n_words; j++) {
                let q = query_tile[j * QUERY_PITCH + row_quad];
                scores_low = fma(q, vec4(key_tile[j * KEY_PITCH + 2u * column_group]), scores_low);
                scores_high = fma(q, vec4(key_tile[j * KEY_PITCH + 2u * column_group + 1u]), scores_high);
            }
        }
        let sees_low = visible(token, begin, end);
        let sees_high = visible(token + 1u, begin, end);
        scores_low = select(vec4(LOWEST), scores_low * params.scale, sees_low);
        scores_high = select(vec4(LOWEST), scores_high * params.scale, sees_high);
        of_groups[column_group * ROW_QUADS + row_quad] = max(scores_low, scores_high);
        workgroupBarrier();
        let before = greatest;
        for (var i = 0u; i < COLUMN_GROUPS; i++) { greatest = max(greatest, of_groups[i * ROW_QUADS + row_quad]); }
        let rescale = exp(before - greatest);
        let weights_low = select(vec4(0.0), exp(scores_low - greatest), sees_low);
        let weights_high = select(vec4(0.0), exp(scores_high - greatest), sees_high);
        // Every lane sums the weights of its own two tokens of each block.
        total = fma(total, rescale, weights_low) + weights_high;
        weights[2u * column_group * ROW_QUADS + row_quad] = weights_low;
        weights[(2u * column_group + 1u) * ROW_QUADS + row_quad] = weights_high;
        workgroupBarrier();

        for (var i = 0u; i < SUMS; i++) { sums[i] *= rescale; }
        let values = keys + BLOCK_TOKENS * words;
        let first_seen = max(first, first_token) - first_token;
        let end_seen = min(last - first_token, BLOCK_TOKENS);
        // Columns beyond the last are the last one again, and never written.
        let w = min(vec4(column_group) + vec4(0u, 16u, 32u, 48u), vec4(words - 1u));
        let w_more = min(vec4(column_group) + vec4(64u, 80u, 96u, 112u), vec4(words - 1u));
        let all_see = first_token >= last_begin && first_token + BLOCK_TOKENS <= tile.y + 1u;
        if all_see {
            for (var t = 0u; t < BLOCK_TOKENS; t++) {
                let weight = weights[t * ROW_QUADS + row_quad];
                let line = values + t * words;
                add_value(&sums, 0u, weight, load_kv(line + w.x));
                if words > 16u { add_value(&sums, 1u, weight, load_kv(line + w.y)); }
                if words > 32u {
                    add_value(&sums, 2u, weight, load_kv(line + w.z));
                    add_value(&sums, 3u, weight, load_kv(line + w.w));
                }
                if words > 64u {
                    add_value(&sums, 4u, weight, load_kv(line + w_more.x));
                    add_value(&sums, 5u, weight, load_kv(line + w_more.y));
                    add_value(&sums, 6u, weight, load_kv(line + w_more.z));
                    add_value(&sums, 7u, weight, load_kv(line + w_more.w));
                }
            }
        } else {
            for (var t = first_seen; t < end_seen; t++) {
                let seen = visible(first_token + t, begin, end);
                let weight = weights[t * ROW_QUADS + row_quad];
                let line = values + t * words;
                add_value_to(&sums, 0u, weight, load_kv(line + w.x), seen);
                if words > 16u { add_value_to(&sums, 1u, weight, load_kv(line + w.y), seen); }
                if words > 32u {
                    add_value_to(&sums, 2u, weight, load_kv(line + w.z), seen);
                    add_value_to(&sums, 3u, weight, load_kv(line + w.w), seen);
                }
                if words > 64u {
                    add_value_to(&sums, 4u, weight, load_kv(line + w_more.x), seen);
                    add_value_to(&sums, 5u, weight, load_kv(line + w_more.y), seen);
                    add_value_to(&sums, 6u, weight, load_kv(line + w_more.z), seen);
                    add_value_to(&sums, 7u, weight, load_kv(line + w_more.w), seen);
                }
            }
        }
    }

    workgroupBarrier();
    of_groups[column_group * ROW_QUADS + row_quad] = total;
    workgroupBarrier();
    total = vec4(0.0);
    for (var i = 0u; i < COLUMN_GROUPS; i++) { total += of_groups[i * ROW_QUADS + row_quad]; }
    for (var r = 0u; r < 4u; r++) {
        let row = rows[r];
        if row >= n_rows { continue; }
        let head = first_head + row % heads;
        var whole = total[r];
        // As if one more token had the sink for a score, and zeros for a value.
        if params.has_sinks != 0u { whole += exp(sinks[head] - greatest[r]); }
        let at = ((tile.x + row / heads) * params.q_heads + head) * width;
        for (var i = 0u; i < 8u; i++) {
            let word = column_group + 16u * i;
            if word < words {
                out[at + 2u * word] = sums[2u * i][r] / whole;
                out[at + 2u * word + 1u] = sums[2u * i + 1u][r] / whole;
            }
        }
    }
}
