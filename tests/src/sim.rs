//! The whole market as one seeded run: consumers, providers, some of which cheat, leads and those who sell them layers, under
//! faults, and then quiet.
//!
//! What a seed decides: how many nodes, who cheats and how, latencies, how rough the Lightning network is, which calls are
//! made when, and when what dies, breaks or fails to write. What must be true: the bounds of [`crate::world::oracle`] at
//! every step; and at the end, with everything up again,
//!
//! * every call has ended, honest providers serve every consumer again, and workers every lead;
//! * layers tile the model, each evaluated the same positions, and nobody signed for more than came back ([`crate::world::ring`]);
//! * no payment was settled twice, none is without an end, and the books agree with the wallets;
//! * audits are clean, and each pair's journals agree, session by session;
//! * nobody honest was accused;
//! * what is alive equals what the journal folds to.

mod faults;

pub use faults::Fault;

use crate::world::{Ask, Cheat, EPOCH, Options, World, ring::layers_of};
use rand::{Rng, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use satgrid_ledger::{entry::Evidence, statements::CreditTransfer};
use satgrid_types::{BothSigned, Msat, PaymentHash, Sampling, UnixMs, node_key};
use satgrid_wallet::fake::FaultRates;
use std::collections::{BTreeMap, BTreeSet};

/// What happened in a run, to see that runs reach what they are for.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Stats {
    pub calls: u64,
    pub finished: u64,
    pub failed: u64,
    pub orphaned: u64,
    pub failovers: u64,
    pub receipts: u64,
    pub abandoned: u64,
    pub settled: u64,
    pub payment_failures: u64,
    pub misbehaviour: u64,
    pub refunds: u64,
    pub credit_notes: u64,
    pub notes_spent: u64,
    pub provider_deaths: u64,
    pub consumer_deaths: u64,
    pub engine_deaths: u64,
    pub broken_links: u64,
    pub broken_journals: u64,
    pub rings: u64,
    pub rings_done: u64,
    pub workers_lost: u64,
    pub replayed: u64,
    pub steps: u64,
}

impl Stats {
    fn fields(&mut self) -> [&mut u64; 23] {
        [
            &mut self.calls,
            &mut self.finished,
            &mut self.failed,
            &mut self.orphaned,
            &mut self.failovers,
            &mut self.receipts,
            &mut self.abandoned,
            &mut self.settled,
            &mut self.payment_failures,
            &mut self.misbehaviour,
            &mut self.refunds,
            &mut self.credit_notes,
            &mut self.notes_spent,
            &mut self.provider_deaths,
            &mut self.consumer_deaths,
            &mut self.engine_deaths,
            &mut self.broken_links,
            &mut self.broken_journals,
            &mut self.rings,
            &mut self.rings_done,
            &mut self.workers_lost,
            &mut self.replayed,
            &mut self.steps,
        ]
    }
    pub fn add(&mut self, mut other: Stats) {
        for (sum, more) in self.fields().into_iter().zip(other.fields()) {
            *sum += *more;
        }
    }
    /// Each was reached at least once.
    pub fn reached_everything(mut self) -> bool {
        self.fields().into_iter().all(|count| *count > 0)
    }
}

/// One run.
pub struct Sim {
    pub world: World,
    pub rng: ChaCha8Rng,
    pub stats: Stats,
    agenda: BTreeMap<(UnixMs, u64), Fault>,
    next: u64,
    /// When the faults end.
    end: UnixMs,
    /// Providers of whole models; those after them sell layers.
    whole: usize,
}

/// Runs a seed to its quiet end.
///
/// # Panics
/// Where something is not as it must be.
pub fn run(seed: u64, trace: bool) -> (Stats, [u8; 32]) {
    let mut sim = Sim::new(seed, trace);
    sim.storm();
    sim.calm();
    sim.verdict();
    (sim.stats, sim.world.fingerprint())
}

