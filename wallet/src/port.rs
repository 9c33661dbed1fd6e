//! The port: everything that satgrid asks of a Lightning wallet, whichever one stands behind it.
//!
//! # Rules that every implementation keeps
//!
//! 1. A payment is named by its hash. [`Lightning::pay`] starts it and returns; the outcome comes as an event and stays
//!    readable by [`Lightning::lookup`]. Calling `pay` with the same BOLT 11 again pays it once, whether the first call
//!    is in flight, settled, or was forgotten in a crash. Only after a failure does it try again.
//! 2. [`Lightning::next_event`] gives the same event until [`Lightning::event_handled`] is called, across restarts too:
//!    write the journal first, then acknowledge. Events may come twice; the reader is idempotent by hash.
//! 3. [`PaymentState::Unknown`] says that the wallet knows nothing of the hash. After a crash that does *not* mean that
//!    nothing was sent (see [`crate::payment`]).
//! 4. Amounts are exact to the msat, from 1 msat up. Balances are too, but follow a payment's event by a round trip.

use crate::Network;
use async_trait::async_trait;
use core::{fmt, net::SocketAddr};
use satgrid_types::{Digest, LightningKey, Msat, PaymentHash, Preimage, UnixMs};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Longest invoice lifetime that the port accepts: what is agreed is agreed for now, not for next week.
pub const MAX_INVOICE_EXPIRY_SECS: u32 = 7 * 24 * 3_600;
/// Longest BOLT 11 text that is looked at. Ours, with two route hints, are under 500.
pub const MAX_BOLT11_LEN: usize = 2_048;

/// A Lightning wallet. Object-safe: roles hold `Arc<dyn Lightning>`.
#[async_trait]
pub trait Lightning: Send + Sync {
    fn node_id(&self) -> LightningKey;
    fn network(&self) -> Network;

    /// An invoice for exactly `amount`, carrying the hash of the terms that it is for.
    async fn create_invoice(&self, request: InvoiceRequest) -> Result<Invoice, InvoiceError>;
    /// Starts paying. `Ok` means: in flight, or already paid. See the module's first rule.
    async fn pay(&self, bolt11: &str, max_fee: Msat) -> Result<(), PayError>;
    /// What the wallet knows of a payment, of either direction.
    async fn lookup(&self, hash: PaymentHash) -> Result<PaymentState, WalletError>;
    /// Every Lightning payment whose row was written at `since` or later, oldest first. A wallet may count a row by the
    /// second: the last one of it comes again.
    async fn payments_since(&self, since: UnixMs) -> Result<Vec<PaymentRecord>, WalletError>;
    /// Every Lightning payment that the wallet has a row for, oldest first.
    async fn payments(&self) -> Result<Vec<PaymentRecord>, WalletError> {
        self.payments_since(UnixMs(0)).await
    }

    async fn balance(&self) -> Result<Balance, WalletError>;
    async fn channels(&self) -> Result<Vec<Channel>, WalletError>;
    /// Connects to a peer and remembers it. Does nothing if it is connected.
    async fn connect(&self, node: LightningKey, addr: SocketAddr) -> Result<(), ChannelError>;
    /// Starts opening a channel; `ChannelPending` and `ChannelReady` follow as events.
    async fn open_channel(&self, open: OpenChannel) -> Result<(), ChannelError>;
    /// Closes cooperatively, or with `force` by broadcasting our latest state; `ChannelClosed` follows as an event.
    async fn close_channel(&self, channel: ChannelId, force: bool) -> Result<(), ChannelError>;
    /// A fresh on-chain address of this wallet.
    async fn new_address(&self) -> Result<String, WalletError>;
    /// Looks at the chain now instead of at the next interval.
    async fn sync(&self) -> Result<(), WalletError>;

    /// Waits for the oldest event that was not acknowledged. `Err` only when the wallet is stopped.
    async fn next_event(&self) -> Result<WalletEvent, WalletError>;
    /// Acknowledges the event that `next_event` last gave. Call it after the journal has the event, never before.
    async fn event_handled(&self) -> Result<(), WalletError>;

    /// Signs with the node's key, in the form that [`crate::message::verify`] checks.
    fn sign_message(&self, message: &[u8]) -> String;
    /// Stops cleanly: peers disconnected, state on disk. Further calls answer `Stopped`.
    async fn stop(&self) -> Result<(), WalletError>;
}

