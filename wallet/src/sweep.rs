//! Money that the node does not need goes where its owner keeps money: when, how much, and to what kind of place.
//!
//! | source | goes to | what stays |
//! |---|---|---|
//! | what channels can pay | a Lightning address, a BOLT 12 offer | `keep`, the channels' reserves, the route's fee |
//! | coins on chain | an address, the cold account | `keep`, the anchor reserve, the miners' fee |
//!
//! A sweep is due when the source holds more than `above`, and not more often than every `every_ms`. It never closes a
//! channel: coins and channels are two purses, and only their owner moves money between them.

use crate::port::Balance;
use core::{fmt, str::FromStr};
use satgrid_types::{Msat, UnixMs};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Less is not worth a sweep, in sat: a payment of its own or an output that costs more to spend than it holds.
pub const LEAST_SAT: u64 = 1_000;
/// Longest destination, in bytes; an offer is a few hundred.
pub const MAX_DESTINATION_BYTES: usize = 2_048;
const MAX_ADDRESS_LEN: usize = 320;

/// Where swept money goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Destination {
    /// `user@host`: asked for an invoice at each sweep.
    LightningAddress {
        user: String,
        host: String,
    },
    /// A BOLT 12 offer that names no amount, or less than is sent.
    Offer(String),
    OnChain(String),
    /// A fresh address of the cold account.
    Cold,
}

#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum DestinationError {
    #[error("a destination is never that long")]
    Long,
    #[error("{0:?} is no Lightning address: write user@host")]
    LightningAddress(String),
    #[error("{0:?} is no destination: write user@host, a BOLT 12 offer (lno1...), an on-chain address, or `cold`")]
    Unknown(String),
}

impl FromStr for Destination {
    type Err = DestinationError;

    fn from_str(text: &str) -> Result<Destination, DestinationError> {
        let text = text.trim();
        if text.len() > MAX_DESTINATION_BYTES {
            return Err(DestinationError::Long);
        }
        let lower = text.to_ascii_lowercase();
        if lower == "cold" {
            return Ok(Destination::Cold);
        }
        if let Some((user, host)) = lower.strip_prefix("lightning:").unwrap_or(&lower).split_once('@') {
            let name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '+');
            let place = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | ':');
            let sound = !user.is_empty() && user.chars().all(name) && !host.is_empty() && host.chars().all(place);
            if !sound || text.len() > MAX_ADDRESS_LEN {
                return Err(DestinationError::LightningAddress(text.to_owned()));
            }
            return Ok(Destination::LightningAddress { user: user.to_owned(), host: host.to_owned() });
        }
        if lower.starts_with("lno1") {
            return Ok(Destination::Offer(lower));
        }
        let plain = text.strip_prefix("bitcoin:").unwrap_or(text);
        // Whether it is an address of this network the wallet finds out before it sends.
        if plain.len() >= 26 && plain.chars().all(|c| c.is_ascii_alphanumeric()) {
            return Ok(Destination::OnChain(plain.to_owned()));
        }
        Err(DestinationError::Unknown(text.chars().take(80).collect()))
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Destination::LightningAddress { user, host } => write!(f, "{user}@{host}"),
            Destination::Offer(text) | Destination::OnChain(text) => f.write_str(text),
            Destination::Cold => f.write_str("cold"),
        }
    }
}

impl From<Destination> for String {
    fn from(to: Destination) -> String {
        to.to_string()
    }
}

impl TryFrom<String> for Destination {
    type Error = DestinationError;
    fn try_from(text: String) -> Result<Destination, DestinationError> {
        text.parse()
    }
}

impl Destination {
    /// Whether channels pay it; else coins do.
    pub const fn is_lightning(&self) -> bool {
        match self {
            Destination::LightningAddress { .. } | Destination::Offer(_) => true,
            Destination::OnChain(_) | Destination::Cold => false,
        }
    }
}

/// What the owner wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    pub to: Destination,
    /// A sweep is due when the source holds more.
    pub above_sat: u64,
    /// Stays in the source.
    pub keep_sat: u64,
    /// Least time between two sweeps.
    pub every_ms: u64,
    /// What a route may cost, in thousandths.
    pub max_fee_permille: u32,
    /// What miners may get of a sweep that nobody looked at, in thousandths.
    pub max_onchain_fee_permille: u32,
}

