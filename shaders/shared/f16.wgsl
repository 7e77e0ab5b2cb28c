// f32 to f16, rounded to nearest even, as the CPU rounds: subnormals kept, overflow to infinity, NaN stays NaN.
// In integers, because pack2x16float may round either way and may flush subnormals.

// `value` / 2^shift, rounded to nearest even; shift is 1..24.
fn shift_right_to_even(value: u32, shift: u32) -> u32 {
    let odd = (value >> shift) & 1u;
    return (value + (1u << (shift - 1u)) - 1u + odd) >> shift;
}

fn f16_bits(value: f32) -> u32 {
    let bits = bitcast<u32>(value);
    let sign = (bits >> 16u) & 0x8000u;
    let magnitude = bits & 0x7fffffffu;
    if magnitude > 0x7f800000u { return sign | 0x7e00u | ((magnitude >> 13u) & 0x3ffu); } // NaN, made quiet
    if magnitude >= 0x47800000u { return sign | 0x7c00u; } // from 2^16 up; 65520 rounds up to infinity below
    if magnitude >= 0x38800000u { // from 2^-14 up: a normal f16. The exponent's bias is 112 less.
        return sign | shift_right_to_even(magnitude - (112u << 23u), 13u);
    }
    if magnitude <= 0x33000000u { return sign; } // up to 2^-25, half of the smallest subnormal: to even, which is zero
    let mantissa = (magnitude & 0x7fffffu) | 0x800000u;
    return sign | shift_right_to_even(mantissa, 126u - (magnitude >> 23u)); // in units of 2^-24
}

// Two f16 in a word, `low` in the low half.
fn pack_f16(low: f32, high: f32) -> u32 { return f16_bits(low) | (f16_bits(high) << 16u); }
