//! The seed under a passphrase: age's version 1 file format with its `scrypt` recipient, armored as text.
//!
//! age's format (C2SP, `age.md`), so that the file outlives this program: `age -d seed` opens it, and what `age -p -a`
//! wrote is opened here. Only the shape that such a file has is read: one scrypt stanza, and a payload of one chunk.
//!
//! ```text
//! age-encryption.org/v1
//! -> scrypt SALT LOG_N                 scrypt(N = 2^LOG_N, r = 8, p = 1) of the passphrase wraps the file key
//! WRAPPED
//! --- MAC                              HMAC-SHA256 by the file key over all of the above
//! NONCE || ChaCha20-Poly1305(payload)
//! ```
//!
//! Written by hand on `scrypt` and `ring`, since the `age` crate brings some thirty crates of translation machinery with it.
//! A vector that the `age` tools open is in the tests. Nothing here draws randomness: [`seal`] is given it.

use base64::Engine as _;
use base64::prelude::{BASE64_STANDARD, BASE64_STANDARD_NO_PAD};
use hmac::{Hmac, Mac};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use sha2::Sha256;
use thiserror::Error;
use zeroize::Zeroizing;

/// The work that a new file asks for: 2^17 rounds over 128 MiB, about a second.
pub const WORK: u8 = 17;
/// The most that is spent on a file that somebody made: 2^20, over 1 GiB.
pub const MOST_WORK: u8 = 20;
/// What is sealed is words. No longer text is.
pub const MAX_TEXT: usize = 4_096;
/// Random bytes that [`seal`] is given.
pub const RANDOM_BYTES: usize = KEY_BYTES + SALT_BYTES + NONCE_BYTES;

const KEY_BYTES: usize = 16;
const SALT_BYTES: usize = 16;
const NONCE_BYTES: usize = 16;
const TAG_BYTES: usize = 16;
const VERSION: &str = "age-encryption.org/v1";
const SALT_LABEL: &[u8] = b"age-encryption.org/v1/scrypt";
const BEGIN: &str = "-----BEGIN AGE ENCRYPTED FILE-----";
const END: &str = "-----END AGE ENCRYPTED FILE-----";
const ARMOR_COLUMNS: usize = 64;
/// A file key is used once, and so is the first chunk's number: eleven bytes of it, and the mark of the last chunk.
const WRAP_NONCE: [u8; 12] = [0; 12];
const LAST_CHUNK: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];

/// Why a sealed text was not opened.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum OpenError {
    #[error("the passphrase is wrong")]
    WrongPassphrase,
    #[error("not a file that a passphrase opens: {0}")]
    Malformed(&'static str),
    #[error("it asks for 2^{asked} rounds of work, more than 2^{MOST_WORK}: it was not made here")]
    TooMuchWork { asked: u8 },
    #[error("the passphrase is right and the file is damaged: put a copy of it back, or restore the words from paper")]
    Damaged,
}

/// Why a text was not sealed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SealError {
    #[error("an empty passphrase protects nothing")]
    EmptyPassphrase,
    #[error("{0} bytes are more than {MAX_TEXT}")]
    TooLong(usize),
    #[error("2^{0} rounds of work are more than this machine can count")]
    Work(u8),
}

/// Whether this is a sealed text, whoever can open it.
pub fn is_sealed(text: &str) -> bool {
    text.trim_start().starts_with(BEGIN)
}

