//! The node's side: the wallet's port, spoken to the wallet's process.

use super::wire::{self, Answered, Asked, Call, NotStarted, Started};
use crate::{LdkConfig, StartError};
use async_trait::async_trait;
use satgrid_types::{LightningKey, Msat, PaymentHash, Preimage, UnixMs};
use satgrid_wallet::{
    Balance, Channel, ChannelError, ChannelId, Embedded, Invoice, InvoiceError, InvoiceRequest, Lightning, Network,
    OpenChannel, PayError, PaymentRecord, PaymentState, WalletError, WalletEvent,
    embedded::{
        BackedUp, ChannelBackup, FeesPaid, NodeFacts, OnchainDraft, OnchainRow, OnchainSend, Receive, Received,
        SendError,
    },
    restore::LostState,
};
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::{
    collections::BTreeMap,
    ffi::OsString,
    net::SocketAddr,
    os::{fd::OwnedFd, unix::net::UnixStream as StdStream},
    path::PathBuf,
    process::Stdio,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncWriteExt, BufReader},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    process::{Child, Command},
    sync::{mpsc, oneshot, watch},
};

/// What the process may see of our environment. Secrets of the configuration live in variables too.
const ENVIRONMENT: [&str; 7] = ["PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TZ", "RUST_BACKTRACE"];
/// How long the process may take to end once its Lightning node was stopped.
const EXIT_WITHIN: Duration = Duration::from_secs(10);

/// The program that the process runs: the daemon's own, with the arguments that lead to [`super::worker_main`].
#[derive(Debug, Clone)]
pub struct Program {
    pub exe: PathBuf,
    pub args: Vec<OsString>,
}

/// A Lightning node in a process of its own. Dropping it closes the socket, upon which the process stops by itself.
pub struct WalletProcess {
    node: LightningKey,
    network: Network,
    calls: Calls,
    /// The one `next_event` that is asked; a caller that goes away leaves it for the next.
    event: tokio::sync::Mutex<Option<oneshot::Receiver<Value>>>,
    process: tokio::sync::Mutex<Option<Child>>,
    pid: Option<u32>,
}

impl WalletProcess {
    /// Starts the process and its Lightning node. Waits while the process of a node that just died still stops.
    pub async fn start(program: &Program, config: LdkConfig) -> Result<WalletProcess, StartError> {
        let failed = |reason: String| StartError::Process { reason };
        let io_failed = |error: std::io::Error| failed(error.to_string());
        let (ours, theirs) = StdStream::pair().map_err(io_failed)?;
        ours.set_nonblocking(true).map_err(io_failed)?;
        let mut command = Command::new(&program.exe);
        command.args(&program.args).env_clear();
        command.envs(ENVIRONMENT.iter().filter_map(|name| Some((name, std::env::var_os(name)?))));
        command.stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::null()).stderr(Stdio::inherit());
        // A group of its own: a terminal's interrupt is ours to handle. It is never killed by us.
        command.process_group(0).kill_on_drop(false);
        let process = command.spawn().map_err(io_failed)?;
        // The command still holds the process's end; while it is open here, its death would not close the socket.
        drop(command);
        let (reader, mut writer) = UnixStream::from_std(ours).map_err(io_failed)?.into_split();
        let mut reader = BufReader::new(reader);
        wire::write(&mut writer, &config).await.map_err(io_failed)?;
        let started = wire::read::<Result<Started, NotStarted>>(&mut reader).await.map_err(io_failed)?;
        let Started { node, network } = match started {
            Some(Ok(started)) => started,
            Some(Err(NotStarted { reason })) => return Err(StartError::Remote { reason }),
            None => return Err(failed("it ended before it was up".to_owned())),
        };
        let pid = process.id();
        let calls = Calls::new(reader, writer);
        let (event, process) = (tokio::sync::Mutex::new(None), tokio::sync::Mutex::new(Some(process)));
        Ok(WalletProcess { node, network, calls, event, process, pid })
    }

    /// The process's id.
    pub fn pid(&self) -> Option<u32> {
        self.pid
    }

    /// Resolves when the process is gone, whoever ended it.
    pub async fn gone(&self) {
        let mut open = self.calls.open.subscribe();
        let _ = open.wait_for(|open| !*open).await;
    }

    async fn ask<T: DeserializeOwned>(&self, call: Call) -> Result<T, WalletError> {
        let answer = self.calls.ask(call).map_err(|_| gone())?;
        answer.await.map_err(|_| gone()).and_then(read)
    }
}

