//! Nodes, payments, events and time of the fake network.

use super::{Fault, FaultRates, channels::FakeChannel};
use crate::{
    Network,
    invoice::{self, InvoiceFacts},
    message,
    port::{
        ChannelId, Direction, FailureReason, Invoice, InvoiceError, InvoiceRequest, MAX_INVOICE_EXPIRY_SECS, PayError,
        PaymentRecord, PaymentState, WalletError, WalletEvent,
    },
};
use core::time::Duration;
use lightning_invoice::{Bolt11InvoiceDescription, Currency, InvoiceBuilder, PaymentSecret, Sha256 as InvoiceHash};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use satgrid_types::{LightningKey, Msat, PaymentHash, Preimage, UnixMs};
use secp256k1::{PublicKey, SECP256K1, SecretKey};
use sha2::{Digest as _, Sha256};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// How a wallet dies.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Crash {
    /// Rows of payments still in flight that were written within this time are lost.
    pub lose_rows_ms: u64,
    /// Its channels are force-closed when it comes back, as the embedded node's may be after a kill.
    pub close_channels: bool,
}

/// All wallets, all channels, one clock. See [`crate::fake`].
#[derive(Debug)]
pub struct FakeNetwork {
    pub(super) now: UnixMs,
    pub(super) rng: ChaCha8Rng,
    pub(super) nodes: BTreeMap<LightningKey, FakeNode>,
    pub(super) channels: BTreeMap<ChannelId, FakeChannel>,
    pub(super) timers: BTreeMap<(UnixMs, u64), Timer>,
    pub(super) next_timer: u64,
    /// Routing and chain fees: paid by someone, got by nobody here.
    pub(super) burned: Msat,
    /// Everything that was ever funded.
    pub(super) minted: Msat,
    rates: FaultRates,
}

#[derive(Debug)]
pub(super) struct FakeNode {
    key: SecretKey,
    pub(super) up: bool,
    /// Set by a crash, acted on by the restart.
    close_on_restart: bool,
    pub(super) onchain_sat: u64,
    pub(super) closing: Msat,
    pub(super) connected: BTreeSet<LightningKey>,
    rows: BTreeMap<PaymentHash, Row>,
    invoices: BTreeMap<PaymentHash, (Preimage, InvoiceFacts)>,
    pub(super) events: VecDeque<WalletEvent>,
    script: VecDeque<Fault>,
    pub(super) addresses: u64,
    next_row: u64,
}

#[derive(Debug)]
struct Row {
    nth: u64,
    record: PaymentRecord,
}

#[derive(Debug, Clone)]
pub(super) enum Timer {
    Resolve { payer: LightningKey, channel: ChannelId, hash: PaymentHash, fault: Fault },
    Ready { channel: ChannelId },
}

/// An HTLC to a payee that is down waits this long before it is tried again.
const PAYEE_RETRY_MS: u64 = 1_000;

impl FakeNetwork {
    pub fn new(seed: u64, rates: FaultRates) -> FakeNetwork {
        FakeNetwork {
            now: UnixMs(0),
            rng: ChaCha8Rng::seed_from_u64(seed),
            nodes: BTreeMap::new(),
            channels: BTreeMap::new(),
            timers: BTreeMap::new(),
            next_timer: 0,
            burned: Msat::ZERO,
            minted: Msat::ZERO,
            rates,
        }
    }

    /// A new wallet with nothing in it.
    pub fn add_wallet(&mut self) -> LightningKey {
        let key = loop {
            if let Ok(key) = SecretKey::from_slice(&self.rng.r#gen::<[u8; 32]>()) {
                break key;
            }
        };
        let id = LightningKey(PublicKey::from_secret_key(SECP256K1, &key).serialize());
        let node = FakeNode {
            key,
            up: true,
            close_on_restart: false,
            onchain_sat: 0,
            closing: Msat::ZERO,
            connected: BTreeSet::new(),
            rows: BTreeMap::new(),
            invoices: BTreeMap::new(),
            events: VecDeque::new(),
            script: VecDeque::new(),
            addresses: 0,
            next_row: 0,
        };
        self.nodes.insert(id, node);
        id
    }

    /// What happens to this payer's next payments, one after another; after that the rates decide.
    pub fn script(&mut self, payer: LightningKey, faults: impl IntoIterator<Item = Fault>) {
        if let Some(node) = self.nodes.get_mut(&payer) {
            node.script.extend(faults);
        }
    }

    pub fn set_rates(&mut self, rates: FaultRates) {
        self.rates = rates;
    }

