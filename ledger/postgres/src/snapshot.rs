//! A journal as it stands at one moment, row by row, beside a writer that goes on: one transaction that reads, repeatably.

use crate::reader::storage;
use satgrid_ledger::{
    journal::{
        JournalError,
        copied::{Copied, CopiedEntry, CopiedNote},
    },
    log::TileId,
};
use satgrid_types::Digest;
use sqlx::{PgPool, Postgres, Transaction};

/// The first query fixes the moment; the server refuses to write.
const BEGIN: &str = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY";
/// Rows in one piece.
const ROWS: i64 = 1_000;

/// Gives every row once, a table after the other.
#[derive(Debug)]
pub struct PostgresSnapshot {
    transaction: Transaction<'static, Postgres>,
    after: After,
}

/// The table that is given next, and the key of its last row that was.
#[derive(Debug)]
enum After {
    Entry(i64),
    Tile(i64, i64),
    Checkpoint(i64),
    Witnessed(Vec<u8>, i64),
    Name(Vec<u8>),
    Everything,
}

fn unsigned(n: i64) -> u64 {
    u64::try_from(n).unwrap_or(0)
}

impl PostgresSnapshot {
    pub(crate) async fn begin(pool: &PgPool) -> Result<PostgresSnapshot, JournalError> {
        let transaction = pool.begin_with(BEGIN).await.map_err(|e| storage(&e))?;
        Ok(PostgresSnapshot { transaction, after: After::Entry(-1) })
    }

    /// The next rows; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<Copied>, JournalError> {
        loop {
            let (given, after) = match &self.after {
                After::Entry(seq) => self.entries(*seq).await?,
                After::Tile(level, idx) => self.tiles(*level, *idx).await?,
                After::Checkpoint(size) => self.checkpoints(*size).await?,
                After::Witnessed(node, size) => self.witnessed(node.clone(), *size).await?,
                After::Name(hash) => self.names(hash.clone()).await?,
                After::Everything => return Ok(None),
            };
            self.after = after;
            if given.is_some() {
                return Ok(given);
            }
        }
    }

    async fn entries(&mut self, after: i64) -> Result<(Option<Copied>, After), JournalError> {
        type Row = (i64, i64, Vec<u8>, Option<Vec<u8>>, Option<Vec<u8>>);
        let rows: Vec<Row> =
            sqlx::query_as("SELECT seq, at, bytes, opening, leaf FROM entries WHERE seq > $1 ORDER BY seq LIMIT $2")
                .bind(after)
                .bind(ROWS)
                .fetch_all(&mut *self.transaction)
                .await
                .map_err(|e| storage(&e))?;
        let Some(last) = rows.last().map(|row| row.0) else { return Ok((None, After::Tile(-1, -1))) };
        let entry = |(seq, at, bytes, opening, leaf)| CopiedEntry {
            seq: unsigned(seq),
            at: unsigned(at),
            bytes,
            opening,
            leaf,
        };
        Ok((Some(Copied::Entries(rows.into_iter().map(entry).collect())), After::Entry(last)))
    }

    async fn tiles(&mut self, level: i64, idx: i64) -> Result<(Option<Copied>, After), JournalError> {
        let rows: Vec<(i64, i64, Vec<u8>)> = sqlx::query_as(
            "SELECT level, idx, hashes FROM tiles WHERE (level, idx) > ($1, $2) ORDER BY level, idx LIMIT $3",
        )
        .bind(level)
        .bind(idx)
        .bind(ROWS)
        .fetch_all(&mut *self.transaction)
        .await
        .map_err(|e| storage(&e))?;
        let Some(last) = rows.last().map(|row| After::Tile(row.0, row.1)) else {
            return Ok((None, After::Checkpoint(-1)));
        };
        let tile = |(level, index, hashes)| {
            let level = u8::try_from(level).map_err(|_| damaged(format!("a tile of level {level}")))?;
            Ok((TileId { level, index: unsigned(index) }, hashes))
        };
        Ok((Some(Copied::Tiles(rows.into_iter().map(tile).collect::<Result<_, _>>()?)), last))
    }

    async fn checkpoints(&mut self, after: i64) -> Result<(Option<Copied>, After), JournalError> {
        let rows: Vec<(i64, String)> =
            sqlx::query_as("SELECT size, note FROM checkpoints WHERE size > $1 ORDER BY size LIMIT $2")
                .bind(after)
                .bind(ROWS)
                .fetch_all(&mut *self.transaction)
                .await
                .map_err(|e| storage(&e))?;
        let Some(last) = rows.last().map(|row| row.0) else { return Ok((None, After::Witnessed(Vec::new(), -1))) };
        let notes = rows.into_iter().map(|(size, note)| (unsigned(size), note));
        Ok((Some(Copied::Checkpoints(notes.collect())), After::Checkpoint(last)))
    }

    async fn witnessed(&mut self, node: Vec<u8>, size: i64) -> Result<(Option<Copied>, After), JournalError> {
        let rows: Vec<(Vec<u8>, i64, String, i64)> = sqlx::query_as(
            "SELECT node, size, note, heard_at FROM witnessed WHERE (node, size) > ($1, $2) ORDER BY node, size LIMIT $3",
        )
        .bind(node)
        .bind(size)
        .bind(ROWS)
        .fetch_all(&mut *self.transaction)
        .await
        .map_err(|e| storage(&e))?;
        let Some(last) = rows.last().map(|row| After::Witnessed(row.0.clone(), row.1)) else {
            return Ok((None, After::Name(Vec::new())));
        };
        let note = |(node, size, note, heard_at)| CopiedNote {
            node,
            size: unsigned(size),
            note,
            heard_at: unsigned(heard_at),
        };
        Ok((Some(Copied::Witnessed(rows.into_iter().map(note).collect())), last))
    }

    async fn names(&mut self, after: Vec<u8>) -> Result<(Option<Copied>, After), JournalError> {
        let rows: Vec<(Vec<u8>,)> = sqlx::query_as("SELECT hash FROM named WHERE hash > $1 ORDER BY hash LIMIT $2")
            .bind(after)
            .bind(ROWS)
            .fetch_all(&mut *self.transaction)
            .await
            .map_err(|e| storage(&e))?;
        let Some(last) = rows.last().map(|row| row.0.clone()) else { return Ok((None, After::Everything)) };
        let (upto,): (i64,) = sqlx::query_as("SELECT len FROM named_upto WHERE one = 1")
            .fetch_one(&mut *self.transaction)
            .await
            .map_err(|e| storage(&e))?;
        let name =
            |(hash,): (Vec<u8>,)| hash.try_into().map(Digest).map_err(|_| damaged("a name that is no hash".to_owned()));
        let names = rows.into_iter().map(name).collect::<Result<_, _>>()?;
        Ok((Some(Copied::Names { names, upto: unsigned(upto) }), After::Name(last)))
    }
}

fn damaged(what: String) -> JournalError {
    JournalError::Damaged { seq: 0, what }
}
