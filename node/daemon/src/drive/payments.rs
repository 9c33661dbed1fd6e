//! Outbound payments: the machine of `wallet::payment` that pays each slice once, driven against the wallet.

use super::{ClockWatch, now, until};
use satgrid_types::{LightningKey, Msat, PaymentHash, Preimage, SessionId, UnixMs};
use satgrid_wallet::{
    Channel, Embedded, FailureReason, Lightning, invoice,
    payment::{Action, Input, InputError, Intent, Outcome, Slices, StartError},
};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};
use tokio::{sync::mpsc, time::Instant};

/// How long a payment waits for the channel with its payee to come back: one that was just restarted is found again and
/// agrees on the channel's state within seconds. Far below an invoice's lifetime.
const USABLE_WITHIN: Duration = Duration::from_secs(15);
const USABLE_POLL: Duration = Duration::from_millis(200);

/// Ended payments that are remembered, so that a slice which is paid stays paid whatever a role asks.
const REMEMBERED: usize = 4_096;

/// Of the payments in flight, those whose payee the other side names: it may let them hang for days, and what this node buys
/// goes on beside them.
const MOST_BACK: usize = Slices::<PaysFor>::MAX_IN_FLIGHT / 2;

/// One of those that has no end after this long gives way to others: it is still resolved by its hash, whenever that is.
const GIVES_WAY: Duration = Duration::from_secs(60);

/// What a payment is for: never two for one of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum PaysFor {
    Slice(SessionId, u32),
    Refund(SessionId),
    /// Back to a client of the front door: the refund's number.
    Door(u64),
}

impl PaysFor {
    /// Money that goes back, to whom its owner names.
    const fn is_back(self) -> bool {
        match self {
            PaysFor::Refund(_) | PaysFor::Door(_) => true,
            PaysFor::Slice(..) => false,
        }
    }
}

/// What the driver is told.
#[derive(Debug)]
pub(crate) enum Command {
    /// Pay, or where `recover` is set, find out what became of an earlier attempt without paying twice.
    Pay {
        pays_for: PaysFor,
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
    pub pays_for: PaysFor,
    pub hash: PaymentHash,
    pub amount: Msat,
    pub outcome: Outcome,
}

struct Payments {
    wallet: Arc<dyn Lightning>,
    /// The same wallet, where it has channels of its own.
    embedded: Option<Arc<dyn Embedded>>,
    commands: mpsc::UnboundedSender<Command>,
    ended: mpsc::UnboundedSender<Ended>,
    /// Told of events about payments that are none of ours, or that the journal has: there is nothing to book.
    handled: mpsc::UnboundedSender<PaymentHash>,
    slices: Slices<PaysFor>,
    /// Waiting for a place: a channel has few slots for payments in flight.
    waiting: VecDeque<(PaysFor, Intent)>,
    /// Of those that have no end yet, what goes back, and since when.
    back: BTreeMap<PaymentHash, Instant>,
    /// Payments whose end the journal has, oldest first.
    booked: VecDeque<(PaymentHash, PaysFor)>,
    booked_hashes: BTreeSet<PaymentHash>,
}

/// Starts the driver; outcomes go to `ended`.
pub(crate) fn start(
    wallet: Arc<dyn Lightning>,
    embedded: Option<Arc<dyn Embedded>>,
    ended: mpsc::UnboundedSender<Ended>,
    handled: mpsc::UnboundedSender<PaymentHash>,
) -> mpsc::UnboundedSender<Command> {
    let (commands, inbox) = mpsc::unbounded_channel();
    let payments = Payments {
        wallet,
        embedded,
        commands: commands.clone(),
        ended,
        handled,
        slices: Slices::new(Slices::<PaysFor>::MAX_IN_FLIGHT),
        waiting: VecDeque::new(),
        back: BTreeMap::new(),
        booked: VecDeque::new(),
        booked_hashes: BTreeSet::new(),
    };
    tokio::spawn(payments.run(inbox));
    commands
}

impl Payments {
    async fn run(mut self, mut inbox: mpsc::UnboundedReceiver<Command>) {
        let mut clock = ClockWatch::new();
        loop {
            let wake = until(self.slices.poll_timeout()).min(self.until_one_gives_way(Instant::now()));
            tokio::select! {
                command = inbox.recv() => match command {
                    Some(command) => self.command(now(), command),
                    None => return,
                },
                () = tokio::time::sleep(wake) => self.slices.handle_timeout(now()),
            }
            if clock.moved().is_some() {
                self.slices.clock_moved(now());
                self.slices.handle_timeout(now());
            }
            self.start_waiting();
            self.act();
        }
    }

