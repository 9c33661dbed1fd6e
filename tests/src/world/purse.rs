//! Wallets: payments by the shipped machine over the fake network, events handed to the roles one at a time.

use super::{Purse, Who, World};
use satgrid_node::{consumer::ConsumerEvent, provider::ProviderEvent};
use satgrid_types::{Msat, PaymentHash};
use satgrid_wallet::{
    invoice,
    payment::{Action, Input, Intent, Outcome},
    port::WalletEvent,
};

impl World {
    fn purse(&mut self, who: Who) -> &mut Purse {
        match who {
            Who::Provider(p) => &mut self.providers[p].purse,
            Who::Consumer(c) => &mut self.consumers[c].purse,
        }
    }

    /// Starts a payment, or takes one up again after a restart.
    pub(super) fn pay(&mut self, who: Who, hash: PaymentHash, bolt11: String, max_fee: Msat, again: bool) {
        let now = self.now;
        let Ok(facts) = invoice::read(&bolt11) else {
            return self.report(who, hash, Outcome::Failed { reason: satgrid_wallet::port::FailureReason::Other });
        };
        let amount = facts.amount.unwrap_or_default();
        self.say(|| format!("{who:?} {} {amount} ({hash})", if again { "resolves" } else { "pays" }));
        let intent = Intent { hash, bolt11, amount, max_fee, expires_at: facts.expires_at };
        let purse = self.purse(who);
        if again {
            purse.payments.recover(now, hash, intent, None);
        } else if let Err(error) = purse.payments.start(now, hash, intent) {
            panic!("{who:?} asked for a payment that may not start: {error}");
        }
    }

    /// Gives the wallet what the payment machine wants done, and the role what happened. True if anything was done.
    pub(super) fn pump_purse(&mut self, who: Who) -> bool {
        let up = match who {
            Who::Provider(p) => self.providers[p].role.is_some(),
            Who::Consumer(c) => self.consumers[c].role.is_some(),
        };
        if !up {
            return false;
        }
        let mut busy = false;
        while let Some((hash, action)) = self.purse(who).payments.poll_action() {
            busy = true;
            let now = self.now;
            let lightning = self.purse(who).lightning;
            let input = match action {
                Action::Pay { bolt11, max_fee } => match self.net.pay(now, lightning, &bolt11, max_fee) {
                    Ok(()) => Input::Accepted,
                    Err(error) => Input::Refused(error),
                },
                Action::Look { hash } => Input::Looked(self.net.lookup(lightning, hash).unwrap()),
                Action::Observe => {
                    let usable = self.net.channels(lightning).unwrap().iter().any(|c| c.usable);
                    let outbound_in_flight = self.net.balance(lightning).unwrap().outbound_in_flight;
                    Input::Observed { usable, outbound_in_flight }
                }
            };
            self.say(|| format!("{who:?} wallet on {hash}: {input:?}"));
            self.payment_input(who, hash, input);
        }
        let lightning = self.purse(who).lightning;
        if self.purse(who).outstanding.is_none()
            && let Some(event) = self.net.poll_event(lightning).cloned()
        {
            busy = true;
            self.wallet_event(who, event);
        }
        busy
    }

    fn wallet_event(&mut self, who: Who, event: WalletEvent) {
        let lightning = self.purse(who).lightning;
        let input = match event {
            WalletEvent::PaymentReceived { hash, amount } => {
                self.purse(who).outstanding = Some(hash);
                self.say(|| format!("{who:?} received {amount} ({hash})"));
                return match who {
                    Who::Provider(p) => {
                        let epoch = self.providers[p].epoch;
                        self.tell_provider(p, epoch, ProviderEvent::PaymentReceived { hash, amount });
                    }
                    Who::Consumer(c) => {
                        let epoch = self.consumers[c].epoch;
                        self.tell_consumer(c, epoch, ConsumerEvent::PaymentReceived { hash, amount });
                    }
                };
            }
            WalletEvent::PaymentSettled { hash, preimage, fee } => Some((hash, Input::Settled { preimage, fee })),
            WalletEvent::PaymentFailed { hash, reason } => Some((hash, Input::Failed { reason })),
            _ => None,
        };
        let news = input.is_some_and(|(hash, input)| {
            self.purse(who).outstanding = Some(hash);
            self.payment_input(who, hash, input)
        });
        if !news {
            self.purse(who).outstanding = None;
            self.net.event_handled(lightning).unwrap();
        }
    }

    fn payment_input(&mut self, who: Who, hash: PaymentHash, input: Input) -> bool {
        let now = self.now;
        match self.purse(who).payments.handle(now, hash, input) {
            Ok(Some((_, outcome))) => {
                self.report(who, hash, outcome);
                true
            }
            Ok(None) | Err(_) => false,
        }
    }

    fn report(&mut self, who: Who, hash: PaymentHash, outcome: Outcome) {
        self.say(|| {
            format!(
                "{who:?} payment {hash}: {}",
                if matches!(outcome, Outcome::Settled { .. }) { "settled" } else { "failed" }
            )
        });
        match who {
            Who::Provider(p) => {
                let epoch = self.providers[p].epoch;
                let amount = self.providers[p].purse.refunds.get(&hash).copied().unwrap_or_default();
                let event = match outcome {
                    Outcome::Settled { preimage, fee } => {
                        ProviderEvent::RefundSettled { hash, amount, preimage: Some(preimage), fee }
                    }
                    Outcome::Failed { reason } => ProviderEvent::RefundFailed { hash, reason: reason.to_string() },
                };
                self.tell_provider(p, epoch, event);
            }
            Who::Consumer(c) => {
                let epoch = self.consumers[c].epoch;
                let event = match outcome {
                    Outcome::Settled { preimage, fee } => ConsumerEvent::PaymentSettled { hash, preimage, fee },
                    Outcome::Failed { reason } => ConsumerEvent::PaymentFailed { hash, reason: reason.to_string() },
                };
                self.tell_consumer(c, epoch, event);
                self.tell_payable(c);
            }
        }
    }

    pub(super) fn tell_payable(&mut self, c: usize) {
        let payable = self.net.balance(self.consumers[c].purse.lightning).map(|b| b.payable).unwrap_or_default();
        let epoch = self.consumers[c].epoch;
        self.tell_consumer(c, epoch, ConsumerEvent::Payable(payable));
        let channels = self.net.channels(self.consumers[c].purse.lightning).unwrap_or_default();
        let peers = channels.iter().filter(|c| c.usable).map(|c| c.counterparty).collect();
        self.tell_consumer(c, epoch, ConsumerEvent::DirectPeers(peers));
    }

    /// The role has booked the event: the wallet may forget it.
    pub(super) fn wallet_handled(&mut self, who: Who, hash: PaymentHash) {
        if self.purse(who).outstanding == Some(hash) {
            let lightning = self.purse(who).lightning;
            self.purse(who).outstanding = None;
            self.net.event_handled(lightning).unwrap();
        }
    }
}
