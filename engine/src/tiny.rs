//! A tiny llama model with random weights, for tests that need a real GGUF: stock llama.cpp loads it, tokenises with
//! it and generates. The same seed gives the same bytes on every machine. What it says means nothing.
//!
//! The vocabulary is SentencePiece-like: three control tokens, the 256 byte tokens, printable ASCII, and some
//! words with all their prefixes, so that merges have something to do and any text can be tokenised. Byte tokens
//! are drawn less often than words, but often enough to cut characters in two.

use std::io::{self, Write};

use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::facts::Pooling;
use crate::gguf::{Array, GgufWriter, Tensor, TensorType, Value, WriteError};

const UNKNOWN: u32 = 0;
const BOS: u32 = 1;
const EOS: u32 = 2;
/// Token of byte 0; the other bytes follow.
const FIRST_BYTE: u32 = 3;

/// llama.cpp's `llama_token_type`.
pub(crate) const TYPE_NORMAL: i32 = 1;
pub(crate) const TYPE_UNKNOWN: i32 = 2;
pub(crate) const TYPE_CONTROL: i32 = 3;
pub(crate) const TYPE_BYTE: i32 = 6;

/// SentencePiece's visible space.
const SPACE: char = '\u{2581}';
const WORDS: [&str; 24] = [
    "the", "and", "of", "to", "in", "is", "that", "light", "river", "stone", "market", "invoice", "channel", "signal",
    "paper", "winter", "garden", "machine", "quiet", "number", "window", "morning", "water", "bright",
];

/// The shape of a tiny model. `write` makes the file.
#[derive(Debug, Clone)]
pub struct TinyModel {
    pub seed: u64,
    /// Of the matrices; norms are always F32. [`TensorType::F32`] or [`TensorType::Q8_0`].
    pub kind: TensorType,
    pub layers: u32,
    /// A multiple of 64.
    pub n_embd: u32,
    pub context: u32,
    /// Goes into `general.name`.
    pub name: String,
    pub chat_template: Option<String>,
    /// It embeds, and writes nothing.
    pub pooling: Option<Pooling>,
}

impl Default for TinyModel {
    fn default() -> Self {
        Self {
            seed: 1,
            kind: TensorType::F32,
            layers: 3,
            n_embd: 64,
            context: 4096,
            name: "tiny-random".to_owned(),
            chat_template: None,
            pooling: None,
        }
    }
}

impl TinyModel {
    const HEAD: u32 = 16;

    /// Writes the whole GGUF. Fails with `BadShape` where `n_embd` does not fit.
    pub fn write<W: Write>(&self, out: &mut W) -> Result<(), WriteError> {
        let vocabulary = vocabulary();
        let writer = self.tensors(self.metadata(&vocabulary), vocabulary.len() as u64)?;
        write_in_streams(writer, out, |tensor, stream| weights(self.seed, tensor, stream))
    }

    /// The file as bytes; under a megabyte by default.
    pub fn to_bytes(&self) -> Result<Vec<u8>, WriteError> {
        let mut bytes = Vec::new();
        self.write(&mut bytes)?;
        Ok(bytes)
    }

    fn heads(&self) -> u32 {
        (self.n_embd / Self::HEAD).max(1)
    }

    fn heads_kv(&self) -> u32 {
        (self.heads() / 2).max(1)
    }

