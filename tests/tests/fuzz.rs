//! Decoders under damaged bytes: no input makes one panic, and what one accepts encodes to the same bytes again.
//!
//! Inputs are the golden vectors, frames and files of ours, mutated by a seeded generator: flipped, cut, doubled, spliced,
//! with lengths overwritten. No nightly toolchain and no coverage feedback; the corpus is deep enough to start from. An
//! input that fails is written to the target folder and its path printed: add it to the corpus with the fix.
//!
//! Each target runs for a second; `make fuzz SECONDS_EACH=600` for longer, with a new seed each time.
#![cfg(test)]
#![allow(clippy::unwrap_used)]

use rand::{Rng, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use satgrid_engine::{gguf::Gguf, tiny::TinyModel};
use satgrid_ledger::{
    audit::{Detail, audit},
    bundle::{Opened, open},
    entry::Entry,
    statements::{Ack, CreditNote, Receipt, RequestOpen, SessionClose, SessionOpen, SliceDescriptor},
};
use satgrid_protocol::frame::{self, ConsumerControl, ConsumerFrame, ProviderControl, ProviderFrame};
use satgrid_types::{NostrEvent, Quote, UnixMs, cbor, verify_listing};
use satgrid_wallet::invoice;
use std::{
    collections::BTreeSet,
    io::Cursor,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// Mutations of one input, at most.
const MUTATIONS: usize = 6;
/// Of each corpus file this much is used: decoders read from the beginning.
const LONGEST: usize = 64 * 1024;

fn seconds() -> u64 {
    std::env::var("SATGRID_FUZZ_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}
fn seed() -> u64 {
    std::env::var("SATGRID_FUZZ_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(7)
}

fn vectors() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("vectors")
}

/// Every text of hex in the golden vectors, as bytes: statements, frames' parts, entries, signatures.
fn golden() -> Vec<Vec<u8>> {
    fn collect(value: &serde_json::Value, into: &mut BTreeSet<Vec<u8>>) {
        match value {
            serde_json::Value::String(text) if text.len() > 16 => into.extend(hex::decode(text)),
            serde_json::Value::Array(items) => items.iter().for_each(|item| collect(item, into)),
            serde_json::Value::Object(fields) => fields.values().for_each(|item| collect(item, into)),
            serde_json::Value::Null
            | serde_json::Value::Bool(_)
            | serde_json::Value::Number(_)
            | serde_json::Value::String(_) => {}
        }
    }
    let mut found = BTreeSet::new();
    for file in std::fs::read_dir(vectors()).unwrap().flatten().filter(|f| f.path().extension().is_some()) {
        let text = std::fs::read_to_string(file.path()).unwrap_or_default();
        if let Ok(value) = serde_json::from_str(&text) {
            collect(&value, &mut found);
        }
    }
    assert!(found.len() > 100, "the vectors are there");
    found.into_iter().collect()
}

fn mutate(rng: &mut ChaCha8Rng, corpus: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = corpus.choose(rng).unwrap().clone();
    bytes.truncate(LONGEST);
    for _ in 0..rng.gen_range(1..=MUTATIONS) {
        if bytes.is_empty() {
            bytes.push(rng.r#gen());
        }
        let at = rng.gen_range(0..bytes.len());
        match rng.gen_range(0..9) {
            0 => bytes[at] ^= 1 << rng.gen_range(0..8),
            1 => bytes[at] = *[0, 1, 0x1f, 0x3b, 0x5b, 0x7f, 0x80, 0x9b, 0xbf, 0xf6, 0xfb, 0xff].choose(rng).unwrap(),
            2 => bytes.truncate(at),
            3 => {
                bytes.remove(at);
            }
            4 => bytes.insert(at, rng.r#gen()),
            5 => {
                // A part of itself, or of another one, comes once more.
                let other = corpus.choose(rng).unwrap();
                let from = rng.gen_range(0..=other.len().min(LONGEST));
                let upto = (from + rng.gen_range(0..64)).min(other.len());
                bytes.splice(at..at, other[from..upto].iter().copied());
            }
            6 | 7 => {
                // A length or count that lies.
                let number = *[0, 1, 0xff, 0xffff, u32::MAX.into(), u64::MAX / 2, u64::MAX].choose(rng).unwrap();
                let number = if rng.gen_bool(0.5) { u64::to_le_bytes(number) } else { u64::to_be_bytes(number) };
                let width = *[1, 2, 4, 8].choose(rng).unwrap();
                for (place, byte) in bytes[at..].iter_mut().zip(&number[..width]) {
                    *place = *byte;
                }
            }
            _ => {
                let end = (at + rng.gen_range(0..32)).min(bytes.len());
                bytes.drain(at..end);
            }
        }
    }
    bytes
}

/// Runs a target for its time; whether an input was accepted is counted, so that a target that accepts nothing is noticed.
#[track_caller]
fn fuzz(name: &str, corpus: &[Vec<u8>], target: impl Fn(&[u8]) -> bool) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed());
    let accepted_whole = corpus.iter().filter(|bytes| target(bytes)).count();
    assert!(accepted_whole > 0, "{name}: nothing of the corpus is accepted as it is");
    let (began, mut runs, mut accepted) = (Instant::now(), 0_u64, 0_u64);
    while began.elapsed() < Duration::from_secs(seconds()) {
        let bytes = mutate(&mut rng, corpus);
        match catch_unwind(AssertUnwindSafe(|| target(&bytes))) {
            Ok(taken) => accepted += u64::from(taken),
            Err(_) => {
                let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fuzz-{name}-{runs}.bin"));
                std::fs::write(&path, &bytes).unwrap();
                panic!("{name}: run {runs} of seed {} fails on {}", seed(), path.display());
            }
        }
        runs += 1;
    }
    eprintln!("  {name}: {runs} inputs from {} seeds, {accepted} accepted", corpus.len());
}

fn same<T: for<'b> minicbor_decode::Decodes<'b>>(bytes: &[u8]) -> bool {
    T::accepts(bytes)
}

/// Decoding and encoding again, for every type of the wire and the ledger.
mod minicbor_decode {
    use super::*;

    pub(crate) trait Decodes<'b> {
        fn accepts(bytes: &'b [u8]) -> bool;
    }
    macro_rules! decodes {
        ($($kind:ty),* $(,)?) => {$(
            impl<'b> Decodes<'b> for $kind {
                fn accepts(bytes: &'b [u8]) -> bool {
                    match cbor::decode_limited::<$kind>(bytes, frame::MAX_FRAME) {
                        Ok(value) => {
                            assert_eq!(cbor::encode(&value), bytes, "one value has one form");
                            true
                        }
                        Err(error) => {
                            assert!(!error.to_string().is_empty());
                            false
                        }
                    }
                }
            }
        )*};
    }
    decodes!(
        ConsumerControl,
        ConsumerFrame,
        ProviderControl,
        ProviderFrame,
        Quote,
        SessionOpen,
        RequestOpen,
        Ack,
        Receipt,
        SessionClose,
        CreditNote,
        SliceDescriptor,
        Entry,
    );
}

#[test]
fn frames() {
    let golden = golden();
    // Statements of the vectors inside frames, and frames by hand.
    let mut corpus: Vec<Vec<u8>> = ["8200820783010203", "8203820318c8", "80", "81068107", "8201820100", "8100"]
        .iter()
        .map(|text| hex::decode(text).unwrap())
        .collect();
    corpus.push(frame::encode(&ProviderFrame::Chunk(7, (0..32).collect())));
    corpus.push(frame::encode(&ConsumerControl::WantInvoice(3, satgrid_types::Msat(10_000))));
    corpus.push(frame::encode(&ProviderControl::Refused(frame::Refusal::Busy, "all slots are taken".into())));
    corpus.push(frame::encode(&ProviderControl::Closed));
    corpus.push(frame::encode(&ConsumerFrame::Cancel));
    for body in golden.iter().filter(|body| body.len() < 2_000) {
        corpus.push(
            [&[0x82, 0x05, 0x81, 0x82, 0x59][..], &u16::try_from(body.len()).unwrap().to_be_bytes(), body].concat(),
        );
    }
    fuzz("frames", &corpus, |bytes| {
        let ours = [same::<ConsumerControl>(bytes), same::<ProviderControl>(bytes)];
        let streams = [same::<ConsumerFrame>(bytes), same::<ProviderFrame>(bytes)];
        ours.into_iter().chain(streams).any(|taken| taken)
    });
}

#[test]
fn statements() {
    fuzz("statements", &golden(), |bytes| {
        let taken = [
            same::<Quote>(bytes),
            same::<SessionOpen>(bytes),
            same::<RequestOpen>(bytes),
            same::<Ack>(bytes),
            same::<Receipt>(bytes),
            same::<SessionClose>(bytes),
            same::<CreditNote>(bytes),
            same::<SliceDescriptor>(bytes),
            same::<Entry>(bytes),
        ];
        taken.into_iter().any(|taken| taken)
    });
}

/// The content of listings is signed anew after each mutation: what is behind the signature is reached too.
#[test]
fn listings() {
    let text = std::fs::read_to_string(vectors().join("listing.json")).unwrap();
    let document: serde_json::Value = serde_json::from_str(&text).unwrap();
    let events = document["vectors"].as_array().unwrap().iter().filter_map(|v| v["event"].as_str());
    let corpus: Vec<Vec<u8>> = events.map(|event| event.as_bytes().to_vec()).collect();
    let key = secp256k1::Keypair::from_seckey_slice(secp256k1::SECP256K1, &[7; 32]).unwrap();
    fuzz("listings", &corpus, |bytes| {
        let Ok(event) = NostrEvent::from_json(&String::from_utf8_lossy(bytes)) else { return false };
        let now = UnixMs(event.created_at.saturating_mul(1_000));
        let _ = verify_listing(event.clone(), now);
        let again = NostrEvent::sign(&key, event.created_at, event.kind, event.tags, event.content, &[0; 32]);
        let _ = verify_listing(again, now);
        true
    });
    // The content alone, in an event that is right otherwise.
    let first: NostrEvent = NostrEvent::from_json(std::str::from_utf8(&corpus[0]).unwrap()).unwrap();
    let contents: Vec<Vec<u8>> = corpus
        .iter()
        .filter_map(|event| NostrEvent::from_json(std::str::from_utf8(event).ok()?).ok())
        .map(|event| event.content.into_bytes())
        .collect();
    fuzz("listing contents", &contents, |bytes| {
        let content = String::from_utf8_lossy(bytes).into_owned();
        let event = NostrEvent::sign(&key, first.created_at, first.kind, first.tags.clone(), content, &[0; 32]);
        // Signed by a key that no binding names: nothing of it may be believed, whatever it says.
        assert!(verify_listing(event, UnixMs(first.created_at * 1_000)).is_err());
        true
    });
}

#[test]
fn bundles() {
    let files = std::fs::read_dir(vectors().join("bundles")).unwrap().flatten();
    let mut corpus: Vec<Vec<u8>> = files.filter_map(|file| std::fs::read(file.path()).ok()).collect();
    corpus.sort();
    fuzz("bundles", &corpus, |bytes| match open(bytes) {
        Ok(Opened::Journal(reader)) => audit(reader, Detail::Sessions).is_ok(),
        Ok(_) => true,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            false
        }
    });
}

#[test]
fn model_files() {
    let mut whole = Vec::new();
    TinyModel::default().write(&mut whole).unwrap();
    // The tensors' bytes are not read with the header; the length of the file is looked at.
    fuzz("model files", &[whole.clone()], |bytes| {
        let mut file = bytes.to_vec();
        if file.len() >= LONGEST {
            file.extend_from_slice(&whole[LONGEST.min(whole.len())..]);
        }
        Gguf::read(&mut Cursor::new(file)).is_ok()
    });
}

#[test]
fn invoices() {
    let text = std::fs::read_to_string(vectors().join("bolt11.json")).unwrap();
    let mut corpus = Vec::new();
    let document: serde_json::Value = serde_json::from_str(&text).unwrap();
    for vector in document["vectors"].as_array().unwrap() {
        let texts = vector.as_object().unwrap().values().filter_map(|value| value.as_str());
        corpus.extend(texts.filter(|text| text.starts_with("ln")).map(|text| text.as_bytes().to_vec()));
    }
    fuzz("invoices", &corpus, |bytes| invoice::read(&String::from_utf8_lossy(bytes)).is_ok());
}
