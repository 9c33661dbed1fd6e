//! Any number of providers and consumers in one virtual time.
//!
//! The roles are the shipped ones; everything around them is here: links that lag and break, journals that answer late
//! and lose their tails, wallets on the fake Lightning network, toy engines, cheats. Every frame goes through its wire
//! form. After every step the bounds of [`oracle`] are checked, and every journal append is booked when it is made.
//!
//! The same options and the same calls give the same journals, byte for byte.

pub mod cheat;
mod consumer;
pub mod journal;
mod links;
pub mod oracle;
mod parts;
mod provider;
mod purse;
pub mod ring;

pub use cheat::Cheat;
pub use consumer::Ask;
pub use parts::*;

use links::Payload;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use satgrid_engine::{
    port::JobId,
    toy::{ToyConfig, ToyEngine},
};
use satgrid_ledger::entry::Evidence;
use satgrid_node::{
    LinkId, StreamId, Ticket,
    consumer::{ConsumerConfig, ConsumerEvent},
    provider::{InvoiceTicket, ProviderConfig, ProviderEvent},
};
use satgrid_types::{LayerRange, Msat, MsatPerMtok, RateCard, SessionId, UnixMs, node_key, nostr_key};
use satgrid_wallet::fake::{FakeNetwork, FaultRates};
use std::collections::BTreeMap;

/// When every world begins: 2026-01-01T00:00:00Z.
pub const EPOCH: UnixMs = UnixMs(1_767_225_600_000);

/// How a world is made.
#[derive(Debug, Clone)]
pub struct Options {
    pub seed: u64,
    pub latency_ms: (u64, u64),
    /// Each frame takes so much longer, at most.
    pub jitter_ms: u64,
    pub journal_ms: (u64, u64),
    pub wallet: FaultRates,
    /// Capacity of each consumer's channel to each provider.
    pub channel_sat: u64,
    pub provider: ProviderConfig,
    pub consumer: ConsumerConfig,
    pub toy: ToyConfig,
    pub rates: RateCard,
    /// Beside those who sell whole models: who sells these layers of one.
    pub layers: Vec<LayerRange>,
    /// Keep a readable trace.
    pub trace: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            seed: 1,
            latency_ms: (5, 30),
            jitter_ms: 3,
            journal_ms: (1, 6),
            wallet: FaultRates::NONE,
            channel_sat: 1_000_000,
            provider: ProviderConfig { engine_name: "toy 1".into(), ..ProviderConfig::default() },
            // Heads are signed where a test asks for them, not by a clock.
            consumer: ConsumerConfig { log_ms: u64::MAX / 4, ..ConsumerConfig::default() },
            toy: ToyConfig::default(),
            rates: usual_rates(),
            layers: Vec::new(),
            trace: std::env::var_os("SATGRID_TRACE").is_some(),
        }
    }
}

/// What is due at some time.
enum What {
    Durable { who: Who, epoch: u64, ticket: Ticket },
    Deliver { link: u64, to_provider: bool, stream: Option<StreamId>, payload: Payload },
    Unreachable { consumer: usize, epoch: u64, link: LinkId },
    Engine { provider: usize, epoch: u64 },
    Invoice { provider: usize, epoch: u64, ticket: InvoiceTicket, result: Result<String, String> },
    CloseInvoice { consumer: usize, epoch: u64, session: SessionId, result: Result<String, String> },
    Late { consumer: usize, epoch: u64, ring: u64 },
    Rows { epoch: u64, work: Box<ring::Work> },
    Computed { provider: usize, epoch: u64, job: JobId, work: Box<ring::Work> },
}

/// See the module.
pub struct World {
    pub now: UnixMs,
    pub net: FakeNetwork,
    pub providers: Vec<ProviderNode>,
    pub consumers: Vec<ConsumerNode>,
    pub options: Options,
    queue: BTreeMap<(UnixMs, u64), What>,
    next: u64,
    links: BTreeMap<u64, parts::Link>,
    next_link: u64,
    pub rng: ChaCha8Rng,
    pub steps: u64,
}