    // Time.

    pub fn now(&self) -> UnixMs {
        self.now
    }
    /// When something will happen by itself.
    pub fn poll_timeout(&self) -> Option<UnixMs> {
        self.timers.keys().next().map(|(at, _)| *at)
    }
    /// Lets happen everything that is due at `now`, in order. Every other call moves time no further than this.
    pub fn handle_timeout(&mut self, now: UnixMs) {
        while let Some(entry) = self.timers.first_entry()
            && entry.key().0 <= now
        {
            let ((at, _), timer) = entry.remove_entry();
            self.now = self.now.max(at);
            match timer {
                Timer::Resolve { payer, channel, hash, fault } => self.resolve(payer, channel, hash, fault),
                Timer::Ready { channel } => self.channel_ready(channel),
            }
        }
        self.now = self.now.max(now);
    }
    pub(super) fn at(&mut self, ms: u64, timer: Timer) {
        self.timers.insert((self.now.plus_ms(ms), self.next_timer), timer);
        self.next_timer += 1;
    }

    // Events.

    /// The oldest event that was not acknowledged; the same one until it is.
    pub fn poll_event(&self, node: LightningKey) -> Option<&WalletEvent> {
        self.nodes.get(&node).filter(|n| n.up).and_then(|n| n.events.front())
    }
    pub fn event_handled(&mut self, node: LightningKey) -> Result<(), WalletError> {
        self.up_mut(node)?.events.pop_front();
        Ok(())
    }
    pub(super) fn emit(&mut self, node: LightningKey, event: WalletEvent) {
        if let Some(node) = self.nodes.get_mut(&node) {
            node.events.push_back(event);
        }
    }

    // Life and death.

    pub fn is_up(&self, node: LightningKey) -> bool {
        self.nodes.get(&node).is_some_and(|n| n.up)
    }
    /// The process dies. Its HTLCs live on; its unacknowledged events come again after the restart.
    pub fn crash(&mut self, now: UnixMs, node: LightningKey, crash: Crash) {
        self.handle_timeout(now);
        if let Some(n) = self.nodes.get_mut(&node) {
            n.up = false;
            n.close_on_restart |= crash.close_channels;
            n.connected.clear();
            n.rows.retain(|_, row| {
                let fresh = now.since(row.record.at) < crash.lose_rows_ms;
                !(fresh && row.record.direction == Direction::Outbound && row.record.state == PaymentState::InFlight)
            });
        }
        for other in self.nodes.values_mut() {
            other.connected.remove(&node);
        }
    }
    /// A clean stop is a crash that loses nothing.
    pub fn stop(&mut self, node: LightningKey) {
        self.crash(self.now, node, Crash::default());
    }
    /// The process is back. Its channels are usable after `connect`, from either side.
    pub fn restart(&mut self, now: UnixMs, node: LightningKey) {
        self.handle_timeout(now);
        let close = self.nodes.get_mut(&node).is_some_and(|n| {
            n.up = true;
            core::mem::take(&mut n.close_on_restart)
        });
        if close {
            let ids: Vec<_> = self.channels.iter().filter(|(_, c)| c.has(node)).map(|(id, _)| *id).collect();
            for id in ids {
                self.close(id, node, true, "OutdatedChannelManager");
            }
        }
    }

    // Payments.

