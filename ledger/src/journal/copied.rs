//! A stored journal row by row, as one database gives it to another for a copy. Nothing is decoded, so nothing changes: a copy
//! has the same bytes, leaves and tiles. What a copy is for decides whoever makes it; here nothing is read or written.

use crate::log::TileId;
use satgrid_types::Digest;

/// Rows of one table, in the order in which a copy takes them: entries first, each table by its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Copied {
    Entries(Vec<CopiedEntry>),
    Tiles(Vec<(TileId, Vec<u8>)>),
    /// By the number of entries that each covers, as signed notes.
    Checkpoints(Vec<(u64, String)>),
    Witnessed(Vec<CopiedNote>),
    /// What the first `upto` entries name.
    Names {
        names: Vec<Digest>,
        upto: u64,
    },
}

/// An entry's row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopiedEntry {
    pub seq: u64,
    pub at: u64,
    pub bytes: Vec<u8>,
    pub opening: Option<Vec<u8>>,
    /// Where the body was pruned: the leaf of the bytes that were there.
    pub leaf: Option<Vec<u8>>,
}

/// Another node's checkpoint as it was heard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopiedNote {
    pub node: Vec<u8>,
    pub size: u64,
    pub note: String,
    pub heard_at: u64,
}