impl World {
    /// Providers and consumers that are up, each consumer with a channel to each provider. Those who sell layers come after
    /// the others.
    pub fn new(options: Options, whole: usize, consumers: usize) -> World {
        let providers = whole + options.layers.len();
        let mut world = World {
            now: EPOCH,
            net: FakeNetwork::new(options.seed, options.wallet),
            providers: Vec::new(),
            consumers: Vec::new(),
            queue: BTreeMap::new(),
            next: 0,
            links: BTreeMap::new(),
            next_link: 0,
            rng: ChaCha8Rng::seed_from_u64(options.seed ^ 0x5a7_6e1d),
            options,
            steps: 0,
        };
        world.net.handle_timeout(EPOCH);
        for p in 0..providers {
            let layers = p.checked_sub(whole).map(|at| world.options.layers[at]);
            world.add_provider(p, layers);
        }
        for c in 0..consumers {
            world.add_consumer(c);
        }
        for p in 0..providers {
            world.start_provider(p);
        }
        for c in 0..consumers {
            world.start_consumer(c);
        }
        world.settle();
        world
    }

    fn add_provider(&mut self, p: usize, layers: Option<LayerRange>) {
        let lightning = self.net.add_wallet();
        let key = ed25519_dalek::SigningKey::from_bytes(&parts::bytes32(&format!("provider {p}")));
        let nostr = parts::nostr_pair(&format!("provider {p} nostr"));
        let toy = self.options.toy.clone();
        // A position through all layers of a worker costs 40 msat.
        let of_layers = RateCard { position_layer: Some(MsatPerMtok(10_000_000)), ..RateCard::default() };
        let rates = if layers.is_some() { of_layers } else { self.options.rates };
        let listing = parts::listing_of(&self.net, self.now, (&key, &nostr, lightning), (rates, layers), &toy);
        let mut config = self.options.provider.clone();
        config.part_batch = 32;
        let genesis = genesis(&key, &nostr, lightning);
        self.providers.push(ProviderNode {
            role: None,
            key,
            nostr,
            config,
            layers,
            desk: ring::Desk::default(),
            rates,
            quoted: rates,
            listing,
            engine: ToyEngine::new(toy.clone()),
            toy,
            journal: journal::SimJournal::with_genesis(self.now, genesis),
            purse: Purse::new(lightning),
            cheat: Cheat::None,
            epoch: 0,
            step_ms: 10,
            unreachable_until: EPOCH,
            stepping: false,
            work: BTreeMap::new(),
            endowment: Msat::ZERO,
            halted: None,
            old_refunds: Default::default(),
            first_invoice: BTreeMap::new(),
        });
    }

    fn add_consumer(&mut self, c: usize) {
        let lightning = self.net.add_wallet();
        let key = ed25519_dalek::SigningKey::from_bytes(&parts::bytes32(&format!("consumer {c}")));
        let nostr = parts::nostr_pair(&format!("consumer {c} nostr"));
        for provider in &self.providers {
            self.net.add_channel(lightning, provider.purse.lightning, self.options.channel_sat, Msat::ZERO);
        }
        let genesis = genesis(&key, &nostr, lightning);
        let endowment = self.net.balance(lightning).map(|b| b.lightning_total).unwrap_or_default();
        self.consumers.push(ConsumerNode {
            role: None,
            key,
            nostr,
            master: parts::bytes32(&format!("consumer {c} master")),
            config: self.options.consumer.clone(),
            journal: journal::SimJournal::with_genesis(self.now, genesis),
            purse: Purse::new(lightning),
            calls: BTreeMap::new(),
            next_call: 0,
            rings: BTreeMap::new(),
            next_ring: 0,
            parts: BTreeMap::new(),
            never_signs: false,
            greed: 1,
            epoch: 0,
            halted: None,
            penalised: Vec::new(),
            endowment,
            host: std::net::IpAddr::from([192, 0, 2, u8::try_from(c).expect("few consumers")]),
        });
    }

    // Time.

