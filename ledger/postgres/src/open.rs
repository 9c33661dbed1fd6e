//! Connecting: one writer at a time, and a schema that this program knows.

use core::time::Duration;
use sqlx::{
    ConnectOptions, Connection, PgConnection,
    migrate::{MigrateError, Migrator},
    postgres::PgConnectOptions,
};
use thiserror::Error;

pub(crate) static MIGRATOR: Migrator = sqlx::migrate!("../../migrations/postgres");

/// How often, and how far apart, a lock is asked for that another writer seems to hold: two seconds in all.
const LOCK_TRIES: u32 = 20;
const LOCK_WAIT: Duration = Duration::from_millis(100);
/// The advisory lock of a journal's writer; a database holds one journal.
const WRITER_LOCK: i64 = 0x7361_7467_7269_6421;
/// PostgreSQL's code for a table that is not there.
const UNDEFINED_TABLE: &str = "42P01";

/// Why a journal was not opened. Nothing was changed in it. Messages never hold the password of the address.
#[derive(Debug, Error)]
pub enum OpenError {
    #[error("not an address of a PostgreSQL database: {0}; expected postgres://USER:PASSWORD@HOST/DATABASE")]
    Address(String),
    #[error("{place}: cannot be reached: {source}")]
    Unreachable { place: String, source: sqlx::Error },
    #[error("{place}: in use by another process; stop it, or read the journal with satgrid-ledger")]
    Locked { place: String },
    #[error("{place}: schema {found} comes from a newer program; this one knows {known}")]
    NewerSchema { place: String, found: i64, known: i64 },
    #[error("{place}: schema {found} is older than this program's {known}; the node migrates it at its next start")]
    OlderSchema { place: String, found: i64, known: i64 },
    #[error("{place}: not a satgrid journal")]
    NotAJournal { place: String },
    #[error("{place}: entry {seq} is damaged: {what}")]
    Damaged { place: String, seq: u64, what: String },
    #[error("{place}: {source}")]
    Postgres { place: String, source: sqlx::Error },
    #[error("{place}: {source}")]
    Migrate { place: String, source: MigrateError },
}

/// Where a database is, without who may enter it.
pub(crate) fn place(options: &PgConnectOptions) -> String {
    let host = options.get_socket().map_or_else(|| options.get_host().to_owned(), |path| path.display().to_string());
    format!("postgres://{host}:{}/{}", options.get_port(), options.get_database().unwrap_or_default())
}

pub(crate) fn options(url: &str) -> Result<PgConnectOptions, OpenError> {
    if !["postgres://", "postgresql://"].iter().any(|scheme| url.starts_with(scheme)) {
        // The text is not repeated: it may hold a password.
        return Err(OpenError::Address("another scheme".into()));
    }
    let options: PgConnectOptions = url.parse().map_err(|error: sqlx::Error| OpenError::Address(error.to_string()))?;
    Ok(options.application_name("satgrid").disable_statement_logging())
}

/// Connects for writing: takes the lock, creates and migrates.
pub(crate) async fn writer(options: &PgConnectOptions) -> Result<PgConnection, OpenError> {
    let place = place(options);
    let postgres = |source| OpenError::Postgres { place: place.clone(), source };
    let mut connection = PgConnection::connect_with(options)
        .await
        .map_err(|source| OpenError::Unreachable { place: place.clone(), source })?;
    // The server lets go of a writer's lock a moment after the writer has closed its connection.
    let mut tries = 0;
    loop {
        let (ours,): (bool,) = sqlx::query_as("SELECT pg_try_advisory_lock($1)")
            .bind(WRITER_LOCK)
            .fetch_one(&mut connection)
            .await
            .map_err(postgres)?;
        if ours {
            break;
        }
        tries += 1;
        if tries > LOCK_TRIES {
            return Err(OpenError::Locked { place });
        }
        tokio::time::sleep(LOCK_WAIT).await;
    }
    sqlx::query("SET synchronous_commit = on").execute(&mut connection).await.map_err(postgres)?;
    check_schema(&place, &mut connection, true).await?;
    MIGRATOR.run(&mut connection).await.map_err(|source| OpenError::Migrate { place, source })?;
    Ok(connection)
}

/// Compares the schema in the database with the one that this program knows.
pub(crate) async fn check_schema(
    place: &str,
    connection: &mut PgConnection,
    may_migrate: bool,
) -> Result<(), OpenError> {
    let known = MIGRATOR.iter().map(|migration| migration.version).max().unwrap_or(0);
    let found: Result<(Option<i64>,), sqlx::Error> =
        sqlx::query_as("SELECT max(version) FROM _sqlx_migrations").fetch_one(connection).await;
    let found = match found {
        Ok((found,)) => found.unwrap_or(0),
        Err(error) if error.as_database_error().and_then(|e| e.code()).as_deref() == Some(UNDEFINED_TABLE) => {
            return if may_migrate { Ok(()) } else { Err(OpenError::NotAJournal { place: place.to_owned() }) };
        }
        Err(source) => return Err(OpenError::Postgres { place: place.to_owned(), source }),
    };
    if found > known {
        return Err(OpenError::NewerSchema { place: place.to_owned(), found, known });
    }
    if found < known && !may_migrate {
        return Err(OpenError::OlderSchema { place: place.to_owned(), found, known });
    }
    Ok(())
}
