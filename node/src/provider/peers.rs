//! Who counts as one consumer where places are shared out.
//!
//! A consumer takes a fresh key for every session, and keys cost nothing: what tells one from another is where it connects
//! from. Nodes of this very machine are told apart by their keys, since they all come from one address.

use super::{Provider, sessions::Session};
use satgrid_pricing::cost_alone;
use satgrid_types::{Msat, NodeKey, RequestId, SessionId, UnixMs, decayed};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};

/// First windows that a peer may leave unsigned, at the price of the request that it asks for: twice the requests that it may
/// have open by default, since all of them break where its node does.
const MOST_LEFT: u64 = 32;
/// After this long half of it is forgotten.
const HALF_LIFE_MS: u64 = 60 * 60 * 1_000;
/// Peers of whom something is known; whoever left least makes room.
const MAX_LEAVERS: usize = 4_096;

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Peer {
    /// An IPv4 address, or the 64 bits of IPv6 that one subscriber has.
    Host(IpAddr),
    Key(NodeKey),
}

impl Peer {
    pub(super) fn of(host: Option<IpAddr>, key: NodeKey) -> Peer {
        match host.map(|host| host.to_canonical()) {
            Some(host) if host.is_loopback() => Peer::Key(key),
            Some(IpAddr::V6(host)) => {
                Peer::Host(IpAddr::V6(Ipv6Addr::from_bits(host.to_bits() & !u128::from(u64::MAX))))
            }
            Some(host @ IpAddr::V4(_)) => Peer::Host(host),
            None => Peer::Key(key),
        }
    }
}

/// What peers had computed for them and did not sign for. Each time it is a window at the most, which is what a provider risks;
/// without this a balance that is never touched would buy a window after the other.
#[derive(Debug, Default)]
pub(super) struct Leavers(BTreeMap<Peer, (Msat, UnixMs)>);

impl Leavers {
    fn left(&self, now: UnixMs, peer: &Peer) -> Msat {
        let Some((left, at)) = self.0.get(peer) else { return Msat::ZERO };
        Msat(decayed(left.0, now.since(*at), HALF_LIFE_MS))
    }

    fn more(&mut self, now: UnixMs, peer: Peer, unsigned: Msat) {
        let left = self.left(now, &peer).saturating_add(unsigned);
        self.0.insert(peer, (left, now));
        if self.0.len() > MAX_LEAVERS {
            let least = self.0.iter().min_by_key(|(_, (left, _))| *left).map(|(peer, _)| *peer);
            least.map(|peer| self.0.remove(&peer));
        }
    }

    /// It signed for so much.
    fn less(&mut self, now: UnixMs, peer: Peer, signed: Msat) {
        let left = self.left(now, &peer).saturating_sub(signed);
        match left.is_zero() {
            true => self.0.remove(&peer),
            false => self.0.insert(peer, (left, now)),
        };
    }
}

impl Provider {
    /// The peer of this session has left so much unsigned that another first window of this price is not risked.
    pub(super) fn peer_leaves(&self, id: SessionId, window: Msat) -> bool {
        let Some(session) = self.sessions.get(&id) else { return true };
        self.leavers.left(self.now, &session.peer).0 > window.0.saturating_mul(MOST_LEFT)
    }

    /// A request ends at its last acknowledgement: what was done beyond is on its peer's account.
    pub(super) fn note_unsigned(&mut self, id: SessionId, request: &RequestId) {
        let Some(session) = self.sessions.get(&id) else { return };
        let (Some(live), Some(state)) = (session.requests.get(request), session.state.request_state(request)) else {
            return;
        };
        let done = cost_alone(&live.done, state.rates()).unwrap_or(Msat::MAX);
        let unsigned = done.saturating_sub(state.acked_cost());
        if !unsigned.is_zero() {
            self.leavers.more(self.now, session.peer, unsigned);
        }
    }

    /// A receipt was signed by the peer of this session.
    pub(super) fn note_signed(&mut self, id: SessionId, cost: Msat) {
        if let Some(session) = self.sessions.get(&id) {
            self.leavers.less(self.now, session.peer, cost);
        }
    }

    /// The peer of this session has as many requests open, over all its sessions, as one may.
    pub(super) fn peer_is_full(&self, id: SessionId) -> bool {
        let Some(session) = self.sessions.get(&id) else { return true };
        let same = |other: &&Session| other.peer == session.peer || other.state.consumer() == session.state.consumer();
        let of_peer =
            self.live.iter().filter(|other| **other != id).filter_map(|id| self.sessions.get(id)).filter(same);
        let open = of_peer.fold(session.requests.len(), |sum, other| sum.saturating_add(other.requests.len()));
        open >= self.config.max_requests_per_peer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_unsigned_is_forgiven_by_what_is_paid_and_by_time() {
        let (mut leavers, now, peer) = (Leavers::default(), UnixMs(1_000_000), Peer::Key(NodeKey([1; 32])));
        let left = |leavers: &Leavers, after: u64| leavers.left(now.plus_ms(after), &peer).0;
        (0..10).for_each(|_| leavers.more(now, peer, Msat(100)));
        assert_eq!((left(&leavers, 0), left(&leavers, HALF_LIFE_MS / 2)), (1_000, 750));
        assert_eq!((left(&leavers, HALF_LIFE_MS), left(&leavers, 20 * HALF_LIFE_MS)), (500, 0));
        leavers.less(now, peer, Msat(300));
        assert_eq!(left(&leavers, 0), 700);
        leavers.less(now, peer, Msat(701));
        assert!(leavers.0.is_empty());
        leavers.more(now, peer, Msat(u64::MAX));
        leavers.more(now, peer, Msat(1));
        assert_eq!((left(&leavers, 0), left(&leavers, HALF_LIFE_MS)), (u64::MAX, u64::MAX / 2));
        assert!(left(&leavers, HALF_LIFE_MS - 1) > u64::MAX / 2);
        for n in 0..=u32::try_from(MAX_LEAVERS).unwrap() {
            leavers.more(now, Peer::Host(Ipv6Addr::from_bits(u128::from(n)).into()), Msat(u64::from(n) + 1));
        }
        assert_eq!((leavers.0.len(), left(&leavers, 0)), (MAX_LEAVERS, u64::MAX), "whoever left most stays");
    }

    #[test]
    fn one_subscriber_is_one_peer() {
        let of = |host: &str, key: u8| Peer::of(Some(host.parse().unwrap()), NodeKey([key; 32]));
        assert_eq!(of("192.0.2.1", 1), of("192.0.2.1", 2));
        assert_eq!(of("192.0.2.1", 1), of("::ffff:192.0.2.1", 2));
        assert_ne!(of("192.0.2.1", 1), of("192.0.2.2", 1));
        assert_eq!(of("2001:db8:1:2::1", 1), of("2001:db8:1:2:ffff::9", 2));
        assert_ne!(of("2001:db8:1:2::1", 1), of("2001:db8:1:3::1", 1));
        assert_ne!(of("127.0.0.1", 1), of("127.0.0.1", 2), "processes of this machine");
        assert_eq!(of("::1", 1), Peer::Key(NodeKey([1; 32])));
        assert_eq!(Peer::of(None, NodeKey([1; 32])), Peer::Key(NodeKey([1; 32])));
    }
}