    /// Lets everything happen that is due by `at`.
    pub fn run_until(&mut self, at: UnixMs) {
        while let Some(due) = self.next_due()
            && due <= at
        {
            self.step(due);
        }
        self.now = self.now.max(at);
        self.net.handle_timeout(self.now);
    }
    pub fn run_ms(&mut self, ms: u64) {
        self.run_until(self.now.plus_ms(ms));
    }
    /// Runs until `done`, at most for `ms`.
    ///
    /// # Panics
    /// Where it is not done by then.
    pub fn run_while(&mut self, what: &str, ms: u64, mut waiting: impl FnMut(&World) -> bool) {
        let end = self.now.plus_ms(ms);
        while waiting(self) {
            match self.next_due() {
                Some(due) if due <= end => self.step(due),
                _ => panic!("{what}: still not so after {ms} ms"),
            }
        }
    }

    fn next_due(&self) -> Option<UnixMs> {
        let queue = self.queue.first_key_value().map(|((at, _), _)| *at);
        let providers = self.providers.iter().filter_map(|p| {
            let role = p.role.as_ref()?.poll_timeout();
            [role, p.purse.payments.poll_timeout()].into_iter().flatten().min()
        });
        let consumers = self.consumers.iter().filter_map(|c| {
            let role = c.role.as_ref()?.poll_timeout();
            [role, c.purse.payments.poll_timeout()].into_iter().flatten().min()
        });
        let nodes = providers.chain(consumers).min();
        let due = [queue, self.net.poll_timeout(), nodes].into_iter().flatten().min()?;
        Some(due.max(self.now))
    }

    fn step(&mut self, due: UnixMs) {
        self.steps += 1;
        self.now = due;
        self.net.handle_timeout(due);
        if let Some(entry) = self.queue.first_entry()
            && entry.key().0 <= due
        {
            let what = entry.remove();
            self.happen(what);
        }
        self.wake_due();
        self.settle();
    }

    fn happen(&mut self, what: What) {
        match what {
            What::Durable { who, epoch, ticket } => self.durable(who, epoch, ticket),
            What::Deliver { link, to_provider, stream, payload } => self.deliver(link, to_provider, stream, payload),
            What::Unreachable { consumer, epoch, link } => {
                let event = ConsumerEvent::LinkFailed { link, reason: "connection refused".into() };
                self.tell_consumer(consumer, epoch, event);
            }
            What::Engine { provider, epoch } => self.engine_step(provider, epoch),
            What::Invoice { provider, epoch, ticket, result } => {
                self.tell_provider(provider, epoch, ProviderEvent::InvoiceMade { ticket, result });
            }
            What::Late { consumer, epoch, ring } => self.ring_is_late(consumer, epoch, ring),
            What::Rows { epoch, work } => self.rows_arrive(epoch, *work),
            What::Computed { provider, epoch, job, work } => self.computed(provider, epoch, job, *work),
            What::CloseInvoice { consumer, epoch, session, result } => {
                self.tell_consumer(consumer, epoch, ConsumerEvent::CloseInvoice { session, result });
            }
        }
    }

    /// Wakes roles and payments whose time has come. A role that still wants to be woken in the past would spin.
    fn wake_due(&mut self) {
        let now = self.now;
        for p in 0..self.providers.len() {
            self.providers[p].purse.payments.handle_timeout(now);
            if let Some(role) = &mut self.providers[p].role
                && role.poll_timeout().is_some_and(|at| at <= now)
            {
                role.handle(now, ProviderEvent::Tick);
                let next = role.poll_timeout();
                assert!(next.is_none_or(|at| at > now), "provider {p} spins: woken at {now:?}, wants {next:?}");
            }
        }
        for c in 0..self.consumers.len() {
            self.consumers[c].purse.payments.handle_timeout(now);
            if let Some(role) = &mut self.consumers[c].role
                && role.poll_timeout().is_some_and(|at| at <= now)
            {
                role.handle(now, ConsumerEvent::Tick);
                let next = role.poll_timeout();
                assert!(next.is_none_or(|at| at > now), "consumer {c} spins: woken at {now:?}, wants {next:?}");
            }
        }
    }

    /// Does everything that the roles and wallets ask for now, then checks the bounds.
    pub fn settle(&mut self) {
        loop {
            let mut busy = false;
            for p in 0..self.providers.len() {
                busy |= self.drain_provider(p);
                busy |= self.pump_purse(Who::Provider(p));
            }
            for c in 0..self.consumers.len() {
                busy |= self.drain_consumer(c);
                busy |= self.pump_purse(Who::Consumer(c));
            }
            if !busy {
                break;
            }
        }
        self.check_bounds();
    }

