//! Where the journal is kept: a file of this machine, or a PostgreSQL server that outlives it.

use ed25519_dalek::SigningKey;
use satgrid_ledger::{
    entry::{Draft, Entry, Head},
    journal::{Journal, JournalError, JournalFuture, JournalReader, MAX_READ, Witness},
    log::SignedCheckpoint,
};
use satgrid_ledger_postgres::PostgresJournal;
use satgrid_ledger_sqlite::SqliteJournal;
use satgrid_protocol::frame::{LogAsk, LogProof};
use satgrid_types::{Digest, NodeKey, UnixMs};
use std::collections::BTreeSet;

/// The node's journal, opened for writing. Clones share it.
#[derive(Debug, Clone)]
pub(crate) enum Store {
    Sqlite(SqliteJournal),
    Postgres(PostgresJournal),
}

impl Store {
    fn journal(&self) -> &dyn Journal {
        match self {
            Store::Sqlite(journal) => journal,
            Store::Postgres(journal) => journal,
        }
    }
    fn reader(&self) -> &dyn JournalReader {
        match self {
            Store::Sqlite(journal) => journal.reader(),
            Store::Postgres(journal) => journal.reader(),
        }
    }
    /// Signs and stores a tree head over all entries that are durable now.
    pub(crate) async fn checkpoint(&self, key: &SigningKey) -> Result<SignedCheckpoint, JournalError> {
        match self {
            Store::Sqlite(journal) => journal.checkpoint(key).await,
            Store::Postgres(journal) => journal.checkpoint(key).await,
        }
    }
    /// Keeps another node's tree head, and says what it shows beside those that were heard before.
    pub(crate) async fn witness(&self, heard: &SignedCheckpoint, at: UnixMs) -> Result<Witness, JournalError> {
        match self {
            Store::Sqlite(journal) => journal.witness(heard, at).await,
            Store::Postgres(journal) => journal.witness(heard, at).await,
        }
    }
    /// Those of these payment hashes and transaction ids that the journal names.
    pub(crate) async fn named(&self, hashes: &[Digest]) -> Result<BTreeSet<Digest>, JournalError> {
        let mut named = BTreeSet::new();
        for piece in hashes.chunks(MAX_READ) {
            named.extend(self.reader().named(piece.to_vec()).await?);
        }
        Ok(named)
    }
    /// Whether a tree head of this node was ever heard.
    pub(crate) async fn has_heard_of(&self, node: NodeKey) -> bool {
        self.reader().witnessed(node).await.is_ok_and(|heads| !heads.is_empty())
    }
    /// The log's answer to a counterparty; without hashes where it has none.
    pub(crate) async fn prove(&self, ask: LogAsk) -> LogProof {
        let hashes = match ask {
            LogAsk::Inclusion(index, size) => self.reader().prove_inclusion(index, size).await,
            LogAsk::Consistency(old, new) => self.reader().prove_consistency(old, new).await,
        };
        let hashes = hashes.unwrap_or_else(|error| {
            tracing::debug!(%error, ?ask, "the log has no answer");
            Vec::new()
        });
        LogProof { ask, hashes }
    }
    pub(crate) async fn close(self) {
        match self {
            Store::Sqlite(journal) => journal.close().await,
            Store::Postgres(journal) => journal.close().await,
        }
    }
}

impl Journal for Store {
    fn append(&self, at: UnixMs, drafts: Vec<Draft>) -> JournalFuture<'_, Vec<Entry>> {
        self.journal().append(at, drafts)
    }
    fn read(&self, from: u64, limit: usize) -> JournalFuture<'_, Vec<Entry>> {
        self.journal().read(from, limit)
    }
    fn head(&self) -> JournalFuture<'_, Head> {
        self.journal().head()
    }
}
