//! Signed statements: canonical bytes and ed25519 signatures over them, from untrusted to verified.
//!
//! What is signed is `"satgrid-<kind>-v1\0" || canonical bytes`; the statement's id is SHA-256 of exactly that.
//! Verification is strict RFC 8032 (`verify_strict`: canonical encodings, no small-order keys) and nothing else.

use crate::{NodeKey, cbor, cbor::CodecError};
use core::marker::PhantomData;
use ed25519_dalek::{Signature as DalekSignature, Signer, SigningKey, VerifyingKey};
use minicbor::{Decode, Encode};
use sha2::{Digest as _, Sha256};
use thiserror::Error;

/// A kind of statement that somebody signs.
pub trait Statement: Clone + core::fmt::Debug + Eq + Encode<()> + for<'b> Decode<'b, ()> {
    /// The word between `satgrid-` and `-v1` in the signing context.
    const KIND: &'static str;
    /// No statement of this kind is longer, in bytes.
    const MAX_LEN: usize = 16 * 1024;
}

/// An ed25519 signature.
#[derive(Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(transparent)]
pub struct Signature(#[cbor(n(0), with = "minicbor::bytes")] pub [u8; 64]);

impl core::fmt::Debug for Signature {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Signature({})", hex::encode(self.0))
    }
}

/// Why a statement was not believed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum VerifyError {
    #[error("{kind}: {source}")]
    Codec { kind: &'static str, source: CodecError },
    #[error("{kind}: {key} is not an acceptable ed25519 key")]
    Key { kind: &'static str, key: NodeKey },
    #[error("{kind}: not signed by {key}")]
    Signature { kind: &'static str, key: NodeKey },
}

/// The bytes that a signature of this kind of statement covers.
pub fn signed_bytes<T: Statement>(body: &[u8]) -> Vec<u8> {
    let mut message = Vec::with_capacity(body.len() + 32);
    message.extend_from_slice(b"satgrid-");
    message.extend_from_slice(T::KIND.as_bytes());
    message.extend_from_slice(b"-v1\0");
    message.extend_from_slice(body);
    message
}

/// A statement's id: SHA-256 of what is signed.
pub fn statement_id<T: Statement>(body: &[u8]) -> [u8; 32] {
    Sha256::digest(signed_bytes::<T>(body)).into()
}

/// Signs a statement's canonical bytes.
pub fn sign_body<T: Statement>(body: &[u8], key: &SigningKey) -> Signature {
    Signature(key.sign(&signed_bytes::<T>(body)).to_bytes())
}

/// Strict verification of one signature over a statement's bytes.
pub fn verify_body<T: Statement>(body: &[u8], key: &NodeKey, signature: &Signature) -> Result<(), VerifyError> {
    let verifying = VerifyingKey::from_bytes(&key.0).map_err(|_| VerifyError::Key { kind: T::KIND, key: *key })?;
    verifying
        .verify_strict(&signed_bytes::<T>(body), &DalekSignature::from_bytes(&signature.0))
        .map_err(|_| VerifyError::Signature { kind: T::KIND, key: *key })
}

/// The public half of a signing key.
pub fn node_key(key: &SigningKey) -> NodeKey {
    NodeKey(key.verifying_key().to_bytes())
}

fn decode_body<T: Statement>(body: &[u8]) -> Result<T, VerifyError> {
    cbor::decode_limited(body, T::MAX_LEN).map_err(|source| VerifyError::Codec { kind: T::KIND, source })
}

/// One party's signature on a statement, not yet checked.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Signed<T> {
    #[cbor(n(0), with = "minicbor::bytes")]
    body: Vec<u8>,
    #[n(1)]
    signature: Signature,
    #[cbor(skip)]
    statement: PhantomData<T>,
}

impl<T: Statement> Signed<T> {
    pub fn sign(statement: &T, key: &SigningKey) -> Signed<T> {
        let body = cbor::encode(statement);
        let signature = sign_body::<T>(&body, key);
        Signed { body, signature, statement: PhantomData }
    }
    pub fn from_parts(body: Vec<u8>, signature: Signature) -> Signed<T> {
        Signed { body, signature, statement: PhantomData }
    }
    pub fn body(&self) -> &[u8] {
        &self.body
    }
    pub fn signature(&self) -> &Signature {
        &self.signature
    }
    /// What it claims, before anybody checked: only to find out whose key to check against.
    pub fn peek(&self) -> Result<T, VerifyError> {
        decode_body(&self.body)
    }
    /// The statement, if `key` signed these canonical bytes.
    pub fn verify(&self, key: &NodeKey) -> Result<Verified<T>, VerifyError> {
        let statement = decode_body(&self.body)?;
        verify_body::<T>(&self.body, key, &self.signature)?;
        Ok(Verified { statement, id: statement_id::<T>(&self.body), evidence: self.clone() })
    }
}

/// A statement whose signature was checked. There is no other way to make one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified<T> {
    statement: T,
    id: [u8; 32],
    evidence: Signed<T>,
}

