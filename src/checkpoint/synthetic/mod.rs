//! Weights without a download: the shape of a real model, values from a formula.
//!
//! In: a [`ModelConfig`]. Out: the bytes of any range of any tensor, the same on every machine and in whatever pieces they
//! are asked for, fast enough to fill 90 GB in seconds on many threads.
//!
//! Values are bf16 (MXFP4 where the model's experts are), uniform, of a size that keeps activations near one: a projection has
//! variance 1 / (its input width), what is added to the residual stream half that size. Column 0 of the residual stream carries a constant (every embedding row
//! has it, and no layer adds to it), so that the routers' column 0 works as a bias: with it experts are chosen as unevenly as
//! in real models ([`routing`]). What such a model says means nothing; what it costs is what a real one costs.

pub mod routing;

use std::ops::Range;

use super::{Dtype, Inventory};
use crate::model::expert_layout::Packing;
use crate::model::{ExpertMatrix, ExpertPart, ModelConfig, Role, Shape, tensors};

/// A made-up checkpoint.
#[derive(Debug, Clone)]
pub struct Synthetic {
    inventory: Inventory,
    /// Biases of the routers of layers 0, 1, 2; they repeat.
    router_biases: [Vec<f32>; 3],
}

/// Uniform values of a stream, four of 16 bits at a time.
#[derive(Debug, Clone)]
pub struct Random(u64);

/// SplitMix64's finaliser: bits of `x` that look like noise.
fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(mix(seed ^ 0x9e37_79b9_7f4a_7c15))
    }

    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// Roughly standard normal: the sum of twelve uniform values.
    pub fn normal(&mut self) -> f32 {
        let sum: f32 = (0..3).map(|_| unit_values(self.bits()).iter().sum::<f32>()).sum();
        sum / 2.0 // each is uniform in -1..1, of variance 1/3
    }
}

/// Four values in -1..1 from 64 bits.
fn unit_values(bits: u64) -> [f32; 4] {
    std::array::from_fn(|i| ((bits >> (16 * i)) as u16 as i16) as f32 * (1.0 / 32768.0))
}

impl Synthetic {
    /// Panics where the config's family has tensors that it does not list consistently: a bug of the model module.
    pub fn new(config: ModelConfig) -> Self {
        let specs = tensors(&config);
        let list = specs.iter().map(|spec| {
            let dtype = match config.forward.experts.packing(spec.role) {
                Packing::Floats => safetensors::Dtype::BF16,
                Packing::Mxfp4Blocks | Packing::Mxfp4Scales => safetensors::Dtype::U8,
            };
            (spec.name.as_str(), dtype, spec.shape.as_slice())
        });
        let Shape { experts, experts_per_token, .. } = config.shape;
        let biases = |layer| routing::biases(&routing::loads(experts, layer), experts_per_token);
        let inventory = Inventory::from_list(config.clone(), list).expect("the family's own list of tensors");
        Self { inventory, router_biases: [biases(0), biases(1), biases(2)] }
    }

    pub fn config(&self) -> &ModelConfig {
        self.inventory.config()
    }

    pub fn inventory(&self) -> &Inventory {
        &self.inventory
    }

    /// Bytes `range` of the tensor that plays `role`; whole elements.
    pub fn fill(&self, role: Role, range: Range<u64>, into: &mut [u8]) {
        assert_eq!(range.end - range.start, into.len() as u64, "room for the range");
        let tensor = self.inventory.find(role).unwrap_or_else(|| panic!("{role:?} is no role of this model"));
        let (scale, offset) = self.magnitude(role);
        match self.config().forward.experts.packing(role) {
            Packing::Mxfp4Blocks => {
                bits(stream(role), range.start as usize, into);
                self.adjust_blocks(role, range.start, into);
            }
            Packing::Mxfp4Scales => {
                // The sixteen E2M1 values have a root mean square of 2.9; three of a uniform's standard deviations are its width.
                let exponent = (scale / 3.0f32.sqrt() / 2.9).log2().round();
                into.fill((127.0 + exponent) as u8);
            }
            Packing::Floats => {
                debug_assert_eq!(tensor.dtype, Dtype::Bf16);
                assert!(range.start.is_multiple_of(2) && range.end.is_multiple_of(2), "whole elements");
                let first = range.start as usize / 2;
                let width = tensor.shape.last().copied().unwrap_or(1);
                uniform(stream(role), first, scale, offset, into);
                self.adjust(role, width, first, into);
            }
        }
    }

