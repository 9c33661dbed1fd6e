//! Reading: entries, checkpoints and tiles. Works beside a running node; never blocks its writer.

use crate::{
    open::{self, OpenError, check_schema},
    snapshot::PostgresSnapshot,
};
use satgrid_ledger::{
    entry::{Entry, Head},
    journal::{JournalError, JournalFuture, JournalReader, MAX_READ, stored},
    log::{SignedCheckpoint, TileCache, TileId},
};
use satgrid_types::{Digest, NodeKey};
use sqlx::{
    Connection, PgConnection, PgPool, Row,
    postgres::{PgConnectOptions, PgPoolOptions, PgRow},
};

/// Connections that read at the same time.
const CONNECTIONS: u32 = 4;
/// PostgreSQL's class of errors for a full disk, memory or connection table.
const OUT_OF_ROOM: &str = "53100";

/// A journal that is only read. Clones share their connections.
#[derive(Debug, Clone)]
pub struct PostgresReader {
    pool: PgPool,
}

pub(crate) fn storage(error: &sqlx::Error) -> JournalError {
    if error.as_database_error().and_then(|e| e.code()).as_deref() == Some(OUT_OF_ROOM) {
        JournalError::Full
    } else {
        JournalError::Storage(error.to_string())
    }
}

/// A row number: PostgreSQL's integers are signed, and ours stay below 2^63.
pub(crate) fn row_number(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

impl PostgresReader {
    /// Connects to an existing journal for reading.
    pub async fn open(url: &str) -> Result<PostgresReader, OpenError> {
        let options = open::options(url)?;
        let place = open::place(&options);
        // Not out of the pool, which goes on trying for half a minute where nobody listens.
        let connected = PgConnection::connect_with(&options).await;
        let mut connection = connected.map_err(|source| OpenError::Unreachable { place: place.clone(), source })?;
        check_schema(&place, &mut connection, false).await?;
        let closed = connection.close().await;
        closed.map_err(|source| OpenError::Postgres { place, source })?;
        Ok(PostgresReader::connect(options))
    }

    pub(crate) fn connect(options: PgConnectOptions) -> PostgresReader {
        // A reader that could write would be a mistake in this program: the server refuses it.
        let options = options.options([("default_transaction_read_only", "on")]);
        PostgresReader { pool: PgPoolOptions::new().max_connections(CONNECTIONS).connect_lazy_with(options) }
    }

    /// Every row as it stands now, for a copy; the node beside goes on.
    pub async fn snapshot(&self) -> Result<PostgresSnapshot, JournalError> {
        PostgresSnapshot::begin(&self.pool).await
    }

    pub(crate) async fn close(&self) {
        self.pool.close().await;
    }

    async fn entries(&self, from: u64, limit: usize) -> Result<Vec<Entry>, JournalError> {
        let limit = i64::try_from(limit.min(MAX_READ)).unwrap_or(0);
        let rows = sqlx::query("SELECT seq, bytes, opening FROM entries WHERE seq >= $1 ORDER BY seq LIMIT $2")
            .bind(row_number(from))
            .bind(limit)
            .fetch_all(&self.pool)
            .await
            .map_err(|e| storage(&e))?;
        rows.iter().map(entry_of).collect()
    }

    async fn last(&self) -> Result<Head, JournalError> {
        let row = sqlx::query("SELECT seq, bytes, opening FROM entries ORDER BY seq DESC LIMIT 1")
            .fetch_optional(&self.pool)
            .await
            .map_err(|e| storage(&e))?;
        row.as_ref().map_or(Ok(Head::EMPTY), |row| entry_of(row).map(|entry| entry.head()))
    }

    async fn newest_checkpoint(&self, size: u64) -> Result<Option<SignedCheckpoint>, JournalError> {
        let row: Option<(String,)> =
            sqlx::query_as("SELECT note FROM checkpoints WHERE size <= $1 ORDER BY size DESC LIMIT 1")
                .bind(row_number(size))
                .fetch_optional(&self.pool)
                .await
                .map_err(|e| storage(&e))?;
        row.map(|(note,)| parse(&note)).transpose()
    }

    async fn stored(&self, ids: &[TileId]) -> Result<TileCache, JournalError> {
        let (levels, indices): (Vec<i64>, Vec<i64>) =
            ids.iter().map(|id| (i64::from(id.level), row_number(id.index))).unzip();
        let rows: Vec<(i64, i64, Vec<u8>)> = sqlx::query_as(
            "SELECT level, idx, hashes FROM tiles WHERE (level, idx) IN (SELECT * FROM UNNEST($1::bigint[], $2::bigint[]))",
        )
        .bind(levels)
        .bind(indices)
        .fetch_all(&self.pool)
        .await
        .map_err(|e| storage(&e))?;
        let mut cache = TileCache::default();
        for (level, index, bytes) in rows {
            if let (Ok(level), Ok(index)) = (u8::try_from(level), u64::try_from(index)) {
                cache.insert(TileId { level, index }, stored::hashes_of(&bytes));
            }
        }
        Ok(cache)
    }

    async fn gone(&self, from: u64, to: u64) -> Result<Vec<u64>, JournalError> {
        let rows: Vec<(i64,)> = sqlx::query_as(
            "SELECT seq FROM entries WHERE leaf IS NOT NULL AND seq >= $1 AND seq < $2 ORDER BY seq LIMIT $3",
        )
        .bind(row_number(from))
        .bind(row_number(to))
        .bind(i64::try_from(MAX_READ).unwrap_or(i64::MAX))
        .fetch_all(&self.pool)
        .await
        .map_err(|e| storage(&e))?;
        Ok(rows.into_iter().filter_map(|(seq,)| u64::try_from(seq).ok()).collect())
    }

    async fn names(&self, hashes: &[Digest]) -> Result<Vec<Digest>, JournalError> {
        let hashes: Vec<&[u8]> = hashes.iter().map(|hash| &hash.0[..]).collect();
        let rows: Vec<(Vec<u8>,)> = sqlx::query_as("SELECT hash FROM named WHERE hash = ANY($1::bytea[])")
            .bind(hashes)
            .fetch_all(&self.pool)
            .await
            .map_err(|e| storage(&e))?;
        Ok(rows.into_iter().filter_map(|(hash,)| hash.try_into().ok().map(Digest)).collect())
    }

    async fn heard(&self, node: NodeKey) -> Result<Vec<SignedCheckpoint>, JournalError> {
        let rows: Vec<(String,)> = sqlx::query_as("SELECT note FROM witnessed WHERE node = $1 ORDER BY size DESC")
            .bind(&node.0[..])
            .fetch_all(&self.pool)
            .await
            .map_err(|e| storage(&e))?;
        rows.iter().map(|(note,)| parse(note)).collect()
    }
}

impl JournalReader for PostgresReader {
    fn read(&self, from: u64, limit: usize) -> JournalFuture<'_, Vec<Entry>> {
        Box::pin(self.entries(from, limit))
    }
    fn head(&self) -> JournalFuture<'_, Head> {
        Box::pin(self.last())
    }
    fn checkpoint(&self, size: u64) -> JournalFuture<'_, Option<SignedCheckpoint>> {
        Box::pin(self.newest_checkpoint(size))
    }
    fn tiles(&self, ids: Vec<TileId>) -> JournalFuture<'_, TileCache> {
        Box::pin(async move { self.stored(&ids).await })
    }
    fn pruned(&self, from: u64, to: u64) -> JournalFuture<'_, Vec<u64>> {
        Box::pin(self.gone(from, to))
    }
    fn named(&self, hashes: Vec<Digest>) -> JournalFuture<'_, Vec<Digest>> {
        Box::pin(async move { self.names(&hashes).await })
    }
    fn witnessed(&self, node: NodeKey) -> JournalFuture<'_, Vec<SignedCheckpoint>> {
        Box::pin(self.heard(node))
    }
}

fn parse(note: &str) -> Result<SignedCheckpoint, JournalError> {
    SignedCheckpoint::parse(note).map_err(|e| JournalError::Damaged { seq: 0, what: format!("checkpoint: {e}") })
}

/// An entry from its row: number, bytes, opening.
pub(crate) fn entry_of(row: &PgRow) -> Result<Entry, JournalError> {
    let seq = u64::try_from(row.get::<i64, _>(0)).unwrap_or(0);
    stored::entry_of(seq, row.get(1), row.get(2))
}
