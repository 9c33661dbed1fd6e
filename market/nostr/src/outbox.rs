//! What this node has published, which version of it, and which relay has which version.
//!
//! | an item is | until | then |
//! |---|---|---|
//! | current | its refresh time | signed anew, with a later `created_at`; every relay lacks it again |
//! | withdrawn: a listing that says it has no slot | its expiry | forgotten |
//!
//! Nothing here survives a restart, and nothing has to: a new version replaces whatever relays still have.
//! Time is an argument.

use std::collections::BTreeMap;
use std::time::Duration;

use satgrid_types::{
    CHECKPOINT_KIND, LISTING_KIND, Listing, ListingId, ListingRefusal, MAX_CLOCK_SKEW_S, NostrEvent, UnixMs,
    verify_listing,
};
use secp256k1::Keypair;
use thiserror::Error;

use crate::schedule::{Jitter, clamp_lifetime};

/// Listings and checkpoints that one node may publish.
const MAX_ITEMS: usize = 256;

/// Why a set of listings was not published. None of it was then.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum OfferError {
    #[error("{given} listings, at most {MAX_ITEMS}")]
    TooMany { given: usize },
    #[error("two listings have the same `d`: {d:?}")]
    SameD { d: String },
    /// Readers would refuse it, so publishing it is a mistake of ours.
    #[error("the listing {d:?} would be refused by its readers: {refusal}")]
    Unverifiable { d: String, refusal: ListingRefusal },
}

/// Kind and `d`: what an addressable event of ours is replaced by.
type Place = (u16, String);

enum Body {
    Listing(Box<Listing>),
    Withdrawn,
    /// Kept until it is replaced; has no expiry.
    Checkpoint,
}

struct Item {
    body: Body,
    event: NostrEvent,
    /// When a current listing is signed anew, or a withdrawn one forgotten.
    due: UnixMs,
    /// Which connection to which relay took this version.
    taken: BTreeMap<String, usize>,
}

pub(crate) struct Outbox {
    keys: Keypair,
    lifetime: Duration,
    jitter: Jitter,
    items: BTreeMap<Place, Item>,
}

impl Outbox {
    pub(crate) fn new(keys: Keypair, lifetime: Duration, seed: u64) -> Outbox {
        Outbox { keys, lifetime: clamp_lifetime(lifetime), jitter: Jitter::new(seed), items: BTreeMap::new() }
    }

    /// Makes these the node's listings. Those that were there before and are not now, are withdrawn.
    pub(crate) fn offer(&mut self, now: UnixMs, listings: Vec<Listing>) -> Result<(), OfferError> {
        if listings.len() > MAX_ITEMS {
            return Err(OfferError::TooMany { given: listings.len() });
        }
        let mut signed = BTreeMap::new();
        for listing in listings {
            let place = (LISTING_KIND, listing.d());
            let item = self.sign(now, &place, listing)?;
            if signed.contains_key(&place) {
                return Err(OfferError::SameD { d: place.1 });
            }
            signed.insert(place, item);
        }
        let gone: Vec<Place> = self.items.keys().filter(|place| !signed.contains_key(*place)).cloned().collect();
        for place in gone {
            self.withdraw(now, &place);
        }
        self.items.extend(signed);
        Ok(())
    }

    /// Publishes a signed tree head under a log's name.
    pub(crate) fn checkpoint(&mut self, now: UnixMs, log: &str, content: String) {
        let place = (CHECKPOINT_KIND, log.to_owned());
        let tags = vec![vec!["d".to_owned(), log.to_owned()]];
        let created_at = self.created_at(now, &place);
        let event = NostrEvent::sign(&self.keys, created_at, CHECKPOINT_KIND, tags, content, &[0; 32]);
        if self.items.len() < MAX_ITEMS || self.items.contains_key(&place) {
            let item = Item { body: Body::Checkpoint, event, due: UnixMs(u64::MAX), taken: BTreeMap::new() };
            self.items.insert(place, item);
        }
    }

    /// Withdraws every listing.
    pub(crate) fn withdraw_all(&mut self, now: UnixMs) {
        let places: Vec<Place> = self.items.keys().cloned().collect();
        for place in places {
            self.withdraw(now, &place);
        }
    }

