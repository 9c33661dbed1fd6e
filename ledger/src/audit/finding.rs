//! What an audit says: findings, each with a stable rule, and totals that were recomputed.

use crate::bundle::Filter;
use core::fmt;
use satgrid_types::{Digest, NodeKey, PaymentHash, RequestId, SessionId, UnixMs};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// Findings kept in a report; further ones are counted only.
pub const MAX_FINDINGS: usize = 1_000;

macro_rules! rules {
    ($($(#[$doc:meta])* $name:ident = $id:literal,)*) => {
        /// What was found to be broken. The text form is stable; docs/ledger-format.md lists it.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Rule {
            $($(#[$doc])* $name,)*
        }
        impl Rule {
            pub const ALL: &'static [Rule] = &[$(Rule::$name,)*];
            /// The rule's stable id.
            pub const fn id(&self) -> &'static str {
                match self {
                    $(Rule::$name => $id,)*
                }
            }
        }
    };
}

rules! {
    /// The header does not name the node whose journal follows.
    BundleNode = "bundle/node",
    /// An entry that the header's filter does not select.
    BundleFilter = "bundle/filter",
    /// The checkpoint is not a note signed by the journal's node.
    LogCheckpoint = "log/checkpoint",
    /// The entries' Merkle root is not the checkpoint's.
    LogRoot = "log/root",
    /// Not as many entries as the checkpoint says.
    LogSize = "log/size",
    /// An inclusion proof does not lead to the checkpoint's root, or is missing.
    LogInclusion = "log/inclusion",
    /// An entry's bytes are not the one encoding of an entry.
    EntryCanonical = "entry/canonical",
    /// A number is missing, repeated or out of order.
    EntrySequence = "entry/sequence",
    /// An entry is not chained to the one before.
    EntryChain = "entry/chain",
    /// An entry is dated before the one before it.
    EntryClock = "entry/clock",
    /// The journal does not begin with exactly one genesis.
    EntryGenesis = "entry/genesis",
    /// A signed statement's bytes are not canonical.
    StatementCanonical = "statement/canonical",
    /// A statement is not signed by whom it must be.
    StatementSignature = "statement/signature",
    /// A statement of a version that this program does not know.
    StatementVersion = "statement/version",
    /// A statement about a session that was not opened, or is over.
    StatementSession = "statement/session",
    /// A listing's event, tags or key bindings do not hold.
    ListingInvalid = "listing/invalid",
    /// A quote names a listing that the journal does not hold.
    QuoteListing = "quote/listing",
    /// A quote is dearer than its listing.
    QuoteDearer = "quote/dearer",
    /// A quote promises another model, build or node than its listing, or was made after the listing expired.
    QuoteTerms = "quote/terms",
    /// A session accepts a quote that is not there, not for its key or no longer valid.
    OpenQuote = "open/quote",
    /// A session was opened twice.
    OpenTwice = "open/twice",
    /// More was paid than the consumer allowed when it opened the session.
    OpenSpendCap = "open/spend-cap",
    /// Not a BOLT 11 invoice with a valid signature, or of another network.
    InvoiceSignature = "invoice/signature",
    /// An invoice does not pay the Lightning node of the quote.
    InvoicePayee = "invoice/payee",
    /// The description hash is not that of the slice's terms.
    InvoiceTerms = "invoice/terms",
    /// The invoice's amount is not the slice's.
    InvoiceAmount = "invoice/amount",
    /// The slice's terms name another session, slice, quote or party.
    InvoiceDescriptor = "invoice/descriptor",
    /// A payment hash that was used before, in any session.
    InvoiceReuse = "invoice/reuse",
    /// Slice numbers leave a gap, or one is invoiced again while its old invoice may still be paid.
    InvoiceSequence = "invoice/sequence",
    /// A payment that no invoice or attempt asked for.
    PaymentUnknown = "payment/unknown",
    /// The preimage does not hash to the payment hash.
    PaymentPreimage = "payment/preimage",
    /// A payment over another amount than its invoice.
    PaymentAmount = "payment/amount",
    /// A payment that was settled or received twice.
    PaymentTwice = "payment/twice",
    /// A second payment while another of the session is in flight.
    PaymentInFlight = "payment/in-flight",
    /// A request at a quote that the session does not have, or one that was opened before.
    RequestInvalid = "request/invalid",
    /// An acknowledgement or a receipt of a request that is not open.
    RequestUnknown = "request/unknown",
    /// Acknowledgements out of order.
    AckSequence = "ack/sequence",
    /// An acknowledgement's counts shrink, contradict themselves or exceed the request.
    AckUsage = "ack/usage",
    /// An acknowledgement's numerators or cost are not those of its usage.
    AckCost = "ack/cost",
    /// A receipt is not chained to the session's last.
    ReceiptChain = "receipt/chain",
    /// A receipt's rates, model, build or parties are not the quote's.
    ReceiptTerms = "receipt/terms",
    /// A receipt's counts contradict the request or its acknowledgements.
    ReceiptUsage = "receipt/usage",
    /// A receipt's numerators or cost are not those of its usage.
    ReceiptCost = "receipt/cost",
    /// A receipt's running totals are not the session's.
    ReceiptCumulative = "receipt/cumulative",
    /// A receipt's slices are not payments of the session, or stand in an earlier receipt.
    ReceiptSlices = "receipt/slices",
    /// A receipt names another last acknowledgement than the one that both signed.
    ReceiptLastAck = "receipt/last-ack",
    /// The private fields beside a receipt are not what it commits to.
    ReceiptOpening = "receipt/opening",
    /// A worker's counts are not those of its order, or its receipt states another order than the request.
    StageWork = "stage/work",
    /// The stage root is not that over the workers' receipts in the journal, or a lead states one without the other.
    StageRoot = "stage/root",
    /// The lead's and the workers' layer ranges do not tile the model.
    StageTiling = "stage/tiling",
    /// Layers of one request evaluated different numbers of positions for the first time, or what was sold is said to be lost.
    StageConservation = "stage/conservation",
    /// The rows that one stage sent are not those that the next received.
    StageRows = "stage/rows",
    /// A worker's receipt for a request whose own receipt was written before: it belongs to none.
    StageOrphan = "stage/orphan",
    /// A worker's counters of expert rows are not those that it charges for, or out of order.
    ExpertWork = "expert/work",
    /// The expert root is not that over the workers' receipts in the journal, or a lead states one without the other.
    ExpertRoot = "expert/root",
    /// At some layer the experts evaluated other rows than the router sent.
    ExpertConservation = "expert/conservation",
    /// An abandoned request is not charged at its last countersigned acknowledgement.
    AbandonedCharge = "abandoned/charge",
    /// A session was closed a second time.
    CloseTwice = "close/twice",
    /// The remainder of a close is not what was paid less what was charged.
    CloseRemainder = "close/remainder",
    /// A credit note over another amount than what is still owed.
    CreditNoteAmount = "credit-note/amount",
    /// A credit note spent twice, for another amount than is owed by it, or in a session that cannot take it.
    CreditNoteSpent = "credit-note/spent",
    /// A refund that nobody attempted, over another amount, or above what is owed.
    RefundInvalid = "refund/invalid",
    /// An inclusion promise that the provider's log breaks, or by another than the provider.
    PromiseBroken = "promise/broken",
    /// A transfer id with two contents, a zero amount or one account on both sides.
    TransferMalformed = "transfer/malformed",
    /// A pending transfer ended twice, posted for more than it held, or expired before its time.
    TransferTwoPhase = "transfer/two-phase",
    /// An account that must not be negative is overdrawn.
    TransferOverdrawn = "transfer/overdrawn",
    /// The transfers are not those that the entry's evidence justifies.
    TransferUnbacked = "transfer/unbacked",
    /// A reservation that outlived its timeout.
    TransferOverdue = "transfer/overdue",
    /// Debits are not credits.
    TransferTrial = "transfer/trial",
    /// The wallet held less than what was owed.
    WalletInsolvent = "wallet/insolvent",
    /// Both parties' exports disagree about a session.
    CrossMismatch = "cross/mismatch",
    /// A session of one party is missing in the other's export.
    CrossMissing = "cross/missing",
    /// Something that proves nothing in a claim, or too much of it.
    ClaimPiece = "claim/piece",
    /// A refund that is not proven.
    ClaimRefund = "claim/refund",
    /// A claim by whose own evidence nothing is owed.
    ClaimNothing = "claim/nothing-owed",
    /// A claim that leaves out what its maker signed or received.
    ClaimContradicted = "claim/contradicted",
    /// Two checkpoints of one size with different roots.
    Fraud = "log/two-histories",
}

impl Rule {
    /// Whether statements that the accused signed break this rule by themselves, whatever else the file holds or lacks.
    /// Findings of all other rules rest on the file: who leaves out, repeats or moves an entry of its own makes them too.
    pub const fn is_proven_by_signature(&self) -> bool {
        matches!(self, Rule::QuoteDearer | Rule::QuoteTerms | Rule::ExpertWork | Rule::PromiseBroken | Rule::Fraud)
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.id())
    }
}

impl Serialize for Rule {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(self.id())
    }
}

