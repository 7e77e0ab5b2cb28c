// Eight elements of K or V as the cache stores them, f16. The same buffer is bound twice: rows of a multiple of 8 elements are read
// 16 bytes at a time.
@group(0) @binding(3) var<storage, read> kv_words: array<u32>;        // [blocks, G, 2, BLOCK_TOKENS, K] f16, two to a word
@group(0) @binding(4) var<storage, read> kv_quads: array<vec4<u32>>;  // the same

// From `element` on, of which `n` and no more belong to the row, two to a word; the others are zeros. Both are even.
fn load_octet(element: u32, n: u32) -> vec4<u32> {
    if params.head_width % 8u == 0u { return kv_quads[element / 8u]; }
    let at = element / 2u;
    var octet = vec4(kv_words[at], 0u, 0u, 0u);
    if n > 2u { octet.y = kv_words[at + 1u]; }
    if n > 4u { octet.z = kv_words[at + 2u]; }
    if n > 6u { octet.w = kv_words[at + 3u]; }
    return octet;
}
