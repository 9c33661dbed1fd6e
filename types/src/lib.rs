//! The nouns of satgrid: units, identifiers, usage, quotes, listings and signed statements.
//!
//! Everything here is a plain value. No clock, socket, file or random source is named in this crate; keys are given,
//! times are arguments. Two rules hold for every type that crosses a wire or enters the ledger:
//!
//! * it has exactly one encoding ([`cbor`]), and a reader refuses any other bytes for it;
//! * bytes become a value that inner code accepts only through a check ([`Signed`] to [`Verified`]).
#![cfg_attr(test, allow(clippy::unwrap_used))]
#![forbid(unsafe_code)]

pub mod cbor;
mod ids;
mod listing;
mod quote;
mod ranges;
mod sampling;
mod sign;
mod succession;
mod units;
mod usage;
mod wire;

pub use ids::*;
pub use listing::*;
pub use quote::*;
pub use ranges::*;
pub use sampling::*;
pub use sign::*;
pub use succession::*;
pub use units::*;
pub use usage::*;
pub use wire::*;
