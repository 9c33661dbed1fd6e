//! When the consumer pays the next slice, and how large it is.
//!
//! Work is metered per token and settled in prepaid slices that belong to the session and span requests. The next slice
//! is paid while the last one streams, so that nobody waits for a payment.
//!
//! | figure | what it is | held to |
//! |---|---|---|
//! | at hand | what waiting calls need to start, and a little ahead of each running request | the work that was asked for |
//! | ahead | what is spent in 1.5 payment times, as both were measured | [`SlicePolicy::ahead_limit`]: the first slice, or a tenth of what is proven |
//! | mark | the larger of the two | |
//! | slice | paid when the free balance is under the mark: at least `first`, twice the last one where that is proven, *ahead*, and what is missing to the mark | the largest, the quote's bounds, the caps |
//!
//! So a provider with nothing proven holds, beside what is reserved for running work, at most twice the larger of `first`
//! and the work at hand, whatever it makes of its speed and of our payments.

use satgrid_pricing::cost_alone;
use satgrid_types::{Msat, RateCard, Terms, TokenUsage};

use crate::pace::PRIOR_PAYMENT_MS;

/// The consumer's own limits; defaults are those of docs/money.md for a direct channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlicePolicy {
    /// The first slice to a peer, and the size that a failed audit returns to.
    pub first: Msat,
    pub largest: Msat,
}

impl Default for SlicePolicy {
    fn default() -> Self {
        SlicePolicy { first: Msat::sat(10), largest: Msat::sat(5_000) }
    }
}

impl SlicePolicy {
    /// The most that is prepaid ahead of the work at hand, by what is proven with the provider.
    pub fn ahead_limit(&self, proven: Msat) -> Msat {
        self.first.max(Msat(proven.0 / 10).min(self.largest))
    }
}

/// Every running request has at least 1.5 payment times at this speed ahead, in tokens per second: what is expected before
/// anything was measured.
const PRIOR_TOKENS_PER_S: u64 = 50;

/// What is kept free ahead of each running request, whatever was measured: never less than a quarter of an acknowledgement
/// interval's worth.
pub fn floor(rates: &RateCard, terms: &Terms) -> Msat {
    const TOKENS: u64 = PRIOR_TOKENS_PER_S * PRIOR_PAYMENT_MS * 3 / 2_000;
    let tokens = u32::try_from(TOKENS).unwrap_or(u32::MAX).max(terms.ack_tokens / 4);
    let usage = TokenUsage { completion: tokens, ..TokenUsage::default() };
    let per_request = rates.per_request;
    cost_alone(&usage, rates).map_or(Msat::MAX, |cost| cost.saturating_sub(per_request))
}

/// The time that should be covered ahead: 1.5 payment times, in ms.
pub fn covered_ms(payment_ms: u64) -> u64 {
    payment_ms.saturating_mul(3) / 2
}

/// What the next slice depends on.
#[derive(Debug, Clone, Copy)]
pub struct SliceDemand {
    /// Prepaid and free: what can be used beside the reservations of what runs.
    pub balance: Msat,
    /// See the module.
    pub at_hand: Msat,
    /// See the module; not held to its limit yet.
    pub ahead: Msat,
    /// The last slice of this session; none before the first.
    pub last: Option<Msat>,
    /// V: value that this provider delivered and this side checked.
    pub proven: Msat,
    /// Paid and in flight so far, against the session's spend cap.
    pub committed: Msat,
    pub spend_cap: Msat,
}

impl SliceDemand {
    /// A slice is due while the balance is under this.
    pub fn mark(&self, policy: &SlicePolicy) -> Msat {
        self.at_hand.max(self.ahead_allowed(policy))
    }
    pub fn is_due(&self, policy: &SlicePolicy) -> bool {
        self.balance < self.mark(policy)
    }
    /// The work at hand cannot go on with the balance alone.
    pub fn is_short(&self) -> bool {
        self.balance < self.at_hand
    }
    fn ahead_allowed(&self, policy: &SlicePolicy) -> Msat {
        self.ahead.min(policy.ahead_limit(self.proven))
    }
}

