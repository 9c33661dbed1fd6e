//! Writes the golden vectors under `tests/vectors/`: what docs/ledger-format.md means, byte for byte.
//!
//! ```text
//! cargo run -p satgrid-ledger --features testing --example make_vectors             writes them
//! cargo run -p satgrid-ledger --features testing --example make_vectors -- --check  fails if they differ
//! ```
//!
//! Deterministic: all keys, salts and times are derived from names. A change of any vector is a change of the format.
// A tool, not part of the pure room: it writes files.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, clippy::wildcard_enum_match_arm, clippy::type_complexity)]

mod bundles;
mod cbor_json;
mod claims;
mod credit;
mod listings;
mod pieces;
mod statements;
mod tampered;

use serde_json::Value;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::ExitCode,
};

/// Files by their path below `tests/vectors/`.
#[derive(Default)]
pub(crate) struct Files(BTreeMap<PathBuf, Vec<u8>>);

impl Files {
    pub(crate) fn json(&mut self, name: &str, about: &str, vectors: Vec<Value>) {
        let file = serde_json::json!({ "about": about, "vectors": vectors });
        let mut bytes = serde_json::to_vec_pretty(&file).unwrap();
        bytes.push(b'\n');
        self.bytes(name, bytes);
    }
    pub(crate) fn bytes(&mut self, name: &str, bytes: Vec<u8>) {
        assert!(self.0.insert(name.into(), bytes).is_none(), "{name} twice");
    }
}

fn main() -> ExitCode {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/vectors");
    let mut files = Files::default();
    statements::write(&mut files);
    pieces::write(&mut files);
    bundles::write(&mut files);
    if std::env::args().any(|arg| arg == "--check") { check(&root, &files) } else { save(&root, &files) }
}

fn save(root: &Path, files: &Files) -> ExitCode {
    for (name, bytes) in &files.0 {
        let path = root.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
    eprintln!("{} files written", files.0.len());
    ExitCode::SUCCESS
}

/// Every file is what would be written, and there is no other.
fn check(root: &Path, files: &Files) -> ExitCode {
    let mut wrong = Vec::new();
    for (name, bytes) in &files.0 {
        match std::fs::read(root.join(name)) {
            Ok(found) if found == *bytes => {}
            Ok(_) => wrong.push(format!("{} differs", name.display())),
            Err(error) => wrong.push(format!("{}: {error}", name.display())),
        }
    }
    for folder in [root.to_path_buf(), root.join("bundles")] {
        for found in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let path = found.path();
            let name = path.strip_prefix(root).unwrap();
            if path.is_file() && name != Path::new("README.md") && !files.0.contains_key(name) {
                wrong.push(format!("{} is not written by this program", name.display()));
            }
        }
    }
    wrong.iter().for_each(|line| eprintln!("{line}"));
    if wrong.is_empty() {
        eprintln!("{} files are as they should be", files.0.len());
        return ExitCode::SUCCESS;
    }
    ExitCode::FAILURE
}
