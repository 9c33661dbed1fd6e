//! What this node itself has been through with each provider.
//!
//! From our own sessions only:
//!
//! - **what was settled** and audited clean. Between equals the one with more goes first.
//! - **how fast it wrote and what it cost to pay it**, in running means: they count instead of what it lists.
//! - **penalty points**, which halve every day. At [`REFUSED_AT`] or above, the planner leaves the provider out; below,
//!   every point makes its price look a thousandth dearer.
//!
//! A lie (an overcount, a failed audit, a quote above the listing) also takes away what was settled. What others say weighs
//! nothing.

use std::collections::BTreeMap;

use crate::lineage::Lineage;
use satgrid_types::{Msat, NodeKey, UnixMs, decayed};
use serde::{Deserialize, Serialize};

/// Penalty points that keep a provider out.
pub const REFUSED_AT: u64 = 100;
/// After this long, half of the points are gone.
pub const HALF_LIFE_MS: u64 = 24 * 60 * 60 * 1_000;
/// Points beyond this add nothing: a penalty ends some day (about ten days after the last lie).
pub const MAX_POINTS: u64 = 100_000;
/// Providers remembered.
pub const MAX_PROVIDERS: usize = 100_000;
/// One new observation moves a running mean by an eighth.
const SMOOTHING: u64 = 8;

/// What a provider did wrong, by what it says about the provider.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// No connection could be made.
    Unreachable,
    /// It took the request and then fell silent, or the stream broke.
    Stalled,
    /// It refused what its listing offers.
    Declined,
    /// An invoice with another amount or description hash than agreed.
    WrongInvoice,
    /// It spoke the protocol wrongly.
    BadFrame,
    /// A session was closed and the remainder not given back.
    Unrefunded,
    /// A quote above its own listing.
    DearQuote,
    /// It claimed more tokens than it sent.
    Overcount,
    /// Its receipts or its output did not stand an audit.
    AuditFailed,
}

impl Fault {
    pub const fn points(self) -> u64 {
        match self {
            Fault::Declined => 5,
            Fault::Unreachable => 20,
            Fault::Stalled => 30,
            Fault::BadFrame => 100,
            Fault::WrongInvoice => 200,
            Fault::Unrefunded => 400,
            Fault::DearQuote => 400,
            Fault::Overcount | Fault::AuditFailed => 10_000,
        }
    }

    /// Bad luck may befall an honest provider; a lie may not.
    pub const fn is_lie(self) -> bool {
        match self {
            Fault::Declined | Fault::Unreachable | Fault::Stalled | Fault::BadFrame => false,
            Fault::WrongInvoice | Fault::Unrefunded | Fault::DearQuote | Fault::Overcount | Fault::AuditFailed => true,
        }
    }
}

/// One provider's record.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Settled and audited clean.
    pub settled: Msat,
    /// Requests that ended with a receipt.
    pub requests: u64,
    pub faults: u64,
    /// Running mean of what payments to it cost in routing fees, in millionths of the amount.
    pub fee_ppm: u32,
    /// Running mean of its output speed as we saw it, in thousandths of a token per second; zero before the first.
    pub decode_mtok_s: u64,
    points: u64,
    points_at: UnixMs,
}

impl Record {
    /// Penalty points as of `now`.
    pub fn points(&self, now: UnixMs) -> u64 {
        decayed(self.points, now.since(self.points_at), HALF_LIFE_MS)
    }

    /// Both records as one. Means are those of the first that has any.
    fn with(&self, now: UnixMs, other: &Record) -> Record {
        let first = |a: u64, b: u64| if a == 0 { b } else { a };
        Record {
            settled: self.settled.saturating_add(other.settled),
            requests: self.requests.saturating_add(other.requests),
            faults: self.faults.saturating_add(other.faults),
            fee_ppm: if self.fee_ppm == 0 { other.fee_ppm } else { self.fee_ppm },
            decode_mtok_s: first(self.decode_mtok_s, other.decode_mtok_s),
            points: self.points(now).saturating_add(other.points(now)).min(MAX_POINTS),
            points_at: now,
        }
    }

    pub fn is_refused(&self, now: UnixMs) -> bool {
        self.points(now) >= REFUSED_AT
    }
}

/// The records of all providers that this node has dealt with.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Reputation {
    records: BTreeMap<NodeKey, Record>,
}

impl Reputation {
    pub fn get(&self, provider: &NodeKey) -> Record {
        self.records.get(provider).copied().unwrap_or_default()
    }

    /// The record of a key and of those that it stands for: trust and penalties of a key that was given up go to its heir.
    pub fn of_line(&self, now: UnixMs, lineage: &Lineage, provider: &NodeKey) -> Record {
        let line = lineage.line(provider);
        let known = line.iter().filter_map(|key| self.records.get(key));
        known.fold(Record::default(), |sum, record| sum.with(now, record))
    }

