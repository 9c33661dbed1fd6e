//! By which payment hashes and transaction ids an entry explains a line of a wallet's list.

use crate::{
    audit::payment_hash,
    entry::{Entry, Evidence},
};
use satgrid_types::{Digest, PaymentHash};

/// What this entry names. Payment hashes and transaction ids are both digests, and stand in one index.
pub fn named_by(entry: &Entry) -> Option<Digest> {
    let payment = |hash: &PaymentHash| Some(Digest(hash.0));
    match entry.evidence.as_ref()? {
        Evidence::Invoice { bolt11, .. } => payment_hash(bolt11).as_ref().and_then(payment),
        Evidence::PaymentAttempted { payment_hash, .. }
        | Evidence::PaymentSettled { payment_hash, .. }
        | Evidence::PaymentReceived { payment_hash, .. }
        | Evidence::RefundAttempted { payment_hash, .. }
        | Evidence::RefundSettled { payment_hash, .. }
        | Evidence::RefundReceived { payment_hash, .. }
        | Evidence::WalletPayment { payment_hash, .. } => payment(payment_hash),
        Evidence::OnChain { txid, .. } => Some(*txid),
        Evidence::Genesis { .. }
        | Evidence::Listing { .. }
        | Evidence::Quote(_)
        | Evidence::Open(_)
        | Evidence::PaymentFailed { .. }
        | Evidence::Request(_)
        | Evidence::Ack(_)
        | Evidence::Receipt { .. }
        | Evidence::Abandoned { .. }
        | Evidence::Close(_)
        | Evidence::CreditNote(_)
        | Evidence::CreditTransfer(_)
        | Evidence::ChannelClosed { .. }
        | Evidence::Misbehaviour { .. }
        | Evidence::WalletSnapshot { .. }
        | Evidence::Checkpoint { .. }
        | Evidence::Succession(_)
        | Evidence::Promise(_) => None,
    }
}