impl Sim {
    fn new(seed: u64, trace: bool) -> Sim {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let slow = rng.gen_range(1..200);
        let mut options = Options {
            seed,
            latency_ms: (1, slow),
            jitter_ms: rng.gen_range(0..=40),
            journal_ms: (1, rng.gen_range(1..=60)),
            wallet: if rng.gen_bool(0.6) { FaultRates::ROUGH } else { FaultRates::NONE },
            trace,
            ..Options::default()
        };
        options.consumer.shun_ms = 60_000;
        options.consumer.exposure_cap = Msat::sat(rng.gen_range(300..2_000));
        options.consumer.slices.first = Msat::sat(rng.gen_range(10..60));
        options.consumer.refund_idle = rng.gen_bool(0.3);
        options.provider.quote_validity_ms = rng.gen_range(20_000..600_000);
        let (providers, consumers) = (rng.gen_range(2..=4), rng.gen_range(1..=3));
        // Some consumers lead: workers for two or three ranges, and for one of them a second one.
        let places = if rng.gen_bool(0.4) { rng.gen_range(2..=3) } else { 0 };
        options.layers = (0..places).map(layers_of).collect();
        if places > 0 && rng.gen_bool(0.6) {
            options.layers.push(layers_of(rng.gen_range(0..places)));
        }
        let mut world = World::new(options, providers, consumers);
        for p in 0..providers {
            world.providers[p].step_ms = rng.gen_range(5..60);
            // Some can pay refunds.
            if rng.gen_bool(0.5) {
                for c in 0..consumers {
                    let (a, b) = (world.providers[p].purse.lightning, world.consumers[c].purse.lightning);
                    world.net.add_channel(a, b, 50_000, Msat::ZERO);
                    let more = world.providers[p].endowment.saturating_add(Msat::sat(50_000));
                    world.providers[p].endowment = more;
                }
            }
            if p > 0 && rng.gen_bool(0.3) {
                world.providers[p].cheat = *Cheat::ALL.choose(&mut rng).unwrap();
            }
        }
        let end = EPOCH.plus_ms(rng.gen_range(20_000..90_000));
        let mut sim =
            Sim { world, rng, stats: Stats::default(), agenda: BTreeMap::new(), next: 0, end, whole: providers };
        sim.plan();
        sim
    }

    fn plan(&mut self) {
        let span = self.end.since(EPOCH);
        for _ in 0..self.rng.gen_range(4..14) {
            let at = self.rng.gen_range(0..span);
            let fault = self.random_call();
            self.add(EPOCH.plus_ms(at), fault);
        }
        if self.world.providers.len() > self.whole {
            for _ in 0..self.rng.gen_range(1..4) {
                let at = self.rng.gen_range(0..span);
                let consumer = self.rng.gen_range(0..self.world.consumers.len());
                let (prompt, decode) = (self.rng.gen_range(1..120), self.rng.gen_range(1..60));
                let workers = self.workers(true);
                let struck = *workers.choose(&mut self.rng).expect("each range has a seller");
                self.add(EPOCH.plus_ms(at), Fault::Lead { consumer, workers, prompt, decode });
                if self.rng.gen_bool(0.4) {
                    let (at, for_ms) = (at + self.rng.gen_range(200..3_000), self.rng.gen_range(50..3_000));
                    let fault = match self.rng.gen_range(0..3) {
                        0 => Fault::KillEngine { provider: struck, for_ms },
                        1 => Fault::BreakLinks { consumer, provider: struck },
                        _ => Fault::KillProvider { provider: struck, for_ms, lose_rows_ms: 0 },
                    };
                    self.add(EPOCH.plus_ms(at), fault);
                }
            }
        }
        for _ in 0..self.rng.gen_range(0..7) {
            let at = self.rng.gen_range(500..span);
            let fault = faults::random(&mut self.rng, self.world.providers.len(), self.world.consumers.len());
            self.add(EPOCH.plus_ms(at), fault);
        }
    }

