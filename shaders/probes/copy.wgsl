// Copies `n` quads of words.
struct Params { n: u32 }
var<immediate> params: Params;
@group(0) @binding(0) var<storage, read>       source: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> copied: array<vec4<u32>>;

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    for (var i = workgroup.x * 256u + lane; i < params.n; i += workgroups.x * 256u) { copied[i] = source[i]; }
}
