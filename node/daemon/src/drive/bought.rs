//! The experts that a lead buys: for each request of its customer one order to each worker, rows to them and back, and the
//! account of all rows for the receipt.
//!
//! The group ([`ExpertGroup`]) decides who evaluates what; here each worker is a host of it. Money runs as for layers: the
//! consumer role orders, signs up to what came back and takes the receipts; the calls go over a hop with tickets.
//!
//! | an order is | awaits | leaves with |
//! |---|---|---|
//! | ordering | the worker took it, and the ticket for our hop | ready; or the call's end: lost |
//! | ready | calls and their rows | a lost hop: ordering, for a new ticket; the job's end: ending |
//! | ending | the worker's receipt, `SETTLE` at most | over |
//! | lost | nothing: its rows went to another host | over |

mod running;
mod settle;
mod workers;

use super::{
    consumer::Message as ConsumerMessage,
    expert_figures::Dealer,
    hops::HopEvent,
    market::Market,
    rings::{Asked, Buys, Settled},
};
use async_trait::async_trait;
use ed25519_dalek::SigningKey;
use satgrid_engine::{
    experts::{
        ExpertCall, ExpertHost, ExpertRows, HostError,
        group::{ExpertGroup, GroupEvent},
    },
    port::JobId,
};
use satgrid_market::experts::ExpertDemand;
use satgrid_node::{
    consumer::{CallId, Emission},
    provider::EngineId,
};
use satgrid_protocol_quic::QuicEndpoint;
use satgrid_types::{NodeKey, WireType};
use std::{collections::BTreeSet, sync::Arc, time::Duration};
use tokio::sync::{mpsc, oneshot};

/// How long workers may take to give their receipts once a request is over.
pub(super) const SETTLE: Duration = Duration::from_secs(4);
/// The same where a lead waits for ours, which names theirs: less than it waits.
pub(super) const SETTLE_OF_A_STAGE: Duration = Duration::from_secs(2);
/// How long a call waits for its worker's order: a session, a slice and a ticket.
const ORDER_WITHIN: Duration = Duration::from_secs(20);
/// How long a worker may take to answer a call.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// Deadlines, untold counts and the market are looked at so often.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// A worker that was lost and is needed is tried again after this.
const TRY_AGAIN: Duration = Duration::from_secs(5);
/// Calls of these orders are numbered from here on, away from those of the gateway and of rings.
const FIRST_CALL: u64 = 1 << 61;
const CALLS_EACH: u32 = 40;

/// What it is started with.
pub(crate) struct BoughtParts {
    pub engine: EngineId,
    pub group: Arc<ExpertGroup>,
    /// What happens in the group, as far as it is not about this node's own packs.
    pub heard: mpsc::UnboundedReceiver<GroupEvent>,
    pub demand: ExpertDemand,
    pub dealer: Dealer,
    pub wire: WireType,
    /// Most expert rows that one order may cover.
    pub most_rows: u64,
    /// How long workers may take to give their receipts.
    pub settle: Duration,
    pub market: Market,
    pub key: Arc<SigningKey>,
    pub endpoint: QuicEndpoint,
    pub consumer: mpsc::Sender<ConsumerMessage>,
}

type Answer = oneshot::Sender<Result<ExpertRows, HostError>>;

enum Said {
    Asked(Asked),
    Call { worker: NodeKey, call: ExpertCall, answer: Answer },
    Emission(JobId, NodeKey, CallId, Emission),
    Late(JobId),
}

/// The handle of the task that buys.
pub(crate) struct Bought {
    said: mpsc::UnboundedSender<Said>,
}

impl Bought {
    /// Admits whoever sells experts of the model to the group, now and from here on.
    pub(crate) fn start(parts: BoughtParts) -> Arc<Bought> {
        let (said, inbox) = mpsc::unbounded_channel();
        let (ear, hops) = mpsc::channel::<HopEvent>(1_024);
        let running = running::Running::new(parts, said.clone(), ear);
        tokio::spawn(running.run(inbox, hops));
        Arc::new(Bought { said })
    }
}

#[async_trait]
impl Buys for Bought {
    fn tell(&self, asked: Asked) -> bool {
        self.said.send(Said::Asked(asked)).is_ok()
    }
}

/// A worker as the group sees it.
struct PaidHost {
    worker: NodeKey,
    said: mpsc::UnboundedSender<Said>,
}

#[async_trait]
impl ExpertHost for PaidHost {
    async fn evaluate(&self, call: ExpertCall) -> Result<ExpertRows, HostError> {
        if call.jobs.is_empty() {
            return Err(HostError::Unpaid);
        }
        let gone = || HostError::Gone { reason: "this node is stopping".to_owned() };
        let (answer, rows) = oneshot::channel();
        let said = self.said.send(Said::Call { worker: self.worker, call, answer });
        said.map_err(|_| gone())?;
        // The task answers every call: with rows, with a loss, or at its deadline.
        rows.await.unwrap_or_else(|_| Err(gone()))
    }
}

/// The jobs of a call, each once.
fn jobs_of(call: &ExpertCall) -> BTreeSet<JobId> {
    call.jobs.iter().copied().collect()
}
