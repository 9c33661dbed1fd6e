//! The golden vectors under `tests/vectors/`, read back: what docs/ledger-format.md means, held against this crate.
//!
//! `tests/interop/` runs the same files through a second implementation.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use satgrid_ledger::{
    audit::{Detail, Party, Report, audit, cross_check, read_invoice},
    bundle::{Opened, open},
    claim::{ClaimReport, audit_claim, cross_claims},
    entry::Entry,
    log::{FraudProof, Frontier, SignedCheckpoint, empty_root, leaf_hash, verify_consistency, verify_inclusion},
    statements::{
        Ack, CreditNote, CreditTransfer, InclusionPromise, Receipt, ReceiptOpening, ReceiptPrivate, RequestOpen,
        RequestPrivate, RunningHash, SessionClose, SessionOpen, SliceDescriptor, private_hash, prompt_hash,
    },
    transfer::{TransferKind, end_id, transfer_id},
};
use satgrid_pricing::{charge, cost_alone, marginal_charge, numerators};
use satgrid_types::{
    Digest, NodeKey, NostrEvent, Numerators, Quote, RateCard, RequestId, Salt, SessionId, Signature, Statement,
    TokenUsage, UnixMs, VerifyError, cbor, statement_id, verify_body, verify_listing,
};
use serde_json::Value;
use std::{collections::BTreeSet, fs, path::PathBuf, str::FromStr};

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/vectors")
}

/// The vectors of a file; there is at least one.
fn vectors(name: &str) -> Vec<Value> {
    let text = fs::read_to_string(folder().join(name)).unwrap();
    let Value::Array(vectors) = serde_json::from_str::<Value>(&text).unwrap()["vectors"].take() else {
        panic!("{name} has no vectors")
    };
    assert!(!vectors.is_empty(), "{name} is empty");
    vectors
}

fn text<'v>(vector: &'v Value, field: &str) -> &'v str {
    vector[field].as_str().unwrap_or_else(|| panic!("no {field} in {vector}"))
}
fn bytes(vector: &Value, field: &str) -> Vec<u8> {
    hex::decode(text(vector, field)).unwrap()
}
fn id<T: FromStr<Err: core::fmt::Debug>>(vector: &Value, field: &str) -> T {
    text(vector, field).parse().unwrap()
}
fn number(vector: &Value, field: &str) -> u64 {
    vector[field].as_u64().unwrap_or_else(|| panic!("no {field} in {vector}"))
}
fn digests(vector: &Value, field: &str) -> Vec<Digest> {
    vector[field].as_array().unwrap().iter().map(|text| text.as_str().unwrap().parse().unwrap()).collect()
}
fn signature(vector: &Value, party: &str) -> Signature {
    Signature(hex::decode(text(&vector["signatures"], party)).unwrap().try_into().unwrap())
}

fn check_statements<T: Statement>() {
    for vector in vectors(&format!("{}.json", T::KIND)) {
        assert_eq!(text(&vector, "kind"), T::KIND);
        let body = bytes(&vector, "body");
        let judged = cbor::decode_limited::<T>(&body, T::MAX_LEN).map_err(|_| "statement/canonical").and_then(|_| {
            let keys = vector["keys"].as_object().unwrap();
            let verified: Result<(), VerifyError> = keys.keys().try_for_each(|party| {
                let key: NodeKey = id(&vector["keys"], party);
                verify_body::<T>(&body, &key, &signature(&vector, party))
            });
            verified.map_err(|_| "statement/signature")
        });
        let verdict = judged.map_or_else(|rule| rule, |()| "valid");
        assert_eq!(verdict, text(&vector, "verdict"), "{} {}", T::KIND, text(&vector, "name"));
        if verdict == "valid" {
            assert_eq!(hex::encode(statement_id::<T>(&body)), text(&vector, "id"));
        }
    }
}