    fn command(&mut self, now: UnixMs, command: Command) {
        match command {
            Command::Pay { pays_for, hash, bolt11, amount, max_fee, recover } => {
                let expires_at = invoice::read(&bolt11).map_or(now, |facts| facts.expires_at);
                let intent = Intent { hash, bolt11, amount, max_fee, expires_at };
                if recover {
                    if pays_for.is_back() {
                        self.back.insert(hash, Instant::now());
                    }
                    self.slices.recover(now, pays_for, intent, None);
                } else {
                    self.waiting.push_back((pays_for, intent));
                }
            }
            Command::Settled { hash, preimage, fee } => self.event(now, hash, Input::Settled { preimage, fee }),
            Command::Failed { hash, reason } => self.event(now, hash, Input::Failed { reason }),
            Command::Answer { hash, input } => {
                self.input(now, hash, input);
            }
            Command::Booked { hash } => self.booked(hash),
        }
    }

    /// Payments back that have hung so long that they give way, as far as a channel has slots for them.
    fn hanging(&self, now: Instant) -> usize {
        let long = self.back.values().filter(|since| now.duration_since(**since) >= GIVES_WAY).count();
        long.min(Slices::<PaysFor>::MAX_ASIDE)
    }

    /// How long nothing gives way by itself, while something waits for that.
    fn until_one_gives_way(&self, now: Instant) -> Duration {
        let left = self.back.values().filter_map(|since| GIVES_WAY.checked_sub(now.duration_since(*since)));
        let next = left.filter(|left| !left.is_zero()).min();
        next.filter(|_| !self.waiting.is_empty()).unwrap_or(Duration::MAX)
    }

    /// Starts what waits, as far as there is room.
    fn start_waiting(&mut self) {
        let hanging = self.hanging(Instant::now());
        self.slices.set_aside(hanging);
        let mut kept = VecDeque::new();
        while let Some((pays_for, intent)) = self.waiting.pop_front() {
            let (hash, amount) = (intent.hash, intent.amount);
            if pays_for.is_back() && self.back.len().saturating_sub(hanging) >= MOST_BACK {
                kept.push_back((pays_for, intent));
                continue;
            }
            match self.slices.start(now(), pays_for, intent.clone()) {
                Ok(()) => {
                    if pays_for.is_back() {
                        self.back.insert(hash, Instant::now());
                    }
                }
                Err(StartError::TooMany { .. }) => {
                    kept.push_back((pays_for, intent));
                    break;
                }
                Err(error) => {
                    // A role asks for what it must not. Nothing was sent under a hash that the machine does not know;
                    // one that it knows has its own end, which was or will be told.
                    tracing::error!(payment = %hash, ?pays_for, %error, "a payment was not started");
                    let of_another = match &error {
                        StartError::NotOver { hash: other, .. } | StartError::Paid { hash: other } => *other != hash,
                        StartError::GivenUp { .. } => true,
                        // Who is paid back names the invoice itself, and may name one that was paid for something else.
                        StartError::HashReused { .. } => matches!(pays_for, PaysFor::Door(_) | PaysFor::Refund(_)),
                        StartError::TooMany { .. } => false,
                    };
                    if of_another {
                        let outcome = Outcome::Failed { reason: FailureReason::NeverSent };
                        let _ = self.ended.send(Ended { pays_for, hash, amount, outcome });
                    }
                }
            }
        }
        kept.append(&mut self.waiting);
        self.waiting = kept;
    }

    /// An event of the wallet. Where it brings no news, nobody will book it, and it can be acknowledged.
    fn event(&mut self, now: UnixMs, hash: PaymentHash, input: Input) {
        let news = self.input(now, hash, input);
        if !news && (self.booked_hashes.contains(&hash) || self.intent(hash).is_none()) {
            let _ = self.handled.send(hash);
        }
    }

    /// Whether it was the payment's end.
    fn input(&mut self, now: UnixMs, hash: PaymentHash, input: Input) -> bool {
        let amount = self.intent(hash);
        match (self.slices.handle(now, hash, input), amount) {
            (Ok(Some((pays_for, outcome))), Some(amount)) => {
                self.back.remove(&hash);
                let _ = self.ended.send(Ended { pays_for, hash, amount, outcome });
                true
            }
            (Ok(_), _) => false,
            (Err(InputError::UnknownHash { .. }), _) => false,
            (Err(error @ InputError::WrongPreimage { .. }), _) => {
                tracing::error!(%error, "the wallet reported something that cannot be");
                false
            }
        }
    }

