//! Opening a database: its permissions, its mode, its migrations.

use rusqlite::OpenFlags;
use sqlx::{
    ConnectOptions, SqliteConnection,
    migrate::{MigrateError, Migrator},
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous},
};
use std::{
    collections::BTreeMap,
    fs::OpenOptions,
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};
use thiserror::Error;

pub(crate) static MIGRATOR: Migrator = sqlx::migrate!("../../migrations/sqlite");

/// How long a connection waits for another one's short write lock.
const BUSY: Duration = Duration::from_secs(10);

/// Pages in the WAL from which on a commit moves them into the database.
const CHECKPOINT_PAGES: u32 = 4_000;

/// Why a journal was not opened. Nothing was changed in it.
#[derive(Debug, Error)]
pub enum OpenError {
    #[error("{}: in use by another process{}; stop it, or read the journal with satgrid-ledger", path.display(), process(holder))]
    Locked { path: PathBuf, holder: String },
    #[error("{}: schema {found} comes from a newer program; this one knows {known}", path.display())]
    NewerSchema { path: PathBuf, found: i64, known: i64 },
    #[error("{}: schema {found} is older than this program's {known}; the node migrates it at its next start", path.display())]
    OlderSchema { path: PathBuf, found: i64, known: i64 },
    #[error("{}: cannot be copied to {} before its schema is changed: {why}; nothing was migrated", path.display(), copy.display())]
    Copy { path: PathBuf, copy: PathBuf, why: String },
    #[error("{}: no such file", path.display())]
    Missing { path: PathBuf },
    #[error("{}: not a satgrid journal", path.display())]
    NotAJournal { path: PathBuf },
    #[error("{}: entry {seq} is damaged: {what}", path.display())]
    Damaged { path: PathBuf, seq: u64, what: String },
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{}: {source}", path.display())]
    Sqlite { path: PathBuf, source: sqlx::Error },
    #[error("{}: {source}", path.display())]
    Migrate { path: PathBuf, source: MigrateError },
}

fn process(holder: &str) -> String {
    if holder.is_empty() { String::new() } else { format!(" (process {holder})") }
}

/// Writers of one file within this process take turns by this: where two meet, SQLite has one of them sleep, for up to 100 ms
/// at a time.
pub(crate) fn turn(path: &Path) -> Arc<tokio::sync::Mutex<()>> {
    static TURNS: Mutex<BTreeMap<PathBuf, Weak<tokio::sync::Mutex<()>>>> = Mutex::new(BTreeMap::new());
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let mut turns = TURNS.lock().unwrap_or_else(PoisonError::into_inner);
    turns.retain(|_, turn| turn.strong_count() > 0);
    if let Some(turn) = turns.get(&path).and_then(Weak::upgrade) {
        return turn;
    }
    let turn = Arc::default();
    turns.insert(path, Arc::downgrade(&turn));
    turn
}

fn options(path: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(path)
        .busy_timeout(BUSY)
        .statement_cache_capacity(32)
        .disable_statement_logging()
}

pub(crate) fn read_options(path: &Path) -> SqliteConnectOptions {
    options(path).read_only(true)
}

/// What was committed is on the disk.
pub(crate) fn writer_options(path: &Path) -> SqliteConnectOptions {
    options(path).journal_mode(SqliteJournalMode::Wal).synchronous(SqliteSynchronous::Full)
}

/// Opens for writing, creates and migrates.
pub(crate) async fn writer(path: &Path, max_pages: Option<u32>) -> Result<SqliteConnection, OpenError> {
    let sqlite = |source| OpenError::Sqlite { path: path.to_owned(), source };
    // Payment hashes and preimages are nobody else's business.
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(|source| OpenError::Io { path: path.to_owned(), source })?;
    let mut options = writer_options(path);
    if let Some(pages) = max_pages {
        options = options.pragma("max_page_count", pages.to_string());
    }
    let mut connection = options.connect().await.map_err(|source| not_a_database(path, source))?;
    if let Some(newest) = check_schema(path, &mut connection, true).await? {
        keep_copy(path, &mut connection, newest).await?;
    }
    MIGRATOR.run(&mut connection).await.map_err(|source| OpenError::Migrate { path: path.to_owned(), source })?;
    let pragma = format!("PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}");
    sqlx::query(&pragma).execute(&mut connection).await.map_err(sqlite)?;
    Ok(connection)
}

