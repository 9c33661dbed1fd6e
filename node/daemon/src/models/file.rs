//! Reading and writing big files: hash while copying, know the space, flush before the rename.

use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use super::error::PullError;
use crate::progress::Bytes;

const BUFFER_BYTES: usize = 1 << 20;

/// Copies all of `from` into `to`, feeding `hash`; `path` names the destination in errors.
pub(super) fn copy_hashing(
    mut from: impl Read,
    to: &mut impl Write,
    hash: &mut Sha256,
    path: &Path,
    progress: &Bytes,
) -> Result<u64, PullError> {
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut copied = 0;
    loop {
        let n = from.read(&mut buffer).map_err(|e| PullError::io("read for", path, e))?;
        let Some(bytes) = buffer.get(..n).filter(|bytes| !bytes.is_empty()) else { return Ok(copied) };
        to.write_all(bytes).map_err(|e| PullError::io("write", path, e))?;
        hash.update(bytes);
        copied += n as u64;
        progress.add(n as u64);
    }
}

/// SHA-256 of a file, in lower-case hex.
pub(crate) fn sha256_of(path: &Path, progress: &Bytes) -> Result<String, PullError> {
    let file = File::open(path).map_err(|e| PullError::io("read", path, e))?;
    let mut hash = Sha256::new();
    copy_hashing(file, &mut std::io::sink(), &mut hash, path, progress)?;
    Ok(hex::encode(hash.finalize()))
}

pub(super) fn size_of(path: &Path) -> Result<u64, PullError> {
    std::fs::metadata(path).map(|m| m.len()).map_err(|e| PullError::io("read", path, e))
}

/// Some space must stay for the wallet and the ledger, which are worth more than any model.
const KEEP_FREE_BYTES: u64 = 256_000_000;

/// Refuses before the first byte what would not fit.
pub(super) fn check_space(dir: &Path, bytes: u64) -> Result<(), PullError> {
    let free = free_bytes(dir).map_err(|e| PullError::io("look at", dir, e))?;
    let needed = bytes.saturating_add(KEEP_FREE_BYTES);
    if free >= needed { Ok(()) } else { Err(PullError::DiskFull { dir: dir.to_owned(), needed, free }) }
}

/// What an unprivileged process may still write.
pub(crate) fn free_bytes(dir: &Path) -> std::io::Result<u64> {
    let stat = rustix::fs::statvfs(dir)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}
