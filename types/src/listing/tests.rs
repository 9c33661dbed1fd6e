//! One good listing, and every way of bending it.

use ed25519_dalek::SigningKey;
use proptest::prelude::*;
use secp256k1::{SECP256K1, SecretKey};

use super::*;
use crate::{LayerRange, Msat, MsatPerMtok, node_key};

const NOW: u64 = 1_700_000_000;

fn nostr_keys(byte: u8) -> Keypair {
    Keypair::from_seckey_slice(SECP256K1, &[byte; 32]).unwrap()
}

fn lightning(byte: u8) -> (SecretKey, LightningKey) {
    let secret = SecretKey::from_slice(&[byte; 32]).unwrap();
    (secret, LightningKey(secret.public_key(SECP256K1).serialize()))
}

fn listing() -> Listing {
    let node = SigningKey::from_bytes(&[2; 32]);
    let (secret, lightning_node) = lightning(3);
    let mut listing = Listing {
        version: Listing::VERSION,
        model: "gemma-3-270m".into(),
        model_root: ModelRoot([0xab; 32]),
        tokenizer: TokenizerHash([5; 32]),
        quantisation: "Q4_K_M".into(),
        part: Part::Whole,
        rates: RateCard {
            input: MsatPerMtok(1_000_000),
            cached_input: MsatPerMtok(100_000),
            output: MsatPerMtok(4_000_000),
            per_request: Msat(10),
            ..RateCard::default()
        },
        context_length: 4_096,
        slots: 4,
        speed: Speed { prefill_mtok_s: 380_000, decode_mtok_s: 47_300 },
        memory_bytes: 1 << 30,
        profiles: vec![EngineProfile::Exact],
        build: BuildId([6; 32]),
        instruction_set: "avx2".into(),
        addresses: vec!["127.0.0.1:9338".into()],
        region: Some("EU".into()),
        node_key: node_key(&node),
        lightning_node,
        expires_at: NOW + 1_800,
        lightning_address: None,
        lightning_unproven: false,
        experts_hash: None,
        embeds: None,
        links: Vec::new(),
        bindings: Bindings::default(),
    };
    let message = lightning_binding_message(&listing.node_key);
    listing.bindings.lightning = Some(sign_lightning_message(&secret, &message));
    bind(&mut listing);
    listing
}

fn bind(listing: &mut Listing) {
    let node = SigningKey::from_bytes(&[2; 32]);
    listing.bindings.node = Some(sign_node_binding(&node, &nostr_key(&nostr_keys(1)), &listing.d()));
}

fn verify(event: NostrEvent) -> Result<VerifiedListing, ListingRefusal> {
    verify_listing(event, UnixMs::from_secs(NOW))
}

/// Bends the listing before it is signed.
#[track_caller]
fn check_listing(reason: &str, bend: impl FnOnce(&mut Listing)) {
    let mut listing = listing();
    bend(&mut listing);
    check(reason, listing.to_event(&nostr_keys(1), NOW, &[0; 32]));
}

/// Bends tags or times and signs again, as a provider that lies would.
#[track_caller]
fn check_event(reason: &str, bend: impl FnOnce(&mut NostrEvent)) {
    let mut event = listing().to_event(&nostr_keys(1), NOW, &[0; 32]);
    bend(&mut event);
    let signed = NostrEvent::sign(&nostr_keys(1), event.created_at, event.kind, event.tags, event.content, &[0; 32]);
    check(reason, signed);
}

#[track_caller]
fn check(reason: &str, event: NostrEvent) {
    match verify(event) {
        Ok(_) => panic!("accepted, should be refused: {reason}"),
        Err(refusal) => assert_eq!(refusal.reason(), reason, "{refusal}"),
    }
}

#[test]
fn a_good_listing_verifies() {
    let event = listing().to_event(&nostr_keys(1), NOW, &[9; 32]);
    let verified = verify(event.clone()).unwrap();
    assert_eq!(*verified, listing());
    assert_eq!(verified.d(), "abababababababab:whole");
    assert_eq!((verified.id(), verified.nostr_key()), (event.id, nostr_key(&nostr_keys(1))));
    assert!(verified.is_live(UnixMs::from_secs(NOW + 1_799)) && !verified.is_live(UnixMs::from_secs(NOW + 1_800)));
    assert_eq!(NostrEvent::from_json(&event.to_json()).unwrap(), *verified.event());
}

#[test]
fn a_layer_listing_names_its_range() {
    let mut listing = listing();
    listing.part = Part::Layers(LayerRange::new(0, 9).unwrap());
    bind(&mut listing);
    let verified = verify(listing.to_event(&nostr_keys(1), NOW, &[0; 32])).unwrap();
    assert_eq!(verified.d(), "abababababababab:layers 0-9");
    assert_eq!(verified.event().only_tag("l"), Some("0-9"));
}

#[test]
fn forged_listings_are_refused() {
    let good = listing().to_event(&nostr_keys(1), NOW, &[0; 32]);
    let mut cheaper = good.clone();
    cheaper.content = cheaper.content.replace("4000000", "1");
    check("forged", cheaper.clone());
    // Someone else republishes it under a key of their own: the event is sound, the node's binding is not.
    let stolen = NostrEvent::sign(&nostr_keys(9), NOW, LISTING_KIND, good.tags.clone(), good.content.clone(), &[0; 32]);
    check("bad_binding", stolen);
    let mut other = good;
    other.sig = cheaper.sig;
    other.sig.0[0] ^= 1;
    check("forged", other);
}

