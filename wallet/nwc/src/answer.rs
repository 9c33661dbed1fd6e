//! What somebody else's wallet answers, read: JSON in, the port's words out.

use satgrid_types::{Msat, PaymentHash, Preimage, UnixMs};
use satgrid_wallet::{Direction, FailureReason, PaymentRecord, PaymentState};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

/// What `lookup_invoice` says.
pub(crate) enum Looked {
    Pending,
    Failed,
    Settled { preimage: Option<Preimage>, fee: Msat, amount: Msat },
}

pub(crate) fn looked(found: &Value, hash: PaymentHash) -> Looked {
    let state = found["state"].as_str().unwrap_or_default().to_lowercase();
    let settled = state == "settled" || (state.is_empty() && found["settled_at"].as_u64().is_some_and(|at| at > 0));
    if settled {
        let amount = Msat(found["amount"].as_u64().unwrap_or_default());
        return Looked::Settled { preimage: preimage(found, hash), fee: fee(found), amount };
    }
    if state == "failed" { Looked::Failed } else { Looked::Pending }
}

/// The preimage, if it is this payment's: another proves nothing, and nobody could book it.
pub(crate) fn preimage(value: &Value, hash: PaymentHash) -> Option<Preimage> {
    let preimage: Preimage = value["preimage"].as_str()?.parse().ok()?;
    (<[u8; 32]>::from(Sha256::digest(preimage.0)) == hash.0).then_some(preimage)
}
pub(crate) fn fee(value: &Value) -> Msat {
    Msat(value["fees_paid"].as_u64().unwrap_or_default())
}

/// A row of `list_transactions`.
pub(crate) fn record(row: &Value) -> Option<PaymentRecord> {
    let hash: PaymentHash = row["payment_hash"].as_str()?.parse().ok()?;
    let outgoing = row["type"].as_str() == Some("outgoing");
    let (amount, fee) = (Msat(row["amount"].as_u64()?), fee(row));
    let state = match looked(row, hash) {
        Looked::Settled { preimage: Some(preimage), fee, amount } => PaymentState::Settled { preimage, fee, amount },
        Looked::Settled { preimage: None, .. } | Looked::Pending => PaymentState::InFlight,
        Looked::Failed => PaymentState::Failed { reason: FailureReason::Other },
    };
    let at = row["settled_at"].as_u64().filter(|at| *at > 0).or(row["created_at"].as_u64()).unwrap_or_default();
    let direction = if outgoing { Direction::Outbound } else { Direction::Inbound };
    Some(PaymentRecord { hash, direction, amount, fee, state, at: UnixMs::from_secs(at) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_preimage_that_does_not_hash_to_it_is_none() {
        let right = [7; 32];
        let hash = PaymentHash(Sha256::digest(right).into());
        let found = |preimage: [u8; 32]| json!({ "state": "settled", "preimage": hex::encode(preimage), "amount": 5 });
        let check = |preimage: [u8; 32], expect: Option<Preimage>| match looked(&found(preimage), hash) {
            Looked::Settled { preimage, amount, .. } => assert_eq!((preimage, amount), (expect, Msat(5))),
            Looked::Pending | Looked::Failed => panic!("it is settled"),
        };
        check(right, Some(Preimage(right)));
        check([8; 32], None);
        assert_eq!(preimage(&json!({ "preimage": "00" }), hash), None);
    }
}
