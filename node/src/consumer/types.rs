//! What the consumer role is told, and what it asks for.

use super::SessionIndex;
use crate::{Append, CloseCode, LinkId, StreamId, Ticket};
use satgrid_ledger::{
    log::{FraudProof, SignedCheckpoint},
    statements::{ExpertCount, PartOrder},
};
use satgrid_protocol::{
    frame::{ConsumerControl, ConsumerFrame, ProviderControl, ProviderFrame, Resend, TokenLogprobs},
    hop,
    slices::SlicePolicy,
};
use satgrid_types::{
    FinishReason, LightningKey, Msat, NodeKey, PartUsage, PaymentHash, Preimage, RateCard, ReceiptId, RequestId,
    Sampling, SessionId, Signed, TokenUsage, VerifiedListing,
};
use satgrid_wallet::Network;
use std::collections::BTreeSet;
use thiserror::Error;

/// Names one call between the API and this role.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CallId(pub u64);

/// The operator's settings and limits.
#[derive(Debug, Clone)]
pub struct ConsumerConfig {
    /// `first` is that for a direct channel.
    pub slices: SlicePolicy,
    /// First slice to a provider that is paid over a route: larger, since every payment then costs a fee.
    pub first_routed: Msat,
    /// The most that one session may cost.
    pub session_cap: Msat,
    /// The most that may be lost at one moment, over all sessions: no slice is paid that would go above it.
    pub exposure_cap: Msat,
    /// Routing fee limit of a slice: this part per thousand of it, and at least `min_fee`.
    pub fee_per_mille: u64,
    pub min_fee: Msat,
    pub network: Network,
    /// How long a provider that broke a rule or vanished is avoided, in ms.
    pub shun_ms: u64,
    /// How long hello, quote and open may take, in ms.
    pub setup_ms: u64,
    /// Silence in a running request after which it goes elsewhere, in ms.
    pub stall_ms: u64,
    /// How long a stream that broke waits for its provider where another one could go on with it, in ms. Where none could,
    /// it waits as long as the provider's terms say.
    pub failover_ms: u64,
    /// How long a slice may take to be credited once it is paid, in ms.
    pub credit_ms: u64,
    /// How long a connected provider may owe a word about its log, in ms: the promise of a receipt, a tree head that covers
    /// the promise, the answer to a question.
    pub log_ms: u64,
    /// A connection without work is closed after this long, in ms.
    pub idle_ms: u64,
    /// The session is closed with it, and its balance asked back; else the balance stays for the next call.
    pub refund_idle: bool,
    /// Calls that may wait or run.
    pub max_calls: usize,
    /// Providers that one call may try.
    pub max_attempts: usize,
}

impl Default for ConsumerConfig {
    fn default() -> Self {
        ConsumerConfig {
            slices: SlicePolicy::default(),
            first_routed: SlicePolicy::default().first,
            session_cap: Msat::sat(20_000),
            exposure_cap: Msat::sat(20_000),
            fee_per_mille: 10,
            min_fee: Msat(1_000),
            network: Network::Regtest,
            shun_ms: 10 * 60 * 1_000,
            setup_ms: 10_000,
            stall_ms: 30_000,
            failover_ms: 3_000,
            credit_ms: 15_000,
            log_ms: 2 * 60 * 1_000,
            idle_ms: 5 * 60 * 1_000,
            refund_idle: false,
            // As many as the API admits at once.
            max_calls: 1_024,
            max_attempts: 4,
        }
    }
}

/// One call: a tokenised prompt and the providers that the planner chose, best first. All run the same model.
#[derive(Debug, Clone)]
pub struct Submit {
    pub call: CallId,
    pub candidates: Vec<VerifiedListing>,
    pub prompt: Vec<u32>,
    pub sampling: Sampling,
    pub stop: Vec<String>,
    pub max_output: u32,
    /// Tokens that end a generation: where the last one received is one, nothing is left for another provider to do.
    pub ends: BTreeSet<u32>,
    /// A grammar that the output follows, encoded.
    pub grammar: Option<Vec<u8>>,
    /// Log probabilities of each token and of so many likeliest ones.
    pub top_logprobs: Option<u32>,
    /// The prompt is texts to be embedded, of so many tokens each; then there is no output.
    pub embed: Option<Vec<u32>>,
    /// Another provider may go on where one failed.
    pub allow_fallbacks: bool,
    /// Work on a part of a model, of the one candidate; then there is no prompt and no output.
    pub part: Option<PartOrder>,
    /// The most that the call may cost, over all providers: none is asked that could go above it.
    pub max_cost: Option<Msat>,
}

