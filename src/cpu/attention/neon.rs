//! NEON: 4 lanes, 32 registers. The trials of `tests/host/attention.rs` pass under qemu's emulation of aarch64; no Arm machine has
//! measured it.

use std::arch::aarch64::*;

use half::f16;

use super::group::{self, Group, Lanes, Scratch, State};
use super::int8::{self, Integers};

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
    unsafe { int8::attend::<I16x8>(group, scratch, earlier) }
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

/// Pairs of 16-bit integers beside 4 lanes of f32.
struct I16x8;

impl Integers for I16x8 {
    type Floats = F32x4;
    type Pairs = int16x8_t;
    type Sums = int32x4_t;

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn zero() -> int32x4_t {
        vdupq_n_s32(0)
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn widen(from: *const [i8; 2]) -> int16x8_t {
        // SAFETY: good for 4 pairs, says the caller: 8 bytes.
        vmovl_s8(unsafe { vld1_s8(from.cast()) })
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn splat(from: *const [i16; 2]) -> int16x8_t {
        // SAFETY: good for a pair, says the caller.
        vreinterpretq_s16_s32(vdupq_n_s32(unsafe { from.cast::<i32>().read_unaligned() }))
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn add_products(sums: int32x4_t, a: int16x8_t, b: int16x8_t) -> int32x4_t {
        let low = vmull_s16(vget_low_s16(a), vget_low_s16(b));
        vaddq_s32(sums, vpaddq_s32(low, vmull_high_s16(a, b)))
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn load(from: *const [i16; 2]) -> int16x8_t {
        // SAFETY: good for 4 pairs, says the caller: 16 bytes.
        unsafe { vld1q_s16(from.cast()) }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn to_f32(sums: int32x4_t) -> F32x4 {
        F32x4(vcvtq_f32_s32(sums))
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn store_rounded(numbers: F32x4, to: *mut i16) {
        // SAFETY: good for 4 integers, says the caller: 8 bytes.
        unsafe { vst1_s16(to, vqmovn_s32(vcvtnq_s32_f32(numbers.0))) }
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
}
