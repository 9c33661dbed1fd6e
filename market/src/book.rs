//! The verified listings that this node knows.
//!
//! One place per (Nostr key, `d`); the newest event holds it: later `created_at`, then the lower id, as NIP-01 has it.
//! Two limits bound memory, one per provider and one over all; beyond a limit the oldest listing goes. Both rules look
//! at the listings alone, so **the same listings give the same book in whatever order relays deliver them**.
//!
//! A listing by a key that was given up ([`Lineage`]) is refused, whatever it says.
//!
//! Expiry is enforced here at every reading. An expired listing stays in its place, invisible, until no older version of
//! it can be live either ([`MAX_LIFETIME_S`] after it was made): so a relay cannot bring back a price by replaying it.

use core::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use satgrid_types::{ListingId, MAX_LIFETIME_S, ModelRoot, NodeKey, NostrKey, UnixMs, VerifiedListing};
use thiserror::Error;

use crate::lineage::{LastWord, Lineage, LineageRefusal};

/// Bounds of a book.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BookLimits {
    pub per_provider: usize,
    pub total: usize,
}

impl Default for BookLimits {
    fn default() -> Self {
        BookLimits { per_provider: 256, total: 100_000 }
    }
}

/// What a listing did to the book.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Applied {
    New,
    Replaced { older: ListingId },
}

/// Why a verified listing is not in the book. None of these is a crime: relays repeat and reorder.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum BookRefusal {
    #[error("this very event is in the book")]
    Duplicate,
    #[error("superseded by {newer}")]
    Superseded { newer: ListingId },
    #[error("expired at {expires_at}")]
    Expired { expires_at: u64 },
    #[error("its provider has {limit} newer listings, the most that one may have")]
    ProviderFull { limit: usize },
    #[error("the book is full of newer listings ({limit})")]
    BookFull { limit: usize },
    #[error("its key was {fate}")]
    GivenUp { fate: String },
}

impl BookRefusal {
    /// A stable word for counters.
    pub const fn reason(&self) -> &'static str {
        match self {
            BookRefusal::Duplicate => "duplicate",
            BookRefusal::Superseded { .. } => "superseded",
            BookRefusal::Expired { .. } => "expired",
            BookRefusal::ProviderFull { .. } => "provider_full",
            BookRefusal::BookFull { .. } => "book_full",
            BookRefusal::GivenUp { .. } => "given_up",
        }
    }
}

/// Sorts older listings first; among those of one second, the higher id counts as older.
type Age = (u64, Reverse<ListingId>);

/// The listings that this node knows.
#[derive(Debug, Clone, Default)]
pub struct Book {
    limits: BookLimits,
    listings: BTreeMap<ListingId, Arc<VerifiedListing>>,
    places: BTreeMap<(NostrKey, String), ListingId>,
    by_root: BTreeMap<ModelRoot, BTreeSet<ListingId>>,
    by_name: BTreeMap<String, BTreeSet<ListingId>>,
    by_node: BTreeMap<NodeKey, BTreeSet<ListingId>>,
    by_age: BTreeSet<Age>,
    by_provider: BTreeMap<NostrKey, BTreeSet<Age>>,
    refused: BTreeMap<&'static str, u64>,
    lineage: Lineage,
}

impl Book {
    pub fn new(limits: BookLimits) -> Book {
        Book { limits, ..Book::default() }
    }

    /// Listings held, the expired ones that only guard their place included.
    pub fn len(&self) -> usize {
        self.listings.len()
    }

    pub fn is_empty(&self) -> bool {
        self.listings.is_empty()
    }

    /// A listing by the id of its event, live or not: quotes refer to it.
    pub fn get(&self, id: &ListingId) -> Option<&Arc<VerifiedListing>> {
        self.listings.get(id)
    }

    /// Every live listing, by id.
    pub fn live(&self, now: UnixMs) -> impl Iterator<Item = &Arc<VerifiedListing>> {
        self.listings.values().filter(move |listing| listing.is_live(now))
    }

    /// Listings of one model, live or not, by id.
    pub fn with_root(&self, root: &ModelRoot) -> impl Iterator<Item = &Arc<VerifiedListing>> {
        self.by_root.get(root).into_iter().flatten().filter_map(|id| self.listings.get(id))
    }

    /// Listings that claim this name (case aside), live or not, by id.
    pub fn claiming(&self, name: &str) -> impl Iterator<Item = &Arc<VerifiedListing>> {
        self.by_name.get(&name.to_lowercase()).into_iter().flatten().filter_map(|id| self.listings.get(id))
    }

