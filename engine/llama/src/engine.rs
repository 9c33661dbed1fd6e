//! The `Engine` port over a child process that runs a whole model; `keeper` starts, watches and restarts it.

use std::sync::Arc;

use async_trait::async_trait;
use satgrid_engine::experts::Experts;
use satgrid_engine::port::{Command, Engine, EngineDown, EngineEvent, EngineFacts};

use crate::child::{SpawnError, WorkerProgram};
use crate::keeper::{Kept, Trade};
use crate::settings::{EngineSettings, WorkerArgs};
use crate::wire::{FromWorker, ToWorker};

/// What to run and with which program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineConfig {
    pub program: WorkerProgram,
    pub settings: EngineSettings,
}

/// A model that runs in a child process. Dropping it ends the process.
pub struct LlamaEngine {
    kept: Kept<Whole>,
}

struct Whole;

/// Both run the same model alike. The root says nothing of the tokenizer, by which stop strings and grammars are read.
pub(crate) fn same_model(known: &EngineFacts, new: &EngineFacts) -> bool {
    let of =
        |facts: &EngineFacts| (facts.model_root, facts.tokenizer_hash, facts.build_id, facts.instruction_set.clone());
    of(known) == of(new)
}

impl Trade for Whole {
    type Command = Command;
    type Event = EngineEvent;
    type Facts = EngineFacts;

    fn ready(message: FromWorker) -> Option<EngineFacts> {
        if let FromWorker::EngineReady(facts) = message { Some(*facts) } else { None }
    }

    fn same(known: &EngineFacts, new: &EngineFacts) -> bool {
        same_model(known, new)
    }

    fn to_worker(command: Command) -> ToWorker {
        ToWorker::Command(command)
    }

    fn events(message: FromWorker) -> Option<Vec<EngineEvent>> {
        if let FromWorker::Events(events) = message { Some(events) } else { None }
    }

    fn down(reason: String) -> EngineEvent {
        EngineEvent::Down { reason }
    }

    fn up() -> EngineEvent {
        EngineEvent::Up
    }
}

impl LlamaEngine {
    /// Starts the child and waits until its model is loaded and measured; `progress` hears thousandths of the load.
    ///
    /// Only the first start can fail here. Later ones are tried again for as long as the engine is wanted.
    pub async fn spawn(config: EngineConfig, progress: impl FnMut(u32)) -> Result<Arc<Self>, SpawnError> {
        let kept = Kept::spawn(config.program, WorkerArgs::Engine(config.settings), progress).await?;
        Ok(Arc::new(Self { kept }))
    }

    /// As [`LlamaEngine::spawn`], for a trunk: `experts` finds the rows of its experts. To all others it is the whole model.
    pub async fn spawn_trunk(
        config: EngineConfig,
        experts: Arc<dyn Experts>,
        progress: impl FnMut(u32),
    ) -> Result<Arc<Self>, SpawnError> {
        let args = WorkerArgs::Trunk(config.settings);
        let kept = Kept::spawn_with(config.program, args, Some(experts), progress).await?;
        Ok(Arc::new(Self { kept }))
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

#[async_trait]
impl Engine for LlamaEngine {
    fn facts(&self) -> EngineFacts {
        self.kept.facts()
    }

    fn send(&self, command: Command) -> Result<(), EngineDown> {
        self.kept.send(command)
    }

    async fn next_event(&self) -> Option<EngineEvent> {
        self.kept.next_event().await
    }

    fn is_up(&self) -> bool {
        self.kept.is_up()
    }
}
