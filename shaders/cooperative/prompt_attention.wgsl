// Causal attention of prompt rows over their paged context, with cooperative matrices: f16 operands, f32 sums.
// One workgroup per KV head and tile; a tile is some consecutive tokens of one sequence, with all query heads of the KV head: row m of
// it is token m / group, head m % group. For every KEYS tokens of context, aligned to the sequence's start, K and V go through
// workgroup memory once, each subgroup multiplies its 16 rows with K, two lanes per row make weights of its scores, and the subgroup
// multiplies those with V. What a row's tokens give is one chain over blocks of keys ascending, whatever else lies in its tile.
//
// Weights are exp2(score - reference), and the reference follows the greatest score only where it is passed by more than SLACK, so that
// sums are seldom rescaled: lanes cannot reach a matrix's elements, it has to go through workgroup memory. Rows that need no rescaling
// are multiplied by 1 where another row of the tile does.
//
// A query is divided by the power of two below its greatest element, which is exact, so no query is too large or too small for f16.
// Reference: src/reference/prompt_attention.rs      Needs: WIDTH, SUBGROUPS, KEYS, PREFETCH, Q_CHUNKS, loops unrolled where marked
struct Params {
    n_tiles: u32, q_heads: u32, kv_heads: u32, head_width: u32, q_stride: u32, window: u32, scale: f32, has_sinks: u32,
}
var<immediate> params: Params;
@group(0) @binding(0) var<storage, read>       qkv: array<vec4<f32>>;       // [T, q_stride], each row's H query heads of K first
@group(0) @binding(1) var<storage, read>       tiles: array<vec4<u32>>;     // first row t, its position, first entry of block_table, tokens
@group(0) @binding(2) var<storage, read>       block_table: array<u32>;     // block of context tokens 32 i .. 32 i + 32
@group(0) @binding(3) var<storage, read>       kv_blocks: array<vec4<f16>>; // [blocks, G, 2, BLOCK_TOKENS, K]
@group(0) @binding(4) var<storage, read_write> out: array<vec4<f32>>;       // [T, H, K]
@group(0) @binding(5) var<storage, read>       sinks: array<f32>;           // [H] scores without a value, where has_sinks

const BLOCK_TOKENS: u32 = 32u;
const LANES: u32 = 32u * SUBGROUPS;
const ROWS: u32 = 16u * SUBGROUPS;
const UNITS: u32 = WIDTH / 4u;           // vec4 across a head
const FRAGS: u32 = (WIDTH + 15u) / 16u;  // matrices across a head
const KEY_FRAGS: u32 = KEYS / 16u;
const LOADS: u32 = (KEYS * UNITS + LANES - 1u) / LANES;
// 16 bytes more than a row has: rows next to each other then meet different banks.
const PITCH: u32 = 4u * FRAGS + 2u;
const SCORE_PITCH: u32 = KEYS / 4u + 1u;
const WEIGHT_PITCH: u32 = KEYS / 4u + 2u;
// Queries come through the memory of K, Q_FRAGS matrices of each row at a time.
const Q_FRAGS: u32 = FRAGS / Q_CHUNKS;
const Q_PITCH: u32 = 4u * Q_FRAGS + 2u;
// Below every score: the finite one, since an infinite one minus itself is no number.
const LOWEST: f32 = -3.4028234e38;
// Weights stay below 2^SLACK, far inside f16.
const SLACK: f32 = 8.0;
const LOG2_E: f32 = 1.4426950408889634;
const RESCALE: u32 = 1u;
const NOT_FINITE: u32 = 2u;

// All workgroup memory is of multiples of 16 bytes: matrices are loaded from such addresses, and where a lone word came first the H100 read
// others without a word (28 November 2026).
var<workgroup> key_tile: array<vec4<f16>, max(KEYS * PITCH, ROWS * Q_PITCH)>; // [KEYS][K]
var<workgroup> value_tile: array<vec4<f16>, KEYS * PITCH>;                     // [KEYS][K]
var<workgroup> score_tile: array<vec4<f32>, ROWS * SCORE_PITCH>;               // [ROWS][KEYS]
var<workgroup> weight_tile: array<vec4<f16>, ROWS * WEIGHT_PITCH>;             // [ROWS][KEYS]
var<workgroup> totals: array<vec4<f32>, LANES / 4u>;

var<workgroup> mends: array<atomic<u32>, 4>; // [0]: what a step's sums need before they go on: RESCALE, NOT_FINITE

