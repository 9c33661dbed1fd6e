//! Connections by where they come from: while there are plenty, anybody may have many; where they grow scarce, nobody more than
//! a share.
//!
//! | connections in all | one address may have |
//! |---|---|
//! | up to half of the most | any number |
//! | more | a quarter of the most |
//!
//! This machine and trusted proxies are no address: many stand behind them.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, PoisonError},
};

#[derive(Clone)]
pub(crate) struct Crowd {
    held: Arc<Mutex<BTreeMap<IpAddr, usize>>>,
    most: usize,
    proxies: Arc<[IpAddr]>,
}

/// One connection's place; given back when it is dropped.
pub(crate) struct Place {
    of: Option<(Crowd, IpAddr)>,
}

impl Crowd {
    pub(crate) fn new(most: usize, proxies: &[IpAddr]) -> Crowd {
        Crowd { held: Arc::default(), most, proxies: proxies.iter().map(IpAddr::to_canonical).collect() }
    }

    /// A place for a connection from there, with so many open in all; none where it has its share.
    pub(crate) fn enter(&self, peer: IpAddr, open: usize) -> Option<Place> {
        let ip = peer.to_canonical();
        if ip.is_loopback() || self.proxies.contains(&ip) {
            return Some(Place { of: None });
        }
        let whose = customer(ip);
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let count = held.entry(whose).or_default();
        if open > self.most / 2 && *count >= (self.most / 4).max(1) {
            return None;
        }
        *count = count.saturating_add(1);
        Some(Place { of: Some((self.clone(), whose)) })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some((crowd, whose)) = self.of.take() else { return };
        let mut held = crowd.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = held.get_mut(&whose) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                held.remove(&whose);
            }
        }
    }
}

/// Whose an address is: one customer has a whole /64.
pub(crate) fn customer(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(ip) => {
            let [a, b, c, d, ..] = ip.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
        ip @ IpAddr::V4(_) => ip,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn one_address_has_a_share_where_connections_are_scarce() {
        let crowd = Crowd::new(16, &[ip("203.0.113.9")]);
        let many: Vec<Place> = (0..8).filter_map(|open| crowd.enter(ip("198.51.100.1"), open)).collect();
        assert_eq!(many.len(), 8, "there are plenty");
        assert!(crowd.enter(ip("198.51.100.1"), 9).is_none(), "it has more than its share");
        assert!(crowd.enter(ip("::ffff:198.51.100.1"), 9).is_none(), "under its other name too");
        let others: Vec<Place> = (9..13).filter_map(|open| crowd.enter(ip("2001:db8::1"), open)).collect();
        assert_eq!(others.len(), 4, "another has its own");
        assert!(crowd.enter(ip("2001:db8::ffff:1"), 13).is_none(), "a /64 is one customer");
        for everybody in ["127.0.0.1", "::1", "203.0.113.9"] {
            assert!((0..20).all(|_| crowd.enter(ip(everybody), 15).is_some()), "{everybody}");
        }
        drop(many);
        assert!(crowd.enter(ip("198.51.100.1"), 9).is_some(), "what is closed is given back");
        drop(others);
        assert!(crowd.held.lock().unwrap().is_empty(), "nobody is remembered");
    }
}
