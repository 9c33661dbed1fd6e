//! Drives the provider role: links that consumers open, engines, invoices, the journal.

use super::{
    desk::{self, Desk, DeskParts, Order},
    expert_desk::{self, ExpertDeskParts},
    hops::Switchboard,
    journal::JournalWriter,
    links::{self, Outbound},
    now, payments,
    rings::{self, Buys},
    until,
};
use crate::store::Store;
use ed25519_dalek::SigningKey;
use satgrid_engine::{
    port::{Command, Engine, EngineEvent, JobError},
    stage::port::Stage,
};
use satgrid_engine_llama::LlamaExperts;
use satgrid_node::{
    LinkId, StreamId,
    provider::{EngineId, Provider, ProviderAction, ProviderEvent},
};
use satgrid_protocol::frame::{ConsumerControl, ConsumerFrame};
use satgrid_protocol_quic::{
    FrameSender, FrameStream, Link, QuicEndpoint, StreamKind,
    artefact::{ArtefactServer, Asked, ConnectionArtefacts},
};
use satgrid_types::{Msat, PaymentHash};
use satgrid_wallet::{Invoice, InvoiceRequest, Lightning};
use std::{
    collections::BTreeMap,
    sync::{Arc, RwLock},
    time::Duration,
};
use tokio::{sync::mpsc, time::Instant};
use tokio_util::sync::CancellationToken;

/// Messages that may wait; senders are held back beyond.
const INBOX: usize = 4_096;

/// What the driver's task is told.
pub(crate) enum Message {
    Event(ProviderEvent),
    Link(Link),
    Control { link: LinkId, sender: FrameSender },
    Stream { link: LinkId, stream: StreamId, sender: FrameSender },
}

/// The sums over all sessions are built at most this often.
const VIEW_INTERVAL: Duration = Duration::from_millis(200);

/// What operators are shown: figures renewed after every event, sums over all sessions soon after they changed.
#[derive(Debug, Clone, Default)]
pub(crate) struct ProviderView {
    pub counters: satgrid_node::provider::ProviderCounters,
    pub open_requests: usize,
    pub links: usize,
    pub sessions: usize,
    /// Prepaid by buyers and not used, in sessions that are open; what is left in those that were closed.
    pub prepaid: Msat,
    pub refunds_due: Msat,
    pub exposure: Msat,
    pub largest_exposure: Msat,
    pub halted: Option<String>,
    pub paused: Option<String>,
}

/// Everything that the driver needs.
pub(crate) struct ProviderDriver {
    pub role: Provider,
    pub journal: JournalWriter,
    pub wallet: Arc<dyn Lightning>,
    pub payments: mpsc::UnboundedSender<payments::Command>,
    pub handled: mpsc::UnboundedSender<PaymentHash>,
    pub engines: BTreeMap<EngineId, Arc<dyn Engine>>,
    /// Engines that hold layers.
    pub stages: BTreeMap<EngineId, Arc<dyn Stage>>,
    /// Packs of experts.
    pub packs: BTreeMap<EngineId, Arc<LlamaExperts>>,
    /// Who buys for engines that lead; those stand among the engines too.
    pub buys: BTreeMap<EngineId, Arc<dyn Buys>>,
    pub switchboard: Switchboard,
    pub key: Arc<SigningKey>,
    pub artefacts: ArtefactServer,
    pub store: Store,
    pub view: Arc<RwLock<ProviderView>>,
    pub shutdown: CancellationToken,
}

struct Running {
    driver: ProviderDriver,
    inbox: mpsc::Sender<Message>,
    links: BTreeMap<LinkId, Outbound>,
    next_link: u64,
    desks: BTreeMap<EngineId, Desk>,
    /// When the view's sums were built, and whether something happened since that may change them.
    summed_at: Instant,
    sums_stale: bool,
}

