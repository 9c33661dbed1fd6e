//! Whole bundles: honest ones, one for each rule of the audit, and files that are no bundle at all.

use crate::{
    Files, claims, credit,
    tampered::{self, Lab},
};
use satgrid_ledger::{
    audit::{Detail, Party, Report, Rule, audit, cross_check},
    bundle::{BundleError, Filter, Header, Item, Opened, open, write_fraud},
    log::{FraudProof, SignedCheckpoint},
    testing::rotated,
};
use satgrid_types::{Digest, cbor, node_key};
use serde_json::{Value, json};
use std::collections::BTreeSet;

pub(crate) fn write(files: &mut Files) {
    let lab = Lab::new();
    let mut vectors = Vec::new();
    let provider = lab.world.provider.bundle(Filter::All, false);
    let consumer = lab.world.consumer.bundle(Filter::All, false);
    let session = Filter::Session(lab.first.id);
    for (name, bytes) in [
        ("provider", provider.clone()),
        ("consumer", consumer.clone()),
        ("provider-redacted", lab.world.provider.bundle(Filter::All, true)),
        ("provider-one-session", lab.world.provider.bundle(session, false)),
        ("consumer-one-session", lab.world.consumer.bundle(session, false)),
        ("consumer-one-peer", lab.world.consumer.bundle(Filter::Peer(node_key(&lab.world.provider.node)), false)),
        (
            "provider-until-the-second-session",
            lab.world.provider.bundle(Filter::Time(lab.first.quote.issued_at, lab.second.quote.issued_at), false),
        ),
    ] {
        vectors.push(single(files, name, None, bytes));
    }
    for (rule, bytes) in tampered::all(&lab) {
        let name = format!("bad-{}", rule.id().replace('/', "-"));
        vectors.push(single(files, &name, Some(rule), bytes));
    }
    vectors.push(single(files, "lead", None, satgrid_ledger::testing::lead_bundle(|_| ())));
    vectors.push(single(files, "lead-lost-rows", None, satgrid_ledger::testing::lost_bundle(|_| ())));
    for (name, rule, bytes) in tampered::losses() {
        vectors.push(single(files, name, Some(rule), bytes));
    }
    vectors.push(single(files, "experts", None, satgrid_ledger::testing::experts_bundle(|_| ())));
    vectors.push(single(files, "stage", None, satgrid_ledger::testing::stage_bundle(|_| ())));
    vectors.push(single(files, "replaced-invoice-paid", None, tampered::replaced_invoice_paid(&lab)));
    let wrong = tampered::replaced_invoice_credited_wrongly(&lab);
    vectors.push(single(files, "bad-replaced-invoice-credited-wrongly", Some(Rule::TransferUnbacked), wrong));
    let spent = credit::spent();
    for (name, bytes) in [
        ("provider-note-spent", spent.provider.bundle(Filter::All, false)),
        ("consumer-note-spent", spent.consumer.bundle(Filter::All, false)),
        ("consumer-note-spent-one-session", spent.consumer.bundle(Filter::Session(spent.to.id), false)),
        ("provider-note-spent-one-session", spent.provider.bundle(Filter::Session(spent.from.id), false)),
    ] {
        vectors.push(single(files, name, None, bytes));
    }
    for (name, bytes) in credit::wrongly(&spent) {
        vectors.push(single(files, &format!("bad-{name}"), Some(Rule::CreditNoteSpent), bytes));
    }
    let (rotated, _) = rotated();
    let [provider_rotated, consumer_rotated] =
        [&rotated.provider, &rotated.consumer].map(|party| party.bundle(Filter::All, false));
    vectors.push(single(files, "provider-rotated", None, provider_rotated.clone()));
    for (name, rule, bytes) in tampered::successions(&rotated) {
        vectors.push(single(files, &format!("bad-{name}"), Some(rule), bytes));
    }
    vectors.push(fraud(files, &lab));
    for (name, bytes) in unreadable(&provider) {
        assert!(judge(&bytes).is_err(), "{name}");
        files.bytes(&format!("bundles/unreadable-{name}.bundle"), bytes);
        vectors.push(
            json!({ "files": [format!("bundles/unreadable-{name}.bundle")], "exit": 2, "must": [], "rules": [] }),
        );
    }
    vectors.push(pair(files, "honest", &[], &provider, &consumer));
    vectors.push(pair(files, "rotated", &[], &provider_rotated, &consumer_rotated));
    vectors.push(pair(
        files,
        "provider-lacks-a-session",
        &[Rule::CrossMissing],
        &lab.before_second.provider.bundle(Filter::All, false),
        &consumer,
    ));
    vectors.push(pair(
        files,
        "provider-lacks-a-receipt",
        &[Rule::CrossMismatch, Rule::PromiseBroken],
        &lab.before_receipt.provider.bundle(Filter::All, false),
        &consumer,
    ));
    vectors.push(pair(
        files,
        "promise-of-another-leaf",
        &[Rule::PromiseBroken],
        &provider,
        &tampered::promise_of_another_leaf(&lab),
    ));
    vectors.extend(claims::write(files, &spent));
    files.json(
        "bundles.json",
        "bundles: `exit`, `must` and, where there are any, `parties` (the roles that findings of the `must` rule name) are normative; `rules` are all that our own audit names. Two files are both parties' exports of one history, or a claim and its answer",
        vectors,
    );
}

