//! A lead and its worker as pure roles: an order for layers, or for experts, is funded, metered, acknowledged up to what came back, and
//! receipted, and both ledgers are clean.
#![allow(clippy::unwrap_used, clippy::wildcard_enum_match_arm)]

use ed25519_dalek::SigningKey;
use satgrid_engine::port::{Command, EngineEvent, FinishReason, JobId};
use satgrid_ledger::{
    audit::{Detail, Report, audit},
    bundle::{Filter, Opened, open},
    entry::Draft,
    statements::{ExpertCount, Leg, PartOrder},
    testing::{Party, bolt11, bundle_of, bytes32},
};
use satgrid_node::{
    consumer::{
        CallError, CallId, Consumer, ConsumerAction, ConsumerConfig, ConsumerEvent, Emission, SessionIndex, Submit,
        session_key,
    },
    provider::{EngineId, Offering, PartDone, Provider, ProviderAction, ProviderConfig, ProviderEvent},
};
use satgrid_protocol::hop::{Expected, Leading, Shown, take_ticket};
use satgrid_types::{
    Bindings, BuildId, Digest, EngineProfile, ExpertSet, LayerRange, Listing, ModelRoot, Msat, MsatPerMtok, NodeKey,
    Part, PartUsage, PaymentHash, Preimage, RateCard, RequestId, SessionId, Signed, Speed, TokenizerHash, UnixMs,
    VerifiedListing, WireType, WorkKind, lightning_binding_message, node_key, nostr_key, sign_lightning_message,
    sign_node_binding, verify_listing,
};
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;

const LAYERS: (u32, u32) = (2, 12);
const CALL: CallId = CallId(1);
const MASTER: [u8; 32] = [7; 32];
const START: UnixMs = UnixMs(1_700_000_000_000);

fn layers() -> LayerRange {
    LayerRange::new(LAYERS.0, LAYERS.1).unwrap()
}

fn listing(party: &Party, part: Part, rates: RateCard) -> VerifiedListing {
    let mut listing = Listing {
        version: Listing::VERSION,
        lightning_address: None,
        lightning_unproven: false,
        experts_hash: None,
        embeds: None,
        links: Vec::new(),
        model: "tiny".into(),
        model_root: ModelRoot(bytes32("model")),
        tokenizer: TokenizerHash([0; 32]),
        quantisation: "part".into(),
        part,
        rates,
        context_length: 4_096,
        slots: 4,
        speed: Speed::default(),
        memory_bytes: 1 << 20,
        profiles: vec![EngineProfile::Exact],
        build: BuildId(bytes32("build")),
        instruction_set: "avx2".into(),
        addresses: vec!["127.0.0.1:9338".into()],
        region: None,
        node_key: node_key(&party.node),
        lightning_node: party.lightning_key(),
        expires_at: START.as_secs() + 1_800,
        bindings: Bindings::default(),
    };
    listing.bindings = Bindings {
        node: Some(sign_node_binding(&party.node, &nostr_key(&party.nostr), &listing.d())),
        lightning: Some(sign_lightning_message(&party.lightning, &lightning_binding_message(&listing.node_key))),
    };
    verify_listing(listing.to_event(&party.nostr, START.as_secs(), &[0; 32]), START).unwrap()
}

fn counts(rows: &[(u32, u32, u64)]) -> Vec<ExpertCount> {
    rows.iter().map(|&(layer, expert, rows)| ExpertCount { layer, expert, rows }).collect()
}

/// Both roles, joined by a perfect link, with a wallet that pays at once.
struct Pair {
    now: UnixMs,
    worker: Party,
    lead: Party,
    provider: Provider,
    consumer: Consumer,
    listing: VerifiedListing,
    /// What the desk was told.
    desk: Vec<ProviderAction>,
    heard: Vec<Emission>,
    penalised: Vec<String>,
    preimages: BTreeMap<PaymentHash, (Preimage, Msat)>,
}

