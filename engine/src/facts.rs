//! What a model file says about its model, in the few figures that listings, planners and engines need.

use std::collections::BTreeMap;

use minicbor::{Decode, Encode};

use crate::gguf::{Array, Gguf, Value};

/// Facts of one model, read from its GGUF metadata and tensor table.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ModelFacts {
    /// `general.architecture`: llama, gemma3, qwen3moe, ...
    #[n(0)]
    pub architecture: String,
    /// `general.name`: a claim, never an identity.
    #[n(1)]
    pub name: Option<String>,
    #[n(2)]
    pub layers: u32,
    /// Width of a hidden state.
    #[n(3)]
    pub n_embd: u32,
    #[n(4)]
    pub n_head: u32,
    #[n(5)]
    pub n_head_kv: u32,
    /// Longest context that the model was trained for.
    #[n(6)]
    pub context: u32,
    #[n(7)]
    pub vocab: u32,
    /// Experts per MoE layer; 0 in a dense model.
    #[n(8)]
    pub experts: u32,
    #[n(9)]
    pub experts_used: u32,
    /// Positions that a windowed layer sees, where there are such layers.
    #[n(10)]
    pub sliding_window: Option<u32>,
    /// `F32`, `Q8_0`, `Q4_K_M`, ... as files are named.
    #[n(11)]
    pub quantisation: String,
    #[n(12)]
    pub parameters: u64,
    /// Bytes of all tensors' data.
    #[n(13)]
    pub tensor_bytes: u64,
    /// The model embeds texts: how the rows of one become its row. Absent: it writes.
    #[n(14)]
    pub pooling: Option<Pooling>,
    /// It sees a text in both directions, so that no piece of one can be computed before the rest is there.
    #[n(15)]
    pub both_ways: bool,
}

/// How an embedding model makes one row of a text's many.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum Pooling {
    #[n(0)]
    Mean,
    /// The first token's row.
    #[n(1)]
    Cls,
    /// The last token's row.
    #[n(2)]
    Last,
}

/// Why a file's metadata does not describe a model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FactsError {
    #[error("the file lacks metadata {key:?}, or it is not of the right type")]
    Missing { key: String },
    #[error("metadata {key:?} is {value}, which is out of range")]
    OutOfRange { key: String, value: u64 },
    #[error("{key:?} is {value}: the model ranks pairs of texts, and nothing here asks for that")]
    Ranks { key: String, value: u64 },
    #[error(
        "the model reads a text in both directions and {key:?} does not say how it embeds: it can neither write nor embed"
    )]
    Mute { key: String },
}

impl ModelFacts {
    /// Reads the facts of a whole model.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, FactsError> {
        let architecture = gguf.architecture().ok_or_else(|| missing("general.architecture"))?.to_owned();
        let optional = |name: &str| -> Result<Option<u32>, FactsError> {
            let key = format!("{architecture}.{name}");
            let Some(value) = gguf.get(&key) else { return Ok(None) };
            small(key, largest(value))
        };
        let required = |name: &str| optional(name)?.ok_or_else(|| missing(&format!("{architecture}.{name}")));
        let n_head = required("attention.head_count")?;
        Ok(Self {
            name: gguf.str("general.name").map(str::to_owned),
            layers: required("block_count")?,
            n_embd: required("embedding_length")?,
            n_head,
            n_head_kv: optional("attention.head_count_kv")?.unwrap_or(n_head),
            context: required("context_length")?,
            vocab: match gguf.get("tokenizer.ggml.tokens").and_then(Value::as_array) {
                Some(tokens) => u32::try_from(tokens.len()).unwrap_or(u32::MAX),
                None => required("vocab_size")?,
            },
            experts: optional("expert_count")?.unwrap_or(0),
            experts_used: optional("expert_used_count")?.unwrap_or(0),
            sliding_window: optional("attention.sliding_window")?.filter(|window| *window > 0),
            quantisation: quantisation(gguf),
            parameters: gguf.tensors.iter().fold(0, |sum, tensor| tensor.elements().saturating_add(sum)),
            tensor_bytes: gguf.tensors.iter().fold(0, |sum, tensor| tensor.bytes.saturating_add(sum)),
            pooling: pooling(gguf, &architecture)?,
            both_ways: both_ways(gguf, &architecture),
            architecture,
        })
    }
}

