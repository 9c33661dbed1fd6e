//! The file that a journal is exported to, and that anyone can check offline.
//!
//! A bundle is a sequence of CBOR byte strings (definite, shortest length form), each holding the canonical CBOR of one
//! [`Item`] and none longer than [`MAX_ITEM_LEN`]: the header, the signed checkpoint, the entries in order, the end. A
//! file that proves two histories holds one [`Item::Fraud`] alone; a claim is [`Item::Claim`], its pieces and the end.
//!
//! A whole export holds every entry below the checkpoint's size, so its root is recomputed. A partial one holds whole
//! sessions, each entry with an inclusion proof to the checkpoint.

mod reader;
mod selection;
mod writer;

pub use reader::*;
pub use selection::*;
pub use writer::*;

use crate::{
    claim::ClaimHeader,
    entry::{Evidence, MAX_ENTRY_LEN, MAX_OPENING_LEN},
    log::{FraudProof, MAX_PROOF},
};
use minicbor::{Decode, Encode};
use satgrid_types::{Digest, NodeKey, SessionId, UnixMs};

/// No item is longer, in bytes; a reader refuses a longer one before it allocates anything.
pub const MAX_ITEM_LEN: usize = MAX_ENTRY_LEN + MAX_OPENING_LEN + MAX_PROOF * 34 + 64;

/// Which part of a journal a bundle holds. A session is exported whole or not at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum Filter {
    #[n(0)]
    All,
    #[n(1)]
    Session(#[n(0)] SessionId),
    /// Sessions with this provider or session key.
    #[n(2)]
    Peer(#[n(0)] NodeKey),
    /// Sessions with any entry in `[from, to)`.
    #[n(3)]
    Time(#[n(0)] UnixMs, #[n(1)] UnixMs),
}

/// What a bundle says about itself.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Header {
    /// Always [`Header::FORMAT`].
    #[n(0)]
    pub format: String,
    #[n(1)]
    pub version: u32,
    /// Whose journal it is.
    #[n(2)]
    pub node: NodeKey,
    #[n(3)]
    pub filter: Filter,
}

impl Header {
    pub const FORMAT: &'static str = "satgrid-bundle";
    pub const VERSION: u32 = 1;
    pub fn new(node: NodeKey, filter: Filter) -> Header {
        Header { format: Header::FORMAT.into(), version: Header::VERSION, node, filter }
    }
}

/// One entry as it stands in a bundle.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct EntryItem {
    /// The entry's canonical bytes: the leaf.
    #[cbor(n(0), with = "minicbor::bytes")]
    pub entry: Vec<u8>,
    /// Canonical bytes of the receipt's opening; absent where there is none or it was redacted.
    #[cbor(n(1), with = "minicbor::bytes")]
    pub opening: Option<Vec<u8>>,
    /// Inclusion proof to the bundle's checkpoint; absent in a whole export.
    #[n(2)]
    pub proof: Option<Vec<Digest>>,
}

/// One item of a file.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Item {
    #[n(0)]
    Header(#[n(0)] Header),
    /// The C2SP signed note.
    #[n(1)]
    Checkpoint(#[n(0)] String),
    #[n(2)]
    Entry(#[n(0)] EntryItem),
    /// The end, with the number of entries before it.
    #[n(3)]
    End(#[n(0)] u64),
    #[n(4)]
    Fraud(#[n(0)] FraudProof),
    /// Begins a claim; its pieces and an end follow.
    #[n(5)]
    Claim(#[n(0)] ClaimHeader),
    #[n(6)]
    Piece(#[n(0)] Box<Evidence>),
}

#[cfg(test)]
mod tests;
