// Weights as MXFP4: E2M1 codes of 4 bits, eight to a word, low bits first; 32 of them share an E8M0 scale, a byte that lies
// with the others behind all codes. value = {0, 0.5, 1, 1.5, 2, 3, 4, 6}[code & 7] * 2^(scale - 127), negative where code & 8.

// Bits of the f32 that code (4 bits) has under scale (8 bits). In integers, so that subnormal values survive everywhere.
fn mxfp4_bits(code: u32, scale: u32) -> u32 {
    let sign = (code & 8u) << 28u;
    let magnitude = code & 7u;
    if scale == 255u { return 0x7fc00000u; } // E8M0's NaN
    if magnitude == 0u { return sign; }
    let half = select(0u, (magnitude & 1u) << 22u, magnitude > 1u); // 0.5 is a power of two, 1.5, 3 and 6 are none
    let exponent = scale + (magnitude >> 1u); // one more than f32's
    if exponent > 255u { return sign | 0x7f800000u; }
    if exponent < 2u { return sign | ((0x800000u | half) >> (2u - exponent)); }
    return sign | ((exponent - 1u) << 23u) | half;
}

// Elements i to i + 3 (i a multiple of 4) out of the word that holds their codes and the one that holds their scale.
fn mxfp4_quad(codes: u32, scales: u32, i: u32) -> vec4<f32> {
    let code = (vec4(codes >> ((i & 4u) * 4u)) >> vec4(0u, 4u, 8u, 12u)) & vec4(15u);
    let scale = (scales >> (((i >> 5u) & 3u) * 8u)) & 255u;
    if scale < 2u || scale > 252u { // some of the values are no normal numbers
        return bitcast<vec4<f32>>(vec4(mxfp4_bits(code.x, scale), mxfp4_bits(code.y, scale),
                                       mxfp4_bits(code.z, scale), mxfp4_bits(code.w, scale)));
    }
    let magnitude = code & vec4(7u);
    let half = select(vec4(0u), (magnitude & vec4(1u)) << vec4(22u), magnitude > vec4(1u));
    let normal = ((vec4(scale - 1u) + (magnitude >> vec4(1u))) << vec4(23u)) | half;
    return bitcast<vec4<f32>>(((code & vec4(8u)) << vec4(28u)) | select(normal, vec4(0u), magnitude == vec4(0u)));
}