/// Starts the driver; messages go to what is returned.
pub(crate) fn start(driver: ProviderDriver, endpoint: QuicEndpoint) -> mpsc::Sender<Message> {
    let (inbox, messages) = mpsc::channel(INBOX);
    for (id, engine) in &driver.engines {
        match driver.buys.get(id) {
            Some(buys) => tokio::spawn(rings::pump(*id, engine.clone(), buys.clone(), inbox.clone())),
            None => tokio::spawn(pump_engine(*id, engine.clone(), inbox.clone())),
        };
    }
    let mut desks = BTreeMap::new();
    for (engine, stage) in &driver.stages {
        let parts = DeskParts {
            engine: *engine,
            stage: stage.clone(),
            key: driver.key.clone(),
            endpoint: endpoint.clone(),
            switchboard: driver.switchboard.clone(),
            role: inbox.clone(),
            buys: driver.buys.get(engine).cloned(),
        };
        desks.insert(*engine, desk::start(parts));
    }
    for (engine, pack) in &driver.packs {
        let parts = ExpertDeskParts {
            engine: *engine,
            host: pack.clone(),
            facts: pack.facts().clone(),
            key: driver.key.clone(),
            switchboard: driver.switchboard.clone(),
            role: inbox.clone(),
        };
        desks.insert(*engine, expert_desk::start(parts));
    }
    tokio::spawn(accept(endpoint, inbox.clone()));
    let (links, summed_at, sums_stale) = (BTreeMap::new(), Instant::now(), true);
    let running = Running { driver, inbox: inbox.clone(), links, next_link: 0, desks, summed_at, sums_stale };
    tokio::spawn(running.run(messages));
    inbox
}

impl Running {
    async fn run(mut self, mut messages: mpsc::Receiver<Message>) {
        self.act();
        self.show(true);
        loop {
            self.driver.journal.caught_up().await;
            let wake = until(self.driver.role.poll_timeout());
            let wake = if self.sums_stale { wake.min(VIEW_INTERVAL) } else { wake };
            let event = tokio::select! {
                () = self.driver.shutdown.cancelled() => return,
                message = messages.recv() => match message {
                    Some(message) => self.event_of(message),
                    None => return,
                },
                () = tokio::time::sleep(wake) => Some(ProviderEvent::Tick),
            };
            if let Some(event) = event {
                // What the engine says moves no money by itself.
                self.sums_stale |= !matches!(event, ProviderEvent::Engine { .. } | ProviderEvent::Tick);
                self.driver.role.handle(now(), event);
                self.act();
                self.show(false);
            }
        }
    }

    fn event_of(&mut self, message: Message) -> Option<ProviderEvent> {
        match message {
            Message::Event(event) => {
                if let ProviderEvent::LinkDown { link } = &event {
                    self.links.remove(link);
                }
                Some(event)
            }
            Message::Link(quic) => {
                let link = LinkId(self.next_link);
                self.next_link += 1;
                let (peer, host) = (quic.peer(), Some(quic.remote().ip()));
                self.links.insert(link, Outbound::new(quic.clone()));
                let (artefacts, hops) = (self.driver.artefacts.connection(), self.driver.switchboard.clone());
                tokio::spawn(serve_link(link, quic, artefacts, hops, self.inbox.clone()));
                Some(ProviderEvent::LinkUp { link, peer, host })
            }
            Message::Control { link, sender } => {
                if let Some(outbound) = self.links.get_mut(&link) {
                    outbound.set_control(sender);
                }
                None
            }
            Message::Stream { link, stream, sender } => {
                if let Some(outbound) = self.links.get_mut(&link) {
                    outbound.add_stream(stream, sender);
                }
                None
            }
        }
    }

    fn act(&mut self) {
        while let Some(action) = self.driver.role.poll_action() {
            self.do_one(action);
        }
    }

