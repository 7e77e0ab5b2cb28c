//! Two vocabularies small enough to be written down here, one of each kind that the supported models have.

use fulmen::request::tokenizer::{SpecialTokens, Tokenizer};
use serde_json::{Map, Value, json};

fn special() -> SpecialTokens {
    [("bos_token", "<s>"), ("eos_token", "</s>")].into_iter().collect()
}

fn added(content: &str, id: usize) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
           "normalized": false, "special": true})
}

/// `<s>` in front of a text.
fn begins_with_bos(id: usize) -> Value {
    json!({"type": "TemplateProcessing",
           "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
           "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
           "special_tokens": {"<s>": {"id": "<s>", "ids": [id], "tokens": ["<s>"]}}})
}

/// Like Mixtral's: `▁` for spaces, a dummy one in front, unknown characters as UTF-8 bytes.
/// Ids: 0..=2 `<unk> <s> </s>`, 3.. the bytes, then pieces.
pub fn sentence_piece() -> Tokenizer {
    let mut vocab = Map::new();
    let mut add = |entry: &str| {
        let id = vocab.len();
        vocab.insert(entry.into(), id.into());
    };
    ["<unk>", "<s>", "</s>"].into_iter().for_each(&mut add);
    (0..=255u8).for_each(|byte| add(&format!("<0x{byte:02X}>")));
    ["▁", "▁▁", "\u{FFFD}", ".", ",", "日", "本"].into_iter().for_each(&mut add);
    ('a'..='z').for_each(|c| add(&c.to_string()));
    ["▁a", "th", "▁th", "▁the", "日本"].into_iter().for_each(&mut add);
    let merges = [["▁", "▁"], ["▁", "a"], ["t", "h"], ["▁", "th"], ["▁th", "e"], ["日", "本"]];
    let json = json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "added_tokens": [added("<unk>", 0), added("<s>", 1), added("</s>", 2)],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": begins_with_bos(1),
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocab,
                  "merges": merges},
    });
    Tokenizer::from_json(json.to_string().as_bytes(), special()).unwrap()
}

/// GPT-2's character for a byte.
fn byte_char(byte: u8) -> char {
    let itself = |b: u8| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..);
    if itself(byte) {
        return byte as char;
    }
    let before = (0..byte).filter(|&b| !itself(b)).count() as u32;
    char::from_u32(0x100 + before).unwrap()
}

/// Like Qwen3's: one character per byte, merged, and a few tokens that begin and end inside characters.
/// Ids: 0..=255 the bytes in order, then [`UNALIGNED`], pieces, `<s>` and `</s>`.
pub fn byte_level() -> Tokenizer {
    let spell = |bytes: &[u8]| bytes.iter().map(|&byte| byte_char(byte)).collect::<String>();
    let mut vocab = Map::new();
    let mut add = |entry: String| {
        let id = vocab.len();
        vocab.insert(entry, id.into());
    };
    (0..=255u8).for_each(|byte| add(spell(&[byte])));
    add(spell(&UNALIGNED));
    add(spell(b"th"));
    add(spell(b"the"));
    add(spell(" t".as_bytes()));
    let (bos, eos) = (vocab.len(), vocab.len() + 1);
    let merges = [[spell(b"t"), spell(b"h")], [spell(b"th"), spell(b"e")], [spell(b" "), spell(b"t")]];
    let json = json!({
        "version": "1.0",
        "added_tokens": [added("<s>", bos), added("</s>", eos)],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true},
        "post_processor": begins_with_bos(bos),
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab,
                  "merges": merges},
    });
    Tokenizer::from_json(json.to_string().as_bytes(), special()).unwrap()
}

/// 叫 is E5 8F AB: this token ends one and begins the next.
pub const UNALIGNED: [u8; 3] = [0x8f, 0xab, 0xe5];
pub const UNALIGNED_ID: u32 = 256;
