//! The frames of a session.
//!
//! One QUIC connection carries one session: the consumer's TLS key is its session key. The consumer opens one control
//! stream, then one stream per request. Each direction of each kind of stream has an enum of its own, so that a frame
//! in the wrong place does not decode. A frame on the wire is a u32 big-endian length and that many bytes of canonical
//! CBOR: the array `[number of the variant, fields]`.
//!
//! | stream | consumer says | provider says |
//! |---|---|---|
//! | control | [`ConsumerControl`] | [`ProviderControl`] |
//! | request | [`ConsumerFrame`] | [`ProviderFrame`] |

use crate::hop::{Leading, Ticket};
use minicbor::{Decode, Encode, bytes::ByteVec};
use satgrid_ledger::statements::{
    Ack, CreditNote, CreditTransfer, InclusionPromise, Receipt, RequestOpen, RequestPrivate, SessionClose, SessionOpen,
    SliceDescriptor,
};
use satgrid_types::{
    BothSigned, Digest, FinishReason, ListingId, ModelRoot, Msat, NodeKey, Numerators, PaymentHash, Quote, ReceiptId,
    RequestId, Salt, SessionId, Signature, Signed,
    cbor::{self, CodecError},
};

/// No frame is longer, in bytes: a prompt of [`MAX_PROMPT_TOKENS`] five-byte ids and room for the rest.
pub const MAX_FRAME: usize = 1 << 20;
/// Longest prompt that a request may carry, in tokens.
pub const MAX_PROMPT_TOKENS: usize = 128 * 1024;
/// Tokens are flushed at every engine step; a chunk never holds more.
pub const MAX_CHUNK_TOKENS: usize = 32;
/// Stop strings of one request.
pub const MAX_STOPS: usize = 16;
/// Longest encoding of a request's grammar, in bytes.
pub const MAX_GRAMMAR: usize = 192 * 1024;
/// Texts that one request embeds.
pub const MAX_TEXTS: usize = 2_048;
/// Longest row of an embedded text, in bytes.
pub const MAX_ROW: usize = satgrid_types::MAX_EMBEDDING as usize * 4;
/// Likeliest tokens whose log probabilities may be asked for.
pub const MAX_TOP_LOGPROBS: u32 = 20;
/// Open requests that a resume may speak of.
pub const MAX_OPEN_REQUESTS: usize = 64;
/// Longest reason text, in bytes.
pub const MAX_REASON: usize = 512;

const _: () =
    assert!(MAX_PROMPT_TOKENS * 5 + MAX_GRAMMAR + 64 * 1024 <= MAX_FRAME, "the longest prompt fits one frame");
const _: () = assert!(MAX_TEXTS * 5 <= MAX_GRAMMAR && MAX_ROW + 1024 <= MAX_FRAME, "texts and rows do too");

/// Version and features that each side states first.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Hello {
    #[n(0)]
    pub version: u32,
    /// Names of optional abilities; unknown ones are ignored.
    #[n(1)]
    pub features: Vec<String>,
}

impl Hello {
    pub const VERSION: u32 = 1;
    /// This side speaks of its log: promises, tree heads, proofs.
    pub const LOG: &'static str = "log";
    /// This side spends credit notes in other sessions.
    pub const CREDIT: &'static str = "credit";
    pub fn speaks_of_its_log(&self) -> bool {
        self.features.iter().any(|feature| feature == Hello::LOG)
    }
    pub fn spends_credit(&self) -> bool {
        self.features.iter().any(|feature| feature == Hello::CREDIT)
    }
    pub fn ours() -> Hello {
        Hello { version: Hello::VERSION, features: vec!["whole".into(), Hello::LOG.into(), Hello::CREDIT.into()] }
    }
}

/// Why a provider will not do what it was asked. Text for people goes beside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum Refusal {
    /// The listing or model is not (or no longer) offered.
    #[n(0)]
    NotOffered,
    /// All slots are taken; try later or elsewhere.
    #[n(1)]
    Busy,
    /// The prepaid balance does not cover the first piece of work.
    #[n(2)]
    Funds,
    /// Prompt and output do not fit the context.
    #[n(3)]
    Context,
    /// The quote is unknown, of another session, or no longer valid.
    #[n(4)]
    Quote,
    /// The peer broke the protocol.
    #[n(5)]
    Protocol,
    /// The provider's engine, wallet or journal cannot serve now.
    #[n(6)]
    Unavailable,
    /// No such session or request here.
    #[n(7)]
    Unknown,
}

/// What the consumer knows about a request that a broken connection left open.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct OpenRequest {
    #[n(0)]
    pub request: RequestId,
    /// The last acknowledgement that the consumer countersigned; the provider may have missed it.
    #[n(1)]
    pub last_ack: Option<BothSigned<Ack>>,
    /// Output tokens received, where the consumer still holds the request and wants it to go on. Absent: it has ended at
    /// `last_ack`.
    #[n(2)]
    pub received: Option<u32>,
}