    /// How many events were refused, by reason: this book's own and those that [`Book::count_refusal`] was told of.
    pub fn refusals(&self) -> &BTreeMap<&'static str, u64> {
        &self.refused
    }

    /// Which keys were given up, and for whom.
    pub fn lineage(&self) -> &Lineage {
        &self.lineage
    }

    /// A key was given up: its listings go, now and whenever one comes again. Returns how many went.
    pub fn give_up(&mut self, word: LastWord, dealt_with: bool) -> Result<usize, LineageRefusal> {
        let old = word.said.old;
        self.lineage.apply(word, dealt_with)?;
        let its = self.by_node.get(&old).cloned().unwrap_or_default();
        its.iter().for_each(|id| self.remove(id));
        Ok(its.len())
    }

    /// Counts an event that was refused before it came here.
    pub fn count_refusal(&mut self, reason: &'static str) {
        *self.refused.entry(reason).or_default() += 1;
    }

    /// Takes a verified listing in, unless the book has better.
    pub fn apply(&mut self, now: UnixMs, listing: VerifiedListing) -> Result<Applied, BookRefusal> {
        let result = self.place(now, listing);
        if let Err(refusal) = &result {
            self.count_refusal(refusal.reason());
        }
        result
    }

    /// Drops what can neither be sold nor replayed any more. Returns how many went.
    pub fn prune(&mut self, now: UnixMs) -> usize {
        let before = self.len();
        while let Some((created_at, Reverse(id))) = self.by_age.first().copied() {
            if created_at.saturating_add(MAX_LIFETIME_S) > now.as_secs() {
                break;
            }
            self.remove(&id);
        }
        before - self.len()
    }

    fn place(&mut self, now: UnixMs, listing: VerifiedListing) -> Result<Applied, BookRefusal> {
        self.prune(now);
        let id = listing.id();
        if self.listings.contains_key(&id) {
            return Err(BookRefusal::Duplicate);
        }
        if !listing.is_live(now) {
            return Err(BookRefusal::Expired { expires_at: listing.expires_at });
        }
        if let Some(fate) = self.lineage.fate(&listing.node_key) {
            return Err(BookRefusal::GivenUp { fate: fate.to_string() });
        }
        let provider = listing.nostr_key();
        let older = self.places.get(&(provider, listing.d().to_owned())).copied();
        if let Some(known) = older.and_then(|id| self.listings.get(&id))
            && age(known) > age(&listing)
        {
            return Err(BookRefusal::Superseded { newer: known.id() });
        }
        if let Some(older) = older {
            self.remove(&older);
        }
        self.insert(listing);

        // The oldest beyond a limit goes, and that may be the newcomer.
        let mut evicted = BTreeSet::new();
        if let Some(ages) = self.by_provider.get(&provider).filter(|ages| ages.len() > self.limits.per_provider) {
            evicted.extend(ages.first().map(|(_, Reverse(oldest))| *oldest));
        }
        if evicted.contains(&id) {
            self.remove(&id);
            return Err(BookRefusal::ProviderFull { limit: self.limits.per_provider });
        }
        if evicted.is_empty() && self.len() > self.limits.total {
            evicted.extend(self.by_age.first().map(|(_, Reverse(oldest))| *oldest));
        }
        for oldest in &evicted {
            self.remove(oldest);
        }
        if evicted.contains(&id) {
            return Err(BookRefusal::BookFull { limit: self.limits.total });
        }
        Ok(older.map_or(Applied::New, |older| Applied::Replaced { older }))
    }

    fn insert(&mut self, listing: VerifiedListing) {
        let id = listing.id();
        self.places.insert((listing.nostr_key(), listing.d().to_owned()), id);
        self.by_root.entry(listing.model_root).or_default().insert(id);
        self.by_name.entry(listing.model.to_lowercase()).or_default().insert(id);
        self.by_node.entry(listing.node_key).or_default().insert(id);
        self.by_age.insert(age(&listing));
        self.by_provider.entry(listing.nostr_key()).or_default().insert(age(&listing));
        self.listings.insert(id, Arc::new(listing));
    }

    fn remove(&mut self, id: &ListingId) {
        let Some(listing) = self.listings.remove(id) else { return };
        self.places.remove(&(listing.nostr_key(), listing.d().to_owned()));
        self.by_age.remove(&age(&listing));
        remove_from(&mut self.by_root, &listing.model_root, id);
        remove_from(&mut self.by_name, &listing.model.to_lowercase(), id);
        remove_from(&mut self.by_node, &listing.node_key, id);
        remove_from(&mut self.by_provider, &listing.nostr_key(), &age(&listing));
    }
}

fn age(listing: &VerifiedListing) -> Age {
    (listing.created_at(), Reverse(listing.id()))
}

