//! Signatures by a Lightning node key over a message, in the form that Lightning implementations agree on.
//!
//! `zbase32(31 + recovery id || compact signature)` over `SHA256(SHA256("Lightning Signed Message:" || message))`.
//! satgrid uses it for one thing: the Lightning key signs the node's ed25519 key, so that a listing binds both.

use satgrid_types::LightningKey;
use secp256k1::{
    Message, PublicKey, SECP256K1, SecretKey,
    ecdsa::{RecoverableSignature, RecoveryId},
};
use sha2::{Digest as _, Sha256};

const PREFIX: &[u8] = b"Lightning Signed Message:";
const ALPHABET: &[u8; 32] = b"ybndrfg8ejkmcpqxot1uwisza345h769";
/// One header byte and a compact signature.
const SIGNATURE_LEN: usize = 65;
/// 65 bytes in groups of 5 bits.
const TEXT_LEN: usize = 104;

/// Signs `message` with a node's secret key.
pub fn sign(message: &[u8], key: &SecretKey) -> String {
    let (id, compact) = SECP256K1.sign_ecdsa_recoverable(&digest(message), key).serialize_compact();
    let mut bytes = [0u8; SIGNATURE_LEN];
    bytes[0] = 31 + id.to_i32().to_le_bytes()[0];
    bytes[1..].copy_from_slice(&compact);
    encode(&bytes)
}

/// Whether `signature` over `message` is by `key`. Any malformed input is simply not a signature.
pub fn verify(message: &[u8], signature: &str, key: &LightningKey) -> bool {
    recover(message, signature).is_some_and(|signer| signer.serialize() == key.0)
}

fn recover(message: &[u8], signature: &str) -> Option<PublicKey> {
    let bytes = decode(signature)?;
    let id = RecoveryId::from_i32(i32::from(bytes[0].checked_sub(31)?)).ok()?;
    let signature = RecoverableSignature::from_compact(&bytes[1..], id).ok()?;
    SECP256K1.recover_ecdsa(&digest(message), &signature).ok()
}

fn digest(message: &[u8]) -> Message {
    let once = Sha256::new().chain_update(PREFIX).chain_update(message).finalize();
    Message::from_digest(Sha256::digest(once).into())
}

/// 65 bytes are 520 bits, a whole number of 5-bit groups: no padding on either way.
fn encode(bytes: &[u8; SIGNATURE_LEN]) -> String {
    let bit = |i: usize| bytes[i / 8] >> (7 - i % 8) & 1;
    (0..TEXT_LEN)
        .map(|group| {
            let value = (0..5).fold(0u8, |acc, b| acc << 1 | bit(group * 5 + b));
            char::from(ALPHABET[usize::from(value)])
        })
        .collect()
}

fn decode(text: &str) -> Option<[u8; SIGNATURE_LEN]> {
    if text.len() != TEXT_LEN {
        return None;
    }
    let mut bytes = [0u8; SIGNATURE_LEN];
    for (group, c) in text.bytes().enumerate() {
        let value = ALPHABET.iter().position(|&a| a == c)?;
        for b in 0..5 {
            let i = group * 5 + b;
            bytes[i / 8] |= u8::from(value >> (4 - b) & 1 == 1) << (7 - i % 8);
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Vectors of the first implementation to have this (lnd), as others test against them.
    #[test]
    fn agrees_with_other_implementations() {
        #[track_caller]
        fn check(message: &str, signature: &str, key: &str) {
            let key = key.parse().unwrap();
            assert!(verify(message.as_bytes(), signature, &key));
            assert!(!verify(b"another", signature, &key));
        }
        check(
            "is this compatible?",
            "rbgfioj114mh48d8egqx8o9qxqw4fmhe8jbeeabdioxnjk8z3t1ma1hu1fiswpakgucwwzwo6ofycffbsqusqdimugbh41n1g698hr9t",
            "02b80cabdf82638aac86948e4c06e82064f547768dcef977677b9ea931ea75bab5",
        );
        check(
            "hi",
            "rnrphcjswusbacjnmmmrynh9pqip7sy5cx695h6mfu64iac6qmcmsd8xnsyczwmpqp9shqkth3h4jmkgyqu5z47jfn1q7gpxtaqpx4xg",
            "02de60d194e1ca5947b59fe8e2efd6aadeabfb67f2e89e13ae1a799c1e08e4a43b",
        );
        let one = SecretKey::from_slice(&secp256k1::constants::ONE).unwrap();
        assert_eq!(
            sign(b"test message", &one),
            "d9tibmnic9t5y41hg7hkakdcra94akas9ku3rmmj4ag9mritc8ok4p5qzefs78c9pqfhpuftqqzhydbdwfg7u6w6wdxcqpqn4sj4e73e"
        );
    }

    #[test]
    fn a_broken_text_is_not_a_signature() {
        let key = SecretKey::from_slice(&[7; 32]).unwrap();
        let id = LightningKey(PublicKey::from_secret_key(SECP256K1, &key).serialize());
        let good = sign(b"m", &key);
        assert!(verify(b"m", &good, &id));
        for bad in ["", "y", &good[1..], &good.to_uppercase(), &format!("{good}y"), &"é".repeat(52)] {
            assert!(!verify(b"m", bad, &id), "{bad}");
        }
    }
}
