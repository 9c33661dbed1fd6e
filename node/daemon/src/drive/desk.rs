//! The desk of an engine that holds some layers: takes rows in by ticket, lets the engine compute what is granted, counts it
//! for the provider role, and sends the rows on.
//!
//! The role decides who is admitted and how much is granted; the desk computes nothing beyond. Rows of one sequence are taken
//! in their order: where the first of them waits for a grant, those behind it wait too.

mod sequences;

use super::{
    account::{Account, cut},
    hops::{HopEvent, HopId, Outgoing, Switchboard},
    inlets::{Inlets, Wrong},
    provider::Message,
    rings::{self, Buys},
};
use ed25519_dalek::SigningKey;
use satgrid_engine::{
    port::{Command, EngineEvent, FinishReason, JobError, JobId},
    stage::{
        codec::HiddenRows,
        kept::KeptRows,
        port::{Piece, SequenceId, Stage, StageCommand, StageError, StageEvent, StageWork, WorkId},
    },
};
use satgrid_ledger::statements::PartOrder;
use satgrid_node::provider::{EngineId, ProviderEvent};
use satgrid_protocol::{
    frame::{PartRoute, Resend},
    hop::{HopFrame, MAX_ROWS_BYTES, RowsHeader, RowsPiece, TicketFrame},
    refusal::Cause,
};
use satgrid_protocol_quic::QuicEndpoint;
use satgrid_types::{NodeKey, RequestId, SessionId, WorkKind};
use sequences::Sequences;
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};
use tokio::sync::{Semaphore, mpsc};

/// Messages that may wait.
const INBOX: usize = 1_024;
/// Works that were sent on and may still be refused downstream.
const MAX_SENT_ON: usize = 4_096;
/// Bytes of rows that were sent on and are kept, to be sent again where the next worker is replaced.
const KEPT_BYTES: usize = 64 << 20;
/// KiB of them that may wait on all hops together until the next node reads. Beyond, they are as good as not kept.
const RESENDING_KIB: usize = 128 << 10;

/// What the provider's driver tells the desk.
pub(crate) enum Order {
    Admit { job: JobId, session: SessionId, request: RequestId, order: PartOrder, lead: NodeKey },
    Engine(Command),
    Route { job: JobId, route: Box<PartRoute> },
    Settle { job: JobId },
}

/// A handle to the desk's task.
#[derive(Clone)]
pub(crate) struct Desk(mpsc::UnboundedSender<Order>);

impl Desk {
    /// A handle, and what is told through it.
    pub(super) fn new() -> (Desk, mpsc::UnboundedReceiver<Order>) {
        let (orders, inbox) = mpsc::unbounded_channel();
        (Desk(orders), inbox)
    }
    pub(crate) fn tell(&self, order: Order) {
        let _ = self.0.send(order);
    }
}

/// What a desk is started with.
pub(crate) struct DeskParts {
    pub engine: EngineId,
    pub stage: Arc<dyn Stage>,
    pub key: Arc<SigningKey>,
    pub endpoint: QuicEndpoint,
    pub switchboard: Switchboard,
    pub role: mpsc::Sender<Message>,
    /// Who buys the experts of a stage that leads some.
    pub buys: Option<Arc<dyn Buys>>,
}

struct Job {
    account: Account,
    owner: u64,
    next: Option<NodeKey>,
    /// Why it ends, once it is to.
    reason: FinishReason,
}

struct AtWork {
    hop: HopId,
    header: RowsHeader,
    jobs: Vec<JobId>,
    sequences: Vec<SequenceId>,
}

struct Running {
    parts: DeskParts,
    ear: mpsc::Sender<HopEvent>,
    jobs: BTreeMap<JobId, Job>,
    sequences: Sequences,
    inlets: Inlets<(RowsHeader, Vec<u8>)>,
    at_work: BTreeMap<WorkId, AtWork>,
    next_work: u64,
    /// The lead of each session.
    leads: BTreeMap<SessionId, NodeKey>,
    /// Hops of ours, by the lead they work for and the node they go to.
    out: BTreeMap<(NodeKey, NodeKey), Outgoing>,
    /// By lead and its number of the work.
    sent_on: VecDeque<(NodeKey, u64, HopId)>,
    /// Rows that were sent on. What is kept of a sequence that was cut since is as long as what was computed after.
    kept: KeptRows<SequenceId>,
    /// Room for those that wait to be sent again, in KiB.
    resending: Arc<Semaphore>,
}

