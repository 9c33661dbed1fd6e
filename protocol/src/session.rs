//! One session as both sides see it: a fold over what the journal holds about it.
//!
//! The methods of [`SessionState`] that are named after a step return the [`Draft`] that the journal must make durable;
//! [`SessionState::apply`] takes a draft that is durable (or is about to be, in order) into the state. A node that
//! starts again folds its journal and stands where it stood: there is no second source of truth.
//!
//! | step | who | entry | what a crash right after it means |
//! |---|---|---|---|
//! | open | both | quote, open | the session exists, nothing is paid |
//! | invoice | both | invoice | it may be paid until it expires |
//! | attempt | consumer | attempted + pending slice | the payment may be out: resolve it by its hash, never pay k again before |
//! | settle, fail | consumer | settled / failed, posted / voided | known |
//! | credit | provider | received + posted | the balance is there |
//! | request | both | request + hold | nothing is owed yet |
//! | ack | both | ack + hold | so much is owed |
//! | finish | both | receipt, holds posted or voided | settled |
//! | abandon | both | abandoned, holds posted or voided | settled at the last ack |
//! | close, refund | both | close, refund entries | the remainder is due, on its way, or back |
//! | credit | both | credit transfer | a closed session's remainder is this session's balance |

mod credit;
mod requests;
mod slices;
#[cfg(test)]
mod tests;
mod unpaid;

use crate::exposure::{ConsumerExposure, ProviderExposure};
use satgrid_ledger::{
    entry::{Draft, Evidence},
    statements::{Ack, CreditNote, CreditTransfer, Receipt, SessionClose, SessionOpen, session_id},
    transfer::{Account, Transfer, TransferKind, TransferOp, transfer_id},
};
use satgrid_pricing::ChargeError;
use satgrid_types::{
    AckId, BothSigned, Msat, NodeKey, Numerators, PaymentHash, Preimage, Quote, QuoteId, ReceiptId, RequestId,
    SessionId, Signed, TransferId, UnixMs, Verified,
};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use thiserror::Error;

pub use requests::{MAX_HOLDS, ReceiptFacts, RequestState};
pub use slices::{SliceState, SliceStatus, invoice_hash};
pub use unpaid::LATE_PAYMENT_MS;

/// Quotes of one session that are kept: the current one and those that open requests refer to.
pub const MAX_QUOTES: usize = 16;

/// Which side of the session this node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    Provider,
    Consumer,
}

/// A step that does not fit the session's state: a bug of ours, or a journal that somebody edited.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SessionError {
    #[error("no request {0} in this session")]
    UnknownRequest(RequestId),
    #[error("no slice {0} in this session")]
    UnknownSlice(u32),
    #[error("no payment {0} in this session")]
    UnknownPayment(PaymentHash),
    #[error("no quote {0} in this session")]
    UnknownQuote(QuoteId),
    #[error("slice {k} is {status}, not what this step needs")]
    SliceStatus { k: u32, status: &'static str },
    #[error("{needed} needed, {available} available")]
    Funds { needed: Msat, available: Msat },
    #[error(transparent)]
    Charge(#[from] ChargeError),
    #[error("a sum does not fit 64 bits")]
    Overflow,
    #[error("evidence does not verify: {0}")]
    Evidence(String),
}

/// The state of one session, on either side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionState {
    side: Side,
    id: SessionId,
    open: SessionOpen,
    quotes: BTreeMap<QuoteId, Quote>,
    current_quote: QuoteId,
    slices: BTreeMap<u32, SliceState>,
    by_hash: BTreeMap<PaymentHash, u32>,
    /// When the last of its invoices expires.
    payable_until: Option<UnixMs>,
    paid: Msat,
    refunded: Msat,
    requests: BTreeMap<RequestId, RequestState>,
    /// All of them, as the books know all their transfers: an id that came again as a new request would stop the journal.
    ended: BTreeSet<RequestId>,
    /// Of all requests that ended.
    settled: Numerators,
    charged: Msat,
    receipts: u32,
    last_receipt: Option<ReceiptId>,
    last_receipt_signed: Option<BothSigned<Receipt>>,
    /// Those before it, oldest first: as many as a provider may have lost in a crash.
    earlier_receipts: VecDeque<BothSigned<Receipt>>,
    abandoned: Vec<(RequestId, Option<BothSigned<Ack>>)>,
    receipted_slices: BTreeSet<u32>,
    receipted_paid: Msat,
    close: Option<SessionClose>,
    /// Provider: the refund whose fate is not known, and how many came to nothing before it.
    refund: Option<(PaymentHash, Msat)>,
    /// What is reserved for it: its amount, and what its route may cost.
    refund_held: Msat,
    refunds_failed: u32,
    /// Refunds of this session that were paid: a remainder may go back in parts.
    refunds_made: u32,
    /// Payment hashes of the invoices that closes named; refunds that arrived on one of them.
    refund_invoices: BTreeSet<PaymentHash>,
    refunds_received: BTreeSet<PaymentHash>,
    /// The provider's word for what it still owes.
    credit_note: Option<Signed<CreditNote>>,
    /// Where that note was spent, once it was; and the notes of other sessions that were spent here.
    spent: Option<BothSigned<CreditTransfer>>,
    spent_amount: Msat,
    credits: Vec<BothSigned<CreditTransfer>>,
    credited: Msat,
}

