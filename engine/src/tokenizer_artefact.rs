//! The tokenizer artefact: a GGUF without tensors, from which a consumer tokenises, detokenises and renders chat
//! templates without any weights. llama.cpp loads it vocab-only in a few megabytes.
//!
//! It is addressed by SHA-256 of its bytes, so they are fixed by the model file's content alone: version 3, first
//! `general.architecture`, then `general.name` (llama.cpp mends a few vocabularies by the model's name), then every
//! key that begins with `tokenizer.`, sorted by its bytes, each value exactly as in the model file, then zeros up to
//! a multiple of 32.

use sha2::{Digest, Sha256};

use crate::gguf::{Gguf, GgufWriter, Value, WriteError};

/// Most bytes that a consumer accepts: ten times the largest vocabulary in use.
pub const MAX_ARTEFACT_BYTES: u64 = 64 << 20;

/// An artefact and its address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenizerArtefact {
    pub bytes: Vec<u8>,
    pub hash: [u8; 32],
}

/// Why a model file gives no artefact.
#[derive(Debug, thiserror::Error)]
pub enum ArtefactError {
    #[error("the model file names no architecture")]
    NoArchitecture,
    #[error("the model file holds no vocabulary")]
    NoVocabulary,
    #[error(transparent)]
    Write(#[from] WriteError),
}

impl TokenizerArtefact {
    /// Cuts the artefact out of a model file's metadata. Applied to an artefact it gives the same bytes.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, ArtefactError> {
        let architecture = gguf.architecture().ok_or(ArtefactError::NoArchitecture)?;
        if gguf.get("tokenizer.ggml.tokens").and_then(Value::as_array).is_none() {
            return Err(ArtefactError::NoVocabulary);
        }
        let mut writer = GgufWriter::new().set("general.architecture", Value::string(architecture));
        if let Some(name) = gguf.get("general.name") {
            writer = writer.set("general.name", name.clone());
        }
        let mut entries: Vec<_> = gguf.metadata.iter().filter(|(key, _)| key.starts_with("tokenizer.")).collect();
        entries.sort_by(|(a, _), (b, _)| a.as_bytes().cmp(b.as_bytes()));
        for (key, value) in entries {
            writer = writer.set(key, value.clone());
        }
        Ok(Self::from_bytes(writer.header()?))
    }

    /// Takes bytes as they came, for example from a provider; compare the hash before use.
    pub fn from_bytes(bytes: Vec<u8>) -> Self {
        let hash = Sha256::digest(&bytes).into();
        Self { bytes, hash }
    }
}

/// The chat template among the metadata, of a model file or an artefact.
pub fn chat_template(gguf: &Gguf) -> Option<&str> {
    gguf.str("tokenizer.chat_template")
}
