//! The desk of a pack of experts that is for sale: takes calls in by ticket, lets the pack evaluate what is granted, counts it
//! by expert for the provider role, and sends the rows straight back.
//!
//! As at the desk of layers the role decides who is admitted and how much is granted. Calls of one hop are taken in their
//! order; those that were taken are evaluated side by side, and the pack's process puts calls on one layer together,
//! whichever lead they are of.

use super::{
    desk::{Desk, Order},
    hops::{HopEvent, HopId, Switchboard},
    inlets::{Inlets, Ordered, Slot},
    provider::Message,
};
use satgrid_engine::{
    experts::{ExpertCall, ExpertHost, HostError, call::Work},
    port::{Command, EngineEvent, FinishReason, JobError, JobId},
    stage::codec::HiddenRows,
};
use satgrid_engine_llama::PackFacts;
use satgrid_ledger::statements::{ExpertCount, PartOrder, RowsHash};
use satgrid_node::provider::{EngineId, PartDone, ProviderEvent};
use satgrid_protocol::{
    experts::{AnswerHeader, CallHeader},
    hop::{HopFrame, Lost},
};
use satgrid_types::{NodeKey, PartUsage, RequestId, SessionId};
use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::mpsc;

/// Messages that may wait.
const INBOX: usize = 1_024;

/// What a desk is started with.
pub(crate) struct ExpertDeskParts {
    pub engine: EngineId,
    pub host: Arc<dyn ExpertHost>,
    pub facts: PackFacts,
    pub ours: NodeKey,
    pub switchboard: Switchboard,
    pub role: mpsc::Sender<Message>,
}

struct Job {
    session: SessionId,
    request: RequestId,
    order: PartOrder,
    lead: NodeKey,
    granted: u64,
    /// Rows that were given to the pack.
    begun: u64,
    counts: BTreeMap<(u32, u32), u64>,
    usage: PartUsage,
    input: RowsHash,
    output: RowsHash,
    bytes_in: u64,
    bytes_out: u64,
    busy: Duration,
    at_work: u32,
    settling: bool,
}

/// The jobs of a call's rows and the rows, or what is wrong with it.
type Verdict = Result<(Vec<JobId>, Vec<f32>), String>;

/// A call that was evaluated, or not.
struct Done {
    hop: HopId,
    header: CallHeader,
    /// Of each row of the call.
    jobs: Vec<JobId>,
    result: Result<HiddenRows, (Lost, String)>,
    took: Duration,
}

struct Running {
    parts: ExpertDeskParts,
    ear: mpsc::Sender<HopEvent>,
    done: mpsc::UnboundedSender<Done>,
    jobs: BTreeMap<JobId, Job>,
    inlets: Inlets<(CallHeader, Vec<u8>)>,
}

/// Starts a desk.
pub(crate) fn start(parts: ExpertDeskParts) -> Desk {
    let (desk, orders) = Desk::new();
    let (ear, hops) = mpsc::channel(INBOX);
    // Bounded by what is granted.
    let (done, finished) = mpsc::unbounded_channel();
    let inlets = Inlets::new(parts.ours);
    let running = Running { parts, ear, done, jobs: BTreeMap::new(), inlets };
    tokio::spawn(running.run(orders, hops, finished));
    desk
}

impl Running {
    async fn run(
        mut self,
        mut orders: mpsc::UnboundedReceiver<Order>,
        mut hops: mpsc::Receiver<HopEvent>,
        mut finished: mpsc::UnboundedReceiver<Done>,
    ) {
        loop {
            let reports = tokio::select! {
                order = orders.recv() => match order {
                    Some(order) => self.order(order),
                    None => return,
                },
                Some(event) = hops.recv() => self.hop_event(event),
                Some(done) = finished.recv() => self.evaluated(done),
            };
            for report in reports {
                if self.parts.role.send(Message::Event(report)).await.is_err() {
                    return;
                }
            }
        }
    }

    fn engine(&self, event: EngineEvent) -> ProviderEvent {
        ProviderEvent::Engine { engine: self.parts.engine, event }
    }

    fn order(&mut self, order: Order) -> Vec<ProviderEvent> {
        match order {
            Order::Admit { job, session, request, order, lead } => {
                let admitted = Job {
                    session,
                    request,
                    order,
                    lead,
                    granted: 0,
                    begun: 0,
                    counts: BTreeMap::new(),
                    usage: PartUsage::default(),
                    input: RowsHash::default(),
                    output: RowsHash::default(),
                    bytes_in: 0,
                    bytes_out: 0,
                    busy: Duration::ZERO,
                    at_work: 0,
                    settling: false,
                };
                self.jobs.insert(job, admitted);
                self.parts.switchboard.expect(session, request, self.ear.clone());
                self.take_tickets();
            }
            Order::Engine(Command::Grant { job, output_upto, .. }) => {
                if let Some(job) = self.jobs.get_mut(&job) {
                    job.granted = job.granted.max(output_upto.into());
                }
            }
            Order::Engine(Command::Cancel { job }) => return self.end(job, FinishReason::Cancelled),
            Order::Engine(Command::Start(job)) => {
                let error = JobError::Backend { reason: "this engine holds experts, not a model".into() };
                return vec![self.engine(EngineEvent::Failed { job: job.id, error })];
            }
            Order::Engine(Command::ForgetSession { session }) => self.inlets.forget(&SessionId(session)),
            // Rows go back the way they came.
            Order::Route { .. } => {}
            Order::Settle { job } => {
                if let Some(held) = self.jobs.get_mut(&job) {
                    held.settling = true;
                }
                return self.settled(job);
            }
        }
        self.advance();
        Vec::new()
    }

