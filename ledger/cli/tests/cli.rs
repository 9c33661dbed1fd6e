//! The built binary on a real journal: what it prints, and how it exits.

#![allow(clippy::unwrap_used)]

mod support;

use satgrid_ledger::{
    Evidence, Journal,
    bundle::write_fraud,
    entry::Draft,
    log::{FraudProof, SignedCheckpoint},
    statements::receipt_id,
    testing::{World, checkpoint_of},
};
use satgrid_ledger_sqlite::SqliteJournal;
use satgrid_types::{Digest, node_key};
use serde_json::Value;
use std::{fs, path::Path};
use support::{Fixture, json, ledger};

#[test]
fn both_exports_verify_and_agree() {
    let fixture = Fixture::new();
    assert_eq!(fixture.export("provider.db", "provider.bundle", &[]).code, 0);
    assert_eq!(fixture.export("consumer.db", "consumer.bundle", &["--redact"]).code, 0);
    let (a, b) = (fixture.text("provider.bundle"), fixture.text("consumer.bundle"));
    let said = ledger(&["verify", &a, &b]);
    assert_eq!(said.code, 0, "{} {}", said.out, said.err);
    assert!(said.out.ends_with("verdict: clean\n"), "{}", said.out);
    let verdict = json(&["verify", &a, &b]);
    assert_eq!(verdict["verdict"], "clean");
    assert_eq!(verdict["cross"], Value::Array(Vec::new()));
    let (provider, consumer) = (&verdict["files"][0]["journal"], &verdict["files"][1]["journal"]);
    assert_eq!(provider["as_provider"], consumer["as_consumer"]);
    assert_eq!(provider["as_provider"]["receipts"], 5);
    assert_eq!(provider["balances_msat"]["income"], consumer["balances_msat"]["expense"]);
    assert!(!fixture.path("provider.part").exists());
}

#[test]
fn one_session_is_exported_with_proofs() {
    let fixture = Fixture::new();
    fixture.export("consumer.db", "all.bundle", &[]);
    let all = json(&["verify", &fixture.text("all.bundle"), "--sessions"]);
    let sessions = all["files"][0]["journal"]["sessions"].as_object().unwrap();
    assert_eq!(sessions.len(), 3);
    for (id, session) in sessions {
        let said = fixture.export("consumer.db", "one.bundle", &["--session", id]);
        assert_eq!(said.code, 0, "{}", said.err);
        let one = json(&["verify", &fixture.text("one.bundle"), "--sessions"]);
        assert_eq!(one["verdict"], "clean");
        assert_eq!(&one["files"][0]["journal"]["sessions"][id], session);
        let key = session["consumer"].as_str().unwrap();
        assert_eq!(fixture.export("consumer.db", "peer.bundle", &["--peer", key]).code, 0);
        assert_eq!(
            fs::read(fixture.path("peer.bundle")).unwrap().len(),
            fs::read(fixture.path("one.bundle")).unwrap().len()
        );
    }
    let none = fixture.export("consumer.db", "none.bundle", &["--session", &"00".repeat(32)]);
    assert_eq!((none.code, fixture.path("none.bundle").exists()), (2, false));
    assert!(none.err.contains("no session matches"), "{}", none.err);
    assert_eq!(fixture.export("consumer.db", "time.bundle", &["--from", "2026-01-01", "--to", "2026-01-02"]).code, 0);
    assert_eq!(ledger(&["verify", &fixture.text("time.bundle")]).code, 0);
}

#[test]
fn a_changed_byte_is_a_finding_and_a_cut_file_is_unreadable() {
    let fixture = Fixture::new();
    fixture.export("provider.db", "a.bundle", &[]);
    let bytes = fs::read(fixture.path("a.bundle")).unwrap();
    let check = |bytes: &[u8], code: i32, expect: &str| {
        fs::write(fixture.path("bad.bundle"), bytes).unwrap();
        let said = ledger(&["verify", &fixture.text("bad.bundle")]);
        assert_eq!(said.code, code, "{} {}", said.out, said.err);
        assert!(said.out.contains(expect) || said.err.contains(expect), "{} {}", said.out, said.err);
    };
    let mut flipped = bytes.clone();
    // Within an invoice's text, far from any framing.
    let at = bytes.windows(5).position(|w| w == b"lnbcr").unwrap() + 60;
    flipped[at] ^= 1;
    check(&flipped, 1, "log/root");
    check(&bytes[..bytes.len() / 2], 2, "the file ends within item");
    check(&bytes[..bytes.len() - 3], 2, "the file ends within item");
    // The end mark is six bytes: its length, and [3, [number of entries]].
    check(&bytes[..bytes.len() - 6], 2, "without an end mark");
    check(b"hello", 2, "not a satgrid bundle");
    let said = ledger(&["verify", &fixture.text("missing.bundle")]);
    assert_eq!(said.code, 2);
    assert_eq!(ledger(&["frobnicate"]).code, 2);
    assert_eq!(ledger(&["--help"]).code, 0);
}

