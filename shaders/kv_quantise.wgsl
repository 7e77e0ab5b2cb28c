// New rows of K and V as 8-bit integers and a scale for each row of each head, for the host's cache; in the GPU's blocks, what these are in f16.
// One workgroup per row and side of a head (K or V); a lane takes words of four integers.
// Reference: src/reference/kv_quantise.rs      Needs: shared/f16 (f16_bits)
struct Params { n_rows: u32, kv_heads: u32, head_width: u32 }
var<immediate> params: Params;
@group(0) @binding(0) var<storage, read>       kv_rows: array<u32>;   // [T, G, 2, K/2] f16 pairs: K, then V
@group(0) @binding(1) var<storage, read>       kv_slots: array<u32>;  // [T] block * BLOCK_TOKENS + token in it, or NO_SLOT
@group(0) @binding(2) var<storage, read_write> new_rows: array<u32>;  // [T, G, 2, K/4 + 1] four integers to a word, the rest of the last one zeros; then the scale, an f16
@group(0) @binding(3) var<storage, read_write> kv_blocks: array<u32>; // [blocks, G, 2, BLOCK_TOKENS, K/2] f16 pairs

const BLOCK_TOKENS: u32 = 32u;
const NO_SLOT: u32 = 0xffffffffu;
const WG_SIZE: u32 = 64u;
const INFINITY: u32 = 0x7c00u;
const NAN: u32 = 0x7e00u;
const SMALLEST: f32 = 0x1p-24;

var<workgroup> largest_bits: atomic<u32>;

// Exactly, and without the unpacking that may flush subnormals.
fn f16_magnitude(bits: u32) -> f32 {
    let magnitude = bits & 0x7fffu;
    return select(bitcast<f32>((magnitude << 13u) + (112u << 23u)), f32(magnitude) * SMALLEST, magnitude < 0x400u);
}

// The smallest scale under which `largest` is 127 at most: of four bits, a multiple of 2^-24, 512 at most.
fn scale_of(largest: f32) -> f32 {
    // From a little below the quotient down to the next scale: at most one step too small, and that is seen exactly.
    let below = largest * 0.007874007;
    if below < 0x1p-21 {
        let scale = floor(below * 0x1p24) * SMALLEST;
        return max(select(scale, scale + SMALLEST, 127.0 * scale < largest), SMALLEST);
    }
    let bits = bitcast<u32>(below) & 0xfff00000u;
    return min(bitcast<f32>(select(bits, bits + 0x100000u, 127.0 * bitcast<f32>(bits) < largest)), 512.0);
}

// x / scale to the nearest integer, ties to even. A quotient may be off in its last bits; what it leaves of x is exact.
fn nearest(x: f32, scale: f32) -> i32 {
    var integer = i32(round(x / scale));
    let rest = x - f32(integer) * scale;
    let half = 0.5 * scale;
    let tie = (integer & 1) != 0;
    if rest > half || (tie && rest == half) { integer += 1; }
    if rest < -half || (tie && rest == -half) { integer -= 1; }
    return clamp(integer, -127, 127);
}

@compute @workgroup_size(WG_SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = workgroup.x;
    let side = workgroup.y;
    let sides = 2u * params.kv_heads;
    let half = params.head_width / 2u;
    let words = (params.head_width + 3u) / 4u;
    let from_row = (row * sides + side) * half;
    if lane == 0u { atomicStore(&largest_bits, 0u); }
    workgroupBarrier();
    for (var pair = lane; pair < half; pair += WG_SIZE) {
        let word = kv_rows[from_row + pair];
        atomicMax(&largest_bits, max(word & 0x7fffu, (word >> 16u) & 0x7fffu));
    }
    workgroupBarrier();
    let largest = atomicLoad(&largest_bits);
    let finite = largest < INFINITY;
    let scale = scale_of(f16_magnitude(select(0u, largest, finite)));
    let to_row = (row * sides + side) * (words + 1u);
    let slot = kv_slots[row];
    let to_block = (((slot / BLOCK_TOKENS) * sides + side) * BLOCK_TOKENS + slot % BLOCK_TOKENS) * half;
    for (var word = lane; word < words; word += WG_SIZE) {
        var integers = 0u;
        for (var i = 0u; i < 2u; i++) {
            let pair = 2u * word + i;
            if pair >= half { break; }
            let halves = kv_rows[from_row + pair];
            var values = 0u;
            for (var j = 0u; j < 2u; j++) {
                let bits = (halves >> (16u * j)) & 0xffffu;
                let magnitude = f16_magnitude(bits);
                let x = select(magnitude, -magnitude, (bits & 0x8000u) != 0u);
                let integer = select(0, nearest(x, scale), finite);
                integers |= (u32(integer) & 0xffu) << (8u * (2u * i + j));
                values |= select(NAN, f16_bits(f32(integer) * scale), finite) << (16u * j);
            }
            if slot != NO_SLOT { kv_blocks[to_block + pair] = values; }
        }
        new_rows[to_row + word] = integers;
    }
    if lane == 0u { new_rows[to_row + words] = select(NAN, f16_bits(scale), finite); }
}
