//! The node's files: one owner, one process, and a database that survives a power cut.

use crate::start::StartError;
use rustix::fs::{FlockOperation, flock};
use sqlx::{
    ConnectOptions, Connection,
    sqlite::{SqliteConnectOptions, SqliteJournalMode},
};
use std::{
    fs::{DirBuilder, File, OpenOptions, Permissions, set_permissions},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::Path,
};

const DATABASE: &str = "ldk_node_data.sqlite";
const LOCK: &str = "lock";

/// While this lives, no other process starts a node on the same directory: two nodes with one state lose channels.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

/// Makes `dir` (0700), takes its lock, and makes the database file (0600; SQLite gives its side files the same mode).
pub(crate) fn prepare(dir: &Path) -> Result<Lock, StartError> {
    let at = |source: io::Error| StartError::Dir { dir: dir.to_owned(), source };
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(at)?;
    set_permissions(dir, Permissions::from_mode(0o700)).map_err(at)?;
    let file = private_file(&dir.join(LOCK)).map_err(at)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => return Err(StartError::InUse { dir: dir.to_owned() }),
        Err(errno) => return Err(at(errno.into())),
    }
    private_file(&dir.join(DATABASE)).map_err(at)?;
    Ok(Lock { _file: file })
}

/// Opens for appending, made with mode 0600 if it is new, and set to it if it is not.
pub(crate) fn private_file(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
    file.set_permissions(Permissions::from_mode(0o600))?;
    Ok(file)
}

/// Sets the database to WAL, which it stays in: a payment then costs fewer waits for the disk, and is as durable
/// (`synchronous` stays FULL, SQLite's default on every connection of the node).
pub(crate) async fn set_wal(dir: &Path) -> Result<(), StartError> {
    let failed = |e: sqlx::Error| StartError::Store { dir: dir.to_owned(), reason: e.to_string() };
    let options = SqliteConnectOptions::new()
        .filename(dir.join(DATABASE))
        .journal_mode(SqliteJournalMode::Wal)
        .disable_statement_logging();
    let mut connection = options.connect().await.map_err(failed)?;
    let (mode,): (String,) = sqlx::query_as("PRAGMA journal_mode").fetch_one(&mut connection).await.map_err(failed)?;
    connection.close().await.map_err(failed)?;
    if mode.eq_ignore_ascii_case("wal") {
        Ok(())
    } else {
        let reason = format!("its file system does not allow WAL (journal mode is {mode})");
        Err(StartError::Store { dir: dir.to_owned(), reason })
    }
}