fn gone() -> WalletError {
    WalletError::Node { reason: "the wallet's process is gone".to_owned() }
}

fn read<T: DeserializeOwned>(answer: Value) -> Result<T, WalletError> {
    serde_json::from_value(answer)
        .map_err(|e| WalletError::Node { reason: format!("the wallet's process does not speak our protocol: {e}") })
}

/// Calls under way.
struct Calls {
    next: AtomicU64,
    waiting: Arc<Mutex<BTreeMap<u64, oneshot::Sender<Value>>>>,
    /// To the task that writes, so that a caller that goes away never leaves half a line. `None` closes the socket.
    outbox: mpsc::UnboundedSender<Option<Asked>>,
    /// False once the process closed its end.
    open: watch::Sender<bool>,
}

/// The process took no call.
struct Closed;

impl Calls {
    fn new(mut reader: BufReader<OwnedReadHalf>, mut writer: OwnedWriteHalf) -> Calls {
        let waiting: Arc<Mutex<BTreeMap<u64, oneshot::Sender<Value>>>> = Arc::default();
        let open = watch::Sender::new(true);
        let (answers, still) = (waiting.clone(), open.clone());
        tokio::spawn(async move {
            while let Ok(Some(Answered { id, answer })) = wire::read(&mut reader).await {
                let to = answers.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
                if let Some(to) = to {
                    let _ = to.send(answer);
                }
            }
            // First, so that no call begins to wait after the others were let go.
            still.send_replace(false);
            answers.lock().unwrap_or_else(PoisonError::into_inner).clear();
        });
        let (outbox, mut lines) = mpsc::unbounded_channel::<Option<Asked>>();
        tokio::spawn(async move {
            while let Some(Some(asked)) = lines.recv().await {
                if wire::write(&mut writer, &asked).await.is_err() {
                    return;
                }
            }
            let _ = writer.shutdown().await;
        });
        Calls { next: AtomicU64::new(0), waiting, outbox, open }
    }

    fn ask(&self, call: Call) -> Result<oneshot::Receiver<Value>, Closed> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (to, answer) = oneshot::channel();
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(id, to);
        if self.outbox.send(Some(Asked { id, call })).is_err() || !*self.open.borrow() {
            self.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
            return Err(Closed);
        }
        Ok(answer)
    }
}

#[async_trait]
impl Lightning for WalletProcess {
    fn node_id(&self) -> LightningKey {
        self.node
    }
    fn network(&self) -> Network {
        self.network
    }
    async fn create_invoice(&self, request: InvoiceRequest) -> Result<Invoice, InvoiceError> {
        self.ask::<Result<_, _>>(Call::CreateInvoice(request)).await?
    }
    async fn pay(&self, bolt11: &str, max_fee: Msat) -> Result<(), PayError> {
        let call = Call::Pay { bolt11: bolt11.to_owned(), max_fee };
        match self.ask::<Result<(), PayError>>(call).await {
            Ok(paid) => paid,
            // It may have been asked before it went.
            Err(error) => Err(PayError::Uncertain { reason: error.to_string() }),
        }
    }
    async fn lookup(&self, hash: PaymentHash) -> Result<PaymentState, WalletError> {
        self.ask::<Result<_, _>>(Call::Lookup(hash)).await?
    }
    async fn payments_since(&self, since: UnixMs) -> Result<Vec<PaymentRecord>, WalletError> {
        self.ask::<Result<_, _>>(Call::Payments(since)).await?
    }
    async fn balance(&self) -> Result<Balance, WalletError> {
        self.ask::<Result<_, _>>(Call::Balance).await?
    }
    async fn channels(&self) -> Result<Vec<Channel>, WalletError> {
        self.ask::<Result<_, _>>(Call::Channels).await?
    }
    async fn connect(&self, node: LightningKey, addr: SocketAddr) -> Result<(), ChannelError> {
        self.ask::<Result<_, _>>(Call::Connect { node, addr }).await?
    }
    async fn open_channel(&self, open: OpenChannel) -> Result<(), ChannelError> {
        self.ask::<Result<_, _>>(Call::OpenChannel(open)).await?
    }
    async fn close_channel(&self, channel: ChannelId, force: bool) -> Result<(), ChannelError> {
        self.ask::<Result<_, _>>(Call::CloseChannel { channel, force }).await?
    }
    async fn new_address(&self) -> Result<String, WalletError> {
        self.ask::<Result<_, _>>(Call::NewAddress).await?
    }
    async fn sync(&self) -> Result<(), WalletError> {
        self.ask::<Result<_, _>>(Call::Sync).await?
    }