impl Submit {
    /// A lead's order of one worker.
    pub fn of_part(call: CallId, worker: VerifiedListing, order: PartOrder) -> Submit {
        Submit {
            call,
            candidates: vec![worker],
            prompt: Vec::new(),
            sampling: Sampling::default(),
            stop: Vec::new(),
            max_output: 0,
            ends: BTreeSet::new(),
            grammar: None,
            top_logprobs: None,
            embed: None,
            allow_fallbacks: false,
            part: Some(order),
            max_cost: None,
        }
    }
}

/// What happened.
#[derive(Debug, Clone)]
pub enum ConsumerEvent {
    Submit(Box<Submit>),
    /// Keys that were given up, of which one stands for all now: what was settled with them counts for it.
    Line {
        key: NodeKey,
        line: Vec<NodeKey>,
    },
    /// The client went away.
    Cancel {
        call: CallId,
    },
    /// A lead ordered so much of a worker so far, and so much of it came back through the ring: a worker's statements are
    /// signed up to what came back.
    Ordered {
        call: CallId,
        sent: PartUsage,
        returned: PartUsage,
        /// Of a worker that holds experts: `returned`, by expert.
        experts: Vec<ExpertCount>,
    },
    /// Tells a worker where its rows go next: to the worker of another call, or back to the lead.
    Route {
        call: CallId,
        slot: u64,
        downstream: Option<CallId>,
        next: NodeKey,
        addresses: Vec<String>,
        resend: Vec<Resend>,
        /// Under the node's own key, of the call's session.
        leading: Signed<hop::Leading>,
    },
    /// A ticket for the lead's own hop to the worker of this call.
    WantTicket {
        call: CallId,
    },
    /// Nothing more is wanted of the worker: its receipt is due.
    PartDone {
        call: CallId,
    },
    /// A worker gave rows that others who hold the same weights compute differently.
    WrongRows {
        worker: NodeKey,
        /// The question and both answers.
        statement: Vec<u8>,
    },
    /// The operator wants the remainder back.
    CloseSession {
        session: SessionId,
    },
    /// The invoice that [`ConsumerAction::MakeCloseInvoice`] asked for.
    CloseInvoice {
        session: SessionId,
        result: Result<String, String>,
    },
    /// The clock that this role is told was set, or the machine slept: what is due from providers is due from now.
    ClockMoved,
    LinkUp {
        link: LinkId,
    },
    LinkFailed {
        link: LinkId,
        reason: String,
    },
    LinkDown {
        link: LinkId,
        reason: String,
        /// It broke on the way: nobody closed it, and the provider may be there yet.
        lost: bool,
    },
    Control {
        link: LinkId,
        frame: ProviderControl,
    },
    Frame {
        link: LinkId,
        stream: StreamId,
        frame: ProviderFrame,
    },
    StreamClosed {
        link: LinkId,
        stream: StreamId,
    },
    PaymentSettled {
        hash: PaymentHash,
        preimage: Preimage,
        fee: Msat,
    },
    /// Nothing was paid and nothing will be.
    PaymentFailed {
        hash: PaymentHash,
        reason: String,
    },
    PaymentReceived {
        hash: PaymentHash,
        amount: Msat,
    },
    /// What the wallet can pay now.
    Payable(Msat),
    /// Lightning nodes with which the wallet has a usable channel of its own.
    DirectPeers(BTreeSet<LightningKey>),
    /// There is a reason to take no new work, or none any more. What runs goes on.
    Paused(Option<String>),
    Durable(Ticket),
    /// Two tree heads of one provider that exclude each other were found among what this node heard.
    SecondHistory(Box<FraudProof>),
    /// A tree head of a provider that this node heard from others: it is to be proved like those that it gave us.
    OthersHead(Box<SignedCheckpoint>),
    JournalFailed {
        reason: String,
    },
    Tick,
}

