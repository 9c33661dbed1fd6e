//! What the front door writes in the journal: strangers' money as it comes in, is charged, and goes back.
//!
//! Clients sign nothing, so these entries have no evidence beside them; what they say is that `clients`, a liability, is
//! never below zero and that every msat of it came in over Lightning and left by a charge or a refund. Ids are derived
//! from what they stand for: after a crash the same transfer is written again and changes nothing.
//!
//! | step | debit / credit |
//! |---|---|
//! | an invoice is paid | lightning / clients |
//! | a slice of the house's | external / lightning: the owner's advance |
//! | a call has ended | clients / income, or clients / external where the node's own house has advanced it |
//! | a refund is attempted | clients / lightning, pending: the amount and its fee limit |
//! | it was paid, or failed | posted with its fee, or voided |

use crate::drive::journal::JournalWriter;
use satgrid_ledger::{
    Account, Transfer,
    entry::{Draft, Entry},
    transfer::TransferOp,
};
use satgrid_ledger_sqlite::{CallRef, RefundRow};
use satgrid_types::{Msat, PaymentHash, TransferId};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;

/// First 16 bytes of SHA-256 over a domain and what names the transfer.
fn id(domain: &[u8], parts: &[&[u8]]) -> TransferId {
    let hasher = parts.iter().fold(Sha256::new().chain_update(domain), |hasher, part| hasher.chain_update(part));
    let digest: [u8; 32] = hasher.finalize().into();
    let mut id = [0; 16];
    id.copy_from_slice(&digest[..16]);
    TransferId(id)
}

fn draft(transfer: Transfer) -> Draft {
    Draft { evidence: None, transfers: vec![transfer] }
}

/// An invoice of the door's was paid.
pub(super) fn deposit(hash: PaymentHash, received: Msat) -> Draft {
    draft(Transfer::post(id(b"satgrid-door-in-v1\0", &[&hash.0]), Account::Lightning, Account::Clients, received))
}

/// The owner pays a slice of the house's in advance.
pub(super) fn advance(hash: PaymentHash, amount: Msat) -> Draft {
    draft(Transfer::post(id(b"satgrid-house-v1\0", &[&hash.0]), Account::External, Account::Lightning, amount))
}

fn refund_id(row: &RefundRow) -> TransferId {
    id(b"satgrid-door-out-v1\0", &[&row.id.to_be_bytes(), &row.tries.to_be_bytes()])
}

/// Held before the wallet is asked: a try of a refund, and what its route may cost.
pub(super) fn refund_held(row: &RefundRow) -> Draft {
    let held = row.amount.saturating_add(row.max_fee);
    draft(Transfer::pending(refund_id(row), Account::Clients, Account::Lightning, held, None))
}

pub(super) fn refund_paid(row: &RefundRow, fee: Msat) -> Draft {
    draft(Transfer::post_pending(refund_id(row), row.amount.saturating_add(fee.min(row.max_fee))))
}

pub(super) fn refund_void(row: &RefundRow) -> Draft {
    draft(Transfer::void(refund_id(row)))
}

/// Where strangers' calls are charged, and to whose benefit.
#[derive(Clone)]
pub(crate) struct Till {
    journal: JournalWriter,
    earns: Account,
    /// What is charged on top of what a call has cost this node, in thousandths.
    pub margin_permille: u64,
}

fn charge_id(call: CallRef) -> TransferId {
    id(b"satgrid-door-call-v1\0", &[&call.id.0, &call.part.to_be_bytes()])
}

impl Till {
    /// What the node buys for strangers is its income with the margin on it.
    pub(crate) fn resale(journal: JournalWriter, margin_permille: u64) -> Till {
        Till { journal, earns: Account::Income, margin_permille }
    }

    /// What the node sells of its own was advanced by its owner, who is paid back. The provider's books have the income.
    pub(crate) fn own(journal: JournalWriter) -> Till {
        Till { journal, earns: Account::External, margin_permille: 0 }
    }

    /// Books what a call is charged; before its key is.
    pub(crate) async fn charge(&self, call: CallRef, amount: Msat) -> Result<(), String> {
        if amount.is_zero() {
            return Ok(());
        }
        let charge = Transfer::post(charge_id(call), Account::Clients, self.earns, amount);
        self.journal.append(vec![draft(charge)]).await.map(drop)
    }
}

/// Charges of calls that the last run left open, found while the journal is read.
#[derive(Debug, Default)]
pub(crate) struct Charged(BTreeMap<TransferId, Msat>);

impl Charged {
    pub(crate) fn of(calls: impl Iterator<Item = CallRef>) -> Charged {
        Charged(calls.map(|call| (charge_id(call), Msat::ZERO)).collect())
    }

    pub(crate) fn entry(&mut self, entry: &Entry) {
        if self.0.is_empty() || entry.evidence.is_some() {
            return;
        }
        for transfer in &entry.transfers {
            if let (TransferOp::Post { amount, .. }, Some(known)) = (transfer.op, self.0.get_mut(&transfer.id)) {
                *known = amount;
            }
        }
    }

    /// What the journal says that the call was charged, if it says anything.
    pub(crate) fn get(&self, call: CallRef) -> Option<Msat> {
        self.0.get(&charge_id(call)).copied().filter(|amount| !amount.is_zero())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use satgrid_types::RequestId;

    #[test]
    fn every_transfer_has_one_id() {
        let hash = PaymentHash([5; 32]);
        assert_eq!(deposit(hash, Msat(1)), deposit(hash, Msat(1)));
        let call = |part| charge_id(CallRef { id: RequestId([5; 32]), part });
        assert_ne!(call(0), call(1));
        assert_ne!(call(0), deposit(hash, Msat(1)).transfers[0].id);
    }
}
