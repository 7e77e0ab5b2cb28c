//! Plain arrays of 4 lanes, the narrowest register of any machine we know: compilers turn them into SSE2 on x86-64.
//!
//! No fused multiply-add, which is a slow library call where the CPU has no instruction for it.

use half::f16;

use super::group::{self, CacheLevel, Group, Lanes, Scratch, State};
use super::int8::{self, Four, Integer, Integers, STEP_TOKENS};

/// Attends one group anywhere.
///
/// # Safety
///
/// * `scratch` and `earlier` are made for the group's form, and the cache's elements are f16.
pub(super) unsafe fn attend_f16(group: &Group, scratch: &mut Scratch, earlier: Option<&mut State>) {
    // SAFETY: arrays need no instruction set; the rest is the caller's.
    unsafe { group::attend::<F32x4>(group, scratch, earlier) }
}

/// Attends one group anywhere.
///
/// # Safety
///
/// * `scratch` and `earlier` are made for the group's form, and the cache's elements are 8-bit integers.
pub(super) unsafe fn attend_int8(group: &Group, scratch: &mut Scratch, earlier: Option<&mut State>) {
    // SAFETY: arrays need no instruction set; the rest is the caller's.
    unsafe { int8::attend::<Wide>(group, scratch, earlier) }
}

#[derive(Clone, Copy)]
struct F32x4([f32; 4]);

impl F32x4 {
    #[inline(always)]
    fn zip(self, other: Self, op: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|lane| op(self.0[lane], other.0[lane])))
    }
}

