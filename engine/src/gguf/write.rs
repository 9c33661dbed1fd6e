//! The writer: version 3, one layout for one content, so that a file's hash is stable.

use std::collections::BTreeSet;
use std::io::{self, Write};

use super::tensor::{Tensor, TensorType};
use super::value::{Value, encode_bytes};
use super::{DEFAULT_ALIGNMENT, Gguf, MAGIC, VERSION, align_up};

/// Metadata and tensors of a file to be. Alignment is always 32.
#[derive(Debug, Clone, Default)]
pub struct GgufWriter {
    metadata: Vec<(String, Value)>,
    tensors: Vec<Tensor>,
    data_bytes: u64,
}

/// Why a file was not written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    #[error("{name:?} appears twice, or may not be set")]
    BadKey { name: String },
    #[error("tensor {name:?} has the impossible shape {shape:?} for {kind}")]
    BadShape { name: String, shape: Vec<u64>, kind: &'static str },
    #[error("tensor {name:?} was given {given} bytes of data, its shape takes {expected}")]
    WrongLength { name: String, given: u64, expected: u64 },
    #[error("writing failed: {0}")]
    Io(#[from] io::Error),
}

impl GgufWriter {
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends an entry; entries keep their order. A key that is set twice shows when writing.
    pub fn set(mut self, key: impl Into<String>, value: Value) -> Self {
        self.metadata.push((key.into(), value));
        self
    }

    /// Appends a tensor; its data is asked for in this order.
    pub fn tensor(mut self, name: impl Into<String>, kind: TensorType, shape: &[u64]) -> Result<Self, WriteError> {
        let (name, shape) = (name.into(), shape.to_vec());
        let size = kind.size(&shape).filter(|bytes| *bytes > 0 && !shape.is_empty() && shape.len() <= 4);
        let next = size.and_then(|bytes| align_up(self.data_bytes.checked_add(bytes)?, DEFAULT_ALIGNMENT));
        let (Some(bytes), Some(next)) = (size, next) else {
            return Err(WriteError::BadShape { name, shape, kind: kind.name });
        };
        self.tensors.push(Tensor { name, shape, kind, offset: self.data_bytes, bytes });
        self.data_bytes = next;
        Ok(self)
    }

    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// Header, metadata and tensor table, padded to where data begins.
    pub fn header(&self) -> Result<Vec<u8>, WriteError> {
        let (mut keys, mut names) = (BTreeSet::from(["general.alignment"]), BTreeSet::new());
        let twice = self.metadata.iter().map(|(key, _)| key).find(|key| !keys.insert(key.as_str()));
        let twice =
            twice.or_else(|| self.tensors.iter().map(|tensor| &tensor.name).find(|name| !names.insert(name.as_str())));
        if let Some(name) = twice {
            return Err(WriteError::BadKey { name: name.clone() });
        }
        let mut out = Vec::new();
        out.extend(MAGIC);
        out.extend(VERSION.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            encode_bytes(key.as_bytes(), &mut out);
            out.extend((value.kind() as u32).to_le_bytes());
            value.encode(&mut out);
        }
        for tensor in &self.tensors {
            encode_bytes(tensor.name.as_bytes(), &mut out);
            out.extend((tensor.shape.len() as u32).to_le_bytes());
            tensor.shape.iter().for_each(|dimension| out.extend(dimension.to_le_bytes()));
            out.extend(tensor.kind.id.to_le_bytes());
            out.extend(tensor.offset.to_le_bytes());
        }
        pad(&mut out);
        Ok(out)
    }

    /// Writes the whole file; `data` gives each tensor's bytes, in order.
    pub fn write<W: Write>(
        &self,
        out: &mut W,
        mut data: impl FnMut(&Tensor) -> io::Result<Vec<u8>>,
    ) -> Result<(), WriteError> {
        out.write_all(&self.header()?)?;
        for tensor in &self.tensors {
            let mut bytes = data(tensor)?;
            if bytes.len() as u64 != tensor.bytes {
                let (given, expected) = (bytes.len() as u64, tensor.bytes);
                return Err(WriteError::WrongLength { name: tensor.name.clone(), given, expected });
            }
            pad(&mut bytes);
            out.write_all(&bytes)?;
        }
        Ok(())
    }
}

impl GgufWriter {
    /// Writes the whole file; `data` writes each tensor's bytes, in order and exactly as many as its shape takes. For
    /// tensors that should not be held in memory.
    pub fn write_streamed<W: Write>(
        &self,
        out: &mut W,
        mut data: impl FnMut(&Tensor, &mut dyn Write) -> io::Result<()>,
    ) -> Result<(), WriteError> {
        self.write_pieces(out, |tensor, out| Ok(data(tensor, out)?))
    }

    /// As [`GgufWriter::write_streamed`], where what gives the data fails in its own words.
    pub fn write_pieces<W: Write, E: From<WriteError>>(
        &self,
        out: &mut W,
        mut data: impl FnMut(&Tensor, &mut dyn Write) -> Result<(), E>,
    ) -> Result<(), E> {
        out.write_all(&self.header()?).map_err(WriteError::Io)?;
        for tensor in &self.tensors {
            let mut counted = Counted { out: &mut *out, written: 0 };
            data(tensor, &mut counted)?;
            let given = counted.written;
            if given != tensor.bytes {
                let (name, expected) = (tensor.name.clone(), tensor.bytes);
                return Err(WriteError::WrongLength { name, given, expected }.into());
            }
            let padding = align_up(given, DEFAULT_ALIGNMENT).unwrap_or(given) - given;
            out.write_all(&vec![0; usize::try_from(padding).unwrap_or(0)]).map_err(WriteError::Io)?;
        }
        Ok(())
    }
}

/// Counts what goes through.
struct Counted<'a, W> {
    out: &'a mut W,
    written: u64,
}

impl<W: Write> Write for Counted<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.written += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

impl Gguf {
    /// A writer with this file's metadata, except what `keep` refuses, and no tensors.
    pub fn writer(&self, keep: impl Fn(&str) -> bool) -> GgufWriter {
        let kept = self.metadata.iter().filter(|(key, _)| key != "general.alignment" && keep(key));
        GgufWriter { metadata: kept.cloned().collect(), ..GgufWriter::default() }
    }
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(DEFAULT_ALIGNMENT as usize), 0);
}
