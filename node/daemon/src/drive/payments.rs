//! Outbound payments: one machine of `wallet::payment` per payment hash, driven against the wallet.

use super::{now, until};
use satgrid_types::{Msat, PaymentHash, Preimage, UnixMs};
use satgrid_wallet::{
    FailureReason, Lightning, invoice,
    payment::{Action, Input, Intent, Outcome, Payment},
};
use std::{collections::BTreeMap, sync::Arc};
use tokio::sync::mpsc;

/// Whose payment it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owner {
    Slice,
    Refund,
}

/// What the driver is told.
#[derive(Debug)]
pub(crate) enum Command {
    /// Pay, or where `recover` is set, find out what became of an earlier attempt without paying twice.
    Pay {
        owner: Owner,
        hash: PaymentHash,
        bolt11: String,
        amount: Msat,
        max_fee: Msat,
        recover: bool,
    },
    /// The wallet's own events.
    Settled {
        hash: PaymentHash,
        preimage: Preimage,
        fee: Msat,
    },
    Failed {
        hash: PaymentHash,
        reason: FailureReason,
    },
    /// The journal has the outcome.
    Booked {
        hash: PaymentHash,
    },
    /// What a call to the wallet answered.
    Answer {
        hash: PaymentHash,
        input: Input,
    },
}

/// How a payment ended.
#[derive(Debug, Clone)]
pub(crate) struct Ended {
    pub owner: Owner,
    pub hash: PaymentHash,
    pub amount: Msat,
    pub outcome: Outcome,
}

struct Payments {
    wallet: Arc<dyn Lightning>,
    commands: mpsc::UnboundedSender<Command>,
    ended: mpsc::UnboundedSender<Ended>,
    /// Told of events about payments that are none of ours: there is nothing to book.
    handled: mpsc::UnboundedSender<PaymentHash>,
    open: BTreeMap<PaymentHash, (Owner, Payment)>,
}

/// Starts the driver; outcomes go to `ended`.
pub(crate) fn start(
    wallet: Arc<dyn Lightning>,
    ended: mpsc::UnboundedSender<Ended>,
    handled: mpsc::UnboundedSender<PaymentHash>,
) -> mpsc::UnboundedSender<Command> {
    let (commands, inbox) = mpsc::unbounded_channel();
    let payments = Payments { wallet, commands: commands.clone(), ended, handled, open: BTreeMap::new() };
    tokio::spawn(payments.run(inbox));
    commands
}

impl Payments {
    async fn run(mut self, mut inbox: mpsc::UnboundedReceiver<Command>) {
        loop {
            let wake = self.open.values().filter_map(|(_, p)| p.poll_timeout()).min();
            tokio::select! {
                command = inbox.recv() => match command {
                    Some(command) => self.command(now(), command),
                    None => return,
                },
                () = tokio::time::sleep(until(wake)) => {
                    let now = now();
                    self.open.values_mut().for_each(|(_, payment)| payment.handle_timeout(now));
                }
            }
            self.act();
        }
    }

    fn command(&mut self, now: UnixMs, command: Command) {
        match command {
            Command::Pay { owner, hash, bolt11, amount, max_fee, recover } => {
                let expires_at = invoice::read(&bolt11).map_or(now, |facts| facts.expires_at);
                let intent = Intent { hash, bolt11, amount, max_fee, expires_at };
                let payment = if recover { Payment::recover(now, intent, None) } else { Payment::start(now, intent) };
                self.open.entry(hash).or_insert((owner, payment));
            }
            Command::Settled { hash, preimage, fee } => self.input(now, hash, Input::Settled { preimage, fee }),
            Command::Failed { hash, reason } => self.input(now, hash, Input::Failed { reason }),
            Command::Answer { hash, input } => self.input(now, hash, input),
            Command::Booked { hash } => {
                if self.open.get(&hash).is_some_and(|(_, p)| p.phase().is_over()) {
                    self.open.remove(&hash);
                }
            }
        }
    }

    fn input(&mut self, now: UnixMs, hash: PaymentHash, input: Input) {
        let Some((owner, payment)) = self.open.get_mut(&hash) else {
            let _ = self.handled.send(hash);
            return;
        };
        match payment.handle(now, input) {
            Ok(Some(outcome)) => {
                let amount = payment.intent().amount;
                let _ = self.ended.send(Ended { owner: *owner, hash, amount, outcome });
            }
            Ok(None) => {}
            Err(error) => tracing::error!(%error, "the wallet reported something that cannot be"),
        }
    }

    /// Starts the calls that the machines ask for; their answers come back as commands.
    fn act(&mut self) {
        for (hash, (_, payment)) in &mut self.open {
            while let Some(action) = payment.poll_action() {
                let (wallet, commands, hash) = (self.wallet.clone(), self.commands.clone(), *hash);
                tokio::spawn(async move {
                    let input = match action {
                        Action::Pay { bolt11, max_fee } => match wallet.pay(&bolt11, max_fee).await {
                            Ok(()) => Some(Input::Accepted),
                            Err(error) => Some(Input::Refused(error)),
                        },
                        Action::Look { hash } => wallet.lookup(hash).await.ok().map(Input::Looked),
                        Action::Observe => observe(wallet.as_ref()).await,
                    };
                    if let Some(input) = input {
                        let _ = commands.send(Command::Answer { hash, input });
                    }
                });
            }
        }
    }
}

async fn observe(wallet: &dyn Lightning) -> Option<Input> {
    let usable = wallet.channels().await.ok()?.iter().any(|channel| channel.usable);
    let outbound_in_flight = wallet.balance().await.ok()?.outbound_in_flight;
    Some(Input::Observed { usable, outbound_in_flight })
}
