// Assignments sorted by expert, stable.   One workgroup per expert: it counts the assignments of the experts before its own, and
// writes its own in order behind them. A lane goes over consecutive assignments, and a scan over the lanes says where its first one goes.
// An id that is no expert's marks a row that is not there: it goes nowhere.
// Reference: src/reference/expert_sort.rs
struct Params { n_assignments: u32, n_experts: u32 }
var<immediate> params: Params;
@group(0) @binding(0) var<storage, read>       ids: array<u32>;         // [T * A] expert of each assignment
@group(0) @binding(1) var<storage, read_write> offsets: array<u32>;     // [E + 1] first sorted position of each expert
@group(0) @binding(2) var<storage, read_write> permutation: array<u32>; // [T * A] assignment of each sorted position

const WG_SIZE: u32 = 256u;
const NOBODY: u32 = 0xffffffffu;
var<workgroup> before: array<u32, WG_SIZE>; // assignments of the experts before this one, in the lanes up to this one
var<workgroup> own: array<u32, WG_SIZE>;    // and of this one

// Four ids whose loads are under way together; nobody's from `end` on.
fn id_quad(a: u32, end: u32) -> vec4<u32> {
    var quad = vec4(ids[a], NOBODY, NOBODY, NOBODY);
    if a + 1u < end { quad.y = ids[a + 1u]; }
    if a + 2u < end { quad.z = ids[a + 2u]; }
    if a + 3u < end { quad.w = ids[a + 3u]; }
    return quad;
}

@compute @workgroup_size(WG_SIZE)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let expert = workgroup.x;
    let n_each = (params.n_assignments + WG_SIZE - 1u) / WG_SIZE;
    let first = min(lane * n_each, params.n_assignments);
    let end = min(first + n_each, params.n_assignments);
    var n_before = 0u;
    var n_own = 0u;
    for (var a = first; a < end; a += 4u) {
        let quad = id_quad(a, end);
        let less = vec4<u32>(quad < vec4(expert));
        let same = vec4<u32>(quad == vec4(expert));
        n_before += less.x + less.y + less.z + less.w;
        n_own += same.x + same.y + same.z + same.w;
    }
    before[lane] = n_before;
    own[lane] = n_own;
    workgroupBarrier();
    for (var distance = 1u; distance < WG_SIZE; distance *= 2u) {
        var add = vec2(0u);
        if lane >= distance { add = vec2(before[lane - distance], own[lane - distance]); }
        workgroupBarrier();
        before[lane] += add.x;
        own[lane] += add.y;
        workgroupBarrier();
    }
    let start = before[WG_SIZE - 1u];
    if lane == 0u {
        offsets[expert] = start;
        if expert + 1u == params.n_experts { offsets[params.n_experts] = start + own[WG_SIZE - 1u]; }
    }
    var next = start + own[lane] - n_own;
    for (var a = first; a < end; a += 4u) {
        let same = id_quad(a, end) == vec4(expert);
        if same.x { permutation[next] = a; next++; }
        if same.y { permutation[next] = a + 1u; next++; }
        if same.z { permutation[next] = a + 2u; next++; }
        if same.w { permutation[next] = a + 3u; next++; }
    }
}
