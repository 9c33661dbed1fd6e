//! A network of fake wallets: real invoices, real preimages, exact balances, and faults by script.
//!
//! [`FakeNetwork`] is sans-IO: time is an argument, chance comes from the seed it was made with, and the same calls
//! give the same events. The simulator drives it directly; [`FakeLightning`] puts one of its wallets behind the
//! [`crate::Lightning`] port for code that wants the async trait, moving the network's time by itself.
//!
//! It fakes what satgrid relies on and nothing more: direct channels with a 1 % reserve, no routing, no chain. Where the
//! embedded node has a trap the fake has it too: rows lost in a crash, a route looked for before a duplicate is noticed,
//! channels that close because their owner was killed.
//!
//! The shipped daemon never turns this feature on.

mod channels;
mod network;
mod payments;
mod port;

pub use channels::{OPEN_FEE_SAT, RESERVE_MIN_SAT};
pub use network::{Crash, FakeNetwork};
pub use port::FakeLightning;

use crate::port::FailureReason;
use satgrid_types::Msat;

/// What happens to one payment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It settles after the usual delay.
    None,
    /// It settles, later.
    Delay { ms: u64 },
    /// It fails, and says so.
    Fail(FailureReason),
    /// Its HTLC hangs for this long, then ends.
    Stuck { ms: u64, then_settles: bool },
    /// It settles, and the payer's event never comes: only the row tells. (If a crash took the row, the event comes:
    /// no wallet loses both.)
    LoseEvent,
    /// It settles, and the payer hears of it twice.
    DuplicateEvent,
    /// `pay` breaks after the HTLC was handed over: no row, no answer; it settles all the same.
    Break,
    /// It settles, and routing takes this on top.
    Fee(Msat),
}

impl Fault {
    /// How long the HTLC is out, if the fault says so.
    fn delay_ms(self) -> Option<u64> {
        match self {
            Fault::Delay { ms } | Fault::Stuck { ms, .. } => Some(ms),
            Fault::None | Fault::Fail(_) | Fault::LoseEvent | Fault::DuplicateEvent | Fault::Break | Fault::Fee(_) => {
                None
            }
        }
    }
    /// Why the HTLC comes back, if it does.
    fn failure(self) -> Option<FailureReason> {
        match self {
            Fault::Fail(reason) => Some(reason),
            Fault::Stuck { then_settles: false, .. } => Some(FailureReason::RetriesExhausted),
            Fault::Stuck { then_settles: true, .. }
            | Fault::None
            | Fault::Delay { .. }
            | Fault::LoseEvent
            | Fault::DuplicateEvent
            | Fault::Break
            | Fault::Fee(_) => None,
        }
    }
}

/// How often each fault is drawn when a payer's script is empty, in thousandths.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FaultRates {
    pub fail: u16,
    pub stuck: u16,
    pub lose_event: u16,
    pub duplicate_event: u16,
    pub break_: u16,
    /// Settling takes between these, in milliseconds.
    pub delay_ms: (u64, u64),
    /// A stuck HTLC hangs for at most this long.
    pub max_stuck_ms: u64,
}

impl FaultRates {
    /// Everything settles in 50 to 200 ms, as on a direct channel.
    pub const NONE: FaultRates = FaultRates {
        fail: 0,
        stuck: 0,
        lose_event: 0,
        duplicate_event: 0,
        break_: 0,
        delay_ms: (50, 200),
        max_stuck_ms: 60_000,
    };
    /// A bad day: about one payment in eight has something wrong with it.
    pub const ROUGH: FaultRates = FaultRates {
        fail: 40,
        stuck: 20,
        lose_event: 20,
        duplicate_event: 30,
        break_: 15,
        delay_ms: (50, 3_000),
        max_stuck_ms: 60_000,
    };
}

#[cfg(test)]
mod tests;
