//! When the consumer pays the next slice, and how large it is.
//!
//! Work is metered per token and settled in prepaid slices that belong to the session and span requests. The next slice
//! is paid while the last one streams, so that nobody waits for a payment.

use satgrid_pricing::cost_alone;
use satgrid_types::{Msat, RateCard, Terms, TokenUsage};

/// The consumer's own limits; defaults are those of docs/money.md for a direct channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlicePolicy {
    /// The first slice to a peer, and the size that a failed audit returns to.
    pub first: Msat,
    pub largest: Msat,
    /// Payment time to be hidden, in ms: the 95th percentile of what this wallet has measured.
    pub payment_ms: u32,
    /// Generation speed that is expected, in tokens per second.
    pub tokens_per_s: u32,
}

impl Default for SlicePolicy {
    fn default() -> Self {
        SlicePolicy { first: Msat::sat(10), largest: Msat::sat(5_000), payment_ms: 500, tokens_per_s: 50 }
    }
}

/// The balance under which the next slice is paid: what 1.5 payment times of generation cost, and never less than one
/// acknowledgement interval's worth.
pub fn low_water(policy: &SlicePolicy, rates: &RateCard, terms: &Terms) -> Msat {
    let during_payment = u64::from(policy.tokens_per_s).saturating_mul(u64::from(policy.payment_ms)) * 3 / 2_000;
    let tokens = u32::try_from(during_payment).unwrap_or(u32::MAX).max(terms.ack_tokens / 4);
    let usage = TokenUsage { completion: tokens, ..TokenUsage::default() };
    let per_request = rates.per_request;
    cost_alone(&usage, rates).map_or(Msat::MAX, |cost| cost.saturating_sub(per_request))
}

/// What the size of the next slice depends on.
#[derive(Debug, Clone, Copy)]
pub struct SliceDemand {
    /// The last slice of this session; none before the first.
    pub last: Option<Msat>,
    /// V: value settled and audited clean with this provider.
    pub settled_clean: Msat,
    /// What is missing for the work at hand.
    pub shortfall: Msat,
    /// Paid and in flight so far, against the session's spend cap.
    pub committed: Msat,
    pub spend_cap: Msat,
}

/// The next slice's amount: `clamp(first, largest, min(2 x last, V / 10))`, raised to the shortfall where one piece of
/// work needs more, within the provider's bounds. `None` where the spend cap leaves no room for it.
pub fn next_slice(policy: &SlicePolicy, terms: &Terms, d: &SliceDemand) -> Option<Msat> {
    let grown = d.last.map_or(policy.first.0, |last| last.0.saturating_mul(2)).min(d.settled_clean.0 / 10);
    let lower = policy.first.0.max(terms.min_slice.0);
    let upper = policy.largest.0.min(terms.max_slice.0).max(lower);
    let size = grown.max(lower).max(d.shortfall.0).min(upper);
    let room = d.spend_cap.saturating_sub(d.committed);
    let size = Msat(size.min(room.0));
    (size >= terms.min_slice && !size.is_zero()).then_some(size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use satgrid_types::MsatPerMtok;

    #[track_caller]
    fn check(last: Option<u64>, clean: u64, shortfall: u64, committed: u64, expect: Option<u64>) {
        let demand = SliceDemand {
            last: last.map(Msat),
            settled_clean: Msat(clean),
            shortfall: Msat(shortfall),
            committed: Msat(committed),
            spend_cap: Msat::sat(10_000),
        };
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

    #[test]
    fn low_water_is_worth_the_payment_time() {
        let rates = RateCard { output: MsatPerMtok(200_000_000), per_request: Msat(9), ..RateCard::default() };
        // 50 tokens/s x 0.5 s x 1.5 = 37 tokens at 200 msat
        assert_eq!(low_water(&SlicePolicy::default(), &rates, &Terms::default()), Msat(37 * 200));
    }
}
