//! The ring of an engine that leads: buys the middle layers of other nodes, sends rows around, and rolls their receipts up.
//!
//! For each request of the lead's customer (a *job*) one order goes to each worker, in a session like any other. Rows go to
//! the first worker and come back from the last; the lead counts what it sent and what came back, and the consumer role
//! signs what the workers claim up to that.
//!
//! | state of a job | awaits | leaves with |
//! |---|---|---|
//! | ordering | every worker took its order, and the ticket for the lead's own hop | ready; after a loss: rebuilding |
//! | rebuilding | the worker before the lost one sends again what it kept (`rebuild`) | ready |
//! | ready | works and their rows | over; ordering again, where a worker was lost and another is there; rebuilding, where one has dropped a sequence |
//! | ended | its engine to end it: nobody takes an order that it needs, or its rows were refused | over |
//! | over | rows that are still under way, then the workers' receipts (`SETTLE`) | settled: split and stage root |

mod back;
mod pace;
mod rebuild;
mod settle;
mod tally;

use super::{
    consumer::Message as ConsumerMessage,
    hops::{HopEvent, Outgoing, Switchboard},
    rings::{Asked, Buys, Settled},
    scout::Scout,
};
use async_trait::async_trait;
use back::Back;
use ed25519_dalek::SigningKey;
use pace::Pacing;
use rebuild::Rebuild;
use satgrid_engine::{
    port::{EngineDown, JobId},
    stage::ring::{Ring, RingCommand, RingEvent, RingFacts, RingWork},
};
use satgrid_ledger::statements::{Leg, PartOrder};
use satgrid_node::consumer::{CallId, ConsumerEvent, Emission, Submit};
use satgrid_protocol::{
    frame::Resend,
    hop::{HopFrame, Leading, RowsHeader, RowsPiece, Shown, TicketFrame},
    refusal::Blame,
};
use satgrid_protocol_quic::QuicEndpoint;
use satgrid_types::{
    LayerRange, NodeKey, PartUsage, RequestId, SessionId, Signed, VerifiedListing, WireType, WorkKind, node_key,
};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};
use tally::Tally;
use tokio::sync::{Mutex, mpsc, oneshot};

/// How long workers may take to give their receipts once a request is over.
const SETTLE: Duration = Duration::from_secs(4);
/// Most rows in one work; longer prompts go around in pieces.
const BATCH: u32 = 256;
/// Calls of rings are numbered from here on, away from those of the gateway.
const FIRST_CALL: u64 = 1 << 62;
/// Times that one job may lose a worker.
const MAX_LOSSES: u32 = 4;

/// One middle stage of the plan.
#[derive(Clone)]
pub(crate) struct Planned {
    pub range: LayerRange,
    pub listing: Arc<VerifiedListing>,
}

/// What a ring is started with.
pub(crate) struct RingParts {
    pub plan: Vec<Planned>,
    pub model_layers: u32,
    pub own: Vec<LayerRange>,
    pub wire: WireType,
    pub n_embd: u32,
    pub key: Arc<SigningKey>,
    pub addresses: Vec<String>,
    pub endpoint: QuicEndpoint,
    pub switchboard: Switchboard,
    pub consumer: mpsc::Sender<ConsumerMessage>,
    /// Finds other workers for the same layers, and hears how fast they are.
    pub scout: Scout,
}

enum Said {
    Command(RingCommand),
    Asked(Asked),
    Emission(JobId, CallId, Emission),
    Late(JobId),
    /// A worker that is left has had its time to end its call.
    Left(JobId, CallId),
    /// A rebuild has had its time.
    Rebuild(JobId, u64),
}

/// The ring's handle: the port of the engine, and the ear of the provider's driver.
pub(crate) struct PaidRing {
    facts: RingFacts,
    said: mpsc::UnboundedSender<Said>,
    events: Mutex<mpsc::UnboundedReceiver<RingEvent>>,
}

