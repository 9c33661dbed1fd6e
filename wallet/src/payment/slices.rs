//! Payments by what they pay for: never two for one slice.

use super::{Action, Input, InputError, Intent, Outcome, Payment, Phase};
use crate::port::FailureReason;
use satgrid_types::{Msat, PaymentHash, UnixMs};
use std::collections::BTreeMap;
use thiserror::Error;

/// Why a payment for a slice may not start.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum StartError {
    /// Wait for it: another invoice for the same slice could be paid beside it.
    #[error("a payment for this slice has not ended ({hash}, {phase:?})")]
    NotOver { hash: PaymentHash, phase: Phase },
    #[error("this slice is paid ({hash})")]
    Paid { hash: PaymentHash },
    /// A payee that offers one payment hash for two slices wants to be paid once for two.
    #[error("payment hash {hash} was used before")]
    HashReused { hash: PaymentHash },
    /// Its row in the wallet may block it for ever; ask for a new invoice.
    #[error("{hash} was given up as never sent; it is not sent again")]
    GivenUp { hash: PaymentHash },
    #[error("{limit} payments are in flight, which is the limit")]
    TooMany { limit: usize },
}

/// All payments of a role, keyed by slice. `K` is whatever names a slice (a session and a number).
#[derive(Debug, Clone)]
pub struct Slices<K> {
    limit: usize,
    /// Unfinished payments that the limit does not count.
    aside: usize,
    /// The latest payment for each slice.
    current: BTreeMap<K, PaymentHash>,
    payments: BTreeMap<PaymentHash, (K, Payment)>,
}

impl<K: Ord + Clone> Slices<K> {
    /// A channel has about 50 HTLC slots and frees them late: more than this many at once gets payments refused.
    pub const MAX_IN_FLIGHT: usize = 8;

    /// Payments that hang and may stay in flight beside those.
    pub const MAX_ASIDE: usize = 12;

    /// `limit`: payments that may be unfinished at once, at most [`Slices::MAX_IN_FLIGHT`].
    pub fn new(limit: usize) -> Slices<K> {
        let limit = limit.clamp(1, Self::MAX_IN_FLIGHT);
        Slices { limit, aside: 0, current: BTreeMap::new(), payments: BTreeMap::new() }
    }

    /// So many unfinished payments hang and give way to others, at most [`Slices::MAX_ASIDE`]: the limit does not count
    /// them. They stay unfinished, and nothing else is paid for their slices.
    pub fn set_aside(&mut self, hanging: usize) {
        self.aside = hanging.min(Self::MAX_ASIDE);
    }

    /// Whether a payment may start now. Ask before the attempt goes to the journal.
    pub fn may_start(&self, slice: &K, hash: PaymentHash) -> Result<(), StartError> {
        if let Some((current, payment)) = self.current.get(slice).and_then(|h| self.payments.get_key_value(h)) {
            let hash = *current;
            match *payment.1.phase() {
                Phase::Settled { .. } => return Err(StartError::Paid { hash }),
                phase @ (Phase::Attempted | Phase::InFlight | Phase::Unknown) => {
                    return Err(StartError::NotOver { hash, phase });
                }
                Phase::Failed { .. } => {}
            }
        }
        if let Some((owner, payment)) = self.payments.get(&hash) {
            if owner != slice || self.current.get(slice) != Some(&hash) {
                return Err(StartError::HashReused { hash });
            }
            if *payment.phase() == (Phase::Failed { reason: FailureReason::NeverSent }) {
                return Err(StartError::GivenUp { hash });
            }
        }
        if self.unfinished().saturating_sub(self.aside) >= self.limit {
            return Err(StartError::TooMany { limit: self.limit });
        }
        Ok(())
    }

    /// Starts a payment; its attempt is in the journal by now. A failed invoice may be tried again, as itself.
    pub fn start(&mut self, now: UnixMs, slice: K, intent: Intent) -> Result<(), StartError> {
        let hash = intent.hash;
        self.may_start(&slice, hash)?;
        self.current.insert(slice.clone(), hash);
        match self.payments.get_mut(&hash) {
            Some((_, payment)) => payment.restart(now),
            None => {
                self.payments.insert(hash, (slice, Payment::start(now, intent)));
            }
        }
        Ok(())
    }

    /// Puts back what the journal holds, in its order. No limit applies: what may be out is out.
    pub fn recover(&mut self, now: UnixMs, slice: K, intent: Intent, outcome: Option<Outcome>) {
        let hash = intent.hash;
        self.current.insert(slice.clone(), hash);
        self.payments.insert(hash, (slice, Payment::recover(now, intent, outcome)));
    }

    /// Takes in what happened to the payment with this hash. `Some` is its end: news for the journal.
    pub fn handle(&mut self, now: UnixMs, hash: PaymentHash, input: Input) -> Result<Option<(K, Outcome)>, InputError> {
        let (slice, payment) = self.payments.get_mut(&hash).ok_or(InputError::UnknownHash { hash })?;
        Ok(payment.handle(now, input)?.map(|outcome| (slice.clone(), outcome)))
    }

    pub fn handle_timeout(&mut self, now: UnixMs) {
        for (_, payment) in self.payments.values_mut() {
            payment.handle_timeout(now);
        }
    }

    /// The clock was set.
    pub fn clock_moved(&mut self, now: UnixMs) {
        for (_, payment) in self.payments.values_mut() {
            payment.clock_moved(now);
        }
    }

    /// The next thing to do, and for which payment.
    pub fn poll_action(&mut self) -> Option<(PaymentHash, Action)> {
        self.payments.iter_mut().find_map(|(hash, (_, payment))| Some((*hash, payment.poll_action()?)))
    }

    pub fn poll_timeout(&self) -> Option<UnixMs> {
        self.payments.values().filter_map(|(_, payment)| payment.poll_timeout()).min()
    }

    /// The latest payment for a slice.
    pub fn get(&self, slice: &K) -> Option<&Payment> {
        self.current.get(slice).and_then(|hash| self.payments.get(hash)).map(|(_, payment)| payment)
    }

    /// The payment with this hash, and what it pays for.
    pub fn payment(&self, hash: &PaymentHash) -> Option<(&K, &Payment)> {
        self.payments.get(hash).map(|(slice, payment)| (slice, payment))
    }

    /// Payments without an end.
    pub fn unfinished(&self) -> usize {
        self.payments.values().filter(|(_, payment)| !payment.phase().is_over()).count()
    }

    /// The most that may be out: amounts and fee limits of everything unfinished. For "most you can lose".
    pub fn exposure(&self) -> Msat {
        self.payments
            .values()
            .filter(|(_, payment)| !payment.phase().is_over())
            .fold(Msat::ZERO, |sum, (_, p)| sum.saturating_add(p.intent().amount).saturating_add(p.intent().max_fee))
    }

    /// Forgets slices that ended and that the caller will never pay again (a closed session's).
    pub fn retire(&mut self, mut done: impl FnMut(&K) -> bool) {
        self.payments.retain(|_, (slice, payment)| !(payment.phase().is_over() && done(slice)));
        self.current.retain(|_, hash| self.payments.contains_key(hash));
    }
}
