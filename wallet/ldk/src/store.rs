//! The node's files: one owner, one process, and a database that survives a power cut.

use crate::start::StartError;
use rustix::fs::{FlockOperation, flock};
use satgrid_wallet::restore::{OVER, Watermarks};
use sqlx::{
    ConnectOptions, Connection,
    sqlite::{SqliteConnectOptions, SqliteJournalMode},
};
use std::{
    collections::BTreeMap,
    fs::{DirBuilder, File, OpenOptions, Permissions, set_permissions},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
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

/// ldk-node's record of its coins, part by part. Reads beside a running node.
pub(crate) async fn coins(dir: &Path) -> Result<BTreeMap<String, Vec<u8>>, StartError> {
    let failed = |e: sqlx::Error| StartError::Store { dir: dir.to_owned(), reason: e.to_string() };
    let options = SqliteConnectOptions::new().filename(dir.join(DATABASE)).disable_statement_logging();
    let mut connection = options.connect().await.map_err(failed)?;
    let parts: Vec<(String, Vec<u8>)> =
        sqlx::query_as("SELECT key, value FROM ldk_node_data WHERE primary_namespace = 'bdk_wallet'")
            .fetch_all(&mut connection)
            .await
            .map_err(failed)?;
    connection.close().await.map_err(failed)?;
    Ok(parts.into_iter().collect())
}

/// Before a monitor's bytes stands this, where its newer updates are kept apart (LDK's `MonitorUpdatingPersister`).
const UPDATES_APART: [u8; 2] = [0xff, 0xff];
/// Version and least version, before the number of the state.
const VERSION_LEN: usize = 2;

/// The number of the latest state of each channel in the store, as LDK wrote it: the monitor's own, or that of the newest
/// update beside it. Reads beside a running node.
pub(crate) async fn watermarks(dir: &Path) -> Result<Watermarks, StartError> {
    let failed = |e: sqlx::Error| StartError::Store { dir: dir.to_owned(), reason: e.to_string() };
    let options = SqliteConnectOptions::new().filename(dir.join(DATABASE)).disable_statement_logging();
    let mut connection = options.connect().await.map_err(failed)?;
    let exists: Option<(String,)> = sqlx::query_as("SELECT name FROM sqlite_master WHERE name = 'ldk_node_data'")
        .fetch_optional(&mut connection)
        .await
        .map_err(failed)?;
    let mut marks = Watermarks::new();
    if exists.is_some() {
        let monitors: Vec<(String, String, Vec<u8>)> = sqlx::query_as(
            "SELECT primary_namespace, key, substr(value, 1, 12) FROM ldk_node_data \
             WHERE primary_namespace IN ('monitors', 'archived_monitors')",
        )
        .fetch_all(&mut connection)
        .await
        .map_err(failed)?;
        for (kept, channel, head) in monitors {
            let state = if kept == "monitors" { monitor_state(&head) } else { Some(OVER) };
            let reason = format!("the monitor of channel {channel} is not as LDK 0.2 writes it");
            let state = state.ok_or_else(|| StartError::Store { dir: dir.to_owned(), reason })?;
            let mark = marks.entry(channel).or_insert(state);
            *mark = (*mark).max(state);
        }
        let updates: Vec<(String, String)> = sqlx::query_as(
            "SELECT secondary_namespace, key FROM ldk_node_data WHERE primary_namespace = 'monitor_updates'",
        )
        .fetch_all(&mut connection)
        .await
        .map_err(failed)?;
        for (channel, update) in updates {
            let update = update.parse().unwrap_or(0);
            marks.entry(channel).and_modify(|mark| *mark = (*mark).max(update));
        }
    }
    connection.close().await.map_err(failed)?;
    Ok(marks)
}

fn monitor_state(head: &[u8]) -> Option<u64> {
    let head = head.strip_prefix(&UPDATES_APART).unwrap_or(head);
    let number = head.get(VERSION_LEN..VERSION_LEN.saturating_add(8))?;
    Some(u64::from_be_bytes(number.try_into().ok()?))
}

/// Puts a store aside under a name that nothing starts. `None` where there is none. Refused while a node uses it.
pub fn put_aside(dir: &Path, stamp: u64) -> Result<Option<PathBuf>, StartError> {
    if !dir.join(DATABASE).exists() {
        return Ok(None);
    }
    let _lock = prepare(dir)?;
    let mut name = dir.as_os_str().to_owned();
    name.push(format!(".given-up-{stamp}"));
    let aside = PathBuf::from(name);
    std::fs::rename(dir, &aside).map_err(|source| StartError::Dir { dir: dir.to_owned(), source })?;
    Ok(Some(aside))
}
