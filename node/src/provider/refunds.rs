//! Closing a session: the remainder goes back, or is owed by a signed credit note.
//!
//! | step | entry | a crash right after it means |
//! |---|---|---|
//! | close received | close, remainder moved to refunds due | it is owed; the consumer may close again |
//! | refund begun | refund attempted, pending | resolved by its hash: the same invoice is sent again |
//! | refund settled | refund settled, posted | done |
//! | refund impossible | failed and voided, then credit note | owed for 30 days |
//! | close received again with a new invoice | close | tried anew: the channel may allow now what it did not then |
//!
//! A note is given once for an amount: being asked again makes it neither longer nor more.

use super::{PendingRefund, Provider, ProviderAction};
use crate::LinkId;
use satgrid_engine::port::Command;
use satgrid_ledger::{
    entry::{Draft, Evidence},
    statements::{CreditNote, CreditReason, SessionClose},
};
use satgrid_protocol::{
    frame::{ProviderControl, Refusal},
    session::invoice_hash,
};
use satgrid_types::{Msat, PaymentHash, Preimage, SessionId, Signed, UnixMs};
use satgrid_wallet::invoice;

/// Closes with another invoice that are written down in one run. An honest consumer asks less and less often, for 30 days.
const MAX_RECLOSED: u32 = 64;

impl Provider {
    pub(super) fn close(&mut self, now: UnixMs, link: LinkId, close: &Signed<SessionClose>) {
        let Some(id) = self.links.get(&link).and_then(|l| l.session) else {
            return self.refuse(link, Refusal::Unknown, "no session on this connection");
        };
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let Ok(body) = close.verify(&session.state.consumer()) else {
            return self.violation(link, "the close is not signed by the session's key");
        };
        if body.session != id {
            return self.refuse(link, Refusal::Protocol, "a close for another session");
        }
        if session.state.close_statement().is_some() {
            return self.closed_before(now, link, id, close, &body);
        }
        if !session.state.requests().is_empty() {
            // A countersignature travels on its own stream and may come after this.
            session.closing = Some((link, close.clone()));
            return;
        }
        self.close_now(now, link, id, close, &body);
    }

