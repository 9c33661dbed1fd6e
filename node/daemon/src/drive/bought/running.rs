//! The task that buys experts: workers, orders, calls under way.

use super::{
    ANSWER_WITHIN, Answer, BoughtParts, CALLS_EACH, ConsumerMessage, FIRST_CALL, LOOK_EVERY, ORDER_WITHIN, Said,
    jobs_of, workers::Worker,
};
use crate::drive::{
    hops::{HopEvent, Outgoing},
    rings::Asked,
};
use satgrid_engine::{
    experts::{AnswerError, ExpertCall, ExpertRows, HostError},
    port::JobId,
    stage::codec::HiddenRows,
};
use satgrid_ledger::statements::{ExpertCount, PartOrder};
use satgrid_node::consumer::{CallId, ConsumerEvent, Emission, Leg, Submit};
use satgrid_protocol::{
    experts::{CallHeader, CallRow},
    hop::{HopFrame, TicketFrame},
    refusal::{self, Member, Refusal, RefusalFault, Sent},
};
use satgrid_types::{NodeKey, PartUsage, RequestId, SessionId, Signed, VerifiedListing, node_key};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};
use tokio::sync::{mpsc, oneshot};

/// What came back is told to the consumer role after so many rows, or at the next look.
const TELL_ROWS: u64 = 1_024;
/// What is ordered is told so many rows ahead, so that it need not be told with every call.
const AHEAD_ROWS: u64 = 8_192;

/// One worker's part in a job.
pub(super) struct Order {
    pub call: CallId,
    pub ordered: Option<(SessionId, RequestId)>,
    /// The worker was shown the ticket on the hop that is open.
    ready: bool,
    wants_ticket: bool,
    pub sent: u64,
    told_sent: u64,
    pub returned: BTreeMap<(u32, u32), u64>,
    returned_sum: u64,
    told_returned: u64,
    /// Its call has ended.
    pub over: bool,
}

pub(super) struct Job {
    pub request: RequestId,
    pub orders: BTreeMap<NodeKey, Order>,
    pub legs: Vec<Leg>,
    pub over: bool,
    pub answer: Option<oneshot::Sender<Option<super::Settled>>>,
}

/// A call that waits for its orders, or for its rows.
struct UnderWay {
    worker: NodeKey,
    call: ExpertCall,
    answer: Answer,
    since: Instant,
    sent: bool,
    /// Of its rows, as they were sent.
    bytes: usize,
}

pub(super) struct Running {
    pub parts: BoughtParts,
    ours: NodeKey,
    pub said: mpsc::UnboundedSender<Said>,
    ear: mpsc::Sender<HopEvent>,
    pub workers: BTreeMap<NodeKey, Worker>,
    pub jobs: BTreeMap<JobId, Job>,
    calls: BTreeMap<u64, UnderWay>,
    next_work: u64,
    next_call: u64,
    /// When it was last dealt who serves.
    pub dealt: Option<Instant>,
}

impl Running {
    pub(super) fn new(parts: BoughtParts, said: mpsc::UnboundedSender<Said>, ear: mpsc::Sender<HopEvent>) -> Self {
        let next_call = FIRST_CALL + (u64::from(parts.engine.0) << CALLS_EACH);
        let ours = node_key(&parts.key);
        let (workers, jobs, calls) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        Running { parts, ours, said, ear, workers, jobs, calls, next_work: 0, next_call, dealt: None }
    }