#[test]
fn all_three_keys_must_agree() {
    check_listing("missing_binding", |l| l.bindings.node = None);
    check_listing("missing_binding", |l| l.bindings.lightning = None);
    check_listing("bad_binding", |l| l.lightning_node = lightning(4).1);
    check_listing("bad_binding", |l| l.bindings.lightning = Some("y".repeat(104)));
    check_listing("bad_binding", |l| l.node_key = node_key(&SigningKey::from_bytes(&[8; 32])));
    check_listing("bad_binding", |l| l.model_root = ModelRoot([1; 32]));
}

#[test]
fn a_wallet_that_signs_nothing_says_so() {
    let unproven = |l: &mut Listing| l.lightning_unproven = true;
    // The mark alone changes nothing: a signature that is there has to be right.
    check_listing("bad_binding", |l| {
        unproven(l);
        l.bindings.lightning = Some("y".repeat(104));
    });
    let mut nwc = listing();
    nwc.bindings.lightning = None;
    unproven(&mut nwc);
    assert!(verify(nwc.to_event(&nostr_keys(1), NOW, &[0; 32])).unwrap().lightning_unproven);
}

#[test]
fn times_are_bounded() {
    check_listing("expired", |l| l.expires_at = NOW);
    check_listing("lives_too_long", |l| l.expires_at = NOW + MAX_LIFETIME_S + 1);
    check_event("from_the_future", |e| e.created_at = NOW + MAX_CLOCK_SKEW_S + 1);
    check_event("no_expiration", |e| e.tags.retain(|tag| tag[0] != "expiration"));
    check_event("no_expiration", |e| e.tags.push(vec!["expiration".into(), "9".into()]));
    check_event("tag_mismatch", |e| {
        e.tags.retain(|tag| tag[0] != "expiration");
        e.tags.push(vec!["expiration".into(), (NOW + 60).to_string()]);
    });
}

#[test]
fn tags_say_what_the_content_says() {
    check_event("other_kind", |e| e.kind = 1);
    check_event("wrong_d", |e| e.tags[0][1].push('x'));
    check_event("wrong_d", |e| e.tags.retain(|tag| tag[0] != "d"));
    check_event("wrong_d", |e| e.tags.push(vec!["d".into(), "second".into()]));
    check_event("tag_mismatch", |e| e.tags[2][1] = "llama-70b".into());
    check_event("tag_mismatch", |e| e.tags.push(vec!["m".into(), "llama-70b".into()]));
    check_event("tag_mismatch", |e| e.tags.push(vec!["l".into(), "0-9".into()]));
    check_event("tag_mismatch", |e| e.tags.push(vec!["u".into()]));
    check_event("too_large", |e| e.tags.extend((0..MAX_TAGS).map(|_| vec!["x".into()])));
}

#[test]
fn content_is_bounded_and_consistent() {
    check_listing("version", |l| l.version = 2);
    check_listing("too_large", |l| l.model = "x".repeat(MAX_TEXT_BYTES + 1));
    check_listing("too_large", |l| l.addresses = vec!["a:1".into(); MAX_ADDRESSES + 1]);
    check_listing("malformed", |l| l.model.clear());
    check_listing("malformed", |l| l.context_length = 0);
    check_listing("malformed", |l| l.profiles.clear());
    check_event("malformed", |e| e.content.clear());
    check_event("malformed", |e| e.content = e.content.replace("\"whole\"", "{\"layers\":{\"start\":9,\"end\":9}}"));
    check_event("malformed", |e| e.content = e.content.replace("\"whole\"", "{\"experts\":[[1,2],[1,2]]}"));
    check_event("too_large", |e| e.content = "x".repeat(MAX_CONTENT_BYTES + 1));
}

#[test]
fn a_later_version_may_add_fields() {
    let event = listing().to_event(&nostr_keys(1), NOW, &[0; 32]);
    let content = event.content.replacen('{', "{\"colour\":\"blue\",", 1);
    let event = NostrEvent::sign(&nostr_keys(1), NOW, LISTING_KIND, event.tags, content, &[0; 32]);
    assert!(verify(event).is_ok());
}

proptest! {
    /// Whatever one byte is changed to: no panic, and nothing verifies but the event that was signed.
    #[test]
    fn a_damaged_event_is_refused(at in 0usize..2_000, byte in 0x20u8..0x7f) {
        let event = listing().to_event(&nostr_keys(1), NOW, &[0; 32]);
        let mut json = event.to_json().into_bytes();
        let at = at % json.len();
        json[at] = byte;
        let read = NostrEvent::from_json(std::str::from_utf8(&json).unwrap());
        if let Ok(verified) = read.map_err(ListingRefusal::from).and_then(verify) {
            prop_assert_eq!(verified.event(), &event);
        }
    }

    #[test]
    fn any_text_is_an_error_or_an_event(text in "\\PC{0,200}") {
        let read = NostrEvent::from_json(&text);
        prop_assert!(read.is_err());
    }
}
