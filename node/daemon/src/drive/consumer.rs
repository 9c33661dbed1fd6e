//! Drives the consumer role: links to providers, payments, the journal, and the calls that wait for tokens.

use super::{
    ClockWatch, checkpoints,
    journal::JournalWriter,
    links::{self, Outbound},
    market::Market,
    now, payments, until,
};
use crate::store::Store;
use satgrid_ledger::log::SignedCheckpoint;
use satgrid_market::Fault;
use satgrid_node::{
    LinkId, StreamId,
    consumer::{CallId, Consumer, ConsumerAction, ConsumerEvent, Emission, SessionIndex, Submit, session_key},
};
use satgrid_protocol::frame::{ConsumerFrame, ProviderControl, ProviderFrame};
use satgrid_protocol_quic::{
    FrameReceiver, FrameSender, FrameStream, Link, LinkError, QuicEndpoint, StreamKind, hints,
};
use satgrid_types::{Digest, Msat, NodeKey, PaymentHash, SessionId, UnixMs};
use satgrid_wallet::{InvoiceRequest, Lightning};
use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, RwLock},
    time::Duration,
};
use tokio::{sync::mpsc, time::Instant};
use tokio_util::sync::CancellationToken;

/// Messages that may wait; senders are held back beyond.
const INBOX: usize = 4_096;
/// The lists of the operators' view are built at most this often.
const VIEW_INTERVAL: Duration = Duration::from_millis(200);
/// How long a refund invoice stands.
const REFUND_INVOICE_SECS: u32 = 3_600;

/// What the driver's task is told.
pub(crate) enum Message {
    Event(ConsumerEvent),
    /// A call, and where its emissions go. Their number is bounded by the tokens that were asked for.
    Call(Box<Submit>, mpsc::UnboundedSender<Emission>),
    Connected {
        link: LinkId,
        quic: Link,
        control: FrameStream,
    },
    Stream {
        link: LinkId,
        stream: StreamId,
        sender: FrameSender,
    },
}

/// What operators are shown: figures renewed after every event, lists soon after they changed.
#[derive(Debug, Clone, Default)]
pub(crate) struct ConsumerView {
    pub counters: satgrid_node::consumer::ConsumerCounters,
    pub open_calls: usize,
    pub exposure: Msat,
    pub largest_exposure: Msat,
    pub sessions: Vec<SessionView>,
    pub avoided: Vec<(NodeKey, String)>,
    pub halted: Option<String>,
    pub paused: Option<String>,
}

#[derive(Debug, Clone)]
pub(crate) struct SessionView {
    pub session: SessionId,
    pub provider: NodeKey,
    /// Where it stands, in one word.
    pub state: &'static str,
    pub paid: Msat,
    pub charged: Msat,
    pub remainder: Msat,
    pub refunded: Msat,
}

/// Everything that the driver needs.
pub(crate) struct ConsumerDriver {
    pub role: Consumer,
    pub master: [u8; 32],
    pub journal: JournalWriter,
    pub wallet: Arc<dyn Lightning>,
    pub payments: mpsc::UnboundedSender<payments::Command>,
    pub handled: mpsc::UnboundedSender<PaymentHash>,
    pub endpoint: QuicEndpoint,
    /// Dialled instead of what a listing names: the house's provider is on this machine.
    pub at: Option<SocketAddr>,
    pub market: Market,
    pub store: Store,
    pub view: Arc<RwLock<ConsumerView>>,
    pub shutdown: CancellationToken,
}

struct Running {
    driver: ConsumerDriver,
    inbox: mpsc::Sender<Message>,
    links: BTreeMap<LinkId, Outbound>,
    calls: BTreeMap<CallId, mpsc::UnboundedSender<Emission>>,
    /// Frames for streams that are still being opened: a cancellation, at most.
    early: BTreeMap<(LinkId, StreamId), Vec<ConsumerFrame>>,
    /// When the view's lists were built, and whether something happened since that may change them.
    listed_at: Instant,
    lists_stale: bool,
}

/// Starts the driver; messages go to what is returned.
pub(crate) fn start(driver: ConsumerDriver) -> mpsc::Sender<Message> {
    let (inbox, messages) = mpsc::channel(INBOX);
    let (links, calls, early) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    let (listed_at, lists_stale) = (Instant::now(), true);
    let running = Running { driver, inbox: inbox.clone(), links, calls, early, listed_at, lists_stale };
    tokio::spawn(running.run(messages));
    inbox
}

