//! What a node opens for writing, once.

use crate::{
    open::{self, OpenError},
    reader::PostgresReader,
    writer::{Append, Ask, QUEUE, Writer},
};
use ed25519_dalek::SigningKey;
use satgrid_ledger::{
    entry::{Draft, Entry, Head},
    journal::{Journal, JournalError, JournalFuture, JournalReader, Witness},
    log::SignedCheckpoint,
};
use satgrid_types::UnixMs;
use std::sync::Arc;
use tokio::{
    sync::{Mutex, mpsc, oneshot},
    task::JoinHandle,
};

/// A journal on PostgreSQL. Clones share the one writer; the database stays locked until one of them closes it, or the
/// last one is dropped.
#[derive(Debug, Clone)]
pub struct PostgresJournal {
    asks: mpsc::Sender<Ask>,
    reader: PostgresReader,
    task: Arc<Mutex<Option<JoinHandle<()>>>>,
}

impl PostgresJournal {
    /// Opens or creates the journal in the database at `url`. Must be called within a tokio runtime.
    pub async fn open(url: &str) -> Result<PostgresJournal, OpenError> {
        let options = open::options(url)?;
        let place = open::place(&options);
        let connection = open::writer(&options).await?;
        let writer = Writer::start(connection).await.map_err(|error| match error {
            JournalError::Damaged { seq, what } => OpenError::Damaged { place, seq, what },
            JournalError::Full | JournalError::Storage(_) | JournalError::Limit { .. } | JournalError::Closed => {
                OpenError::Damaged { place, seq: 0, what: error.to_string() }
            }
        })?;
        let (asks, receiver) = mpsc::channel(QUEUE);
        let task = Arc::new(Mutex::new(Some(tokio::spawn(writer.run(receiver)))));
        Ok(PostgresJournal { asks, reader: PostgresReader::connect(options), task })
    }

    /// The reading side: proofs, checkpoints and entries, without waiting for the writer.
    pub fn reader(&self) -> &PostgresReader {
        &self.reader
    }

    /// Signs and stores a checkpoint over all entries that are durable now.
    pub async fn checkpoint(&self, key: &SigningKey) -> Result<SignedCheckpoint, JournalError> {
        let (answer, answered) = oneshot::channel();
        self.ask(Ask::Checkpoint { key: Box::new(key.clone()), answer }).await?;
        answered.await.map_err(|_| JournalError::Closed)?
    }

    /// Keeps another node's checkpoint, and says what it shows beside those that were heard before.
    pub async fn witness(&self, heard: &SignedCheckpoint, at: UnixMs) -> Result<Witness, JournalError> {
        let (answer, answered) = oneshot::channel();
        self.ask(Ask::Witness { heard: Box::new(heard.clone()), at, answer }).await?;
        answered.await.map_err(|_| JournalError::Closed)?
    }

    /// Lets go of the bodies of these entries: their evidence and private fields. Their transfers and leaves stay. Says how
    /// many went; the last entry never does.
    pub async fn prune(&self, bodies: Vec<u64>) -> Result<u64, JournalError> {
        let (answer, answered) = oneshot::channel();
        self.ask(Ask::Prune { bodies, answer }).await?;
        answered.await.map_err(|_| JournalError::Closed)?
    }

    async fn ask(&self, ask: Ask) -> Result<(), JournalError> {
        self.asks.send(ask).await.map_err(|_| JournalError::Closed)
    }

    /// Writes what was asked before and lets go of the database; later appends, of any clone, fail with
    /// [`JournalError::Closed`].
    pub async fn close(self) {
        // An error means that it is closed already.
        let _ = self.asks.send(Ask::Close).await;
        self.reader.close().await;
        let task = self.task.lock().await.take();
        if let Some(task) = task
            && let Err(error) = task.await
        {
            tracing::error!(%error, "the journal's writer");
        }
    }
}

impl Journal for PostgresJournal {
    fn append(&self, at: UnixMs, drafts: Vec<Draft>) -> JournalFuture<'_, Vec<Entry>> {
        Box::pin(async move {
            let (answer, answered) = oneshot::channel();
            self.ask(Ask::Append(Append { at, drafts, answer })).await?;
            answered.await.map_err(|_| JournalError::Closed)?
        })
    }
    fn read(&self, from: u64, limit: usize) -> JournalFuture<'_, Vec<Entry>> {
        JournalReader::read(&self.reader, from, limit)
    }
    fn head(&self) -> JournalFuture<'_, Head> {
        JournalReader::head(&self.reader)
    }
}
