//! Models of real shapes with random weights, for benchmarks on machines where no weights can be fetched. Their speed is a
//! real model's of the same shape and types; what they say means nothing.
//!
//! Blocks are drawn as they lie in the file (quantised numbers uniform, scales so that a row of a matrix has length about
//! one), so a file is made as fast as a disk writes it. The same seed gives the same bytes on every machine. For models
//! small enough to check arithmetic with, see [`crate::tiny`].

use std::io::{self, Write};

use crate::gguf::{GgufWriter, Tensor, TensorType, Value, WriteError};
use crate::tiny::{TYPE_BYTE, TYPE_CONTROL, TYPE_NORMAL, TYPE_UNKNOWN, bell, f16_bits, tokenizer};

/// Control tokens and bytes come first, as in SentencePiece vocabularies; the rest is filler.
const CONTROL: [&str; 3] = ["<unk>", "<s>", "</s>"];
/// The shape of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RandomModel {
    pub name: &'static str,
    pub layers: u32,
    pub n_embd: u32,
    /// Inner width of the feed-forward part, of each expert where there are experts.
    pub n_ff: u32,
    pub heads: u32,
    pub heads_kv: u32,
    pub head_width: u32,
    pub vocab: u32,
    pub context: u32,
    /// 0 for a dense model (architecture llama), else qwen3moe.
    pub experts: u32,
    pub experts_used: u32,
}

/// The shapes that have names.
pub const SHAPES: [RandomModel; 4] = [
    // Llama 3.1 8B.
    RandomModel {
        name: "llama-8b",
        layers: 32,
        n_embd: 4096,
        n_ff: 14_336,
        heads: 32,
        heads_kv: 8,
        head_width: 128,
        vocab: 128_256,
        context: 8192,
        experts: 0,
        experts_used: 0,
    },
    // The layers of Llama 3.2 1B, deeper than wide; quick to make and to load.
    RandomModel {
        name: "llama-1b",
        layers: 16,
        n_embd: 2048,
        n_ff: 8192,
        heads: 32,
        heads_kv: 8,
        head_width: 64,
        vocab: 128_256,
        context: 8192,
        experts: 0,
        experts_used: 0,
    },
    // Qwen3 30B-A3B with a quarter of its layers and half of its experts.
    RandomModel {
        name: "moe-4b",
        layers: 12,
        n_embd: 2048,
        n_ff: 768,
        heads: 32,
        heads_kv: 4,
        head_width: 128,
        vocab: 151_936,
        context: 8192,
        experts: 64,
        experts_used: 8,
    },
    // Deep, with next to no vocabulary: what a token costs is its layers, so that splits by layers can be compared.
    RandomModel {
        name: "llama-deep",
        layers: 24,
        n_embd: 768,
        n_ff: 2048,
        heads: 12,
        heads_kv: 4,
        head_width: 64,
        vocab: 2048,
        context: 8192,
        experts: 0,
        experts_used: 0,
    },
];

impl RandomModel {
    pub fn named(name: &str) -> Option<RandomModel> {
        SHAPES.into_iter().find(|shape| shape.name == name)
    }

    /// Writes the whole GGUF in Q4_K_M's mixture: Q4_K, with Q6_K for the head and every second value and down matrix.
    /// `progress` hears the bytes of each tensor as it is written.
    pub fn write<W: Write>(&self, out: &mut W, seed: u64, mut progress: impl FnMut(u64)) -> Result<(), WriteError> {
        let writer = self.tensors(self.metadata())?;
        let mut index = 0_u64;
        writer.write(out, |tensor| {
            index += 1;
            progress(tensor.bytes);
            weights(tensor, seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(index))
        })
    }

    /// Bytes of all tensors, for a progress bar.
    pub fn tensor_bytes(&self) -> Result<u64, WriteError> {
        Ok(self.tensors(GgufWriter::new())?.tensors().iter().map(|tensor| tensor.bytes).sum())
    }

