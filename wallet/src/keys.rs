//! Every key of a node from one BIP-39 phrase: one thing to write down, one thing to lose.
//!
//! | key | from the BIP-39 seed by | path | why so |
//! |---|---|---|---|
//! | Lightning and on-chain | the seed itself, as the embedded node's entropy | its own (on chain BIP-84) | the same words open the funds in other wallets |
//! | Nostr | BIP-32 over secp256k1, NIP-06 | `m/44'/1237'/i'/0/0` | the same words log in to other Nostr clients (account `i`) |
//! | node identity (QUIC, receipts) | SLIP-0010 over ed25519 | `m/1935766631'/0'/i'` | `1935766631` is "satg" |
//! | sign of life | BIP-32 over secp256k1 | `m/44'/1237'/1935766631'/0/0` | one for the seed, so that two nodes on it see each other |
//! | session keys | SLIP-0010 over ed25519 | `m/1935766631'/1'/0'` is their master; key `i` is SHA-256(`"satgrid-session-key-v1\0"`, master, `i` as u64 big-endian) | a consumer shows each provider another key, and can still prove an old one |
//!
//! `i` is 0 until the identity is rotated, and then one more each time: the words give every key that ever was. The Lightning
//! key does not rotate, since channels hang on it: money moves to other words by closing them.
//!
//! The curves' master keys come from HMACs under different names ("Bitcoin seed", "ed25519 seed"), and the secp256k1
//! paths differ in their first hardened step, so no key tells anything about another. There is no passphrase: a second
//! secret that is not written down loses money more often than it saves any.
//!
//! Nothing here draws randomness: [`Phrase::from_entropy`] is given it. Secrets held by
//! these types are wiped when dropped and print as dots.

use bip39::{Language, Mnemonic};
use core::fmt;
use ed25519_dalek::SigningKey;
use hmac::{Hmac, Mac};
use secp256k1::{PublicKey, SECP256K1, Scalar, SecretKey};
use sha2::Sha512;
use thiserror::Error;
use zeroize::{Zeroize, Zeroizing};

/// First step of satgrid's own ed25519 paths.
const PURPOSE: u32 = 0x7361_7467;
const IDENTITY_BRANCH: u32 = 0;
const SESSION_BRANCH: u32 = 1;
/// Indices from here on are hardened.
const HARDENED: u32 = 1 << 31;
/// Identities per seed, one after the other.
pub const MAX_IDENTITIES: u32 = 1_000;
/// Session keys per seed.
pub const MAX_SESSION_KEYS: u32 = HARDENED;

/// Why words are not a phrase.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PhraseError {
    #[error("a phrase has 12 or 24 words; this one has {0}")]
    WordCount(usize),
    #[error("word {position} is not in the BIP-39 English list")]
    UnknownWord { position: usize },
    #[error("the words are known but their checksum is wrong: a word was mistaken or two changed places")]
    Checksum,
    #[error("16 or 32 bytes of entropy make a phrase; {0} were given")]
    Entropy(usize),
}

/// 12 or 24 English BIP-39 words.
#[derive(Clone, PartialEq, Eq)]
pub struct Phrase(Zeroizing<String>);

impl Phrase {
    /// 16 bytes give 12 words, 32 give 24.
    pub fn from_entropy(entropy: &[u8]) -> Result<Phrase, PhraseError> {
        if !matches!(entropy.len(), 16 | 32) {
            return Err(PhraseError::Entropy(entropy.len()));
        }
        let mnemonic =
            Mnemonic::from_entropy_in(Language::English, entropy).map_err(|_| PhraseError::Entropy(entropy.len()))?;
        Ok(Phrase(Zeroizing::new(mnemonic.to_string())))
    }

