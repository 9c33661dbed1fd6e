//! The receipt of one finished request, and the private fields that it commits to.

use super::{private_hash, prompt_hash};
use minicbor::{Decode, Encode, bytes::ByteVec};
use satgrid_types::{
    AckId, BothSigned, BuildId, Digest, EngineProfile, FinishReason, ListingId, ModelRoot, Msat, NodeKey, Numerators,
    PaymentHash, QuoteId, RateCard, ReceiptId, RequestId, Salt, Sampling, SessionId, Statement, TokenUsage,
    TokenizerHash, UnixMs, cbor,
};

/// A slice that the session was funded with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct SlicePaid {
    #[n(0)]
    pub k: u32,
    #[n(1)]
    pub payment_hash: PaymentHash,
    #[n(2)]
    pub amount: Msat,
}

/// The receipt of one request. Provider and consumer sign the same bytes.
///
/// `cost` = charge(cumulative numerators) - charge(cumulative numerators before): the session is rounded once, so a
/// receipt's cost may be 1 msat below what the request would cost alone.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Receipt {
    #[n(0)]
    pub version: u32,
    #[n(1)]
    pub session: SessionId,
    /// 0, 1, 2, ... in the order in which requests of this session finished.
    #[n(2)]
    pub seq: u32,
    /// The receipt before this one; absent in the first.
    #[n(3)]
    pub previous: Option<ReceiptId>,
    #[n(4)]
    pub request: RequestId,
    #[n(5)]
    pub quote: QuoteId,
    #[n(6)]
    pub listing: ListingId,
    /// The name under which it was listed: a claim. The root is the fact.
    #[n(7)]
    pub model: String,
    #[n(8)]
    pub model_root: ModelRoot,
    #[n(9)]
    pub tokenizer: TokenizerHash,
    #[n(10)]
    pub quantisation: String,
    #[n(11)]
    pub engine: String,
    #[n(12)]
    pub profile: EngineProfile,
    #[n(13)]
    pub build: BuildId,
    #[n(14)]
    pub instruction_set: String,
    #[n(15)]
    pub usage: TokenUsage,
    #[n(16)]
    pub rates: RateCard,
    #[n(17)]
    pub numerators: Numerators,
    #[n(18)]
    pub cost: Msat,
    /// Over all receipts of the session, this one included.
    #[n(19)]
    pub cumulative_numerators: Numerators,
    #[n(20)]
    pub cumulative_cost: Msat,
    /// All slices of the session settled by now.
    #[n(21)]
    pub cumulative_paid: Msat,
    /// Slices settled since the previous receipt, by `k`.
    #[n(22)]
    pub slices: Vec<SlicePaid>,
    #[n(23)]
    pub finish: FinishReason,
    #[n(24)]
    pub started_at: UnixMs,
    /// By the provider's clock; absent where no token came.
    #[n(25)]
    pub first_token_ms: Option<u32>,
    #[n(26)]
    pub duration_ms: u32,
    #[n(27)]
    pub private_hash: Digest,
    /// The last acknowledgement that both signed; absent where there was none.
    #[n(28)]
    pub last_ack: Option<AckId>,
    #[n(29)]
    pub error: Option<String>,
    #[n(30)]
    pub provider: NodeKey,
    #[n(31)]
    pub consumer: NodeKey,
    /// Merkle root over the receipts for layers; absent where no layers were bought.
    #[n(32)]
    pub stage_root: Option<Digest>,
    /// Merkle root over the receipts for experts; absent where no experts were bought.
    #[n(33)]
    pub expert_root: Option<Digest>,
    #[n(34)]
    pub fingerprint_root: Option<Digest>,
    /// In a session between a lead and its worker: what the worker did.
    #[n(35)]
    pub part: Option<super::PartWork>,
    /// How a lead put the answer together; together with `stage_root`.
    #[n(36)]
    pub split: Option<super::Split>,
    /// Beside `part` where experts were bought: the rows of each, zeros left out.
    #[n(37)]
    pub expert_rows: Option<Vec<super::ExpertCount>>,
    /// How a lead accounts for the rows of its expert layers; together with `expert_root`.
    #[n(38)]
    pub expert_split: Option<super::ExpertSplit>,
}

impl Receipt {
    pub const VERSION: u32 = 1;
    /// More slices than this since the last receipt cannot be settled: one payment is in flight at a time.
    pub const MAX_SLICES: usize = 64;
}
impl Statement for Receipt {
    const KIND: &'static str = "receipt";
    const MAX_LEN: usize = 40 * 1024;
}

/// The id of a receipt that both signed.
pub fn receipt_id(receipt: &BothSigned<Receipt>) -> ReceiptId {
    ReceiptId(receipt.id())
}

/// What [`super::RequestOpen`] commits to: the request's private side, known to both parties only.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct RequestPrivate {
    #[n(0)]
    pub prompt_hash: Digest,
    #[n(1)]
    pub sampling: Sampling,
    #[n(2)]
    pub stop: Vec<String>,
    /// After a failover the prompt ends with output of an earlier run of the same answer: this many tokens. Draws go on
    /// from there, so that the text is the one that an undisturbed run would have given.
    #[n(3)]
    pub resumed: u32,
    /// The grammar that the output follows, as `satgrid_engine::grammar` encodes it.
    #[n(4)]
    pub grammar: Option<ByteVec>,
    /// Log probabilities are asked for: of each token, and of so many likeliest ones.
    #[n(5)]
    pub top_logprobs: Option<u32>,
    /// The prompt is texts to be embedded, one after the other, of so many tokens each. Then there is no output.
    #[n(6)]
    pub embed: Option<Vec<u32>>,
}

impl RequestPrivate {
    /// A request for tokens, without grammar and log probabilities.
    pub fn new(salt: &Salt, prompt: &[u32], sampling: Sampling, stop: Vec<String>, resumed: u32) -> RequestPrivate {
        let prompt_hash = prompt_hash(salt, prompt);
        RequestPrivate { prompt_hash, sampling, stop, resumed, grammar: None, top_logprobs: None, embed: None }
    }
    pub fn commitment(&self, salt: &Salt) -> Digest {
        private_hash(salt, &cbor::encode(self))
    }
}

/// What [`Receipt::private_hash`] commits to. Redaction leaves it (and the salt) out of a bundle.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct ReceiptPrivate {
    #[n(0)]
    pub prompt_hash: Digest,
    /// Running hash over all output tokens.
    #[n(1)]
    pub running_hash: Digest,
    #[n(2)]
    pub sampling: Sampling,
}

impl ReceiptPrivate {
    pub fn commitment(&self, salt: &Salt) -> Digest {
        private_hash(salt, &cbor::encode(self))
    }
}

/// The opening of a commitment: salt and private map, kept beside the receipt until redacted.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct ReceiptOpening {
    #[n(0)]
    pub salt: Salt,
    #[n(1)]
    pub private: ReceiptPrivate,
}