    fn architecture(&self) -> &'static str {
        if self.experts == 0 { "llama" } else { "qwen3moe" }
    }

    fn metadata(&self) -> GgufWriter {
        let arch = self.architecture();
        let key = |name: &str| format!("{arch}.{name}");
        let number = |value: u32| Value::U32(value);
        let bytes = (0..256).map(|byte| format!("<0x{byte:02X}>"));
        let fixed: Vec<String> = CONTROL.iter().map(|name| (*name).to_owned()).chain(bytes).collect();
        let filler = self.vocab.saturating_sub(fixed.len() as u32);
        // Every word of filler is a text of its own; a prompt of bytes never meets them, an answer is made of them.
        let filler = (0..filler).map(|n| (format!("\u{2581}w{n}"), TYPE_NORMAL));
        let kind = |at: usize| match at {
            0 => TYPE_UNKNOWN,
            1 | 2 => TYPE_CONTROL,
            _ => TYPE_BYTE,
        };
        let vocabulary: Vec<(String, i32)> =
            fixed.into_iter().enumerate().map(|(at, token)| (token, kind(at))).chain(filler).collect();
        let mut writer = GgufWriter::new()
            .set("general.architecture", Value::string(arch))
            .set("general.name", Value::string(format!("{}-random", self.name)))
            .set("general.file_type", number(15))
            .set(key("block_count"), number(self.layers))
            .set(key("context_length"), number(self.context))
            .set(key("embedding_length"), number(self.n_embd))
            .set(key("feed_forward_length"), number(self.n_ff))
            .set(key("attention.head_count"), number(self.heads))
            .set(key("attention.head_count_kv"), number(self.heads_kv))
            .set(key("attention.key_length"), number(self.head_width))
            .set(key("attention.value_length"), number(self.head_width))
            .set(key("attention.layer_norm_rms_epsilon"), Value::F32(1e-5))
            .set(key("rope.dimension_count"), number(self.head_width))
            .set(key("rope.freq_base"), Value::F32(500_000.0))
            .set(key("vocab_size"), number(vocabulary.len() as u32));
        if self.experts > 0 {
            writer = writer
                .set(key("expert_count"), number(self.experts))
                .set(key("expert_used_count"), number(self.experts_used))
                .set(key("expert_feed_forward_length"), number(self.n_ff));
        }
        tokenizer(writer, &vocabulary)
    }

    fn tensors(&self, writer: GgufWriter) -> Result<GgufWriter, WriteError> {
        let (embd, inner) = (u64::from(self.n_embd), u64::from(self.n_ff));
        let (query, value) = (u64::from(self.heads * self.head_width), u64::from(self.heads_kv * self.head_width));
        let (vocab, experts, width) = (u64::from(self.vocab), u64::from(self.experts), u64::from(self.head_width));
        let mut writer = writer
            .tensor("token_embd.weight", Q4_K, &[embd, vocab])?
            .tensor("output_norm.weight", TensorType::F32, &[embd])?
            .tensor("output.weight", Q6_K, &[embd, vocab])?;
        for layer in 0..self.layers {
            let name = |part: &str| format!("blk.{layer}.{part}.weight");
            let fine = if layer % 2 == 0 { Q6_K } else { Q4_K };
            writer = writer
                .tensor(name("attn_norm"), TensorType::F32, &[embd])?
                .tensor(name("attn_q"), Q4_K, &[embd, query])?
                .tensor(name("attn_k"), Q4_K, &[embd, value])?
                .tensor(name("attn_v"), fine, &[embd, value])?
                .tensor(name("attn_output"), Q4_K, &[query, embd])?
                .tensor(name("ffn_norm"), TensorType::F32, &[embd])?;
            writer = if experts == 0 {
                writer
                    .tensor(name("ffn_gate"), Q4_K, &[embd, inner])?
                    .tensor(name("ffn_up"), Q4_K, &[embd, inner])?
                    .tensor(name("ffn_down"), fine, &[inner, embd])?
            } else {
                writer
                    .tensor(name("attn_q_norm"), TensorType::F32, &[width])?
                    .tensor(name("attn_k_norm"), TensorType::F32, &[width])?
                    .tensor(name("ffn_gate_inp"), TensorType::F32, &[embd, experts])?
                    .tensor(name("ffn_gate_exps"), Q4_K, &[embd, inner, experts])?
                    .tensor(name("ffn_up_exps"), Q4_K, &[embd, inner, experts])?
                    .tensor(name("ffn_down_exps"), fine, &[inner, embd, experts])?
            };
        }
        Ok(writer)
    }
}

/// ggml's ids and block shapes.
const Q4_K: TensorType = TensorType { id: 12, name: "Q4_K", block: 256, bytes: 144 };
const Q6_K: TensorType = TensorType { id: 14, name: "Q6_K", block: 256, bytes: 210 };

