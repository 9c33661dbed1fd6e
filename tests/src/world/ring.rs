//! Leads that buy layers, and the desks of those who sell them. Orders, grants, acknowledgements, receipts and money are the
//! shipped roles' affair; what is here is what lies behind them: rows on their way, and what computes them.
//!
//! A lead's request (a *ring*) goes around in works, one at a time, through one worker for each range. A worker that is lost is
//! ordered anew, of whoever sells its layers, at most [`MAX_LOSSES`] times: what had come back is replayed up to it, and the work
//! that was lost is sent again. Checked as it goes: who vanished is owed no more than what came back, and nothing is computed
//! beyond its grant. Checked at its end: ranges tile the model and every layer evaluated the same positions, by the workers' own statements.

use super::{What, World, parts};
use satgrid_engine::port::{Command, EngineEvent, FinishReason, JobId};
use satgrid_ledger::statements::{Leg, PartOrder, RowsHash, Split, check_split};
use satgrid_node::{
    consumer::{Bill, CallId, ConsumerEvent, Submit},
    provider::{EngineId, PartDone, ProviderEvent},
};
use satgrid_types::{LayerRange, PartUsage, RequestId, SessionId, TokenUsage, WireType, WorkKind, node_key};
use std::collections::{BTreeMap, VecDeque};

const ENGINE: EngineId = EngineId(0);
/// Layers of each worker; the lead has one at either end.
pub const LAYERS_EACH: u32 = 4;
/// Positions of a prompt that travel together.
const PIECE: u32 = 16;
/// How long workers may take to give their receipts.
const SETTLE_MS: u64 = 4_000;
/// Workers that one ring may lose.
const MAX_LOSSES: u32 = 3;

/// The n-th worker's layers.
pub fn layers_of(place: usize) -> LayerRange {
    let start = 1 + u32::try_from(place).unwrap() * LAYERS_EACH;
    LayerRange::new(start, start + LAYERS_EACH).unwrap()
}

/// Positions on their way.
#[derive(Debug, Clone)]
pub(super) struct Work {
    consumer: usize,
    ring: u64,
    number: u64,
    /// Where it is: before the n-th worker.
    place: usize,
    start: u32,
    rows: u32,
    kind: WorkKind,
    /// The last worker that computes it; all of them where absent.
    ends_at: Option<usize>,
    /// Sent before, and not answered.
    again: bool,
}

impl Work {
    /// What travels, by the worker that it comes to.
    fn bytes(&self, place: usize) -> Vec<u8> {
        [self.start, self.rows, u32::try_from(place).unwrap()].iter().flat_map(|n| n.to_le_bytes()).collect()
    }
}

/// One worker's order in a ring.
#[derive(Debug, Clone)]
struct Ordered {
    call: CallId,
    provider: usize,
    request: Option<(SessionId, RequestId)>,
    /// Works from this number on are for it: it lacks what comes before those.
    since: u64,
    sent: PartUsage,
    returned: PartUsage,
    over: bool,
}

/// A lead's request at its workers.
#[derive(Debug, Clone)]
pub struct Ring {
    request: RequestId,
    workers: Vec<Ordered>,
    /// Positions that are wanted, the first of them as a prompt; and how many came back.
    positions: u32,
    prompt: u32,
    back: u32,
    sent: RowsHash,
    received: RowsHash,
    legs: Vec<Leg>,
    awaits: Option<Work>,
    /// The number of the work that replays what had come back.
    replaying: Option<u64>,
    /// The worker that was lost and is ordered anew.
    lost: Option<usize>,
    losses: u32,
    next: u64,
    /// Nothing more is wanted of the workers.
    over: bool,
    /// Every position came back.
    pub done: bool,
    /// Every worker's call has ended.
    pub settled: bool,
}

impl Ring {
    pub fn losses(&self) -> u32 {
        self.losses
    }
    /// Its lead died.
    pub(super) fn orphan(&mut self) {
        (self.over, self.settled) = (true, true);
    }
    pub fn replayed(&self) -> u64 {
        self.legs.iter().map(|leg| leg.usage.replay).sum()
    }
}

/// One order at a desk.
#[derive(Debug)]
struct DeskJob {
    session: SessionId,
    request: RequestId,
    order: PartOrder,
    granted: u64,
    begun: u64,
    /// Positions that were computed under this order.
    held: u32,
    usage: PartUsage,
    input: RowsHash,
    output: RowsHash,
    bytes: (u64, u64),
    waiting: VecDeque<Work>,
    at_work: u32,
    settling: bool,
}

