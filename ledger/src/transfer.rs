//! Accounts and transfers: the vocabulary of double entry.
//!
//! A transfer moves an amount from the credited to the debited account. It happens at once ([`TransferOp::Post`]), or it
//! is reserved first ([`TransferOp::Pending`]) and then ended exactly once: posted (for the amount or less, the rest
//! returns), voided, or expired.

use core::fmt;
use minicbor::{Decode, Encode};
use satgrid_types::{Msat, NodeKey, RequestId, SessionId, TransferId, UnixMs, cbor};
use sha2::{Digest as _, Sha256};

/// Where value stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub enum Account {
    /// Asset: net of all Lightning payments since the journal began, so it may stand below zero.
    #[n(0)]
    Lightning,
    /// Liability, provider side: what a consumer has paid in and not used up.
    #[n(1)]
    Prepaid(#[n(0)] SessionId),
    /// Revenue: what was earned by receipts.
    #[n(2)]
    Income,
    /// Asset, consumer side: what was paid in and not used up.
    #[n(3)]
    PrepaidAsset(#[n(0)] SessionId),
    /// Expense: what inference has cost.
    #[n(4)]
    Expense,
    /// Expense: what routers (or a just-in-time channel) kept.
    #[n(5)]
    RoutingFees,
    /// Liability, provider side: remainders of closed sessions that are not paid out yet.
    #[n(6)]
    RefundsDue(#[n(0)] SessionId),
    /// Revenue: remainders whose credit notes ran out.
    #[n(7)]
    Dust,
    /// Liability: owed to a worker outside any session.
    #[n(8)]
    WorkerPayable(#[n(0)] NodeKey),
    /// Equity: deposits into and withdrawals from the wallet.
    #[n(9)]
    External,
    /// Liability: what clients of the front door, who have no node, have paid in and not used up.
    #[n(10)]
    Clients,
    /// Expense: what miners took of the operator's coins.
    #[n(11)]
    MinersFees,
}

/// On which side of an account its balance normally stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Normal {
    /// Assets and expenses: debits raise the balance.
    Debit,
    /// Liabilities, revenue and equity: credits raise it.
    Credit,
}

impl Account {
    pub const fn normal(&self) -> Normal {
        match self {
            Account::Lightning
            | Account::PrepaidAsset(_)
            | Account::Expense
            | Account::RoutingFees
            | Account::MinersFees => Normal::Debit,
            Account::Prepaid(_)
            | Account::Income
            | Account::RefundsDue(_)
            | Account::Dust
            | Account::WorkerPayable(_)
            | Account::External
            | Account::Clients => Normal::Credit,
        }
    }
    /// Nothing may be taken out of these beyond what is available in them.
    pub const fn never_negative(&self) -> bool {
        match self {
            Account::Prepaid(_)
            | Account::PrepaidAsset(_)
            | Account::RefundsDue(_)
            | Account::WorkerPayable(_)
            | Account::Clients => true,
            Account::Lightning
            | Account::Income
            | Account::Expense
            | Account::RoutingFees
            | Account::MinersFees
            | Account::Dust
            | Account::External => false,
        }
    }
    /// What this node owes to others: the figure that solvency is measured against.
    pub const fn is_liability(&self) -> bool {
        matches!(self, Account::Prepaid(_) | Account::RefundsDue(_) | Account::WorkerPayable(_) | Account::Clients)
    }
    /// The session that the account belongs to, if it is one of a session's.
    pub const fn session(&self) -> Option<SessionId> {
        match self {
            Account::Prepaid(s) | Account::PrepaidAsset(s) | Account::RefundsDue(s) => Some(*s),
            Account::Lightning
            | Account::Income
            | Account::Expense
            | Account::RoutingFees
            | Account::MinersFees
            | Account::Dust
            | Account::WorkerPayable(_)
            | Account::External
            | Account::Clients => None,
        }
    }
    /// The account's name without whose it is.
    pub const fn name(&self) -> &'static str {
        match self {
            Account::Lightning => "lightning",
            Account::Prepaid(_) => "prepaid",
            Account::Income => "income",
            Account::PrepaidAsset(_) => "prepaid-asset",
            Account::Expense => "expense",
            Account::RoutingFees => "routing-fees",
            Account::RefundsDue(_) => "refunds-due",
            Account::Dust => "dust",
            Account::WorkerPayable(_) => "worker-payable",
            Account::External => "external",
            Account::Clients => "clients",
            Account::MinersFees => "miners-fees",
        }
    }
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Account::Prepaid(s) | Account::PrepaidAsset(s) | Account::RefundsDue(s) => write!(f, "{}:{s}", self.name()),
            Account::WorkerPayable(key) => write!(f, "{}:{key}", self.name()),
            Account::Lightning
            | Account::Income
            | Account::Expense
            | Account::RoutingFees
            | Account::MinersFees
            | Account::Dust
            | Account::External
            | Account::Clients => f.write_str(self.name()),
        }
    }
}