/// What would be moved now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sweep {
    pub to: Destination,
    /// What arrives over Lightning; what leaves on chain, the miners' fee still to be taken off it.
    pub amount_sat: u64,
    /// The most that the route may cost on top; on chain, that miners may get of a sweep by schedule.
    pub max_fee: Msat,
    /// Everything that can be spent goes: nothing is left to pay the fee from but the amount.
    pub all: bool,
}

/// Why nothing is moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error, Serialize, Deserialize)]
pub enum Nothing {
    #[error("{holds_sat} sat can be moved, and {above_sat} sat or less stay where they are")]
    Below { holds_sat: u64, above_sat: u64 },
    #[error("{left_sat} sat would be moved beyond the {keep_sat} sat that stay; {LEAST_SAT} sat are the least")]
    TooLittle { left_sat: u64, keep_sat: u64 },
    #[error("a payment is in flight; it is over first")]
    InFlight,
}

/// Why a sweep by schedule waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error(
    "miners would get {fee_sat} sat of {amount_sat} sat now, and at most {max_fee} (wallet.sweep_max_onchain_fee_permille)"
)]
pub struct TooDear {
    pub fee_sat: u64,
    pub amount_sat: u64,
    pub max_fee: Msat,
}

impl Sweep {
    /// Whether miners may get that much of it without anyone having seen the figure.
    pub fn allows_miners(&self, fee_sat: u64) -> Result<(), TooDear> {
        // A fee beyond what there can be is not allowed either.
        if Msat::from_sat(fee_sat).is_some_and(|fee| fee <= self.max_fee) {
            return Ok(());
        }
        Err(TooDear { fee_sat, amount_sat: self.amount_sat, max_fee: self.max_fee })
    }
}

impl Rules {
    /// What can be moved, in sat: what one payment can carry, or the coins above the anchor reserve.
    pub fn holds_sat(&self, balance: &Balance) -> u64 {
        if self.to.is_lightning() { balance.payable.0 / 1_000 } else { balance.onchain_confirmed_sat }
    }

    /// What a sweep would move now, were it asked for.
    pub fn plan(&self, balance: &Balance) -> Result<Sweep, Nothing> {
        let holds_sat = self.holds_sat(balance);
        let free = holds_sat.saturating_sub(self.keep_sat);
        let (amount_sat, max_fee) = if self.to.is_lightning() {
            if balance.outbound_in_flight {
                return Err(Nothing::InFlight);
            }
            // What one payment carries, with room for its fee: a / (1 + p/1000).
            let carried = free.min(balance.largest_payment.0 / 1_000);
            let permille = u64::from(self.max_fee_permille);
            let amount = carried.saturating_mul(1_000) / permille.saturating_add(1_000);
            (amount, Msat(amount.saturating_mul(permille)))
        } else {
            (free, Msat(free.saturating_mul(u64::from(self.max_onchain_fee_permille))))
        };
        if amount_sat < LEAST_SAT {
            return Err(Nothing::TooLittle { left_sat: amount_sat, keep_sat: self.keep_sat });
        }
        let all = !self.to.is_lightning() && self.keep_sat == 0;
        Ok(Sweep { to: self.to.clone(), amount_sat, max_fee, all })
    }

    /// The sweep that is due by threshold and schedule.
    pub fn due(&self, now: UnixMs, last: Option<UnixMs>, balance: &Balance) -> Option<Sweep> {
        let waited = last.is_none_or(|last| now.since(last) >= self.every_ms);
        let above = self.holds_sat(balance) > self.above_sat;
        (waited && above).then(|| self.plan(balance).ok()).flatten()
    }
}

