//! Publisher and subscriber against a real relay, over real WebSockets. Nothing sleeps: every wait is for an event.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use ed25519_dalek::SigningKey;
use nostr_relay_builder::builder::{PolicyResult, QueryPolicy, RelayBuilderNip42, RelayBuilderNip42Mode, WritePolicy};
use nostr_relay_builder::{LocalRelay, RelayBuilder};
use nostr_sdk::util::BoxedFuture;
use nostr_sdk::{Event, Filter, JsonUtil};
use satgrid_market::{Applied, Book};
use satgrid_types::{
    Bindings, BuildId, EngineProfile, LightningKey, Listing, ModelRoot, Msat, MsatPerMtok, NostrEvent, Part, RateCard,
    Speed, TokenizerHash, VerifiedListing, lightning_binding_message, node_key, nostr_key, sign_lightning_message,
    sign_node_binding,
};
use secp256k1::{Keypair, SECP256K1, SecretKey};
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::publisher::now;
use crate::*;

const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn nostr_keys(byte: u8) -> Keypair {
    Keypair::from_seckey_slice(SECP256K1, &[byte; 32]).unwrap()
}

/// A bound listing of provider 1 for one of several models.
pub(crate) fn listing(model: u8, slots: u32) -> Listing {
    let node = SigningKey::from_bytes(&[2; 32]);
    let lightning = SecretKey::from_slice(&[3; 32]).unwrap();
    let mut listing = Listing {
        version: Listing::VERSION,
        model: "gemma-3-270m".into(),
        model_root: ModelRoot([model; 32]),
        tokenizer: TokenizerHash([5; 32]),
        quantisation: "Q4_K_M".into(),
        part: Part::Whole,
        rates: RateCard {
            input: MsatPerMtok(1_000_000),
            cached_input: MsatPerMtok(100_000),
            output: MsatPerMtok(4_000_000),
            per_request: Msat(0),
            ..RateCard::default()
        },
        context_length: 4_096,
        slots,
        speed: Speed { prefill_mtok_s: 380_000, decode_mtok_s: 47_000 },
        memory_bytes: 1 << 30,
        profiles: vec![EngineProfile::Exact],
        build: BuildId([6; 32]),
        instruction_set: "avx2".into(),
        addresses: vec!["127.0.0.1:9338".into()],
        region: None,
        node_key: node_key(&node),
        lightning_node: LightningKey(lightning.public_key(SECP256K1).serialize()),
        expires_at: 0,
        lightning_address: None,
        lightning_unproven: false,
        experts_hash: None,
        embeds: None,
        links: Vec::new(),
        bindings: Bindings::default(),
    };
    let message = lightning_binding_message(&listing.node_key);
    listing.bindings.lightning = Some(sign_lightning_message(&lightning, &message));
    listing.bindings.node = Some(sign_node_binding(&node, &nostr_key(&nostr_keys(1)), &listing.d()));
    listing
}

/// A version of that listing as it was made `age_s` ago, to live for `lifetime_s`.
fn event(age_s: u64, lifetime_s: u64) -> NostrEvent {
    let created_at = now().as_secs() - age_s;
    let listing = Listing { expires_at: created_at + lifetime_s, ..listing(1, 4) };
    listing.to_event(&nostr_keys(1), created_at, &[0; 32])
}

fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// Starts a relay, waiting for its port if its predecessor is still letting go of it.
async fn relay(port: u16) -> LocalRelay {
    let start = async {
        loop {
            let relay = LocalRelay::new(RelayBuilder::default().port(port));
            if relay.run().await.is_ok() {
                return relay;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, start).await.unwrap()
}

fn config(ports: &[u16]) -> RelayConfig {
    let urls = ports.iter().map(|port| format!("ws://{}", SocketAddr::from(([127, 0, 0, 1], *port)))).collect();
    RelayConfig { urls, retry: Duration::from_millis(100) }
}

/// A subscriber, its listings, and what ends it when the test does.
struct Reader {
    subscriber: Subscriber,
    listings: mpsc::Receiver<VerifiedListing>,
    _stop: DropGuard,
}

impl Reader {
    async fn start(ports: &[u16]) -> Reader {
        let token = CancellationToken::new();
        let config = SubscriberConfig::new(config(ports));
        let (subscriber, listings) = Subscriber::start(config, token.clone()).await.unwrap();
        Reader { subscriber, listings, _stop: token.drop_guard() }
    }

    async fn next(&mut self) -> VerifiedListing {
        tokio::time::timeout(PATIENCE, self.listings.recv()).await.unwrap().unwrap()
    }

    fn count(&self, reason: &str) -> u64 {
        self.subscriber.counters().get(reason).copied().unwrap_or(0)
    }
}

async fn publisher(ports: &[u16]) -> (Publisher, DropGuard) {
    let token = CancellationToken::new();
    let config = PublisherConfig::new(config(ports), 7);
    let publisher = Publisher::start(config, nostr_keys(1), token.clone()).await.unwrap();
    (publisher, token.drop_guard())
}

async fn wait_for(publisher: &Publisher, what: impl FnMut(&Vec<RelayHealth>) -> bool) {
    tokio::time::timeout(PATIENCE, publisher.health().wait_for(what)).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_published_listing_reaches_the_book() {
    let (first, second) = (free_port(), free_port());
    let (_a, _b) = (relay(first).await, relay(second).await);
    let mut reader = Reader::start(&[first, second]).await;
    assert_eq!(reader.subscriber.synced(PATIENCE).await, 2);
    let (publisher, _stop) = publisher(&[first, second]).await;
    publisher.offer(vec![listing(1, 4)]).await.unwrap().unwrap();

    let mut book = Book::default();
    let found = reader.next().await;
    assert_eq!(found.slots, 4);
    assert_eq!(found.nostr_key(), publisher.nostr_key());
    assert_eq!(book.apply(now(), found), Ok(Applied::New));
    wait_for(&publisher, |health| health.iter().all(|relay| relay.delivered == 1)).await;

    // A new price replaces the old one; what is offered no more is withdrawn.
    publisher.offer(vec![listing(1, 2)]).await.unwrap().unwrap();
    let changed = reader.next().await;
    assert!(matches!(book.apply(now(), changed), Ok(Applied::Replaced { .. })));
    publisher.offer(vec![]).await.unwrap().unwrap();
    let withdrawn = reader.next().await;
    assert_eq!(withdrawn.slots, 0);
    assert!(matches!(book.apply(now(), withdrawn), Ok(Applied::Replaced { .. })));
    assert_eq!(book.len(), 1);
    assert_eq!(reader.count("accepted"), 3, "two relays, and each version once");
}

#[tokio::test]
async fn what_a_wrong_clock_dated_ahead_keeps_nothing_out() {
    // It ran with a clock of tomorrow: the relay has a listing from then, and takes none that is older.
    let port = free_port();
    let _relay = relay(port).await;
    let day_ahead = now().as_secs() + 86_400;
    let tomorrow = Listing { expires_at: day_ahead + 1_800, ..listing(1, 4) };
    let event = tomorrow.to_event(&nostr_keys(1), day_ahead, &[0; 32]);
    let told = succession::tell(&config(&[port]), &[event], PATIENCE).await.unwrap();
    assert_eq!(told.taken.len(), 1);
    let mut reader = Reader::start(&[port]).await;
    let (publisher, _stop) = publisher(&[port]).await;
    publisher.offer(vec![listing(1, 4)]).await.unwrap().unwrap();
    let listing = reader.next().await;
    assert!(listing.created_at() < day_ahead);
    wait_for(&publisher, |all| all[0].delivered == 1 && all[0].refused == 0).await;
}

#[tokio::test]
async fn a_late_reader_gets_what_is_stored() {
    let port = free_port();
    let _relay = relay(port).await;
    let (publisher, _stop) = publisher(&[port]).await;
    publisher.offer(vec![listing(1, 4), listing(2, 4)]).await.unwrap().unwrap();
    publisher.checkpoint("log", "10\nroot".into()).await.unwrap();
    wait_for(&publisher, |health| health[0].delivered == 3).await;
    let mut reader = Reader::start(&[port]).await;
    assert_eq!(reader.subscriber.synced(PATIENCE).await, 1);
    let models = [reader.listings.try_recv().unwrap(), reader.listings.try_recv().unwrap()];
    assert_ne!(models[0].model_root, models[1].model_root);
    assert!(reader.listings.try_recv().is_err(), "a checkpoint is no listing");
}

#[tokio::test]
async fn who_asks_for_them_hears_checkpoints_and_only_signed_ones() {
    let port = free_port();
    let _relay = relay(port).await;
    let (publisher, _stop) = publisher(&[port]).await;
    publisher.checkpoint("log", "10\nroot".into()).await.unwrap();
    wait_for(&publisher, |health| health[0].delivered == 1).await;
    let (notes, mut heard) = mpsc::channel(4);
    let mut subscription = SubscriberConfig::new(config(&[port]));
    subscription.notes = Some(notes);
    let token = CancellationToken::new();
    let (subscriber, mut listings) = Subscriber::start(subscription, token.clone()).await.unwrap();
    let note = tokio::time::timeout(PATIENCE, heard.recv()).await.unwrap().unwrap();
    assert_eq!(note, "10\nroot");
    assert!(listings.try_recv().is_err());
    assert_eq!(subscriber.counters().len(), 0, "it is no refused listing");
    token.cancel();
}

/// A relay that lies: it passes on whatever it is given, checking nothing.
#[tokio::test]
async fn what_a_lying_relay_sends_is_counted_and_ignored() {
    let port = free_port();
    let relay = relay(port).await;
    let mut reader = Reader::start(&[port]).await;
    reader.subscriber.synced(PATIENCE).await;
    let say = |event: &NostrEvent| {
        assert!(relay.notify_event(Event::from_json(event.to_json()).unwrap()), "somebody listens");
    };

    let newer = event(10, 1_800);
    let mut cheaper = newer.clone();
    cheaper.content = cheaper.content.replace("4000000", "1");
    let mut unsigned = newer.clone();
    unsigned.sig.0[5] ^= 1;
    let listing = listing(1, 4);
    let other_key = nostr_keys(9);
    let stolen =
        Listing { expires_at: now().as_secs() + 60, ..listing }.to_event(&other_key, now().as_secs(), &[0; 32]);
    // The forgeries come first and borrow the id of the real one, which must get through all the same.
    say(&cheaper);
    say(&unsigned);
    say(&stolen);
    say(&event(1_000, 900));
    say(&newer);
    say(&cheaper);
    say(&newer);
    say(&event(60, 1_800));
    let end = event(5, 1_800);
    say(&end);

    let mut book = Book::default();
    let got = [reader.next().await, reader.next().await, reader.next().await];
    assert_eq!(got[0].id(), newer.id);
    let applied: Vec<bool> = got.iter().map(|listing| book.apply(now(), listing.clone()).is_ok()).collect();
    assert_eq!(applied, vec![true, false, true], "a replayed older version verifies, and the book has better");
    assert_eq!(book.refusals()[&"superseded"], 1);
    assert!(book.get(&end.id).is_some());
    let counts = ["forged", "bad_binding", "expired", "duplicate", "accepted"].map(|reason| reader.count(reason));
    assert_eq!(counts, [3, 1, 1, 1, 3]);
}

#[tokio::test]
async fn both_sides_outlive_their_relay() {
    let port = free_port();
    // Nobody listens there yet: the publisher says so and keeps trying.
    let (publisher, stop) = publisher(&[port]).await;
    let mut reader = Reader::start(&[port]).await;
    publisher.offer(vec![listing(1, 4)]).await.unwrap().unwrap();
    wait_for(&publisher, |health| health[0].attempts > 1 && health[0].last_error.is_some()).await;
    assert_eq!(publisher.health().borrow()[0].delivered, 0);

    let first = relay(port).await;
    assert_eq!(reader.next().await.slots, 4);
    wait_for(&publisher, |health| health[0].connected && health[0].delivered == 1).await;
    first.shutdown();
    drop(first);
    wait_for(&publisher, |health| !health[0].connected).await;

    // It comes back with an empty store and is told again; the reader hears the new price on its new connection.
    let _second = relay(port).await;
    wait_for(&publisher, |health| health[0].connections == 2 && health[0].delivered == 2).await;
    publisher.offer(vec![listing(1, 3)]).await.unwrap().unwrap();
    assert_eq!(reader.next().await.slots, 3);

    // A publisher that stops says that it is gone.
    drop(stop);
    publisher.stopped().await;
    assert_eq!(reader.next().await.slots, 0);
}

#[tokio::test]
async fn a_relay_that_asks_who_writes_is_told() {
    let port = free_port();
    let writers_only = RelayBuilderNip42 { mode: RelayBuilderNip42Mode::Write };
    let relay = LocalRelay::new(RelayBuilder::default().port(port).nip42(writers_only));
    relay.run().await.unwrap();
    let (publisher, _stop) = publisher(&[port]).await;
    publisher.offer(vec![listing(1, 4)]).await.unwrap().unwrap();
    let mut reader = Reader::start(&[port]).await;
    assert_eq!(reader.next().await.slots, 4);
}

/// Wants no listing of nine slots, as a relay with a rule of its own does.
#[derive(Debug)]
struct NotNine;

impl WritePolicy for NotNine {
    fn admit_event<'a>(&'a self, event: &'a Event, _: &'a SocketAddr) -> BoxedFuture<'a, PolicyResult> {
        let nine = event.content.contains("\"slots\":9,");
        Box::pin(async move { if nine { PolicyResult::Reject("nine".into()) } else { PolicyResult::Accept } })
    }
}

#[tokio::test]
async fn an_event_that_a_relay_does_not_want_keeps_no_other_from_it() {
    let port = free_port();
    let relay = LocalRelay::new(RelayBuilder::default().port(port).write_policy(NotNine));
    relay.run().await.unwrap();
    let (publisher, _stop) = publisher(&[port]).await;
    // In the order in which they are sent.
    publisher.offer(vec![listing(1, 9), listing(2, 4)]).await.unwrap().unwrap();
    wait_for(&publisher, |health| health[0].delivered == 1 && health[0].refused > 0).await;
    let mut reader = Reader::start(&[port]).await;
    assert_eq!(reader.next().await.slots, 4);
}

/// Turns away the first request, as a relay under load does.
#[derive(Debug, Default)]
struct BusyAtFirst(AtomicU32);

impl QueryPolicy for BusyAtFirst {
    fn admit_query<'a>(&'a self, _: &'a Filter, _: &'a SocketAddr) -> BoxedFuture<'a, PolicyResult> {
        let first = self.0.fetch_add(1, Ordering::SeqCst) == 0;
        Box::pin(async move { if first { PolicyResult::Reject("busy".into()) } else { PolicyResult::Accept } })
    }
}

#[tokio::test]
async fn a_subscription_that_a_relay_closed_is_asked_for_again() {
    let port = free_port();
    let relay = LocalRelay::new(RelayBuilder::default().port(port).query_policy(BusyAtFirst::default()));
    relay.run().await.unwrap();
    let reader = Reader::start(&[port]).await;
    assert_eq!(reader.subscriber.synced(PATIENCE).await, 1);
    assert_eq!(reader.subscriber.health().borrow()[0].connections, 1, "on the same connection");
}

#[tokio::test]
async fn nonsense_in_the_configuration_is_told_at_once() {
    let start = |urls: Vec<String>| async {
        let config = SubscriberConfig::new(RelayConfig::new(urls));
        Subscriber::start(config, CancellationToken::new()).await.err().unwrap()
    };
    assert!(matches!(start(vec![]).await, StartError::NoRelays));
    assert!(matches!(start(vec!["http://x".into()]).await, StartError::BadUrl { .. }));
    assert!(matches!(start(vec!["ws://x".into(); 33]).await, StartError::TooMany { given: 33 }));
}