/// What computes the layers of a provider that sells some.
#[derive(Debug, Default)]
pub struct Desk {
    jobs: BTreeMap<JobId, DeskJob>,
    /// Works that came before their order was written down here, by its request.
    early: Vec<(RequestId, Work)>,
    down: bool,
}

impl World {
    /// A consumer that leads asks workers, each for its layers, for so many positions of a prompt and so many more.
    pub fn lead(&mut self, c: usize, workers: &[usize], prompt: u32, decode: u32) -> u64 {
        let id = self.consumers[c].next_ring;
        self.consumers[c].next_ring += 1;
        self.say(|| format!("consumer {c} leads ring {id} over {workers:?}: {prompt} + {decode} positions"));
        let request = RequestId(parts::bytes32(&format!("ring {c} {id}")));
        let ring = Ring {
            request,
            workers: Vec::new(),
            positions: prompt + decode,
            prompt,
            back: 0,
            sent: RowsHash::default(),
            received: RowsHash::default(),
            legs: Vec::new(),
            awaits: None,
            replaying: None,
            lost: None,
            losses: 0,
            next: 0,
            over: false,
            done: false,
            settled: false,
        };
        self.consumers[c].rings.insert(id, ring);
        for (place, p) in workers.iter().enumerate() {
            let ordered = self.order(c, id, place, *p);
            self.ring(c, id).workers.push(ordered);
        }
        for worker in self.ring(c, id).workers.clone() {
            self.submit_part(c, id, &worker);
        }
        self.settle();
        id
    }

    fn ring(&mut self, c: usize, id: u64) -> &mut Ring {
        self.consumers[c].rings.get_mut(&id).expect("it was begun")
    }

    /// Rings whose workers' calls have not all ended.
    pub fn open_rings(&self) -> usize {
        self.consumers.iter().flat_map(|node| node.rings.values()).filter(|ring| !ring.settled).count()
    }

    fn order(&mut self, c: usize, id: u64, place: usize, provider: usize) -> Ordered {
        let node = &mut self.consumers[c];
        let call = CallId(node.next_call);
        node.next_call += 1;
        node.parts.insert(call, (id, place));
        let (sent, returned) = (PartUsage::default(), PartUsage::default());
        let since = self.ring(c, id).next;
        Ordered { call, provider, request: None, since, sent, returned, over: false }
    }

    fn submit_part(&mut self, c: usize, id: u64, worker: &Ordered) {
        let (lead, request) = (node_key(&self.consumers[c].key), self.ring(c, id).request);
        let listing = self.providers[worker.provider].listing.clone();
        let layers = self.providers[worker.provider].layers;
        let order = PartOrder { layers, lead, request, wire: WireType::F32, max_positions: 100_000 };
        let submit = Submit::of_part(worker.call, listing, order);
        self.tell_payable(c);
        let epoch = self.consumers[c].epoch;
        self.tell_consumer(c, epoch, ConsumerEvent::Submit(Box::new(submit)));
    }

    /// A worker took its order. When all have, rows go out.
    pub(super) fn part_ordered(&mut self, c: usize, call: CallId, session: SessionId, request: RequestId) {
        let Some((id, place)) = self.consumers[c].parts.get(&call).copied() else { return };
        let ring = self.ring(c, id);
        if ring.workers[place].call != call {
            return;
        }
        ring.workers[place].request = Some((session, request));
        if !ring.over && ring.workers.iter().all(|worker| worker.request.is_some()) {
            self.go_on(c, id);
        }
    }

    /// The next work of a ring: what was lost is replayed first.
    fn go_on(&mut self, c: usize, id: u64) {
        let ring = self.ring(c, id);
        let (back, prompt) = (ring.back, ring.prompt);
        let lost = ring.lost.take().filter(|_| back > 0);
        let (start, rows, kind, ends_at, again) = match (lost, &ring.awaits) {
            (Some(at), _) => (0, back, WorkKind::Replay, Some(at), false),
            (None, Some(work)) => (work.start, work.rows, work.kind, None, true),
            (None, None) if back < prompt => (back, PIECE.min(prompt - back), WorkKind::Prefill, None, false),
            (None, None) => (back, 1, WorkKind::Decode, None, false),
        };
        let number = ring.next;
        ring.next += 1;
        let work = Work { consumer: c, ring: id, number, place: 0, start, rows, kind, ends_at, again };
        ring.sent.push(&work.bytes(0));
        for (place, worker) in ring.workers.iter_mut().enumerate() {
            if ends_at.is_none_or(|last| place <= last) {
                worker.sent = counted(worker.sent, &work);
            }
        }
        match kind {
            // The work that was lost waits until it is there.
            WorkKind::Replay => ring.replaying = Some(number),
            WorkKind::Prefill | WorkKind::Decode | WorkKind::Draft => ring.awaits = Some(work.clone()),
        }
        self.tell_ordered(c, id);
        self.pass_on(work);
    }

