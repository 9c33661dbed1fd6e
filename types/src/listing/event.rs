//! Nostr events (NIP-01): the id, and the BIP-340 signature over it.
//!
//! An event here is a plain value; relays and subscriptions belong to the adapter that speaks to them.

use secp256k1::{Keypair, Message, SECP256K1, XOnlyPublicKey, schnorr};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use thiserror::Error;

use crate::{ListingId, NostrKey};

/// No event that we read is longer, as JSON.
pub const MAX_EVENT_BYTES: usize = 128 * 1024;

/// A BIP-340 signature.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct SchnorrSignature(pub [u8; 64]);

/// A signed event as relays carry it, not yet checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NostrEvent {
    pub id: ListingId,
    pub pubkey: NostrKey,
    /// Unix seconds, by the author's clock.
    pub created_at: u64,
    pub kind: u16,
    pub tags: Vec<Vec<String>>,
    pub content: String,
    pub sig: SchnorrSignature,
}

/// Why an event was not believed. Always the fault of whoever sent it.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum EventError {
    #[error("{given} bytes of JSON, the limit is {MAX_EVENT_BYTES}")]
    TooLong { given: usize },
    #[error("not a Nostr event: {0}")]
    Malformed(String),
    #[error("the id says {claimed}, the content hashes to {computed}")]
    WrongId { claimed: ListingId, computed: ListingId },
    #[error("not signed by {key}")]
    BadSignature { key: NostrKey },
}

impl NostrEvent {
    /// Signs an event. `aux` is 32 random bytes, or zeros where none are to be had (BIP-340 allows both).
    pub fn sign(
        keys: &Keypair,
        created_at: u64,
        kind: u16,
        tags: Vec<Vec<String>>,
        content: String,
        aux: &[u8; 32],
    ) -> NostrEvent {
        let pubkey = NostrKey(keys.x_only_public_key().0.serialize());
        let id = event_id(&pubkey, created_at, kind, &tags, &content);
        let signature = SECP256K1.sign_schnorr_with_aux_rand(&Message::from_digest(id.0), keys, aux);
        NostrEvent { id, pubkey, created_at, kind, tags, content, sig: SchnorrSignature(signature.serialize()) }
    }

    /// Reads an event without believing it.
    pub fn from_json(json: &str) -> Result<NostrEvent, EventError> {
        if json.len() > MAX_EVENT_BYTES {
            return Err(EventError::TooLong { given: json.len() });
        }
        serde_json::from_str(json).map_err(|e| EventError::Malformed(e.to_string()))
    }

    pub fn to_json(&self) -> String {
        // Strings and integers only: this has no failing case.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Checks the id against the content and the signature against the id.
    pub fn verify(&self) -> Result<(), EventError> {
        let computed = event_id(&self.pubkey, self.created_at, self.kind, &self.tags, &self.content);
        if computed != self.id {
            return Err(EventError::WrongId { claimed: self.id, computed });
        }
        let bad = EventError::BadSignature { key: self.pubkey };
        let Ok(key) = XOnlyPublicKey::from_slice(&self.pubkey.0) else { return Err(bad) };
        let Ok(signature) = schnorr::Signature::from_slice(&self.sig.0) else { return Err(bad) };
        SECP256K1.verify_schnorr(&signature, &Message::from_digest(self.id.0), &key).map_err(|_| bad)
    }

    /// The value of the only tag of this name; `None` where there is none or more than one.
    pub fn only_tag(&self, name: &str) -> Option<&str> {
        let mut named = self.tags.iter().filter(|tag| tag.first().is_some_and(|first| first == name));
        let value = named.next()?.get(1)?;
        if named.next().is_some() { None } else { Some(value) }
    }
}

/// NIP-01: SHA-256 of `[0, pubkey, created_at, kind, tags, content]` as JSON without white space.
fn event_id(pubkey: &NostrKey, created_at: u64, kind: u16, tags: &[Vec<String>], content: &str) -> ListingId {
    let array = serde_json::to_vec(&(0, pubkey, created_at, kind, tags, content)).unwrap_or_default();
    ListingId(Sha256::digest(array).into())
}

/// The Nostr public key of a key pair.
pub fn nostr_key(keys: &Keypair) -> NostrKey {
    NostrKey(keys.x_only_public_key().0.serialize())
}

impl core::fmt::Debug for SchnorrSignature {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "SchnorrSignature({})", hex::encode(self.0))
    }
}

