//! What two nodes say to each other, and what follows from it for both.
//!
//! * [`frame`]: the messages of a session, one canonical encoding each, with a limit on everything;
//! * [`hop`]: hidden rows between the nodes of a ring, and the tickets that allow them;
//! * [`refusal`]: a worker's signed word that rows came to nothing, and whom a lead holds it against;
//! * [`experts`]: expert rows between a lead and a worker that holds experts, on the same kind of stream;
//! * [`session`]: the state of one session as a fold over its journal entries, the same on both sides;
//! * [`metering`]: how far work may run ahead of acknowledgements and of money;
//! * [`slices`]: when the next instalment is due and how large it is; [`pace`]: what that is reckoned from;
//! * [`exposure`]: the most that either side can lose at this moment;
//! * [`check`]: what a consumer verifies in a quote, an invoice, an acknowledgement and a receipt before it signs or pays.
//!
//! Pure: no clock, socket, file or random source. Normative text: docs/protocol.md and docs/money.md.
#![cfg_attr(test, allow(clippy::unwrap_used))]
#![forbid(unsafe_code)]

pub mod check;
pub mod experts;
pub mod exposure;
pub mod frame;
pub mod hop;
pub mod metering;
pub mod pace;
pub mod refusal;
pub mod session;
pub mod slices;

/// ALPN of the QUIC connection: protocol name and major version.
pub const ALPN: &[u8] = b"satgrid/1";
