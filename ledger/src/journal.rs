//! The journal port: append-only, durable, numbered and chained.
//!
//! An entry is durable when `append` returns, and nothing that it authorises may begin before. One journal has one
//! writer. The conformance suite in `testing` is what every implementation passes.

pub mod copied;
mod named;
pub mod stored;

pub use named::named_by;

use crate::{
    entry::{Draft, Entry, Head, MAX_ENTRY_LEN, MAX_OPENING_LEN},
    log::{
        MissingTile, ProofError, SignedCheckpoint, TileCache, TileId, consistency_proof, inclusion_proof, leaf_hash,
        root_at,
    },
};
use core::{future::Future, pin::Pin};
use satgrid_types::{Digest, NodeKey, UnixMs, cbor};
use std::sync::{Arc, Mutex, PoisonError};
use thiserror::Error;

/// No append holds more drafts.
pub const MAX_APPEND: usize = 4_096;

/// No read returns more entries.
pub const MAX_READ: usize = 4_096;

/// Why the journal did not do as asked. After any error of `append`, nothing of that append is in the journal.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum JournalError {
    /// The world's fault: stop taking work until there is room.
    #[error("the disk is full; nothing was written")]
    Full,
    /// The world's fault: the journal cannot be written or read. Stop taking work.
    #[error("the journal's storage failed: {0}")]
    Storage(String),
    /// What is stored is not what was written.
    #[error("entry {seq} of the journal is damaged: {what}")]
    Damaged { seq: u64, what: String },
    /// Ours: the draft breaks a limit.
    #[error("{what}: {given}, the limit is {limit}")]
    Limit { what: &'static str, given: usize, limit: usize },
    #[error("the journal was closed")]
    Closed,
}

/// A boxed future, so that the port can be a trait object.
pub type JournalFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, JournalError>> + Send + 'a>>;

/// Where entries are kept.
pub trait Journal: Send + Sync {
    /// Appends all drafts or none, in order; durable when it returns. `at` is the time of the entries, held at that of
    /// the last entry if it lies before.
    fn append(&self, at: UnixMs, drafts: Vec<Draft>) -> JournalFuture<'_, Vec<Entry>>;
    /// Entries from number `from` on, at most `limit` and at most [`MAX_READ`]; empty at the end.
    fn read(&self, from: u64, limit: usize) -> JournalFuture<'_, Vec<Entry>>;
    /// The durable head.
    fn head(&self) -> JournalFuture<'_, Head>;
}

/// The reading side of a stored journal: entries, checkpoints and proofs, also beside the node that writes it.
///
/// An entry never changes once it is there, so everything below a checkpoint is one consistent snapshot, however many reads
/// it takes.
pub trait JournalReader: Send + Sync {
    /// As [`Journal::read`].
    fn read(&self, from: u64, limit: usize) -> JournalFuture<'_, Vec<Entry>>;
    /// The durable head.
    fn head(&self) -> JournalFuture<'_, Head>;
    /// The newest checkpoint that covers at most `size` entries.
    fn checkpoint(&self, size: u64) -> JournalFuture<'_, Option<SignedCheckpoint>>;
    /// These tiles of the log, as far as they exist.
    fn tiles(&self, ids: Vec<TileId>) -> JournalFuture<'_, TileCache>;
    /// Numbers of entries in `[from, to)` whose bodies were pruned, at most [`MAX_READ`]: they read as entries without
    /// evidence, and their bytes are no leaves.
    fn pruned(&self, from: u64, to: u64) -> JournalFuture<'_, Vec<u64>>;
    /// Those of these payment hashes and transaction ids that some entry names ([`named_by`]), in any order. At most
    /// [`MAX_READ`] are asked for at once. Entries whose bodies were pruned since count on.
    fn named(&self, hashes: Vec<Digest>) -> JournalFuture<'_, Vec<Digest>>;
    /// Checkpoints of another node's log as they were heard, newest first.
    fn witnessed(&self, node: NodeKey) -> JournalFuture<'_, Vec<SignedCheckpoint>>;

    /// Root of the log of the first `size` entries.
    fn root(&self, size: u64) -> JournalFuture<'_, Digest> {
        Box::pin(async move {
            let mut cache = self.tiles(TileCache::for_inclusion(size.saturating_sub(1), size)).await?;
            root_at(size, &mut cache).map_err(|missing| unproven(ProofError::Store(missing)))
        })
    }
    /// Proof that entry `index` is in the log of the first `size` entries.
    fn prove_inclusion(&self, index: u64, size: u64) -> JournalFuture<'_, Vec<Digest>> {
        Box::pin(async move {
            let mut cache = self.tiles(TileCache::for_inclusion(index, size)).await?;
            inclusion_proof(index, size, &mut cache).map_err(unproven)
        })
    }
    /// Proof that the log of `new` entries extends that of `old`.
    fn prove_consistency(&self, old: u64, new: u64) -> JournalFuture<'_, Vec<Digest>> {
        Box::pin(async move {
            let mut cache = self.tiles(TileCache::for_consistency(old, new)).await?;
            consistency_proof(old, new, &mut cache).map_err(unproven)
        })
    }
}

/// Why a stored log could not answer.
fn unproven(error: ProofError<MissingTile>) -> JournalError {
    match error {
        ProofError::Store(MissingTile { level, index }) => {
            JournalError::Damaged { seq: index, what: format!("tile {level}/{index} is missing or too short") }
        }
        ProofError::NoSuchLeaf { index, size } => {
            JournalError::Storage(format!("entry {index} is not among the first {size}"))
        }
        ProofError::Backwards { old, new } => JournalError::Storage(format!("{new} entries do not extend {old}")),
    }
}

