//! A credit note that is spent: what a closed session is owed becomes the balance of another one with the same provider.
//!
//! The consumer orders it with the closed session's key, the provider agrees; both signatures together are the transfer. It
//! says nothing that changes from one order to the next, so an order that is made again after a crash is the same bytes.

use super::CreditNote;
use minicbor::{Decode, Encode};
use satgrid_types::{BothSigned, Digest, Msat, NodeKey, SessionId, Signed, Statement, statement_id};

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct CreditTransfer {
    #[n(0)]
    pub version: u32,
    #[n(1)]
    pub provider: NodeKey,
    /// The closed session that is owed.
    #[n(2)]
    pub from: SessionId,
    /// Its key, which signs this for the consumer.
    #[n(3)]
    pub consumer: NodeKey,
    /// The open session that gets it.
    #[n(4)]
    pub to: SessionId,
    /// Id of the credit note that is spent.
    #[n(5)]
    pub note: Digest,
    /// All that it says is owed.
    #[n(6)]
    pub amount: Msat,
}

impl CreditTransfer {
    pub const VERSION: u32 = 1;
}
impl Statement for CreditTransfer {
    const KIND: &'static str = "credit-transfer";
    const MAX_LEN: usize = 256;
}

/// The id of a credit note.
pub fn note_id(note: &Signed<CreditNote>) -> Digest {
    Digest(statement_id::<CreditNote>(note.body()))
}

/// What a transfer says, if the provider and the closed session's key both signed it.
pub fn verify_credit(both: &BothSigned<CreditTransfer>) -> Option<CreditTransfer> {
    let body = both.peek().ok()?;
    both.verify(&body.provider, &body.consumer).ok()
}
