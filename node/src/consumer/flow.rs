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
    /// The most requests that were open at once, before the session was last without any and since.
    most_open: [u64; 2],
}

impl Flow {
    pub(super) fn asked(&mut self, now: UnixMs, k: u32) {
        self.asked = Some((k, now));
    }
    pub(super) fn unlinked(&mut self) {
        self.asked = None;
    }
    /// A request starts beside `others`.
    pub(super) fn started(&mut self, now: UnixMs, need: Msat, others: usize) {
        let follows = self.ended_at.is_some_and(|at| now.since(at) < FOLLOWS_MS);
        let alone = others == 0;
        self.in_a_row = follows || (self.in_a_row && !alone);
        let [before, since] = self.most_open;
        let open = to_u64(others).saturating_add(1);
        self.most_open = match (alone, follows) {
            (true, true) => [since, open],
            (true, false) => [0, open],
            (false, _) => [before, since.max(open)],
        };
        self.last_start = need;
    }
    pub(super) fn ended(&mut self, now: UnixMs) {
        self.ended_at = Some(now);
    }

    /// What should be free so that work goes on through a payment, while `open` requests are. `rest` is what these can still
    /// cost: more is wanted only where others have followed so far. Then it is enough to start as many as were open at once.
    pub(super) fn ahead(&self, now: UnixMs, payment_ms: u64, open: usize, rest: impl FnOnce() -> Msat) -> Msat {
        let during = self.pace.during(now, covered_ms(payment_ms));
        if !self.in_a_row {
            return during.min(rest());
        }
        let [before, since] = self.most_open;
        let more = before.max(since).saturating_sub(to_u64(open)).max(1);
        during.max(Msat(self.last_start.0.saturating_mul(more)))
    }
}

fn to_u64(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
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

#[cfg(test)]
mod tests {
    use super::*;

    const START: Msat = Msat(700);

    fn wanted(flow: &Flow, at: u64, open: usize) -> u64 {
        flow.ahead(UnixMs(at), 100, open, || Msat(50)).0
    }

    #[test]
    fn a_crowd_that_was_there_is_expected_again() {
        let mut flow = Flow::default();
        for others in 0..8 {
            flow.started(UnixMs(1_000), START, others);
        }
        assert_eq!(wanted(&flow, 1_000, 8), 0, "nobody followed so far, and no pace is known");
        flow.ended(UnixMs(2_000));
        flow.started(UnixMs(3_000), START, 0);
        assert_eq!(wanted(&flow, 3_000, 1), 7 * START.0, "seven more may come");
        (1..8).for_each(|others| flow.started(UnixMs(3_010), START, others));
        assert_eq!(wanted(&flow, 3_010, 8), START.0, "and then one at a time");
        assert_eq!(wanted(&flow, 4_000, 0), 8 * START.0);
        // One at a time from here on: the crowd is remembered once.
        flow.ended(UnixMs(4_000));
        flow.started(UnixMs(5_000), START, 0);
        assert_eq!(wanted(&flow, 5_000, 0), 8 * START.0);
        flow.ended(UnixMs(6_000));
        flow.started(UnixMs(7_000), START, 0);
        assert_eq!(wanted(&flow, 7_000, 0), START.0);
        // A request that comes late follows none.
        flow.ended(UnixMs(8_000));
        flow.started(UnixMs(8_000 + FOLLOWS_MS), START, 0);
        assert_eq!(wanted(&flow, 8_000 + FOLLOWS_MS, 1), 0);
    }
}
