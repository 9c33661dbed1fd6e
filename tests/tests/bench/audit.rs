//! The auditor's speed: `satgrid-ledger verify` on a provider's journal, against nothing but its signatures' checks.

use crate::Size;
use crate::report::{Goal, Report};
use ed25519_dalek::VerifyingKey;
use satgrid_ledger::{
    bundle::Filter,
    entry::{Entry, Evidence},
    testing::{Work, World},
};
use satgrid_types::{BothSigned, Msat, NodeKey, Signature, Signed, Statement, node_key, signed_bytes};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

const GOAL: f64 = 0.7;
const RECEIPTS_PER_SESSION: u32 = 100;

/// A signature with what it signs.
struct Check {
    message: Vec<u8>,
    key: NodeKey,
    signature: Signature,
}

fn check<T: Statement>(body: &[u8], key: NodeKey, signature: &Signature) -> Check {
    Check { message: signed_bytes::<T>(body), key, signature: *signature }
}

/// The signatures that an auditor must check: all statements, those of two parties twice.
struct Checks {
    provider: NodeKey,
    /// The open session's.
    consumer: NodeKey,
    all: Vec<Check>,
}

impl Checks {
    fn one<T: Statement>(&mut self, signed: &Signed<T>, key: NodeKey) {
        self.all.push(check::<T>(signed.body(), key, signed.signature()));
    }
    fn both<T: Statement>(&mut self, both: &BothSigned<T>) {
        self.all.push(check::<T>(both.body(), self.provider, both.provider_signature()));
        self.all.push(check::<T>(both.body(), self.consumer, both.consumer_signature()));
    }
    #[allow(clippy::wildcard_enum_match_arm)]
    fn entry(&mut self, entry: &Entry) {
        let (provider, consumer) = (self.provider, self.consumer);
        let Some(evidence) = &entry.evidence else { return };
        match evidence {
            Evidence::Quote(quote) => self.one(quote, provider),
            Evidence::Open(open) => {
                self.consumer = open.peek().unwrap().consumer;
                self.one(open, self.consumer);
            }
            Evidence::Request(request) => self.one(request, consumer),
            Evidence::Ack(ack) => self.both(ack),
            Evidence::Receipt { receipt, .. } => self.both(receipt),
            Evidence::Promise(promise) => self.one(promise, provider),
            Evidence::Close(close) => self.one(close, consumer),
            // Invoices, one for each session, and the listing are left to the auditor alone.
            _ => {}
        }
    }
}

fn history(receipts: u32) -> World {
    let mut world = World::new();
    let mut done = 0;
    while done < receipts {
        let mut session = world.open();
        world.pay(&mut session, Msat::sat(100));
        for _ in 0..RECEIPTS_PER_SESSION.min(receipts - done) {
            world.complete(&mut session, Work { prompt: 64, cached: 0, output: 128, acks: 1 });
        }
        world.close_with_refund(&mut session);
        done += RECEIPTS_PER_SESSION;
    }
    world
}

/// Strict checks, as the auditor's, one after the other on one core.
fn bare_loop(checks: &[Check]) -> f64 {
    let began = Instant::now();
    for check in checks {
        let key = VerifyingKey::from_bytes(&check.key.0).unwrap();
        key.verify_strict(&check.message, &ed25519_dalek::Signature::from_bytes(&check.signature.0)).unwrap();
    }
    checks.len() as f64 / began.elapsed().as_secs_f64()
}

pub(crate) fn measure(binary: &Path, size: Size, report: &mut Report) {
    assert!(binary.is_file(), "{} is not there: `make build` makes it", binary.display());
    let began = Instant::now();
    let world = history(size.audit_receipts);
    let entries = world.provider.journal.entries();
    let provider = node_key(&world.provider.node);
    let mut checks = Checks { provider, consumer: provider, all: Vec::new() };
    entries.iter().for_each(|entry| checks.entry(entry));
    let dir = tempfile::tempdir().unwrap();
    let bundle = dir.path().join("provider.bundle");
    std::fs::write(&bundle, world.provider.bundle(Filter::All, false)).unwrap();
    let (count, signatures) = (entries.len(), checks.all.len());
    drop((world, entries));
    eprintln!("audit: a journal of {} receipts made in {:.0} s", size.audit_receipts, began.elapsed().as_secs_f64());

    let mut turns = Vec::new();
    for turn in 1..=size.audit_turns {
        let began = Instant::now();
        let verify = Command::new(binary).arg("verify").arg(&bundle).stdin(Stdio::null()).output().unwrap();
        let a = signatures as f64 / began.elapsed().as_secs_f64();
        let verdict = String::from_utf8_lossy(&verify.stdout).into_owned();
        assert!(verify.status.success() && verdict.contains("verdict: clean"), "{verdict}");
        let b = bare_loop(&checks.all);
        eprintln!("audit, turn {turn}: {a:.0} signatures/s; bare loop {b:.0}");
        turns.push((a, b));
    }
    report.ratio("verify : bare loop of its checks", "signatures/s", &turns, Goal::AtLeast(GOAL));
    let megabytes = std::fs::metadata(&bundle).unwrap().len() as f64 / 1e6;
    report.note(format!(
        "audit: {} receipts, {count} entries, {signatures} signatures, {megabytes:.0} MB; one core each; verify includes the \
         process's start, reading, hashes, books and 1 invoice for {RECEIPTS_PER_SESSION} receipts",
        size.audit_receipts,
    ));
}
