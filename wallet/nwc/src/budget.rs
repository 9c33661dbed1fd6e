//! How much an app may spend: an amount a period, reserved before it is paid. Pure; time is an argument.
//!
//! | step | `spent` | `reserved` |
//! |---|---|---|
//! | a payment may start | | + amount and fee limit |
//! | it settled | + amount and fee | - what was reserved for it |
//! | it failed | | - what was reserved for it |
//! | its fate is unknown | | stays: what may be out counts |
//! | it is proved to be out no more (`Quiet`) | | - what was reserved for it |

use core::time::Duration;
use satgrid_types::{Msat, PaymentHash, UnixMs};
use satgrid_wallet::payment::QUIET_MS;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use thiserror::Error;

const DAY_MS: u64 = 24 * 3_600 * 1_000;

/// How often a budget starts over.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Renewal {
    #[default]
    Never,
    Daily,
    Weekly,
    Monthly,
}

impl Renewal {
    const fn period_ms(self) -> Option<u64> {
        match self {
            Renewal::Never => None,
            Renewal::Daily => Some(DAY_MS),
            Renewal::Weekly => Some(7 * DAY_MS),
            Renewal::Monthly => Some(30 * DAY_MS),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Budget {
    pub limit: Msat,
    pub renewal: Renewal,
    pub period_began: UnixMs,
    pub spent: Msat,
    /// By payment.
    pub reserved: BTreeMap<PaymentHash, Msat>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{asked} with its fee limit is more than the {left} that this connection may still spend")]
pub struct OverBudget {
    pub asked: Msat,
    pub left: Msat,
}

impl Budget {
    pub fn new(now: UnixMs, limit: Msat, renewal: Renewal) -> Budget {
        Budget { limit, renewal, period_began: now, spent: Msat::ZERO, reserved: BTreeMap::new() }
    }

    /// What may still be spent in this period.
    pub fn left(&self, now: UnixMs) -> Msat {
        let spent = if self.is_over(now) { Msat::ZERO } else { self.spent };
        let held = self.reserved.values().fold(spent, |sum, held| sum.saturating_add(*held));
        self.limit.checked_sub(held).unwrap_or(Msat::ZERO)
    }

    /// Holds back what a payment may cost. The same payment is held once, at the most that was asked for it: two invoices may
    /// name one hash. Returns whether nothing was held for it before.
    pub fn reserve(&mut self, now: UnixMs, hash: PaymentHash, most: Msat) -> Result<bool, OverBudget> {
        self.renew(now);
        let held = self.reserved.get(&hash).copied();
        let more = most.checked_sub(held.unwrap_or(Msat::ZERO)).unwrap_or(Msat::ZERO);
        let left = self.left(now);
        if more > left {
            return Err(OverBudget { asked: most, left });
        }
        self.reserved.insert(hash, held.map_or(most, |held| held.max(most)));
        Ok(held.is_none())
    }

    /// A payment cost this much. It counts once.
    pub fn settled(&mut self, now: UnixMs, hash: PaymentHash, cost: Msat) {
        self.renew(now);
        if self.reserved.remove(&hash).is_some() {
            self.spent = self.spent.saturating_add(cost);
        }
    }

    pub fn failed(&mut self, hash: &PaymentHash) {
        self.reserved.remove(hash);
    }

    fn is_over(&self, now: UnixMs) -> bool {
        self.renewal.period_ms().is_some_and(|period| now.since(self.period_began) >= period)
    }

    fn renew(&mut self, now: UnixMs) {
        if self.is_over(now) {
            self.period_began = now;
            self.spent = Msat::ZERO;
        }
    }
}

/// Payments without an end, and since when nothing can be out for them: their invoice has expired, a channel is usable and
/// none carries a payment of ours. What a crash forgot before it was sent ends so, or it would be held for ever.
#[derive(Debug, Default)]
pub(crate) struct Quiet(BTreeMap<PaymentHash, Duration>);

impl Quiet {
    /// What was found at this moment of a clock that nobody sets. True once it has held for long enough.
    pub(crate) fn saw(&mut self, at: Duration, hash: PaymentHash, quiet: bool) -> bool {
        if !quiet {
            self.0.remove(&hash);
            return false;
        }
        let since = *self.0.entry(hash).or_insert(at);
        at.saturating_sub(since) >= Duration::from_millis(QUIET_MS)
    }

    /// Forgets all but these.
    pub(crate) fn keep(&mut self, held: impl Fn(&PaymentHash) -> bool) {
        self.0.retain(|hash, _| held(hash));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(byte: u8) -> PaymentHash {
        PaymentHash([byte; 32])
    }

    #[test]
    fn what_may_be_out_counts() {
        let (now, mut budget) = (UnixMs(1_000), Budget::new(UnixMs(0), Msat(10_000), Renewal::Never));
        budget.reserve(now, hash(1), Msat(6_000)).unwrap();
        budget.reserve(now, hash(1), Msat(6_000)).unwrap();
        let over = OverBudget { asked: Msat(4_001), left: Msat(4_000) };
        assert_eq!(budget.reserve(now, hash(2), Msat(4_001)), Err(over));
        budget.settled(now, hash(1), Msat(5_500));
        budget.settled(now, hash(1), Msat(5_500));
        assert_eq!(budget.left(now), Msat(4_500));
        budget.reserve(now, hash(3), Msat(4_500)).unwrap();
        budget.failed(&hash(3));
        assert_eq!(budget.left(now), Msat(4_500));
        // Never renewed, however long.
        assert_eq!(budget.left(UnixMs(1_000 * DAY_MS)), Msat(4_500));
    }

    /// An app that makes its own hashes could hold little by one invoice and pay much by the other.
    #[test]
    fn two_invoices_of_one_hash_are_held_at_the_dearer() {
        let (now, mut budget) = (UnixMs(1_000), Budget::new(UnixMs(0), Msat(10_000), Renewal::Never));
        assert_eq!(budget.reserve(now, hash(1), Msat(1_000)), Ok(true));
        let over = OverBudget { asked: Msat(50_000), left: Msat(9_000) };
        assert_eq!(budget.reserve(now, hash(1), Msat(50_000)), Err(over));
        assert_eq!(budget.left(now), Msat(9_000), "what was held before is held still");
        assert_eq!(budget.reserve(now, hash(1), Msat(10_000)), Ok(false));
        assert_eq!(budget.left(now), Msat(0));
        assert_eq!(budget.reserve(now, hash(1), Msat(500)), Ok(false));
        assert_eq!(budget.left(now), Msat(0), "the dearer one may be out");
    }

    #[test]
    fn what_is_not_out_is_not_held_for_ever() {
        let (mut quiet, at) = (Quiet::default(), Duration::from_millis);
        assert!(!quiet.saw(at(0), hash(1), true));
        assert!(!quiet.saw(at(QUIET_MS - 1), hash(1), true));
        assert!(!quiet.saw(at(QUIET_MS - 1), hash(2), true));
        assert!(quiet.saw(at(QUIET_MS), hash(1), true));
        // Something was out in between.
        assert!(!quiet.saw(at(QUIET_MS), hash(1), false));
        assert!(!quiet.saw(at(2 * QUIET_MS - 1), hash(1), true));
        quiet.keep(|held| *held == hash(1));
        assert!(!quiet.saw(at(2 * QUIET_MS), hash(2), true));
        assert!(quiet.saw(at(3 * QUIET_MS), hash(1), true));
    }

    #[test]
    fn a_period_starts_over_and_keeps_what_is_held() {
        let mut budget = Budget::new(UnixMs(0), Msat(10_000), Renewal::Daily);
        budget.reserve(UnixMs(1), hash(1), Msat(9_000)).unwrap();
        budget.settled(UnixMs(2), hash(1), Msat(9_000));
        budget.reserve(UnixMs(3), hash(2), Msat(1_000)).unwrap();
        assert_eq!(budget.left(UnixMs(DAY_MS - 1)), Msat(0));
        assert_eq!(budget.left(UnixMs(DAY_MS)), Msat(9_000));
        budget.reserve(UnixMs(DAY_MS), hash(3), Msat(9_000)).unwrap();
        assert_eq!(budget.left(UnixMs(DAY_MS)), Msat(0));
    }
}
