//! Hears listings on several relays at once and hands out those that verify.
//!
//! Two tasks: one keeps a subscription open on every connection of every relay, the other verifies. The same event from
//! five relays is verified once. Only ids of *verified* events are remembered for that: a forgery that borrows an id must
//! not keep the real one out.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nostr_sdk::{Filter, Kind, Relay, SubscribeOptions, SubscriptionId, Timestamp};
use satgrid_types::{
    CHECKPOINT_KIND, LISTING_KIND, ListingId, MAX_EVENT_BYTES, MAX_LIFETIME_S, NostrEvent, SUCCESSION_KIND,
    SignedSuccession, Succession, Verified, VerifiedListing, verify_listing, verify_succession,
};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::publisher::now;
use crate::relays::{RelayConfig, RelayHealth, Relays, StartError, observe};
use crate::tap::{FromRelay, Tap};

const TICK: Duration = Duration::from_millis(200);
/// Messages that wait for the verifier.
const INBOX: usize = 1_024;
/// Verified ids that are remembered.
const REMEMBERED: usize = 65_536;
/// Room for `["EVENT","<subscription>",...]` around an event.
const MAX_MESSAGE_BYTES: usize = MAX_EVENT_BYTES + 1_024;
/// How many stored events a relay is asked for at once.
const STORED_LIMIT: usize = 5_000;
/// No checkpoint's text is longer.
const MAX_NOTE_BYTES: usize = 512;
const SUBSCRIPTION: &str = "satgrid-listings";
const SUCCESSIONS: &str = "satgrid-successions";

/// A key that gave way: the statement, and what it says.
pub type Succeeded = (SignedSuccession, Verified<Succession>);

/// Where to listen.
#[derive(Debug, Clone)]
pub struct SubscriberConfig {
    pub relays: RelayConfig,
    /// Verified listings that may wait for the book.
    pub queue: usize,
    /// Where the texts of log checkpoints go, if they are to be heard at all: signed events, whose text is not judged here.
    /// What does not fit is dropped; the next one says more.
    pub notes: Option<mpsc::Sender<String>>,
    /// Where keys that were given up are told, verified, if they are to be heard at all. What does not fit is dropped and
    /// told again at the next connection.
    pub successions: Option<mpsc::Sender<Succeeded>>,
}

impl SubscriberConfig {
    pub fn new(relays: RelayConfig) -> SubscriberConfig {
        SubscriberConfig { relays, queue: 1_024, notes: None, successions: None }
    }
}

type Counters = Arc<Mutex<BTreeMap<&'static str, u64>>>;

/// A running subscription. It ends with its shutdown token, or when the receiver of its listings is dropped.
pub struct Subscriber {
    counters: Counters,
    health: watch::Receiver<Vec<RelayHealth>>,
    synced: watch::Receiver<BTreeSet<String>>,
}

impl Subscriber {
    /// Starts listening. Relays that are down now are connected to later.
    pub async fn start(
        config: SubscriberConfig,
        shutdown: CancellationToken,
    ) -> Result<(Subscriber, mpsc::Receiver<VerifiedListing>), StartError> {
        let (tapped, inbox) = mpsc::channel(INBOX);
        let (verified, listings) = mpsc::channel(config.queue.max(1));
        let (mark_synced, synced) = watch::channel(BTreeSet::new());
        let relays =
            Relays::connect(&config.relays, None, Some(Arc::new(Tap { out: tapped, wanted: SUBSCRIPTION }))).await?;
        let health: Vec<RelayHealth> = relays
            .all
            .iter()
            .map(|relay| RelayHealth { url: relay.url().to_string(), ..RelayHealth::default() })
            .collect();
        let (report, health_seen) = watch::channel(health);
        let counters = Counters::default();
        let hears = Hears { notes: config.notes.is_some(), successions: config.successions.is_some() };
        let verifier = Verifier {
            counters: counters.clone(),
            verified,
            mark_synced,
            seen: Seen::default(),
            notes: config.notes,
            successions: config.successions,
        };
        // The listings' receiver going away ends both tasks.
        let done = shutdown.child_token();
        tokio::spawn(verifier.run(inbox, done.clone()));
        tokio::spawn(keep_subscribed(relays, config.relays.retry, hears, report, done));
        Ok((Subscriber { counters, health: health_seen, synced }, listings))
    }

