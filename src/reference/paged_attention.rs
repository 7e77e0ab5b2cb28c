//! Attention over a paged context: gathers each row's tokens from its blocks, then [`attention`].

use half::f16;

use super::attention::attention;
use crate::model::AttentionShape;

/// A row to attend.
#[derive(Debug, Clone, Copy)]
pub struct PagedRow<'a> {
    /// `[H, K]`
    pub q: &'a [f32],
    /// It sees the tokens of its sequence up to this one.
    pub position: usize,
    /// `blocks[i]` holds the tokens from `i * block_tokens` on of its sequence.
    pub blocks: &'a [u32],
}

/// `sinks`: `[H]`, as [`attention`] has them; `kv_blocks`: `[blocks, G, 2, block_tokens, K]`, K then V; returns `[R, H, K]`.
pub fn paged_attention(
    shape: &AttentionShape,
    sinks: Option<&[f32]>,
    rows: &[PagedRow<'_>],
    kv_blocks: &[f16],
    block_tokens: usize,
) -> Vec<f32> {
    let mut out = Vec::new();
    for row in rows {
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for token in 0..=row.position {
            // A block before the window may be gone: its tokens are not looked at, and 0 stands in for them.
            let seen = shape.window.is_none_or(|window| token + window > row.position);
            for kv_head in 0..shape.kv_heads {
                for (which, tensor) in [&mut keys, &mut values].into_iter().enumerate() {
                    if seen {
                        let block = row.blocks[token / block_tokens] as usize;
                        let line =
                            ((block * shape.kv_heads + kv_head) * 2 + which) * block_tokens + token % block_tokens;
                        let line = &kv_blocks[line * shape.head_width..][..shape.head_width];
                        tensor.extend(line.iter().map(|v| v.to_f32()));
                    } else {
                        tensor.extend(std::iter::repeat_n(0.0, shape.head_width));
                    }
                }
            }
        }
        out.extend(attention(shape, sinks, row.q, &keys, &values));
    }
    out
}
