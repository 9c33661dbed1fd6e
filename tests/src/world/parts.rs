//! Who lives in a world: a provider with its engine, a consumer with its calls, and the link between two.

use super::{
    cheat::Cheat,
    journal::SimJournal,
    ring::{Desk, Ring},
};
use ed25519_dalek::SigningKey;
use satgrid_engine::{
    port::JobId,
    toy::{ToyConfig, ToyEngine},
};
use satgrid_node::{
    LinkId, StreamId,
    consumer::{Bill, CallError, CallId, Consumer, ConsumerConfig},
    provider::{Provider, ProviderConfig},
};
use satgrid_types::{
    Bindings, BuildId, EngineProfile, FinishReason, LayerRange, LightningKey, Listing, ModelRoot, Msat, MsatPerMtok,
    NodeKey, Part, PaymentHash, RateCard, RequestId, Sampling, Speed, TokenUsage, TokenizerHash, UnixMs,
    VerifiedListing, lightning_binding_message, node_key, nostr_key, sign_node_binding, verify_listing,
};
use satgrid_wallet::{fake::FakeNetwork, payment::Slices};
use secp256k1::{Keypair, SECP256K1};
use sha2::{Digest as _, Sha256};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

/// Names a node of a world.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Who {
    Provider(usize),
    Consumer(usize),
}

/// What the wallet of a node is doing for it.
pub struct Purse {
    pub lightning: LightningKey,
    pub payments: Slices<PaymentHash>,
    /// The wallet event that was given to the role and is not acknowledged.
    pub outstanding: Option<PaymentHash>,
    /// What each refund is over.
    pub refunds: BTreeMap<PaymentHash, Msat>,
}

impl Purse {
    pub(super) fn new(lightning: LightningKey) -> Purse {
        let payments = Slices::new(Slices::<PaymentHash>::MAX_IN_FLIGHT);
        Purse { lightning, payments, outstanding: None, refunds: BTreeMap::new() }
    }
}

/// A provider: role, engine, journal, wallet.
pub struct ProviderNode {
    pub role: Option<Provider>,
    pub key: SigningKey,
    pub nostr: Keypair,
    pub config: ProviderConfig,
    /// It sells layers, which its desk computes; else it sells a whole model, which its engine runs.
    pub layers: Option<LayerRange>,
    pub desk: Desk,
    /// What is listed, and what is quoted.
    pub rates: RateCard,
    pub quoted: RateCard,
    pub listing: VerifiedListing,
    pub toy: ToyConfig,
    pub engine: ToyEngine,
    pub journal: SimJournal,
    pub purse: Purse,
    pub cheat: Cheat,
    /// Counts lives: what was scheduled for an earlier one is void.
    pub epoch: u64,
    /// Virtual time that one engine step takes, in ms.
    pub step_ms: u64,
    /// It is up, and no new connection reaches it before this.
    pub unreachable_until: UnixMs,
    pub(super) stepping: bool,
    /// What the engine has done for jobs that are not over.
    pub work: BTreeMap<JobId, TokenUsage>,
    /// What its wallet held when the world began.
    pub endowment: Msat,
    /// Halted by its journal.
    pub halted: Option<String>,
    /// Refunds that were under way when it started: resolved, not begun.
    pub(super) old_refunds: BTreeSet<PaymentHash>,
    pub(super) first_invoice: BTreeMap<[u8; 32], String>,
}

/// What a client of a consumer has heard of one call.
#[derive(Debug, Default, Clone)]
pub struct CallLog {
    pub prompt: Vec<u32>,
    pub max_output: u32,
    pub sampling: Sampling,
    pub tokens: Vec<u32>,
    /// Of texts that are embedded.
    pub rows: Vec<Vec<u8>>,
    /// When each chunk came.
    pub chunk_times: Vec<UnixMs>,
    pub started: Vec<(NodeKey, RequestId)>,
    pub end: Option<Result<(FinishReason, Bill), (CallError, Bill)>>,
    pub ended_at: Option<UnixMs>,
    /// The consumer died under it: nobody listens any more.
    pub orphaned: bool,
}

impl CallLog {
    pub fn bill(&self) -> &Bill {
        match self.end.as_ref().expect("the call has ended") {
            Ok((_, bill)) | Err((_, bill)) => bill,
        }
    }
    pub fn is_ok(&self) -> bool {
        matches!(self.end, Some(Ok(_)))
    }
    pub fn error(&self) -> &CallError {
        match &self.end {
            Some(Err((error, _))) => error,
            other => panic!("the call should have failed: {other:?}"),
        }
    }
    /// The longest pause between two chunks, in ms.
    pub fn longest_gap(&self) -> u64 {
        self.chunk_times.windows(2).map(|pair| pair[1].since(pair[0])).max().unwrap_or(0)
    }
}

