//! What the provider role is told, and what it asks for.

use crate::{Append, CloseCode, LinkId, StreamId, Ticket};
use satgrid_engine::port::{Command, EngineEvent, JobId};
use satgrid_ledger::{
    Entry,
    statements::{ExpertCount, ExpertSplit, PartOrder, Split},
};
use satgrid_protocol::frame::{
    ConsumerControl, ConsumerFrame, LogAsk, LogProof, PartRoute, ProviderControl, ProviderFrame,
};
use satgrid_types::{
    BuildId, Digest, EngineProfile, Msat, NodeKey, PartUsage, PaymentHash, Preimage, RateCard, RequestId, SessionId,
    Terms, UnixMs, VerifiedListing,
};
use std::net::IpAddr;

/// Names one engine of this node; a node with several models runs several.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EngineId(pub u32);

/// Names one invoice that the wallet was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InvoiceTicket(pub u64);

/// The operator's settings and limits.
#[derive(Debug, Clone)]
pub struct ProviderConfig {
    pub terms: Terms,
    pub quote_validity_ms: u64,
    /// Sessions with a live connection.
    pub max_links: usize,
    /// How long a connection may stay without a session, and without rows or a download under way on it, in ms.
    pub unused_link_ms: u64,
    /// Sessions in which nothing was paid: of one peer, and of all.
    pub unpaid_per_peer: usize,
    pub unpaid_sessions: usize,
    /// Requests that one peer may have open, over all its sessions.
    pub max_requests_per_peer: usize,
    /// Requests open over all sessions; further ones are refused as busy.
    pub max_requests: usize,
    /// How long an acknowledgement or receipt may stay unsigned before the link is given up, in ms.
    pub signature_timeout_ms: u64,
    /// Name and version of the engine, for receipts.
    pub engine_name: String,
    /// Work on a part of a model that may be unacknowledged, per request; at least two batches of the engine.
    pub part_window: Msat,
    /// Positions in one batch of an engine that holds a part.
    pub part_batch: u32,
    /// The same where it holds experts, in expert rows: the largest call.
    pub expert_batch: u32,
}

impl Default for ProviderConfig {
    fn default() -> Self {
        ProviderConfig {
            terms: Terms::default(),
            quote_validity_ms: satgrid_types::Quote::VALIDITY_MS,
            max_links: 256,
            unused_link_ms: 60_000,
            unpaid_per_peer: 32,
            unpaid_sessions: 1_024,
            max_requests_per_peer: 32,
            max_requests: 64,
            signature_timeout_ms: 20_000,
            engine_name: "unnamed".into(),
            part_window: Msat(2_000),
            part_batch: 512,
            expert_batch: 4_096,
        }
    }
}

/// One listing that is published, and the engine behind it.
#[derive(Debug, Clone)]
pub struct Offering {
    pub listing: VerifiedListing,
    pub engine: EngineId,
    /// What is quoted: at most what is listed.
    pub rates: RateCard,
    pub profile: EngineProfile,
    pub build: BuildId,
}

impl Offering {
    pub(super) fn is_live(&self, now: UnixMs) -> bool {
        self.listing.is_live(now)
    }
}

/// What an engine that holds a part has done for one request, cumulative.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PartDone {
    pub usage: PartUsage,
    /// Running hashes over the rows that came in and went out.
    pub input: Digest,
    pub output: Digest,
    pub bytes_in: u64,
    pub bytes_out: u64,
    pub busy_ms: u64,
}

/// A refund that was attempted before a restart and has no outcome.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PendingRefund {
    pub session: SessionId,
    pub hash: PaymentHash,
    pub amount: Msat,
    pub bolt11: String,
}

