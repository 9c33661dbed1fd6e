use super::*;
use crate::{
    audit::{Auditor, Detail, Rule, audit},
    entry::Entry,
    log::{Frontier, SignedCheckpoint, leaf_hash},
    statements::ReceiptOpening,
    testing::{Work, World},
};
use satgrid_types::{Msat, cbor};

/// One session, one slice, one request: every kind of item, few bytes.
fn small() -> World {
    let mut world = World::new();
    let mut session = world.open();
    world.pay(&mut session, Msat::sat(10));
    world.complete(&mut session, Work { prompt: 20, cached: 0, output: 8, acks: 1 });
    world
}

fn reader(bytes: &[u8]) -> Result<BundleReader<&[u8]>, BundleError> {
    match open(bytes)? {
        Opened::Journal(reader) => Ok(reader),
        Opened::Fraud(_) | Opened::Claim(_) => panic!("a journal was expected"),
    }
}

/// What is wrong with a bundle: nothing, an error, or the rules that were broken.
#[derive(Debug, PartialEq)]
enum Outcome {
    Clean,
    Refused,
    Findings(Vec<Rule>),
}

fn outcome(bytes: &[u8]) -> Outcome {
    let Ok(reader) = reader(bytes) else { return Outcome::Refused };
    match audit(reader, Detail::Totals) {
        Err(_) => Outcome::Refused,
        Ok(report) if report.is_clean() => Outcome::Clean,
        Ok(report) => Outcome::Findings(report.findings.iter().map(|finding| finding.rule).collect()),
    }
}

#[test]
fn what_is_written_reads_back() {
    let world = World::example();
    let entries = world.consumer.journal.entries();
    let bytes = world.consumer.bundle(Filter::All, false);
    let mut reader = reader(&bytes).unwrap();
    let mut read = Vec::new();
    while let Some(item) = reader.next_entry().unwrap() {
        let mut entry = Entry::decode(&item.entry).unwrap();
        assert_eq!(item.proof, None);
        entry.set_opening(item.opening.map(|bytes| cbor::decode::<ReceiptOpening>(&bytes).unwrap()));
        read.push(entry);
    }
    assert_eq!(read, entries);
    assert!(read.iter().any(|entry| entry.opening().is_some()));
    assert!(reader.next_entry().unwrap().is_none(), "the end stays the end");
}

#[test]
fn redaction_touches_no_leaf() {
    let world = World::example();
    let (open, redacted) = (world.provider.bundle(Filter::All, false), world.provider.bundle(Filter::All, true));
    assert!(redacted.len() < open.len());
    let (mut a, mut b) = (reader(&open).unwrap(), reader(&redacted).unwrap());
    assert_eq!(a.checkpoint(), b.checkpoint());
    while let Some(item) = a.next_entry().unwrap() {
        let other = b.next_entry().unwrap().unwrap();
        assert_eq!((item.entry, None), (other.entry, other.opening));
    }
}

#[test]
fn a_partial_bundle_holds_whole_sessions_with_proofs() {
    let world = World::example();
    let whole = crate::audit::tests::report(&world.consumer.bundle(Filter::All, false));
    let provider = whole.sessions.values().next().unwrap().provider.unwrap();
    let (first_at, last_at) = (whole.first_at.unwrap(), whole.last_at.unwrap());
    for (id, session) in &whole.sessions {
        let filters = [Filter::Session(*id), Filter::Peer(session.consumer.unwrap())];
        for filter in filters {
            let part = crate::audit::tests::report(&world.consumer.bundle(filter, false));
            assert_eq!(part.findings, [], "{filter:?}");
            assert_eq!(part.sessions.keys().collect::<Vec<_>>(), [id]);
            assert_eq!(part.sessions[id], whole.sessions[id]);
            assert!(part.entries < whole.entries);
        }
    }
    for filter in [Filter::Peer(provider), Filter::Time(first_at, last_at.plus_ms(1))] {
        let part = crate::audit::tests::report(&world.consumer.bundle(filter, false));
        assert_eq!(part.findings, []);
        assert_eq!(part.sessions, whole.sessions, "{filter:?}");
    }
    let none = crate::audit::tests::report(
        &world.consumer.bundle(Filter::Time(last_at.plus_ms(1), last_at.plus_ms(2)), false),
    );
    assert_eq!((none.sessions.len(), none.entries), (0, 1));
}

#[test]
fn a_claimed_length_is_refused_before_anything_is_allocated() {
    let bytes = small().provider.bundle(Filter::All, false);
    #[track_caller]
    fn check(head: &[u8], expect: &str) {
        let error = open(head).unwrap_err().to_string();
        assert!(error.contains(expect), "{error}");
    }
    // As the first item, anything odd is simply not a bundle.
    check(&[0x5b, 0, 0, 0, 1, 0, 0, 0, 0], "not a satgrid bundle");
    check(b"SQLite format 3\0", "not a satgrid bundle");
    check(&[], "not a satgrid bundle");
    let heads: [(&[u8], &str); 6] = [
        (&[0x5b, 0, 0, 0, 1, 0, 0, 0, 0], "claims 4294967296 bytes"),
        (&[0x5a, 0xff, 0xff, 0xff, 0xff], "claims 4294967295 bytes"),
        (&[0x5b, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff], "claims 18446744073709551615 bytes"),
        (&[0x58, 0x05, 0, 0, 0, 0, 0], "shortest form"),
        (&[0x5f], "shortest form"),
        (&[0x82, 0, 0], "shortest form"),
    ];
    for (head, expect) in heads {
        // After the header item.
        let first = usize::from(bytes[1]) + 2;
        check(&[&bytes[..first], head].concat(), expect);
    }
}

