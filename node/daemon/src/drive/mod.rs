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
pub(crate) mod trunks;
pub(crate) mod upstream;
pub(crate) mod wallet;

use rand::RngCore;
use satgrid_types::UnixMs;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The wall clock: the one place where this process reads it for its machines.
pub(crate) fn now() -> UnixMs {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    UnixMs(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
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
