//! Between an engine that buys parts of its work, those that buy for it, and the provider role: before a run is reported as
//! over, its workers give receipts.

use super::provider::Message;
use async_trait::async_trait;
use satgrid_engine::port::{Engine, EngineEvent, JobId};
use satgrid_ledger::statements::{ExpertSplit, Split};
use satgrid_node::provider::{EngineId, ProviderEvent};
use satgrid_types::{Digest, RequestId};
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};

/// How an answer was put together, and the root over the workers' receipts: for the receipt of the customer's request.
#[derive(Debug, Clone)]
pub(crate) enum Settled {
    Layers(Box<Split>, Digest),
    Experts(Box<ExpertSplit>, Digest),
}

/// Who buys parts of an engine's work: a ring of layers, or a group of experts.
#[async_trait]
pub(crate) trait Buys: Send + Sync {
    /// Tells the task that buys. Whether it still runs.
    fn tell(&self, asked: Asked) -> bool;

    /// The job works for this request of this node's customer: workers are ordered before its first rows are there.
    fn begin(&self, job: JobId, request: RequestId) {
        self.tell(Asked::Begin(job, request));
    }

    /// Jobs that are not settled.
    async fn jobs(&self) -> Vec<JobId> {
        let (answer, jobs) = oneshot::channel();
        if !self.tell(Asked::Jobs(answer)) {
            return Vec::new();
        }
        jobs.await.unwrap_or_default()
    }

    /// How the job was put together, once its workers have given their receipts. `None` where nobody was bought of.
    async fn settled(&self, job: JobId) -> Option<Settled> {
        let (answer, settled) = oneshot::channel();
        if !self.tell(Asked::Settle(job, answer)) {
            return None;
        }
        settled.await.ok().flatten()
    }
}

/// What the provider's driver asks of a task that buys.
pub(crate) enum Asked {
    /// The job works for this request of this node's customer.
    Begin(JobId, RequestId),
    Jobs(oneshot::Sender<Vec<JobId>>),
    Settle(JobId, oneshot::Sender<Option<Settled>>),
}

/// Hands the events of an engine that leads to the role, until the engine is gone for good.
pub(crate) async fn pump(engine: EngineId, source: Arc<dyn Engine>, buys: Arc<dyn Buys>, inbox: mpsc::Sender<Message>) {
    while let Some(event) = source.next_event().await {
        match &event {
            EngineEvent::Finished { job, .. } | EngineEvent::Failed { job, .. } => {
                let (job, inbox) = (*job, inbox.clone());
                tell_over((engine, job), buys.clone(), inbox, ProviderEvent::Engine { engine, event });
                continue;
            }
            EngineEvent::Down { reason } => {
                tracing::warn!(%reason, "the engine is down; requests in hand end at what was acknowledged");
                tell_all_over(engine, buys.as_ref(), &inbox).await;
            }
            EngineEvent::Prefilled { .. }
            | EngineEvent::Tokens { .. }
            | EngineEvent::Logprobs { .. }
            | EngineEvent::Embedded { .. }
            | EngineEvent::Up => {}
        }
        if inbox.send(Message::Event(ProviderEvent::Engine { engine, event })).await.is_err() {
            return;
        }
    }
}

/// A run is over: its workers give receipts, then `event` says so.
pub(super) fn tell_over(
    (engine, job): (EngineId, JobId),
    buys: Arc<dyn Buys>,
    inbox: mpsc::Sender<Message>,
    event: ProviderEvent,
) {
    tokio::spawn(async move {
        tell_split(engine, job, buys.as_ref(), &inbox).await;
        let _ = inbox.send(Message::Event(event)).await;
    });
}

/// All runs are over: their workers give receipts.
pub(super) async fn tell_all_over(engine: EngineId, buys: &dyn Buys, inbox: &mpsc::Sender<Message>) {
    // Side by side: each may wait for as long as its workers may take.
    let told = buys.jobs().await.into_iter().map(|job| tell_split(engine, job, buys, inbox));
    futures::future::join_all(told).await;
}

async fn tell_split(engine: EngineId, job: JobId, buys: &dyn Buys, inbox: &mpsc::Sender<Message>) {
    let event = match buys.settled(job).await {
        Some(Settled::Layers(split, root)) => ProviderEvent::Split { engine, job, split, root },
        Some(Settled::Experts(split, root)) => ProviderEvent::ExpertSplit { engine, job, split, root },
        None => return,
    };
    let _ = inbox.send(Message::Event(event)).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{sync::Mutex, time::Duration};

    /// Three jobs, settled only once all three are asked for.
    #[derive(Default)]
    struct Slow(Mutex<Vec<oneshot::Sender<Option<Settled>>>>);

    impl Buys for Slow {
        fn tell(&self, asked: Asked) -> bool {
            match asked {
                Asked::Begin(..) => {}
                Asked::Jobs(answer) => assert!(answer.send([1, 2, 3].map(JobId).to_vec()).is_ok()),
                Asked::Settle(_, answer) => {
                    let mut asked = self.0.lock().unwrap();
                    asked.push(answer);
                    if asked.len() == 3 {
                        asked.drain(..).for_each(|answer| assert!(answer.send(None).is_ok()));
                    }
                }
            }
            true
        }
    }

    #[tokio::test]
    async fn jobs_of_a_dead_engine_are_settled_side_by_side() {
        let (inbox, _messages) = mpsc::channel(8);
        let (buys, within) = (Slow::default(), Duration::from_secs(60));
        tokio::time::timeout(within, tell_all_over(EngineId(0), &buys, &inbox)).await.unwrap();
    }
}
