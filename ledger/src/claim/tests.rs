use super::*;
use crate::{
    audit::Rule,
    bundle::{BundleError, Opened, open, write_claim},
    entry::{Entry, Evidence},
    testing::{Session, Work, World},
};
use satgrid_types::{Msat, SessionId};

fn of(entries: &[Entry], session: SessionId) -> Vec<u8> {
    let mut collector = ClaimCollector::new(session);
    entries.iter().for_each(|entry| collector.observe(entry));
    let (header, pieces) = collector.finish().unwrap();
    let mut out = Vec::new();
    write_claim(&mut out, &header, &pieces).unwrap();
    out
}

fn judged(bytes: &[u8]) -> Result<ClaimReport, BundleError> {
    match open(bytes)? {
        Opened::Claim(reader) => audit_claim(reader),
        Opened::Journal(_) | Opened::Fraud(_) => panic!("a claim was expected"),
    }
}

fn report(bytes: &[u8]) -> ClaimReport {
    judged(bytes).unwrap()
}

fn rules(report: &ClaimReport) -> Vec<Rule> {
    report.findings.iter().map(|finding| finding.rule).collect()
}

fn vanished() -> (World, Session) {
    let mut world = World::new();
    let mut session = world.open();
    world.pay(&mut session, Msat::sat(10));
    world.complete(&mut session, Work { prompt: 200, cached: 0, output: 300, acks: 2 });
    world.pay(&mut session, Msat::sat(5));
    world.abandon(&mut session, Work { prompt: 120, cached: 64, output: 100, acks: 1 });
    world.start(&mut session, Work { prompt: 50, cached: 0, output: 60, acks: 2 });
    (world, session)
}

#[test]
fn what_a_vanished_provider_owes_is_what_the_books_say() {
    let (mut world, mut session) = vanished();
    let (ours, theirs) = (world.consumer.journal.entries(), world.provider.journal.entries());
    let claim = report(&of(&ours, session.id));
    assert_eq!(claim.findings, []);
    assert_eq!((claim.maker, claim.slices, claim.receipts, claim.acknowledged), (Maker::Consumer, 2, 1, 2));
    assert_eq!(claim.figures.paid, Msat::sat(15));
    assert!(claim.figures.charged > session.charged, "the running request's last acknowledgement is charged too");
    let answer = report(&of(&theirs, session.id));
    assert_eq!((answer.maker, answer.figures), (Maker::Provider, claim.figures));
    let (figures, across) = cross_claims(&claim, &answer).unwrap();
    assert_eq!((figures, across), (claim.figures, Vec::new()));
    // Once the books close, they come to the same.
    let other = world.open();
    world.pay(&mut session, Msat::sat(1));
    assert!(cross_claims(&claim, &report(&of(&world.consumer.journal.entries(), other.id))).is_err());
}

#[test]
fn a_later_statement_and_a_refund_contradict_a_claim() {
    let (world, session) = vanished();
    let (ours, theirs) = (world.consumer.journal.entries(), world.provider.journal.entries());
    let answer = report(&of(&theirs, session.id));
    let acks = ours.iter().filter(|entry| matches!(entry.evidence, Some(Evidence::Ack(_)))).map(|entry| entry.seq);
    for ack in acks {
        let cut = usize::try_from(ack).unwrap();
        let older = report(&of(&ours[..cut], session.id));
        let (figures, across) = cross_claims(&older, &answer).unwrap();
        assert!(across.iter().all(|finding| finding.rule == Rule::ClaimContradicted));
        assert_eq!(across.len(), usize::from(figures.owed < older.figures.owed), "before entry {ack}");
        // The order of the files does not matter.
        assert_eq!(cross_claims(&answer, &older).unwrap().0, figures);
    }

    let mut world = World::new();
    let mut session = world.open();
    world.pay(&mut session, Msat::sat(10));
    world.complete(&mut session, Work { prompt: 40, cached: 32, output: 128, acks: 2 });
    world.close_with_refund(&mut session);
    let (ours, theirs) = (world.consumer.journal.entries(), world.provider.journal.entries());
    let received = ours.iter().position(|e| matches!(e.evidence, Some(Evidence::RefundReceived { .. }))).unwrap();
    let (denied, answer) = (report(&of(&ours[..received], session.id)), report(&of(&theirs, session.id)));
    assert_eq!(denied.findings, []);
    assert!(!answer.figures.refunded.is_zero());
    let (figures, across) = cross_claims(&denied, &answer).unwrap();
    assert!(figures.owed < denied.figures.owed);
    assert_eq!(across.len(), 1);
    // Whoever admits the refund claims at most the routing fee that was kept of it.
    let whole = report(&of(&ours, session.id));
    assert_eq!(whole.figures.owed, figures.owed);
}

#[test]
fn flipped_bits_of_a_claim_are_found_or_harmless() {
    flip(37);
}

#[test]
#[ignore = "make fuzz-ledger"]
fn whole_every_flipped_bit_of_a_claim_is_found_or_harmless() {
    flip(1);
}

fn flip(stride: usize) {
    let (world, session) = vanished();
    let bytes = of(&world.consumer.journal.entries(), session.id);
    let honest = report(&bytes);
    let mut harmless = 0u32;
    for bit in (0..bytes.len() * 8).step_by(stride) {
        let mut bent = bytes.clone();
        bent[bit / 8] ^= 1 << (bit % 8);
        match judged(&bent) {
            Err(_) => {}
            Ok(report) if !report.is_clean() => {}
            Ok(report) => {
                // An amount or fee of the payer's own word, or a quote that nothing stands on: the verdict is the same.
                assert_eq!(report.figures, honest.figures, "bit {bit}");
                assert_eq!((report.session, report.provider), (honest.session, honest.provider), "bit {bit}");
                harmless += 1;
            }
        }
    }
    let tried = bytes.len() * 8 / stride;
    println!("{tried} bits of {} bytes: {harmless} harmless, the others found", bytes.len());
    assert!(usize::try_from(harmless).unwrap() * 20 < tried, "{harmless} of {tried}");
}

