//! AVX-512F: 16 lanes, 32 registers, so tiles of twice as many accumulators, each twice as wide.

use std::arch::x86_64::*;

use half::f16;

use super::group::{self, CacheLevel, Group, Lanes, Scratch, State};
use super::int8::{self, Four, Integer, Integers, STEP_TOKENS};

/// Attends one group on AVX-512.
///
/// # Safety
///
/// * `scratch` and `earlier` are made for the group's form, and the cache's elements are f16.
#[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
pub(super) unsafe fn attend_f16(group: &Group, scratch: &mut Scratch, earlier: Option<&mut State>) {
    // SAFETY: this function runs only where its own features are, and they are those of the registers; the rest is the caller's.
    unsafe { group::attend::<F32x16>(group, scratch, earlier) }
}

/// Attends one group on AVX-512.
///
/// # Safety
///
/// * `scratch` and `earlier` are made for the group's form, and the cache's elements are 8-bit integers.
#[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
pub(super) unsafe fn attend_int8(group: &Group, scratch: &mut Scratch, earlier: Option<&mut State>) {
    // SAFETY: this function runs only where its own features are, and they are those of the registers; the rest is the caller's.
    unsafe { int8::attend::<Wide>(group, scratch, earlier) }
}

/// Attends one group on AVX-512 and its VNNI.
///
/// # Safety
///
/// * `scratch` and `earlier` are made for the group's form, and the cache's elements are 8-bit integers.
#[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c,avx512vnni")]
pub(super) unsafe fn attend_int8_vnni(group: &Group, scratch: &mut Scratch, earlier: Option<&mut State>) {
    // SAFETY: this function runs only where its own features are, and they are those of the registers; the rest is the caller's.
    unsafe { int8::attend::<Bytes>(group, scratch, earlier) }
}

#[derive(Clone, Copy)]
struct F32x16(__m512);

impl Lanes for F32x16 {
    const COUNT: usize = 16;
    const TILE: usize = 16;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
    unsafe fn splat(x: f32) -> Self {
        Self(_mm512_set1_ps(x))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: good for 16 elements, says the caller.
        Self(unsafe { _mm512_loadu_ps(from) })
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
    unsafe fn load_f16(from: *const f16) -> Self {
        let wide;
        // The intrinsic makes two instructions of it, a load and a conversion that takes two steps where this one takes one.
        // SAFETY: good for 16 elements, says the caller: 32 bytes.
        unsafe {
            std::arch::asm!("vcvtph2ps {wide}, ymmword ptr [{from}]", wide = lateout(zmm_reg) wide, from = in(reg) from,
                options(pure, readonly, nostack, preserves_flags));
        }
        Self(wide)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: good for 16 elements, says the caller.
        unsafe { _mm512_storeu_ps(to, self.0) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
    unsafe fn add(self, other: Self) -> Self {
        Self(_mm512_add_ps(self.0, other.0))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
    unsafe fn sub(self, other: Self) -> Self {
        Self(_mm512_sub_ps(self.0, other.0))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
    unsafe fn mul(self, other: Self) -> Self {
        Self(_mm512_mul_ps(self.0, other.0))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
        Self(_mm512_fmadd_ps(self.0, factor.0, addend.0))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
    unsafe fn max(self, other: Self) -> Self {
        Self(_mm512_max_ps(self.0, other.0))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
    unsafe fn pow2(self) -> Self {
        let exponents = _mm512_slli_epi32::<23>(_mm512_castps_si512(self.0));
        Self(_mm512_castsi512_ps(_mm512_add_epi32(exponents, _mm512_set1_epi32(127 << 23))))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
    unsafe fn zero_where_below(self, x: Self, limit: Self) -> Self {
        // "Not less than, unordered": true where x is NaN.
        Self(_mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x.0, limit.0), self.0))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
    unsafe fn max_lane(self) -> f32 {
        _mm512_reduce_max_ps(self.0)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
    unsafe fn sums(registers: [Self; 16]) -> [f32; 16] {
        // Lanes 0 + 2, 1 + 3 of each quarter, of two registers side by side; then those two, of four registers; then quarters
        // 0 + 1, 2 + 3; then those two.
        let pairs: [__m512; 8] = std::array::from_fn(|i| {
            let (a, b) = (registers[2 * i].0, registers[2 * i + 1].0);
            _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b))
        });
        let fours: [__m512; 4] = std::array::from_fn(|i| {
            let (a, b) = (_mm512_castps_pd(pairs[2 * i]), _mm512_castps_pd(pairs[2 * i + 1]));
            _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)))
        });
        let halves_of = |a, b| {
            _mm512_add_ps(_mm512_shuffle_f32x4::<0b10_00_10_00>(a, b), _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b))
        };
        let all = halves_of(halves_of(fours[0], fours[1]), halves_of(fours[2], fours[3]));
        let mut sums = [0.0; 16];
        // SAFETY: `sums` has 16 elements.
        unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), all) };
        sums
    }
}

