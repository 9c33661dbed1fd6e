//! What a node opens for writing, once.

use crate::{
    lock::Lock,
    open::{self, OpenError},
    reader::SqliteReader,
    scribe::Scribe,
    writer::{Append, Ask, QUEUE, Writer},
};
use ed25519_dalek::SigningKey;
use satgrid_ledger::{
    entry::{Draft, Entry, Head},
    journal::{Journal, JournalError, JournalFuture, Witness},
    log::SignedCheckpoint,
};
use satgrid_types::UnixMs;
use sqlx::Connection;
use std::{path::Path, sync::Arc};
use tokio::{
    sync::{Mutex, mpsc, oneshot},
    task::JoinHandle,
};

/// How a journal is opened.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// The database may grow to this many pages of 4 KiB; beyond it, appends fail as on a full disk.
    pub max_pages: Option<u32>,
}

/// A journal on SQLite. Clones share the one writer; the database stays locked until one of them closes it, or the last
/// one is dropped.
#[derive(Debug, Clone)]
pub struct SqliteJournal {
    asks: mpsc::Sender<Ask>,
    reader: SqliteReader,
    task: Arc<Mutex<Option<JoinHandle<()>>>>,
}

impl SqliteJournal {
    /// Opens or creates the journal at `path`. Must be called within a tokio runtime.
    pub async fn open(path: &Path) -> Result<SqliteJournal, OpenError> {
        SqliteJournal::open_with(path, Options::default()).await
    }

    pub async fn open_with(path: &Path, options: Options) -> Result<SqliteJournal, OpenError> {
        let lock = Lock::take(path)?;
        let migrated = open::writer(path, options.max_pages).await?;
        migrated.close().await.map_err(|source| OpenError::Sqlite { path: path.to_owned(), source })?;
        let scribe = Scribe::start(path, options.max_pages, lock);
        let scribe = scribe.map_err(|source| OpenError::Io { path: path.to_owned(), source })?;
        let writer = Writer::start(scribe, open::turn(path)).await.map_err(|error| match error {
            JournalError::Damaged { seq, what } => OpenError::Damaged { path: path.to_owned(), seq, what },
            JournalError::Full | JournalError::Storage(_) | JournalError::Limit { .. } | JournalError::Closed => {
                OpenError::Damaged { path: path.to_owned(), seq: 0, what: error.to_string() }
            }
        })?;
        let (asks, receiver) = mpsc::channel(QUEUE);
        let task = tokio::spawn(writer.run(receiver));
        let task = Arc::new(Mutex::new(Some(task)));
        Ok(SqliteJournal { asks, reader: SqliteReader::connect(path), task })
    }

    /// The reading side: proofs, checkpoints and entries, without waiting for the writer.
    pub fn reader(&self) -> &SqliteReader {
        &self.reader
    }

    /// Signs and stores a checkpoint over all entries that are durable now.
    pub async fn checkpoint(&self, key: &SigningKey) -> Result<SignedCheckpoint, JournalError> {
        let (answer, answered) = oneshot::channel();
        let ask = Ask::Checkpoint { key: Box::new(key.clone()), answer };
        self.asks.send(ask).await.map_err(|_| JournalError::Closed)?;
        answered.await.map_err(|_| JournalError::Closed)?
    }

    /// Keeps another node's checkpoint, and says what it shows beside those that were heard before.
    pub async fn witness(&self, heard: &SignedCheckpoint, at: UnixMs) -> Result<Witness, JournalError> {
        let (answer, answered) = oneshot::channel();
        let ask = Ask::Witness { heard: Box::new(heard.clone()), at, answer };
        self.asks.send(ask).await.map_err(|_| JournalError::Closed)?;
        answered.await.map_err(|_| JournalError::Closed)?
    }

    /// Lets go of the bodies of these entries: their evidence and private fields. Their transfers and leaves stay. Says how
    /// many went; the last entry never does.
    pub async fn prune(&self, bodies: Vec<u64>) -> Result<u64, JournalError> {
        let (answer, answered) = oneshot::channel();
        self.asks.send(Ask::Prune { bodies, answer }).await.map_err(|_| JournalError::Closed)?;
        answered.await.map_err(|_| JournalError::Closed)?
    }

    /// Writes what was asked before and closes the database; later appends, of any clone, fail with
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

impl Journal for SqliteJournal {
    fn append(&self, at: UnixMs, drafts: Vec<Draft>) -> JournalFuture<'_, Vec<Entry>> {
        Box::pin(async move {
            let (answer, answered) = oneshot::channel();
            self.asks.send(Ask::Append(Append { at, drafts, answer })).await.map_err(|_| JournalError::Closed)?;
            answered.await.map_err(|_| JournalError::Closed)?
        })
    }
    fn read(&self, from: u64, limit: usize) -> JournalFuture<'_, Vec<Entry>> {
        Box::pin(self.reader.read(from, limit))
    }
    fn head(&self) -> JournalFuture<'_, Head> {
        Box::pin(self.reader.head())
    }
}
