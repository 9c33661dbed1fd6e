//! The desk of a pack of experts that is for sale: takes calls in by ticket, lets the pack evaluate what is granted, counts it
//! by expert for the provider role, and sends the rows straight back.
//!
//! As at the desk of layers the role decides who is admitted and how much is granted. Calls of one hop are taken in their
//! order; those that were taken are evaluated side by side, and the pack's process puts calls on one layer together,
//! whichever lead they are of.

use super::{
    account::{Account, cut},
    desk::{Desk, Order},
    hops::{HopEvent, HopId, Switchboard},
    inlets::{Inlets, Wrong},
    provider::Message,
};
use ed25519_dalek::SigningKey;
use satgrid_engine::{
    experts::{ExpertCall, ExpertHost, HostError, call::Work},
    port::{Command, EngineEvent, FinishReason, JobError, JobId},
    stage::codec::HiddenRows,
};
use satgrid_engine_llama::PackFacts;
use satgrid_ledger::statements::ExpertCount;
use satgrid_node::provider::{EngineId, ProviderEvent};
use satgrid_protocol::{
    experts::{AnswerHeader, CallHeader},
    hop::HopFrame,
    refusal::Cause,
};
use satgrid_types::SessionId;
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
    /// Signs refusals.
    pub key: Arc<SigningKey>,
    pub switchboard: Switchboard,
    pub role: mpsc::Sender<Message>,
}

struct Job {
    account: Account,
    /// Rows by layer and expert.
    counts: BTreeMap<(u32, u32), u64>,
}

/// The jobs of a call's rows and the rows, or what is wrong with it.
type Verdict = Result<(Vec<JobId>, Vec<f32>), Wrong>;