impl Pair {
    fn new() -> Pair {
        // A position through all ten layers costs 10 msat.
        let rates = RateCard { position_layer: Some(MsatPerMtok(1_000_000)), ..RateCard::default() };
        Pair::of(Part::Layers(layers()), rates)
    }

    /// A worker that sells experts, at 2 msat a row.
    fn of_experts() -> Pair {
        let rates = RateCard { expert_row: Some(MsatPerMtok(2_000_000)), ..RateCard::default() };
        Pair::of(Part::Experts(ExpertSet::new([(0, 1), (0, 3), (1, 0)])), rates)
    }

    fn of(part: Part, rates: RateCard) -> Pair {
        let (mut worker, mut lead) = (Party::new("worker"), Party::new("lead"));
        for party in [&mut worker, &mut lead] {
            let genesis = party.genesis();
            party.append(START, Draft::of(genesis));
        }
        let listing = listing(&worker, part, rates);
        let config =
            ProviderConfig { part_window: Msat(100), part_batch: 32, expert_batch: 50, ..ProviderConfig::default() };
        let mut provider = Provider::new(config, worker.node.clone(), [1; 32]);
        let (profile, build) = (EngineProfile::Exact, listing.build);
        let offering = Offering { listing: listing.clone(), engine: EngineId(0), rates: listing.rates, profile, build };
        provider.handle(START, ProviderEvent::Offer(Box::new(offering)));
        let consumer = Consumer::new(ConsumerConfig::default(), MASTER, [2; 32]);
        Pair {
            now: START,
            worker,
            lead,
            provider,
            consumer,
            listing,
            desk: Vec::new(),
            heard: Vec::new(),
            penalised: Vec::new(),
            preimages: BTreeMap::new(),
        }
    }

    fn order(&self, layers: Option<LayerRange>) -> PartOrder {
        let (lead, request) = (node_key(&self.lead.node), RequestId(bytes32("customer's request")));
        PartOrder { layers, lead, request, wire: WireType::F32, max_positions: 500 }
    }

    fn submit(&mut self, layers: Option<LayerRange>) {
        let submit = Submit::of_part(CALL, self.listing.clone(), self.order(layers));
        self.buy(ConsumerEvent::Submit(Box::new(submit)));
    }
    fn buy(&mut self, event: ConsumerEvent) {
        self.consumer.handle(self.now, event);
        self.settle();
    }
    fn sell(&mut self, event: ProviderEvent) {
        self.provider.handle(self.now, event);
        self.settle();
    }
    fn pass(&mut self, ms: u64) {
        self.now = self.now.plus_ms(ms);
        self.buy(ConsumerEvent::Tick);
        self.sell(ProviderEvent::Tick);
    }

    /// Carries out everything that both roles ask for.
    fn settle(&mut self) {
        loop {
            if let Some(action) = self.provider.poll_action() {
                self.provider_asks(action);
            } else if let Some(action) = self.consumer.poll_action() {
                self.consumer_asks(action);
            } else {
                return;
            }
        }
    }

    fn provider_asks(&mut self, action: ProviderAction) {
        let now = self.now;
        match action {
            ProviderAction::Append(append) => {
                append.drafts.into_iter().for_each(|draft| self.worker.append(now, draft));
                self.provider.handle(now, ProviderEvent::Durable(append.ticket));
            }
            ProviderAction::Control { link, frame } => {
                self.consumer.handle(now, ConsumerEvent::Control { link, frame })
            }
            ProviderAction::Send { link, stream, frame } => {
                self.consumer.handle(now, ConsumerEvent::Frame { link, stream, frame });
            }
            ProviderAction::FinishStream { link, stream } => {
                self.consumer.handle(now, ConsumerEvent::StreamClosed { link, stream });
            }
            ProviderAction::CloseLink { link, reason, .. } => {
                self.consumer.handle(now, ConsumerEvent::LinkDown { link, reason, lost: false });
            }
            ProviderAction::MakeInvoice { ticket, amount, description_hash, .. } => {
                let preimage = Preimage(bytes32(&format!("preimage {}", self.preimages.len())));
                let hash = PaymentHash(Sha256::digest(preimage.0).into());
                self.preimages.insert(hash, (preimage, amount));
                let text = bolt11(&self.worker.lightning, amount, &description_hash, &hash, now);
                self.provider.handle(now, ProviderEvent::InvoiceMade { ticket, result: Ok(text) });
            }
            desk @ (ProviderAction::Admit { .. }
            | ProviderAction::Route { .. }
            | ProviderAction::Settle { .. }
            | ProviderAction::Engine { .. }) => self.desk.push(desk),
            ProviderAction::WalletHandled { .. } => {}
            ProviderAction::PayRefund { .. } | ProviderAction::ProveLog { .. } | ProviderAction::Halt { .. } => {
                panic!("{action:?}")
            }
        }
    }

