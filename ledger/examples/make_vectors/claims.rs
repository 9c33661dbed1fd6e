//! Claims: what a vanished provider owes, answers to them, and claims that are wrong.

use crate::{Files, credit::Spent};
use satgrid_ledger::{
    audit::Rule,
    bundle::{Opened, open, write_claim},
    claim::{ClaimCollector, ClaimHeader, ClaimReport, Maker, audit_claim, cross_claims},
    entry::{Entry, Evidence},
    testing::{Session, Work, World, bytes32},
};
use satgrid_types::{Msat, Preimage, SessionId};
use serde_json::{Value, json};
use std::collections::BTreeSet;

type Claim = (ClaimHeader, Vec<Evidence>);

/// What `satgrid-ledger claim` would make of these entries.
fn claim(entries: &[Entry], session: SessionId) -> Claim {
    let mut collector = ClaimCollector::new(session);
    entries.iter().for_each(|entry| collector.observe(entry));
    collector.finish().unwrap()
}

fn bytes((header, pieces): &Claim) -> Vec<u8> {
    let mut out = Vec::new();
    write_claim(&mut out, header, pieces).unwrap();
    out
}

fn judge(bytes: &[u8]) -> ClaimReport {
    match open(bytes).unwrap() {
        Opened::Claim(reader) => audit_claim(reader).unwrap(),
        Opened::Journal(_) | Opened::Fraud(_) => panic!("a claim was expected"),
    }
}

fn ids<'a>(rules: impl IntoIterator<Item = &'a Rule>) -> BTreeSet<&'static str> {
    rules.into_iter().map(Rule::id).collect()
}

fn single(files: &mut Files, name: &str, expect: &[Rule], claim: &Claim) -> Value {
    let bytes = bytes(claim);
    let report = judge(&bytes);
    let rules = ids(report.findings.iter().map(|finding| &finding.rule));
    let must = ids(expect);
    assert!(must.is_subset(&rules) && must.is_empty() == rules.is_empty(), "{name}: {:?}", report.findings);
    let file = format!("bundles/{name}.claim");
    files.bytes(&file, bytes);
    json!({ "files": [file], "exit": i32::from(!rules.is_empty()), "must": must, "rules": rules,
        "owed_msat": report.figures.owed })
}

fn pair(files: &mut Files, name: &str, expect: &[Rule], ours: &Claim, answer: &Claim) -> Value {
    let (ours, answer) = (bytes(ours), bytes(answer));
    let (one, other) = (judge(&ours), judge(&answer));
    let (figures, across) = cross_claims(&one, &other).unwrap();
    let all = one.findings.iter().chain(&other.findings).chain(&across);
    let rules = ids(all.map(|finding| &finding.rule));
    assert_eq!(rules, ids(expect), "{name}");
    let names = ["consumer", "provider"].map(|side| format!("bundles/pair-{name}-{side}.claim"));
    files.bytes(&names[0], ours);
    files.bytes(&names[1], answer);
    json!({ "files": names, "exit": i32::from(!rules.is_empty()), "must": rules, "rules": rules,
        "owed_msat": figures.owed })
}

/// A provider that vanished with money, a broken-off and a running request.
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

pub(crate) fn write(files: &mut Files, spent: &Spent) -> Vec<Value> {
    let (world, session) = vanished();
    let (consumer, provider) = (world.consumer.journal.entries(), world.provider.journal.entries());
    let honest = claim(&consumer, session.id);
    let with = |change: &dyn Fn(&mut Claim)| {
        let mut bent = honest.clone();
        change(&mut bent);
        bent
    };
    // The consumer's journal as it was before its last acknowledgement.
    let last_ack = consumer.iter().rposition(|e| matches!(e.evidence, Some(Evidence::Ack(_)))).unwrap();
    let older = claim(&consumer[..last_ack], session.id);

    let mut closed = World::new();
    let mut over = closed.open();
    closed.pay(&mut over, Msat::sat(10));
    closed.complete(&mut over, Work { prompt: 40, cached: 32, output: 128, acks: 2 });
    closed.close_with_refund(&mut over);
    let (theirs, ours) = (closed.provider.journal.entries(), closed.consumer.journal.entries());
    let received = ours.iter().position(|e| matches!(e.evidence, Some(Evidence::RefundReceived { .. }))).unwrap();
    let (denied, refund) = (claim(&ours[..received], over.id), claim(&theirs, over.id));
    let mut unproven = refund.clone();
    for piece in &mut unproven.1 {
        if let Evidence::RefundSettled { preimage, .. } = piece {
            *preimage = Some(Preimage(bytes32("another")));
        }
    }

    // Before its note was spent something was owed; the provider shows that it was.
    let (owed, answered) =
        (claim(&spent.before, spent.from.id), claim(&spent.provider.journal.entries(), spent.from.id));
    // In the session where it was spent, it counts as paid.
    let credited = claim(&spent.provider.journal.entries(), spent.to.id);
    vec![
        single(files, "claim-with-credit", &[], &credited),
        pair(files, "claim-note-spent", &[Rule::ClaimContradicted], &owed, &answered),
        single(files, "claim", &[], &honest),
        single(files, "claim-answer", &[], &claim(&provider, session.id)),
        single(
            files,
            "claim-preimage",
            &[Rule::PaymentPreimage],
            &with(&|(_, pieces)| {
                for piece in pieces.iter_mut() {
                    if let Evidence::PaymentSettled { preimage, .. } = piece {
                        *preimage = Preimage(bytes32("another"));
                    }
                }
            }),
        ),
        single(
            files,
            "claim-other-network",
            &[Rule::InvoiceSignature],
            &with(&|(header, _)| header.network = "mainnet".into()),
        ),
        single(
            files,
            "claim-of-a-stranger",
            &[Rule::ClaimPiece],
            &with(&|(_, pieces)| {
                let snapshot = Evidence::WalletSnapshot { lightning_msat: Msat(1), onchain_msat: Msat(1) };
                pieces.push(snapshot);
            }),
        ),
        single(
            files,
            "claim-without-a-session",
            &[Rule::StatementSession],
            &with(&|(_, pieces)| pieces.retain(|piece| !matches!(piece, Evidence::Open(_)))),
        ),
        single(files, "claim-refunded", &[Rule::ClaimNothing], &claim(&ours, over.id)),
        single(files, "claim-refund-unproven", &[Rule::ClaimRefund], &unproven),
        pair(files, "claim-agreed", &[], &honest, &claim(&provider, session.id)),
        pair(files, "claim-later-ack", &[Rule::ClaimContradicted], &older, &claim(&provider, session.id)),
        pair(files, "claim-refund", &[Rule::ClaimContradicted], &denied, &refund),
        {
            let empty = (ClaimHeader::new(Maker::Consumer, "regtest"), Vec::new());
            single(files, "claim-empty", &[Rule::StatementSession, Rule::ClaimNothing], &empty)
        },
    ]
}