    fn hop_event(&mut self, event: HopEvent) -> Vec<ProviderEvent> {
        match self.inlets.hear(event) {
            None => self.take_tickets(),
            Some(HopEvent::Frame { hop, frame: HopFrame::Call(header, rows) }) => {
                if let Some((header, _)) = self.inlets.push(hop, (header, rows)) {
                    self.inlets.refuse(hop, header.work, Lost::Sender, "more calls wait than may");
                }
            }
            Some(HopEvent::Frame { hop, frame: HopFrame::Rows(header, _) }) => {
                self.inlets.refuse(hop, header.work, Lost::Sender, "experts are sold here, not layers");
            }
            // Nothing else is for a desk whose rows go back.
            Some(
                HopEvent::Begun { .. }
                | HopEvent::Frame { .. }
                | HopEvent::Ended { .. }
                | HopEvent::Back { .. }
                | HopEvent::Lost { .. },
            ) => {}
        }
        self.advance();
        Vec::new()
    }

    fn take_tickets(&mut self) {
        let jobs = &self.jobs;
        self.inlets.take_tickets(|session, request| {
            let (id, job) = jobs.iter().find(|(_, job)| job.session == *session && job.request == *request)?;
            Some((*id, Ordered { session: *session, request: *request, lead: job.lead }))
        });
    }

    /// Gives the pack whatever is granted now.
    fn advance(&mut self) {
        for hop in self.inlets.ids() {
            while let Some((header, rows)) = self.inlets.first(hop) {
                let Some(verdict) = self.judge(hop, header, rows) else { break };
                let Some((header, rows)) = self.inlets.pop(hop) else { break };
                match verdict {
                    Ok((jobs, numbers)) => self.begin(hop, header, &rows, numbers, jobs),
                    Err(text) => self.inlets.refuse(hop, header.work, Lost::Sender, &text),
                }
            }
        }
    }

    /// Whether a call may be evaluated now: none where it has to wait, else the jobs of its rows and the rows, or what is wrong.
    fn judge(&self, hop: HopId, header: &CallHeader, rows: &[u8]) -> Option<Verdict> {
        let mut jobs = Vec::with_capacity(header.rows.len());
        let mut wanted: BTreeMap<JobId, u64> = BTreeMap::new();
        for row in &header.rows {
            let job = match self.inlets.slot(hop, row.slot) {
                Slot::Job(job) if self.jobs.contains_key(&job) => job,
                Slot::Job(_) => return Some(Err("the request is over".into())),
                Slot::NotYet => return None,
                Slot::Uncovered => return Some(Err(format!("no ticket covers slot {}", row.slot))),
            };
            jobs.push(job);
            *wanted.entry(job).or_default() += row.experts.len() as u64;
        }
        for (id, more) in wanted {
            let job = self.jobs.get(&id)?;
            if job.order.wire != header.wire {
                return Some(Err(format!("rows as {}, ordered as {}", header.wire, job.order.wire)));
            }
            let upto = job.begun.saturating_add(more);
            if upto > job.order.max_positions {
                return Some(Err(format!("{upto} expert rows, {} were ordered", job.order.max_positions)));
            }
            if upto > job.granted {
                return None;
            }
        }
        let width = self.parts.facts.n_embd;
        let count = u32::try_from(header.rows.len()).unwrap_or(u32::MAX);
        let coded = HiddenRows { wire: header.wire, count, bytes: rows.to_vec() };
        Some(coded.decode(width).map(|numbers| (jobs, numbers)).map_err(|fault| fault.to_string()))
    }

