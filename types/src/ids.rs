//! Identifiers and keys as types of their own, so that no two can be swapped.
//!
//! All are fixed-length byte strings; text form is lower-case hex.

use core::{fmt, str::FromStr};
use minicbor::{Decode, Encode};
use thiserror::Error;

/// Reads lower-case hex of exactly `bytes.len()` bytes. Identifiers have one text form, as they have one encoding: two
/// spellings of one key would be one key to a reader and two texts to a signature over them.
pub(crate) fn decode_lower_hex(text: &str, bytes: &mut [u8]) -> Result<(), hex::FromHexError> {
    if let Some(index) = text.bytes().position(|byte| byte.is_ascii_uppercase()) {
        let c = text[index..].chars().next().unwrap_or_default();
        return Err(hex::FromHexError::InvalidHexCharacter { c, index });
    }
    hex::decode_to_slice(text, bytes)
}

/// A text that should have been the hex of an identifier.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("expected {expected} bytes in hex, got {given:?}")]
pub struct IdParseError {
    pub expected: usize,
    pub given: String,
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $len:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
        #[cbor(transparent)]
        pub struct $name(#[cbor(n(0), with = "minicbor::bytes")] pub [u8; $len]);

        impl $name {
            pub const fn as_bytes(&self) -> &[u8; $len] {
                &self.0
            }
            /// The first eight hex digits, for tables and logs.
            pub fn short(&self) -> String {
                hex::encode(&self.0[..4])
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&hex::encode(self.0))
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), hex::encode(self.0))
            }
        }
        impl FromStr for $name {
            type Err = IdParseError;
            fn from_str(text: &str) -> Result<Self, IdParseError> {
                let mut bytes = [0u8; $len];
                crate::decode_lower_hex(text, &mut bytes)
                    .map_err(|_| IdParseError { expected: $len, given: text.chars().take(80).collect() })?;
                Ok($name(bytes))
            }
        }
        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }
        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = <std::borrow::Cow<'de, str>>::deserialize(d)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

id!(/// An ed25519 public key: a provider's receipt key, which is also its QUIC key, or a consumer's session key.
    NodeKey, 32);
id!(/// An x-only secp256k1 public key, as Nostr uses it.
    NostrKey, 32);
id!(/// A compressed secp256k1 public key: a Lightning node id.
    LightningKey, 33);
id!(/// Merkle root over a model's canonical metadata and tensor hashes: which model this is, as a fact.
    ModelRoot, 32);
id!(/// SHA-256 of the tokenizer artefact.
    TokenizerHash, 32);
id!(/// SHA-256 over crate version, compile flags, compiler, target and a known answer: which engine build this is.
    BuildId, 32);
id!(/// A Nostr event id: SHA-256 of the canonical event array. Names one version of a listing.
    ListingId, 32);
id!(/// Id of a signed quote.
    QuoteId, 32);
id!(/// Id of a signed session-open statement.
    SessionId, 32);
id!(/// Chosen at random by the consumer; resuming a request after a break uses the same one.
    RequestId, 32);
id!(/// Id of an acknowledgement.
    AckId, 32);
id!(/// Id of a receipt.
    ReceiptId, 32);
id!(/// SHA-256 of a preimage: names a Lightning payment.
    PaymentHash, 32);
id!(/// The secret whose SHA-256 is the payment hash. Evidence of payment in the payer's hands only.
    Preimage, 32);
id!(/// 32 random bytes by the consumer, one per request: without them nobody can test guesses against hashes.
    Salt, 32);
id!(/// A plain SHA-256 digest with no narrower meaning.
    Digest, 32);
id!(/// 128-bit deterministic id of a transfer.
    TransferId, 16);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identifier_has_one_text_form() {
        let text = "ab".repeat(32);
        assert_eq!(text.parse::<NodeKey>().unwrap().to_string(), text);
        for bad in [text.to_uppercase(), text[1..].to_owned(), format!("{text}00"), "zz".repeat(32), "é".repeat(32)] {
            assert!(bad.parse::<NodeKey>().is_err(), "{bad}");
        }
    }
}