/// Starts a desk.
pub(crate) fn start(parts: DeskParts) -> Desk {
    let (desk, orders) = Desk::new();
    let (ear, hop_inbox) = mpsc::channel(INBOX);
    tokio::spawn(Running::new(parts, ear).run(orders, hop_inbox));
    desk
}

impl Running {
    fn new(parts: DeskParts, ear: mpsc::Sender<HopEvent>) -> Running {
        let inlets = Inlets::new(parts.key.clone());
        Running {
            parts,
            ear,
            jobs: BTreeMap::new(),
            sequences: Sequences::default(),
            inlets,
            at_work: BTreeMap::new(),
            next_work: 0,
            leads: BTreeMap::new(),
            out: BTreeMap::new(),
            sent_on: VecDeque::new(),
            kept: KeptRows::new(KEPT_BYTES),
            resending: Arc::new(Semaphore::new(RESENDING_KIB)),
        }
    }

    async fn run(mut self, mut orders: mpsc::UnboundedReceiver<Order>, mut hops: mpsc::Receiver<HopEvent>) {
        let stage = self.parts.stage.clone();
        loop {
            let reports = tokio::select! {
                order = orders.recv() => match order {
                    Some(order) => self.order(order),
                    None => return,
                },
                Some(event) = hops.recv() => self.hop_event(event),
                event = stage.next_event() => match event {
                    Some(event) => {
                        self.before(&event).await;
                        self.stage_event(event)
                    }
                    None => return,
                },
            };
            for report in reports {
                if self.parts.role.send(Message::Event(report)).await.is_err() {
                    return;
                }
            }
        }
    }

    /// Where the engine died every job is over, and whoever holds experts for one gives its receipt. The role says no more of
    /// these jobs: they are forgotten once it is up again, with those that came before the role had heard of it. Until then
    /// their rows are left to the receipts, as in `begin`.
    async fn before(&mut self, event: &StageEvent) {
        let (died, up) = match event {
            StageEvent::Down { .. } => (true, false),
            StageEvent::Up => (false, true),
            StageEvent::Evaluated { .. } | StageEvent::Refused { .. } => (false, false),
        };
        if let Some(buys) = self.parts.buys.clone().filter(|_| died || up) {
            rings::tell_all_over(self.parts.engine, buys.as_ref(), &self.parts.role).await;
        }
        if up {
            for (id, job) in std::mem::take(&mut self.jobs) {
                self.parts.switchboard.forget(job.account.session, job.account.request);
                self.inlets.over(id);
            }
        }
    }

    fn engine(&self, event: EngineEvent) -> ProviderEvent {
        ProviderEvent::Engine { engine: self.parts.engine, event }
    }

    fn order(&mut self, order: Order) -> Vec<ProviderEvent> {
        match order {
            Order::Admit { job, session, request, order, lead } => {
                let owner = self.sequences.owner(session);
                let account = Account::new(session, request, order, lead);
                self.jobs.insert(job, Job { account, owner, next: None, reason: FinishReason::Stop });
                if let Some(buys) = &self.parts.buys {
                    buys.begin(job, request);
                }
                self.parts.switchboard.expect(session, request, self.ear.clone());
                self.take_tickets();
            }
            Order::Engine(Command::Grant { job, output_upto, .. }) => {
                if let Some(job) = self.jobs.get_mut(&job) {
                    job.account.grant(output_upto.into());
                }
            }
            Order::Engine(Command::Cancel { job }) => return self.cancel(job),
            Order::Engine(Command::Start(job)) => {
                let error = JobError::Backend { reason: "this engine holds layers, not a model".into() };
                return vec![self.engine(EngineEvent::Failed { job: job.id, error })];
            }
            Order::Engine(Command::ForgetSession { session }) => {
                self.inlets.forget(&SessionId(session));
                if let Some(lead) = self.leads.remove(&SessionId(session))
                    && !self.leads.values().any(|other| *other == lead)
                {
                    self.out.retain(|(of, _), _| *of != lead);
                }
                if let Some(owner) = self.sequences.forget(SessionId(session)) {
                    self.kept.forget_all(|sequence| sequence.owner == owner);
                    let _ = self.parts.stage.send(StageCommand::ForgetOwner { owner });
                }
            }
            Order::Route { job, route } => self.route(job, *route),
            Order::Settle { job } => {
                if let Some(held) = self.jobs.get_mut(&job) {
                    held.account.settle();
                }
                return self.settled(job);
            }
        }
        self.advance()
    }