impl PaidRing {
    pub(crate) fn start(parts: RingParts) -> Arc<PaidRing> {
        let listings = || parts.plan.iter().map(|stage| &stage.listing);
        let row_bytes = parts.wire.row_bytes(parts.n_embd).unwrap_or(usize::MAX);
        let frame = satgrid_protocol::hop::MAX_ROWS_BYTES / row_bytes.max(1);
        let facts = RingFacts {
            stages: parts.plan.iter().map(|stage| stage.range).collect(),
            sequences: listings().map(|l| l.slots).min().unwrap_or(u32::MAX),
            context: listings().map(|l| l.context_length).min().unwrap_or(u32::MAX),
            batch: BATCH.min(u32::try_from(frame).unwrap_or(u32::MAX)).max(1),
            wire: parts.wire,
        };
        let (said, inbox) = mpsc::unbounded_channel();
        let (events, event_inbox) = mpsc::unbounded_channel();
        let (ear, hops) = mpsc::channel(1_024);
        let running = Running::new(parts, facts.batch, said.clone(), ear, events);
        tokio::spawn(running.run(inbox, hops));
        Arc::new(PaidRing { facts, said, events: Mutex::new(event_inbox) })
    }
}

#[async_trait]
impl Buys for PaidRing {
    fn tell(&self, asked: Asked) -> bool {
        self.said.send(Said::Asked(asked)).is_ok()
    }
}

#[async_trait]
impl Ring for PaidRing {
    fn facts(&self) -> RingFacts {
        self.facts.clone()
    }
    fn send(&self, command: RingCommand) -> Result<(), EngineDown> {
        self.said.send(Said::Command(command)).map_err(|_| EngineDown)
    }
    async fn next_event(&self) -> Option<RingEvent> {
        self.events.lock().await.recv().await
    }
}

/// One worker's part in a job.
struct Worker {
    call: CallId,
    node: NodeKey,
    ordered: Option<(SessionId, NodeKey, RequestId)>,
    /// Its layers computed so much for this job.
    sent: PartUsage,
    returned: PartUsage,
    /// The plan has moved on: once its call has ended, another takes its place.
    left: bool,
    /// Its call has ended.
    over: bool,
}

impl Worker {
    /// It took its order, and keeps it.
    fn stands(&self) -> bool {
        self.ordered.is_some() && !self.left && !self.over
    }
}

struct Job {
    request: RequestId,
    workers: Vec<Worker>,
    /// The first worker has (or will be shown) the ticket for the lead's hop.
    ready: bool,
    tally: Tally,
    legs: Vec<Leg>,
    over: bool,
    /// Why it cannot go on: its engine is told, and ends it.
    ended: Option<String>,
    losses: u32,
    /// The worker that was lost, until its replacement is ready.
    lost: Option<usize>,
    /// The lead's own hop has its ticket.
    ticketed: bool,
    rebuild: Option<Rebuild>,
    answer: Option<oneshot::Sender<Option<Settled>>>,
}

impl Job {
    /// Rows of it may yet come.
    fn goes_on(&self) -> bool {
        !self.over && self.ended.is_none()
    }
    /// A worker of it was lost, or is being left for another.
    fn moves(&self) -> bool {
        self.goes_on() && (self.lost.is_some() || self.workers.iter().any(|worker| worker.left || worker.over))
    }
}

/// A work that was sent around and not answered.
struct UnderWay {
    work: RingWork,
    /// The first worker that computes it.
    from: usize,
    sent: Instant,
}

/// A KV sequence of the engine.
struct Sequence {
    /// Whose it is, or was last.
    job: JobId,
    /// Positions that came back.
    back: u32,
}

struct Running {
    parts: RingParts,
    /// Most rows in one work.
    batch: u32,
    ours: NodeKey,
    said: mpsc::UnboundedSender<Said>,
    ear: mpsc::Sender<HopEvent>,
    events: mpsc::UnboundedSender<RingEvent>,
    jobs: BTreeMap<JobId, Job>,
    /// Works that were sent around and not answered.
    works: BTreeMap<u64, UnderWay>,
    /// Gaps that the engine was told of, by stage and sequence, and the first work that it sent because of each: those before
    /// that are refused for the same reason.
    gaps: BTreeMap<(u32, u32), Option<u64>>,
    /// Works that wait for their jobs' orders.
    held_back: VecDeque<RingWork>,
    /// The hop to the first worker.
    first: Option<(NodeKey, Outgoing)>,
    back: Back,
    avoided: BTreeSet<NodeKey>,
    pacing: Pacing,
    /// Places in the plan of those who are slower than they list.
    slow: BTreeSet<usize>,
    /// What failed, and against whom it counts.
    blame: Blame,
    /// What a new worker has to be told again.
    sequences: BTreeMap<u32, Sequence>,
    next_rebuild: u64,
    next_call: u64,
    shown: BTreeMap<SessionId, Shown>,
}

