//! The lead's own parts in memory: the embedding looked up by row, the first layers, the last layers and the head.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use satgrid_engine::gguf::Gguf;

use super::trip::Ends;
use crate::backend::LlamaBackend;
use crate::ffi::{BatchRow, DecodeError, to_floats};
use crate::scheduler::Backend;
use crate::stage::layers::LlamaLayers;
use crate::stage::queue::Layers;

/// The embedding of a tail: rows are read from the file as tokens ask for them.
pub(crate) struct Embedding {
    file: File,
    at: u64,
    row_bytes: u64,
    kind: u32,
    width: usize,
    vocab: u64,
    scale: Option<f32>,
}

impl Embedding {
    pub(crate) fn open(path: &Path, gguf: &Gguf) -> Result<Self, String> {
        let named = |what: &str| format!("{}: {what}", path.display());
        let file = File::open(path).map_err(|error| named(&error.to_string()))?;
        let tensor = gguf.tensor("token_embd.weight").ok_or_else(|| named("there is no embedding"))?;
        let &[width, vocab] = tensor.shape.as_slice() else { return Err(named("the embedding is no table")) };
        let row_bytes = tensor.kind.size(&[width]).ok_or_else(|| named("the embedding's rows are no whole blocks"))?;
        let width = usize::try_from(width).map_err(|_| named("the embedding is too wide"))?;
        let embedding = Self {
            file,
            at: gguf.position(tensor),
            row_bytes,
            kind: tensor.kind.id,
            width,
            vocab,
            // As llama.cpp scales what it looks up, and only that.
            scale: (gguf.architecture() == Some("gemma3")).then(|| (width as f32).sqrt()),
        };
        // A type that has no way to numbers shows now.
        embedding.row(0).map_err(|error| named(&error.to_string()))?;
        Ok(embedding)
    }

    fn row(&self, token: u32) -> Result<Vec<f32>, DecodeError> {
        let failed = |reason: String| DecodeError::Ring { reason };
        if u64::from(token) >= self.vocab {
            return Err(failed(format!("token {token} is not in the embedding")));
        }
        let mut bytes = vec![0; usize::try_from(self.row_bytes).unwrap_or(0)];
        let at = self.at + u64::from(token) * self.row_bytes;
        self.file.read_exact_at(&mut bytes, at).map_err(|error| failed(format!("reading the embedding: {error}")))?;
        let numbers = to_floats(self.kind, &bytes, self.width);
        let mut numbers = numbers.ok_or_else(|| failed("the embedding's type cannot be read".to_owned()))?;
        if let Some(scale) = self.scale {
            numbers.iter_mut().for_each(|number| *number *= scale);
        }
        Ok(numbers)
    }
}

/// Both ends over llama.cpp.
pub(crate) struct LlamaEnds {
    pub(crate) embedding: Embedding,
    pub(crate) head: LlamaLayers,
    pub(crate) tail: LlamaBackend,
}

impl Ends for LlamaEnds {
    fn width(&self) -> u32 {
        self.head.width()
    }

    fn head(&mut self, rows: &[BatchRow]) -> Result<Vec<f32>, DecodeError> {
        let mut hidden = Vec::with_capacity(rows.len() * self.embedding.width);
        for row in rows {
            hidden.extend(self.embedding.row(row.token)?);
        }
        let rows: Vec<BatchRow> = rows.iter().map(|row| BatchRow { output: true, ..*row }).collect();
        self.head.evaluate(&rows, &hidden)
    }

    fn tail(&mut self, rows: &[BatchRow], hidden: &[f32]) -> Result<(), DecodeError> {
        self.tail.evaluate_hidden(rows, hidden)
    }

    fn logits(&mut self, row: usize) -> Result<&[f32], DecodeError> {
        self.tail.logits(row)
    }

    fn truncate_head(&mut self, slot: u32, from: u32) -> bool {
        self.head.truncate(slot, from)
    }

    fn truncate_tail(&mut self, slot: u32, from: u32) -> bool {
        self.tail.truncate(slot, from)
    }
}