/// Receipts that a provider may have countersigned and not yet on its disk when it offers the next one.
pub const MAX_RECEIPTS_AHEAD: usize = 7;
/// Only receipts up to this size are offered ahead of the disk: a resume shows them all in one frame.
pub const MAX_AHEAD_BYTES: usize = 2_048;

impl SessionState {
    /// A new session. The drafts that make it durable are [`SessionState::open_drafts`].
    pub fn new(side: Side, quote: &Verified<Quote>, open: &Verified<SessionOpen>) -> SessionState {
        SessionState {
            side,
            id: session_id(open),
            open: SessionOpen::clone(open),
            quotes: BTreeMap::from([(quote.quote_id(), Quote::clone(quote))]),
            current_quote: quote.quote_id(),
            slices: BTreeMap::new(),
            by_hash: BTreeMap::new(),
            payable_until: None,
            paid: Msat::ZERO,
            refunded: Msat::ZERO,
            requests: BTreeMap::new(),
            ended: BTreeSet::new(),
            settled: Numerators::ZERO,
            charged: Msat::ZERO,
            receipts: 0,
            last_receipt: None,
            last_receipt_signed: None,
            earlier_receipts: VecDeque::new(),
            abandoned: Vec::new(),
            receipted_slices: BTreeSet::new(),
            receipted_paid: Msat::ZERO,
            close: None,
            refund: None,
            refund_held: Msat::ZERO,
            refunds_failed: 0,
            refunds_made: 0,
            refund_invoices: BTreeSet::new(),
            refunds_received: BTreeSet::new(),
            credit_note: None,
            spent: None,
            spent_amount: Msat::ZERO,
            credits: Vec::new(),
            credited: Msat::ZERO,
        }
    }

    /// The entries that begin a session.
    pub fn open_drafts(quote: &Verified<Quote>, open: &Verified<SessionOpen>) -> Vec<Draft> {
        vec![Draft::of(Evidence::Quote(quote.evidence().clone())), Draft::of(Evidence::Open(open.evidence().clone()))]
    }

    pub fn side(&self) -> Side {
        self.side
    }
    pub fn id(&self) -> SessionId {
        self.id
    }
    pub fn provider(&self) -> NodeKey {
        self.open.provider
    }
    pub fn consumer(&self) -> NodeKey {
        self.open.consumer
    }
    pub fn terms(&self) -> &SessionOpen {
        &self.open
    }
    /// The quote under which new requests and invoices are made.
    pub fn quote_id(&self) -> QuoteId {
        self.current_quote
    }
    pub fn quote(&self) -> &Quote {
        // The current quote is inserted before it becomes current and is never evicted.
        &self.quotes[&self.current_quote]
    }
    pub fn quote_of(&self, id: &QuoteId) -> Option<&Quote> {
        self.quotes.get(id)
    }
    /// Slices that arrived, less refunds.
    pub fn paid(&self) -> Msat {
        self.paid
    }
    /// The session's charge so far: over all requests that ended.
    pub fn charged(&self) -> Msat {
        self.charged
    }
    pub fn refunded(&self) -> Msat {
        self.refunded
    }
    pub fn receipts(&self) -> u32 {
        self.receipts
    }
    pub fn last_receipt(&self) -> Option<ReceiptId> {
        self.last_receipt
    }
    pub fn close_statement(&self) -> Option<&SessionClose> {
        self.close.as_ref()
    }
    /// What is owed on after the close, as long as some of it is.
    pub fn credit_note(&self) -> Option<&Signed<CreditNote>> {
        self.credit_note.as_ref().filter(|_| !self.remainder().is_zero())
    }
    /// Invoices that closes named, by their payment hashes.
    pub fn refund_invoices(&self) -> &BTreeSet<PaymentHash> {
        &self.refund_invoices
    }
    /// Consumer: this payment is a refund of this session, and it is not booked yet.
    pub fn is_refund_due_on(&self, hash: &PaymentHash) -> bool {
        let named = self.refund_invoices.contains(hash) && !self.refunds_received.contains(hash);
        named && !self.remainder().is_zero()
    }
    /// Provider: the refund that was attempted and whose fate is not known.
    pub fn refund_in_flight(&self) -> Option<(PaymentHash, Msat)> {
        self.refund
    }
    /// Reserved by open requests.
    pub fn reserved(&self) -> Msat {
        self.requests.values().fold(Msat::ZERO, |sum, r| sum.saturating_add(r.reserved()))
    }
    /// What is prepaid and neither charged nor reserved: the one figure for admission and for display.
    pub fn available(&self) -> Msat {
        self.remainder().saturating_sub(self.reserved())
    }
    /// What is prepaid and not charged: what a close would give back.
    pub fn remainder(&self) -> Msat {
        let gone = self.charged.saturating_add(self.refunded).saturating_add(self.spent_amount);
        self.paid.saturating_add(self.credited).saturating_sub(gone)
    }