/// A call that was evaluated, or not.
struct Done {
    hop: HopId,
    header: CallHeader,
    /// Of each row of the call.
    jobs: Vec<JobId>,
    result: Result<HiddenRows, Wrong>,
    /// The pack's process died under it. Whatever else comes to nothing was computed, and may be the rows' fault.
    died: bool,
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
    let inlets = Inlets::new(parts.key.clone());
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
                let account = Account::new(session, request, order, lead);
                self.jobs.insert(job, Job { account, counts: BTreeMap::new() });
                self.parts.switchboard.expect(session, request, self.ear.clone());
                self.take_tickets();
            }
            Order::Engine(Command::Grant { job, output_upto, .. }) => {
                if let Some(job) = self.jobs.get_mut(&job) {
                    job.account.grant(output_upto.into());
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
                    held.account.settle();
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
                    self.refuse(hop, &header, &Wrong::all(Cause::Sender, "more calls wait than may"));
                }
            }
            Some(HopEvent::Frame { hop, frame: HopFrame::Rows(header, _) }) => {
                let wrong = Wrong::all(Cause::Sender, "experts are sold here, not layers");
                self.inlets.refuse(hop, (header.work, header.rows()), &wrong);
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
            jobs.iter().find_map(|(id, job)| job.account.ordered(*id, session, request))
        });
    }

    fn refuse(&self, hop: HopId, header: &CallHeader, wrong: &Wrong) {
        self.inlets.refuse(hop, (header.work, header.rows.len() as u64), wrong);
    }

    /// Gives the pack whatever is granted now.
    fn advance(&mut self) {
        for hop in self.inlets.ids() {
            while let Some((header, rows)) = self.inlets.nth(hop, 0) {
                let Some(verdict) = self.judge(hop, header, rows) else { break };
                let Some((header, rows)) = self.inlets.take(hop, 0) else { break };
                match verdict {
                    Ok((jobs, numbers)) => self.begin(hop, header, &rows, numbers, jobs),
                    Err(wrong) => self.refuse(hop, &header, &wrong),
                }
            }
        }
    }

    /// Whether a call may be evaluated now: none where it has to wait, else the jobs of its rows and the rows, or what is wrong.
    fn judge(&self, hop: HopId, header: &CallHeader, rows: &[u8]) -> Option<Verdict> {
        let mut jobs = Vec::with_capacity(header.rows.len());
        let mut wanted: BTreeMap<JobId, u64> = BTreeMap::new();
        for row in &header.rows {
            let job = match self.inlets.job(hop, row.slot, |job| self.jobs.contains_key(job))? {
                Ok(job) => job,
                Err(wrong) => return Some(Err(wrong)),
            };
            jobs.push(job);
            *wanted.entry(job).or_default() += row.experts.len() as u64;
        }
        for (id, more) in wanted {
            let job = self.jobs.get(&id)?;
            if let Err(text) = job.account.may_begin(more, header.wire, "expert rows")? {
                return Some(Err(Wrong::all(Cause::Sender, text)));
            }
        }
        let width = self.parts.facts.n_embd;
        let count = u32::try_from(header.rows.len()).unwrap_or(u32::MAX);
        let coded = HiddenRows { wire: header.wire, count, bytes: rows.to_vec() };
        Some(
            coded
                .decode(width)
                .map(|numbers| (jobs, numbers))
                .map_err(|fault| Wrong::all(Cause::Sender, fault.to_string())),
        )
    }

    fn begin(&mut self, hop: HopId, header: CallHeader, bytes: &[u8], rows: Vec<f32>, jobs: Vec<JobId>) {
        let row_bytes = bytes.len() / header.rows.len().max(1);
        let mut work = Vec::with_capacity(header.pairs());
        for ((number, row), id) in (0u32..).zip(&header.rows).zip(&jobs) {
            work.extend(row.experts.iter().map(|expert| Work { row: number, expert: *expert }));
            let Some(job) = self.jobs.get_mut(id) else { continue };
            let at = number as usize * row_bytes;
            job.account.begin(bytes.get(at..at + row_bytes).unwrap_or_default(), row.experts.len() as u64);
        }
        let (host, done, width) = (self.parts.host.clone(), self.done.clone(), self.parts.facts.n_embd);
        let back = self.inlets.back(hop).cloned();
        tokio::spawn(async move {
            let began = Instant::now();
            let call = ExpertCall { step: header.work, layer: header.layer, rows, work, jobs: Vec::new() };
            let answer = host.evaluate(call).await;
            let took = began.elapsed();
            let died = matches!(answer, Err(HostError::Gone { .. }));
            let result = coded(answer.map(|rows| rows.rows), width, &header);
            // Rows first: whoever waits for them is not kept waiting for the books.
            if let (Ok(rows), Some(back)) = (&result, back) {
                let busy_us = u32::try_from(took.as_micros()).unwrap_or(u32::MAX);
                let answer = AnswerHeader { work: header.work, wire: header.wire, busy_us };
                let _ = back.send(HopFrame::Answer(answer, rows.bytes.clone())).await;
            }
            let _ = done.send(Done { hop, header, jobs, result, died, took });
        });
    }

    fn evaluated(&mut self, done: Done) -> Vec<ProviderEvent> {
        let Done { hop, header, jobs, result, died, took } = done;
        let mut touched = Vec::new();
        let pairs = header.pairs().max(1);
        let answered = result.as_ref().map_or(&[][..], |rows| rows.bytes.as_slice());
        let parts = cut(answered, answered.len() / pairs, header.rows.iter().map(|row| row.experts.len()));
        for ((row, id), out) in header.rows.iter().zip(&jobs).zip(parts) {
            let Some(job) = self.jobs.get_mut(id) else { continue };
            job.account.put_down();
            if died {
                // Nobody signs for it, and so nothing would be granted in its place: what is granted stands.
                job.account.give_back(row.experts.len() as u64);
            }
            if result.is_err() {
                continue;
            }
            let share = u32::try_from(row.experts.len()).unwrap_or(u32::MAX);
            job.account.came_out(out, took * share / u32::try_from(pairs).unwrap_or(u32::MAX));
            for expert in &row.experts {
                *job.counts.entry((header.layer, *expert)).or_default() += 1;
            }
            let more = row.experts.len() as u64;
            job.account.usage.expert_rows = job.account.usage.expert_rows.saturating_add(more);
            if !touched.contains(id) {
                touched.push(*id);
            }
        }
        if let Err(wrong) = &result {
            self.refuse(hop, &header, wrong);
        }
        let worked = touched.iter().filter_map(|id| {
            let done = self.jobs.get(id)?.account.done();
            Some(ProviderEvent::Worked { engine: self.parts.engine, job: *id, done })
        });
        let mut reports: Vec<ProviderEvent> = worked.collect();
        let mut ended: Vec<JobId> = jobs;
        ended.dedup();
        reports.extend(ended.into_iter().flat_map(|job| self.settled(job)));
        if died {
            // Calls may have waited for what it had taken.
            self.advance();
        }
        reports
    }

    /// Ends a job that is to be settled, once nothing of it is at work.
    fn settled(&mut self, id: JobId) -> Vec<ProviderEvent> {
        match self.jobs.get(&id) {
            Some(job) if job.account.is_over() => self.end(id, FinishReason::Stop),
            Some(_) | None => Vec::new(),
        }
    }

    fn end(&mut self, id: JobId, reason: FinishReason) -> Vec<ProviderEvent> {
        let Some(job) = self.jobs.remove(&id) else { return Vec::new() };
        self.parts.switchboard.forget(job.account.session, job.account.request);
        self.inlets.over(id);
        let counts = job.counts.iter().map(|(&(layer, expert), &rows)| ExpertCount { layer, expert, rows }).collect();
        let evaluated = job.account.evaluated();
        let counted = ProviderEvent::Counted { engine: self.parts.engine, job: id, counts };
        vec![counted, self.engine(EngineEvent::Finished { job: id, reason, evaluated })]
    }
}

