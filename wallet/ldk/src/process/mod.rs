//! The wallet in a process of its own, so that nothing but a power cut or somebody's aim can kill it.
//!
//! ldk-node 0.7.1 that is killed in mid-payment may force-close its channels at the next start (`docs/adr/0012` has the
//! trials). Engines, the HTTP edge and the roles therefore live in one process, the Lightning node in another, and
//! the two speak over a socket pair:
//!
//! | who dies | what the other does |
//! |---|---|
//! | the node (crash, `kill -9`, out of memory) | the wallet sees the socket end, stops its Lightning node cleanly, and ends; a node started meanwhile waits for it, by the lock of the store |
//! | the wallet | every call answers that it is gone; the node stops with an error, and its supervisor starts both again |
//! | a terminal's Ctrl-C, or a supervisor's SIGTERM to all | the wallet ignores it: it ends when the node has said so |
//!
//! [`worker_main`] is the wallet's side; [`WalletProcess`] is the node's, a [`satgrid_wallet::Embedded`] like the node in
//! this process ([`crate::LdkWallet`]). Both pass the same tests.

mod remote;
mod wire;
mod worker;

pub use remote::{Program, WalletProcess};
pub use worker::worker_main;
