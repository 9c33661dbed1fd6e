//! Money and work in integers. No float comes near either.

use core::fmt;
use minicbor::{Decode, Encode};
use serde::{Deserialize, Serialize};

/// An amount in millisatoshi. One sat is 1,000 msat.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize, Deserialize)]
#[cbor(transparent)]
#[serde(transparent)]
pub struct Msat(#[n(0)] pub u64);

impl Msat {
    pub const ZERO: Msat = Msat(0);
    pub const MAX: Msat = Msat(u64::MAX);

    /// `None` where the amount does not fit.
    pub const fn from_sat(sat: u64) -> Option<Msat> {
        match sat.checked_mul(1_000) {
            Some(msat) => Some(Msat(msat)),
            None => None,
        }
    }
    /// For constants: the number of sat is known to fit.
    pub const fn sat(sat: u32) -> Msat {
        Msat(sat as u64 * 1_000)
    }
    pub const fn checked_add(self, other: Msat) -> Option<Msat> {
        match self.0.checked_add(other.0) {
            Some(v) => Some(Msat(v)),
            None => None,
        }
    }
    pub const fn checked_sub(self, other: Msat) -> Option<Msat> {
        match self.0.checked_sub(other.0) {
            Some(v) => Some(Msat(v)),
            None => None,
        }
    }
    /// For bounds that are shown, never for a figure that enters the books.
    pub const fn saturating_add(self, other: Msat) -> Msat {
        Msat(self.0.saturating_add(other.0))
    }
    /// For bounds that are shown, never for a figure that enters the books.
    pub const fn saturating_sub(self, other: Msat) -> Msat {
        Msat(self.0.saturating_sub(other.0))
    }
    pub const fn is_zero(self) -> bool {
        self.0 == 0
    }
    /// `None` if any partial sum does not fit.
    pub fn checked_sum(amounts: impl IntoIterator<Item = Msat>) -> Option<Msat> {
        amounts.into_iter().try_fold(Msat::ZERO, Msat::checked_add)
    }
}

impl fmt::Display for Msat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} msat", self.0)
    }
}

/// An integer price: msat per 1,000,000 units of work (tokens, position-layers or expert rows).
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize, Deserialize)]
#[cbor(transparent)]
#[serde(transparent)]
pub struct MsatPerMtok(#[n(0)] pub u64);

/// Work times price, before the division by 1,000,000: the exact figure that charges are rounded from.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize, Deserialize)]
#[cbor(transparent)]
#[serde(transparent)]
pub struct Numerators(#[n(0)] pub u64);

impl Numerators {
    pub const ZERO: Numerators = Numerators(0);
    pub const fn checked_add(self, other: Numerators) -> Option<Numerators> {
        match self.0.checked_add(other.0) {
            Some(v) => Some(Numerators(v)),
            None => None,
        }
    }
    pub const fn checked_sub(self, other: Numerators) -> Option<Numerators> {
        match self.0.checked_sub(other.0) {
            Some(v) => Some(Numerators(v)),
            None => None,
        }
    }
}

/// What is left of an amount that halves with each half-life: exact at its ends, linear and rounded up between them.
pub const fn decayed(whole: u64, passed_ms: u64, half_life_ms: u64) -> u64 {
    let halvings = passed_ms / half_life_ms;
    let whole = if halvings < u64::BITS as u64 { whole >> halvings } else { 0 };
    // Below half of a u64.
    let gone = whole as u128 * (passed_ms % half_life_ms) as u128 / half_life_ms as u128 / 2;
    whole - gone as u64
}

/// A moment: milliseconds since 1970-01-01T00:00:00Z. Always an argument in pure code.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize, Deserialize)]
#[cbor(transparent)]
#[serde(transparent)]
pub struct UnixMs(#[n(0)] pub u64);

impl UnixMs {
    pub const fn plus_ms(self, ms: u64) -> UnixMs {
        UnixMs(self.0.saturating_add(ms))
    }
    /// Milliseconds from `earlier` to `self`; zero if the clock ran backwards.
    pub const fn since(self, earlier: UnixMs) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
    pub const fn from_secs(secs: u64) -> UnixMs {
        UnixMs(secs.saturating_mul(1_000))
    }
    /// Whole seconds, rounded down: the unit of Nostr and BOLT 11.
    pub const fn as_secs(self) -> u64 {
        self.0 / 1_000
    }
}
