//! Tiny random models of every architecture that may be cut into layers, without a vocabulary: for tests that hold a model in
//! parts against the whole one. Stock llama.cpp loads them. The same seed gives the same bytes on every machine.

use std::io;

use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::gguf::{GgufWriter, Tensor, TensorType, Value, WriteError};
use crate::tiny::{store, write_in_streams};

const WIDTH: u64 = 64;
const HEAD: u64 = 16;
const HEADS: u64 = 4;
const HEADS_KV: u64 = 2;
const WIDE: u64 = 128;
const VOCAB: u64 = 512;
const EXPERTS: u64 = 8;
const EXPERTS_USED: u64 = 2;
/// Positions that a windowed layer of the Gemma-like model sees.
const WINDOW: u32 = 48;

/// The architectures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    Llama,
    Qwen2,
    Qwen3,
    Qwen3Moe,
    Gemma3,
}

impl Family {
    pub const ALL: [Self; 5] = [Self::Llama, Self::Qwen2, Self::Qwen3, Self::Qwen3Moe, Self::Gemma3];

    /// As `general.architecture` says it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Qwen3Moe => "qwen3moe",
            Self::Gemma3 => "gemma3",
        }
    }
}

/// The shape of a tiny model.
#[derive(Debug, Clone)]
pub struct TinyShape {
    pub family: Family,
    pub seed: u64,
    /// Of the matrices: F32, Q8_0 or Q4_0; norms are always F32.
    pub kind: TensorType,
    pub layers: u32,
    pub context: u32,
}

impl TinyShape {
    /// The whole file.
    pub fn to_bytes(&self) -> Result<Vec<u8>, WriteError> {
        let writer = self.tensors(self.metadata())?;
        let mut bytes = Vec::new();
        write_in_streams(writer, &mut bytes, |tensor, stream| self.weights(tensor, stream))?;
        Ok(bytes)
    }

    fn metadata(&self) -> GgufWriter {
        let name = self.family.name();
        let key = |part: &str| format!("{name}.{part}");
        let number = |number: u64| Value::U32(number as u32);
        let writer = GgufWriter::new()
            .set("general.architecture", Value::string(name))
            .set("general.name", Value::string(format!("tiny-{name}")))
            .set(key("block_count"), Value::U32(self.layers))
            .set(key("context_length"), Value::U32(self.context))
            .set(key("embedding_length"), number(WIDTH))
            .set(key("feed_forward_length"), number(WIDE))
            .set(key("attention.head_count"), number(HEADS))
            .set(key("attention.head_count_kv"), number(HEADS_KV))
            .set(key("attention.key_length"), number(HEAD))
            .set(key("attention.value_length"), number(HEAD))
            .set(key("attention.layer_norm_rms_epsilon"), Value::F32(1e-5))
            .set(key("rope.dimension_count"), number(HEAD))
            .set(key("rope.freq_base"), Value::F32(10_000.0))
            .set(key("vocab_size"), number(VOCAB))
            .set("tokenizer.ggml.model", Value::string("no_vocab"));
        match self.family {
            Family::Llama | Family::Qwen2 | Family::Qwen3 => writer,
            Family::Qwen3Moe => writer
                .set(key("expert_count"), number(EXPERTS))
                .set(key("expert_used_count"), number(EXPERTS_USED))
                .set(key("expert_feed_forward_length"), number(WIDTH)),
            Family::Gemma3 => writer.set(key("attention.sliding_window"), Value::U32(WINDOW)),
        }
    }