    fn do_one(&mut self, action: ProviderAction) {
        match action {
            ProviderAction::Append(append) => {
                let (written, inbox) = (self.driver.journal.append(append.drafts), self.inbox.clone());
                tokio::spawn(async move {
                    let events = match written.await {
                        Ok(receipts) => {
                            let logged = receipts.into_iter().map(|entry| ProviderEvent::Logged(Box::new(entry)));
                            core::iter::once(ProviderEvent::Durable(append.ticket)).chain(logged).collect()
                        }
                        Err(reason) => vec![ProviderEvent::JournalFailed { reason }],
                    };
                    for event in events {
                        let _ = inbox.send(Message::Event(event)).await;
                    }
                });
            }
            ProviderAction::Control { link, frame } => {
                if let Some(outbound) = self.links.get(&link) {
                    outbound.control(&frame);
                }
            }
            ProviderAction::Send { link, stream, frame } => {
                if let Some(outbound) = self.links.get(&link) {
                    outbound.send(stream, &frame);
                }
            }
            ProviderAction::FinishStream { link, stream } => {
                if let Some(outbound) = self.links.get_mut(&link) {
                    outbound.finish(stream);
                }
            }
            ProviderAction::CloseLink { link, code, reason } => {
                if let Some(outbound) = self.links.get(&link) {
                    tracing::debug!(peer = %outbound.link().peer().short(), %reason, "closing a link");
                    outbound.close(code, &reason);
                }
            }
            ProviderAction::MakeInvoice { ticket, amount, description_hash, expiry_secs } => {
                let wallet = self.driver.wallet.clone();
                self.later(async move {
                    let made = wallet.create_invoice(InvoiceRequest { amount, description_hash, expiry_secs }).await;
                    let result = made.map(|Invoice { bolt11, .. }| bolt11).map_err(|error| error.to_string());
                    ProviderEvent::InvoiceMade { ticket, result }
                });
            }
            ProviderAction::Engine { engine, command } => self.command(engine, command),
            ProviderAction::Admit { engine, job, session, request, order, lead } => {
                self.tell_desk(engine, Order::Admit { job, session, request, order, lead });
            }
            ProviderAction::Route { engine, job, route } => self.tell_desk(engine, Order::Route { job, route }),
            ProviderAction::Settle { engine, job } => self.tell_desk(engine, Order::Settle { job }),
            ProviderAction::WalletHandled { hash } => {
                let _ = self.driver.payments.send(payments::Command::Booked { hash });
                let _ = self.driver.handled.send(hash);
            }
            ProviderAction::PayRefund { session, hash, bolt11, amount, max_fee, recover } => {
                let pays_for = payments::PaysFor::Refund(session);
                let pay = payments::Command::Pay { pays_for, hash, bolt11, amount, max_fee, recover };
                let _ = self.driver.payments.send(pay);
            }
            ProviderAction::ProveLog { link, ask } => {
                let store = self.driver.store.clone();
                self.later(async move { ProviderEvent::LogProved { link, proof: store.prove(ask).await } });
            }
            ProviderAction::Halt { reason } => {
                tracing::error!(%reason, "the provider has stopped taking work");
                if let Ok(mut view) = self.driver.view.write() {
                    view.halted = Some(reason);
                }
            }
        }
    }

    fn tell_desk(&self, engine: EngineId, order: Order) {
        if let Some(desk) = self.desks.get(&engine) {
            desk.tell(order);
        }
    }

    fn command(&self, engine: EngineId, command: Command) {
        if self.desks.contains_key(&engine) {
            return self.tell_desk(engine, Order::Engine(command));
        }
        if let (Some(buys), Command::Start(job)) = (self.driver.buys.get(&engine), &command)
            && let Some((_, request)) = self.driver.role.request_of(job.id)
        {
            buys.begin(job.id, request);
        }
        let started = match &command {
            Command::Start(job) => Some(job.id),
            Command::Grant { .. } | Command::Cancel { .. } | Command::ForgetSession { .. } => None,
        };
        let sent = self.driver.engines.get(&engine).is_some_and(|e| e.send(command).is_ok());
        if let (false, Some(job)) = (sent, started) {
            // The engine is between two lives: the job ends here and its consumer is told.
            let error = JobError::Backend { reason: "the engine process is not running".into() };
            let event = ProviderEvent::Engine { engine, event: EngineEvent::Failed { job, error } };
            match self.driver.buys.get(&engine) {
                // Its workers have their orders already.
                Some(buys) => rings::tell_over((engine, job), buys.clone(), self.inbox.clone(), event),
                None => self.later(std::future::ready(event)),
            }
        }
    }

    /// Reports back what a call answers.
    fn later(&self, answer: impl Future<Output = ProviderEvent> + Send + 'static) {
        let inbox = self.inbox.clone();
        tokio::spawn(async move {
            let _ = inbox.send(Message::Event(answer.await)).await;
        });
    }

    fn show(&mut self, at_once: bool) {
        let Ok(mut view) = self.driver.view.write() else { return };
        let exposure = self.driver.role.exposure();
        view.counters = *self.driver.role.counters();
        view.paused = self.driver.role.paused().map(str::to_owned);
        view.open_requests = self.driver.role.open_requests();
        view.links = self.links.len();
        view.exposure = exposure;
        view.largest_exposure = view.largest_exposure.max(exposure);
        if !at_once && (!self.sums_stale || self.summed_at.elapsed() < VIEW_INTERVAL) {
            return;
        }
        (self.summed_at, self.sums_stale) = (Instant::now(), false);
        (view.sessions, view.prepaid, view.refunds_due) = (0, Msat::ZERO, Msat::ZERO);
        for state in self.driver.role.session_states() {
            view.sessions += 1;
            let sum = if state.close_statement().is_some() { &mut view.refunds_due } else { &mut view.prepaid };
            *sum = sum.saturating_add(state.remainder());
        }
    }
}

