// Uniform random numbers in -amplitude .. amplitude, as bf16 or f16 (two to a word) or f32.
struct Params { n_words: u32, seed: u32, kind: u32, amplitude: f32 }
var<immediate> params: Params;
@group(0) @binding(0) var<storage, read_write> words: array<u32>;

fn random(seed: u32) -> f32 {
    // PCG's output permutation of a linear congruential step.
    let state = seed * 747796405u + 2891336453u;
    let word = ((state >> ((state >> 28u) + 4u)) ^ state) * 277803737u;
    let bits = (word >> 22u) ^ word;
    return (f32(bits >> 8u) / 8388608.0 - 1.0) * params.amplitude;
}

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    for (var i = workgroup.x * 256u + lane; i < params.n_words; i += workgroups.x * 256u) {
        let a = random(2u * i + params.seed);
        let b = random(2u * i + 1u + params.seed);
        var word = bitcast<u32>(a);
        if params.kind == 0u { word = (word >> 16u) | (bitcast<u32>(b) & 0xffff0000u); }
        if params.kind == 1u { word = pack2x16float(vec2(a, b)); }
        words[i] = word;
    }
}
