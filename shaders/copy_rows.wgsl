// Rows of words from one buffer to another, either of which may lie in host memory.
// One workgroup per row and 256 words of it; lanes next to each other touch words next to each other.
// Reference: src/reference/copy_rows.rs
struct Params { n_rows: u32, row_words: u32, from_stride: u32, to_stride: u32 }
var<immediate> params: Params;
@group(0) @binding(0) var<storage, read>       from_words: array<u32>; // [n_rows, from_stride], the first row_words of each
@group(0) @binding(1) var<storage, read_write> to_words: array<u32>;   // [n_rows, to_stride], the first row_words of each

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = workgroup.x;
    for (var i = 0u; i < 4u; i++) {
        let word = workgroup.y * 256u + i * 64u + lane;
        if word < params.row_words {
            to_words[row * params.to_stride + word] = from_words[row * params.from_stride + word];
        }
    }
}
