//! Spending credit notes: what a closed session is owed becomes the balance of the session that asks for it.
//!
//! | what comes | what is done | a crash right after it means |
//! |---|---|---|
//! | an order that fits | signed, booked to both sessions in one entry, told | the note is spent; told again at the resume |
//! | an order for a note that is spent | told where, whatever the order says | the same |
//! | another order | refused; the note stands as it did | nothing happened |
//!
//! A note is spent whole and once. While a refund of its session is under way nothing of it is spent.

use super::{Provider, ProviderAction};
use crate::LinkId;
use satgrid_ledger::statements::CreditTransfer;
use satgrid_protocol::{
    frame::{ProviderControl, Refusal, reason},
    session::{SessionState, Side},
};
use satgrid_types::{BothSigned, SessionId, Signed, UnixMs, sign_body};

impl Provider {
    pub(super) fn spend_credit(&mut self, now: UnixMs, link: LinkId, order: &Signed<CreditTransfer>) {
        let Some(to) = self.links.get(&link).and_then(|l| l.session) else {
            return self.refuse(link, Refusal::Unknown, "no session on this connection");
        };
        let Ok(body) = order.peek() else { return self.violation(link, "a credit transfer that cannot be read") };
        let Some(owed) = self.sessions.get(&body.from).map(|s| &s.state) else {
            return self.keep(link, body.from, "no such session here");
        };
        if order.verify(&owed.consumer()).is_err() {
            return self.violation(link, "a credit transfer that the owed session's key did not sign");
        }
        if let Some(spent) = owed.spent().cloned() {
            // It may not be durable yet: then neither is what this answers.
            return self.behind(vec![ProviderAction::Control { link, frame: ProviderControl::CreditSpent(spent) }]);
        }
        let fits = owed.spend(to).as_ref() == Some(&body);
        let lapsed = owed.credit_note().and_then(|note| note.peek().ok()).is_some_and(|note| note.valid_until < now);
        let takes = self.sessions.get(&to).is_some_and(|s| s.state.takes_credit() && s.closing.is_none());
        if !fits || lapsed || !takes {
            return self.keep(link, body.from, "its note is over another amount, on its way back, or has run out");
        }
        let ours = sign_body::<CreditTransfer>(order.body(), self.keys.of(&body.provider));
        let both = BothSigned::from_parts(order.body().to_vec(), ours, *order.signature());
        let Some(draft) = SessionState::credit_draft(Side::Provider, &both) else { return };
        let applied = self.sessions.get_mut(&body.from).map(|owed| owed.state.apply(&draft));
        if let Some(Err(error)) = applied {
            return self.journal_failed(&format!("a draft does not fit the state it was built from: {error}"));
        }
        self.refresh(&body.from);
        self.counters.notes_spent += 1;
        let told = ProviderAction::Control { link, frame: ProviderControl::CreditSpent(both) };
        self.record(to, vec![draft], vec![told]);
        self.funds_arrived(now, to);
    }

    /// Tells a consumer that comes back which notes were spent in its session, and where its own was.
    pub(super) fn tell_credits(&mut self, link: LinkId, id: SessionId) {
        let speaks = self.links.get(&link).is_some_and(|held| held.credit);
        let Some(session) = self.sessions.get(&id).filter(|_| speaks) else { return };
        let spent: Vec<_> = session.state.credits().iter().chain(session.state.spent()).cloned().collect();
        let told =
            spent.into_iter().map(|both| ProviderAction::Control { link, frame: ProviderControl::CreditSpent(both) });
        let told = told.collect();
        self.behind(told);
    }

    fn keep(&mut self, link: LinkId, from: SessionId, why: &str) {
        self.say(link, ProviderControl::CreditKept(from, reason(why)));
    }
}
