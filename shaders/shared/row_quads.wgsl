// Four elements of a row of `x` that a lane takes at a time, WG_SIZE apart, so that their loads are under way together.
// Elements from beyond the row are zeros. Needs x, WG_SIZE.
fn row_quad(base: u32, j: u32, width: u32) -> vec4<f32> {
    var quad = vec4(0.0);
    if j < width { quad.x = x[base + j]; }
    if j + WG_SIZE < width { quad.y = x[base + j + WG_SIZE]; }
    if j + 2u * WG_SIZE < width { quad.z = x[base + j + 2u * WG_SIZE]; }
    if j + 3u * WG_SIZE < width { quad.w = x[base + j + 3u * WG_SIZE]; }
    return quad;
}

// One chain of multiply-adds with the squares of a quad.
fn add_squares(sum: f32, quad: vec4<f32>) -> f32 {
    return fma(quad.w, quad.w, fma(quad.z, quad.z, fma(quad.y, quad.y, fma(quad.x, quad.x, sum))));
}
