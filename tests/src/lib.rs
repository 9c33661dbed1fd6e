//! Worlds for tests: the two roles as they ship, with a toy engine, a fake Lightning network and a journal in memory, in
//! virtual time. Nothing here is linked into what is shipped.
//!
//! | module | for |
//! |---|---|
//! | [`world`] | any number of providers and consumers, links with latency, crashes, cheats; every step is held against bounds |
//! | [`ports`] | ports for markets of real processes |
//! | [`sim`] | a whole market under seeded faults, and what must be true once it is quiet |
// Test support: what does not hold here is a failed test.
#![allow(clippy::unwrap_used, clippy::wildcard_enum_match_arm)]
#![forbid(unsafe_code)]

/// The demo's own: where markets of tests listen.
#[path = "../../node/devnet/src/ports.rs"]
pub mod ports;
pub mod sim;
pub mod world;