    fn intent(&self, hash: PaymentHash) -> Option<Msat> {
        self.slices.payment(&hash).map(|(_, payment)| payment.intent().amount)
    }

    /// The journal has its end: it is remembered for a while, and then forgotten.
    fn booked(&mut self, hash: PaymentHash) {
        let Some((pays_for, payment)) = self.slices.payment(&hash) else { return };
        if !payment.phase().is_over() || !self.booked_hashes.insert(hash) {
            return;
        }
        self.booked.push_back((hash, *pays_for));
        if self.booked.len() > REMEMBERED
            && let Some((oldest, pays_for)) = self.booked.pop_front()
        {
            self.booked_hashes.remove(&oldest);
            self.slices.retire(|other| *other == pays_for);
        }
    }

    /// Starts the calls that the machines ask for; their answers come back as commands.
    fn act(&mut self) {
        while let Some((hash, action)) = self.slices.poll_action() {
            let (wallet, commands) = (self.wallet.clone(), self.commands.clone());
            let embedded = self.embedded.clone();
            tokio::spawn(async move {
                let input = match action {
                    Action::Pay { bolt11, max_fee } => {
                        if let (Some(embedded), Ok(facts)) = (embedded, invoice::read(&bolt11)) {
                            channel_is_back(embedded.as_ref(), facts.payee, USABLE_WITHIN).await;
                        }
                        match wallet.pay(&bolt11, max_fee).await {
                            Ok(()) => Some(Input::Accepted),
                            Err(error) => Some(Input::Refused(error)),
                        }
                    }
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

/// Waits while a channel with the payee stands and its peer is away, and looks for the peer. Nothing is sent before, so a
/// payment that waits here has been attempted by nobody; without this it would fail at once for want of a route.
async fn channel_is_back(wallet: &dyn Embedded, payee: LightningKey, within: Duration) {
    let waits = async {
        let mut asked = false;
        while wallet.channels().await.is_ok_and(|channels| is_away(&channels, payee)) {
            // The peer may listen only a moment from now: it is asked for by others, too, every two seconds.
            if !std::mem::replace(&mut asked, true) {
                tracing::info!(peer = %payee, "waiting for the channel with the payee to come back");
                let _ = wallet.reconnect().await;
            }
            tokio::time::sleep(USABLE_POLL).await;
        }
    };
    let _ = tokio::time::timeout(within, waits).await;
}

/// Channels with the payee are agreed on, and none can be used.
fn is_away(channels: &[Channel], payee: LightningKey) -> bool {
    let mut with = channels.iter().filter(|channel| channel.counterparty == payee && channel.ready).peekable();
    with.peek().is_some() && with.all(|channel| !channel.usable)
}

async fn observe(wallet: &dyn Lightning) -> Option<Input> {
    let usable = wallet.channels().await.ok()?.iter().any(|channel| channel.usable);
    let outbound_in_flight = wallet.balance().await.ok()?.outbound_in_flight;
    Some(Input::Observed { usable, outbound_in_flight })
}

#[cfg(test)]
mod tests {
    use super::*;
    use satgrid_types::Digest;
    use satgrid_wallet::{
        ChannelId, InvoiceRequest,
        fake::{FakeLightning, FakeNetwork, FaultRates},
    };

    fn driver(node: FakeLightning) -> Payments {
        Payments {
            wallet: Arc::new(node),
            embedded: None,
            commands: mpsc::unbounded_channel().0,
            ended: mpsc::unbounded_channel().0,
            handled: mpsc::unbounded_channel().0,
            slices: Slices::new(Slices::<PaysFor>::MAX_IN_FLIGHT),
            waiting: VecDeque::new(),
            back: BTreeMap::new(),
            booked: VecDeque::new(),
            booked_hashes: BTreeSet::new(),
        }
    }

    impl Payments {
        /// To pay an invoice of the stranger's, whose wallet is never asked: it hangs.
        async fn ask(&mut self, stranger: &FakeLightning, pays_for: PaysFor) -> PaymentHash {
            let request = InvoiceRequest { amount: Msat::sat(1), description_hash: Digest([0; 32]), expiry_secs: 600 };
            let made = stranger.create_invoice(request).await.unwrap();
            let (hash, bolt11) = (made.payment_hash, made.bolt11);
            let (amount, max_fee) = (Msat::sat(1), Msat::sat(1));
            self.command(now(), Command::Pay { pays_for, hash, bolt11, amount, max_fee, recover: false });
            self.start_waiting();
            hash
        }
    }

    #[tokio::test]
    async fn refunds_that_hang_leave_room_for_what_is_bought() {
        let [node, stranger] = FakeLightning::wallets(FakeNetwork::new(7, FaultRates::NONE));
        node.with_network(|network| network.handle_timeout(now()));
        let mut payments = driver(node);
        let session = SessionId([1; 32]);
        let all =
            (0..16).map(|n| if n % 2 == 0 { PaysFor::Door(n) } else { PaysFor::Refund(SessionId([n as u8; 32])) });
        let mut hashes = Vec::new();
        for pays_for in all.chain([PaysFor::Slice(session, 0)]) {
            hashes.push(payments.ask(&stranger, pays_for).await);
        }
        assert_eq!(payments.slices.unfinished(), MOST_BACK + 1);
        assert_eq!(payments.intent(hashes[16]), Some(Msat::sat(1)), "the slice is on its way");
        // Where one ends, the next goes, in their order.
        let reason = FailureReason::Rejected;
        payments.command(now(), Command::Failed { hash: hashes[0], reason });
        payments.start_waiting();
        assert!(payments.intent(hashes[MOST_BACK]).is_some());
        assert!(payments.intent(hashes[MOST_BACK + 1]).is_none());
        assert_eq!(payments.waiting.len(), 16 - MOST_BACK - 1);
    }

    #[tokio::test]
    async fn refunds_that_hang_for_long_hold_up_no_others() {
        let [node, stranger] = FakeLightning::wallets(FakeNetwork::new(7, FaultRates::NONE));
        node.with_network(|network| network.handle_timeout(now()));
        let mut payments = driver(node);
        let mut hashes = Vec::new();
        for n in 0..24 {
            hashes.push(payments.ask(&stranger, PaysFor::Door(n)).await);
        }
        // Each time that those in flight have hung long enough, as many again go.
        for started in [1, 2, 3, 4].map(|times| times * MOST_BACK) {
            assert_eq!(payments.slices.unfinished(), started);
            assert!(payments.until_one_gives_way(Instant::now()) <= GIVES_WAY, "the driver wakes for it");
            payments.back.values_mut().for_each(|since| *since = since.checked_sub(GIVES_WAY).unwrap());
            payments.start_waiting();
        }
        assert_eq!(payments.waiting.len(), 24 - 4 * MOST_BACK, "no more hang than there are places for");
        // What is bought still goes, and who is paid back twice is not.
        let slice = payments.ask(&stranger, PaysFor::Slice(SessionId([1; 32]), 0)).await;
        assert!(payments.intent(slice).is_some());
        let again = payments.slices.may_start(&PaysFor::Door(0), PaymentHash([9; 32]));
        assert!(matches!(again, Err(StartError::NotOver { .. })), "{again:?}");
        // Their ends are still told, and leave room.
        payments.command(now(), Command::Failed { hash: hashes[0], reason: FailureReason::Rejected });
        payments.start_waiting();
        assert_eq!(payments.waiting.len(), 24 - 4 * MOST_BACK - 1);
    }

    #[test]
    fn a_payment_waits_for_its_payees_channel_alone() {
        let (payee, other) = (LightningKey([2; 33]), LightningKey([3; 33]));
        let channel = |counterparty, ready, usable| Channel {
            id: ChannelId([0; 32]),
            counterparty,
            capacity_sat: 0,
            ours: Msat::ZERO,
            reserve_sat: 0,
            payable: Msat::ZERO,
            largest_payment: Msat::ZERO,
            receivable: Msat::ZERO,
            we_opened: true,
            ready,
            usable,
            confirmations: 1,
        };
        let check = |channels: &[Channel], away: bool| assert_eq!(is_away(channels, payee), away, "{channels:?}");
        check(&[], false);
        check(&[channel(other, true, false)], false);
        // One that still confirms is not waited for.
        check(&[channel(payee, false, false)], false);
        check(&[channel(payee, true, false), channel(other, true, true)], true);
        check(&[channel(payee, true, false), channel(payee, true, true)], false);
    }
}
