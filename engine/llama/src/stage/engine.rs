//! The `Stage` port over a child process; `keeper` starts, watches and restarts it.

use std::sync::Arc;

use async_trait::async_trait;
use satgrid_engine::experts::Experts;
use satgrid_engine::port::EngineDown;
use satgrid_engine::stage::port::{Stage, StageCommand, StageEvent, StageFacts};

use crate::child::{SpawnError, WorkerProgram};
use crate::keeper::{Kept, Trade};
use crate::settings::{StageSettings, WorkerArgs};
use crate::wire::{FromWorker, ToWorker};

/// Which part to run and with which program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StageConfig {
    pub program: WorkerProgram,
    pub settings: StageSettings,
}

/// Layers of a model that run in a child process. Dropping it ends the process.
pub struct LlamaStage {
    kept: Kept<Layered>,
}

struct Layered;

impl Trade for Layered {
    type Command = StageCommand;
    type Event = StageEvent;
    type Facts = StageFacts;

    fn ready(message: FromWorker) -> Option<StageFacts> {
        if let FromWorker::StageReady(facts) = message { Some(*facts) } else { None }
    }

    fn same(known: &StageFacts, new: &StageFacts) -> bool {
        let of = |facts: &StageFacts| (facts.model_root, facts.layers, facts.build_id, facts.instruction_set.clone());
        of(known) == of(new)
    }

    fn to_worker(command: StageCommand) -> ToWorker {
        ToWorker::Stage(command)
    }

    fn events(message: FromWorker) -> Option<Vec<StageEvent>> {
        if let FromWorker::StageEvents(events) = message { Some(events) } else { None }
    }

    fn down(reason: String) -> StageEvent {
        StageEvent::Down { reason }
    }

    fn up() -> StageEvent {
        StageEvent::Up
    }
}

impl LlamaStage {
    /// Starts the child and waits until its part is proved, loaded and measured; `progress` hears thousandths.
    ///
    /// Only the first start can fail here. Later ones are tried again for as long as the stage is wanted.
    pub async fn spawn(config: StageConfig, progress: impl FnMut(u32)) -> Result<Arc<Self>, SpawnError> {
        let kept = Kept::spawn(config.program, WorkerArgs::Stage(config.settings), progress).await?;
        Ok(Arc::new(Self { kept }))
    }

    /// As [`LlamaStage::spawn`], for a part without its experts: `experts` finds their rows.
    pub async fn spawn_trunk(
        config: StageConfig,
        experts: Arc<dyn Experts>,
        progress: impl FnMut(u32),
    ) -> Result<Arc<Self>, SpawnError> {
        let args = WorkerArgs::StageTrunk(config.settings);
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
impl Stage for LlamaStage {
    fn facts(&self) -> StageFacts {
        self.kept.facts()
    }

    fn send(&self, command: StageCommand) -> Result<(), EngineDown> {
        self.kept.send(command)
    }

    async fn next_event(&self) -> Option<StageEvent> {
        self.kept.next_event().await
    }

    fn is_up(&self) -> bool {
        self.kept.is_up()
    }
}
