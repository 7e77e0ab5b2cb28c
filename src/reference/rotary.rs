//! Rotary position embedding, half-split pairs (modeling_mixtral.py, MixtralRotaryEmbedding and apply_rotary_pos_emb;
//! modeling_rope_utils.py, _compute_yarn_parameters).

use crate::model::Yarn;

/// Cosine and sine of every position and pair: `[P, K/2]` pairs (cos, sin), flat.
///
/// Frequency and angle are f32, as transformers computes them: at position 100,000 the angle's rounding is worth 0.004
/// radians, so an exact angle would be a different model.
pub fn rope_table(head_width: usize, theta: f32, n_positions: usize) -> Vec<f32> {
    let inverse: Vec<f32> = frequencies(head_width, theta).iter().map(|frequency| 1.0 / frequency).collect();
    turns(&inverse, 1.0, n_positions)
}

/// The same where [`Yarn`] stretches it: pairs that turn often over the original positions keep their frequency, slow ones turn
/// `factor` times slower, those between are mixed; cosine and sine grow by the attention factor.
pub fn yarn_rope_table(head_width: usize, theta: f32, yarn: &Yarn, n_positions: usize) -> Vec<f32> {
    let Yarn { factor, beta_fast, beta_slow, original_positions, truncate, attention_factor } = *yarn;
    // The pair that turns so many times over the original positions.
    let pair = |n_turns: f64| {
        let waves = original_positions / (n_turns * std::f64::consts::TAU);
        head_width as f64 * waves.ln() / (2.0 * (theta as f64).ln())
    };
    let (low, high) = (pair(beta_fast), pair(beta_slow));
    let (low, high) = if truncate { (low.floor(), high.ceil()) } else { (low, high) };
    let (low, mut high) = (low.max(0.0), high.min(head_width as f64 - 1.0));
    if low == high {
        high += 0.001;
    }
    let inverse: Vec<f32> = frequencies(head_width, theta)
        .iter()
        .enumerate()
        .map(|(j, frequency)| {
            let stretched = ((j as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
            let kept = 1.0 - stretched;
            1.0 / (factor as f32 * frequency) * (1.0 - kept) + 1.0 / frequency * kept
        })
        .collect();
    turns(&inverse, attention_factor as f32, n_positions)
}

/// theta^(2j / K) of every pair j.
fn frequencies(head_width: usize, theta: f32) -> Vec<f32> {
    let exponent = |j: usize| (2 * j) as f32 / head_width as f32;
    (0..head_width / 2).map(|j| (theta as f64).powf(exponent(j) as f64) as f32).collect()
}

fn turns(inverse_frequencies: &[f32], factor: f32, n_positions: usize) -> Vec<f32> {
    let mut table = Vec::with_capacity(2 * n_positions * inverse_frequencies.len());
    for position in 0..n_positions {
        for inverse_frequency in inverse_frequencies {
            let angle = (position as f32 * inverse_frequency) as f64;
            table.extend([angle.cos() as f32 * factor, angle.sin() as f32 * factor]);
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

    /// gpt-oss: pairs up to 8 keep their frequency, those from 18 on turn 32 times slower, one between is a mixture.
    #[test]
    fn yarn_stretches_the_slow_pairs() {
        let yarn = Yarn {
            factor: 32.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            original_positions: 4096.0,
            truncate: false,
            attention_factor: Yarn::default_attention_factor(32.0),
        };
        let (plain, stretched) = (rope_table(64, 150_000.0, 2), yarn_rope_table(64, 150_000.0, &yarn, 2));
        assert_eq!(stretched[..2], [1.346_573_6, 0.0]);
        let angle = |table: &[f32], j: usize| table[64 + 2 * j + 1].atan2(table[64 + 2 * j]) as f64;
        // low = 8.0928, high = 17.3980
        for j in 0..32 {
            let ramp = ((j as f64 - 8.0928) / (17.3980 - 8.0928)).clamp(0.0, 1.0);
            let ratio = angle(&stretched, j) / angle(&plain, j);
            assert!((ratio - (ramp / 32.0 + 1.0 - ramp)).abs() < 2e-5, "pair {j}: {ratio}");
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