impl Lanes for F32x4 {
    const COUNT: usize = 4;
    const TILE: usize = 8;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self([x; 4])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: good for 4 elements, says the caller; an array of f32 is aligned as an f32.
        Self(unsafe { from.cast::<[f32; 4]>().read() })
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self {
        // SAFETY: good for 4 elements, says the caller; an array of f16 is aligned as an f16.
        Self(unsafe { from.cast::<[f16; 4]>().read() }.map(widen))
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: good for 4 elements, says the caller; an array of f32 is aligned as an f32.
        unsafe { to.cast::<[f32; 4]>().write(self.0) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
        self.zip(factor, |a, b| a * b).zip(addend, |product, c| product + c)
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        // Not f32::max, whose rule for NaN costs instructions that nobody needs here.
        self.zip(other, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    unsafe fn pow2(self) -> Self {
        Self(self.0.map(|x| f32::from_bits((x.to_bits() << 23).wrapping_add(127 << 23))))
    }

    #[inline(always)]
    unsafe fn zero_where_below(self, x: Self, limit: Self) -> Self {
        let kept = x.zip(limit, |x, limit| if x < limit { 0.0 } else { 1.0 });
        self.zip(kept, |value, kept| if kept == 0.0 { 0.0 } else { value })
    }

    #[inline(always)]
    unsafe fn max_lane(self) -> f32 {
        self.0.into_iter().reduce(|a, b| if a > b { a } else { b }).expect("four lanes")
    }

    #[inline(always)]
    unsafe fn sums(registers: [Self; 16]) -> [f32; 16] {
        registers.map(|Self([a, b, c, d])| (a + b) + (c + d))
    }
}

/// Elements widened to 16 bits, beside 4 lanes of f32: two pairs in each.
struct Wide;

impl Integers for Wide {
    type Floats = F32x4;
    type Elements = [[i16; 2]; 8];
    type Factors = [[i16; 2]; 2];
    type Sums = [i32; 8];

    const LARGEST_QUERY: f32 = 32767.0;
    const LARGEST_WEIGHT: f32 = 32767.0;
    const HEADS: usize = 4;
    const AHEAD: CacheLevel = CacheLevel::First;

    #[inline(always)]
    unsafe fn store_query(numbers: *const f32, factor: f32, n: usize, to: *mut Integer) {
        for at in (0..n).step_by(F32x4::COUNT) {
            // SAFETY: good for `n`, says the caller.
            let product = unsafe { F32x4::load(numbers.add(at)).mul(F32x4::splat(factor)) };

            // SAFETY: good for 4 integers, says the caller.
            unsafe { to.add(at).cast::<[i16; 4]>().write_unaligned(product.0.map(nearest)) }
        }
    }

    #[inline(always)]
    unsafe fn store_weights(numbers: *const f32, factor: f32, to: *mut Integer) {
        // SAFETY: as the caller's.
        unsafe { Self::store_query(numbers, factor, STEP_TOKENS, to) }
    }

    #[inline(always)]
    unsafe fn max_magnitude(a: F32x4, b: F32x4) -> F32x4 {
        // Without a sign, bits order numbers as numbers do, and NaN above them.
        a.zip(b, |a, b| f32::from_bits(a.abs().to_bits().max(b.abs().to_bits())))
    }

    #[inline(always)]
    unsafe fn max_magnitude_lane(of: F32x4) -> f32 {
        f32::from_bits(of.0.map(f32::to_bits).into_iter().max().expect("four lanes"))
    }

    #[inline(always)]
    unsafe fn sums(of: i32) -> [i32; 8] {
        [of, 0, of, 0, of, 0, of, 0]
    }

    #[inline(always)]
    unsafe fn keys(from: *const [u8; 4]) -> [[i16; 2]; 8] {
        // SAFETY: good for 4 fours, says the caller.
        unsafe { from.cast::<[[u8; 2]; 8]>().read() }.map(|pair| pair.map(i16::from))
    }

    #[inline(always)]
    unsafe fn values(from: *const [u8; 4]) -> [[i16; 2]; 8] {
        // SAFETY: good for 4 fours, says the caller.
        unsafe { from.cast::<[[i8; 2]; 8]>().read() }.map(|pair| pair.map(i16::from))
    }

    #[inline(always)]
    unsafe fn splat(from: *const Four) -> [[i16; 2]; 2] {
        // SAFETY: good for a four, says the caller.
        unsafe { from.cast::<[[i16; 2]; 2]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn add_keys(sums: [i32; 8], keys: [[i16; 2]; 8], query: [[i16; 2]; 2]) -> [i32; 8] {
        let product = |pair: usize, i: usize| i32::from(keys[pair][i]) * i32::from(query[pair % 2][i]);
        std::array::from_fn(|pair| sums[pair].wrapping_add(product(pair, 0).wrapping_add(product(pair, 1))))
    }

    #[inline(always)]
    unsafe fn add_values(sums: [i32; 8], values: [[i16; 2]; 8], weights: [[i16; 2]; 2]) -> [i32; 8] {
        // SAFETY: the same arithmetic.
        unsafe { Self::add_keys(sums, values, weights) }
    }

    #[inline(always)]
    unsafe fn to_f32(sums: [i32; 8]) -> F32x4 {
        F32x4(std::array::from_fn(|lane| sums[2 * lane].wrapping_add(sums[2 * lane + 1]) as f32))
    }
}

/// The nearest integer of a number in ±32767, ties to even, without a call: adding 1.5 * 2^23 rounds and leaves it in the low bits.
#[inline(always)]
fn nearest(x: f32) -> i16 {
    (x + 12_582_912.0).to_bits() as i16
}

/// f16 to f32, exactly, without a branch: `f16::to_f32` asks for the CPU's features at every call.
///
/// The exponent and mantissa bits move to their places in an f32, whose exponent is then too small by 127 - 15: a product
/// with 2^112 mends that, and turns subnormal f16 into normal f32 on the way. Infinity and NaN come out as 2^16 and more,
/// and get their exponent back.
#[inline(always)]
fn widen(x: f16) -> f32 {
    let bits = u32::from(x.to_bits());
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23);
    let not_finite = if magnitude >= 65536.0 { 0x7f80_0000 } else { 0 };
    f32::from_bits(magnitude.to_bits() | not_finite | (bits & 0x8000) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widening_is_exact_for_every_f16() {
        for bits in 0..=u16::MAX {
            let x = f16::from_bits(bits);
            let (ours, expected) = (widen(x), x.to_f32());
            if x.is_nan() {
                assert!(ours.is_nan(), "{bits:#06x}");
            } else {
                assert_eq!(ours.to_bits(), expected.to_bits(), "{bits:#06x}");
            }
        }
    }
}
