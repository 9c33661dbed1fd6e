//! The drivers: each carries out what a pure machine asks and reports what became of it. None decides about money.
//!
//! | driver | machine or port | the world behind it |
//! |---|---|---|
//! | [`journal`] | `ledger::books`, the journal port | SQLite |
//! | [`provider`], [`consumer`] | the two roles | QUIC links, engines, wallet, journal |
//! | [`desk`], [`ring`], [`hops`], [`inlets`] | work on layers, sold and bought | QUIC hops from node to node |
//! | [`expert_desk`], [`bought`] | work on experts, sold and bought | the same hops |
//! | [`account`] | what both desks keep of a job | |
//! | [`links`] | frames in and out | QUIC streams |
//! | [`payments`], [`wallet`] | `wallet::payment` | the Lightning wallet |
//! | [`sweep`] | `wallet::sweep` | the embedded Lightning node, the cold account |
//! | [`bookkeeper`] | `ledger::own` | the wallet's own list |
//! | [`channels`], [`restore`] | `wallet::reopen`, `wallet::restore` | the embedded Lightning node |
//! | [`market`] | `market::book` | Nostr relays |
//! | [`probes`] | `market::links` | QUIC connections to other sellers of parts |
//! | [`scout`] | `market::layers`, `market::paces` | the market view, the ledger's database |
//! | [`engines`], [`layers`], [`tokenizers`] | the engine's ports | llama.cpp in child processes |
//! | [`upstream`] | the engine's port | a server that runs the model already |
//! | [`experts`], [`trunks`] | the experts' port of a trunk | packs in child processes, and of other nodes |
//! | [`expert_figures`] | `market::estimate`, `market::experts` | what a trunk's steps and workers take; the ledger's database |
//!
//! Every driver is one task with a bounded or naturally bounded inbox; they talk by messages and share no locks but
//! the book's. All end with one shutdown token.

mod account;
pub(crate) mod bookkeeper;
pub(crate) mod bought;
pub(crate) mod channels;
pub(crate) mod checkpoints;
pub(crate) mod consumer;
pub(crate) mod desk;
pub(crate) mod engines;
pub(crate) mod expert_desk;
pub(crate) mod expert_figures;
pub(crate) mod experts;
pub(crate) mod figures;
pub(crate) mod hops;
pub(crate) mod inlets;
pub(crate) mod journal;
pub(crate) mod layers;
pub(crate) mod links;
pub(crate) mod market;
pub(crate) mod metered;
pub(crate) mod payments;
pub(crate) mod probes;
pub(crate) mod provider;
pub(crate) mod restore;
pub(crate) mod ring;
pub(crate) mod rings;
pub(crate) mod scout;
pub(crate) mod space;
pub(crate) mod sweep;
pub(crate) mod tokenizers;
#[cfg(test)]
pub(crate) mod toy;
pub(crate) mod trunks;
pub(crate) mod upstream;
pub(crate) mod wallet;

use rand::RngCore;
use satgrid_types::UnixMs;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The wall clock: the one place where this process reads it for its machines.
pub(crate) fn now() -> UnixMs {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    UnixMs(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// Tells when the wall clock was set, or stood still for us while the machine slept: it then went another way than time did.
pub(crate) struct ClockWatch {
    wall: UnixMs,
    steady: Instant,
}

impl ClockWatch {
    /// More than any machine is held up between two looks at its clocks, and less than anybody is accused over.
    const MOST_APART_MS: u64 = 5_000;

    pub(crate) fn new() -> ClockWatch {
        ClockWatch { wall: now(), steady: Instant::now() }
    }

    /// By how much it was moved since the last look, in milliseconds and either way; none where it was not.
    pub(crate) fn moved(&mut self) -> Option<i64> {
        self.moved_to(now(), Instant::now())
    }

    fn moved_to(&mut self, wall: UnixMs, steady: Instant) -> Option<i64> {
        let passed = u64::try_from(steady.saturating_duration_since(self.steady).as_millis()).unwrap_or(u64::MAX);
        let due = self.wall.plus_ms(passed);
        (self.wall, self.steady) = (wall, steady);
        let apart = i64::try_from(wall.0.abs_diff(due.0)).unwrap_or(i64::MAX);
        (apart.unsigned_abs() > Self::MOST_APART_MS).then_some(if wall > due { apart } else { -apart })
    }
}

/// A seed for a machine's random source.
pub(crate) fn fresh_seed() -> [u8; 32] {
    let mut seed = [0; 32];
    rand::rngs::OsRng.fill_bytes(&mut seed);
    seed
}

/// How long to sleep until `deadline`; an hour where there is none.
pub(crate) fn until(deadline: Option<UnixMs>) -> Duration {
    const LONG_MS: u64 = 3_600_000;
    Duration::from_millis(deadline.map_or(LONG_MS, |at| at.since(now()).max(1)).min(LONG_MS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_set_and_a_machine_that_slept_are_noticed() {
        const DAY_MS: u64 = 86_400_000;
        let (wall, steady) = (UnixMs(1_700_000_000_000), Instant::now());
        let later = |ms| steady + Duration::from_millis(ms);
        let mut clock = ClockWatch { wall, steady };
        assert_eq!(clock.moved_to(wall.plus_ms(60_000), later(60_000)), None, "time passed");
        assert_eq!(clock.moved_to(wall.plus_ms(64_000), later(60_100)), None, "a little");
        assert_eq!(
            clock.moved_to(wall.plus_ms(64_000 + DAY_MS), later(60_100)),
            Some(86_400_000),
            "set ahead, or slept"
        );
        assert_eq!(clock.moved_to(wall.plus_ms(64_100 + DAY_MS), later(60_200)), None, "said once");
        assert_eq!(clock.moved_to(wall.plus_ms(64_100), later(60_200)), Some(-86_400_000), "set back");
    }
}
