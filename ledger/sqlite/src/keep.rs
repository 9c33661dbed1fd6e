//! What is kept beside the entries, and what is let go: checkpoints that others signed, what entries name, pruned bodies.

use crate::reader::{entry_at, row_number, writing_failed};
use rusqlite::{Connection, OptionalExtension};
use satgrid_ledger::{
    entry::Entry,
    journal::{
        JournalError, MAX_READ, Witness, named_by,
        stored::{KEPT_PER_NODE, NAMES_LAG},
    },
    log::{SignedCheckpoint, leaf_hash},
};
use satgrid_types::{Digest, UnixMs};

/// Bodies pruned in one transaction.
const PRUNED_AT_ONCE: usize = 1_000;

pub(crate) fn witness(
    connection: &mut Connection,
    heard: &SignedCheckpoint,
    at: UnixMs,
) -> Result<Witness, JournalError> {
    let failed = |e: rusqlite::Error| writing_failed(&e);
    let node = heard.node.0;
    let transaction = connection.transaction().map_err(failed)?;
    let below: Option<String> = transaction
        .query_row(
            "SELECT note FROM witnessed WHERE node = ? AND size <= ? ORDER BY size DESC LIMIT 1",
            (node, row_number(heard.size)),
            |row| row.get(0),
        )
        .optional()
        .map_err(failed)?;
    let below = below
        .map(|note| SignedCheckpoint::parse(&note).map_err(|e| JournalError::Damaged { seq: 0, what: e.to_string() }));
    let shows = Witness::of(heard, below.transpose()?);
    if !shows.is_new() {
        return Ok(shows);
    }
    transaction
        .execute(
            "INSERT INTO witnessed (node, size, note, heard_at) VALUES (?, ?, ?, ?)",
            (node, row_number(heard.size), heard.note(), row_number(at.0)),
        )
        .map_err(failed)?;
    transaction
        .execute(
            "DELETE FROM witnessed WHERE node = ?1 AND size NOT IN \
             (SELECT size FROM witnessed WHERE node = ?1 ORDER BY size DESC LIMIT ?2)",
            (node, KEPT_PER_NODE),
        )
        .map_err(failed)?;
    transaction.commit().map_err(failed)?;
    Ok(shows)
}

/// How many entries the index of what they name has.
fn named_upto(connection: &Connection) -> Result<u64, JournalError> {
    let len = connection.query_row("SELECT len FROM named_upto WHERE one = 1", [], |row| row.get::<_, i64>(0));
    Ok(u64::try_from(len.map_err(|e| writing_failed(&e))?).unwrap_or(0))
}

/// Takes names into the index, which then has the first `len` entries. Within a transaction of the caller's.
pub(crate) fn take_names(connection: &Connection, names: &[Digest], len: u64) -> Result<(), rusqlite::Error> {
    let mut insert = connection.prepare_cached("INSERT OR IGNORE INTO named (hash) VALUES (?)")?;
    for name in names {
        insert.execute([name.0])?;
    }
    connection.prepare_cached("UPDATE named_upto SET len = ? WHERE one = 1")?.execute([row_number(len)])?;
    Ok(())
}

/// Entries that the index has not: those of before there was one, or the last few without names.
pub(crate) fn name_the_rest(connection: &mut Connection, len: u64) -> Result<u64, JournalError> {
    let failed = |e: rusqlite::Error| writing_failed(&e);
    let mut upto = named_upto(connection)?;
    if len.saturating_sub(upto) > NAMES_LAG {
        tracing::info!(entries = len.saturating_sub(upto), "what the ledger's entries name is indexed once");
    }
    while upto < len {
        let transaction = connection.transaction().map_err(failed)?;
        let mut select = transaction
            .prepare_cached("SELECT seq, bytes, opening FROM entries WHERE seq >= ? ORDER BY seq LIMIT ?")
            .map_err(failed)?;
        let limit = i64::try_from(MAX_READ).unwrap_or(i64::MAX);
        let rows = select.query_map((row_number(upto), limit), |row| Ok(entry_at(row))).map_err(failed)?;
        let (mut names, mut next) = (Vec::new(), upto);
        for entry in rows {
            let entry = entry.map_err(failed)??;
            next = entry.seq.saturating_add(1);
            names.extend(named_by(&entry));
        }
        drop(select);
        if next == upto {
            break;
        }
        take_names(&transaction, &names, next).map_err(failed)?;
        transaction.commit().map_err(failed)?;
        upto = next;
    }
    Ok(upto)
}

/// Replaces bodies by the same entries without evidence, and keeps their leaves.
pub(crate) fn prune(connection: &mut Connection, bodies: &[u64], len: u64) -> Result<u64, JournalError> {
    let failed = |e: rusqlite::Error| writing_failed(&e);
    let mut pruned: u64 = 0;
    for piece in bodies.chunks(PRUNED_AT_ONCE) {
        let transaction = connection.transaction().map_err(failed)?;
        for seq in piece.iter().filter(|seq| seq.saturating_add(1) < len) {
            let stored = transaction
                .query_row(
                    "SELECT seq, bytes, opening FROM entries WHERE seq = ? AND leaf IS NULL",
                    [row_number(*seq)],
                    |row| Ok((leaf_hash(row.get_ref(1)?.as_blob()?), entry_at(row))),
                )
                .optional()
                .map_err(failed)?;
            let Some((leaf, entry)) = stored else { continue };
            let stub = Entry { evidence: None, ..entry? };
            transaction
                .execute(
                    "UPDATE entries SET bytes = ?, opening = NULL, leaf = ? WHERE seq = ?",
                    (stub.bytes(), leaf.0, row_number(*seq)),
                )
                .map_err(failed)?;
            pruned = pruned.saturating_add(1);
        }
        transaction.commit().map_err(failed)?;
    }
    if pruned > 0 {
        // Gives the room back to the disk.
        connection.execute_batch("VACUUM").map_err(failed)?;
    }
    Ok(pruned)
}
