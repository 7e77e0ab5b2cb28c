// y[t, y_offset + n] (+)= sum over k of x[t, k] * w[n, k], on matrices of a whole workgroup (VK_NV_cooperative_matrix2).
// What shaders/cooperative/matmul.wgsl gives, bit for bit: one accumulator of f32 for each output, 16 terms to a product, k ascending.
// The driver brings both operands from memory into fragments by itself, in an order and through copies that WGSL cannot ask for.
// n_out is a multiple of COLS and n_in one of DEPTH. BF16: weights are bf16, rounded to f16 as they are loaded; else they are f16.
// Words: matmul_bf16.spv and matmul_f16.spv, by `make` beside this. Reference: src/reference/matmul.rs
#version 460
#extension GL_EXT_buffer_reference : require
#extension GL_EXT_control_flow_attributes : require
#extension GL_EXT_shader_16bit_storage : require
#extension GL_EXT_shader_explicit_arithmetic_types_float16 : require
#extension GL_KHR_cooperative_matrix : require
#extension GL_KHR_memory_scope_semantics : require
#extension GL_NV_cooperative_matrix2 : require
#pragma use_vulkan_memory_model

// A workgroup's outputs, terms of a step, and steps without a branch between them: what was fastest on an H200.
const uint ROWS = 128;
const uint COLS = 256;
const uint DEPTH = 64;
const uint UNROLL = 8;

layout(local_size_x = 256) in;
layout(push_constant) uniform Params { uint n_rows, n_out, n_in, y_stride, y_offset, accumulate; } params;
layout(std430, binding = 0) readonly buffer X { float16_t x[]; };  // [T, n_in up to a multiple of 256], 0 from n_in
layout(std430, binding = 1) readonly buffer S { float scales[]; }; // [T]
layout(std430, binding = 3) buffer Y { float y[]; };               // [T, y_stride], columns y_offset .. y_offset + n_out

#ifdef BF16
// Two to a word, low half first.
layout(std430, binding = 2) readonly buffer W { uint w[]; };       // [n_out, n_in]
layout(buffer_reference, std430, buffer_reference_align = 4) readonly buffer Pair { uint both; };
float16_t half_of(const in Pair pair, const in uint at[2], const in uint within[2]) {
    return float16_t(uintBitsToFloat((within[1] & 1) == 0 ? pair.both << 16 : pair.both & 0xffff0000u));
}
#define AS_HALVES , half_of
const uint BLOCK = 2;
#else
layout(std430, binding = 2) readonly buffer W { float16_t w[]; };  // [n_out, n_in]
#define AS_HALVES
const uint BLOCK = 1;
#endif

// Sums are [outputs, rows]: faster than the other way round.
float scaled(const in uint output_, const in uint row, const in float sum, const in uint first_row) {
    return sum * scales[min(first_row + row, params.n_rows - 1)];
}

#define PAST_IS_ZERO gl_CooperativeMatrixClampModeConstantNV
#define Weights coopmat<float16_t, gl_ScopeWorkgroup, COLS, DEPTH, gl_MatrixUseA>
#define Rows coopmat<float16_t, gl_ScopeWorkgroup, DEPTH, ROWS, gl_MatrixUseB>
#define Sums coopmat<float, gl_ScopeWorkgroup, COLS, ROWS, gl_MatrixUseAccumulator>

void main() {
    const uint first_row = gl_WorkGroupID.x * ROWS;
    const uint first_col = gl_WorkGroupID.y * COLS;
    // The driver takes wide loads where it can see that rows start at multiples of 16 bytes.
    const uint n_in = params.n_in & ~7;
    const uint pitch = (n_in + 255) & ~255;

    tensorLayoutNV<2> of_w = createTensorLayoutNV(2);
#ifdef BF16
    of_w = setTensorLayoutBlockSizeNV(of_w, 1, BLOCK);
#endif
    of_w = setTensorLayoutDimensionNV(of_w, params.n_out, n_in);
    of_w = setTensorLayoutStrideNV(of_w, n_in / BLOCK, 1);
    tensorLayoutNV<2> of_x = createTensorLayoutNV(2);
    of_x = setTensorLayoutDimensionNV(of_x, params.n_rows, pitch);
    of_x = setTensorLayoutStrideNV(of_x, pitch, 1);
    // Of the last rows: what lies past the end is read as 0 and not written. Such loads are slower, so whole tiles do without.
    tensorLayoutNV<2, PAST_IS_ZERO> of_last_x = createTensorLayoutNV(2, PAST_IS_ZERO);
    of_last_x = setTensorLayoutDimensionNV(of_last_x, params.n_rows, pitch);
    of_last_x = setTensorLayoutStrideNV(of_last_x, pitch, 1);
    tensorLayoutNV<2, PAST_IS_ZERO> of_y = createTensorLayoutNV(2, PAST_IS_ZERO);
    of_y = setTensorLayoutDimensionNV(of_y, params.n_rows, params.n_out);
    of_y = setTensorLayoutStrideNV(of_y, params.y_stride, 1);
    tensorViewNV<2, false, 1, 0> turned = createTensorViewNV(2, false, 1, 0);

    Sums sums = Sums(0.0);
#define STEP(of_rows, k) { \
        Rows rows; Weights weights; \
        coopMatLoadTensorNV(rows, x, 0, sliceTensorLayoutNV(of_rows, first_row, ROWS, k, DEPTH), turned); \
        coopMatLoadTensorNV(weights, w, 0, sliceTensorLayoutNV(of_w, first_col, COLS, k, DEPTH) AS_HALVES); \
        sums = coopMatMulAdd(weights, rows, sums); \
    }
#define STEPS(of_rows) { \
        uint k = 0; \
        for (; k + UNROLL * DEPTH <= n_in; k += UNROLL * DEPTH) { \
            [[unroll]] for (uint step = 0; step < UNROLL; ++step) STEP(of_rows, k + step * DEPTH) \
        } \
        for (; k < n_in; k += DEPTH) STEP(of_rows, k) \
    }
    if (first_row + ROWS <= params.n_rows) STEPS(of_x) else STEPS(of_last_x)

    coopMatPerElementNV(sums, sums, scaled, first_row);
    if (params.accumulate != 0) {
        Sums before;
        coopMatLoadTensorNV(before, y, params.y_offset, sliceTensorLayoutNV(of_y, first_row, ROWS, first_col, COLS), turned);
        sums = before + sums;
    }
    coopMatStoreTensorNV(sums, y, params.y_offset, sliceTensorLayoutNV(of_y, first_row, ROWS, first_col, COLS), turned);
}