/// What a transfer does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Encode, Decode)]
#[cbor(map)]
pub enum TransferOp {
    #[n(0)]
    Post {
        #[n(0)]
        debit: Account,
        #[n(1)]
        credit: Account,
        #[n(2)]
        amount: Msat,
    },
    /// Reserves the amount in the account that it will leave.
    #[n(1)]
    Pending {
        #[n(0)]
        debit: Account,
        #[n(1)]
        credit: Account,
        #[n(2)]
        amount: Msat,
        /// From then on it may be expired. Absent where only an event may end it: a payment whose fate is unknown.
        #[n(3)]
        expires_at: Option<UnixMs>,
    },
    /// Ends a pending transfer for `amount`, which is above zero and at most what was reserved; the rest returns.
    #[n(2)]
    PostPending {
        #[n(0)]
        pending: TransferId,
        #[n(1)]
        amount: Msat,
    },
    #[n(3)]
    VoidPending {
        #[n(0)]
        pending: TransferId,
    },
    /// As void, by its timeout.
    #[n(4)]
    ExpirePending {
        #[n(0)]
        pending: TransferId,
    },
}

/// An immutable transfer. Corrections are new transfers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Encode, Decode)]
#[cbor(map)]
pub struct Transfer {
    #[n(0)]
    pub id: TransferId,
    #[n(1)]
    pub op: TransferOp,
}

impl Transfer {
    pub const fn post(id: TransferId, debit: Account, credit: Account, amount: Msat) -> Transfer {
        Transfer { id, op: TransferOp::Post { debit, credit, amount } }
    }
    pub const fn pending(
        id: TransferId,
        debit: Account,
        credit: Account,
        amount: Msat,
        expires_at: Option<UnixMs>,
    ) -> Transfer {
        Transfer { id, op: TransferOp::Pending { debit, credit, amount, expires_at } }
    }
    /// Ends `pending` under the id that [`end_id`] derives from it.
    pub fn post_pending(pending: TransferId, amount: Msat) -> Transfer {
        Transfer { id: end_id(pending), op: TransferOp::PostPending { pending, amount } }
    }
    pub fn void(pending: TransferId) -> Transfer {
        Transfer { id: end_id(pending), op: TransferOp::VoidPending { pending } }
    }
    pub fn expire(pending: TransferId) -> Transfer {
        Transfer { id: end_id(pending), op: TransferOp::ExpirePending { pending } }
    }
}

