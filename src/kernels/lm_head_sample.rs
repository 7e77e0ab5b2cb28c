//! What sampling needs of a row's logits, so that the logits themselves stay on the GPU.

use crate::checkpoint::Dtype;
use crate::gpu::{Access::*, GpuError, Kernel, Part, Recorder, Slice, Variant, params};

params! {
    /// Immediates of `shaders/lm_head_sample.wgsl`.
    pub struct Params {
        /// R
        pub n_rows: u32,
        /// V
        pub vocab: u32,
    }
}

params! {
    /// What the kernel leaves of a row. Logits that are NaN are left out of everything but `nan`.
    #[derive(PartialEq, bytemuck::AnyBitPattern)]
    pub struct Sample {
        /// The greedy choice: the lowest id of the greatest logit. u32::MAX where every logit is NaN.
        pub id: u32,
        /// 1 if any logit is NaN, else 0.
        pub nan: u32,
        /// The greatest logit; minus infinity where every logit is NaN.
        pub max: f32,
        /// Natural logarithm of the sum of `exp(logit)`: `logit - log_sum_exp` is a log-probability.
        pub log_sum_exp: f32,
    }
}

pub static LM_HEAD_SAMPLE: Kernel = Kernel {
    name: "lm_head_sample",
    parts: &[
        Part::Text(include_str!("../../shaders/shared/reduce.wgsl")),
        Part::Text(include_str!("../../shaders/lm_head_sample.wgsl")),
    ],
    bindings: &[Read, ReadWrite],
    param_bytes: size_of::<Params>(),
    params: Params::FIELDS,
    tunables: &[("WG_SIZE", &[256, 64])],
};

/// Vocabularies up to this size take workgroups of 64 lanes: a software adapter runs lanes one after the other, and waits at every step
/// of a tree for all of them.
const SMALL_VOCAB: u32 = 512;

/// `samples[R]`, one [`Sample`] per row of `logits[R, V]` (f32).
pub fn record(
    recorder: &mut Recorder<'_>,
    params: Params,
    logits: Slice<'_>,
    samples: Slice<'_>,
) -> Result<(), GpuError> {
    let variant = Variant::new(Dtype::F32);
    let variant = if params.vocab <= SMALL_VOCAB { variant.with("WG_SIZE", 64) } else { variant };
    recorder.dispatch(&LM_HEAD_SAMPLE, &variant, &params, &[logits, samples], [params.n_rows, 1, 1])
}
