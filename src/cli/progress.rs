//! Progress on stderr: a bar on a terminal, else one line every few seconds.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar, ProgressStyle};

use crate::units::human_bytes;

/// Between two lines where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Bytes brought to the GPU at open. Quiet for loads shorter than a line's interval.
pub struct LoadProgress {
    bar: Option<ProgressBar>,
    started: Instant,
    last_line: Instant,
}

impl LoadProgress {
    pub fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            ProgressBar::new(0).with_style(
                ProgressStyle::with_template("loading {wide_bar} {bytes}/{total_bytes} {eta}").expect("valid"),
            )
        });
        Self { bar, started: Instant::now(), last_line: Instant::now() }
    }

    pub fn update(&mut self, done: u64, total: u64) {
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
        } else if self.last_line.elapsed() > LINE_EVERY {
            self.last_line = Instant::now();
            say!("loading: {} of {}", human_bytes(done), human_bytes(total));
        }
    }

    pub fn finish(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        if self.started.elapsed() > LINE_EVERY {
            say!("loaded in {}", HumanDuration(self.started.elapsed()));
        }
    }
}

/// Requests answered, with rate and time left.
pub struct RunProgress {
    bar: Option<ProgressBar>,
    total: Option<u64>,
    started: Instant,
    last_line: Instant,
}

impl RunProgress {
    /// `total` requests, where that is known.
    pub fn new(total: Option<u64>) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| match total {
            Some(total) => ProgressBar::new(total)
                .with_style(ProgressStyle::with_template("{wide_bar} {pos}/{len} [{elapsed}{msg}]").expect("valid")),
            None => ProgressBar::new_spinner()
                .with_style(ProgressStyle::with_template("{spinner} {pos} [{elapsed}{msg}]").expect("valid")),
        });
        let now = Instant::now();
        Self { bar, total, started: now, last_line: now }
    }

    /// By now this run has answered so many requests and generated so many tokens; an earlier run had answered others.
    pub fn update(&mut self, answered: u64, answered_earlier: u64, generated: u64) {
        let finished = answered + answered_earlier;
        let rate = format!("{:.1} tok/s", generated as f64 / self.started.elapsed().as_secs_f64().max(1e-9));
        let left = self.time_left(answered, finished);
        let left = left.map_or(String::new(), |left| format!(", {} left", HumanDuration(left)));
        if let Some(bar) = &self.bar {
            bar.set_position(finished);
            bar.set_message(format!("{left}, {rate}"));
        } else if self.last_line.elapsed() > LINE_EVERY {
            self.last_line = Instant::now();
            let elapsed = HumanDuration(self.started.elapsed());
            match self.total.filter(|total| *total > 0) {
                Some(total) => say!("{}% | {finished}/{total} [{elapsed}{left}, {rate}]", 100 * finished / total),
                None => say!("{finished} finished [{elapsed}, {rate}]"),
            }
        }
    }

    /// At the rate of this run: what an earlier one had answered took none of its time.
    fn time_left(&self, answered: u64, finished: u64) -> Option<Duration> {
        let unanswered = self.total?.saturating_sub(finished);
        (answered > 0).then(|| self.started.elapsed().mul_f64(unanswered as f64 / answered as f64))
    }

    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Passes of a benchmark.
pub struct PassProgress {
    bar: Option<ProgressBar>,
    name: String,
    passes: usize,
    last_line: Instant,
}

impl PassProgress {
    pub fn new(name: &str, passes: usize) -> Self {
        let style = ProgressStyle::with_template("{msg:<20} {wide_bar} {pos}/{len} passes {eta}").expect("valid");
        let bar = std::io::stderr()
            .is_terminal()
            .then(|| ProgressBar::new(passes as u64).with_style(style).with_message(name.to_owned()));
        Self { bar, name: name.to_owned(), passes, last_line: Instant::now() }
    }

    pub fn update(&mut self, done: usize) {
        if let Some(bar) = &self.bar {
            bar.set_position(done as u64);
        } else if self.last_line.elapsed() > LINE_EVERY {
            self.last_line = Instant::now();
            say!("{}: {done} of {} passes", self.name, self.passes);
        }
    }

    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
