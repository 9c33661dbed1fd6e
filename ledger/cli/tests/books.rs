//! Claims, proofs and books from the built binary: what it writes, and that it adds up.

#![allow(clippy::unwrap_used)]

mod support;

use satgrid_ledger::{
    Evidence,
    statements::receipt_id,
    testing::{Work, World},
};
use satgrid_types::Msat;
use serde_json::{Value, json as object};
use std::{collections::BTreeMap, fs};
use support::{Fixture, json, ledger};

/// A provider that vanished while a request ran.
fn vanished() -> Fixture {
    let mut world = World::new();
    let mut session = world.open();
    world.pay(&mut session, Msat::sat(10));
    world.complete(&mut session, Work { prompt: 200, cached: 0, output: 300, acks: 2 });
    world.start(&mut session, Work { prompt: 50, cached: 0, output: 60, acks: 2 });
    Fixture::of(world)
}

#[test]
fn a_claim_is_made_from_either_side_and_judged() {
    let fixture = vanished();
    let (consumer, provider) = (fixture.text("consumer.db"), fixture.text("provider.db"));
    let stakes = json(&["claim", "--db", &consumer]);
    let stake = &stakes.as_array().unwrap()[0];
    assert_eq!(stake["role"], "consumer");
    let session = stake["session"].as_str().unwrap();
    let (ours, answer) = (fixture.text("ours.claim"), fixture.text("answer.claim"));
    for (db, out) in [(&consumer, &ours), (&provider, &answer)] {
        let said = ledger(&["claim", "--db", db, "--session", session, "--out", out]);
        assert_eq!(said.code, 0, "{}", said.err);
    }
    let verdict = json(&["verify", &ours]);
    assert_eq!((&verdict["verdict"], &verdict["files"][0]["kind"]), (&object!("clean"), &object!("claim")));
    let claim = &verdict["files"][0]["claim"];
    assert_eq!(claim["paid_msat"], 10_000);
    let owed = claim["paid_msat"].as_u64().unwrap() - claim["charged_msat"].as_u64().unwrap();
    assert_eq!(claim["owed_msat"], owed);
    let both = json(&["verify", &ours, &answer]);
    assert_eq!((&both["verdict"], &both["together"]["owed_msat"]), (&object!("clean"), &object!(owed)));
    assert!(ledger(&["verify", &ours]).out.ends_with("verdict: clean\n"));

    // From an exported file, to the byte the same claim.
    fixture.export("consumer.db", "c.bundle", &[]);
    let again = fixture.text("again.claim");
    assert_eq!(ledger(&["claim", "--db", &fixture.text("c.bundle"), "--session", session, "--out", &again]).code, 0);
    assert_eq!(fs::read(&ours).unwrap(), fs::read(&again).unwrap());

    let mut bytes = fs::read(&ours).unwrap();
    let at = bytes.len() / 2;
    bytes[at] ^= 1;
    fs::write(fixture.path("bent.claim"), &bytes).unwrap();
    assert_ne!(ledger(&["verify", &fixture.text("bent.claim")]).code, 0);
    fs::write(fixture.path("cut.claim"), &bytes[..at]).unwrap();
    assert_eq!(ledger(&["verify", &fixture.text("cut.claim")]).code, 2);
    let mixed = ledger(&["verify", &ours, &fixture.text("c.bundle")]);
    assert!(mixed.code == 2 && mixed.err.contains("hint:"), "{}", mixed.err);
    let none = ledger(&["claim", "--db", &consumer, "--session", &"00".repeat(32), "--out", &again]);
    assert!(none.code == 2 && none.err.contains("hint:"), "{}", none.err);
}