    pub fn records(&self) -> &BTreeMap<NodeKey, Record> {
        &self.records
    }

    /// Puts a record back as it was stored.
    pub fn restore(&mut self, provider: NodeKey, record: Record) {
        self.records.insert(provider, record);
    }

    /// A request ended with a receipt that we checked and countersigned.
    pub fn settled(&mut self, provider: NodeKey, cost: Msat, decode_mtok_s: Option<u64>) {
        let record = self.entry(provider);
        record.settled = record.settled.saturating_add(cost);
        record.requests = record.requests.saturating_add(1);
        if let Some(seen) = decode_mtok_s {
            record.decode_mtok_s = mean(record.decode_mtok_s, seen);
        }
    }

    /// A slice was paid, at this routing fee.
    pub fn paid_slice(&mut self, provider: NodeKey, amount: Msat, fee: Msat) {
        let record = self.entry(provider);
        let ppm = u128::from(fee.0) * 1_000_000 / u128::from(amount.0.max(1));
        let ppm = u32::try_from(ppm).unwrap_or(u32::MAX);
        record.fee_ppm = u32::try_from(mean(u64::from(record.fee_ppm), u64::from(ppm))).unwrap_or(u32::MAX);
    }

    /// It did something wrong.
    pub fn fault(&mut self, now: UnixMs, provider: NodeKey, fault: Fault) {
        let record = self.entry(provider);
        record.points = record.points(now).saturating_add(fault.points()).min(MAX_POINTS);
        record.points_at = now;
        record.faults = record.faults.saturating_add(1);
        if fault.is_lie() {
            record.settled = Msat::ZERO;
        }
    }

    /// The record to change. At the limit, the one with the least to lose makes room.
    fn entry(&mut self, provider: NodeKey) -> &mut Record {
        if self.records.len() >= MAX_PROVIDERS && !self.records.contains_key(&provider) {
            let least =
                self.records.iter().min_by_key(|(_, record)| (record.points, record.settled)).map(|(key, _)| *key);
            least.map(|key| self.records.remove(&key));
        }
        self.records.entry(provider).or_default()
    }
}

/// A running mean that starts at its first observation.
fn mean(old: u64, seen: u64) -> u64 {
    if old == 0 { seen } else { old - old / SMOOTHING + seen / SMOOTHING }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const P: NodeKey = NodeKey([1; 32]);

    #[test]
    fn a_lie_starts_trust_again() {
        let mut all = Reputation::default();
        all.settled(P, Msat(1_000_000_000), None);
        all.fault(UnixMs(0), P, Fault::Stalled);
        assert_eq!(all.get(&P).settled, Msat(1_000_000_000), "bad luck is no lie");
        all.fault(UnixMs(0), P, Fault::Overcount);
        assert_eq!(all.get(&P).settled, Msat::ZERO);
        assert!(all.get(&P).is_refused(UnixMs(HALF_LIFE_MS * 6)));
        assert!(!all.get(&P).is_refused(UnixMs(HALF_LIFE_MS * 7)));
    }

    #[test]
    fn points_halve_every_day() {
        let mut all = Reputation::default();
        all.fault(UnixMs(0), P, Fault::WrongInvoice);
        let points = |ms| all.get(&P).points(UnixMs(ms));
        assert_eq!((points(0), points(HALF_LIFE_MS / 2)), (200, 150));
        assert_eq!((points(HALF_LIFE_MS), points(2 * HALF_LIFE_MS), points(100 * HALF_LIFE_MS)), (100, 50, 0));
        all.fault(UnixMs(HALF_LIFE_MS), P, Fault::Stalled);
        assert_eq!(all.get(&P).points(UnixMs(HALF_LIFE_MS)), 130);
    }

    #[test]
    fn fees_and_speed_are_running_means() {
        let mut all = Reputation::default();
        all.paid_slice(P, Msat(250_000), Msat(2_000));
        assert_eq!(all.get(&P).fee_ppm, 8_000);
        all.paid_slice(P, Msat(250_000), Msat(0));
        assert_eq!(all.get(&P).fee_ppm, 7_000);
        all.settled(P, Msat(1), Some(40_000));
        all.settled(P, Msat(1), Some(48_000));
        assert_eq!(all.get(&P).decode_mtok_s, 41_000);
    }

    proptest! {
        #[test]
        fn penalties_only_shrink_with_time(start in 0u64..MAX_POINTS, a in 0u64..1 << 40, b in 0u64..1 << 40) {
            let record = Record { points: start, ..Record::default() };
            prop_assert!(record.points(UnixMs(a.min(b))) >= record.points(UnixMs(a.max(b))));
            prop_assert!(record.points(UnixMs(a)) <= start);
        }
    }
}