#[test]
fn statements_are_judged_as_the_vectors_say() {
    check_statements::<Quote>();
    check_statements::<SessionOpen>();
    check_statements::<RequestOpen>();
    check_statements::<Ack>();
    check_statements::<Receipt>();
    check_statements::<SessionClose>();
    check_statements::<CreditNote>();
    check_statements::<CreditTransfer>();
    check_statements::<InclusionPromise>();
}

#[test]
fn signatures_hold_by_the_strict_rules_alone() {
    use ed25519_dalek::{Signature, VerifyingKey};
    for vector in vectors("ed25519.json") {
        let signature = Signature::from_bytes(&bytes(&vector, "signature").try_into().unwrap());
        let key = VerifyingKey::from_bytes(&bytes(&vector, "key").try_into().unwrap());
        let holds = key.is_ok_and(|key| key.verify_strict(&bytes(&vector, "message"), &signature).is_ok());
        assert_eq!(Some(holds), vector["valid"].as_bool(), "{}", text(&vector, "name"));
    }
}

#[test]
fn private_things_hash_as_the_vectors_say() {
    for vector in vectors("hashes.json") {
        let (salt, request): (Salt, RequestId) = (id(&vector, "salt"), id(&vector, "request"));
        let tokens: Vec<u32> = serde_json::from_value(vector["tokens"].clone()).unwrap();
        assert_eq!(prompt_hash(&salt, &tokens).to_string(), text(&vector, "prompt_hash"));
        let mut running = RunningHash::start(&salt, &request);
        assert_eq!(running.value().to_string(), text(&vector, "running_hash_0"));
        tokens.iter().for_each(|token| running.push(*token));
        assert_eq!(running.value().to_string(), text(&vector, "running_hash"));
        let private: ReceiptPrivate = cbor::decode(&bytes(&vector, "receipt_private")).unwrap();
        assert_eq!(private.running_hash, running.value());
        assert_eq!(private.commitment(&salt).to_string(), text(&vector, "receipt_private_hash"));
        let opening: ReceiptOpening = cbor::decode(&bytes(&vector, "receipt_opening")).unwrap();
        assert_eq!(opening, ReceiptOpening { salt, private });
        let asked = bytes(&vector, "request_private");
        assert!(cbor::decode::<RequestPrivate>(&asked).is_ok());
        assert_eq!(private_hash(&salt, &asked).to_string(), text(&vector, "request_private_hash"));
    }
    for vector in vectors("slice-descriptor.json") {
        let descriptor: SliceDescriptor = cbor::decode(&bytes(&vector, "bytes")).unwrap();
        assert_eq!(descriptor.description_hash().to_string(), text(&vector, "description_hash"));
    }
}

#[test]
fn work_costs_what_the_vectors_say() {
    for vector in vectors("pricing.json") {
        let rates: RateCard = serde_json::from_value(vector["rates"].clone()).unwrap();
        let usage = |value: &Value| -> TokenUsage { serde_json::from_value(value.clone()).unwrap() };
        if !vector["bad"].is_null() {
            assert!(numerators(&usage(&vector["bad"]), &rates).is_err(), "{}", text(&vector, "name"));
            continue;
        }
        let mut before = Numerators::ZERO;
        for step in vector["requests"].as_array().unwrap() {
            let usage = usage(&step["usage"]);
            let added = numerators(&usage, &rates).unwrap();
            assert_eq!(added.0.to_string(), text(step, "numerators"));
            assert_eq!(cost_alone(&usage, &rates).unwrap().0, number(step, "alone_msat"));
            assert_eq!(marginal_charge(before, added).unwrap().0, number(step, "cost_msat"));
            before = before.checked_add(added).unwrap();
            assert_eq!(before.0.to_string(), text(step, "cumulative_numerators"));
            assert_eq!(charge(before).0, number(step, "cumulative_cost_msat"));
        }
    }
}

