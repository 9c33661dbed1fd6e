//! The port: commands to jobs, jobs to events, and what happens when the server goes away.
//!
//! | state | awaits | leaves with |
//! |---|---|---|
//! | up | commands | `Down` when a job finds that nothing answers |
//! | down | an answer, asked for every [`LOOK_EVERY`] | `Up` |

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use satgrid_engine::port::{Command, Engine, EngineDown, EngineEvent, EngineFacts, Extras, JobError, JobId, Tokenizer};
use tokio::sync::{Semaphore, mpsc, watch};

use crate::{
    client::Client,
    config::{Dialect, UpstreamConfig},
    run::run,
};

/// Jobs that may wait or run for each slot.
const JOBS_PER_SLOT: usize = 8;
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// How a server serves, as the probe found it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Served {
    pub dialect: Dialect,
    /// The server gives no token ids: its text is tokenised with the named tokenizer, and the listing says so.
    pub retokenised: bool,
}

/// What a job may do now.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Limits {
    pub(crate) prompt_upto: u32,
    pub(crate) output_upto: u32,
    pub(crate) cancelled: bool,
}

/// What jobs share.
pub(crate) struct Shared {
    pub(crate) client: Client,
    pub(crate) served: Served,
    pub(crate) tokenizer: Arc<dyn Tokenizer>,
    pub(crate) slots: Arc<Semaphore>,
    pub(crate) context: u32,
    pub(crate) vocab: u32,
    events: mpsc::UnboundedSender<EngineEvent>,
    jobs: Mutex<BTreeMap<JobId, watch::Sender<Limits>>>,
    down: AtomicBool,
    closed: AtomicBool,
}

/// An engine whose model runs in somebody else's server.
pub struct UpstreamEngine {
    shared: Arc<Shared>,
    facts: EngineFacts,
    events: tokio::sync::Mutex<mpsc::UnboundedReceiver<EngineEvent>>,
}

impl UpstreamEngine {
    /// Must be called within a tokio runtime. `facts` are the model's as the provider sells it.
    pub fn new(
        config: UpstreamConfig,
        served: Served,
        facts: EngineFacts,
        tokenizer: Arc<dyn Tokenizer>,
    ) -> Arc<UpstreamEngine> {
        let (events, inbox) = mpsc::unbounded_channel();
        let shared = Shared {
            slots: Arc::new(Semaphore::new(facts.slots.max(1) as usize)),
            context: facts.context,
            vocab: facts.model.vocab,
            client: Client::new(config),
            served,
            tokenizer,
            events,
            jobs: Mutex::default(),
            down: AtomicBool::new(false),
            closed: AtomicBool::new(false),
        };
        Arc::new(UpstreamEngine { shared: Arc::new(shared), facts, events: tokio::sync::Mutex::new(inbox) })
    }

    /// Ends every job; no command is taken after this.
    pub fn shut_down(&self) {
        let mut jobs = self.shared.jobs();
        self.shared.closed.store(true, Ordering::Release);
        jobs.clear();
    }
}

impl Shared {
    fn jobs(&self) -> MutexGuard<'_, BTreeMap<JobId, watch::Sender<Limits>>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reports on a job, unless it was lost with all others.
    pub(crate) fn tell(&self, event: EngineEvent) {
        if event.job().is_some_and(|job| self.jobs().contains_key(&job)) {
            let _ = self.events.send(event);
        }
    }

    /// Reports a job's end, and forgets it.
    pub(crate) fn end(&self, job: JobId, event: EngineEvent) {
        if self.jobs().remove(&job).is_some() {
            let _ = self.events.send(event);
        }
    }

    /// Nothing answers: every job is lost. Looks for an answer until there is one.
    pub(crate) fn down(self: &Arc<Self>, reason: String) {
        // One step to those who send: a job is taken in before all are lost, and lost with them, or not at all.
        let mut jobs = self.jobs();
        if self.down.swap(true, Ordering::AcqRel) {
            return;
        }
        tracing::warn!(%reason, "an upstream engine is down");
        jobs.clear();
        let _ = self.events.send(EngineEvent::Down { reason });
        drop(jobs);
        let shared = Arc::clone(self);
        tokio::spawn(async move {
            while !shared.closed.load(Ordering::Acquire) {
                tokio::time::sleep(LOOK_EVERY).await;
                if shared.client.answers().await {
                    shared.down.store(false, Ordering::Release);
                    tracing::info!("an upstream engine answers again");
                    let _ = shared.events.send(EngineEvent::Up);
                    return;
                }
            }
        });
    }
}

#[async_trait]
impl Engine for UpstreamEngine {
    fn facts(&self) -> EngineFacts {
        self.facts.clone()
    }

    fn is_up(&self) -> bool {
        !self.shared.down.load(Ordering::Acquire) && !self.shared.closed.load(Ordering::Acquire)
    }

    fn send(&self, command: Command) -> Result<(), EngineDown> {
        let shared = &self.shared;
        let mut jobs = shared.jobs();
        if !self.is_up() {
            return Err(EngineDown);
        }
        match command {
            Command::Start(job) => {
                let id = job.id;
                let refused = if jobs.contains_key(&id) {
                    Some(JobError::DuplicateJob)
                } else if jobs.len() >= JOBS_PER_SLOT.saturating_mul(self.facts.slots.max(1) as usize) {
                    Some(JobError::Busy)
                } else if job.extras != Extras::default() {
                    let reason = "this upstream's dialect has no grammars and no log probabilities".to_owned();
                    Some(JobError::Backend { reason })
                } else {
                    job.check(shared.context, shared.vocab).err()
                };
                match refused {
                    Some(error) => drop(shared.events.send(EngineEvent::Failed { job: id, error })),
                    None => {
                        let (sender, limits) = watch::channel(Limits::default());
                        jobs.insert(id, sender);
                        tokio::spawn(run(Arc::clone(shared), job, limits));
                    }
                }
            }
            Command::Grant { job, prompt_upto, output_upto } => {
                if let Some(job) = jobs.get(&job) {
                    job.send_modify(|limits| {
                        limits.prompt_upto = limits.prompt_upto.max(prompt_upto);
                        limits.output_upto = limits.output_upto.max(output_upto);
                    });
                }
            }
            Command::Cancel { job } => {
                if let Some(job) = jobs.get(&job) {
                    job.send_modify(|limits| limits.cancelled = true);
                }
            }
            // The server keeps its own caches.
            Command::ForgetSession { .. } => {}
        }
        Ok(())
    }

    async fn next_event(&self) -> Option<EngineEvent> {
        self.events.lock().await.recv().await
    }
}
