//! What a model file is, read by our own bounds-checked reader before llama.cpp sees the file.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use satgrid_engine::experts::trunk::Trunk;
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
///
/// A trunk is the whole model to all but the engine: it has that model's root, facts and tokenizer.
pub(crate) fn read(path: &Path, is_trunk: bool, mut progress: impl FnMut(u32)) -> Result<ModelFile, String> {
    let named = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let file = File::open(path).map_err(|error| named(&error))?;
    let mut reader = BufReader::with_capacity(READ_BUFFER, file);
    let gguf = Gguf::read(&mut reader).map_err(|error| named(&error))?;
    match (is_trunk, Trunk::is_part(&gguf)) {
        (false, true) => return Err(named(&"a part of a split model: it runs only where its experts are found")),
        (true, false) => {
            return Err(named(&"a whole model; a trunk is made of it by `satgrid models split --experts`"));
        }
        (true, true) | (false, false) => {}
    }
    let tensor_bytes = gguf.tensors.iter().fold(0_u64, |sum, tensor| sum.saturating_add(tensor.bytes));
    let tokenizer_hash = TokenizerArtefact::from_gguf(&gguf).map(|artefact| artefact.hash).unwrap_or_default();
    let (mut done, mut told) = (0_u64, 0);
    let mut read = |bytes: u64| {
        done += bytes;
        let permille = u32::try_from(done.saturating_mul(1000) / tensor_bytes.max(1)).unwrap_or(1000);
        if permille >= told + 10 {
            told = permille;
            progress(permille);
        }
    };
    let (root, facts) = if is_trunk {
        let trunk = Trunk::open(&gguf, &mut reader, &mut read).map_err(|error| named(&error))?;
        (trunk.manifest.root, ModelFacts::from_gguf(&trunk.whole))
    } else {
        let root = ModelRoot::compute(&gguf, &mut reader, &mut read).map_err(|error| named(&error))?;
        (root.root, ModelFacts::from_gguf(&gguf))
    };
    let facts = facts.map_err(|error| named(&error))?;
    Ok(ModelFile { facts, root, tokenizer_hash })
}