    /// What open requests cost by their last acknowledgements.
    pub fn acked_open(&self) -> Msat {
        self.requests.values().fold(Msat::ZERO, |sum, r| sum.saturating_add(r.acked_cost()))
    }

    /// "Most you can lose now", consumer's side.
    pub fn consumer_exposure(&self) -> ConsumerExposure {
        let acked = self.acked_open();
        ConsumerExposure {
            paid: self
                .paid
                .saturating_add(self.credited)
                .saturating_sub(self.refunded.saturating_add(self.spent_amount)),
            charged: self.charged.saturating_add(acked),
            in_flight: self.in_flight(),
        }
    }

    /// "Most you can lose now", provider's side; `done` is the cost of the work done in open requests.
    pub fn provider_exposure(&self, done: Msat) -> ProviderExposure {
        let acked = self.acked_open();
        let owed = self.charged.saturating_add(acked);
        ProviderExposure { done, acked, credit: owed.saturating_sub(self.paid.saturating_add(self.credited)) }
    }

    /// A further quote for the same session, after the current one ran out.
    pub fn requote(&self, quote: &Verified<Quote>) -> Draft {
        Draft::of(Evidence::Quote(quote.evidence().clone()))
    }

    /// The consumer's close. The provider moves the remainder to refunds due in the same entry. Said again with another
    /// invoice, it moves nothing.
    pub fn closed(&self, close: &Signed<SessionClose>) -> Draft {
        let draft = Draft::of(Evidence::Close(close.clone()));
        let remainder = self.remainder();
        match self.side {
            Side::Provider if !remainder.is_zero() && self.close.is_none() => {
                let id = transfer_id(self.id, None, TransferKind::Remainder, 0);
                let (debit, credit) = (Account::Prepaid(self.id), Account::RefundsDue(self.id));
                draft.with([Transfer::post(id, debit, credit, remainder)])
            }
            Side::Provider | Side::Consumer => draft,
        }
    }

    /// Provider: about to pay the remainder back. `amount` and `max_fee` are together no more than is owed: who asks for less
    /// than its remainder leaves the rest for the route.
    pub fn refund_attempted(&self, payment_hash: PaymentHash, amount: Msat, max_fee: Msat) -> Draft {
        let (debit, credit) = (Account::RefundsDue(self.id), Account::Lightning);
        let held = amount.checked_add(max_fee).unwrap_or(amount);
        Draft::of(Evidence::RefundAttempted { session: self.id, payment_hash, amount, max_fee })
            .with([Transfer::pending(self.refund_transfer(), debit, credit, held, None)])
    }

    /// Provider: the remainder went back; what its route cost is owed no longer. Told twice, it is an error: a refund is
    /// booked once.
    pub fn refund_settled(
        &self,
        payment_hash: PaymentHash,
        preimage: Option<Preimage>,
        fee: Msat,
    ) -> Result<Draft, SessionError> {
        let amount = self.refund_of(&payment_hash)?;
        let from_due = amount.checked_add(fee).ok_or(SessionError::Overflow)?.min(self.refund_held);
        let mut transfers = vec![Transfer::post_pending(self.refund_transfer(), from_due)];
        // A wallet that paid more than it was allowed is booked as it is, and so is a refund of before fees were reserved.
        let beyond = fee.saturating_sub(from_due.saturating_sub(amount));
        if !beyond.is_zero() {
            let id = transfer_id(self.id, None, TransferKind::RefundFee, self.refunds_tried());
            transfers.push(Transfer::post(id, Account::RoutingFees, Account::Lightning, beyond));
        }
        let evidence = Evidence::RefundSettled { session: self.id, payment_hash, amount, fee, preimage };
        Ok(Draft::of(evidence).with(transfers))
    }

