//! AVX-512F: 16 lanes, 32 registers, so tiles of twice as many accumulators, each twice as wide.

use std::arch::x86_64::*;

use half::f16;

use super::group::{self, Group, Lanes, Scratch, State};
use super::int8::{self, Integers};

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
    unsafe { int8::attend::<I16x32<false>>(group, scratch, earlier) }
}

/// Attends one group on AVX-512 and its VNNI.
///
/// # Safety
///
/// * `scratch` and `earlier` are made for the group's form, and the cache's elements are 8-bit integers.
#[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c,avx512vnni")]
pub(super) unsafe fn attend_int8_vnni(group: &Group, scratch: &mut Scratch, earlier: Option<&mut State>) {
    // SAFETY: this function runs only where its own features are, and they are those of the registers; the rest is the caller's.
    unsafe { int8::attend::<I16x32<true>>(group, scratch, earlier) }
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

/// Pairs of 16-bit integers beside 16 lanes of f32. With VNNI a product and its sum are one instruction, the same numbers.
struct I16x32<const VNNI: bool>;

impl<const VNNI: bool> Integers for I16x32<VNNI> {
    type Floats = F32x16;
    type Pairs = __m512i;
    type Sums = __m512i;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
    unsafe fn zero() -> __m512i {
        _mm512_setzero_si512()
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
    unsafe fn widen(from: *const [i8; 2]) -> __m512i {
        // SAFETY: good for 16 pairs, says the caller: 32 bytes.
        _mm512_cvtepi8_epi16(unsafe { _mm256_loadu_si256(from.cast()) })
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
    unsafe fn splat(from: *const [i16; 2]) -> __m512i {
        // SAFETY: good for a pair, says the caller.
        _mm512_set1_epi32(unsafe { from.cast::<i32>().read_unaligned() })
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
    unsafe fn add_products(sums: __m512i, a: __m512i, b: __m512i) -> __m512i {
        if VNNI {
            // SAFETY: `VNNI` is asked for only by a function that switches AVX-512's VNNI on.
            return unsafe { _mm512_dpwssd_epi32(sums, a, b) };
        }
        _mm512_add_epi32(sums, _mm512_madd_epi16(a, b))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
    unsafe fn load(from: *const [i16; 2]) -> __m512i {
        // SAFETY: good for 16 pairs, says the caller: 64 bytes.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
    unsafe fn store_tokens(sums: [__m512i; 2], scales: *const f32, factor: F32x16, to: *mut f32) {
        // 8 tokens of one pair of columns in a lower half, the same of the next pair in the upper one.
        let [a, b] = sums;
        let sums =
            _mm512_add_epi32(_mm512_shuffle_i64x2::<0b01_00_01_00>(a, b), _mm512_shuffle_i64x2::<0b11_10_11_10>(a, b));
        // SAFETY: both good for 16 tokens, says the caller.
        unsafe { Self::to_f32(sums).mul(F32x16::load(scales).mul(factor)).store(to) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
    unsafe fn to_f32(sums: __m512i) -> F32x16 {
        F32x16(_mm512_cvtepi32_ps(sums))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
    unsafe fn store_rounded(numbers: F32x16, to: *mut i16) {
        // SAFETY: good for 16 integers, says the caller: 32 bytes.
        unsafe { _mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(numbers.0))) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
    unsafe fn max_magnitude(a: F32x16, b: F32x16) -> F32x16 {
        // Without a sign, bits order numbers as numbers do, and NaN above them.
        let magnitude = _mm512_set1_epi32(i32::MAX);
        let [a, b] = [a, b].map(|x| _mm512_and_si512(_mm512_castps_si512(x.0), magnitude));
        F32x16(_mm512_castsi512_ps(_mm512_max_epu32(a, b)))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
    unsafe fn max_magnitude_lane(of: F32x16) -> f32 {
        f32::from_bits(_mm512_reduce_max_epu32(_mm512_castps_si512(of.0)))
    }
}