/// The next slice's amount: `clamp(first, largest, min(2 x last, V / 10))`, raised to what should be ahead and to what is
/// missing for the work at hand, within the provider's bounds. `None` where the spend cap leaves no room for it.
pub fn next_slice(policy: &SlicePolicy, terms: &Terms, d: &SliceDemand) -> Option<Msat> {
    let grown = Msat(d.last.map_or(policy.first.0, |last| last.0.saturating_mul(2)).min(d.proven.0 / 10));
    let lower = policy.first.max(terms.min_slice);
    let upper = policy.largest.min(terms.max_slice).max(lower);
    let missing = d.mark(policy).saturating_sub(d.balance);
    let size = grown.max(lower).max(d.ahead_allowed(policy)).max(missing).min(upper);
    let room = d.spend_cap.saturating_sub(d.committed);
    let size = size.min(room);
    (size >= terms.min_slice && !size.is_zero()).then_some(size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use satgrid_types::MsatPerMtok;

    fn demand(last: Option<u64>, proven: u64, at_hand: u64, committed: u64) -> SliceDemand {
        SliceDemand {
            balance: Msat::ZERO,
            at_hand: Msat(at_hand),
            ahead: Msat::ZERO,
            last: last.map(Msat),
            proven: Msat(proven),
            committed: Msat(committed),
            spend_cap: Msat::sat(10_000),
        }
    }

    #[track_caller]
    fn check(last: Option<u64>, proven: u64, at_hand: u64, committed: u64, expect: Option<u64>) {
        let demand = demand(last, proven, at_hand, committed);
        assert_eq!(next_slice(&SlicePolicy::default(), &Terms::default(), &demand), expect.map(Msat));
    }

    #[test]
    fn slices_grow_with_proven_value_only() {
        check(None, 0, 0, 0, Some(10_000));
        check(Some(10_000), 0, 0, 10_000, Some(10_000)); // nothing proven yet
        check(Some(10_000), 150_000, 0, 10_000, Some(15_000)); // a tenth of what is proven
        check(Some(10_000), 1_000_000, 0, 10_000, Some(20_000)); // at most double
        check(Some(4_000_000), 1_000_000_000, 0, 0, Some(5_000_000)); // the largest
        check(None, 0, 40_000, 0, Some(40_000)); // a long prompt needs more at once
        check(None, 0, 9_000_000, 0, Some(5_000_000)); // never above the largest
        check(None, 0, 0, 9_995_000, None); // the cap leaves less than the smallest slice
        check(None, 0, 40_000, 9_980_000, Some(20_000)); // what the cap leaves
    }

    /// Balance, at hand, ahead, proven; whether a slice is due, and its amount after one of 10 sat.
    #[track_caller]
    fn check_ahead((balance, at_hand, ahead, proven): (u64, u64, u64, u64), due: bool, amount: u64) {
        let last = Some(10_000);
        let demand = SliceDemand { balance: Msat(balance), ahead: Msat(ahead), ..demand(last, proven, at_hand, 0) };
        let policy = SlicePolicy::default();
        assert_eq!(demand.is_due(&policy), due);
        assert_eq!(next_slice(&policy, &Terms::default(), &demand), Some(Msat(amount)));
    }

    #[test]
    fn what_is_paid_ahead_is_held_to_what_is_proven() {
        check_ahead((5_000, 1_000, 4_000, 0), false, 10_000);
        check_ahead((3_000, 1_000, 4_000, 0), true, 10_000); // at the pace it was measured at
        check_ahead((9_000, 1_000, 400_000, 0), true, 10_000); // fast, and a stranger: the first slice again
        check_ahead((11_000, 1_000, 400_000, 0), false, 10_000); // and no more
        check_ahead((11_000, 12_000, 400_000, 0), true, 10_000); // but for the work at hand
        check_ahead((90_000, 1_000, 400_000, 1_000_000), true, 100_000); // a tenth of what is proven
        check_ahead((90_000, 1_000, 400_000, 90_000_000), true, 400_000); // all that it needs, at once
        check_ahead((0, 500_000, 400_000, 90_000_000), true, 500_000);
    }

    #[test]
    fn the_floor_is_worth_a_payment_time_of_an_ordinary_engine() {
        let rates = RateCard { output: MsatPerMtok(200_000_000), per_request: Msat(9), ..RateCard::default() };
        // 50 tokens/s x 0.5 s x 1.5 = 37 tokens at 200 msat
        assert_eq!(floor(&rates, &Terms::default()), Msat(37 * 200));
        assert_eq!(covered_ms(500), 750);
    }

    proptest! {
        /// Whatever was measured: the balance after a slice is at most the mark and the slice, and neither is above the
        /// larger of the work at hand and what is proven.
        #[test]
        fn no_measurement_raises_what_a_stranger_holds(
            balance in 0u64..100_000_000,
            at_hand in 0u64..1_000_000,
            ahead in 0u64..u64::MAX,
            proven in 0u64..1_000_000_000,
            last in proptest::option::of(1_000u64..5_000_000),
        ) {
            let policy = SlicePolicy::default();
            let d = SliceDemand { balance: Msat(balance), ahead: Msat(ahead), ..demand(last, proven, at_hand, 0) };
            let most = at_hand.max(10_000).max((proven / 10).min(5_000_000));
            prop_assert!(d.mark(&policy).0 <= most);
            let slice = next_slice(&policy, &Terms::default(), &d).map_or(0, |s| s.0);
            prop_assert!(slice <= most, "{slice} above {most}");
            if d.is_due(&policy) {
                prop_assert!(balance + slice <= 2 * most);
            }
        }
    }
}