    /// Provider: the refund was not paid and will not be; the remainder is still owed.
    pub fn refund_failed(&self, payment_hash: PaymentHash, reason: String) -> Result<Draft, SessionError> {
        self.refund_of(&payment_hash)?;
        let void = Transfer::void(self.refund_transfer());
        Ok(Draft::of(Evidence::PaymentFailed { payment_hash, reason }).with([void]))
    }

    fn refund_of(&self, hash: &PaymentHash) -> Result<Msat, SessionError> {
        let found = self.refund.filter(|(known, _)| known == hash);
        found.map(|(_, amount)| amount).ok_or(SessionError::UnknownPayment(*hash))
    }

    /// What these transfers reserve for the refund, or post of it.
    fn of_refund(&self, transfers: &[Transfer]) -> Option<Msat> {
        let id = self.refund_transfer();
        transfers.iter().find_map(|transfer| match transfer.op {
            TransferOp::Pending { amount, .. } => Some(amount).filter(|_| transfer.id == id),
            TransferOp::PostPending { pending, amount } => Some(amount).filter(|_| pending == id),
            TransferOp::Post { .. } | TransferOp::VoidPending { .. } | TransferOp::ExpirePending { .. } => None,
        })
    }

    fn refund_transfer(&self) -> TransferId {
        transfer_id(self.id, None, TransferKind::Refund, self.refunds_tried())
    }

    fn refunds_tried(&self) -> u32 {
        self.refunds_failed.saturating_add(self.refunds_made)
    }

    /// Consumer: the remainder came back.
    pub fn refund_received(&self, payment_hash: PaymentHash, amount: Msat) -> Draft {
        let id = transfer_id(self.id, None, TransferKind::RefundCredit, self.refunds_made);
        let (debit, credit) = (Account::Lightning, Account::PrepaidAsset(self.id));
        Draft::of(Evidence::RefundReceived { session: self.id, payment_hash, amount }).with([Transfer::post(
            id,
            debit,
            credit,
            amount.min(self.remainder()),
        )])
    }

    /// Takes a durable draft into the state. Drafts about other sessions change nothing.
    pub fn apply(&mut self, draft: &Draft) -> Result<(), SessionError> {
        let Some(evidence) = &draft.evidence else {
            // A further reservation stands alone; its id says whose it is.
            let open: Vec<RequestId> = self.requests.keys().copied().collect();
            open.iter().for_each(|id| self.apply_holds(id, &draft.transfers));
            return Ok(());
        };
        match evidence {
            Evidence::Quote(signed) => self.apply_quote(signed),
            Evidence::Invoice { session, k, bolt11, descriptor } if *session == self.id => {
                self.apply_invoice(*k, bolt11, descriptor)
            }
            Evidence::PaymentAttempted { session, k, payment_hash, max_fee } if *session == self.id => {
                self.apply_attempt(*k, payment_hash, *max_fee)
            }
            Evidence::PaymentSettled { payment_hash, .. } => self.apply_settled(payment_hash),
            Evidence::PaymentFailed { payment_hash, .. } => {
                if self.refund_of(payment_hash).is_ok() {
                    self.refund = None;
                    self.refunds_failed = self.refunds_failed.saturating_add(1);
                    return Ok(());
                }
                self.apply_failed(payment_hash)
            }
            Evidence::PaymentReceived { payment_hash, .. } => self.apply_received(payment_hash),
            Evidence::Request(signed) => self.apply_request(signed, &draft.transfers),
            Evidence::Ack(both) => self.apply_ack(both, &draft.transfers),
            Evidence::Receipt { receipt, .. } => self.apply_receipt(receipt),
            Evidence::Abandoned { session, request, numerators, .. } if *session == self.id => {
                self.apply_abandoned(*request, *numerators)
            }
            Evidence::Close(signed) => self.apply_close(signed),
            Evidence::RefundAttempted { session, payment_hash, amount, .. } if *session == self.id => {
                self.refund = Some((*payment_hash, *amount));
                self.refund_held = self.of_refund(&draft.transfers).unwrap_or(*amount);
                Ok(())
            }
            Evidence::CreditNote(signed) => {
                if signed.verify(&self.open.provider).is_ok_and(|note| note.session == self.id) {
                    self.credit_note = Some(signed.clone());
                }
                Ok(())
            }
            Evidence::RefundSettled { session, amount, payment_hash, .. }
            | Evidence::RefundReceived { session, amount, payment_hash }
                if *session == self.id =>
            {
                // Of a provider's refund, with what its route cost.
                let gone = self.of_refund(&draft.transfers).unwrap_or(*amount);
                self.refund = None;
                self.refunds_made = self.refunds_made.saturating_add(1);
                self.refunds_received.insert(*payment_hash);
                self.refunded = self.refunded.checked_add(gone).ok_or(SessionError::Overflow)?;
                Ok(())
            }
            Evidence::CreditTransfer(both) => self.apply_credit(both),
            Evidence::Genesis { .. }
            | Evidence::Listing { .. }
            | Evidence::Open(_)
            | Evidence::Invoice { .. }
            | Evidence::PaymentAttempted { .. }
            | Evidence::Abandoned { .. }
            | Evidence::RefundAttempted { .. }
            | Evidence::RefundSettled { .. }
            | Evidence::RefundReceived { .. }
            | Evidence::ChannelClosed { .. }
            | Evidence::WalletPayment { .. }
            | Evidence::OnChain { .. }
            | Evidence::Succession(_)
            | Evidence::Misbehaviour { .. }
            | Evidence::WalletSnapshot { .. }
            | Evidence::Checkpoint { .. }
            | Evidence::Promise(_) => Ok(()),
        }
    }

