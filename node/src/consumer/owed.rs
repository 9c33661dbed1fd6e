//! Money that providers owe: a remainder that could not be paid back at the close stands in a signed credit note, and is
//! asked for again, with a new invoice and less and less often, until it is paid or the note has run out.
//!
//! It counts in "most you can lose now" all the time. Dust is not asked for: no payment is worth it.

use super::{Consumer, SessionIndex, links::Phase};
use satgrid_ledger::statements::CreditReason;
use satgrid_protocol::session::SessionState;
use satgrid_types::UnixMs;

/// After the first note it is asked again after this long, in ms; then after twice as long each time ...
const FIRST_MS: u64 = 10 * 60 * 1_000;
/// ... and at least this often.
const LONGEST_MS: u64 = 24 * 3_600 * 1_000;
/// A provider whose listing is not known yet is looked for this often, in ms.
const LOOK_MS: u64 = 60 * 1_000;

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Owed {
    until: UnixMs,
    next_try: UnixMs,
    tries: u32,
}

impl Owed {
    /// What a session is owed by a note that is worth asking for.
    pub(super) fn of(next_try: UnixMs, state: &SessionState) -> Option<Owed> {
        let note = state.credit_note()?.peek().ok()?;
        let worth_it = note.reason != CreditReason::Dust && state.remainder() >= state.quote().terms.refund_dust;
        worth_it.then_some(Owed { until: note.valid_until, next_try, tries: 0 })
    }
    pub(super) fn next_try(&self) -> UnixMs {
        self.next_try
    }
    fn wait(tries: u32) -> u64 {
        FIRST_MS.saturating_mul(1 << tries.min(20)).min(LONGEST_MS)
    }
}

impl Consumer {
    /// A note came: the remainder is asked for later.
    pub(super) fn ask_again_later(&mut self, now: UnixMs, index: SessionIndex) {
        let Some(session) = self.sessions.get_mut(&index) else { return };
        let tries = session.owed.map_or(0, |owed| owed.tries);
        let owed = session.state.as_ref().and_then(|state| Owed::of(now.plus_ms(Owed::wait(tries)), state));
        session.owed = owed.map(|owed| Owed { tries, ..owed });
    }

    pub(super) fn tick_owed(&mut self, now: UnixMs, index: SessionIndex) {
        let Some(session) = self.sessions.get_mut(&index).filter(|s| s.link.is_none()) else { return };
        let Some(owed) = &mut session.owed else { return };
        let paid = session.state.as_ref().is_none_or(|state| state.credit_note().is_none());
        if paid || now >= owed.until {
            session.owed = None;
            session.closing = false;
            return;
        }
        if now < owed.next_try {
            return;
        }
        if session.listing.is_none() {
            owed.next_try = now.plus_ms(LOOK_MS);
            return;
        }
        owed.tries = owed.tries.saturating_add(1);
        owed.next_try = now.plus_ms(Owed::wait(owed.tries));
        session.phase = Phase::Asleep;
        session.closing = true;
        self.counters.refunds_asked_again += 1;
        self.wake(now, index);
    }

    /// A session without work for a while: its balance is asked back where that is wanted and worth it.
    pub(super) fn refund_idle(&mut self, now: UnixMs, index: SessionIndex) -> bool {
        let worth_it = |state: &&SessionState| {
            state.close_statement().is_none() && state.remainder() >= state.quote().terms.refund_dust
        };
        let wanted = self.config.refund_idle;
        let session = self.sessions.get(&index).filter(|_| wanted);
        let state = session.and_then(|s| s.state.as_ref()).filter(worth_it);
        let Some(id) = state.map(SessionState::id) else { return false };
        self.begin_close(now, id);
        true
    }
}
