//! The one task that writes.
//!
//! It takes the first waiting append, then every other that is already waiting, and commits them in one transaction:
//! one wait for the disk serves them all. Nothing is answered before the commit returned. If the transaction fails, all
//! of its appends fail and the state is read again from the database, which is the truth.

use crate::{
    keep,
    reader::{entry_of, row_number, storage},
};
use ed25519_dalek::SigningKey;
use satgrid_ledger::{
    entry::{Draft, Entry, Head},
    journal::{
        JournalError, Witness,
        stored::{Group, MAX_GROUP, Tip, Written},
    },
    log::{SignedCheckpoint, TileEdge},
};
use satgrid_types::{Digest, UnixMs};
use sqlx::{Connection, QueryBuilder, Sqlite, SqliteConnection};
use std::sync::Arc;
use tokio::sync::{Mutex, mpsc, oneshot};

/// Appends that wait in the queue before callers are made to wait.
pub(crate) const QUEUE: usize = 1_024;
/// Rows in one statement, largest first: few lengths, so that few shapes of statement are prepared.
const AT_ONCE: [usize; 4] = [256, 32, 4, 1];
/// Entries up to which the script that writes a group stays prepared: larger ones are seldom of one shape.
const PREPARED: usize = 256;

/// Where the answer to an append goes.
type Answer = oneshot::Sender<Result<Vec<Entry>, JournalError>>;

/// Drafts to append, whole or not at all.
pub(crate) struct Append {
    pub(crate) at: UnixMs,
    pub(crate) drafts: Vec<Draft>,
    pub(crate) answer: Answer,
}

/// What the writer is asked.
pub(crate) enum Ask {
    Append(Append),
    Checkpoint { key: Box<SigningKey>, answer: oneshot::Sender<Result<SignedCheckpoint, JournalError>> },
    Witness { heard: Box<SignedCheckpoint>, at: UnixMs, answer: oneshot::Sender<Result<Witness, JournalError>> },
    Prune { bodies: Vec<u64>, answer: oneshot::Sender<Result<u64, JournalError>> },
    Close,
}

/// Entries that wait for the commit.
struct Waiting {
    entries: Vec<Entry>,
    answer: Answer,
}

/// The writer's state, always that of the last commit.
pub(crate) struct Writer {
    connection: SqliteConnection,
    /// Shared with whoever else writes to the file.
    turn: Arc<Mutex<()>>,
    tip: Tip,
    /// Entries that the index of names has in the database.
    named: u64,
    /// Set when what failed could not be left, or the state not be read again: nothing more is written.
    broken: Option<JournalError>,
}

impl Writer {
    /// Takes up the journal where it ends, and checks that its end hangs together.
    pub(crate) async fn start(connection: SqliteConnection, turn: Arc<Mutex<()>>) -> Result<Writer, JournalError> {
        let mut writer = Writer { connection, turn, tip: Tip::empty(), named: 0, broken: None };
        writer.reload().await?;
        let len = writer.tip.head().len;
        writer.named = keep::name_the_rest(&mut writer.connection, len).await?;
        Ok(writer)
    }

    async fn reload(&mut self) -> Result<(), JournalError> {
        let row = sqlx::query("SELECT seq, bytes, opening FROM entries ORDER BY seq DESC LIMIT 1")
            .fetch_optional(&mut self.connection)
            .await
            .map_err(|e| storage(&e))?;
        let head = row.as_ref().map_or(Ok(Head::EMPTY), |row| entry_of(row).map(|entry| entry.head()))?;
        let mut tiles = Vec::new();
        for id in TileEdge::ids(head.len) {
            let tile: Option<(Vec<u8>,)> = sqlx::query_as("SELECT hashes FROM tiles WHERE level = ? AND idx = ?")
                .bind(i64::from(id.level))
                .bind(row_number(id.index))
                .fetch_optional(&mut self.connection)
                .await
                .map_err(|e| storage(&e))?;
            tiles.push(tile.map(|(bytes,)| bytes).unwrap_or_default());
        }
        self.tip = Tip::restore(head, tiles)?;
        Ok(())
    }

    /// Serves until it is told to close or every sender is gone, then closes the database.
    pub(crate) async fn run(mut self, mut asks: mpsc::Receiver<Ask>) {
        let mut next = None;
        loop {
            let ask = match next.take() {
                Some(ask) => ask,
                None => match asks.recv().await {
                    Some(ask) => ask,
                    None => break,
                },
            };
            match ask {
                Ask::Append(append) => {
                    let turn = self.turn.clone().lock_owned().await;
                    // Those that came while another writer had its turn go with it.
                    let mut count = append.drafts.len();
                    let mut group = vec![append];
                    while count < MAX_GROUP {
                        match asks.try_recv() {
                            Ok(Ask::Append(append)) => {
                                count = count.saturating_add(append.drafts.len());
                                group.push(append);
                            }
                            Ok(other) => {
                                next = Some(other);
                                break;
                            }
                            Err(_) => break,
                        }
                    }
                    self.group(group).await;
                    drop(turn);
                }
                Ask::Close => break,
                Ask::Witness { heard, at, answer } => {
                    let kept = keep::witness(&mut self.connection, &heard, at).await;
                    let _ = answer.send(kept);
                }
                Ask::Prune { bodies, answer } => {
                    let pruned = keep::prune(&mut self.connection, &bodies, self.tip.head().len).await;
                    let _ = answer.send(pruned);
                }
                Ask::Checkpoint { key, answer } => {
                    let made = self.checkpoint(&key).await;
                    // A caller that stopped waiting needs no answer.
                    let _ = answer.send(made);
                }
            }
        }
        // Everything is durable already; closing only tidies the WAL.
        if let Err(error) = self.connection.close().await {
            tracing::warn!(%error, "closing the journal");
        }
    }

