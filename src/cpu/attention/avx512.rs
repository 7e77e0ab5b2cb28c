//! AVX-512F: 16 lanes. The tiles are those of AVX2, twice as wide.

use std::arch::x86_64::*;

use half::f16;

use super::avx2;
use super::group::{self, Element, Group, Lanes, Scratch};

/// Attends one group on AVX-512.
///
/// # Safety
///
/// * `scratch` is made for the group's form, and the cache's elements are `E`.
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
pub(super) unsafe fn attend<E: Element>(group: &Group, scratch: &mut Scratch) {
    // SAFETY: this function runs only where its own features are, and they are those of `F32x16`; the rest is the caller's.
    unsafe { group::attend::<F32x16, E>(group, scratch) }
}

#[derive(Clone, Copy)]
struct F32x16(__m512);

impl Lanes for F32x16 {
    const COUNT: usize = 16;

    #[inline]
    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    unsafe fn splat(x: f32) -> Self {
        Self(_mm512_set1_ps(x))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: good for 16 elements, says the caller.
        Self(unsafe { _mm512_loadu_ps(from) })
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    unsafe fn load_f16(from: *const f16) -> Self {
        // SAFETY: good for 16 elements, says the caller: 32 bytes.
        Self(_mm512_cvtph_ps(unsafe { _mm256_loadu_si256(from.cast()) }))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    unsafe fn load_i8(from: *const i8) -> Self {
        // SAFETY: good for 16 elements, says the caller: 16 bytes.
        Self(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(unsafe { _mm_loadu_si128(from.cast()) })))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: good for 16 elements, says the caller.
        unsafe { _mm512_storeu_ps(to, self.0) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    unsafe fn add(self, other: Self) -> Self {
        Self(_mm512_add_ps(self.0, other.0))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    unsafe fn sub(self, other: Self) -> Self {
        Self(_mm512_sub_ps(self.0, other.0))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    unsafe fn mul(self, other: Self) -> Self {
        Self(_mm512_mul_ps(self.0, other.0))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
        Self(_mm512_fmadd_ps(self.0, factor.0, addend.0))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    unsafe fn max(self, other: Self) -> Self {
        Self(_mm512_max_ps(self.0, other.0))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    unsafe fn pow2(self) -> Self {
        let exponents = _mm512_slli_epi32::<23>(_mm512_castps_si512(self.0));
        Self(_mm512_castsi512_ps(_mm512_add_epi32(exponents, _mm512_set1_epi32(127 << 23))))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    unsafe fn zero_where_below(self, x: Self, limit: Self) -> Self {
        // "Not less than, unordered": true where x is NaN.
        Self(_mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x.0, limit.0), self.0))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    unsafe fn max_lane(self) -> f32 {
        _mm512_reduce_max_ps(self.0)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    unsafe fn sums(registers: [Self; 8]) -> [f32; 8] {
        avx2::sums(registers.map(|register| halves_added(register.0)))
    }
}

/// Lane j + lane j + 8.
#[inline]
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
fn halves_added(register: __m512) -> __m256 {
    let high = _mm512_extractf64x4_pd::<1>(_mm512_castps_pd(register));
    _mm256_add_ps(_mm512_castps512_ps256(register), _mm256_castpd_ps(high))
}