    fn metadata(&self, vocabulary: &[(String, i32)]) -> GgufWriter {
        let file_type = if self.kind == TensorType::Q8_0 { 7 } else { 0 };
        let writer = GgufWriter::new()
            .set("general.architecture", Value::string("llama"))
            .set("general.name", Value::string(self.name.clone()))
            .set("general.file_type", Value::U32(file_type))
            .set("llama.block_count", Value::U32(self.layers))
            .set("llama.context_length", Value::U32(self.context))
            .set("llama.embedding_length", Value::U32(self.n_embd))
            .set("llama.feed_forward_length", Value::U32(self.n_embd * 2))
            .set("llama.attention.head_count", Value::U32(self.heads()))
            .set("llama.attention.head_count_kv", Value::U32(self.heads_kv()))
            .set("llama.attention.key_length", Value::U32(Self::HEAD))
            .set("llama.attention.value_length", Value::U32(Self::HEAD))
            .set("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5))
            .set("llama.rope.dimension_count", Value::U32(Self::HEAD))
            .set("llama.rope.freq_base", Value::F32(10_000.0))
            .set("llama.vocab_size", Value::U32(vocabulary.len() as u32));
        let writer = tokenizer(writer, vocabulary);
        let writer = match self.pooling {
            Some(pooling) => writer.set("llama.pooling_type", Value::U32(pooling_number(pooling))),
            None => writer,
        };
        match &self.chat_template {
            Some(template) => writer.set("tokenizer.chat_template", Value::string(template.clone())),
            None => writer,
        }
    }

    fn tensors(&self, writer: GgufWriter, vocab: u64) -> Result<GgufWriter, WriteError> {
        let embd = u64::from(self.n_embd);
        let query = u64::from(self.heads() * Self::HEAD);
        let key = u64::from(self.heads_kv() * Self::HEAD);
        let mut writer = writer
            .tensor("token_embd.weight", self.kind, &[embd, vocab])?
            .tensor("output_norm.weight", TensorType::F32, &[embd])?
            .tensor("output.weight", self.kind, &[embd, vocab])?;
        for layer in 0..self.layers {
            let name = |part: &str| format!("blk.{layer}.{part}.weight");
            writer = writer
                .tensor(name("attn_norm"), TensorType::F32, &[embd])?
                .tensor(name("attn_q"), self.kind, &[embd, query])?
                .tensor(name("attn_k"), self.kind, &[embd, key])?
                .tensor(name("attn_v"), self.kind, &[embd, key])?
                .tensor(name("attn_output"), self.kind, &[query, embd])?
                .tensor(name("ffn_norm"), TensorType::F32, &[embd])?
                .tensor(name("ffn_gate"), self.kind, &[embd, embd * 2])?
                .tensor(name("ffn_up"), self.kind, &[embd, embd * 2])?
                .tensor(name("ffn_down"), self.kind, &[embd * 2, embd])?;
        }
        Ok(writer)
    }
}

/// llama.cpp's `llama_pooling_type`.
pub(crate) fn pooling_number(pooling: Pooling) -> u32 {
    match pooling {
        Pooling::Mean => 1,
        Pooling::Cls => 2,
        Pooling::Last => 3,
    }
}

/// The vocabulary's part of the metadata.
pub(crate) fn tokenizer(writer: GgufWriter, vocabulary: &[(String, i32)]) -> GgufWriter {
    // Merges prefer the higher score, so the earlier token.
    let scores = (0..vocabulary.len()).map(|at| -(at as f32)).collect();
    let tokens = vocabulary.iter().map(|(token, _)| token.clone().into_bytes()).collect();
    let kinds = vocabulary.iter().map(|(_, kind)| *kind).collect();
    writer
        .set("tokenizer.ggml.model", Value::string("llama"))
        .set("tokenizer.ggml.tokens", Value::Array(Array::Str(tokens)))
        .set("tokenizer.ggml.scores", Value::Array(Array::F32(scores)))
        .set("tokenizer.ggml.token_type", Value::Array(Array::I32(kinds)))
        .set("tokenizer.ggml.unknown_token_id", Value::U32(UNKNOWN))
        .set("tokenizer.ggml.bos_token_id", Value::U32(BOS))
        .set("tokenizer.ggml.eos_token_id", Value::U32(EOS))
        .set("tokenizer.ggml.add_bos_token", Value::Bool(true))
        .set("tokenizer.ggml.add_space_prefix", Value::Bool(false))
}

/// Writes the file; each tensor's data is made from a stream of random numbers of its own, told by its place.
pub(crate) fn write_in_streams<W: Write>(
    writer: GgufWriter,
    out: &mut W,
    data: impl Fn(&Tensor, u64) -> io::Result<Vec<u8>>,
) -> Result<(), WriteError> {
    let names: Vec<String> = writer.tensors().iter().map(|tensor| tensor.name.clone()).collect();
    writer.write(out, |tensor| {
        let stream = names.iter().position(|name| *name == tensor.name).unwrap_or(0);
        data(tensor, stream as u64)
    })
}

/// One tensor's data: around 0 in a matrix, around 1 in a norm.
pub(crate) fn weights(seed: u64, tensor: &Tensor, stream: u64) -> io::Result<Vec<u8>> {
    let mut rng = ChaCha20Rng::seed_from_u64(seed);
    rng.set_stream(stream);
    let row = tensor.shape.first().copied().unwrap_or(1).max(1);
    let matrix = tensor.shape.len() > 1;
    let spread = if tensor.name == "token_embd.weight" { 1.0 } else { 1.4 / (row as f32).sqrt() };
    let numbers: Vec<f32> = (0..tensor.elements())
        .map(|at| {
            let token = (at / row) as u32;
            let byte_token = (FIRST_BYTE..FIRST_BYTE + 256).contains(&token);
            let spread = if tensor.name == "output.weight" && byte_token { spread * 0.5 } else { spread };
            let noise = bell(rng.next_u64()) * spread;
            if matrix { noise } else { 1.0 + noise }
        })
        .collect();
    store(tensor.kind, &numbers)
}

/// Numbers as a file holds them.
pub(crate) fn store(kind: TensorType, numbers: &[f32]) -> io::Result<Vec<u8>> {
    if kind == TensorType::F32 {
        Ok(numbers.iter().flat_map(|number| number.to_le_bytes()).collect())
    } else if kind == TensorType::Q8_0 {
        Ok(quantise_q8_0(numbers))
    } else if kind == TensorType::Q4_0 {
        Ok(quantise_q4_0(numbers))
    } else {
        Err(io::Error::new(io::ErrorKind::Unsupported, format!("tiny models are F32, Q8_0 or Q4_0, not {}", kind.name)))
    }
}

/// About normal with variance 1: the four uniform numbers in 64 random bits summed. Exact in f32, so the same everywhere.
pub(crate) fn bell(bits: u64) -> f32 {
    let sum: i32 = (0..4).map(|part| ((bits >> (16 * part)) & 0xFFFF) as i32 - 0x8000).sum();
    // A uniform number over 2^16 has variance 2^32 / 12; four have 2^32 / 3.
    sum as f32 / 65536.0 * 1.732_050_8
}

/// Blocks of 32: the scale as f16, then 32 signed bytes.
fn quantise_q8_0(numbers: &[f32]) -> Vec<u8> {
    let mut out = Vec::with_capacity(numbers.len() / 32 * 34);
    for block in numbers.chunks_exact(32) {
        let largest = block.iter().fold(0f32, |largest, number| largest.max(number.abs()));
        let scale = largest / 127.0;
        out.extend(f16_bits(scale).to_le_bytes());
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        out.extend(block.iter().map(|number| (number * inverse).round().clamp(-127.0, 127.0) as i8 as u8));
    }
    out
}

/// Blocks of 32: the scale as f16, then 16 bytes, each the numbers i and i + 16 as 4 bits above -8.
fn quantise_q4_0(numbers: &[f32]) -> Vec<u8> {
    let mut out = Vec::with_capacity(numbers.len() / 32 * 18);
    for block in numbers.chunks_exact(32) {
        let largest = block.iter().fold(0f32, |largest, number| largest.max(number.abs()));
        let scale = largest / 7.0;
        out.extend(f16_bits(scale).to_le_bytes());
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        let four = |number: f32| ((number * inverse).round().clamp(-8.0, 7.0) as i8 + 8) as u8;
        out.extend((0..16).map(|at| four(block[at]) | four(block[at + 16]) << 4));
    }
    out
}

/// A positive f32 within f16's range, rounded to the nearest f16, subnormal where it must be; anything else is 0.
pub(crate) fn f16_bits(number: f32) -> u16 {
    if (0.0..6.2e-5).contains(&number) {
        return (number * 16_777_216.0).round() as u16;
    }
    if !(6.2e-5..65_000.0).contains(&number) {
        return 0;
    }
    // Rebias the exponent from 127 to 15 and round off 13 bits of mantissa, ties to even.
    let bits = number.to_bits() - (112 << 23);
    let half = 0x0FFF + ((bits >> 13) & 1);
    ((bits + half) >> 13) as u16
}

/// Tokens and their types. Every token longer than one character is another token plus one character, so
/// merging pairs reaches it.
pub(crate) fn vocabulary() -> Vec<(String, i32)> {
    let mut tokens =
        vec![("<unk>".to_owned(), TYPE_UNKNOWN), ("<s>".to_owned(), TYPE_CONTROL), ("</s>".to_owned(), TYPE_CONTROL)];
    tokens.extend((0..256).map(|byte| (format!("<0x{byte:02X}>"), TYPE_BYTE)));
    let mut normal: Vec<String> = vec![SPACE.to_string()];
    normal.extend((b'!'..=b'~').map(|byte| char::from(byte).to_string()));
    for length in 1..8 {
        for word in WORDS {
            let Some(prefix) = word.get(..length) else { continue };
            let token = format!("{SPACE}{prefix}");
            if !normal.contains(&token) {
                normal.push(token);
            }
        }
    }
    tokens.extend(normal.into_iter().map(|token| (token, TYPE_NORMAL)));
    tokens
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;
    use crate::facts::ModelFacts;
    use crate::gguf::Gguf;
    use crate::root::ModelRoot;
    use crate::tokenizer_artefact::TokenizerArtefact;

    fn read(bytes: &[u8]) -> Gguf {
        Gguf::read(&mut Cursor::new(bytes)).unwrap()
    }

    #[test]
    fn a_tiny_model_is_a_whole_model() {
        let model = TinyModel { kind: TensorType::Q8_0, ..TinyModel::default() };
        let bytes = model.to_bytes().unwrap();
        assert_eq!(bytes, model.to_bytes().unwrap());
        let gguf = read(&bytes);
        let facts = ModelFacts::from_gguf(&gguf).unwrap();
        assert_eq!((facts.layers, facts.n_embd, facts.n_head, facts.n_head_kv), (3, 64, 4, 2));
        assert_eq!((facts.quantisation.as_str(), facts.context, facts.experts), ("Q8_0", 4096, 0));
        assert_eq!(facts.vocab as usize, vocabulary().len());
        assert_eq!(gguf.position(&gguf.tensors[29]) + gguf.tensors[29].bytes.next_multiple_of(32), bytes.len() as u64);

        let root = |bytes: &[u8]| ModelRoot::compute(&read(bytes), &mut Cursor::new(bytes), &mut |_| ()).unwrap().root;
        let other = TinyModel { seed: 2, ..model.clone() }.to_bytes().unwrap();
        assert_ne!(root(&bytes), root(&other));
        let renamed = TinyModel { name: "another".to_owned(), ..model }.to_bytes().unwrap();
        assert_eq!(root(&bytes), root(&renamed));
    }

    #[test]
    fn the_artefact_of_an_artefact_is_itself() {
        let template = "{{ messages[0].content }}";
        let model = TinyModel { chat_template: Some(template.to_owned()), ..TinyModel::default() };
        let artefact = TokenizerArtefact::from_gguf(&read(&model.to_bytes().unwrap())).unwrap();
        let gguf = read(&artefact.bytes);
        assert!(gguf.tensors.is_empty());
        assert_eq!(crate::tokenizer_artefact::chat_template(&gguf), Some(template));
        assert_eq!(TokenizerArtefact::from_gguf(&gguf).unwrap(), artefact);
        // Other weights, same tokenizer.
        let other = TinyModel { seed: 9, kind: TensorType::Q8_0, ..model };
        assert_eq!(TokenizerArtefact::from_gguf(&read(&other.to_bytes().unwrap())).unwrap().hash, artefact.hash);
    }

    #[test]
    fn f16_rounds_to_nearest() {
        let cases = [(1.0, 0x3C00), (0.5, 0x3800), (0.1, 0x2E66), (1.0 / 3.0, 0x3555), (2047.5, 0x6800), (0.0, 0)];
        for (number, expect) in cases {
            assert_eq!(f16_bits(number), expect, "{number}");
        }
    }

    #[test]
    fn quantised_weights_stay_near() {
        let numbers: Vec<f32> = (0..64).map(|n| (n as f32 - 31.5) / 40.0).collect();
        let bytes = quantise_q8_0(&numbers);
        assert_eq!(bytes.len(), 68);
        for (at, number) in numbers.iter().enumerate() {
            let block = &bytes[at / 32 * 34..];
            // The scale's f16, decoded by hand for normal numbers.
            let half = u16::from_le_bytes([block[0], block[1]]);
            let scale = (1.0 + f32::from(half & 0x3FF) / 1024.0) * 2f32.powi(i32::from(half >> 10) - 15);
            let decoded = f32::from(block[2 + at % 32] as i8) * scale;
            assert!((decoded - number).abs() < 0.005, "{decoded} against {number}");
        }
    }
}