    fn tell_ordered(&mut self, c: usize, id: u64) {
        let epoch = self.consumers[c].epoch;
        for Ordered { call, sent, returned, over, .. } in self.ring(c, id).workers.clone() {
            if !over {
                let event = ConsumerEvent::Ordered { call, sent, returned, experts: Vec::new() };
                self.tell_consumer(c, epoch, event);
            }
        }
    }

    /// To the worker at its place, or back to the lead.
    fn pass_on(&mut self, work: Work) {
        let latency = self.options.latency_ms;
        let ms = self.between(latency);
        let epoch = self.consumers[work.consumer].epoch;
        self.at(ms, What::Rows { epoch, work: Box::new(work) });
    }

    pub(super) fn rows_arrive(&mut self, epoch: u64, work: Work) {
        if self.consumers[work.consumer].epoch != epoch {
            return;
        }
        let ring = self.ring(work.consumer, work.ring);
        let Some(worker) = ring.workers.get(work.place) else { return self.came_back(&work) };
        if work.number < worker.since {
            // It lacks what comes before, and says so.
            return;
        }
        let (p, request) = (worker.provider, worker.request);
        if work.ends_at.is_some_and(|last| work.place > last) {
            // It only passes.
            return self.pass_on(Work { place: work.place + 1, ..work });
        }
        if self.providers[p].role.is_none() {
            return;
        }
        if self.providers[p].desk.down {
            // It refuses, and the ring has failed.
            let (c, id) = (work.consumer, work.ring);
            if !self.ring(c, id).over {
                self.wind_up(c, id);
            }
            return;
        }
        let Some((session, request)) = request else { return };
        let desk = &mut self.providers[p].desk;
        match desk.jobs.iter_mut().find(|(_, job)| (job.session, job.request) == (session, request)) {
            Some((id, job)) => {
                let id = *id;
                job.waiting.push_back(work);
                self.advance_desk(p, id);
            }
            None => desk.early.push((request, work)),
        }
    }

    fn came_back(&mut self, work: &Work) {
        let (c, id) = (work.consumer, work.ring);
        let ring = self.ring(c, id);
        let replayed = ring.replaying == Some(work.number);
        let awaited = ring.awaits.as_ref().is_some_and(|awaited| awaited.number == work.number);
        // An answer to what was sent again, or is not waited for any more, is nobody's.
        if ring.over || ring.lost.is_some() || !(replayed || awaited) {
            return;
        }
        for (place, worker) in ring.workers.iter_mut().enumerate() {
            if work.ends_at.is_none_or(|last| place <= last) {
                worker.returned = counted(worker.returned, work);
            }
        }
        if replayed {
            ring.replaying = None;
        } else {
            let bytes = work.bytes(ring.workers.len());
            ring.received.push(&bytes);
            ring.awaits = None;
            ring.back = work.start + work.rows;
            ring.done = ring.back == ring.positions;
        }
        self.tell_ordered(c, id);
        if self.ring(c, id).done { self.wind_up(c, id) } else { self.go_on(c, id) }
    }

    /// Asks every worker for its receipt.
    fn wind_up(&mut self, c: usize, id: u64) {
        let ring = self.ring(c, id);
        ring.over = true;
        let (open, epoch) = (ring.workers.clone(), self.consumers[c].epoch);
        for Ordered { call, request, .. } in open.into_iter().filter(|worker| !worker.over) {
            let event =
                if request.is_some() { ConsumerEvent::PartDone { call } } else { ConsumerEvent::Cancel { call } };
            self.tell_consumer(c, epoch, event);
        }
        self.at(SETTLE_MS, What::Late { consumer: c, epoch, ring: id });
    }