    fn consumer_asks(&mut self, action: ConsumerAction) {
        let now = self.now;
        match action {
            ConsumerAction::Append(append) => {
                append.drafts.into_iter().for_each(|draft| self.lead.append(now, draft));
                self.consumer.handle(now, ConsumerEvent::Durable(append.ticket));
            }
            ConsumerAction::Connect { link, session, .. } => {
                let peer = node_key(&session_key(&MASTER, session));
                self.provider.handle(now, ProviderEvent::LinkUp { link, peer, host: None });
                self.consumer.handle(now, ConsumerEvent::LinkUp { link });
            }
            ConsumerAction::Control { link, frame } => {
                self.provider.handle(now, ProviderEvent::Control { link, frame })
            }
            ConsumerAction::OpenStream { link, stream, frame } | ConsumerAction::Send { link, stream, frame } => {
                self.provider.handle(now, ProviderEvent::Request { link, stream, frame });
            }
            ConsumerAction::Pay { hash, amount, .. } => {
                let (preimage, _) = self.preimages[&hash];
                self.provider.handle(now, ProviderEvent::PaymentReceived { hash, amount });
                self.consumer.handle(now, ConsumerEvent::PaymentSettled { hash, preimage, fee: Msat(0) });
            }
            ConsumerAction::Emit { emission, .. } => self.heard.push(emission),
            ConsumerAction::Penalise { rule, .. } => self.penalised.push(rule),
            ConsumerAction::CloseLink { link, .. } => self.provider.handle(now, ProviderEvent::LinkDown { link }),
            ConsumerAction::FinishStream { .. }
            | ConsumerAction::ResetStream { .. }
            | ConsumerAction::Left { .. }
            | ConsumerAction::WalletHandled { .. }
            | ConsumerAction::PaidSlice { .. }
            | ConsumerAction::Settled { .. } => {}
            ConsumerAction::ResolvePayment { .. }
            | ConsumerAction::MakeCloseInvoice { .. }
            | ConsumerAction::Witness { .. }
            | ConsumerAction::Halt { .. } => panic!("{action:?}"),
        }
    }

    fn job(&self) -> JobId {
        let admitted =
            self.desk.iter().find_map(|a| if let ProviderAction::Admit { job, .. } = a { Some(*job) } else { None });
        admitted.expect("the order was admitted")
    }
    /// Positions that the desk may compute.
    fn granted(&self) -> u32 {
        let grants = self.desk.iter().filter_map(|action| match action {
            ProviderAction::Engine { command: Command::Grant { output_upto, .. }, .. } => Some(*output_upto),
            _ => None,
        });
        grants.max().unwrap_or(0)
    }
    fn ordered(&self) -> (SessionId, NodeKey, RequestId) {
        let ordered = self.heard.iter().find_map(|emission| match emission {
            Emission::Ordered { session, key, request } => Some((*session, *key, *request)),
            _ => None,
        });
        ordered.expect("the worker was ordered")
    }

