//! What the two processes say: one JSON value a line, calls with an id, answers with the same.
//!
//! Both ends are the same binary, so there are no versions here; what does not parse ends the connection.

use satgrid_types::{LightningKey, Msat, PaymentHash, UnixMs};
use satgrid_wallet::{
    ChannelId, InvoiceRequest, Network, OpenChannel,
    embedded::{BackedUp, OnchainSend, Receive},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;
use std::{io, net::SocketAddr};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use zeroize::Zeroizing;

/// Longest line: a list of 10,000 payments is about 4 MB.
const MAX_LINE: u64 = 64 * 1024 * 1024;

/// The first line of the wallet's process, after it was given its configuration.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Started {
    pub node: LightningKey,
    pub network: Network,
}

/// Why the Lightning node did not start; `in_use` is worth waiting for.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct NotStarted {
    pub reason: String,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Call {
    CreateInvoice(InvoiceRequest),
    Pay { bolt11: String, max_fee: Msat },
    Lookup(PaymentHash),
    Payments(UnixMs),
    Balance,
    Channels,
    Connect { node: LightningKey, addr: SocketAddr },
    OpenChannel(OpenChannel),
    CloseChannel { channel: ChannelId, force: bool },
    NewAddress,
    Sync,
    NextEvent,
    EventHandled,
    Sign(Vec<u8>),
    Stop,
    Facts,
    Reconnect,
    Receive(Receive),
    SendOnchain(OnchainSend),
    DraftOnchain(OnchainSend),
    FeesPaid,
    Preimage(PaymentHash),
    ChannelBackup,
    OnchainRows,
    PayOffer { offer: String, amount: Msat, max_fee: Msat },
    AskPeer { node: LightningKey, address: String },
    Recover(BackedUp),
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Asked {
    pub id: u64,
    pub call: Call,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Answered {
    pub id: u64,
    /// The call's own `Result`.
    pub answer: Value,
}

/// The next line; `None` at the end.
pub(super) async fn read<T: DeserializeOwned>(from: &mut (impl AsyncBufRead + Unpin)) -> io::Result<Option<T>> {
    let mut line = Zeroizing::new(Vec::new());
    let read = from.take(MAX_LINE).read_until(b'\n', &mut line).await?;
    if read == 0 || line.last() != Some(&b'\n') {
        return Ok(None);
    }
    serde_json::from_slice(&line).map(Some).map_err(io::Error::from)
}

pub(super) async fn write(to: &mut (impl AsyncWrite + Unpin), what: &impl Serialize) -> io::Result<()> {
    let mut line = Zeroizing::new(serde_json::to_vec(what)?);
    line.push(b'\n');
    to.write_all(&line).await?;
    to.flush().await
}
