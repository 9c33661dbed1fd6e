//! Driving the provider role: its actions against engine, wallet and links; its deaths and returns.

use super::{Cheat, ProviderNode, What, Who, World, cheat, parts};
use rand::Rng;
use satgrid_engine::{
    port::{Command, EngineEvent, JobError},
    toy::ToyEngine,
};
use satgrid_ledger::{
    Entry,
    log::{MemoryTiles, SignedCheckpoint, consistency_proof, inclusion_proof, root_at},
};
use satgrid_node::{
    provider::{EngineId, Offering, Provider, ProviderAction, ProviderEvent},
    recover::Fold,
};
use satgrid_protocol::frame::{self, LogAsk, LogProof, ProviderControl};
use satgrid_types::{Digest, Msat, node_key};
use satgrid_wallet::{fake::Crash, port::InvoiceRequest};

const ENGINE: EngineId = EngineId(0);
/// How long a wallet takes to make an invoice.
const INVOICE_MS: u64 = 4;

impl World {
    /// A provider's process starts: the journal is folded, what it holds is taken up, the listing goes out.
    pub fn start_provider(&mut self, p: usize) {
        let now = self.now;
        let node = &mut self.providers[p];
        assert!(node.role.is_none(), "it runs already");
        let mut seed = parts::bytes32(&format!("provider {p} seed {}", self.options.seed));
        seed[0] ^= node.epoch as u8;
        let mut role = Provider::new(node.config.clone(), node.key.clone(), seed);
        let mut fold = Fold::new([node_key(&node.key)]);
        node.journal.entries().iter().for_each(|entry| fold.entry(entry));
        let recovered = fold.finish();
        node.old_refunds = recovered.refunds.iter().map(|refund| refund.hash).collect();
        role.restore(now, recovered.provider_sessions, recovered.refunds);
        node.role = Some(role);
        node.engine = ToyEngine::new(node.toy.clone());
        node.desk = Default::default();
        node.halted = None;
        self.publish(p);
        self.settle();
    }

    /// Publishes (or refreshes) the listing.
    pub fn publish(&mut self, p: usize) {
        let now = self.now;
        let node = &self.providers[p];
        let by = (&node.key, &node.nostr, node.purse.lightning);
        let listing = parts::listing_of(&self.net, now, by, (node.rates, node.layers), &node.toy);
        let node = &mut self.providers[p];
        node.listing = listing.clone();
        let (profile, build) = (listing.profiles[0], listing.build);
        let offering = Offering { listing, engine: ENGINE, rates: node.quoted, profile, build };
        let epoch = node.epoch;
        self.tell_provider(p, epoch, ProviderEvent::Offer(Box::new(offering)));
    }

    /// Signs a tree head over what is durable, as the daemon does from time to time; `bend` may lie about the root.
    pub fn sign_head(&mut self, p: usize, bend: impl FnOnce(Digest) -> Digest) {
        let node = &self.providers[p];
        let (entries, epoch) = (node.journal.durable_entries(), node.epoch);
        let mut tiles = tiles(entries);
        let size = tiles.size();
        let root = bend(root_at(size, &mut tiles).unwrap());
        let note = SignedCheckpoint::sign(size, root, &node.key).note().to_owned();
        self.tell_provider(p, epoch, ProviderEvent::TreeHead { note });
        self.settle();
    }

    /// The process dies, engine and wallet with it; of its unanswered appends the first few survive.
    pub fn crash_provider(&mut self, p: usize, crash: Crash) {
        let pending = self.providers[p].journal.pending();
        let survive = self.rng.gen_range(0..=pending);
        self.say(|| format!("provider {p} dies, {survive} of {pending} appends survive"));
        let node = &mut self.providers[p];
        node.role = None;
        node.epoch += 1;
        node.stepping = false;
        node.work.clear();
        node.desk = Default::default();
        node.journal.crash(survive);
        let lightning = node.purse.lightning;
        node.purse = super::Purse::new(lightning);
        self.net.crash(self.now, lightning, crash);
        self.cut_links_of(None, Some(p));
        self.settle();
    }

    /// It is back.
    pub fn restart_provider(&mut self, p: usize) {
        let lightning = self.providers[p].purse.lightning;
        self.net.restart(self.now, lightning);
        self.reconnect_wallets();
        self.start_provider(p);
    }

