//! Tensor types and their sizes, as ggml lays them out.

/// How a tensor's numbers are stored: ggml's id, name, and block shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct TensorType {
    pub id: u32,
    pub name: &'static str,
    /// Numbers in a block; a row holds whole blocks.
    pub block: u64,
    /// Bytes of a block.
    pub bytes: u64,
}

const fn kind(id: u32, name: &'static str, block: u64, bytes: u64) -> TensorType {
    TensorType { id, name, block, bytes }
}

const TYPES: [TensorType; 35] = [
    kind(0, "F32", 1, 4),
    kind(1, "F16", 1, 2),
    kind(2, "Q4_0", 32, 18),
    kind(3, "Q4_1", 32, 20),
    kind(6, "Q5_0", 32, 22),
    kind(7, "Q5_1", 32, 24),
    kind(8, "Q8_0", 32, 34),
    kind(9, "Q8_1", 32, 36),
    kind(10, "Q2_K", 256, 84),
    kind(11, "Q3_K", 256, 110),
    kind(12, "Q4_K", 256, 144),
    kind(13, "Q5_K", 256, 176),
    kind(14, "Q6_K", 256, 210),
    kind(15, "Q8_K", 256, 292),
    kind(16, "IQ2_XXS", 256, 66),
    kind(17, "IQ2_XS", 256, 74),
    kind(18, "IQ3_XXS", 256, 98),
    kind(19, "IQ1_S", 256, 50),
    kind(20, "IQ4_NL", 32, 18),
    kind(21, "IQ3_S", 256, 110),
    kind(22, "IQ2_S", 256, 82),
    kind(23, "IQ4_XS", 256, 136),
    kind(24, "I8", 1, 1),
    kind(25, "I16", 1, 2),
    kind(26, "I32", 1, 4),
    kind(27, "I64", 1, 8),
    kind(28, "F64", 1, 8),
    kind(29, "IQ1_M", 256, 56),
    kind(30, "BF16", 1, 2),
    kind(34, "TQ1_0", 256, 54),
    kind(35, "TQ2_0", 256, 66),
    kind(39, "MXFP4", 32, 17),
    kind(40, "NVFP4", 64, 36),
    kind(41, "Q1_0", 128, 18),
    kind(42, "Q2_0", 64, 18),
];

impl TensorType {
    pub const F32: Self = TYPES[0];
    pub const F16: Self = TYPES[1];
    pub const Q4_0: Self = TYPES[2];
    pub const Q8_0: Self = TYPES[6];

    pub fn from_id(id: u32) -> Option<Self> {
        TYPES.iter().find(|kind| kind.id == id).copied()
    }

    /// Bytes of a tensor of this shape (innermost dimension first); `None` where a row is not whole blocks or the
    /// size overflows.
    pub fn size(self, shape: &[u64]) -> Option<u64> {
        let row = shape.first().copied().unwrap_or(1);
        if row % self.block != 0 {
            return None;
        }
        let elements = elements(shape)?;
        (elements / self.block).checked_mul(self.bytes)
    }
}

/// The product of the dimensions.
pub(crate) fn elements(shape: &[u64]) -> Option<u64> {
    shape.iter().try_fold(1u64, |product, &dimension| product.checked_mul(dimension))
}

/// One row of the tensor table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    pub name: String,
    /// Innermost dimension first, one to four of them, none zero.
    pub shape: Vec<u64>,
    pub kind: TensorType,
    /// From the beginning of the file's data section.
    pub offset: u64,
    /// Bytes of data, without padding.
    pub bytes: u64,
}

impl Tensor {
    pub fn elements(&self) -> u64 {
        elements(&self.shape).unwrap_or(u64::MAX)
    }
}