    /// Events by what became of them: `accepted`, `duplicate`, or the reason of a refusal.
    pub fn counters(&self) -> BTreeMap<&'static str, u64> {
        self.counters.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How each relay is doing, now and whenever it changes.
    pub fn health(&self) -> watch::Receiver<Vec<RelayHealth>> {
        self.health.clone()
    }

    /// Waits until every relay has sent what it had stored, or until `timeout`. Returns how many relays have.
    ///
    /// What they sent has then been verified and put into the queue; take listings out meanwhile, or a full queue holds
    /// everything up.
    pub async fn synced(&self, timeout: Duration) -> usize {
        let wanted = self.health.borrow().len();
        let mut synced = self.synced.clone();
        let all = synced.wait_for(|relays| relays.len() >= wanted);
        match tokio::time::timeout(timeout, all).await {
            Ok(Ok(relays)) => relays.len(),
            Ok(Err(_)) | Err(_) => self.synced.borrow().len(),
        }
    }
}

/// What we know of our subscription at one relay.
struct Standing {
    relay: Relay,
    /// The connection on which it was asked for.
    connection: usize,
    /// Not to be asked again before.
    not_before: Instant,
}

/// Subscribes on every new connection, and again where a relay closed the subscription; reports how relays are doing.
async fn keep_subscribed(
    relays: Relays,
    retry: Duration,
    hears: Hears,
    report: watch::Sender<Vec<RelayHealth>>,
    done: CancellationToken,
) {
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let standing = |relay: &Relay| Standing { relay: relay.clone(), connection: 0, not_before: Instant::now() };
    let mut standings: Vec<Standing> = relays.all.iter().map(standing).collect();
    loop {
        tokio::select! {
            () = done.cancelled() => break,
            _ = tick.tick() => {}
        }
        let mut health = report.borrow().clone();
        for (state, standing) in health.iter_mut().zip(&mut standings) {
            observe(state, &standing.relay);
            if state.connected
                && let Err(reason) = subscribe_anew(standing, state.connections, retry, hears).await
            {
                tracing::warn!(relay = %state.url, reason, "not subscribed; trying again");
                state.last_error = Some(reason);
            }
        }
        report.send_if_modified(|known| {
            let changed = *known != health;
            *known = health;
            changed
        });
    }
    relays.client.shutdown().await;
}

