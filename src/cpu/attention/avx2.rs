//! AVX2, FMA and F16C: 8 lanes, 16 registers.

use std::arch::x86_64::*;

use half::f16;

use super::group::{self, Element, Group, Lanes, Scratch};

/// Attends one group on AVX2.
///
/// # Safety
///
/// * `scratch` is made for the group's form, and the cache's elements are `E`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn attend<E: Element>(group: &Group, scratch: &mut Scratch) {
    // SAFETY: this function runs only where its own features are, and they are those of `F32x8`; the rest is the caller's.
    unsafe { group::attend::<F32x8, E>(group, scratch) }
}

#[derive(Clone, Copy)]
struct F32x8(__m256);

impl Lanes for F32x8 {
    const COUNT: usize = 8;
    const TILE: usize = 8;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn splat(x: f32) -> Self {
        Self(_mm256_set1_ps(x))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: good for 8 elements, says the caller.
        Self(unsafe { _mm256_loadu_ps(from) })
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load_f16(from: *const f16) -> Self {
        // SAFETY: good for 8 elements, says the caller: 16 bytes.
        Self(_mm256_cvtph_ps(unsafe { _mm_loadu_si128(from.cast()) }))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load_i8(from: *const i8) -> Self {
        // SAFETY: good for 8 elements, says the caller: 8 bytes.
        Self(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(unsafe { _mm_loadl_epi64(from.cast()) })))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: good for 8 elements, says the caller.
        unsafe { _mm256_storeu_ps(to, self.0) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn add(self, other: Self) -> Self {
        Self(_mm256_add_ps(self.0, other.0))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn sub(self, other: Self) -> Self {
        Self(_mm256_sub_ps(self.0, other.0))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn mul(self, other: Self) -> Self {
        Self(_mm256_mul_ps(self.0, other.0))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
        Self(_mm256_fmadd_ps(self.0, factor.0, addend.0))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn max(self, other: Self) -> Self {
        Self(_mm256_max_ps(self.0, other.0))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn pow2(self) -> Self {
        let exponents = _mm256_slli_epi32::<23>(_mm256_castps_si256(self.0));
        Self(_mm256_castsi256_ps(_mm256_add_epi32(exponents, _mm256_set1_epi32(127 << 23))))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn zero_where_below(self, x: Self, limit: Self) -> Self {
        // "Not less than, unordered": true where x is NaN.
        Self(_mm256_and_ps(self.0, _mm256_cmp_ps::<_CMP_NLT_UQ>(x.0, limit.0)))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn max_lane(self) -> f32 {
        let four = _mm_max_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
        let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn sums([a, b, c, d, e, f, g, h, ..]: [Self; 16]) -> [f32; 16] {
        let mut all = [0.0; 16];
        all[..8].copy_from_slice(&sums([a, b, c, d, e, f, g, h].map(|register| register.0)));
        all
    }
}

/// Sum over the lanes of eight registers at once: ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)).
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sums([a, b, c, d, e, f, g, h]: [__m256; 8]) -> [f32; 8] {
    // Each half holds that half's sum of a, b, c, d (and of e, f, g, h).
    let abcd = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    let efgh = _mm256_hadd_ps(_mm256_hadd_ps(e, f), _mm256_hadd_ps(g, h));
    let low = _mm256_permute2f128_ps::<0x20>(abcd, efgh);
    let high = _mm256_permute2f128_ps::<0x31>(abcd, efgh);
    let mut sums = [0.0; 8];
    // SAFETY: `sums` has 8 elements.
    unsafe { _mm256_storeu_ps(sums.as_mut_ptr(), _mm256_add_ps(low, high)) };
    sums
}
