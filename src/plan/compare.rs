//! Predictions held against the clock, after every run.

use std::collections::BTreeMap;

use super::cost::PassRows;
use crate::schedule::{Lane, Timeline};

/// Seconds as predicted and as measured.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize)]
pub struct Pair {
    pub predicted: f64,
    pub measured: f64,
}

impl Pair {
    fn add(&mut self, predicted: f64, measured: f64) {
        self.predicted += predicted;
        self.measured += measured;
    }

    /// What came after `earlier`.
    pub fn since(&self, earlier: Pair) -> Pair {
        Pair { predicted: self.predicted - earlier.predicted, measured: self.measured - earlier.measured }
    }

    /// Predicted over measured; None where nothing was measured.
    pub fn ratio(&self) -> Option<f64> {
        (self.measured > 0.0).then(|| self.predicted / self.measured)
    }
}

/// What kind of rows a pass has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    Prefill,
    Decode,
    Mixed,
}

impl Phase {
    pub fn of(rows: &PassRows) -> Phase {
        match (rows.prompt(), rows.decode()) {
            (0, _) => Phase::Decode,
            (_, 0) => Phase::Prefill,
            _ => Phase::Mixed,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Phase::Prefill => "prefill",
            Phase::Decode => "decode",
            Phase::Mixed => "mixed",
        }
    }
}

/// The passes of a run that were predicted, summed up.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Comparison {
    pub passes: u64,
    pub all: Pair,
    pub phases: BTreeMap<Phase, Pair>,
    /// Time in which each lane ran a task.
    pub lanes: BTreeMap<Lane, Pair>,
}

/// One pass: seconds, and what ran when.
pub struct Side<'a> {
    pub seconds: f64,
    pub timeline: &'a Timeline,
}

impl Comparison {
    pub fn add(&mut self, phase: Phase, predicted: Side<'_>, measured: Side<'_>) {
        self.passes += 1;
        self.all.add(predicted.seconds, measured.seconds);
        self.phases.entry(phase).or_default().add(predicted.seconds, measured.seconds);
        for lane in Lane::ALL {
            let busy = |timeline: &Timeline| timeline.busy(lane).as_secs_f64();
            let (predicted, measured) = (busy(predicted.timeline), busy(measured.timeline));
            if predicted > 0.0 || measured > 0.0 {
                self.lanes.entry(lane).or_default().add(predicted, measured);
            }
        }
    }

    /// `predicted / measured 0.97 over 20 passes (decode 0.97); lanes gpu 1.02, h2d 0.99, cpu 0.93`
    pub fn line(&self) -> String {
        let ratio = |pair: &Pair| pair.ratio().map_or("-".to_owned(), |ratio| format!("{ratio:.2}"));
        let list = |pairs: Vec<(&str, &Pair)>| {
            pairs.iter().map(|(name, pair)| format!("{name} {}", ratio(pair))).collect::<Vec<_>>().join(", ")
        };
        format!(
            "predicted / measured {} over {} passes ({}); lanes {}",
            ratio(&self.all),
            self.passes,
            list(self.phases.iter().map(|(phase, pair)| (phase.name(), pair)).collect()),
            list(self.lanes.iter().map(|(lane, pair)| (lane.name(), pair)).collect()),
        )
    }

    /// The same as an object.
    pub fn json(&self) -> serde_json::Value {
        let pair = |pair: &Pair| serde_json::json!({ "predicted_seconds": pair.predicted, "measured_seconds": pair.measured, "ratio": pair.ratio() });
        let phases: serde_json::Map<_, _> =
            self.phases.iter().map(|(phase, of)| (phase.name().to_owned(), pair(of))).collect();
        let lanes: serde_json::Map<_, _> =
            self.lanes.iter().map(|(lane, of)| (lane.name().to_owned(), pair(of))).collect();
        serde_json::json!({ "passes": self.passes, "all": pair(&self.all), "phases": phases, "lanes": lanes })
    }
}