    pub fn create_invoice(
        &mut self,
        now: UnixMs,
        payee: LightningKey,
        request: InvoiceRequest,
    ) -> Result<Invoice, InvoiceError> {
        self.handle_timeout(now);
        if request.amount.is_zero() {
            return Err(InvoiceError::ZeroAmount);
        }
        if request.expiry_secs == 0 || request.expiry_secs > MAX_INVOICE_EXPIRY_SECS {
            return Err(InvoiceError::Expiry { asked: request.expiry_secs });
        }
        let preimage = Preimage(self.rng.r#gen());
        let hash = PaymentHash(Sha256::digest(preimage.0).into());
        let secret = PaymentSecret(self.rng.r#gen());
        let node = self.up_mut(payee)?;
        let broken = |reason: String| WalletError::Node { reason };
        let terms = hex::encode(request.description_hash.0).parse().map_err(|e| broken(format!("{e}")))?;
        let invoice = InvoiceBuilder::new(Currency::Regtest)
            .amount_milli_satoshis(request.amount.0)
            .invoice_description(Bolt11InvoiceDescription::Hash(InvoiceHash(terms)))
            .payment_hash(hex::encode(hash.0).parse().map_err(|e| broken(format!("{e}")))?)
            .payment_secret(secret)
            .duration_since_epoch(Duration::from_secs(now.as_secs()))
            .expiry_time(Duration::from_secs(u64::from(request.expiry_secs)))
            .min_final_cltv_expiry_delta(24)
            .basic_mpp()
            .build_signed(|digest| SECP256K1.sign_ecdsa_recoverable(digest, &node.key))
            .map_err(|e| broken(e.to_string()))?;
        let bolt11 = invoice.to_string();
        let facts = invoice::read(&bolt11).map_err(|e| broken(e.to_string()))?;
        node.invoices.insert(hash, (preimage, facts));
        node.write(now, hash, Direction::Inbound, request.amount, Msat::ZERO, PaymentState::InFlight);
        Ok(Invoice { bolt11, payment_hash: hash })
    }

    /// As the port's `pay`: in flight or paid when `Ok`.
    pub fn pay(&mut self, now: UnixMs, payer: LightningKey, bolt11: &str, max_fee: Msat) -> Result<(), PayError> {
        self.handle_timeout(now);
        let node = self.up_mut(payer).map_err(|_| PayError::Stopped)?;
        let bad = |reason: &str| PayError::BadInvoice { reason: reason.to_owned() };
        let facts = invoice::read(bolt11).map_err(|e| PayError::BadInvoice { reason: e.to_string() })?;
        let amount = facts.amount.ok_or_else(|| bad("it names no amount"))?;
        if facts.network != Some(Network::Regtest) {
            return Err(bad("it is for another network"));
        }
        let hash = facts.payment_hash;
        if let Some(row) = node.rows.get(&hash)
            && matches!(row.record.state, PaymentState::InFlight | PaymentState::Settled { .. })
        {
            return if row.record.direction == Direction::Outbound { Ok(()) } else { Err(bad("it is our own")) };
        }
        // Expiry and route come before the duplicate, as in the embedded node.
        if facts.is_expired(now) {
            return Err(PayError::Expired);
        }
        let Some(channel) = self.route(payer, facts.payee, amount) else {
            let payable = self.payable(payer);
            let failed = PaymentState::Failed { reason: FailureReason::NoRoute };
            if let Some(node) = self.nodes.get_mut(&payer) {
                node.write(now, hash, Direction::Outbound, amount, Msat::ZERO, failed);
            }
            return Err(PayError::NoRoute { amount, payable, max_fee });
        };
        if self.channels.values().any(|c| c.htlcs.contains_key(&hash)) {
            return Ok(());
        }
        let fault = self.next_fault(payer);
        let fee = match fault {
            Fault::Fee(fee) if fee <= max_fee => fee,
            _ => Msat::ZERO,
        };
        self.add_htlc(channel, payer, hash, amount, fee);
        let delay = match fault {
            Fault::Delay { ms } | Fault::Stuck { ms, .. } => ms,
            _ => self.rng.gen_range(self.rates.delay_ms.0..=self.rates.delay_ms.1),
        };
        self.at(delay, Timer::Resolve { payer, channel, hash, fault });
        if fault == Fault::Break {
            return Err(PayError::Uncertain { reason: "the row was not written".into() });
        }
        if let Some(node) = self.nodes.get_mut(&payer) {
            node.write(now, hash, Direction::Outbound, amount, Msat::ZERO, PaymentState::InFlight);
        }
        Ok(())
    }

    pub fn lookup(&self, node: LightningKey, hash: PaymentHash) -> Result<PaymentState, WalletError> {
        Ok(self.up(node)?.rows.get(&hash).map_or(PaymentState::Unknown, |row| row.record.state.clone()))
    }

    /// Oldest first.
    pub fn payments(&self, node: LightningKey) -> Result<Vec<PaymentRecord>, WalletError> {
        let mut rows: Vec<&Row> = self.up(node)?.rows.values().collect();
        rows.sort_by_key(|row| row.nth);
        Ok(rows.into_iter().map(|row| row.record.clone()).collect())
    }

    pub fn sign_message(&self, node: LightningKey, text: &[u8]) -> String {
        self.nodes.get(&node).map_or_else(String::new, |n| message::sign(text, &n.key))
    }

    fn next_fault(&mut self, payer: LightningKey) -> Fault {
        if let Some(fault) = self.nodes.get_mut(&payer).and_then(|n| n.script.pop_front()) {
            return fault;
        }
        let rates = self.rates;
        let mut draw = self.rng.gen_range(0..1_000u16);
        let mut hit = |rate: u16| match draw.checked_sub(rate) {
            Some(rest) => {
                draw = rest;
                false
            }
            None => true,
        };
        if hit(rates.fail) {
            Fault::Fail(FailureReason::RetriesExhausted)
        } else if hit(rates.stuck) {
            Fault::Stuck { ms: self.rng.gen_range(0..=rates.max_stuck_ms), then_settles: self.rng.r#gen() }
        } else if hit(rates.lose_event) {
            Fault::LoseEvent
        } else if hit(rates.duplicate_event) {
            Fault::DuplicateEvent
        } else if hit(rates.break_) {
            Fault::Break
        } else {
            Fault::None
        }
    }

    /// An HTLC's end.
    fn resolve(&mut self, payer: LightningKey, channel: ChannelId, hash: PaymentHash, fault: Fault) {
        let now = self.now;
        let Some((payee, amount, fee)) = self.htlc(channel, payer, hash) else { return };
        let fails = match fault {
            Fault::Fail(reason) => Some(reason),
            Fault::Stuck { then_settles: false, .. } => Some(FailureReason::RetriesExhausted),
            _ => None,
        };
        if let Some(reason) = fails {
            return self.fail(payer, channel, hash, reason);
        }
        if !self.is_up(payee) {
            return self.at(PAYEE_RETRY_MS, Timer::Resolve { payer, channel, hash, fault });
        }
        let claim = self.nodes.get_mut(&payee).and_then(|n| n.claim(now, hash, amount));
        let Some(preimage) = claim else {
            return self.fail(payer, channel, hash, FailureReason::Rejected);
        };
        self.settle_htlc(channel, hash);
        self.emit(payee, WalletEvent::PaymentReceived { hash, amount });
        if let Some(node) = self.nodes.get_mut(&payer) {
            // A row that a crash lost does not come back; the event still comes.
            node.update(now, hash, fee, PaymentState::Settled { preimage, fee, amount });
        }
        let has_row = self.nodes.get(&payer).is_some_and(|n| n.rows.contains_key(&hash));
        let times = match fault {
            Fault::LoseEvent if has_row => 0,
            Fault::DuplicateEvent => 2,
            _ => 1,
        };
        for _ in 0..times {
            self.emit(payer, WalletEvent::PaymentSettled { hash, preimage, fee });
        }
    }

    fn fail(&mut self, payer: LightningKey, channel: ChannelId, hash: PaymentHash, reason: FailureReason) {
        self.return_htlc(channel, hash);
        let now = self.now;
        if let Some(node) = self.nodes.get_mut(&payer) {
            node.update(now, hash, Msat::ZERO, PaymentState::Failed { reason });
        }
        self.emit(payer, WalletEvent::PaymentFailed { hash, reason });
    }

    pub(super) fn up(&self, node: LightningKey) -> Result<&FakeNode, WalletError> {
        self.nodes.get(&node).filter(|n| n.up).ok_or(WalletError::Stopped)
    }
    pub(super) fn up_mut(&mut self, node: LightningKey) -> Result<&mut FakeNode, WalletError> {
        self.nodes.get_mut(&node).filter(|n| n.up).ok_or(WalletError::Stopped)
    }
}

impl FakeNode {
    fn write(
        &mut self,
        at: UnixMs,
        hash: PaymentHash,
        direction: Direction,
        amount: Msat,
        fee: Msat,
        state: PaymentState,
    ) {
        let nth = self.rows.get(&hash).map_or(self.next_row, |row| row.nth);
        self.next_row += 1;
        self.rows.insert(hash, Row { nth, record: PaymentRecord { hash, direction, amount, fee, state, at } });
    }

    fn update(&mut self, at: UnixMs, hash: PaymentHash, fee: Msat, state: PaymentState) {
        if let Some(row) = self.rows.get_mut(&hash) {
            row.record.at = at;
            row.record.fee = fee;
            row.record.state = state;
        }
    }

    /// The payee's part: an invoice of ours, unpaid, unexpired, in full.
    fn claim(&mut self, now: UnixMs, hash: PaymentHash, amount: Msat) -> Option<Preimage> {
        let (preimage, facts) = self.invoices.get(&hash)?;
        let preimage = *preimage;
        let open = self.rows.get(&hash).is_some_and(|row| row.record.state == PaymentState::InFlight);
        if !open || facts.is_expired(now) || facts.amount != Some(amount) {
            return None;
        }
        self.update(now, hash, Msat::ZERO, PaymentState::Settled { preimage, fee: Msat::ZERO, amount });
        Some(preimage)
    }
}