/// Seals `text` under `passphrase`. `random` must never be used twice.
pub fn seal(text: &str, passphrase: &str, work: u8, random: &[u8; RANDOM_BYTES]) -> Result<String, SealError> {
    if passphrase.is_empty() {
        return Err(SealError::EmptyPassphrase);
    }
    if text.len() > MAX_TEXT {
        return Err(SealError::TooLong(text.len()));
    }
    let (file_key, rest) = random.split_at(KEY_BYTES);
    let (salt, nonce) = rest.split_at(SALT_BYTES);
    let wrapping = wrapping_key(passphrase, salt, work).ok_or(SealError::Work(work))?;
    let wrapped = encrypt(&wrapping, WRAP_NONCE, file_key);
    let head = format!(
        "{VERSION}\n-> scrypt {} {work}\n{}\n---",
        BASE64_STANDARD_NO_PAD.encode(salt),
        BASE64_STANDARD_NO_PAD.encode(wrapped)
    );
    let tag = mac(&*hkdf(&[], b"header", file_key), &[head.as_bytes()]).finalize().into_bytes();
    let mut file = format!("{head} {}\n", BASE64_STANDARD_NO_PAD.encode(tag)).into_bytes();
    file.extend_from_slice(nonce);
    file.extend(encrypt(&hkdf(nonce, b"payload", file_key), LAST_CHUNK, text.as_bytes()));
    let body = BASE64_STANDARD.encode(file);
    let mut armored = format!("{BEGIN}\n");
    let mut rest = body.as_str();
    while !rest.is_empty() {
        // Base64 is ASCII: every index is a boundary.
        let (line, after) = rest.split_at(rest.len().min(ARMOR_COLUMNS));
        armored.push_str(line);
        armored.push('\n');
        rest = after;
    }
    Ok(armored + END + "\n")
}

/// Opens what [`seal`] or `age -p -a` made.
pub fn open(armored: &str, passphrase: &str) -> Result<Zeroizing<String>, OpenError> {
    let file = unarmor(armored)?;
    let malformed = OpenError::Malformed;
    let mut rest = file.as_slice();
    let mut line = || -> Result<&str, OpenError> {
        let end = rest.iter().position(|b| *b == b'\n').ok_or(malformed("its header has no end"))?;
        let (line, after) = rest.split_at(end);
        rest = &after[1..];
        core::str::from_utf8(line).map_err(|_| malformed("its header is no text"))
    };
    if line()? != VERSION {
        return Err(malformed("it is of another version of age"));
    }
    let stanza = line()?;
    let mut words = stanza.split(' ');
    let (Some("->"), Some("scrypt"), Some(salt), Some(work), None) =
        (words.next(), words.next(), words.next(), words.next(), words.next())
    else {
        return Err(malformed("it is encrypted to a key, not by a passphrase"));
    };
    let salt = decode::<SALT_BYTES>(salt).ok_or(malformed("its salt"))?;
    let plain = work.bytes().all(|b| b.is_ascii_digit()) && !work.starts_with('0');
    let work: u8 = work.parse().ok().filter(|_| plain).ok_or(malformed("its work factor"))?;
    let wrapped = line()?;
    let sealed_key = decode::<{ KEY_BYTES + TAG_BYTES }>(wrapped).ok_or(malformed("its wrapped key"))?;
    let last = line()?;
    let tag = last.strip_prefix("--- ").and_then(decode::<32>).ok_or(malformed("its header's mark"))?;
    let (nonce, payload) = rest.split_at_checked(NONCE_BYTES).ok_or(malformed("it has no payload"))?;
    if payload.len() > MAX_TEXT + TAG_BYTES {
        return Err(malformed("it holds more than words"));
    }
    if work > MOST_WORK {
        return Err(OpenError::TooMuchWork { asked: work });
    }
    let wrapping = wrapping_key(passphrase, &salt, work).ok_or(malformed("its work factor"))?;
    let file_key = decrypt(&wrapping, WRAP_NONCE, &sealed_key).ok_or(OpenError::WrongPassphrase)?;
    let head = format!("{VERSION}\n{stanza}\n{wrapped}\n---");
    let marked = mac(&*hkdf(&[], b"header", &file_key), &[head.as_bytes()]).verify_slice(&tag);
    marked.map_err(|_| OpenError::Damaged)?;
    let text = decrypt(&hkdf(nonce, b"payload", &file_key), LAST_CHUNK, payload).ok_or(OpenError::Damaged)?;
    let text = core::str::from_utf8(&text).map_err(|_| malformed("it holds no text"))?;
    Ok(Zeroizing::new(text.to_owned()))
}

