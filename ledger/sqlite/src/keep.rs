//! What is kept beside the entries, and what is let go: checkpoints that others signed, what entries name, pruned bodies.

use crate::reader::{entry_of, row_number, storage};
use satgrid_ledger::{
    entry::Entry,
    journal::{
        JournalError, MAX_READ, Witness, named_by,
        stored::{KEPT_PER_NODE, NAMES_LAG},
    },
    log::{SignedCheckpoint, leaf_hash},
};
use satgrid_types::{Digest, UnixMs};
use sqlx::{Connection, QueryBuilder, Row, Sqlite, SqliteConnection};

/// Bodies pruned in one transaction.
const PRUNED_AT_ONCE: usize = 1_000;

pub(crate) async fn witness(
    connection: &mut SqliteConnection,
    heard: &SignedCheckpoint,
    at: UnixMs,
) -> Result<Witness, JournalError> {
    let node = heard.node.0;
    let below: Option<(String,)> =
        sqlx::query_as("SELECT note FROM witnessed WHERE node = ? AND size <= ? ORDER BY size DESC LIMIT 1")
            .bind(&node[..])
            .bind(row_number(heard.size))
            .fetch_optional(&mut *connection)
            .await
            .map_err(|e| storage(&e))?;
    let below = below.map(|(note,)| {
        SignedCheckpoint::parse(&note).map_err(|e| JournalError::Damaged { seq: 0, what: e.to_string() })
    });
    let shows = Witness::of(heard, below.transpose()?);
    if !shows.is_new() {
        return Ok(shows);
    }
    sqlx::query("INSERT INTO witnessed (node, size, note, heard_at) VALUES (?, ?, ?, ?)")
        .bind(&node[..])
        .bind(row_number(heard.size))
        .bind(heard.note())
        .bind(row_number(at.0))
        .execute(&mut *connection)
        .await
        .map_err(|e| storage(&e))?;
    sqlx::query(
        "DELETE FROM witnessed WHERE node = ?1 AND size NOT IN (SELECT size FROM witnessed WHERE node = ?1 ORDER BY size DESC LIMIT ?2)",
    )
    .bind(&node[..])
    .bind(KEPT_PER_NODE)
    .execute(connection)
    .await
    .map_err(|e| storage(&e))?;
    Ok(shows)
}

/// How many entries the index of what they name has.
pub(crate) async fn named_upto(connection: &mut SqliteConnection) -> Result<u64, JournalError> {
    let (len,): (i64,) = sqlx::query_as("SELECT len FROM named_upto WHERE one = 1")
        .fetch_one(connection)
        .await
        .map_err(|e| storage(&e))?;
    Ok(u64::try_from(len).unwrap_or(0))
}

/// Statements that take names into the index, which then has the first `len` entries. Names go as one value, so that any
/// number of them is one statement.
pub(crate) fn push_names(script: &mut QueryBuilder<'_, Sqlite>, names: &[Digest], len: u64) {
    if !names.is_empty() {
        let all: Vec<u8> = names.iter().flat_map(|name| name.0).collect();
        script.push("WITH RECURSIVE given(names) AS (SELECT ").push_bind(all).push(
            "), at(byte) AS (SELECT 1 UNION ALL SELECT byte + 32 FROM at, given WHERE byte + 32 < length(names)) \
             INSERT OR IGNORE INTO named (hash) SELECT substr(names, byte, 32) FROM at, given;",
        );
    }
    script.push("UPDATE named_upto SET len = ").push_bind(row_number(len)).push(" WHERE one = 1;");
}

/// Entries that the index has not: those of before there was one, or the last few without names.
pub(crate) async fn name_the_rest(connection: &mut SqliteConnection, len: u64) -> Result<u64, JournalError> {
    let mut upto = named_upto(connection).await?;
    if len.saturating_sub(upto) > NAMES_LAG {
        tracing::info!(entries = len.saturating_sub(upto), "what the ledger's entries name is indexed once");
    }
    while upto < len {
        let rows = sqlx::query("SELECT seq, bytes, opening FROM entries WHERE seq >= ? ORDER BY seq LIMIT ?")
            .bind(row_number(upto))
            .bind(i64::try_from(MAX_READ).unwrap_or(i64::MAX))
            .fetch_all(&mut *connection)
            .await
            .map_err(|e| storage(&e))?;
        let entries = rows.iter().map(entry_of).collect::<Result<Vec<Entry>, _>>()?;
        let Some(last) = entries.last() else { break };
        let (names, next) = (entries.iter().filter_map(named_by).collect::<Vec<_>>(), last.seq.saturating_add(1));
        let mut transaction = connection.begin().await.map_err(|e| storage(&e))?;
        let mut script = QueryBuilder::new("");
        push_names(&mut script, &names, next);
        script.build().persistent(false).execute(&mut *transaction).await.map_err(|e| storage(&e))?;
        transaction.commit().await.map_err(|e| storage(&e))?;
        upto = next;
    }
    Ok(upto)
}

/// Replaces bodies by the same entries without evidence, and keeps their leaves.
pub(crate) async fn prune(connection: &mut SqliteConnection, bodies: &[u64], len: u64) -> Result<u64, JournalError> {
    let mut pruned = 0;
    for piece in bodies.chunks(PRUNED_AT_ONCE) {
        let mut transaction = connection.begin().await.map_err(|e| storage(&e))?;
        for seq in piece.iter().filter(|seq| seq.saturating_add(1) < len) {
            let row = sqlx::query("SELECT seq, bytes, opening FROM entries WHERE seq = ? AND leaf IS NULL")
                .bind(row_number(*seq))
                .fetch_optional(&mut *transaction)
                .await
                .map_err(|e| storage(&e))?;
            let Some(row) = row else { continue };
            let leaf = leaf_hash(row.get::<&[u8], _>(1));
            let stub = Entry { evidence: None, ..entry_of(&row)? };
            let done = sqlx::query("UPDATE entries SET bytes = ?, opening = NULL, leaf = ? WHERE seq = ?")
                .bind(stub.bytes())
                .bind(&leaf.0[..])
                .bind(row_number(*seq))
                .execute(&mut *transaction)
                .await
                .map_err(|e| storage(&e))?;
            pruned += done.rows_affected();
        }
        transaction.commit().await.map_err(|e| storage(&e))?;
    }
    if pruned > 0 {
        // Gives the room back to the disk.
        sqlx::query("VACUUM").execute(connection).await.map_err(|e| storage(&e))?;
    }
    Ok(pruned)
}