// Where this KV head's part of a block starts in kv_blocks: K, then V.
fn block_at(entry: u32, kv_head: u32) -> u32 {
    return (block_table[entry] * params.kv_heads + kv_head) * 2u * BLOCK_TOKENS * UNITS;
}

fn is_finite(v: vec4<f16>) -> vec4<bool> { return abs(v) <= vec4<f16>(65504.0h); }

// Visible tokens among the four from `token` on.
fn visible(token: u32, begin: u32, end: u32) -> vec4<bool> {
    let tokens = vec4(token) + vec4(0u, 1u, 2u, 3u);
    return (tokens >= vec4(begin)) & (tokens < vec4(end));
}

// What values that are not finite add to four columns of a row: they were left out of the matrices, where a weight of zero would not
// keep them from other rows.
fn not_finite_terms(row: u32, quad: u32, first_entry: u32, kv_head: u32, first_token: u32, begin: u32, end: u32) -> vec4<f32> {
    var sum = vec4(0.0);
    for (var i = 0u; i < KEYS; i++) {
        let token = first_token + i;
        if token >= begin && token < end && quad < UNITS {
            let at = block_at(first_entry + token / BLOCK_TOKENS, kv_head);
            let v = kv_blocks[at + (BLOCK_TOKENS + token % BLOCK_TOKENS) * UNITS + quad];
            let weight = f32(weight_tile[row * WEIGHT_PITCH + i / 4u][i % 4u]);
            sum += select(weight * vec4<f32>(v), vec4(0.0), is_finite(v));
        }
    }
    return sum;
}

// Number `i` of the vec4 of K or V that a step needs, of which the block's part begins at `at`: zeros where no row of the tile sees the
// token, which may hold anything.
fn stage(at: u32, first_token: u32, first: u32, last: u32, i: u32) -> vec4<f16> {
    let token = first_token + i / UNITS;
    if (KEYS * UNITS % LANES != 0u && i >= KEYS * UNITS) || token < first || token >= last { return vec4<f16>(); }
    return kv_blocks[at + i];
}

fn put_key(i: u32, key: vec4<f16>) {
    if KEYS * UNITS % LANES == 0u || i < KEYS * UNITS { key_tile[i / UNITS * PITCH + i % UNITS] = key; }
}

