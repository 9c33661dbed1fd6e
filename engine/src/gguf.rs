//! GGUF files: a bounds-checked reader and a writer, over whatever the caller can read, seek and write.
//!
//! The reader takes metadata and the tensor table and leaves tensor data where it is. It trusts no count or length:
//! every one is checked against a limit below and against the length of the file before memory is taken for it. It
//! accepts versions 2 and 3, little-endian, with tensors laid out one after another, as llama.cpp demands.
//!
//! This room never opens a file.

mod read;
mod tensor;
mod value;
mod write;

pub use read::{GgufError, hash_tensor, read_range};
pub use tensor::{Tensor, TensorType};
pub use value::{Array, Value, ValueType};
pub use write::{GgufWriter, WriteError};

pub const MAGIC: [u8; 4] = *b"GGUF";
pub const VERSION: u32 = 3;
pub const DEFAULT_ALIGNMENT: u64 = 32;

/// Limits on what is read. The largest published models stay a factor of ten below each.
pub const MAX_METADATA_ENTRIES: u64 = 4_096;
pub const MAX_TENSORS: u64 = 65_536;
pub const MAX_KEY_BYTES: u64 = 256;
pub const MAX_TENSOR_NAME_BYTES: u64 = 256;
pub const MAX_STRING_BYTES: u64 = 4 << 20;
pub const MAX_ARRAY_ITEMS: u64 = 4 << 20;
/// Header, metadata and tensor table together.
pub const MAX_HEADER_BYTES: u64 = 256 << 20;
pub const MAX_DIMENSIONS: u32 = 4;
pub const MAX_ALIGNMENT: u64 = 1 << 20;

/// A model file without its tensors' data.
#[derive(Debug, Clone, PartialEq)]
pub struct Gguf {
    pub version: u32,
    /// In the order of the file; keys are unique.
    pub metadata: Vec<(String, Value)>,
    /// In the order of the file, which is the order of their data; names are unique.
    pub tensors: Vec<Tensor>,
    pub alignment: u64,
    /// Where tensor data begins; [`Tensor::offset`] counts from here.
    pub data_offset: u64,
    pub file_bytes: u64,
}

impl Gguf {
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.iter().find(|(name, _)| name == key).map(|(_, value)| value)
    }

    /// A string that is valid UTF-8.
    pub fn str(&self, key: &str) -> Option<&str> {
        self.get(key)?.as_str()
    }

    /// Any unsigned or non-negative integer.
    pub fn uint(&self, key: &str) -> Option<u64> {
        self.get(key)?.as_uint()
    }

    /// `general.architecture`.
    pub fn architecture(&self) -> Option<&str> {
        self.str("general.architecture")
    }

    /// A key under the architecture's name: `arch_uint("block_count")` reads `llama.block_count`.
    pub fn arch_uint(&self, key: &str) -> Option<u64> {
        self.uint(&format!("{}.{key}", self.architecture()?))
    }

    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }

    /// Absolute position of a tensor's data in the file.
    pub fn position(&self, tensor: &Tensor) -> u64 {
        self.data_offset + tensor.offset
    }
}

/// The next multiple of `alignment`, which is a power of two.
pub(crate) fn align_up(offset: u64, alignment: u64) -> Option<u64> {
    Some(offset.checked_add(alignment - 1)? & !(alignment - 1))
}

#[cfg(test)]
mod tests;
