//! Rotary position embedding, half-split pairs (modeling_mixtral.py, MixtralRotaryEmbedding and apply_rotary_pos_emb).

/// Cosine and sine of every position and pair: `[P, K/2]` pairs (cos, sin), flat.
///
/// Frequency and angle are f32, as transformers computes them: at position 100,000 the angle's rounding is worth 0.004
/// radians, so an exact angle would be a different model.
pub fn rope_table(head_width: usize, theta: f32, n_positions: usize) -> Vec<f32> {
    let inverse_frequencies: Vec<f32> = (0..head_width / 2)
        .map(|j| {
            let exponent = (2 * j) as f32 / head_width as f32;
            1.0 / (theta as f64).powf(exponent as f64) as f32
        })
        .collect();
    let mut table = Vec::with_capacity(n_positions * head_width);
    for position in 0..n_positions {
        for inverse_frequency in &inverse_frequencies {
            let angle = (position as f32 * inverse_frequency) as f64;
            table.extend([angle.cos() as f32, angle.sin() as f32]);
        }
    }
    table
}

/// Turns one head `[K]` by its position: pair `(j, j + K/2)` by the angle of `turns[j]`, a (cos, sin) of [`rope_table`].
pub fn rotate(head: &[f32], turns: &[f32]) -> Vec<f32> {
    let half = head.len() / 2;
    let mut rotated = vec![0.0; head.len()];
    for j in 0..half {
        let (low, high) = (head[j] as f64, head[half + j] as f64);
        let (cos, sin) = (turns[2 * j] as f64, turns[2 * j + 1] as f64);
        rotated[j] = (low * cos - high * sin) as f32;
        rotated[half + j] = (high * cos + low * sin) as f32;
    }
    rotated
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first pair turns by the position itself, the last one by almost theta times less; position 0 turns nothing.
    #[test]
    fn frequencies_fall_from_one_to_one_over_theta() {
        let (head_width, theta) = (128, 1e6);
        let table = rope_table(head_width, theta, 8);
        assert_eq!(table.len(), 8 * head_width);
        assert!(table[..head_width].chunks_exact(2).all(|turn| turn == [1.0, 0.0]));
        for (position, row) in table.chunks_exact(head_width).enumerate() {
            assert_eq!(row[..2], [(position as f64).cos() as f32, (position as f64).sin() as f32]);
            let last = position as f64 * 1e6f64.powf(-126.0 / 128.0);
            // The frequency is rounded to f32 three times: as exponent's power, as inverse, and times the position.
            assert!((row[127] as f64 - last.sin()).abs() <= 3.0 * last * 2f64.powi(-24));
        }
    }

    /// Far out the exact product of position and frequency has another cosine than the rounded one.
    #[test]
    fn angles_are_rounded_to_f32_before_the_cosine() {
        let (head_width, position) = (64, 100_003);
        let table = rope_table(head_width, 1e4, position + 1);
        let frequency = 1.0 / 1e4f64.powf(2.0 / 64.0) as f32;
        let angle = position as f32 * frequency;
        assert_eq!(table[position * head_width + 2], (angle as f64).cos() as f32);
        assert_ne!(table[position * head_width + 2], (position as f64 * frequency as f64).cos() as f32);
    }
}
