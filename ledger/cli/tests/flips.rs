//! Every single bit of files as a market made them, flipped: found, each and every one.
//!
//! A whole export has one Merkle root, so a bit inside an entry changes a leaf and the root, and the audit says so without
//! looking at a signature. Those bits are judged by the framing and the root alone, with the same code that the audit uses;
//! a sample of them, and every bit that the log does not give away, goes through the whole audit. In a partial export the
//! audit judges every bit. `make fuzz-ledger FILES="a.bundle b.bundle"` runs it.

#![allow(clippy::unwrap_used)]

// Only the folder with both journals is needed of it.
#[allow(dead_code)]
mod support;

use satgrid_ledger::{
    audit::{Detail, audit},
    bundle::{Filter, Opened, open},
    log::{Frontier, SignedCheckpoint, leaf_hash},
};
use std::{
    fs,
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
};
use support::Fixture;

/// One flip in so many that the log gives away is judged by the audit too: a prime, so that all bits of a byte are met.
const SAMPLE: usize = 1_009;

/// Whether the file is refused, or the audit of it finds something.
fn is_found(bytes: &[u8]) -> bool {
    match open(bytes) {
        Ok(Opened::Journal(reader)) => !audit(reader, Detail::Totals).is_ok_and(|report| report.is_clean()),
        // Another kind of file: a fraud proof is a finding, a claim is judged as such by its maker's name.
        Ok(Opened::Fraud(_) | Opened::Claim(_)) | Err(_) => true,
    }
}

fn audit_is_clean(bytes: &[u8]) -> bool {
    let Ok(Opened::Journal(reader)) = open(bytes) else { return false };
    audit(reader, Detail::Totals).is_ok_and(|report| report.is_clean())
}

/// Whether framing, count or root give the change away: what the audit reports as unreadable, `log/size` or `log/root`.
fn by_the_log(bytes: &[u8]) -> bool {
    let Ok(Opened::Journal(mut reader)) = open(bytes) else { return true };
    if reader.header().filter != Filter::All {
        return false;
    }
    let Ok(checkpoint) = SignedCheckpoint::parse(reader.checkpoint()) else { return true };
    if checkpoint.node != reader.header().node {
        return true;
    }
    let mut frontier = Frontier::new();
    loop {
        match reader.next_entry() {
            Err(_) => return true,
            Ok(None) => return checkpoint.size != frontier.size() || checkpoint.root != frontier.root(),
            Ok(Some(item)) => frontier.push(leaf_hash(&item.entry)),
        }
    }
}

/// Flips every `step`-th bit; how many were given away by the log and by the audit. Panics at the first that is not found.
fn flip(what: &str, bytes: &[u8], step: usize) -> (usize, usize) {
    assert!(audit_is_clean(bytes), "{what} has findings as it is");
    let (log, whole) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let (log, whole) = (&log, &whole);
            scope.spawn(move || {
                let mut flipped = bytes.to_vec();
                for at in (0..bytes.len() * 8).step_by(step).skip(thread).step_by(threads) {
                    flipped[at / 8] ^= 1 << (at % 8);
                    let given_away = by_the_log(&flipped);
                    if !given_away || at % SAMPLE == 0 {
                        assert!(is_found(&flipped), "{what}: byte {} bit {} is not found", at / 8, at % 8);
                    }
                    if given_away { log } else { whole }.fetch_add(1, Ordering::Relaxed);
                    flipped[at / 8] ^= 1 << (at % 8);
                }
            });
        }
    });
    (log.into_inner(), whole.into_inner())
}

#[test]
fn flipped_bits_of_both_parties_exports_are_found() {
    let fixture = Fixture::new();
    for party in ["provider", "consumer"] {
        let (db, out) = (format!("{party}.db"), format!("{party}.bundle"));
        assert_eq!(fixture.export(&db, &out, &[]).code, 0);
        let bytes = fs::read(fixture.path(&out)).unwrap();
        let (log, audit) = flip(party, &bytes, 211);
        assert!(log > 10 * audit && audit > 0, "{party}: {log} by the log, {audit} by the audit");
    }
}

#[test]
#[ignore = "make fuzz-ledger FILES=..."]
fn whole_flips_of_files() {
    let files = std::env::var("SATGRID_FLIP_FILES").unwrap_or_default();
    let step = std::env::var("SATGRID_FLIP_STEP").map_or(1, |text| text.parse().unwrap());
    for file in files.split_whitespace() {
        let bytes = fs::read(Path::new(file)).unwrap();
        let (log, audit) = flip(file, &bytes, step);
        let all = bytes.len() * 8;
        println!(
            "{file}: {} of {all} bits flipped, all found: {log} by the log, {audit} by the whole audit",
            log + audit
        );
    }
}
