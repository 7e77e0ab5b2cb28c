//! Everything that needs an adapter. Without one each trial is reported as ignored, with the reason in its kind.

mod common;
mod families;
mod faults;
mod generate;
mod goldens;
mod kernels;
mod pipeline;
mod pipelines;
mod planning;

use libtest_mimic::{Arguments, Trial};

fn main() {
    fulmen::cli::quiet_mesa();
    let arguments = Arguments::from_args();
    let mut trials: Vec<Trial> = Vec::new();
    trials.extend(kernels::trials());
    trials.extend(pipeline::trials());
    trials.extend(pipelines::trials());
    trials.extend(goldens::trials());
    trials.extend(generate::trials());
    trials.extend(families::trials());
    trials.extend(planning::trials());
    if fulmen::gpu::list_adapters().is_empty() {
        trials = trials
            .into_iter()
            .map(|trial| trial.with_kind("ignored: no Vulkan adapter answers").with_ignored_flag(true))
            .collect();
    }
    libtest_mimic::run(&arguments, trials).exit();
}