/// What the role asks of the world.
#[derive(Debug, Clone)]
pub enum ConsumerAction {
    Append(Append),
    Connect {
        link: LinkId,
        provider: NodeKey,
        addresses: Vec<String>,
        session: SessionIndex,
    },
    Control {
        link: LinkId,
        frame: ConsumerControl,
    },
    /// Opens a request stream whose first frame this is.
    OpenStream {
        link: LinkId,
        stream: StreamId,
        frame: ConsumerFrame,
    },
    Send {
        link: LinkId,
        stream: StreamId,
        frame: ConsumerFrame,
    },
    /// This side has no more to say on the stream; it ends when the provider has finished too.
    FinishStream {
        link: LinkId,
        stream: StreamId,
    },
    ResetStream {
        link: LinkId,
        stream: StreamId,
    },
    CloseLink {
        link: LinkId,
        code: CloseCode,
        reason: String,
    },
    Pay {
        slice: (SessionId, u32),
        hash: PaymentHash,
        bolt11: String,
        amount: Msat,
        max_fee: Msat,
    },
    /// After a restart: find out what became of this payment, and never pay it a second time.
    ResolvePayment {
        slice: (SessionId, u32),
        hash: PaymentHash,
        bolt11: String,
        amount: Msat,
        max_fee: Msat,
    },
    MakeCloseInvoice {
        session: SessionId,
        amount: Msat,
    },
    /// The journal has this wallet event: acknowledge it.
    WalletHandled {
        hash: PaymentHash,
    },
    Emit {
        call: CallId,
        emission: Emission,
    },
    /// Tell the market room: this provider broke that rule.
    Penalise {
        provider: NodeKey,
        rule: String,
    },
    /// Tell the operator: a call with so many tokens received went away from this provider before its end.
    Left {
        provider: NodeKey,
        received: u32,
        why: String,
    },
    /// Tell the market room: so much was settled with this provider, who wrote this fast where that could be seen.
    Settled {
        provider: NodeKey,
        amount: Msat,
        decode_mtok_s: Option<u64>,
    },
    /// Tell the market room what it cost to pay a slice to this provider.
    PaidSlice {
        provider: NodeKey,
        amount: Msat,
        fee: Msat,
    },
    /// A provider's tree head: keep it, and compare it with what was heard of that log elsewhere.
    Witness {
        note: String,
    },
    /// The journal is broken: take no work and tell the operator.
    Halt {
        reason: String,
    },
}

/// What a call hears.
#[derive(Debug, Clone)]
pub enum Emission {
    /// A provider took the request (again, after a failover).
    Started {
        provider: NodeKey,
        request: RequestId,
    },
    /// Of the tokens that come next; only where the call asks for them.
    Logprobs {
        entries: Vec<TokenLogprobs>,
    },
    Tokens {
        ids: Vec<u32>,
    },
    /// The row of the next text, in their order.
    Embedded {
        row: Vec<u8>,
    },
    /// A worker was ordered: this session, its key (which signs tickets), this request.
    Ordered {
        session: SessionId,
        key: NodeKey,
        request: RequestId,
    },
    /// The ticket that [`ConsumerEvent::WantTicket`] asked for.
    Ticket {
        ticket: Signed<hop::Ticket>,
    },
    Finished {
        reason: FinishReason,
        bill: Bill,
    },
    Failed {
        error: CallError,
        bill: Bill,
    },
}

/// What a call cost, one leg per provider that worked on it.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Bill {
    pub legs: Vec<Leg>,
}

/// One provider's part of a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leg {
    pub provider: NodeKey,
    pub request: RequestId,
    /// Absent where the provider vanished: then the charge is that of the last acknowledgement.
    pub receipt: Option<ReceiptId>,
    pub usage: TokenUsage,
    pub rates: RateCard,
    pub cost: Msat,
    /// Of a worker: its part in the request of the lead's customer.
    pub part: Option<satgrid_ledger::statements::Leg>,
    /// Of a worker that evaluated experts and gave a receipt: its counters.
    pub experts: Vec<ExpertCount>,
}

impl Bill {
    pub fn cost(&self) -> Msat {
        self.legs.iter().fold(Msat::ZERO, |sum, leg| sum.saturating_add(leg.cost))
    }
}

/// Why a call failed, by fault.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CallError {
    #[error("no provider could serve this: {why}")]
    NoProvider { why: String },
    #[error("{required} needed, {available} can be paid")]
    Funds { required: Msat, available: Msat, limit: FundsLimit },
    #[error("every provider that was tried failed; the last one: {reason}")]
    ProvidersFailed { reason: String },
    #[error("every provider that could serve this is busy; the last one: {reason}")]
    Full { reason: String },
    #[error("the call was cancelled")]
    Cancelled,
    #[error("too many calls wait already")]
    Busy,
    #[error("this node takes no new work: {reason}")]
    Paused { reason: String },
    #[error("this node's ledger cannot be written: {reason}")]
    Journal { reason: String },
}

/// Which limit money ran into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FundsLimit {
    /// What the wallet can pay through its channels.
    Wallet,
    /// The operator's cap on one session.
    SessionCap,
    /// The operator's cap on what may be lost at one moment.
    ExposureCap,
}

/// What the operator sees counted.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct ConsumerCounters {
    pub calls: u64,
    pub finished: u64,
    pub failed: u64,
    pub failovers: u64,
    /// Requests that went on at the same provider after their connection broke.
    pub resumed: u64,
    pub receipts: u64,
    pub slices: u64,
    pub misbehaviour: u64,
    pub refused_quotes: u64,
    /// Times that a remainder was asked for again on a credit note.
    pub refunds_asked_again: u64,
    /// Credit notes that were spent in other sessions.
    pub notes_spent: u64,
    /// Inclusion promises, and those that a proof has kept.
    pub promises: u64,
    pub promises_kept: u64,
    /// Sessions that could not be resumed; what was left in them is a claim.
    pub lost_sessions: u64,
}