    /// The desk reports so many positions; the lead knows of `sent`, and has `returned` back.
    fn work(&mut self, done: u64, returned: u64, sent: u64) {
        let usage = |n| PartUsage::default().plus(WorkKind::Prefill, n, 10).unwrap();
        self.buy(ConsumerEvent::Ordered {
            call: CALL,
            sent: usage(sent),
            returned: usage(returned),
            experts: Vec::new(),
        });
        let (input, output) = (Digest([1; 32]), Digest([2; 32]));
        let done = PartDone { usage: usage(done), input, output, bytes_in: 9, bytes_out: 9, busy_ms: 3 };
        self.sell(ProviderEvent::Worked { engine: EngineId(0), job: self.job(), done });
    }
    /// The desk reports rows of each expert; the lead knows of what it sent and of what came back.
    fn evaluate(&mut self, done: u64, returned: &[(u32, u32, u64)], sent: u64) {
        let usage = |expert_rows| PartUsage { expert_rows, ..PartUsage::default() };
        let back = returned.iter().map(|(_, _, rows)| rows).sum();
        let (sent, returned, experts) = (usage(sent), usage(back), counts(returned));
        self.buy(ConsumerEvent::Ordered { call: CALL, sent, returned, experts });
        let (input, output) = (Digest([1; 32]), Digest([2; 32]));
        let done = PartDone { usage: usage(done), input, output, bytes_in: 9, bytes_out: 9, busy_ms: 3 };
        self.sell(ProviderEvent::Worked { engine: EngineId(0), job: self.job(), done });
    }
    /// The lead asks for the receipt, and the desk ends the job with these counters.
    fn receipt(&mut self, counted: &[(u32, u32, u64)]) {
        self.buy(ConsumerEvent::PartDone { call: CALL });
        assert!(self.desk.iter().any(|action| matches!(action, ProviderAction::Settle { .. })));
        let (engine, job) = (EngineId(0), self.job());
        self.sell(ProviderEvent::Counted { engine, job, counts: counts(counted) });
        let event = EngineEvent::Finished { job, reason: FinishReason::Stop, evaluated: 0 };
        self.sell(ProviderEvent::Engine { engine, event });
    }
    fn acked_rows(&self) -> u64 {
        let state = self.consumer.session_states().next().unwrap();
        state.requests().values().map(|r| r.acked().part.unwrap_or_default().expert_rows).sum()
    }
    fn acked(&self) -> u64 {
        let state = self.consumer.session_states().next().unwrap();
        state.requests().values().map(|r| r.acked().part.unwrap_or_default().prefill).sum()
    }

    #[track_caller]
    fn clean(&self) -> [Report; 2] {
        [&self.worker, &self.lead].map(|party| {
            let bundle = bundle_of(&party.journal.entries(), &party.node, Filter::All, false);
            let Opened::Journal(reader) = open(&bundle[..]).unwrap() else { panic!("a journal") };
            let report = audit(reader, Detail::Sessions).unwrap();
            assert_eq!(report.findings, []);
            report
        })
    }
}

#[test]
fn layers_are_bought_metered_acknowledged_and_receipted() {
    let mut pair = Pair::new();
    pair.submit(Some(layers()));
    // 100 msat are 10 positions; the window is never less than two batches.
    assert_eq!(pair.granted(), 64);
    // The worker speaks of 32 positions, the lead has 20 of them back: it signs when it has them all.
    pair.work(32, 20, 40);
    assert_eq!(pair.acked(), 0);
    pair.work(32, 32, 40);
    assert_eq!(pair.acked(), 32);
    assert_eq!(pair.granted(), 96, "the window moves with the acknowledgement");
    pair.work(50, 50, 50);
    assert_eq!(pair.acked(), 32, "less than a batch");
    pair.pass(1_000);
    assert_eq!(pair.acked(), 50, "an interval later");

    pair.buy(ConsumerEvent::PartDone { call: CALL });
    assert!(pair.desk.iter().any(|action| matches!(action, ProviderAction::Settle { .. })));
    let (job, reason) = (pair.job(), FinishReason::Stop);
    let event = EngineEvent::Finished { job, reason, evaluated: 50 };
    pair.sell(ProviderEvent::Engine { engine: EngineId(0), event });
    let Some(Emission::Finished { bill, .. }) = pair.heard.last() else { panic!("{:?}", pair.heard) };
    assert_eq!(bill.cost(), Msat(500), "50 positions through 10 layers");
    let leg: Leg = bill.legs[0].part.unwrap();
    assert_eq!(leg.rows.map(|rows| (rows.input, rows.output)), Some((Digest([1; 32]), Digest([2; 32]))));
    assert_eq!((leg.order, leg.usage.prefill), (pair.order(Some(layers())), 50));
    let [worker, lead] = pair.clean();
    assert_eq!((worker.as_provider.charged_msat, lead.as_consumer.charged_msat), (500, 500));
}

