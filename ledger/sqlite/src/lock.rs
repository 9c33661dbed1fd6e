//! One writer per database: an advisory lock on a file beside it, held until the process ends, however it ends.

use crate::OpenError;
use rustix::fs::{FlockOperation, flock};
use std::{
    fs::{File, OpenOptions},
    io::{Read, Seek, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

/// The lock; dropping it lets the next process in.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

/// Where the lock of a database is.
fn lock_path(database: &Path) -> PathBuf {
    let mut name = database.as_os_str().to_owned();
    name.push(".lock");
    PathBuf::from(name)
}

impl Lock {
    pub(crate) fn take(database: &Path) -> Result<Lock, OpenError> {
        let path = lock_path(database);
        let io = |source| OpenError::Io { path: path.clone(), source };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(io)?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            let mut holder = String::new();
            // The holder writes its process id; without it the refusal is as clear.
            let _ = file.take(20).read_to_string(&mut holder);
            return Err(OpenError::Locked { path: database.to_owned(), holder: holder.trim().to_owned() });
        }
        file.set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "{}", std::process::id()))
            .map_err(io)?;
        Ok(Lock { _file: file })
    }
}