    pub(super) fn reconnect_wallets(&mut self) {
        let addr = std::net::SocketAddr::from(([192, 0, 2, 1], 9_735));
        for c in &self.consumers {
            for p in &self.providers {
                let (a, b) = (c.purse.lightning, p.purse.lightning);
                if self.net.is_up(a) && self.net.is_up(b) {
                    self.net.connect(a, b, addr).unwrap();
                }
            }
        }
    }

    pub fn pause_provider(&mut self, p: usize, why: Option<String>) {
        let epoch = self.providers[p].epoch;
        self.tell_provider(p, epoch, ProviderEvent::Paused(why));
        self.settle();
    }

    /// The engine's process dies; the node lives.
    pub fn kill_engine(&mut self, p: usize) {
        self.say(|| format!("the engine of provider {p} dies"));
        if self.providers[p].layers.is_some() {
            return self.kill_desk(p);
        }
        self.providers[p].engine.die("killed");
        self.kick_engine(p);
        self.settle();
    }
    pub fn restart_engine(&mut self, p: usize) {
        if self.providers[p].layers.is_some() {
            return self.restart_desk(p);
        }
        self.providers[p].engine.restart();
        self.kick_engine(p);
    }

    fn kick_engine(&mut self, p: usize) {
        let node = &mut self.providers[p];
        if !node.stepping {
            node.stepping = true;
            let (epoch, step) = (node.epoch, node.step_ms);
            self.at(step, What::Engine { provider: p, epoch });
        }
    }

    pub(super) fn engine_step(&mut self, p: usize, epoch: u64) {
        let node = &mut self.providers[p];
        if node.epoch != epoch {
            return;
        }
        node.stepping = false;
        let mut any = false;
        for _ in 0..node.toy.slots.max(1) {
            let Some(event) = self.providers[p].engine.poll_event() else { break };
            any = true;
            self.say(|| format!("engine {p}: {event:?}"));
            self.count_work(p, &event);
            self.tell_provider(p, epoch, ProviderEvent::Engine { engine: ENGINE, event });
        }
        if any {
            self.kick_engine(p);
        }
    }

    fn count_work(&mut self, p: usize, event: &EngineEvent) {
        let work = &mut self.providers[p].work;
        match event {
            EngineEvent::Prefilled { job, upto, cached } => {
                let usage = work.entry(*job).or_default();
                (usage.prompt, usage.cached_prompt) = (*upto, *cached);
            }
            EngineEvent::Tokens { job, ids, .. } => work.entry(*job).or_default().completion += ids.len() as u32,
            EngineEvent::Finished { job, .. } | EngineEvent::Failed { job, .. } => {
                work.remove(job);
            }
            EngineEvent::Down { .. } => work.clear(),
            EngineEvent::Logprobs { .. } | EngineEvent::Embedded { .. } | EngineEvent::Up => {}
        }
    }

    pub(super) fn drain_provider(&mut self, p: usize) -> bool {
        let mut busy = false;
        while let Some(action) = self.providers[p].role.as_mut().and_then(Provider::poll_action) {
            busy = true;
            self.provider_action(p, action);
        }
        busy
    }