/// From consumer to provider on the control stream.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum ConsumerControl {
    #[n(0)]
    Hello(#[n(0)] Hello),
    #[n(1)]
    WantQuote(#[n(0)] ListingId, #[n(1)] ModelRoot),
    #[n(2)]
    Open(#[n(0)] Signed<SessionOpen>),
    /// Slice number and amount; the provider answers with an invoice.
    #[n(3)]
    WantInvoice(#[n(0)] u32, #[n(1)] Msat),
    /// After a broken connection: every request that the consumer had open, to go on or to be ended at its last
    /// acknowledgement, the last receipt that it countersigned, and those before it, oldest first
    /// ([`crate::session::MAX_RECEIPTS_AHEAD`] at most).
    #[n(4)]
    Resume(
        #[n(0)] SessionId,
        #[n(1)] Vec<OpenRequest>,
        #[n(2)] Option<BothSigned<Receipt>>,
        #[n(3)] Option<Vec<BothSigned<Receipt>>>,
    ),
    #[n(5)]
    Close(#[n(0)] Signed<SessionClose>),
    /// Show that your log holds what you promised, or only grew. Only to a provider that speaks of its log.
    #[n(6)]
    WantProof(#[n(0)] LogAsk),
    /// What a closed session is owed by a credit note is to be this session's balance. Only to a provider that spends credit.
    #[n(7)]
    SpendCredit(#[n(0)] Signed<CreditTransfer>),
}

/// From provider to consumer on the control stream.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum ProviderControl {
    #[n(0)]
    Hello(#[n(0)] Hello),
    #[n(1)]
    Quote(#[n(0)] Signed<Quote>),
    #[n(2)]
    Opened(#[n(0)] SessionId),
    #[n(3)]
    Invoice(#[n(0)] SliceDescriptor, #[n(1)] String),
    /// Slice k has arrived; all slices so far come to this amount.
    #[n(4)]
    Credited(#[n(0)] u32, #[n(1)] Msat),
    /// The session goes on: everything paid, the last receipt, and the numerators of all requests that ended, by the
    /// provider's books; and the requests that go on, each once the consumer opens a stream for it.
    #[n(5)]
    Resumed(#[n(0)] SessionId, #[n(1)] Msat, #[n(2)] Option<ReceiptId>, #[n(3)] Numerators, #[n(4)] Vec<RequestId>),
    /// The remainder is on its way to the consumer's invoice.
    #[n(6)]
    Refunding(#[n(0)] PaymentHash, #[n(1)] Msat),
    /// The remainder (or what could not be paid of it) is owed.
    #[n(7)]
    Owed(#[n(0)] Signed<CreditNote>),
    /// Nothing is left to settle.
    #[n(8)]
    Closed,
    #[n(9)]
    Refused(#[n(0)] Refusal, #[n(1)] String),
    /// A receipt of this session is durable, at this place of the provider's log.
    #[n(10)]
    Promise(#[n(0)] Signed<InclusionPromise>),
    /// The newest tree head that the provider signed, as a note.
    #[n(11)]
    TreeHead(#[n(0)] String),
    #[n(12)]
    Proof(#[n(0)] LogProof),
    /// The note is spent; said again for every note of a session that is resumed.
    #[n(13)]
    CreditSpent(#[n(0)] BothSigned<CreditTransfer>),
    /// The note of this session is not spent, and why.
    #[n(14)]
    CreditKept(#[n(0)] SessionId, #[n(1)] String),
}

/// A question about the provider's log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum LogAsk {
    /// That the log of so many entries holds the entry of this index: index, size.
    #[n(0)]
    Inclusion(#[n(0)] u64, #[n(1)] u64),
    /// That the log of `new` entries extends that of `old`: old, new.
    #[n(1)]
    Consistency(#[n(0)] u64, #[n(1)] u64),
}

/// The answer: RFC 6962 hashes, none where the log cannot tell.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct LogProof {
    #[n(0)]
    pub ask: LogAsk,
    #[n(1)]
    pub hashes: Vec<Digest>,
}

/// From consumer to provider on a request's stream.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum ConsumerFrame {
    #[n(0)]
    Start(#[n(0)] Box<StartRequest>),
    /// Countersignature of acknowledgement `seq`.
    #[n(1)]
    Ack(#[n(0)] u32, #[n(1)] Signature),
    #[n(2)]
    Cancel,
    /// Countersignature of the receipt.
    #[n(3)]
    Receipt(#[n(0)] Signature),
    /// To a worker: where the rows of this request go next. May come again, when the next node was replaced.
    #[n(4)]
    Route(#[n(0)] Box<PartRoute>),
    /// To a worker: the work is over; its receipt is due.
    #[n(5)]
    Done,
    /// First on a new stream: a request that a broken connection left open goes on here.
    #[n(6)]
    Resume(#[n(0)] RequestId),
}

/// Where a worker sends the rows of a request.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct PartRoute {
    /// The lead's number of the request: rows name it by this.
    #[n(0)]
    pub slot: u64,
    #[n(1)]
    pub next: NodeKey,
    /// `host:port`, as in listings.
    #[n(2)]
    pub addresses: Vec<String>,
    /// For the next node: to be shown to it.
    #[n(3)]
    pub ticket: Signed<Ticket>,
    /// Rows that this worker sent before and kept, to go to the next node once more before any others.
    #[n(4)]
    pub resend: Vec<Resend>,
    /// By the lead that the order names: it is it who pays in this session.
    #[n(5)]
    pub leading: Signed<Leading>,
}

/// Kept rows to be sent again, as a replay that ends at the next node: to rebuild what a lost worker held. Where they are not
/// kept any more the work is refused as a gap, and the rows are computed again.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Resend {
    /// The lead's number of this work: its answer carries it.
    #[n(0)]
    pub work: u64,
    #[n(1)]
    pub sequence: u32,
    #[n(2)]
    pub start: u32,
    #[n(3)]
    pub rows: u32,
}

/// Addresses of a route.
pub const MAX_ADDRESSES: usize = 8;
/// Works that one route may have sent again.
pub const MAX_RESENDS: usize = 256;

/// A request with the private side that its signed part commits to.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct StartRequest {
    #[n(0)]
    pub open: Signed<RequestOpen>,
    #[n(1)]
    pub salt: Salt,
    #[n(2)]
    pub prompt: Vec<u32>,
    #[n(3)]
    pub private: RequestPrivate,
}

/// From provider to consumer on a request's stream.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum ProviderFrame {
    /// Index of the first id within the output, and the ids.
    #[n(0)]
    Chunk(#[n(0)] u32, #[n(1)] Vec<u32>),
    #[n(1)]
    Ack(#[n(0)] Signed<Ack>),
    /// The request is over; its receipt, to be countersigned.
    #[n(2)]
    Receipt(#[n(0)] FinishReason, #[n(1)] Signed<Receipt>),
    /// Not accepted: nothing was done and nothing is owed.
    #[n(3)]
    Refused(#[n(0)] Refusal, #[n(1)] String),
    /// Index of the first token within the output, and log probabilities from there on; right before their [`Self::Chunk`],
    /// and only where the request asks for them. No receipt speaks of them.
    #[n(4)]
    Logprobs(#[n(0)] u32, #[n(1)] Vec<TokenLogprobs>),
    /// Index of an embedded text, and its row: little-endian f32 numbers. In the order of the texts, each before the
    /// acknowledgement that covers its text.
    #[n(5)]
    Embedded(#[n(0)] u32, #[n(1)] ByteVec),
}

/// Log probabilities at one output position, in millionths of a nat.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct TokenLogprobs {
    /// Of the token that was drawn.
    #[n(0)]
    pub drawn_micro: i32,
    /// The likeliest tokens, likeliest first.
    #[n(1)]
    pub top: Vec<(u32, i32)>,
}

/// Encodes a frame. The caller adds the length.
pub fn encode<F: Encode<()>>(frame: &F) -> Vec<u8> {
    cbor::encode(frame)
}

/// Decodes a frame, refusing what is over the limit or not canonical.
pub fn decode<'b, F: Decode<'b, ()> + Encode<()>>(bytes: &'b [u8]) -> Result<F, CodecError> {
    cbor::decode_limited(bytes, MAX_FRAME)
}

/// A reason text cut to [`MAX_REASON`] bytes at a character's border.
pub fn reason(text: impl Into<String>) -> String {
    let mut text = text.into();
    if text.len() > MAX_REASON {
        let mut end = MAX_REASON;
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_the_wire_and_only_in_their_own_place() {
        let frame = ProviderFrame::Chunk(7, vec![1, 70_000]);
        let bytes = encode(&frame);
        assert_eq!(hex::encode(&bytes), "8200820782011a00011170");
        assert_eq!(decode::<ProviderFrame>(&bytes), Ok(frame));
        assert!(decode::<ConsumerControl>(&bytes).is_err());
        let control = ConsumerControl::WantInvoice(3, Msat(10_000));
        assert_eq!(decode::<ConsumerControl>(&encode(&control)), Ok(control));
    }

    #[test]
    fn over_the_limit_is_refused_before_decoding() {
        let bytes = vec![0u8; MAX_FRAME + 1];
        assert!(matches!(decode::<ConsumerFrame>(&bytes), Err(CodecError::TooLong { .. })));
    }

    #[test]
    fn reasons_are_cut_at_characters() {
        assert!(reason("ä".repeat(400)).len() <= MAX_REASON);
    }
}
