// What the kernels over experts share: which rows of which expert a workgroup computes, and one step of its sums.
// Needs: TILE_ROWS, params.n_experts, offsets (sorted positions of expert e: offsets[e] .. offsets[e + 1]), places.

// Slab of an expert that is not on the GPU.
const ABSENT: u32 = 0xffffffffu;

// Sorted positions first .. end, all of `expert`, whose matrix lies at `place` (slab, offset in words). Nothing to do
// where first >= end.
struct RowTile { first: u32, end: u32, expert: u32, place: vec2<u32> }

// The numbers of expert e's tiles start at offsets[e] / TILE_ROWS + e. That leaves every expert enough of them, since
// floor((o + n) / R) + 1 >= floor(o / R) + ceil(n / R), it needs no prefix sum over experts, and the last number is below
// n_assignments / TILE_ROWS + E. Numbers that no rows fall to are empty tiles.
fn first_tile(expert: u32) -> u32 { return offsets[expert] / TILE_ROWS + expert; }

fn row_tile(number: u32) -> RowTile {
    // The last expert whose tiles do not start after this one.
    var expert = 0u;
    var beyond = params.n_experts;
    while beyond - expert > 1u {
        let middle = (expert + beyond) / 2u;
        if first_tile(middle) <= number { expert = middle; } else { beyond = middle; }
    }
    let place = places[expert];
    let first = offsets[expert] + (number - first_tile(expert)) * TILE_ROWS;
    let end = select(min(first + TILE_ROWS, offsets[expert + 1u]), first, place.x == ABSENT);
    return RowTile(first, end, expert, place);
}

// Four columns' sums for one row, four values of k further: x holds the row's, w[j] the four columns' at the j-th.
// One chain acc = fma(x, w, acc) per sum with k ascending, whatever the tile: the tile changes time, never bits.
fn accumulate(acc: vec4<f32>, x: vec4<f32>, w: mat4x4<f32>) -> vec4<f32> {
    return fma(vec4(x.w), w[3], fma(vec4(x.z), w[2], fma(vec4(x.y), w[1], fma(vec4(x.x), w[0], acc))));
}
