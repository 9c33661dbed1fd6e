//! Money as it moved: every posted transfer of a journal, with what it was for. Books of other programs are made of these.

use crate::source::Source;
use anyhow::Context;
use satgrid_ledger::{
    Books,
    audit::read_invoice,
    bundle::Subjected,
    entry::{Entry, Evidence},
    statements::{SessionOpen, receipt_id},
    transfer::{Account, TransferOp},
};
use satgrid_types::{Msat, NodeKey, PaymentHash, ReceiptId, SessionId, UnixMs, statement_id};
use std::collections::{BTreeMap, BTreeSet};

/// What a movement was for. The words stand in exports and do not change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Category {
    SlicePaid,
    SliceReceived,
    RoutingFee,
    MinersFee,
    Inference,
    RemainderDue,
    RefundPaid,
    RefundReceived,
    RefundLoss,
    /// A credit note that was spent in another session.
    CreditSpent,
    Dust,
    Wallet,
    ClientPaidIn,
    ClientPaidBack,
    ClientCharged,
    Correction,
}

impl Category {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Category::SlicePaid => "slice-paid",
            Category::SliceReceived => "slice-received",
            Category::RoutingFee => "routing-fee",
            Category::MinersFee => "miners-fee",
            Category::Inference => "inference",
            Category::RemainderDue => "remainder-due",
            Category::RefundPaid => "refund-paid",
            Category::RefundReceived => "refund-received",
            Category::RefundLoss => "refund-loss",
            Category::CreditSpent => "credit-spent",
            Category::Dust => "dust",
            Category::Wallet => "wallet",
            Category::ClientPaidIn => "client-paid-in",
            Category::ClientPaidBack => "client-paid-back",
            Category::ClientCharged => "client-charged",
            Category::Correction => "correction",
        }
    }
}

/// One posted amount, from the credited to the debited account.
#[derive(Debug, Clone)]
pub(crate) struct Movement {
    pub(crate) entry: u64,
    pub(crate) at: UnixMs,
    pub(crate) category: Category,
    pub(crate) debit: Account,
    pub(crate) credit: Account,
    pub(crate) amount: Msat,
    pub(crate) session: Option<SessionId>,
    /// Who sits at the other end of the session.
    pub(crate) peer: Option<NodeKey>,
    pub(crate) model: String,
    pub(crate) payment_hash: Option<PaymentHash>,
    pub(crate) receipt: Option<ReceiptId>,
}

#[derive(Debug, Clone)]
struct Known {
    peer: NodeKey,
    model: String,
}

/// Folds a journal into movements.
#[derive(Debug, Default)]
pub(crate) struct Movements {
    books: Books,
    subjected: Subjected,
    ours: BTreeSet<NodeKey>,
    sessions: BTreeMap<SessionId, Known>,
}

impl Movements {
    /// What this entry moved; nothing where it only reserves or repeats.
    pub(crate) fn of(&mut self, entry: &Entry) -> anyhow::Result<Vec<Movement>> {
        let subjects = self.subjected.of(entry);
        let session = subjects.sessions.first().copied();
        self.learn(entry, session);
        let known = session.and_then(|session| self.sessions.get(&session));
        let (payment_hash, receipt) = names(entry.evidence.as_ref());
        let mut moved = Vec::new();
        // A reservation may be posted in the entry that made it.
        let mut here = BTreeMap::new();
        for transfer in entry.transfers.iter().filter(|transfer| !self.books.knows(&transfer.id)) {
            let (debit, credit, amount) = match transfer.op {
                TransferOp::Post { debit, credit, amount } => (debit, credit, amount),
                TransferOp::PostPending { pending, amount } => {
                    let held = self.books.pending(&pending).map(|hold| (hold.debit, hold.credit));
                    let Some((debit, credit)) = held.or_else(|| here.get(&pending).copied()) else { continue };
                    (debit, credit, amount)
                }
                TransferOp::Pending { debit, credit, .. } => {
                    here.insert(transfer.id, (debit, credit));
                    continue;
                }
                TransferOp::VoidPending { .. } | TransferOp::ExpirePending { .. } => continue,
            };
            moved.push(Movement {
                entry: entry.seq,
                at: entry.at,
                category: category(entry.evidence.as_ref(), debit, credit),
                debit,
                credit,
                amount,
                session,
                peer: known.map(|known| known.peer),
                model: known.map(|known| known.model.clone()).unwrap_or_default(),
                payment_hash,
                receipt,
            });
        }
        self.books.apply(entry.at, &entry.draft()).with_context(|| format!("entry {}", entry.seq))?;
        Ok(moved)
    }

