//! Closing a session: the remainder goes back, or is owed by a signed credit note.
//!
//! | step | entry | a crash right after it means |
//! |---|---|---|
//! | close received | close, remainder moved to refunds due | it is owed; the consumer may close again |
//! | refund begun | refund attempted, pending | resolved by its hash: the same invoice is sent again |
//! | refund settled | refund settled, posted | done |
//! | refund impossible | failed and voided, then credit note | owed for 30 days |

use super::{PendingRefund, Provider, ProviderAction};
use crate::LinkId;
use satgrid_ledger::{
    entry::{Draft, Evidence},
    statements::{CreditNote, CreditReason, SessionClose},
    transfer::{Transfer, TransferKind, transfer_id},
};
use satgrid_protocol::{
    frame::{ProviderControl, Refusal},
    session::invoice_hash,
};
use satgrid_types::{Msat, PaymentHash, Preimage, SessionId, Signed, UnixMs, node_key};

impl Provider {
    pub(super) fn close(&mut self, now: UnixMs, link: LinkId, close: &Signed<SessionClose>) {
        let Some(id) = self.links.get(&link).and_then(|l| l.session) else {
            return self.refuse(link, Refusal::Unknown, "no session on this connection");
        };
        let Some(session) = self.sessions.get(&id) else { return };
        let state = &session.state;
        let Ok(body) = close.verify(&state.consumer()) else {
            return self.violation(link, "the close is not signed by the session's key");
        };
        if body.session != id || !state.requests().is_empty() {
            return self.refuse(link, Refusal::Protocol, "a close for another session, or while requests are open");
        }
        if state.close_statement().is_some() {
            return self.say(link, ProviderControl::Closed);
        }
        let remainder = state.remainder();
        let draft = state.closed(close);
        let terms = state.quote().terms;
        if remainder.is_zero() {
            return self.record(id, vec![draft], vec![ProviderAction::Control { link, frame: ProviderControl::Closed }]);
        }
        let payable = body.invoice.as_ref().and_then(|bolt11| Some((bolt11.clone(), invoice_hash(bolt11)?)));
        match payable {
            Some((bolt11, hash)) if remainder >= terms.refund_dust => {
                // The consumer's books may be behind ours by a slice in flight, never ahead: pay what it asks for, at most
                // the remainder. Routing is paid from what it left over, within the cap.
                let amount = body.remainder.min(remainder);
                let max_fee = remainder.saturating_sub(amount).min(terms.refund_fee_cap);
                let attempt = state.refund_attempted(hash, amount, max_fee);
                self.by_payment.insert(hash, id);
                let refunding = ProviderControl::Refunding(hash, amount);
                let pay = ProviderAction::PayRefund { session: id, hash, bolt11, amount, max_fee };
                self.record(id, vec![draft, attempt], vec![ProviderAction::Control { link, frame: refunding }, pay]);
            }
            Some(_) => {
                self.record(id, vec![draft], Vec::new());
                self.owe(now, id, remainder, CreditReason::Dust);
            }
            None => {
                let reason =
                    if remainder < terms.refund_dust { CreditReason::Dust } else { CreditReason::NoDestination };
                self.record(id, vec![draft], Vec::new());
                self.owe(now, id, remainder, reason);
            }
        }
    }

    /// A refund that was under way when the node stopped: the same invoice again, which pays it once.
    pub(super) fn retry_refund(&mut self, refund: PendingRefund) {
        self.by_payment.insert(refund.hash, refund.session);
        self.actions.push_back(ProviderAction::PayRefund {
            session: refund.session,
            hash: refund.hash,
            bolt11: refund.bolt11,
            amount: refund.amount,
            max_fee: Msat::ZERO,
        });
    }

    pub(super) fn refund_settled(&mut self, hash: PaymentHash, amount: Msat, preimage: Option<Preimage>, fee: Msat) {
        let handled = ProviderAction::WalletHandled { hash };
        let Some(&id) = self.by_payment.get(&hash) else { return self.actions.push_back(handled) };
        let pending = transfer_id(id, None, TransferKind::Refund, 0);
        let mut transfers = vec![Transfer::post_pending(pending, amount)];
        if !fee.is_zero() {
            let id = transfer_id(id, None, TransferKind::RefundFee, 0);
            let (debit, credit) =
                (satgrid_ledger::transfer::Account::RoutingFees, satgrid_ledger::transfer::Account::Lightning);
            transfers.push(Transfer::post(id, debit, credit, fee));
        }
        let evidence = Evidence::RefundSettled { session: id, payment_hash: hash, amount, fee, preimage };
        let mut then = vec![handled];
        if let Some(link) = self.sessions.get(&id).and_then(|s| s.link) {
            then.push(ProviderAction::Control { link, frame: ProviderControl::Closed });
        }
        self.record(id, vec![Draft::of(evidence).with(transfers)], then);
    }

    pub(super) fn refund_failed(&mut self, now: UnixMs, hash: PaymentHash, reason: String) {
        let Some(&id) = self.by_payment.get(&hash) else { return };
        let pending = transfer_id(id, None, TransferKind::Refund, 0);
        let draft = Draft::of(Evidence::PaymentFailed { payment_hash: hash, reason }).with([Transfer::void(pending)]);
        self.record(id, vec![draft], vec![ProviderAction::WalletHandled { hash }]);
        let owed = self.sessions.get(&id).map_or(Msat::ZERO, |s| s.state.remainder());
        self.owe(now, id, owed, CreditReason::Unpayable);
    }

    fn owe(&mut self, now: UnixMs, id: SessionId, amount: Msat, reason: CreditReason) {
        let Some(session) = self.sessions.get(&id) else { return };
        let note = CreditNote {
            version: CreditNote::VERSION,
            session: id,
            provider: node_key(&self.key),
            consumer: session.state.consumer(),
            amount,
            reason,
            issued_at: now,
            valid_until: now.plus_ms(CreditNote::VALIDITY_MS),
        };
        let signed = Signed::sign(&note, &self.key);
        let link = session.link;
        let then = link.map(|link| ProviderAction::Control { link, frame: ProviderControl::Owed(signed.clone()) });
        self.record(id, vec![Draft::of(Evidence::CreditNote(signed))], then.into_iter().collect());
    }
}
