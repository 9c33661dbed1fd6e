//! Tiny mixture-of-experts models with random weights, one for each admitted architecture (`experts::family`), with the
//! vocabulary of [`crate::tiny`]. The same seed gives the same bytes on every machine.

use std::io::Write;

use crate::gguf::{GgufWriter, TensorType, Value, WriteError};
use crate::tiny::{tokenizer, vocabulary, weights, write_in_streams};

/// The shape of a tiny model with experts. `write` makes the file.
#[derive(Debug, Clone)]
pub struct TinyMoe {
    /// One of `experts::family::FAMILIES`.
    pub architecture: &'static str,
    pub seed: u64,
    /// Of the matrices: F32, Q8_0 or Q4_0. Norms and the router are F32.
    pub kind: TensorType,
    pub layers: u32,
    /// A multiple of 32.
    pub n_embd: u32,
    /// Inner width of an expert, a multiple of 32.
    pub n_ff: u32,
    pub experts: u32,
    pub used: u32,
    pub context: u32,
}

impl Default for TinyMoe {
    fn default() -> Self {
        Self {
            architecture: "qwen3moe",
            seed: 1,
            kind: TensorType::F32,
            layers: 3,
            n_embd: 64,
            n_ff: 32,
            experts: 8,
            used: 3,
            context: 4096,
        }
    }
}

impl TinyMoe {
    const HEAD: u32 = 16;

    /// Writes the whole GGUF.
    pub fn write<W: Write>(&self, out: &mut W) -> Result<(), WriteError> {
        let vocabulary = vocabulary();
        let writer = self.tensors(self.metadata(&vocabulary), vocabulary.len() as u64)?;
        write_in_streams(writer, out, |tensor, stream| weights(self.seed, tensor, stream))
    }

    pub fn to_bytes(&self) -> Result<Vec<u8>, WriteError> {
        let mut bytes = Vec::new();
        self.write(&mut bytes)?;
        Ok(bytes)
    }

    fn heads(&self) -> u32 {
        (self.n_embd / Self::HEAD).max(1)
    }

    /// OLMoE norms whole keys by the width of the queries, so it has as many.
    fn heads_kv(&self) -> u32 {
        if self.architecture == "olmoe" { self.heads() } else { (self.heads() / 2).max(1) }
    }

    fn metadata(&self, vocabulary: &[(String, i32)]) -> GgufWriter {
        let arch = self.architecture;
        let key = |name: &str| format!("{arch}.{name}");
        let has_own_width = matches!(arch, "qwen3moe" | "qwen2moe");
        let mut writer = GgufWriter::new()
            .set("general.architecture", Value::string(arch))
            .set("general.name", Value::string(format!("tiny-random-{arch}")))
            .set(key("block_count"), Value::U32(self.layers))
            .set(key("context_length"), Value::U32(self.context))
            .set(key("embedding_length"), Value::U32(self.n_embd))
            .set(key("feed_forward_length"), Value::U32(if has_own_width { 2 * self.n_ff } else { self.n_ff }))
            .set(key("attention.head_count"), Value::U32(self.heads()))
            .set(key("attention.head_count_kv"), Value::U32(self.heads_kv()))
            .set(key("attention.key_length"), Value::U32(Self::HEAD))
            .set(key("attention.value_length"), Value::U32(Self::HEAD))
            .set(key("attention.layer_norm_rms_epsilon"), Value::F32(1e-5))
            .set(key("rope.dimension_count"), Value::U32(Self::HEAD))
            .set(key("rope.freq_base"), Value::F32(10_000.0))
            .set(key("vocab_size"), Value::U32(vocabulary.len() as u32))
            .set(key("expert_count"), Value::U32(self.experts))
            .set(key("expert_used_count"), Value::U32(self.used));
        if has_own_width {
            writer = writer.set(key("expert_feed_forward_length"), Value::U32(self.n_ff));
        }
        if matches!(arch, "qwen2moe" | "granitemoe") {
            writer = writer.set(key("expert_shared_feed_forward_length"), Value::U32(self.n_ff));
        }
        if arch == "granitemoe" {
            writer = writer
                .set(key("logit_scale"), Value::F32(2.0))
                .set(key("residual_scale"), Value::F32(0.5))
                .set(key("embedding_scale"), Value::F32(1.5))
                .set(key("attention.scale"), Value::F32(0.25));
        }
        tokenizer(writer, vocabulary)
    }

    fn tensors(&self, writer: GgufWriter, vocab: u64) -> Result<GgufWriter, WriteError> {
        let (embd, ff, experts) = (u64::from(self.n_embd), u64::from(self.n_ff), u64::from(self.experts));
        let key_width = u64::from(self.heads_kv() * Self::HEAD);
        let mut writer = writer
            .tensor("token_embd.weight", self.kind, &[embd, vocab])?
            .tensor("output_norm.weight", TensorType::F32, &[embd])?
            .tensor("output.weight", self.kind, &[embd, vocab])?;
        for layer in 0..self.layers {
            let name = |part: &str| format!("blk.{layer}.{part}.weight");
            writer = writer
                .tensor(name("attn_norm"), TensorType::F32, &[embd])?
                .tensor(name("attn_q"), self.kind, &[embd, embd])?
                .tensor(name("attn_k"), self.kind, &[embd, key_width])?
                .tensor(name("attn_v"), self.kind, &[embd, key_width])?
                .tensor(name("attn_output"), self.kind, &[embd, embd])?
                .tensor(name("ffn_norm"), TensorType::F32, &[embd])?
                .tensor(name("ffn_gate_inp"), TensorType::F32, &[embd, experts])?
                .tensor(name("ffn_gate_exps"), self.kind, &[embd, ff, experts])?
                .tensor(name("ffn_down_exps"), self.kind, &[ff, embd, experts])?
                .tensor(name("ffn_up_exps"), self.kind, &[embd, ff, experts])?;
            writer = match self.architecture {
                "qwen3moe" => {
                    let head = u64::from(Self::HEAD);
                    writer.tensor(name("attn_q_norm"), TensorType::F32, &[head])?.tensor(
                        name("attn_k_norm"),
                        TensorType::F32,
                        &[head],
                    )?
                }
                "olmoe" => writer.tensor(name("attn_q_norm"), TensorType::F32, &[embd])?.tensor(
                    name("attn_k_norm"),
                    TensorType::F32,
                    &[embd],
                )?,
                "qwen2moe" | "granitemoe" => {
                    if self.architecture == "qwen2moe" {
                        writer = writer.tensor(name("ffn_gate_inp_shexp"), TensorType::F32, &[embd])?;
                    }
                    writer
                        .tensor(name("ffn_gate_shexp"), self.kind, &[embd, ff])?
                        .tensor(name("ffn_down_shexp"), self.kind, &[ff, embd])?
                        .tensor(name("ffn_up_shexp"), self.kind, &[embd, ff])?
                }
                _ => writer,
            };
        }
        Ok(writer)
    }
}
