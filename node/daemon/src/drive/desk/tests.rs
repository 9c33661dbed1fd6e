use super::*;
use async_trait::async_trait;
use satgrid_engine::{
    port::{EngineDown, Profile},
    stage::port::StageFacts,
};
use satgrid_protocol::hop::Ticket;
use satgrid_protocol_quic::Limits;
use satgrid_types::{LayerRange, Signed, WireType, node_key};
use std::net::{Ipv4Addr, SocketAddr};
use tokio_util::sync::CancellationToken;

const LEAD: NodeKey = NodeKey([1; 32]);
const OTHER_LEAD: NodeKey = NodeKey([2; 32]);
const NEXT: NodeKey = NodeKey([3; 32]);
const HOP: HopId = HopId(1);

/// Layers that take everything and say nothing.
struct Mute;

#[async_trait]
impl Stage for Mute {
    fn facts(&self) -> StageFacts {
        StageFacts {
            model_root: [0; 32],
            architecture: "llama".into(),
            layers: range(),
            model_layers: 8,
            n_embd: 1,
            profile: Profile::Exact,
            build_id: [0; 32],
            instruction_set: String::new(),
            sequences: 8,
            context: 64,
            batch: 64,
            speed: None,
            tensor_bytes: 0,
            name: None,
            quantisation: String::new(),
            memory_bytes: 0,
        }
    }

    fn send(&self, _command: StageCommand) -> Result<(), EngineDown> {
        Ok(())
    }

    async fn next_event(&self) -> Option<StageEvent> {
        None
    }

    fn is_up(&self) -> bool {
        true
    }
}

fn range() -> LayerRange {
    LayerRange::new(1, 3).unwrap()
}

fn endpoint() -> QuicEndpoint {
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    QuicEndpoint::bind_client(any, Limits::default(), &CancellationToken::new()).unwrap()
}

/// A desk on which an upstream node has a hop; what it is answered.
fn desk() -> (Running, mpsc::Receiver<HopFrame>) {
    let (role, _) = mpsc::channel(8);
    let (ear, _) = mpsc::channel(8);
    let (back, answers) = mpsc::channel(8);
    let key = Arc::new(SigningKey::from_bytes(&[9; 32]));
    let (engine, stage, switchboard) = (EngineId(0), Arc::new(Mute), Switchboard::default());
    let parts = DeskParts { engine, stage, key, endpoint: endpoint(), switchboard, role, buys: None };
    let mut running = Running { resending: Arc::new(Semaphore::new(2)), ..Running::new(parts, ear) };
    running.inlets.begun(HOP, LEAD, back);
    (running, answers)
}

impl Running {
    /// A job of a lead, whose rows go to the next node.
    fn with_job(&mut self, id: u64, lead: NodeKey) -> JobId {
        let order = PartOrder {
            layers: Some(range()),
            lead,
            request: RequestId([7; 32]),
            wire: WireType::F32,
            max_positions: 100,
        };
        let request = RequestId([u8::try_from(id).unwrap(); 32]);
        let admit = Order::Admit { job: JobId(id), session: SessionId([5; 32]), request, order, lead };
        assert!(self.order(admit).is_empty());
        // As its route would.
        self.jobs.get_mut(&JobId(id)).unwrap().next = Some(NEXT);
        self.leads.insert(SessionId([5; 32]), lead);
        let (ear, key) = (self.ear.clone(), self.parts.key.clone());
        self.out
            .entry((lead, NEXT))
            .or_insert_with(|| Outgoing::start(self.parts.endpoint.clone(), key, (lead, NEXT), &[], ear));
        JobId(id)
    }
}

impl Running {
    /// Of the request of a job, whoever signed it.
    fn show_ticket(&mut self, id: u64) {
        let ticket = Ticket {
            version: Ticket::VERSION,
            upstream: LEAD,
            downstream: node_key(&self.parts.key),
            session: SessionId([5; 32]),
            request: RequestId([u8::try_from(id).unwrap(); 32]),
            positions: 100,
            expires_at: crate::drive::now().plus_ms(60_000),
            nonce: id,
        };
        let ticket = Signed::sign(&ticket, &self.parts.key);
        self.inlets.show(HOP, TicketFrame { slot: id, ticket });
        self.take_tickets();
    }
}

/// A work of one row of each of some jobs.
fn work(jobs: &[JobId]) -> RowsHeader {
    let piece = |job: &JobId| {
        let sequence = u32::try_from(job.0).unwrap();
        RowsPiece { slot: job.0, sequence, start: 0, rows: 1, kind: WorkKind::Prefill }
    };
    let pieces = jobs.iter().map(piece).collect();
    RowsHeader { work: 70, pieces, wire: WireType::F32, ends_after: None, again: false }
}

