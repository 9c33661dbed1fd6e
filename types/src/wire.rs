//! How hidden states travel between the nodes that run one model.

use minicbor::{Decode, Encode};
use serde::{Deserialize, Serialize};

/// How hidden rows are written on the wire. Only `f32` is exact.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize, Deserialize)]
#[cbor(index_only)]
#[serde(rename_all = "snake_case")]
pub enum WireType {
    #[n(0)]
    F32,
    #[n(1)]
    Bf16,
    #[n(2)]
    Q8_0,
}

impl WireType {
    pub const ALL: [Self; 3] = [Self::F32, Self::Bf16, Self::Q8_0];
    /// Numbers that share a scale in q8_0.
    pub const BLOCK: usize = 32;
    /// Bytes of such a block: the scale as f16, then a byte for each number.
    pub const BLOCK_BYTES: usize = 34;

    /// The word used in configuration, frames and receipts.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|wire| wire.name() == name)
    }

    /// A split model computes the same bits as a whole one.
    pub fn is_exact(self) -> bool {
        self == Self::F32
    }

    /// Bytes of a row; `None` where such rows do not travel as this type.
    pub fn row_bytes(self, width: u32) -> Option<usize> {
        let width = usize::try_from(width).ok()?;
        match self {
            Self::F32 => width.checked_mul(4),
            Self::Bf16 => width.checked_mul(2),
            Self::Q8_0 if width.is_multiple_of(Self::BLOCK) => (width / Self::BLOCK).checked_mul(Self::BLOCK_BYTES),
            Self::Q8_0 => None,
        }
    }
}

impl core::fmt::Display for WireType {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.name())
    }
}
