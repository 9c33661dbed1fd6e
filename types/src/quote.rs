//! A quote: the provider's signed price and terms for one session.

use crate::{
    BuildId, LightningKey, ListingId, ModelRoot, Msat, MsatPerMtok, NodeKey, QuoteId, Statement, TokenizerHash, UnixMs,
    Verified,
};
use minicbor::{Decode, Encode};
use serde::{Deserialize, Serialize};

/// What work costs, in integers: msat per million units of it, plus a fixed amount per request.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Hash, Encode, Decode, Serialize, Deserialize)]
#[cbor(map)]
pub struct RateCard {
    #[n(0)]
    pub input: MsatPerMtok,
    #[n(1)]
    pub cached_input: MsatPerMtok,
    #[n(2)]
    pub output: MsatPerMtok,
    #[n(3)]
    pub per_request: Msat,
    /// Layer work: msat per million position-layers. Absent where no layers are sold.
    #[n(4)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub position_layer: Option<MsatPerMtok>,
    /// Expert work: msat per million expert rows. Absent where no experts are sold.
    #[n(5)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expert_row: Option<MsatPerMtok>,
}

impl RateCard {
    /// No rate of `self` is above that of `listed`: a quote may be cheaper than its listing, never dearer.
    pub fn is_within(&self, listed: &RateCard) -> bool {
        self.input <= listed.input
            && self.cached_input <= listed.cached_input
            && self.output <= listed.output
            && self.per_request <= listed.per_request
            && self.position_layer.unwrap_or_default() <= listed.position_layer.unwrap_or_default()
            && self.expert_row.unwrap_or_default() <= listed.expert_row.unwrap_or_default()
    }
}

/// What the engine promises about repeatability.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize, Deserialize)]
#[cbor(index_only)]
#[serde(rename_all = "snake_case")]
pub enum EngineProfile {
    /// Bit-identical over batch mixes, chunkings and replays, for one build and one instruction set.
    #[n(0)]
    Exact,
    /// As fast as the machine goes; the same call repeats, nothing more.
    #[n(1)]
    Fast,
}

impl core::fmt::Display for EngineProfile {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            EngineProfile::Exact => "exact",
            EngineProfile::Fast => "fast",
        })
    }
}

/// Slice sizes, windows and intervals that both sides keep to. Defaults are those of docs/money.md.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Encode, Decode, Serialize, Deserialize)]
#[cbor(map)]
pub struct Terms {
    /// Smallest slice that the provider invoices.
    #[n(0)]
    pub min_slice: Msat,
    #[n(1)]
    pub max_slice: Msat,
    /// Work that the provider does beyond the prepaid balance.
    #[n(2)]
    pub credit_window: Msat,
    /// Output tokens after which an acknowledgement is due, at the latest.
    #[n(3)]
    pub ack_tokens: u32,
    /// Milliseconds after which one is due while tokens flow.
    #[n(4)]
    pub ack_interval_ms: u32,
    /// Output tokens that may be unacknowledged before generation pauses.
    #[n(5)]
    pub window_tokens: u32,
    /// Prompt tokens in one prefill piece: each is an acknowledgement boundary, at most one unacknowledged.
    #[n(6)]
    pub prefill_piece: u32,
    #[n(7)]
    pub invoice_expiry_secs: u32,
    /// A remainder below this becomes a credit note at once.
    #[n(8)]
    pub refund_dust: Msat,
    /// The most that a refund's routing may cost, taken from the refund.
    #[n(9)]
    pub refund_fee_cap: Msat,
    /// How long the provider holds a broken stream for its consumer.
    #[n(10)]
    pub resume_ms: u32,
    /// Silence after which the session is closed and the remainder refunded.
    #[n(11)]
    pub idle_close_ms: u32,
}

impl Default for Terms {
    fn default() -> Self {
        Terms {
            min_slice: Msat::sat(10),
            max_slice: Msat::sat(5_000),
            credit_window: Msat::ZERO,
            ack_tokens: 128,
            ack_interval_ms: 1_000,
            window_tokens: 256,
            prefill_piece: 512,
            invoice_expiry_secs: 120,
            refund_dust: Msat::sat(10),
            refund_fee_cap: Msat::sat(10),
            resume_ms: 60_000,
            idle_close_ms: 300_000,
        }
    }
}

/// The provider's signed offer of a price for one session key.
///
/// A quote dearer than the listing it names is refused, and both together prove bait and switch.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Quote {
    #[n(0)]
    pub version: u32,
    #[n(1)]
    pub provider: NodeKey,
    #[n(2)]
    pub lightning_node: LightningKey,
    /// The consumer's session key: nobody else can use this quote.
    #[n(3)]
    pub consumer: NodeKey,
    #[n(4)]
    pub listing: ListingId,
    #[n(5)]
    pub model_root: ModelRoot,
    #[n(6)]
    pub tokenizer: TokenizerHash,
    #[n(7)]
    pub quantisation: String,
    #[n(8)]
    pub profile: EngineProfile,
    #[n(9)]
    pub build: BuildId,
    #[n(10)]
    pub instruction_set: String,
    #[n(11)]
    pub context_length: u32,
    #[n(12)]
    pub rates: RateCard,
    #[n(13)]
    pub terms: Terms,
    #[n(14)]
    pub issued_at: UnixMs,
    #[n(15)]
    pub valid_until: UnixMs,
    /// Makes every quote's id its own.
    #[n(16)]
    pub nonce: u64,
}

impl Quote {
    pub const VERSION: u32 = 1;
    /// Default validity.
    pub const VALIDITY_MS: u64 = 10 * 60 * 1_000;
}

impl Statement for Quote {
    const KIND: &'static str = "quote";
    const MAX_LEN: usize = 2 * 1024;
}

impl Verified<Quote> {
    pub fn quote_id(&self) -> QuoteId {
        QuoteId(self.id())
    }
}
