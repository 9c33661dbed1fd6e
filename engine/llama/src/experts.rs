//! The `ExpertHost` port over a child process that holds a pack, which is started, watched and restarted here.
//!
//! A call belongs to the process that was up when it was made: when that dies the call fails at once, and a lead finds its
//! rows elsewhere.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use satgrid_engine::experts::map::Claims;
use satgrid_engine::experts::{ExpertCall, ExpertHost, ExpertRows, HostError};
use satgrid_types::ExpertSet;
use tokio::io::AsyncWriteExt;
use tokio::sync::{mpsc, oneshot, watch};

use crate::child::{Child, SpawnError, Waits, WorkerProgram, end_process};
use crate::settings::{PackSettings, WorkerArgs};
use crate::wire::{self, CallFailure, FromWorker, PackFacts, ToWorker};

/// Longest wait for one call's rows; far more than any takes, so a process that hangs is noticed.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);

type Answer = oneshot::Sender<Result<ExpertRows, HostError>>;

/// A pack that is served by a child process. Dropping it ends the process.
pub struct LlamaExperts {
    facts: PackFacts,
    shared: Arc<Shared>,
    stop: watch::Sender<bool>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// Whether a process serves.
    up: watch::Sender<bool>,
}

#[derive(Default)]
struct State {
    /// The way to the process that is up.
    calls: Option<mpsc::UnboundedSender<(u64, ExpertCall)>>,
    process: Option<u32>,
    waiting: BTreeMap<u64, Answer>,
    next: u64,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail_all(&self, reason: &str) {
        let waiting = {
            let mut state = self.state();
            state.calls = None;
            state.process = None;
            std::mem::take(&mut state.waiting)
        };
        self.up.send_replace(false);
        for answer in waiting.into_values() {
            // Who asked may have given up.
            let _ = answer.send(Err(HostError::Gone { reason: reason.to_owned() }));
        }
    }
}

impl LlamaExperts {
    /// Starts the process and waits until its experts are read and proved; `progress` hears thousandths.
    pub async fn spawn(
        program: WorkerProgram,
        settings: PackSettings,
        progress: impl FnMut(u32),
    ) -> Result<Arc<Self>, SpawnError> {
        let args = WorkerArgs::Pack(settings);
        let (child, facts) = start(&program, &args, progress).await?;
        let shared = Arc::new(Shared::default());
        let (stop, stopped) = watch::channel(false);
        let keeper = Keeper { program, args, facts: facts.clone(), shared: Arc::clone(&shared), stopped };
        let calls = keeper.put_up(&child);
        tokio::spawn(keeper.keep(child, calls));
        Ok(Arc::new(Self { facts, shared, stop }))
    }

    pub fn facts(&self) -> &PackFacts {
        &self.facts
    }

    /// What a group is told of this host.
    pub fn claims(&self) -> Claims {
        self.facts.experts.iter().map(|held| ((held.layer, held.expert), held.hash)).collect()
    }

    pub fn set(&self) -> ExpertSet {
        ExpertSet::new(self.facts.experts.iter().map(|held| (held.layer, held.expert)))
    }

    /// Waits until a process serves. False if none ever will again.
    pub async fn until_up(&self) -> bool {
        let mut up = self.shared.up.subscribe();
        up.wait_for(|up| *up).await.is_ok()
    }

    /// The process, while it is up. For displays, and for tests that kill it.
    pub fn process_id(&self) -> Option<u32> {
        self.shared.state().process
    }
}

impl Drop for LlamaExperts {
    fn drop(&mut self) {
        self.shared.fail_all("the node no longer serves these experts");
        self.stop.send_replace(true);
    }
}

#[async_trait]
impl ExpertHost for LlamaExperts {
    async fn evaluate(&self, call: ExpertCall) -> Result<ExpertRows, HostError> {
        let down = || HostError::Gone { reason: "its process is down".to_owned() };
        let (id, answer) = {
            let mut state = self.shared.state();
            let calls = state.calls.clone().ok_or_else(down)?;
            let (id, (sender, answer)) = (state.next, oneshot::channel());
            state.next += 1;
            calls.send((id, call)).map_err(|_| down())?;
            state.waiting.insert(id, sender);
            (id, answer)
        };
        match tokio::time::timeout(ANSWER_WITHIN, answer).await {
            Ok(answer) => answer.unwrap_or_else(|_| Err(down())),
            Err(_) => {
                self.shared.state().waiting.remove(&id);
                Err(HostError::Late { ms: u64::try_from(ANSWER_WITHIN.as_millis()).unwrap_or(u64::MAX) })
            }
        }
    }
}

