// Rotary embedding of the fused projection, whose elements are clamped first: q in place; k and v rounded to f16 for the host's cache and the GPU's blocks.
// One invocation per pair of elements of a row: heads x K/2.
// Reference: src/reference/rotary.rs      Needs: shared/f16 (pack_f16)
struct Params { n_rows: u32, q_heads: u32, kv_heads: u32, head_width: u32, clip: f32 }
var<immediate> params: Params;
@group(0) @binding(0) var<storage, read_write> qkv: array<f32>;           // [T, (H + 2 G) K] q heads, k heads, v heads; only q changes
@group(0) @binding(1) var<storage, read>       positions: array<u32>;     // [T], each below P
@group(0) @binding(2) var<storage, read>       rope_table: array<vec2<f32>>; // [P, K/2] (cos, sin)
@group(0) @binding(3) var<storage, read>       kv_slots: array<u32>;      // [T] block * BLOCK_TOKENS + token in it, or NO_SLOT
@group(0) @binding(4) var<storage, read_write> kv_rows: array<u32>;       // [T, G, 2, K/2] f16 pairs: K, then V
@group(0) @binding(5) var<storage, read_write> kv_blocks: array<u32>;     // [blocks, G, 2, BLOCK_TOKENS, K/2] f16 pairs

const BLOCK_TOKENS: u32 = 32u;
const NO_SLOT: u32 = 0xffffffffu;

// An element of qkv within ±clip; 0 is no clip. select, not clamp: a NaN stays one.
fn clipped(at: u32) -> f32 {
    let value = qkv[at];
    if params.clip == 0.0 { return value; }
    return select(select(value, params.clip, value > params.clip), -params.clip, value < -params.clip);
}

// The pair (j, j + K/2) of the head that starts at `head`, turned by its angle.
fn rotated_pair(head: u32, row: u32, j: u32) -> vec2<f32> {
    let half = params.head_width / 2u;
    let low = clipped(head + j);
    let high = clipped(head + half + j);
    let turn = rope_table[positions[row] * half + j];
    return vec2(fma(-high, turn.y, low * turn.x), fma(low, turn.y, high * turn.x));
}

// Element `i` of a k head after rotation.
fn rotated(head: u32, row: u32, i: u32) -> f32 {
    let half = params.head_width / 2u;
    if i < half { return rotated_pair(head, row, i).x; }
    return rotated_pair(head, row, i - half).y;
}

override WG_SIZE: u32 = 256u;

@compute @workgroup_size(WG_SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let half = params.head_width / 2u;
    let heads = params.q_heads + 2u * params.kv_heads;
    let row = workgroup.x;
    let pair = workgroup.y * WG_SIZE + lane;
    if pair >= heads * half { return; }
    let head_idx = pair / half;
    let j = pair % half;
    let head = (row * heads + head_idx) * params.head_width;
    if head_idx < params.q_heads {
        let turned = rotated_pair(head, row, j);
        qkv[head + j] = turned.x;
        qkv[head + half + j] = turned.y;
        return;
    }
    // Word j of a K or V head holds its elements 2j and 2j + 1.
    var kv_head = head_idx - params.q_heads;
    let is_value = kv_head >= params.kv_heads;
    var word: u32;
    if is_value {
        kv_head -= params.kv_heads;
        word = pack_f16(clipped(head + 2u * j), clipped(head + 2u * j + 1u));
    } else {
        word = pack_f16(rotated(head, row, 2u * j), rotated(head, row, 2u * j + 1u));
    }
    kv_rows[((row * params.kv_heads + kv_head) * 2u + u32(is_value)) * half + j] = word;
    let slot = kv_slots[row];
    if slot != NO_SLOT {
        let side = ((slot / BLOCK_TOKENS) * params.kv_heads + kv_head) * 2u + u32(is_value);
        kv_blocks[(side * BLOCK_TOKENS + slot % BLOCK_TOKENS) * half + j] = word;
    }
}
