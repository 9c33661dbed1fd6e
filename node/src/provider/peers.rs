//! Who counts as one consumer where places are shared out.
//!
//! A consumer takes a fresh key for every session, and keys cost nothing: what tells one from another is where it connects
//! from. Nodes of this very machine are told apart by their keys, since they all come from one address.

use super::{Provider, sessions::Session};
use satgrid_types::{NodeKey, SessionId};
use std::net::{IpAddr, Ipv6Addr};

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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

impl Provider {
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
