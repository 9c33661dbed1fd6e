//! The provider's promise that a receipt is in its log.

use super::receipt_id;
use crate::entry::{Entry, Evidence};
use minicbor::{Decode, Encode};
use satgrid_types::{Digest, NodeKey, ReceiptId, SessionId, Statement, UnixMs};

/// The provider says: this receipt is the leaf at this index of my log.
///
/// A log of at least `index + 1` entries whose leaf there differs is then provably not the log it promised.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct InclusionPromise {
    #[n(0)]
    pub version: u32,
    #[n(1)]
    pub node: NodeKey,
    #[n(2)]
    pub session: SessionId,
    #[n(3)]
    pub receipt: ReceiptId,
    /// RFC 6962 leaf hash of the entry that holds the receipt.
    #[n(4)]
    pub leaf: Digest,
    #[n(5)]
    pub index: u64,
    #[n(6)]
    pub promised_at: UnixMs,
}

impl InclusionPromise {
    pub const VERSION: u32 = 1;

    /// What `node` promises about an entry of its journal; `None` where that holds no receipt.
    pub fn of(entry: &Entry, node: NodeKey, promised_at: UnixMs) -> Option<InclusionPromise> {
        let Some(Evidence::Receipt { receipt, .. }) = &entry.evidence else { return None };
        let session = receipt.peek().ok()?.session;
        Some(InclusionPromise {
            version: InclusionPromise::VERSION,
            node,
            session,
            receipt: receipt_id(receipt),
            leaf: entry.leaf(),
            index: entry.seq,
            promised_at,
        })
    }
}
impl Statement for InclusionPromise {
    const KIND: &'static str = "inclusion-promise";
    const MAX_LEN: usize = 256;
}