/// Subscribes if this connection has no subscription yet, or has lost it.
async fn subscribe_anew(
    standing: &mut Standing,
    connection: usize,
    retry: Duration,
    hears: Hears,
) -> Result<(), String> {
    let id = SubscriptionId::new(SUBSCRIPTION);
    let fresh = standing.connection != connection;
    // The client library forgets a subscription that the relay closed.
    let open = !fresh && standing.relay.subscription(&id).await.is_some();
    if open || (!fresh && standing.not_before > Instant::now()) {
        return Ok(());
    }
    standing.connection = connection;
    standing.not_before = Instant::now() + retry;
    // Listings older than their longest life are dead, whatever they say.
    let since = Timestamp::now() - Duration::from_secs(MAX_LIFETIME_S);
    let kinds = [Some(LISTING_KIND), hears.notes.then_some(CHECKPOINT_KIND)].into_iter().flatten().map(Kind::Custom);
    let filter = Filter::new().kinds(kinds).since(since).limit(STORED_LIMIT);
    let asked = standing.relay.subscribe_with_id(id, filter, SubscribeOptions::default()).await;
    asked.map_err(|error| error.to_string())?;
    if hears.successions {
        // However old: a key that was given up stays so.
        let filter = Filter::new().kind(Kind::Custom(SUCCESSION_KIND)).limit(STORED_LIMIT);
        let id = SubscriptionId::new(SUCCESSIONS);
        let asked = standing.relay.subscribe_with_id(id, filter, SubscribeOptions::default()).await;
        asked.map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// What is to be heard beside listings.
#[derive(Debug, Clone, Copy)]
struct Hears {
    notes: bool,
    successions: bool,
}

struct Verifier {
    counters: Counters,
    verified: mpsc::Sender<VerifiedListing>,
    mark_synced: watch::Sender<BTreeSet<String>>,
    seen: Seen,
    notes: Option<mpsc::Sender<String>>,
    successions: Option<mpsc::Sender<Succeeded>>,
}

impl Verifier {
    async fn run(mut self, mut inbox: mpsc::Receiver<FromRelay>, done: CancellationToken) {
        loop {
            let message = tokio::select! {
                () = done.cancelled() => break,
                () = self.verified.closed() => break,
                message = inbox.recv() => message,
            };
            match message {
                None => break,
                Some(FromRelay::EndOfStored { relay }) => {
                    self.mark_synced.send_if_modified(|relays| relays.insert(relay));
                }
                Some(FromRelay::Event { text }) => match self.read(&text) {
                    Ok(None) => {}
                    Ok(Some(listing)) => {
                        self.count("accepted");
                        tokio::select! {
                            () = done.cancelled() => break,
                            sent = self.verified.send(listing) => if sent.is_err() { break },
                        }
                    }
                    Err(reason) => self.count(reason),
                },
            }
        }
        done.cancel();
    }

    /// A listing, or the word for why not; nothing where it was a checkpoint or a succession, which are passed on.
    fn read(&mut self, text: &str) -> Result<Option<VerifiedListing>, &'static str> {
        if text.len() > MAX_MESSAGE_BYTES {
            return Err("too_large");
        }
        let (_, _, event): (String, String, NostrEvent) = serde_json::from_str(text).map_err(|_| "malformed")?;
        // The id alone is a claim, so a borrowed one is caught by hashing again below.
        if self.seen.contains(&event.id) && event.verify().is_ok() {
            return Err("duplicate");
        }
        if let Some(notes) = self.notes.as_ref().filter(|_| event.kind == CHECKPOINT_KIND) {
            event.verify().map_err(|_| "forged")?;
            if event.content.len() > MAX_NOTE_BYTES {
                return Err("too_large");
            }
            self.seen.insert(event.id);
            // A full queue is no reason to hold up listings.
            let _ = notes.try_send(event.content);
            return Ok(None);
        }
        if let Some(successions) = self.successions.as_ref().filter(|_| event.kind == SUCCESSION_KIND) {
            let (signed, said) = verify_succession(&event).map_err(|refusal| refusal.reason())?;
            if successions.try_send((signed, said)).is_ok() {
                self.seen.insert(event.id);
            }
            return Ok(None);
        }
        let listing = verify_listing(event, now()).map_err(|refusal| {
            tracing::debug!(%refusal, "a listing was refused");
            refusal.reason()
        })?;
        self.seen.insert(listing.id());
        Ok(Some(listing))
    }

    fn count(&self, reason: &'static str) {
        let mut counters = self.counters.lock().unwrap_or_else(PoisonError::into_inner);
        *counters.entry(reason).or_default() += 1;
    }
}

/// The ids that were verified last.
#[derive(Default)]
struct Seen {
    ids: BTreeSet<ListingId>,
    order: VecDeque<ListingId>,
}

impl Seen {
    fn contains(&self, id: &ListingId) -> bool {
        self.ids.contains(id)
    }

    fn insert(&mut self, id: ListingId) {
        if self.ids.insert(id) {
            self.order.push_back(id);
        }
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.ids.remove(&oldest);
        }
    }
}
