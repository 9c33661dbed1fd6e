//! A whole market on one machine, for the demo and for tests: a Bitcoin regtest chain and a Nostr relay.
//!
//! - [`chain`]: blocks, coins and the rules by which a transaction is accepted. Scripts are judged by Bitcoin
//!   Core's own consensus library; blocks carry real (regtest) proof of work.
//! - [`server`]: that chain over HTTP, with an Esplora face and a face of bitcoind's JSON-RPC on one port, which is
//!   what Lightning nodes and wallets ask for. Mining is the RPC call `generatetoaddress`.
//! - `electrum`: the same chain in Electrum's protocol, on a port of its own.
//! - [`relay`]: a real Nostr relay.
//! - [`ports`]: where the nodes of such a market listen.
//!
//! What this room never does: listen beyond loopback, touch any network but regtest, keep anything on disk, or
//! reorganise its chain. Nothing here is part of a node that serves strangers.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod chain;
mod consensus;
mod electrum;
mod esplora;
mod mempool;
pub mod ports;
pub mod relay;
mod rpc;
pub mod server;
#[cfg(test)]
mod tests;

pub use chain::{Chain, Shared, shared};
pub use consensus::RefusedTx;
pub use electrum::{ElectrumServer, serve_electrum};
pub use relay::{RelayError, RelayServer, run_relay};
pub use server::{ChainServer, run_chain, serve};