/// What another node's checkpoint shows beside those of it that were heard before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Witness {
    /// The first of its node.
    First,
    /// Heard before: the same root over as many entries.
    Known,
    /// A new one, and the nearest smaller one that is kept: a consistency proof between the two is owed.
    Grown { from: Box<SignedCheckpoint> },
    /// Another root over as many entries: together they are a fraud proof.
    Conflict { with: Box<SignedCheckpoint> },
}

impl Witness {
    /// Judges a checkpoint by the newest kept one of its node that covers at most as many entries.
    pub fn of(heard: &SignedCheckpoint, below: Option<SignedCheckpoint>) -> Witness {
        match below {
            None => Witness::First,
            Some(below) if below.size != heard.size => Witness::Grown { from: Box::new(below) },
            Some(same) if same.root == heard.root => Witness::Known,
            Some(other) => Witness::Conflict { with: Box::new(other) },
        }
    }
    /// Whether it is to be kept.
    pub const fn is_new(&self) -> bool {
        matches!(self, Witness::First | Witness::Grown { .. })
    }
}

/// Limits of a draft that hold for every journal.
pub fn check_limits(drafts: &[Draft]) -> Result<(), JournalError> {
    if drafts.len() > MAX_APPEND {
        return Err(JournalError::Limit { what: "drafts in one append", given: drafts.len(), limit: MAX_APPEND });
    }
    Ok(())
}

/// An entry with what is stored of it. Encoded and hashed once.
#[derive(Debug, Clone)]
pub struct Chained {
    pub entry: Entry,
    /// Canonical.
    pub bytes: Vec<u8>,
    /// Their hash as a leaf of the log.
    pub leaf: Digest,
    /// The private fields kept beside them.
    pub opening: Option<Vec<u8>>,
}

/// Chains one draft onto `head`, which is then the entry's.
fn link(head: &mut Head, at: UnixMs, draft: Draft) -> Result<Chained, JournalError> {
    let within = |what, given, limit| match given <= limit {
        true => Ok(()),
        false => Err(JournalError::Limit { what, given, limit }),
    };
    let entry = Entry::chain(head, at, draft);
    let (bytes, opening) = (entry.bytes(), entry.opening().map(cbor::encode));
    within("bytes in one entry", bytes.len(), MAX_ENTRY_LEN)?;
    within("bytes of private fields", opening.as_ref().map_or(0, Vec::len), MAX_OPENING_LEN)?;
    let leaf = leaf_hash(&bytes);
    *head = Head { len: head.len.saturating_add(1), last: leaf, at: entry.at };
    Ok(Chained { entry, bytes, leaf, opening })
}

/// Chains drafts onto `head`.
pub fn chain(mut head: Head, at: UnixMs, drafts: Vec<Draft>) -> Result<Vec<Chained>, JournalError> {
    check_limits(&drafts)?;
    drafts.into_iter().map(|draft| link(&mut head, at, draft)).collect()
}

/// A journal in memory: for simulations, tests and tools. Clones share the same entries.
#[derive(Debug, Clone, Default)]
pub struct MemoryJournal {
    entries: Arc<Mutex<Vec<Entry>>>,
}

impl MemoryJournal {
    pub fn new() -> MemoryJournal {
        MemoryJournal::default()
    }
    /// The entries so far.
    pub fn entries(&self) -> Vec<Entry> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
    /// The last entry.
    pub fn last(&self) -> Option<Entry> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).last().cloned()
    }
    /// As [`Journal::append`], without a future.
    pub fn append_now(&self, at: UnixMs, drafts: Vec<Draft>) -> Result<Vec<Entry>, JournalError> {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let head = entries.last().map_or(Head::EMPTY, Entry::head);
        let added: Vec<Entry> = chain(head, at, drafts)?.into_iter().map(|chained| chained.entry).collect();
        entries.extend(added.iter().cloned());
        Ok(added)
    }
    /// Drops every entry from number `len` on: what a crash before the disk was reached looks like.
    pub fn tear(&self, len: u64) {
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).truncate(len);
    }
}

impl Journal for MemoryJournal {
    fn append(&self, at: UnixMs, drafts: Vec<Draft>) -> JournalFuture<'_, Vec<Entry>> {
        Box::pin(core::future::ready(self.append_now(at, drafts)))
    }
    fn read(&self, from: u64, limit: usize) -> JournalFuture<'_, Vec<Entry>> {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let from = usize::try_from(from).unwrap_or(usize::MAX);
        let read = entries.iter().skip(from).take(limit.min(MAX_READ)).cloned().collect();
        Box::pin(core::future::ready(Ok(read)))
    }
    fn head(&self) -> JournalFuture<'_, Head> {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        Box::pin(core::future::ready(Ok(entries.last().map_or(Head::EMPTY, Entry::head))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::conformance::CASES;
    use std::task::{Context, Poll, Waker};

    #[test]
    fn the_memory_journal_conforms() {
        for (name, case) in CASES {
            let journal = MemoryJournal::new();
            let mut future = case(&journal);
            // Nothing in it ever waits, so one poll is the whole run.
            let done = future.as_mut().poll(&mut Context::from_waker(Waker::noop()));
            assert_eq!(done, Poll::Ready(()), "{name}");
        }
    }
}
