//! Plain arrays of 4 lanes, the narrowest register of any machine we know: compilers turn them into SSE2 on x86-64.
//!
//! No fused multiply-add, which is a slow library call where the CPU has no instruction for it.

use half::f16;

use super::group::{self, Element, Group, Lanes, Scratch};

/// Attends one group anywhere.
///
/// # Safety
///
/// * `scratch` is made for the group's form, and the cache's elements are `E`.
pub(super) unsafe fn attend<E: Element>(group: &Group, scratch: &mut Scratch) {
    // SAFETY: arrays need no instruction set; the rest is the caller's.
    unsafe { group::attend::<F32x4, E>(group, scratch) }
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
    unsafe fn load_i8(from: *const i8) -> Self {
        // SAFETY: good for 4 elements, says the caller.
        Self(unsafe { from.cast::<[i8; 4]>().read() }.map(f32::from))
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