impl Running {
    fn new(
        parts: RingParts,
        batch: u32,
        said: mpsc::UnboundedSender<Said>,
        ear: mpsc::Sender<HopEvent>,
        events: mpsc::UnboundedSender<RingEvent>,
    ) -> Running {
        Running {
            ours: node_key(&parts.key),
            parts,
            batch,
            said,
            ear,
            events,
            jobs: BTreeMap::new(),
            works: BTreeMap::new(),
            gaps: BTreeMap::new(),
            held_back: VecDeque::new(),
            first: None,
            back: BTreeMap::new(),
            avoided: BTreeSet::new(),
            pacing: Pacing::default(),
            slow: BTreeSet::new(),
            blame: Blame::default(),
            sequences: BTreeMap::new(),
            next_rebuild: 0,
            next_call: FIRST_CALL,
            shown: BTreeMap::new(),
        }
    }

    async fn run(mut self, mut inbox: mpsc::UnboundedReceiver<Said>, mut hops: mpsc::Receiver<HopEvent>) {
        loop {
            let orders = tokio::select! {
                said = inbox.recv() => match said {
                    Some(said) => self.said(said),
                    None => return,
                },
                Some(event) = hops.recv() => self.hop(event),
            };
            for order in orders {
                if self.parts.consumer.send(order).await.is_err() {
                    return;
                }
            }
        }
    }

    fn said(&mut self, said: Said) -> Vec<ConsumerMessage> {
        match said {
            Said::Command(RingCommand::Work(work)) => {
                if let Some(orders) = self.turned_away(&work) {
                    return orders;
                }
                self.held_back.push_back(work);
                self.flush()
            }
            Said::Command(RingCommand::Forget { sequence }) => {
                self.sequences.remove(&sequence);
                Vec::new()
            }
            Said::Command(RingCommand::Reset) => {
                self.works.clear();
                self.gaps.clear();
                self.held_back.clear();
                self.sequences.clear();
                Vec::new()
            }
            Said::Command(RingCommand::JobOver { job }) => {
                self.held_back.retain(|work| work.pieces.iter().any(|piece| piece.job != job));
                if let Some(held) = self.jobs.get_mut(&job) {
                    held.over = true;
                }
                self.wind_up(job)
            }
            Said::Asked(Asked::Begin(job, request)) => self.begin(job, request),
            Said::Asked(Asked::Settle(job, answer)) => match self.jobs.get_mut(&job) {
                Some(held) => {
                    held.answer = Some(answer);
                    held.over = true;
                    self.say_in(SETTLE, Said::Late(job));
                    let orders = self.wind_up(job);
                    self.finish(job);
                    orders
                }
                None => {
                    let _ = answer.send(None);
                    Vec::new()
                }
            },
            Said::Emission(job, call, emission) => self.emission(job, call, emission),
            Said::Asked(Asked::Jobs(answer)) => {
                let _ = answer.send(self.jobs.keys().copied().collect());
                Vec::new()
            }
            Said::Rebuild(job, number) => self.rebuild_is_late(job, number),
            Said::Left(job, call) => {
                let Some(held) = self.jobs.get_mut(&job).filter(|held| held.goes_on()) else { return Vec::new() };
                let Some(at) = held.workers.iter().position(|one| one.call == call && !one.over) else {
                    return Vec::new();
                };
                // Its last acknowledgement is what it has.
                held.workers[at].over = true;
                self.lost(job, at)
            }
            Said::Late(job) => {
                // Who has not given a receipt by now is left with its last acknowledgement.
                self.works.retain(|_, one| one.work.pieces.iter().all(|piece| piece.job != job));
                let Some(held) = self.jobs.get(&job) else { return Vec::new() };
                let late = held.workers.iter().filter(|worker| !worker.over).map(|worker| worker.call);
                let orders = late.map(|call| ConsumerMessage::Event(ConsumerEvent::Cancel { call })).collect();
                self.finish_with(job, true);
                orders
            }
        }
    }

    /// Tells this ring something after a time.
    fn say_in(&self, time: Duration, what: Said) {
        let said = self.said.clone();
        tokio::spawn(async move {
            tokio::time::sleep(time).await;
            let _ = said.send(what);
        });
    }

    fn order_of(&self, request: RequestId, stage: &Planned) -> PartOrder {
        let max_positions = u64::from(stage.listing.context_length).saturating_mul(8);
        PartOrder { layers: Some(stage.range), lead: self.ours, request, wire: self.parts.wire, max_positions }
    }