#[test]
fn proofs_are_checked_by_whoever_has_the_file() {
    let fixture = Fixture::new();
    let db = fixture.text("provider.db");
    let entries = fixture.world.provider.journal.entries();
    let receipt = entries.iter().find_map(|entry| match &entry.evidence {
        Some(Evidence::Receipt { receipt, .. }) => Some(receipt_id(receipt).to_string()),
        _ => None,
    });
    let receipt = receipt.unwrap();
    let save = |name: &str, text: &str| fs::write(fixture.path(name), text).unwrap();
    let prove = |args: &[&str]| json(&[&["prove", "--db", &db], args].concat());
    let inclusion = prove(&["--receipt", &receipt]);
    save("inclusion.json", &inclusion.to_string());
    save("consistency.json", &prove(&["--extends", "7"]).to_string());
    let note = ledger(&["checkpoint", "--db", &db]);
    assert!(note.out.starts_with("satgrid/"), "{}", note.err);
    save("kept.note", &note.out);
    for name in ["inclusion.json", "consistency.json"] {
        let args = ["check", &fixture.text(name), "--checkpoint", &fixture.text("kept.note")];
        let checked = json(&args);
        assert_eq!(checked["verdict"], "holds", "{checked}");
        assert!(checked["vouched_by"].is_string());
        assert_eq!(ledger(&args).code, 0);
    }
    assert_eq!(json(&["check", &fixture.text("inclusion.json")])["receipt"], receipt);

    // Anything changed in a proof fails, and a kept checkpoint gives a false root away.
    let bend = |field: &str, value: Value| {
        let mut bent = inclusion.clone();
        bent[field] = value;
        save("bent.json", &bent.to_string());
        ledger(&["check", &fixture.text("bent.json"), "--checkpoint", &fixture.text("kept.note")]).code
    };
    let other = Value::String("ab".repeat(32));
    assert_eq!(bend("leaf", other.clone()), 1);
    assert_eq!(bend("root", other), 1);
    assert_eq!(bend("index", object!(3)), 1);
    assert_eq!(bend("checkpoint", object!("not a note")), 1);
    assert_eq!(bend("proof", object!([])), 1);
    assert_eq!(bend("kind", object!("none")), 2);
    save("bent.json", "{}");
    assert_eq!(ledger(&["check", &fixture.text("bent.json")]).code, 2);
}

#[test]
fn old_sessions_lose_their_bodies_and_the_rest_is_still_proven() {
    let fixture = Fixture::new();
    let db = fixture.text("provider.db");
    let copy = fixture.text("copy.db");
    assert_eq!(ledger(&["snapshot", "--db", &db, "--out", &copy]).code, 0);
    assert_eq!(ledger(&["snapshot", "--db", &db, "--out", &copy]).code, 2, "nothing is overwritten");
    assert_eq!(json(&["balance", "--db", &db]), json(&["balance", "--db", &copy]));
    let prune = |more: &[&str]| ledger(&[&["prune", "--db", &copy, "--older-than-days", "1"], more].concat());
    assert!(prune(&[]).out.contains("could go"));
    let balance = json(&["balance", "--db", &copy]);
    assert_eq!(prune(&["--yes"]).code, 0);
    assert_eq!(json(&["balance", "--db", &copy]), balance);
    let whole = fixture.export("copy.db", "whole.bundle", &[]);
    assert!(whole.code == 2 && whole.err.contains("pruned") && whole.err.contains("hint:"), "{}", whole.err);
    // Sessions that hold money are whole, under the same checkpoint as before.
    let stakes = json(&["claim", "--db", &copy]);
    assert!(!stakes.as_array().unwrap().is_empty());
    for stake in stakes.as_array().unwrap() {
        let session = stake["session"].as_str().unwrap();
        assert_eq!(fixture.export("copy.db", "part.bundle", &["--session", session]).code, 0);
        assert_eq!(ledger(&["verify", &fixture.text("part.bundle")]).code, 0);
    }
    // A session that is half gone is left out, and accuses nobody.
    let part = fixture.export("copy.db", "part.bundle", &["--from", "2026-01-01"]);
    assert!(part.code == 0 && part.err.contains("left out"), "{}", part.err);
    let verdict = json(&["verify", &fixture.text("part.bundle"), "--sessions"]);
    assert_eq!(verdict["verdict"], "clean", "{verdict}");
    let shown = verdict["files"][0]["journal"]["sessions"].as_object().unwrap();
    assert_eq!(shown.len(), 2, "one of three sessions is over");
    fixture.export("provider.db", "whole.bundle", &[]);
    let whole = json(&["verify", &fixture.text("whole.bundle"), "--sessions"]);
    let sessions = whole["files"][0]["journal"]["sessions"].as_object().unwrap();
    let gone = sessions.keys().find(|id| !shown.contains_key(*id)).unwrap();
    let none = fixture.export("copy.db", "gone.bundle", &["--session", gone]);
    assert!(none.code == 2 && none.err.contains("pruned"), "{}", none.err);
}

