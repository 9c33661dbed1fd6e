//! Nostr Wallet Connect (NIP-47), both ends of it: a wallet that is somebody else's behind the port, and our own wallet
//! for the user's other apps.
//!
//! This room speaks Nostr and nothing else. It decides nothing about slices or books; [`budget`] decides how much an app
//! may spend, and is pure.
//!
//! - [`NwcWallet`]: a [`satgrid_wallet::Lightning`] over a `nostr+walletconnect:` address. What NIP-47 lacks, it lacks: no
//!   coins, no channels, no signature by the Lightning node, and no fee limit that could be given along with a payment
//!   (the connection's own budget bounds it).
//! - [`NwcService`]: answers apps. Each has a key of its own, a budget, and can be revoked.
//!
//! Encryption is NIP-44 where the wallet says that it speaks it, else NIP-04.
#![cfg_attr(test, allow(clippy::unwrap_used))]
#![forbid(unsafe_code)]
#![warn(clippy::float_arithmetic, clippy::cast_possible_truncation)]

mod answer;
pub mod budget;
mod client;
mod connections;
mod link;
mod service;
mod watch;
mod wire;

pub use client::{ConnectError, NwcConfig, NwcWallet};
pub use connections::{Connection, Connections, NewConnection, StoreError};
pub use service::{NwcService, ServiceConfig};
