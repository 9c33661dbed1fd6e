//! Between a lead's engine, its ring and the provider role: before a run is reported as over, its workers give receipts.

use super::{provider::Message, ring::PaidRing};
use satgrid_engine::port::{Engine, EngineEvent, JobId};
use satgrid_node::provider::{EngineId, ProviderEvent};
use std::sync::Arc;
use tokio::sync::mpsc;

/// Hands the events of an engine that leads to the role, until the engine is gone for good.
pub(crate) async fn pump(engine: EngineId, source: Arc<dyn Engine>, ring: Arc<PaidRing>, inbox: mpsc::Sender<Message>) {
    while let Some(event) = source.next_event().await {
        match &event {
            EngineEvent::Finished { job, .. } | EngineEvent::Failed { job, .. } => {
                let (job, ring, inbox) = (*job, ring.clone(), inbox.clone());
                tokio::spawn(async move {
                    tell_split(engine, job, &ring, &inbox).await;
                    let _ = inbox.send(Message::Event(ProviderEvent::Engine { engine, event })).await;
                });
                continue;
            }
            EngineEvent::Down { reason } => {
                tracing::warn!(%reason, "the engine is down; requests in hand end at what was acknowledged");
                for job in ring.jobs().await {
                    tell_split(engine, job, &ring, &inbox).await;
                }
            }
            EngineEvent::Prefilled { .. }
            | EngineEvent::Tokens { .. }
            | EngineEvent::Logprobs { .. }
            | EngineEvent::Up => {}
        }
        if inbox.send(Message::Event(ProviderEvent::Engine { engine, event })).await.is_err() {
            return;
        }
    }
}

async fn tell_split(engine: EngineId, job: JobId, ring: &PaidRing, inbox: &mpsc::Sender<Message>) {
    if let Some((split, root)) = ring.settled(job).await {
        let split = Box::new(split);
        let _ = inbox.send(Message::Event(ProviderEvent::Split { engine, job, split, root })).await;
    }
}