#[test]
fn pieces_dropped_or_swapped_never_raise_what_is_owed_unseen() {
    let (world, session) = vanished();
    let mut collector = ClaimCollector::new(session.id);
    world.consumer.journal.entries().iter().for_each(|entry| collector.observe(entry));
    let (header, pieces) = collector.finish().unwrap();
    let judge = |pieces: &[Evidence]| {
        let mut audit = ClaimAudit::new(&header);
        pieces.iter().for_each(|piece| audit.piece(piece));
        audit.finish()
    };
    let honest = judge(&pieces);
    let answer = report(&of(&world.provider.journal.entries(), session.id));
    for n in 0..pieces.len() {
        let mut fewer = pieces.clone();
        fewer.remove(n);
        let less = judge(&fewer);
        if less.is_clean() && less.figures.owed > honest.figures.owed {
            let (figures, across) = cross_claims(&less, &answer).unwrap();
            assert_eq!((figures.owed, across.len()), (honest.figures.owed, 1), "without piece {n}");
        }
        let mut twice = pieces.clone();
        twice.insert(n, pieces[n].clone());
        let more = judge(&twice);
        assert!(!more.is_clean() || more.figures == honest.figures, "piece {n} twice: {:?}", rules(&more));
    }
}

#[test]
fn stakes_name_the_sessions_that_hold_money() {
    let (world, session) = vanished();
    for (party, as_provider) in [(&world.consumer, false), (&world.provider, true)] {
        let (mut stakes, mut books) = (Stakes::default(), crate::Books::new());
        for entry in party.journal.entries() {
            stakes.observe(&entry);
            books.apply(entry.at, &entry.draft()).unwrap();
        }
        let found = stakes.finish(&books);
        assert_eq!(found.len(), 1);
        assert_eq!(found[&session.id].as_provider, as_provider);
        assert_eq!(found[&session.id].amount, Msat(session.paid.0 - session.charged.0));
    }
}

#[test]
fn a_note_that_was_spent_is_owed_no_more_and_counts_where_it_was() {
    let mut world = World::new();
    let mut from = world.open();
    world.pay(&mut from, Msat::sat(10));
    world.complete(&mut from, Work { prompt: 40, cached: 0, output: 60, acks: 1 });
    let note = world.close_with_credit_note(&mut from);
    let before = report(&of(&world.consumer.journal.entries(), from.id));
    assert_eq!(before.figures.owed, from.paid.saturating_sub(from.charged));
    let mut to = world.open();
    world.spend_credit_note(&from, &note, &mut to);
    let (ours, theirs) = (world.consumer.journal.entries(), world.provider.journal.entries());
    assert_eq!(rules(&report(&of(&ours, from.id))), [Rule::ClaimNothing]);
    let answer = report(&of(&theirs, from.id));
    let (figures, across) = cross_claims(&before, &answer).unwrap();
    assert_eq!((figures.owed, across[0].rule), (Msat::ZERO, Rule::ClaimContradicted));
    let claim = report(&of(&ours, to.id));
    assert_eq!((claim.findings.len(), claim.figures.owed), (0, before.figures.owed), "it is owed there now");
}

#[test]
fn work_that_a_receipt_holds_is_not_charged_again() {
    let mut world = World::new();
    let mut session = world.open();
    world.pay(&mut session, Msat::sat(20));
    world.complete(&mut session, Work { prompt: 200, cached: 0, output: 300, acks: 2 });
    world.abandon(&mut session, Work { prompt: 120, cached: 64, output: 100, acks: 1 });
    world.complete(&mut session, Work { prompt: 700, cached: 512, output: 900, acks: 3 });
    world.abandon(&mut session, Work { prompt: 60, cached: 0, output: 70, acks: 1 });
    let (ours, theirs) = (world.consumer.journal.entries(), world.provider.journal.entries());
    let claim = report(&of(&ours, session.id));
    let answer = report(&of(&theirs, session.id));
    assert_eq!((claim.receipts, claim.figures.charged), (2, session.charged));
    assert!(claim.is_clean() && answer.is_clean());
    assert_eq!(answer.figures, claim.figures);
    assert_eq!(cross_claims(&claim, &answer).unwrap(), (claim.figures, Vec::new()));

    // A provider that shows every acknowledgement there was, and fewer receipts, would have the same work paid twice.
    let mut collector = ClaimCollector::new(session.id);
    theirs.iter().for_each(|entry| collector.observe(entry));
    let (header, honest) = collector.finish().unwrap();
    let acked = theirs.iter().filter_map(|entry| entry.evidence.clone());
    let acked: Vec<Evidence> = acked.filter(|e| matches!(e, Evidence::Request(_) | Evidence::Ack(_))).collect();
    for dropped in 0..=2usize {
        let mut left = dropped;
        let mut pieces = honest.clone();
        pieces.retain(|piece| {
            let drop = left > 0 && matches!(piece, Evidence::Receipt { .. });
            left -= usize::from(drop);
            !drop
        });
        pieces.extend(acked.iter().cloned());
        let mut bytes = Vec::new();
        write_claim(&mut bytes, &header, &pieces).unwrap();
        let lie = report(&bytes);
        assert_eq!(lie.findings, [], "{dropped}");
        for (figures, across) in [cross_claims(&claim, &lie).unwrap(), cross_claims(&lie, &claim).unwrap()] {
            assert_eq!((figures, across), (claim.figures, Vec::new()), "without {dropped} receipts");
        }
    }
}
