//! What is ours, to the msat.
//!
//! ldk-node gives a channel's *capacities*, from which reserves and the opener's anchors are already taken off and which
//! stop at zero, and its *claimable balance*, which is rounded down to the sat and leaves dust out. It does not say
//! whether a channel has anchors. [`ours`] finds our side of the channel from these; [`has_anchors`] finds the missing
//! bit while nothing is in flight, and [`Anchors`] remembers it.

use crate::translate::{channel_id, node_key};
use ldk_node::{
    BalanceDetails, ChannelDetails, LightningBalance, PendingSweepBalance, lightning::ln::types::ChannelId as LdkId,
};
use satgrid_types::Msat;
use satgrid_wallet::{Balance, Channel, ChannelId};
use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

/// Two anchor outputs of 330 sat, which the opener pays for.
const ANCHORS_MSAT: u64 = 660_000;
/// Weight of an empty commitment transaction, without and with anchors.
const COMMITMENT_WEIGHT: u64 = 724;
const ANCHOR_COMMITMENT_WEIGHT: u64 = 1_124;

/// Which channels have anchors: a fact of the channel's type, found once.
#[derive(Debug, Default)]
pub(crate) struct Anchors(Mutex<BTreeMap<ChannelId, bool>>);

impl Anchors {
    fn known(&self, id: ChannelId, sides: &Sides, at_rest: bool) -> Option<bool> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(anchors) = known.get(&id) {
            return Some(*anchors);
        }
        let found = has_anchors(sides)?;
        if at_rest {
            known.insert(id, found);
        }
        Some(found)
    }
}

/// What is known of a channel's two sides.
#[derive(Debug, Clone, Copy)]
struct Sides {
    value_msat: u64,
    we_opened: bool,
    /// Our balance above our reserve (and, if we opened, above the anchors), or zero.
    outbound_msat: u64,
    our_reserve_msat: u64,
    /// The same of the other side.
    inbound_msat: u64,
    their_reserve_msat: u64,
    feerate_per_kw: u64,
    /// What our commitment transaction gives us, and what it leaves to the miners: its fee, dust, and an anchor of the
    /// other side if that has no output. In sat; only of a monitored channel.
    commitment: Option<(u64, u64)>,
}

impl Sides {
    /// What is not theirs, if there are no anchors. Exact while they are above their reserve.
    fn not_theirs(&self) -> u64 {
        self.value_msat.saturating_sub(self.inbound_msat.saturating_add(self.their_reserve_msat))
    }
    /// What is ours, but for an opener's anchors. Exact while we are above our reserve.
    fn above_and_reserve(&self) -> u64 {
        self.outbound_msat.saturating_add(self.our_reserve_msat)
    }
}

/// Whether the channel has anchors; right while nothing is in flight. `None`: there is no commitment to judge by.
fn has_anchors(s: &Sides) -> Option<bool> {
    let (claimable_sat, left_sat) = s.commitment?;
    if s.we_opened {
        if s.value_msat.saturating_sub(s.above_and_reserve()) < ANCHORS_MSAT {
            return Some(false); // with anchors the other side would owe us
        }
        // The other side then has an output (it holds 660 sat more), so nothing but the fee is left to the miners.
        let fee = |weight: u64| weight.saturating_mul(s.feerate_per_kw) / 1_000;
        return Some(left_sat >= (fee(COMMITMENT_WEIGHT) + fee(ANCHOR_COMMITMENT_WEIGHT)) / 2);
    }
    let without = s.not_theirs();
    Some(if s.outbound_msat > 0 {
        s.above_and_reserve() != without
    } else if claimable_sat > 0 {
        claimable_sat != without / 1_000
    } else {
        // Nothing claimable: we are below the dust limit, and that is far below two anchors.
        without >= ANCHORS_MSAT
    })
}

/// Our side of the channel, the reserve included. What is in flight from us is not ours. An unknown `anchors` counts
/// against us.
fn ours(s: &Sides, anchors: Option<bool>) -> u64 {
    match (s.we_opened, s.outbound_msat > 0) {
        (true, true) if anchors == Some(true) => s.above_and_reserve().saturating_add(ANCHORS_MSAT),
        (_, true) => s.above_and_reserve(),
        (true, false) => s.not_theirs(),
        (false, false) if anchors == Some(false) => s.not_theirs(),
        (false, false) => s.not_theirs().saturating_sub(ANCHORS_MSAT),
    }
}