    /// Signs anew what is due, forgets what is withdrawn and expired.
    pub(crate) fn refresh(&mut self, now: UnixMs) {
        // What is due later than can be was made by a clock that was ahead, and so was what no reader takes yet.
        let latest = now.plus_ms(u64::try_from(self.lifetime.as_millis()).unwrap_or(u64::MAX));
        let readable = now.as_secs().saturating_add(MAX_CLOCK_SKEW_S);
        let ahead = |item: &Item| match item.body {
            Body::Listing(_) => item.due > latest || item.event.created_at > readable,
            Body::Withdrawn => item.due > latest,
            Body::Checkpoint => false,
        };
        let due = self.items.iter().filter(|(_, item)| item.due <= now || ahead(item));
        let due: Vec<Place> = due.map(|(place, _)| place.clone()).collect();
        for place in due {
            let Some(item) = self.items.get(&place) else { continue };
            let Body::Listing(listing) = &item.body else {
                self.items.remove(&place);
                continue;
            };
            match self.sign(now, &place, *listing.clone()) {
                Ok(item) => {
                    self.items.insert(place, item);
                }
                // It verified when it was offered, so this is a clock that jumped; the next tick tries again.
                Err(error) => tracing::error!(%error, "a listing was not refreshed"),
            }
        }
    }

    /// The events of the listings that are offered now.
    pub(crate) fn offered(&self) -> impl Iterator<Item = &NostrEvent> {
        self.items.values().filter(|item| matches!(item.body, Body::Listing(_))).map(|item| &item.event)
    }

    /// What this connection to this relay has not taken yet.
    pub(crate) fn lacking(&self, relay: &str, connection: usize) -> Vec<NostrEvent> {
        let lacks = |item: &&Item| item.taken.get(relay) != Some(&connection);
        self.items.values().filter(lacks).map(|item| item.event.clone()).collect()
    }

    /// A relay took this version.
    pub(crate) fn taken(&mut self, relay: &str, connection: usize, id: &ListingId) {
        for item in self.items.values_mut().filter(|item| item.event.id == *id) {
            item.taken.insert(relay.to_owned(), connection);
        }
    }

    fn withdraw(&mut self, now: UnixMs, place: &Place) {
        let Some(Item { body: Body::Listing(listing), .. }) = self.items.get(place) else { return };
        let closed = Listing { slots: 0, ..*listing.clone() };
        match self.sign(now, place, closed) {
            Ok(mut item) => {
                item.body = Body::Withdrawn;
                item.due = now.plus_ms(u64::try_from(self.lifetime.as_millis()).unwrap_or(u64::MAX));
                self.items.insert(place.clone(), item);
            }
            Err(error) => tracing::error!(%error, "a listing was not withdrawn; it expires by itself"),
        }
    }

    fn sign(&mut self, now: UnixMs, place: &Place, mut listing: Listing) -> Result<Item, OfferError> {
        let created_at = self.created_at(now, place);
        listing.expires_at = created_at.saturating_add(self.lifetime.as_secs());
        // Without auxiliary randomness BIP-340 signatures are deterministic, and still safe.
        let event = listing.to_event(&self.keys, created_at, &[0; 32]);
        verify_listing(event.clone(), now)
            .map_err(|refusal| OfferError::Unverifiable { d: place.1.clone(), refusal })?;
        let due = self.jitter.refresh_at(now, self.lifetime);
        Ok(Item { body: Body::Listing(Box::new(listing)), event, due, taken: BTreeMap::new() })
    }