    /// Reads words in any case, with any white space between them.
    pub fn parse(text: &str) -> Result<Phrase, PhraseError> {
        let lower = Zeroizing::new(text.to_lowercase());
        let count = lower.split_whitespace().count();
        if !matches!(count, 12 | 24) {
            return Err(PhraseError::WordCount(count));
        }
        let mnemonic = Mnemonic::parse_in_normalized(Language::English, &lower).map_err(|e| match e {
            bip39::Error::UnknownWord(index) => PhraseError::UnknownWord { position: index + 1 },
            bip39::Error::BadWordCount(n) => PhraseError::WordCount(n),
            bip39::Error::BadEntropyBitCount(_)
            | bip39::Error::InvalidChecksum
            | bip39::Error::AmbiguousLanguages(_) => PhraseError::Checksum,
        })?;
        Ok(Phrase(Zeroizing::new(mnemonic.to_string())))
    }

    /// The words, to be shown once or written to a file of mode 0600.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// The BIP-39 seed (no passphrase). Takes 2,048 rounds of PBKDF2.
    pub fn seed(&self) -> Seed {
        // The words were checked when the phrase was made.
        let Ok(mnemonic) = Mnemonic::parse_in_normalized(Language::English, &self.0) else {
            unreachable!("a phrase holds checked words")
        };
        Seed(Zeroizing::new(mnemonic.to_seed_normalized("")))
    }
}

impl fmt::Debug for Phrase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Phrase(...)")
    }
}

/// The 64-byte BIP-39 seed, root of every key.
#[derive(Clone)]
pub struct Seed(Zeroizing<[u8; 64]>);

impl Seed {
    /// The seed as [`Seed::lightning`] gave it, on the other side of a pipe between two processes of one node.
    pub fn from_bytes(bytes: [u8; 64]) -> Seed {
        Seed(Zeroizing::new(bytes))
    }

    /// Entropy of the embedded Lightning node.
    pub fn lightning(&self) -> Zeroizing<[u8; 64]> {
        self.0.clone()
    }

    /// The Nostr secret key by NIP-06, of the `index`-th identity.
    pub fn nostr(&self, index: u32) -> Zeroizing<[u8; 32]> {
        self.nip_06(index % MAX_IDENTITIES)
    }

    /// The Nostr secret key under which the running node gives its sign of life.
    pub fn sign_of_life(&self) -> Zeroizing<[u8; 32]> {
        self.nip_06(PURPOSE)
    }

    /// The node's own ed25519 key: its QUIC identity and its signature under receipts; the `index`-th of them.
    pub fn identity(&self, index: u32) -> SigningKey {
        self.ed25519(IDENTITY_BRANCH, index % MAX_IDENTITIES)
    }

    fn nip_06(&self, account: u32) -> Zeroizing<[u8; 32]> {
        let path = [44 | HARDENED, 1237 | HARDENED, account | HARDENED, 0, 0];
        path.iter().fold(Node::secp256k1_master(&self.0[..]), |node, &i| node.secp256k1_child(i)).secret()
    }

    /// The key of the consumer's `index`-th session.
    pub fn session(&self, index: u32) -> SigningKey {
        self.ed25519(SESSION_BRANCH, index % MAX_SESSION_KEYS)
    }

    fn ed25519(&self, branch: u32, index: u32) -> SigningKey {
        let path = [PURPOSE, branch, index];
        let node = path.iter().fold(Node::ed25519_master(&self.0[..]), |node, &i| node.ed25519_child(i));
        SigningKey::from_bytes(&node.secret())
    }
}

impl fmt::Debug for Seed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Seed(...)")
    }
}

/// One node of a derivation tree: a private key and its chain code.
struct Node {
    key: Zeroizing<[u8; 32]>,
    chain: Zeroizing<[u8; 32]>,
}

impl Node {
    fn secp256k1_master(seed: &[u8]) -> Node {
        Node::from_hmac(b"Bitcoin seed", &[seed])
    }
    fn ed25519_master(seed: &[u8]) -> Node {
        Node::from_hmac(b"ed25519 seed", &[seed])
    }

    /// SLIP-0010: every step is hardened, and the left half is the key as it is.
    fn ed25519_child(&self, index: u32) -> Node {
        let hardened = (index | HARDENED).to_be_bytes();
        Node::from_hmac(&self.chain[..], &[&[0], &self.key[..], &hardened])
    }

