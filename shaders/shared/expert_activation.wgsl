// What an expert does with its gate and up products: SwiGLU, or the clamped one where params.limit is not 0.
// Needs: params.limit.
fn activate(gate: vec4<f32>, up: vec4<f32>) -> vec4<f32> {
    if params.limit == 0.0 { return gate / (1.0 + exp(-gate)) * up; }
    // select, not min: a NaN stays one.
    let limit = vec4(params.limit);
    let g = select(gate, limit, gate > limit);
    let u = select(select(up, limit, up > limit), -limit, up < -limit);
    return (u + 1.0) * (g / (1.0 + exp(-1.702 * g)));
}
