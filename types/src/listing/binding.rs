//! How a provider's three keys prove that they belong together.
//!
//! | key | proves | by signing |
//! |---|---|---|
//! | Nostr (secp256k1) | it published the listing | the event, which names the other two |
//! | node (ed25519) | it stands behind this Nostr key, for this part of this model | `"satgrid-binding-v1\0" \|\| nostr key \|\| d` |
//! | Lightning (secp256k1) | it is paid on behalf of this node key | `"satgrid-node-key-v1:" \|\| hex of the node key`, as LND, CLN and LDK sign messages |
//!
//! So nobody can publish a listing under another's node key, nor point at another's Lightning node.

use ed25519_dalek::{Signature as DalekSignature, Signer, SigningKey, VerifyingKey};
use secp256k1::ecdsa::{RecoverableSignature, RecoveryId};
use secp256k1::{Message, SECP256K1, SecretKey};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::{LightningKey, NodeKey, NostrKey, Signature};

const NODE_CONTEXT: &[u8] = b"satgrid-binding-v1\0";
const LIGHTNING_CONTEXT: &str = "satgrid-node-key-v1:";
const LIGHTNING_PREFIX: &[u8] = b"Lightning Signed Message:";
/// One byte of recovery id, then r and s.
const RECOVERABLE_LEN: usize = 65;
/// What is added to a recovery id for a compressed key.
const RECOVERY_OFFSET: u8 = 31;
const ZBASE32: &[u8; 32] = b"ybndrfg8ejkmcpqxot1uwisza345h769";

/// The two signatures that a listing carries beside its event's own.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bindings {
    /// By the node key, over the Nostr key and the listing's `d`.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "hex_signature")]
    pub node: Option<Signature>,
    /// By the Lightning node, over the node key: zbase32, as its `signmessage` prints it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lightning: Option<String>,
}

/// Signs the binding of a node key to a Nostr key for one `d`.
pub fn sign_node_binding(node: &SigningKey, nostr: &NostrKey, d: &str) -> Signature {
    Signature(node.sign(&node_message(nostr, d)).to_bytes())
}

/// Strict check of a node binding.
pub fn verify_node_binding(node: &NodeKey, nostr: &NostrKey, d: &str, signature: &Signature) -> bool {
    let Ok(key) = VerifyingKey::from_bytes(&node.0) else { return false };
    key.verify_strict(&node_message(nostr, d), &DalekSignature::from_bytes(&signature.0)).is_ok()
}

/// What a Lightning node signs to stand behind a node key. Plain text, so that any node's `signmessage` can do it.
pub fn lightning_binding_message(node: &NodeKey) -> String {
    format!("{LIGHTNING_CONTEXT}{node}")
}

/// Was `message` signed by this Lightning node? `signature` is zbase32 as LND, CLN and LDK print it.
pub fn verify_lightning_message(node: &LightningKey, message: &str, signature: &str) -> bool {
    recover(message, signature).is_some_and(|key| key == *node)
}

/// Signs a message the way Lightning nodes do. For wallets that hold their key in the clear, such as a fake.
pub fn sign_lightning_message(secret: &SecretKey, message: &str) -> String {
    let signature = SECP256K1.sign_ecdsa_recoverable(&lightning_digest(message), secret);
    let (recovery, compact) = signature.serialize_compact();
    let mut bytes = [0u8; RECOVERABLE_LEN];
    // A recovery id is 0 to 3.
    bytes[0] = RECOVERY_OFFSET + recovery.to_i32().unsigned_abs() as u8;
    bytes[1..].copy_from_slice(&compact);
    zbase32_encode(&bytes)
}

fn node_message(nostr: &NostrKey, d: &str) -> Vec<u8> {
    [NODE_CONTEXT, &nostr.0, d.as_bytes()].concat()
}

fn lightning_digest(message: &str) -> Message {
    let once = Sha256::digest([LIGHTNING_PREFIX, message.as_bytes()].concat());
    Message::from_digest(Sha256::digest(once).into())
}

