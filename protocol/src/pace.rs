//! How fast a session spends, and how long its payments take: what the low-water mark is reckoned from.
//!
//! Both are measured, and neither is taken on a provider's word. What was spent is what this side signed for, so a
//! provider that would raise the pace has to do the work and have it signed. It may take its time over an invoice, or
//! hold a payment back; so the time that is reckoned with ends at [`MAX_PAYMENT_MS`], and whatever the two figures say,
//! no more is prepaid on them than [`crate::slices`] allows.

use satgrid_types::{Msat, UnixMs};
use std::collections::VecDeque;

/// Spending is counted in slots of this many ms ...
const SLOT_MS: u64 = 250;
/// ... and what is older than this is forgotten.
pub const WINDOW_MS: u64 = 8_000;
/// A pace that is younger than this is reckoned as if it were this old: one statement is no pace.
const LEAST_MS: u64 = 1_000;

/// What a session was charged lately, by the statements that this side signed.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Pace {
    /// By the number of the slot since the epoch, oldest first.
    slots: VecDeque<(u64, Msat)>,
    /// All that was signed for by the last look; none before the first.
    signed: Option<Msat>,
}

impl Pace {
    /// So much is signed for now, over the session's whole life. The first look only learns where it stands.
    pub fn note(&mut self, now: UnixMs, signed: Msat) {
        let more = signed.saturating_sub(self.signed.unwrap_or(signed));
        self.signed = Some(self.signed.unwrap_or_default().max(signed));
        let slot = now.0 / SLOT_MS;
        while self.slots.front().is_some_and(|(at, _)| at.saturating_add(WINDOW_MS / SLOT_MS) <= slot) {
            self.slots.pop_front();
        }
        if more.is_zero() {
            return;
        }
        match self.slots.back_mut().filter(|(at, _)| *at >= slot) {
            Some((_, spent)) => *spent = spent.saturating_add(more),
            None => self.slots.push_back((slot, more)),
        }
    }

    /// What is spent in `ms` at this pace; never more than was signed for within [`WINDOW_MS`].
    pub fn during(&self, now: UnixMs, ms: u64) -> Msat {
        let live = |at: u64| now.since(UnixMs(at.saturating_mul(SLOT_MS))) < WINDOW_MS;
        let spent =
            self.slots.iter().filter(|(at, _)| live(*at)).fold(Msat::ZERO, |sum, (_, m)| sum.saturating_add(*m));
        let Some((first, _)) = self.slots.iter().find(|(at, _)| live(*at)) else { return Msat::ZERO };
        let age = now.since(UnixMs(first.saturating_mul(SLOT_MS))).clamp(LEAST_MS, WINDOW_MS);
        let during = u128::from(spent.0).saturating_mul(ms.into()) / u128::from(age);
        Msat(u64::try_from(during).unwrap_or(u64::MAX)).min(spent)
    }
}

/// A slice takes this long until one was measured, in ms.
pub const PRIOR_PAYMENT_MS: u64 = 500;
/// No payment is reckoned with as slower than this, in ms.
pub const MAX_PAYMENT_MS: u64 = 5_000;
/// Payments that are remembered.
const REMEMBERED: usize = 32;

/// How long slices took with one provider, from being asked for to being credited.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct PaymentTimes {
    /// In ms, oldest first.
    took: VecDeque<u64>,
}

impl PaymentTimes {
    pub fn note(&mut self, ms: u64) {
        self.took.push_back(ms);
        if self.took.len() > REMEMBERED {
            self.took.pop_front();
        }
    }

    /// The 95th percentile of the last ones, in ms.
    pub fn p95_ms(&self) -> u64 {
        let mut sorted: Vec<u64> = self.took.iter().copied().collect();
        sorted.sort_unstable();
        let rank = sorted.len().saturating_mul(95).div_ceil(100);
        let p95 = rank.checked_sub(1).and_then(|at| sorted.get(at).copied());
        p95.unwrap_or(PRIOR_PAYMENT_MS).min(MAX_PAYMENT_MS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BEGAN: u64 = 1_767_225_600_000;

    /// Notes of (ms, signed for in all); what is spent in so many ms after the last.
    #[track_caller]
    fn check(notes: &[(u64, u64)], at: u64, ms: u64, expect: u64) {
        let mut pace = Pace::default();
        notes.iter().for_each(|(at, signed)| pace.note(UnixMs(BEGAN + at), Msat(*signed)));
        assert_eq!(pace.during(UnixMs(BEGAN + at), ms), Msat(expect));
    }

    #[test]
    fn pace_is_what_was_signed_for_over_the_time_it_took() {
        check(&[], 0, 500, 0);
        check(&[(0, 900_000)], 0, 500, 0); // a session that comes back: its past is no pace
        check(&[(0, 0), (0, 100)], 0, 500, 50); // at least a second
        check(&[(0, 0), (0, 100), (1_000, 200), (2_000, 300)], 2_000, 500, 75); // 300 in 2 s
        check(&[(0, 0), (0, 100), (1_000, 100), (4_000, 100)], 4_000, 1_000, 25); // it slows down
        check(&[(0, 0), (0, 100)], 8_000, 1_000, 0); // long ago
        check(&[(0, 0), (0, 100), (7_000, 200)], 9_000, 1_000, 50); // the first one is forgotten: 100 in 2 s
        check(&[(0, 0), (500, 1_000)], 500, 60_000, 1_000); // never more than was signed for
        check(&[(0, 500), (500, 400), (600, 500)], 600, 1_000, 0); // statements only grow
    }

    #[test]
    fn the_slow_payments_count() {
        let p95 = |took: &[u64]| {
            let mut times = PaymentTimes::default();
            took.iter().for_each(|ms| times.note(*ms));
            times.p95_ms()
        };
        assert_eq!(p95(&[]), 500);
        assert_eq!(p95(&[80]), 80);
        assert_eq!(p95(&[80, 90, 1_200]), 1_200);
        assert_eq!(p95(&[90_000]), 5_000);
        let mut many = vec![100; 31];
        many.push(3_000);
        assert_eq!(p95(&many), 100, "one in thirty-two");
        many.push(3_000);
        assert_eq!(p95(&many), 3_000, "two in thirty-two");
        many.extend([100; 32]);
        assert_eq!(p95(&many), 100, "they pass");
    }

    proptest! {
        /// However statements are spaced and bundled, the pace promises nothing that was not signed for within the window.
        #[test]
        fn a_provider_cannot_raise_the_pace_without_work(
            steps in proptest::collection::vec((0u64..3_000, 0u64..50_000), 1..60),
            ms in 0u64..20_000,
        ) {
            let (mut pace, mut now, mut signed) = (Pace::default(), BEGAN, 0);
            pace.note(UnixMs(now), Msat(0));
            let mut all = Vec::new();
            for (wait, more) in steps {
                now += wait;
                signed += more;
                pace.note(UnixMs(now), Msat(signed));
                all.push((now, more));
                let recent: u64 = all.iter().filter(|(at, _)| now - at < WINDOW_MS + SLOT_MS).map(|(_, m)| m).sum();
                let during = pace.during(UnixMs(now), ms).0;
                prop_assert!(during <= recent, "{during} of {recent}");
                prop_assert!(u128::from(during) <= u128::from(recent) * u128::from(ms) / u128::from(LEAST_MS));
            }
        }
    }
}
