// Weights as f16, two to a word, low half first.
fn weight_words(elements: u32) -> u32 { return (elements + 1u) / 2u; }
fn weight_word_index(i: u32) -> u32 { return i >> 1u; }
fn weight_from_word(word: u32, i: u32) -> f32 { let pair = unpack2x16float(word); return select(pair.x, pair.y, (i & 1u) == 1u); }