    fn call(&mut self, job: JobId, request: RequestId, stage: &Planned) -> (Worker, ConsumerMessage) {
        let call = CallId(self.next_call);
        self.next_call += 1;
        let submit = Submit::of_part(call, VerifiedListing::clone(&stage.listing), self.order_of(request, stage));
        let (emissions, mut inbox) = mpsc::unbounded_channel();
        let said = self.said.clone();
        tokio::spawn(async move {
            while let Some(emission) = inbox.recv().await {
                if said.send(Said::Emission(job, call, emission)).is_err() {
                    return;
                }
            }
        });
        let (sent, returned) = (PartUsage::default(), PartUsage::default());
        let node = stage.listing.node_key;
        let worker = Worker { call, node, ordered: None, sent, returned, left: false, over: false };
        (worker, ConsumerMessage::Call(Box::new(submit), emissions))
    }

    fn begin(&mut self, job: JobId, request: RequestId) -> Vec<ConsumerMessage> {
        self.swap();
        let plan = self.parts.plan.clone();
        let (workers, orders): (Vec<Worker>, Vec<ConsumerMessage>) =
            plan.iter().map(|stage| self.call(job, request, stage)).unzip();
        let fresh = Job {
            request,
            workers,
            ready: false,
            tally: Tally::default(),
            legs: Vec::new(),
            over: false,
            ended: None,
            losses: 0,
            lost: None,
            ticketed: false,
            rebuild: None,
            answer: None,
        };
        self.jobs.insert(job, fresh);
        orders
    }

    fn emission(&mut self, job: JobId, call: CallId, emission: Emission) -> Vec<ConsumerMessage> {
        let Some(held) = self.jobs.get_mut(&job) else { return Vec::new() };
        let Some(at) = held.workers.iter().position(|worker| worker.call == call) else { return Vec::new() };
        match emission {
            Emission::Ordered { session, key, request } => {
                held.workers[at].ordered = Some((session, key, request));
                if held.workers.iter().all(Worker::stands) { self.routes(job) } else { Vec::new() }
            }
            // Some worker was lost since it was asked for: with the next one's order it is asked for again.
            Emission::Ticket { .. } if !held.workers.iter().all(Worker::stands) => Vec::new(),
            Emission::Ticket { ticket } => {
                let first = &self.parts.plan[0].listing;
                let to = first.node_key;
                let out = match self.first.take().filter(|(node, _)| *node == to) {
                    Some((_, out)) => out,
                    None => Outgoing::start(
                        self.parts.endpoint.clone(),
                        self.parts.key.clone(),
                        (self.ours, to),
                        &first.addresses,
                        self.ear.clone(),
                    ),
                };
                out.send(HopFrame::Ticket(TicketFrame { slot: job.0, ticket }));
                self.first = Some((to, out));
                held.ticketed = true;
                self.ready(job)
            }
            Emission::Finished { bill, .. } | Emission::Failed { bill, .. } => {
                held.workers[at].over = true;
                held.legs.extend(bill.legs.iter().filter_map(|leg| leg.part));
                if !held.goes_on() {
                    self.finish(job);
                    return Vec::new();
                }
                self.lost(job, at)
            }
            Emission::Started { .. }
            | Emission::Tokens { .. }
            | Emission::Embedded { .. }
            | Emission::Logprobs { .. } => Vec::new(),
        }
    }

    /// Every worker has its order: each learns where its rows go, and after a loss one of them what it is to send again.
    fn routes(&mut self, job: JobId) -> Vec<ConsumerMessage> {
        let mut again = self.rebuild_lost(job);
        // What is to be rebuilt is ordered before it is asked for.
        let mut orders = self.tell(job);
        let Some(held) = self.jobs.get(&job) else { return Vec::new() };
        for at in 0..held.workers.len() {
            let resend = again.take_if(|(worker, _)| *worker == at).map_or_else(Vec::new, |(_, resend)| resend);
            orders.extend(self.route(job, at, resend));
        }
        if let Some((session, _, request)) = held.workers.last().and_then(|worker| worker.ordered) {
            self.parts.switchboard.expect(session, request, self.ear.clone());
        }
        if let Some(first) = held.workers.first() {
            orders.push(ConsumerMessage::Event(ConsumerEvent::WantTicket { call: first.call }));
        }
        orders
    }

