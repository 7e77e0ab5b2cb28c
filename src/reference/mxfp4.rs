//! MXFP4: 4-bit values in blocks of 32 that share a power of two (OCP Microscaling Formats 1.0; transformers,
//! integrations/mxfp4.py).

use crate::model::expert_layout::MXFP4_BLOCK;

/// Magnitudes of E2M1 codes 0 to 7; 8 to 15 are their negatives.
const MAGNITUDES: [f64; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

/// The value of a code (4 bits) under an E8M0 scale, in f32: subnormal, infinite or NaN (scale 255) where the product is.
pub fn mxfp4_value(code: u8, scale: u8) -> f32 {
    let sign = if code & 8 == 0 { 1.0 } else { -1.0 };
    if scale == 255 {
        return f32::NAN;
    }
    (sign * MAGNITUDES[(code & 7) as usize] * 2f64.powi(scale as i32 - 127)) as f32
}

/// All values of `blocks` (16 bytes each, the even value of a byte in its low half) under `scales` (one byte a block).
pub fn mxfp4(blocks: &[u8], scales: &[u8]) -> Vec<f32> {
    let blocks = blocks.chunks_exact(MXFP4_BLOCK / 2).zip(scales);
    blocks
        .flat_map(|(block, scale)| {
            block.iter().flat_map(move |byte| [mxfp4_value(byte & 15, *scale), mxfp4_value(byte >> 4, *scale)])
        })
        .collect()
}