fn weights(tensor: &Tensor, seed: u64) -> io::Result<Vec<u8>> {
    let row = tensor.shape.first().copied().unwrap_or(1).max(1) as f32;
    // Norms are one; a matrix's numbers have the variance of one over its row.
    let spread = if tensor.name == "token_embd.weight" { 1.0 } else { 1.0 / row.sqrt() };
    let length = usize::try_from(tensor.bytes).map_err(io::Error::other)?;
    if tensor.kind == TensorType::F32 {
        let mut random = Random(seed);
        let number = |random: &mut Random| if tensor.shape.len() == 1 { 1.0 } else { bell(random.next()) * spread };
        return Ok((0..length / 4).flat_map(|_| number(&mut random).to_le_bytes()).collect());
    }
    let mut bytes = vec![0_u8; length];
    Random(seed).fill(&mut bytes);
    for block in bytes.chunks_exact_mut(usize::try_from(tensor.kind.bytes).unwrap_or(1)) {
        if tensor.kind == Q4_K {
            // w = d * scale * q - dmin * min, scales and minima 0..63, q 0..15: mean zero at dmin = 7.5 d, deviation 256 d.
            let d = spread / 256.0;
            block[0..2].copy_from_slice(&f16_bits(d).to_le_bytes());
            block[2..4].copy_from_slice(&f16_bits(d * 7.5).to_le_bytes());
        } else if tensor.kind == Q6_K {
            // w = d * scale * (q - 32), q 0..63, scales drawn from 32..63: deviation 888 d.
            for scale in &mut block[192..208] {
                *scale = 32 + (*scale & 31);
            }
            block[208..210].copy_from_slice(&f16_bits(spread / 888.0).to_le_bytes());
        } else {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "random models are F32, Q4_K and Q6_K"));
        }
    }
    Ok(bytes)
}

/// SplitMix64: as fast as memory, and the same everywhere. Nothing secret depends on it.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let drawn = self.next().to_le_bytes();
            chunk.copy_from_slice(&drawn[..chunk.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{facts::ModelFacts, gguf::Gguf};

    fn small(experts: u32) -> RandomModel {
        let (layers, n_embd, n_ff, vocab) = (2, 256, 512, 512);
        let base = SHAPES[usize::from(experts > 0) * 2];
        RandomModel { layers, n_embd, n_ff, heads: 4, heads_kv: 2, head_width: 64, vocab, experts, ..base }
    }

    #[test]
    fn a_file_reads_back_as_its_shape() {
        for experts in [0, 16] {
            let model = small(experts);
            let (mut bytes, mut told) = (Vec::new(), 0);
            model.write(&mut bytes, 1, |n| told += n).unwrap();
            let gguf = Gguf::read(&mut io::Cursor::new(&bytes)).unwrap();
            let facts = ModelFacts::from_gguf(&gguf).unwrap();
            assert_eq!((facts.layers, facts.n_embd, facts.vocab, facts.experts), (2, 256, 512, experts));
            assert_eq!(facts.quantisation, "Q4_K_M");
            assert_eq!((facts.tensor_bytes, told), (model.tensor_bytes().unwrap(), facts.tensor_bytes));
            let mut again = Vec::new();
            model.write(&mut again, 1, |_| ()).unwrap();
            assert_eq!(bytes, again);
        }
    }

    #[test]
    fn the_named_shapes_have_the_sizes_of_their_models() {
        let gigabytes = |name| RandomModel::named(name).unwrap().tensor_bytes().unwrap() as f64 / 1e9;
        // Llama 3.1 8B in Q4_K_M is 4.92 GB.
        assert!((4.7..5.1).contains(&gigabytes("llama-8b")), "{}", gigabytes("llama-8b"));
        assert!((1.5..3.0).contains(&gigabytes("moe-4b")), "{}", gigabytes("moe-4b"));
        assert_eq!(RandomModel::named("llama-9b"), None);
    }

    #[test]
    fn halves() {
        for (number, bits) in [(1.0, 0x3C00), (6.103_515_6e-5, 0x0400), (5.960_464_5e-8, 0x0001), (3.3e-5, 0x022A)] {
            assert_eq!(f16_bits(number), bits, "{number}");
        }
    }
}
