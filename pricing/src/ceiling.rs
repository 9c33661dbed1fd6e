//! The most that a request can cost before it is sent: prompt and longest output at the listed rates, nothing cached.

use crate::{ChargeError, cost_alone};
use satgrid_types::{Msat, MsatPerMtok, RateCard, TokenUsage};

/// The most that one request can cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ceiling {
    /// At the dearest of the candidates, if the one that begins also ends it.
    pub one: Msat,
    /// If one more provider has to take over, who bills what was there as input.
    pub failover: Msat,
}

/// The most that one provider can ask for a prompt of `prompt` tokens and up to `output` more.
pub fn leg_ceiling(prompt: u32, output: u32, rates: &RateCard) -> Result<Msat, ChargeError> {
    // A provider says what came from its cache: take the dearer of the two rates.
    let input = MsatPerMtok(rates.input.0.max(rates.cached_input.0));
    let usage = TokenUsage { prompt, completion: output, ..TokenUsage::default() };
    cost_alone(&usage, &RateCard { input, cached_input: input, ..*rates })
}

/// The ceiling over `candidates`. A failover can strike at any token; the cost is linear in where, so the worst is at the
/// first or at the last.
pub fn ceiling(candidates: &[RateCard], prompt: u32, output: u32) -> Result<Ceiling, ChargeError> {
    let mut found = Ceiling { one: Msat::ZERO, failover: Msat::ZERO };
    for first in candidates {
        found.one = found.one.max(leg_ceiling(prompt, output, first)?);
        for second in candidates {
            for done in [0, output] {
                let begun = leg_ceiling(prompt, done, first)?;
                let left = output.saturating_sub(done);
                let taken_over = leg_ceiling(prompt.saturating_add(done), left, second)?;
                let both = begun.checked_add(taken_over).ok_or(ChargeError::Overflow)?;
                found.failover = found.failover.max(both);
            }
        }
    }
    Ok(found)
}

/// The longest output that `budget` covers at every candidate, `most` at most; `None` where not even one token fits.
pub fn affordable_output(candidates: &[RateCard], prompt: u32, most: u32, budget: Msat) -> Option<u32> {
    let covers = |output: u32| {
        candidates.iter().all(|rates| leg_ceiling(prompt, output, rates).is_ok_and(|ceiling| ceiling <= budget))
    };
    if most == 0 || !covers(1) {
        return None;
    }
    // The ceiling grows with the output: search for the last that is covered.
    let (mut covered, mut beyond) = (1, most.saturating_add(1));
    while beyond.saturating_sub(covered) > 1 {
        let middle = covered.midpoint(beyond);
        if covers(middle) {
            covered = middle;
        } else {
            beyond = middle;
        }
    }
    Some(covered)
}

const PERMILLE: u128 = 1_000;

/// A cost with a reseller's margin in thousandths, rounded up.
pub fn with_margin(cost: Msat, permille: u64) -> Msat {
    let whole = PERMILLE.saturating_add(u128::from(permille));
    let product = u128::from(cost.0).saturating_mul(whole);
    Msat(u64::try_from(product.div_ceil(PERMILLE)).unwrap_or(u64::MAX))
}

/// The largest cost whose price with the margin is not above `price`.
pub fn without_margin(price: Msat, permille: u64) -> Msat {
    let whole = PERMILLE.saturating_add(u128::from(permille));
    let cost = u128::from(price.0).saturating_mul(PERMILLE).checked_div(whole).unwrap_or(0);
    Msat(u64::try_from(cost).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rates(input: u64, cached: u64, output: u64, per_request: u64) -> RateCard {
        RateCard {
            input: MsatPerMtok(input),
            cached_input: MsatPerMtok(cached),
            output: MsatPerMtok(output),
            per_request: Msat(per_request),
            ..RateCard::default()
        }
    }

    #[test]
    fn figures() {
        let cheap = rates(2_000_000, 500_000, 8_000_000, 0);
        assert_eq!(leg_ceiling(1_000, 50, &cheap), Ok(Msat(2_400)));
        let dear = rates(3_000_000, 0, 9_000_000, 7);
        let both = ceiling(&[cheap, dear], 1_000, 50).unwrap();
        assert_eq!(both.one, Msat(3_457));
        // All of it at the dear one, then its output as input of the dear one again.
        assert_eq!(both.failover, Msat(3_457 + 3_150 + 7));
        assert_eq!(affordable_output(&[cheap, dear], 1_000, 50, Msat(3_457)), Some(50));
        assert_eq!(affordable_output(&[cheap, dear], 1_000, 50, Msat(3_456)), Some(49));
        assert_eq!(affordable_output(&[cheap], 1_000, 50, Msat(2_007)), None);
        assert_eq!(affordable_output(&[cheap], 1_000, 0, Msat(9_999)), None);
    }

    proptest! {
        #[test]
        fn a_margin_and_back_never_passes_the_price(price in 0..u64::MAX / 4_000, permille in 0..3_000u64) {
            let cost = without_margin(Msat(price), permille);
            prop_assert!(with_margin(cost, permille) <= Msat(price));
            prop_assert!(with_margin(Msat(cost.0 + 1), permille) > Msat(price));
        }

        #[test]
        fn no_way_through_two_providers_costs_more(
            (a, b) in ((0..9u64, 0..9u64, 0..99u64), (0..9u64, 0..9u64, 0..99u64)),
            prompt in 1..500u32, output in 1..300u32, at in 0..300u32, cached in 0..500u32,
        ) {
            let card = |(i, o, r): (u64, u64, u64)| rates(i * 100_000, i * 50_000, o * 100_000, r);
            let (a, b) = (card(a), card(b));
            let found = ceiling(&[a, b], prompt, output).unwrap();
            let at = at.min(output);
            let usage = |prompt, cached: u32, completion| TokenUsage {
                prompt, cached_prompt: cached.min(prompt), completion, ..TokenUsage::default()
            };
            let first = cost_alone(&usage(prompt, cached, at), &a).unwrap();
            let second = cost_alone(&usage(prompt + at, cached, output - at), &b).unwrap();
            // Two roundings upward may add one msat over a linear bound.
            prop_assert!(first.0 + second.0 <= found.failover.0 + 1);
            prop_assert!(cost_alone(&usage(prompt, cached, output), &b).unwrap() <= found.one);
        }
    }
}
