//! The wallet's own process: a Lightning node, and a socket on which it is asked.

use super::wire::{self, Answered, Asked, Call, NotStarted, Started};
use crate::{LdkConfig, LdkWallet, StartError};
use satgrid_wallet::{Embedded, Lightning};
use serde_json::Value;
use std::{
    io,
    os::{fd::AsFd, unix::net::UnixStream as StdStream},
    sync::Arc,
    time::Duration,
};
use tokio::{
    io::BufReader,
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::Instant,
};

/// How long the process before us may take to stop its node and let go of the store.
const PREDECESSOR_STOPS_WITHIN: Duration = Duration::from_secs(30);
const PREDECESSOR_POLL: Duration = Duration::from_millis(50);
/// Exit code after a panic, as of Rust programs that panic on their main thread.
const PANICKED: i32 = 101;
/// Answers that wait to be written.
const ANSWERS: usize = 256;

/// Serves a Lightning node on the socket that is this process's standard input, until it ends; then stops the node.
pub fn worker_main() -> io::Result<()> {
    end_with_a_panic();
    // One payment at a time holds the manager's lock anyway; a second thread would only be woken for nothing.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let served = runtime.block_on(serve());
    runtime.shutdown_timeout(Duration::from_secs(1));
    served
}

/// ldk-node panics where it cannot go on safely, such as on a full disk, and then leaves the rest of the process standing: it would
/// answer, and never again send or receive. Whatever it said before is on the disk; ended, it is started again.
fn end_with_a_panic() {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tell(panic);
        std::process::exit(PANICKED);
    }));
}

async fn serve() -> io::Result<()> {
    // Whoever started us says when to end, by closing the socket, or dies, which closes it too.
    for kind in [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()] {
        let mut ignored = signal(kind)?;
        tokio::spawn(async move { while ignored.recv().await.is_some() {} });
    }
    let socket = StdStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    socket.set_nonblocking(true)?;
    let (reader, mut writer) = UnixStream::from_std(socket)?.into_split();
    let mut reader = BufReader::new(reader);
    let Some(config) = wire::read::<LdkConfig>(&mut reader).await? else { return Ok(()) };
    let wallet = match start(config).await {
        Ok(wallet) => Arc::new(wallet),
        Err(error) => {
            let reason = error.to_string();
            return wire::write(&mut writer, &Err::<Started, _>(NotStarted { reason })).await;
        }
    };
    let started = Started { node: wallet.node_id(), network: wallet.network() };
    // A node that is gone already has closed the socket; the loop sees that, and stops the wallet.
    let _ = wire::write(&mut writer, &Ok::<_, NotStarted>(started)).await;
    let served = answer_calls(&wallet, &mut reader, writer).await;
    // Its own end of the story: whatever happened to the node, the Lightning node is stopped, not killed.
    let stopped = wallet.stop().await;
    served.and(stopped.map_err(io::Error::other))
}

/// A node that was killed a moment ago left its wallet stopping: wait for the store.
async fn start(config: LdkConfig) -> Result<LdkWallet, StartError> {
    let deadline = Instant::now() + PREDECESSOR_STOPS_WITHIN;
    loop {
        match LdkWallet::start(config.clone()).await {
            Err(StartError::InUse { .. }) if Instant::now() < deadline => {
                tokio::time::sleep(PREDECESSOR_POLL).await;
            }
            started => return started,
        }
    }
}

async fn answer_calls(
    wallet: &Arc<LdkWallet>,
    reader: &mut BufReader<OwnedReadHalf>,
    mut writer: OwnedWriteHalf,
) -> io::Result<()> {
    let (answers, mut outbox) = mpsc::channel::<Answered>(ANSWERS);
    let writing = tokio::spawn(async move {
        while let Some(answered) = outbox.recv().await {
            if wire::write(&mut writer, &answered).await.is_err() {
                return;
            }
        }
    });
    let end = loop {
        match wire::read::<Asked>(reader).await {
            Ok(Some(Asked { id, call })) => {
                let (wallet, answers) = (wallet.clone(), answers.clone());
                tokio::spawn(async move {
                    let answer = answer(&wallet, call).await.unwrap_or(Value::Null);
                    let _ = answers.send(Answered { id, answer }).await;
                });
            }
            Ok(None) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    writing.abort();
    end
}

async fn answer(wallet: &LdkWallet, call: Call) -> serde_json::Result<Value> {
    use serde_json::to_value;
    match call {
        Call::CreateInvoice(request) => to_value(wallet.create_invoice(request).await),
        Call::Pay { bolt11, max_fee } => to_value(wallet.pay(&bolt11, max_fee).await),
        Call::Lookup(hash) => to_value(wallet.lookup(hash).await),
        Call::Payments(since) => to_value(wallet.payments_since(since).await),
        Call::Balance => to_value(wallet.balance().await),
        Call::Channels => to_value(wallet.channels().await),
        Call::Connect { node, addr } => to_value(wallet.connect(node, addr).await),
        Call::OpenChannel(open) => to_value(wallet.open_channel(open).await),
        Call::CloseChannel { channel, force } => to_value(wallet.close_channel(channel, force).await),
        Call::NewAddress => to_value(wallet.new_address().await),
        Call::Sync => to_value(wallet.sync().await),
        Call::NextEvent => to_value(wallet.next_event().await),
        Call::EventHandled => to_value(wallet.event_handled().await),
        Call::Sign(message) => to_value(wallet.sign_message(&message)),
        Call::Stop => to_value(wallet.stop().await),
        Call::Facts => to_value(wallet.facts().await),
        Call::Reconnect => to_value(wallet.reconnect().await),
        Call::Receive(ask) => to_value(wallet.receive(ask).await),
        Call::SendOnchain(send) => to_value(wallet.send_onchain(send).await),
        Call::Preimage(hash) => to_value(wallet.preimage(hash).await),
        Call::DraftOnchain(send) => to_value(wallet.draft_onchain(send).await),
        Call::FeesPaid => to_value(wallet.fees_paid().await),
        Call::ChannelBackup => to_value(wallet.channel_backup().await),
        Call::PayOffer { offer, amount, max_fee } => to_value(wallet.pay_offer(&offer, amount, max_fee).await),
        Call::OnchainRows => to_value(wallet.onchain_rows().await),
        Call::AskPeer { node, address } => to_value(wallet.ask_peer(node, &address).await),
        Call::Recover(lost) => to_value(wallet.recover(&lost).await),
    }
}
