//! What every stored journal does the same, whatever database it stands on: the end that a writer holds, the group of
//! appends that one transaction writes, and entries read back from their rows. The adapters keep their SQL.

use super::{Chained, JournalError, check_limits, link, named_by};
use crate::{
    entry::{Draft, Entry, Head},
    log::{SignedCheckpoint, TILE_WIDTH, TileEdge, TileId},
    statements::ReceiptOpening,
};
use ed25519_dalek::SigningKey;
use satgrid_types::{Digest, UnixMs, cbor};
use std::collections::{BTreeMap, BTreeSet};

/// Entries in one transaction, at most.
pub const MAX_GROUP: usize = 8_192;
/// Entries without a name that the index of names may lack: they are looked at again when the journal is opened.
pub const NAMES_LAG: u64 = 4_096;
/// Checkpoints kept of one other node; older ones make room.
pub const KEPT_PER_NODE: i64 = 64;

/// The end of a journal, as its writer holds it: always that of the last commit.
#[derive(Debug, Clone)]
pub struct Tip {
    head: Head,
    edge: TileEdge,
}

impl Tip {
    /// Of a journal without entries.
    pub fn empty() -> Tip {
        Tip { head: Head::EMPTY, edge: TileEdge::default() }
    }

    /// Takes a journal up where it ends, and checks that its end hangs together. `tiles` are those of [`TileEdge::ids`] for
    /// the head's length, as they are stored; empty where there is none.
    pub fn restore(head: Head, tiles: Vec<Vec<u8>>) -> Result<Tip, JournalError> {
        let damaged = |what: &str| JournalError::Damaged { seq: head.len.saturating_sub(1), what: what.into() };
        let tiles = tiles.iter().map(|bytes| hashes_of(bytes)).collect();
        let edge = TileEdge::restore(head.len, tiles).ok_or_else(|| damaged("its log tiles are not of its length"))?;
        let last_leaf = edge.tiles().next().and_then(|(_, hashes)| hashes.last().copied());
        if last_leaf.is_some_and(|leaf| leaf != head.last) {
            return Err(damaged("its bytes are not the leaf that the log holds"));
        }
        Ok(Tip { head, edge })
    }

    pub fn head(&self) -> Head {
        self.head
    }

    /// A signed tree head over everything so far. Signatures are deterministic: the same end gives the same note again.
    pub fn checkpoint(&self, key: &SigningKey) -> Result<SignedCheckpoint, JournalError> {
        let root = self.edge.root();
        let root = root.map_err(|e| JournalError::Damaged { seq: self.head.len, what: e.to_string() })?;
        Ok(SignedCheckpoint::sign(self.head.len, root, key))
    }
}

/// An entry as it is written.
#[derive(Debug)]
pub struct Row {
    pub seq: u64,
    pub at: UnixMs,
    pub bytes: Vec<u8>,
    pub opening: Option<Vec<u8>>,
}

/// Appends that one transaction writes.
#[derive(Debug)]
pub struct Group {
    tip: Tip,
    rows: Vec<Row>,
    tiles: BTreeMap<TileId, Vec<u8>>,
    changed: BTreeSet<TileId>,
    names: Vec<Digest>,
}

/// What the transaction of a group writes.
#[derive(Debug)]
pub struct Written {
    /// Those that were not taken before.
    pub rows: Vec<Row>,
    pub tiles: BTreeMap<TileId, Vec<u8>>,
    /// What the entries name.
    names: Vec<Digest>,
    /// Entries of the journal once this is committed.
    len: u64,
}

impl Written {
    /// What goes into the index of names, which has the first `upto` entries, and how many it has then. `None` while nothing
    /// is named and it lags little.
    pub fn index(&self, upto: u64) -> Option<(&[Digest], u64)> {
        let due = !self.names.is_empty() || self.len.saturating_sub(upto) >= NAMES_LAG;
        due.then_some((&self.names, self.len))
    }
}

impl Group {
    /// An empty group after `tip`.
    pub fn after(tip: &Tip) -> Group {
        let (tiles, changed) = (BTreeMap::new(), BTreeSet::new());
        Group { tip: tip.clone(), rows: Vec::new(), tiles, changed, names: Vec::new() }
    }

    /// Takes up one append, whole; a refused one leaves no trace. The entries are durable once the group is.
    pub fn append(&mut self, at: UnixMs, drafts: Vec<Draft>) -> Result<Vec<Entry>, JournalError> {
        check_limits(&drafts)?;
        let (before, mut head) = (self.rows.len(), self.tip.head);
        let (mut entries, mut leaves) = (Vec::with_capacity(drafts.len()), Vec::with_capacity(drafts.len()));
        for draft in drafts {
            let linked = link(&mut head, at, draft);
            let Chained { entry, bytes, leaf, opening } = linked.inspect_err(|_| self.rows.truncate(before))?;
            self.rows.push(Row { seq: entry.seq, at: entry.at, bytes, opening });
            leaves.push(leaf);
            entries.push(entry);
        }
        for leaf in leaves {
            let (changed, tiles) = (&mut self.changed, &mut self.tiles);
            self.tip.edge.push(leaf, &mut |id, hashes| {
                changed.insert(id);
                // The edge lets go of a full tile; the others are taken from it at the end.
                if hashes.len() == TILE_WIDTH {
                    tiles.insert(id, bytes_of(hashes));
                }
            });
        }
        self.tip.head = head;
        self.names.extend(entries.iter().filter_map(named_by));
        Ok(entries)
    }

    /// The rows so far that were not taken yet, for a writer that writes them while the rest is made.
    pub fn take_rows(&mut self) -> Vec<Row> {
        core::mem::take(&mut self.rows)
    }

    /// How many rows wait to be taken.
    pub fn waiting_rows(&self) -> usize {
        self.rows.len()
    }

    /// What the transaction writes, and the journal's end once it is committed.
    pub fn finish(self) -> (Written, Tip) {
        let Group { tip, rows, mut tiles, changed, names } = self;
        let partial = tip.edge.tiles().filter(|(id, hashes)| !hashes.is_empty() && changed.contains(id));
        tiles.extend(partial.map(|(id, hashes)| (id, bytes_of(hashes))));
        (Written { rows, tiles, names, len: tip.head.len }, tip)
    }
}

/// An entry from its row; what is stored is checked against its number.
pub fn entry_of(seq: u64, bytes: &[u8], opening: Option<&[u8]>) -> Result<Entry, JournalError> {
    let damaged = |what: String| JournalError::Damaged { seq, what };
    let mut entry = Entry::decode(bytes).map_err(|e| damaged(e.to_string()))?;
    if entry.seq != seq {
        return Err(damaged(format!("it says that it is number {}", entry.seq)));
    }
    if let Some(bytes) = opening {
        let opening = cbor::decode::<ReceiptOpening>(bytes).map_err(|e| damaged(format!("opening: {e}")))?;
        entry.set_opening(Some(opening));
    }
    Ok(entry)
}

/// The hashes of a stored tile.
pub fn hashes_of(bytes: &[u8]) -> Vec<Digest> {
    let whole = bytes.chunks_exact(32);
    whole.filter_map(|chunk| chunk.try_into().ok()).map(Digest).collect()
}

fn bytes_of(hashes: &[Digest]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(hashes.len().saturating_mul(32));
    hashes.iter().for_each(|hash| bytes.extend_from_slice(&hash.0));
    bytes
}