#[test]
fn experts_are_bought_metered_acknowledged_and_receipted() {
    let mut pair = Pair::of_experts();
    pair.submit(None);
    // 100 msat are 50 rows; the window is never less than two of the largest calls.
    assert_eq!(pair.granted(), 100);
    pair.evaluate(60, &[(0, 1, 40)], 60);
    assert_eq!(pair.acked_rows(), 0, "20 of them are still on their way");
    pair.evaluate(60, &[(0, 1, 40), (0, 3, 20)], 60);
    assert_eq!((pair.acked_rows(), pair.granted()), (60, 160));
    pair.evaluate(75, &[(0, 1, 40), (0, 3, 20), (1, 0, 15)], 75);
    pair.receipt(&[(0, 1, 40), (0, 3, 20), (1, 0, 15)]);
    let Some(Emission::Finished { bill, .. }) = pair.heard.last() else { panic!("{:?}", pair.heard) };
    assert_eq!(bill.cost(), Msat(150));
    assert_eq!(bill.legs[0].experts, counts(&[(0, 1, 40), (0, 3, 20), (1, 0, 15)]));
    let [worker, lead] = pair.clean();
    assert_eq!((worker.as_provider.charged_msat, lead.as_consumer.charged_msat), (150, 150));
}

#[test]
fn a_worker_s_counters_leave_out_nothing_that_came_back() {
    let check = |counted: &[(u32, u32, u64)], rule: &str| {
        let mut pair = Pair::of_experts();
        pair.submit(None);
        pair.evaluate(60, &[(0, 1, 40), (0, 3, 20)], 60);
        pair.receipt(counted);
        assert_eq!(pair.penalised, [rule], "{counted:?}");
        let [_, lead] = pair.clean();
        assert_eq!(lead.misbehaviour, 1, "{counted:?}");
        // Charged is what both had signed before.
        assert_eq!(lead.as_consumer.charged_msat, 120);
    };
    // Another sum than is charged, rows at another expert, another layer, an expert twice, none at all.
    check(&[(0, 1, 40), (0, 3, 21)], "expert-counts");
    check(&[(0, 1, 41), (0, 3, 19)], "expert-counts");
    check(&[(0, 1, 40), (1, 0, 20)], "expert-counts");
    check(&[(0, 1, 40), (0, 1, 20)], "expert-counts");
    check(&[], "expert-counts");
}

#[test]
fn rows_that_were_not_ordered_are_not_paid() {
    let mut pair = Pair::of_experts();
    pair.submit(None);
    pair.evaluate(80, &[(0, 1, 60)], 60);
    assert_eq!(pair.penalised, ["overcount-part"]);
    pair.clean();
    let mut pair = Pair::of_experts();
    pair.submit(Some(layers()));
    let Some(Emission::Failed { error, .. }) = pair.heard.last() else { panic!("{:?}", pair.heard) };
    assert!(error.to_string().contains("what is sold here is 3 experts"), "{error}");
}

