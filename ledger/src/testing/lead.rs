//! The journal of a node that leads: it bought layers or experts of a worker, then sold an answer, or a stage's layers, whose
//! receipt names the worker's.

use super::{Work, World, bundle_of, bytes32, chain_entries, drafts_of};
use crate::{
    bundle::Filter,
    entry::{Draft, Evidence},
    statements::{
        Ack, ExpertCount, ExpertLegs, ExpertSplit, Leg, LostRows, PartOrder, PartWork, Passed, Receipt, RequestOpen,
        Split, ack_id, receipt_id, stage_root,
    },
    transfer::Transfer,
};
use ed25519_dalek::SigningKey;
use satgrid_pricing::{charge, numerators};
use satgrid_types::{
    BothSigned, Digest, LayerRange, Msat, MsatPerMtok, PartUsage, RateCard, Signed, TokenUsage, UnixMs, WireType,
    WorkKind, node_key,
};

/// What worker and lead state, before anybody signs.
#[derive(Debug, Clone)]
pub struct Stated {
    pub usage: PartUsage,
    pub work: PartWork,
    pub split: Option<Split>,
    /// Where experts were bought instead of layers.
    pub counts: Option<Vec<ExpertCount>>,
    pub expert_split: Option<ExpertSplit>,
    /// The worker's receipt is written after that of the customer's request.
    pub late: bool,
}

/// Such a journal, as an export of the whole. `bend` changes what is stated.
pub fn lead_bundle(bend: impl Fn(&mut Stated)) -> Vec<u8> {
    let rates = RateCard { position_layer: Some(MsatPerMtok(1_000_000)), ..RateCard::default() };
    let (drafts, key) = lead_drafts(rates, None, bend);
    bundle_of(&chain_entries(drafts), &key, Filter::All, false)
}

/// The journal of a lead whose worker's engine died under a batch of 8, which nobody else could evaluate: it was never sold.
pub fn lost_bundle(bend: impl Fn(&mut Stated)) -> Vec<u8> {
    lead_bundle(|stated| {
        if let Some(split) = &mut stated.split {
            split.sent = Digest([9; 32]);
            split.lost = Some(LostRows { positions: 8, bytes_sent: 48, bytes_received: 40 });
        }
        bend(stated);
    })
}

/// The journal of a lead that bought experts: two layers of ten rows through two experts each, of which the lead evaluated
/// some itself and had one evaluated twice.
pub fn experts_bundle(bend: impl Fn(&mut Stated)) -> Vec<u8> {
    bought_experts(None, bend)
}

/// The same of a stage that leads experts itself: what it sold are those two layers, to a lead of its own.
pub fn stage_bundle(bend: impl Fn(&mut Stated)) -> Vec<u8> {
    bought_experts(LayerRange::new(0, 2), bend)
}

fn bought_experts(sold: Option<LayerRange>, bend: impl Fn(&mut Stated)) -> Vec<u8> {
    let rates = RateCard { expert_row: Some(MsatPerMtok(5_000_000)), ..RateCard::default() };
    let count = |layer, expert, rows| ExpertCount { layer, expert, rows };
    let (drafts, key) = lead_drafts(rates, sold, |stated| {
        let counts = vec![count(0, 1, 12), count(0, 3, 6), count(1, 0, 19)];
        stated.usage = PartUsage { expert_rows: 37, ..PartUsage::default() };
        stated.work.order.layers = None;
        stated.split = None;
        stated.counts = Some(counts);
        let own = vec![count(0, 2, 3), count(1, 7, 1)];
        stated.expert_split = Some(ExpertSplit { chosen: 2, layers: vec![10, 10], own, again: vec![1, 0] });
        bend(stated);
    });
    bundle_of(&chain_entries(drafts), &key, Filter::All, false)
}

fn at(drafts: &[(UnixMs, Draft)], kind: &str) -> usize {
    let is = |(_, draft): &(UnixMs, Draft)| draft.evidence.as_ref().is_some_and(|e| e.kind() == kind);
    drafts.iter().position(is).expect("the world made one")
}
fn evidence<'a>(drafts: &'a mut [(UnixMs, Draft)], kind: &str) -> &'a mut Evidence {
    let at = at(drafts, kind);
    drafts[at].1.evidence.as_mut().expect("found by its evidence")
}

/// Work on a part, as its order, its counts and its receipt state it.
struct Done {
    usage: PartUsage,
    work: PartWork,
    counts: Option<Vec<ExpertCount>>,
}

