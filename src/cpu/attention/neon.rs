//! NEON: 4 lanes, 32 registers. The trials of `tests/host/attention.rs` pass under qemu's emulation of aarch64; no Arm machine has
//! measured it.

use std::arch::aarch64::*;

use half::f16;

use super::group::{self, CacheLevel, Group, Lanes, Scratch, State};
use super::int8::{self, Four, Integer, Integers, STEP_TOKENS};

/// Attends one group on NEON.
///
/// # Safety
///
/// * `scratch` and `earlier` are made for the group's form, and the cache's elements are f16.
#[target_feature(enable = "neon")]
pub(super) unsafe fn attend_f16(group: &Group, scratch: &mut Scratch, earlier: Option<&mut State>) {
    // SAFETY: this function runs only where its own features are, and they are those of the registers; the rest is the caller's.
    unsafe { group::attend::<F32x4>(group, scratch, earlier) }
}

/// Attends one group on NEON.
///
/// # Safety
///
/// * `scratch` and `earlier` are made for the group's form, and the cache's elements are 8-bit integers.
#[target_feature(enable = "neon")]
pub(super) unsafe fn attend_int8(group: &Group, scratch: &mut Scratch, earlier: Option<&mut State>) {
    // SAFETY: this function runs only where its own features are, and they are those of the registers; the rest is the caller's.
    unsafe { int8::attend::<Wide>(group, scratch, earlier) }
}

#[derive(Clone, Copy)]
struct F32x4(float32x4_t);

impl Lanes for F32x4 {
    const COUNT: usize = 4;
    const TILE: usize = 8;

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn splat(x: f32) -> Self {
        Self(vdupq_n_f32(x))
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: good for 4 elements, says the caller.
        Self(unsafe { vld1q_f32(from) })
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn load_f16(from: *const f16) -> Self {
        // SAFETY: good for 4 elements, says the caller: 8 bytes.
        Self(vcvt_f32_f16(vreinterpret_f16_u16(unsafe { vld1_u16(from.cast()) })))
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: good for 4 elements, says the caller.
        unsafe { vst1q_f32(to, self.0) }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn add(self, other: Self) -> Self {
        Self(vaddq_f32(self.0, other.0))
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn sub(self, other: Self) -> Self {
        Self(vsubq_f32(self.0, other.0))
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn mul(self, other: Self) -> Self {
        Self(vmulq_f32(self.0, other.0))
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
        Self(vfmaq_f32(addend.0, self.0, factor.0))
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn max(self, other: Self) -> Self {
        Self(vmaxq_f32(self.0, other.0))
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn pow2(self) -> Self {
        let exponents = vshlq_n_s32::<23>(vreinterpretq_s32_f32(self.0));
        Self(vreinterpretq_f32_s32(vaddq_s32(exponents, vdupq_n_s32(127 << 23))))
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn zero_where_below(self, x: Self, limit: Self) -> Self {
        // The comparison is false where x is NaN.
        Self(vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(self.0), vcltq_f32(x.0, limit.0))))
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn max_lane(self) -> f32 {
        vmaxvq_f32(self.0)
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn sums([a, b, c, d, e, f, g, h, ..]: [Self; 16]) -> [f32; 16] {
        // Each: (0 + 1) + (2 + 3).
        let [a, b, c, d, e, f, g, h] = [a, b, c, d, e, f, g, h].map(|register| register.0);
        let mut sums = [0.0; 16];
        // SAFETY: `sums` has 16 elements, 4 for each store.
        unsafe {
            vst1q_f32(sums.as_mut_ptr(), vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
            vst1q_f32(sums.as_mut_ptr().add(4), vpaddq_f32(vpaddq_f32(e, f), vpaddq_f32(g, h)));
        }
        sums
    }
}

/// Elements widened to 16 bits, beside 4 lanes of f32: the fours of two lanes, then of the other two. A four's sums take a register.
struct Wide;

impl Integers for Wide {
    type Floats = F32x4;
    type Elements = [int16x8_t; 2];
    type Factors = int16x4_t;
    type Sums = [int32x4_t; 4];

    const LARGEST_QUERY: f32 = 32767.0;
    const LARGEST_WEIGHT: f32 = 32767.0;
    const HEADS: usize = 4;
    const AHEAD: CacheLevel = CacheLevel::First;

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn store_query(numbers: *const f32, factor: f32, n: usize, to: *mut Integer) {
        for at in (0..n).step_by(F32x4::COUNT) {
            // SAFETY: good for `n`, says the caller.
            let product = unsafe { F32x4::load(numbers.add(at)).mul(F32x4::splat(factor)) };

            // SAFETY: good for 4 integers, says the caller: 8 bytes.
            unsafe { vst1_s16(to.add(at).cast(), vqmovn_s32(vcvtnq_s32_f32(product.0))) }
        }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn store_weights(numbers: *const f32, factor: f32, to: *mut Integer) {
        // SAFETY: as the caller's.
        unsafe { Self::store_query(numbers, factor, STEP_TOKENS, to) }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn max_magnitude(a: F32x4, b: F32x4) -> F32x4 {
        // Without a sign, bits order numbers as numbers do, and NaN above them.
        let [a, b] = [a, b].map(|x| vreinterpretq_u32_f32(vabsq_f32(x.0)));
        F32x4(vreinterpretq_f32_u32(vmaxq_u32(a, b)))
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn max_magnitude_lane(of: F32x4) -> f32 {
        f32::from_bits(vmaxvq_u32(vreinterpretq_u32_f32(of.0)))
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn sums(of: i32) -> [int32x4_t; 4] {
        [vsetq_lane_s32::<0>(of, vdupq_n_s32(0)); 4]
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn keys(from: *const [u8; 4]) -> [int16x8_t; 2] {
        // SAFETY: good for 4 fours, says the caller: 16 bytes.
        let bytes = unsafe { vld1q_u8(from.cast()) };
        [vmovl_u8(vget_low_u8(bytes)), vmovl_high_u8(bytes)].map(|half| vreinterpretq_s16_u16(half))
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn values(from: *const [u8; 4]) -> [int16x8_t; 2] {
        // SAFETY: good for 4 fours, says the caller: 16 bytes.
        let bytes = unsafe { vld1q_s8(from.cast()) };
        [vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes)]
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn splat(from: *const Four) -> int16x4_t {
        // SAFETY: good for a four, says the caller: 8 bytes.
        unsafe { vld1_s16(from.cast()) }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn add_keys(sums: [int32x4_t; 4], keys: [int16x8_t; 2], query: int16x4_t) -> [int32x4_t; 4] {
        [
            vmlal_s16(sums[0], vget_low_s16(keys[0]), query),
            vmlal_s16(sums[1], vget_high_s16(keys[0]), query),
            vmlal_s16(sums[2], vget_low_s16(keys[1]), query),
            vmlal_s16(sums[3], vget_high_s16(keys[1]), query),
        ]
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn add_values(sums: [int32x4_t; 4], values: [int16x8_t; 2], weights: int16x4_t) -> [int32x4_t; 4] {
        // SAFETY: the same instructions.
        unsafe { Self::add_keys(sums, values, weights) }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn to_f32([a, b, c, d]: [int32x4_t; 4]) -> F32x4 {
        F32x4(vcvtq_f32_s32(vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d))))
    }
}
