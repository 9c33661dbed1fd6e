//! A tiny BERT with random weights: a model that reads texts in both directions and embeds them, for tests that need a real
//! GGUF of one. Stock llama.cpp loads it. The same seed gives the same bytes on every machine; its rows mean nothing.
//!
//! Its vocabulary is [`crate::tiny`]'s, so that one tokenizer serves both.

use std::io::Write;

use crate::facts::Pooling;
use crate::gguf::{GgufWriter, TensorType, Value, WriteError};
use crate::tiny::{pooling_number, tokenizer, vocabulary, weights, write_in_streams};

const LAYERS: u32 = 2;
const WIDTH: u32 = 64;
const WIDE: u32 = 128;
const HEADS: u32 = 4;
/// Kinds of text that BERT tells apart; the first is all that embedding uses.
const TOKEN_TYPES: u32 = 2;

/// `write` makes the file.
#[derive(Debug, Clone)]
pub struct TinyBert {
    pub seed: u64,
    pub context: u32,
    pub pooling: Pooling,
}

impl Default for TinyBert {
    fn default() -> Self {
        Self { seed: 1, context: 1024, pooling: Pooling::Mean }
    }
}

impl TinyBert {
    /// Writes the whole GGUF.
    pub fn write<W: Write>(&self, out: &mut W) -> Result<(), WriteError> {
        let vocabulary = vocabulary();
        let writer = GgufWriter::new()
            .set("general.architecture", Value::string("bert"))
            .set("general.name", Value::string("tiny-random-bert"))
            .set("general.file_type", Value::U32(0))
            .set("bert.block_count", Value::U32(LAYERS))
            .set("bert.context_length", Value::U32(self.context))
            .set("bert.embedding_length", Value::U32(WIDTH))
            .set("bert.feed_forward_length", Value::U32(WIDE))
            .set("bert.attention.head_count", Value::U32(HEADS))
            .set("bert.attention.layer_norm_epsilon", Value::F32(1e-12))
            .set("bert.attention.causal", Value::Bool(false))
            .set("bert.pooling_type", Value::U32(pooling_number(self.pooling)))
            .set("tokenizer.ggml.token_type_count", Value::U32(TOKEN_TYPES));
        let writer = self.tensors(tokenizer(writer, &vocabulary), vocabulary.len() as u64)?;
        write_in_streams(writer, out, |tensor, stream| weights(self.seed, tensor, stream))
    }

    /// The file as bytes.
    pub fn to_bytes(&self) -> Result<Vec<u8>, WriteError> {
        let mut bytes = Vec::new();
        self.write(&mut bytes)?;
        Ok(bytes)
    }

    fn tensors(&self, writer: GgufWriter, vocab: u64) -> Result<GgufWriter, WriteError> {
        let (kind, width, wide) = (TensorType::F32, u64::from(WIDTH), u64::from(WIDE));
        let mut writer = writer
            .tensor("token_embd.weight", kind, &[width, vocab])?
            .tensor("token_types.weight", kind, &[width, u64::from(TOKEN_TYPES)])?
            .tensor("position_embd.weight", kind, &[width, u64::from(self.context)])?
            .tensor("token_embd_norm.weight", kind, &[width])?
            .tensor("token_embd_norm.bias", kind, &[width])?;
        for layer in 0..LAYERS {
            let shapes = [
                ("attn_q", width, width),
                ("attn_k", width, width),
                ("attn_v", width, width),
                ("attn_output", width, width),
                ("ffn_up", width, wide),
                ("ffn_down", wide, width),
            ];
            for (part, rows, columns) in shapes {
                writer = writer.tensor(format!("blk.{layer}.{part}.weight"), kind, &[rows, columns])?.tensor(
                    format!("blk.{layer}.{part}.bias"),
                    kind,
                    &[columns],
                )?;
            }
            for part in ["attn_output_norm", "layer_output_norm"] {
                writer = writer.tensor(format!("blk.{layer}.{part}.weight"), kind, &[width])?.tensor(
                    format!("blk.{layer}.{part}.bias"),
                    kind,
                    &[width],
                )?;
            }
        }
        Ok(writer)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;
    use crate::facts::ModelFacts;
    use crate::gguf::Gguf;

    #[test]
    fn it_embeds_by_its_own_account() {
        let model = TinyBert::default();
        let bytes = model.to_bytes().unwrap();
        assert_eq!(bytes, model.to_bytes().unwrap());
        let facts = ModelFacts::from_gguf(&Gguf::read(&mut Cursor::new(bytes)).unwrap()).unwrap();
        assert_eq!((facts.architecture.as_str(), facts.pooling), ("bert", Some(Pooling::Mean)));
        assert_eq!((facts.layers, facts.n_embd, facts.context), (2, 64, 1024));
    }
}
