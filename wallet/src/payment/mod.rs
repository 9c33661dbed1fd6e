//! The life of one outbound payment, from the journal's "I will pay" to its one end.
//!
//! Money is lost by paying twice. The machine here decides when the same BOLT 11 may be sent (again) and when a payment
//! may be called failed; [`Slices`] adds that a slice never has two payments. It asks the world by [`Action`]s and is
//! told by [`Input`]s; it never calls a wallet itself.
//!
//! # States
//!
//! | phase | entered when | awaits | a crash here means |
//! |---|---|---|---|
//! | `Attempted` | the attempt is in the journal | `pay` to return | it may be out: recovered as `Unknown` |
//! | `InFlight` | `pay` returned `Ok`, or the wallet has a pending row | the outcome's event; looks it up every [`LOOK_EVERY_MS`] | recovered as `Unknown` |
//! | `Unknown` | recovered without an outcome, or `pay` broke midway | a row in the wallet, else a usable channel, with nothing out, to send the *same* BOLT 11 over | the same |
//! | `Settled` | a preimage that hashes to the payment hash | nothing, ever | settled |
//! | `Failed` | the wallet says so, the first `pay` was refused, or it is proved never sent | nothing; the slice may be paid by another invoice | failed |
//!
//! # Why "not found" is not "not sent"
//!
//! The embedded wallet writes its payment row after it has handed over the HTLC, so after a crash a payment may be out
//! and have no row, or have a row and never have left. Therefore: an outcome in the journal wins; else the wallet's row;
//! else the same BOLT 11 is sent again, once a channel is usable and nothing has been out, nor an event waited to be read,
//! for [`STILL_MS`]. (Its payment id is its hash, so a payment that is out would answer `Ok`; but if the first sending
//! ended in the meantime, its failure would be taken for the second's, which is out.) A refusal of such a second sending proves nothing, because the wallet looks
//! for a route before it looks for a duplicate. A payment without outcome ends as [`FailureReason::NeverSent`] only when
//! all of this held for [`QUIET_MS`]: its invoice has expired (the payee would refuse it now), a channel is usable (so
//! everything held back has been sent or dropped), and no outbound HTLC is on any channel.
//!
//! A preimage beats everything, at any time and from anyone (the payee made it): if it comes after a failure, the
//! payment is settled after all, and the caller is told by a second [`Outcome`]. This happens: when a channel is
//! force-closed with an amount below the dust limit (354 sat) in flight, that amount is left to the miners, the payer's
//! wallet calls the payment failed, and the payee's may list it as received. So before a slice that failed is paid by
//! another invoice, ask the payee whether it has credited it.

mod slices;

pub use slices::{Slices, StartError};

use crate::{
    invoice::CheckedInvoice,
    port::{FailureReason, PayError, PaymentState},
};
use satgrid_types::{Msat, PaymentHash, Preimage, UnixMs};
use sha2::{Digest as _, Sha256};
use std::collections::VecDeque;
use thiserror::Error;

/// While a payment is in flight its row is read this often, in case its event was lost.
pub const LOOK_EVERY_MS: u64 = 5_000;
/// While a payment's fate is unknown the wallet is asked this often.
pub const RESOLVE_EVERY_MS: u64 = 1_000;
/// How long nothing may have been out before the same invoice is sent again: an HTLC's end takes a moment to become an
/// event.
pub const STILL_MS: u64 = 1_000;
/// How long the proof that nothing is out has to hold.
pub const QUIET_MS: u64 = 30_000;
const _: () = assert!(RESOLVE_EVERY_MS < LOOK_EVERY_MS && LOOK_EVERY_MS < QUIET_MS);

/// What the journal holds of a payment before it is attempted: enough to send exactly the same again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Intent {
    pub hash: PaymentHash,
    pub bolt11: String,
    pub amount: Msat,
    pub max_fee: Msat,
    pub expires_at: UnixMs,
}

impl Intent {
    pub fn new(invoice: &CheckedInvoice, max_fee: Msat) -> Intent {
        Intent {
            hash: invoice.payment_hash(),
            bolt11: invoice.bolt11().to_owned(),
            amount: invoice.amount(),
            max_fee,
            expires_at: invoice.expires_at(),
        }
    }
}

/// See the module's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Attempted,
    InFlight,
    Unknown,
    Settled { preimage: Preimage, fee: Msat },
    Failed { reason: FailureReason },
}

impl Phase {
    pub const fn is_over(&self) -> bool {
        match self {
            Phase::Attempted | Phase::InFlight | Phase::Unknown => false,
            Phase::Settled { .. } | Phase::Failed { .. } => true,
        }
    }
}

/// The end of a payment. Append it to the journal before the wallet's event is acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Settled { preimage: Preimage, fee: Msat },
    Failed { reason: FailureReason },
}

