//! What work costs. One function turns work into money, with one rounding, upward.
//!
//! Formula (docs/money.md, "Units and rounding"): a request's numerators are the sum of `count x rate` over its counters
//! plus `per_request x 1,000,000`; a session's charge is `ceil(sum of numerators over its requests / 1,000,000)` msat.
#![cfg_attr(test, allow(clippy::unwrap_used))]
#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(clippy::arithmetic_side_effects, clippy::cast_possible_truncation, clippy::float_arithmetic)
)]

mod ceiling;

use satgrid_types::{Msat, Numerators, RateCard, TokenUsage};
use thiserror::Error;

pub use ceiling::{Ceiling, affordable_output, ceiling, leg_ceiling, with_margin, without_margin};

/// Units in a million: prices are per million units of work.
pub const PER_MILLION: u64 = 1_000_000;

/// A price times a count that no bill can hold: more than 18 million million msat. Refuse the quote or end the session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ChargeError {
    #[error("the charge does not fit 64 bits")]
    Overflow,
    #[error("the usage contradicts itself: more cached than prompt tokens, or more reasoning than output tokens")]
    Inconsistent,
    #[error("the usage counts layer or expert work, and the quote has no price for it")]
    Unpriced,
}

/// The exact numerators of one request at its quote's rates.
pub fn numerators(usage: &TokenUsage, rates: &RateCard) -> Result<Numerators, ChargeError> {
    if !usage.is_consistent() {
        return Err(ChargeError::Inconsistent);
    }
    let fresh = usage.prompt.checked_sub(usage.cached_prompt).ok_or(ChargeError::Inconsistent)?;
    let part = usage.part.unwrap_or_default();
    let started = usage.prompt > 0 || usage.completion > 0 || part.position_layers > 0 || part.expert_rows > 0;
    // Work that the quote has no price for is nobody's to charge.
    let unpriced = (part.position_layers > 0 && rates.position_layer.is_none())
        || (part.expert_rows > 0 && rates.expert_row.is_none());
    if unpriced {
        return Err(ChargeError::Unpriced);
    }
    let parts = [
        (u64::from(fresh), rates.input.0),
        (u64::from(usage.cached_prompt), rates.cached_input.0),
        (u64::from(usage.completion), rates.output.0),
        (part.position_layers, rates.position_layer.unwrap_or_default().0),
        (part.expert_rows, rates.expert_row.unwrap_or_default().0),
        (if started { PER_MILLION } else { 0 }, rates.per_request.0),
    ];
    parts.iter().try_fold(Numerators::ZERO, |sum, (count, rate)| {
        let product = count.checked_mul(*rate).ok_or(ChargeError::Overflow)?;
        sum.checked_add(Numerators(product)).ok_or(ChargeError::Overflow)
    })
}

/// Charges a session's summed numerators (counts x msat per million), rounded up to a whole msat.
///
/// Rounding applies to the running total, so cutting work into more receipts or streams never raises its price.
pub fn charge(total: Numerators) -> Msat {
    Msat(total.0.div_ceil(PER_MILLION))
}

/// What a request adds to the bill of a session that stands at `before`: `charge(before + added) - charge(before)`.
pub fn marginal_charge(before: Numerators, added: Numerators) -> Result<Msat, ChargeError> {
    let after = before.checked_add(added).ok_or(ChargeError::Overflow)?;
    // charge is monotone, so this never goes below zero.
    charge(after).checked_sub(charge(before)).ok_or(ChargeError::Overflow)
}

/// What `usage` costs alone: the figure for reservations and estimates.
pub fn cost_alone(usage: &TokenUsage, rates: &RateCard) -> Result<Msat, ChargeError> {
    numerators(usage, rates).map(charge)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use satgrid_types::{MsatPerMtok, PartUsage, WorkKind};

    fn usage(prompt: u32, cached: u32, completion: u32) -> TokenUsage {
        TokenUsage { prompt, cached_prompt: cached, completion, ..TokenUsage::default() }
    }
    fn rates(input: u64, cached: u64, output: u64, per_request: u64) -> RateCard {
        RateCard {
            input: MsatPerMtok(input),
            cached_input: MsatPerMtok(cached),
            output: MsatPerMtok(output),
            per_request: Msat(per_request),
            ..RateCard::default()
        }
    }
    #[track_caller]
    fn check(usage: TokenUsage, rates: RateCard, msat: u64) {
        assert_eq!(cost_alone(&usage, &rates), Ok(Msat(msat)));
    }

    #[test]
    fn charges_by_hand() {
        check(usage(0, 0, 0), rates(1_000_000, 0, 1_000_000, 500), 0);
        check(usage(1, 0, 0), rates(1, 0, 0, 0), 1); // a millionth of a msat rounds up
        check(usage(1_000_000, 0, 0), rates(1, 0, 0, 0), 1);
        check(usage(1_000_001, 0, 0), rates(1, 0, 0, 0), 2);
        check(usage(1_000, 400, 50), rates(2_000_000, 500_000, 8_000_000, 0), 600 * 2 + 200 + 50 * 8);
        check(usage(1, 0, 0), rates(0, 0, 0, 700), 700);
    }

    #[test]
    fn parts_are_priced_by_position_layers_and_expert_rows() {
        let part = PartUsage::default().plus(WorkKind::Prefill, 500, 6).unwrap().plus(WorkKind::Decode, 1, 6).unwrap();
        let usage = TokenUsage::of_part(PartUsage { expert_rows: 10, ..part });
        let rates = RateCard { per_request: Msat(3), ..RateCard::default() };
        assert_eq!(cost_alone(&usage, &rates), Err(ChargeError::Unpriced));
        let rates = RateCard { position_layer: Some(MsatPerMtok(1_000_000)), ..rates };
        assert_eq!(cost_alone(&usage, &rates), Err(ChargeError::Unpriced), "its expert rows have no price");
        let rates = RateCard { expert_row: Some(MsatPerMtok(2_000_000)), ..rates };
        assert_eq!(cost_alone(&usage, &rates), Ok(Msat(501 * 6 + 20 + 3)));
        assert_eq!(cost_alone(&TokenUsage::of_part(PartUsage::default()), &rates), Ok(Msat(0)), "nothing was begun");
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        assert_eq!(cost_alone(&usage(u32::MAX, 0, 0), &rates(u64::MAX, 0, 0, 0)), Err(ChargeError::Overflow));
        assert_eq!(cost_alone(&usage(1, 2, 0), &rates(1, 1, 1, 0)), Err(ChargeError::Inconsistent));
    }

    proptest! {
        #[test]
        fn pieces_cost_what_the_whole_costs(parts in proptest::collection::vec(0u64..1 << 40, 1..50)) {
            let total = Numerators(parts.iter().sum());
            let mut before = Numerators::ZERO;
            let mut paid = Msat::ZERO;
            for part in &parts {
                paid = paid.checked_add(marginal_charge(before, Numerators(*part)).unwrap()).unwrap();
                before = before.checked_add(Numerators(*part)).unwrap();
            }
            prop_assert_eq!(paid, charge(total));
        }

        #[test]
        fn charge_is_monotone_and_within_one_msat(a in 0u64..1 << 50, b in 0u64..1 << 50) {
            let whole = charge(Numerators(a + b));
            let apart = charge(Numerators(a)).0 + charge(Numerators(b)).0;
            prop_assert!(whole >= charge(Numerators(a)));
            prop_assert!(apart >= whole.0 && apart - whole.0 <= 1);
        }
    }
}
