//! Brings what this node publishes to its relays, and keeps it there.
//!
//! One task owns the [`Outbox`]. At every tick it refreshes what is due and, for each relay that is connected, sends what
//! this connection lacks; a relay that fails is left alone for a growing while. So a relay that was down, restarted or
//! lost its store gets everything as soon as it is back, and nobody has to ask.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nostr_sdk::pool::relay::Error as RelayError;
use nostr_sdk::{Event, Filter, JsonUtil, Keys, Kind, Relay, SecretKey};
use satgrid_types::{
    CHECKPOINT_KIND, LISTING_KIND, Listing, ListingId, NostrEvent, NostrKey, UnixMs, VerifiedListing, nostr_key,
    verify_listing,
};
use secp256k1::Keypair;
use thiserror::Error;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::ahead;
use crate::outbox::{OfferError, Outbox};
use crate::relays::{RelayConfig, RelayHealth, Relays, StartError, observe};
use crate::schedule::backoff;

const TICK: Duration = Duration::from_millis(200);
/// How long one relay may take over one event.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a stopping node tries to tell its relays that it is gone.
const FAREWELL: Duration = Duration::from_secs(2);
/// Commands that may wait.
const QUEUE: usize = 64;

/// Where to publish, and for how long a listing is good.
#[derive(Debug, Clone)]
pub struct PublisherConfig {
    pub relays: RelayConfig,
    /// Between [`crate::MIN_LIFETIME`] and [`crate::MAX_LIFETIME`]; what lies outside is moved inside.
    pub lifetime: Duration,
    /// Seed of the jitter on refreshes.
    pub seed: u64,
}

impl PublisherConfig {
    /// Half an hour's life: refreshed every quarter of an hour or so.
    pub fn new(relays: RelayConfig, seed: u64) -> PublisherConfig {
        PublisherConfig { relays, lifetime: Duration::from_secs(30 * 60), seed }
    }
}

/// The publisher's task has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("the publisher has stopped")]
pub struct PublisherStopped;

enum Command {
    Offer(Vec<Listing>, oneshot::Sender<Result<(), OfferError>>),
    Checkpoint { log: String, content: String },
}

/// Publishes for one Nostr key. It ends with its shutdown token, withdrawing what it published.
pub struct Publisher {
    commands: mpsc::Sender<Command>,
    health: watch::Receiver<Vec<RelayHealth>>,
    offered: watch::Receiver<Vec<VerifiedListing>>,
    key: NostrKey,
    task: JoinHandle<()>,
}

impl Publisher {
    /// Starts the task. Relays that are down now are connected to later.
    pub async fn start(
        config: PublisherConfig,
        keys: Keypair,
        shutdown: CancellationToken,
    ) -> Result<Publisher, StartError> {
        let signer = SecretKey::from_slice(&keys.secret_bytes()).map_err(|e| StartError::Client(e.to_string()))?;
        let signer = Keys::new(signer);
        let relays = Relays::connect(&config.relays, Some(signer.clone()), None).await?;
        let (commands, received) = mpsc::channel(QUEUE);
        let states: Vec<RelayState> = relays.all.iter().map(RelayState::new).collect();
        let (report, health) = watch::channel(states.iter().map(|state| state.health.clone()).collect());
        let (tell_offered, offered) = watch::channel(Vec::new());
        let worker = Worker {
            tell_offered,
            signer,
            outbox: Outbox::new(keys, config.lifetime, config.seed),
            states,
            retry: config.relays.retry,
            sending: JoinSet::new(),
            report,
        };
        let task = tokio::spawn(worker.run(relays, received, shutdown));
        Ok(Publisher { commands, health, offered, key: nostr_key(&keys), task })
    }

    /// The key that listings are published under; node bindings name it.
    pub fn nostr_key(&self) -> NostrKey {
        self.key
    }