    /// Closes that waited for the last request.
    pub(super) fn continue_close(&mut self, now: UnixMs, id: SessionId) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        if session.state.requests().is_empty()
            && let Some((link, close)) = session.closing.take()
        {
            self.close(now, link, &close);
        }
    }

    fn close_now(
        &mut self,
        now: UnixMs,
        link: LinkId,
        id: SessionId,
        close: &Signed<SessionClose>,
        body: &SessionClose,
    ) {
        let Some(session) = self.sessions.get(&id) else { return };
        let (remainder, terms) = (session.state.remainder(), session.state.quote().terms);
        let draft = session.state.closed(close);
        // Nothing comes in it any more: its engine need not keep what it computed for it.
        let forget = Command::ForgetSession { session: id.0 };
        let forget = session.engine.map(|engine| ProviderAction::Engine { engine, command: forget });
        if remainder.is_zero() {
            let closed = ProviderAction::Control { link, frame: ProviderControl::Closed };
            return self.record(id, vec![draft], forget.into_iter().chain([closed]).collect());
        }
        let refusal = if remainder < terms.refund_dust {
            Some(CreditReason::Dust)
        } else if body.invoice.is_none() {
            Some(CreditReason::NoDestination)
        } else {
            None
        };
        self.record(id, vec![draft], forget.into_iter().collect());
        if let Some(reason) = refusal {
            return self.owe(now, id, remainder, reason);
        }
        // The invoice is the consumer's text: it is paid only if it asks for no more than is owed, to the msat. Routing is
        // paid from what it left over, within the cap.
        let bolt11 = body.invoice.clone().unwrap_or_default();
        let facts = invoice::read(&bolt11).ok().filter(|facts| !facts.is_expired(now));
        let asked = facts.and_then(|facts| Some((facts.payment_hash, facts.amount?)));
        let fits = |(hash, amount): &(PaymentHash, Msat)| {
            *amount <= remainder && !amount.is_zero() && !self.by_payment.contains_key(hash)
        };
        let Some((hash, amount)) = asked.filter(fits) else {
            return self.owe(now, id, remainder, CreditReason::Unpayable);
        };
        let Some(session) = self.sessions.get(&id) else { return };
        let max_fee = remainder.saturating_sub(amount).min(terms.refund_fee_cap);
        let attempt = session.state.refund_attempted(hash, amount, max_fee);
        self.by_payment.insert(hash, id);
        let refunding = ProviderAction::Control { link, frame: ProviderControl::Refunding(hash, amount) };
        let pay = ProviderAction::PayRefund { session: id, hash, bolt11, amount, max_fee, recover: false };
        self.record(id, vec![attempt], vec![refunding, pay]);
    }

    /// The same close again, after a lost answer: where it stands.
    fn closed_before(
        &mut self,
        now: UnixMs,
        link: LinkId,
        id: SessionId,
        close: &Signed<SessionClose>,
        body: &SessionClose,
    ) {
        let Some(session) = self.sessions.get(&id) else { return };
        let state = &session.state;
        let remainder = state.remainder();
        let hash = body.invoice.as_deref().and_then(invoice_hash);
        let new_invoice = hash.is_some_and(|hash| !state.refund_invoices().contains(&hash));
        let new_invoice = new_invoice && session.reclosed < MAX_RECLOSED;
        let same_books = body.remainder == remainder && body.last_receipt == state.last_receipt();
        match state.refund_in_flight() {
            Some((hash, amount)) => self.say(link, ProviderControl::Refunding(hash, amount)),
            None if remainder.is_zero() => {
                self.tell_credits(link, id);
                self.behind(vec![ProviderAction::Control { link, frame: ProviderControl::Closed }]);
            }
            None if new_invoice && same_books => {
                if let Some(session) = self.sessions.get_mut(&id) {
                    session.reclosed = session.reclosed.saturating_add(1);
                }
                self.close_now(now, link, id, close, body);
            }
            None => self.owe(now, id, remainder, CreditReason::Unpayable),
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
            recover: true,
        });
    }

    pub(super) fn refund_settled(&mut self, hash: PaymentHash, preimage: Option<Preimage>, fee: Msat) {
        let handled = ProviderAction::WalletHandled { hash };
        let id = self.by_payment.get(&hash).copied();
        let session = id.and_then(|id| self.sessions.get(&id).map(|s| (id, s)));
        let booked = session.and_then(|(id, s)| Some((id, s.link, s.state.refund_settled(hash, preimage, fee).ok()?)));
        // Not a refund of ours, or booked already.
        let Some((id, link, draft)) = booked else { return self.actions.push_back(handled) };
        let closed = link.map(|link| ProviderAction::Control { link, frame: ProviderControl::Closed });
        let then = [handled].into_iter().chain(closed).collect();
        self.record(id, vec![draft], then);
    }

    pub(super) fn refund_failed(&mut self, now: UnixMs, hash: PaymentHash, reason: String) {
        let handled = ProviderAction::WalletHandled { hash };
        let id = self.by_payment.get(&hash).copied();
        let session = id.and_then(|id| self.sessions.get(&id).map(|s| (id, s)));
        let booked = session.and_then(|(id, s)| Some((id, s.state.refund_failed(hash, reason).ok()?)));
        let Some((id, draft)) = booked else { return self.actions.push_back(handled) };
        self.record(id, vec![draft], vec![handled]);
        let owed = self.sessions.get(&id).map_or(Msat::ZERO, |s| s.state.remainder());
        self.owe(now, id, owed, CreditReason::Unpayable);
    }

    fn owe(&mut self, now: UnixMs, id: SessionId, amount: Msat, reason: CreditReason) {
        let Some(session) = self.sessions.get(&id) else { return };
        let link = session.link;
        let owed = |signed: Signed<CreditNote>| {
            link.map(|link| ProviderAction::Control { link, frame: ProviderControl::Owed(signed) })
        };
        if let Some(given) = session.state.credit_note()
            && given.peek().is_ok_and(|note| note.amount == amount)
        {
            let again = owed(given.clone());
            return self.behind(again.into_iter().collect());
        }
        let note = CreditNote {
            version: CreditNote::VERSION,
            session: id,
            provider: session.state.provider(),
            consumer: session.state.consumer(),
            amount,
            reason,
            issued_at: now,
            valid_until: now.plus_ms(CreditNote::VALIDITY_MS),
        };
        let signed = Signed::sign(&note, self.keys.of(&note.provider));
        let then = owed(signed.clone()).into_iter().collect();
        self.record(id, vec![Draft::of(Evidence::CreditNote(signed))], then);
    }
}