fn both_ways(gguf: &Gguf, architecture: &str) -> bool {
    gguf.get(&format!("{architecture}.attention.causal")).and_then(Value::as_bool) == Some(false)
}

/// llama.cpp's `llama_pooling_type`; a model that generates has none, or 0.
pub(crate) fn pooling(gguf: &Gguf, architecture: &str) -> Result<Option<Pooling>, FactsError> {
    let key = format!("{architecture}.pooling_type");
    match gguf.uint(&key).unwrap_or(0) {
        0 if both_ways(gguf, architecture) => Err(FactsError::Mute { key }),
        0 => Ok(None),
        1 => Ok(Some(Pooling::Mean)),
        2 => Ok(Some(Pooling::Cls)),
        3 => Ok(Some(Pooling::Last)),
        4 => Err(FactsError::Ranks { key, value: 4 }),
        value => Err(FactsError::OutOfRange { key, value }),
    }
}

fn missing(key: &str) -> FactsError {
    FactsError::Missing { key: key.to_owned() }
}

/// A value may be one number or one per layer; the largest speaks for all.
fn largest(value: &Value) -> Option<u64> {
    match value.as_array() {
        Some(Array::U32(items)) => items.iter().max().map(|n| u64::from(*n)),
        Some(Array::I32(items)) => items.iter().max().and_then(|n| u64::try_from(*n).ok()),
        Some(_) => None,
        None => value.as_uint(),
    }
}

fn small(key: String, value: Option<u64>) -> Result<Option<u32>, FactsError> {
    let Some(value) = value else { return Err(FactsError::Missing { key }) };
    match u32::try_from(value) {
        Ok(value) => Ok(Some(value)),
        Err(_) => Err(FactsError::OutOfRange { key, value }),
    }
}

/// The name that the file gives itself by `general.file_type`; else the type that takes the most bytes.
pub fn quantisation(gguf: &Gguf) -> String {
    if let Some(name) = gguf.uint("general.file_type").and_then(file_type_name) {
        return name.to_owned();
    }
    let mut bytes = BTreeMap::new();
    for tensor in &gguf.tensors {
        let sum: &mut u64 = bytes.entry(tensor.kind.name).or_default();
        *sum = sum.saturating_add(tensor.bytes);
    }
    let most = bytes.into_iter().max_by_key(|(_, bytes)| *bytes);
    most.map_or("none", |(name, _)| name).to_owned()
}

