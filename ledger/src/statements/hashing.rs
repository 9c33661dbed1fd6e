//! Salted hashes of prompts and outputs: they bind both sides to token ids without telling anyone the tokens.

use satgrid_types::{Digest, RequestId, Salt};
use sha2::{Digest as _, Sha256};

/// The hash of a prompt: SHA-256 over salt, then each token id as u32 little-endian.
pub fn prompt_hash(salt: &Salt, tokens: &[u32]) -> Digest {
    let mut hasher = Sha256::new();
    hasher.update(salt.0);
    for token in tokens {
        hasher.update(token.to_le_bytes());
    }
    Digest(hasher.finalize().into())
}

/// The running hash of a request's output.
///
/// h(0) = SHA-256(salt || request id); h(i+1) = SHA-256(h(i) || token id as u32 little-endian).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunningHash(Digest);

impl RunningHash {
    pub fn start(salt: &Salt, request: &RequestId) -> RunningHash {
        let mut hasher = Sha256::new();
        hasher.update(salt.0);
        hasher.update(request.0);
        RunningHash(Digest(hasher.finalize().into()))
    }
    pub fn push(&mut self, token: u32) {
        let mut hasher = Sha256::new();
        hasher.update(self.0.0);
        hasher.update(token.to_le_bytes());
        self.0 = Digest(hasher.finalize().into());
    }
    pub fn value(&self) -> Digest {
        self.0
    }
}

/// The commitment to a receipt's private fields: SHA-256(salt || canonical bytes of the private map).
pub fn private_hash(salt: &Salt, private_bytes: &[u8]) -> Digest {
    let mut hasher = Sha256::new();
    hasher.update(salt.0);
    hasher.update(private_bytes);
    Digest(hasher.finalize().into())
}