    /// Opens (or takes up) the hop to the next node, and shows it the ticket.
    fn route(&mut self, job: JobId, route: PartRoute) {
        let Some(held) = self.jobs.get_mut(&job) else { return };
        held.next = Some(route.next);
        // The role holds the lead's own word that it is who pays.
        self.leads.insert(held.account.session, held.account.order.lead);
        let to = (held.account.order.lead, route.next);
        let parts = &self.parts;
        let out = self.out.entry(to).or_insert_with(|| {
            Outgoing::start(parts.endpoint.clone(), parts.key.clone(), to, &route.addresses, self.ear.clone())
        });
        out.send(HopFrame::Ticket(TicketFrame { slot: route.slot, ticket: route.ticket }));
        for resend in route.resend {
            self.send_again(job, (to, route.slot), &resend);
        }
    }

    /// Rows that were kept go out once more, as a replay that ends at the next node: nothing is computed for them here.
    fn send_again(&mut self, id: JobId, (to, slot): ((NodeKey, NodeKey), u64), resend: &Resend) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let Resend { work, sequence, start, rows } = *resend;
        let kept = SequenceId { owner: job.owner, number: sequence };
        let found = self.kept.rows(kept, start, start.saturating_add(rows));
        let fits = |found: &HiddenRows| found.count > 0 && found.bytes.len() <= MAX_ROWS_BYTES;
        let found = found.filter(|found| found.wire == job.account.order.wire && fits(found));
        let room = |bytes: usize| {
            let kib = u32::try_from(bytes.div_ceil(1 << 10)).ok()?;
            self.resending.clone().try_acquire_many_owned(kib).ok()
        };
        match found.and_then(|found| Some((room(found.bytes.len())?, found))) {
            Some((room, found)) => {
                let pieces = vec![RowsPiece { slot, sequence, start, rows, kind: WorkKind::Replay }];
                let header = RowsHeader { work, pieces, wire: found.wire, ends_after: Some(0), again: false };
                job.account.sent_again(&found.bytes);
                if let Some(out) = self.out.get(&to) {
                    out.send_again(HopFrame::Rows(header, found.bytes), room);
                }
            }
            None => {
                let held = self.kept.upto(kept);
                if let Some(hop) = self.inlets.hop_of(id) {
                    let wrong = Wrong::all(Cause::Gap(sequence, held), "these rows are not kept any more");
                    self.inlets.refuse(hop, (work, rows.into()), &wrong);
                }
            }
        }
    }

    fn hop_event(&mut self, event: HopEvent) -> Vec<ProviderEvent> {
        let Some(event) = self.inlets.hear(event) else {
            self.take_tickets();
            return self.advance();
        };
        match event {
            HopEvent::Frame { hop, frame: HopFrame::Rows(header, rows) } => {
                if let Some((header, _)) = self.inlets.push(hop, (header, rows)) {
                    self.refuse(hop, &header, &Wrong::all(Cause::Sender, "more rows wait than may"));
                }
            }
            HopEvent::Frame { hop, frame: HopFrame::Call(header, _) } => {
                let wrong = Wrong::all(Cause::Sender, "layers are sold here, not experts");
                self.inlets.refuse(hop, (header.work, header.rows.len() as u64), &wrong);
            }
            HopEvent::Begun { .. } | HopEvent::Frame { .. } | HopEvent::Ended { .. } => {}
            HopEvent::Back { lead, frame: HopFrame::Lost(lost), from } => {
                // On its way to the lead, who alone knows whose word it may be.
                let Ok(said) = lost.peek() else {
                    tracing::warn!(next = %from.short(), "a refusal that cannot be read");
                    return self.advance();
                };
                let of = |sent: &&(NodeKey, u64, HopId)| (sent.0, sent.1) == (lead, said.work);
                let found = self.sent_on.iter().rev().find(of);
                // Rows that a worker kept and sent again did not pass here.
                let found = found.or_else(|| self.sent_on.iter().rev().find(|sent| sent.0 == lead));
                let hop = found.map(|(_, _, hop)| *hop);
                if let Some(back) = hop.and_then(|hop| self.inlets.back(hop)) {
                    let _ = back.try_send(HopFrame::Lost(lost));
                }
            }
            HopEvent::Back { .. } => {}
            HopEvent::Lost { lead, to, reason } => {
                tracing::info!(next = %to.short(), %reason, "the hop to the next node is gone");
                self.out.remove(&(lead, to));
            }
        }
        self.advance()
    }

    fn take_tickets(&mut self) {
        let jobs = &self.jobs;
        self.inlets.take_tickets(|session, request| {
            jobs.iter().find_map(|(id, job)| job.account.ordered(*id, session, request))
        });
    }

    fn refuse(&self, hop: HopId, header: &RowsHeader, wrong: &Wrong) {
        self.inlets.refuse(hop, (header.work, header.rows()), wrong);
    }

    /// Gives the engine whatever is granted now.
    fn advance(&mut self) -> Vec<ProviderEvent> {
        for id in self.inlets.ids() {
            let (mut at, mut blocked) = (0, BTreeSet::new());
            while let Some((header, rows)) = self.inlets.nth(id, at) {
                let waits = header.pieces.iter().any(|piece| blocked.contains(&piece.sequence));
                let verdict = if waits { None } else { self.judge(id, header, rows.len()) };
                let Some(verdict) = verdict else {
                    // Those of other sequences need not wait for it.
                    blocked.extend(header.pieces.iter().map(|piece| piece.sequence));
                    at += 1;
                    continue;
                };
                let Some((header, rows)) = self.inlets.take(id, at) else { break };
                match verdict {
                    Ok(jobs) if rows.is_empty() => self.send_on(id, &header, &jobs, Vec::new()),
                    Ok(jobs) => self.begin(id, header, rows, jobs),
                    Err(wrong) => self.refuse(id, &header, &wrong),
                }
            }
        }
        Vec::new()
    }

    /// Whether rows may be computed now: none where they have to wait, else the jobs of the pieces, or what is wrong.
    fn judge(&self, hop: HopId, header: &RowsHeader, bytes: usize) -> Option<Result<Vec<JobId>, Wrong>> {
        let sender = |text: String| Some(Err(Wrong::all(Cause::Sender, text)));
        let mut jobs = Vec::with_capacity(header.pieces.len());
        for piece in &header.pieces {
            match self.inlets.job(hop, piece.slot, |job| self.jobs.contains_key(job))? {
                Ok(job) => jobs.push(job),
                Err(wrong) => return Some(Err(wrong)),
            }
        }
        if bytes == 0 {
            // A replay that ended before: it only passes.
            return jobs.iter().all(|job| self.jobs.get(job).is_some_and(|j| j.next.is_some())).then_some(Ok(jobs));
        }
        let facts = self.parts.stage.facts();
        let Some(row_bytes) = header.wire.row_bytes(facts.n_embd) else {
            return sender("rows of this width do not travel as this type".into());
        };
        if let Err(fault) = header.check_shape(bytes, row_bytes) {
            return sender(fault.to_string());
        }
        let mut wanted: BTreeMap<JobId, (u64, u64)> = BTreeMap::new();
        for (piece, job) in header.pieces.iter().zip(&jobs) {
            wanted.entry(*job).or_insert((piece.slot, 0)).1 += u64::from(piece.rows);
        }
        for (id, (slot, rows)) in wanted {
            let job = self.jobs.get(&id)?;
            if let Err(text) = job.account.may_begin(rows, header.wire, "positions")? {
                return Some(Err(Wrong::one(slot, Cause::Sender, text)));
            }
            job.next?;
        }
        Some(Ok(jobs))
    }

    fn begin(&mut self, hop: HopId, header: RowsHeader, rows: Vec<u8>, jobs: Vec<JobId>) {
        let count = u32::try_from(header.rows()).unwrap_or(u32::MAX);
        let row_bytes = rows.len() / count.max(1) as usize;
        let (mut at, mut pieces, mut sequences) = (0, Vec::new(), Vec::new());
        for (piece, id) in header.pieces.iter().zip(&jobs) {
            let Some(job) = self.jobs.get_mut(id) else { return };
            let bytes = piece.rows as usize * row_bytes;
            job.account.begin(&rows[at..at + bytes], piece.rows.into());
            at += bytes;
            let sequence = SequenceId { owner: job.owner, number: piece.sequence };
            sequences.push(sequence);
            pieces.push(Piece { sequence, start: piece.start, rows: piece.rows, purpose: piece.kind, job: *id });
        }
        let id = WorkId(self.next_work);
        self.next_work += 1;
        let rows = HiddenRows { wire: header.wire, count, bytes: rows };
        let output = header.ends_after != Some(0);
        let work = StageWork { id, pieces, rows, output };
        if self.parts.stage.send(StageCommand::Evaluate(work)).is_err() {
            // It has just died: every job ends with its receipt, by which its lead knows to look for another worker. A
            // refusal would be there before that, and end what another could go on with.
            tracing::debug!(work = header.work, "rows for an engine that is down");
            return self.put_down(&jobs);
        }
        self.at_work.insert(id, AtWork { hop, header, jobs, sequences });
    }

    fn put_down(&mut self, jobs: &[JobId]) {
        for id in jobs {
            if let Some(job) = self.jobs.get_mut(id) {
                job.account.put_down();
            }
        }
    }

    fn stage_event(&mut self, event: StageEvent) -> Vec<ProviderEvent> {
        match event {
            StageEvent::Evaluated { work, rows, busy_us } => {
                let Some(done) = self.at_work.remove(&work) else { return Vec::new() };
                self.evaluated(done, rows, busy_us)
            }
            StageEvent::Refused { work, error } => {
                let Some(AtWork { hop, header, jobs, .. }) = self.at_work.remove(&work) else { return Vec::new() };
                let (why, sequence) = match &error {
                    StageError::Gap { sequence, held, .. } => {
                        self.sequences.cut(*sequence, *held);
                        (Cause::Gap(sequence.number, *held), None)
                    }
                    StageError::OverContext { sequence, .. } => (Cause::Sender, Some(sequence.number)),
                    StageError::BadWork { .. } | StageError::BadRows(_) => (Cause::Sender, None),
                    StageError::Full { .. }
                    | StageError::Busy { .. }
                    | StageError::BadResult(_)
                    | StageError::Backend { .. } => (Cause::Worker, None),
                };
                let piece = header.pieces.iter().find(|piece| sequence == Some(piece.sequence));
                let slot = piece.map(|piece| piece.slot);
                self.refuse(hop, &header, &Wrong { why, slot, text: error.to_string() });
                self.put_down(&jobs);
                for (piece, id) in header.pieces.iter().zip(&jobs) {
                    if let Some(job) = self.jobs.get_mut(id) {
                        job.account.give_back(piece.rows.into());
                    }
                }
                jobs.into_iter().flat_map(|job| self.settled(job)).collect()
            }
            StageEvent::Down { reason } => {
                self.at_work.clear();
                self.sequences.clear();
                self.jobs.values_mut().for_each(|job| job.account.drop_work());
                vec![self.engine(EngineEvent::Down { reason })]
            }
            StageEvent::Up => vec![self.engine(EngineEvent::Up)],
        }
    }

    fn evaluated(&mut self, done: AtWork, rows: HiddenRows, busy_us: u64) -> Vec<ProviderEvent> {
        let AtWork { hop, header, jobs, sequences } = done;
        let total = header.rows().max(1);
        let row_bytes = if rows.count == 0 { 0 } else { rows.bytes.len() / rows.count as usize };
        let parts = cut(&rows.bytes, row_bytes, header.pieces.iter().map(|piece| piece.rows as usize));
        let mut reports = Vec::new();
        for (((piece, id), sequence), part) in header.pieces.iter().zip(&jobs).zip(sequences).zip(parts) {
            let kind = self.sequences.computed(sequence, *id, piece, header.again);
            let Some(job) = self.jobs.get_mut(id) else { continue };
            let account = &mut job.account;
            let share = Duration::from_micros(busy_us.saturating_mul(piece.rows.into()) / total);
            account.came_out(part, share);
            if rows.count > 0 {
                // From an engine whose rows are whole: they were checked where they came in.
                let part = HiddenRows { wire: header.wire, count: piece.rows, bytes: part.to_vec() };
                self.kept.push(sequence, piece.start, &part);
            }
            account.put_down();
            let layers = account.order.layers.map_or(0, |range| range.layers());
            if let Some(usage) = account.usage.plus(kind, piece.rows.into(), layers) {
                account.usage = usage;
            }
            reports.push(ProviderEvent::Worked { engine: self.parts.engine, job: *id, done: account.done() });
        }
        // Rows first: whoever waits for them is not kept waiting for the books.
        self.send_on(hop, &header, &jobs, rows.bytes);
        let over: Vec<ProviderEvent> = jobs.into_iter().flat_map(|job| self.settled(job)).collect();
        reports.extend(over);
        reports
    }

    fn send_on(&mut self, hop: HopId, header: &RowsHeader, jobs: &[JobId], rows: Vec<u8>) {
        // All pieces of a work go one way, which any job that still runs knows.
        let mut running = jobs.iter().filter_map(|id| self.jobs.get(id));
        let Some(to) = running.find_map(|job| Some((job.account.order.lead, job.next?))) else {
            // Its orders have ended meanwhile, and their ends say so. A refusal would end what others of this lead could go on with.
            tracing::debug!(work = header.work, "rows of requests that are over");
            return;
        };
        let (lead, _) = to;
        let Some(out) = self.out.get(&to) else {
            return self.inlets.refuse_later(hop, (header.work, header.rows()), to.1);
        };
        let ends_after = header.ends_after.map(|left| left.saturating_sub(1));
        let header = RowsHeader { ends_after, ..header.clone() };
        self.sent_on.push_back((lead, header.work, hop));
        if self.sent_on.len() > MAX_SENT_ON {
            self.sent_on.pop_front();
        }
        out.send(HopFrame::Rows(header, rows));
    }

    /// Ends a job that is to be settled, once nothing of it is at work.
    fn settled(&mut self, id: JobId) -> Vec<ProviderEvent> {
        match self.jobs.get(&id) {
            Some(job) if job.account.is_over() => self.end(id, job.reason),
            Some(_) | None => Vec::new(),
        }
    }

    /// Nothing more of a job begins. Experts that are asked for its rows are its workers until the engine is done with these.
    fn cancel(&mut self, id: JobId) -> Vec<ProviderEvent> {
        if self.parts.buys.is_none() {
            return self.end(id, FinishReason::Cancelled);
        }
        let Some(job) = self.jobs.get_mut(&id) else { return Vec::new() };
        self.inlets.over(id);
        job.account.settle();
        job.reason = FinishReason::Cancelled;
        self.settled(id)
    }

    fn end(&mut self, id: JobId, reason: FinishReason) -> Vec<ProviderEvent> {
        let Some(job) = self.jobs.remove(&id) else { return Vec::new() };
        self.parts.switchboard.forget(job.account.session, job.account.request);
        self.inlets.over(id);
        let evaluated = job.account.evaluated();
        let over = self.engine(EngineEvent::Finished { job: id, reason, evaluated });
        match self.parts.buys.clone() {
            Some(buys) => {
                rings::tell_over((self.parts.engine, id), buys, self.parts.role.clone(), over);
                Vec::new()
            }
            None => vec![over],
        }
    }
}

#[cfg(test)]
mod tests;
