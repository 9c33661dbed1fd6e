//! What a provider publishes: one listing for one part of one model build, as a Nostr event of kind 38521.
//!
//! The event is addressable: `d = <first 16 hex of the model root>:<whole | layers a-b | experts>`, so a newer event of
//! the same author and `d` replaces the older one. Single-letter tags are the only ones that relays index; they repeat
//! what the content says (`m` model, `q` quantisation, `k` kind of part, `l` layers, `u` address, `g` region) and a
//! listing whose tags say something else is refused. Only [`verify_listing`] makes a [`VerifiedListing`].

mod binding;
mod event;

use core::ops::Deref;

use secp256k1::Keypair;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use thiserror::Error;

use crate::{
    BuildId, Digest, EngineProfile, LightningKey, ListingId, ModelRoot, NodeKey, NostrKey, Part, RateCard,
    TokenizerHash, UnixMs,
};
pub use binding::*;
pub use event::*;

/// Kind of a listing: addressable.
pub const LISTING_KIND: u16 = 38_521;
/// Kind of a log checkpoint: addressable.
pub const CHECKPOINT_KIND: u16 = 38_522;
/// A listing may live this long at most, in seconds: its author refreshes it well before.
pub const MAX_LIFETIME_S: u64 = 60 * 60;
/// How far ahead of ours an author's clock may be, in seconds.
pub const MAX_CLOCK_SKEW_S: u64 = 5 * 60;
/// Longest content, in bytes.
pub const MAX_CONTENT_BYTES: usize = 64 * 1024;
pub const MAX_TAGS: usize = 64;
/// Longest model name, quantisation, instruction set, region or address, in bytes.
pub const MAX_TEXT_BYTES: usize = 128;
pub const MAX_ADDRESSES: usize = 8;
/// Most numbers in the row of an embedded text.
pub const MAX_EMBEDDING: u32 = 16 * 1024;
const MAX_PROFILES: usize = 2;
/// Most links that a listing tells of.
pub const MAX_LINKS: usize = 64;
const ROOT_PREFIX_HEX: usize = 16;

const _: () = assert!(MAX_CONTENT_BYTES < MAX_EVENT_BYTES);

/// Measured speed of one sequence alone, in thousandths of a token per second.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Speed {
    pub prefill_mtok_s: u64,
    pub decode_mtok_s: u64,
}

/// A link that a listing's node has measured itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MeasuredLink {
    /// The node at the other end.
    pub node: NodeKey,
    /// There and back, in microseconds.
    pub rtt_us: u32,
}

/// A listing's content. Serialised as the event's JSON content; unknown fields are left to later versions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listing {
    pub version: u32,
    /// The name that the provider claims. A catalogue says which root a name stands for.
    pub model: String,
    pub model_root: ModelRoot,
    /// Of a part all zeros: layers and experts have no vocabulary, and a stage or a pack could prove none. Whoever leads lists
    /// the whole model with its own.
    pub tokenizer: TokenizerHash,
    pub quantisation: String,
    pub part: Part,
    pub rates: RateCard,
    /// Tokens that one sequence may hold, prompt and output together.
    pub context_length: u32,
    /// Sequences at once.
    pub slots: u32,
    pub speed: Speed,
    /// Memory that the engine may use, in bytes. Of layers: what was free before they were loaded, or the operator's cap;
    /// plans hold it against what they take.
    pub memory_bytes: u64,
    pub profiles: Vec<EngineProfile>,
    pub build: BuildId,
    pub instruction_set: String,
    /// QUIC addresses, `host:port`.
    pub addresses: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    /// `host:port` of its Lightning node, where it takes channels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lightning_address: Option<String>,
    /// The Lightning node is a wallet's that signs no messages (Nostr Wallet Connect): its binding is absent, and only
    /// invoices show that it is paid on behalf of the node key.
    #[serde(default, skip_serializing_if = "is_false")]
    pub lightning_unproven: bool,
    /// Of experts: SHA-256 over each held (layer, expert) and the hash of its weights ([`experts_hash`]). Whoever knows the
    /// model's own hashes sees from it alone that other weights are held.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub experts_hash: Option<Digest>,
    /// The model embeds texts and writes none: how many numbers a text's row has. Absent: it writes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub embeds: Option<u32>,
    /// Links to other nodes that sell parts of the same model: what a plan over several of them reckons with.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub links: Vec<MeasuredLink>,
    /// Signs quotes, acks and receipts, and is the QUIC identity.
    pub node_key: NodeKey,
    pub lightning_node: LightningKey,
    /// Unix seconds. Readers enforce it, since relays keep stale events.
    pub expires_at: u64,
    pub bindings: Bindings,
}