#[test]
fn a_bundle_cut_anywhere_is_refused() {
    let bytes = small().provider.bundle(Filter::All, false);
    for len in 0..bytes.len() {
        let cut = reader(&bytes[..len]).and_then(|mut reader| {
            while reader.next_entry()?.is_some() {}
            Ok(())
        });
        assert!(cut.is_err(), "cut at {len}");
    }
    let longer = [&bytes[..], &[0x40]].concat();
    assert_eq!(outcome(&longer), Outcome::Refused);
}

/// Whether the file's own framing or its Merkle root gives a change away: what an audit would report as refused, or as
/// `log/root`, without the cost of its signatures.
fn given_away_by_the_log(bytes: &[u8]) -> bool {
    let Ok(mut reader) = reader(bytes) else { return true };
    let Ok(checkpoint) = SignedCheckpoint::parse(reader.checkpoint()) else { return true };
    let mut frontier = Frontier::new();
    loop {
        match reader.next_entry() {
            Err(_) => return true,
            Ok(None) => break,
            Ok(Some(item)) => frontier.push(leaf_hash(&item.entry)),
        }
    }
    checkpoint.size != frontier.size() || checkpoint.root != frontier.root()
}

#[test]
fn every_single_flipped_bit_is_found() {
    let bytes = small().consumer.bundle(Filter::All, false);
    assert_eq!(outcome(&bytes), Outcome::Clean);
    assert!(!given_away_by_the_log(&bytes));
    let (mut by_log, mut by_audit) = (0, 0);
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << bit;
            if given_away_by_the_log(&flipped) {
                by_log += 1;
                // The audit agrees; on a sample, since it checks every signature.
                if (at * 8 + bit) % 1_009 == 0 {
                    assert_ne!(outcome(&flipped), Outcome::Clean, "byte {at} bit {bit}");
                }
            } else {
                by_audit += 1;
                assert_ne!(outcome(&flipped), Outcome::Clean, "byte {at} bit {bit}");
            }
        }
    }
    assert!(by_log > 10 * by_audit && by_audit > 0, "{by_log} {by_audit}");
}

#[test]
fn every_flipped_byte_of_a_partial_bundle_is_found() {
    let world = small();
    let report = crate::audit::tests::report(&world.provider.bundle(Filter::All, false));
    let session = *report.sessions.keys().next().unwrap();
    let bytes = world.provider.bundle(Filter::Session(session), true);
    assert_eq!(outcome(&bytes), Outcome::Clean);
    // Here every entry has a proof of its own, and the audit has to tell: one bit of every eleventh byte.
    for at in (0..bytes.len()).step_by(11) {
        let mut flipped = bytes.clone();
        flipped[at] ^= 1 << (at % 8);
        assert_ne!(outcome(&flipped), Outcome::Clean, "byte {at}");
    }
}

#[test]
#[ignore = "make fuzz-ledger"]
fn whole_every_flipped_bit_is_found_by_the_audit_alone() {
    let world = small();
    let report = crate::audit::tests::report(&world.provider.bundle(Filter::All, false));
    let session = *report.sessions.keys().next().unwrap();
    for (what, bytes) in [
        ("whole", world.consumer.bundle(Filter::All, false)),
        ("one session, redacted", world.provider.bundle(Filter::Session(session), true)),
    ] {
        for at in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[at / 8] ^= 1 << (at % 8);
            assert_ne!(outcome(&flipped), Outcome::Clean, "{what}, byte {} bit {}", at / 8, at % 8);
        }
        println!("{what}: all {} flipped bits of {} bytes are found", bytes.len() * 8, bytes.len());
    }
}

#[test]
fn a_fraud_proof_is_a_file_of_its_own() {
    let world = small();
    let entries = world.provider.journal.entries();
    let honest = crate::testing::checkpoint_of(&entries, &world.provider.node);
    let mut other = entries.clone();
    other.last_mut().unwrap().at = other.last().unwrap().at.plus_ms(1);
    let lying = crate::testing::checkpoint_of(&other, &world.provider.node);
    let proof = FraudProof { one: honest.note().into(), other: lying.note().into() };
    let mut file = Vec::new();
    write_fraud(&mut file, &proof).unwrap();
    match open(&file[..]).unwrap() {
        Opened::Fraud(read) => assert_eq!(read.check(), Ok(honest.node)),
        Opened::Journal(_) | Opened::Claim(_) => panic!("a fraud proof was expected"),
    }
    file.push(0x40);
    assert!(matches!(open(&file[..]), Err(BundleError::Codec { .. } | BundleError::Trailing)));
}

#[test]
fn memory_does_not_grow_with_sessions_that_are_over() {
    // A stand-in for measuring memory: what the auditor still holds at the end.
    let mut world = World::new();
    for _ in 0..20 {
        let mut session = world.open();
        world.pay(&mut session, Msat::sat(10));
        world.complete(&mut session, Work { prompt: 20, cached: 0, output: 8, acks: 1 });
        world.close_with_refund(&mut session);
    }
    let bytes = world.provider.bundle(Filter::All, false);
    let mut reader = reader(&bytes).unwrap();
    let mut auditor = Auditor::new(reader.header(), reader.checkpoint(), Detail::Totals);
    while let Some(item) = reader.next_entry().unwrap() {
        auditor.entry(&item);
    }
    assert_eq!(auditor.open_sessions(), 0);
    let report = auditor.finish();
    assert_eq!(report.findings, []);
    assert_eq!(report.as_provider.sessions, 20);
    assert!(report.sessions.is_empty());
    let over: Vec<_> = report.balances.iter().filter(|(name, _)| ["prepaid", "refunds-due"].contains(name)).collect();
    assert_eq!(over, [], "accounts of sessions that are over were let go");
}