/// The answer as it travels, or whose fault it is that there is none.
fn coded(rows: Result<Vec<f32>, HostError>, width: u32, header: &CallHeader) -> Result<HiddenRows, Wrong> {
    let rows = rows.map_err(|error| match error {
        // The lead's fault, whatever is wrong with the call: this desk passes it on as it came.
        HostError::Refused(error) => Wrong::all(Cause::Sender, error.to_string()),
        HostError::Answer(_) | HostError::Gone { .. } | HostError::Late { .. } | HostError::Unpaid => {
            Wrong::all(Cause::Worker, error.to_string())
        }
    })?;
    HiddenRows::encode(&rows, width, header.wire).map_err(|error| Wrong::all(Cause::Worker, error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use async_trait::async_trait;
    use satgrid_engine::{
        experts::{CallError, ExpertRows},
        port::Profile,
    };
    use satgrid_ledger::statements::PartOrder;
    use satgrid_protocol::experts::CallRow;
    use satgrid_types::{NodeKey, RequestId, WireType};

    const HOP: HopId = HopId(1);

    /// Ends every call alike.
    struct Host(Result<f32, HostError>);

    #[async_trait]
    impl ExpertHost for Host {
        async fn evaluate(&self, call: ExpertCall) -> Result<ExpertRows, HostError> {
            let number = self.0.clone()?;
            let rows = (0_u8..).zip(&call.work).map(|(at, _)| number + f32::from(at)).collect();
            Ok(ExpertRows { step: call.step, layer: call.layer, rows })
        }
    }

    fn desk(host: Host) -> (Running, mpsc::UnboundedReceiver<Done>) {
        let facts = PackFacts {
            model_root: [0; 32],
            experts: Vec::new(),
            n_embd: 1,
            layers: 1,
            experts_per_layer: 8,
            used: 2,
            bytes: 0,
            profile: Profile::Exact,
            build_id: [0; 32],
            instruction_set: String::new(),
            millirows_per_s: 1,
        };
        let (role, _) = mpsc::channel(8);
        let (ear, _) = mpsc::channel(8);
        let (done, finished) = mpsc::unbounded_channel();
        let (key, switchboard) = (Arc::new(SigningKey::from_bytes(&[9; 32])), Switchboard::default());
        let inlets = Inlets::new(key.clone());
        let parts = ExpertDeskParts { engine: EngineId(0), host: Arc::new(host), facts, key, switchboard, role };
        let mut running = Running { parts, ear, done, jobs: BTreeMap::new(), inlets };
        for id in [1_u8, 2] {
            let (session, request, lead) = (SessionId([5; 32]), RequestId([id; 32]), NodeKey([1; 32]));
            let order = PartOrder { layers: None, lead, request, wire: WireType::F32, max_positions: 100 };
            let job = JobId(id.into());
            assert!(running.order(Order::Admit { job, session, request, order, lead }).is_empty());
            let grant = Command::Grant { job, prompt_upto: 0, output_upto: 2 };
            assert!(running.order(Order::Engine(grant)).is_empty());
        }
        (running, finished)
    }

    /// One row of each of two jobs, for two experts.
    fn begin(desk: &mut Running) {
        let row = |slot| CallRow { slot, experts: vec![0, 1] };
        let header = CallHeader { work: 70, layer: 0, wire: WireType::F32, rows: vec![row(1), row(2)] };
        desk.begin(HOP, header, &[0; 8], vec![0.0; 2], vec![JobId(1), JobId(2)]);
    }

    #[tokio::test]
    async fn what_a_dying_pack_lost_may_begin_again() {
        let again = async |error: HostError| {
            let (mut desk, mut finished) = desk(Host(Err(error)));
            begin(&mut desk);
            let done = finished.recv().await.unwrap();
            assert!(desk.evaluated(done).is_empty());
            desk.jobs[&JobId(1)].account.may_begin(2, WireType::F32, "expert rows") == Some(Ok(()))
        };
        assert!(again(HostError::Gone { reason: "it died".into() }).await);
        // Who sends what cannot be computed has used up what it was granted.
        assert!(!again(HostError::Refused(CallError::Empty)).await);
    }

    #[tokio::test]
    async fn rows_behind_those_of_a_request_that_is_over_are_booked_as_they_are() {
        let (mut desk, mut finished) = desk(Host(Ok(1.0)));
        begin(&mut desk);
        assert_eq!(desk.order(Order::Engine(Command::Cancel { job: JobId(1) })).len(), 2);
        let done = finished.recv().await.unwrap();
        assert_eq!(desk.evaluated(done).len(), 1);
        let mut given = satgrid_ledger::statements::RowsHash::default();
        given.push(&[3.0_f32.to_le_bytes(), 4.0_f32.to_le_bytes()].concat());
        assert_eq!(desk.jobs[&JobId(2)].account.done().output, given.value());
    }
}
