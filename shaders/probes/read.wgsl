// Reads `n` elements once, in steps of UNROLL loads that are all under way together; what they hold decides whether anything is written.
// Before this text: alias Element, the type of a load.
struct Params { n: u32 }
var<immediate> params: Params;
@group(0) @binding(0) var<storage, read>       data: array<Element>;
@group(0) @binding(1) var<storage, read_write> sums: array<Element>;

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    var sum = Element();
    let last = params.n - 1u;
    for (var i = workgroup.x * 2048u + lane; i < params.n; i += workgroups.x * 2048u) {
        let a = data[i];
        let b = data[min(i + 256u, last)];
        let c = data[min(i + 512u, last)];
        let d = data[min(i + 768u, last)];
        let e = data[min(i + 1024u, last)];
        let f = data[min(i + 1280u, last)];
        let g = data[min(i + 1536u, last)];
        let h = data[min(i + 1792u, last)];
        sum ^= a ^ b ^ c ^ d ^ e ^ f ^ g ^ h;
    }
    // No sum is all this; the compiler cannot know.
    if all(sum == Element(0x5eed5eedu)) { sums[0] = sum; }
}
