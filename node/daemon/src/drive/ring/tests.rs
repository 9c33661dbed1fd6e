//! A ring of two workers that sell layers, and what its engine is told when orders end and rows are refused.

use super::*;
use crate::drive::{market::Market, now};
use satgrid_engine::stage::{
    codec::HiddenRows,
    port::WorkId,
    ring::{Held, RingPiece},
};
use satgrid_market::{
    Catalogue,
    layers::{LayerDemand, LayerNeeds},
};
use satgrid_protocol::refusal::{Cause, Refusal};
use satgrid_protocol_quic::Limits;
use satgrid_types::{
    Bindings, BuildId, EngineProfile, LightningKey, Listing, ModelRoot, Msat, MsatPerMtok, Part, RateCard, Speed,
    TokenizerHash, lightning_binding_message, nostr_key, sign_lightning_message, sign_node_binding, verify_listing,
};
use secp256k1::{Keypair, SECP256K1, SecretKey};
use std::net::{Ipv4Addr, SocketAddr};
use tokio_util::sync::CancellationToken;

const LEAD: u8 = 9;
const ROOT: ModelRoot = ModelRoot([7; 32]);

fn key(n: u8) -> SigningKey {
    SigningKey::from_bytes(&[n; 32])
}

fn node(n: u8) -> NodeKey {
    node_key(&key(n))
}

fn range(stage: u32) -> LayerRange {
    LayerRange::new(1 + 2 * stage, 3 + 2 * stage).unwrap()
}

/// What a worker lists for the layers of a stage.
fn listing(worker: u8, stage: u32) -> VerifiedListing {
    let nostr = Keypair::from_seckey_slice(SECP256K1, &[worker; 32]).unwrap();
    let lightning = SecretKey::from_slice(&[worker + 100; 32]).unwrap();
    let at = now().as_secs();
    let rates = RateCard {
        input: MsatPerMtok(0),
        cached_input: MsatPerMtok(0),
        output: MsatPerMtok(0),
        per_request: Msat(0),
        position_layer: Some(MsatPerMtok(10)),
        expert_row: None,
    };
    let mut listing = Listing {
        version: Listing::VERSION,
        model: "tiny".into(),
        model_root: ROOT,
        tokenizer: TokenizerHash([0; 32]),
        quantisation: "part".into(),
        part: Part::Layers(range(stage)),
        rates,
        context_length: 4_096,
        slots: 4,
        speed: Speed::default(),
        memory_bytes: 1 << 30,
        profiles: vec![EngineProfile::Exact],
        build: BuildId([6; 32]),
        instruction_set: "avx2".into(),
        addresses: vec!["127.0.0.1:9".into()],
        region: None,
        node_key: node(worker),
        lightning_node: LightningKey(lightning.public_key(SECP256K1).serialize()),
        expires_at: at + 1_800,
        lightning_address: None,
        lightning_unproven: false,
        experts_hash: None,
        embeds: None,
        links: Vec::new(),
        bindings: Bindings::default(),
    };
    listing.bindings = Bindings {
        node: Some(sign_node_binding(&key(worker), &nostr_key(&nostr), &listing.d())),
        lightning: Some(sign_lightning_message(&lightning, &lightning_binding_message(&listing.node_key))),
    };
    verify_listing(listing.to_event(&nostr, at, &[0; 32]), now()).unwrap()
}