    /// BIP-32. A left half outside the curve's order has a probability of 2^-127; SLIP-0010's rule for it (hash
    /// again) stands in for BIP-32's (take the next index), so that the function is total.
    fn secp256k1_child(&self, index: u32) -> Node {
        let parent = secret_key(&self.key);
        let step = if index >= HARDENED {
            Node::from_hmac(&self.chain[..], &[&[0], &self.key[..], &index.to_be_bytes()])
        } else {
            let point = PublicKey::from_secret_key(SECP256K1, &parent).serialize();
            Node::from_hmac(&self.chain[..], &[&point, &index.to_be_bytes()])
        };
        let mut step = step;
        loop {
            let child = Scalar::from_be_bytes(*step.key).ok().and_then(|tweak| parent.add_tweak(&tweak).ok());
            if let Some(mut child) = child {
                let key = Zeroizing::new(child.secret_bytes());
                child.non_secure_erase();
                return Node { key, chain: step.chain };
            }
            step = Node::from_hmac(&self.chain[..], &[&[1], &step.chain[..], &index.to_be_bytes()]);
        }
    }

    fn from_hmac(key: &[u8], parts: &[&[u8]]) -> Node {
        // HMAC takes a key of any length.
        let Ok(mut mac) = Hmac::<Sha512>::new_from_slice(key) else { unreachable!("HMAC keys have no length limit") };
        for part in parts {
            mac.update(part);
        }
        let mut out = mac.finalize().into_bytes();
        let mut node = Node { key: Zeroizing::new([0; 32]), chain: Zeroizing::new([0; 32]) };
        node.key.copy_from_slice(&out[..32]);
        node.chain.copy_from_slice(&out[32..]);
        out.as_mut_slice().zeroize();
        node
    }

    fn secret(self) -> Zeroizing<[u8; 32]> {
        self.key
    }
}

