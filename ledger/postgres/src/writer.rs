//! The one task that writes: as on SQLite, the first waiting append and every other that waits already are committed in
//! one transaction, and nothing is answered before the commit returned.
//!
//! A transaction that failed leaves nothing, and the state is read again from the database. A connection that is lost takes
//! the writer's lock with it, so another process may have written since: nothing more is written then, and the node must
//! be started again.

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
use satgrid_types::UnixMs;
use sqlx::{Connection, PgConnection};
use tokio::sync::{mpsc, oneshot};

/// Appends that wait in the queue before callers are made to wait.
pub(crate) const QUEUE: usize = 1_024;

type Answer<T> = oneshot::Sender<Result<T, JournalError>>;

/// Drafts to append, whole or not at all.
#[derive(Debug)]
pub(crate) struct Append {
    pub(crate) at: UnixMs,
    pub(crate) drafts: Vec<Draft>,
    pub(crate) answer: Answer<Vec<Entry>>,
}

/// What the writer is asked.
#[derive(Debug)]
pub(crate) enum Ask {
    Append(Append),
    Checkpoint { key: Box<SigningKey>, answer: Answer<SignedCheckpoint> },
    Witness { heard: Box<SignedCheckpoint>, at: UnixMs, answer: Answer<Witness> },
    Prune { bodies: Vec<u64>, answer: Answer<u64> },
    Close,
}

/// Entries that wait for the commit.
struct Waiting {
    entries: Vec<Entry>,
    answer: Answer<Vec<Entry>>,
}

/// The writer's state, always that of the last commit.
pub(crate) struct Writer {
    connection: PgConnection,
    tip: Tip,
    /// Entries that the index of names has in the database.
    named: u64,
    /// Set when nothing more may be written.
    broken: Option<JournalError>,
}

impl Writer {
    /// Takes up the journal where it ends, and checks that its end hangs together.
    pub(crate) async fn start(connection: PgConnection) -> Result<Writer, JournalError> {
        let mut writer = Writer { connection, tip: Tip::empty(), named: 0, broken: None };
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
            let tile: Option<(Vec<u8>,)> = sqlx::query_as("SELECT hashes FROM tiles WHERE level = $1 AND idx = $2")
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

    /// Serves until it is told to close or every sender is gone, then lets go of the database.
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
                }
                // A caller that stopped waiting needs no answer.
                Ask::Checkpoint { key, answer } => drop(answer.send(self.checkpoint(&key).await)),
                Ask::Witness { heard, at, answer } => {
                    drop(answer.send(keep::witness(&mut self.connection, &heard, at).await));
                }
                Ask::Prune { bodies, answer } => drop(answer.send(self.prune(&bodies).await)),
                Ask::Close => break,
            }
        }
        // Everything is durable already; closing tells the server, which drops the lock.
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
                tracing::error!(%error, "nothing of this group was written");
                // Without the connection there is no lock, and no way to read the state again.
                if let Err(reload) = self.reload().await {
                    self.broken = Some(reload);
                }
                waiting.into_iter().for_each(|w| drop(w.answer.send(Err(error.clone()))));
            }
        }
    }

    async fn commit(&mut self, written: &Written) -> Result<(), JournalError> {
        if written.rows.is_empty() {
            return Ok(());
        }
        let (mut seqs, mut times, mut bodies, mut openings) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for row in &written.rows {
            seqs.push(row_number(row.seq));
            times.push(row_number(row.at.0));
            bodies.push(row.bytes.as_slice());
            openings.push(row.opening.as_deref());
        }
        // Dropped without a commit, the transaction is rolled back.
        let mut transaction = self.connection.begin().await.map_err(|e| storage(&e))?;
        sqlx::query(
            "INSERT INTO entries (seq, at, bytes, opening) SELECT * FROM UNNEST($1::bigint[], $2::bigint[], $3::bytea[], $4::bytea[])",
        )
        .bind(seqs)
        .bind(times)
        .bind(bodies)
        .bind(openings)
        .execute(&mut *transaction)
        .await
        .map_err(|e| storage(&e))?;
        let (mut levels, mut indices, mut hashes) = (Vec::new(), Vec::new(), Vec::new());
        for (id, bytes) in &written.tiles {
            levels.push(i64::from(id.level));
            indices.push(row_number(id.index));
            hashes.push(bytes.as_slice());
        }
        sqlx::query(
            "INSERT INTO tiles (level, idx, hashes) SELECT * FROM UNNEST($1::bigint[], $2::bigint[], $3::bytea[]) ON CONFLICT (level, idx) DO UPDATE SET hashes = EXCLUDED.hashes",
        )
        .bind(levels)
        .bind(indices)
        .bind(hashes)
        .execute(&mut *transaction)
        .await
        .map_err(|e| storage(&e))?;
        let index = written.index(self.named);
        if let Some((names, len)) = index {
            keep::name(&mut transaction, names, len).await?;
        }
        transaction.commit().await.map_err(|e| storage(&e))?;
        self.named = index.map_or(self.named, |(_, len)| len);
        Ok(())
    }

    async fn prune(&mut self, bodies: &[u64]) -> Result<u64, JournalError> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        keep::prune(&mut self.connection, bodies, self.tip.head().len).await
    }

    async fn checkpoint(&mut self, key: &SigningKey) -> Result<SignedCheckpoint, JournalError> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        let signed = self.tip.checkpoint(key)?;
        sqlx::query("INSERT INTO checkpoints (size, note) VALUES ($1, $2) ON CONFLICT (size) DO UPDATE SET note = EXCLUDED.note")
            .bind(row_number(signed.size))
            .bind(signed.note())
            .execute(&mut self.connection)
            .await
            .map_err(|e| storage(&e))?;
        Ok(signed)
    }
}