/// A lead's ring over the workers 1 and 2, and what its engine hears. `spare` sells what the second one sells.
fn ring(spare: Option<u8>) -> (Running, mpsc::UnboundedReceiver<RingEvent>) {
    let plan: Vec<Planned> = [(1_u8, 0_u32), (2, 1)]
        .map(|(worker, stage)| Planned { range: range(stage), listing: Arc::new(listing(worker, stage)) })
        .to_vec();
    let market = Market::new(Catalogue::shipped().unwrap());
    for (worker, stage) in [(1, 0), (2, 1)].into_iter().chain(spare.map(|worker| (worker, 1))) {
        market.apply(listing(worker, stage));
    }
    let demand = LayerDemand {
        root: ROOT,
        range: LayerRange::new(1, 5).unwrap(),
        ends: (node(LEAD), node(LEAD)),
        not: BTreeSet::from([node(LEAD)]),
        profile: EngineProfile::Exact,
        build: None,
        max_rate: None,
        slots: 1,
        context: 1,
        needs: LayerNeeds::default(),
    };
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let parts = RingParts {
        plan,
        model_layers: 6,
        own: vec![LayerRange::new(0, 1).unwrap(), LayerRange::new(5, 6).unwrap()],
        wire: WireType::F32,
        n_embd: 1,
        key: Arc::new(key(LEAD)),
        addresses: Vec::new(),
        endpoint: QuicEndpoint::bind_client(any, Limits::default(), &CancellationToken::new()).unwrap(),
        switchboard: Switchboard::default(),
        consumer: mpsc::channel(8).0,
        scout: Scout { market, demand, store: None },
    };
    let (said, _) = mpsc::unbounded_channel();
    let (events, heard) = mpsc::unbounded_channel();
    (Running::new(parts, 64, said, mpsc::channel(8).0, events), heard)
}

fn order(job: u64, worker: u8) -> (SessionId, RequestId) {
    (SessionId([worker; 32]), RequestId([u8::try_from(job).unwrap(); 32]))
}

impl Running {
    /// A job whose workers all took their orders; its sequence has its number.
    fn with_job(&mut self, id: u64) {
        self.begin(JobId(id), RequestId([u8::try_from(id).unwrap() + 50; 32]));
        let job = self.jobs.get_mut(&JobId(id)).unwrap();
        for (worker, n) in job.workers.iter_mut().zip(1..) {
            let (session, request) = order(id, n);
            worker.ordered = Some((session, node(LEAD), request));
        }
        (job.ready, job.ticketed) = (true, true);
    }

    /// One row of each job goes around.
    fn send(&mut self, work: u64, jobs: &[u64]) {
        let piece = |job: &u64| {
            let sequence = u32::try_from(*job).unwrap();
            RingPiece { job: JobId(*job), sequence, start: 0, rows: 1, purpose: WorkKind::Decode }
        };
        let pieces: Vec<RingPiece> = jobs.iter().map(piece).collect();
        let rows = HiddenRows {
            wire: WireType::F32,
            count: u32::try_from(jobs.len()).unwrap(),
            bytes: vec![0; 4 * jobs.len()],
        };
        let work = RingWork { id: WorkId(work), pieces, rows, ends_at: None, again: false };
        self.said(Said::Command(RingCommand::Work(work)));
    }

    fn under_way(&self) -> Vec<u64> {
        self.works.keys().copied().collect()
    }
}

fn refusal(work: u64, rows: u64, why: Cause, accused: Option<u8>) -> Refusal {
    let (session, request) = order(1, 2);
    let (version, worker, accused) = (Refusal::VERSION, node(2), accused.map(node));
    Refusal { version, worker, session, request, work, rows, slot: None, why, accused, text: "no".into() }
}

/// The jobs that the engine was told the end of.
#[track_caller]
fn ended(heard: &mut mpsc::UnboundedReceiver<RingEvent>) -> Vec<u64> {
    match heard.try_recv() {
        Ok(RingEvent::Ended { jobs, .. }) => jobs.into_iter().map(|job| job.0).collect(),
        Ok(other) => panic!("{other:?}"),
        Err(_) => Vec::new(),
    }
}

#[tokio::test]
async fn an_order_that_nobody_else_takes_ends_its_own_request_alone() {
    let (mut ring, mut heard) = ring(None);
    [1, 2, 3].into_iter().for_each(|job| ring.with_job(job));
    [(10, &[1, 2][..]), (11, &[1]), (12, &[3])].into_iter().for_each(|(work, jobs)| ring.send(work, jobs));
    ring.jobs.get_mut(&JobId(1)).unwrap().workers[1].over = true;
    ring.lost(JobId(1), 1);
    assert_eq!(ended(&mut heard), [1]);
    assert_eq!(ring.under_way(), [12], "what is another's alone goes on; what is void is sent again by the engine");
    // The engine had sent this before it heard of it.
    ring.send(13, &[1, 3]);
    assert_eq!((ended(&mut heard), ring.under_way()), (vec![1], vec![12]));
    ring.send(14, &[2]);
    assert_eq!(ring.under_way(), [12, 14]);
    assert!(ring.held_back.is_empty() && heard.try_recv().is_err());
    // Its other worker ends too: nobody is ordered for it any more.
    let call = ring.jobs[&JobId(1)].workers[0].call;
    let failed = Emission::Finished { reason: satgrid_types::FinishReason::Stop, bill: Default::default() };
    assert!(ring.emission(JobId(1), call, failed).is_empty());
    assert!(ring.jobs[&JobId(2)].goes_on() && ring.jobs[&JobId(3)].goes_on());
}