pub(crate) fn channel(c: &ChannelDetails, balances: &BalanceDetails, anchors: &Anchors) -> Channel {
    let reserve_sat = c.unspendable_punishment_reserve.unwrap_or(0);
    let (commitment, at_rest) = commitment(&c.channel_id, balances);
    let sides = Sides {
        value_msat: c.channel_value_sats.saturating_mul(1_000),
        we_opened: c.is_outbound,
        outbound_msat: c.outbound_capacity_msat,
        our_reserve_msat: reserve_sat.saturating_mul(1_000),
        inbound_msat: c.inbound_capacity_msat,
        their_reserve_msat: c.counterparty_unspendable_punishment_reserve.saturating_mul(1_000),
        feerate_per_kw: u64::from(c.feerate_sat_per_1000_weight),
        commitment,
    };
    let id = channel_id(&c.channel_id);
    let if_usable = |msat: u64| Msat(if c.is_usable { msat } else { 0 });
    Channel {
        id,
        counterparty: node_key(&c.counterparty_node_id),
        capacity_sat: c.channel_value_sats,
        ours: Msat(ours(&sides, anchors.known(id, &sides, at_rest))),
        reserve_sat,
        payable: if_usable(c.outbound_capacity_msat),
        largest_payment: if_usable(c.next_outbound_htlc_limit_msat),
        receivable: if_usable(c.inbound_capacity_msat),
        we_opened: c.is_outbound,
        ready: c.is_channel_ready,
        usable: c.is_usable,
        confirmations: c.confirmations.unwrap_or(0),
    }
}

/// The channel's commitment as [`Sides`] has it, and whether it carries no HTLC.
fn commitment(id: &LdkId, balances: &BalanceDetails) -> (Option<(u64, u64)>, bool) {
    let (mut found, mut at_rest) = (None, true);
    for balance in &balances.lightning_balances {
        match balance {
            LightningBalance::ClaimableOnChannelClose {
                channel_id,
                amount_satoshis,
                transaction_fee_satoshis,
                outbound_payment_htlc_rounded_msat,
                outbound_forwarded_htlc_rounded_msat,
                inbound_claiming_htlc_rounded_msat,
                inbound_htlc_rounded_msat,
                ..
            } if channel_id == id => {
                found = Some((*amount_satoshis, *transaction_fee_satoshis));
                at_rest &= *outbound_payment_htlc_rounded_msat == 0
                    && *outbound_forwarded_htlc_rounded_msat == 0
                    && *inbound_claiming_htlc_rounded_msat == 0
                    && *inbound_htlc_rounded_msat == 0;
            }
            LightningBalance::MaybeTimeoutClaimableHTLC { channel_id, .. }
            | LightningBalance::MaybePreimageClaimableHTLC { channel_id, .. }
            | LightningBalance::ContentiousClaimable { channel_id, .. } => at_rest &= channel_id != id,
            LightningBalance::ClaimableOnChannelClose { .. }
            | LightningBalance::ClaimableAwaitingConfirmations { .. }
            | LightningBalance::CounterpartyRevokedOutputClaimable { .. } => {}
        }
    }
    (found, at_rest)
}