    fn learn(&mut self, entry: &Entry, session: Option<SessionId>) {
        match &entry.evidence {
            Some(Evidence::Genesis { node, .. }) => drop(self.ours.insert(*node)),
            Some(Evidence::Succession(signed)) => self.ours.extend(signed.heir()),
            Some(Evidence::Open(open)) => {
                if let Ok(body) = open.peek() {
                    let id = SessionId(statement_id::<SessionOpen>(open.body()));
                    let peer = if self.ours.contains(&body.provider) { body.consumer } else { body.provider };
                    self.sessions.insert(id, Known { peer, model: String::new() });
                }
            }
            Some(Evidence::Receipt { receipt, .. }) => {
                if let (Some(known), Ok(receipt)) =
                    (session.and_then(|session| self.sessions.get_mut(&session)), receipt.peek())
                {
                    known.model = receipt.model;
                }
            }
            Some(_) | None => {}
        }
    }
}

/// Every movement of a source within a span of time, handed on one by one.
pub(crate) async fn each(
    source: &mut Source,
    (from, to): (Option<UnixMs>, Option<UnixMs>),
    mut take: impl FnMut(Movement) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut movements = Movements::default();
    loop {
        let entries = source.next().await?;
        if entries.is_empty() {
            return Ok(());
        }
        for entry in entries {
            for movement in movements.of(&entry)? {
                if from.is_none_or(|from| movement.at >= from) && to.is_none_or(|to| movement.at < to) {
                    take(movement)?;
                }
            }
        }
    }
}

fn names(evidence: Option<&Evidence>) -> (Option<PaymentHash>, Option<ReceiptId>) {
    match evidence {
        Some(
            Evidence::PaymentAttempted { payment_hash, .. }
            | Evidence::PaymentSettled { payment_hash, .. }
            | Evidence::PaymentFailed { payment_hash, .. }
            | Evidence::PaymentReceived { payment_hash, .. }
            | Evidence::RefundAttempted { payment_hash, .. }
            | Evidence::RefundSettled { payment_hash, .. }
            | Evidence::RefundReceived { payment_hash, .. }
            | Evidence::WalletPayment { payment_hash, .. },
        ) => (Some(*payment_hash), None),
        Some(Evidence::Invoice { bolt11, .. }) => (read_invoice(bolt11).ok().map(|facts| facts.payment_hash), None),
        Some(Evidence::Receipt { receipt, .. }) => (None, Some(receipt_id(receipt))),
        Some(_) | None => (None, None),
    }
}

fn category(evidence: Option<&Evidence>, debit: Account, credit: Account) -> Category {
    match (debit, credit) {
        (Account::RoutingFees, Account::PrepaidAsset(_)) => Category::RefundLoss,
        (Account::MinersFees, _) => Category::MinersFee,
        // Journals of before that account have what miners took here.
        (Account::RoutingFees, Account::External) => Category::MinersFee,
        (Account::RoutingFees, _) => Category::RoutingFee,
        (Account::PrepaidAsset(_), Account::Lightning) => Category::SlicePaid,
        (Account::Lightning, Account::Prepaid(_)) => Category::SliceReceived,
        (Account::Prepaid(_), Account::Income) => Category::Inference,
        (Account::Expense, Account::PrepaidAsset(_)) => match evidence {
            Some(Evidence::RefundReceived { .. }) => Category::RefundLoss,
            Some(_) | None => Category::Inference,
        },
        (Account::Prepaid(_), Account::RefundsDue(_)) => Category::RemainderDue,
        (Account::RefundsDue(_), Account::Lightning) => Category::RefundPaid,
        (Account::Lightning, Account::PrepaidAsset(_)) => Category::RefundReceived,
        (Account::RefundsDue(_), Account::Prepaid(_)) | (Account::PrepaidAsset(_), Account::PrepaidAsset(_)) => {
            Category::CreditSpent
        }
        (Account::RefundsDue(_), Account::Dust) => Category::Dust,
        (Account::Lightning, Account::Clients) => Category::ClientPaidIn,
        (Account::Clients, Account::Lightning) => Category::ClientPaidBack,
        (Account::Clients, Account::Income | Account::External) => Category::ClientCharged,
        (Account::Lightning, Account::External) | (Account::External, Account::Lightning) => Category::Wallet,
        _ => Category::Correction,
    }
}