/// A CSV line's fields; nothing here is quoted.
fn fields(line: &str) -> Vec<String> {
    line.split(',').map(str::to_owned).collect()
}

#[test]
fn books_for_other_programs_add_up() {
    let fixture = Fixture::new();
    for db in ["consumer.db", "provider.db"] {
        let balance = json(&["balance", "--db", &fixture.text(db)]);
        fs::write(fixture.path("rates.csv"), "time,currency,rate\n2026-01-01,USD,100000\n").unwrap();
        let rates = fixture.text("rates.csv");
        assert_eq!(fixture.export(db, "books.csv", &["--csv", "--rates", &rates]).code, 0);
        let csv = fs::read_to_string(fixture.path("books.csv")).unwrap();
        let mut lines = csv.lines();
        let head = fields(lines.next().unwrap());
        let column = |name: &str| head.iter().position(|column| column == name).unwrap();
        let (mut wallet, mut accounts) = (0i128, BTreeMap::<String, i128>::new());
        for line in lines {
            let row = fields(line);
            assert_eq!(row.len(), head.len(), "{line}");
            wallet += row[column("wallet_msat")].parse::<i128>().unwrap();
            let amount: i128 = row[column("amount_msat")].parse().unwrap();
            *accounts.entry(row[column("debit")].clone()).or_default() += amount;
            *accounts.entry(row[column("credit")].clone()).or_default() -= amount;
            assert_eq!((row[column("rate_currency")].as_str(), row[column("value")].is_empty()), ("USD", false));
        }
        assert_eq!(balance["lightning"]["balance_msat"], object!(wallet as i64));
        for (name, net) in accounts {
            let credit = ["prepaid", "income", "refunds-due", "dust", "worker-payable", "external"];
            let normal = if credit.contains(&name.as_str()) { -net } else { net };
            assert_eq!(balance[&name]["balance_msat"], object!(normal as i64), "{db}, {name}");
        }

        assert_eq!(fixture.export(db, "books.beancount", &["--beancount"]).code, 0);
        let beancount = fs::read_to_string(fixture.path("books.beancount")).unwrap();
        let (mut sum, mut lightning) = (0i128, 0i128);
        for line in beancount.lines().filter(|line| line.ends_with(" MSAT") && line.starts_with("  ")) {
            let words: Vec<&str> = line.split_whitespace().collect();
            let amount: i128 = words[1].parse().unwrap();
            sum += amount;
            lightning += if words[0] == "Assets:Lightning" { amount } else { 0 };
        }
        assert_eq!((sum, lightning), (0, wallet));

        assert_eq!(fixture.export(db, "koinly.csv", &["--koinly"]).code, 0);
        let koinly = fs::read_to_string(fixture.path("koinly.csv")).unwrap();
        let msat = |text: &str| text.replace('.', "").parse::<i128>().unwrap_or(0);
        let moved: i128 = koinly.lines().skip(1).map(fields).map(|row| msat(&row[3]) - msat(&row[1])).sum();
        assert_eq!(moved, wallet);
    }
    assert_eq!(fixture.export("consumer.db", "x", &["--csv", "--koinly"]).code, 2);
}

