//! AVX2, FMA and F16C: 8 lanes, 16 registers.

use std::arch::x86_64::*;

use half::f16;

use super::group::{self, Group, Lanes, Scratch, State};
use super::int8::{self, Integers};

/// Attends one group on AVX2.
///
/// # Safety
///
/// * `scratch` and `earlier` are made for the group's form, and the cache's elements are f16.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn attend_f16(group: &Group, scratch: &mut Scratch, earlier: Option<&mut State>) {
    // SAFETY: this function runs only where its own features are, and they are those of the registers; the rest is the caller's.
    unsafe { group::attend::<F32x8>(group, scratch, earlier) }
}

/// Attends one group on AVX2.
///
/// # Safety
///
/// * `scratch` and `earlier` are made for the group's form, and the cache's elements are 8-bit integers.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn attend_int8(group: &Group, scratch: &mut Scratch, earlier: Option<&mut State>) {
    // SAFETY: this function runs only where its own features are, and they are those of the registers; the rest is the caller's.
    unsafe { int8::attend::<I16x16<false>>(group, scratch, earlier) }
}

/// Attends one group on AVX2 and AVX-VNNI.
///
/// # Safety
///
/// * `scratch` and `earlier` are made for the group's form, and the cache's elements are 8-bit integers.
#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
pub(super) unsafe fn attend_int8_vnni(group: &Group, scratch: &mut Scratch, earlier: Option<&mut State>) {
    // SAFETY: this function runs only where its own features are, and they are those of the registers; the rest is the caller's.
    unsafe { int8::attend::<I16x16<true>>(group, scratch, earlier) }
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

/// Pairs of 16-bit integers beside 8 lanes of f32. With AVX-VNNI a product and its sum are one instruction, the same numbers.
struct I16x16<const VNNI: bool>;

impl<const VNNI: bool> Integers for I16x16<VNNI> {
    type Floats = F32x8;
    type Pairs = __m256i;
    type Sums = __m256i;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn zero() -> __m256i {
        _mm256_setzero_si256()
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn widen(from: *const [i8; 2]) -> __m256i {
        // SAFETY: good for 8 pairs, says the caller: 16 bytes.
        _mm256_cvtepi8_epi16(unsafe { _mm_loadu_si128(from.cast()) })
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn splat(from: *const [i16; 2]) -> __m256i {
        // SAFETY: good for a pair, says the caller.
        _mm256_set1_epi32(unsafe { from.cast::<i32>().read_unaligned() })
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn add_products(sums: __m256i, a: __m256i, b: __m256i) -> __m256i {
        if VNNI {
            // SAFETY: `VNNI` is asked for only by a function that switches AVX-VNNI on.
            return unsafe { _mm256_dpwssd_avx_epi32(sums, a, b) };
        }
        _mm256_add_epi32(sums, _mm256_madd_epi16(a, b))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load(from: *const [i16; 2]) -> __m256i {
        // SAFETY: good for 8 pairs, says the caller: 32 bytes.
        unsafe { _mm256_loadu_si256(from.cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn to_f32(sums: __m256i) -> F32x8 {
        F32x8(_mm256_cvtepi32_ps(sums))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn store_rounded(numbers: F32x8, to: *mut i16) {
        let integers = _mm256_cvtps_epi32(numbers.0);
        let words = _mm_packs_epi32(_mm256_castsi256_si128(integers), _mm256_extracti128_si256::<1>(integers));
        // SAFETY: good for 8 integers, says the caller: 16 bytes.
        unsafe { _mm_storeu_si128(to.cast(), words) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn max_magnitude(a: F32x8, b: F32x8) -> F32x8 {
        // Without a sign, bits order numbers as numbers do, and NaN above them.
        let magnitude = _mm256_set1_epi32(i32::MAX);
        let [a, b] = [a, b].map(|x| _mm256_and_si256(_mm256_castps_si256(x.0), magnitude));
        F32x8(_mm256_castsi256_ps(_mm256_max_epu32(a, b)))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn max_magnitude_lane(of: F32x8) -> f32 {
        let of = _mm256_castps_si256(of.0);
        let four = _mm_max_epu32(_mm256_castsi256_si128(of), _mm256_extracti128_si256::<1>(of));
        let two = _mm_max_epu32(four, _mm_unpackhi_epi64(four, four));
        let one = _mm_max_epu32(two, _mm_shuffle_epi32::<0b01>(two));
        _mm_cvtss_f32(_mm_castsi128_ps(one))
    }
}
