//! Channels, balances and peers of the fake network.

use super::network::{FakeNetwork, Timer};
use crate::port::{Balance, Channel, ChannelError, ChannelId, OpenChannel, WalletError, WalletEvent};
use core::net::SocketAddr;
use rand::Rng;
use satgrid_types::{LightningKey, Msat, PaymentHash};
use std::collections::BTreeMap;

/// The reserve is 1 % of the channel and never less than this.
pub const RESERVE_MIN_SAT: u64 = 1_000;
/// What the funding transaction costs.
pub const OPEN_FEE_SAT: u64 = 200;
/// A funding transaction confirms after this.
const CONFIRM_MS: u64 = 1_000;

#[derive(Debug)]
pub(super) struct FakeChannel {
    /// Opener first.
    ends: [LightningKey; 2],
    msat: [u64; 2],
    capacity_sat: u64,
    ready: bool,
    /// Closed on chain: HTLCs end there, and what they free goes to `closing`.
    closed: bool,
    pub(super) htlcs: BTreeMap<PaymentHash, Htlc>,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Htlc {
    payer_side: usize,
    amount: Msat,
    fee: Msat,
}

impl FakeChannel {
    pub(super) fn has(&self, node: LightningKey) -> bool {
        self.ends.contains(&node)
    }
    fn side(&self, node: LightningKey) -> Option<usize> {
        self.ends.iter().position(|end| *end == node)
    }
    fn reserve_sat(&self) -> u64 {
        (self.capacity_sat / 100).max(RESERVE_MIN_SAT)
    }
    fn payable(&self, side: usize) -> Msat {
        Msat(self.msat[side].saturating_sub(self.reserve_sat() * 1_000))
    }
}

impl FakeNetwork {
    /// Puts coins into a wallet.
    pub fn fund(&mut self, node: LightningKey, sat: u64) {
        if let Some(node) = self.nodes.get_mut(&node) {
            node.onchain_sat += sat;
            self.minted = self.minted.saturating_add(Msat(sat * 1_000));
        }
    }

    /// A ready channel out of nothing, without events: for a simulation's first state.
    pub fn add_channel(
        &mut self,
        opener: LightningKey,
        peer: LightningKey,
        capacity_sat: u64,
        push: Msat,
    ) -> ChannelId {
        self.minted = self.minted.saturating_add(Msat(capacity_sat * 1_000));
        let id = self.insert_channel(opener, peer, capacity_sat, push, true);
        self.link(opener, peer);
        id
    }

    pub fn connect(&mut self, node: LightningKey, peer: LightningKey, addr: SocketAddr) -> Result<(), ChannelError> {
        self.up(node)?;
        if !self.is_up(peer) {
            return Err(ChannelError::Unreachable { node: peer, addr });
        }
        self.link(node, peer);
        Ok(())
    }

    pub fn open_channel(&mut self, node: LightningKey, open: OpenChannel) -> Result<(), ChannelError> {
        self.connect(node, open.node, open.addr)?;
        let capacity_sat = open.capacity_sat;
        let wallet = self.up_mut(node)?;
        let spendable_sat = wallet.onchain_sat;
        let rest = spendable_sat.checked_sub(capacity_sat.saturating_add(OPEN_FEE_SAT));
        let Some(rest) = rest.filter(|_| open.push.0 <= capacity_sat.saturating_mul(1_000)) else {
            return Err(ChannelError::Funds { capacity_sat, anchor_reserve_sat: 0, spendable_sat });
        };
        wallet.onchain_sat = rest;
        self.burned = self.burned.saturating_add(Msat(OPEN_FEE_SAT * 1_000));
        let channel = self.insert_channel(node, open.node, capacity_sat, open.push, false);
        self.emit(node, WalletEvent::ChannelPending { channel, counterparty: open.node });
        self.emit(open.node, WalletEvent::ChannelPending { channel, counterparty: node });
        self.at(CONFIRM_MS, Timer::Ready { channel });
        Ok(())
    }