/// What a payee asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct InvoiceRequest {
    pub amount: Msat,
    /// SHA-256 of the terms (for a slice: of its descriptor). The invoice's signature then covers the terms.
    pub description_hash: Digest,
    pub expiry_secs: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invoice {
    pub bolt11: String,
    pub payment_hash: PaymentHash,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Direction {
    Inbound,
    Outbound,
}

/// What a wallet knows of a payment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum PaymentState {
    /// No row. Not the same as "never sent": see [`crate::payment`].
    Unknown,
    /// Outbound: the HTLC may be out. Inbound: the invoice waits to be paid.
    InFlight,
    /// `amount` is what the payee got; `fee` is what routing took on top (zero for inbound).
    Settled {
        preimage: Preimage,
        fee: Msat,
        amount: Msat,
    },
    Failed {
        reason: FailureReason,
    },
}

/// One row of the wallet's own payment list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PaymentRecord {
    pub hash: PaymentHash,
    pub direction: Direction,
    pub amount: Msat,
    pub fee: Msat,
    pub state: PaymentState,
    /// When the row was last written.
    pub at: UnixMs,
}

/// Why a payment that was tried came to nothing. Nothing was paid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum FailureReason {
    /// No path with enough balance on it, within the fee limit.
    NoRoute,
    RetriesExhausted,
    /// The payee (or its channel) turned it down.
    Rejected,
    Expired,
    /// Proved never to have left this node ([`crate::payment`] says how).
    NeverSent,
    Other,
}

impl fmt::Display for FailureReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FailureReason::NoRoute => "no route with enough balance within the fee limit",
            FailureReason::RetriesExhausted => "every route was tried and failed",
            FailureReason::Rejected => "the payee turned it down",
            FailureReason::Expired => "the invoice expired",
            FailureReason::NeverSent => "it never left this node",
            FailureReason::Other => "the wallet gave no reason",
        })
    }
}

/// What a wallet holds.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Balance {
    /// Our side of all open channels, the reserve included; amounts in flight are not ours until they fail.
    pub lightning_total: Msat,
    /// Outbound above the reserve, over channels that are usable now: what can be paid.
    pub payable: Msat,
    /// The largest that can be paid over one channel at once, after fees and the peer's limits: a bound for a slice.
    pub largest_payment: Msat,
    /// What can be received over channels that are usable now.
    pub receivable: Msat,
    /// In channels that are closing or closed and not yet swept to an address of ours.
    pub closing_sat: u64,
    /// Confirmed and free to spend (the anchor reserve is taken off).
    pub onchain_confirmed_sat: u64,
    /// Everything on chain, unconfirmed and reserved included.
    pub onchain_total_sat: u64,
    /// Some outbound payment is out on some channel, or an event waits to be read that may tell of its end. `false` once
    /// a channel is usable again is part of the proof that a forgotten payment never left ([`crate::payment`]). Whoever
    /// fills it looks at the channels first and at the events after them, so that an end between the two is not missed.
    pub outbound_in_flight: bool,
}

/// A channel's id, as the wallet names it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ChannelId(pub [u8; 32]);

impl fmt::Display for ChannelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}
impl fmt::Debug for ChannelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChannelId({self})")
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Channel {
    pub id: ChannelId,
    pub counterparty: LightningKey,
    pub capacity_sat: u64,
    /// Our side of the channel, the reserve included.
    pub ours: Msat,
    /// What must stay on our side.
    pub reserve_sat: u64,
    /// What can be paid through it now, in all.
    pub payable: Msat,
    /// What can be paid through it at once. LDK peers accept 10 % of the channel in flight.
    pub largest_payment: Msat,
    pub receivable: Msat,
    /// We opened it (and pay its commitment fee).
    pub we_opened: bool,
    /// `channel_ready` has been exchanged.
    pub ready: bool,
    /// Ready, and the peer is connected.
    pub usable: bool,
    pub confirmations: u32,
}

/// A channel to open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenChannel {
    pub node: LightningKey,
    pub addr: SocketAddr,
    pub capacity_sat: u64,
    /// Given to the peer at the start, out of the capacity.
    pub push: Msat,
}

