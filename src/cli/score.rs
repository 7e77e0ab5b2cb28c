//! `fulmen score`: a results file against known answers.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::Value;

use super::print_line;

#[derive(Debug, Args)]
pub struct Arguments {
    /// What `run-batch` wrote
    #[arg(long, value_name = "FILE")]
    results: PathBuf,
    /// Lines with custom_id, kind and answer
    #[arg(long, value_name = "FILE")]
    answers: PathBuf,
    /// Print the first so many answers
    #[arg(long, default_value_t = 0, value_name = "N")]
    show: usize,
    /// One JSON object instead of text
    #[arg(long)]
    json: bool,
}

fn lines(path: &Path) -> Result<impl Iterator<Item = Result<Value>>> {
    let file = File::open(path).with_context(|| path.display().to_string())?;
    let name = path.display().to_string();
    Ok(BufReader::new(file).lines().enumerate().map(move |(index, line)| {
        let place = || format!("{name}, line {}", index + 1);
        serde_json::from_str(&line.with_context(place)?).with_context(place)
    }))
}

/// The text of a results line; None where it is an error.
fn text(line: &Value) -> Option<&str> {
    let choice = &line["response"]["body"]["choices"][0];
    choice["message"]["content"].as_str().or_else(|| choice["text"].as_str())
}

#[derive(Debug, Default, serde::Serialize)]
struct Tally {
    right: usize,
    wrong: usize,
    /// Answers without a result, or with an error.
    missing: usize,
}

impl Tally {
    fn accuracy(&self) -> f64 {
        self.right as f64 / (self.right + self.wrong + self.missing).max(1) as f64
    }
}

pub fn run(arguments: Arguments) -> Result<u8> {
    let mut results = HashMap::new();
    for line in lines(&arguments.results)? {
        let line = line?;
        let Some(id) = line["custom_id"].as_str() else {
            bail!("{}: a line without custom_id", arguments.results.display())
        };
        results.insert(id.to_owned(), text(&line).map(|text| text.trim().to_owned()));
    }
    let mut kinds: BTreeMap<String, Tally> = BTreeMap::new();
    let mut shown = 0;
    for line in lines(&arguments.answers)? {
        let line = line?;
        let field = |name: &str| {
            let value = line[name].as_str().map(str::to_owned);
            value.with_context(|| format!("{}: a line without {name}", arguments.answers.display()))
        };
        let (id, kind, answer) = (field("custom_id")?, field("kind")?, field("answer")?);
        let tally = kinds.entry(kind).or_default();
        let got = results.get(&id).and_then(|text| text.as_deref());
        match got {
            Some(text) if text == answer => tally.right += 1,
            Some(_) => tally.wrong += 1,
            None => tally.missing += 1,
        }
        if shown < arguments.show {
            shown += 1;
            let mark = if got == Some(answer.as_str()) { "right" } else { "wrong" };
            say!("{id:<28} {:<40} {mark}", got.unwrap_or("(no answer)"));
        }
    }
    if kinds.is_empty() {
        bail!("{}: no answers in it", arguments.answers.display());
    }
    if arguments.json {
        let report: BTreeMap<_, _> = kinds
            .iter()
            .map(|(kind, tally)| (kind, serde_json::json!({"accuracy": tally.accuracy(), "tally": tally})))
            .collect();
        print_line(serde_json::to_string_pretty(&report)?)?;
        return Ok(super::OK);
    }
    print_line(format_args!("{:<28} {:>9} {:>7} {:>7} {:>8}", "kind", "accuracy", "right", "wrong", "missing"))?;
    for (kind, tally) in &kinds {
        print_line(format_args!(
            "{kind:<28} {:>8.1}% {:>7} {:>7} {:>8}",
            100.0 * tally.accuracy(),
            tally.right,
            tally.wrong,
            tally.missing
        ))?;
    }
    Ok(super::OK)
}