/// Zero and values past the order have a probability of 2^-127 in a master key and none in a derived one.
fn secret_key(bytes: &[u8; 32]) -> SecretKey {
    let Ok(key) = SecretKey::from_slice(bytes) else { unreachable!("a master key outside the curve's order") };
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Test vectors 1 and 2 of SLIP-0010 for ed25519: (seed, path, private key).
    #[test]
    fn slip_0010_vectors() {
        #[track_caller]
        fn check(seed: &str, path: &[u32], private: &str) {
            let seed = hex::decode(seed).unwrap();
            let node = path.iter().fold(Node::ed25519_master(&seed), |node, &i| node.ed25519_child(i));
            assert_eq!(hex::encode(*node.secret()), private);
        }
        let one = "000102030405060708090a0b0c0d0e0f";
        check(one, &[], "2b4be7f19ee27bbf30c667b642d5f4aa69fd169872f8fc3059c08ebae2eb19e7");
        check(one, &[0], "68e0fe46dfb67e368c75379acec591dad19df3cde26e63b93a8e704f1dade7a3");
        check(one, &[0, 1], "b1d0bad404bf35da785a64ca1ac54b2617211d2777696fbffaf208f746ae84f2");
        check(one, &[0, 1, 2], "92a5b23c0b8a99e37d07df3fb9966917f5d06e02ddbd909c7e184371463e9fc9");
        check(one, &[0, 1, 2, 2], "30d1dc7e5fc04c31219ab25a27ae00b50f6fd66622f6e9c913253d6511d1e662");
        check(one, &[0, 1, 2, 2, 1_000_000_000], "8f94d394a8e8fd6b1bc2f3f49f5c47e385281d5c17e65324b0f62483e37e8793");
        let two = "fffcf9f6f3f0edeae7e4e1dedbd8d5d2cfccc9c6c3c0bdbab7b4b1aeaba8a5a29f9c999693908d8a8784817e7b7875726f6c\
                   696663605d5a5754514e4b484542";
        check(two, &[], "171cb88b1b3c1db25add599712e36245d75bc65a1a5c9e18d76f9f2b1eab4012");
        check(two, &[0], "1559eb2bbec5790b0c65d8693e4d0875b1747f4970ae8b650486ed7470845635");
        check(two, &[0, 2147483647], "ea4f5bfe8694d8bb74b7b59404632fd5968b774ed545e810de9c32a4fb4192f4");
    }

    /// BIP-32's first test vector, m/0'/1 (both kinds of step).
    #[test]
    fn bip_32_vector() {
        let seed = hex::decode("000102030405060708090a0b0c0d0e0f").unwrap();
        let node = Node::secp256k1_master(&seed).secp256k1_child(HARDENED).secp256k1_child(1);
        assert_eq!(hex::encode(*node.key), "3c6cb8d0f6a264c91ea8b5030fadaa8e538b020f0a387421a12de9319dc93368");
        assert_eq!(hex::encode(*node.chain), "2a7857631386ba23dacac34180dd1983734e444fdbf774041578e9b6adb37c19");
    }

    #[test]
    fn nip_06_vectors() {
        #[track_caller]
        fn check(words: &str, secret: &str) {
            assert_eq!(hex::encode(*Phrase::parse(words).unwrap().seed().nostr(0)), secret);
        }
        check(
            "leader monkey parrot ring guide accident before fence cannon height naive bean",
            "7f7ff03d123792d6ac594bfa67bf6d0c0ab55b6b1fdb6249303fe861f1ccba9a",
        );
        check(
            "what bleak badge arrange retreat wolf trade produce cricket blur garlic valid proud rude strong choose \
             busy staff weather area salt hollow arm fade",
            "c15d739894c81a2fcfd3a2df85a0d2c0dbc47a280d092799f144d73d7ae78add",
        );
    }

    #[test]
    fn bip_39_vectors_without_passphrase() {
        let words = Phrase::from_entropy(&[0; 16]).unwrap();
        assert_eq!(words.reveal(), format!("{}about", "abandon ".repeat(11)));
        assert!(
            hex::encode(*words.seed().lightning())
                .starts_with("5eb00bbddcf069084889a8ab9155568165f5c453ccb85e70811aaed6f6da5fc1")
        );
        assert!(Phrase::from_entropy(&[0xff; 32]).unwrap().reveal().ends_with("zoo vote"));
    }

    #[test]
    fn words_are_read_as_people_write_them() {
        #[track_caller]
        fn check(words: &str, expect: Result<(), PhraseError>) {
            assert_eq!(Phrase::parse(words).map(drop), expect);
        }
        let good = format!("{}about", "abandon ".repeat(11));
        check(&good, Ok(()));
        check(&format!("\n  {}\t", good.to_uppercase().replace(' ', "\n")), Ok(()));
        check(&"abandon ".repeat(12), Err(PhraseError::Checksum));
        check(&"abandon ".repeat(15), Err(PhraseError::WordCount(15)));
        check("", Err(PhraseError::WordCount(0)));
        check(&good.replacen("abandon", "satoshiz", 1), Err(PhraseError::UnknownWord { position: 1 }));
        assert_eq!(Phrase::from_entropy(&[0; 20]).map(drop), Err(PhraseError::Entropy(20)));
        assert_eq!(
            format!("{:?} {:?}", Phrase::parse(&good).unwrap(), Phrase::parse(&good).unwrap().seed()),
            "Phrase(...) Seed(...)"
        );
    }

    #[test]
    fn keys_of_one_seed_are_all_different_and_always_the_same() {
        let seed = Phrase::from_entropy(&[9; 32]).unwrap().seed();
        let keys: std::collections::BTreeSet<[u8; 32]> = [
            seed.identity(0).to_bytes(),
            seed.identity(1).to_bytes(),
            seed.session(0).to_bytes(),
            seed.session(1).to_bytes(),
            *seed.nostr(0),
            *seed.nostr(1),
            *seed.sign_of_life(),
            seed.lightning()[..32].try_into().unwrap(),
        ]
        .into();
        assert_eq!(keys.len(), 8);
        let again = Phrase::from_entropy(&[9; 32]).unwrap().seed();
        assert_eq!(seed.session(7).to_bytes(), again.session(7).to_bytes());
    }
}