    /// Where the rows of one worker go.
    fn route(&self, job: JobId, at: usize, resend: Vec<Resend>) -> Option<ConsumerMessage> {
        let held = self.jobs.get(&job)?;
        let worker = held.workers.get(at)?;
        let (call, (session, ..)) = (worker.call, worker.ordered?);
        let leading = Signed::sign(&Leading::of(session), &self.parts.key);
        let next = held.workers.get(at + 1).zip(self.parts.plan.get(at + 1));
        let (downstream, next, addresses) = match next {
            Some((next, stage)) => (Some(next.call), stage.listing.node_key, stage.listing.addresses.clone()),
            None => (None, self.ours, self.parts.addresses.clone()),
        };
        let route = ConsumerEvent::Route { call, slot: job.0, downstream, next, addresses, resend, leading };
        Some(ConsumerMessage::Event(route))
    }

    /// Sends what waits, in order, as far as its jobs are ready. A job that still orders holds up nobody else's rows.
    fn flush(&mut self) -> Vec<ConsumerMessage> {
        let (mut orders, mut blocked, mut at) = (Vec::new(), BTreeSet::new(), 0);
        while let Some(work) = self.held_back.get(at) {
            let ready = |job: &JobId| !blocked.contains(job) && self.jobs.get(job).is_none_or(|job| job.ready);
            if !work.pieces.iter().all(|piece| ready(&piece.job)) {
                blocked.extend(work.pieces.iter().map(|piece| piece.job));
                at += 1;
                continue;
            }
            let Some(work) = self.held_back.remove(at) else { break };
            orders.extend(self.send_around(work));
        }
        orders
    }

    fn send_around(&mut self, work: RingWork) -> Vec<ConsumerMessage> {
        let mut pieces = Vec::with_capacity(work.pieces.len());
        let row_bytes = work.rows.bytes.len() / work.rows.count.max(1) as usize;
        let mut at = 0;
        let mut touched = BTreeSet::new();
        for piece in &work.pieces {
            let kind = piece.purpose;
            let bytes = piece.rows as usize * row_bytes;
            let sequence = self.sequences.entry(piece.sequence).or_insert(Sequence { job: piece.job, back: 0 });
            sequence.job = piece.job;
            if kind != WorkKind::Replay {
                sequence.back = sequence.back.min(piece.start);
            }
            if work.again || kind == WorkKind::Replay {
                let told = self.gaps.iter_mut().filter(|((_, sequence), _)| *sequence == piece.sequence);
                told.for_each(|(_, since)| *since = Some(since.unwrap_or(work.id.0)));
            }
            if let Some(job) = self.jobs.get_mut(&piece.job) {
                job.tally.sent(kind, piece.rows, work.rows.bytes.get(at..at + bytes).unwrap_or_default());
                for (index, (worker, stage)) in job.workers.iter_mut().zip(&self.parts.plan).enumerate() {
                    let reached = work.ends_at.is_none_or(|last| index <= last as usize);
                    // A worker may book as replay what was under way when another was lost: either is ordered.
                    let layers = stage.range.layers();
                    for kind in [Some(kind), work.again.then_some(WorkKind::Replay)].into_iter().flatten() {
                        if reached && let Some(sent) = worker.sent.plus(kind, piece.rows.into(), layers) {
                            worker.sent = sent;
                        }
                    }
                }
                touched.insert(piece.job);
            }
            at += bytes;
            let (slot, sequence) = (piece.job.0, piece.sequence);
            pieces.push(RowsPiece { slot, sequence, start: piece.start, rows: piece.rows, kind });
        }
        let header =
            RowsHeader { work: work.id.0, pieces, wire: self.parts.wire, ends_after: work.ends_at, again: work.again };
        let rows = work.rows.bytes.clone();
        self.works.insert(work.id.0, UnderWay { work, from: 0, sent: Instant::now() });
        if let Some((_, out)) = &self.first {
            out.send(HopFrame::Rows(header, rows));
        }
        touched.into_iter().flat_map(|job| self.tell(job)).collect()
    }

    /// Tells the consumer role what was ordered and what came back.
    fn tell(&self, job: JobId) -> Vec<ConsumerMessage> {
        let Some(held) = self.jobs.get(&job) else { return Vec::new() };
        let tell = |worker: &Worker| {
            let Worker { call, sent, returned, .. } = *worker;
            ConsumerMessage::Event(ConsumerEvent::Ordered { call, sent, returned, experts: Vec::new() })
        };
        held.workers.iter().filter(|worker| !worker.over).map(tell).collect()
    }
}

#[cfg(test)]
mod tests;
