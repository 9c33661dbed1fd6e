//! A model that is already on this machine: checked, hashed, and linked into the store (copied across disks).

use sha2::{Digest, Sha256};
use std::fs::File;
use std::path::Path;

use super::error::PullError;
use super::file::{check_space, copy_hashing, sha256_of, size_of};
use super::inspect::inspect;
use super::store::{Record, Store};
use super::{Pulled, ShowProgress};
use crate::progress::Bytes;

pub(super) fn pull(store: &Store, path: &Path, name: Option<&str>, show: ShowProgress) -> Result<Pulled, PullError> {
    let path = path.canonicalize().map_err(|e| PullError::io("read", path, e))?;
    inspect(&path).map_err(|source| PullError::BadFile { path: path.clone(), source })?;
    let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
    let name = name.map(str::to_owned).or(stem).unwrap_or_else(|| "model".to_owned());
    let bytes = size_of(&path)?;
    let progress = show(&format!("checking {name}"), bytes);
    let sha256 = sha256_of(&path, &progress)?;
    progress.finish();
    store.check_name(&name, &sha256)?;

    let record = Record { file: format!("{name}.gguf"), name, bytes, sha256, source: path.display().to_string() };
    let kept = store.path(&record);
    if kept == path || (kept.exists() && sha256_of(&kept, &Bytes::silent())? == record.sha256) {
        let path = store.admit(&kept, &record)?;
        return Ok(Pulled { record, path, cached: true });
    }
    let scratch = store.scratch("local")?;
    let staged = scratch.join("whole");
    let _ = std::fs::remove_file(&staged);
    if std::fs::hard_link(&path, &staged).is_err() {
        copy(&path, &staged, &record, show)?;
    }
    let kept = store.admit(&staged, &record)?;
    let _ = std::fs::remove_dir_all(&scratch);
    Ok(Pulled { record, path: kept, cached: false })
}

fn copy(from: &Path, to: &Path, record: &Record, show: ShowProgress) -> Result<(), PullError> {
    check_space(to.parent().unwrap_or(to), record.bytes)?;
    let source = File::open(from).map_err(|e| PullError::io("read", from, e))?;
    let mut target = File::create(to).map_err(|e| PullError::io("write", to, e))?;
    let mut hash = Sha256::new();
    let progress = show(&format!("copying {}", record.name), record.bytes);
    copy_hashing(source, &mut target, &mut hash, to, &progress)?;
    progress.finish();
    let found = hex::encode(hash.finalize());
    if found == record.sha256 {
        return Ok(());
    }
    let what = from.display().to_string();
    Err(PullError::Damaged { what, detail: "it changed while it was copied".to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use satgrid_engine::tiny::TinyModel;

    fn silent(_: &str, _: u64) -> Bytes {
        Bytes::silent()
    }

    #[test]
    fn linked_found_again_and_never_replaced_silently() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(&dir.path().join("store"));
        std::fs::create_dir_all(store.dir()).unwrap();
        let path = dir.path().join("m.gguf");
        let write =
            |seed| std::fs::write(&path, TinyModel { seed, ..TinyModel::default() }.to_bytes().unwrap()).unwrap();
        write(1);
        let first = pull(&store, &path, None, silent).unwrap();
        assert_eq!((first.record.name.as_str(), first.cached), ("m", false));
        assert!(pull(&store, &path, None, silent).unwrap().cached);
        assert_eq!(store.list(), std::slice::from_ref(&first.record));

        // Another file under the same name: it must be given another one.
        std::fs::remove_file(&path).unwrap();
        write(2);
        assert!(matches!(pull(&store, &path, None, silent), Err(PullError::NameTaken { .. })));
        assert_eq!(pull(&store, &path, Some("other"), silent).unwrap().record.name, "other");
        assert_eq!(store.list().len(), 2);

        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, b"GGML").unwrap();
        assert!(matches!(pull(&store, &path, None, silent), Err(PullError::BadFile { .. })));
        assert!(matches!(pull(&store, &dir.path().join("none"), None, silent), Err(PullError::Io { .. })));
    }
}
