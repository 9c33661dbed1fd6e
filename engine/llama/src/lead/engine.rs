//! The `Engine` port of a lead: its child process, joined to a ring.
//!
//! Two tasks pass words between the child and the ring; both end with the engine. When the child dies, the ring hears `Reset`;
//! when the ring is gone for good, jobs fail by the ring's last word, `Failed`.

use std::sync::Arc;

use async_trait::async_trait;
use satgrid_engine::port::{Command, Engine, EngineDown, EngineEvent, EngineFacts};
use satgrid_engine::stage::ring::{Ring, RingCommand, RingEvent};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::child::{SpawnError, WorkerProgram};
use crate::engine::same_model;
use crate::keeper::{Kept, Trade};
use crate::settings::{LeadSettings, WorkerArgs};
use crate::wire::{FromWorker, ToWorker};

/// Which parts to run and with which program. `settings.ring` is taken from the ring itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeadConfig {
    pub program: WorkerProgram,
    pub settings: LeadSettings,
}

/// A model whose middle layers are elsewhere. Dropping it ends the process; the ring is its owner's to end.
pub struct LlamaLead {
    kept: Arc<Kept<Leading>>,
    events: tokio::sync::Mutex<UnboundedReceiver<EngineEvent>>,
    from_ring: tokio::task::AbortHandle,
}

struct Leading;

enum ToLead {
    Command(Command),
    Ring(RingEvent),
}

enum FromLead {
    Engine(EngineEvent),
    Ring(RingCommand),
}

impl Trade for Leading {
    type Command = ToLead;
    type Event = FromLead;
    type Facts = EngineFacts;

    fn ready(message: FromWorker) -> Option<EngineFacts> {
        if let FromWorker::EngineReady(facts) = message { Some(*facts) } else { None }
    }

    fn same(known: &EngineFacts, new: &EngineFacts) -> bool {
        same_model(known, new)
    }

    fn to_worker(command: ToLead) -> ToWorker {
        match command {
            ToLead::Command(command) => ToWorker::Command(command),
            ToLead::Ring(event) => ToWorker::Ring(event),
        }
    }

    fn events(message: FromWorker) -> Option<Vec<FromLead>> {
        match message {
            FromWorker::Events(events) => Some(events.into_iter().map(FromLead::Engine).collect()),
            FromWorker::Ring(command) => Some(vec![FromLead::Ring(command)]),
            FromWorker::Loading { .. }
            | FromWorker::LoadFailed { .. }
            | FromWorker::EngineReady(_)
            | FromWorker::TokenizerReady(_)
            | FromWorker::Tokenized(_)
            | FromWorker::Named(_)
            | FromWorker::Rendered(_)
            | FromWorker::StageReady(_)
            | FromWorker::StageEvents(_)
            | FromWorker::ExpertStep(_)
            | FromWorker::ExpertAnswer { .. }
            | FromWorker::PackReady(_) => None,
        }
    }

    fn down(reason: String) -> FromLead {
        FromLead::Engine(EngineEvent::Down { reason })
    }

    fn up() -> FromLead {
        FromLead::Engine(EngineEvent::Up)
    }
}

impl LlamaLead {
    /// Starts the child and waits until both parts are proved and loaded; `progress` hears thousandths of the load.
    pub async fn spawn(
        config: LeadConfig,
        ring: Arc<dyn Ring>,
        progress: impl FnMut(u32),
    ) -> Result<Arc<Self>, SpawnError> {
        let settings = LeadSettings { ring: ring.facts(), ..config.settings };
        let kept = Arc::new(Kept::<Leading>::spawn(config.program, WorkerArgs::Lead(settings), progress).await?);
        let (sink, events) = unbounded_channel();
        let (words, road) = (Arc::downgrade(&kept), Arc::clone(&ring));
        let from_ring = tokio::spawn(async move {
            while let Some(event) = ring.next_event().await {
                let Some(kept) = words.upgrade() else { return };
                // While the child is down there is nobody to tell: its next life begins with nothing.
                let _ = kept.send(ToLead::Ring(event));
            }
        });
        let from_ring = from_ring.abort_handle();
        let child = Arc::downgrade(&kept);
        tokio::spawn(async move {
            loop {
                // Held only while a word is awaited, by whom the engine outlives: see `Drop`.
                let Some(kept) = child.upgrade() else { return };
                let Some(event) = kept.next_event().await else { return };
                let told = match event {
                    FromLead::Ring(command) => {
                        if road.send(command).is_err() {
                            let reason = "the ring is gone".to_owned();
                            let _ = kept.send(ToLead::Ring(RingEvent::Failed { reason }));
                        }
                        continue;
                    }
                    FromLead::Engine(event) => event,
                };
                match &told {
                    EngineEvent::Finished { job, .. } | EngineEvent::Failed { job, .. } => {
                        let _ = road.send(RingCommand::JobOver { job: *job });
                    }
                    EngineEvent::Down { .. } => {
                        let _ = road.send(RingCommand::Reset);
                    }
                    EngineEvent::Prefilled { .. }
                    | EngineEvent::Logprobs { .. }
                    | EngineEvent::Embedded { .. }
                    | EngineEvent::Tokens { .. }
                    | EngineEvent::Up => {}
                }
                if sink.send(told).is_err() {
                    return;
                }
            }
        });
        Ok(Arc::new(Self { kept, events: tokio::sync::Mutex::new(events), from_ring }))
    }

    /// Ends the child. Events already told can still be read; then they end.
    pub fn shut_down(&self) {
        self.kept.shut_down();
    }

    /// The child's process id, while it is up. For operators' displays, and for tests that kill it.
    pub fn process_id(&self) -> Option<u32> {
        self.kept.process_id()
    }
}

impl Drop for LlamaLead {
    fn drop(&mut self) {
        // Its events end then, and with them the task that awaits them.
        self.kept.shut_down();
        self.from_ring.abort();
    }
}

#[async_trait]
impl Engine for LlamaLead {
    fn facts(&self) -> EngineFacts {
        self.kept.facts()
    }

    fn send(&self, command: Command) -> Result<(), EngineDown> {
        self.kept.send(ToLead::Command(command))
    }

    async fn next_event(&self) -> Option<EngineEvent> {
        self.events.lock().await.recv().await
    }

    fn is_up(&self) -> bool {
        self.kept.is_up()
    }
}