    fn provider_action(&mut self, p: usize, action: ProviderAction) {
        let who = Who::Provider(p);
        match action {
            ProviderAction::Append(append) => self.append(who, append),
            ProviderAction::Control { link, frame } => {
                let swallowed = match self.providers[p].cheat {
                    Cheat::NeverCredits => matches!(frame, ProviderControl::Credited(..)),
                    Cheat::NoPromises => matches!(frame, ProviderControl::Promise(..)),
                    Cheat::NoProofs => matches!(frame, ProviderControl::Proof(..)),
                    _ => false,
                };
                if swallowed {
                    return;
                }
                self.send_to_consumer(p, link, None, frame::encode(&frame));
            }
            ProviderAction::Send { link, stream, frame } => {
                let ProviderNode { cheat, key, .. } = &self.providers[p];
                if let Some(frame) = cheat::bend(*cheat, key, frame) {
                    self.send_to_consumer(p, link, Some(stream), frame::encode(&frame));
                }
            }
            ProviderAction::FinishStream { link, stream } => self.close_stream(None, Some(p), link, stream),
            ProviderAction::CloseLink { link, reason, .. } => self.close_link(None, Some(p), link, reason),
            ProviderAction::MakeInvoice { ticket, amount, description_hash, expiry_secs } => {
                let result = self.make_invoice(p, amount, description_hash, expiry_secs);
                let epoch = self.providers[p].epoch;
                self.at(INVOICE_MS, What::Invoice { provider: p, epoch, ticket, result });
            }
            ProviderAction::Engine { command, .. } if self.providers[p].layers.is_some() => {
                self.desk_command(p, command);
            }
            ProviderAction::Engine { command, .. } => self.command(p, command),
            ProviderAction::Admit { job, session, request, order, .. } => {
                self.admit_part(p, job, order, (session, request));
            }
            ProviderAction::Settle { job, .. } => self.settle_part(p, job),
            ProviderAction::Route { .. } => panic!("rows find their way in this world"),
            ProviderAction::WalletHandled { hash } => self.wallet_handled(who, hash),
            ProviderAction::PayRefund { hash, bolt11, amount, max_fee, .. } => {
                let again = self.providers[p].old_refunds.contains(&hash);
                self.providers[p].purse.refunds.insert(hash, amount);
                self.pay(who, hash, bolt11, max_fee, again);
            }
            ProviderAction::ProveLog { link, ask } => {
                let node = &self.providers[p];
                let (hashes, epoch) = (prove(node.journal.entries(), ask), node.epoch);
                let proof = LogProof { ask, hashes };
                self.tell_provider(p, epoch, ProviderEvent::LogProved { link, proof });
            }
            ProviderAction::Halt { reason } => {
                self.say(|| format!("provider {p} halts: {reason}"));
                assert!(self.providers[p].journal.broken, "provider {p} halts by itself: {reason}");
                self.providers[p].halted = Some(reason);
            }
        }
    }

    fn command(&mut self, p: usize, command: Command) {
        let job = match &command {
            Command::Start(job) => Some(job.id),
            Command::Cancel { job } => {
                self.providers[p].work.remove(job);
                None
            }
            Command::Grant { .. } | Command::ForgetSession { .. } => None,
        };
        let refused = self.providers[p].engine.handle(command).is_err();
        if let Some(job) = job.filter(|_| refused) {
            let error = JobError::Backend { reason: "the engine is down".into() };
            let epoch = self.providers[p].epoch;
            self.tell_provider(
                p,
                epoch,
                ProviderEvent::Engine { engine: ENGINE, event: EngineEvent::Failed { job, error } },
            );
        }
        self.kick_engine(p);
    }

    fn make_invoice(&mut self, p: usize, amount: Msat, terms: Digest, expiry_secs: u32) -> Result<String, String> {
        let mut request = InvoiceRequest { amount, description_hash: terms, expiry_secs };
        let mut payee = self.providers[p].purse.lightning;
        match self.providers[p].cheat {
            Cheat::InvoiceAmount => request.amount = Msat(amount.0 * 10),
            Cheat::InvoiceTerms => request.description_hash = Digest([9; 32]),
            Cheat::InvoicePayee => payee = self.net.add_wallet(),
            Cheat::InvoiceReuse => {
                if let Some(first) = self.providers[p].first_invoice.get(&terms.0) {
                    return Ok(first.clone());
                }
            }
            _ => {}
        }
        let invoice = self.net.create_invoice(self.now, payee, request).map_err(|e| e.to_string())?;
        self.providers[p].first_invoice.insert(terms.0, invoice.bolt11.clone());
        Ok(invoice.bolt11)
    }
}

fn tiles(entries: &[Entry]) -> MemoryTiles {
    let mut tiles = MemoryTiles::default();
    entries.iter().for_each(|entry| tiles.push(entry.leaf()));
    tiles
}

/// What the log of these entries answers.
fn prove(entries: &[Entry], ask: LogAsk) -> Vec<Digest> {
    let mut tiles = tiles(entries);
    match ask {
        LogAsk::Inclusion(index, size) => inclusion_proof(index, size, &mut tiles).unwrap_or_default(),
        LogAsk::Consistency(old, new) => consistency_proof(old, new, &mut tiles).unwrap_or_default(),
    }
}
