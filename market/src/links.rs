//! What is known of the links between nodes: a function from two nodes to a figure, for whoever plans over several.
//!
//! Each node measures its own links and lists them. Both ends may tell of the same link, and either may flatter itself: the
//! longer time counts. What this node has measured itself counts like any other.

use satgrid_types::{NodeKey, VerifiedListing};
use std::collections::BTreeMap;

/// What a hop costs in a comparison where nobody has measured it, in microseconds: half a round trip in one city.
pub const HOP_US: u64 = 2_000;

/// Round trips, by the node that measured and the node at the other end.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Links(BTreeMap<(NodeKey, NodeKey), u64>);

/// The way from one node to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hop {
    pub from: NodeKey,
    pub to: NodeKey,
    /// As measured, there and back, in microseconds.
    pub rtt_us: Option<u64>,
}

impl Hop {
    /// One way, in microseconds.
    pub fn us(&self) -> u64 {
        self.rtt_us.map_or(HOP_US, |rtt| rtt.div_ceil(2))
    }
}

impl Links {
    /// What these listings tell of their nodes' links.
    pub fn listed<'a>(listings: impl IntoIterator<Item = &'a VerifiedListing>) -> Links {
        let mut links = Links::default();
        for listing in listings {
            for link in &listing.links {
                links.measured(listing.node_key, link.node, link.rtt_us.into());
            }
        }
        links
    }

    /// `by` has measured its link to a node; what it said before is forgotten.
    pub fn measured(&mut self, by: NodeKey, to: NodeKey, rtt_us: u64) {
        if by != to {
            self.0.insert((by, to), rtt_us);
        }
    }

    /// Everything that these links know and those do not, from `other`.
    pub fn join(mut self, other: &Links) -> Links {
        self.0.extend(&other.0);
        self
    }

    /// The round trip between two nodes, in microseconds: the longer of what the two say.
    pub fn rtt_us(&self, one: &NodeKey, other: &NodeKey) -> Option<u64> {
        if one == other {
            return Some(0);
        }
        let there = self.0.get(&(*one, *other));
        there.into_iter().chain(self.0.get(&(*other, *one))).copied().max()
    }

    pub fn hop(&self, from: &NodeKey, to: &NodeKey) -> Hop {
        Hop { from: *from, to: *to, rtt_us: self.rtt_us(from, to) }
    }

    /// What one node has measured, by the node at the other end.
    pub fn of(&self, by: &NodeKey) -> Vec<(NodeKey, u64)> {
        self.0.iter().filter(|((from, _), _)| from == by).map(|((_, to), rtt)| (*to, *rtt)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longer_of_two_figures_counts_and_none_is_a_guess() {
        let [a, b, c] = [1, 2, 3].map(|n| NodeKey([n; 32]));
        let mut links = Links::default();
        assert_eq!((links.rtt_us(&a, &b), links.hop(&a, &b).us()), (None, HOP_US));
        links.measured(a, b, 9_001);
        // The other end makes itself nearer than it is, then farther.
        links.measured(b, a, 1);
        assert_eq!((links.rtt_us(&a, &b), links.hop(&b, &a).us()), (Some(9_001), 4_501));
        links.measured(b, a, 20_000);
        assert_eq!(links.rtt_us(&a, &b), Some(20_000));
        links.measured(c, c, 5);
        assert_eq!((links.rtt_us(&c, &c), links.of(&c).len(), links.of(&a)), (Some(0), 0, vec![(b, 9_001)]));
        let mut own = Links::default();
        own.measured(b, a, 7);
        assert_eq!(links.join(&own).rtt_us(&a, &b), Some(9_001));
    }
}