#[tokio::test]
async fn a_refusal_ends_what_it_is_about_and_nothing_else() {
    let (mut ring, mut heard) = ring(None);
    [1, 2, 3].into_iter().for_each(|job| ring.with_job(job));
    let say = |ring: &mut Running, said: &Refusal, signer: u8| ring.refused(node(1), &Signed::sign(said, &key(signer)));
    // Of one request in a work of two.
    ring.send(10, &[1, 2]);
    ring.send(11, &[3]);
    say(&mut ring, &Refusal { slot: Some(1), ..refusal(10, 2, Cause::Worker, None) }, 2);
    assert_eq!((ended(&mut heard), ring.under_way()), (vec![1], vec![11]));
    assert!(ring.jobs[&JobId(2)].goes_on());
    // A gap is told, and ends nothing; where it is in a sequence of somebody else's it is no gap.
    ring.send(12, &[2]);
    say(&mut ring, &refusal(12, 1, Cause::Gap(2, 0), None), 2);
    assert!(
        matches!(heard.try_recv(), Ok(RingEvent::NeedsReplay { stage: 1, held }) if held == [Held { sequence: 2, upto: 0 }])
    );
    ring.send(13, &[2]);
    say(&mut ring, &refusal(13, 1, Cause::Gap(3, 0), None), 2);
    assert_eq!(ended(&mut heard), [2]);
    // Of what is not under way: nobody's trouble.
    say(&mut ring, &refusal(99, 1, Cause::Worker, None), 2);
    assert_eq!((ended(&mut heard), ring.under_way()), (vec![], vec![11]));
    // While another worker's place is taken, what is under way goes out again in any case.
    ring.jobs.get_mut(&JobId(3)).unwrap().lost = Some(0);
    say(&mut ring, &refusal(11, 1, Cause::Worker, None), 2);
    assert!(heard.try_recv().is_err() && ring.jobs[&JobId(3)].goes_on());
}

#[tokio::test]
async fn who_is_common_to_failures_gives_way_between_two_requests() {
    let fails = |said: Refusal, signer: u8| {
        let (mut ring, _heard) = ring(Some(3));
        ring.with_job(1);
        // Each of the two has failed twice before, with others.
        for ms in [6_000, 3_000] {
            let before = satgrid_types::UnixMs(now().0 - ms);
            ring.blame.count(before, [node(1), node(2)]);
        }
        ring.send(10, &[1]);
        ring.refused(node(1), &Signed::sign(&said, &key(signer)));
        let blamed = [1, 2].map(|worker| ring.blame.gives_way(now(), &node(worker)));
        ring.jobs.get_mut(&JobId(1)).unwrap().over = true;
        ring.begin(JobId(2), RequestId([3; 32]));
        (blamed, ring.parts.plan[1].listing.node_key == node(3))
    };
    assert_eq!(fails(refusal(10, 1, Cause::Worker, None), 2), ([false, true], true));
    assert_eq!(
        fails(refusal(10, 1, Cause::Sender, Some(1)), 2),
        ([true, true], true),
        "nobody else sells the first one's"
    );
    assert_eq!(fails(refusal(10, 1, Cause::Gap(1, 0), None), 2), ([false, false], false));
    assert_eq!(fails(refusal(10, 1, Cause::Gap(5, 0), None), 2), ([false, true], true), "in nobody's sequence");
    // The second one's word, as the first one made it up: in its name, or out of another request.
    assert_eq!(fails(refusal(10, 1, Cause::Worker, None), 1), ([true, false], false));
    let replayed = Refusal { request: RequestId([77; 32]), ..refusal(10, 1, Cause::Worker, None) };
    assert_eq!(fails(replayed, 2), ([true, false], false));
}