    /// Who has not given a receipt by now is left with its last acknowledgement.
    pub(super) fn ring_is_late(&mut self, c: usize, epoch: u64, id: u64) {
        if self.consumers[c].epoch == epoch {
            let open = self.ring(c, id).workers.clone();
            for Ordered { call, .. } in open.into_iter().filter(|worker| !worker.over) {
                self.tell_consumer(c, epoch, ConsumerEvent::Cancel { call });
            }
        }
    }

    /// A worker's call has ended: in good order at the end, else it was lost.
    pub(super) fn part_ended(&mut self, c: usize, call: CallId, bill: &Bill) {
        let Some((id, place)) = self.consumers[c].parts.get(&call).copied() else { return };
        let ring = self.ring(c, id);
        let legs: Vec<Leg> = bill.legs.iter().filter_map(|leg| leg.part).collect();
        let Ordered { call: ours, provider: gone, sent, returned, .. } = ring.workers[place];
        assert_eq!(ours, call, "an order ends once");
        for leg in &legs {
            // Who gave a receipt did what was ordered, also where another one lost it; who vanished is owed what came back.
            let most = if leg.rows.is_some() { sent } else { returned };
            assert!(most.covers(&leg.usage), "signed for {:?}, at most {most:?} is owed", leg.usage);
        }
        ring.workers[place].over = true;
        ring.legs.extend(legs);
        if !ring.over {
            ring.losses += 1;
            ring.replaying = None;
            ring.lost = Some(ring.lost.map_or(place, |before| before.max(place)));
            let losses = ring.losses;
            let sells =
                |p: &usize| self.providers[*p].layers == Some(layers_of(place)) && self.providers[*p].role.is_some();
            let mut sellers: Vec<usize> = (0..self.providers.len()).filter(sells).collect();
            // Another one, where there is one.
            sellers.sort_by_key(|p| *p == gone);
            match sellers.first().filter(|_| losses <= MAX_LOSSES) {
                Some(p) => {
                    let ordered = self.order(c, id, place, *p);
                    self.ring(c, id).workers[place] = ordered.clone();
                    self.submit_part(c, id, &ordered);
                }
                None => self.wind_up(c, id),
            }
        }
        let ring = self.ring(c, id);
        if ring.over && ring.workers.iter().all(|worker| worker.over) && !ring.settled {
            ring.settled = true;
            if ring.done {
                self.check_ring(c, id);
            }
        }
    }

    /// By the workers' own statements: no layer is missing or run twice, and all evaluated the same positions.
    fn check_ring(&self, c: usize, id: u64) {
        let ring = &self.consumers[c].rings[&id];
        let layers = 2 + LAYERS_EACH * u32::try_from(ring.workers.len()).unwrap();
        let own = [(0, 1), (layers - 1, layers)].map(|(a, b)| LayerRange::new(a, b).unwrap()).to_vec();
        let (sent, received) = (ring.sent.value(), ring.received.value());
        let split = Split { layers, own, positions: ring.back.into(), sent, received, lost: None };
        let verdict = check_split(&split, &ring.legs);
        assert!(verdict.is_ok(), "ring {id} of consumer {c}: {verdict:?}\n{:#?}", ring.legs);
    }

    // The desks.

    pub(super) fn admit_part(&mut self, p: usize, job: JobId, order: PartOrder, of: (SessionId, RequestId)) {
        let fresh = DeskJob {
            session: of.0,
            request: of.1,
            order,
            granted: 0,
            begun: 0,
            held: 0,
            usage: PartUsage::default(),
            input: RowsHash::default(),
            output: RowsHash::default(),
            bytes: (0, 0),
            waiting: VecDeque::new(),
            at_work: 0,
            settling: false,
        };
        let desk = &mut self.providers[p].desk;
        let (here, others) = std::mem::take(&mut desk.early).into_iter().partition(|(request, _)| *request == of.1);
        let here: Vec<(RequestId, Work)> = here;
        desk.early = others;
        let waiting = here.into_iter().map(|(_, work)| work).collect();
        desk.jobs.insert(job, DeskJob { waiting, ..fresh });
    }

    pub(super) fn desk_command(&mut self, p: usize, command: Command) {
        match command {
            Command::Grant { job, output_upto, .. } => {
                if let Some(held) = self.providers[p].desk.jobs.get_mut(&job) {
                    held.granted = held.granted.max(output_upto.into());
                }
                self.advance_desk(p, job);
            }
            Command::Cancel { job } => self.end_part(p, job, FinishReason::Cancelled),
            Command::Start(_) => panic!("layers are no model"),
            Command::ForgetSession { .. } => {}
        }
    }