    fn at(&mut self, ms: u64, what: What) {
        self.queue.insert((self.now.plus_ms(ms), self.next), what);
        self.next += 1;
    }
    fn between(&mut self, range: (u64, u64)) -> u64 {
        self.rng.gen_range(range.0..=range.1)
    }
    pub(crate) fn say(&self, text: impl FnOnce() -> String) {
        if self.options.trace {
            eprintln!("{:>9} ms  {}", self.now.since(EPOCH), text());
        }
    }

    // Journals.

    fn append(&mut self, who: Who, append: satgrid_node::Append) {
        let (now, ticket) = (self.now, append.ticket);
        self.say(|| {
            let kinds = append.drafts.iter().map(|d| d.evidence.as_ref().map_or("reservation", Evidence::kind));
            format!("{who:?} appends {}", kinds.collect::<Vec<_>>().join(", "))
        });
        let (journal, epoch) = match who {
            Who::Provider(p) => {
                let node = &mut self.providers[p];
                (&mut node.journal, node.epoch)
            }
            Who::Consumer(c) => {
                let node = &mut self.consumers[c];
                (&mut node.journal, node.epoch)
            }
        };
        if journal.broken {
            self.journal_failed(who);
            return;
        }
        let busy = journal.pending() > 0;
        journal.append(now, ticket, append.drafts);
        // One writer: an append is not durable before the one that was asked for earlier.
        let last = self.queue.iter().filter_map(|((at, _), what)| match what {
            What::Durable { who: w, epoch: e, .. } if *w == who && *e == epoch => Some(*at),
            _ => None,
        });
        let earliest = if busy { last.max().unwrap_or(now) } else { now };
        let range = self.options.journal_ms;
        let at = now.plus_ms(self.between(range)).max(earliest);
        self.at(at.since(now), What::Durable { who, epoch, ticket });
    }

    fn journal_failed(&mut self, who: Who) {
        let reason = "no space left on device".to_owned();
        match who {
            Who::Provider(p) => {
                let epoch = self.providers[p].epoch;
                self.tell_provider(p, epoch, ProviderEvent::JournalFailed { reason });
            }
            Who::Consumer(c) => {
                let epoch = self.consumers[c].epoch;
                self.tell_consumer(c, epoch, ConsumerEvent::JournalFailed { reason });
            }
        }
    }

    fn durable(&mut self, who: Who, epoch: u64, ticket: Ticket) {
        match who {
            Who::Provider(p) if self.providers[p].epoch == epoch => {
                let receipts = self.providers[p].journal.durable(ticket).iter().filter(|e| e.opening().is_some());
                let receipts: Vec<_> = receipts.cloned().collect();
                self.tell_provider(p, epoch, ProviderEvent::Durable(ticket));
                for entry in receipts {
                    self.tell_provider(p, epoch, ProviderEvent::Logged(Box::new(entry)));
                }
            }
            Who::Consumer(c) if self.consumers[c].epoch == epoch => {
                let _ = self.consumers[c].journal.durable(ticket);
                self.tell_consumer(c, epoch, ConsumerEvent::Durable(ticket));
            }
            Who::Provider(_) | Who::Consumer(_) => {}
        }
    }

    fn tell_provider(&mut self, p: usize, epoch: u64, event: ProviderEvent) {
        let now = self.now;
        let node = &mut self.providers[p];
        if node.epoch == epoch
            && let Some(role) = &mut node.role
        {
            role.handle(now, event);
        }
    }
    fn tell_consumer(&mut self, c: usize, epoch: u64, event: ConsumerEvent) {
        let now = self.now;
        let node = &mut self.consumers[c];
        if node.epoch == epoch
            && let Some(role) = &mut node.role
        {
            role.handle(now, event);
        }
    }
}

fn genesis(
    key: &ed25519_dalek::SigningKey,
    nostr: &secp256k1::Keypair,
    lightning: satgrid_types::LightningKey,
) -> Evidence {
    Evidence::Genesis { node: node_key(key), nostr: nostr_key(nostr), lightning, network: "regtest".into() }
}
