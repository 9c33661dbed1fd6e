//! The task that owns a child process: starts it, passes words both ways, and starts it again when it dies.
//!
//! | state    | awaits                             | leaves with                                                        |
//! |----------|------------------------------------|--------------------------------------------------------------------|
//! | up       | commands, events, the child's end  | `Down` when the socket closes; shut down                           |
//! | down     | the wait before the next start     | up (`Up` told); down again with a longer wait; shut down           |
//! | shut down | nothing                           | never: the events end                                              |
//!
//! A command reaches the child that was up when it was sent, or none: none of an earlier child's commands is ever played to
//! a later one. What the node knows of a job dies with `Down`; the job itself is the node's to start again.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Instant;

use satgrid_engine::experts::{ExpertRows, Experts};
use satgrid_engine::port::EngineDown;
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, channel, unbounded_channel};
use tokio::sync::watch;

use crate::child::{Child, SpawnError, Waits, WorkerProgram, end_process, find_outputs};
use crate::settings::WorkerArgs;
use crate::wire::{self, FromWorker, ToWorker};

/// Messages of the child that wait to be passed on.
const INBOX: usize = 64;

/// What a kind of child hears and says.
pub(crate) trait Trade: Send + Sync + 'static {
    type Command: Send + 'static;
    type Event: Send + 'static;
    type Facts: Clone + Send + Sync + 'static;

    /// The facts in a child's first word; `None` if it is a child of another kind.
    fn ready(message: FromWorker) -> Option<Self::Facts>;
    /// Both describe what was sold, so the new child may take the old one's place.
    fn same(known: &Self::Facts, new: &Self::Facts) -> bool;
    fn to_worker(command: Self::Command) -> ToWorker;
    /// `None` for words out of turn.
    fn events(message: FromWorker) -> Option<Vec<Self::Event>>;
    fn down(reason: String) -> Self::Event;
    fn up() -> Self::Event;
}

/// A child process that is kept running. Dropping it ends the process.
pub(crate) struct Kept<T: Trade> {
    shared: Arc<Shared<T>>,
    events: tokio::sync::Mutex<UnboundedReceiver<T::Event>>,
    shut_down: watch::Sender<bool>,
}

struct Shared<T: Trade> {
    /// The way to the child that is up; none while there is none.
    link: Mutex<Option<Up<T>>>,
    facts: RwLock<T::Facts>,
}

struct Up<T: Trade> {
    commands: UnboundedSender<T::Command>,
    process: Option<u32>,
}

impl<T: Trade> Shared<T> {
    fn link(&self) -> MutexGuard<'_, Option<Up<T>>> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Trade> Kept<T> {
    /// Starts the child and waits until it is ready; `progress` hears thousandths of the load.
    ///
    /// Only the first start can fail here. Later ones are tried again for as long as the child is wanted.
    pub(crate) async fn spawn(
        program: WorkerProgram,
        args: WorkerArgs,
        progress: impl FnMut(u32),
    ) -> Result<Self, SpawnError> {
        Self::spawn_with(program, args, None, progress).await
    }

    /// As [`Kept::spawn`], for a trunk, whose experts' rows somebody finds.
    pub(crate) async fn spawn_with(
        program: WorkerProgram,
        args: WorkerArgs,
        experts: Option<Arc<dyn Experts>>,
        progress: impl FnMut(u32),
    ) -> Result<Self, SpawnError> {
        let (child, facts) = start::<T>(&program, &args, experts.as_ref(), progress).await?;
        let shared = Arc::new(Shared { link: Mutex::new(None), facts: RwLock::new(facts) });
        let (event_sink, events) = unbounded_channel();
        let (shut_down, stop) = watch::channel(false);
        let keeper = Keeper { program, args, experts, shared: Arc::clone(&shared), events: event_sink, stop };
        let commands = keeper.put_up(&child);
        tokio::spawn(keeper.keep(child, commands));
        Ok(Self { shared, events: tokio::sync::Mutex::new(events), shut_down })
    }

    pub(crate) fn facts(&self) -> T::Facts {
        self.shared.facts.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn send(&self, command: T::Command) -> Result<(), EngineDown> {
        match self.shared.link().as_ref() {
            Some(up) => up.commands.send(command).map_err(|_| EngineDown),
            None => Err(EngineDown),
        }
    }

    pub(crate) async fn next_event(&self) -> Option<T::Event> {
        self.events.lock().await.recv().await
    }

    /// Ends the child. Events already told can still be read; then they end.
    pub(crate) fn shut_down(&self) {
        self.shared.link().take();
        self.shut_down.send_replace(true);
    }

    pub(crate) fn is_up(&self) -> bool {
        self.shared.link().is_some()
    }

    /// The child's process id, while it is up.
    pub(crate) fn process_id(&self) -> Option<u32> {
        self.shared.link().as_ref().and_then(|up| up.process)
    }
}

impl<T: Trade> Drop for Kept<T> {
    fn drop(&mut self) {
        self.shut_down();
    }
}

/// A trunk's step while its rows are found.
type Outputs = Pin<Box<dyn Future<Output = Result<ExpertRows, String>> + Send>>;

/// The task that owns the child.
struct Keeper<T: Trade> {
    program: WorkerProgram,
    args: WorkerArgs,
    /// Of a trunk: who finds its experts' rows.
    experts: Option<Arc<dyn Experts>>,
    shared: Arc<Shared<T>>,
    events: UnboundedSender<T::Event>,
    stop: watch::Receiver<bool>,
}

impl<T: Trade> Keeper<T> {
    async fn keep(mut self, mut child: Child, mut commands: UnboundedReceiver<T::Command>) {
        let mut waits = Waits::new();
        loop {
            let since = Instant::now();
            let Some(how) = self.serve(child, commands).await else { return };
            tracing::error!(how, "the engine process ended");
            if self.tell(T::down(format!("the engine process {how}"))).is_none() {
                return;
            }
            waits.served(since.elapsed());
            let Some(next) = self.restart(&mut waits).await else { return };
            commands = self.put_up(&next);
            child = next;
            if self.tell(T::up()).is_none() {
                return;
            }
        }
    }

