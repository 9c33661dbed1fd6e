//! Which models may be cut: architectures *and* shapes, each held to the same bits by the whole-against-staged tests.

use crate::facts;
use crate::gguf::Gguf;

/// Architectures whose layers are all alike and know nothing of each other's number, and whose last tensor of each layer is
/// called `l_out`. `engine/llama/tests/split.rs` runs one of each kind, whole against staged.
const ARCHITECTURES: [&str; 7] = ["llama", "qwen2", "qwen3", "qwen2moe", "qwen3moe", "olmoe", "gemma3"];
/// Of these the mixtures of experts; `llama` with experts is Mixtral.
const WITH_EXPERTS: [&str; 4] = ["llama", "qwen2moe", "qwen3moe", "olmoe"];
/// Gemma 3 27B scales attention by the width of the model, and llama.cpp knows it by its number of layers.
const GEMMA3_SCALED_BY_LAYERS: u64 = 62;
/// Tensors outside the layers that we know what to do with.
const OUTSIDE: [&str; 4] = ["token_embd.weight", "output_norm.weight", "output.weight", "rope_freqs.weight"];
/// Metadata that makes layers differ in ways that a part does not carry.
const UNEVEN: [&str; 4] =
    ["leading_dense_block_count", "nextn_predict_layers", "interleave_moe_layer_step", "full_attention_interval"];

/// Why a model is not cut.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("models of architecture {architecture:?} are not cut into layers; these are: {}", ARCHITECTURES.join(", "))]
    Architecture { architecture: String },
    #[error("this {architecture} is not cut into layers: {why}")]
    Shape { architecture: String, why: String },
    #[error("the file is a part of a model already; cut the whole model")]
    IsPart,
    #[error("the file lacks metadata {key:?}, or it is not of the right type")]
    Missing { key: String },
}

/// The number of layers, if the model may be cut.
pub fn admit(gguf: &Gguf) -> Result<u32, Refused> {
    let missing = |key: &str| Refused::Missing { key: key.to_owned() };
    if gguf.metadata.iter().any(|(key, _)| key.starts_with(super::PREFIX)) {
        return Err(Refused::IsPart);
    }
    let architecture = gguf.architecture().ok_or_else(|| missing("general.architecture"))?.to_owned();
    if !ARCHITECTURES.contains(&architecture.as_str()) {
        return Err(Refused::Architecture { architecture });
    }
    let layers = gguf.arch_uint("block_count").ok_or_else(|| missing("block_count"))?;
    let refuse = |why: String| Err(Refused::Shape { architecture: architecture.clone(), why });
    if layers < 2 || layers > u64::from(u16::MAX) {
        return refuse(format!("it has {layers} layers"));
    }
    if architecture == "gemma3" && layers == GEMMA3_SCALED_BY_LAYERS {
        return refuse(format!("with {layers} layers its attention is scaled by the number of layers"));
    }
    // A text's row is pooled over all positions behind the last layer: there is no head that a lead could sample from.
    if !matches!(facts::pooling(gguf, &architecture), Ok(None)) {
        return refuse("it embeds or ranks texts (its pooling_type says so) and writes none; sell it whole".to_owned());
    }
    let experts = gguf.arch_uint("expert_count").unwrap_or(0);
    if experts > 0 && !WITH_EXPERTS.contains(&architecture.as_str()) {
        return refuse(format!("it has {experts} experts, and no such model was tried"));
    }
    if let Some(key) = UNEVEN.into_iter().find(|key| gguf.arch_uint(key).unwrap_or(0) > 0) {
        return refuse(format!("its layers differ ({key})"));
    }
    let known = |name: &str| OUTSIDE.contains(&name) || layer_of(name).is_some_and(|(at, _)| u64::from(at) < layers);
    if let Some(tensor) = gguf.tensors.iter().find(|tensor| !known(&tensor.name)) {
        return refuse(format!("tensor {:?} belongs to no layer", tensor.name));
    }
    Ok(u32::try_from(layers).unwrap_or(u32::MAX))
}

/// The layer of a tensor's name and the rest behind it: `blk.7.attn_q.weight` is of layer 7.
pub(super) fn layer_of(name: &str) -> Option<(u32, &str)> {
    let (number, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    // Only the plain form: `blk.07.x` would be another name for the same layer.
    let layer: u32 = number.parse().ok()?;
    (layer.to_string() == number).then_some((layer, rest))
}