/// llama.cpp's `llama_ftype`, as files are named.
fn file_type_name(id: u64) -> Option<&'static str> {
    Some(match id {
        0 => "F32",
        1 => "F16",
        2 => "Q4_0",
        3 => "Q4_1",
        7 => "Q8_0",
        8 => "Q5_0",
        9 => "Q5_1",
        10 => "Q2_K",
        11 => "Q3_K_S",
        12 => "Q3_K_M",
        13 => "Q3_K_L",
        14 => "Q4_K_S",
        15 => "Q4_K_M",
        16 => "Q5_K_S",
        17 => "Q5_K_M",
        18 => "Q6_K",
        19 => "IQ2_XXS",
        20 => "IQ2_XS",
        21 => "Q2_K_S",
        22 => "IQ3_XS",
        23 => "IQ3_XXS",
        24 => "IQ1_S",
        25 => "IQ4_NL",
        26 => "IQ3_S",
        27 => "IQ3_M",
        28 => "IQ2_S",
        29 => "IQ2_M",
        30 => "IQ4_XS",
        31 => "IQ1_M",
        32 => "BF16",
        36 => "TQ1_0",
        37 => "TQ2_0",
        38 => "MXFP4_MOE",
        39 => "NVFP4",
        40 => "Q1_0",
        41 => "Q2_0",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;
    use crate::gguf::{GgufWriter, TensorType};

    fn facts(change: impl Fn(GgufWriter) -> GgufWriter) -> Result<ModelFacts, FactsError> {
        let base = GgufWriter::new()
            .set("general.architecture", Value::string("qwen3moe"))
            .set("qwen3moe.block_count", Value::U32(6))
            .set("qwen3moe.context_length", Value::U64(4096))
            .set("qwen3moe.attention.head_count", Value::Array(Array::U32(vec![8, 16, 8])))
            .set("qwen3moe.expert_count", Value::U32(16))
            .set("qwen3moe.expert_used_count", Value::U16(4))
            .set("qwen3moe.vocab_size", Value::U32(32))
            .tensor("a", TensorType::F32, &[32, 2])
            .unwrap()
            .tensor("b", TensorType::Q8_0, &[32, 8, 2])
            .unwrap();
        let mut bytes = Vec::new();
        change(base).write(&mut bytes, |tensor| Ok(vec![0; tensor.bytes as usize])).unwrap();
        ModelFacts::from_gguf(&Gguf::read(&mut Cursor::new(bytes)).unwrap())
    }

    #[test]
    fn facts_come_from_metadata_and_tensors() {
        let width = |writer: GgufWriter| writer.set("qwen3moe.embedding_length", Value::I32(512));
        let read = facts(width).unwrap();
        let expect = ModelFacts {
            architecture: "qwen3moe".to_owned(),
            name: None,
            layers: 6,
            n_embd: 512,
            n_head: 16,
            n_head_kv: 16,
            context: 4096,
            vocab: 32,
            experts: 16,
            experts_used: 4,
            sliding_window: None,
            quantisation: "Q8_0".to_owned(),
            parameters: 64 + 512,
            tensor_bytes: 256 + 544,
            pooling: None,
            both_ways: false,
        };
        assert_eq!(read, expect);
        let named = facts(|writer| width(writer).set("general.file_type", Value::U32(15))).unwrap();
        assert_eq!(named.quantisation, "Q4_K_M");
    }

    #[test]
    fn how_a_model_embeds_is_read() {
        let with = |kind: Option<u32>, causal: bool| {
            facts(|writer| {
                let writer = writer
                    .set("qwen3moe.embedding_length", Value::I32(512))
                    .set("qwen3moe.attention.causal", Value::Bool(causal));
                kind.map_or(writer.clone(), |kind| writer.set("qwen3moe.pooling_type", Value::U32(kind)))
            })
            .map(|facts| facts.pooling)
        };
        assert_eq!(with(None, true), Ok(None));
        assert_eq!(with(Some(0), true), Ok(None));
        assert_eq!(with(Some(1), false), Ok(Some(Pooling::Mean)));
        assert_eq!(with(Some(2), false), Ok(Some(Pooling::Cls)));
        assert_eq!(with(Some(3), true), Ok(Some(Pooling::Last)));
        let key = "qwen3moe.pooling_type".to_owned();
        assert_eq!(with(None, false), Err(FactsError::Mute { key: key.clone() }));
        assert_eq!(with(Some(4), true), Err(FactsError::Ranks { key: key.clone(), value: 4 }));
        assert_eq!(with(Some(9), true), Err(FactsError::OutOfRange { key, value: 9 }));
    }

    #[test]
    fn what_is_missing_or_absurd_is_named() {
        let key = "qwen3moe.embedding_length".to_owned();
        assert_eq!(facts(|writer| writer), Err(FactsError::Missing { key: key.clone() }));
        let text = facts(|writer| writer.set(key.clone(), Value::string("wide")));
        assert_eq!(text, Err(FactsError::Missing { key: key.clone() }));
        let absurd = facts(|writer| writer.set(key.clone(), Value::U64(1 << 40)));
        assert_eq!(absurd, Err(FactsError::OutOfRange { key, value: 1 << 40 }));
    }
}
