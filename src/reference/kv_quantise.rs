//! 8-bit K and V: integers under one scale for each row of each head, so that a value never depends on its neighbours.
//!
//! A scale is m · 2^e with m of at most four bits, and 2^-24 divides it: so `integer · scale` has at most eleven bits and f16
//! holds it exactly. Everything that reads the cache reads the same numbers, whether it multiplies in f32 or has f16 blocks.
//!
//! What is given up: a scale is up to 9/8 of what a free one would be. A value is off by at most half a scale, that is
//! 9/16 · 1/127 of the largest of its row (0.45 %). Where that largest is below 127 · 2^-21 (6e-5), scales are few and it is 1/2 · 1/127
//! of it and 2^-25 more; above 65,280 it is up to 480, as f16 ends at 65,504.

use half::f16;

/// The smallest scale: the smallest f16.
const SMALLEST: f64 = 1.0 / (1 << 24) as f64;

/// The largest scale whose 127-fold f16 holds.
const LARGEST: f64 = 512.0;

/// `[K]` as integers in ±127 and their scale. The scale is the smallest one under which the largest element fits; an element that is
/// infinite or NaN makes it NaN, and with it the whole row.
pub fn quantise(row: &[f16]) -> (Vec<i8>, f16) {
    if row.iter().any(|x| !x.is_finite()) {
        return (vec![0; row.len()], f16::NAN);
    }
    let largest = row.iter().map(|x| x.to_f64().abs()).fold(0.0, f64::max);
    // 1 to 15 of the smallest, then eight steps to each power of two.
    let mut scale = SMALLEST;
    while 127.0 * scale < largest && scale < LARGEST {
        let step = (scale.log2().floor() - 3.0).exp2().max(SMALLEST);
        scale += step;
    }
    let integer = |x: &f16| (x.to_f64() / scale).round_ties_even().clamp(-127.0, 127.0) as i8;
    (row.iter().map(integer).collect(), f16::from_f64(scale))
}

/// The value of an integer under a scale. Exact.
pub fn dequantised(integer: i8, scale: f16) -> f16 {
    f16::from_f32(f32::from(integer) * scale.to_f32())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every scale that there is, times every integer.
    #[test]
    fn a_value_is_exact_in_f16() {
        let mut scales = std::collections::BTreeSet::new();
        for bits in 0..0x7c00u16 {
            let largest = f16::from_bits(bits);
            let (integers, scale) = quantise(&[largest]);
            scales.insert(scale.to_bits());
            let error = (dequantised(integers[0], scale).to_f64() - largest.to_f64()).abs();
            let free = largest.to_f64() / 127.0;
            let allowed = (free * 9.0 / 8.0).max(free + SMALLEST);
            assert!(scale.to_f64() <= allowed, "{largest}: scale {scale}");
            let allowed = if largest.to_f64() <= 65280.0 { allowed / 2.0 } else { 480.0 };
            assert!(error <= allowed, "{largest}: off by {error}");
        }
        assert!(scales.len() > 200, "{} scales", scales.len());
        for scale in scales.into_iter().map(f16::from_bits) {
            for integer in -127..=127i8 {
                let exact = f64::from(integer) * scale.to_f64();
                assert_eq!(dequantised(integer, scale).to_f64(), exact, "{integer} of {scale}");
            }
        }
    }

    #[test]
    fn what_is_not_finite_takes_its_row() {
        for bad in [f16::NAN, f16::INFINITY, f16::NEG_INFINITY] {
            let (integers, scale) = quantise(&[f16::ONE, bad]);
            assert!(scale.is_nan() && dequantised(integers[0], scale).is_nan());
        }
        assert_eq!(quantise(&[f16::ZERO, f16::NEG_ZERO]).0, [0, 0]);
    }
}
