// Causal attention of prompt rows over their paged context.   One workgroup per row and four query heads of a KV head.
// K and V are read as the cache stores them, the row's own chunk included, so where a prompt is cut changes no bit.
// lavapipe 22.3 ends an invocation after 65,535 loop iterations: about 10,000 tokens of context at head width 128.
// Reference: src/reference/prompt_attention.rs      Needs: shared/paged_attention (bindings, attend)
@compute @workgroup_size(WG_SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    attend(rows[workgroup.x], workgroup.y, lane);
}
