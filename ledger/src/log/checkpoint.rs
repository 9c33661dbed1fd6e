//! Signed tree heads, in the C2SP signed-note form that transparency logs and their witnesses exchange.
//!
//! ```text
//! satgrid/<node key, hex>
//! <number of entries, decimal>
//! <root, base64>
//!
//! — satgrid/<node key, hex> <base64 of 4-byte key hash and 64-byte signature>
//! ```
//!
//! The signature covers the three lines with their line ends. The key hash is the first 4 bytes of
//! SHA-256(name || "\n" || 0x01 || public key). One text means one checkpoint: a reader refuses any other spelling.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use minicbor::{Decode, Encode};
use satgrid_types::{Digest, NodeKey, node_key};
use sha2::{Digest as _, Sha256};
use thiserror::Error;

/// No checkpoint text is longer, in bytes.
pub const MAX_NOTE_LEN: usize = 512;
const ORIGIN: &str = "satgrid/";
const ED25519: u8 = 1;

/// What a node says about its log: so many entries, with this root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checkpoint {
    pub node: NodeKey,
    pub size: u64,
    pub root: Digest,
}

/// Why a text is not a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CheckpointError {
    #[error("{given} bytes, the limit is {MAX_NOTE_LEN}")]
    TooLong { given: usize },
    #[error("not a signed note of a satgrid log: {0}")]
    Malformed(&'static str),
    #[error("not signed by {0}")]
    Signature(NodeKey),
}

/// A checkpoint with its signature checked, and the text that shows it to others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedCheckpoint {
    checkpoint: Checkpoint,
    note: String,
}

impl Checkpoint {
    fn text(&self) -> String {
        format!("{ORIGIN}{}\n{}\n{}\n", self.node, self.size, STANDARD.encode(self.root.0))
    }
    fn render(&self, signature: &[u8; 64]) -> String {
        let mut blob = key_hash(&self.node).to_vec();
        blob.extend_from_slice(signature);
        format!("{}\n\u{2014} {ORIGIN}{} {}\n", self.text(), self.node, STANDARD.encode(blob))
    }
}

impl SignedCheckpoint {
    /// Signs a tree head with the node's own key, which names the log.
    pub fn sign(size: u64, root: Digest, key: &SigningKey) -> SignedCheckpoint {
        let checkpoint = Checkpoint { node: node_key(key), size, root };
        let note = checkpoint.render(&key.sign(checkpoint.text().as_bytes()).to_bytes());
        SignedCheckpoint { checkpoint, note }
    }
    /// Reads a note and verifies it by the key that its origin names. Whose log that is remains the caller's question.
    pub fn parse(note: &str) -> Result<SignedCheckpoint, CheckpointError> {
        if note.len() > MAX_NOTE_LEN {
            return Err(CheckpointError::TooLong { given: note.len() });
        }
        let malformed = CheckpointError::Malformed;
        let lines: Vec<&str> = note.split('\n').collect();
        let [origin, size, root, "", signature, ""] = lines[..] else {
            return Err(malformed("expected an origin, a size, a root, an empty line and one signature"));
        };
        let node: NodeKey = origin
            .strip_prefix(ORIGIN)
            .and_then(|key| key.parse().ok())
            .ok_or(malformed("the origin is not satgrid/<node key>"))?;
        let size = size.parse().map_err(|_| malformed("the size is not a number"))?;
        let root = STANDARD
            .decode(root)
            .ok()
            .and_then(|bytes| bytes.try_into().ok())
            .map(Digest)
            .ok_or(malformed("the root is not 32 bytes in base64"))?;
        let checkpoint = Checkpoint { node, size, root };
        let blob = signature
            .rsplit(' ')
            .next()
            .and_then(|text| STANDARD.decode(text).ok())
            .ok_or(malformed("the signature is not base64"))?;
        let signature: [u8; 64] = blob
            .get(4..)
            .and_then(|bytes| bytes.try_into().ok())
            .ok_or(malformed("the signature is not 68 bytes long"))?;
        if checkpoint.render(&signature) != note {
            return Err(malformed("not the one spelling of this checkpoint"));
        }
        VerifyingKey::from_bytes(&node.0)
            .and_then(|key| key.verify_strict(checkpoint.text().as_bytes(), &Signature::from_bytes(&signature)))
            .map_err(|_| CheckpointError::Signature(node))?;
        Ok(SignedCheckpoint { checkpoint, note: note.to_owned() })
    }
    pub fn note(&self) -> &str {
        &self.note
    }
}

