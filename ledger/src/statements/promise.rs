//! The provider's promise that a receipt is in its log.

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
}
impl Statement for InclusionPromise {
    const KIND: &'static str = "inclusion-promise";
    const MAX_LEN: usize = 256;
}
