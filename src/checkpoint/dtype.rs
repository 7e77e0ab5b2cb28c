//! Element types of weights as they lie in a checkpoint. They travel to the GPU as they are.

use crate::model::expert_layout::Packing;

/// Element type of a weight tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Dtype {
    Bf16,
    F16,
    F32,
    /// E2M1 values and E8M0 scales, in tensors of their own ([`Packing`]). Experts only; it has no element that stands alone.
    Mxfp4,
}

impl Dtype {
    /// The types of single elements.
    pub const ALL: [Dtype; 3] = [Dtype::Bf16, Dtype::F16, Dtype::F32];

    /// What a tensor that should be packed like that holds, if its safetensors type is one that it may have.
    pub fn of_safetensors(dtype: safetensors::Dtype, packing: Packing) -> Option<Dtype> {
        match (packing, dtype) {
            (Packing::Floats, safetensors::Dtype::BF16) => Some(Dtype::Bf16),
            (Packing::Floats, safetensors::Dtype::F16) => Some(Dtype::F16),
            (Packing::Floats, safetensors::Dtype::F32) => Some(Dtype::F32),
            (Packing::Mxfp4Blocks | Packing::Mxfp4Scales, safetensors::Dtype::U8) => Some(Dtype::Mxfp4),
            _ => None,
        }
    }

    /// Bytes of one element.
    ///
    /// # Panics
    ///
    /// For [`Dtype::Mxfp4`], whose elements share bytes.
    pub fn size_bytes(self) -> usize {
        match self {
            Dtype::Bf16 | Dtype::F16 => 2,
            Dtype::F32 => 4,
            Dtype::Mxfp4 => panic!("elements of MXFP4 have no bytes of their own"),
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Dtype::Bf16 => "bf16",
            Dtype::F16 => "f16",
            Dtype::F32 => "f32",
            Dtype::Mxfp4 => "mxfp4",
        }
    }

    /// Element `index` of little-endian `bytes`, widened to f32 (exact for the three types of [`Dtype::ALL`]).
    ///
    /// # Panics
    ///
    /// For [`Dtype::Mxfp4`]: `reference::mxfp4` decodes that.
    pub fn read(self, bytes: &[u8], index: usize) -> f32 {
        match self {
            Dtype::Bf16 => half::bf16::from_le_bytes([bytes[2 * index], bytes[2 * index + 1]]).to_f32(),
            Dtype::F16 => half::f16::from_le_bytes([bytes[2 * index], bytes[2 * index + 1]]).to_f32(),
            Dtype::F32 => f32::from_le_bytes(bytes[4 * index..4 * index + 4].try_into().expect("four bytes")),
            Dtype::Mxfp4 => panic!("elements of MXFP4 need their scales"),
        }
    }

    /// All elements of little-endian `bytes`, widened to f32.
    pub fn read_all(self, bytes: &[u8]) -> Vec<f32> {
        (0..bytes.len() / self.size_bytes()).map(|i| self.read(bytes, i)).collect()
    }
}