#[test]
fn without_a_checkpoint_there_is_a_hint_and_a_key_helps() {
    let fixture = Fixture::new();
    fixture.journal("bare.db", &fixture.world.provider, false);
    let said = fixture.export("bare.db", "bare.bundle", &[]);
    assert_eq!(said.code, 2);
    assert!(said.err.contains("hint:") && said.err.contains("--key"), "{}", said.err);
    fs::write(fixture.path("key"), hex::encode(fixture.world.provider.node.to_bytes())).unwrap();
    assert_eq!(fixture.export("bare.db", "bare.bundle", &["--key", &fixture.text("key")]).code, 0);
    assert_eq!(ledger(&["verify", &fixture.text("bare.bundle")]).code, 0);
    fs::write(fixture.path("key"), hex::encode(fixture.world.consumer.node.to_bytes())).unwrap();
    let said = fixture.export("bare.db", "bare.bundle", &["--key", &fixture.text("key")]);
    assert!(said.code == 2 && said.err.contains("the journal is of"), "{}", said.err);
    let said = fixture.export("missing.db", "x.bundle", &[]);
    assert!(said.code == 2 && said.err.contains("no such file"), "{}", said.err);
}

#[test]
fn a_journal_in_use_is_exported_as_it_stands() {
    let fixture = Fixture::new();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let journal = SqliteJournal::open(&fixture.path("provider.db")).await.unwrap();
        let newer = satgrid_ledger::testing::conformance::numbered(1_000_000_000);
        journal.append(satgrid_types::UnixMs(0), vec![newer]).await.unwrap();
        let said = fixture.export("provider.db", "live.bundle", &[]);
        assert_eq!(said.code, 0, "{}", said.err);
        assert!(said.err.contains("1 newer entries"), "{}", said.err);
        journal.close().await;
    });
    assert_eq!(ledger(&["verify", &fixture.text("live.bundle")]).code, 0);
}

#[test]
fn journals_and_bundles_are_shown_alike() {
    let fixture = Fixture::new();
    fixture.export("consumer.db", "c.bundle", &[]);
    let (db, bundle) = (fixture.text("consumer.db"), fixture.text("c.bundle"));
    for command in
        [&["show"][..], &["balance"], &["balance", "--sessions"], &["statement"], &["statement", "--by", "model"]]
    {
        let run = |file: &str| ledger(&[command, &["--db", file]].concat());
        let (a, b) = (run(&db), run(&bundle));
        assert_eq!((a.code, b.code), (0, 0), "{} {}", a.err, b.err);
        assert_eq!(a.out, b.out, "{command:?}");
        assert_eq!(json(&[command, &["--db", &db]].concat()), json(&[command, &["--db", &bundle]].concat()));
    }
    let balance = json(&["balance", "--db", &db]);
    let spent = balance["expense"]["balance_msat"].as_i64().unwrap();
    let statement = json(&["statement", "--db", &db, "--by", "day"]);
    assert_eq!(statement["2026-01-01"]["spent_msat"], spent);
    assert_eq!(statement["2026-01-01"]["receipts"], 5);
    let model = json(&["statement", "--db", &db, "--by", "model"]);
    assert_eq!(model["gemma-3-270m"]["spent_msat"], spent);
    let shown = json(&["show", "--db", &db, "--limit", "3"]);
    assert_eq!(shown.as_array().unwrap().len(), 3);
    assert_eq!(shown[0]["kind"], "genesis");
}

