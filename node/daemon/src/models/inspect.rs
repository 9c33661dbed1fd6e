//! What a model file is: sound or not, its facts, and the hashes that name it.
//!
//! The root reads every byte once, which takes minutes for a large model; so it is remembered beside the store, under
//! the file's path, size and time of change. Delete the `.identities` folder to have it worked out anew.

use satgrid_engine::experts::pack::ARCHITECTURE;
use satgrid_engine::experts::trunk::Trunk;
use satgrid_engine::experts::{Manifest, PartError};
use satgrid_engine::facts::{FactsError, ModelFacts};
use satgrid_engine::gguf::{Gguf, GgufError};
use satgrid_engine::root::ModelRoot;
use satgrid_engine::tokenizer_artefact::{ArtefactError, TokenizerArtefact, chat_template};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use super::ShowProgress;
use super::store::Store;

/// What a file's header says.
#[derive(Debug)]
pub(crate) struct Inspected {
    pub(crate) facts: ModelFacts,
    pub(crate) has_template: bool,
    /// What consumers fetch by its hash, so that they can tokenise without weights.
    pub(crate) tokenizer: TokenizerArtefact,
    /// A model without its experts, which are found elsewhere. Facts and root are the whole model's.
    pub(crate) is_trunk: bool,
    gguf: Gguf,
}

