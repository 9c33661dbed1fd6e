//! Reading: entries, checkpoints and proofs. Works beside a running node; never blocks its writer.

use crate::open::{OpenError, check_schema, copy_into, read_options};
use satgrid_ledger::{
    entry::{Entry, Head},
    journal::{JournalError, JournalFuture, JournalReader, MAX_READ, stored},
    log::{SignedCheckpoint, TileCache, TileId},
};
use satgrid_types::{Digest, NodeKey};
use sqlx::{
    Row, SqlitePool,
    sqlite::{SqlitePoolOptions, SqliteRow},
};
use std::path::Path;

/// Connections that read at the same time.
const CONNECTIONS: u32 = 4;
/// Tiles that one query reads: a proof needs two a level.
const TILES_IN_A_QUERY: usize = 16;
/// Hashes that one query looks for.
const NAMES_IN_A_QUERY: usize = 256;

/// A journal that is only read. Clones share their connections.
#[derive(Debug, Clone)]
pub struct SqliteReader {
    pool: SqlitePool,
}

pub(crate) fn storage(error: &sqlx::Error) -> JournalError {
    JournalError::Storage(error.to_string())
}

/// What the writer's connection says.
pub(crate) fn writing_failed(error: &rusqlite::Error) -> JournalError {
    match error.sqlite_error_code() {
        Some(rusqlite::ErrorCode::DiskFull) => JournalError::Full,
        Some(_) | None => JournalError::Storage(error.to_string()),
    }
}