    /// Makes these the node's listings, and withdraws those that it offered before and does not now.
    ///
    /// Their expiry is set here. Returns once they are signed, whether or not any relay is up; [`Publisher::health`] tells
    /// of deliveries. The inner error is ours: a listing that every reader would refuse.
    pub async fn offer(&self, listings: Vec<Listing>) -> Result<Result<(), OfferError>, PublisherStopped> {
        let (answer, answered) = oneshot::channel();
        self.commands.send(Command::Offer(listings, answer)).await.map_err(|_| PublisherStopped)?;
        answered.await.map_err(|_| PublisherStopped)
    }

    /// Publishes a log's signed tree head (kind 38522, `d` = the log's name); the latest one stays up.
    pub async fn checkpoint(&self, log: &str, content: String) -> Result<(), PublisherStopped> {
        let command = Command::Checkpoint { log: log.to_owned(), content };
        self.commands.send(command).await.map_err(|_| PublisherStopped)
    }

    /// The listings as they were last signed, before any relay has them: quotes name these versions.
    pub fn offered(&self) -> watch::Receiver<Vec<VerifiedListing>> {
        self.offered.clone()
    }

    /// How each relay is doing, now and whenever it changes.
    pub fn health(&self) -> watch::Receiver<Vec<RelayHealth>> {
        self.health.clone()
    }

    /// Waits for the task to end, after the shutdown token was cancelled.
    pub async fn stopped(self) {
        if let Err(error) = self.task.await {
            tracing::error!(%error, "the publisher's task failed");
        }
    }
}

struct RelayState {
    relay: Relay,
    health: RelayHealth,
    sending: bool,
    /// The last connection on which what is dated ahead was taken back.
    looked_ahead: usize,
    failures: u32,
    not_before: Instant,
}

impl RelayState {
    fn new(relay: &Relay) -> RelayState {
        let health = RelayHealth { url: relay.url().to_string(), ..RelayHealth::default() };
        let relay = relay.clone();
        RelayState { relay, health, sending: false, looked_ahead: 0, failures: 0, not_before: Instant::now() }
    }
}

/// What came of sending one relay what it lacked.
struct Sent {
    index: usize,
    connection: usize,
    results: BTreeMap<ListingId, Result<(), String>>,
}

struct Worker {
    outbox: Outbox,
    signer: Keys,
    states: Vec<RelayState>,
    retry: Duration,
    sending: JoinSet<Sent>,
    report: watch::Sender<Vec<RelayHealth>>,
    tell_offered: watch::Sender<Vec<VerifiedListing>>,
}