/// What a listing needs to know of a file.
#[derive(Debug)]
pub(crate) struct Identified {
    pub(crate) inspected: Inspected,
    /// The model root: a name is a claim, a root is a fact.
    pub(crate) root: [u8; 32],
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum FileFault {
    #[error("it cannot be opened: {0}")]
    Unreadable(#[from] std::io::Error),
    #[error(transparent)]
    Gguf(#[from] GgufError),
    #[error(transparent)]
    Facts(#[from] FactsError),
    #[error(transparent)]
    Tokenizer(#[from] ArtefactError),
    #[error(transparent)]
    Part(#[from] PartError),
}

impl FileFault {
    pub(crate) fn hint(&self) -> String {
        match self {
            FileFault::Unreadable(_) => "check the path and its permissions".to_owned(),
            FileFault::Gguf(GgufError::Truncated { .. } | GgufError::TensorTruncated { .. }) => {
                "the file is cut short, as after a broken download or copy: fetch it again".to_owned()
            }
            FileFault::Gguf(GgufError::BadMagic { .. }) => {
                "models are GGUF files; other formats are converted with llama.cpp's tools".to_owned()
            }
            FileFault::Gguf(_) => {
                "the file is damaged or made by a newer tool: fetch it again or convert it anew".to_owned()
            }
            FileFault::Part(_) => "make it again from the whole model: satgrid models split --experts".to_owned(),
            FileFault::Facts(_) | FileFault::Tokenizer(_) => {
                "it is a GGUF file but not a whole language model (perhaps an adapter, a projector or a part)"
                    .to_owned()
            }
        }
    }
}

impl Inspected {
    /// Of a trunk: which model it is of, and the hashes of that model's experts.
    pub(crate) fn manifest(&self) -> Result<Manifest, FileFault> {
        Ok(Manifest::of_part(&self.gguf)?)
    }
}

/// Reads the header and checks it; the tensors' data stay on the disk.
pub(crate) fn inspect(path: &Path) -> Result<Inspected, FileFault> {
    let gguf = Gguf::read(&mut BufReader::new(File::open(path)?))?;
    let is_trunk = Trunk::is_part(&gguf) && gguf.architecture() != Some(ARCHITECTURE);
    let facts =
        if is_trunk { ModelFacts::from_gguf(&Trunk::describe(&gguf)?.whole)? } else { ModelFacts::from_gguf(&gguf)? };
    Ok(Inspected {
        facts,
        is_trunk,
        has_template: chat_template(&gguf).is_some(),
        tokenizer: TokenizerArtefact::from_gguf(&gguf)?,
        gguf,
    })
}

/// Header and root. The root is worked out once per state of the file.
pub(crate) fn identify(store: &Store, path: &Path, show: ShowProgress) -> Result<Identified, FileFault> {
    let inspected = inspect(path)?;
    let state = FileState::of(path)?;
    let note = note_path(store, path);
    let noted = std::fs::read(&note).ok().and_then(|text| serde_json::from_slice::<Note>(&text).ok());
    if let Some(root) = noted.filter(|note| note.state == state).and_then(|note| note.root()) {
        return Ok(Identified { inspected, root });
    }
    let label = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let progress = show(&format!("hashing {label}"), inspected.facts.tensor_bytes);
    let mut file = BufReader::new(File::open(path)?);
    let root = if inspected.is_trunk {
        Trunk::open(&inspected.gguf, &mut file, &mut |bytes| progress.add(bytes))?.manifest.root
    } else {
        ModelRoot::compute(&inspected.gguf, &mut file, &mut |bytes| progress.add(bytes))?.root
    };
    progress.finish();
    // A note that cannot be kept costs time at the next start, nothing else.
    let text = serde_json::to_vec(&Note { state, root: hex::encode(root) }).unwrap_or_default();
    let _ = note.parent().map(std::fs::create_dir_all).transpose().and_then(|_| std::fs::write(&note, text));
    Ok(Identified { inspected, root })
}

fn note_path(store: &Store, path: &Path) -> PathBuf {
    let key = hex::encode(Sha256::digest(path.as_os_str().as_encoded_bytes()));
    store.dir().join(".identities").join(format!("{key}.json"))
}

#[derive(Serialize, Deserialize)]
struct Note {
    state: FileState,
    root: String,
}

impl Note {
    fn root(&self) -> Option<[u8; 32]> {
        hex::decode(&self.root).ok()?.try_into().ok()
    }
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct FileState {
    bytes: u64,
    /// Nanoseconds since 1970, as text: JSON readers lose the last digits of such numbers.
    changed: String,
}

impl FileState {
    fn of(path: &Path) -> std::io::Result<FileState> {
        let metadata = std::fs::metadata(path)?;
        let changed = metadata.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos().to_string();
        Ok(FileState { bytes: metadata.len(), changed })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Bytes;
    use satgrid_engine::tiny::TinyModel;

    fn tiny(seed: u64) -> Vec<u8> {
        TinyModel { seed, ..TinyModel::default() }.to_bytes().unwrap()
    }

    #[test]
    fn faults_and_their_hints() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        let good = tiny(1);
        let check = |bytes: &[u8], message: &str, hint: &str| {
            std::fs::write(&path, bytes).unwrap();
            let fault = inspect(&path).unwrap_err();
            assert!(fault.to_string().contains(message), "{fault}");
            assert!(fault.hint().contains(hint), "{}", fault.hint());
        };
        check(b"PK\x03\x04 and more of a zip file", "not a GGUF", "converted");
        check(&good[..good.len() - 100], "truncated", "cut short");
        check(&good[..40], "ends at byte 40", "cut short");
        check(b"", "ends at byte 0", "cut short");
        assert!(matches!(inspect(&dir.path().join("none")), Err(FileFault::Unreadable(_))));
        let artefact = TokenizerArtefact::from_gguf(&Gguf::read(&mut std::io::Cursor::new(&good)).unwrap()).unwrap();
        check(&artefact.bytes, "lacks metadata", "not a whole language model");
    }

    #[test]
    fn the_root_follows_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        let path = dir.path().join("m.gguf");
        let root_of = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            identify(&store, &path, |_, _| Bytes::silent()).unwrap().root
        };
        let first = root_of(&tiny(1));
        assert_eq!(root_of(&tiny(1)), first);
        assert_eq!(identify(&store, &path, |_, _| Bytes::silent()).unwrap().root, first);
        // Another size or time of change makes the note stale.
        std::thread::sleep(std::time::Duration::from_millis(2));
        assert_ne!(root_of(&tiny(2)), first);
    }
}
