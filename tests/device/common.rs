//! Seeded numbers, poisoned buffers and comparisons for tests on a device.

use std::sync::{Arc, OnceLock};

use fulmen::checkpoint::Dtype;
use fulmen::gpu::{Buffer, DeviceChoice, Gpu, GpuError, OpenOptions, Pipelines, Recorder, Slice, TestFaults};
use libtest_mimic::Trial;

pub const DTYPES: [Dtype; 3] = [Dtype::Bf16, Dtype::F16, Dtype::F32];

/// The adapter of all tests: FULMEN_DEVICE chooses it as `--device` does.
pub fn device() -> DeviceChoice {
    std::env::var("FULMEN_DEVICE").map_or(DeviceChoice::Best, |text| DeviceChoice::from(text.as_str()))
}

/// The adapter's matrices are its own.
pub fn has_matrices() -> bool {
    pipelines().gpu().summary().cooperative
}

/// Trials of the f16 class: ignored, with the reason, where the adapter has neither cooperative matrices nor f16 to emulate them with.
pub fn if_cooperative(trials: Vec<Trial>) -> Vec<Trial> {
    unless_ignored(|| pipelines().gpu().cooperative(), "no cooperative matrices", trials)
}

/// Likewise of whole models, whose tiles an emulating adapter may have no workgroup memory for.
pub fn if_matrices(trials: Vec<Trial>) -> Vec<Trial> {
    unless_ignored(has_matrices, "no cooperative matrices", trials)
}

/// Likewise of kernels in SPIR-V.
pub fn if_workgroup_matrices(trials: Vec<Trial>) -> Vec<Trial> {
    unless_ignored(|| pipelines().gpu().workgroup_matrices(), "no VK_NV_cooperative_matrix2", trials)
}

fn unless_ignored(there: fn() -> bool, reason: &str, trials: Vec<Trial>) -> Vec<Trial> {
    // Without any adapter main ignores them all.
    if fulmen::gpu::list_adapters().is_empty() || there() {
        return trials;
    }
    let ignored = |trial: Trial| trial.with_kind(format!("ignored: {reason}")).with_ignored_flag(true);
    trials.into_iter().map(ignored).collect()
}

/// Compiled kernels on that adapter, shared by all tests of kernels.
pub fn pipelines() -> &'static Pipelines {
    static PIPELINES: OnceLock<Pipelines> = OnceLock::new();
    PIPELINES.get_or_init(|| {
        // Where the adapter has no cooperative matrices, WGSL stands in for them.
        let test_faults = TestFaults { emulated_matrices: true, ..TestFaults::default() };
        let options = OpenOptions { device: device(), test_faults, ..OpenOptions::default() };
        Pipelines::new(Arc::new(Gpu::open_with(&options).expect("an adapter was listed, so it opens")))
    })
}

/// xorshift64*: the same numbers on every machine.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() >> 32) as usize % n.max(1)
    }

    /// Uniform in -1..1.
    pub fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.unit()).collect()
    }
}

/// A device buffer holding `values`.
pub fn upload<T: bytemuck::NoUninit>(values: &[T]) -> Buffer {
    pipelines().gpu().buffer_with("test input", bytemuck::cast_slice(values)).expect("small buffer")
}

/// `values` rounded to `dtype`, little-endian.
pub fn weight_bytes(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    match dtype {
        Dtype::Bf16 => values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect(),
        Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Dtype::Mxfp4 => panic!("its values need scales"),
    }
}

/// `values` rounded to `dtype`: as a device buffer of that type, and widened again for the reference.
pub fn upload_weights(dtype: Dtype, values: &[f32]) -> (Buffer, Vec<f32>) {
    let bytes = weight_bytes(dtype, values);
    (upload(&bytes), dtype.read_all(&bytes))
}

/// Records, submits and waits.
pub fn run(record: impl FnOnce(&mut Recorder<'_>) -> Result<(), GpuError>) {
    let mut recorder = Recorder::new(pipelines());
    record(&mut recorder).expect("kernel compiles");
    recorder.submit().expect("device works");
    pipelines().gpu().wait().expect("device works");
}

fn poison(index: usize) -> u32 {
    0x7fc0_0000 | (index as u32 & 0xffff)
}

/// A device buffer of `n` words, each a NaN with a pattern of its own, so that an element nobody wrote is seen.
pub fn poisoned(n: usize) -> Buffer {
    let words: Vec<u32> = (0..n.max(1)).map(poison).collect();
    upload(&words)
}

/// Panics where word `index` of a buffer of [`poisoned`] was written.
pub fn assert_untouched(what: &str, words: &[u32], index: usize) {
    assert_eq!(words[index], poison(index), "{what}: word {index} is outside of the result and was written");
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

pub fn download<T: bytemuck::Pod>(slice: Slice<'_>) -> Vec<T> {
    let bytes = pipelines().gpu().read(slice).expect("device works");
    bytemuck::pod_collect_to_vec(&bytes)
}

/// Panics with the worst element where `|got - want| > tolerance(index)`; NaN never passes.
pub fn assert_close(what: &str, got: &[f32], want: &[f32], tolerance: impl Fn(usize) -> f32) {
    assert_eq!(got.len(), want.len(), "{what}: number of elements");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let error = (g - w).abs();
        assert!(
            error <= tolerance(i),
            "{what}: element {i} is {g}, reference {w}: off by {error}, allowed {}",
            tolerance(i)
        );
    }
}