#[test]
fn transfers_have_the_ids_of_the_vectors() {
    for vector in vectors("transfer-id.json") {
        let session: SessionId = id(&vector, "session");
        let request: Option<RequestId> = vector["request"].as_str().map(|text| text.parse().unwrap());
        let kind: TransferKind = cbor::decode(&[u8::try_from(number(&vector, "number")).unwrap()]).unwrap();
        assert_eq!(format!("{kind:?}"), text(&vector, "kind"));
        let k = u32::try_from(number(&vector, "k")).unwrap();
        assert_eq!(hex::encode(cbor::encode(&(session, request, kind, k))), text(&vector, "hashed"));
        let transfer = transfer_id(session, request, kind, k);
        assert_eq!(transfer.to_string(), text(&vector, "id"));
        assert_eq!(end_id(transfer).to_string(), text(&vector, "end_id"));
    }
}

#[test]
fn the_log_is_that_of_the_vectors() {
    for vector in vectors("merkle.json") {
        let (size, root): (u64, Digest) = (number(&vector, "size"), id(&vector, "root"));
        let valid = vector["valid"].as_bool();
        if !vector["inclusion"].is_null() {
            let (leaf, proof): (Digest, Vec<Digest>) = (id(&vector, "leaf"), digests(&vector, "inclusion"));
            let holds = verify_inclusion(&leaf, number(&vector, "index"), size, &proof, &root);
            assert_eq!(Some(holds), valid, "{vector}");
        } else if !vector["consistency"].is_null() {
            let (old_root, proof): (Digest, Vec<Digest>) = (id(&vector, "old_root"), digests(&vector, "consistency"));
            let holds = verify_consistency(number(&vector, "old"), size, &old_root, &root, &proof);
            assert_eq!(Some(holds), valid, "{vector}");
        } else {
            let mut frontier = Frontier::new();
            (0..size).for_each(|n| frontier.push(leaf_hash(&n.to_be_bytes())));
            assert_eq!(frontier.root(), root);
            assert!(size > 0 || root == empty_root());
        }
    }
    for vector in vectors("checkpoint.json") {
        let parsed = SignedCheckpoint::parse(text(&vector, "note"));
        assert_eq!(Some(parsed.is_ok()), vector["valid"].as_bool(), "{}", text(&vector, "name"));
        if let Ok(signed) = parsed {
            let says = (signed.node.to_string(), signed.size, signed.root.to_string());
            assert_eq!(says, (text(&vector, "node").into(), number(&vector, "size"), text(&vector, "root").into()));
        }
    }
    for vector in vectors("fraud.json") {
        let proof = FraudProof { one: text(&vector, "one").into(), other: text(&vector, "other").into() };
        let guilty = proof.check().ok().map(|node| node.to_string());
        assert_eq!(guilty.as_deref(), vector["guilty"].as_str(), "{}", text(&vector, "name"));
    }
}

#[test]
fn invoices_listings_and_entries_read_as_the_vectors_say() {
    for vector in vectors("bolt11.json") {
        let read = read_invoice(text(&vector, "bolt11"));
        assert_eq!(Some(read.is_ok()), vector["valid"].as_bool(), "{}", text(&vector, "name"));
        if let Ok(facts) = read {
            assert_eq!(facts.payee.to_string(), text(&vector, "payee"));
            assert_eq!(facts.payment_hash.to_string(), text(&vector, "payment_hash"));
            assert_eq!(facts.amount.map(|amount| amount.0), vector["amount_msat"].as_u64());
            assert_eq!(facts.description_hash.map(|d| d.to_string()).as_deref(), vector["description_hash"].as_str());
            assert_eq!(facts.network, text(&vector, "network"));
        }
    }
    for vector in vectors("listing.json") {
        let event = NostrEvent::from_json(text(&vector, "event")).unwrap();
        let created = UnixMs::from_secs(event.created_at);
        let verified = verify_listing(event, created);
        assert_eq!(Some(verified.is_ok()), vector["valid"].as_bool(), "{}", text(&vector, "name"));
        if let Ok(listing) = verified {
            assert_eq!(listing.id().to_string(), text(&vector, "id"));
            assert_eq!(listing.node_key.to_string(), text(&vector, "node_key"));
        }
    }
    for vector in vectors("entry.json") {
        let raw = bytes(&vector, "bytes");
        let valid = text(&vector, "verdict") == "valid";
        let decoded = Entry::decode(&raw);
        assert_eq!(decoded.is_ok(), valid, "{}", text(&vector, "name"));
        if let Ok(entry) = decoded {
            assert_eq!(entry.leaf().to_string(), text(&vector, "leaf"));
            assert_eq!(entry.bytes(), raw);
        }
    }
}

