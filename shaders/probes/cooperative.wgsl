// 8 chains of 16x16x16 products of f16 with f32 sums in each subgroup's registers, `steps` long: 65,536 operations a step and subgroup.
enable f16;
enable wgpu_cooperative_matrix;
struct Params { steps: u32 }
var<immediate> params: Params;
@group(0) @binding(0) var<storage, read_write> sums: array<f32>;
var<workgroup> operands: array<vec4<f16>, 64>;

@compute @workgroup_size(128)
fn main(@builtin(local_invocation_index) lane: u32) {
    if lane < 64u { operands[lane] = vec4<f16>(f16(lane) * 1e-3h); }
    workgroupBarrier();
    let x = coopLoadT<coop_mat16x16<f16, A>>(&operands[0], 4u);
    let w = coopLoad<coop_mat16x16<f16, B>>(&operands[0], 4u);
    var a = coop_mat16x16<f32, C>(); var b = coop_mat16x16<f32, C>();
    var c = coop_mat16x16<f32, C>(); var d = coop_mat16x16<f32, C>();
    var e = coop_mat16x16<f32, C>(); var f = coop_mat16x16<f32, C>();
    var g = coop_mat16x16<f32, C>(); var h = coop_mat16x16<f32, C>();
    for (var i = 0u; i < params.steps; i++) {
        a = coopMultiplyAdd(x, w, a); b = coopMultiplyAdd(x, w, b);
        c = coopMultiplyAdd(x, w, c); d = coopMultiplyAdd(x, w, d);
        e = coopMultiplyAdd(x, w, e); f = coopMultiplyAdd(x, w, f);
        g = coopMultiplyAdd(x, w, g); h = coopMultiplyAdd(x, w, h);
    }
    a = a + b; c = c + d; e = e + f; g = g + h;
    a = a + c; e = e + g;
    a = a + e;
    coopStoreT(a, &sums[0], 16u);
}