    pub(super) async fn run(mut self, mut inbox: mpsc::UnboundedReceiver<Said>, mut hops: mpsc::Receiver<HopEvent>) {
        let mut look = tokio::time::interval(LOOK_EVERY);
        let (none, nobody) = mpsc::unbounded_channel();
        let mut heard = std::mem::replace(&mut self.parts.heard, nobody);
        drop(none);
        loop {
            let orders = tokio::select! {
                said = inbox.recv() => match said {
                    Some(said) => self.said(said),
                    None => return,
                },
                Some(event) = hops.recv() => self.hop(event),
                Some(event) = heard.recv() => self.group(event),
                _ = look.tick() => self.look(),
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
            Said::Asked(Asked::Begin(job, request)) => {
                self.parts.group.open_account(job);
                let (orders, legs) = (BTreeMap::new(), Vec::new());
                self.jobs.insert(job, Job { request, orders, legs, over: false, answer: None });
                // Sessions and slices take their time; the prompt is on its way meanwhile.
                // Who stands by is ordered when it is first asked.
                let serving = self.workers.iter().filter(|(_, worker)| worker.inside && worker.serves);
                let serving: Vec<NodeKey> = serving.map(|(key, _)| *key).collect();
                serving.into_iter().flat_map(|worker| self.order(job, worker)).collect()
            }
            Said::Call { worker, call, answer } => self.called(worker, call, answer),
            Said::Emission(job, worker, call, emission) => self.emission(job, worker, call, emission),
            Said::Asked(Asked::Settle(job, answer)) => self.settle(job, answer),
            Said::Late(job) => self.late(job),
            Said::Asked(Asked::Jobs(answer)) => {
                let _ = answer.send(self.jobs.keys().copied().collect());
                Vec::new()
            }
        }
    }

    /// Orders experts of a worker for a job.
    fn order(&mut self, job: JobId, worker: NodeKey) -> Vec<ConsumerMessage> {
        let Some(listing) = self.workers.get(&worker).map(|worker| VerifiedListing::clone(&worker.listing)) else {
            return Vec::new();
        };
        let Some(held) = self.jobs.get_mut(&job) else { return Vec::new() };
        let call = CallId(self.next_call);
        self.next_call += 1;
        let order = PartOrder {
            layers: None,
            lead: self.ours,
            request: held.request,
            wire: self.parts.wire,
            max_positions: self.parts.most_rows,
        };
        let submit = Submit::of_part(call, listing, order);
        let fresh = Order {
            call,
            ordered: None,
            ready: false,
            wants_ticket: false,
            sent: 0,
            told_sent: 0,
            returned: BTreeMap::new(),
            returned_sum: 0,
            told_returned: 0,
            over: false,
        };
        held.orders.insert(worker, fresh);
        let (emissions, mut inbox) = mpsc::unbounded_channel();
        let said = self.said.clone();
        tokio::spawn(async move {
            while let Some(emission) = inbox.recv().await {
                if said.send(Said::Emission(job, worker, call, emission)).is_err() {
                    return;
                }
            }
        });
        vec![ConsumerMessage::Call(Box::new(submit), emissions)]
    }

    fn called(&mut self, worker: NodeKey, call: ExpertCall, answer: Answer) -> Vec<ConsumerMessage> {
        let mut orders = Vec::new();
        for job in jobs_of(&call) {
            let known = self.jobs.get(&job).filter(|job| !job.over).map(|job| job.orders.get(&worker).map(|o| o.over));
            match known {
                // A new order where there was none, or where the last one ended.
                Some(None | Some(true)) => orders.extend(self.order(job, worker)),
                Some(Some(false)) => {}
                None => {
                    let _ = answer.send(Err(HostError::Gone { reason: "the request is over".into() }));
                    return orders;
                }
            }
        }
        let work = self.next_work;
        self.next_work += 1;
        self.calls.insert(work, UnderWay { worker, call, answer, since: Instant::now(), sent: false, bytes: 0 });
        orders.extend(self.flush(worker));
        orders
    }

    fn emission(&mut self, job: JobId, worker: NodeKey, call: CallId, emission: Emission) -> Vec<ConsumerMessage> {
        let Some(held) = self.jobs.get_mut(&job) else { return Vec::new() };
        let Some(order) = held.orders.get_mut(&worker).filter(|order| order.call == call) else { return Vec::new() };
        match emission {
            Emission::Ordered { session, request, .. } => {
                order.ordered = Some((session, request));
                order.wants_ticket = true;
                vec![ConsumerMessage::Event(ConsumerEvent::WantTicket { call })]
            }
            Emission::Ticket { ticket } => {
                let Some(to) = self.workers.get_mut(&worker) else { return Vec::new() };
                let parts = &self.parts;
                let hop = to.hop.get_or_insert_with(|| {
                    let (endpoint, key) = (parts.endpoint.clone(), parts.key.clone());
                    Outgoing::start(endpoint, key, (self.ours, worker), &to.listing.addresses, self.ear.clone())
                });
                hop.send(HopFrame::Ticket(TicketFrame { slot: job.0, ticket }));
                (order.ready, order.wants_ticket) = (true, false);
                self.flush(worker)
            }
            Emission::Finished { bill, .. } => {
                order.over = true;
                held.legs.extend(bill.legs);
                let over = held.over;
                if over {
                    self.finish(job, false);
                } else {
                    self.fail(worker, Some(job), "it ended the order");
                }
                Vec::new()
            }
            Emission::Failed { bill, error } => {
                order.over = true;
                held.legs.extend(bill.legs);
                let over = held.over;
                if over {
                    self.finish(job, false);
                } else {
                    self.fail(worker, Some(job), &error.to_string());
                }
                Vec::new()
            }
            Emission::Started { .. }
            | Emission::Tokens { .. }
            | Emission::Embedded { .. }
            | Emission::Logprobs { .. } => Vec::new(),
        }
    }

    /// Sends a worker's calls that wait, in their order, as far as all their jobs' orders are ready.
    fn flush(&mut self, worker: NodeKey) -> Vec<ConsumerMessage> {
        let mut orders = Vec::new();
        let waiting: Vec<u64> = self
            .calls
            .iter()
            .filter(|(_, under_way)| under_way.worker == worker && !under_way.sent)
            .map(|(work, _)| *work)
            .collect();
        for work in waiting {
            let Some(jobs) = self.calls.get(&work).map(|under_way| jobs_of(&under_way.call)) else { continue };
            let mut ready = true;
            for job in &jobs {
                let order = self.jobs.get_mut(job).and_then(|job| job.orders.get_mut(&worker));
                let Some(order) = order else { continue };
                ready &= order.ready;
                if !order.ready && order.ordered.is_some() && !order.wants_ticket && !order.over {
                    order.wants_ticket = true;
                    orders.push(ConsumerMessage::Event(ConsumerEvent::WantTicket { call: order.call }));
                }
            }
            if ready {
                orders.extend(self.send(work));
            }
        }
        orders
    }

    fn send(&mut self, work: u64) -> Vec<ConsumerMessage> {
        let Some(under_way) = self.calls.get_mut(&work) else { return Vec::new() };
        let (worker, width) = (under_way.worker, self.parts.group.manifest().n_embd);
        let framed = frame(work, &under_way.call, self.parts.wire, width);
        let (header, rows) = match framed {
            Ok(framed) => framed,
            Err(error) => {
                if let Some(under_way) = self.calls.remove(&work) {
                    let _ = under_way.answer.send(Err(error));
                }
                return Vec::new();
            }
        };
        (under_way.sent, under_way.since, under_way.bytes) = (true, Instant::now(), rows.len());
        let mut orders = Vec::new();
        for row in &header.rows {
            let order = self.jobs.get_mut(&JobId(row.slot)).and_then(|job| job.orders.get_mut(&worker));
            if let Some(order) = order {
                order.sent = order.sent.saturating_add(row.experts.len() as u64);
            }
        }
        for job in jobs_of_header(&header) {
            if let Some(order) = self.jobs.get_mut(&job).and_then(|job| job.orders.get_mut(&worker))
                && order.sent > order.told_sent
            {
                order.told_sent = order.sent.saturating_add(AHEAD_ROWS);
                orders.push(tell(order));
            }
        }
        if let Some(hop) = self.workers.get(&worker).and_then(|worker| worker.hop.as_ref()) {
            hop.send(HopFrame::Call(header, rows));
        }
        orders
    }

    fn hop(&mut self, event: HopEvent) -> Vec<ConsumerMessage> {
        match event {
            HopEvent::Back { from, frame: HopFrame::Answer(header, rows), .. } => {
                let Some(under_way) = self.take(header.work, &from) else { return Vec::new() };
                let (width, waited) = (self.parts.group.manifest().n_embd, under_way.since.elapsed());
                let busy = Duration::from_micros(header.busy_us.into());
                let bytes = under_way.bytes.saturating_add(rows.len());
                self.parts.dealer.figures.answered(from, bytes, under_way.call.work.len(), waited, busy);
                let count = u32::try_from(under_way.call.work.len()).unwrap_or(u32::MAX);
                let coded = HiddenRows { wire: self.parts.wire, count, bytes: rows };
                let answer = if header.wire == self.parts.wire {
                    decoded(&under_way.call, &coded, width)
                } else {
                    Err(HostError::Gone { reason: format!("it answered as {}", header.wire) })
                };
                let good = answer.is_ok();
                let UnderWay { call, answer: asked, .. } = under_way;
                let _ = asked.send(answer);
                if good { self.came_back(from, &call) } else { self.distrust(&from) }
            }
            HopEvent::Back { from, frame: HopFrame::Lost(signed), .. } => {
                let Some(under_way) = signed.peek().ok().and_then(|said| self.take(said.work, &from)) else {
                    return Vec::new();
                };
                // Its rows come straight from it, signed or not: it is out, as whoever does not answer.
                let reason = match self.said_by(&from, &under_way.call, &signed) {
                    Ok(said) => said.text,
                    Err(fault) => format!("its refusal is not its own word: {fault}"),
                };
                tracing::info!(worker = %from.short(), why = %reason, "a worker refused a call");
                let _ = under_way.answer.send(Err(HostError::Gone { reason }));
                Vec::new()
            }
            HopEvent::Lost { to, reason, .. } => {
                tracing::info!(worker = %to.short(), %reason, "the hop to a worker is gone");
                if let Some(worker) = self.workers.get_mut(&to) {
                    worker.hop = None;
                }
                for order in self.jobs.values_mut().filter_map(|job| job.orders.get_mut(&to)) {
                    (order.ready, order.wants_ticket) = (false, false);
                }
                self.fail(to, None, &reason);
                Vec::new()
            }
            // Nobody opens a hop to who only buys experts.
            HopEvent::Begun { .. } | HopEvent::Frame { .. } | HopEvent::Ended { .. } | HopEvent::Back { .. } => {
                Vec::new()
            }
        }
    }

    /// The call that a worker speaks of, if it is one of its own.
    fn take(&mut self, work: u64, from: &NodeKey) -> Option<UnderWay> {
        self.calls.get(&work).filter(|under_way| under_way.worker == *from && under_way.sent)?;
        self.calls.remove(&work)
    }

    /// What a worker signed about a call, if it did.
    fn said_by(&self, worker: &NodeKey, call: &ExpertCall, said: &Signed<Refusal>) -> Result<Refusal, RefusalFault> {
        let work = said.peek().map_err(|_| RefusalFault::Unreadable)?.work;
        let orders = self.jobs.values().filter_map(|job| job.orders.get(worker)?.ordered).collect();
        let ring = [Member { node: *worker, orders }];
        let rows = call.jobs.len() as u64;
        let sent = Sent { lead: self.ours, ring: &ring, work, rows, sequences: &[], from: *worker };
        refusal::check(said, &sent).map(|(_, said)| said)
    }

    fn came_back(&mut self, worker: NodeKey, call: &ExpertCall) -> Vec<ConsumerMessage> {
        for work in &call.work {
            let job = usize::try_from(work.row).ok().and_then(|row| call.jobs.get(row));
            let order = job.and_then(|job| self.jobs.get_mut(job)).and_then(|job| job.orders.get_mut(&worker));
            if let Some(order) = order {
                *order.returned.entry((call.layer, work.expert)).or_default() += 1;
                order.returned_sum = order.returned_sum.saturating_add(1);
            }
        }
        let mut orders = Vec::new();
        for job in jobs_of(call) {
            if let Some(order) = self.jobs.get_mut(&job).and_then(|job| job.orders.get_mut(&worker))
                && order.returned_sum.saturating_sub(order.told_returned) >= TELL_ROWS
            {
                orders.push(tell(order));
            }
        }
        orders
    }

    /// Answers all calls that a worker has with a loss; of one job, or of all.
    fn fail(&mut self, worker: NodeKey, job: Option<JobId>, reason: &str) {
        let of = |under_way: &UnderWay| {
            under_way.worker == worker && job.is_none_or(|job| under_way.call.jobs.contains(&job))
        };
        let lost: Vec<u64> = self.calls.iter().filter(|(_, call)| of(call)).map(|(work, _)| *work).collect();
        for work in lost {
            if let Some(under_way) = self.calls.remove(&work) {
                let _ = under_way.answer.send(Err(HostError::Gone { reason: reason.to_owned() }));
            }
        }
    }

    /// Deadlines, counts that were not told yet, and who sells now.
    fn look(&mut self) -> Vec<ConsumerMessage> {
        let within = |under_way: &UnderWay| if under_way.sent { ANSWER_WITHIN } else { ORDER_WITHIN };
        let late: Vec<u64> = self
            .calls
            .iter()
            .filter(|(_, under_way)| under_way.since.elapsed() >= within(under_way))
            .map(|(work, _)| *work)
            .collect();
        for work in late {
            if let Some(under_way) = self.calls.remove(&work) {
                let ms = u64::try_from(within(&under_way).as_millis()).unwrap_or(u64::MAX);
                let _ = under_way.answer.send(Err(HostError::Late { ms }));
            }
        }
        self.admit();
        let open = self.jobs.values_mut().flat_map(|job| job.orders.values_mut());
        open.filter(|order| !order.over && order.returned_sum > order.told_returned).map(tell).collect()
    }
}

/// Tells the consumer role what was ordered and what came back.
pub(super) fn tell(order: &mut Order) -> ConsumerMessage {
    order.told_returned = order.returned_sum;
    let rows = |expert_rows| PartUsage { expert_rows, ..PartUsage::default() };
    ConsumerMessage::Event(ConsumerEvent::Ordered {
        call: order.call,
        sent: rows(order.told_sent),
        returned: rows(order.returned_sum),
        experts: counts(&order.returned),
    })
}

/// The last word on an order: exactly what was sent; of one that gave wrong rows, what came back and no more.
pub(super) fn tell_exactly(order: &mut Order, lied: bool) -> ConsumerMessage {
    order.told_sent = if lied { order.returned_sum } else { order.sent };
    tell(order)
}

pub(super) fn counts(rows: &BTreeMap<(u32, u32), u64>) -> Vec<ExpertCount> {
    rows.iter().map(|(&(layer, expert), &rows)| ExpertCount { layer, expert, rows }).collect()
}

fn jobs_of_header(header: &CallHeader) -> BTreeSet<JobId> {
    header.rows.iter().map(|row| JobId(row.slot)).collect()
}

/// A call as it travels: pairs come by rising row, as the group makes them.
fn frame(
    work: u64,
    call: &ExpertCall,
    wire: satgrid_types::WireType,
    width: u32,
) -> Result<(CallHeader, Vec<u8>), HostError> {
    let mut rows: Vec<CallRow> = call.jobs.iter().map(|job| CallRow { slot: job.0, experts: Vec::new() }).collect();
    for pair in &call.work {
        if let Some(row) = usize::try_from(pair.row).ok().and_then(|row| rows.get_mut(row)) {
            row.experts.push(pair.expert);
        }
    }
    let coded = HiddenRows::encode(&call.rows, width, wire);
    let coded = coded.map_err(|error| HostError::Gone { reason: error.to_string() })?;
    Ok((CallHeader { work, layer: call.layer, wire, rows }, coded.bytes))
}

/// The rows of an answer, or what is wrong with them: the worker's fault.
fn decoded(call: &ExpertCall, coded: &HiddenRows, width: u32) -> Result<ExpertRows, HostError> {
    let rows = coded.decode(width).map_err(|error| match error {
        satgrid_engine::stage::codec::CodecError::NotFinite { row } => {
            let expert = usize::try_from(row).ok().and_then(|row| call.work.get(row)).map_or(0, |work| work.expert);
            HostError::Answer(AnswerError::NotFinite { layer: call.layer, expert })
        }
        error @ (satgrid_engine::stage::codec::CodecError::WrongShape { .. }
        | satgrid_engine::stage::codec::CodecError::Width { .. }) => HostError::Gone { reason: error.to_string() },
    })?;
    Ok(ExpertRows { step: call.step, layer: call.layer, rows })
}