/// What a file turned out to be.
enum Judged {
    Fraud,
    Journal(Box<Report>),
    Claim(Box<ClaimReport>),
}

/// The rules that a file breaks; none where it is unreadable.
fn judge(name: &str) -> Option<(BTreeSet<String>, Judged)> {
    let bytes = fs::read(folder().join(name)).unwrap();
    match open(&bytes[..]).ok()? {
        Opened::Fraud(proof) => {
            proof.check().ok()?;
            Some((BTreeSet::from(["log/two-histories".to_owned()]), Judged::Fraud))
        }
        Opened::Journal(reader) => {
            let report = audit(reader, Detail::Sessions).ok()?;
            let rules = report.findings.iter().map(|finding| finding.rule.to_string()).collect();
            Some((rules, Judged::Journal(Box::new(report))))
        }
        Opened::Claim(reader) => {
            let report = audit_claim(reader).ok()?;
            let rules = report.findings.iter().map(|finding| finding.rule.to_string()).collect();
            Some((rules, Judged::Claim(Box::new(report))))
        }
    }
}

#[test]
fn bundles_are_judged_as_the_vectors_say() {
    for vector in vectors("bundles.json") {
        let strings = |field: &str| -> BTreeSet<String> { serde_json::from_value(vector[field].clone()).unwrap() };
        let files: Vec<String> = serde_json::from_value(vector["files"].clone()).unwrap();
        let judged: Option<Vec<_>> = files.iter().map(|name| judge(name)).collect();
        let Some(judged) = judged else {
            assert_eq!(number(&vector, "exit"), 2, "{files:?} cannot be read");
            continue;
        };
        let mut rules: BTreeSet<String> = judged.iter().flat_map(|(rules, _)| rules.clone()).collect();
        let mut owed = None;
        match &judged[..] {
            [(_, Judged::Journal(one)), (_, Judged::Journal(other))] => {
                rules.extend(cross_check(one, other).iter().map(|finding| finding.rule.to_string()));
            }
            [(_, Judged::Claim(one)), (_, Judged::Claim(other))] => {
                let (figures, across) = cross_claims(one, other).unwrap();
                rules.extend(across.iter().map(|finding| finding.rule.to_string()));
                owed = Some(figures.owed.0);
            }
            [(_, Judged::Claim(one))] => owed = Some(one.figures.owed.0),
            _ => {}
        }
        assert_eq!(vector["owed_msat"].as_u64(), owed, "{files:?}");
        assert_eq!(rules, strings("rules"), "{files:?}");
        assert!(rules.is_superset(&strings("must")), "{files:?}");
        if let [(_, Judged::Journal(report))] = &judged[..] {
            let must = strings("must");
            let found = report.findings.iter().filter(|finding| must.contains(finding.rule.id()));
            let role = |party: &Party| serde_json::to_value(party).unwrap()["role"].as_str().unwrap().to_owned();
            assert_eq!(found.map(|f| role(&f.party)).collect::<BTreeSet<_>>(), strings("parties"), "{files:?}");
        }
        assert_eq!(number(&vector, "exit"), u64::from(!rules.is_empty()), "{files:?}");
    }
}