fn unarmor(text: &str) -> Result<Vec<u8>, OpenError> {
    let inner = text.trim().strip_prefix(BEGIN).and_then(|rest| rest.strip_suffix(END));
    let inner = inner.ok_or(OpenError::Malformed("it has no armor; `age -a` writes it"))?;
    let body: String = inner.split_ascii_whitespace().collect();
    BASE64_STANDARD.decode(body).map_err(|_| OpenError::Malformed("its armor is damaged"))
}

fn decode<const N: usize>(text: &str) -> Option<[u8; N]> {
    BASE64_STANDARD_NO_PAD.decode(text).ok()?.try_into().ok()
}

/// `None` for a work factor that no machine can do.
fn wrapping_key(passphrase: &str, salt: &[u8], work: u8) -> Option<Zeroizing<[u8; 32]>> {
    let params = scrypt::Params::new(work, 8, 1, 32).ok()?;
    let salt = [SALT_LABEL, salt].concat();
    let mut key = Zeroizing::new([0; 32]);
    scrypt::scrypt(passphrase.as_bytes(), &salt, &params, key.as_mut_slice()).ok()?;
    Some(key)
}

fn mac(key: &[u8], parts: &[&[u8]]) -> Hmac<Sha256> {
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(key) else { unreachable!("HMAC keys have no length limit") };
    parts.iter().for_each(|part| mac.update(part));
    mac
}

/// HKDF-SHA256 (RFC 5869), one block of it.
fn hkdf(salt: &[u8], info: &[u8], secret: &[u8]) -> Zeroizing<[u8; 32]> {
    let extracted = mac(salt, &[secret]).finalize().into_bytes();
    Zeroizing::new(mac(&extracted, &[info, &[1]]).finalize().into_bytes().into())
}

fn cipher(key: &[u8; 32]) -> LessSafeKey {
    let Ok(key) = UnboundKey::new(&CHACHA20_POLY1305, key) else { unreachable!("a key of this cipher has 32 bytes") };
    LessSafeKey::new(key)
}

fn encrypt(key: &[u8; 32], nonce: [u8; 12], text: &[u8]) -> Vec<u8> {
    let mut out = text.to_vec();
    let sealed = cipher(key).seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::empty(), &mut out);
    assert!(sealed.is_ok(), "texts are far below the cipher's limit");
    out
}