#[tokio::test]
async fn a_request_that_ends_under_its_rows_takes_nobody_elses_along() {
    let (mut desk, mut answers) = desk();
    let jobs = [desk.with_job(1, LEAD), desk.with_job(2, LEAD)];
    desk.begin(HOP, work(&jobs), vec![0; 8], jobs.to_vec());
    assert_eq!(desk.order(Order::Engine(Command::Cancel { job: jobs[0] })).len(), 1);
    let rows = HiddenRows { wire: WireType::F32, count: 2, bytes: vec![1, 1, 1, 1, 2, 2, 2, 2] };
    let reports = desk.stage_event(StageEvent::Evaluated { work: WorkId(0), rows, busy_us: 9 });
    assert_eq!(reports.len(), 1, "the other one's work is counted");
    assert_eq!(desk.sent_on.len(), 1, "and goes on");
    assert!(answers.try_recv().is_err(), "nothing is refused");
    // Its own rows, not those of the one before it.
    let kept = SequenceId { owner: desk.jobs[&jobs[1]].owner, number: 2 };
    assert_eq!(desk.kept.rows(kept, 0, 1).map(|rows| rows.bytes), Some(vec![2; 4]));
    // Where all have ended there is nobody to send to, and nobody to blame.
    desk.begin(HOP, work(&jobs[1..]), vec![0; 4], vec![jobs[1]]);
    desk.order(Order::Engine(Command::Cancel { job: jobs[1] }));
    let rows = HiddenRows { wire: WireType::F32, count: 1, bytes: vec![2; 4] };
    assert!(desk.stage_event(StageEvent::Evaluated { work: WorkId(1), rows, busy_us: 9 }).is_empty());
    assert!(answers.try_recv().is_err());
}

/// A lead may name any addresses for the node that is next.
#[tokio::test]
async fn a_hop_that_one_lead_loses_is_no_other_leads() {
    let (mut desk, _answers) = desk();
    desk.with_job(1, LEAD);
    desk.with_job(2, OTHER_LEAD);
    desk.hop_event(HopEvent::Lost { lead: OTHER_LEAD, to: NEXT, reason: "nobody is there".into() });
    assert_eq!(desk.out.keys().copied().collect::<Vec<_>>(), [(LEAD, NEXT)]);
}

/// The role has no more to say of jobs that died with the engine.
#[tokio::test]
async fn jobs_that_died_with_the_engine_are_forgotten_when_it_is_back() {
    let (mut desk, mut answers) = desk();
    let job = desk.with_job(1, LEAD);
    let down = StageEvent::Down { reason: "killed".into() };
    desk.before(&down).await;
    desk.stage_event(down);
    // What was on its way here is not refused: others may go on with it.
    desk.begin(HOP, work(&[job]), vec![0; 4], vec![job]);
    assert!(answers.try_recv().is_err());
    desk.before(&StageEvent::Up).await;
    desk.stage_event(StageEvent::Up);
    assert!(desk.jobs.is_empty());
}

/// A lead may ask as often as it likes, and its next node need not read.
#[tokio::test]
async fn rows_wait_to_be_sent_again_only_where_there_is_room() {
    let (mut desk, _answers) = desk();
    let job = desk.with_job(1, LEAD);
    let kept = SequenceId { owner: desk.jobs[&job].owner, number: 1 };
    desk.kept.push(kept, 0, &HiddenRows { wire: WireType::F32, count: 1, bytes: vec![1; 4] });
    for work in 0..5 {
        desk.send_again(job, ((LEAD, NEXT), 1), &Resend { work, sequence: 1, start: 0, rows: 1 });
    }
    assert_eq!(desk.jobs[&job].account.done().bytes_out, 8, "room for two, and neither is sent");
    assert_eq!(desk.resending.available_permits(), 0);
}

#[tokio::test]
async fn a_session_that_is_over_leaves_no_rows_and_no_hops() {
    let (mut desk, _answers) = desk();
    let job = desk.with_job(1, LEAD);
    let kept = SequenceId { owner: desk.jobs[&job].owner, number: 1 };
    desk.kept.push(kept, 0, &HiddenRows { wire: WireType::F32, count: 1, bytes: vec![1; 4] });
    desk.order(Order::Engine(Command::Cancel { job }));
    desk.order(Order::Engine(Command::ForgetSession { session: [4; 32] }));
    assert_eq!((desk.kept.upto(kept), desk.out.len()), (1, 1), "it was another one");
    desk.order(Order::Engine(Command::ForgetSession { session: [5; 32] }));
    assert_eq!((desk.kept.upto(kept), desk.out.len()), (0, 0));
}

/// Whoever is next may be dead, which its lead hears of too.
#[tokio::test]
async fn rows_for_a_node_that_is_gone_are_refused_when_the_lead_has_had_its_time() {
    let (mut desk, mut answers) = desk();
    let job = desk.with_job(1, LEAD);
    desk.show_ticket(1);
    desk.begin(HOP, work(&[job]), vec![0; 4], vec![job]);
    desk.hop_event(HopEvent::Lost { lead: LEAD, to: NEXT, reason: "silent".into() });
    let rows = HiddenRows { wire: WireType::F32, count: 1, bytes: vec![1; 4] };
    desk.stage_event(StageEvent::Evaluated { work: WorkId(0), rows, busy_us: 9 });
    assert!(answers.try_recv().is_err(), "not at once");
    let refused = tokio::time::timeout(Duration::from_secs(60), answers.recv()).await.unwrap();
    let Some(HopFrame::Lost(signed)) = refused else { panic!("no refusal") };
    let said = signed.verify(&node_key(&desk.parts.key)).unwrap();
    assert_eq!((said.work, said.rows, said.why, said.accused), (70, 1, Cause::Next, Some(NEXT)));
    assert_eq!((said.session, said.request), (SessionId([5; 32]), RequestId([1; 32])));
}
