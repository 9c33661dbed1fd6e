//! How far the nodes are that sell parts of the same models: this node connects to each, reads the round trip off QUIC, and
//! keeps the figure in its market view. Its listings tell it, plans reckon with it.
//!
//! A probe costs the other side a handshake, so each node is asked seldom, few at a time, and only those who list parts of a
//! model that this node sells or leads.

use super::market::Market;
use ed25519_dalek::SigningKey;
use satgrid_protocol_quic::{QuicEndpoint, hints};
use satgrid_types::{Listing, MAX_LINKS, MeasuredLink, NodeKey, VerifiedListing, node_key};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};
use tokio::{task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;

/// How often the book is looked at for nodes that were not measured.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// A figure is measured again after so long; one that could not be had is tried again sooner.
const FRESH: Duration = Duration::from_secs(10 * 60);
const TRY_AGAIN: Duration = Duration::from_secs(30);
/// How long a link is held for its round trips to be seen, and how long a probe may take in all.
const HELD: Duration = Duration::from_millis(1_200);
const GIVE_UP: Duration = Duration::from_secs(5);
/// Probes at once.
const AT_ONCE: usize = 8;
/// How often listings may change because of figures.
const TELL_EVERY: Duration = Duration::from_secs(3);
/// What a figure must have changed by to be told again: a quarter, and so much.
const NOISE_US: u64 = 1_000;

/// Whom to measure, and where the figures go.
pub(crate) struct Prober {
    pub market: Market,
    pub endpoint: QuicEndpoint,
    pub key: Arc<SigningKey>,
    pub shutdown: CancellationToken,
}

impl Prober {
    /// Measures whoever is listed, for as long as the node runs.
    pub(crate) async fn run(self) {
        let ours = node_key(&self.key);
        let mut next: BTreeMap<NodeKey, Instant> = BTreeMap::new();
        let mut probes = JoinSet::new();
        loop {
            let mut listed: BTreeMap<NodeKey, Arc<VerifiedListing>> = BTreeMap::new();
            for listing in self.market.watched().iter().flat_map(|root| self.market.parts_of(root)) {
                listed.insert(listing.node_key, listing);
            }
            listed.remove(&ours);
            // Whoever is gone is measured anew when it is back.
            next.retain(|node, _| listed.contains_key(node));
            for (node, listing) in listed.into_iter().take(MAX_LINKS) {
                let due = next.get(&node).is_none_or(|due| *due <= Instant::now());
                if due && probes.len() < AT_ONCE {
                    next.insert(node, Instant::now() + TRY_AGAIN);
                    probes.spawn(probe(self.endpoint.clone(), self.key.clone(), listing));
                }
            }
            tokio::select! {
                () = self.shutdown.cancelled() => return,
                Some(Ok((node, found))) = probes.join_next() => match found {
                    Some(rtt) => {
                        tracing::debug!(node = %node.short(), rtt_us = rtt.as_micros(), "a link was measured");
                        self.market.measured(ours, node, rtt);
                        next.insert(node, Instant::now() + FRESH);
                    }
                    None => tracing::debug!(node = %node.short(), "a link could not be measured"),
                },
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
        }
    }
}

/// The least round trip to the node that lists this; `None` where it cannot be reached.
async fn probe(
    endpoint: QuicEndpoint,
    key: Arc<SigningKey>,
    listing: Arc<VerifiedListing>,
) -> (NodeKey, Option<Duration>) {
    let node = listing.node_key;
    let hints = hints(&listing.addresses);
    let measured = async {
        let link = endpoint.connect(&hints, node, &key).await.ok()?;
        // Keep-alives go to and fro meanwhile.
        tokio::time::sleep(HELD).await;
        let path = link.path();
        Some(path.min_rtt.min(path.rtt))
    };
    (node, tokio::time::timeout(GIVE_UP, measured).await.ok().flatten())
}

/// What a node tells of its links beside what it sells of those models.
pub(crate) struct Told {
    market: Market,
    ours: NodeKey,
    known: Vec<MeasuredLink>,
    looked: Option<Instant>,
}

impl Told {
    pub(crate) fn new(market: Market, ours: NodeKey) -> Told {
        Told { market, ours, known: Vec::new(), looked: None }
    }

    /// Whether something was measured that is worth a listing; listings made from here on say it.
    pub(crate) fn has_news(&mut self) -> bool {
        if self.market.watched().is_empty() || self.looked.is_some_and(|looked| looked.elapsed() < TELL_EVERY) {
            return false;
        }
        self.looked = Some(Instant::now());
        let watched = self.market.watched();
        let listed =
            watched.iter().flat_map(|root| self.market.parts_of(root)).map(|listing| listing.node_key).collect();
        let now = worth_telling(self.market.own_links().of(&self.ours), &listed);
        let news = is_news(&self.known, &now);
        if news {
            self.known = now;
        }
        news
    }

    /// The listing, with the links where it is of such a model.
    pub(crate) fn with_links(&self, listing: &Listing) -> Listing {
        let links = if self.market.watched().contains(&listing.model_root) { self.known.clone() } else { Vec::new() };
        Listing { links, ..listing.clone() }
    }
}

/// Of all that was ever measured, the links to whoever lists something now: the shortest, where there are more than a listing holds.
fn worth_telling(measured: Vec<(NodeKey, u64)>, listed: &BTreeSet<NodeKey>) -> Vec<MeasuredLink> {
    let mut links: Vec<(u64, NodeKey)> =
        measured.into_iter().filter(|(node, _)| listed.contains(node)).map(|(node, rtt)| (rtt, node)).collect();
    links.sort_unstable();
    links.truncate(MAX_LINKS);
    links.sort_unstable_by_key(|(_, node)| *node);
    let link = |(rtt, node)| MeasuredLink { node, rtt_us: u32::try_from(rtt).unwrap_or(u32::MAX) };
    links.into_iter().map(link).collect()
}

/// Whether what is measured now is news to those who know what was told before.
fn is_news(told: &[MeasuredLink], now: &[MeasuredLink]) -> bool {
    let known: BTreeMap<NodeKey, u64> = told.iter().map(|link| (link.node, link.rtt_us.into())).collect();
    now.iter().any(|link| {
        let rtt = u64::from(link.rtt_us);
        known.get(&link.node).is_none_or(|known| known.abs_diff(rtt) > NOISE_US.max(known / 4))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_left_the_market_takes_no_place_among_the_links() {
        let node = |n: u8| NodeKey([n; 32]);
        let measured = (0..=200).map(|n| (node(n), 1_000 - u64::from(n))).collect::<Vec<_>>();
        // The lowest keys are gone.
        let listed: BTreeSet<NodeKey> = (100..=200).map(node).collect();
        let told = worth_telling(measured.clone(), &listed);
        let nearest: Vec<NodeKey> = (201 - 64..=200).map(node).collect();
        assert_eq!((told.len(), told.iter().map(|link| link.node).collect::<Vec<_>>()), (MAX_LINKS, nearest));
        assert_eq!(worth_telling(measured, &BTreeSet::new()), vec![]);
    }

    #[test]
    fn noise_is_no_news() {
        let link = |node: u8, rtt_us: u32| MeasuredLink { node: NodeKey([node; 32]), rtt_us };
        for (told, now, news) in [
            (vec![], vec![], false),
            (vec![], vec![link(1, 5)], true),
            (vec![link(1, 20_000)], vec![link(1, 24_000)], false),
            (vec![link(1, 20_000)], vec![link(1, 26_000)], true),
            (vec![link(1, 300)], vec![link(1, 1_200)], false),
            (vec![link(1, 300), link(2, 9)], vec![link(1, 300)], false),
        ] {
            assert_eq!(is_news(&told, &now), news, "{told:?} and {now:?}");
        }
    }
}