/// Whose doing a finding is, as far as the evidence tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(tag = "role", content = "key", rename_all = "kebab-case")]
pub enum Party {
    /// Whoever keeps the journal or made the file.
    Exporter,
    Provider(NodeKey),
    Consumer(NodeKey),
    /// The provider's signed statement does not fit the rest of the file, which is the exporter's to choose.
    ExporterOrProvider(NodeKey),
    /// The same with the consumer's.
    ExporterOrConsumer(NodeKey),
}

impl Party {
    /// Whom a finding in a single file names: a party alone only where its own signatures prove it.
    pub(crate) fn in_one_file(self, rule: Rule) -> Party {
        match self {
            Party::Provider(key) if !rule.is_proven_by_signature() => Party::ExporterOrProvider(key),
            Party::Consumer(key) if !rule.is_proven_by_signature() => Party::ExporterOrConsumer(key),
            Party::Exporter
            | Party::Provider(_)
            | Party::Consumer(_)
            | Party::ExporterOrProvider(_)
            | Party::ExporterOrConsumer(_) => self,
        }
    }
}

impl fmt::Display for Party {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Party::Exporter => f.write_str("exporter"),
            Party::Provider(key) => write!(f, "provider {}", key.short()),
            Party::Consumer(key) => write!(f, "consumer {}", key.short()),
            Party::ExporterOrProvider(key) => write!(f, "provider {} or exporter", key.short()),
            Party::ExporterOrConsumer(key) => write!(f, "consumer {} or exporter", key.short()),
        }
    }
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub rule: Rule,
    /// The entry's number; absent where the file as a whole is meant.
    pub entry: Option<u64>,
    pub session: Option<SessionId>,
    pub party: Party,
    pub detail: String,
}