impl Running {
    async fn run(mut self, mut messages: mpsc::Receiver<Message>) {
        self.act();
        self.show(true);
        let mut clock = ClockWatch::new();
        loop {
            self.driver.journal.caught_up().await;
            let wake = until(self.driver.role.poll_timeout());
            let wake = if self.lists_stale { wake.min(VIEW_INTERVAL) } else { wake };
            let event = tokio::select! {
                () = self.driver.shutdown.cancelled() => return,
                message = messages.recv() => match message {
                    Some(message) => self.event_of(message),
                    None => return,
                },
                () = tokio::time::sleep(wake) => Some(ConsumerEvent::Tick),
            };
            // Before anything is judged by it.
            if let Some(by_ms) = clock.moved() {
                tracing::warn!(
                    by_s = by_ms / 1_000,
                    "the clock was set, or the machine slept: waits for providers begin anew"
                );
                self.driver.role.handle(now(), ConsumerEvent::ClockMoved);
            }
            if let Some(event) = event {
                if matches!(event, ConsumerEvent::Tick) && self.driver.role.wants_listings() {
                    self.learn();
                }
                // A chunk changes no list.
                let chunk = matches!(event, ConsumerEvent::Frame { frame: ProviderFrame::Chunk(..), .. });
                self.lists_stale |= !chunk && !matches!(event, ConsumerEvent::Tick);
                self.driver.role.handle(now(), event);
                self.act();
                self.show(false);
            }
        }
    }

    fn event_of(&mut self, message: Message) -> Option<ConsumerEvent> {
        match message {
            Message::Event(event) => {
                if let ConsumerEvent::LinkDown { link, .. } = &event {
                    self.links.remove(link);
                    self.early.retain(|(of, _), _| of != link);
                }
                if let ConsumerEvent::CloseSession { .. } = &event {
                    self.learn();
                }
                Some(event)
            }
            Message::Call(submit, emissions) => {
                self.calls.insert(submit.call, emissions);
                Some(ConsumerEvent::Submit(submit))
            }
            Message::Connected { link, quic, control } => {
                let mut outbound = Outbound::new(quic.clone());
                outbound.set_control(control.tx);
                self.links.insert(link, outbound);
                tokio::spawn(read_control(link, quic, control.rx, self.inbox.clone()));
                Some(ConsumerEvent::LinkUp { link })
            }
            Message::Stream { link, stream, sender } => {
                let early = self.early.remove(&(link, stream)).unwrap_or_default();
                if let Some(outbound) = self.links.get_mut(&link) {
                    outbound.add_stream(stream, sender);
                    early.iter().for_each(|frame| outbound.send(stream, frame));
                }
                None
            }
        }
    }

    /// After a restart the role knows with whom it has sessions, not where they are reached now.
    fn learn(&mut self) {
        let live = self.driver.market.live();
        live.iter().for_each(|listing| self.driver.role.learn(listing));
    }

    fn act(&mut self) {
        while let Some(action) = self.driver.role.poll_action() {
            self.do_one(action);
        }
    }

