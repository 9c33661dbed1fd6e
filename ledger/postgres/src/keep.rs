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
use sqlx::{Connection, Executor, PgConnection, Row};

/// Bodies pruned in one transaction.
const PRUNED_AT_ONCE: usize = 1_000;

pub(crate) async fn witness(
    connection: &mut PgConnection,
    heard: &SignedCheckpoint,
    at: UnixMs,
) -> Result<Witness, JournalError> {
    let node = heard.node.0;
    let below: Option<(String,)> =
        sqlx::query_as("SELECT note FROM witnessed WHERE node = $1 AND size <= $2 ORDER BY size DESC LIMIT 1")
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
    sqlx::query("INSERT INTO witnessed (node, size, note, heard_at) VALUES ($1, $2, $3, $4)")
        .bind(&node[..])
        .bind(row_number(heard.size))
        .bind(heard.note())
        .bind(row_number(at.0))
        .execute(&mut *connection)
        .await
        .map_err(|e| storage(&e))?;
    sqlx::query(
        "DELETE FROM witnessed WHERE node = $1 AND size NOT IN (SELECT size FROM witnessed WHERE node = $1 ORDER BY size DESC LIMIT $2)",
    )
    .bind(&node[..])
    .bind(KEPT_PER_NODE)
    .execute(connection)
    .await
    .map_err(|e| storage(&e))?;
    Ok(shows)
}

/// How many entries the index of what they name has.
async fn named_upto(connection: &mut PgConnection) -> Result<u64, JournalError> {
    let (len,): (i64,) = sqlx::query_as("SELECT len FROM named_upto WHERE one = 1")
        .fetch_one(connection)
        .await
        .map_err(|e| storage(&e))?;
    Ok(u64::try_from(len).unwrap_or(0))
}

/// Takes names into the index, which then has the first `len` entries.
pub(crate) async fn name(connection: &mut PgConnection, names: &[Digest], len: u64) -> Result<(), JournalError> {
    let names: Vec<&[u8]> = names.iter().map(|name| &name.0[..]).collect();
    sqlx::query("INSERT INTO named (hash) SELECT * FROM UNNEST($1::bytea[]) ON CONFLICT DO NOTHING")
        .bind(names)
        .execute(&mut *connection)
        .await
        .map_err(|e| storage(&e))?;
    sqlx::query("UPDATE named_upto SET len = $1 WHERE one = 1")
        .bind(row_number(len))
        .execute(connection)
        .await
        .map_err(|e| storage(&e))?;
    Ok(())
}

/// Entries that the index has not: those of before there was one, or the last few without names.
pub(crate) async fn name_the_rest(connection: &mut PgConnection, len: u64) -> Result<u64, JournalError> {
    let mut upto = named_upto(connection).await?;
    if len.saturating_sub(upto) > NAMES_LAG {
        tracing::info!(entries = len.saturating_sub(upto), "what the ledger's entries name is indexed once");
    }
    while upto < len {
        let rows = sqlx::query("SELECT seq, bytes, opening FROM entries WHERE seq >= $1 ORDER BY seq LIMIT $2")
            .bind(row_number(upto))
            .bind(i64::try_from(MAX_READ).unwrap_or(i64::MAX))
            .fetch_all(&mut *connection)
            .await
            .map_err(|e| storage(&e))?;
        let entries = rows.iter().map(entry_of).collect::<Result<Vec<Entry>, _>>()?;
        let Some(last) = entries.last() else { break };
        let (names, next) = (entries.iter().filter_map(named_by).collect::<Vec<_>>(), last.seq.saturating_add(1));
        let mut transaction = connection.begin().await.map_err(|e| storage(&e))?;
        name(&mut transaction, &names, next).await?;
        transaction.commit().await.map_err(|e| storage(&e))?;
        upto = next;
    }
    Ok(upto)
}

/// Replaces bodies by the same entries without evidence, and keeps their leaves.
pub(crate) async fn prune(connection: &mut PgConnection, bodies: &[u64], len: u64) -> Result<u64, JournalError> {
    let mut pruned: u64 = 0;
    for piece in bodies.chunks(PRUNED_AT_ONCE) {
        let asked: Vec<i64> =
            piece.iter().filter(|seq| seq.saturating_add(1) < len).map(|seq| row_number(*seq)).collect();
        // Dropped without a commit, the transaction is rolled back.
        let mut transaction = connection.begin().await.map_err(|e| storage(&e))?;
        let rows = sqlx::query("SELECT seq, bytes, opening FROM entries WHERE seq = ANY($1) AND leaf IS NULL")
            .bind(asked)
            .fetch_all(&mut *transaction)
            .await
            .map_err(|e| storage(&e))?;
        let (mut seqs, mut stubs, mut leaves) = (Vec::new(), Vec::new(), Vec::new());
        for row in &rows {
            let stub = Entry { evidence: None, ..entry_of(row)? };
            seqs.push(row_number(stub.seq));
            leaves.push(leaf_hash(row.get(1)).0.to_vec());
            stubs.push(stub.bytes());
        }
        let done = sqlx::query(
            "UPDATE entries SET bytes = stub.bytes, opening = NULL, leaf = stub.leaf FROM UNNEST($1::bigint[], $2::bytea[], $3::bytea[]) AS stub (seq, bytes, leaf) WHERE entries.seq = stub.seq",
        )
        .bind(seqs)
        .bind(stubs)
        .bind(leaves)
        .execute(&mut *transaction)
        .await
        .map_err(|e| storage(&e))?;
        transaction.commit().await.map_err(|e| storage(&e))?;
        pruned = pruned.saturating_add(done.rows_affected());
    }
    if pruned > 0
        && let Err(error) = connection.execute("VACUUM entries").await
    {
        // The server's own cleaning comes sooner or later; the bodies are gone either way.
        tracing::warn!(%error, "the room of what was pruned is not free yet");
    }
    Ok(pruned)
}