    pub(super) fn settle_part(&mut self, p: usize, job: JobId) {
        if let Some(held) = self.providers[p].desk.jobs.get_mut(&job) {
            held.settling = true;
        }
        self.end_if_settled(p, job);
    }

    fn end_if_settled(&mut self, p: usize, job: JobId) {
        if self.providers[p].desk.jobs.get(&job).is_some_and(|held| held.settling && held.at_work == 0) {
            self.end_part(p, job, FinishReason::Stop);
        }
    }

    fn end_part(&mut self, p: usize, job: JobId, reason: FinishReason) {
        let node = &mut self.providers[p];
        node.work.remove(&job);
        let Some(held) = node.desk.jobs.remove(&job) else { return };
        let evaluated = held.usage.positions().and_then(|n| u32::try_from(n).ok()).unwrap_or(u32::MAX);
        let (epoch, event) = (node.epoch, EngineEvent::Finished { job, reason, evaluated });
        self.tell_provider(p, epoch, ProviderEvent::Engine { engine: ENGINE, event });
    }

    /// Computes what is granted, in order.
    fn advance_desk(&mut self, p: usize, id: JobId) {
        let node = &mut self.providers[p];
        let (epoch, step) = (node.epoch, node.step_ms);
        let Some(job) = node.desk.jobs.get_mut(&id) else { return };
        let Some(work) = job.waiting.front() else { return };
        if job.at_work > 0 || job.begun + u64::from(work.rows) > job.granted {
            return;
        }
        let Some(work) = job.waiting.pop_front() else { return };
        let bytes = work.bytes(work.place);
        job.begun += u64::from(work.rows);
        job.at_work += 1;
        job.input.push(&bytes);
        job.bytes.0 += bytes.len() as u64;
        self.at(step, What::Computed { provider: p, epoch, job: id, work: Box::new(work) });
    }

    pub(super) fn computed(&mut self, p: usize, epoch: u64, id: JobId, work: Work) {
        let node = &mut self.providers[p];
        if node.epoch != epoch {
            return;
        }
        let Some(job) = node.desk.jobs.get_mut(&id) else { return };
        job.at_work -= 1;
        // What was under way when another was lost is known here already.
        let known = work.again && work.start < job.held;
        let kind = if known { WorkKind::Replay } else { work.kind };
        job.held = job.held.max(work.start + work.rows);
        let layers = job.order.layers.map_or(0, |range| range.layers());
        job.usage = job.usage.plus(kind, work.rows.into(), layers).expect("few positions");
        let next = work.place + 1;
        let passes = work.ends_at.is_none_or(|last| work.place < last);
        if passes {
            let bytes = work.bytes(next);
            job.output.push(&bytes);
            job.bytes.1 += bytes.len() as u64;
        }
        let (input, output) = (job.input.value(), job.output.value());
        let (bytes_in, bytes_out) = job.bytes;
        let done = PartDone { usage: job.usage, input, output, bytes_in, bytes_out, busy_ms: 1 };
        node.work.insert(id, TokenUsage::of_part(job.usage));
        self.tell_provider(p, epoch, ProviderEvent::Worked { engine: ENGINE, job: id, done });
        self.pass_on(Work { place: next, ..work });
        self.end_if_settled(p, id);
        self.advance_desk(p, id);
    }

    pub(super) fn kill_desk(&mut self, p: usize) {
        let node = &mut self.providers[p];
        node.desk = Desk { down: true, ..Desk::default() };
        node.work.clear();
        let epoch = node.epoch;
        let event = EngineEvent::Down { reason: "killed".into() };
        self.tell_provider(p, epoch, ProviderEvent::Engine { engine: ENGINE, event });
        self.settle();
    }

    pub(super) fn restart_desk(&mut self, p: usize) {
        let node = &mut self.providers[p];
        if std::mem::take(&mut node.desk.down) {
            let epoch = node.epoch;
            self.tell_provider(p, epoch, ProviderEvent::Engine { engine: ENGINE, event: EngineEvent::Up });
            self.settle();
        }
    }
}

/// A worker may book as replay what was under way when another was lost: either is ordered.
fn counted(usage: PartUsage, work: &Work) -> PartUsage {
    let kinds = [Some(work.kind), work.again.then_some(WorkKind::Replay)];
    kinds
        .into_iter()
        .flatten()
        .fold(usage, |usage, kind| usage.plus(kind, work.rows.into(), LAYERS_EACH).expect("few positions"))
}