impl core::ops::Deref for SignedCheckpoint {
    type Target = Checkpoint;
    fn deref(&self) -> &Checkpoint {
        &self.checkpoint
    }
}

fn key_hash(node: &NodeKey) -> [u8; 4] {
    let digest =
        Sha256::new().chain_update(format!("{ORIGIN}{node}\n")).chain_update([ED25519]).chain_update(node.0).finalize();
    let mut out = [0; 4];
    out.copy_from_slice(&digest[..4]);
    out
}

/// Two notes of one log that cannot both be true: a portable proof that a node keeps two histories.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct FraudProof {
    #[n(0)]
    pub one: String,
    #[n(1)]
    pub other: String,
}

/// Why two notes prove nothing.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum NoFraud {
    #[error(transparent)]
    Note(#[from] CheckpointError),
    #[error("two logs: of {one} and of {other}")]
    TwoLogs { one: NodeKey, other: NodeKey },
    #[error("of {one} and of {other} entries: ask for a consistency proof")]
    TwoSizes { one: u64, other: u64 },
    #[error("both say the same")]
    Same,
}

impl FraudProof {
    /// The node that signed two roots for one size, or why these notes do not show that.
    pub fn check(&self) -> Result<NodeKey, NoFraud> {
        let (one, other) = (SignedCheckpoint::parse(&self.one)?, SignedCheckpoint::parse(&self.other)?);
        if one.node != other.node {
            return Err(NoFraud::TwoLogs { one: one.node, other: other.node });
        }
        if one.size != other.size {
            return Err(NoFraud::TwoSizes { one: one.size, other: other.size });
        }
        if one.root == other.root { Err(NoFraud::Same) } else { Ok(one.node) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u8) -> SigningKey {
        SigningKey::from_bytes(&[n; 32])
    }
    fn note(n: u8, size: u64, root: u8) -> SignedCheckpoint {
        SignedCheckpoint::sign(size, Digest([root; 32]), &key(n))
    }

    #[test]
    fn a_note_reads_back() {
        let signed = note(1, 42, 7);
        assert_eq!(SignedCheckpoint::parse(signed.note()).unwrap(), signed);
        assert!(
            signed.note().starts_with("satgrid/8a88e3dd7409f195fd52db2d3cba5d72ca6709bf1d94121bf3748801b40f6f5c\n42\n")
        );
    }

    #[test]
    fn every_flipped_bit_of_a_note_is_refused() {
        let signed = note(1, 42, 7);
        for at in 0..signed.note().len() {
            for bit in 0..8 {
                let mut bytes = signed.note().as_bytes().to_vec();
                bytes[at] ^= 1 << bit;
                if let Ok(text) = String::from_utf8(bytes) {
                    assert!(SignedCheckpoint::parse(&text).is_err(), "byte {at} bit {bit}");
                }
            }
        }
    }

    #[test]
    fn other_spellings_are_refused() {
        let good = note(1, 42, 7);
        for bad in [
            good.note().replace("\n42\n", "\n042\n"),
            good.note().replace("\n42\n", "\n+42\n"),
            good.note().replace("satgrid/8a", "satgrid/8A"),
            good.note().replace("\n\n", "\nextra\n\n"),
            format!("{}\n", good.note()),
            format!("{0}{0}", good.note()),
            "x".repeat(MAX_NOTE_LEN + 1),
        ] {
            assert!(SignedCheckpoint::parse(&bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn two_roots_of_one_size_are_fraud() {
        let proof = |a: &SignedCheckpoint, b: &SignedCheckpoint| {
            FraudProof { one: a.note().into(), other: b.note().into() }.check()
        };
        assert_eq!(proof(&note(1, 42, 7), &note(1, 42, 8)), Ok(node_key(&key(1))));
        assert_eq!(proof(&note(1, 42, 7), &note(1, 42, 7)), Err(NoFraud::Same));
        assert_eq!(proof(&note(1, 42, 7), &note(1, 43, 8)), Err(NoFraud::TwoSizes { one: 42, other: 43 }));
        assert!(matches!(proof(&note(1, 42, 7), &note(2, 42, 8)), Err(NoFraud::TwoLogs { .. })));
    }
}
