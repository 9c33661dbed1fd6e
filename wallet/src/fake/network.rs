//! Wallets, events and time of the fake network.

use super::{Fault, FaultRates, channels::FakeChannel};
use crate::{
    invoice::InvoiceFacts,
    port::{ChannelId, Direction, PaymentRecord, PaymentState, WalletError, WalletEvent},
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use satgrid_types::{LightningKey, Msat, PaymentHash, Preimage, UnixMs};
use secp256k1::{PublicKey, SECP256K1, SecretKey};
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
    pub(super) rates: FaultRates,
}

#[derive(Debug)]
pub(super) struct FakeNode {
    pub(super) key: SecretKey,
    pub(super) up: bool,
    /// Set by a crash, acted on by the restart.
    close_on_restart: bool,
    pub(super) onchain_sat: u64,
    pub(super) closing: Msat,
    pub(super) connected: BTreeSet<LightningKey>,
    pub(super) rows: BTreeMap<PaymentHash, Row>,
    pub(super) invoices: BTreeMap<PaymentHash, (Preimage, InvoiceFacts)>,
    pub(super) events: VecDeque<WalletEvent>,
    pub(super) script: VecDeque<Fault>,
    pub(super) addresses: u64,
    pub(super) next_row: u64,
}

#[derive(Debug)]
pub(super) struct Row {
    pub(super) nth: u64,
    pub(super) record: PaymentRecord,
}

#[derive(Debug, Clone)]
pub(super) enum Timer {
    Resolve { payer: LightningKey, channel: ChannelId, hash: PaymentHash, fault: Fault },
    Ready { channel: ChannelId },
}

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

    pub(super) fn up(&self, node: LightningKey) -> Result<&FakeNode, WalletError> {
        self.nodes.get(&node).filter(|n| n.up).ok_or(WalletError::Stopped)
    }
    pub(super) fn up_mut(&mut self, node: LightningKey) -> Result<&mut FakeNode, WalletError> {
        self.nodes.get_mut(&node).filter(|n| n.up).ok_or(WalletError::Stopped)
    }
}
