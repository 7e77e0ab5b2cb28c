//! `--trace-file` and `--timeline`: what ran when, as a file to open and as a picture.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;

use crate::engine::PassReport;
use crate::schedule::{Timeline, trace};

#[derive(Debug, Args)]
pub struct Arguments {
    /// Chrome/Perfetto trace of every pass (open it in ui.perfetto.dev)
    #[arg(long, env = "FULMEN_TRACE_FILE", value_name = "FILE")]
    trace_file: Option<PathBuf>,
    /// Picture of two layers of the fullest pass
    #[arg(long, env = "FULMEN_TIMELINE", value_name = "FILE.svg")]
    timeline: Option<PathBuf>,
}

/// Written as the run goes: memory does not grow with it.
pub struct Trace<'a> {
    arguments: &'a Arguments,
    file: Option<BufWriter<File>>,
    events: u64,
    /// The pass with the most rows so far.
    fullest: (usize, Timeline),
    broken: Option<anyhow::Error>,
}

impl Arguments {
    /// Opens the files now: a path that cannot be written is known before anything is loaded.
    pub fn open(&self) -> Result<Trace<'_>> {
        let file = match &self.trace_file {
            None => None,
            Some(path) => {
                let file = File::create(path).with_context(|| format!("--trace-file {}", path.display()))?;
                Some(BufWriter::new(file))
            }
        };
        if let Some(path) = &self.timeline {
            File::create(path).with_context(|| format!("--timeline {}", path.display()))?;
        }
        Ok(Trace { arguments: self, file, events: 0, fullest: Default::default(), broken: None })
    }
}

impl Trace<'_> {
    pub fn pass(&mut self, report: &PassReport<'_>) {
        if self.file.is_some()
            && let Err(error) = self.write(report.timeline)
        {
            self.broken.get_or_insert(error.into());
            self.file = None;
        }
        let rows: usize = report.micro_batches.iter().map(|of| of.rows.len()).sum();
        if self.arguments.timeline.is_some() && rows > self.fullest.0 {
            self.fullest = (rows, report.timeline.clone());
        }
    }

    fn write(&mut self, timeline: &Timeline) -> std::io::Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        let document = trace::chrome([timeline]);
        for event in document["traceEvents"].as_array().into_iter().flatten() {
            // The names of the tracks once.
            if self.events > 0 && event["ph"] == "M" {
                continue;
            }
            let before = if self.events == 0 { "[\n" } else { ",\n" };
            write!(file, "{before}{event}")?;
            self.events += 1;
        }
        Ok(())
    }

    /// Ends the files. What could not be written is an error, and only here: the run's results come first.
    pub fn finish(mut self, heading: &str) -> Result<()> {
        if let Some(error) = self.broken {
            return Err(error.context("--trace-file"));
        }
        if let Some(file) = &mut self.file {
            let end = if self.events == 0 { "[]\n" } else { "\n]\n" };
            file.write_all(end.as_bytes()).and_then(|()| file.flush()).context("--trace-file")?;
        }
        if let Some(path) = &self.arguments.timeline {
            let text = trace::svg(&self.fullest.1, heading);
            std::fs::write(path, text).with_context(|| format!("--timeline {}", path.display()))?;
        }
        Ok(())
    }
}
