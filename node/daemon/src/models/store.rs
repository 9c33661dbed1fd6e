//! The store: one folder, each model one file with a small record beside it.
//!
//! A record is written after its file is in place; a file without a record is a leftover and is not a model.

use serde::{Deserialize, Serialize};
use std::fs::File;
use std::path::{Path, PathBuf};

use super::error::PullError;

/// What is known of one model, kept as `FILE.json` beside it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub name: String,
    /// File name in the store.
    pub file: String,
    pub bytes: u64,
    /// Lower-case hex.
    pub sha256: String,
    /// The reference that it was pulled by.
    pub source: String,
}

#[derive(Clone, Debug)]
pub(crate) struct Store {
    dir: PathBuf,
}

/// Held while a pull runs.
pub(super) struct Lock {
    _file: File,
}

impl Store {
    /// The store in `dir`, which need not be there yet.
    pub(crate) fn new(dir: &Path) -> Store {
        Store { dir: dir.to_owned() }
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn path(&self, record: &Record) -> PathBuf {
        self.dir.join(&record.file)
    }

    /// Every model, by name. Records that cannot be read are left out.
    pub(crate) fn list(&self) -> Vec<Record> {
        let Ok(entries) = std::fs::read_dir(&self.dir) else { return Vec::new() };
        let mut records: Vec<Record> = entries
            .filter_map(|entry| {
                let path = entry.ok()?.path();
                let record: Record = serde_json::from_slice(&std::fs::read(path.with_extension("json")).ok()?).ok()?;
                (path.extension()? == "gguf" && path.file_name()? == record.file.as_str()).then_some(record)
            })
            .collect();
        records.sort_by(|a, b| a.name.cmp(&b.name));
        records
    }

    /// The model with this name.
    pub(crate) fn find(&self, name: &str) -> Option<Record> {
        self.list().into_iter().find(|record| record.name == name)
    }

    /// Folder for a download in pieces.
    pub(super) fn scratch(&self, name: &str) -> Result<PathBuf, PullError> {
        let dir = self.dir.join(format!(".{name}.parts"));
        std::fs::create_dir_all(&dir).map_err(|e| PullError::io("make the folder", &dir, e))?;
        Ok(dir)
    }

    /// Takes a whole and checked file into the store: on disk, then renamed, then recorded.
    pub(super) fn admit(&self, file: &Path, record: &Record) -> Result<PathBuf, PullError> {
        let path = self.path(record);
        File::open(file).and_then(|file| file.sync_all()).map_err(|e| PullError::io("flush", file, e))?;
        std::fs::rename(file, &path).map_err(|e| PullError::io("move to", &path, e))?;
        let sidecar = path.with_extension("json");
        let part = self.dir.join(format!(".{}.json.part", record.file));
        let text = serde_json::to_vec_pretty(record).unwrap_or_default();
        std::fs::write(&part, text).map_err(|e| PullError::io("write", &part, e))?;
        std::fs::rename(&part, &sidecar).map_err(|e| PullError::io("move to", &sidecar, e))?;
        File::open(&self.dir).and_then(|dir| dir.sync_all()).map_err(|e| PullError::io("flush", &self.dir, e))?;
        Ok(path)
    }

    /// A model under `name` with another content may not be replaced silently.
    pub(super) fn check_name(&self, name: &str, sha256: &str) -> Result<(), PullError> {
        match self.find(name) {
            Some(record) if record.sha256 != sha256 => {
                Err(PullError::NameTaken { name: name.to_owned(), sha256: record.sha256 })
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Waits for its turn.
    pub(super) fn lock(&self) -> Result<Lock, PullError> {
        std::fs::create_dir_all(&self.dir).map_err(|e| PullError::io("make the folder", &self.dir, e))?;
        let path = self.dir.join(".lock");
        let file = File::options().create(true).append(true).open(&path);
        let file = file.map_err(|e| PullError::io("write", &path, e))?;
        use rustix::fs::FlockOperation::{LockExclusive, NonBlockingLockExclusive};
        if rustix::fs::flock(&file, NonBlockingLockExclusive).is_err() {
            eprintln!("another pull is at work; waiting for it");
            rustix::fs::flock(&file, LockExclusive).map_err(|e| PullError::io("lock", &path, e.into()))?;
        }
        Ok(Lock { _file: file })
    }
}