/// Elements widened to 16 bits, beside 16 lanes of f32: fours of the lower eight lanes, then of the upper ones, as two lanes each.
struct Wide;

impl Integers for Wide {
    type Floats = F32x16;
    type Elements = [__m512i; 2];
    type Factors = __m512i;
    type Sums = [__m512i; 2];

    const LARGEST_QUERY: f32 = 32767.0;
    const LARGEST_WEIGHT: f32 = 32767.0;
    const HEADS: usize = 4;
    const AHEAD: CacheLevel = CacheLevel::Second;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
    unsafe fn store_query(numbers: *const f32, factor: f32, n: usize, to: *mut Integer) {
        for at in (0..n).step_by(F32x16::COUNT) {
            // SAFETY: good for `n`, says the caller.
            let product = unsafe { F32x16::load(numbers.add(at)).mul(F32x16::splat(factor)) };

            // SAFETY: good for 16 integers, says the caller: 32 bytes.
            unsafe { _mm256_storeu_si256(to.add(at).cast(), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(product.0))) }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
    unsafe fn store_weights(numbers: *const f32, factor: f32, to: *mut Integer) {
        // SAFETY: as the caller's.
        unsafe { Self::store_query(numbers, factor, STEP_TOKENS, to) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
    unsafe fn max_magnitude(a: F32x16, b: F32x16) -> F32x16 {
        max_magnitude(a, b)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
    unsafe fn max_magnitude_lane(of: F32x16) -> f32 {
        max_magnitude_lane(of)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
    unsafe fn sums(of: i32) -> [__m512i; 2] {
        [_mm512_set1_epi64(i64::from(of as u32)); 2]
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
    unsafe fn keys(from: *const [u8; 4]) -> [__m512i; 2] {
        // SAFETY: good for 16 fours, says the caller: 64 bytes.
        [0, 32].map(|at| _mm512_cvtepu8_epi16(unsafe { _mm256_loadu_si256(from.cast::<u8>().add(at).cast()) }))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
    unsafe fn values(from: *const [u8; 4]) -> [__m512i; 2] {
        // SAFETY: good for 16 fours, says the caller: 64 bytes.
        [0, 32].map(|at| _mm512_cvtepi8_epi16(unsafe { _mm256_loadu_si256(from.cast::<u8>().add(at).cast()) }))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
    unsafe fn splat(from: *const Four) -> __m512i {
        // SAFETY: good for a four, says the caller.
        _mm512_set1_epi64(unsafe { from.cast::<i64>().read_unaligned() })
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
    unsafe fn add_keys(sums: [__m512i; 2], keys: [__m512i; 2], query: __m512i) -> [__m512i; 2] {
        [
            _mm512_add_epi32(sums[0], _mm512_madd_epi16(keys[0], query)),
            _mm512_add_epi32(sums[1], _mm512_madd_epi16(keys[1], query)),
        ]
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
    unsafe fn add_values(sums: [__m512i; 2], values: [__m512i; 2], weights: __m512i) -> [__m512i; 2] {
        // SAFETY: the same instructions.
        unsafe { Self::add_keys(sums, values, weights) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
    unsafe fn to_f32(sums: [__m512i; 2]) -> F32x16 {
        let even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
        let odd = _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
        let [even, odd] = [even, odd].map(|lanes| _mm512_permutex2var_epi32(sums[0], lanes, sums[1]));
        F32x16(_mm512_cvtepi32_ps(_mm512_add_epi32(even, odd)))
    }
}

/// Products of bytes, beside 16 lanes of f32: factors and sums of high digits, and of low ones.
struct Bytes;

impl Integers for Bytes {
    type Floats = F32x16;
    type Elements = __m512i;
    type Factors = [__m512i; 2];
    type Sums = [__m512i; 2];

    // 127 · 256 + 127.
    const LARGEST_QUERY: f32 = 32639.0;
    const LARGEST_WEIGHT: f32 = 65535.0;
    const HEADS: usize = 4;
    const AHEAD: CacheLevel = CacheLevel::Second;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c,avx512vnni")]
    unsafe fn store_query(numbers: *const f32, factor: f32, n: usize, to: *mut Integer) {
        for at in (0..n).step_by(F32x16::COUNT) {
            // SAFETY: good for `n`, says the caller.
            let product = unsafe { F32x16::load(numbers.add(at)).mul(F32x16::splat(factor)) };

            // With 128 more, the high digit is the upper byte, and the low one the lower byte, 128 less.
            let integers = _mm512_add_epi32(_mm512_cvtps_epi32(product.0), _mm512_set1_epi32(128));
            let low = _mm256_set1_epi64x(0x8080_8080 << 32);
            // SAFETY: good for 16 integers, says the caller: 32 bytes.
            unsafe { _mm256_storeu_si256(to.add(at).cast(), _mm256_xor_si256(digits(integers), low)) }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c,avx512vnni")]
    unsafe fn store_weights(numbers: *const f32, factor: f32, to: *mut Integer) {
        for at in (0..STEP_TOKENS).step_by(F32x16::COUNT) {
            // SAFETY: good for 64, says the caller.
            let product = unsafe { F32x16::load(numbers.add(at)).mul(F32x16::splat(factor)) };

            // SAFETY: good for 16 integers, says the caller: 32 bytes.
            unsafe { _mm256_storeu_si256(to.add(at).cast(), digits(_mm512_cvtps_epi32(product.0))) }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
    unsafe fn max_magnitude(a: F32x16, b: F32x16) -> F32x16 {
        max_magnitude(a, b)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
    unsafe fn max_magnitude_lane(of: F32x16) -> f32 {
        max_magnitude_lane(of)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c,avx512vnni")]
    unsafe fn sums(of: i32) -> [__m512i; 2] {
        [_mm512_setzero_si512(), _mm512_set1_epi32(of)]
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c,avx512vnni")]
    unsafe fn keys(from: *const [u8; 4]) -> __m512i {
        // SAFETY: good for 16 fours, says the caller: 64 bytes.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c,avx512vnni")]
    unsafe fn values(from: *const [u8; 4]) -> __m512i {
        // SAFETY: good for 16 fours, says the caller: 64 bytes.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c,avx512vnni")]
    unsafe fn splat(from: *const Four) -> [__m512i; 2] {
        // SAFETY: good for a four, says the caller: 8 bytes.
        [0, 1].map(|at| _mm512_set1_epi32(unsafe { from.cast::<i32>().add(at).read_unaligned() }))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c,avx512vnni")]
    unsafe fn add_keys(sums: [__m512i; 2], keys: __m512i, query: [__m512i; 2]) -> [__m512i; 2] {
        [_mm512_dpbusd_epi32(sums[0], keys, query[0]), _mm512_dpbusd_epi32(sums[1], keys, query[1])]
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c,avx512vnni")]
    unsafe fn add_values(sums: [__m512i; 2], values: __m512i, weights: [__m512i; 2]) -> [__m512i; 2] {
        [_mm512_dpbusd_epi32(sums[0], weights[0], values), _mm512_dpbusd_epi32(sums[1], weights[1], values)]
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c,avx512vnni")]
    unsafe fn to_f32([high, low]: [__m512i; 2]) -> F32x16 {
        F32x16(_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32::<8>(high), low)))
    }
}

/// The upper and lower bytes of 16 integers of 16 bits: of each four, the upper ones first.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn digits(integers: __m512i) -> __m256i {
    let bytes = _mm512_shuffle_epi8(integers, _mm512_set4_epi32(0, 0, 0x0c08_0400, 0x0d09_0501));
    _mm512_castsi512_si256(_mm512_permutexvar_epi64(_mm512_set_epi64(0, 0, 0, 0, 6, 4, 2, 0), bytes))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn max_magnitude(a: F32x16, b: F32x16) -> F32x16 {
    // Without a sign, bits order numbers as numbers do, and NaN above them.
    let magnitude = _mm512_set1_epi32(i32::MAX);
    let [a, b] = [a, b].map(|x| _mm512_and_si512(_mm512_castps_si512(x.0), magnitude));
    F32x16(_mm512_castsi512_ps(_mm512_max_epu32(a, b)))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn max_magnitude_lane(of: F32x16) -> f32 {
    f32::from_bits(_mm512_reduce_max_epu32(_mm512_castps_si512(of.0)))
}
