//! A party of the world: its keys, its journal and its books, and what its keys sign on their own: invoices, a listing.

use crate::{
    books::Books,
    bundle::Filter,
    entry::{Draft, Evidence},
    journal::MemoryJournal,
};
use core::time::Duration;
use ed25519_dalek::SigningKey;
use lightning_invoice::{Bolt11InvoiceDescription, Currency, InvoiceBuilder, PaymentSecret, Sha256 as InvoiceHash};
use satgrid_types::{
    Bindings, BuildId, Digest, EngineProfile, LightningKey, Listing, ModelRoot, Msat, Part, PaymentHash, RateCard,
    Speed, TokenizerHash, UnixMs, VerifiedListing, lightning_binding_message, node_key, nostr_key,
    sign_lightning_message, sign_node_binding, verify_listing,
};
use secp256k1::{Keypair, PublicKey, SECP256K1, SecretKey};
use sha2::{Digest as _, Sha256};

/// A node: its three keys, its journal and its books.
#[derive(Debug, Clone)]
pub struct Party {
    pub node: SigningKey,
    pub nostr: Keypair,
    pub lightning: SecretKey,
    pub journal: MemoryJournal,
    pub books: Books,
}

impl Party {
    pub fn new(name: &str) -> Party {
        let secret = |what: &str| bytes32(&format!("{name}/{what}"));
        let lightning = SecretKey::from_slice(&secret("lightning")).expect("a hash is a valid key");
        Party {
            node: SigningKey::from_bytes(&secret("node")),
            nostr: Keypair::from_seckey_slice(SECP256K1, &secret("nostr")).expect("a hash is a valid key"),
            lightning,
            journal: MemoryJournal::new(),
            books: Books::new(),
        }
    }
    pub fn lightning_key(&self) -> LightningKey {
        LightningKey(PublicKey::from_secret_key(SECP256K1, &self.lightning).serialize())
    }
    pub fn genesis(&self) -> Evidence {
        Evidence::Genesis {
            node: node_key(&self.node),
            nostr: nostr_key(&self.nostr),
            lightning: self.lightning_key(),
            network: "regtest".into(),
        }
    }
    /// Books and journals one draft.
    pub fn append(&mut self, at: UnixMs, draft: Draft) {
        self.books.apply(at, &draft).expect("the world's drafts are valid");
        self.journal.append_now(at, vec![draft]).expect("the world's drafts are within the limits");
    }
    /// This party's bundle.
    pub fn bundle(&self, filter: Filter, redact: bool) -> Vec<u8> {
        super::bundle_of(&self.journal.entries(), &self.node, filter, redact)
    }
}

/// 32 bytes that belong to a name.
pub fn bytes32(name: &str) -> [u8; 32] {
    Sha256::digest(name.as_bytes()).into()
}

/// A signed BOLT 11 invoice on regtest.
pub fn bolt11(payee: &SecretKey, amount: Msat, terms: &Digest, payment_hash: &PaymentHash, at: UnixMs) -> String {
    let parse = |bytes: &[u8; 32]| hex::encode(bytes).parse().expect("64 hex digits");
    InvoiceBuilder::new(Currency::Regtest)
        .amount_milli_satoshis(amount.0)
        .invoice_description(Bolt11InvoiceDescription::Hash(InvoiceHash(parse(&terms.0))))
        .payment_hash(parse(&payment_hash.0))
        .payment_secret(PaymentSecret(bytes32(&format!("secret {payment_hash}"))))
        .duration_since_epoch(Duration::from_secs(at.as_secs()))
        .expiry_time(Duration::from_secs(120))
        .min_final_cltv_expiry_delta(24)
        .basic_mpp()
        .build_signed(|digest| SECP256K1.sign_ecdsa_recoverable(digest, payee))
        .expect("all required fields are set")
        .to_string()
}

/// A listing of the party's, with its three keys bound to each other.
pub fn listing(party: &Party, rates: RateCard, at: UnixMs) -> VerifiedListing {
    let mut listing = Listing {
        version: Listing::VERSION,
        model: "gemma-3-270m".into(),
        model_root: ModelRoot(bytes32("model")),
        tokenizer: TokenizerHash(bytes32("tokenizer")),
        quantisation: "Q4_K_M".into(),
        part: Part::Whole,
        rates,
        context_length: 4_096,
        slots: 4,
        speed: Speed { prefill_mtok_s: 380_000, decode_mtok_s: 47_300 },
        memory_bytes: 1 << 30,
        profiles: vec![EngineProfile::Exact],
        build: BuildId(bytes32("build")),
        instruction_set: "avx2".into(),
        addresses: vec!["127.0.0.1:9338".into()],
        region: None,
        node_key: node_key(&party.node),
        lightning_node: party.lightning_key(),
        expires_at: at.as_secs().saturating_add(1_800),
        lightning_address: None,
        lightning_unproven: false,
        experts_hash: None,
        embeds: None,
        links: Vec::new(),
        bindings: Bindings::default(),
    };
    let message = lightning_binding_message(&listing.node_key);
    listing.bindings = Bindings {
        node: Some(sign_node_binding(&party.node, &nostr_key(&party.nostr), &listing.d())),
        lightning: Some(sign_lightning_message(&party.lightning, &message)),
    };
    let event = listing.to_event(&party.nostr, at.as_secs(), &[0; 32]);
    verify_listing(event, at).expect("the world's listing is valid")
}