/// A sweep that was made, as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Swept {
    pub at: UnixMs,
    pub to: String,
    pub amount_sat: u64,
    /// The transaction, or the payment's hash or id.
    pub by: String,
    pub label: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(to: &str, above_sat: u64, keep_sat: u64) -> Rules {
        let (to, max_fee_permille, max_onchain_fee_permille) = (to.parse().unwrap(), 10, 50);
        Rules { to, above_sat, keep_sat, every_ms: 1_000, max_fee_permille, max_onchain_fee_permille }
    }
    const ADDRESS: &str = "bcrt1q6rhpng9evdsfnn833a4f4vej0asu6dk5srld6x";

    #[test]
    fn destinations_are_read_and_written() {
        #[track_caller]
        fn check(text: &str, lightning: Option<bool>) {
            let read = text.parse::<Destination>();
            assert_eq!(read.as_ref().ok().map(Destination::is_lightning), lightning, "{text}: {read:?}");
            if let Ok(read) = read {
                assert_eq!(read.to_string().parse::<Destination>().unwrap(), read);
            }
        }
        check("Alice@Example.com", Some(true));
        check("lightning:bob@localhost:80", Some(true));
        check("LNO1PQPS7SJQPGTYZM3QV4UXZMTSD", Some(true));
        check(ADDRESS, Some(false));
        check("bitcoin:1BoatSLRHtKNngkdXEeobR76b53LETtpyT", Some(false));
        check(" cold ", Some(false));
        check("a/../b@example.com", None);
        check("@example.com", None);
        check("lnbc1", None);
        check("", None);
        check(&"x".repeat(3_000), None);
    }

    #[test]
    fn channels_keep_what_is_theirs_and_pay_their_fee() {
        let balance = |payable, largest, in_flight| Balance {
            payable: Msat(payable),
            largest_payment: Msat(largest),
            outbound_in_flight: in_flight,
            onchain_confirmed_sat: 9_000_000,
            ..Balance::default()
        };
        let r = rules("a@b.c", 50_000, 20_000);
        let plan = r.plan(&balance(121_000_000, 121_000_000, false)).unwrap();
        assert_eq!((plan.amount_sat, plan.max_fee, plan.all), (100_000, Msat(1_000_000), false));
        // One payment carries no more than the largest channel lets through.
        assert_eq!(r.plan(&balance(121_000_000, 10_100_000, false)).unwrap().amount_sat, 10_000);
        assert_eq!(r.plan(&balance(121_000_000, 121_000_000, true)), Err(Nothing::InFlight));
        assert!(matches!(r.plan(&balance(20_500_000, 20_500_000, false)), Err(Nothing::TooLittle { .. })));
    }

    #[test]
    fn coins_go_above_the_threshold_and_on_schedule() {
        let balance = |sat| Balance { onchain_confirmed_sat: sat, ..Balance::default() };
        let r = rules(ADDRESS, 50_000, 10_000);
        let due = |last: Option<u64>, sat| r.due(UnixMs(10_000), last.map(UnixMs), &balance(sat)).map(|s| s.amount_sat);
        assert_eq!(due(None, 50_000), None);
        assert_eq!(due(None, 50_001), Some(40_001));
        assert_eq!(due(Some(9_500), 50_001), None);
        assert_eq!(due(Some(9_000), 50_001), Some(40_001));
        assert!(!r.plan(&balance(60_000)).unwrap().all);
        assert!(rules("cold", 0, 0).plan(&balance(60_000)).unwrap().all);
        assert!(matches!(rules("cold", 0, 0).plan(&balance(999)), Err(Nothing::TooLittle { .. })));
    }

    #[test]
    fn miners_get_no_more_than_their_share_of_what_goes() {
        let sweep = |sat| {
            let balance = Balance { onchain_confirmed_sat: sat, ..Balance::default() };
            rules(ADDRESS, 50_000, 20_000).plan(&balance).unwrap()
        };
        // 5% of 40,000 sat.
        assert_eq!(sweep(60_000).allows_miners(2_000), Ok(()));
        let dear = TooDear { fee_sat: 2_001, amount_sat: 40_000, max_fee: Msat(2_000_000) };
        assert_eq!(sweep(60_000).allows_miners(2_001), Err(dear));
        // The same fee is fine once there is more to move.
        assert_eq!(sweep(70_000).allows_miners(2_001), Ok(()));
        assert!(sweep(60_000).allows_miners(u64::MAX).is_err());
    }
}