/// A request becomes an order; its acknowledgement and its receipt speak of the work. Gives the receipt's id.
fn becomes_work(
    drafts: &mut [(UnixMs, Draft)],
    (provider, buyer): (&SigningKey, &SigningKey),
    (rates, order): (&RateCard, PartOrder),
    done: Done,
) -> Digest {
    let usage = TokenUsage::of_part(done.usage);
    let n = numerators(&usage, rates).expect("small numbers");
    let cost = charge(n);
    let Evidence::Request(open) = evidence(drafts, "request") else { unreachable!("found by its kind") };
    let body = RequestOpen { prompt_tokens: 0, max_output: 0, part: Some(order), ..open.peek().expect("the world's") };
    *open = Signed::sign(&body, buyer);
    let Evidence::Ack(ack) = evidence(drafts, "ack") else { unreachable!("found by its kind") };
    let body = Ack { usage, numerators: n, cost, ..ack.peek().expect("the world's") };
    *ack = BothSigned::countersign(&Signed::sign(&body, provider), buyer);
    let last_ack = Some(ack_id(ack));
    let Evidence::Receipt { receipt, opening } = evidence(drafts, "receipt") else { unreachable!("found by its kind") };
    let body = Receipt {
        usage,
        numerators: n,
        cost,
        cumulative_numerators: n,
        cumulative_cost: cost,
        part: Some(done.work),
        expert_rows: done.counts,
        last_ack,
        ..receipt.peek().expect("the world's")
    };
    *receipt = BothSigned::countersign(&Signed::sign(&body, provider), buyer);
    *opening = None;
    let id = Digest(receipt_id(receipt).0);
    let hold = drafts[at(drafts, "request")].1.transfers[0].id;
    let receipt_at = at(drafts, "receipt");
    drafts[receipt_at].1.transfers = vec![Transfer::post_pending(hold, cost)];
    id
}

/// What `sold` names is sold instead of an answer.
fn lead_drafts(
    rates: RateCard,
    sold: Option<LayerRange>,
    bend: impl Fn(&mut Stated),
) -> (Vec<(UnixMs, Draft)>, SigningKey) {
    let asks = RateCard { position_layer: Some(MsatPerMtok(9_000_000)), ..RateCard::default() };
    let mut selling = if sold.is_some() { World::with_rates(asks) } else { World::new() };
    let mut sale = selling.open();
    selling.pay(&mut sale, Msat::sat(10));
    selling.complete(&mut sale, Work { prompt: 33, cached: 0, output: 8, acks: 1 });
    let lead = selling.provider.node.clone();
    let mut all = drafts_of(&selling.provider.journal.entries());

    let mut buying = World::of("worker", "provider", "stage", rates);
    let mut session = buying.open();
    buying.pay(&mut session, Msat::sat(10));
    buying.complete(&mut session, Work { prompt: 1, cached: 0, output: 0, acks: 1 });
    let worker = buying.provider.node.clone();
    let buyer = SigningKey::from_bytes(&bytes32("stage 1"));
    let mut bought = drafts_of(&buying.consumer.journal.entries());
    bought.retain(|(_, draft)| !matches!(draft.evidence, Some(Evidence::Promise(_) | Evidence::Genesis { .. })));

    let Evidence::Request(open) = evidence(&mut all, "request") else { unreachable!("found by its kind") };
    let request = open.peek().expect("the world's").request;
    let layers = LayerRange::new(2, 10);
    let order = PartOrder { layers, lead: node_key(&lead), request, wire: WireType::F32, max_positions: 1_000 };
    let own = [LayerRange::new(0, 2), LayerRange::new(10, 12)].into_iter().flatten().collect();
    let (sent, received) = (Digest([1; 32]), Digest([2; 32]));
    let mut stated = Stated {
        usage: PartUsage::default().plus(WorkKind::Prefill, 40, 8).expect("small numbers"),
        work: PartWork { order, input: sent, output: received, bytes_in: 40, bytes_out: 40, busy_ms: 7 },
        split: Some(Split { layers: 12, own, positions: 40, sent, received, lost: None }),
        counts: None,
        expert_split: None,
        late: false,
    };
    bend(&mut stated);
    let Stated { usage: part, work, split, counts, expert_split, late } = stated;
    let order = PartOrder { layers: work.order.layers, ..order };
    let done = Done { usage: part, work, counts: counts.clone() };
    let id = Some(becomes_work(&mut bought, (&worker, &buyer), (&rates, order), done));
    let receipt_at = at(&bought, "receipt");
    let rows = Some(Passed::from(&work));
    let leg = Leg { worker: node_key(&worker), order: work.order, usage: part, id, rows };

    let customer = SigningKey::from_bytes(&bytes32("session 1"));
    if let Some(range) = sold {
        let order = PartOrder { layers: Some(range), lead: node_key(&buyer), ..order };
        let usage = PartUsage::default().plus(WorkKind::Prefill, 10, range.layers()).expect("small numbers");
        let done = Done { usage, work: PartWork { order, ..work }, counts: None };
        becomes_work(&mut all, (&lead, &customer), (&asks, order), done);
    }

    // What was bought comes first, then the sale, whose receipt names the root.
    let Evidence::Receipt { receipt, .. } = evidence(&mut all, "receipt") else { unreachable!("found by its kind") };
    let stage_root = split.is_some().then(|| stage_root(&[leg]));
    let mut experts = ExpertLegs::default();
    experts.add(id, counts.as_deref());
    let expert_root = expert_split.is_some().then(|| experts.root());
    let body = Receipt { stage_root, split, expert_root, expert_split, ..receipt.peek().expect("the world's") };
    *receipt = BothSigned::countersign(&Signed::sign(&body, &lead), &customer);
    let orphan = late.then(|| bought.remove(receipt_at));
    let before = at(&all, "request");
    all.splice(before..before, bought);
    all.extend(orphan);
    let mut now = UnixMs(0);
    for (time, _) in &mut all {
        now = now.max(*time);
        *time = now;
    }
    (all, lead)
}