fn recover(message: &str, signature: &str) -> Option<LightningKey> {
    let bytes = zbase32_decode(signature)?;
    let recovery = RecoveryId::from_i32(i32::from(bytes[0].checked_sub(RECOVERY_OFFSET)?)).ok()?;
    let signature = RecoverableSignature::from_compact(&bytes[1..], recovery).ok()?;
    let key = SECP256K1.recover_ecdsa(&lightning_digest(message), &signature).ok()?;
    Some(LightningKey(key.serialize()))
}

/// Five bits a letter, most significant first; 65 bytes are 104 letters exactly.
fn zbase32_encode(bytes: &[u8; RECOVERABLE_LEN]) -> String {
    let letter = |index: usize| {
        let bit = |offset: usize| {
            let at = index * 5 + offset;
            usize::from(bytes[at / 8] >> (7 - at % 8) & 1)
        };
        char::from(ZBASE32[(0..5).fold(0, |value, offset| value << 1 | bit(offset))])
    };
    (0..RECOVERABLE_LEN * 8 / 5).map(letter).collect()
}

fn zbase32_decode(text: &str) -> Option<[u8; RECOVERABLE_LEN]> {
    if text.len() != RECOVERABLE_LEN * 8 / 5 {
        return None;
    }
    let mut bytes = [0u8; RECOVERABLE_LEN];
    for (index, letter) in text.bytes().enumerate() {
        let value = ZBASE32.iter().position(|known| *known == letter)?;
        for offset in 0..5 {
            let at = index * 5 + offset;
            bytes[at / 8] |= ((value >> (4 - offset) & 1) as u8) << (7 - at % 8);
        }
    }
    Some(bytes)
}

mod hex_signature {
    use super::Signature;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(signature: &Option<Signature>, s: S) -> Result<S::Ok, S::Error> {
        match signature {
            Some(signature) => s.serialize_str(&hex::encode(signature.0)),
            None => s.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Option<Signature>, D::Error> {
        let Some(text) = <Option<String>>::deserialize(d)? else { return Ok(None) };
        let mut bytes = [0u8; 64];
        crate::decode_lower_hex(&text, &mut bytes).map_err(D::Error::custom)?;
        Ok(Some(Signature(bytes)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node_key;

    fn secret(byte: u8) -> SecretKey {
        SecretKey::from_slice(&[byte; 32]).unwrap()
    }

    fn lightning_key(secret: &SecretKey) -> LightningKey {
        LightningKey(secret.public_key(SECP256K1).serialize())
    }

    /// The vector of rust-lightning's own message signing: secret key one, "test message".
    #[test]
    fn lightning_messages_are_those_of_other_nodes() {
        const SIGNED: &str =
            "d9tibmnic9t5y41hg7hkakdcra94akas9ku3rmmj4ag9mritc8ok4p5qzefs78c9pqfhpuftqqzhydbdwfg7u6w6wdxcqpqn4sj4e73e";
        let mut one = [0; 32];
        one[31] = 1;
        let one = SecretKey::from_slice(&one).unwrap();
        assert_eq!(sign_lightning_message(&one, "test message"), SIGNED);
        assert!(verify_lightning_message(&lightning_key(&one), "test message", SIGNED));
        assert!(!verify_lightning_message(&lightning_key(&one), "test massage", SIGNED));
        assert!(!verify_lightning_message(&lightning_key(&secret(2)), "test message", SIGNED));
        for bad in ["", &SIGNED[1..], &SIGNED.replace('d', "0"), &"y".repeat(104), &"9".repeat(104), &"é".repeat(52)] {
            assert!(!verify_lightning_message(&lightning_key(&one), "test message", bad), "{bad}");
        }
    }

    #[test]
    fn a_node_binding_holds_for_one_nostr_key_and_one_part() {
        let node = SigningKey::from_bytes(&[3; 32]);
        let (ours, theirs) = (NostrKey([1; 32]), NostrKey([2; 32]));
        let signature = sign_node_binding(&node, &ours, "abc:whole");
        let key = node_key(&node);
        assert!(verify_node_binding(&key, &ours, "abc:whole", &signature));
        assert!(!verify_node_binding(&key, &theirs, "abc:whole", &signature));
        assert!(!verify_node_binding(&key, &ours, "abc:experts", &signature));
        assert!(!verify_node_binding(&node_key(&SigningKey::from_bytes(&[4; 32])), &ours, "abc:whole", &signature));
    }
}