/// What the machine asks of the world.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Call `pay`, then report `Accepted` or `Refused`.
    Pay { bolt11: String, max_fee: Msat },
    /// Call `lookup`, then report `Looked`.
    Look { hash: PaymentHash },
    /// Read balance and channels, then report `Observed`.
    Observe,
}

/// What the world tells the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// `pay` returned `Ok`.
    Accepted,
    /// `pay` returned an error.
    Refused(PayError),
    /// The wallet's event.
    Settled {
        preimage: Preimage,
        fee: Msat,
    },
    /// The wallet's event.
    Failed {
        reason: FailureReason,
    },
    Looked(PaymentState),
    /// `usable`: a channel that could carry the payment is ready and its peer connected. `outbound_in_flight`: as in
    /// [`crate::Balance`], which counts an event that waits to be read.
    Observed {
        usable: bool,
        outbound_in_flight: bool,
    },
}

/// An input that cannot be true.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum InputError {
    #[error("a preimage was reported for {hash} that does not hash to it")]
    WrongPreimage { hash: PaymentHash },
    #[error("no payment with hash {hash} was started here")]
    UnknownHash { hash: PaymentHash },
}

/// One outbound payment.
#[derive(Debug, Clone)]
pub struct Payment {
    intent: Intent,
    phase: Phase,
    actions: VecDeque<Action>,
    wake_at: Option<UnixMs>,
    /// A `pay` was called whose answer has not come.
    paying: bool,
    /// No row was found since the phase became `Unknown`.
    no_row: bool,
    /// Since when a channel is usable and nothing is out.
    still_since: Option<UnixMs>,
    /// Since when that holds and the invoice has expired.
    quiet_since: Option<UnixMs>,
    /// Some `pay` before the current one may have sent it.
    may_be_out: bool,
}

impl Payment {
    /// A new payment. Call it after the intent is in the journal: the first action is to pay.
    pub fn start(now: UnixMs, intent: Intent) -> Payment {
        let mut payment = Payment::with(intent, Phase::Attempted);
        payment.pay(now);
        payment
    }

    /// A payment whose attempt the journal holds, after a restart, with its outcome if the journal has that too.
    pub fn recover(now: UnixMs, intent: Intent, outcome: Option<Outcome>) -> Payment {
        let mut payment = Payment::with(intent, Phase::Unknown);
        payment.may_be_out = true;
        match outcome {
            Some(Outcome::Settled { preimage, fee }) => payment.phase = Phase::Settled { preimage, fee },
            Some(Outcome::Failed { reason }) => payment.phase = Phase::Failed { reason },
            None => payment.ask(now),
        }
        payment
    }

    fn with(intent: Intent, phase: Phase) -> Payment {
        Payment {
            intent,
            phase,
            actions: VecDeque::new(),
            wake_at: None,
            paying: false,
            no_row: false,
            still_since: None,
            quiet_since: None,
            may_be_out: false,
        }
    }

    pub fn intent(&self) -> &Intent {
        &self.intent
    }
    pub fn phase(&self) -> &Phase {
        &self.phase
    }

    /// Takes in what happened. `Some` is news for the journal: the payment's end.
    pub fn handle(&mut self, now: UnixMs, input: Input) -> Result<Option<Outcome>, InputError> {
        match input {
            Input::Settled { preimage, fee } => return self.settle(preimage, fee),
            Input::Failed { reason } => return Ok(self.fail(reason)),
            Input::Accepted => self.accepted(now),
            Input::Refused(error) => return Ok(self.refused(now, &error)),
            Input::Looked(PaymentState::Settled { preimage, fee, .. }) => return self.settle(preimage, fee),
            Input::Looked(PaymentState::Failed { reason }) => return Ok(self.looked_failed(reason)),
            Input::Looked(PaymentState::InFlight) => {
                if self.phase == Phase::Unknown {
                    self.enter_flight(now);
                }
            }
            Input::Looked(PaymentState::Unknown) => self.no_row = true,
            Input::Observed { usable, outbound_in_flight } => {
                return Ok(self.observed(now, usable, outbound_in_flight));
            }
        }
        Ok(None)
    }

    /// Call it when [`Payment::poll_timeout`] has passed.
    pub fn handle_timeout(&mut self, now: UnixMs) {
        if self.wake_at.is_none_or(|at| now < at) {
            return;
        }
        self.ask(now);
    }