    /// Later than the version before, even within one second: readers keep the newest. One from the future is taken back, and
    /// no measure.
    fn created_at(&self, now: UnixMs, place: &Place) -> u64 {
        let latest = now.as_secs().saturating_add(MAX_CLOCK_SKEW_S);
        let before = self.items.get(place).map(|item| item.event.created_at).filter(|at| *at <= latest);
        now.as_secs().max(before.map_or(0, |before| before.saturating_add(1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::{listing, nostr_keys};

    const NOW: UnixMs = UnixMs(1_700_000_000_000);
    const LIFE: Duration = Duration::from_secs(1_800);

    fn outbox() -> Outbox {
        Outbox::new(nostr_keys(1), LIFE, 7)
    }

    fn only(outbox: &Outbox) -> NostrEvent {
        let all = outbox.lacking("r", 1);
        assert_eq!(all.len(), 1);
        all[0].clone()
    }

    #[test]
    fn a_clock_that_was_a_day_ahead_and_is_set_right_dates_nothing_ahead() {
        let mut outbox = outbox();
        outbox.offer(NOW.plus_ms(86_400_000), vec![listing(1, 4)]).unwrap();
        outbox.refresh(NOW);
        assert_eq!(only(&outbox).created_at, NOW.as_secs());
        let id = only(&outbox).id;
        outbox.refresh(NOW.plus_ms(1_000));
        assert_eq!(only(&outbox).id, id, "once");
    }

    #[test]
    fn a_clock_that_was_minutes_ahead_hides_no_listing_until_its_refresh() {
        let mut outbox = outbox();
        outbox.offer(NOW.plus_ms(400_000), vec![listing(1, 4)]).unwrap();
        let ahead = only(&outbox);
        assert!(verify_listing(ahead.clone(), NOW).is_err(), "no reader takes it");
        outbox.refresh(NOW);
        assert_eq!(only(&outbox).created_at, NOW.as_secs());
        // Readers allow a little.
        let mut outbox = self::outbox();
        outbox.offer(NOW.plus_ms(200_000), vec![listing(1, 4)]).unwrap();
        let kept = only(&outbox).id;
        outbox.refresh(NOW);
        assert_eq!(only(&outbox).id, kept);
    }

    #[test]
    fn a_listing_is_signed_with_an_expiry_and_refreshed_at_half_life() {
        let mut outbox = outbox();
        outbox.offer(NOW, vec![listing(1, 4)]).unwrap();
        let first = only(&outbox);
        assert_eq!(first.only_tag("expiration"), Some("1700001800"));
        outbox.taken("r", 1, &first.id);
        assert!(outbox.lacking("r", 1).is_empty());
        assert_eq!(outbox.lacking("r", 2).len(), 1, "a relay that came back may have forgotten");
        assert_eq!(outbox.lacking("other", 1).len(), 1);

        outbox.refresh(NOW.plus_ms(700_000));
        assert!(outbox.lacking("r", 1).is_empty(), "not yet");
        let later = NOW.plus_ms(1_100_000);
        outbox.refresh(later);
        let second = only(&outbox);
        assert_eq!(second.created_at, later.as_secs());
        assert!(verify_listing(second, later).is_ok());
        outbox.taken("r", 1, &first.id);
        assert_eq!(outbox.lacking("r", 1).len(), 1, "a late answer about the old version settles nothing");
    }

    #[test]
    fn a_changed_price_is_newer_even_in_the_same_second() {
        let mut outbox = outbox();
        outbox.offer(NOW, vec![listing(1, 4)]).unwrap();
        let first = only(&outbox);
        outbox.offer(NOW, vec![listing(1, 9)]).unwrap();
        assert_eq!(only(&outbox).created_at, first.created_at + 1);
    }

    #[test]
    fn what_is_no_longer_offered_is_withdrawn_and_then_forgotten() {
        let mut outbox = outbox();
        outbox.offer(NOW, vec![listing(1, 4)]).unwrap();
        outbox.offer(NOW.plus_ms(5_000), vec![]).unwrap();
        let withdrawn = verify_listing(only(&outbox), NOW.plus_ms(5_000)).unwrap();
        assert_eq!(withdrawn.slots, 0);
        outbox.refresh(NOW.plus_ms(5_000 + 1_799_000));
        assert_eq!(outbox.lacking("r", 1).len(), 1);
        outbox.refresh(NOW.plus_ms(5_000 + 1_800_000));
        assert!(outbox.lacking("r", 1).is_empty());
    }

    #[test]
    fn a_listing_that_readers_would_refuse_is_our_mistake() {
        let mut outbox = outbox();
        outbox.offer(NOW, vec![listing(1, 4)]).unwrap();
        let mut unbound = listing(2, 4);
        unbound.bindings.lightning = None;
        let refused = outbox.offer(NOW, vec![unbound]).unwrap_err();
        assert!(matches!(refused, OfferError::Unverifiable { .. }), "{refused}");
        assert!(matches!(outbox.offer(NOW, vec![listing(1, 4), listing(1, 5)]), Err(OfferError::SameD { .. })));
        assert_eq!(verify_listing(only(&outbox), NOW).unwrap().slots, 4, "the old one stands");
    }

    #[test]
    fn a_checkpoint_stays_until_it_is_replaced() {
        let mut outbox = outbox();
        outbox.checkpoint(NOW, "log", "first".into());
        outbox.checkpoint(NOW, "log", "second".into());
        outbox.offer(NOW, vec![]).unwrap();
        outbox.refresh(UnixMs(u64::MAX - 1));
        let event = only(&outbox);
        assert_eq!((event.kind, event.content.as_str()), (CHECKPOINT_KIND, "second"));
        assert_eq!(event.verify(), Ok(()));
        assert_eq!(event.created_at, NOW.as_secs() + 1);
    }
}
