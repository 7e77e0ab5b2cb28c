//! The real binary, on files in temporary folders: answers, exit codes and messages. What needs an adapter is reported as
//! ignored where none answers; what is refused before one is opened runs everywhere.

mod batch;
mod common;
mod damage;
mod generate;
mod plan;
mod resume;
mod soak;
mod usage;

use libtest_mimic::{Arguments, Trial};

fn main() {
    fulmen::cli::quiet_mesa();
    let arguments = Arguments::from_args();
    let mut trials: Vec<Trial> = Vec::new();
    // The longest first: trials run side by side.
    trials.extend(soak::on_adapter());
    trials.extend(resume::on_adapter());
    trials.extend(batch::on_adapter());
    trials.extend(damage::on_adapter());
    trials.extend(generate::on_adapter());
    trials.extend(plan::on_adapter());
    trials.extend(usage::on_adapter());
    if fulmen::gpu::list_adapters().is_empty() {
        trials = trials
            .into_iter()
            .map(|trial| trial.with_kind("ignored: no Vulkan adapter answers").with_ignored_flag(true))
            .collect();
    }
    trials.extend(damage::anywhere());
    trials.extend(plan::anywhere());
    trials.extend(usage::anywhere());
    libtest_mimic::run(&arguments, trials).exit();
}
