// Weights as bf16, two to a word, low half first.
fn weight_words(elements: u32) -> u32 { return (elements + 1u) / 2u; }
// Element `i` counted from the low half of word 0 of `word`'s array.
fn weight_word_index(i: u32) -> u32 { return i >> 1u; }
fn weight_from_word(word: u32, i: u32) -> f32 { return bitcast<f32>(select(word << 16u, word & 0xffff0000u, (i & 1u) == 1u)); }
