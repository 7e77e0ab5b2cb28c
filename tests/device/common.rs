//! Seeded numbers, poisoned buffers and comparisons for tests on a device.

use std::sync::{Arc, OnceLock};

use fulmen::gpu::{Buffer, DeviceChoice, Gpu, Pipelines, Slice};

/// The device that all tests share; FULMEN_DEVICE chooses it as `--device` does.
pub fn pipelines() -> &'static Pipelines {
    static PIPELINES: OnceLock<Pipelines> = OnceLock::new();
    PIPELINES.get_or_init(|| {
        let choice =
            std::env::var("FULMEN_DEVICE").map_or(DeviceChoice::Best, |text| DeviceChoice::from(text.as_str()));
        Pipelines::new(Arc::new(Gpu::open(&choice).expect("an adapter was listed, so it opens")))
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

/// A device buffer of `n` words, each a NaN with a pattern of its own, so that an element nobody wrote is seen.
pub fn poisoned(n: usize) -> Buffer {
    let words: Vec<u32> = (0..n.max(1) as u32).map(|i| 0x7fc0_0000 | (i & 0xffff)).collect();
    upload(&words)
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
