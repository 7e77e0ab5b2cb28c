//! How long prompts and answers are: what a plan or a benchmark needs to know of a workload.
//!
//! From a table with a heading, as published traces are: Azure's LLM inference trace (`ContextTokens`, `GeneratedTokens`), Vidur's
//! (`num_prefill_tokens`, `num_decode_tokens`), or simply `prompt,generated`.

use std::path::{Path, PathBuf};

/// Tokens of one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Length {
    pub prompt: usize,
    pub generated: usize,
}

/// Mixtral tokens of MT-Bench's 80 first turns: mean 75, longest 417.
pub const MT_BENCH_PROMPTS: [usize; 80] = [
    25, 50, 58, 45, 24, 39, 34, 34, 49, 107, 37, 57, 86, 99, 112, 62, 78, 45, 45, 56, 41, 38, 22, 19, 222, 80, 23, 20,
    54, 151, 35, 52, 70, 22, 76, 24, 21, 30, 73, 29, 28, 19, 28, 214, 23, 29, 25, 41, 33, 18, 184, 226, 417, 216, 188,
    300, 220, 372, 171, 344, 26, 46, 49, 20, 67, 40, 69, 41, 36, 21, 34, 15, 30, 61, 26, 22, 14, 17, 15, 20,
];

/// Names of the two columns that are known.
const COLUMNS: [(&str, &str); 3] =
    [("ContextTokens", "GeneratedTokens"), ("num_prefill_tokens", "num_decode_tokens"), ("prompt", "generated")];

#[derive(Debug, thiserror::Error)]
pub enum LengthsError {
    #[error("{}: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{}: the heading is '{heading}'; needed are two columns named {}", path.display(), column_names())]
    Heading { path: PathBuf, heading: String },
    #[error("{}, line {line}: {what} is '{had}', which is no number of tokens from 1 on", path.display())]
    Value { path: PathBuf, line: usize, what: &'static str, had: String },
    #[error("{} has a heading and no lengths", path.display())]
    Empty { path: PathBuf },
}

fn column_names() -> String {
    COLUMNS.map(|(prompt, generated)| format!("{prompt} and {generated}")).join(", or ")
}

/// The lengths of a table, in its order. Requests that generate nothing are left out: traces have a few.
pub fn read(path: &Path) -> Result<Vec<Length>, LengthsError> {
    let text = std::fs::read_to_string(path).map_err(|source| LengthsError::Read { path: path.to_owned(), source })?;
    let mut lines = text.lines();
    let heading = lines.next().unwrap_or_default();
    let at = |name: &str| heading.split(',').position(|column| column.trim() == name);
    let found = COLUMNS.into_iter().find_map(|(prompt, generated)| Some((at(prompt)?, at(generated)?)));
    let Some((prompt, generated)) = found else {
        return Err(LengthsError::Heading { path: path.to_owned(), heading: heading.to_owned() });
    };
    let mut lengths = Vec::new();
    for (index, line) in lines.enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let number = |column: usize, what: &'static str| {
            let had = line.split(',').nth(column).unwrap_or_default().trim();
            had.parse::<usize>().map_err(|_| LengthsError::Value {
                path: path.to_owned(),
                line: index + 2,
                what,
                had: had.to_owned(),
            })
        };
        let length = Length { prompt: number(prompt, "prompt")?, generated: number(generated, "generated")? };
        if length.prompt == 0 {
            let had = "0".to_owned();
            return Err(LengthsError::Value { path: path.to_owned(), line: index + 2, what: "prompt", had });
        }
        if length.generated > 0 {
            lengths.push(length);
        }
    }
    if lengths.is_empty() {
        return Err(LengthsError::Empty { path: path.to_owned() });
    }
    Ok(lengths)
}
