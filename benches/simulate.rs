//! How long a prediction takes: a pass of 32 layers and 16 micro-batches built and simulated, and a whole search.
//!
//! Asserts what the planner rests on: such a pass in less than 50 ms, a search for Mixtral 8x7B in less than 10 s on two cores.

use std::time::{Duration, Instant};

use fulmen::checkpoint::Synthetic;
use fulmen::model::presets::preset;
use fulmen::plan::cost::{PassRows, Predictor};
use fulmen::plan::presets::hardware;
use fulmen::plan::search::Problem;
use fulmen::plan::workload::Workload;
use fulmen::plan::{ModelBytes, Wishes, fit};

/// CPU time of the best of several: the clock also sees what others run on the same cores.
fn best(times: usize, mut work: impl FnMut()) -> Duration {
    let once = |work: &mut dyn FnMut()| {
        let begun = cpu_seconds();
        work();
        cpu_seconds() - begun
    };
    Duration::from_secs_f64((0..times).map(|_| once(&mut work)).fold(f64::INFINITY, f64::min))
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let config = preset("mixtral-8x7b").expect("a shape");
    let synthetic = Synthetic::new(config.clone());
    let machine = hardware("t4").expect("a machine");
    let (bytes, profile, limits) =
        (ModelBytes::of(synthetic.inventory()), machine.profile(synthetic.inventory()), machine.limits());
    let wishes = Wishes {
        max_sequences: Some(512),
        micro_batches: Some(16),
        expert_groups: Some(16),
        pass_rows: Some(1024),
        max_model_len: Some(576),
        ..Wishes::default()
    };
    let plan = fit(&config, &bytes, &limits, &wishes)?;
    let predictor = Predictor::new(&config, &bytes, &plan, &profile)?;
    let rows = PassRows::spread(&config, &plan.policy, 512.0, 480.0, 0.0, 418.0);
    let shape = predictor.shape(&rows, 32, true);
    let mut tasks = 0;
    let pass = best(10, || tasks = predictor.simulate(&rows, &shape, &[]).1);
    println!(
        "a pass of 32 layers and 16 micro-batches, {tasks} tasks, built and simulated: {:.2} ms of CPU time",
        pass.as_secs_f64() * 1e3
    );
    assert!(pass < Duration::from_millis(50), "a simulation takes {pass:?}");
    let few = best(10, || {
        std::hint::black_box(predictor.pass_seconds(&rows));
    });
    println!("its time by repetition of layers, once its schedule is built: {:.2} ms", few.as_secs_f64() * 1e3);
    let problem = Problem {
        config: &config,
        bytes,
        profile: &profile,
        limits,
        margin: 0.0,
        wishes: Wishes { max_model_len: Some(576), ..Wishes::default() },
        workload: Workload::uniform(418, 128),
    };
    let mut found = None;
    let (begun, before) = (Instant::now(), cpu_seconds());
    let two = rayon::ThreadPoolBuilder::new().num_threads(2).build()?;
    two.install(|| found = problem.search().ok());
    let (wall, cpu) = (begun.elapsed().as_secs_f64(), cpu_seconds() - before);
    let found = found.ok_or("a policy fits")?;
    println!(
        "the search: {} policies that fit, {} simulated, {:.2} s of CPU time, in {wall:.2} s with two threads",
        found.fitting, found.simulated, cpu
    );
    // Half of its CPU time is what two cores of its own would take.
    assert!(cpu / 2.0 < 10.0, "a search takes {cpu:.1} s of CPU time");
    Ok(())
}

/// CPU time of this process, all threads.
fn cpu_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call fills the structure that it is given.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}
