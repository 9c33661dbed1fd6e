//! The reader.

use std::collections::BTreeSet;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;

use sha2::{Digest, Sha256};

use super::tensor::{Tensor, TensorType};
use super::value::{Array, Value, ValueType};
use super::{
    DEFAULT_ALIGNMENT, Gguf, MAGIC, MAX_ALIGNMENT, MAX_ARRAY_ITEMS, MAX_DIMENSIONS, MAX_HEADER_BYTES, MAX_KEY_BYTES,
    MAX_METADATA_ENTRIES, MAX_STRING_BYTES, MAX_TENSOR_NAME_BYTES, MAX_TENSORS, align_up,
};

/// Bytes of tensor data that are in memory at once.
const CHUNK: usize = 1 << 20;

/// Why a file is no GGUF that we run. Positions are bytes from the beginning of the file.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    #[error("not a GGUF file: it begins with {found:02x?}")]
    BadMagic { found: [u8; 4] },
    #[error("GGUF version {version} is not supported, only 2 and 3")]
    UnsupportedVersion { version: u32 },
    #[error("a big-endian GGUF file; only little-endian ones are supported")]
    BigEndian,
    #[error("the file ends at byte {file_bytes}, inside {what}")]
    Truncated { what: &'static str, file_bytes: u64 },
    #[error("{what}: {value} is over the limit of {limit}")]
    OverLimit { what: &'static str, value: u64, limit: u64 },
    #[error("{what} at byte {at} is not UTF-8")]
    NotUtf8 { what: &'static str, at: u64 },
    #[error("metadata {key:?} has the unknown type {kind}")]
    UnknownValueType { key: String, kind: u32 },
    #[error("metadata {key:?} is an array of arrays")]
    NestedArray { key: String },
    #[error("metadata {key:?} holds {byte} where a boolean should be")]
    BadBool { key: String, byte: u8 },
    #[error("metadata {key:?} appears twice")]
    DuplicateKey { key: String },
    #[error("alignment {alignment} is not a power of two up to {MAX_ALIGNMENT}")]
    BadAlignment { alignment: u64 },
    #[error("tensor {name:?} appears twice")]
    DuplicateTensor { name: String },
    #[error("tensor {name:?} has the unknown type {kind}")]
    UnknownTensorType { name: String, kind: u32 },
    #[error("tensor {name:?} has the impossible shape {shape:?} for {kind}")]
    BadShape { name: String, shape: Vec<u64>, kind: &'static str },
    #[error("tensor {name:?} is at offset {offset}, expected {expected}")]
    BadOffset { name: String, offset: u64, expected: u64 },
    #[error("tensor {name:?} ends at byte {end}, the file at byte {file_bytes}: it is truncated")]
    TensorTruncated { name: String, end: u64, file_bytes: u64 },
    #[error("reading failed: {0}")]
    Io(#[from] io::Error),
}

impl Gguf {
    /// Reads header, metadata and tensor table, and checks that every tensor's data lies within the file.
    /// Give it a buffered reader: it asks for few bytes at a time.
    pub fn read<R: Read + Seek>(reader: &mut R) -> Result<Self, GgufError> {
        let file_bytes = reader.seek(SeekFrom::End(0))?;
        reader.seek(SeekFrom::Start(0))?;
        let mut cursor = Cursor { reader, at: 0, end: file_bytes.min(MAX_HEADER_BYTES), file_bytes };

        let magic = cursor.array::<4>("the magic number")?;
        if magic != MAGIC {
            return Err(GgufError::BadMagic { found: magic });
        }
        let version = cursor.u32("the version")?;
        match version {
            2 | 3 => {}
            0x0200_0000 | 0x0300_0000 => return Err(GgufError::BigEndian),
            _ => return Err(GgufError::UnsupportedVersion { version }),
        }
        let tensor_count = cursor.limited("tensors", MAX_TENSORS)?;
        let entry_count = cursor.limited("metadata entries", MAX_METADATA_ENTRIES)?;

        let metadata = cursor.metadata(entry_count)?;
        let alignment = metadata
            .iter()
            .find(|(key, _)| key == "general.alignment")
            .map_or(Some(DEFAULT_ALIGNMENT), |(_, value)| value.as_uint())
            .unwrap_or(0);
        if !alignment.is_power_of_two() || alignment > MAX_ALIGNMENT {
            return Err(GgufError::BadAlignment { alignment });
        }
        let tensors = cursor.tensors(tensor_count, alignment)?;
        let data_offset = align_up(cursor.at, alignment).unwrap_or(u64::MAX);
        for tensor in &tensors {
            let end = data_offset.saturating_add(tensor.offset).saturating_add(tensor.bytes);
            if end > file_bytes {
                return Err(GgufError::TensorTruncated { name: tensor.name.clone(), end, file_bytes });
            }
        }
        Ok(Self { version, metadata, tensors, alignment, data_offset, file_bytes })
    }
}

/// SHA-256 of one tensor's data. `progress` hears of every chunk's bytes.
pub fn hash_tensor<R: Read + Seek>(
    reader: &mut R,
    gguf: &Gguf,
    tensor: &Tensor,
    progress: &mut dyn FnMut(u64),
) -> Result<[u8; 32], GgufError> {
    let mut hash = Sha256::new();
    let mut take = |chunk: &[u8]| {
        hash.update(chunk);
        progress(chunk.len() as u64);
        Ok(())
    };
    read_range(reader, gguf, tensor, 0..tensor.bytes, &mut take)?;
    Ok(hash.finalize().into())
}

/// Hands a range of a tensor's data over in chunks, so that no tensor need fit in memory. The range is within the tensor.
pub fn read_range<R: Read + Seek>(
    reader: &mut R,
    gguf: &Gguf,
    tensor: &Tensor,
    range: Range<u64>,
    take: &mut dyn FnMut(&[u8]) -> io::Result<()>,
) -> Result<(), GgufError> {
    reader.seek(SeekFrom::Start(gguf.position(tensor) + range.start))?;
    let mut left = range.end.saturating_sub(range.start);
    let mut chunk = vec![0; usize::try_from(left).unwrap_or(CHUNK).min(CHUNK)];
    while left > 0 {
        let want = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        let got = reader.read(&mut chunk[..want])?;
        if got == 0 {
            let end = gguf.position(tensor) + range.end;
            return Err(GgufError::TensorTruncated { name: tensor.name.clone(), end, file_bytes: end - left });
        }
        take(&chunk[..got])?;
        left -= got as u64;
    }
    Ok(())
}

/// Reads forward, never past `end`.
struct Cursor<'a, R> {
    reader: &'a mut R,
    at: u64,
    end: u64,
    file_bytes: u64,
}

impl<R: Read> Cursor<'_, R> {
    /// Fails before memory is taken where the file (or the header's limit) does not hold that many bytes more.
    fn room(&self, bytes: u64, what: &'static str) -> Result<(), GgufError> {
        if bytes <= self.end - self.at {
            return Ok(());
        }
        if self.end < self.file_bytes {
            let value = self.at.saturating_add(bytes);
            return Err(GgufError::OverLimit { what: "bytes of header", value, limit: MAX_HEADER_BYTES });
        }
        Err(GgufError::Truncated { what, file_bytes: self.file_bytes })
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], GgufError> {
        self.room(N as u64, what)?;
        let mut bytes = [0; N];
        self.reader.read_exact(&mut bytes)?;
        self.at += N as u64;
        Ok(bytes)
    }

    fn bytes(&mut self, length: u64, what: &'static str) -> Result<Vec<u8>, GgufError> {
        self.room(length, what)?;
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
        self.reader.read_exact(&mut bytes)?;
        self.at += length;
        Ok(bytes)
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &'static str) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A count or length no larger than `limit`.
    fn limited(&mut self, what: &'static str, limit: u64) -> Result<u64, GgufError> {
        let value = self.u64(what)?;
        if value > limit {
            return Err(GgufError::OverLimit { what, value, limit });
        }
        Ok(value)
    }

    fn string(&mut self, what: &'static str, limit: u64) -> Result<Vec<u8>, GgufError> {
        let length = self.limited(what, limit)?;
        self.bytes(length, what)
    }

    fn name(&mut self, what: &'static str, limit: u64) -> Result<String, GgufError> {
        let at = self.at;
        String::from_utf8(self.string(what, limit)?).map_err(|_| GgufError::NotUtf8 { what, at })
    }

    fn metadata(&mut self, count: u64) -> Result<Vec<(String, Value)>, GgufError> {
        let mut seen = BTreeSet::new();
        let mut metadata = Vec::new();
        for _ in 0..count {
            let key = self.name("a metadata key", MAX_KEY_BYTES)?;
            if !seen.insert(key.clone()) {
                return Err(GgufError::DuplicateKey { key });
            }
            let value = self.value(&key)?;
            metadata.push((key, value));
        }
        Ok(metadata)
    }

    fn kind(&mut self, key: &str) -> Result<ValueType, GgufError> {
        let kind = self.u32("a metadata type")?;
        ValueType::from_id(kind).ok_or_else(|| GgufError::UnknownValueType { key: key.to_owned(), kind })
    }

    fn value(&mut self, key: &str) -> Result<Value, GgufError> {
        const WHAT: &str = "a metadata value";
        Ok(match self.kind(key)? {
            ValueType::U8 => Value::U8(u8::from_le_bytes(self.array(WHAT)?)),
            ValueType::I8 => Value::I8(i8::from_le_bytes(self.array(WHAT)?)),
            ValueType::U16 => Value::U16(u16::from_le_bytes(self.array(WHAT)?)),
            ValueType::I16 => Value::I16(i16::from_le_bytes(self.array(WHAT)?)),
            ValueType::U32 => Value::U32(u32::from_le_bytes(self.array(WHAT)?)),
            ValueType::I32 => Value::I32(i32::from_le_bytes(self.array(WHAT)?)),
            ValueType::F32 => Value::F32(f32::from_le_bytes(self.array(WHAT)?)),
            ValueType::Bool => {
                let [byte] = self.array(WHAT)?;
                Value::Bool(boolean(key, byte)?)
            }
            ValueType::Str => Value::Str(self.string("bytes of a metadata string", MAX_STRING_BYTES)?),
            ValueType::Array => Value::Array(self.items(key)?),
            ValueType::U64 => Value::U64(u64::from_le_bytes(self.array(WHAT)?)),
            ValueType::I64 => Value::I64(i64::from_le_bytes(self.array(WHAT)?)),
            ValueType::F64 => Value::F64(f64::from_le_bytes(self.array(WHAT)?)),
        })
    }

    fn items(&mut self, key: &str) -> Result<Array, GgufError> {
        let kind = self.kind(key)?;
        let count = self.limited("items of a metadata array", MAX_ARRAY_ITEMS)?;
        Ok(match kind {
            ValueType::U8 => Array::U8(self.bytes(count, "a metadata array")?),
            ValueType::I8 => Array::I8(self.numbers(count, i8::from_le_bytes)?),
            ValueType::U16 => Array::U16(self.numbers(count, u16::from_le_bytes)?),
            ValueType::I16 => Array::I16(self.numbers(count, i16::from_le_bytes)?),
            ValueType::U32 => Array::U32(self.numbers(count, u32::from_le_bytes)?),
            ValueType::I32 => Array::I32(self.numbers(count, i32::from_le_bytes)?),
            ValueType::F32 => Array::F32(self.numbers(count, f32::from_le_bytes)?),
            ValueType::Bool => {
                let bytes = self.bytes(count, "a metadata array")?;
                Array::Bool(bytes.into_iter().map(|byte| boolean(key, byte)).collect::<Result<_, _>>()?)
            }
            ValueType::Str => {
                // Each string takes at least its length's eight bytes.
                self.room(count.saturating_mul(8), "a metadata array")?;
                let strings = (0..count).map(|_| self.string("bytes of a metadata string", MAX_STRING_BYTES));
                Array::Str(strings.collect::<Result<_, _>>()?)
            }
            ValueType::Array => return Err(GgufError::NestedArray { key: key.to_owned() }),
            ValueType::U64 => Array::U64(self.numbers(count, u64::from_le_bytes)?),
            ValueType::I64 => Array::I64(self.numbers(count, i64::from_le_bytes)?),
            ValueType::F64 => Array::F64(self.numbers(count, f64::from_le_bytes)?),
        })
    }

    fn numbers<const N: usize, T>(&mut self, count: u64, from: fn([u8; N]) -> T) -> Result<Vec<T>, GgufError> {
        let bytes = self.bytes(count.saturating_mul(N as u64), "a metadata array")?;
        let (chunks, _) = bytes.as_chunks::<N>();
        Ok(chunks.iter().map(|chunk| from(*chunk)).collect())
    }

    fn tensors(&mut self, count: u64, alignment: u64) -> Result<Vec<Tensor>, GgufError> {
        let mut seen = BTreeSet::new();
        let mut tensors = Vec::new();
        let mut expected = 0u64;
        for _ in 0..count {
            let tensor = self.tensor()?;
            if !seen.insert(tensor.name.clone()) {
                return Err(GgufError::DuplicateTensor { name: tensor.name });
            }
            if tensor.offset != expected {
                return Err(GgufError::BadOffset { name: tensor.name, offset: tensor.offset, expected });
            }
            expected = tensor
                .offset
                .checked_add(tensor.bytes)
                .and_then(|end| align_up(end, alignment))
                .ok_or_else(|| bad_shape(&tensor))?;
            tensors.push(tensor);
        }
        Ok(tensors)
    }

    fn tensor(&mut self) -> Result<Tensor, GgufError> {
        let name = self.name("a tensor's name", MAX_TENSOR_NAME_BYTES)?;
        let dimensions = self.u32("a tensor's shape")?;
        if dimensions == 0 || dimensions > MAX_DIMENSIONS {
            let (value, limit) = (u64::from(dimensions), u64::from(MAX_DIMENSIONS));
            return Err(GgufError::OverLimit { what: "dimensions of a tensor", value, limit });
        }
        let shape = (0..dimensions).map(|_| self.u64("a tensor's shape")).collect::<Result<Vec<_>, _>>()?;
        let kind = self.u32("a tensor's type")?;
        let offset = self.u64("a tensor's offset")?;
        let Some(kind) = TensorType::from_id(kind) else {
            return Err(GgufError::UnknownTensorType { name, kind });
        };
        let mut tensor = Tensor { name, shape, kind, offset, bytes: 0 };
        tensor.bytes = kind.size(&tensor.shape).filter(|bytes| *bytes > 0).ok_or_else(|| bad_shape(&tensor))?;
        Ok(tensor)
    }
}

fn boolean(key: &str, byte: u8) -> Result<bool, GgufError> {
    match byte {
        0 => Ok(false),
        1 => Ok(true),
        byte => Err(GgufError::BadBool { key: key.to_owned(), byte }),
    }
}

fn bad_shape(tensor: &Tensor) -> GgufError {
    GgufError::BadShape { name: tensor.name.clone(), shape: tensor.shape.clone(), kind: tensor.kind.name }
}
