//! Lengths of the requests of a batch file: what a policy is searched for.

use std::path::Path;

use anyhow::{Context, Result};

use super::open::Text;
use crate::plan::workload::Workload;
use crate::request::Request;
use crate::request::batch_file::{BatchReader, ReadOptions};

/// Lines that are looked at: enough for means, little beside answering them.
const SAMPLE: usize = 4096;
/// Tokens that a request is taken to generate where nothing limits it.
const UNLIMITED: usize = 512;

/// Prompt and most generated tokens of a request, for each of its completions.
pub fn of_request(request: &Request) -> Vec<(usize, usize)> {
    vec![(request.prompt.len(), request.params.max_tokens.unwrap_or(UNLIMITED)); request.params.n.max(1)]
}

/// Of the first lines of a file that can be read again; what is wrong with a line is not for here. `total`: lines in all.
pub fn of_batch(path: &Path, options: ReadOptions, text: &Text, total: Option<u64>) -> Result<Option<Workload>> {
    let mut reader = BatchReader::open(path, options).with_context(|| path.display().to_string())?;
    let (mut lengths, mut lines) = (Vec::new(), 0u64);
    while let Some(line) = reader.next()
        && lines < SAMPLE as u64
    {
        lines += 1;
        let Ok(line) = line else { continue };
        let template = text.template.as_ref();
        // The vocabulary's size matters for answers alone.
        if let Ok(request) = line.to_request(&text.tokenizer, template, &text.defaults, usize::MAX) {
            lengths.extend(of_request(&request));
        }
    }
    let each = lengths.len() as f64 / lines.max(1) as f64;
    let requests = total.map(|total| (total as f64 * each).round().max(1.0) as u64);
    Ok(Workload::of(lengths, requests))
}
