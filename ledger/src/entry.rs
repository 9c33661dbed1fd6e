//! What the journal holds: entries, each with its evidence and the transfers that the evidence justifies.
//!
//! A role asks for a [`Draft`]; the journal numbers it, stamps it, chains it to the entry before and makes it durable:
//! an [`Entry`]. An entry's canonical bytes are a leaf of the Merkle log and never change. The one thing kept beside
//! them is a receipt's [`ReceiptOpening`], which the leaf commits to through the receipt's `private_hash` but does not
//! contain: leaving it out of an export redacts prompt and output hashes without touching a leaf.

use crate::{
    log::leaf_hash,
    statements::{
        Ack, CreditNote, CreditTransfer, InclusionPromise, Receipt, ReceiptOpening, RequestOpen, SessionClose,
        SessionOpen, SliceDescriptor,
    },
    transfer::Transfer,
};
use minicbor::{Decode, Encode};
use satgrid_types::{
    AckId, BothSigned, Digest, LightningKey, Msat, NodeKey, NostrKey, Numerators, PaymentHash, Preimage, Quote,
    RequestId, SessionId, Signed, SignedSuccession, UnixMs, cbor, cbor::CodecError,
};

/// No entry is longer, in bytes. A listing event is the largest thing that one holds.
pub const MAX_ENTRY_LEN: usize = 192 * 1024;
const _: () = assert!(satgrid_types::MAX_EVENT_BYTES + 16 * 1024 <= MAX_ENTRY_LEN);

/// No opening is longer, in bytes: a full map of biased tokens is the largest thing in it.
pub const MAX_OPENING_LEN: usize = 32 * 1024;