/// A row number: SQLite's integers are signed, and ours stay below 2^63.
pub(crate) fn row_number(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

impl SqliteReader {
    /// Opens an existing journal for reading.
    pub async fn open(path: &Path) -> Result<SqliteReader, OpenError> {
        if !path.exists() {
            return Err(OpenError::Missing { path: path.to_owned() });
        }
        let reader = SqliteReader::connect(path);
        let sqlite = |source| OpenError::Sqlite { path: path.to_owned(), source };
        let mut connection = reader.pool.acquire().await.map_err(sqlite)?;
        check_schema(path, &mut connection, false).await?;
        drop(connection);
        Ok(reader)
    }

    pub(crate) fn connect(path: &Path) -> SqliteReader {
        // A connection to a file does not break while it rests; asking it first is a trip to its thread for nothing.
        let pool = SqlitePoolOptions::new().max_connections(CONNECTIONS).test_before_acquire(false);
        SqliteReader { pool: pool.connect_lazy_with(read_options(path)) }
    }

    pub(crate) async fn close(&self) {
        self.pool.close().await;
    }

    /// Entries from number `from` on, at most `limit` and at most [`MAX_READ`].
    pub async fn read(&self, from: u64, limit: usize) -> Result<Vec<Entry>, JournalError> {
        let limit = i64::try_from(limit.min(MAX_READ)).unwrap_or(0);
        let rows = sqlx::query("SELECT seq, bytes, opening FROM entries WHERE seq >= ? ORDER BY seq LIMIT ?")
            .bind(row_number(from))
            .bind(limit)
            .fetch_all(&self.pool)
            .await
            .map_err(|e| storage(&e))?;
        rows.iter().map(entry_of).collect()
    }

    /// The head, from the last entry that is durable.
    pub async fn head(&self) -> Result<Head, JournalError> {
        let row = sqlx::query("SELECT seq, bytes, opening FROM entries ORDER BY seq DESC LIMIT 1")
            .fetch_optional(&self.pool)
            .await
            .map_err(|e| storage(&e))?;
        row.as_ref().map_or(Ok(Head::EMPTY), |row| entry_of(row).map(|entry| entry.head()))
    }

    /// The newest checkpoint that covers at most `size` entries.
    pub async fn checkpoint(&self, size: u64) -> Result<Option<SignedCheckpoint>, JournalError> {
        let row: Option<(i64, String)> =
            sqlx::query_as("SELECT size, note FROM checkpoints WHERE size <= ? ORDER BY size DESC LIMIT 1")
                .bind(row_number(size))
                .fetch_optional(&self.pool)
                .await
                .map_err(|e| storage(&e))?;
        let Some((size, note)) = row else { return Ok(None) };
        let damaged = |what: String| JournalError::Damaged { seq: u64::try_from(size).unwrap_or(0), what };
        SignedCheckpoint::parse(&note).map(Some).map_err(|e| damaged(format!("checkpoint: {e}")))
    }

    /// Numbers of entries in `[from, to)` whose bodies were pruned, at most [`MAX_READ`]: they read as entries without
    /// evidence, and their bytes are no leaves.
    pub async fn pruned(&self, from: u64, to: u64) -> Result<Vec<u64>, JournalError> {
        let rows: Vec<(i64,)> = sqlx::query_as(
            "SELECT seq FROM entries WHERE leaf IS NOT NULL AND seq >= ? AND seq < ? ORDER BY seq LIMIT ?",
        )
        .bind(row_number(from))
        .bind(row_number(to))
        .bind(i64::try_from(MAX_READ).unwrap_or(i64::MAX))
        .fetch_all(&self.pool)
        .await
        .map_err(|e| storage(&e))?;
        Ok(rows.into_iter().filter_map(|(seq,)| u64::try_from(seq).ok()).collect())
    }

    /// Those of these payment hashes and transaction ids that some entry names.
    pub async fn named(&self, hashes: &[Digest]) -> Result<Vec<Digest>, JournalError> {
        let mut found = Vec::new();
        let mut connection = self.pool.acquire().await.map_err(|e| storage(&e))?;
        for piece in hashes.chunks(NAMES_IN_A_QUERY) {
            let marks = vec!["?"; piece.len()].join(",");
            let statement = format!("SELECT hash FROM named WHERE hash IN ({marks})");
            let mut query = sqlx::query_as(&statement);
            for hash in piece {
                query = query.bind(&hash.0[..]);
            }
            let rows: Vec<(Vec<u8>,)> = query.fetch_all(&mut *connection).await.map_err(|e| storage(&e))?;
            found.extend(rows.into_iter().filter_map(|(hash,)| hash.try_into().ok().map(Digest)));
        }
        Ok(found)
    }

    /// Checkpoints of another node's log as they were heard, newest first.
    pub async fn witnessed(&self, node: &NodeKey) -> Result<Vec<SignedCheckpoint>, JournalError> {
        let rows: Vec<(String,)> = sqlx::query_as("SELECT note FROM witnessed WHERE node = ? ORDER BY size DESC")
            .bind(&node.0[..])
            .fetch_all(&self.pool)
            .await
            .map_err(|e| storage(&e))?;
        let damaged = |what: String| JournalError::Damaged { seq: 0, what };
        rows.iter()
            .map(|(note,)| SignedCheckpoint::parse(note).map_err(|e| damaged(format!("a witnessed checkpoint: {e}"))))
            .collect()
    }

    /// Writes a consistent copy of the whole journal as it is now. Its writer goes on meanwhile.
    pub async fn snapshot(&self, to: &Path) -> Result<(), JournalError> {
        let mut connection = self.pool.acquire().await.map_err(|e| storage(&e))?;
        copy_into(&mut connection, to).await.map_err(JournalError::Storage)
    }

    pub(crate) async fn tiles(&self, ids: &[TileId]) -> Result<TileCache, JournalError> {
        let mut cache = TileCache::default();
        let mut connection = self.pool.acquire().await.map_err(|e| storage(&e))?;
        // Each query is a trip to the connection's thread and back, which takes longer than reading a tile.
        for piece in ids.chunks(TILES_IN_A_QUERY) {
            let statement = vec!["SELECT level, idx, hashes FROM tiles WHERE level = ? AND idx = ?"; piece.len()];
            let statement = statement.join(" UNION ALL ");
            let mut query = sqlx::query(&statement);
            for id in piece {
                query = query.bind(i64::from(id.level)).bind(row_number(id.index));
            }
            for row in query.fetch_all(&mut *connection).await.map_err(|e| storage(&e))? {
                let (level, index) = (u8::try_from(row.get::<i64, _>(0)), u64::try_from(row.get::<i64, _>(1)));
                let (Ok(level), Ok(index)) = (level, index) else { continue };
                cache.insert(TileId { level, index }, stored::hashes_of(row.get(2)));
            }
        }
        Ok(cache)
    }
}

impl JournalReader for SqliteReader {
    fn read(&self, from: u64, limit: usize) -> JournalFuture<'_, Vec<Entry>> {
        Box::pin(SqliteReader::read(self, from, limit))
    }
    fn head(&self) -> JournalFuture<'_, Head> {
        Box::pin(SqliteReader::head(self))
    }
    fn checkpoint(&self, size: u64) -> JournalFuture<'_, Option<SignedCheckpoint>> {
        Box::pin(SqliteReader::checkpoint(self, size))
    }
    fn tiles(&self, ids: Vec<TileId>) -> JournalFuture<'_, TileCache> {
        Box::pin(async move { SqliteReader::tiles(self, &ids).await })
    }
    fn pruned(&self, from: u64, to: u64) -> JournalFuture<'_, Vec<u64>> {
        Box::pin(SqliteReader::pruned(self, from, to))
    }
    fn named(&self, hashes: Vec<Digest>) -> JournalFuture<'_, Vec<Digest>> {
        Box::pin(async move { SqliteReader::named(self, &hashes).await })
    }
    fn witnessed(&self, node: NodeKey) -> JournalFuture<'_, Vec<SignedCheckpoint>> {
        Box::pin(async move { SqliteReader::witnessed(self, &node).await })
    }
}

/// An entry from its row: number, bytes, opening.
pub(crate) fn entry_at(row: &rusqlite::Row<'_>) -> Result<Entry, JournalError> {
    let read = |e: rusqlite::Error| writing_failed(&e);
    let seq = u64::try_from(row.get::<_, i64>(0).map_err(read)?).unwrap_or(0);
    let bytes = row.get_ref(1).map_err(read)?.as_blob().map_err(|e| read(e.into()))?;
    let opening = row.get_ref(2).map_err(read)?.as_blob_or_null().map_err(|e| read(e.into()))?;
    stored::entry_of(seq, bytes, opening)
}

/// The same, of a reading connection.
fn entry_of(row: &SqliteRow) -> Result<Entry, JournalError> {
    let seq = u64::try_from(row.get::<i64, _>(0)).unwrap_or(0);
    stored::entry_of(seq, row.get(1), row.get(2))
}