/// The task that owns the process.
struct Keeper {
    program: WorkerProgram,
    args: WorkerArgs,
    facts: PackFacts,
    shared: Arc<Shared>,
    stopped: watch::Receiver<bool>,
}

impl Keeper {
    fn put_up(&self, child: &Child) -> mpsc::UnboundedReceiver<(u64, ExpertCall)> {
        let (sender, calls) = mpsc::unbounded_channel();
        let mut state = self.shared.state();
        (state.calls, state.process) = (Some(sender), child.id());
        self.shared.up.send_replace(true);
        calls
    }

    async fn keep(mut self, mut child: Child, mut calls: mpsc::UnboundedReceiver<(u64, ExpertCall)>) {
        let mut waits = Waits::new();
        loop {
            let since = Instant::now();
            let Some(how) = self.serve(child, calls).await else { return };
            tracing::error!(how, "the process with the experts ended");
            waits.served(since.elapsed());
            let Some(next) = self.restart(&mut waits).await else { return };
            calls = self.put_up(&next);
            child = next;
        }
    }

    /// Until the process ends (says how) or is no longer wanted (`None`).
    async fn serve(&mut self, child: Child, mut calls: mpsc::UnboundedReceiver<(u64, ExpertCall)>) -> Option<String> {
        let (process, mut reader, mut writer) = child.split();
        let shared = Arc::clone(&self.shared);
        let mut reading = tokio::spawn(async move {
            while let Ok(Some(message)) = wire::read_async::<FromWorker>(&mut reader).await {
                let FromWorker::ExpertAnswer { id, answer } = message else {
                    tracing::error!("out of turn from the process with the experts");
                    continue;
                };
                let answer = answer.map_err(|failure| match failure {
                    CallFailure::Refused(error) => HostError::Refused(error),
                    CallFailure::Failed(reason) => HostError::Gone { reason },
                });
                if let Some(waiting) = shared.state().waiting.remove(&id) {
                    // Who asked may have given up.
                    let _ = waiting.send(answer);
                }
            }
        });
        let wanted = loop {
            tokio::select! {
                call = calls.recv() => {
                    let Some((id, call)) = call else { break false };
                    let Ok(frame) = wire::encode(&ToWorker::ExpertCall { id, call }) else { continue };
                    tokio::select! {
                        written = writer.write_all(&frame) => {
                            if written.is_err() {
                                break true;
                            }
                        }
                        // A process that hangs reads nothing.
                        _ = self.stopped.changed() => break false,
                    }
                }
                _ = &mut reading => break true,
                _ = self.stopped.changed() => break false,
            }
        };
        reading.abort();
        drop(writer);
        self.shared.fail_all("its process ended");
        let how = end_process(process).await;
        wanted.then_some(how)
    }

    async fn restart(&mut self, waits: &mut Waits) -> Option<Child> {
        loop {
            tokio::select! {
                () = tokio::time::sleep(waits.take()) => {}
                _ = self.stopped.changed() => return None,
            }
            let started = tokio::select! {
                started = start(&self.program, &self.args, |_| {}) => started,
                _ = self.stopped.changed() => return None,
            };
            match started {
                Ok((child, facts)) if same(&facts, &self.facts) => return Some(child),
                Ok(_) => tracing::error!("the pack or the program has changed since this node started"),
                Err(error) => tracing::error!(%error, "the experts do not start again; next try in {:?}", waits.next()),
            }
        }
    }
}

/// The same experts from the same build; the measured speed may differ.
fn same(a: &PackFacts, b: &PackFacts) -> bool {
    *a == PackFacts { millirows_per_s: a.millirows_per_s, ..b.clone() }
}

async fn start(
    program: &WorkerProgram,
    args: &WorkerArgs,
    progress: impl FnMut(u32),
) -> Result<(Child, PackFacts), SpawnError> {
    match Child::start(program, args, None, progress).await? {
        (child, FromWorker::PackReady(facts)) => Ok((child, *facts)),
        _ => Err(SpawnError::Protocol("not the keeper of a pack".into())),
    }
}