    fn random_call(&mut self) -> Fault {
        let consumer = self.rng.gen_range(0..self.world.consumers.len());
        let mut providers: Vec<usize> = (0..self.whole).collect();
        providers.shuffle(&mut self.rng);
        let prompt = if self.rng.gen_bool(0.2) { self.rng.gen_range(600..1_600) } else { self.rng.gen_range(1..200) };
        let mut ask = Ask::tokens(prompt, self.rng.gen_range(1..500)).to(&providers);
        ask.sampling =
            Sampling { seed: self.rng.gen_range(0..1_000), temperature_micro: 700_000, ..Sampling::default() };
        ask.allow_fallbacks = self.rng.gen_bool(0.9);
        Fault::Call {
            consumer,
            ask: Box::new(ask),
            cancel_after_ms: self.rng.gen_bool(0.15).then(|| self.rng.gen_range(0..4_000)),
        }
    }

    /// One seller for each range of layers; where there are two, the first, or `any`.
    fn workers(&mut self, any: bool) -> Vec<usize> {
        let (sold, rng) = (&self.world.options.layers, &mut self.rng);
        let mut chosen: BTreeMap<u32, usize> = BTreeMap::new();
        for (at, range) in sold.iter().enumerate() {
            let first = !chosen.contains_key(&range.start());
            if first || (any && rng.gen_bool(0.5)) {
                chosen.insert(range.start(), self.whole + at);
            }
        }
        chosen.into_values().collect()
    }

    pub(super) fn add(&mut self, at: UnixMs, fault: Fault) {
        self.agenda.insert((at, self.next), fault);
        self.next += 1;
    }

    /// Everything that was planned happens.
    fn storm(&mut self) {
        while let Some(entry) = self.agenda.first_entry() {
            let (at, _) = *entry.key();
            let fault = entry.remove();
            self.world.run_until(at);
            self.apply(fault);
        }
        self.world.run_until(self.end);
    }

    /// No more faults: calls end, payments resolve, the two sides of each session meet once more, sessions close.
    fn calm(&mut self) {
        self.world.net.set_rates(FaultRates::NONE);
        let providers = self.world.providers.len();
        for p in 0..providers {
            self.world.restart_engine(p);
            self.world.publish(p);
        }
        self.world.run_while("every call ends", 600_000, |w| w.open_calls() + w.open_rings() > 0);
        self.world.run_ms(240_000);
        let (mut last, mut rings) = (Vec::new(), Vec::new());
        let workers = self.workers(false);
        for c in 0..self.world.consumers.len() {
            if !workers.is_empty() {
                rings.push((c, self.world.lead(c, &workers, 20, 10)));
            }
            for p in 0..self.whole {
                let call = self.world.submit(c, Ask::tokens(20, 30).to(&[p]));
                last.push((c, p, call));
            }
        }
        self.world.run_while("the last calls end", 300_000, |w| w.open_calls() + w.open_rings() > 0);
        for (c, ring) in rings {
            let ring = &self.world.consumers[c].rings[&ring];
            assert!(ring.done && ring.losses() == 0, "consumer {c} cannot lead over these workers any more: {ring:#?}");
        }
        for (c, p, call) in last {
            let (log, honest) = (self.world.call(c, call), self.world.providers[p].cheat == Cheat::None);
            assert!(!honest || log.is_ok(), "consumer {c} cannot be served by provider {p} any more: {:?}", log.end);
        }
        self.world.run_ms(20_000);
        for c in 0..self.world.consumers.len() {
            self.world.close_all(c);
        }
        self.world.run_ms(60_000);
        // Requests of consumers that never came back end by themselves.
        self.world.run_ms(30 * 60_000);
    }

