//! The two roles as pure state machines: a [`provider::Provider`] sells, a [`consumer::Consumer`] buys.
//!
//! A role is told what happened (`handle(now, event)`), says what it wants done (`poll_action`) and when it wants to be
//! woken (`poll_timeout`). It never waits, never reads a clock, and its randomness comes from the seed it was given: a
//! recorded trace of events replays it exactly. The daemon drives these machines against the world; the simulator drives
//! the same ones against a world that lies, loses and dies.
//!
//! Rule of the house: an entry is durable before the effect that it authorises. A role asks for entries with
//! [`Append`]; what they authorise is held back in a [`gate::Gate`] until the journal has answered with the ticket.
//! A journal that cannot write stops a role before it promises anything more.
#![cfg_attr(test, allow(clippy::unwrap_used))]
#![forbid(unsafe_code)]

pub mod consumer;
pub mod gate;
pub mod provider;
pub mod recover;

use satgrid_ledger::entry::Draft;

/// Names one QUIC connection between a role and its driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinkId(pub u64);

/// Names one request stream of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(pub u64);

/// Names one append; the journal's answer carries it back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// Entries that must become durable, in this order, all or none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Append {
    pub ticket: Ticket,
    pub drafts: Vec<Draft>,
}

/// Why a link is closed, as the peer sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CloseCode {
    /// Nothing more to say.
    Done,
    /// The peer broke the protocol; the reason says which rule.
    Violation,
    /// This node cannot serve now.
    Unavailable,
}

impl CloseCode {
    /// The QUIC application error code.
    pub const fn number(self) -> u32 {
        match self {
            CloseCode::Done => 0,
            CloseCode::Violation => 1,
            CloseCode::Unavailable => 2,
        }
    }
}
