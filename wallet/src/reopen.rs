//! Which channels to open again after a force-close, and when.
//!
//! A force-close is nobody's wish: a crash, a peer that lost its data, an HTLC that ran out. Whoever opened the channel
//! opens it again; a cooperative close is somebody's wish and is left alone.
//!
//! | state of a peer | entered when | then |
//! |---|---|---|
//! | nothing | | |
//! | wanted | a channel that we opened to it was force-closed | an open is due as soon as the coins are there, and again every [`RETRY_MS`] |
//! | nothing | there is a channel with it again, by whomever | |
//!
//! The size is what was there, or what the coins above fee and anchor reserve allow, if that is [`LEAST_SAT`] at least.

use crate::{
    embedded::ANCHOR_RESERVE_SAT,
    port::{Balance, Channel},
};
use satgrid_types::{LightningKey, UnixMs};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Between two tries to open to one peer: it may be away, or the coins may still come back from the close.
pub const RETRY_MS: u64 = 30_000;
/// A smaller channel is not worth its fee.
pub const LEAST_SAT: u64 = 20_000;
/// Left for the funding transaction's fee.
const FEE_ALLOWANCE_SAT: u64 = 5_000;

/// A channel as it was last seen open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Known {
    pub counterparty: LightningKey,
    pub capacity_sat: u64,
    pub we_opened: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Wanted {
    capacity_sat: u64,
    next_try: UnixMs,
}

/// See the module's table. It is kept on disk by whoever drives it: a close is often found at the next start.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reopen {
    known: BTreeMap<String, Known>,
    wanted: BTreeMap<LightningKey, Wanted>,
}

/// An open that is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Due {
    pub node: LightningKey,
    pub capacity_sat: u64,
}

impl Reopen {
    /// Takes in the channels that are open. Returns whether anything changed.
    pub fn saw(&mut self, channels: &[Channel]) -> bool {
        let before = self.clone();
        for c in channels {
            let known = Known { counterparty: c.counterparty, capacity_sat: c.capacity_sat, we_opened: c.we_opened };
            self.known.insert(c.id.to_string(), known);
            self.wanted.remove(&c.counterparty);
        }
        *self != before
    }

    /// A channel closed.
    pub fn closed(&mut self, now: UnixMs, channel: &str, forced: bool) {
        let Some(known) = self.known.remove(channel) else { return };
        if forced && known.we_opened {
            self.wanted.insert(known.counterparty, Wanted { capacity_sat: known.capacity_sat, next_try: now });
        }
    }

    /// The next open that is due. It counts as tried.
    pub fn due(&mut self, now: UnixMs, balance: &Balance, channels: &[Channel]) -> Option<Due> {
        self.wanted.retain(|peer, _| !channels.iter().any(|c| c.counterparty == *peer));
        let free = balance.onchain_confirmed_sat.saturating_sub(ANCHOR_RESERVE_SAT + FEE_ALLOWANCE_SAT);
        // One that is further away than any was ever put is of a clock that was set back since.
        let is_due = |next: UnixMs| next <= now || next.since(now) > RETRY_MS;
        let (node, wanted) = self.wanted.iter_mut().find(|(_, wanted)| is_due(wanted.next_try))?;
        wanted.next_try = now.plus_ms(RETRY_MS);
        let capacity_sat = wanted.capacity_sat.min(free);
        (capacity_sat >= LEAST_SAT).then_some(Due { node: *node, capacity_sat })
    }

    /// Peers to whom a channel is wanted.
    pub fn wanted(&self) -> usize {
        self.wanted.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::port::ChannelId;
    use satgrid_types::Msat;

    fn channel(id: u8, peer: u8, we_opened: bool) -> Channel {
        Channel {
            id: ChannelId([id; 32]),
            counterparty: LightningKey([peer; 33]),
            capacity_sat: 100_000,
            ours: Msat(0),
            reserve_sat: 1_000,
            payable: Msat(0),
            largest_payment: Msat(0),
            receivable: Msat(0),
            we_opened,
            ready: true,
            usable: true,
            confirmations: 6,
        }
    }
    fn coins(sat: u64) -> Balance {
        Balance { onchain_confirmed_sat: sat, ..Balance::default() }
    }
    fn after(forced: bool, we_opened: bool) -> Reopen {
        let mut reopen = Reopen::default();
        let open = channel(1, 2, we_opened);
        assert!(reopen.saw(core::slice::from_ref(&open)));
        assert!(!reopen.saw(core::slice::from_ref(&open)));
        reopen.closed(UnixMs(1_000), &open.id.to_string(), forced);
        reopen
    }

    #[test]
    fn only_our_own_forced_closes_are_mended() {
        let check = |forced, we_opened, expect| {
            assert_eq!(after(forced, we_opened).due(UnixMs(1_000), &coins(1_000_000), &[]).is_some(), expect);
        };
        check(true, true, true);
        check(true, false, false);
        check(false, true, false);
    }

    #[test]
    fn it_waits_for_coins_and_leaves_the_reserve() {
        let mut reopen = after(true, true);
        let mut now = UnixMs(1_000);
        let mut due = |sat| {
            let due = reopen.due(now, &coins(sat), &[]).map(|due| due.capacity_sat);
            now = now.plus_ms(RETRY_MS);
            due
        };
        assert_eq!(due(0), None);
        assert_eq!(due(49_999), None);
        assert_eq!(due(50_000), Some(20_000));
        assert_eq!(due(5_000_000), Some(100_000));
    }

    #[test]
    fn a_clock_that_was_a_day_ahead_does_not_put_it_off_by_a_day() {
        const DAY_MS: u64 = 86_400_000;
        let mut reopen = after(true, true);
        assert!(reopen.due(UnixMs(DAY_MS), &coins(1_000_000), &[]).is_some());
        assert!(reopen.due(UnixMs(DAY_MS + 1), &coins(1_000_000), &[]).is_none());
        assert!(reopen.due(UnixMs(2_000), &coins(1_000_000), &[]).is_some());
        assert!(reopen.due(UnixMs(2_001), &coins(1_000_000), &[]).is_none());
    }

    #[test]
    fn it_tries_again_until_there_is_a_channel() {
        let mut reopen = after(true, true);
        assert!(reopen.due(UnixMs(1_000), &coins(1_000_000), &[]).is_some());
        assert!(reopen.due(UnixMs(1_001), &coins(1_000_000), &[]).is_none());
        assert!(reopen.due(UnixMs(1_000 + RETRY_MS), &coins(1_000_000), &[]).is_some());
        // Survives a restart, as text.
        let kept: Reopen = reopen.clone();
        assert_eq!(kept.wanted(), 1);
        assert!(reopen.due(UnixMs(9_000_000), &coins(1_000_000), &[channel(7, 2, false)]).is_none());
        assert_eq!(reopen.wanted(), 0);
    }
}
