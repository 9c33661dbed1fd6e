//! The market as this node sees it: the book that a subscription fills, the catalogue, and what it knows of providers.

use super::{consumer, now};
use satgrid_market::experts::{self, ExpertDemand};
use satgrid_market::layers::{self, Known, LayerDemand};
use satgrid_market::paces::{Pace, Paces};
use satgrid_market::{
    Book, BookLimits, Catalogue, Choice, Considered, Demand, Fault, LastWord, Links, NoPlan, Reputation, explain, plan,
};
use satgrid_market_nostr::{RelayConfig, RelayHealth, StartError, Subscriber, SubscriberConfig, Succeeded};
use satgrid_node::consumer::ConsumerEvent;
use satgrid_types::{LayerRange, ModelRoot, Msat, NodeKey, Part, UnixMs, VerifiedListing};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

/// How often expired listings are swept out.
const PRUNE_EVERY: Duration = Duration::from_secs(30);
/// Keys that were given up, waiting to be taken in.
const SUCCESSIONS: usize = 4_096;

/// A handle to the shared view. Clones see the same book.
#[derive(Clone)]
pub(crate) struct Market {
    state: Arc<RwLock<State>>,
    pub catalogue: Arc<Catalogue>,
}

struct State {
    book: Book,
    reputation: Reputation,
    /// What this node has measured itself.
    measured: Links,
    /// And of those whose layers it bought, by model.
    paces: BTreeMap<ModelRoot, Paces>,
    /// Models of which this node sells layers, or that it leads: how far others are that list parts of them is measured.
    watched: BTreeSet<ModelRoot>,
}

impl State {
    /// What is known of the links between those who sell parts of a model.
    fn links(&self, root: &ModelRoot) -> Links {
        let of_root = self.book.live(now()).filter(|listing| listing.model_root == *root);
        Links::listed(of_root.map(Arc::as_ref)).join(&self.measured)
    }
    /// What is known for a plan over layers of a model.
    fn known(&self, root: &ModelRoot) -> Known {
        Known { links: self.links(root), paces: self.paces.get(root).cloned().unwrap_or_default() }
    }
}

impl Market {
    pub(crate) fn new(catalogue: Catalogue) -> Market {
        let state = State {
            book: Book::new(BookLimits::default()),
            reputation: Reputation::default(),
            measured: Links::default(),
            paces: BTreeMap::new(),
            watched: BTreeSet::new(),
        };
        Market { state: Arc::new(RwLock::new(state)), catalogue: Arc::new(catalogue) }
    }