impl Worker {
    async fn run(mut self, relays: Relays, mut commands: mpsc::Receiver<Command>, shutdown: CancellationToken) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => break,
                command = commands.recv() => match command {
                    Some(command) => self.obey(command),
                    None => break,
                },
                Some(sent) = self.sending.join_next() => self.note(sent.ok()),
                _ = tick.tick() => {}
            }
            self.step();
        }
        self.farewell().await;
        relays.client.shutdown().await;
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Offer(listings, answer) => {
                let result = self.outbox.offer(now(), listings);
                // Whoever asked may have gone; what they asked for is done all the same.
                let _ = answer.send(result);
            }
            Command::Checkpoint { log, content } => self.outbox.checkpoint(now(), &log, content),
        }
    }

    /// Refreshes, observes, sends.
    fn step(&mut self) {
        self.outbox.refresh(now());
        self.tell_offered();
        for (index, state) in self.states.iter_mut().enumerate() {
            observe(&mut state.health, &state.relay);
            if !state.health.connected || state.sending || state.not_before > Instant::now() {
                continue;
            }
            let connection = state.health.connections;
            let lacking = self.outbox.lacking(&state.health.url, connection);
            if !lacking.is_empty() {
                state.sending = true;
                let signer = (state.looked_ahead != connection).then(|| self.signer.clone());
                state.looked_ahead = connection;
                self.sending.spawn(send(index, state.relay.clone(), connection, signer, lacking));
            }
        }
        let health: Vec<RelayHealth> = self.states.iter().map(|state| state.health.clone()).collect();
        self.report.send_if_modified(|known| {
            let changed = *known != health;
            *known = health;
            changed
        });
    }

    /// Whoever quotes must know a version before a reader can ask for it.
    fn tell_offered(&self) {
        let told =
            |ids: &[VerifiedListing]| ids.iter().map(VerifiedListing::id).eq(self.outbox.offered().map(|e| e.id));
        if told(&self.tell_offered.borrow()) {
            return;
        }
        let verified = self.outbox.offered().filter_map(|event| verify_listing(event.clone(), now()).ok());
        self.tell_offered.send_replace(verified.collect());
    }

    fn note(&mut self, sent: Option<Sent>) {
        let Some(sent) = sent else { return };
        let Some(state) = self.states.get_mut(sent.index) else { return };
        state.sending = false;
        let mut failed = false;
        for (id, result) in sent.results {
            match result {
                Ok(()) => {
                    state.health.delivered += 1;
                    self.outbox.taken(&state.health.url, sent.connection, &id);
                }
                Err(reason) => {
                    failed = true;
                    // It may keep what this clock dated ahead a moment ago.
                    state.looked_ahead = 0;
                    state.health.refused += 1;
                    tracing::warn!(relay = %state.health.url, event = %id, reason, "event not taken; trying again");
                    state.health.last_error = Some(reason);
                }
            }
        }
        state.failures = if failed { state.failures.saturating_add(1) } else { 0 };
        if failed {
            state.not_before = Instant::now() + backoff(self.retry, state.failures);
        }
    }

    /// Tells the relays that are up that nothing is offered any more; the others forget by themselves.
    async fn farewell(&mut self) {
        self.outbox.withdraw_all(now());
        let until = Instant::now() + FAREWELL;
        loop {
            self.step();
            let sent = tokio::time::timeout_at(until, self.sending.join_next()).await;
            match sent {
                Ok(Some(sent)) => self.note(sent.ok()),
                Ok(None) | Err(_) => break,
            }
        }
    }
}

/// `signer` is given once for each connection, to take back first what would keep these events out.
async fn send(index: usize, relay: Relay, connection: usize, signer: Option<Keys>, events: Vec<NostrEvent>) -> Sent {
    if let Some(keys) = signer {
        let ours = Filter::new().kinds([Kind::Custom(LISTING_KIND), Kind::Custom(CHECKPOINT_KIND)]);
        ahead::take_back(&relay, &keys, ours).await;
    }
    let mut results = BTreeMap::new();
    for event in events {
        let id = event.id;
        let (result, goes_on) = match Event::from_json(event.to_json()) {
            Ok(event) => match tokio::time::timeout(SEND_TIMEOUT, relay.send_event(&event)).await {
                Ok(Ok(_)) => (Ok(()), true),
                Ok(Err(error)) => {
                    let goes_on = is_about_this_event(&error);
                    (taken_before(error.to_string()), goes_on)
                }
                Err(_) => (Err(format!("no answer within {} s", SEND_TIMEOUT.as_secs())), false),
            },
            Err(error) => (Err(error.to_string()), true),
        };
        results.insert(id, result);
        if !goes_on {
            break;
        }
    }
    Sent { index, connection, results }
}

/// A relay that does not want one event may well take the others; one that is lost, or wants none of ours now, is left alone.
fn is_about_this_event(error: &RelayError) -> bool {
    let RelayError::RelayMessage(said) = error else { return false };
    !["rate-limited:", "auth-required:", "restricted:"].iter().any(|prefix| said.starts_with(prefix))
}

/// NIP-01's `duplicate:` means that the relay has it.
fn taken_before(error: String) -> Result<(), String> {
    if error.contains("duplicate:") { Ok(()) } else { Err(error) }
}

pub(crate) fn now() -> UnixMs {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    UnixMs(u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX))
}
