//! What a device can do at most: reads, copies, multiply-adds. And numbers to try it on.

use crate::checkpoint::Dtype;
use crate::gpu::{Access::*, GpuError, Kernel, Part, Recorder, Slice, Variant, params};

params! {
    /// Immediates of `shaders/probes/fill.wgsl`.
    pub struct FillParams {
        pub n_words: u32,
        pub seed: u32,
        /// 0: bf16, 1: f16, 2: f32.
        pub kind: u32,
        pub amplitude: f32,
    }
}

params! {
    /// Immediates of the probes of memory: how many elements.
    pub struct Elements {
        pub n: u32,
    }
}

params! {
    /// Immediates of the probes of arithmetic: how long the chains are.
    pub struct Steps {
        pub steps: u32,
    }
}

static FILL: Kernel = Kernel {
    name: "probes/fill",
    parts: &[Part::Text(include_str!("../../shaders/probes/fill.wgsl"))],
    bindings: &[ReadWrite],
    param_bytes: size_of::<FillParams>(),
    params: FillParams::FIELDS,
    tunables: &[],
};

static READ_64: Kernel = Kernel {
    name: "probes/read of 64 bits",
    parts: &[Part::Text("alias Element = vec2<u32>;"), Part::Text(include_str!("../../shaders/probes/read.wgsl"))],
    bindings: &[Read, ReadWrite],
    param_bytes: size_of::<Elements>(),
    params: Elements::FIELDS,
    tunables: &[],
};

static READ_128: Kernel = Kernel {
    name: "probes/read of 128 bits",
    parts: &[Part::Text("alias Element = vec4<u32>;"), Part::Text(include_str!("../../shaders/probes/read.wgsl"))],
    bindings: &[Read, ReadWrite],
    param_bytes: size_of::<Elements>(),
    params: Elements::FIELDS,
    tunables: &[],
};

static COPY: Kernel = Kernel {
    name: "probes/copy",
    parts: &[Part::Text(include_str!("../../shaders/probes/copy.wgsl"))],
    bindings: &[Read, ReadWrite],
    param_bytes: size_of::<Elements>(),
    params: Elements::FIELDS,
    tunables: &[],
};

static FMA: Kernel = Kernel {
    name: "probes/fma",
    parts: &[Part::Text(include_str!("../../shaders/probes/fma.wgsl"))],
    bindings: &[ReadWrite],
    param_bytes: size_of::<Steps>(),
    params: Steps::FIELDS,
    tunables: &[],
};

static COOPERATIVE: Kernel = Kernel {
    name: "probes/cooperative",
    parts: &[Part::Text(include_str!("../../shaders/probes/cooperative.wgsl"))],
    bindings: &[ReadWrite],
    param_bytes: size_of::<Steps>(),
    params: Steps::FIELDS,
    tunables: &[],
};

/// Every probe there is. Tests walk this list.
pub static ALL: &[&Kernel] = &[&FILL, &READ_64, &READ_128, &COPY, &FMA, &COOPERATIVE];

/// Workgroups that keep every part of a large device busy.
const GRID: u32 = 4096;

fn variant() -> Variant {
    Variant::new(Dtype::F32)
}

/// Random numbers of `dtype` in `-amplitude .. amplitude`, all over `words`.
pub fn fill(
    recorder: &mut Recorder<'_>,
    dtype: Dtype,
    seed: u32,
    amplitude: f32,
    words: Slice<'_>,
) -> Result<(), GpuError> {
    let kind = match dtype {
        Dtype::Bf16 => 0,
        Dtype::F16 => 1,
        Dtype::F32 => 2,
        Dtype::Mxfp4 => panic!("its values need scales"),
    };
    let params = FillParams { n_words: (words.size() / 4) as u32, seed, kind, amplitude };
    recorder.dispatch(&FILL, &variant(), &params, &[words], [GRID, 1, 1])
}

/// Reads all of `data` once, in loads of 64 or of 128 bits; `sums` is 16 bytes that stay as they are.
pub fn read(recorder: &mut Recorder<'_>, wide: bool, data: Slice<'_>, sums: Slice<'_>) -> Result<(), GpuError> {
    let (kernel, bytes) = if wide { (&READ_128, 16) } else { (&READ_64, 8) };
    let n = (data.size() / bytes) as u32;
    recorder.dispatch(kernel, &variant(), &Elements { n }, &[data, sums], [n.div_ceil(2048).min(GRID), 1, 1])
}

/// Copies all of `from` to `to`.
pub fn copy(recorder: &mut Recorder<'_>, from: Slice<'_>, to: Slice<'_>) -> Result<(), GpuError> {
    let n = (from.size() / 16) as u32;
    recorder.dispatch(&COPY, &variant(), &Elements { n }, &[from, to], [n.div_ceil(256).min(GRID), 1, 1])
}

/// `workgroups` of f32 multiply-adds in registers. Returns how many operations that is.
pub fn fma(recorder: &mut Recorder<'_>, workgroups: u32, steps: u32, sums: Slice<'_>) -> Result<f64, GpuError> {
    recorder.dispatch(&FMA, &variant(), &Steps { steps }, &[sums], [workgroups, 1, 1])?;
    Ok(64.0 * 256.0 * workgroups as f64 * steps as f64)
}

/// `workgroups` of f16 products on cooperative matrices in registers; `sums` has 1,024 bytes. Returns how many operations that is.
pub fn cooperative(recorder: &mut Recorder<'_>, workgroups: u32, steps: u32, sums: Slice<'_>) -> Result<f64, GpuError> {
    recorder.dispatch(&COOPERATIVE, &variant(), &Steps { steps }, &[sums], [workgroups, 1, 1])?;
    Ok(65536.0 * 4.0 * workgroups as f64 * steps as f64)
}