    pub fn close_channel(&mut self, node: LightningKey, id: ChannelId, force: bool) -> Result<(), ChannelError> {
        self.up(node)?;
        if !self.channels.get(&id).is_some_and(|c| c.has(node) && !c.closed) {
            return Err(ChannelError::NoSuchChannel(id));
        }
        self.close(id, node, force, if force { "forced" } else { "cooperative" });
        Ok(())
    }

    pub fn channels(&self, node: LightningKey) -> Result<Vec<Channel>, WalletError> {
        let me = self.up(node)?;
        let mut list = Vec::new();
        for (id, c) in self.channels.iter().filter(|(_, c)| !c.closed) {
            let Some(side) = c.side(node) else { continue };
            let counterparty = c.ends[1 - side];
            list.push(Channel {
                id: *id,
                counterparty,
                capacity_sat: c.capacity_sat,
                ours: Msat(c.msat[side]),
                reserve_sat: c.reserve_sat(),
                payable: c.payable(side),
                largest_payment: c.payable(side),
                receivable: c.payable(1 - side),
                we_opened: side == 0,
                ready: c.ready,
                usable: c.ready && me.connected.contains(&counterparty),
                confirmations: u32::from(c.ready),
            });
        }
        Ok(list)
    }

    pub fn balance(&self, node: LightningKey) -> Result<Balance, WalletError> {
        let me = self.up(node)?;
        let mut balance = Balance {
            closing_sat: me.closing.0 / 1_000,
            onchain_confirmed_sat: me.onchain_sat,
            onchain_total_sat: me.onchain_sat,
            outbound_in_flight: !me.events.is_empty()
                || self.channels.values().any(|c| c.htlcs.values().any(|h| c.ends[h.payer_side] == node)),
            ..Balance::default()
        };
        for channel in self.channels(node)? {
            balance.lightning_total = balance.lightning_total.saturating_add(channel.ours);
            if channel.usable {
                balance.payable = balance.payable.saturating_add(channel.payable);
                balance.largest_payment = balance.largest_payment.max(channel.payable);
                balance.receivable = balance.receivable.saturating_add(channel.receivable);
            }
        }
        Ok(balance)
    }

    pub fn new_address(&mut self, node: LightningKey) -> Result<String, WalletError> {
        let me = self.up_mut(node)?;
        me.addresses += 1;
        Ok(format!("fake-{}-{}", node.short(), me.addresses))
    }

    /// Everything that exists, wherever it is: equal to [`FakeNetwork::minted`], always.
    pub fn total(&self) -> Msat {
        let nodes = self.nodes.values().map(|n| Msat(n.onchain_sat * 1_000).saturating_add(n.closing));
        let sides = self.channels.values().flat_map(|c| c.msat.map(Msat));
        let htlcs = self.channels.values().flat_map(|c| c.htlcs.values()).map(|h| h.amount.saturating_add(h.fee));
        Msat::checked_sum(nodes.chain(sides).chain(htlcs).chain([self.burned])).unwrap_or(Msat::MAX)
    }
    /// Everything that was ever put in.
    pub fn minted(&self) -> Msat {
        self.minted
    }