    /// Factor on values in -1..1, and what is added to them.
    fn magnitude(&self, role: Role) -> (f32, f32) {
        let Shape { d_model, expert_width, .. } = self.config().shape;
        // A uniform value in -1..1 has variance 1/3.
        let unit = |inputs: usize| (3.0 / inputs as f32).sqrt();
        match role {
            Role::Embedding => (3.0f32.sqrt(), 0.0),
            Role::FinalNorm
            | Role::AttentionNorm { .. }
            | Role::ExpertNorm { .. }
            | Role::QueryNorm { .. }
            | Role::KeyNorm { .. } => (0.0, 1.0),
            Role::AttentionOutput { .. } => (0.5 * unit(self.config().shape.q_width()), 0.0),
            Role::Expert { matrix: ExpertMatrix::Down, .. }
            | Role::Experts { part: ExpertPart::Down | ExpertPart::DownScales, .. } => (0.5 * unit(expert_width), 0.0),
            Role::AttentionOutputBias { .. } | Role::DownBias { .. } => (0.0, 0.0),
            role if role.kept_as_f32() => (0.1, 0.0),
            _ => (unit(d_model), 0.0),
        }
    }

    /// Column 0 of the residual stream, and the routers' use of it.
    fn adjust(&self, role: Role, width: usize, first: usize, into: &mut [u8]) {
        let last = first + into.len() / 2;
        let mut set = |element: usize, value: f32| {
            if (first..last).contains(&element) {
                let at = 2 * (element - first);
                into[at..at + 2].copy_from_slice(&half::bf16::from_f32(value).to_le_bytes());
            }
        };
        let mut set_column = |value: f32| {
            (first.div_ceil(width)..last.div_ceil(width)).for_each(|row| set(row * width, value));
        };
        match role {
            // Every token carries 1 there, and nothing is added to it.
            Role::Embedding => set_column(1.0),
            Role::Experts { part: ExpertPart::Down, .. } => set_column(0.0),
            Role::AttentionOutput { .. } | Role::Expert { matrix: ExpertMatrix::Down, .. } => {
                (first..width.min(last)).for_each(|element| set(element, 0.0));
            }
            Role::Router { layer } => {
                for (expert, bias) in self.router_biases[layer % 3].iter().enumerate() {
                    set(expert * width, *bias);
                }
            }
            _ => {}
        }
    }

    /// The same where the experts' output 0 is a row of MXFP4 blocks.
    fn adjust_blocks(&self, role: Role, first: u64, into: &mut [u8]) {
        let Shape { d_model, expert_width, experts, .. } = self.config().shape;
        let row_bytes = expert_width as u64 / 2;
        if !matches!(role, Role::Experts { part: ExpertPart::Down, .. }) {
            return;
        }
        for expert in 0..experts as u64 {
            let row = expert * d_model as u64 * row_bytes..(expert * d_model as u64 + 1) * row_bytes;
            let (start, end) = (row.start.max(first), row.end.min(first + into.len() as u64));
            if start < end {
                into[(start - first) as usize..(end - first) as usize].fill(0);
            }
        }
    }
}

/// Seed of a tensor.
fn stream(role: Role) -> u64 {
    use std::hash::{Hash, Hasher};
    let mut seed = Seed(0x00f0_1e55);
    role.hash(&mut seed);
    seed.finish()
}

/// A hash that is the same on every machine and with every compiler that derives `Hash` field by field.
struct Seed(u64);

impl std::hash::Hasher for Seed {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = mix(self.0 ^ (*byte as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        }
    }

    fn finish(&self) -> u64 {
        mix(self.0)
    }
}

/// Bytes `first ..` of a stream of random ones. Eight share 64 random bits.
fn bits(seed: u64, first: usize, into: &mut [u8]) {
    for (at, byte) in (first..).zip(into) {
        let word = mix(seed.wrapping_add((at as u64 / 8).wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        *byte = word.to_le_bytes()[at % 8];
    }
}

/// Elements `first ..` of a stream of uniform values, as bf16. Four elements share 64 random bits.
fn uniform(seed: u64, first: usize, scale: f32, offset: f32, into: &mut [u8]) {
    let quad = |number: usize| -> [u16; 4] {
        let values = unit_values(mix(seed.wrapping_add((number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15))));
        // Truncated, not rounded: the low bits are noise anyway.
        std::array::from_fn(|i| ((values[i] * scale + offset).to_bits() >> 16) as u16)
    };
    let n = into.len() / 2;
    let head = (first.next_multiple_of(4) - first).min(n);
    let mut put = |at: usize, value: u16| into[2 * at..2 * at + 2].copy_from_slice(&value.to_le_bytes());
    for at in 0..head {
        put(at, quad((first + at) / 4)[(first + at) % 4]);
    }
    let quads = (n - head) / 4;
    for number in 0..quads {
        let values = quad((first + head) / 4 + number);
        for (i, value) in values.into_iter().enumerate() {
            put(head + 4 * number + i, value);
        }
    }
    for at in head + 4 * quads..n {
        put(at, quad((first + at) / 4)[(first + at) % 4]);
    }
}
