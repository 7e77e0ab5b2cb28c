// halves[t, k] = x[t, x_offset + k] / scales[t] as f16, 0 from n_in to n_padded.   One workgroup per row, rows in turn.
// scales[t] is the power of two that brings the greatest magnitude of row t into 2^14 .. 2^15: below f16's greatest number, with as
// much room as there is for the smaller ones. It is at least 2^-100, and 1 for a row that is 0 or not finite.
// Rows 0 .. n_rows, or those between two entries of offsets.
// Where n_experts is not 0, rows are sorted positions, t that of row permutation[t] / n_chosen of x (of row t itself where n_chosen is 0),
// and lie by the expert they belong to, in groups of 16: those of expert e from group offsets[e] / 16 + e on. A group is n_padded / 16
// fragments of 16 columns, each 16 x 16 and contiguous. What no row falls to is left as it is.
// Reference: src/reference/half_rows.rs      Needs: shared/f16, shared/expert_groups
struct Params {
    n_rows: u32, n_in: u32, n_padded: u32, x_stride: u32, x_offset: u32,
    first_bound: u32, end_bound: u32,
    n_experts: u32, n_chosen: u32,
}
var<immediate> params: Params;
@group(0) @binding(0) var<storage, read>       x: array<f32>;      // [T, x_stride], columns x_offset .. x_offset + n_in
@group(0) @binding(1) var<storage, read_write> halves: array<u32>; // [T, n_padded] f16 or groups of fragments; two to a word, low half first
@group(0) @binding(2) var<storage, read_write> scales: array<f32>; // [T]
@group(0) @binding(3) var<storage, read>       offsets: array<u32>;     // ascending, up to n_rows; where first_bound < end_bound
@group(0) @binding(4) var<storage, read>       permutation: array<u32>; // [T], where n_chosen is not 0

const WG_SIZE: u32 = 256u;
var<workgroup> greatest: array<u32, WG_SIZE>;

@compute @workgroup_size(WG_SIZE)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    var first_row = 0u;
    var end_row = params.n_rows;
    if params.first_bound < params.end_bound {
        first_row = offsets[params.first_bound];
        end_row = offsets[params.end_bound];
    }
    for (var row = first_row + workgroup.x; row < end_row; row += workgroups.x) {
        var x_row = row;
        if params.n_chosen != 0u { x_row = permutation[row] / params.n_chosen; }
        let start = x_row * params.x_stride + params.x_offset;
        // Magnitudes order as their bits do, with those that are not finite last.
        // Eight loads are under way together; those past the end repeat the last one.
        var bits = 0u;
        let last = start + params.n_in - 1u;
        for (var k = start + lane; k <= last; k += 8u * WG_SIZE) {
            let a = vec4(x[k], x[min(k + WG_SIZE, last)], x[min(k + 2u * WG_SIZE, last)], x[min(k + 3u * WG_SIZE, last)]);
            let b = vec4(x[min(k + 4u * WG_SIZE, last)], x[min(k + 5u * WG_SIZE, last)],
                         x[min(k + 6u * WG_SIZE, last)], x[min(k + 7u * WG_SIZE, last)]);
            let most = max(bitcast<vec4<u32>>(a) & vec4(0x7fffffffu), bitcast<vec4<u32>>(b) & vec4(0x7fffffffu));
            bits = max(max(bits, max(most.x, most.y)), max(most.z, most.w));
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
        let pairs = params.n_padded / 2u;
        // First word of the row, and from eight words to the next eight.
        var first = row * pairs;
        var step = 8u;
        if params.n_experts != 0u {
            let place = place_of(row, params.n_experts);
            first = place.x * 16u * pairs + place.y * 8u;
            step = 128u;
        }
        for (var pair = lane; pair < pairs; pair += 4u * WG_SIZE) {
            // As many loads again, and at most four words: 0 from beyond n_in, nothing beyond the row.
            let k = vec4(2u * pair) + vec4(0u, 2u, 4u, 6u) * WG_SIZE;
            let even = vec4(start) + min(k, vec4(params.n_in - 1u));
            let odd = vec4(start) + min(k + 1u, vec4(params.n_in - 1u));
            let low = select(vec4(0.0), vec4(x[even.x], x[even.y], x[even.z], x[even.w]), k < vec4(params.n_in));
            let high = select(vec4(0.0), vec4(x[odd.x], x[odd.y], x[odd.z], x[odd.w]), k + 1u < vec4(params.n_in));
            let at = first + pair / 8u * step + pair % 8u;
            let further = WG_SIZE / 8u * step;
            halves[at] = pack_f16(low.x * inverse, high.x * inverse);
            if pair + WG_SIZE < pairs { halves[at + further] = pack_f16(low.y * inverse, high.y * inverse); }
            if pair + 2u * WG_SIZE < pairs { halves[at + 2u * further] = pack_f16(low.z * inverse, high.z * inverse); }
            if pair + 3u * WG_SIZE < pairs { halves[at + 3u * further] = pack_f16(low.w * inverse, high.w * inverse); }
        }
    }
}
