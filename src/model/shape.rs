//! The axes of a model, with the letters that the whole crate uses.

/// Extents of every axis of a model. T (rows of a pass) and C (context) belong to requests, not to the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// L: layers.
    pub layers: usize,
    /// D: model width.
    pub d_model: usize,
    /// H: query heads.
    pub q_heads: usize,
    /// G: key/value heads. Divides H.
    pub kv_heads: usize,
    /// K: head width. Even, because rotary pairs `(j, j + K/2)`.
    pub head_width: usize,
    /// E: experts of a layer.
    pub experts: usize,
    /// A: experts that a token takes.
    pub experts_per_token: usize,
    /// F: expert width.
    pub expert_width: usize,
    /// V: vocabulary rows of the embedding and of the LM head.
    pub vocab: usize,
}

impl Shape {
    /// Width of all query heads together, `H * K`. Not always D.
    pub fn q_width(&self) -> usize {
        self.q_heads * self.head_width
    }

    /// Width of all key (or value) heads together, `G * K`.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_width
    }

    /// Width of a row of the fused projection: queries, keys, values.
    pub fn qkv_width(&self) -> usize {
        self.q_width() + 2 * self.kv_width()
    }

    /// Elements of one expert matrix (gate, up and down all have `D * F`).
    pub fn expert_matrix_elements(&self) -> usize {
        self.d_model * self.expert_width
    }
}

/// What attention needs to know of a model: its heads, and which part of the context they see.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// H
    pub q_heads: usize,
    /// G: divides H. Query head h reads key/value head `h / (H / G)`.
    pub kv_heads: usize,
    /// K
    pub head_width: usize,
    /// Only the last `window` tokens of the context are visible, the row's own among them.
    pub window: Option<usize>,
    /// Factor on `q · k`, usually `1 / sqrt(K)`.
    pub scale: f32,
}

impl AttentionShape {
    /// Query heads that read the same key/value head, `H / G`.
    pub fn heads_per_group(&self) -> usize {
        self.q_heads / self.kv_heads
    }

    /// First token that a row with `context` tokens (its own included) still sees.
    pub fn first_visible(&self, context: usize) -> usize {
        self.window.map_or(0, |window| context.saturating_sub(window))
    }
}