    pub(crate) fn plan(&self, demand: &Demand) -> Result<Choice, NoPlan> {
        self.read(|state| plan(now(), &state.book, demand, &state.reputation))
    }
    pub(crate) fn plan_layers(&self, demand: &LayerDemand) -> Result<layers::Plan, layers::NoLayers> {
        self.read(|state| layers::plan_layers(now(), &state.book, demand, &state.known(&demand.root)))
    }
    pub(crate) fn explain_layers(
        &self,
        demand: &LayerDemand,
    ) -> (Result<layers::Plan, layers::NoLayers>, Vec<layers::LayersConsidered>) {
        self.read(|state| layers::explain_layers(now(), &state.book, demand, &state.known(&demand.root)))
    }
    /// What is known for a plan over layers of a model.
    pub(crate) fn known(&self, root: &ModelRoot) -> Known {
        self.read(|state| state.known(root))
    }
    /// This node has measured some layers of a worker, which lists `listed_us`.
    pub(crate) fn paced(&self, root: ModelRoot, node: NodeKey, range: &LayerRange, listed_us: u64, us: u64) -> Pace {
        self.write(|state| state.paces.entry(root).or_default().measured(now(), node, range, listed_us, us))
    }
    /// It measured them before.
    pub(crate) fn keep_pace(&self, root: ModelRoot, node: NodeKey, range: &LayerRange, pace: Pace) {
        self.write(|state| state.paces.entry(root).or_default().keep(node, range, pace));
    }
    /// This node sells or leads parts of this model: the links to others that do are measured from now on.
    pub(crate) fn watch(&self, root: ModelRoot) {
        self.write(|state| state.watched.insert(root));
    }
    pub(crate) fn watched(&self) -> BTreeSet<ModelRoot> {
        self.read(|state| state.watched.clone())
    }
    /// This node has measured its link to another one.
    pub(crate) fn measured(&self, by: NodeKey, to: NodeKey, rtt: Duration) {
        let rtt_us = u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX);
        self.write(|state| state.measured.measured(by, to, rtt_us));
    }
    /// What this node has measured itself.
    pub(crate) fn own_links(&self) -> Links {
        self.read(|state| state.measured.clone())
    }
    /// Live listings of parts of this model: layers, or experts.
    pub(crate) fn parts_of(&self, root: &ModelRoot) -> Vec<Arc<VerifiedListing>> {
        let part = |listing: &&Arc<VerifiedListing>| listing.model_root == *root && listing.part != Part::Whole;
        self.read(|state| state.book.live(now()).filter(part).cloned().collect())
    }
    /// Who sells experts that fit now, cheapest first, and why others do not.
    pub(crate) fn sellers_of_experts(
        &self,
        demand: &ExpertDemand,
    ) -> (Vec<Arc<VerifiedListing>>, BTreeMap<&'static str, usize>) {
        self.read(|state| experts::sellers(now(), &state.book, demand))
    }
    pub(crate) fn explain(&self, demand: &Demand, name: &str) -> Vec<Considered> {
        self.read(|state| explain(now(), &state.book, demand, name, &state.reputation))
    }
    /// Every listing that is live now.
    pub(crate) fn live(&self) -> Vec<Arc<VerifiedListing>> {
        self.read(|state| state.book.live(now()).cloned().collect())
    }
    pub(crate) fn refusals(&self) -> BTreeMap<&'static str, u64> {
        self.read(|state| state.book.refusals().clone())
    }
    pub(crate) fn settled(&self, provider: NodeKey, amount: Msat, decode_mtok_s: Option<u64>) {
        self.write(|state| state.reputation.settled(provider, amount, decode_mtok_s));
    }
    pub(crate) fn paid_slice(&self, provider: NodeKey, amount: Msat, fee: Msat) {
        self.write(|state| state.reputation.paid_slice(provider, amount, fee));
    }
    pub(crate) fn fault(&self, at: UnixMs, provider: NodeKey, fault: Fault) {
        self.write(|state| state.reputation.fault(at, provider, fault));
    }

    /// Takes in what this very node offers, and nothing else.
    pub(crate) async fn own(self, mut offered: watch::Receiver<Vec<VerifiedListing>>, shutdown: CancellationToken) {
        loop {
            let listings = offered.borrow_and_update().clone();
            listings.into_iter().for_each(|listing| self.apply(listing));
            self.write(|state| state.book.prune(now()));
            tokio::select! {
                () = shutdown.cancelled() => return,
                changed = offered.changed() => if changed.is_err() { return },
            }
        }
    }

    /// The key that stands for this one now, and where it listens, if it was given up for another.
    pub(crate) fn heir(&self, provider: &NodeKey) -> Option<(NodeKey, Vec<String>)> {
        self.read(|state| {
            let heir = state.book.lineage().current(provider).filter(|heir| heir != provider)?;
            let newest =
                state.book.live(now()).filter(|listing| listing.node_key == heir).max_by_key(|l| l.created_at());
            Some((heir, newest.map(|listing| listing.addresses.clone()).unwrap_or_default()))
        })
    }
    /// Every key that is known to be given up, with what became of it and what proves that.
    pub(crate) fn given_up(&self) -> Vec<(NodeKey, String, String)> {
        self.read(|state| {
            let all = state.book.lineage().all();
            all.map(|(key, fate)| (key, fate.to_string(), fate.proof())).collect()
        })
    }

    /// A key gave way. Returns, of every key that this touches, the keys that it stands for now.
    fn gave_way(&self, word: LastWord) -> Vec<(NodeKey, Vec<NodeKey>)> {
        let (old, new) = (word.said.old, word.said.new);
        self.write(|state| {
            let dealt_with = state.reputation.records().contains_key(&old);
            match state.book.give_up(word, dealt_with) {
                Ok(gone) => {
                    let fate = state.book.lineage().fate(&old).map(|fate| fate.to_string()).unwrap_or_default();
                    tracing::info!(provider = %old.short(), fate, listings = gone, "a key was given up");
                }
                Err(refusal) => {
                    tracing::debug!(provider = %old.short(), %refusal, "a key that was given up");
                    return Vec::new();
                }
            }
            let lineage = state.book.lineage();
            let touched = [Some(old), new].into_iter().flatten().chain(lineage.heirs_named_by(&old));
            let touched: BTreeSet<NodeKey> =
                touched.flat_map(|key| [Some(key), lineage.current(&key)]).flatten().collect();
            touched.into_iter().map(|key| (key, lineage.line(&key))).collect()
        })
    }

    pub(super) fn apply(&self, listing: VerifiedListing) {
        let (name, provider) = (listing.model.clone(), listing.node_key);
        match self.write(|state| state.book.apply(now(), listing)) {
            Ok(applied) => tracing::debug!(model = %name, provider = %provider.short(), ?applied, "listing"),
            Err(refusal) => tracing::debug!(model = %name, provider = %provider.short(), %refusal, "listing refused"),
        }
    }
    fn read<T>(&self, f: impl FnOnce(&State) -> T) -> T {
        f(&self.state.read().unwrap_or_else(PoisonError::into_inner))
    }
    fn write<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        f(&mut self.state.write().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A running subscription to the relays.
pub(crate) struct Listening {
    subscriber: Subscriber,
}

impl Listening {
    /// Fills the market's book from these relays, now and from here on. Texts of log checkpoints go to `notes`; which keys
    /// stand for which, to `consumer`.
    pub(crate) async fn start(
        market: &Market,
        relays: Vec<String>,
        notes: Option<mpsc::Sender<String>>,
        consumer: Option<mpsc::Sender<consumer::Message>>,
        shutdown: CancellationToken,
    ) -> Result<Listening, StartError> {
        let (successions, heard) = mpsc::channel(SUCCESSIONS);
        let successions = Some(successions);
        let config = SubscriberConfig { notes, successions, ..SubscriberConfig::new(RelayConfig::new(relays)) };
        tokio::spawn(follow(market.clone(), heard, consumer));
        let (subscriber, listings) = Subscriber::start(config, shutdown.clone()).await?;
        tokio::spawn(fill(market.clone(), listings, shutdown));
        Ok(Listening { subscriber })
    }
    /// Waits until the relays have sent what they had stored. Returns how many have.
    pub(crate) async fn synced(&self, timeout: Duration) -> usize {
        self.subscriber.synced(timeout).await
    }
    pub(crate) fn health(&self) -> watch::Receiver<Vec<RelayHealth>> {
        self.subscriber.health()
    }
    pub(crate) fn counters(&self) -> BTreeMap<&'static str, u64> {
        self.subscriber.counters()
    }
}

/// Hears which keys gave way.
async fn follow(
    market: Market,
    mut heard: mpsc::Receiver<Succeeded>,
    consumer: Option<mpsc::Sender<consumer::Message>>,
) {
    while let Some((signed, said)) = heard.recv().await {
        for (key, line) in market.gave_way(LastWord { signed, said }) {
            if let Some(consumer) = &consumer {
                let event = ConsumerEvent::Line { key, line };
                let _ = consumer.send(consumer::Message::Event(event)).await;
            }
        }
    }
}

async fn fill(market: Market, mut listings: mpsc::Receiver<VerifiedListing>, shutdown: CancellationToken) {
    let mut prune = tokio::time::interval(PRUNE_EVERY);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = prune.tick() => {
                market.write(|state| state.book.prune(now()));
            }
            listing = listings.recv() => match listing {
                Some(listing) => market.apply(listing),
                None => return,
            },
        }
    }
}