    fn do_one(&mut self, action: ConsumerAction) {
        match action {
            ConsumerAction::Append(append) => {
                let written = self.driver.journal.append(append.drafts);
                self.later(async move {
                    match written.await {
                        Ok(_) => ConsumerEvent::Durable(append.ticket),
                        Err(reason) => ConsumerEvent::JournalFailed { reason },
                    }
                });
            }
            ConsumerAction::Connect { link, provider, addresses, session } => {
                self.connect(link, provider, addresses, session);
            }
            ConsumerAction::Control { link, frame } => {
                if let Some(outbound) = self.links.get(&link) {
                    outbound.control(&frame);
                }
            }
            ConsumerAction::OpenStream { link, stream, frame } => self.open_stream(link, stream, frame),
            ConsumerAction::Send { link, stream, frame } => match self.early.get_mut(&(link, stream)) {
                Some(early) => early.push(frame),
                None => {
                    if let Some(outbound) = self.links.get(&link) {
                        outbound.send(stream, &frame);
                    }
                }
            },
            ConsumerAction::FinishStream { link, stream } => {
                if let Some(outbound) = self.links.get_mut(&link) {
                    outbound.finish(stream);
                }
            }
            ConsumerAction::ResetStream { link, stream } => {
                if let Some(outbound) = self.links.get_mut(&link) {
                    outbound.forget(stream);
                }
            }
            ConsumerAction::CloseLink { link, code, reason } => {
                if let Some(outbound) = self.links.remove(&link) {
                    tracing::debug!(peer = %outbound.link().peer().short(), %reason, "closing a link");
                    outbound.close(code, &reason);
                }
            }
            ConsumerAction::Pay { slice, hash, bolt11, amount, max_fee } => {
                self.pay(slice, hash, bolt11, amount, max_fee, false);
            }
            ConsumerAction::ResolvePayment { slice, hash, bolt11, amount, max_fee } => {
                tracing::info!(payment = %hash, %amount, "finding out what became of a payment from before the restart");
                self.pay(slice, hash, bolt11, amount, max_fee, true);
            }
            ConsumerAction::MakeCloseInvoice { session, amount } => {
                let wallet = self.driver.wallet.clone();
                self.later(async move {
                    let description_hash = Digest(session.0);
                    let request = InvoiceRequest { amount, description_hash, expiry_secs: REFUND_INVOICE_SECS };
                    let made = wallet.create_invoice(request).await;
                    let result = made.map(|invoice| invoice.bolt11).map_err(|error| error.to_string());
                    ConsumerEvent::CloseInvoice { session, result }
                });
            }
            ConsumerAction::WalletHandled { hash } => {
                let _ = self.driver.payments.send(payments::Command::Booked { hash });
                let _ = self.driver.handled.send(hash);
            }
            ConsumerAction::Emit { call, emission } => {
                let last = matches!(emission, Emission::Finished { .. } | Emission::Failed { .. });
                if let Some(emissions) = self.calls.get(&call) {
                    let _ = emissions.send(emission);
                }
                if last {
                    self.calls.remove(&call);
                }
            }
            ConsumerAction::Penalise { provider, rule } => {
                tracing::warn!(provider = %provider, %rule, "a provider broke a rule; the proof is in the ledger");
                self.driver.market.fault(now(), provider, fault_of(&rule));
            }
            ConsumerAction::Left { provider, received, why } => {
                tracing::info!(provider = %provider.short(), received, %why, "a call left its provider before its end");
            }
            ConsumerAction::Witness { note } => self.witness(note),
            ConsumerAction::Settled { provider, amount, decode_mtok_s } => {
                self.driver.market.settled(provider, amount, decode_mtok_s);
            }
            ConsumerAction::PaidSlice { provider, amount, fee } => {
                self.driver.market.paid_slice(provider, amount, fee);
            }
            ConsumerAction::Halt { reason } => {
                tracing::error!(%reason, "the consumer has stopped taking work");
                if let Ok(mut view) = self.driver.view.write() {
                    view.halted = Some(reason);
                }
            }
        }
    }

    /// Keeps a tree head beside those of earlier runs; one that contradicts them is told to the role.
    fn witness(&self, note: String) {
        let (store, inbox) = (self.driver.store.clone(), self.inbox.clone());
        tokio::spawn(async move {
            if let Ok(heard) = SignedCheckpoint::parse(&note) {
                checkpoints::witness(&store, &heard, &inbox).await;
            }
        });
    }

    fn connect(&self, link: LinkId, provider: NodeKey, addresses: Vec<String>, session: SessionIndex) {
        let (endpoint, inbox) = (self.driver.endpoint.clone(), self.inbox.clone());
        // A session lives on under its provider's newer key, and where that listens.
        let (dialled, addresses) = match self.driver.market.heir(&provider) {
            Some((heir, newer)) => (heir, newer.into_iter().chain(addresses).collect()),
            None => (provider, addresses),
        };
        let addresses = self.driver.at.map_or(addresses, |at| vec![at.to_string()]);
        let key = session_key(&self.driver.master, session);
        tokio::spawn(async move {
            let hints = hints(&addresses);
            let connected = match endpoint.connect(&hints, dialled, &key).await {
                Ok(quic) => match quic.open(StreamKind::Control).await {
                    Ok(control) => Ok((quic, control)),
                    Err(error) => Err(error.to_string()),
                },
                Err(error) => Err(error.to_string()),
            };
            let message = match connected {
                Ok((quic, control)) => Message::Connected { link, quic, control },
                Err(reason) => {
                    tracing::info!(provider = %provider.short(), %reason, "a provider was not reached");
                    Message::Event(ConsumerEvent::LinkFailed { link, reason })
                }
            };
            let _ = inbox.send(message).await;
        });
    }

