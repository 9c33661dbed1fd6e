//! The toy engine in the place of the model that a configuration names, for `make bench-tiny`. Test builds have it; the shipped
//! program does not, so nobody can sell what it says.

use crate::models::Identified;
use async_trait::async_trait;
use satgrid_engine::{
    port::{Command, Engine, EngineDown, EngineEvent, EngineFacts, Job},
    toy::{AsyncToy, ToyConfig},
};

/// The toy, under the root and the tokenizer of a real file. Its words are the lowest of the file's vocabulary.
pub(crate) struct OnToy {
    toy: AsyncToy,
    facts: EngineFacts,
    words: u32,
}

impl OnToy {
    pub(crate) fn in_place_of(file: &Identified, slots: u32) -> OnToy {
        let toy = AsyncToy::new(ToyConfig { slots, ..ToyConfig::default() });
        let own = toy.facts();
        let words = own.model.vocab;
        let (model, tokenizer_hash) = (file.inspected.facts.clone(), file.inspected.tokenizer.hash);
        OnToy { toy, facts: EngineFacts { model, model_root: file.root, tokenizer_hash, ..own }, words }
    }
    pub(crate) fn shut_down(&self) {
        self.toy.shut_down();
    }
    /// Token ids that the toy does not know are others to it: what it says means nothing anyway.
    fn read(&self, job: Job) -> Job {
        Job { prompt: job.prompt.iter().map(|id| id % self.words).collect(), ..job }
    }
}

#[async_trait]
impl Engine for OnToy {
    fn facts(&self) -> EngineFacts {
        self.facts.clone()
    }
    fn send(&self, command: Command) -> Result<(), EngineDown> {
        self.toy.send(match command {
            Command::Start(job) => Command::Start(self.read(job)),
            Command::Grant { .. } | Command::Cancel { .. } | Command::ForgetSession { .. } => command,
        })
    }
    fn is_up(&self) -> bool {
        self.toy.is_up()
    }
    async fn next_event(&self) -> Option<EngineEvent> {
        self.toy.next_event().await
    }
}
