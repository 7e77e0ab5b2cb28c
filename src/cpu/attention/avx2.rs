//! AVX2, FMA and F16C: 8 lanes, 16 registers.

use std::arch::x86_64::*;

use half::f16;

use super::group::{self, CacheLevel, Group, Lanes, Scratch, State};
use super::int8::{self, Four, Integer, Integers, STEP_TOKENS};

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
    unsafe { int8::attend::<Wide>(group, scratch, earlier) }
}

/// Attends one group on AVX2 and AVX-VNNI.
///
/// # Safety
///
/// * `scratch` and `earlier` are made for the group's form, and the cache's elements are 8-bit integers.
#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
pub(super) unsafe fn attend_int8_vnni(group: &Group, scratch: &mut Scratch, earlier: Option<&mut State>) {
    // SAFETY: this function runs only where its own features are, and they are those of the registers; the rest is the caller's.
    unsafe { int8::attend::<Bytes>(group, scratch, earlier) }
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

/// Elements widened to 16 bits, beside 8 lanes of f32: fours of the lower four lanes, then of the upper ones, as two lanes each.
struct Wide;

impl Integers for Wide {
    type Floats = F32x8;
    type Elements = [__m256i; 2];
    type Factors = __m256i;
    type Sums = [__m256i; 2];

    const LARGEST_QUERY: f32 = 32767.0;
    const LARGEST_WEIGHT: f32 = 32767.0;
    const HEADS: usize = 4;
    const AHEAD: CacheLevel = CacheLevel::First;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn store_query(numbers: *const f32, factor: f32, n: usize, to: *mut Integer) {
        for at in (0..n).step_by(F32x8::COUNT) {
            // SAFETY: good for `n`, says the caller.
            let product = unsafe { F32x8::load(numbers.add(at)).mul(F32x8::splat(factor)) };

            let integers = _mm256_cvtps_epi32(product.0);
            let words = _mm_packs_epi32(_mm256_castsi256_si128(integers), _mm256_extracti128_si256::<1>(integers));
            // SAFETY: good for 8 integers, says the caller: 16 bytes.
            unsafe { _mm_storeu_si128(to.add(at).cast(), words) }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn store_weights(numbers: *const f32, factor: f32, to: *mut Integer) {
        // SAFETY: as the caller's.
        unsafe { Self::store_query(numbers, factor, STEP_TOKENS, to) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn max_magnitude(a: F32x8, b: F32x8) -> F32x8 {
        max_magnitude(a, b)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn max_magnitude_lane(of: F32x8) -> f32 {
        max_magnitude_lane(of)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn sums(of: i32) -> [__m256i; 2] {
        [_mm256_set1_epi64x(i64::from(of as u32)); 2]
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn keys(from: *const [u8; 4]) -> [__m256i; 2] {
        // SAFETY: good for 8 fours, says the caller: 32 bytes.
        [0, 16].map(|at| _mm256_cvtepu8_epi16(unsafe { _mm_loadu_si128(from.cast::<u8>().add(at).cast()) }))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn values(from: *const [u8; 4]) -> [__m256i; 2] {
        // SAFETY: good for 8 fours, says the caller: 32 bytes.
        [0, 16].map(|at| _mm256_cvtepi8_epi16(unsafe { _mm_loadu_si128(from.cast::<u8>().add(at).cast()) }))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn splat(from: *const Four) -> __m256i {
        // SAFETY: good for a four, says the caller.
        _mm256_set1_epi64x(unsafe { from.cast::<i64>().read_unaligned() })
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn add_keys(sums: [__m256i; 2], keys: [__m256i; 2], query: __m256i) -> [__m256i; 2] {
        [
            _mm256_add_epi32(sums[0], _mm256_madd_epi16(keys[0], query)),
            _mm256_add_epi32(sums[1], _mm256_madd_epi16(keys[1], query)),
        ]
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn add_values(sums: [__m256i; 2], values: [__m256i; 2], weights: __m256i) -> [__m256i; 2] {
        // SAFETY: the same instructions.
        unsafe { Self::add_keys(sums, values, weights) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn to_f32(sums: [__m256i; 2]) -> F32x8 {
        // Of each half: two of the first four, then two of the second.
        let joined = _mm256_hadd_epi32(sums[0], sums[1]);
        F32x8(_mm256_cvtepi32_ps(_mm256_permute4x64_epi64::<0b11_01_10_00>(joined)))
    }
}

/// Products of bytes, beside 8 lanes of f32: factors and sums of high digits, and of low ones.
struct Bytes;

impl Integers for Bytes {
    type Floats = F32x8;
    type Elements = __m256i;
    type Factors = [__m256i; 2];
    type Sums = [__m256i; 2];

    // 127 · 256 + 127.
    const LARGEST_QUERY: f32 = 32639.0;
    const LARGEST_WEIGHT: f32 = 65535.0;
    const HEADS: usize = 2;
    const AHEAD: CacheLevel = CacheLevel::First;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
    unsafe fn store_query(numbers: *const f32, factor: f32, n: usize, to: *mut Integer) {
        for at in (0..n).step_by(F32x8::COUNT) {
            // SAFETY: good for `n`, says the caller.
            let product = unsafe { F32x8::load(numbers.add(at)).mul(F32x8::splat(factor)) };

            // With 128 more, the high digit is the upper byte, and the low one the lower byte, 128 less.
            let integers = _mm256_add_epi32(_mm256_cvtps_epi32(product.0), _mm256_set1_epi32(128));
            let low = _mm_set1_epi64x(0x8080_8080 << 32);
            // SAFETY: good for 8 integers, says the caller: 16 bytes.
            unsafe { _mm_storeu_si128(to.add(at).cast(), _mm_xor_si128(digits(integers), low)) }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
    unsafe fn store_weights(numbers: *const f32, factor: f32, to: *mut Integer) {
        for at in (0..STEP_TOKENS).step_by(F32x8::COUNT) {
            // SAFETY: good for 64, says the caller.
            let product = unsafe { F32x8::load(numbers.add(at)).mul(F32x8::splat(factor)) };

            // SAFETY: good for 8 integers, says the caller: 16 bytes.
            unsafe { _mm_storeu_si128(to.add(at).cast(), digits(_mm256_cvtps_epi32(product.0))) }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn max_magnitude(a: F32x8, b: F32x8) -> F32x8 {
        max_magnitude(a, b)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn max_magnitude_lane(of: F32x8) -> f32 {
        max_magnitude_lane(of)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
    unsafe fn sums(of: i32) -> [__m256i; 2] {
        [_mm256_setzero_si256(), _mm256_set1_epi32(of)]
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
    unsafe fn keys(from: *const [u8; 4]) -> __m256i {
        // SAFETY: good for 8 fours, says the caller: 32 bytes.
        unsafe { _mm256_loadu_si256(from.cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
    unsafe fn values(from: *const [u8; 4]) -> __m256i {
        // SAFETY: good for 8 fours, says the caller: 32 bytes.
        unsafe { _mm256_loadu_si256(from.cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
    unsafe fn splat(from: *const Four) -> [__m256i; 2] {
        // SAFETY: good for a four, says the caller: 8 bytes.
        [0, 1].map(|at| _mm256_set1_epi32(unsafe { from.cast::<i32>().add(at).read_unaligned() }))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
    unsafe fn add_keys(sums: [__m256i; 2], keys: __m256i, query: [__m256i; 2]) -> [__m256i; 2] {
        [_mm256_dpbusd_avx_epi32(sums[0], keys, query[0]), _mm256_dpbusd_avx_epi32(sums[1], keys, query[1])]
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
    unsafe fn add_values(sums: [__m256i; 2], values: __m256i, weights: [__m256i; 2]) -> [__m256i; 2] {
        [_mm256_dpbusd_avx_epi32(sums[0], weights[0], values), _mm256_dpbusd_avx_epi32(sums[1], weights[1], values)]
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
    unsafe fn to_f32([high, low]: [__m256i; 2]) -> F32x8 {
        F32x8(_mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_slli_epi32::<8>(high), low)))
    }
}

/// The upper and lower bytes of 8 integers of 16 bits: of each four, the upper ones first.
#[inline]
#[target_feature(enable = "avx2")]
fn digits(integers: __m256i) -> __m128i {
    let bytes = _mm256_shuffle_epi8(integers, _mm256_set1_epi64x(0x0c08_0400_0d09_0501));
    _mm_unpacklo_epi64(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256::<1>(bytes))
}

#[inline]
#[target_feature(enable = "avx2")]
fn max_magnitude(a: F32x8, b: F32x8) -> F32x8 {
    // Without a sign, bits order numbers as numbers do, and NaN above them.
    let magnitude = _mm256_set1_epi32(i32::MAX);
    let [a, b] = [a, b].map(|x| _mm256_and_si256(_mm256_castps_si256(x.0), magnitude));
    F32x8(_mm256_castsi256_ps(_mm256_max_epu32(a, b)))
}

#[inline]
#[target_feature(enable = "avx2")]
fn max_magnitude_lane(of: F32x8) -> f32 {
    let of = _mm256_castps_si256(of.0);
    let four = _mm_max_epu32(_mm256_castsi256_si128(of), _mm256_extracti128_si256::<1>(of));
    let two = _mm_max_epu32(four, _mm_unpackhi_epi64(four, four));
    let one = _mm_max_epu32(two, _mm_shuffle_epi32::<0b01>(two));
    _mm_cvtss_f32(_mm_castsi128_ps(one))
}
