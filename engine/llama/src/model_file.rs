//! What a model file is, read by our own bounds-checked reader before llama.cpp sees the file.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use satgrid_engine::facts::ModelFacts;
use satgrid_engine::gguf::Gguf;
use satgrid_engine::root::ModelRoot;
use satgrid_engine::tokenizer_artefact::TokenizerArtefact;

/// Bytes read at once.
const READ_BUFFER: usize = 1 << 20;

/// A model file's identity.
pub(crate) struct ModelFile {
    pub(crate) facts: ModelFacts,
    pub(crate) root: [u8; 32],
    /// Zeros where the file brings no vocabulary.
    pub(crate) tokenizer_hash: [u8; 32],
}

/// Reads the whole file once. `progress` hears thousandths. The error is for the person who gave the path.
pub(crate) fn read(path: &Path, mut progress: impl FnMut(u32)) -> Result<ModelFile, String> {
    let named = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let file = File::open(path).map_err(|error| named(&error))?;
    let mut reader = BufReader::with_capacity(READ_BUFFER, file);
    let gguf = Gguf::read(&mut reader).map_err(|error| named(&error))?;
    let facts = ModelFacts::from_gguf(&gguf).map_err(|error| named(&error))?;
    let tokenizer_hash = TokenizerArtefact::from_gguf(&gguf).map(|artefact| artefact.hash).unwrap_or_default();
    let (mut done, mut told) = (0_u64, 0);
    let root = ModelRoot::compute(&gguf, &mut reader, &mut |bytes| {
        done += bytes;
        let permille = u32::try_from(done.saturating_mul(1000) / facts.tensor_bytes.max(1)).unwrap_or(1000);
        if permille >= told + 10 {
            told = permille;
            progress(permille);
        }
    });
    let root = root.map_err(|error| named(&error))?.root;
    Ok(ModelFile { facts, root, tokenizer_hash })
}
