//! Weights without a download: the shape of a real model, values from a formula.
//!
//! In: a [`ModelConfig`]. Out: the bytes of any range of any tensor, the same on every machine and in whatever pieces they
//! are asked for, fast enough to fill 90 GB in seconds on many threads.
//!
//! Values are bf16, uniform, of a size that keeps activations near one: a projection has variance 1 / (its input width), what
//! is added to the residual stream half that size. Column 0 of the residual stream carries a constant (every embedding row
//! has it, and no layer adds to it), so that the routers' column 0 works as a bias: with it experts are chosen as unevenly as
//! in real models ([`routing`]). What such a model says means nothing; what it costs is what a real one costs.

pub mod routing;

use std::ops::Range;

use super::{Dtype, Inventory};
use crate::model::{ExpertMatrix, ModelConfig, Role, Shape, tensors};

/// A made-up checkpoint of bf16 weights.
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
        let list = specs.iter().map(|spec| (spec.name.as_str(), safetensors::Dtype::BF16, spec.shape.as_slice()));
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
        assert!(range.start.is_multiple_of(2) && range.end.is_multiple_of(2), "whole elements");
        let tensor = self.inventory.find(role).unwrap_or_else(|| panic!("{role:?} is no role of this model"));
        debug_assert_eq!(tensor.dtype, Dtype::Bf16);
        let first = range.start as usize / 2;
        let width = tensor.shape.last().copied().unwrap_or(1);
        let (scale, offset) = magnitude(role, width);
        uniform(stream(role), first, scale, offset, into);
        self.adjust(role, width, first, into);
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
        match role {
            // Every token carries 1 there.
            Role::Embedding => (first.div_ceil(width)..last.div_ceil(width)).for_each(|row| set(row * width, 1.0)),
            // Nothing is added to it.
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
}

/// Factor on values in -1..1, and what is added to them.
fn magnitude(role: Role, width: usize) -> (f32, f32) {
    // A uniform value in -1..1 has variance 1/3.
    let unit = (3.0 / width as f32).sqrt();
    match role {
        Role::Embedding => (3.0f32.sqrt(), 0.0),
        Role::FinalNorm | Role::AttentionNorm { .. } | Role::ExpertNorm { .. } => (0.0, 1.0),
        Role::AttentionOutput { .. } | Role::Expert { matrix: ExpertMatrix::Down, .. } => (0.5 * unit, 0.0),
        _ => (unit, 0.0),
    }
}

/// Seed of a tensor.
fn stream(role: Role) -> u64 {
    let parts: [u64; 4] = match role {
        Role::Embedding => [1, 0, 0, 0],
        Role::FinalNorm => [2, 0, 0, 0],
        Role::LmHead => [3, 0, 0, 0],
        Role::AttentionNorm { layer } => [4, layer as u64, 0, 0],
        Role::Query { layer } => [5, layer as u64, 0, 0],
        Role::Key { layer } => [6, layer as u64, 0, 0],
        Role::Value { layer } => [7, layer as u64, 0, 0],
        Role::AttentionOutput { layer } => [8, layer as u64, 0, 0],
        Role::ExpertNorm { layer } => [9, layer as u64, 0, 0],
        Role::Router { layer } => [10, layer as u64, 0, 0],
        Role::Expert { layer, expert, matrix } => [11, layer as u64, expert as u64, matrix as u64],
    };
    parts.iter().fold(0x00f0_1e55, |seed, part| mix(seed ^ part.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
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