/// What happened in a wallet. May come twice.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum WalletEvent {
    PaymentSettled {
        hash: PaymentHash,
        preimage: Preimage,
        fee: Msat,
    },
    PaymentFailed {
        hash: PaymentHash,
        reason: FailureReason,
    },
    PaymentReceived {
        hash: PaymentHash,
        amount: Msat,
    },
    ChannelPending {
        channel: ChannelId,
        counterparty: LightningKey,
    },
    /// `funding_confirmed` is false for a zero-confirmation channel: whoever opened it can still double-spend.
    ChannelReady {
        channel: ChannelId,
        counterparty: LightningKey,
        funding_confirmed: bool,
        we_opened: bool,
    },
    /// `forced`: a commitment transaction was or will be broadcast, and our share comes back only after its delay.
    ChannelClosed {
        channel: ChannelId,
        counterparty: Option<LightningKey>,
        reason: String,
        forced: bool,
    },
    /// Something that satgrid has no use for. Acknowledge it and go on.
    Other {
        what: String,
    },
}

/// An operation that can only fail because the wallet did.
#[derive(Debug, Clone, PartialEq, Eq, Error, Serialize, Deserialize)]
pub enum WalletError {
    #[error("the wallet is stopped")]
    Stopped,
    #[error("the wallet failed: {reason}")]
    Node { reason: String },
}

/// Why no invoice was made.
#[derive(Debug, Clone, PartialEq, Eq, Error, Serialize, Deserialize)]
pub enum InvoiceError {
    #[error("an invoice over nothing is no invoice")]
    ZeroAmount,
    #[error("an invoice lifetime of {asked} s is not between 1 and {MAX_INVOICE_EXPIRY_SECS}")]
    Expiry { asked: u32 },
    /// The operator's own limit on what this hot wallet may hold.
    #[error("refused: {holds_sat} sat held and {asked} asked would exceed this wallet's cap of {cap_sat} sat")]
    OverCap { holds_sat: u64, asked: Msat, cap_sat: u64 },
    /// No channel has room for it and none will be opened.
    #[error("no channel has room for {amount}, and the liquidity provider opens none: {reason}")]
    NoRoom { amount: Msat, reason: String },
    #[error("the liquidity provider asks more than {limit} to open a channel for {amount}; ask for more at once")]
    LspFee { amount: Msat, limit: Msat },
    #[error(transparent)]
    Wallet(#[from] WalletError),
}

/// Why `pay` did not start a payment.
#[derive(Debug, Clone, PartialEq, Eq, Error, Serialize, Deserialize)]
pub enum PayError {
    #[error("not an invoice that this wallet can pay: {reason}")]
    BadInvoice { reason: String },
    #[error(
        "by this machine's clock the invoice has expired; if it was just made, look at the clock (`satgrid doctor`)"
    )]
    Expired,
    #[error("no route for {amount} (payable now: {payable}, fee limit {max_fee})")]
    NoRoute { amount: Msat, payable: Msat, max_fee: Msat },
    #[error("the wallet is stopped")]
    Stopped,
    /// The wallet broke while it was sending: the payment may be out. Resolve it by its hash.
    #[error("the payment may or may not be out: {reason}")]
    Uncertain { reason: String },
}

impl PayError {
    /// This call sent nothing. An earlier call for the same invoice may still have.
    pub const fn sent_nothing(&self) -> bool {
        match self {
            PayError::BadInvoice { .. } | PayError::Expired | PayError::NoRoute { .. } | PayError::Stopped => true,
            PayError::Uncertain { .. } => false,
        }
    }
}

/// Why a peer was not reached or a channel not opened.
#[derive(Debug, Clone, PartialEq, Eq, Error, Serialize, Deserialize)]
pub enum ChannelError {
    #[error("cannot reach {node} at {addr}")]
    Unreachable { node: LightningKey, addr: SocketAddr },
    /// Beside the channel itself, each anchor channel keeps a reserve on chain with which a force-close can be paid.
    #[error(
        "a channel of {capacity_sat} sat needs {capacity_sat} sat on chain plus the fee and an anchor reserve of \
         {anchor_reserve_sat} sat; {spendable_sat} sat is confirmed and free"
    )]
    Funds { capacity_sat: u64, anchor_reserve_sat: u64, spendable_sat: u64 },
    #[error("refused: a channel of {capacity_sat} sat would exceed this wallet's cap of {cap_sat} sat")]
    OverCap { capacity_sat: u64, cap_sat: u64 },
    #[error("{0} is not a channel of this wallet")]
    NoSuchChannel(ChannelId),
    #[error("{reason}")]
    Refused { reason: String },
    #[error(transparent)]
    Wallet(#[from] WalletError),
}