fn put_value(i: u32, value: vec4<f16>) {
    if KEYS * UNITS % LANES != 0u && i >= KEYS * UNITS { return; }
    var v = value;
    if !all(is_finite(v)) {
        v = select(vec4<f16>(), v, is_finite(v));
        atomicOr(&mends[0], NOT_FINITE);
    }
    value_tile[i / UNITS * PITCH + i % UNITS] = v;
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let kv_head = workgroup.x;
    let tile = tiles[workgroup.y];
    let group = params.q_heads / params.kv_heads;
    let first_of_subgroup = lane / 32u * 16u;
    // Lanes 2 m and 2 m + 1 look after row m.
    let row = lane / 2u;
    let side = lane % 2u;
    let token_of_tile = row / group;
    let head = kv_head * group + row % group;
    let there = token_of_tile < tile.w;
    // A row sees tokens begin .. end of its sequence, the tile as a whole first .. last.
    let own_end = tile.y + token_of_tile + 1u;
    let end = select(0u, own_end, there);
    let begin = select(0u, own_end - params.window, params.window != 0u && own_end > params.window);
    let last = tile.y + tile.w;
    let first = select(0u, tile.y + 1u - params.window, params.window != 0u && tile.y + 1u > params.window);
    let last_begin = select(0u, last - params.window, params.window != 0u && last > params.window);

    let q_at = ((tile.x + token_of_tile) * params.q_stride + head * WIDTH) / 4u;
    var greatest_q = 0.0;
    if there {
        for (var c = 0u; c < UNITS; c++) {
            let q = abs(qkv[q_at + c]);
            greatest_q = max(greatest_q, max(max(q.x, q.y), max(q.z, q.w)));
        }
    }
    let exponent = clamp(bitcast<u32>(greatest_q) >> 23u, 27u, 227u);
    let shrink = bitcast<f32>((254u - exponent) << 23u);
    let factor = params.scale * LOG2_E * bitcast<f32>(exponent << 23u);

    // Columns beyond the head's width stay zero.
    if WIDTH % 16u != 0u {
        for (var i = lane; i < KEYS * PITCH; i += LANES) { value_tile[i] = vec4<f16>(); }
    }
    var query: array<coop_mat16x16<f16, A>, FRAGS>;
    for (var chunk = 0u; chunk < Q_CHUNKS; chunk++) { // unrolled
        workgroupBarrier();
        for (var i = 0u; i < 2u * Q_FRAGS; i++) {
            let c = chunk * 4u * Q_FRAGS + 2u * i + side;
            var q = vec4<f16>();
            if there && c < UNITS { q = vec4<f16>(qkv[q_at + c] * shrink); }
            key_tile[row * Q_PITCH + 2u * i + side] = q;
        }
        workgroupBarrier();
        for (var f = 0u; f < Q_FRAGS; f++) { // unrolled
            query[chunk * Q_FRAGS + f] = coopLoadT<coop_mat16x16<f16, A>>(&key_tile[first_of_subgroup * Q_PITCH + f * 4u], Q_PITCH);
        } // f
    } // chunk
    if WIDTH % 16u != 0u {
        workgroupBarrier();
        for (var i = lane; i < KEYS * PITCH; i += LANES) { key_tile[i] = vec4<f16>(); }
    }
    if lane == 0u { atomicStore(&mends[0], 0u); }

    var sums: array<coop_mat16x16<f32, C>, FRAGS>;
    for (var f = 0u; f < FRAGS; f++) { // unrolled
        sums[f] = coop_mat16x16<f32, C>();
    } // f
    var reference = LOWEST;
    var total = vec4(0.0);
    let first_step = first / KEYS;
    var staged_keys: array<vec4<f16>, LOADS>;
    var staged_values: array<vec4<f16>, LOADS>;
    // The block of the step whose units are staged next.
    var next_block = block_at(tile.z + first_step, kv_head);
    if PREFETCH {
        for (var i = 0u; i < LOADS; i++) { // unrolled
            staged_keys[i] = stage(next_block, first_step * KEYS, first, last, i * LANES + lane);
            staged_values[i] = stage(next_block + BLOCK_TOKENS * UNITS, first_step * KEYS, first, last, i * LANES + lane);
        } // i
        if (first_step + 1u) * KEYS < last { next_block = block_at(tile.z + first_step + 1u, kv_head); }
    }
    for (var step = first_step; step * KEYS < last; step++) {
        let first_token = step * KEYS;
        if !PREFETCH {
            for (var i = 0u; i < LOADS; i++) { // unrolled
                staged_keys[i] = stage(next_block, first_token, first, last, i * LANES + lane);
                staged_values[i] = stage(next_block + BLOCK_TOKENS * UNITS, first_token, first, last, i * LANES + lane);
            } // i
            if first_token + KEYS < last { next_block = block_at(tile.z + step + 1u, kv_head); }
        }
        workgroupBarrier();
        for (var i = 0u; i < LOADS; i++) { // unrolled
            put_key(i * LANES + lane, staged_keys[i]);
            put_value(i * LANES + lane, staged_values[i]);
        } // i
        workgroupBarrier();
        if PREFETCH {
            // Beyond the last step no token is visible, and nothing is read.
            for (var i = 0u; i < LOADS; i++) { // unrolled
                staged_keys[i] = stage(next_block, first_token + KEYS, first, last, i * LANES + lane);
                staged_values[i] = stage(next_block + BLOCK_TOKENS * UNITS, first_token + KEYS, first, last, i * LANES + lane);
            } // i
            if first_token + 2u * KEYS < last { next_block = block_at(tile.z + step + 2u, kv_head); }
        }

        var scores: array<coop_mat16x16<f32, C>, KEY_FRAGS>;
        for (var n = 0u; n < KEY_FRAGS; n++) { // unrolled
            scores[n] = coop_mat16x16<f32, C>();
        } // n
        for (var f = 0u; f < FRAGS; f++) { // unrolled
            for (var n = 0u; n < KEY_FRAGS; n++) { // unrolled
                scores[n] = coopMultiplyAdd(query[f], coopLoad<coop_mat16x16<f16, B>>(&key_tile[n * 16u * PITCH + f * 4u], PITCH), scores[n]);
            } // n
        } // f
        for (var n = 0u; n < KEY_FRAGS; n++) { // unrolled
            coopStoreT(scores[n], &score_tile[first_of_subgroup * SCORE_PITCH + n * 4u], SCORE_PITCH);
        } // n
        workgroupBarrier();

        // Both lanes of a row look at all its scores, and each makes weights of every second four. Rows that are not there have all sums of
        // zeros, which nobody reads.
        let all_see = first_token >= last_begin && first_token + KEYS <= tile.y + 1u;
        var of_row: array<vec4<f32>, KEYS / 4u>;
        for (var c = 0u; c < KEYS / 4u; c++) { // unrolled
            of_row[c] = score_tile[row * SCORE_PITCH + c];
        } // c
        if !all_see {
            for (var c = 0u; c < KEYS / 4u; c++) { // unrolled
                of_row[c] = select(vec4(LOWEST), of_row[c], visible(first_token + 4u * c, begin, end));
            } // c
        }
        var greatest = vec4(LOWEST);
        for (var c = 0u; c < KEYS / 4u; c++) { // unrolled
            greatest = max(greatest, of_row[c]);
        } // c
        let passing = max(max(greatest.x, greatest.y), max(greatest.z, greatest.w)) * factor;
        var rescale = 1.0;
        if passing > reference + SLACK {
            rescale = exp2(reference - passing);
            reference = passing;
            // Before the first step of a tile there are no sums.
            if step != first_step { atomicOr(&mends[0], RESCALE); }
        }
        total *= rescale;
        for (var i = 0u; i < KEYS / 8u; i++) { // unrolled
            let score = select(of_row[2u * i], of_row[2u * i + 1u], side == 1u);
            let c = 2u * i + side;
            var exps = exp2(fma(score, vec4(factor), vec4(-reference)));
            if !all_see { exps = select(vec4(0.0), exps, visible(first_token + 4u * c, begin, end)); }
            let weights = vec4<f16>(exps);
            // As they are multiplied, rounded.
            total += vec4<f32>(weights);
            weight_tile[row * WEIGHT_PITCH + c] = weights;
        } // i

        let mend = workgroupUniformLoad(&mends[0]);
        if lane == 0u { atomicStore(&mends[0], 0u); }
        if mend != 0u {
            for (var f = 0u; f < FRAGS; f++) { // unrolled
                coopStoreT(sums[f], &score_tile[first_of_subgroup * SCORE_PITCH + f % 2u * 4u], SCORE_PITCH);
                workgroupBarrier();
                for (var i = 0u; i < 2u; i++) {
                    let c = 2u * i + side;
                    let at = row * SCORE_PITCH + f % 2u * 4u + c;
                    var sum = score_tile[at] * rescale;
                    if (mend & NOT_FINITE) != 0u {
                        sum += not_finite_terms(row, f * 4u + c, tile.z, kv_head, first_token, begin, end);
                    }
                    score_tile[at] = sum;
                }
                workgroupBarrier();
                sums[f] = coopLoadT<coop_mat16x16<f32, C>>(&score_tile[first_of_subgroup * SCORE_PITCH + f % 2u * 4u], SCORE_PITCH);
            } // f
        }
        for (var n = 0u; n < KEY_FRAGS; n++) { // unrolled
            let weights = coopLoadT<coop_mat16x16<f16, A>>(&weight_tile[first_of_subgroup * WEIGHT_PITCH + n * 4u], WEIGHT_PITCH);
            for (var f = 0u; f < FRAGS; f++) { // unrolled
                sums[f] = coopMultiplyAdd(weights, coopLoadT<coop_mat16x16<f16, B>>(&value_tile[n * 16u * PITCH + f * 4u], PITCH), sums[f]);
            } // f
        } // n
    }

    totals[lane / 4u][lane % 4u] = (total.x + total.y) + (total.z + total.w);
    workgroupBarrier();
    var whole = totals[2u * row / 4u][2u * row % 4u] + totals[(2u * row + 1u) / 4u][(2u * row + 1u) % 4u];
    if params.has_sinks != 0u {
        // As if one more token had the sink for a score, and zeros for a value.
        whole += exp2(fma(sinks[min(head, params.q_heads - 1u)], LOG2_E, -reference));
    }
    let out_at = ((tile.x + token_of_tile) * params.q_heads + head) * UNITS;
    for (var f = 0u; f < FRAGS; f++) { // unrolled
        coopStoreT(sums[f], &score_tile[first_of_subgroup * SCORE_PITCH + f % 2u * 4u], SCORE_PITCH);
        workgroupBarrier();
        for (var i = 0u; i < 2u; i++) {
            let c = 2u * i + side;
            if there && f * 4u + c < UNITS {
                out[out_at + f * 4u + c] = score_tile[row * SCORE_PITCH + f % 2u * 4u + c] / whole;
            }
        }
    } // f
}