fn decrypt(key: &[u8; 32], nonce: [u8; 12], sealed: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    let mut out = Zeroizing::new(sealed.to_vec());
    let nonce = Nonce::assume_unique_for_key(nonce);
    let length = cipher(key).open_in_place(nonce, Aad::empty(), &mut out).ok()?.len();
    out.truncate(length);
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORDS: &str = "abandon abandon abandon abandon abandon abandon abandon abandon abandon abandon abandon about";

    fn sealed(work: u8) -> String {
        let random: [u8; RANDOM_BYTES] = core::array::from_fn(|i| u8::try_from(i).unwrap());
        seal(WORDS, "correct horse", work, &random).unwrap()
    }

    #[test]
    fn only_the_passphrase_opens_it() {
        let text = sealed(4);
        assert!(is_sealed(&text) && !is_sealed(WORDS) && !text.contains("abandon"));
        assert!(text.lines().all(|line| line.len() <= ARMOR_COLUMNS));
        assert_eq!(open(&text, "correct horse").unwrap().as_str(), WORDS);
        assert_eq!(open(&text.replace('\n', "\r\n"), "correct horse").unwrap().as_str(), WORDS);
        for wrong in ["", "correct horse ", "Correct horse", "battery staple"] {
            assert_eq!(open(&text, wrong), Err(OpenError::WrongPassphrase), "{wrong:?}");
        }
        let random = [7; RANDOM_BYTES];
        assert_eq!(seal(WORDS, "", 4, &random), Err(SealError::EmptyPassphrase));
        assert_eq!(seal(&"x".repeat(MAX_TEXT + 1), "p", 4, &random), Err(SealError::TooLong(MAX_TEXT + 1)));
    }

    /// Made by another implementation from the same random bytes; age's Rust tool (`rage`) opens it.
    #[test]
    fn the_file_is_ages() {
        let file = "YWdlLWVuY3J5cHRpb24ub3JnL3YxCi0+IHNjcnlwdCBaR1ZtWjJocGFtdHNiVzV2\n\
                    Y0hGeWN3IDEwCk5EVXh2T1JWNGlSSFg3WVlSTUk5MHh5V0Y4KzkyTWdYVkp3NTAv\n\
                    Yjl1d1EKLS0tIDNJa2xCc3o4QXY4RmVPc2JSa2x6RzhkZVcyQ2M1eThQcTZ4bktm\n\
                    K1RUemsKyMnKy8zNzs/Q0dLT1NXW1wuNRc0XMcf28I7fEPUw/HN27ZH1m6D5EUQt\n\
                    Frw/W2q5J90Ttc56oA0ilVgKVSiliSJ5lPiL/oEGXZq8cf11IlJecw==";
        let file = format!("{BEGIN}\n{file}\n{END}\n");
        let words = format!("{}wrong\n", "zoo ".repeat(11));
        assert_eq!(open(&file, "träumen").unwrap().as_str(), words);
        let (key, salt, nonce) = ((0..16), (100..116), (200..216));
        let random: Vec<u8> = key.chain(salt).chain(nonce).collect();
        assert_eq!(seal(&words, "träumen", 10, &random.try_into().unwrap()).unwrap(), file);
    }

    #[test]
    fn no_byte_can_be_changed_unnoticed() {
        let file = unarmor(&sealed(1)).unwrap();
        for place in 0..file.len() {
            let mut changed = file.clone();
            changed[place] ^= 1;
            let text = format!("{BEGIN}\n{}\n{END}\n", BASE64_STANDARD.encode(&changed));
            assert!(open(&text, "correct horse").is_err(), "byte {place}");
        }
        for length in 0..file.len() {
            let text = format!("{BEGIN}\n{}\n{END}\n", BASE64_STANDARD.encode(&file[..length]));
            assert!(open(&text, "correct horse").is_err(), "{length} bytes");
        }
    }

    #[test]
    fn work_that_nobody_asked_for_is_refused() {
        let file = unarmor(&sealed(1)).unwrap();
        let head = String::from_utf8_lossy(&file[..80]).into_owned();
        let (line, rest) = (head.lines().nth(1).unwrap(), head.find(" 1\n").unwrap());
        assert!(line.ends_with(" 1"));
        let with = |work: &str| {
            let mut changed = file[..=rest].to_vec();
            changed.extend_from_slice(work.as_bytes());
            changed.extend_from_slice(&file[rest + 2..]);
            open(&format!("{BEGIN}\n{}\n{END}\n", BASE64_STANDARD.encode(&changed)), "correct horse")
        };
        assert_eq!(with("30"), Err(OpenError::TooMuchWork { asked: 30 }));
        for work in ["01", "+1", "", "300", "0"] {
            assert!(matches!(with(work), Err(OpenError::Malformed(_))), "{work:?}");
        }
    }

    #[test]
    fn keys_and_other_versions_are_told_apart() {
        #[track_caller]
        fn check(header: &str) {
            let text = format!("{BEGIN}\n{}\n{END}\n", BASE64_STANDARD.encode(header));
            assert!(matches!(open(&text, "p"), Err(OpenError::Malformed(_))), "{header:?}");
        }
        check("");
        check("age-encryption.org/v2\n");
        check("age-encryption.org/v1\n-> X25519 abc\n");
        check("age-encryption.org/v1\n-> scrypt AAAAAAAAAAAAAAAAAAAAAA 4 5\n");
        assert!(matches!(open(WORDS, "p"), Err(OpenError::Malformed(_))));
    }
}
