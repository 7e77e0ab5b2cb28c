//! The axes of a model, with the letters that the whole crate uses.

/// Extents of every axis of a model. T (rows of a pass) and C (context) belong to requests, not to the model.
///
/// One that came out of [`ModelConfig`](super::ModelConfig) keeps [`Shape::faults`] empty: its products do not overflow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
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
    /// No axis is longer than this. The largest of today's models has a vocabulary of 2^18.
    pub const MAX_AXIS: usize = 1 << 24;

    /// L · E is at most this, so that a list of tensors stays a list (Qwen3-30B-A3B has 6,144).
    pub const MAX_EXPERTS_IN_ALL: usize = 1 << 18;

    /// Parameters are at most this many, so that sizes in bytes fit 64 bits with room.
    pub const MAX_PARAMETERS: u128 = 1 << 48;

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

    /// Elements that the KV cache keeps for one token: K and V of every layer, `2 * L * G * K`.
    pub fn kv_elements_per_token(&self) -> usize {
        2 * self.layers * self.kv_width()
    }

    /// Everything that is wrong with this shape, in words; empty for a sound one.
    pub fn faults(&self) -> Vec<String> {
        let axes = [
            ("L (layers)", self.layers),
            ("D (model width)", self.d_model),
            ("H (query heads)", self.q_heads),
            ("G (KV heads)", self.kv_heads),
            ("K (head width)", self.head_width),
            ("E (experts)", self.experts),
            ("A (experts per token)", self.experts_per_token),
            ("F (expert width)", self.expert_width),
            ("V (vocabulary)", self.vocab),
        ];
        let mut faults: Vec<String> = axes
            .into_iter()
            .filter(|(_, extent)| !(1..=Self::MAX_AXIS).contains(extent))
            .map(|(axis, extent)| format!("{axis} needs 1 to {}, has {extent}", Self::MAX_AXIS))
            .collect();
        if !faults.is_empty() {
            return faults; // The rest divides and multiplies.
        }
        if !self.q_heads.is_multiple_of(self.kv_heads) {
            faults.push(format!("G (KV heads) {} does not divide H (query heads) {}", self.kv_heads, self.q_heads));
        }
        if !self.head_width.is_multiple_of(2) {
            faults.push(format!("K (head width) {} is odd: rotary embedding needs pairs", self.head_width));
        }
        if self.experts_per_token > self.experts {
            faults.push(format!(
                "A (experts per token) {} is more than E (experts) {}",
                self.experts_per_token, self.experts
            ));
        }
        // Every axis is at most 2^24, so the largest product here, L E D F, is below 2^100 and u128 holds the sum. Bounding
        // the sum bounds each of its terms, hence every product of axes that the rest of the crate takes.
        let wide = |extent: usize| extent as u128;
        let (d, heads) = (wide(self.d_model), wide(self.q_heads) + wide(self.kv_heads));
        let attention = 2 * d * heads * wide(self.head_width);
        let experts = wide(self.experts) * d * (1 + 3 * wide(self.expert_width));
        let parameters = wide(self.layers) * (2 * d + attention + experts) + d * (1 + 2 * wide(self.vocab));
        if parameters > Self::MAX_PARAMETERS {
            faults.push(format!("{parameters} parameters in all, the limit is {}", Self::MAX_PARAMETERS));
        }
        if wide(self.layers) * wide(self.experts) > wide(Self::MAX_EXPERTS_IN_ALL) {
            faults.push(format!(
                "L (layers) {} times E (experts) {} is more than {}",
                self.layers,
                self.experts,
                Self::MAX_EXPERTS_IN_ALL
            ));
        }
        faults
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