/// A consumer: role, journal, wallet, and the clients' view of its calls.
pub struct ConsumerNode {
    pub role: Option<Consumer>,
    pub key: SigningKey,
    pub nostr: Keypair,
    pub master: [u8; 32],
    pub config: ConsumerConfig,
    pub journal: SimJournal,
    pub purse: Purse,
    pub calls: BTreeMap<CallId, CallLog>,
    pub next_call: u64,
    /// What it leads, and the calls at its workers: of which ring, and in which place.
    pub rings: BTreeMap<u64, Ring>,
    pub next_ring: u64,
    pub parts: BTreeMap<CallId, (u64, usize)>,
    /// Its countersignatures never leave: a consumer that takes and does not sign.
    pub never_signs: bool,
    /// Asks for so many times its remainder when it closes.
    pub greed: u64,
    pub epoch: u64,
    pub halted: Option<String>,
    pub penalised: Vec<(NodeKey, String)>,
    /// What its wallet held when the world began.
    pub endowment: Msat,
    /// Where it connects from.
    pub host: IpAddr,
}

/// A connection: which ends it has, and how far each direction of each stream is.
pub(super) struct Link {
    pub consumer: usize,
    pub consumer_end: LinkId,
    pub consumer_epoch: u64,
    /// The key of the consumer's session.
    pub session_key: NodeKey,
    pub provider: usize,
    pub provider_end: LinkId,
    pub provider_epoch: u64,
    pub latency_ms: u64,
    /// Nothing arrives after this; set by whoever closes.
    pub closed: bool,
    /// Latest delivery of each stream and direction: a stream does not overtake itself.
    pub last: BTreeMap<(Option<StreamId>, bool), UnixMs>,
}

/// 32 bytes that belong to a name.
pub(super) fn bytes32(name: &str) -> [u8; 32] {
    Sha256::digest(name.as_bytes()).into()
}

pub(super) fn nostr_pair(name: &str) -> Keypair {
    Keypair::from_seckey_slice(SECP256K1, &bytes32(name)).expect("a hash is a valid key")
}

/// The usual prices: output at 20 msat a token.
pub fn usual_rates() -> RateCard {
    RateCard {
        input: MsatPerMtok(2_000_000),
        cached_input: MsatPerMtok(500_000),
        output: MsatPerMtok(20_000_001),
        per_request: Msat(7),
        ..RateCard::default()
    }
}

/// A provider's listing as of now, for one hour.
pub(super) fn listing_of(
    net: &FakeNetwork,
    now: UnixMs,
    (key, nostr, lightning): (&SigningKey, &Keypair, LightningKey),
    (rates, layers): (RateCard, Option<LayerRange>),
    toy: &ToyConfig,
) -> VerifiedListing {
    let facts = ToyEngine::new(toy.clone()).facts();
    let mut listing = Listing {
        version: Listing::VERSION,
        model: "toy".into(),
        model_root: ModelRoot(facts.model_root),
        tokenizer: TokenizerHash(facts.tokenizer_hash),
        quantisation: facts.model.quantisation.clone(),
        part: layers.map_or(Part::Whole, Part::Layers),
        rates,
        context_length: facts.context,
        slots: facts.slots,
        speed: Speed { prefill_mtok_s: 400_000, decode_mtok_s: 40_000 },
        memory_bytes: 1 << 20,
        profiles: vec![EngineProfile::Exact],
        build: BuildId(facts.build_id),
        instruction_set: facts.instruction_set,
        addresses: vec!["192.0.2.1:9338".into()],
        region: None,
        node_key: node_key(key),
        lightning_node: lightning,
        expires_at: now.as_secs() + 3_600,
        lightning_address: None,
        lightning_unproven: false,
        experts_hash: None,
        embeds: toy.embeds.filter(|_| layers.is_none()),
        links: Vec::new(),
        bindings: Bindings::default(),
    };
    let message = lightning_binding_message(&listing.node_key);
    listing.bindings.lightning = Some(net.sign_message(lightning, message.as_bytes()));
    listing.bindings.node = Some(sign_node_binding(key, &nostr_key(nostr), &listing.d()));
    let event = listing.to_event(nostr, now.as_secs(), &[0; 32]);
    verify_listing(event, now).expect("the world's listings are sound")
}
