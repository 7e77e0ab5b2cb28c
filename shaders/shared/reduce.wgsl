// Sum over the lanes of a workgroup, as a tree of fixed order. All lanes get the sum; all must call.
// Needs WG_SIZE, a power of two that rows have no part in choosing: the shape of the tree is part of the order of summation.
var<workgroup> reduce_scratch: array<f32, WG_SIZE>;
fn workgroup_sum(value: f32, lane: u32) -> f32 {
    reduce_scratch[lane] = value;
    workgroupBarrier();
    for (var half = WG_SIZE / 2u; half > 0u; half /= 2u) {
        if lane < half { reduce_scratch[lane] += reduce_scratch[lane + half]; }
        workgroupBarrier();
    }
    let sum = reduce_scratch[0];
    workgroupBarrier();
    return sum;
}
