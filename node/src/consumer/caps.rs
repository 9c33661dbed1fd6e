//! The operator's caps, reached. A session that may pay no further slice is retired: it takes no new call, closes once
//! nothing runs in it, and its remainder comes back. Its calls go on in a fresh session with the same provider, one that
//! streams from what was received.
//!
//! The cap bounds what one session may cost, and so what one call may: a call that has spent it ends there.

use super::{
    CallError, CallId, Consumer, FundsLimit, SessionIndex,
    calls::{Call, Place},
};
use satgrid_types::{Msat, UnixMs};

/// Why money cannot be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Lack {
    pub required: Msat,
    pub available: Msat,
    pub limit: FundsLimit,
}

impl Lack {
    pub(super) fn error(&self) -> CallError {
        CallError::Funds { required: self.required, available: self.available, limit: self.limit }
    }
}

/// What becomes of a call that starved.
pub(super) enum Starved {
    GoesOnAfresh,
    Ends(CallError),
}

impl Call {
    /// What it has cost so far, and at least so much more, stays within what one session may cost.
    pub(super) fn may_spend(&self, more: Msat, cap: Msat) -> bool {
        self.bill.cost().checked_add(more).is_some_and(|sum| sum <= cap)
    }
}

impl Consumer {
    /// A session at its cap takes no new work; what waits for it goes to a fresh one. Whether it did: a session in which
    /// nothing was paid yet is not at its cap, the cap is too small for the work.
    pub(super) fn retire(&mut self, now: UnixMs, index: SessionIndex) -> bool {
        let Some(session) = self.sessions.get(&index) else { return false };
        let (Some(state), Some(lack), Some(listing)) = (&session.state, session.unfunded, &session.listing) else {
            return false;
        };
        if state.paid().is_zero() {
            return false;
        }
        let (id, listing, cap) = (state.id(), listing.clone(), self.config.session_cap);
        self.begin_close(now, id);
        let waiting: Vec<CallId> =
            self.sessions.get_mut(&index).map(|s| s.waiting.drain(..).collect()).unwrap_or_default();
        for call in waiting {
            let need = self.start_need(index, call).unwrap_or(Msat::MAX);
            if !self.calls.get(&call).is_some_and(|held| held.may_spend(need, cap)) {
                self.fail_call(call, lack.error());
                continue;
            }
            let fresh = self.session_with(now, &listing);
            self.attach(call, fresh);
        }
        true
    }

    /// A call whose request ended for want of money: at a session's cap it may go on in a fresh one.
    pub(super) fn starved(&self, id: CallId, index: SessionIndex) -> Starved {
        let nothing = Lack { required: Msat::ZERO, available: Msat::ZERO, limit: FundsLimit::Wallet };
        let session = self.sessions.get(&index);
        let lack = session.and_then(|s| s.unfunded).unwrap_or(nothing);
        let retired = session.filter(|s| s.closing && lack.limit == FundsLimit::SessionCap);
        let least = retired.and_then(|s| s.state.as_ref()).map(|state| state.quote().terms.min_slice);
        // A worker's state of a request ends with its session: its lead takes another worker, or this one anew.
        let whole = self.calls.get(&id).filter(|call| call.part().is_none());
        match least.zip(whole) {
            Some((least, call)) if call.may_spend(least, self.config.session_cap) => Starved::GoesOnAfresh,
            Some(_) | None => Starved::Ends(lack.error()),
        }
    }

    /// See [`Starved::GoesOnAfresh`].
    pub(super) fn go_on_afresh(&mut self, now: UnixMs, id: CallId, index: SessionIndex) {
        if let Some(call) = self.calls.get_mut(&id) {
            call.place = Place::Nowhere;
        }
        if self.has_everything(id) {
            return;
        }
        let Some(listing) = self.sessions.get(&index).and_then(|s| s.listing.clone()) else { return };
        let fresh = self.session_with(now, &listing);
        self.attach(id, fresh);
    }
}
