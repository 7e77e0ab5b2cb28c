// Two elements of K or V as the cache stores them, f16.   Needs kv_blocks: array<u32>.
fn load_kv(word: u32) -> vec2<f32> { return unpack2x16float(kv_blocks[word]); }