async fn pump_engine(engine: EngineId, source: Arc<dyn Engine>, inbox: mpsc::Sender<Message>) {
    while let Some(event) = source.next_event().await {
        if let EngineEvent::Down { reason } = &event {
            tracing::warn!(%reason, "the engine is down; requests in hand end at what was acknowledged");
        }
        if inbox.send(Message::Event(ProviderEvent::Engine { engine, event })).await.is_err() {
            return;
        }
    }
}

async fn accept(endpoint: QuicEndpoint, inbox: mpsc::Sender<Message>) {
    while let Some(link) = endpoint.accept().await {
        if inbox.send(Message::Link(link)).await.is_err() {
            return;
        }
    }
}

/// While this runs, the connection is not one that nothing comes of.
async fn in_use<T>(link: LinkId, inbox: &mpsc::Sender<Message>, work: impl Future<Output = T>) -> T {
    let _ = inbox.send(Message::Event(ProviderEvent::LinkUsed { link })).await;
    let done = work.await;
    let _ = inbox.send(Message::Event(ProviderEvent::LinkFreed { link })).await;
    done
}

/// Reads everything that one consumer says, until its link ends.
async fn serve_link(
    link: LinkId,
    quic: Link,
    artefacts: ConnectionArtefacts,
    switchboard: Switchboard,
    inbox: mpsc::Sender<Message>,
) {
    let artefacts = Arc::new(artefacts);
    let mut next_stream = 0;
    while let Ok(FrameStream { kind, tx, rx }) = quic.accept().await {
        let inbox = inbox.clone();
        match kind {
            StreamKind::Control => {
                tokio::spawn(async move {
                    let mut rx = rx;
                    let _ = inbox.send(Message::Control { link, sender: tx }).await;
                    let event = |frame: ConsumerControl| Message::Event(ProviderEvent::Control { link, frame });
                    let _ = links::read(&mut rx, &inbox, event).await;
                });
            }
            StreamKind::Request => {
                let stream = StreamId(next_stream);
                let connection = quic.clone();
                next_stream += 1;
                tokio::spawn(async move {
                    let mut rx = rx;
                    let _ = inbox.send(Message::Stream { link, stream, sender: tx }).await;
                    let event = |frame: ConsumerFrame| Message::Event(ProviderEvent::Request { link, stream, frame });
                    let _ = links::read(&mut rx, &inbox, event).await;
                    // A stream that ends with its connection is no word of the consumer's: the link's end is told by itself.
                    if connection.close_reason().is_none() {
                        let _ = inbox.send(Message::Event(ProviderEvent::StreamClosed { link, stream })).await;
                    }
                });
            }
            StreamKind::Hop => {
                let (switchboard, upstream) = (switchboard.clone(), quic.peer());
                tokio::spawn(async move {
                    let mut stream = FrameStream { kind, tx, rx };
                    if let Some(admitted) = switchboard.admit(upstream, &mut stream).await {
                        in_use(link, &inbox, switchboard.serve(upstream, stream, admitted)).await;
                    }
                });
            }
            StreamKind::Artefact => {
                let artefacts = artefacts.clone();
                tokio::spawn(async move {
                    let mut stream = FrameStream { kind, tx, rx };
                    let served = match artefacts.asked(&mut stream).await {
                        Ok(Asked::Granted(grant)) => in_use(link, &inbox, artefacts.give(stream, grant)).await,
                        Ok(Asked::Refused(refused)) => Ok(refused),
                        Err(error) => Err(error),
                    };
                    if let Err(error) = served {
                        tracing::debug!(%error, "an artefact was not served to its end");
                    }
                });
            }
        }
    }
    let reason = quic.closed().await;
    tracing::debug!(peer = %quic.peer().short(), %reason, "a consumer's link ended");
    let _ = inbox.send(Message::Event(ProviderEvent::LinkDown { link })).await;
}