#[test]
fn a_receipt_is_proved_and_two_histories_are_too() {
    let fixture = Fixture::new();
    let entries = fixture.world.provider.journal.entries();
    let receipt = entries.iter().find_map(|entry| match &entry.evidence {
        Some(Evidence::Receipt { receipt, .. }) => Some((entry.seq, receipt_id(receipt))),
        _ => None,
    });
    let (index, id) = receipt.unwrap();
    let db = fixture.text("provider.db");
    let proof = json(&["prove", "--db", &db, "--receipt", &id.to_string()]);
    assert_eq!(proof["index"], index);
    assert_eq!(proof["size"], entries.len());
    assert!(proof["checkpoint"].as_str().unwrap().starts_with("satgrid/"));
    assert_eq!(proof, json(&["prove", "--db", &db, "--entry", &index.to_string()]));
    assert_eq!(json(&["prove", "--db", &db, "--extends", "5"])["kind"], "consistency");
    let said = ledger(&["prove", "--db", &db, "--receipt", &"00".repeat(32)]);
    assert!(said.code == 2 && said.err.contains("hint:"), "{}", said.err);

    let write = |name: &str, text: &str| fs::write(fixture.path(name), text).unwrap();
    let honest = checkpoint_of(&entries, &fixture.world.provider.node);
    let mut other = entries;
    other[3].at = satgrid_types::UnixMs(u64::from(u32::MAX));
    write("one.note", honest.note());
    write("other.note", checkpoint_of(&other, &fixture.world.provider.node).note());
    let fraud = |other: &str| {
        ledger(&["fraud", &fixture.text("one.note"), &fixture.text(other), "--out", &fixture.text("fraud.bundle")])
    };
    assert_eq!(fraud("one.note").code, 2);
    assert!(!Path::new(&fixture.text("fraud.bundle")).exists());
    assert_eq!(fraud("other.note").code, 0);
    let verdict = json(&["verify", &fixture.text("fraud.bundle")]);
    assert_eq!(verdict["files"][0]["kind"], "fraud-proof");
    assert_eq!(verdict["files"][0]["findings"][0]["rule"], "log/two-histories");
    assert_eq!(ledger(&["verify", &fixture.text("fraud.bundle")]).code, 1);
}

#[test]
fn a_server_that_is_not_there_leaves_nothing_behind() {
    let fixture = Fixture::new();
    let (server, out) = ("postgres://nobody@127.0.0.1:1/none", fixture.text("copy.db"));
    for args in [
        &["snapshot", "--db", server, "--out", &out][..],
        &["prune", "--db", server, "--older-than-days", "1", "--yes"],
    ] {
        let said = ledger(args);
        assert!(said.code == 2 && said.err.contains("cannot be reached"), "{}", said.err);
    }
    assert!(!fixture.path("copy.db").exists());
}

#[test]
fn what_others_were_caught_at_is_listed_and_written_as_proof() {
    let world = World::example();
    let peer = node_key(&world.provider.node);
    let head = |root: u8| SignedCheckpoint::sign(7, Digest([root; 32]), &world.provider.node).note().to_owned();
    let mut fraud = Vec::new();
    write_fraud(&mut fraud, &FraudProof { one: head(1), other: head(2) }).unwrap();
    let kept = [("two-histories", fraud), ("log-silent", vec![1, 2, 3])];
    let drafts = kept.map(|(rule, statement)| Draft::of(Evidence::Misbehaviour { peer, rule: rule.into(), statement }));
    let at = world.consumer.journal.last().unwrap().at;
    let entries = world.consumer.journal.append_now(at, drafts.into()).unwrap();
    let fixture = Fixture::of(world);
    let db = fixture.text("consumer.db");
    let list = json(&["misbehaviour", "--db", &db]);
    let rules: Vec<&str> = list.as_array().unwrap().iter().map(|one| one["rule"].as_str().unwrap()).collect();
    assert_eq!(rules, ["two-histories", "log-silent"]);
    assert_eq!((&list[0]["proof"], &list[1]["proof"]), (&Value::Bool(true), &Value::Bool(false)));
    let proof = fixture.text("fraud.bundle");
    let number = entries[0].seq.to_string();
    let said = ledger(&["misbehaviour", "--db", &db, "--entry", &number, "--out", &proof]);
    assert!(said.code == 0 && said.err.contains("`verify` judges it"), "{}", said.err);
    let verdict = json(&["verify", &proof]);
    assert_eq!(verdict["files"][0]["findings"][0]["rule"], "log/two-histories");
    assert_eq!(verdict["files"][0]["findings"][0]["party"]["key"], peer.to_string());
    // What others did is no finding against the journal that keeps it.
    fixture.export("consumer.db", "consumer.bundle", &[]);
    assert_eq!(json(&["verify", &fixture.text("consumer.bundle")])["files"][0]["journal"]["misbehaviour"], 2);
    let said = ledger(&["misbehaviour", "--db", &db, "--entry", "0", "--out", &proof]);
    assert!(said.code == 2 && said.err.contains("hint:"), "{}", said.err);
    assert_eq!(json(&["misbehaviour", "--db", &fixture.text("provider.db")]), Value::Array(Vec::new()));
}
