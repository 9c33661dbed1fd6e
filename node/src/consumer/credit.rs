//! Spending credit notes: what a provider owes for a closed session becomes the balance of the session in use.
//!
//! | step | entry | a crash right after it means |
//! |---|---|---|
//! | order sent | none: it is the same bytes whenever it is made, and moves nothing until the provider agreed | asked again, or told at the resume |
//! | agreed | credit transfer, booked to both sessions | the same balance |
//! | refused, or no answer | none | the note stands, and is asked for as before |
//!
//! It comes before any slice: money that is there already is used before new money is sent. Dust is spent too.

use super::{Consumer, SessionIndex};
use crate::CloseCode;
use satgrid_ledger::statements::{CreditTransfer, verify_credit};
use satgrid_protocol::{
    frame::ConsumerControl,
    session::{SessionState, Side},
};
use satgrid_types::{BothSigned, SessionId, Signed, UnixMs};

impl Consumer {
    /// Offers the next note of this session's provider, one at a time.
    pub(super) fn spend_notes(&mut self, now: UnixMs, index: SessionIndex) {
        let Some(session) = self.sessions.get_mut(&index) else { return };
        if let Some((from, since)) = session.spending {
            if now.since(since) < self.config.setup_ms {
                return;
            }
            // No answer: the note stands, and what was agreed unheard is told at the next resume.
            session.spending = None;
            if let Some(owed) = self.sessions.get_mut(&from) {
                owed.note_kept = true;
            }
        }
        let Some(session) = self.sessions.get(&index) else { return };
        let (Some(state), Some(link)) = (&session.state, session.link) else { return };
        if !session.is_ready() || session.closing || !session.spends_credit || !state.takes_credit() {
            return;
        }
        let (to, provider) = (state.id(), session.provider());
        let unspent =
            self.sessions.iter().filter(|(_, s)| s.provider() == provider && s.link.is_none() && !s.note_kept);
        let order = unspent.filter_map(|(from, s)| {
            let state = s.state.as_ref()?;
            let valid = state.credit_note()?.peek().ok()?.valid_until > now;
            let order = state.spend(to).filter(|_| valid)?;
            Some((*from, Signed::sign(&order, &s.key)))
        });
        let Some((from, order)) = order.take(1).next() else { return };
        if let Some(session) = self.sessions.get_mut(&index) {
            session.spending = Some((from, now));
        }
        self.say(link, ConsumerControl::SpendCredit(order));
    }

    /// The provider agreed, now or before a connection broke: booked to both sessions, once.
    pub(super) fn credit_spent(&mut self, now: UnixMs, index: SessionIndex, both: &BothSigned<CreditTransfer>) {
        let provider = self.sessions.get(&index).map(super::links::Session::provider);
        let body = verify_credit(both).filter(|body| Some(body.provider) == provider);
        // Our own signature is on it, so both sessions are ours.
        let ours = body.and_then(|body| Some((self.index_of(body.from)?, self.index_of(body.to)?, body)));
        let Some((from, to, body)) = ours else {
            return self.drop_link(now, index, CloseCode::Violation, "a credit transfer that nobody here ordered");
        };
        if let Some(session) = self.sessions.get_mut(&index) {
            session.spending = session.spending.filter(|(spending, _)| *spending != from);
        }
        let state = |index: &SessionIndex| self.sessions.get(index).and_then(|s| s.state.as_ref());
        let owed = state(&from).is_some_and(|s| s.spent().is_none() && s.spend(body.to).as_ref() == Some(&body));
        if !owed || !state(&to).is_some_and(SessionState::takes_credit) {
            // Booked already; or the remainder came back on another way, and the provider gives it twice.
            return;
        }
        let Some(draft) = SessionState::credit_draft(Side::Consumer, both) else { return };
        if let Some(session) = self.sessions.get_mut(&from)
            && let Some(state) = &mut session.state
        {
            if let Err(error) = state.apply(&draft) {
                let text = format!("a draft does not fit the state it was built from: {error}");
                return self.journal_failed(&text);
            }
            session.owed = None;
        }
        self.refresh(from);
        self.counters.notes_spent += 1;
        self.record(to, vec![draft], Vec::new());
    }

    /// It will not: the note is asked for as before.
    pub(super) fn credit_kept(&mut self, index: SessionIndex, from: SessionId) {
        let Some(from) = self.index_of(from) else { return };
        if let Some(session) = self.sessions.get_mut(&index) {
            session.spending = session.spending.filter(|(spending, _)| *spending != from);
        }
        if let Some(owed) = self.sessions.get_mut(&from) {
            owed.note_kept = true;
        }
    }
}