    async fn next_event(&self) -> Result<WalletEvent, WalletError> {
        let mut asked = self.event.lock().await;
        if asked.is_none() {
            *asked = Some(self.calls.ask(Call::NextEvent).map_err(|_| WalletError::Stopped)?);
        }
        let Some(answer) = asked.as_mut() else { return Err(WalletError::Stopped) };
        let answer = answer.await;
        *asked = None;
        read::<Result<_, _>>(answer.map_err(|_| WalletError::Stopped)?)?
    }

    async fn event_handled(&self) -> Result<(), WalletError> {
        self.ask::<Result<_, _>>(Call::EventHandled).await?
    }

    /// Waits for the process; must be called on the multi-thread runtime. A process that is gone signs nothing.
    fn sign_message(&self, message: &[u8]) -> String {
        let call = Call::Sign(message.to_owned());
        tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(self.ask(call))).unwrap_or_default()
    }

    async fn stop(&self) -> Result<(), WalletError> {
        let Some(mut process) = self.process.lock().await.take() else { return Ok(()) };
        let stopped = self.ask::<Result<(), WalletError>>(Call::Stop).await;
        // Closing our end of the socket is what ends it.
        let _ = self.calls.outbox.send(None);
        match tokio::time::timeout(EXIT_WITHIN, process.wait()).await {
            Ok(_) => stopped?,
            Err(_) => Err(WalletError::Node { reason: "the wallet's process has not ended yet".to_owned() }),
        }
    }
}

#[async_trait]
impl Embedded for WalletProcess {
    async fn facts(&self) -> Result<NodeFacts, WalletError> {
        self.ask::<Result<_, _>>(Call::Facts).await?
    }
    async fn reconnect(&self) -> Result<u64, WalletError> {
        self.ask::<Result<_, _>>(Call::Reconnect).await?
    }
    async fn receive(&self, ask: Receive) -> Result<Received, InvoiceError> {
        self.ask::<Result<_, _>>(Call::Receive(ask)).await?
    }
    async fn send_onchain(&self, send: OnchainSend) -> Result<String, SendError> {
        self.ask::<Result<_, _>>(Call::SendOnchain(send)).await?
    }
    async fn draft_onchain(&self, send: OnchainSend) -> Result<OnchainDraft, SendError> {
        self.ask::<Result<_, _>>(Call::DraftOnchain(send)).await?
    }
    async fn preimage(&self, hash: PaymentHash) -> Result<Option<Preimage>, WalletError> {
        self.ask::<Result<_, _>>(Call::Preimage(hash)).await?
    }
    async fn fees_paid(&self) -> Result<FeesPaid, WalletError> {
        self.ask::<Result<_, _>>(Call::FeesPaid).await?
    }
    async fn channel_backup(&self) -> Result<ChannelBackup, WalletError> {
        self.ask::<Result<_, _>>(Call::ChannelBackup).await?
    }
    async fn pay_offer(&self, offer: &str, amount: Msat, max_fee: Msat) -> Result<String, PayError> {
        let call = Call::PayOffer { offer: offer.to_owned(), amount, max_fee };
        match self.ask::<Result<String, PayError>>(call).await {
            Ok(paid) => paid,
            Err(error) => Err(PayError::Uncertain { reason: error.to_string() }),
        }
    }
    async fn onchain_rows(&self) -> Result<Vec<OnchainRow>, WalletError> {
        self.ask::<Result<_, _>>(Call::OnchainRows).await?
    }
    async fn ask_peer(&self, node: LightningKey, address: &str) -> Result<(), WalletError> {
        self.ask::<Result<_, _>>(Call::AskPeer { node, address: address.to_owned() }).await?
    }
    async fn recover(&self, lost: &BackedUp) -> Result<LostState, WalletError> {
        self.ask::<Result<_, _>>(Call::Recover(lost.clone())).await?
    }
}