    fn insert_channel(
        &mut self,
        opener: LightningKey,
        peer: LightningKey,
        capacity_sat: u64,
        push: Msat,
        ready: bool,
    ) -> ChannelId {
        let id = ChannelId(self.rng.r#gen());
        let push = push.0.min(capacity_sat * 1_000);
        let channel = FakeChannel {
            ends: [opener, peer],
            msat: [capacity_sat * 1_000 - push, push],
            capacity_sat,
            ready,
            closed: false,
            htlcs: BTreeMap::new(),
        };
        self.channels.insert(id, channel);
        id
    }

    fn link(&mut self, a: LightningKey, b: LightningKey) {
        for (one, other) in [(a, b), (b, a)] {
            if let Some(node) = self.nodes.get_mut(&one) {
                node.connected.insert(other);
            }
        }
    }

    pub(super) fn channel_ready(&mut self, channel: ChannelId) {
        let Some(c) = self.channels.get_mut(&channel).filter(|c| !c.closed) else { return };
        c.ready = true;
        let ends = c.ends;
        for side in 0..2 {
            let (counterparty, we_opened) = (ends[1 - side], side == 0);
            let event = WalletEvent::ChannelReady { channel, counterparty, funding_confirmed: true, we_opened };
            self.emit(ends[side], event);
        }
    }

    pub(super) fn close(&mut self, channel: ChannelId, _by: LightningKey, forced: bool, reason: &str) {
        let Some(c) = self.channels.get_mut(&channel).filter(|c| !c.closed) else { return };
        c.closed = true;
        let (ends, msat) = (c.ends, core::mem::take(&mut c.msat));
        for side in 0..2 {
            self.sweep(ends[side], Msat(msat[side]));
            self.emit(
                ends[side],
                WalletEvent::ChannelClosed {
                    channel,
                    counterparty: Some(ends[1 - side]),
                    reason: reason.to_owned(),
                    forced,
                },
            );
        }
    }

    fn sweep(&mut self, node: LightningKey, amount: Msat) {
        if let Some(node) = self.nodes.get_mut(&node) {
            node.closing = node.closing.saturating_add(amount);
        }
    }

    // HTLCs.

    /// A usable channel from `payer` to `payee` with enough above the reserve.
    pub(super) fn route(&self, payer: LightningKey, payee: LightningKey, amount: Msat) -> Option<ChannelId> {
        let linked = self.nodes.get(&payer)?.connected.contains(&payee);
        let fits = |c: &FakeChannel| {
            let side = c.side(payer);
            c.ready && !c.closed && c.has(payee) && side.is_some_and(|s| c.payable(s) >= amount)
        };
        self.channels.iter().find(|(_, c)| linked && payer != payee && fits(c)).map(|(id, _)| *id)
    }
    pub(super) fn payable(&self, node: LightningKey) -> Msat {
        self.balance(node).map_or(Msat::ZERO, |b| b.payable)
    }
    pub(super) fn add_htlc(&mut self, id: ChannelId, payer: LightningKey, hash: PaymentHash, amount: Msat, fee: Msat) {
        let Some(c) = self.channels.get_mut(&id) else { return };
        let Some(payer_side) = c.side(payer) else { return };
        // A fee that does not fit is not taken.
        let fee = if c.payable(payer_side) >= amount.saturating_add(fee) { fee } else { Msat::ZERO };
        c.msat[payer_side] -= amount.0 + fee.0;
        c.htlcs.insert(hash, Htlc { payer_side, amount, fee });
    }
    /// Payee, amount and fee of an HTLC that is out.
    pub(super) fn htlc(
        &self,
        id: ChannelId,
        payer: LightningKey,
        hash: PaymentHash,
    ) -> Option<(LightningKey, Msat, Msat)> {
        let c = self.channels.get(&id)?;
        let h = c.htlcs.get(&hash).filter(|h| c.ends[h.payer_side] == payer)?;
        Some((c.ends[1 - h.payer_side], h.amount, h.fee))
    }
    pub(super) fn settle_htlc(&mut self, id: ChannelId, hash: PaymentHash) {
        self.end_htlc(id, hash, |h| (1 - h.payer_side, h.amount, h.fee));
    }
    pub(super) fn return_htlc(&mut self, id: ChannelId, hash: PaymentHash) {
        self.end_htlc(id, hash, |h| (h.payer_side, h.amount.saturating_add(h.fee), Msat::ZERO));
    }
    fn end_htlc(&mut self, id: ChannelId, hash: PaymentHash, to: impl Fn(Htlc) -> (usize, Msat, Msat)) {
        let Some(c) = self.channels.get_mut(&id) else { return };
        let Some(htlc) = c.htlcs.remove(&hash) else { return };
        let (side, amount, burn) = to(htlc);
        let (end, closed) = (c.ends[side], c.closed);
        if !closed {
            c.msat[side] += amount.0;
        }
        self.burned = self.burned.saturating_add(burn);
        if closed {
            self.sweep(end, amount);
        }
    }
}