/// What a wallet would list for one side of the world: its own payments, as the ledger has them.
fn payments(fixture: &Fixture, db: &str) -> Vec<Value> {
    fixture.export(db, "all.csv", &["--csv"]);
    let csv = fs::read_to_string(fixture.path("all.csv")).unwrap();
    let mut out: BTreeMap<String, Value> = BTreeMap::new();
    for row in csv.lines().skip(1).map(fields) {
        let (category, hash) = (row[2].as_str(), row[8].clone());
        let amount: u64 = row[4].parse().unwrap();
        let direction = match category {
            "slice-paid" | "refund-paid" => "outbound",
            "slice-received" | "refund-received" => "inbound",
            "routing-fee" => {
                out.get_mut(&hash).unwrap()["fee_msat"] = object!(amount);
                continue;
            }
            _ => continue,
        };
        // A refund's route is paid from the refund.
        let fee = if category == "refund-paid" { fixture.world.refund_fee.0 } else { 0 };
        let payment = object!({ "payment_hash": hash, "direction": direction, "amount_msat": amount - fee, "fee_msat": fee, "state": "settled" });
        out.insert(hash, payment);
    }
    out.into_values().collect()
}

#[test]
fn the_wallet_and_the_ledger_are_held_against_each_other() {
    let mut world = World::new();
    world.slice_fee = Msat(7);
    let mut session = world.open();
    world.pay(&mut session, Msat::sat(10));
    world.complete(&mut session, Work { prompt: 40, cached: 32, output: 128, acks: 2 });
    world.fail_payment(&mut session, Msat::sat(5));
    world.pay(&mut session, Msat::sat(5));
    world.close_with_refund(&mut session);
    let fixture = Fixture::of(world);
    for db in ["consumer.db", "provider.db"] {
        let listed = payments(&fixture, db);
        assert_eq!(listed.len(), 3);
        let reconcile = |listed: &[Value]| {
            fs::write(fixture.path("payments.json"), object!(listed).to_string()).unwrap();
            json(&["reconcile", "--db", &fixture.text(db), "--payments", &fixture.text("payments.json")])
        };
        let agreed = reconcile(&listed);
        assert_eq!(agreed["verdict"], "agree", "{agreed}");
        let kinds = |listed: &[Value]| -> Vec<String> {
            let found = reconcile(listed);
            let differences = found["differences"].as_array().unwrap();
            differences.iter().map(|d| d["kind"].as_str().unwrap().to_owned()).collect()
        };
        assert_eq!(kinds(&listed[1..]), ["only-in-ledger"]);
        let with = |change: &dyn Fn(&mut Vec<Value>)| {
            let mut bent = listed.clone();
            change(&mut bent);
            kinds(&bent)
        };
        let stranger = object!({ "payment_hash": "ab".repeat(32), "direction": "outbound", "amount_msat": 5, "fee_msat": 0, "state": "settled" });
        assert_eq!(with(&|l| l.push(stranger.clone())), ["only-in-wallet"]);
        let mut unpaid = stranger.clone();
        (unpaid["state"], unpaid["direction"]) = (object!("in_flight"), object!("inbound"));
        assert_eq!(with(&|l| l.push(unpaid.clone())), [] as [&str; 0], "an invoice that nobody paid");
        assert_eq!(with(&|l| l[0]["amount_msat"] = object!(1)), ["amount-differs"]);
        assert_eq!(with(&|l| l[0]["state"] = object!("failed")), ["state-differs"]);
        if let Some(out) = listed.iter().position(|p| p["direction"] == "outbound") {
            assert_eq!(with(&|l| l[out]["fee_msat"] = object!(999)), ["fee-differs"]);
        }
    }
    assert_eq!(
        ledger(&["reconcile", "--db", &fixture.text("consumer.db"), "--payments", &fixture.text("consumer.db")]).code,
        2
    );
}
