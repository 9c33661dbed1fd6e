//! L402 tokens: real macaroons (version 2, binary) without caveats, one for each invoice.
//!
//! The identifier is the one that L402 clients know: a version of two bytes, the payment hash, 32 bytes that name the
//! token. The token commits to the payment hash by its signature, and opens a key only together with the preimage *and*
//! after this node's own wallet has received the payment: routers learn preimages too.

use base64::Engine as _;
use hmac::{Hmac, Mac};
use satgrid_types::{PaymentHash, Preimage};
use sha2::{Digest, Sha256};

const IDENTIFIER_LEN: usize = 2 + 32 + 32;
const SIGNATURE_LEN: usize = 32;
/// Version, identifier field, end of header, end of caveats, signature field.
const TOKEN_LEN: usize = 1 + 2 + IDENTIFIER_LEN + 1 + 1 + 2 + SIGNATURE_LEN;
/// What macaroon libraries derive a root key with.
const KEY_GENERATOR: &[u8] = b"macaroons-key-generator";

/// Mints and checks tokens under one secret.
pub(crate) struct Mint {
    root: [u8; 32],
}

fn hmac(key: &[u8], data: &[u8]) -> [u8; 32] {
    // An HMAC takes a key of any length.
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(key) else { return [0; 32] };
    mac.update(data);
    mac.finalize().into_bytes().into()
}

impl Mint {
    /// `secret` is this node's own and permanent.
    pub(crate) fn new(secret: &[u8; 32]) -> Mint {
        Mint { root: hmac(KEY_GENERATOR, &hmac(secret, b"satgrid-l402-v1")) }
    }

    /// The token of an invoice, as clients carry it.
    pub(crate) fn token(&self, hash: PaymentHash) -> String {
        base64::engine::general_purpose::STANDARD.encode(self.bytes(hash))
    }

    fn bytes(&self, hash: PaymentHash) -> Vec<u8> {
        let mut identifier = vec![0, 0];
        identifier.extend(hash.0);
        // The same invoice gives the same token: nothing of it is stored.
        identifier.extend(hmac(&self.root, &hash.0));
        let signature = hmac(&self.root, &identifier);
        let mut token = vec![2, 2, IDENTIFIER_LEN as u8];
        token.extend(&identifier);
        token.extend([0, 0, 6, SIGNATURE_LEN as u8]);
        token.extend(signature);
        token
    }

    /// The payment hash of a token of ours whose preimage is shown; `None` for anything else.
    pub(crate) fn check(&self, token: &str, preimage: &str) -> Option<PaymentHash> {
        let bytes = base64::engine::general_purpose::STANDARD.decode(token).ok()?;
        if bytes.len() != TOKEN_LEN {
            return None;
        }
        let hash = PaymentHash(bytes.get(5..37)?.try_into().ok()?);
        let preimage: Preimage = preimage.to_ascii_lowercase().parse().ok()?;
        // Hashes are compared, so that time tells nothing of where two tokens differ.
        let ours = Sha256::digest(self.bytes(hash)) == Sha256::digest(&bytes);
        let paid = <[u8; 32]>::from(Sha256::digest(preimage.0)) == hash.0;
        (ours && paid).then_some(hash)
    }
}

/// What the key of a token is found by, in place of a secret's hash.
pub(crate) fn key_hash(hash: PaymentHash) -> [u8; 32] {
    let mut hasher = Sha256::new();
    hasher.update(b"satgrid-l402-key-v1\0");
    hasher.update(hash.0);
    hasher.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_token_with_its_preimage_opens() {
        let mint = Mint::new(&[7; 32]);
        let preimage = [9; 32];
        let hash = PaymentHash(Sha256::digest(preimage).into());
        let token = mint.token(hash);
        let shown = hex::encode(preimage);
        assert_eq!(mint.check(&token, &shown), Some(hash));
        assert_eq!(mint.check(&token, &shown.to_uppercase()), Some(hash));
        assert_eq!(mint.token(hash), token, "the same again");
        assert_eq!(mint.check(&token, &hex::encode([8; 32])), None, "another preimage");
        assert_eq!(Mint::new(&[8; 32]).check(&token, &shown), None, "another node's token");
        let mut bytes = base64::engine::general_purpose::STANDARD.decode(&token).unwrap();
        assert_eq!(bytes.len(), TOKEN_LEN);
        for at in 0..bytes.len() {
            bytes[at] ^= 1;
            let forged = base64::engine::general_purpose::STANDARD.encode(&bytes);
            assert_eq!(mint.check(&forged, &shown), None, "byte {at}");
            bytes[at] ^= 1;
        }
        for junk in ["", "%%%", "AgI="] {
            assert_eq!(mint.check(junk, &shown), None);
        }
    }
}