impl Serialize for SchnorrSignature {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&hex::encode(self.0))
    }
}

impl<'de> Deserialize<'de> for SchnorrSignature {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(d)?;
        let mut bytes = [0u8; 64];
        crate::decode_lower_hex(&text, &mut bytes).map_err(serde::de::Error::custom)?;
        Ok(SchnorrSignature(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(byte: u8) -> Keypair {
        Keypair::from_seckey_slice(SECP256K1, &[byte; 32]).unwrap()
    }

    fn event() -> NostrEvent {
        let tags = vec![vec!["d".into(), "x".into()], vec!["e".into(), "\"quoted\"\n\u{7f}é".into()]];
        NostrEvent::sign(&keys(1), 1_700_000_000, 38_521, tags, "ten \\ sat\t\u{8}\u{1f}".into(), &[0; 32])
    }

    #[test]
    fn what_was_signed_verifies_and_survives_json() {
        let event = event();
        assert_eq!(event.verify(), Ok(()));
        assert_eq!(NostrEvent::from_json(&event.to_json()), Ok(event.clone()));
        assert_eq!(event.only_tag("d"), Some("x"));
        assert_eq!(event.only_tag("nothing"), None);
        let mut twice = event;
        twice.tags.push(vec!["d".into(), "y".into()]);
        assert_eq!(twice.only_tag("d"), None, "an ambiguous tag is no tag");
    }

    /// An event of another implementation (the `nostr` crate's own test data).
    #[test]
    fn an_event_from_elsewhere_verifies() {
        let json = r#"{"content":"uRuvYr585B80L6rSJiHocw==?iv=oh6LVqdsYYol3JfFnXTbPA==","created_at":1640839235,"id":"2be17aa3031bdcb006f0fce80c146dea9c1c0268b0af2398bb673365c6444d45","kind":4,"pubkey":"f86c44a2de95d9149b51c6a29afeabba264c18e2fa7c49de93424a0c56947785","sig":"a5d9290ef9659083c490b303eb7ee41356d8778ff19f2f91776c8dc4443388a64ffcf336e61af4c25c05ac3ae952d1ced889ed655b67790891222aaa15b99fdd","tags":[["p","13adc511de7e1cfcf1c6b7f6365fb5a03442d7bcacf565ea57fa7770912c023d"]]}"#;
        assert_eq!(NostrEvent::from_json(json).unwrap().verify(), Ok(()));
    }

    #[test]
    fn every_field_is_covered() {
        let changes: [fn(&mut NostrEvent); 5] = [
            |e| e.content.push('x'),
            |e| e.created_at += 1,
            |e| e.kind += 1,
            |e| e.tags[0][1].push('x'),
            |e| e.pubkey = nostr_key(&keys(2)),
        ];
        for change in changes {
            let mut changed = event();
            change(&mut changed);
            assert!(matches!(changed.verify(), Err(EventError::WrongId { .. })));
            // With the id put right, the signature is what gives it away.
            changed.id = event_id(&changed.pubkey, changed.created_at, changed.kind, &changed.tags, &changed.content);
            assert_eq!(changed.verify(), Err(EventError::BadSignature { key: changed.pubkey }));
        }
    }

    #[test]
    fn junk_is_an_error() {
        for junk in ["", "{}", "[]", "{\"id\":1}", "\"x\""] {
            assert!(matches!(NostrEvent::from_json(junk), Err(EventError::Malformed(_))), "{junk}");
        }
        let long = " ".repeat(MAX_EVENT_BYTES + 1);
        assert!(matches!(NostrEvent::from_json(&long), Err(EventError::TooLong { .. })));
    }
}
