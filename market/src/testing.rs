//! Signed listings for this room's tests: real keys, real signatures, small words.

use ed25519_dalek::SigningKey;
use satgrid_types::{
    Bindings, BuildId, Digest, EngineProfile, LightningKey, Listing, MeasuredLink, ModelRoot, Msat, MsatPerMtok,
    NodeKey, Part, RateCard, Speed, TokenizerHash, UnixMs, VerifiedListing, lightning_binding_message, node_key,
    nostr_key, sign_lightning_message, sign_node_binding, verify_listing,
};
use secp256k1::{Keypair, SECP256K1, SecretKey};

pub(crate) const NOW_S: u64 = 1_700_000_000;

pub(crate) fn now() -> UnixMs {
    UnixMs::from_secs(NOW_S)
}

/// What a test says about a listing; the rest is the same for all.
#[derive(Debug, Clone)]
pub(crate) struct Offer {
    pub(crate) provider: u32,
    pub(crate) model: u32,
    pub(crate) name: &'static str,
    /// How long before now it was made.
    pub(crate) age_s: i64,
    pub(crate) lifetime_s: u64,
    pub(crate) output: u64,
    pub(crate) part: Part,
    pub(crate) context_length: u32,
    pub(crate) slots: u32,
    pub(crate) profiles: Vec<EngineProfile>,
    pub(crate) quantisation: &'static str,
    pub(crate) build: u8,
    pub(crate) decode_mtok_s: u64,
    pub(crate) addresses: Vec<String>,
    pub(crate) layer_price: Option<u64>,
    pub(crate) expert_price: Option<u64>,
    pub(crate) experts: Option<Digest>,
    pub(crate) links: Vec<MeasuredLink>,
    pub(crate) memory_bytes: u64,
}

impl Offer {
    pub(crate) fn new(provider: u32) -> Offer {
        Offer {
            provider,
            model: 0,
            name: "gemma-3-270m",
            age_s: 0,
            lifetime_s: 1_800,
            output: 4_000_000,
            part: Part::Whole,
            context_length: 4_096,
            slots: 4,
            profiles: vec![EngineProfile::Exact],
            quantisation: "Q4_K_M",
            build: 6,
            decode_mtok_s: 40_000,
            addresses: vec!["127.0.0.1:9338".into()],
            layer_price: None,
            expert_price: None,
            experts: None,
            links: Vec::new(),
            memory_bytes: 1 << 30,
        }
    }

    pub(crate) fn tokenizer() -> TokenizerHash {
        TokenizerHash([5; 32])
    }

    pub(crate) fn root(&self) -> ModelRoot {
        ModelRoot(seed(b'm', self.model))
    }

    pub(crate) fn signing(&self) -> SigningKey {
        SigningKey::from_bytes(&seed(b'n', self.provider))
    }

    pub(crate) fn node(&self) -> NodeKey {
        node_key(&self.signing())
    }

    pub(crate) fn verified(&self) -> VerifiedListing {
        let nostr = Keypair::from_seckey_slice(SECP256K1, &seed(b's', self.provider)).unwrap();
        let node = SigningKey::from_bytes(&seed(b'n', self.provider));
        let lightning = SecretKey::from_slice(&seed(b'l', self.provider)).unwrap();
        let created_at = NOW_S.checked_add_signed(-self.age_s).unwrap();
        let mut listing = Listing {
            version: Listing::VERSION,
            model: self.name.into(),
            model_root: self.root(),
            tokenizer: Offer::tokenizer(),
            quantisation: self.quantisation.into(),
            part: self.part.clone(),
            rates: RateCard {
                input: MsatPerMtok(1_000_000),
                cached_input: MsatPerMtok(100_000),
                output: MsatPerMtok(self.output),
                per_request: Msat(0),
                position_layer: self.layer_price.map(MsatPerMtok),
                expert_row: self.expert_price.map(MsatPerMtok),
            },
            context_length: self.context_length,
            slots: self.slots,
            speed: Speed { prefill_mtok_s: 380_000, decode_mtok_s: self.decode_mtok_s },
            memory_bytes: self.memory_bytes,
            profiles: self.profiles.clone(),
            build: BuildId([self.build; 32]),
            instruction_set: "avx2".into(),
            addresses: self.addresses.clone(),
            region: None,
            node_key: node_key(&node),
            lightning_node: LightningKey(lightning.public_key(SECP256K1).serialize()),
            expires_at: created_at + self.lifetime_s,
            lightning_address: None,
            lightning_unproven: false,
            experts_hash: self.experts,
            embeds: None,
            links: self.links.clone(),
            bindings: Bindings::default(),
        };
        let message = lightning_binding_message(&listing.node_key);
        listing.bindings.lightning = Some(sign_lightning_message(&lightning, &message));
        listing.bindings.node = Some(sign_node_binding(&node, &nostr_key(&nostr), &listing.d()));
        verify_listing(listing.to_event(&nostr, created_at, &[0; 32]), now()).unwrap()
    }
}

fn seed(kind: u8, number: u32) -> [u8; 32] {
    let mut seed = [kind; 32];
    seed[..4].copy_from_slice(&number.to_be_bytes());
    seed
}