/// Sums over one side of the journal, recomputed from evidence that was verified.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct SideTotals {
    pub sessions: u64,
    pub requests: u64,
    pub receipts: u64,
    pub abandoned: u64,
    pub acks: u64,
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    pub output_tokens: u64,
    pub slices: u64,
    pub paid_msat: u64,
    pub charged_msat: u64,
    pub refunded_msat: u64,
}

/// Balances at the end, by kind of account; msat, in each account's normal direction.
pub type Balances = BTreeMap<&'static str, i128>;

/// What both parties must agree on about one session.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize)]
pub struct SessionSummary {
    pub provider: Option<NodeKey>,
    pub consumer: Option<NodeKey>,
    pub as_provider: bool,
    pub quotes: Vec<String>,
    pub receipts: u64,
    pub last_receipt: Option<String>,
    /// Settled slices by number: payment hash and msat.
    pub slices: BTreeMap<u32, (String, u64)>,
    /// Requests without a receipt that are over: their last acknowledgement and numerators.
    pub abandoned: BTreeMap<String, (Option<String>, u64)>,
    pub prompt_tokens: u64,
    pub output_tokens: u64,
    pub numerators: u64,
    pub paid_msat: u64,
    pub charged_msat: u64,
    pub refunded_msat: u64,
    /// Credit notes of other sessions that were spent here, and this session's spent in others.
    pub credited_msat: u64,
    pub spent_msat: u64,
    pub closed: bool,
    /// What one side signed and the other must hold too: requests by the consumer, invoices and credit notes by the
    /// provider. Kept for cross-checks only.
    #[serde(skip)]
    pub(crate) requests: BTreeSet<RequestId>,
    #[serde(skip)]
    pub(crate) invoices: BTreeSet<PaymentHash>,
    #[serde(skip)]
    pub(crate) notes: BTreeSet<[u8; 32]>,
    /// Receipts as they stand in this log, for promises: receipt, index, leaf. Kept for cross-checks only.
    #[serde(skip)]
    pub(crate) logged: Vec<([u8; 32], u64, Digest)>,
    /// Promises by the provider: receipt, index, leaf.
    #[serde(skip)]
    pub(crate) promised: Vec<([u8; 32], u64, Digest)>,
}

/// The verdict on one journal's bundle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The key by which the checkpoint is signed.
    pub node: NodeKey,
    /// Every key that was the node's, the newest last.
    pub keys: Vec<NodeKey>,
    pub filter: Filter,
    /// Entries read, and entries that the checkpoint covers.
    pub entries: u64,
    pub checkpoint_size: Option<u64>,
    pub checkpoint_root: Option<Digest>,
    pub first_at: Option<UnixMs>,
    pub last_at: Option<UnixMs>,
    pub as_provider: SideTotals,
    pub as_consumer: SideTotals,
    pub balances: Balances,
    /// Reservations still open at the end: number and msat.
    pub open_holds: u64,
    pub open_holds_msat: u64,
    /// Proofs of misbehaviour that the exporter keeps against others.
    pub misbehaviour: u64,
    /// The first [`MAX_FINDINGS`].
    pub findings: Vec<Finding>,
    pub findings_total: u64,
    /// Per session, where asked for.
    pub sessions: BTreeMap<SessionId, SessionSummary>,
}

impl Report {
    pub fn is_clean(&self) -> bool {
        self.findings_total == 0
    }
    /// Adds a finding; beyond [`MAX_FINDINGS`] it is only counted.
    pub fn push(&mut self, finding: Finding) {
        self.findings_total = self.findings_total.saturating_add(1);
        if self.findings.len() < MAX_FINDINGS {
            self.findings.push(finding);
        }
    }
    /// Whether some finding is of this rule.
    pub fn has(&self, rule: Rule) -> bool {
        self.findings.iter().any(|finding| finding.rule == rule)
    }
}
