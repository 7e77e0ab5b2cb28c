//! A schedule as a table that a person can read.

use std::fmt;

use super::task::{Lane, Schedule, Work};

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name();
        match *self {
            Work::LoadPage { layer, chunk, page } | Work::PinPage { layer, chunk, page } => {
                write!(f, "{name} {layer}.{chunk}.{page}")
            }
            Work::Experts { group, chunk, .. } => write!(f, "{name} g{group} c{chunk}"),
            Work::Barrier { number } => write!(f, "{name} {number}"),
            Work::Embed { micro_batch }
            | Work::Head { micro_batch }
            | Work::Sample { micro_batch }
            | Work::KvToDevice { micro_batch, .. }
            | Work::PreAttention { micro_batch, .. }
            | Work::RowsToHost { micro_batch, .. }
            | Work::CpuAttention { micro_batch, .. }
            | Work::GpuAttention { micro_batch, .. }
            | Work::RowsToDevice { micro_batch, .. }
            | Work::PostAttention { micro_batch, .. } => write!(f, "{name} b{micro_batch}"),
        }
    }
}

/// One line per task, one column per lane.
impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |step: String, layer: String, cell: &dyn Fn(Lane) -> String| {
            let cells: String = Lane::ALL.map(|lane| format!("  {:<18}", cell(lane))).concat();
            writeln!(f, "{step:>4}  {layer:>5}{}", cells.trim_end())
        };
        line("step".into(), "layer".into(), &|lane| lane.name().to_owned())?;
        for (id, task) in self.ids() {
            let layer = task.work.layer().map_or("·".to_owned(), |layer| layer.to_string());
            let cell = |lane| if lane == task.lane { task.work.to_string() } else { "·".to_owned() };
            line(id.0.to_string(), layer, &cell)?;
        }
        Ok(())
    }
}