/// What happened.
#[derive(Debug, Clone)]
pub enum ProviderEvent {
    /// A listing was published (again): quote under it from now on.
    Offer(Box<Offering>),
    LinkUp {
        link: LinkId,
        peer: NodeKey,
        /// Where it connects from, where that is known.
        host: Option<IpAddr>,
    },
    LinkDown {
        link: LinkId,
    },
    /// Rows of a ticketed request, or a download, are under way on this connection: once for each stream that carries some.
    LinkUsed {
        link: LinkId,
    },
    /// One of them is over.
    LinkFreed {
        link: LinkId,
    },
    Control {
        link: LinkId,
        frame: ConsumerControl,
    },
    Request {
        link: LinkId,
        stream: StreamId,
        frame: ConsumerFrame,
    },
    StreamClosed {
        link: LinkId,
        stream: StreamId,
    },
    Engine {
        engine: EngineId,
        event: EngineEvent,
    },
    /// An engine that holds a part worked for a request.
    Worked {
        engine: EngineId,
        job: JobId,
        done: PartDone,
    },
    /// What each expert evaluated for a request; comes before its end.
    Counted {
        engine: EngineId,
        job: JobId,
        counts: Vec<ExpertCount>,
    },
    /// As `Split`, of a lead that bought experts.
    ExpertSplit {
        engine: EngineId,
        job: JobId,
        split: Box<ExpertSplit>,
        root: Digest,
    },
    /// A lead's run is about to be reported as over: these layers were its own, and this is the root over the workers'
    /// receipts.
    Split {
        engine: EngineId,
        job: JobId,
        split: Box<Split>,
        root: Digest,
    },
    InvoiceMade {
        ticket: InvoiceTicket,
        result: Result<String, String>,
    },
    PaymentReceived {
        hash: PaymentHash,
        amount: Msat,
    },
    RefundSettled {
        hash: PaymentHash,
        amount: Msat,
        preimage: Option<Preimage>,
        fee: Msat,
    },
    /// Nothing was paid and nothing will be.
    RefundFailed {
        hash: PaymentHash,
        reason: String,
    },
    /// There is a reason to take no new work, or none any more. What runs goes on.
    Paused(Option<String>),
    Durable(Ticket),
    /// An entry with a receipt is durable, at this place of the journal.
    Logged(Box<Entry>),
    /// A tree head over the journal was signed.
    TreeHead {
        note: String,
    },
    /// What [`ProviderAction::ProveLog`] asked for.
    LogProved {
        link: LinkId,
        proof: LogProof,
    },
    JournalFailed {
        reason: String,
    },
    Tick,
}

/// What the role asks of the world.
#[derive(Debug, Clone)]
pub enum ProviderAction {
    Append(Append),
    Control {
        link: LinkId,
        frame: ProviderControl,
    },
    Send {
        link: LinkId,
        stream: StreamId,
        frame: ProviderFrame,
    },
    /// No more frames from us on this stream.
    FinishStream {
        link: LinkId,
        stream: StreamId,
    },
    CloseLink {
        link: LinkId,
        code: CloseCode,
        reason: String,
    },
    MakeInvoice {
        ticket: InvoiceTicket,
        amount: Msat,
        description_hash: Digest,
        expiry_secs: u32,
    },
    Engine {
        engine: EngineId,
        command: Command,
    },
    /// An order for a part of a model was accepted. Units are granted and the job cancelled by the engine's own commands.
    Admit {
        engine: EngineId,
        job: JobId,
        session: SessionId,
        request: RequestId,
        order: PartOrder,
        /// Signs the tickets of this request.
        lead: NodeKey,
    },
    /// Where the rows of a part request go next.
    Route {
        engine: EngineId,
        job: JobId,
        route: Box<PartRoute>,
    },
    /// The lead wants no more of a part request: end it in good order.
    Settle {
        engine: EngineId,
        job: JobId,
    },
    /// The journal has this wallet event: acknowledge it.
    WalletHandled {
        hash: PaymentHash,
    },
    PayRefund {
        session: SessionId,
        hash: PaymentHash,
        bolt11: String,
        amount: Msat,
        max_fee: Msat,
        /// It was begun before a restart: find out what became of it and never pay it twice.
        recover: bool,
    },
    /// Answer a question about this node's log from its tiles.
    ProveLog {
        link: LinkId,
        ask: LogAsk,
    },
    /// The journal is broken: take no work and tell the operator.
    Halt {
        reason: String,
    },
}

/// What the operator sees counted.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct ProviderCounters {
    pub requests_started: u64,
    pub requests_refused: u64,
    pub receipts: u64,
    pub abandoned: u64,
    pub violations: u64,
    pub slices: u64,
    pub payments_unknown: u64,
    /// Credit notes that were spent in other sessions.
    pub notes_spent: u64,
    /// Connections that were closed since nothing was opened on them.
    pub links_unused: u64,
    /// Sessions that were forgotten: nothing was paid in them.
    pub sessions_forgotten: u64,
}
