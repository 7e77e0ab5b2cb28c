// Attention of decode rows over their paged context.   One workgroup per row and four query heads of a KV head.
// The same function as for prompt rows, so a token gets the same bits whichever way it is attended.
// Reference: src/reference/decode_attention.rs      Needs: shared/paged_attention (bindings, attend)
@compute @workgroup_size(WG_SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    attend(rows[workgroup.x], workgroup.y, lane);
}
