//! The one task that writes.
//!
//! It takes the first waiting append, then every other that is already waiting, and commits them in one transaction:
//! one wait for the disk serves them all. Nothing is answered before the commit returned. If the transaction fails, all
//! of its appends fail and the state is read again from the database, which is the truth.
//!
//! While it encodes, chains and hashes the entries of a group, those before them are written already ([`Scribe`]).

use crate::{
    keep,
    reader::{row_number, writing_failed},
    scribe::{self, Scribe, Unwritten},
};
use ed25519_dalek::SigningKey;
use satgrid_ledger::{
    entry::{Draft, Entry, Head},
    journal::{
        JournalError, Witness,
        stored::{Group, MAX_GROUP, Tip},
    },
    log::{SignedCheckpoint, TileEdge},
};
use satgrid_types::UnixMs;
use std::sync::Arc;
use tokio::sync::{Mutex, mpsc, oneshot};

/// Appends that wait in the queue before callers are made to wait.
pub(crate) const QUEUE: usize = 1_024;
/// Rows that are handed over together: few, so that they are written while the next are made, and enough to pay for it.
const PIECE: usize = 32;

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
    scribe: Scribe,
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
    pub(crate) async fn start(scribe: Scribe, turn: Arc<Mutex<()>>) -> Result<Writer, JournalError> {
        let mut writer = Writer { scribe, turn, tip: Tip::empty(), named: 0, broken: None };
        writer.reload().await?;
        let len = writer.tip.head().len;
        writer.named = writer.scribe.run(move |connection| keep::name_the_rest(connection, len)).await?;
        Ok(writer)
    }

    async fn reload(&mut self) -> Result<(), JournalError> {
        let restore = |connection: &mut _| {
            let head = scribe::last_entry(connection)?.map_or(Head::EMPTY, |entry| entry.head());
            Tip::restore(head, scribe::tiles(connection, &TileEdge::ids(head.len))?)
        };
        self.tip = self.scribe.run(restore).await?;
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
                    let kept = self.scribe.run(move |connection| keep::witness(connection, &heard, at)).await;
                    let _ = answer.send(kept);
                }
                Ask::Prune { bodies, answer } => {
                    let len = self.tip.head().len;
                    let pruned = self.scribe.run(move |connection| keep::prune(connection, &bodies, len)).await;
                    let _ = answer.send(pruned);
                }
                Ask::Checkpoint { key, answer } => {
                    let made = self.checkpoint(&key).await;
                    // A caller that stopped waiting needs no answer.
                    let _ = answer.send(made);
                }
            }
        }
        // Waits for the thread, off the runtime's.
        let _ = tokio::task::spawn_blocking(move || drop(self.scribe)).await;
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
            if group.waiting_rows() >= PIECE {
                self.scribe.rows(group.take_rows());
            }
        }
        let (written, tip) = group.finish();
        let nothing = tip.head().len == self.tip.head().len;
        let done = if nothing { Ok(self.named) } else { self.scribe.commit(written, self.named).await };
        match done {
            Ok(named) => {
                (self.tip, self.named) = (tip, named);
                waiting.into_iter().for_each(|w| drop(w.answer.send(Ok(w.entries))));
            }
            Err(Unwritten { error, stuck }) => {
                tracing::error!(%error, appends = waiting.len(), "nothing of this group was written");
                self.broken = stuck;
                if self.broken.is_none()
                    && let Err(reload) = self.reload().await
                {
                    self.broken = Some(reload);
                }
                waiting.into_iter().for_each(|w| drop(w.answer.send(Err(error.clone()))));
            }
        }
    }

    async fn checkpoint(&mut self, key: &SigningKey) -> Result<SignedCheckpoint, JournalError> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        let signed = self.tip.checkpoint(key)?;
        let (size, note) = (row_number(signed.size), signed.note().to_owned());
        let sql = "INSERT OR REPLACE INTO checkpoints (size, note) VALUES (?, ?)";
        let keep = move |connection: &mut rusqlite::Connection| {
            connection.execute(sql, (size, note)).map(drop).map_err(|e| writing_failed(&e))
        };
        self.scribe.run(keep).await?;
        Ok(signed)
    }
}