#[test]
fn a_worker_that_counts_more_than_was_ordered_is_left_with_a_proof() {
    let mut pair = Pair::new();
    pair.submit(Some(layers()));
    pair.work(32, 32, 32);
    assert_eq!(pair.acked(), 32);
    // 64 positions claimed; 40 were ordered.
    pair.work(64, 40, 40);
    assert_eq!(pair.penalised, ["overcount-part"]);
    let Some(Emission::Failed { error: CallError::ProvidersFailed { .. }, bill }) = pair.heard.last() else {
        panic!("{:?}", pair.heard)
    };
    assert_eq!(bill.cost(), Msat(320), "what both had signed is owed, and no more");
    assert_eq!(bill.legs[0].part.unwrap().rows, None);
    let [_, lead] = pair.clean();
    assert_eq!(lead.misbehaviour, 1);
}

#[test]
fn an_order_for_other_layers_is_refused() {
    let mut pair = Pair::new();
    pair.submit(LayerRange::new(2, 11));
    let Some(Emission::Failed { error, .. }) = pair.heard.last() else { panic!("{:?}", pair.heard) };
    assert!(error.to_string().contains("what is sold here is layers 2-12"), "{error}");
    assert!(pair.desk.is_empty());
    pair.clean();
}

#[test]
fn tickets_are_signed_with_the_session_s_key() {
    let mut pair = Pair::new();
    pair.submit(Some(layers()));
    let (session, key, request) = pair.ordered();
    assert_eq!(key, node_key(&session_key(&MASTER, SessionIndex(0))));
    pair.buy(ConsumerEvent::WantTicket { call: CALL });
    let Some(Emission::Ticket { ticket }) = pair.heard.last() else { panic!("{:?}", pair.heard) };
    let (upstream, downstream) = (node_key(&pair.lead.node), node_key(&pair.worker.node));
    let expected = Expected { lead: key, upstream, downstream, session, request };
    let taken = take_ticket(ticket, &expected, &mut Shown::default(), pair.now).unwrap();
    assert_eq!(taken.positions, 500);

    // The way back: the worker shows this node a ticket of the same session.
    pair.buy(way_back(&pair.lead.node, upstream, session));
    let Some(ProviderAction::Route { route, job, .. }) = pair.desk.last() else { panic!("{:?}", pair.desk) };
    assert_eq!((route.slot, route.next, *job), (9, upstream, pair.job()));
    let expected = Expected { upstream: downstream, downstream: upstream, ..expected };
    take_ticket(&route.ticket, &expected, &mut Shown::default(), pair.now).unwrap();
    let forged = SigningKey::from_bytes(&[1; 32]);
    let expected = Expected { lead: node_key(&forged), ..expected };
    assert!(take_ticket(&route.ticket, &expected, &mut Shown::default(), pair.now).is_err());
}

fn way_back(lead: &SigningKey, next: NodeKey, session: SessionId) -> ConsumerEvent {
    ConsumerEvent::Route {
        call: CALL,
        slot: 9,
        downstream: None,
        next,
        addresses: vec!["127.0.0.1:1".into()],
        resend: Vec::new(),
        leading: Signed::sign(&Leading::of(session), lead),
    }
}

/// Requests of one lead share its hops at a worker: whoever pays for an order in another's name must not come among them.
#[test]
fn an_order_goes_nowhere_until_its_lead_says_that_it_pays() {
    let stranger = SigningKey::from_bytes(&[7; 32]);
    for (by_lead, of_session) in [(false, true), (true, false)] {
        let mut pair = Pair::new();
        pair.submit(Some(layers()));
        let (session, ..) = pair.ordered();
        let (lead, before) = (node_key(&pair.lead.node), pair.desk.len());
        let key = if by_lead { pair.lead.node.clone() } else { stranger.clone() };
        let of = if of_session { session } else { SessionId([9; 32]) };
        pair.buy(way_back(&key, lead, of));
        let routed = |action: &ProviderAction| matches!(action, ProviderAction::Route { .. });
        assert!(!pair.desk[before..].iter().any(routed), "{:?}", pair.desk);
    }
}