    /// The clock was set. What was reckoned by it begins anew: a step ahead is no quiet time, and after a step back the next
    /// look would be as far away.
    pub fn clock_moved(&mut self, now: UnixMs) {
        (self.still_since, self.quiet_since) = (None, None);
        self.wake_at = self.wake_at.map(|_| now);
    }

    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }
    pub fn poll_timeout(&self) -> Option<UnixMs> {
        self.wake_at
    }

    /// Tries a failed payment's own invoice again; the wallet vouched for the failure, so nothing is out.
    fn restart(&mut self, now: UnixMs) {
        self.phase = Phase::Attempted;
        self.may_be_out = false;
        self.quiet_since = None;
        self.no_row = false;
        self.pay(now);
    }

    fn pay(&mut self, now: UnixMs) {
        self.paying = true;
        self.still_since = None;
        self.actions.push_back(Action::Pay { bolt11: self.intent.bolt11.clone(), max_fee: self.intent.max_fee });
        self.wake_at = Some(now.plus_ms(LOOK_EVERY_MS));
    }

    /// Asks the wallet for what this phase lacks.
    fn ask(&mut self, now: UnixMs) {
        let every = match self.phase {
            Phase::Settled { .. } | Phase::Failed { .. } => {
                self.wake_at = None;
                return;
            }
            Phase::Attempted | Phase::InFlight => LOOK_EVERY_MS,
            Phase::Unknown => RESOLVE_EVERY_MS,
        };
        self.actions.push_back(Action::Look { hash: self.intent.hash });
        if self.phase == Phase::Unknown || now >= self.intent.expires_at {
            self.actions.push_back(Action::Observe);
        }
        self.wake_at = Some(now.plus_ms(every));
    }

    fn enter_flight(&mut self, now: UnixMs) {
        self.phase = Phase::InFlight;
        self.may_be_out = true;
        self.wake_at = Some(now.plus_ms(LOOK_EVERY_MS));
    }

    fn accepted(&mut self, now: UnixMs) {
        self.paying = false;
        if !self.phase.is_over() {
            self.enter_flight(now);
        }
    }

    fn refused(&mut self, now: UnixMs, error: &PayError) -> Option<Outcome> {
        self.paying = false;
        if self.phase.is_over() {
            return None;
        }
        if error.sent_nothing() && !self.may_be_out {
            return self.fail(refusal(error));
        }
        self.may_be_out = true;
        self.phase = Phase::Unknown;
        self.wake_at = Some(now.plus_ms(RESOLVE_EVERY_MS));
        None
    }

    /// A failed row ends a payment only where it can be no other sending's: while `pay` is being called it belongs to the
    /// attempt before, and where an earlier sending may be out it may tell of a later one that was refused (the wallet
    /// writes a row for that too). The failure's own event, shown until it is acknowledged, or the quiet time ends those.
    fn looked_failed(&mut self, reason: FailureReason) -> Option<Outcome> {
        if self.paying {
            return None;
        }
        if self.may_be_out && self.phase == Phase::Unknown {
            self.no_row = true;
            return None;
        }
        self.fail(reason)
    }

    fn observed(&mut self, now: UnixMs, usable: bool, outbound_in_flight: bool) -> Option<Outcome> {
        if self.phase.is_over() {
            return None;
        }
        if !usable || outbound_in_flight {
            (self.still_since, self.quiet_since) = (None, None);
            return None;
        }
        let still_since = *self.still_since.get_or_insert(now);
        if now >= self.intent.expires_at {
            let since = *self.quiet_since.get_or_insert(now);
            return (now.since(since) >= QUIET_MS).then(|| self.fail(FailureReason::NeverSent)).flatten();
        }
        if self.phase == Phase::Unknown && self.no_row && !self.paying && now.since(still_since) >= STILL_MS {
            self.pay(now);
        }
        None
    }

    fn settle(&mut self, preimage: Preimage, fee: Msat) -> Result<Option<Outcome>, InputError> {
        if <[u8; 32]>::from(Sha256::digest(preimage.0)) != self.intent.hash.0 {
            return Err(InputError::WrongPreimage { hash: self.intent.hash });
        }
        if let Phase::Settled { .. } = self.phase {
            return Ok(None);
        }
        self.end(Phase::Settled { preimage, fee });
        Ok(Some(Outcome::Settled { preimage, fee }))
    }

    fn fail(&mut self, reason: FailureReason) -> Option<Outcome> {
        if self.phase.is_over() {
            return None;
        }
        self.end(Phase::Failed { reason });
        Some(Outcome::Failed { reason })
    }

    fn end(&mut self, phase: Phase) {
        self.phase = phase;
        self.actions.clear();
        self.wake_at = None;
        self.quiet_since = None;
    }
}

/// A refusal that sent nothing, as a reason.
fn refusal(error: &PayError) -> FailureReason {
    match error {
        PayError::NoRoute { .. } => FailureReason::NoRoute,
        PayError::Expired => FailureReason::Expired,
        PayError::Stopped | PayError::BadInvoice { .. } | PayError::Uncertain { .. } => FailureReason::Other,
    }
}

#[cfg(test)]
mod tests;
