//! What a session spends and how long its slices take, as this side measures both. What follows from it is decided by
//! [`satgrid_protocol::slices`].

use super::{Consumer, SessionIndex};
use satgrid_protocol::{pace::Pace, session::SliceStatus, slices::covered_ms};
use satgrid_types::{Msat, UnixMs};

/// A request that starts so soon after another one's end follows it, in ms.
const FOLLOWS_MS: u64 = 10_000;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Flow {
    pace: Pace,
    /// The slice that is awaited, and since when.
    asked: Option<(u32, UnixMs)>,
    /// When a request ended last.
    ended_at: Option<UnixMs>,
    /// Requests come one after another: the next one is paid for before it is there.
    in_a_row: bool,
    /// What the last request needed to start.
    last_start: Msat,
}

impl Flow {
    pub(super) fn asked(&mut self, now: UnixMs, k: u32) {
        self.asked = Some((k, now));
    }
    pub(super) fn unlinked(&mut self) {
        self.asked = None;
    }
    pub(super) fn started(&mut self, now: UnixMs, need: Msat, alone: bool) {
        let follows = self.ended_at.is_some_and(|at| now.since(at) < FOLLOWS_MS);
        self.in_a_row = follows || (self.in_a_row && !alone);
        self.last_start = need;
    }
    pub(super) fn ended(&mut self, now: UnixMs) {
        self.ended_at = Some(now);
    }

    /// What should be free so that work goes on through a payment. `rest` is what running requests can still cost: more is
    /// wanted only where others have followed so far.
    pub(super) fn ahead(&self, now: UnixMs, payment_ms: u64, rest: impl FnOnce() -> Msat) -> Msat {
        let during = self.pace.during(now, covered_ms(payment_ms));
        if self.in_a_row { during.max(self.last_start) } else { during.min(rest()) }
    }
}

impl Consumer {
    /// Looks at what a session is charged for.
    pub(super) fn measure(&mut self, now: UnixMs, index: SessionIndex) {
        let Some(session) = self.sessions.get_mut(&index) else { return };
        if let Some(state) = &session.state {
            session.flow.pace.note(now, state.consumer_exposure().charged);
        }
    }

    /// A slice was paid, or credited: where it is both, it is known how long that took.
    pub(super) fn slice_over(&mut self, now: UnixMs, index: SessionIndex) {
        let Some(session) = self.sessions.get_mut(&index) else { return };
        let Some(state) = &session.state else { return };
        let paid = |k: &u32| state.slices().get(k).is_some_and(|slice| slice.status == SliceStatus::Paid);
        let Some((_, since)) = session.flow.asked.take_if(|(k, _)| paid(k) && state.paid() <= session.credited) else {
            return;
        };
        let provider = session.provider();
        self.payment_times.entry(provider).or_default().note(now.since(since));
    }
}