    fn open_stream(&mut self, link: LinkId, stream: StreamId, first: ConsumerFrame) {
        let Some(quic) = self.links.get(&link).map(|outbound| outbound.link().clone()) else { return };
        self.early.insert((link, stream), Vec::new());
        let inbox = self.inbox.clone();
        tokio::spawn(async move {
            let opened = async {
                let mut opened = quic.open(StreamKind::Request).await?;
                opened.tx.send_frame(&first).await?;
                Ok::<_, LinkError>(opened)
            };
            match opened.await {
                Ok(FrameStream { tx, mut rx, .. }) => {
                    let _ = inbox.send(Message::Stream { link, stream, sender: tx }).await;
                    let event = |frame: ProviderFrame| Message::Event(ConsumerEvent::Frame { link, stream, frame });
                    let _ = links::read(&mut rx, &inbox, event).await;
                }
                Err(error) => tracing::debug!(%error, "a request stream was not opened"),
            }
            // A stream that ends with its connection is no word of the provider's: the link's end is told by itself.
            if quic.close_reason().is_some() {
                return;
            }
            let _ = inbox.send(Message::Event(ConsumerEvent::StreamClosed { link, stream })).await;
        });
    }

    fn pay(
        &self,
        (session, k): (SessionId, u32),
        hash: PaymentHash,
        bolt11: String,
        amount: Msat,
        max_fee: Msat,
        recover: bool,
    ) {
        let pays_for = payments::PaysFor::Slice(session, k);
        let _ = self.driver.payments.send(payments::Command::Pay { pays_for, hash, bolt11, amount, max_fee, recover });
    }

    /// Reports back what a call answers.
    fn later(&self, answer: impl Future<Output = ConsumerEvent> + Send + 'static) {
        let inbox = self.inbox.clone();
        tokio::spawn(async move {
            let _ = inbox.send(Message::Event(answer.await)).await;
        });
    }

    fn show(&mut self, at_once: bool) {
        let Ok(mut view) = self.driver.view.write() else { return };
        let role = &self.driver.role;
        let exposure = role.exposure();
        view.counters = *role.counters();
        view.open_calls = role.open_calls();
        view.paused = role.paused().map(str::to_owned);
        view.exposure = exposure;
        view.largest_exposure = view.largest_exposure.max(exposure);
        if !at_once && (!self.lists_stale || self.listed_at.elapsed() < VIEW_INTERVAL) {
            return;
        }
        (self.listed_at, self.lists_stale) = (Instant::now(), false);
        view.sessions = role
            .sessions()
            .map(|(state, word)| SessionView {
                session: state.id(),
                provider: state.provider(),
                state: word,
                paid: state.paid(),
                charged: state.charged(),
                remainder: state.remainder(),
                refunded: state.refunded(),
            })
            .collect();
        view.avoided = role.shunned(now()).map(|(key, why)| (*key, why.to_owned())).collect();
    }
}

async fn read_control(link: LinkId, quic: Link, mut rx: FrameReceiver, inbox: mpsc::Sender<Message>) {
    let event = |frame: ProviderControl| Message::Event(ConsumerEvent::Control { link, frame });
    let ended = links::read(&mut rx, &inbox, event).await;
    // A control stream that ends takes its link with it.
    quic.close(satgrid_protocol_quic::Code::DONE, "the control stream ended");
    let error = match ended {
        Ok(()) => quic.closed().await,
        Err(error) => error,
    };
    // A peer that closes says so; what times out broke on the way.
    let lost = matches!(error, LinkError::TimedOut { .. } | LinkError::Transport(_));
    let reason = error.to_string();
    let _ = inbox.send(Message::Event(ConsumerEvent::LinkDown { link, reason, lost })).await;
}

/// What providers did wrong before this start counts against them as it did then.
pub(crate) fn recall(market: &Market, misbehaved: impl IntoIterator<Item = (UnixMs, NodeKey, String)>) {
    for (at, provider, rule) in misbehaved {
        market.fault(at, provider, fault_of(&rule));
    }
}

/// How the market room weighs a broken rule.
fn fault_of(rule: &str) -> Fault {
    match rule {
        "quote-dearer-than-listing" | "quote-cached-dearer" => Fault::DearQuote,
        rule if rule.starts_with("invoice-") || rule == "payment-hash-reuse" => Fault::WrongInvoice,
        rule if rule.starts_with("overc") || rule.starts_with("count-") || rule == "output-hash" => Fault::Overcount,
        "slice-not-credited" => Fault::Unrefunded,
        "wrong-rows" => Fault::AuditFailed,
        _ => Fault::BadFrame,
    }
}