/// What [`Listing::experts_hash`] says of these experts, in rising order: of each its layer and number as 32-bit big-endian
/// integers, then the 32 bytes that stand for its weights.
pub fn experts_hash<'a>(held: impl IntoIterator<Item = (&'a (u32, u32), &'a [u8; 32])>) -> Digest {
    let mut hash = Sha256::new();
    for ((layer, expert), weights) in held {
        hash.update(layer.to_be_bytes());
        hash.update(expert.to_be_bytes());
        hash.update(weights);
    }
    Digest(hash.finalize().into())
}

/// Why an event is not a listing that we use. Sorted: not ours to read, out of date, forged, contradictory.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ListingRefusal {
    #[error("kind {kind} is not a listing")]
    OtherKind { kind: u16 },
    #[error("{what}: {given}, the limit is {limit}")]
    TooLarge { what: &'static str, given: usize, limit: usize },
    #[error("no `expiration` tag, or more than one")]
    NoExpiration,
    #[error("expired at {expires_at}, it is {now}")]
    Expired { expires_at: u64, now: u64 },
    #[error("made at {created_at}, which is more than {MAX_CLOCK_SKEW_S} s ahead of {now}")]
    FromTheFuture { created_at: u64, now: u64 },
    #[error("lives from {created_at} to {expires_at}, more than {MAX_LIFETIME_S} s")]
    LivesTooLong { created_at: u64, expires_at: u64 },
    #[error(transparent)]
    Event(#[from] EventError),
    #[error("content: {0}")]
    Content(String),
    #[error("version {0} is not known")]
    Version(u32),
    #[error("`d` says {given:?}, the content says {expected:?}")]
    WrongD { given: String, expected: String },
    #[error("tag `{tag}` does not say what the content says")]
    TagMismatch { tag: &'static str },
    #[error("no binding by the {key} key")]
    MissingBinding { key: &'static str },
    #[error("the binding by the {key} key does not verify")]
    BadBinding { key: &'static str },
}

impl ListingRefusal {
    /// A stable word for counters.
    pub const fn reason(&self) -> &'static str {
        match self {
            ListingRefusal::OtherKind { .. } => "other_kind",
            ListingRefusal::TooLarge { .. } => "too_large",
            ListingRefusal::NoExpiration => "no_expiration",
            ListingRefusal::Expired { .. } => "expired",
            ListingRefusal::FromTheFuture { .. } => "from_the_future",
            ListingRefusal::LivesTooLong { .. } => "lives_too_long",
            ListingRefusal::Event(EventError::BadSignature { .. } | EventError::WrongId { .. }) => "forged",
            ListingRefusal::Event(EventError::TooLong { .. } | EventError::Malformed(_)) => "malformed",
            ListingRefusal::Content(_) => "malformed",
            ListingRefusal::Version(_) => "version",
            ListingRefusal::WrongD { .. } => "wrong_d",
            ListingRefusal::TagMismatch { .. } => "tag_mismatch",
            ListingRefusal::MissingBinding { .. } => "missing_binding",
            ListingRefusal::BadBinding { .. } => "bad_binding",
        }
    }
}

impl Listing {
    pub const VERSION: u32 = 1;

    /// The event's `d`: which part of which model this is about.
    pub fn d(&self) -> String {
        let root = self.model_root.to_string();
        format!("{}:{}", &root[..ROOT_PREFIX_HEX], part_word(&self.part))
    }

    /// The event's tags, `d` and `expiration` included.
    pub fn tags(&self) -> Vec<Vec<String>> {
        let tag = |name: &str, value: String| vec![name.to_owned(), value];
        let mut tags = vec![
            tag("d", self.d()),
            tag("expiration", self.expires_at.to_string()),
            tag("m", self.model.clone()),
            tag("q", self.quantisation.clone()),
            tag("k", part_kind(&self.part).to_owned()),
        ];
        if let Part::Layers(range) = &self.part {
            tags.push(tag("l", range.to_string()));
        }
        tags.extend(self.addresses.iter().map(|address| tag("u", address.clone())));
        tags.extend(self.region.iter().map(|region| tag("g", region.clone())));
        tags
    }

    /// Signs it as an event made at `created_at` (Unix seconds). `aux` as in [`NostrEvent::sign`].
    ///
    /// Both bindings must be in place; the node's is [`sign_node_binding`] over this listing's `d`.
    pub fn to_event(&self, keys: &Keypair, created_at: u64, aux: &[u8; 32]) -> NostrEvent {
        // A struct of strings, integers and enums: this has no failing case.
        let content = serde_json::to_string(self).unwrap_or_default();
        NostrEvent::sign(keys, created_at, LISTING_KIND, self.tags(), content, aux)
    }

    fn check_content(&self) -> Result<(), ListingRefusal> {
        if self.version != Listing::VERSION {
            return Err(ListingRefusal::Version(self.version));
        }
        let texts = [&self.model, &self.quantisation, &self.instruction_set];
        for text in texts.into_iter().chain(&self.region).chain(&self.lightning_address).chain(&self.addresses) {
            limit("text", text.len(), MAX_TEXT_BYTES)?;
        }
        limit("addresses", self.addresses.len(), MAX_ADDRESSES)?;
        limit("profiles", self.profiles.len(), MAX_PROFILES)?;
        limit("links", self.links.len(), MAX_LINKS)?;
        let contradiction = match &self.part {
            Part::Whole => false,
            Part::Layers(range) => range.start() >= range.end(),
            Part::Experts(set) => set.pairs().is_empty() || !set.pairs().is_sorted_by(|a, b| a < b),
        };
        if self.embeds.is_some_and(|numbers| numbers == 0 || numbers > MAX_EMBEDDING || self.part != Part::Whole) {
            return Err(ListingRefusal::Content("rows of no or too many numbers, or of a part of a model".into()));
        }
        if contradiction || self.model.is_empty() || self.context_length == 0 || self.profiles.is_empty() {
            return Err(ListingRefusal::Content("an empty part, name, context or list of profiles".into()));
        }
        Ok(())
    }

    fn check_tags(&self, event: &NostrEvent) -> Result<(), ListingRefusal> {
        let given = event.only_tag("d").unwrap_or_default();
        let expected = self.d();
        if given != expected {
            return Err(ListingRefusal::WrongD { given: given.to_owned(), expected });
        }
        let ours = self.tags();
        for name in ["expiration", "m", "q", "k", "l", "u", "g"] {
            let values = |tags: &[Vec<String>]| -> Vec<Option<String>> {
                tags.iter()
                    .filter(|tag| tag.first().is_some_and(|n| n == name))
                    .map(|tag| tag.get(1).cloned())
                    .collect()
            };
            if values(&ours) != values(&event.tags) {
                return Err(ListingRefusal::TagMismatch { tag: name });
            }
        }
        Ok(())
    }

    fn check_bindings(&self, nostr: &NostrKey) -> Result<(), ListingRefusal> {
        let node = self.bindings.node.as_ref().ok_or(ListingRefusal::MissingBinding { key: "node" })?;
        if !verify_node_binding(&self.node_key, nostr, &self.d(), node) {
            return Err(ListingRefusal::BadBinding { key: "node" });
        }
        if self.lightning_unproven && self.bindings.lightning.is_none() {
            return Ok(());
        }
        let lightning = self.bindings.lightning.as_ref().ok_or(ListingRefusal::MissingBinding { key: "Lightning" })?;
        let message = lightning_binding_message(&self.node_key);
        if !verify_lightning_message(&self.lightning_node, &message, lightning) {
            return Err(ListingRefusal::BadBinding { key: "Lightning" });
        }
        Ok(())
    }
}

/// A listing whose event, tags and three keys were checked. There is no other way to make one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedListing {
    listing: Listing,
    d: String,
    event: NostrEvent,
}

/// Checks an event that claims to be a listing: cheap checks first, three signatures last.
pub fn verify_listing(event: NostrEvent, now: UnixMs) -> Result<VerifiedListing, ListingRefusal> {
    if event.kind != LISTING_KIND {
        return Err(ListingRefusal::OtherKind { kind: event.kind });
    }
    limit("content", event.content.len(), MAX_CONTENT_BYTES)?;
    limit("tags", event.tags.len(), MAX_TAGS)?;
    check_times(&event, now.as_secs())?;
    event.verify()?;
    let listing: Listing = serde_json::from_str(&event.content).map_err(|e| ListingRefusal::Content(e.to_string()))?;
    listing.check_content()?;
    listing.check_tags(&event)?;
    listing.check_bindings(&event.pubkey)?;
    Ok(VerifiedListing { d: listing.d(), listing, event })
}

impl VerifiedListing {
    /// Names this version of the listing; quotes refer to it.
    pub fn id(&self) -> ListingId {
        self.event.id
    }
    pub fn nostr_key(&self) -> NostrKey {
        self.event.pubkey
    }
    pub fn d(&self) -> &str {
        &self.d
    }
    /// Unix seconds, by the author's clock.
    pub fn created_at(&self) -> u64 {
        self.event.created_at
    }
    pub fn is_live(&self, now: UnixMs) -> bool {
        now.as_secs() < self.listing.expires_at
    }
    /// The signed event, to be kept as evidence or shown to others.
    pub fn event(&self) -> &NostrEvent {
        &self.event
    }
}

impl Deref for VerifiedListing {
    type Target = Listing;
    fn deref(&self) -> &Listing {
        &self.listing
    }
}

fn check_times(event: &NostrEvent, now: u64) -> Result<(), ListingRefusal> {
    let created_at = event.created_at;
    let expires_at = event.only_tag("expiration").and_then(|text| text.parse::<u64>().ok());
    let expires_at = expires_at.ok_or(ListingRefusal::NoExpiration)?;
    if expires_at <= now {
        return Err(ListingRefusal::Expired { expires_at, now });
    }
    if created_at > now.saturating_add(MAX_CLOCK_SKEW_S) {
        return Err(ListingRefusal::FromTheFuture { created_at, now });
    }
    if expires_at.saturating_sub(created_at) > MAX_LIFETIME_S {
        return Err(ListingRefusal::LivesTooLong { created_at, expires_at });
    }
    Ok(())
}

fn is_false(value: &bool) -> bool {
    !value
}

fn limit(what: &'static str, given: usize, limit: usize) -> Result<(), ListingRefusal> {
    if given > limit { Err(ListingRefusal::TooLarge { what, given, limit }) } else { Ok(()) }
}

/// The kind of part: the tag `k`.
fn part_kind(part: &Part) -> &'static str {
    match part {
        Part::Whole => "whole",
        Part::Layers(_) => "layers",
        Part::Experts(_) => "experts",
    }
}

fn part_word(part: &Part) -> String {
    match part {
        Part::Whole | Part::Experts(_) => part_kind(part).to_owned(),
        Part::Layers(range) => format!("layers {range}"),
    }
}

#[cfg(test)]
mod tests;