    fn apply_quote(&mut self, signed: &Signed<Quote>) -> Result<(), SessionError> {
        // A quote for somebody else, or one whose signature does not hold, is not ours to fold. Cheap checks first: a
        // journal that is folded shows every session every quote.
        let ours = |q: &Quote| q.consumer == self.open.consumer && q.provider == self.open.provider;
        if !signed.peek().is_ok_and(|quote| ours(&quote)) {
            return Ok(());
        }
        let Ok(quote) = signed.verify(&self.open.provider) else { return Ok(()) };
        let id = quote.quote_id();
        self.quotes.insert(id, quote.into_statement());
        self.current_quote = id;
        if self.quotes.len() > MAX_QUOTES {
            let used: BTreeSet<QuoteId> = self.requests.values().map(|r| r.open().quote).collect();
            let oldest =
                self.quotes.iter().filter(|(q, _)| **q != id && !used.contains(q)).min_by_key(|(_, q)| q.issued_at);
            if let Some((&oldest, _)) = oldest {
                self.quotes.remove(&oldest);
            }
        }
        Ok(())
    }

    fn apply_close(&mut self, signed: &Signed<SessionClose>) -> Result<(), SessionError> {
        let close = signed.verify(&self.open.consumer).map_err(|e| SessionError::Evidence(e.to_string()))?;
        if close.session == self.id {
            self.refund_invoices.extend(close.invoice.as_deref().and_then(invoice_hash));
            self.close = Some(close.into_statement());
        }
        Ok(())
    }

    /// Where charges go: out of the prepaid balance, into income or expense.
    fn charge_accounts(&self) -> (Account, Account) {
        match self.side {
            Side::Provider => (Account::Prepaid(self.id), Account::Income),
            Side::Consumer => (Account::Expense, Account::PrepaidAsset(self.id)),
        }
    }
}

/// When a hold may be expired at the latest: no request lives this long, in ms.
pub const HOLD_TIMEOUT_MS: u64 = 60 * 60 * 1_000;
/// A request is ended by its provider after this long, in ms.
pub const REQUEST_DEADLINE_MS: u64 = 30 * 60 * 1_000;
/// How long a provider keeps requests open whose consumer is gone, in ms. Only their bookkeeping: nothing runs. A consumer
/// that comes back shows an acknowledgement whose frame was lost, and both sides stand at the same figure again.
pub const DETACHED_MS: u64 = 25 * 60 * 1_000;
const _: () =
    assert!(REQUEST_DEADLINE_MS + DETACHED_MS < HOLD_TIMEOUT_MS, "a hold never expires under an open request");

fn hold_expiry(now: UnixMs) -> Option<UnixMs> {
    Some(now.plus_ms(HOLD_TIMEOUT_MS))
}

/// The last acknowledgement's id, where there is one.
type LastAck = Option<AckId>;