    fn verdict(&mut self) {
        let world = &self.world;
        let cheats: BTreeSet<usize> =
            (0..world.providers.len()).filter(|p| world.providers[*p].cheat != Cheat::None).collect();
        let honest: BTreeSet<_> = (0..world.providers.len()).filter(|p| !cheats.contains(p)).collect();
        let (sellers, buyers) = world.assert_quiet_but(&cheats);
        for (c, buyer) in buyers.iter().enumerate() {
            for p in &honest {
                world.assert_reports_agree((*p, &sellers[*p]), (c, buyer));
            }
            let keys: BTreeSet<_> = honest.iter().map(|p| node_key(&world.providers[*p].key)).collect();
            let mut settled: BTreeSet<PaymentHash> = BTreeSet::new();
            let mut ended: BTreeMap<PaymentHash, bool> = BTreeMap::new();
            for entry in world.consumers[c].journal.entries() {
                match &entry.evidence {
                    Some(Evidence::Misbehaviour { peer, rule, .. }) => {
                        assert!(!keys.contains(peer), "an honest provider was accused of {rule}");
                        self.stats.misbehaviour += 1;
                    }
                    Some(Evidence::PaymentAttempted { payment_hash, .. }) => {
                        ended.insert(*payment_hash, false);
                    }
                    Some(Evidence::PaymentSettled { payment_hash, .. }) => {
                        assert!(settled.insert(*payment_hash), "{payment_hash} was settled twice");
                        ended.insert(*payment_hash, true);
                    }
                    Some(Evidence::PaymentFailed { payment_hash, .. }) => {
                        ended.insert(*payment_hash, true);
                    }
                    _ => {}
                }
            }
            assert!(ended.values().all(|ended| *ended), "consumer {c} has a payment without an end");
            let role = world.consumers[c].role.as_ref().expect("everything is up");
            for session in role.session_states() {
                let honest = keys.contains(&session.provider());
                let prepaid = session.paid().saturating_add(session.credited());
                assert!(!honest || prepaid >= session.charged(), "charged beyond what was paid or credited");
            }
            // Whatever notes brought into sessions is what they were worth to those that were owed.
            let amount = |both: &BothSigned<CreditTransfer>| both.peek().expect("it was signed").amount;
            let came = role.session_states().map(|s| s.credited()).fold(Msat::ZERO, Msat::saturating_add);
            let went =
                role.session_states().filter_map(|s| s.spent().map(amount)).fold(Msat::ZERO, Msat::saturating_add);
            assert_eq!(came, went, "consumer {c}: credit that came and credit that went");
            for log in world.consumers[c].calls.values() {
                self.stats.calls += 1;
                self.stats.finished += u64::from(log.is_ok());
                self.stats.failed += u64::from(log.end.as_ref().is_some_and(Result::is_err));
                self.stats.orphaned += u64::from(log.orphaned && log.end.is_none());
                self.stats.failovers += u64::from(log.end.is_some() && log.bill().legs.len() > 1);
            }
            for ring in world.consumers[c].rings.values() {
                self.stats.rings += 1;
                self.stats.rings_done += u64::from(ring.done);
                self.stats.workers_lost += u64::from(ring.losses());
                self.stats.replayed += ring.replayed();
            }
            let journal = &world.consumers[c].journal;
            self.stats.receipts += journal.count("receipt") as u64;
            self.stats.abandoned += journal.count("abandoned") as u64;
            self.stats.settled += journal.count("payment-settled") as u64;
            self.stats.payment_failures += journal.count("payment-failed") as u64;
            self.stats.refunds += journal.count("refund-received") as u64;
            self.stats.credit_notes += journal.count("credit-note") as u64;
            self.stats.notes_spent += journal.count("credit-transfer") as u64;
        }
        self.check_texts();
        self.stats.steps = self.world.steps;
    }

    /// Every token that a client heard is the one that a run without any trouble gives at its place, whoever sent it.
    fn check_texts(&self) {
        for node in &self.world.consumers {
            for log in node.calls.values() {
                let whole = self.world.undisturbed(log);
                assert_eq!(log.tokens, whole[..log.tokens.len()], "a text went wrong on its way");
                assert!(!log.is_ok() || log.tokens.len() == whole.len(), "a call finished before its text did");
            }
        }
    }
}