/// The connection on which the journal's one writer stands, to a database that [`writer`] has opened before.
pub(crate) fn journal(path: &Path, max_pages: Option<u32>) -> Result<rusqlite::Connection, rusqlite::Error> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = rusqlite::Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(BUSY)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "wal_autocheckpoint", CHECKPOINT_PAGES)?;
    if let Some(pages) = max_pages {
        connection.pragma_update(None, "max_page_count", pages)?;
    }
    Ok(connection)
}

fn not_a_database(path: &Path, source: sqlx::Error) -> OpenError {
    const SQLITE_NOTADB: &str = "26";
    let code = source.as_database_error().and_then(|e| e.code()).map(|code| code.into_owned());
    match code.as_deref() {
        Some(SQLITE_NOTADB) => OpenError::NotAJournal { path: path.to_owned() },
        _ => OpenError::Sqlite { path: path.to_owned(), source },
    }
}

/// Where the copy of a journal goes that is made before it is migrated to a schema.
fn copy_path(path: &Path, schema: i64) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".before-{schema}"));
    PathBuf::from(name)
}

/// Copies the journal as it is, whole and consistent, before its schema is changed. A copy that a broken-off start left is
/// made anew: the journal is still the old one.
async fn keep_copy(path: &Path, connection: &mut SqliteConnection, schema: i64) -> Result<(), OpenError> {
    let copy = copy_path(path, schema);
    let failed = |why: String| OpenError::Copy { path: path.to_owned(), copy: copy.clone(), why };
    copy_into(connection, &copy).await.map_err(failed)?;
    tracing::info!(copy = %copy.display(), schema, "the ledger was copied; its schema is changed now");
    Ok(())
}

/// Writes a consistent copy of the database; the writer beside goes on. What stands at `to` is replaced.
pub(crate) async fn copy_into(connection: &mut SqliteConnection, to: &Path) -> Result<(), String> {
    let name = to.to_str().ok_or("the path is not UTF-8")?;
    match std::fs::remove_file(to) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.to_string()),
        Ok(()) | Err(_) => {}
    }
    // SQLite writes into an empty file as into none, and keeps its mode.
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(to).map_err(|error| error.to_string())?;
    let copied = sqlx::query("VACUUM INTO ?").bind(name).execute(connection).await;
    copied.map_err(|error| {
        let _ = std::fs::remove_file(to);
        error.to_string()
    })?;
    let synced = std::fs::File::open(to).and_then(|file| file.sync_all());
    synced.map_err(|error| error.to_string())
}

/// Compares the schema in the file with the one that this program knows; gives the newer one where it is to be migrated.
pub(crate) async fn check_schema(
    path: &Path,
    connection: &mut SqliteConnection,
    may_migrate: bool,
) -> Result<Option<i64>, OpenError> {
    let failed = |source| not_a_database(path, source);
    let tables: Vec<(String,)> = sqlx::query_as("SELECT name FROM sqlite_master WHERE type = 'table'")
        .fetch_all(&mut *connection)
        .await
        .map_err(failed)?;
    let known = MIGRATOR.iter().map(|migration| migration.version).max().unwrap_or(0);
    if !tables.iter().any(|(name,)| name == "_sqlx_migrations") {
        // An empty file is a journal to be; a database of something else is not.
        return if tables.is_empty() && may_migrate {
            Ok(None)
        } else {
            Err(OpenError::NotAJournal { path: path.to_owned() })
        };
    }
    let (found,): (Option<i64>,) =
        sqlx::query_as("SELECT max(version) FROM _sqlx_migrations").fetch_one(connection).await.map_err(failed)?;
    let found = found.unwrap_or(0);
    if found > known {
        return Err(OpenError::NewerSchema { path: path.to_owned(), found, known });
    }
    if found < known && !may_migrate {
        return Err(OpenError::OlderSchema { path: path.to_owned(), found, known });
    }
    Ok((found < known).then_some(known))
}