    fn begin(&mut self, hop: HopId, header: CallHeader, bytes: &[u8], rows: Vec<f32>, jobs: Vec<JobId>) {
        let row_bytes = bytes.len() / header.rows.len().max(1);
        let mut work = Vec::with_capacity(header.pairs());
        for ((number, row), id) in (0u32..).zip(&header.rows).zip(&jobs) {
            work.extend(row.experts.iter().map(|expert| Work { row: number, expert: *expert }));
            let Some(job) = self.jobs.get_mut(id) else { continue };
            let at = number as usize * row_bytes;
            job.input.push(bytes.get(at..at + row_bytes).unwrap_or_default());
            job.bytes_in = job.bytes_in.saturating_add(row_bytes as u64);
            job.begun = job.begun.saturating_add(row.experts.len() as u64);
            job.at_work += 1;
        }
        let (host, done, width) = (self.parts.host.clone(), self.done.clone(), self.parts.facts.n_embd);
        let back = self.inlets.back(hop).cloned();
        tokio::spawn(async move {
            let began = Instant::now();
            let call = ExpertCall { step: header.work, layer: header.layer, rows, work, jobs: Vec::new() };
            let answer = host.evaluate(call).await;
            let took = began.elapsed();
            let result = coded(answer.map(|rows| rows.rows), width, &header);
            // Rows first: whoever waits for them is not kept waiting for the books.
            if let (Ok(rows), Some(back)) = (&result, back) {
                let answer = AnswerHeader { work: header.work, wire: header.wire };
                let _ = back.send(HopFrame::Answer(answer, rows.bytes.clone())).await;
            }
            let _ = done.send(Done { hop, header, jobs, result, took });
        });
    }

    fn evaluated(&mut self, done: Done) -> Vec<ProviderEvent> {
        let Done { hop, header, jobs, result, took } = done;
        let mut touched = Vec::new();
        let (mut at, pairs) = (0, header.pairs().max(1));
        for (row, id) in header.rows.iter().zip(&jobs) {
            let Some(job) = self.jobs.get_mut(id) else { continue };
            job.at_work = job.at_work.saturating_sub(1);
            let Ok(rows) = &result else { continue };
            let bytes = row.experts.len() * (rows.bytes.len() / pairs);
            let out = rows.bytes.get(at..at + bytes).unwrap_or_default();
            at += bytes;
            job.output.push(out);
            job.bytes_out = job.bytes_out.saturating_add(out.len() as u64);
            let share = u32::try_from(row.experts.len()).unwrap_or(u32::MAX);
            job.busy += took * share / u32::try_from(pairs).unwrap_or(u32::MAX);
            for expert in &row.experts {
                *job.counts.entry((header.layer, *expert)).or_default() += 1;
            }
            let more = row.experts.len() as u64;
            job.usage.expert_rows = job.usage.expert_rows.saturating_add(more);
            if !touched.contains(id) {
                touched.push(*id);
            }
        }
        if let Err((why, text)) = &result {
            self.inlets.refuse(hop, header.work, why.clone(), text);
        }
        let worked = touched.iter().filter_map(|id| {
            let job = self.jobs.get(id)?;
            let done = PartDone {
                usage: job.usage,
                input: job.input.value(),
                output: job.output.value(),
                bytes_in: job.bytes_in,
                bytes_out: job.bytes_out,
                busy_ms: u64::try_from(job.busy.as_millis()).unwrap_or(u64::MAX),
            };
            Some(ProviderEvent::Worked { engine: self.parts.engine, job: *id, done })
        });
        let mut reports: Vec<ProviderEvent> = worked.collect();
        let mut ended: Vec<JobId> = jobs;
        ended.dedup();
        reports.extend(ended.into_iter().flat_map(|job| self.settled(job)));
        reports
    }

    /// Ends a job that is to be settled, once nothing of it is at work.
    fn settled(&mut self, id: JobId) -> Vec<ProviderEvent> {
        match self.jobs.get(&id) {
            Some(job) if job.settling && job.at_work == 0 => self.end(id, FinishReason::Stop),
            Some(_) | None => Vec::new(),
        }
    }

    fn end(&mut self, id: JobId, reason: FinishReason) -> Vec<ProviderEvent> {
        let Some(job) = self.jobs.remove(&id) else { return Vec::new() };
        self.parts.switchboard.forget(job.session, job.request);
        self.inlets.over(id);
        let counts = job.counts.iter().map(|(&(layer, expert), &rows)| ExpertCount { layer, expert, rows }).collect();
        let evaluated = u32::try_from(job.begun).unwrap_or(u32::MAX);
        let counted = ProviderEvent::Counted { engine: self.parts.engine, job: id, counts };
        vec![counted, self.engine(EngineEvent::Finished { job: id, reason, evaluated })]
    }
}

/// The answer as it travels, or whose fault it is that there is none.
fn coded(rows: Result<Vec<f32>, HostError>, width: u32, header: &CallHeader) -> Result<HiddenRows, (Lost, String)> {
    let rows = rows.map_err(|error| match error {
        // The lead's fault, whatever is wrong with the call: this desk passes it on as it came.
        HostError::Refused(error) => (Lost::Sender, error.to_string()),
        HostError::Answer(_) | HostError::Gone { .. } | HostError::Late { .. } | HostError::Unpaid => {
            (Lost::Worker, error.to_string())
        }
    })?;
    HiddenRows::encode(&rows, width, header.wire).map_err(|error| (Lost::Worker, error.to_string()))
}
