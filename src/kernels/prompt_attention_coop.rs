//! Causal attention of prompt rows over the paged KV of the GPU, with cooperative matrices.

use super::paged_attention::ACCESS;
pub use super::paged_attention::Params;
use crate::gpu::{Kernel, Part, Variant};

const TEXT: &str = include_str!("../../shaders/prompt_attention_coop.wgsl");

pub static PROMPT_ATTENTION_COOP: Kernel = Kernel {
    name: "prompt_attention_coop",
    parts: &[Part::Template(text)],
    bindings: ACCESS,
    param_bytes: size_of::<Params>(),
    params: Params::FIELDS,
    tunables: &[("WIDTH", &[128, 64, 32]), ("SUBGROUPS", &[4]), ("KEYS", &[32]), ("PREFETCH", &[0, 1]), ("UNROLL", &[1, 0, 2])],
};

fn text(variant: &Variant) -> String {
    let tunable = |name| PROMPT_ATTENTION_COOP.tunable(variant, name);
    let (width, subgroups, keys) = (tunable("WIDTH"), tunable("SUBGROUPS"), tunable("KEYS"));
    let lanes = 32 * subgroups;
    let frags = width.div_ceil(16);
    let q_chunks = (16 * subgroups).div_ceil(2 * keys);
    assert!(frags % q_chunks == 0);
    let loads = (2 * keys * width / 4).div_ceil(lanes);
    let counts = [
        ("FRAGS", frags),
        ("KEY_FRAGS", keys / 16),
        ("KEY_QUADS", keys / 4),
        ("KEY_QUADS / 2u", keys / 8),
        ("LOADS", loads),
        ("Q_CHUNKS", q_chunks),
        ("Q_FRAGS", frags / q_chunks),
    ];
    let head = format!(
        "enable f16;\nenable wgpu_cooperative_matrix;\nconst WIDTH: u32 = {width}u;\nconst SUBGROUPS: u32 = {subgroups}u;\n\
         const KEYS: u32 = {keys}u;\nconst Q_CHUNKS: u32 = {q_chunks}u;\nconst PREFETCH: bool = {};\n",
        tunable("PREFETCH") != 0
    );
    let body = match tunable("UNROLL") {
        0 => TEXT.to_owned(),
        1 => unroll(TEXT, &counts),
        _ => name(unroll(TEXT, &counts), &counts),
    };
    head + &body
}

/// Writes out the loops that are marked `// unrolled`, from 0 to a count that `counts` has the value of.
fn unroll(text: &str, counts: &[(&str, u32)]) -> String {
    let mut out = String::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let Some(header) = line.trim().strip_suffix("// unrolled") else {
            out += line;
            out.push('\n');
            continue;
        };
        let (variable, rest) = header.strip_prefix("for (var ").and_then(|rest| rest.split_once(" = 0u; ")).expect("a loop from 0");
        let bound = rest.split_once(" < ").and_then(|(_, rest)| rest.split_once(';')).expect("a bound").0;
        let (_, count) = counts.iter().find(|(name, _)| *name == bound).unwrap_or_else(|| panic!("no count {bound}"));
        let end = format!("}} // {variable}");
        let mut depth = 0;
        let mut body = String::new();
        for line in lines.by_ref() {
            if line.trim() == end {
                if depth == 0 {
                    break;
                }
                depth -= 1;
            }
            if line.trim().starts_with(&format!("for (var {variable} = 0u;")) && line.ends_with("// unrolled") {
                depth += 1;
            }
            body += line;
            body.push('\n');
        }
        for i in 0..*count {
            let body = replace_word(&body, variable, &format!("{i}u"));
            out += &format!("{{\n{}}}\n", unroll(&body, counts));
        }
    }
    out
}

fn replace_word(text: &str, word: &str, with: &str) -> String {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(word) {
        let before = rest[..at].chars().next_back().or(out.chars().next_back());
        let after = rest[at + word.len()..].chars().next();
        out += &rest[..at];
        out += if before.is_some_and(is_word) || after.is_some_and(is_word) { word } else { with };
        rest = &rest[at + word.len()..];
    }
    out + rest
}

/// Arrays of matrices as variables of their own.
fn name(mut text: String, counts: &[(&str, u32)]) -> String {
    for array in ["query", "sums", "scores", "staged"] {
        let start = text.find(&format!("var {array}: array<")).expect("declared");
        let line = text[start..].lines().next().unwrap().to_owned();
        let inner = line.split_once("array<").unwrap().1.trim_end_matches(">;");
        let (ty, count) = inner.rsplit_once(", ").unwrap();
        let n = counts.iter().find(|(name, _)| *name == count).unwrap().1;
        let declared: String = (0..n).map(|i| format!("var {array}_{i}: {ty};\n")).collect();
        text = text.replacen(&line, &declared, 1);
        let mut out = String::new();
        let mut rest = text.as_str();
        let open = format!("{array}[");
        while let Some(at) = rest.find(&open) {
            let (index, after) = rest[at + open.len()..].split_once(']').unwrap();
            let value: u32 = index.split(" + ").map(|term| term.split(" * ").map(|f| {
                f.trim_end_matches('u').parse::<u32>().unwrap_or_else(|_| counts.iter().find(|(name, _)| *name == f).unwrap().1)
            }).product::<u32>()).sum();
            out += &format!("{}{array}_{value}", &rest[..at]);
            rest = after;
        }
        text = out + rest;
    }
    text
}