/// Takes `value` out of the set under `key`, and the set out of the map when it is empty.
fn remove_from<K: Ord, V: Ord>(map: &mut BTreeMap<K, BTreeSet<V>>, key: &K, value: &V) {
    if let Some(set) = map.get_mut(key) {
        set.remove(value);
        if set.is_empty() {
            map.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{NOW_S, Offer, now};
    use proptest::prelude::*;
    use satgrid_types::{GivenUp, SignedSuccession};
    use std::sync::LazyLock;

    const SMALL: BookLimits = BookLimits { per_provider: 2, total: 5 };

    fn ids(book: &Book) -> Vec<ListingId> {
        book.listings.keys().copied().collect()
    }

    /// Every index must tell the same story as the listings themselves.
    fn assert_consistent(book: &Book) {
        let all = book.len();
        assert_eq!(book.places.len(), all);
        assert_eq!(book.by_age.len(), all);
        assert_eq!(book.by_root.values().map(BTreeSet::len).sum::<usize>(), all);
        assert_eq!(book.by_name.values().map(BTreeSet::len).sum::<usize>(), all);
        assert_eq!(book.by_node.values().map(BTreeSet::len).sum::<usize>(), all);
        assert_eq!(book.by_provider.values().map(BTreeSet::len).sum::<usize>(), all);
    }

    #[test]
    fn newer_replaces_older_and_never_the_other_way() {
        let mut book = Book::default();
        let (old, new) = (Offer::new(1).verified(), Offer { age_s: -10, ..Offer::new(1) }.verified());
        assert_eq!(book.apply(now(), old.clone()), Ok(Applied::New));
        assert_eq!(book.apply(now(), new.clone()), Ok(Applied::Replaced { older: old.id() }));
        assert_eq!(book.apply(now(), old), Err(BookRefusal::Superseded { newer: new.id() }));
        assert_eq!(book.apply(now(), new.clone()), Err(BookRefusal::Duplicate));
        assert_eq!(ids(&book), vec![new.id()]);
        assert_eq!(book.refusals()[&"superseded"], 1);
        assert_eq!(book.refusals()[&"duplicate"], 1);
        assert_consistent(&book);
    }

    #[test]
    fn a_key_that_was_given_up_sells_nothing_any_more() {
        let mut book = Book::default();
        let (stays, goes) = (Offer::new(2).verified(), Offer::new(1).verified());
        book.apply(now(), stays.clone()).unwrap();
        book.apply(now(), goes.clone()).unwrap();
        let old = (&Offer::new(1).signing(), goes.nostr_key());
        let signed = SignedSuccession::revoke(old, now(), GivenUp::Stolen);
        let word = LastWord { said: signed.verify().unwrap(), signed };
        assert_eq!(book.give_up(word.clone(), false), Ok(1));
        assert_eq!(book.give_up(word, false), Err(LineageRefusal::Known));
        assert_eq!(ids(&book), vec![stays.id()]);
        let newer = Offer { age_s: -10, ..Offer::new(1) }.verified();
        assert!(matches!(book.apply(now(), newer), Err(BookRefusal::GivenUp { fate }) if fate.contains("stolen")));
        assert_eq!(book.refusals()[&"given_up"], 1);
        assert_consistent(&book);
    }

    #[test]
    fn in_one_second_the_lower_id_wins() {
        let a = Offer { output: 1, ..Offer::new(1) }.verified();
        let b = Offer { output: 2, ..Offer::new(1) }.verified();
        let winner = a.id().min(b.id());
        for pair in [[a.clone(), b.clone()], [b, a]] {
            let mut book = Book::default();
            for listing in pair {
                let _ = book.apply(now(), listing);
            }
            assert_eq!(ids(&book), vec![winner]);
        }
    }

    #[test]
    fn an_expired_listing_is_invisible_but_keeps_its_place() {
        let cheap = Offer { age_s: 60, lifetime_s: 3_000, output: 1, ..Offer::new(1) }.verified();
        let dear = Offer { lifetime_s: 600, output: 9, ..Offer::new(1) }.verified();
        let mut book = Book::default();
        book.apply(now(), dear.clone()).unwrap();
        let later = now().plus_ms(601_000);
        assert_eq!(book.live(later).count(), 0);
        assert!(cheap.is_live(later));
        assert_eq!(book.apply(later, cheap), Err(BookRefusal::Superseded { newer: dear.id() }));
        assert_eq!(book.prune(now().plus_ms(MAX_LIFETIME_S * 1_000)), 1);
        assert!(book.is_empty());
        let expired = book.apply(later, dear);
        assert_eq!(expired, Err(BookRefusal::Expired { expires_at: NOW_S + 600 }));
        assert_consistent(&book);
    }

    #[test]
    fn one_provider_cannot_fill_the_book() {
        let mut book = Book::new(SMALL);
        for model in 0..4 {
            let offer = Offer { model, age_s: i64::from(model), ..Offer::new(1) };
            let kept = book.apply(now(), offer.verified());
            assert_eq!(kept.is_ok(), model < 2, "{kept:?}");
        }
        book.apply(now(), Offer { model: 9, age_s: -1, ..Offer::new(1) }.verified()).unwrap();
        assert_eq!(book.len(), 2);
        assert_eq!(book.refusals()[&"provider_full"], 2);
        assert_consistent(&book);
    }

    #[test]
    fn finds_by_root_and_by_claimed_name() {
        let mut book = Book::default();
        for provider in 1..4 {
            book.apply(now(), Offer::new(provider).verified()).unwrap();
        }
        let imposter = Offer { model: 7, name: "GEMMA-3-270m", ..Offer::new(4) }.verified();
        book.apply(now(), imposter.clone()).unwrap();
        assert_eq!(book.with_root(&Offer::new(1).root()).count(), 3);
        assert_eq!(book.with_root(&imposter.model_root).count(), 1);
        assert_eq!(book.claiming("gemma-3-270M").count(), 4);
        assert_eq!(book.claiming("gemma").count(), 0);
    }

    /// Four providers, three models, three versions: some older, some shorter-lived, all live now.
    static POOL: LazyLock<Vec<VerifiedListing>> = LazyLock::new(|| {
        let mut pool = Vec::new();
        for provider in 1..5 {
            for model in 0..3 {
                for version in 0..3 {
                    let age_s = i64::from((provider * 7 + model * 5 + version * 11) % 13);
                    let output = u64::from(version);
                    pool.push(Offer { model, age_s, output, ..Offer::new(provider) }.verified());
                }
            }
        }
        pool
    });

    proptest! {
        #[test]
        fn the_order_of_arrival_does_not_matter(
            order in Just((0..36usize).collect::<Vec<_>>()).prop_shuffle(),
            again in Just((0..36usize).collect::<Vec<_>>()).prop_shuffle(),
            repeats in proptest::collection::vec(0..36usize, 0..20),
            some in 1..36usize,
            per_provider in 1..4usize,
            total in 1..12usize,
        ) {
            let chosen: BTreeSet<usize> = order.iter().take(some).copied().collect();
            let build = |arrivals: &mut dyn Iterator<Item = usize>| {
                let mut book = Book::new(BookLimits { per_provider, total });
                for index in arrivals.filter(|index| chosen.contains(index)) {
                    let _ = book.apply(now(), POOL[index].clone());
                    assert_consistent(&book);
                }
                ids(&book)
            };
            let first = build(&mut order.iter().copied());
            let second = build(&mut again.iter().copied().chain(repeats.iter().copied()));
            prop_assert_eq!(&first, &second);
            prop_assert!(first.len() <= total);
        }
    }

    /// `cargo test -p satgrid-market -- --ignored --nocapture a_hundred_thousand`: signs for a minute, then measures.
    #[test]
    #[ignore = "signs and verifies 100,000 listings; prints its figures"]
    #[allow(clippy::disallowed_methods)]
    fn a_hundred_thousand_listings() {
        use crate::{Demand, Reputation, Wanted};
        use std::time::Instant;
        let start = Instant::now();
        let listings: Vec<VerifiedListing> = (0..100_000u32)
            .map(|n| {
                let output = 1_000 + u64::from(n * 7_919 % 100_000);
                Offer { model: n / 2_000, output, ..Offer::new(n % 2_000 + 1) }.verified()
            })
            .collect();
        println!("signed and verified in {:?}", start.elapsed());
        let mut book = Book::default();
        let start = Instant::now();
        for listing in listings {
            book.apply(now(), listing).unwrap();
        }
        println!("{} applied in {:?}", book.len(), start.elapsed());
        let root = Offer { model: 42, ..Offer::new(1) }.root();
        for wanted in [Wanted::Roots([(root, Offer::tokenizer())].into()), Wanted::ClaimedName("gemma-3-270m".into())] {
            let demand = Demand::new(wanted, 1_000, 500);
            let start = Instant::now();
            let choice = crate::plan(now(), &book, &demand, &Reputation::default()).unwrap();
            println!("planned in {:?}: {:?}", start.elapsed(), demand.wanted);
            assert_eq!(choice.best.stages.len(), 1);
        }
        let start = Instant::now();
        assert_eq!(book.prune(now().plus_ms(MAX_LIFETIME_S * 1_000)), 100_000);
        println!("pruned in {:?}", start.elapsed());
    }
}