/// What a transfer is for; part of its id. The number is what is hashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Encode, Decode)]
#[cbor(index_only)]
pub enum TransferKind {
    /// Consumer: a slice on its way. `k`: see [`attempt`].
    #[n(0)]
    Slice,
    /// Consumer: the slice's routing fee, reserved up to its cap. `k` as the slice's.
    #[n(1)]
    SliceFee,
    /// Provider: a slice that arrived. `k` of the slice.
    #[n(2)]
    SliceCredit,
    /// Provider: what a just-in-time channel kept of it. `k` of the slice.
    #[n(3)]
    SliceSkim,
    /// Either side: the reservation of a request, `k` = 0 for the prompt and the first window, then 1, 2, ...
    #[n(4)]
    Hold,
    /// Either side: a charge that was not reserved. `k` of the reservation it would have been.
    #[n(5)]
    Charge,
    /// Provider: prepaid remainder becomes a refund due.
    #[n(6)]
    Remainder,
    /// Provider: a refund on its way. `k`: see [`attempt`].
    #[n(7)]
    Refund,
    /// Provider: its routing fee.
    #[n(8)]
    RefundFee,
    /// Consumer: a refund that arrived.
    #[n(9)]
    RefundCredit,
    /// Consumer: the part of the remainder that the refund's routing cost.
    #[n(10)]
    RefundLoss,
    /// Provider: a remainder whose credit note ran out.
    #[n(11)]
    DustKept,
    /// The routing fee of a settled slice, posted without a reservation.
    #[n(12)]
    SliceFeePaid,
    /// Deposits, withdrawals and corrections, numbered by `k`.
    #[n(13)]
    Other,
    /// Either side: a credit note that was spent in another session. Its id is made of the session that was owed.
    #[n(14)]
    CreditSpent,
}

/// The deterministic id of a transfer, so that a replay after a crash is the same transfer and does nothing.
///
/// First 16 bytes of SHA-256 over `"satgrid-transfer-v1\0"` and the canonical CBOR array
/// `[session (bytes), request (bytes, or null), kind (unsigned), k (unsigned)]`.
pub fn transfer_id(session: SessionId, request: Option<RequestId>, kind: TransferKind, k: u32) -> TransferId {
    digest16(b"satgrid-transfer-v1\0", &cbor::encode(&(session, request, kind, k)))
}

/// The id of the transfer that ends `pending`: first 16 bytes of SHA-256 over `"satgrid-end-v1\0"` and its 16 bytes.
/// There is one id for all three endings, so two different ones can never both be booked.
pub fn end_id(pending: TransferId) -> TransferId {
    digest16(b"satgrid-end-v1\0", &pending.0)
}

/// `k` of the `again`-th further try of slice `k`: a failed payment that is made again is another transfer.
/// `None` where either number does not fit 16 bits.
pub fn attempt(k: u32, again: u32) -> Option<u32> {
    let (low, high) = (u16::try_from(k).ok()?, u16::try_from(again).ok()?);
    Some(u32::from(high).wrapping_shl(16) | u32::from(low))
}

fn digest16(context: &[u8], bytes: &[u8]) -> TransferId {
    let digest = Sha256::new().chain_update(context).chain_update(bytes).finalize();
    let mut id = [0; 16];
    id.copy_from_slice(&digest[..16]);
    TransferId(id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn ids_differ_in_every_argument() {
        let (s, t) = (SessionId([1; 32]), SessionId([2; 32]));
        let r = RequestId([1; 32]);
        let ids = BTreeSet::from([
            transfer_id(s, None, TransferKind::Slice, 0),
            transfer_id(t, None, TransferKind::Slice, 0),
            transfer_id(s, Some(r), TransferKind::Slice, 0),
            transfer_id(s, None, TransferKind::Hold, 0),
            transfer_id(s, None, TransferKind::Slice, 1),
            end_id(transfer_id(s, None, TransferKind::Slice, 0)),
        ]);
        assert_eq!(ids.len(), 6);
        assert_eq!(
            transfer_id(s, Some(r), TransferKind::Hold, 7),
            transfer_id(s, Some(r), TransferKind::Hold, 7),
            "the same transfer has the same id after a crash"
        );
    }

    #[test]
    fn attempts_are_numbered_apart() {
        assert_eq!(attempt(3, 0), Some(3));
        assert_eq!(attempt(3, 2), Some(0x0002_0003));
        assert_eq!(attempt(70_000, 0), None);
    }
}
