// halves[t, k] = x[t, x_offset + k] / scales[t] as f16, 0 from n_in to n_padded.   One workgroup per row, rows in turn.
// scales[t] is the power of two that brings the greatest magnitude of row t into 2^14 .. 2^15: below f16's greatest number, with as
// much room as there is for the smaller ones. It is at least 2^-100, and 1 for a row that is 0 or not finite.
// Reference: src/reference/half_rows.rs      Needs: shared/f16
struct Params { n_rows: u32, n_in: u32, n_padded: u32, x_stride: u32, x_offset: u32 }
var<immediate> params: Params;
@group(0) @binding(0) var<storage, read>       x: array<f32>;      // [T, x_stride], columns x_offset .. x_offset + n_in
@group(0) @binding(1) var<storage, read_write> halves: array<u32>; // [T, n_padded] f16, two to a word, low half first
@group(0) @binding(2) var<storage, read_write> scales: array<f32>; // [T]

const WG_SIZE: u32 = 256u;
var<workgroup> greatest: array<u32, WG_SIZE>;

@compute @workgroup_size(WG_SIZE)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    for (var row = workgroup.x; row < params.n_rows; row += workgroups.x) {
        let start = row * params.x_stride + params.x_offset;
        // Magnitudes order as their bits do, with those that are not finite last.
        var bits = 0u;
        for (var k = lane; k < params.n_in; k += WG_SIZE) {
            bits = max(bits, bitcast<u32>(x[start + k]) & 0x7fffffffu);
        }
        workgroupBarrier();
        greatest[lane] = bits;
        workgroupBarrier();
        for (var half = WG_SIZE / 2u; half > 0u; half /= 2u) {
            if lane < half { greatest[lane] = max(greatest[lane], greatest[lane + half]); }
            workgroupBarrier();
        }
        bits = greatest[0];
        var exponent = 0i;
        if bits != 0u && bits < 0x7f800000u { exponent = max(i32(bits >> 23u) - 127 - 14, -100); }
        let inverse = bitcast<f32>(u32(127 - exponent) << 23u);
        if lane == 0u { scales[row] = bitcast<f32>(u32(127 + exponent) << 23u); }
        for (var pair = lane; pair < params.n_padded / 2u; pair += WG_SIZE) {
            var low = 0.0;
            var high = 0.0;
            if 2u * pair < params.n_in { low = x[start + 2u * pair]; }
            if 2u * pair + 1u < params.n_in { high = x[start + 2u * pair + 1u]; }
            halves[row * (params.n_padded / 2u) + pair] = pack_f16(low * inverse, high * inverse);
        }
    }
}
