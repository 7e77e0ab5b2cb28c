//! What a run has to answer, as far as planning is concerned: lengths.

use std::path::Path;

/// Lengths of a run's requests.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Workload {
    /// s: mean tokens of a prompt.
    pub prompt_tokens: f64,
    /// g: mean tokens generated.
    pub generated_tokens: f64,
    /// Mean tokens that a running sequence attends to: requests that generate more run longer and count for more.
    pub context_tokens: f64,
    /// Most tokens of one, prompt and completion.
    pub longest: usize,
    /// Requests in all; None: without an end.
    pub requests: Option<u64>,
}

/// Lengths that say nothing.
#[derive(Debug, thiserror::Error)]
pub enum WorkloadError {
    #[error("{0}: {1}")]
    Io(String, std::io::Error),
    #[error("{path}, line {line}: {cause}")]
    Line { path: String, line: usize, cause: String },
    #[error("{0} has no request that generates a token")]
    Empty(String),
}

impl Workload {
    /// Requests that are all alike.
    pub fn uniform(prompt_tokens: usize, generated_tokens: usize) -> Workload {
        Self::of([(prompt_tokens, generated_tokens)], None).expect("both are at least 1")
    }

    /// Of prompt and generated tokens of each request; None where no request generates anything. `requests`: how many there are of
    /// their kind.
    pub fn of(lengths: impl IntoIterator<Item = (usize, usize)>, requests: Option<u64>) -> Option<Workload> {
        let (mut n, mut prompt, mut generated, mut attended) = (0.0, 0.0, 0.0, 0.0);
        let mut longest = 0;
        for (s, g) in lengths.into_iter().filter(|(s, g)| *s > 0 && *g > 0) {
            let (of_prompt, of_generated) = (s as f64, g as f64);
            n += 1.0;
            prompt += of_prompt;
            generated += of_generated;
            attended += of_generated * (of_prompt + of_generated / 2.0);
            longest = longest.max(s + g);
        }
        (n > 0.0).then(|| Workload {
            prompt_tokens: prompt / n,
            generated_tokens: generated / n,
            context_tokens: attended / generated,
            longest,
            requests,
        })
    }

    /// A trace of lengths: comma-separated lines under a heading, of whose columns one names prompts (`ContextTokens`,
    /// `num_prefill_tokens`, anything with "prompt", "context", "prefill" or "input") and one what is generated ("generated",
    /// "decode", "output", "completion").
    pub fn from_trace(path: &Path) -> Result<Workload, WorkloadError> {
        let name = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|error| WorkloadError::Io(name.clone(), error))?;
        let mut lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let fault = |line: usize, cause: String| WorkloadError::Line { path: name.clone(), line: line + 1, cause };
        let Some((_, heading)) = lines.next() else { return Err(WorkloadError::Empty(name)) };
        let columns: Vec<String> = heading.split(',').map(|column| column.trim().to_lowercase()).collect();
        let column = |words: &[&str]| {
            let names = |column: &String| words.iter().any(|word| column.contains(word));
            columns.iter().position(names).ok_or_else(|| {
                fault(0, format!("no column names any of {}; there are {}", words.join(", "), columns.join(", ")))
            })
        };
        let generated = column(&["generated", "decode", "output", "completion"])?;
        let prompt = column(&["context", "prefill", "prompt", "input"])?;
        let mut lengths = Vec::new();
        for (number, line) in lines {
            let fields: Vec<&str> = line.split(',').map(str::trim).collect();
            let tokens = |column: usize| {
                let field = fields.get(column).copied().unwrap_or_default();
                let value = field.parse::<f64>().ok().filter(|value| (0.0..1e9).contains(value));
                value
                    .map(|value| value as usize)
                    .ok_or_else(|| fault(number, format!("'{field}' is no number of tokens")))
            };
            lengths.push((tokens(prompt)?, tokens(generated)?));
        }
        let n = lengths.len() as u64;
        Workload::of(lengths, Some(n)).ok_or(WorkloadError::Empty(name))
    }

    /// Passes that a request is in: its prompt's pieces of at most `chunk` tokens, then one for each token but the first.
    pub fn passes(&self, chunk: usize) -> f64 {
        (self.prompt_tokens / chunk as f64).ceil().max(1.0) + self.generated_tokens - 1.0
    }

    /// Rows of a request in all.
    pub fn rows(&self) -> f64 {
        self.prompt_tokens + self.generated_tokens - 1.0
    }
}
