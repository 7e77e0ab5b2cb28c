//! Element types of weights as they lie in a checkpoint. They travel to the GPU as they are.

/// Element type of a weight tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Dtype {
    Bf16,
    F16,
    F32,
}

impl Dtype {
    pub const ALL: [Dtype; 3] = [Dtype::Bf16, Dtype::F16, Dtype::F32];

    /// The supported type that a safetensors header names, if it is one.
    pub fn of_safetensors(dtype: safetensors::Dtype) -> Option<Dtype> {
        match dtype {
            safetensors::Dtype::BF16 => Some(Dtype::Bf16),
            safetensors::Dtype::F16 => Some(Dtype::F16),
            safetensors::Dtype::F32 => Some(Dtype::F32),
            _ => None,
        }
    }

    /// Bytes of one element.
    pub fn size_bytes(self) -> usize {
        match self {
            Dtype::Bf16 | Dtype::F16 => 2,
            Dtype::F32 => 4,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Dtype::Bf16 => "bf16",
            Dtype::F16 => "f16",
            Dtype::F32 => "f32",
        }
    }

    /// Element `index` of little-endian `bytes`, widened to f32 (exact for all three types).
    pub fn read(self, bytes: &[u8], index: usize) -> f32 {
        match self {
            Dtype::Bf16 => half::bf16::from_le_bytes([bytes[2 * index], bytes[2 * index + 1]]).to_f32(),
            Dtype::F16 => half::f16::from_le_bytes([bytes[2 * index], bytes[2 * index + 1]]).to_f32(),
            Dtype::F32 => f32::from_le_bytes(bytes[4 * index..4 * index + 4].try_into().expect("four bytes")),
        }
    }

    /// All elements of little-endian `bytes`, widened to f32.
    pub fn read_all(self, bytes: &[u8]) -> Vec<f32> {
        (0..bytes.len() / self.size_bytes()).map(|i| self.read(bytes, i)).collect()
    }
}