    async fn group(&mut self, asks: Vec<Append>) {
        if let Some(error) = &self.broken {
            asks.into_iter().for_each(|ask| drop(ask.answer.send(Err(error.clone()))));
            return;
        }
        let (mut group, mut waiting) = (Group::after(&self.tip), Vec::new());
        for Append { at, drafts, answer } in asks {
            match group.append(at, drafts) {
                Err(error) => drop(answer.send(Err(error))),
                Ok(entries) => waiting.push(Waiting { entries, answer }),
            }
        }
        let (written, tip) = group.finish();
        match self.commit(&written).await {
            Ok(()) => {
                self.tip = tip;
                waiting.into_iter().for_each(|w| drop(w.answer.send(Ok(w.entries))));
            }
            Err(error) => {
                tracing::error!(%error, entries = written.rows.len(), "nothing of this group was written");
                if self.broken.is_none()
                    && let Err(reload) = self.reload().await
                {
                    self.broken = Some(reload);
                }
                waiting.into_iter().for_each(|w| drop(w.answer.send(Err(error.clone()))));
            }
        }
    }

    /// Writes a group in one transaction and one trip to the connection's thread: a trip costs what ten entries cost.
    async fn commit(&mut self, written: &Written) -> Result<(), JournalError> {
        if written.rows.is_empty() {
            return Ok(());
        }
        let index = written.index(self.named);
        let mut script = script(written, index);
        let query = script.build().persistent(written.rows.len() <= PREPARED);
        if let Err(error) = query.execute(&mut self.connection).await {
            self.abandon().await?;
            return Err(storage(&error));
        }
        self.named = index.map_or(self.named, |(_, len)| len);
        Ok(())
    }

    /// Leaves the transaction of a script that failed. SQLite may have left it by itself, so the rollback may fail; that
    /// another one can begin is what tells.
    async fn abandon(&mut self) -> Result<(), JournalError> {
        let _ = sqlx::query("ROLLBACK").execute(&mut self.connection).await;
        let left = sqlx::query("BEGIN; ROLLBACK").execute(&mut self.connection).await;
        left.map(drop).map_err(|e| {
            let broken = storage(&e);
            self.broken = Some(broken.clone());
            broken
        })
    }

    async fn checkpoint(&mut self, key: &SigningKey) -> Result<SignedCheckpoint, JournalError> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        let signed = self.tip.checkpoint(key)?;
        sqlx::query("INSERT OR REPLACE INTO checkpoints (size, note) VALUES (?, ?)")
            .bind(row_number(signed.size))
            .bind(signed.note())
            .execute(&mut self.connection)
            .await
            .map_err(|e| storage(&e))?;
        Ok(signed)
    }
}

/// The one transaction that writes a group.
fn script<'a>(written: &'a Written, index: Option<(&'a [Digest], u64)>) -> QueryBuilder<'a, Sqlite> {
    let mut script = QueryBuilder::new("BEGIN IMMEDIATE;");
    for rows in pieces(&written.rows) {
        script.push("INSERT INTO entries (seq, at, bytes, opening) ").push_values(rows, |mut values, row| {
            values.push_bind(row_number(row.seq)).push_bind(row_number(row.at.0));
            values.push_bind(&row.bytes[..]).push_bind(row.opening.as_deref());
        });
        script.push(";");
    }
    // An entry changes a tile at least.
    script.push("INSERT OR REPLACE INTO tiles (level, idx, hashes) ").push_values(
        &written.tiles,
        |mut values, tile| {
            let (id, hashes) = tile;
            values.push_bind(i64::from(id.level)).push_bind(row_number(id.index)).push_bind(&hashes[..]);
        },
    );
    script.push(";");
    if let Some((names, len)) = index {
        keep::push_names(&mut script, names, len);
    }
    script.push("COMMIT;");
    script
}

/// Cuts into pieces of these lengths.
fn pieces<T>(mut rest: &[T]) -> impl Iterator<Item = &[T]> {
    std::iter::from_fn(move || {
        let size = AT_ONCE.into_iter().find(|size| *size <= rest.len())?;
        let (now, later) = rest.split_at(size);
        rest = later;
        Some(now)
    })
}
