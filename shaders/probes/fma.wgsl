// 8 chains of vec4 multiply-adds in registers, `steps` long: 64 operations on floating-point numbers a step and lane.
struct Params { steps: u32 }
var<immediate> params: Params;
@group(0) @binding(0) var<storage, read_write> sums: array<vec4<f32>>;

@compute @workgroup_size(256)
fn main(@builtin(local_invocation_index) lane: u32) {
    let x = vec4(f32(lane) * 1e-3);
    let w = vec4(0.999);
    var a = x; var b = x + 1.0; var c = x + 2.0; var d = x + 3.0;
    var e = x + 4.0; var f = x + 5.0; var g = x + 6.0; var h = x + 7.0;
    for (var i = 0u; i < params.steps; i++) {
        a = fma(a, w, x); b = fma(b, w, x); c = fma(c, w, x); d = fma(d, w, x);
        e = fma(e, w, x); f = fma(f, w, x); g = fma(g, w, x); h = fma(h, w, x);
    }
    let sum = a + b + c + d + e + f + g + h;
    // No sum is this large; the compiler cannot know.
    if sum.x > 1e30 { sums[0] = sum; }
}