    fn tensors(&self, writer: GgufWriter) -> Result<GgufWriter, WriteError> {
        let (kind, norm) = (self.kind, TensorType::F32);
        let (query, key) = (HEADS * HEAD, HEADS_KV * HEAD);
        let mut writer =
            writer.tensor("token_embd.weight", kind, &[WIDTH, VOCAB])?.tensor("output_norm.weight", norm, &[WIDTH])?;
        // Gemma ties its head to its embedding.
        if self.family != Family::Gemma3 {
            writer = writer.tensor("output.weight", kind, &[WIDTH, VOCAB])?;
        }
        for layer in 0..self.layers {
            let name = |part: &str| format!("blk.{layer}.{part}");
            writer = writer
                .tensor(name("attn_norm.weight"), norm, &[WIDTH])?
                .tensor(name("attn_q.weight"), kind, &[WIDTH, query])?
                .tensor(name("attn_k.weight"), kind, &[WIDTH, key])?
                .tensor(name("attn_v.weight"), kind, &[WIDTH, key])?
                .tensor(name("attn_output.weight"), kind, &[query, WIDTH])?
                .tensor(name("ffn_norm.weight"), norm, &[WIDTH])?;
            if self.family == Family::Qwen2 {
                writer = writer
                    .tensor(name("attn_q.bias"), norm, &[query])?
                    .tensor(name("attn_k.bias"), norm, &[key])?
                    .tensor(name("attn_v.bias"), norm, &[key])?;
            }
            if matches!(self.family, Family::Qwen3 | Family::Qwen3Moe | Family::Gemma3) {
                writer = writer.tensor(name("attn_q_norm.weight"), norm, &[HEAD])?.tensor(
                    name("attn_k_norm.weight"),
                    norm,
                    &[HEAD],
                )?;
            }
            if self.family == Family::Gemma3 {
                writer = writer.tensor(name("post_attention_norm.weight"), norm, &[WIDTH])?.tensor(
                    name("post_ffw_norm.weight"),
                    norm,
                    &[WIDTH],
                )?;
            }
            writer = if self.family == Family::Qwen3Moe {
                writer
                    .tensor(name("ffn_gate_inp.weight"), norm, &[WIDTH, EXPERTS])?
                    .tensor(name("ffn_gate_exps.weight"), kind, &[WIDTH, WIDTH, EXPERTS])?
                    .tensor(name("ffn_up_exps.weight"), kind, &[WIDTH, WIDTH, EXPERTS])?
                    .tensor(name("ffn_down_exps.weight"), kind, &[WIDTH, WIDTH, EXPERTS])?
            } else {
                writer
                    .tensor(name("ffn_gate.weight"), kind, &[WIDTH, WIDE])?
                    .tensor(name("ffn_up.weight"), kind, &[WIDTH, WIDE])?
                    .tensor(name("ffn_down.weight"), kind, &[WIDE, WIDTH])?
            };
        }
        Ok(writer)
    }

    fn weights(&self, tensor: &Tensor, stream: u64) -> io::Result<Vec<u8>> {
        let mut rng = ChaCha20Rng::seed_from_u64(self.seed);
        rng.set_stream(stream);
        let row = tensor.shape.first().copied().unwrap_or(1).max(1);
        let (embedding, bias) = (tensor.name == "token_embd.weight", tensor.name.ends_with(".bias"));
        let spread = if embedding { 1.0 } else { 1.4 / (row as f32).sqrt() };
        let centre = if tensor.shape.len() > 1 || bias { 0.0 } else { 1.0 };
        let mut number = || {
            // Uniform over 2^16 steps: exact, so the same everywhere.
            let steps = (rng.next_u32() & 0xFFFF) as i32 - 0x8000;
            centre + steps as f32 / 32_768.0 * spread * 1.7
        };
        let numbers: Vec<f32> = (0..tensor.elements()).map(|_| number()).collect();
        store(tensor.kind, &numbers)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;
    use crate::gguf::Gguf;
    use crate::part::admit;

    #[test]
    fn every_shape_is_a_file_that_may_be_cut() {
        for family in Family::ALL {
            for kind in [0, 2, 8].map(|id| TensorType::from_id(id).unwrap()) {
                let shape = TinyShape { family, seed: 1, kind, layers: 3, context: 256 };
                let bytes = shape.to_bytes().unwrap();
                assert_eq!(bytes, shape.to_bytes().unwrap());
                assert_eq!(admit(&Gguf::read(&mut Cursor::new(bytes)).unwrap()), Ok(3), "{family:?}");
            }
        }
    }
}
