//! Lightning as satgrid needs it: what an invoice must say, how a payment lives and dies, and the [`Lightning`] port
//! that any wallet stands behind.
//!
//! This room is pure: no clock, socket, file or random source is named here; time, entropy and limits are arguments.
//! It never decides *whether* to pay (that is the node's business) and never holds the books (the ledger's); it
//! decides only whether a payment that was started may be started again, which is where money is lost.
//!
//! - [`port`]: the trait, its records and its errors;
//! - [`embedded`]: what only a node of our own can do, and what it lacks before work starts;
//! - [`invoice`]: reading a BOLT 11 invoice against what was agreed;
//! - [`payment`]: the life cycle of one payment, and never two payments for one slice;
//! - [`keys`]: every key of a node from one BIP-39 phrase;
//! - [`message`]: signatures by a Lightning node key over a text, as other Lightning implementations make them;
//! - [`reopen`]: opening a force-closed channel again without a person;
//! - [`sweep`]: what goes to where the owner keeps money, and when;
//! - [`sealed`]: the seed under a passphrase, as an age file;
//! - [`restore`]: lost channels coming back, and the guard against old copies of them;
//! - `fake` (feature): wallets that fail by script, for the simulator;
//! - `conformance` (feature): the suite that the fake and every adapter pass.
#![cfg_attr(test, allow(clippy::unwrap_used))]
#![forbid(unsafe_code)]
#![warn(clippy::float_arithmetic, clippy::cast_possible_truncation)]

#[cfg(feature = "conformance")]
pub mod conformance;
pub mod embedded;
#[cfg(feature = "fake")]
pub mod fake;
pub mod invoice;
pub mod keys;
pub mod message;
mod network;
pub mod payment;
pub mod port;
pub mod reopen;
pub mod restore;
pub mod sealed;
pub mod sweep;

pub use embedded::Embedded;
pub use network::{Network, UnknownNetwork};
pub use port::{
    Balance, Channel, ChannelError, ChannelId, Direction, FailureReason, Invoice, InvoiceError, InvoiceRequest,
    Lightning, OpenChannel, PayError, PaymentRecord, PaymentState, WalletError, WalletEvent,
};
