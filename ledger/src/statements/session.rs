//! Statements that open, fund and close a session, and the acknowledgements between.

use minicbor::{Decode, Encode};
use satgrid_types::{
    AckId, BothSigned, Digest, Msat, NodeKey, Numerators, QuoteId, ReceiptId, RequestId, SessionId, Statement,
    TokenUsage, UnixMs, Verified, cbor,
};
use sha2::{Digest as _, Sha256};

/// Where a provider sends what is left at the end.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum RefundTo {
    /// The consumer's node issues an invoice when it closes the session.
    #[n(0)]
    InvoiceAtClose,
    #[n(1)]
    Bolt12(#[n(0)] String),
    #[n(2)]
    LightningAddress(#[n(0)] String),
    /// A BOLT 11 invoice without an amount.
    #[n(3)]
    Bolt11(#[n(0)] String),
}

/// The consumer accepts a quote and opens a session. Its id names the session.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct SessionOpen {
    #[n(0)]
    pub version: u32,
    #[n(1)]
    pub provider: NodeKey,
    /// The session key: signs everything the consumer says here, and is its TLS key.
    #[n(2)]
    pub consumer: NodeKey,
    #[n(3)]
    pub quote: QuoteId,
    #[n(4)]
    pub refund_to: RefundTo,
    /// The consumer pays no slice that would bring the session's total above this.
    #[n(5)]
    pub spend_cap: Msat,
    #[n(6)]
    pub opened_at: UnixMs,
}

impl SessionOpen {
    pub const VERSION: u32 = 1;
}
impl Statement for SessionOpen {
    const KIND: &'static str = "session-open";
    const MAX_LEN: usize = 4 * 1024;
}

/// The id of a session: that of its open statement.
pub fn session_id(open: &Verified<SessionOpen>) -> SessionId {
    SessionId(open.id())
}

/// What one slice invoice pays for. SHA-256 of its canonical bytes is the invoice's description hash, so the
/// invoice's own signature covers these terms.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct SliceDescriptor {
    #[n(0)]
    pub version: u32,
    #[n(1)]
    pub session: SessionId,
    /// 0, 1, 2, ... within the session.
    #[n(2)]
    pub k: u32,
    #[n(3)]
    pub amount: Msat,
    #[n(4)]
    pub quote: QuoteId,
    #[n(5)]
    pub provider: NodeKey,
    #[n(6)]
    pub consumer: NodeKey,
    /// The session's last receipt when the invoice was issued.
    #[n(7)]
    pub previous_receipt: Option<ReceiptId>,
}

impl SliceDescriptor {
    pub const VERSION: u32 = 1;
    pub fn description_hash(&self) -> Digest {
        Digest(Sha256::digest(cbor::encode(self)).into())
    }
}

/// A request at a quote, signed by the consumer: acknowledgement 0. It fixes the prompt's token count and costs nothing.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct RequestOpen {
    #[n(0)]
    pub version: u32,
    #[n(1)]
    pub session: SessionId,
    #[n(2)]
    pub request: RequestId,
    #[n(3)]
    pub quote: QuoteId,
    #[n(4)]
    pub prompt_tokens: u32,
    #[n(5)]
    pub max_output: u32,
    /// `private_hash` over the canonical bytes of [`super::RequestPrivate`].
    #[n(6)]
    pub private_hash: Digest,
    #[n(7)]
    pub opened_at: UnixMs,
    /// In a session between a lead and its worker: the work that is ordered. Then there is no prompt and no output.
    #[n(8)]
    pub part: Option<super::PartOrder>,
}

impl RequestOpen {
    pub const VERSION: u32 = 1;
}
impl Statement for RequestOpen {
    const KIND: &'static str = "request-open";
    const MAX_LEN: usize = 1024;
}

/// A cumulative statement about one request that both sides sign: the claim that either can show to anyone.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Ack {
    #[n(0)]
    pub version: u32,
    #[n(1)]
    pub session: SessionId,
    #[n(2)]
    pub request: RequestId,
    /// 1, 2, 3, ... within the request; 0 is the request itself.
    #[n(3)]
    pub seq: u32,
    /// Prompt tokens evaluated or taken from the cache so far, and output tokens sent so far.
    #[n(4)]
    pub usage: TokenUsage,
    /// Of this request, at the rates of its quote.
    #[n(5)]
    pub numerators: Numerators,
    /// `ceil(numerators / 1,000,000)`: what this request would cost alone. The session's charge is rounded once, over all.
    #[n(6)]
    pub cost: Msat,
    #[n(7)]
    pub running_hash: Digest,
}

impl Ack {
    pub const VERSION: u32 = 1;
}
impl Statement for Ack {
    const KIND: &'static str = "ack";
    const MAX_LEN: usize = 512;
}

/// The id of an acknowledgement that both signed.
pub fn ack_id(ack: &BothSigned<Ack>) -> AckId {
    AckId(ack.id())
}

/// The consumer ends the session and asks for the remainder.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct SessionClose {
    #[n(0)]
    pub version: u32,
    #[n(1)]
    pub session: SessionId,
    #[n(2)]
    pub last_receipt: Option<ReceiptId>,
    /// By the consumer's own books: paid slices less charges.
    #[n(3)]
    pub remainder: Msat,
    /// Where to pay it; none where it is dust.
    #[n(4)]
    pub invoice: Option<String>,
    #[n(5)]
    pub closed_at: UnixMs,
}

impl SessionClose {
    pub const VERSION: u32 = 1;
}
impl Statement for SessionClose {
    const KIND: &'static str = "session-close";
    const MAX_LEN: usize = 4 * 1024;
}

/// Why a remainder was not paid out at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum CreditReason {
    /// Below the terms' refund dust.
    #[n(0)]
    Dust,
    /// Nothing payable above the channel reserve, or no route within the fee cap.
    #[n(1)]
    Unpayable,
    /// The session ended without the consumer (idle), who gave no other destination.
    #[n(2)]
    NoDestination,
}

/// A remainder that the provider still owes. The old session's key may ask for it, or spend it in another session.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct CreditNote {
    #[n(0)]
    pub version: u32,
    #[n(1)]
    pub session: SessionId,
    #[n(2)]
    pub provider: NodeKey,
    #[n(3)]
    pub consumer: NodeKey,
    #[n(4)]
    pub amount: Msat,
    #[n(5)]
    pub reason: CreditReason,
    #[n(6)]
    pub issued_at: UnixMs,
    #[n(7)]
    pub valid_until: UnixMs,
}

impl CreditNote {
    pub const VERSION: u32 = 1;
    /// 30 days.
    pub const VALIDITY_MS: u64 = 30 * 24 * 3_600 * 1_000;
}
impl Statement for CreditNote {
    const KIND: &'static str = "credit-note";
    const MAX_LEN: usize = 512;
}
