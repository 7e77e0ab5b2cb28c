// Weights as f32, one to a word.
fn weight_words(elements: u32) -> u32 { return elements; }
fn weight_word_index(i: u32) -> u32 { return i; }
fn weight_from_word(word: u32, i: u32) -> f32 { return bitcast<f32>(word); }