impl<T: Statement> Verified<T> {
    pub fn id(&self) -> [u8; 32] {
        self.id
    }
    /// The signed form, to be kept as evidence or shown to others.
    pub fn evidence(&self) -> &Signed<T> {
        &self.evidence
    }
    pub fn into_statement(self) -> T {
        self.statement
    }
}

impl<T> core::ops::Deref for Verified<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.statement
    }
}

/// The same bytes signed by provider and consumer, not yet checked.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct BothSigned<T> {
    #[cbor(n(0), with = "minicbor::bytes")]
    body: Vec<u8>,
    #[n(1)]
    provider: Signature,
    #[n(2)]
    consumer: Signature,
    #[cbor(skip)]
    statement: PhantomData<T>,
}

impl<T: Statement> BothSigned<T> {
    /// Adds the consumer's signature to what the provider signed.
    pub fn countersign(signed: &Signed<T>, key: &SigningKey) -> BothSigned<T> {
        let consumer = sign_body::<T>(&signed.body, key);
        BothSigned::from_parts(signed.body.clone(), signed.signature, consumer)
    }
    pub fn from_parts(body: Vec<u8>, provider: Signature, consumer: Signature) -> BothSigned<T> {
        BothSigned { body, provider, consumer, statement: PhantomData }
    }
    pub fn body(&self) -> &[u8] {
        &self.body
    }
    pub fn provider_signature(&self) -> &Signature {
        &self.provider
    }
    pub fn consumer_signature(&self) -> &Signature {
        &self.consumer
    }
    pub fn id(&self) -> [u8; 32] {
        statement_id::<T>(&self.body)
    }
    pub fn peek(&self) -> Result<T, VerifyError> {
        decode_body(&self.body)
    }
    /// The statement, if both keys signed these canonical bytes.
    pub fn verify(&self, provider: &NodeKey, consumer: &NodeKey) -> Result<T, VerifyError> {
        let statement = decode_body(&self.body)?;
        verify_body::<T>(&self.body, provider, &self.provider)?;
        verify_body::<T>(&self.body, consumer, &self.consumer)?;
        Ok(statement)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
    #[cbor(map)]
    struct Note {
        #[n(0)]
        text: String,
    }
    impl Statement for Note {
        const KIND: &'static str = "note";
        const MAX_LEN: usize = 64;
    }
    #[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
    #[cbor(map)]
    struct Other {
        #[n(0)]
        text: String,
    }
    impl Statement for Other {
        const KIND: &'static str = "other";
    }

    fn key(n: u8) -> SigningKey {
        SigningKey::from_bytes(&[n; 32])
    }

    #[test]
    fn only_the_signer_and_the_kind_verify() {
        let note = Note { text: "ten sat".into() };
        let signed = Signed::sign(&note, &key(1));
        assert_eq!(*signed.verify(&node_key(&key(1))).unwrap(), note);
        assert!(matches!(signed.verify(&node_key(&key(2))), Err(VerifyError::Signature { .. })));
        let other: Signed<Other> = Signed::from_parts(signed.body().to_vec(), *signed.signature());
        assert!(other.verify(&node_key(&key(1))).is_err(), "a signature holds for one kind of statement only");
        let long = Signed::sign(&Note { text: "x".repeat(100) }, &key(1));
        assert!(matches!(long.verify(&node_key(&key(1))), Err(VerifyError::Codec { .. })));
    }

    #[test]
    fn both_sign_the_same_bytes() {
        let offered = Signed::sign(&Note { text: "done".into() }, &key(1));
        let both = BothSigned::countersign(&offered, &key(2));
        assert!(both.verify(&node_key(&key(1)), &node_key(&key(2))).is_ok());
        assert!(both.verify(&node_key(&key(2)), &node_key(&key(1))).is_err());
        assert_eq!(both.id(), offered.verify(&node_key(&key(1))).unwrap().id());
    }

    #[test]
    fn a_small_order_key_signs_nothing() {
        let signed = Signed::sign(&Note { text: "x".into() }, &key(1));
        let identity =
            NodeKey([1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert!(signed.verify(&identity).is_err());
    }
}