/// The report, as `verify FILE` would make it.
pub(crate) fn judge(bytes: &[u8]) -> Result<Report, BundleError> {
    match open(bytes)? {
        Opened::Journal(reader) => audit(reader, Detail::Sessions),
        Opened::Fraud(_) | Opened::Claim(_) => panic!("a journal was expected"),
    }
}

fn ids(rules: impl IntoIterator<Item = Rule>) -> BTreeSet<&'static str> {
    rules.into_iter().map(|rule| rule.id()).collect()
}

fn single(files: &mut Files, name: &str, expect: Option<Rule>, bytes: Vec<u8>) -> Value {
    let report = judge(&bytes).unwrap();
    match expect {
        None => assert_eq!(report.findings, [], "{name}"),
        Some(rule) => assert!(report.has(rule), "{name}: {:?}", report.findings),
    }
    let file = format!("bundles/{name}.bundle");
    files.bytes(&file, bytes);
    let rules = ids(report.findings.iter().map(|finding| finding.rule));
    let must = ids(expect);
    // Whom the findings of the expected rule name.
    let of_it = report.findings.iter().filter(|finding| Some(finding.rule) == expect);
    let parties: BTreeSet<String> = of_it.map(|f| role(&f.party)).collect();
    json!({ "files": [file], "exit": i32::from(!report.is_clean()), "must": must, "rules": rules, "parties": parties, "entries": report.entries })
}

fn role(party: &Party) -> String {
    serde_json::to_value(party).unwrap()["role"].as_str().unwrap().to_owned()
}

fn pair(files: &mut Files, name: &str, must: &[Rule], provider: &[u8], consumer: &[u8]) -> Value {
    let names = ["provider", "consumer"].map(|side| format!("bundles/pair-{name}-{side}.bundle"));
    let reports = [judge(provider).unwrap(), judge(consumer).unwrap()];
    let across = cross_check(&reports[0], &reports[1]);
    let all = reports.iter().flat_map(|report| &report.findings).chain(&across);
    let rules = ids(all.map(|finding| finding.rule));
    assert_eq!(rules.is_empty(), matches!(name, "honest" | "rotated"), "{name}: {rules:?}");
    files.bytes(&names[0], provider.to_vec());
    files.bytes(&names[1], consumer.to_vec());
    let must = ids(must.iter().copied());
    assert!(must.is_subset(&rules), "{name}: {rules:?}");
    json!({ "files": names, "exit": i32::from(!rules.is_empty()), "must": must, "rules": rules })
}

fn fraud(files: &mut Files, lab: &Lab) -> Value {
    let note = |root| SignedCheckpoint::sign(42, Digest([root; 32]), &lab.world.provider.node).note().to_owned();
    let proof = FraudProof { one: note(1), other: note(2) };
    assert!(proof.check().is_ok());
    let mut bytes = Vec::new();
    write_fraud(&mut bytes, &proof).unwrap();
    files.bytes("bundles/fraud.bundle", bytes);
    json!({ "files": ["bundles/fraud.bundle"], "exit": 1, "must": [Rule::Fraud.id()], "rules": [Rule::Fraud.id()] })
}

/// One item as it stands in a file.
fn framed(item: &Item) -> Vec<u8> {
    let mut out = minicbor::Encoder::new(Vec::new());
    out.bytes(&cbor::encode(item)).unwrap();
    out.into_writer()
}

fn unreadable(good: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    let node = match open(good).unwrap() {
        Opened::Journal(reader) => reader.header().node,
        Opened::Fraud(_) | Opened::Claim(_) => panic!("a journal was expected"),
    };
    let header = Header::new(node, Filter::All);
    let first = framed(&Item::Header(header.clone()));
    assert!(good.starts_with(&first));
    let rest = &good[first.len()..];
    let end_at = good.len() - framed(&Item::End(31)).len();
    let with = |header: Header| [framed(&Item::Header(header)), rest.to_vec()].concat();
    vec![
        ("empty", Vec::new()),
        ("no-bundle", b"not a bundle at all".to_vec()),
        ("cut-in-an-item", good[..good.len() / 2].to_vec()),
        ("no-end-mark", good[..end_at].to_vec()),
        ("more-after-the-end", [good, &[0x40]].concat()),
        ("wrong-count", [&good[..end_at], &framed(&Item::End(1))].concat()),
        ("four-gigabytes-claimed", [&first[..], &[0x5a, 0xff, 0xff, 0xff, 0xff]].concat()),
        ("long-length", [&[0x59, 0, first[1]], &first[2..], rest].concat()),
        ("indefinite-length", [&[0x5f], good, &[0xff]].concat()),
        ("format-of-another-program", with(Header { format: "other-bundle".into(), ..header.clone() })),
        ("version-2", with(Header { version: 2, ..header })),
        ("no-checkpoint", [&first[..], &framed(&Item::End(0))].concat()),
        ("two-headers", [&first[..], good].concat()),
        ("fraud-and-more", {
            let fraud = Item::Fraud(FraudProof { one: String::new(), other: String::new() });
            [framed(&fraud), first.clone()].concat()
        }),
    ]
}