pub(crate) fn balance(channels: &[ChannelDetails], balances: &BalanceDetails, anchors: &Anchors) -> Balance {
    let mut total = Balance {
        onchain_confirmed_sat: balances.spendable_onchain_balance_sats,
        onchain_total_sat: balances.total_onchain_balance_sats,
        ..Balance::default()
    };
    for c in channels {
        let view = channel(c, balances, anchors);
        total.lightning_total = total.lightning_total.saturating_add(view.ours);
        total.payable = total.payable.saturating_add(view.payable);
        total.largest_payment = total.largest_payment.max(view.largest_payment);
        total.receivable = total.receivable.saturating_add(view.receivable);
    }
    for balance in &balances.lightning_balances {
        let (id, sat) = match balance {
            LightningBalance::ClaimableOnChannelClose {
                channel_id,
                amount_satoshis,
                outbound_payment_htlc_rounded_msat,
                ..
            } => {
                total.outbound_in_flight |= *outbound_payment_htlc_rounded_msat > 0;
                (channel_id, *amount_satoshis)
            }
            LightningBalance::ClaimableAwaitingConfirmations { channel_id, amount_satoshis, .. }
            | LightningBalance::ContentiousClaimable { channel_id, amount_satoshis, .. }
            | LightningBalance::CounterpartyRevokedOutputClaimable { channel_id, amount_satoshis, .. } => {
                (channel_id, *amount_satoshis)
            }
            LightningBalance::MaybeTimeoutClaimableHTLC { channel_id, outbound_payment, .. } => {
                total.outbound_in_flight |= *outbound_payment;
                (channel_id, 0)
            }
            LightningBalance::MaybePreimageClaimableHTLC { channel_id, .. } => (channel_id, 0),
        };
        if !channels.iter().any(|c| c.channel_id == *id) {
            total.closing_sat = total.closing_sat.saturating_add(sat);
        }
    }
    for sweep in &balances.pending_balances_from_channel_closures {
        total.closing_sat = total.closing_sat.saturating_add(match sweep {
            PendingSweepBalance::PendingBroadcast { amount_satoshis, .. }
            | PendingSweepBalance::BroadcastAwaitingConfirmation { amount_satoshis, .. } => *amount_satoshis,
            // On chain in an address of ours, and counted there.
            PendingSweepBalance::AwaitingThresholdConfirmations { .. } => 0,
        });
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both ends of a 100,000 sat channel, with figures made from the true balance as LDK makes them, give it back.
    #[test]
    fn both_sides_are_exact_everywhere() {
        const VALUE: u64 = 100_000_000;
        const RESERVE: u64 = 1_000_000;
        const DUST_SAT: u64 = 354;
        for (anchors, feerate) in [(false, 253), (true, 253), (false, 5_000), (true, 5_000)] {
            let anchors_msat = if anchors { ANCHORS_MSAT } else { 0 };
            let weight = if anchors { ANCHOR_COMMITMENT_WEIGHT } else { COMMITMENT_WEIGHT };
            let fee = weight * feerate / 1_000;
            let edges = [0, 1, 353_999, 354_000, 659_999, 660_000, 660_001, 999_999, RESERVE, RESERVE + 1, 1_700_000];
            for peer in edges.into_iter().chain([50_000_001, VALUE - 9_000_000, VALUE - 7_000_000]) {
                let opener = VALUE - peer;
                let opener_out = opener.saturating_sub(anchors_msat).saturating_sub(RESERVE);
                let peer_out = peer.saturating_sub(RESERVE);
                let output = |sat: u64| if sat < DUST_SAT { 0 } else { sat };
                let to_opener = output(((opener - anchors_msat) / 1_000).saturating_sub(fee));
                let to_peer = output(peer / 1_000);
                let anchor_outputs = match (anchors, to_peer) {
                    (false, _) => 0,
                    (true, 0) => 330,
                    (true, _) => 660,
                };
                let as_opener = Sides {
                    value_msat: VALUE,
                    we_opened: true,
                    outbound_msat: opener_out,
                    our_reserve_msat: RESERVE,
                    inbound_msat: peer_out,
                    their_reserve_msat: RESERVE,
                    feerate_per_kw: feerate,
                    commitment: Some((to_opener, VALUE / 1_000 - to_opener - to_peer - anchor_outputs)),
                };
                let got = ours(&as_opener, has_anchors(&as_opener));
                assert_eq!(got, opener, "opener, peer has {peer}, anchors {anchors}");
                let as_peer = Sides {
                    we_opened: false,
                    outbound_msat: peer_out,
                    inbound_msat: opener_out,
                    commitment: Some((to_peer, 0)),
                    ..as_opener
                };
                let got = ours(&as_peer, has_anchors(&as_peer));
                assert_eq!(got, peer, "peer has {peer}, anchors {anchors}");
            }
        }
    }
}