/// Why an entry exists. Statements are kept as they were signed; facts from the wallet are this node's own word.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub enum Evidence {
    /// The first entry: whose journal this is. Sessions where `node`, or a key that came after it, is the provider are its
    /// provider side.
    #[n(0)]
    Genesis {
        #[n(0)]
        node: NodeKey,
        #[n(1)]
        nostr: NostrKey,
        #[n(2)]
        lightning: LightningKey,
        #[n(3)]
        network: String,
    },
    /// A listing's Nostr event as received, before the first quote that names it.
    #[n(1)]
    Listing {
        #[n(0)]
        event_json: String,
    },
    #[n(2)]
    Quote(#[n(0)] Signed<Quote>),
    #[n(3)]
    Open(#[n(0)] Signed<SessionOpen>),
    /// A slice's invoice, issued (provider) or received and checked (consumer).
    #[n(4)]
    Invoice {
        #[n(0)]
        session: SessionId,
        #[n(1)]
        k: u32,
        #[n(2)]
        bolt11: String,
        #[n(3)]
        descriptor: SliceDescriptor,
    },
    /// Consumer: about to pay. Appended before the wallet is asked.
    #[n(5)]
    PaymentAttempted {
        #[n(0)]
        session: SessionId,
        #[n(1)]
        k: u32,
        #[n(2)]
        payment_hash: PaymentHash,
        #[n(3)]
        max_fee: Msat,
    },
    /// Consumer: the wallet has the preimage.
    #[n(6)]
    PaymentSettled {
        #[n(0)]
        payment_hash: PaymentHash,
        #[n(1)]
        preimage: Preimage,
        #[n(2)]
        amount: Msat,
        #[n(3)]
        fee: Msat,
    },
    /// The wallet says that this payment (a slice or a refund) failed for good.
    #[n(7)]
    PaymentFailed {
        #[n(0)]
        payment_hash: PaymentHash,
        #[n(1)]
        reason: String,
    },
    /// Provider: a slice arrived. `amount` is what the wallet received; the invoice's amount is credited and a
    /// difference (a just-in-time channel's fee) is booked to routing fees.
    #[n(8)]
    PaymentReceived {
        #[n(0)]
        payment_hash: PaymentHash,
        #[n(1)]
        amount: Msat,
    },
    #[n(9)]
    Request(#[n(0)] Signed<RequestOpen>),
    #[n(10)]
    Ack(#[n(0)] BothSigned<Ack>),
    #[n(11)]
    Receipt {
        #[n(0)]
        receipt: BothSigned<Receipt>,
        /// Kept beside the entry, never in its bytes.
        #[cbor(skip)]
        opening: Option<ReceiptOpening>,
    },
    /// A request ended without a receipt: charged at the last countersigned ack, which `numerators` repeats.
    #[n(12)]
    Abandoned {
        #[n(0)]
        session: SessionId,
        #[n(1)]
        request: RequestId,
        /// Absent where none was countersigned: then `numerators` is zero.
        #[n(2)]
        last_ack: Option<AckId>,
        #[n(3)]
        numerators: Numerators,
    },
    #[n(13)]
    Close(#[n(0)] Signed<SessionClose>),
    #[n(14)]
    CreditNote(#[n(0)] Signed<CreditNote>),
    /// Provider: about to pay a remainder back.
    #[n(15)]
    RefundAttempted {
        #[n(0)]
        session: SessionId,
        #[n(1)]
        payment_hash: PaymentHash,
        #[n(2)]
        amount: Msat,
        #[n(3)]
        max_fee: Msat,
    },
    #[n(16)]
    RefundSettled {
        #[n(0)]
        session: SessionId,
        #[n(1)]
        payment_hash: PaymentHash,
        #[n(2)]
        amount: Msat,
        #[n(3)]
        fee: Msat,
        /// Absent where the wallet does not tell it (BOLT 12 over some wallets).
        #[n(4)]
        preimage: Option<Preimage>,
    },
    /// Consumer: the remainder came back.
    #[n(17)]
    RefundReceived {
        #[n(0)]
        session: SessionId,
        #[n(1)]
        payment_hash: PaymentHash,
        #[n(2)]
        amount: Msat,
    },
    #[n(18)]
    ChannelClosed {
        #[n(0)]
        channel: String,
        #[n(1)]
        reason: String,
        #[n(2)]
        force: bool,
    },
    /// Kept proof against a peer: a dear quote, an overcount, a bad invoice.
    #[n(19)]
    Misbehaviour {
        #[n(0)]
        peer: NodeKey,
        #[n(1)]
        rule: String,
        #[cbor(n(2), with = "minicbor::bytes")]
        statement: Vec<u8>,
    },
    /// What the wallet itself holds: solvency is checked here.
    #[n(20)]
    WalletSnapshot {
        #[n(0)]
        lightning_msat: Msat,
        #[n(1)]
        onchain_msat: Msat,
    },
    /// A signed tree head that this node published over all entries before this one.
    #[n(21)]
    Checkpoint {
        #[n(0)]
        note: String,
    },
    /// Consumer: the provider's promise that a receipt is in its log.
    #[n(22)]
    Promise(#[n(0)] Signed<InclusionPromise>),
    /// A credit note was spent: what its session was owed is the balance of another one.
    #[n(23)]
    CreditTransfer(#[n(0)] BothSigned<CreditTransfer>),
    /// A Lightning payment of the operator's own, of no session: by hand, by a sweep, by another app of theirs.
    #[n(24)]
    WalletPayment {
        #[n(0)]
        payment_hash: PaymentHash,
        #[n(1)]
        inbound: bool,
        #[n(2)]
        amount: Msat,
        /// What the route took on top; zero inbound.
        #[n(3)]
        fee: Msat,
        #[n(4)]
        preimage: Option<Preimage>,
    },
    /// A confirmed transaction of the wallet's coins: a channel opened or closed, coins in, coins out.
    #[n(25)]
    OnChain {
        /// As it is hashed, so the reverse of how people write it.
        #[n(0)]
        txid: Digest,
        #[n(1)]
        inbound: bool,
        /// Into or out of the wallet's coins, the fee left out.
        #[n(2)]
        amount: Msat,
        /// What we paid to the miners; zero inbound.
        #[n(3)]
        fee: Msat,
    },
    /// This node's key gave way to another, which signs from here on, or to none.
    #[n(26)]
    Succession(#[n(0)] SignedSuccession),
}

impl Evidence {
    /// One word for tables.
    pub fn kind(&self) -> &'static str {
        match self {
            Evidence::Genesis { .. } => "genesis",
            Evidence::Listing { .. } => "listing",
            Evidence::Quote(_) => "quote",
            Evidence::Open(_) => "open",
            Evidence::Invoice { .. } => "invoice",
            Evidence::PaymentAttempted { .. } => "payment-attempted",
            Evidence::PaymentSettled { .. } => "payment-settled",
            Evidence::PaymentFailed { .. } => "payment-failed",
            Evidence::PaymentReceived { .. } => "payment-received",
            Evidence::Request(_) => "request",
            Evidence::Ack(_) => "ack",
            Evidence::Receipt { .. } => "receipt",
            Evidence::Abandoned { .. } => "abandoned",
            Evidence::Close(_) => "close",
            Evidence::CreditNote(_) => "credit-note",
            Evidence::RefundAttempted { .. } => "refund-attempted",
            Evidence::RefundSettled { .. } => "refund-settled",
            Evidence::RefundReceived { .. } => "refund-received",
            Evidence::ChannelClosed { .. } => "channel-closed",
            Evidence::Misbehaviour { .. } => "misbehaviour",
            Evidence::WalletSnapshot { .. } => "wallet-snapshot",
            Evidence::Checkpoint { .. } => "checkpoint",
            Evidence::Promise(_) => "promise",
            Evidence::CreditTransfer(_) => "credit-transfer",
            Evidence::WalletPayment { .. } => "wallet-payment",
            Evidence::OnChain { .. } => "on-chain",
            Evidence::Succession(_) => "succession",
        }
    }
}

/// What a role asks to append, atomically: all of it becomes durable or none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Draft {
    pub evidence: Option<Evidence>,
    pub transfers: Vec<Transfer>,
}

impl Draft {
    pub fn of(evidence: Evidence) -> Draft {
        Draft { evidence: Some(evidence), transfers: Vec::new() }
    }
    #[must_use]
    pub fn with(mut self, transfers: impl IntoIterator<Item = Transfer>) -> Draft {
        self.transfers.extend(transfers);
        self
    }
}

/// Where a journal stands: what the next entry is chained to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// Number of entries, and the sequence number of the next one.
    pub len: u64,
    /// Leaf hash of the last entry; zeros while there is none.
    pub last: Digest,
    /// The last entry's time.
    pub at: UnixMs,
}

impl Head {
    pub const EMPTY: Head = Head { len: 0, last: Digest([0; 32]), at: UnixMs(0) };
}

/// A durable, immutable entry of the journal; its canonical bytes are a leaf of the log.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Entry {
    /// 0, 1, 2, ... without gaps.
    #[n(0)]
    pub seq: u64,
    /// Never before the entry before: a clock that was set back is held still until it has caught up.
    #[n(1)]
    pub at: UnixMs,
    /// Leaf hash of the entry before; zeros in the first.
    #[n(2)]
    pub prev: Digest,
    #[n(3)]
    pub evidence: Option<Evidence>,
    #[n(4)]
    pub transfers: Vec<Transfer>,
}

impl Entry {
    /// The entry that `draft` becomes on top of `head`.
    pub fn chain(head: &Head, at: UnixMs, draft: Draft) -> Entry {
        Entry {
            seq: head.len,
            at: at.max(head.at),
            prev: head.last,
            evidence: draft.evidence,
            transfers: draft.transfers,
        }
    }
    /// Canonical bytes, without the opening.
    pub fn bytes(&self) -> Vec<u8> {
        cbor::encode(self)
    }
    /// Reads an entry; refuses more than [`MAX_ENTRY_LEN`] bytes and any but the canonical form.
    pub fn decode(bytes: &[u8]) -> Result<Entry, CodecError> {
        cbor::decode_limited(bytes, MAX_ENTRY_LEN)
    }
    /// Hash of these bytes as a leaf of the log.
    pub fn leaf(&self) -> Digest {
        leaf_hash(&self.bytes())
    }
    /// The journal's head once this entry is its last.
    pub fn head(&self) -> Head {
        Head { len: self.seq.saturating_add(1), last: self.leaf(), at: self.at }
    }
    pub fn draft(&self) -> Draft {
        Draft { evidence: self.evidence.clone(), transfers: self.transfers.clone() }
    }
    /// The private fields kept beside a receipt, unless they were redacted.
    pub fn opening(&self) -> Option<&ReceiptOpening> {
        match &self.evidence {
            Some(Evidence::Receipt { opening, .. }) => opening.as_ref(),
            _ => None,
        }
    }
    /// Puts an opening back beside its receipt; ignored on any other entry.
    pub fn set_opening(&mut self, given: Option<ReceiptOpening>) {
        if let Some(Evidence::Receipt { opening, .. }) = &mut self.evidence {
            *opening = given;
        }
    }
}