    /// Opens the way for commands to a child that is ready.
    fn put_up(&self, child: &Child) -> UnboundedReceiver<T::Command> {
        let (sender, commands) = unbounded_channel();
        *self.shared.link() = Some(Up { commands: sender, process: child.id() });
        commands
    }

    /// Passes commands and events until the child ends (says how) or the engine is no longer wanted (`None`).
    async fn serve(&mut self, child: Child, mut commands: UnboundedReceiver<T::Command>) -> Option<String> {
        let (process, mut reader, mut writer) = child.split();
        let (to_inbox, mut inbox) = channel(INBOX);
        let reading = tokio::spawn(async move {
            // Ends with the stream, or with the other end of the inbox.
            while let Ok(Some(message)) = wire::read_async::<FromWorker>(&mut reader).await {
                if to_inbox.send(message).await.is_err() {
                    return;
                }
            }
        });
        // A trunk asks for one step at a time, and waits for it in the middle of a batch.
        let mut step: Option<Outputs> = None;
        let wanted = loop {
            let outputs = async {
                match step.as_mut() {
                    Some(step) => step.await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                outputs = outputs => {
                    step = None;
                    match wire::encode(&ToWorker::ExpertOutputs(outputs)) {
                        // An error shows as the end of the inbox.
                        Ok(frame) => tokio::select! {
                            _ = writer.write_all(&frame) => {}
                            _ = self.stop.changed() => break false,
                        },
                        Err(error) => tracing::error!(%error, "experts' rows that do not fit a frame"),
                    }
                },
                message = inbox.recv() => match message {
                    Some(FromWorker::ExpertStep(asked)) => {
                        let experts = self.experts.clone();
                        step = Some(Box::pin(async move { find_outputs(experts.as_ref(), asked).await }));
                    }
                    Some(message) => match T::events(message) {
                        Some(events) => {
                            for event in events {
                                if self.tell(event).is_none() {
                                    break;
                                }
                            }
                        }
                        None => tracing::error!("out of turn from the engine process"),
                    },
                    None => break true,
                },
                command = commands.recv() => {
                    // None once the engine is shut down, which the other arm tells too.
                    let Some(command) = command else { break false };
                    match wire::encode(&T::to_worker(command)) {
                        Ok(frame) => tokio::select! {
                            // An error shows as the end of the inbox, after the child's last words.
                            _ = writer.write_all(&frame) => {}
                            // A child that hangs reads nothing.
                            _ = self.stop.changed() => break false,
                        },
                        Err(error) => tracing::error!(%error, "a command that does not fit a frame"),
                    }
                },
                _ = self.stop.changed() => break false,
            }
        };
        self.shared.link().take();
        reading.abort();
        drop(writer);
        let how = end_process(process).await;
        wanted.then_some(how)
    }

    /// Starts until a child serves the same model; `None` when the engine is no longer wanted.
    async fn restart(&mut self, waits: &mut Waits) -> Option<Child> {
        loop {
            tokio::select! {
                () = tokio::time::sleep(waits.take()) => {}
                _ = self.stop.changed() => return None,
            }
            let started = tokio::select! {
                started = start::<T>(&self.program, &self.args, self.experts.as_ref(), |_| {}) => started,
                _ = self.stop.changed() => return None,
            };
            let reason = match started {
                Ok((child, facts)) => match self.adopt(facts) {
                    Ok(()) => return Some(child),
                    Err(reason) => reason,
                },
                Err(error) => error.to_string(),
            };
            tracing::error!(reason, "the engine does not start again; next try in {:?}", waits.next());
        }
    }

    /// Takes the facts of a new child, unless it runs something else than what was sold.
    fn adopt(&self, facts: T::Facts) -> Result<(), String> {
        let mut known = self.shared.facts.write().unwrap_or_else(PoisonError::into_inner);
        if !T::same(&known, &facts) {
            return Err(
                "the model file, the program or the device is another than when this node started, and its listing \
                        says so: put it back, or start the node again"
                    .into(),
            );
        }
        *known = facts;
        Ok(())
    }

    /// `None` if nobody listens any more.
    fn tell(&self, event: T::Event) -> Option<()> {
        self.events.send(event).ok()
    }
}

async fn start<T: Trade>(
    program: &WorkerProgram,
    args: &WorkerArgs,
    experts: Option<&Arc<dyn Experts>>,
    progress: impl FnMut(u32),
) -> Result<(Child, T::Facts), SpawnError> {
    let (child, ready) = Child::start(program, args, experts, progress).await?;
    match T::ready(ready) {
        Some(facts) => Ok((child, facts)),
        None => Err(SpawnError::Protocol("a child of another kind".into())),
    }
}
