//! Vectors of everything that is not a signed statement: hashing, pricing, ids, the log, invoices, listings, entries.

use crate::{Files, cbor_json::to_json, listings::listings};
use satgrid_ledger::{
    audit::read_invoice,
    entry::{Draft, Entry, Evidence, Head},
    log::{
        FraudProof, MemoryTiles, SignedCheckpoint, consistency_proof, empty_root, inclusion_proof, leaf_hash, root_at,
        verify_consistency, verify_inclusion,
    },
    statements::{ReceiptOpening, ReceiptPrivate, RequestPrivate, RunningHash, SliceDescriptor, prompt_hash},
    testing::{EPOCH, Party, World, bolt11, bytes32, succession_of},
    transfer::{Account, Transfer, TransferKind, attempt, end_id, transfer_id},
};
use satgrid_pricing::{charge, cost_alone, marginal_charge, numerators};
use satgrid_types::{
    Digest, Msat, MsatPerMtok, NodeKey, Numerators, PaymentHash, Preimage, QuoteId, RateCard, ReceiptId, RequestId,
    Salt, Sampling, SessionId, TokenUsage, TransferId, cbor,
};
use serde_json::{Value, json};

pub(crate) fn write(files: &mut Files) {
    files.json("ed25519.json", "which signatures hold: the rules beyond RFC 8032's equation", ed25519());
    files.json("hashes.json", "prompt hashes, running hashes, and the commitments to private fields", hashes());
    files.json(
        "slice-descriptor.json",
        "slice descriptors and the description hashes of their invoices",
        descriptors(),
    );
    files.json("pricing.json", "usage at rates: numerators, and what a session is charged", pricing());
    files.json("transfer-id.json", "deterministic ids of transfers and of their endings", transfer_ids());
    files.json("merkle.json", "roots, inclusion and consistency proofs", merkle());
    files.json("checkpoint.json", "signed tree heads", checkpoints());
    files.json("fraud.json", "pairs of tree heads that prove two histories, and pairs that do not", frauds());
    files.json("bolt11.json", "what is read from an invoice", invoices());
    files.json("listing.json", "listing events", listings());
    files.json("entry.json", "journal entries: canonical bytes and leaf hashes", entries());
}

/// Over the plain message, no context. Made with the scalar arithmetic that a signing library does not offer.
const ED25519: [(&str, &str, &str, &str); 6] = [
    (
        "small-order R",
        "455ef0556f7fe201050269008f00e75f6363ae3de7f998a506e5e3a11bf1cad2",
        "small-order R",
        "0100000000000000000000000000000000000000000000000000000000000000bd8c312bcc56558efa069c1b255d241d2ad7bd3fa52005e6e9b6067def2a5e06",
    ),
    (
        "R of order 8, cofactored equation only",
        "455ef0556f7fe201050269008f00e75f6363ae3de7f998a506e5e3a11bf1cad2",
        "R of order 8, 0",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037aaea2e920f888d67a3fc5a5d27eeb89dfdadd1b93c600b924c2043926c90e5c08",
    ),
    (
        "mixed-order key, equation holds",
        "0a69e197f4e190d5af0fa7e19565dfc6254a90d534ddd16f89336e09cf8f0563",
        "mixed-order key, 7",
        "83269cce30edf692ab3fba7c77d474ca76c37831a61a2dac097f8c6537762495993a494ae211926cb6bcef6da26e9ca3902fa51b0fc6acab6ce5419007a66a06",
    ),
    (
        "mixed-order key, cofactored equation only",
        "0a69e197f4e190d5af0fa7e19565dfc6254a90d534ddd16f89336e09cf8f0563",
        "mixed-order key off, 0",
        "83269cce30edf692ab3fba7c77d474ca76c37831a61a2dac097f8c65377624959564a27468c22d5247878381af07ac37fbd57ff13ad96b01c436594f9eda4d02",
    ),
    (
        "mixed-order R, cofactored equation only",
        "455ef0556f7fe201050269008f00e75f6363ae3de7f998a506e5e3a11bf1cad2",
        "mixed-order R",
        "55c657542d2f54d9d72f7dcf5559bc71d5b25c862823d53760a69c4bcb3002c977aa1395b23cd6bccdec0e5810dd72711e12c32b297088a51ec1c898eeee210c",
    ),
    (
        "mixed-order key and R, equation holds",
        "0a69e197f4e190d5af0fa7e19565dfc6254a90d534ddd16f89336e09cf8f0563",
        "mixed both, 7",
        "55c657542d2f54d9d72f7dcf5559bc71d5b25c862823d53760a69c4bcb3002c9e80d0af0ba599817d59f31f6e350ce5199f9772439d64fa4fc8ed2351147c008",
    ),
];

/// A statement kind whose context is taken off again: these vectors sign plain messages.
fn holds(key: &[u8], message: &[u8], signature: &[u8]) -> bool {
    use ed25519_dalek::{Signature, VerifyingKey};
    let Ok(key) = VerifyingKey::from_bytes(key.try_into().unwrap()) else { return false };
    key.verify_strict(message, &Signature::from_bytes(signature.try_into().unwrap())).is_ok()
}

fn ed25519() -> Vec<Value> {
    let crafted = ED25519.iter().map(|(name, key, message, signature)| {
        let (key, signature) = (hex::decode(key).unwrap(), hex::decode(signature).unwrap());
        (name.to_string(), key, message.as_bytes().to_vec(), signature)
    });
    // RFC 8032, 7.1, tests 1 to 3.
    let rfc = [
        (
            "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
            "",
            "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
        ),
        (
            "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
            "72",
            "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
        ),
        (
            "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
            "af82",
            "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
        ),
    ];
    let rfc = rfc.iter().enumerate().map(|(n, (key, message, signature))| {
        (
            format!("RFC 8032 test {}", n + 1),
            hex::decode(key).unwrap(),
            hex::decode(message).unwrap(),
            hex::decode(signature).unwrap(),
        )
    });
    let vectors = rfc.chain(crafted).map(|(name, key, message, signature)| {
        let valid = holds(&key, &message, &signature);
        json!({ "name": name, "key": hex::encode(key), "message": hex::encode(message), "signature": hex::encode(signature), "valid": valid })
    });
    vectors.collect()
}

fn hashes() -> Vec<Value> {
    let salt = Salt(bytes32("salt"));
    let request = RequestId(bytes32("request"));
    let lists: [(&str, Vec<u32>); 4] = [
        ("no token", vec![]),
        ("one token", vec![0]),
        ("four bytes each, little-endian", vec![1, 256, 65_536, u32::MAX]),
        ("a hundred", (0..100).collect()),
    ];
    let plain = lists.map(|(name, tokens)| (name, tokens, None, None, None));
    // What a request asks for beside tokens.
    let more = [
        ("texts to be embedded, of 40, 1 and 59 tokens", (0..100).collect(), Some(vec![40, 1, 59]), None, None),
        ("one text to be embedded", vec![7], Some(vec![1]), None, None),
        ("five likeliest tokens of each, under a grammar", vec![1, 2], None, Some(5), Some(vec![0xa0, 0xff])),
    ];
    let mut vectors = Vec::new();
    for (name, tokens, embed, top_logprobs, grammar) in plain.into_iter().chain(more) {
        let mut running = RunningHash::start(&salt, &request);
        let start = running.value();
        tokens.iter().for_each(|token| running.push(*token));
        let private = ReceiptPrivate {
            prompt_hash: prompt_hash(&salt, &tokens),
            running_hash: running.value(),
            sampling: Sampling::default(),
        };
        let asked = RequestPrivate {
            embed,
            top_logprobs,
            grammar: grammar.map(Into::into),
            ..RequestPrivate::new(&salt, &tokens, sampling(), vec!["END".into(), "é".into()], 3)
        };
        vectors.push(json!({
            "name": name, "salt": salt.to_string(), "request": request.to_string(), "tokens": tokens,
            "prompt_hash": private.prompt_hash.to_string(),
            "running_hash_0": start.to_string(), "running_hash": running.value().to_string(),
            "receipt_private": hex::encode(cbor::encode(&private)),
            "receipt_private_hash": private.commitment(&salt).to_string(),
            "receipt_opening": hex::encode(cbor::encode(&ReceiptOpening { salt, private })),
            "request_private": hex::encode(cbor::encode(&asked)),
            "request_private_fields": to_json(&cbor::encode(&asked)),
            "request_private_hash": asked.commitment(&salt).to_string(),
        }));
    }
    vectors
}

fn sampling() -> Sampling {
    Sampling {
        temperature_micro: 700_000,
        top_k: 40,
        presence_penalty_micro: -500_000,
        frequency_penalty_micro: 250_000,
        logit_bias_micro: vec![(7, -1_000_000), (70_000, 1)],
        seed: u64::MAX,
        ..Sampling::default()
    }
}

fn descriptors() -> Vec<Value> {
    let first = SliceDescriptor {
        version: 1,
        session: SessionId(bytes32("session")),
        k: 0,
        amount: Msat::sat(250),
        quote: QuoteId(bytes32("quote")),
        provider: NodeKey(bytes32("provider")),
        consumer: NodeKey(bytes32("consumer")),
        previous_receipt: None,
    };
    let later = SliceDescriptor { k: 7, previous_receipt: Some(ReceiptId(bytes32("receipt"))), ..first.clone() };
    let show = |d: &SliceDescriptor| {
        let bytes = cbor::encode(d);
        json!({ "bytes": hex::encode(&bytes), "fields": to_json(&bytes), "description_hash": d.description_hash().to_string() })
    };
    vec![show(&first), show(&later)]
}

fn pricing() -> Vec<Value> {
    let rates = |input, cached, output, per_request| RateCard {
        input: MsatPerMtok(input),
        cached_input: MsatPerMtok(cached),
        output: MsatPerMtok(output),
        per_request: Msat(per_request),
        ..RateCard::default()
    };
    let usage = |prompt, cached_prompt, completion, reasoning| TokenUsage {
        prompt,
        cached_prompt,
        completion,
        reasoning,
        part: None,
    };
    let sessions: [(&str, RateCard, Vec<TokenUsage>); 8] = [
        (
            "nothing done costs nothing, not even the fixed amount",
            rates(1_000_000, 0, 1_000_000, 500),
            vec![usage(0, 0, 0, 0)],
        ),
        ("a millionth of a msat is rounded up", rates(1, 0, 0, 0), vec![usage(1, 0, 0, 0)]),
        ("one over a million", rates(1, 0, 0, 0), vec![usage(1_000_000, 0, 0, 0), usage(1, 0, 0, 0)]),
        ("fresh, cached and output tokens", rates(2_000_000, 500_000, 8_000_000, 0), vec![usage(1_000, 400, 50, 10)]),
        ("the fixed amount alone", rates(0, 0, 0, 700), vec![usage(1, 0, 0, 0), usage(0, 0, 1, 0)]),
        ("one rounding over many requests", rates(333_333, 0, 0, 0), vec![usage(1, 0, 0, 0); 4]),
        ("reasoning is output and costs no more", rates(1, 1, 1_500_000, 1), vec![usage(10, 10, 7, 7)]),
        ("large counts", rates(4_000_000_000, 0, 0, 0), vec![usage(u32::MAX, 0, 0, 0)]),
    ];
    let mut vectors = Vec::new();
    for (name, rates, requests) in sessions {
        let mut before = Numerators::ZERO;
        let mut steps = Vec::new();
        for usage in requests {
            let added = numerators(&usage, &rates).unwrap();
            let cost = marginal_charge(before, added).unwrap();
            before = before.checked_add(added).unwrap();
            steps.push(json!({
                "usage": usage, "numerators": added.0.to_string(), "alone_msat": cost_alone(&usage, &rates).unwrap(), "cost_msat": cost,
                "cumulative_numerators": before.0.to_string(), "cumulative_cost_msat": charge(before),
            }));
        }
        vectors.push(json!({ "name": name, "rates": rates, "requests": steps }));
    }
    for (name, rates, usage) in [
        ("bad: does not fit 64 bits", rates(u64::MAX, 0, 0, 0), usage(2, 0, 0, 0)),
        ("bad: the sum does not fit", rates(u64::MAX, 0, u64::MAX, 0), usage(1, 0, 1, 0)),
        ("bad: more cached than prompt tokens", rates(1, 1, 1, 0), usage(1, 2, 0, 0)),
        ("bad: more reasoning than output tokens", rates(1, 1, 1, 0), usage(1, 0, 1, 2)),
    ] {
        assert!(numerators(&usage, &rates).is_err());
        vectors.push(json!({ "name": name, "rates": rates, "bad": usage }));
    }
    vectors
}

fn transfer_ids() -> Vec<Value> {
    let (session, request) = (SessionId(bytes32("session")), RequestId(bytes32("request")));
    let kinds = [
        ("Slice", TransferKind::Slice),
        ("SliceFee", TransferKind::SliceFee),
        ("SliceCredit", TransferKind::SliceCredit),
        ("SliceSkim", TransferKind::SliceSkim),
        ("Hold", TransferKind::Hold),
        ("Charge", TransferKind::Charge),
        ("Remainder", TransferKind::Remainder),
        ("Refund", TransferKind::Refund),
        ("RefundFee", TransferKind::RefundFee),
        ("RefundCredit", TransferKind::RefundCredit),
        ("RefundLoss", TransferKind::RefundLoss),
        ("DustKept", TransferKind::DustKept),
        ("SliceFeePaid", TransferKind::SliceFeePaid),
        ("Other", TransferKind::Other),
        ("CreditSpent", TransferKind::CreditSpent),
    ];
    let mut vectors = Vec::new();
    for (name, kind) in kinds {
        for (request, k) in [(None, 0), (Some(request), 300), (None, attempt(3, 2).unwrap())] {
            let id = transfer_id(session, request, kind, k);
            vectors.push(json!({
                "kind": name, "number": kind as u32, "session": session.to_string(), "request": request.map(|r| r.to_string()), "k": k,
                "hashed": hex::encode(cbor::encode(&(session, request, kind, k))), "id": id.to_string(), "end_id": end_id(id).to_string(),
            }));
        }
    }
    vectors
}

fn log(size: u64) -> MemoryTiles {
    let mut tiles = MemoryTiles::default();
    (0..size).for_each(|n| tiles.push(leaf_hash(&n.to_be_bytes())));
    tiles
}

fn merkle() -> Vec<Value> {
    let texts = |proof: Vec<Digest>| proof.iter().map(Digest::to_string).collect::<Vec<_>>();
    let mut vectors = vec![json!({ "name": "no leaves", "size": 0, "root": empty_root().to_string() })];
    for size in [1u64, 2, 3, 7, 8, 70, 300] {
        let mut tiles = log(size);
        let root = root_at(size, &mut tiles).unwrap();
        vectors.push(
            json!({ "name": "leaf n is the number n in 8 bytes, big-endian", "size": size, "root": root.to_string() }),
        );
        for index in [0, size / 2, size - 1] {
            let leaf = leaf_hash(&index.to_be_bytes());
            let proof = inclusion_proof(index, size, &mut tiles).unwrap();
            let mut cases =
                vec![("good: included", index, proof.clone()), ("bad: another index", index + 1, proof.clone())];
            cases.push(("bad: a hash too many", index, [proof.clone(), vec![leaf]].concat()));
            if let Some((_, shorter)) = proof.split_last() {
                cases.push(("bad: a hash too few", index, shorter.to_vec()));
            }
            for (name, index, proof) in cases {
                let valid = verify_inclusion(&leaf, index, size, &proof, &root);
                assert_eq!(valid, name.starts_with("good"), "{name} {index} of {size}");
                vectors.push(json!({
                    "name": name, "leaf": leaf.to_string(), "index": index, "size": size, "inclusion": texts(proof), "root": root.to_string(), "valid": valid,
                }));
            }
        }
        for old in [1, size / 2, size - 1, size] {
            let old_root = root_at(old, &mut tiles).unwrap();
            let proof = consistency_proof(old, size, &mut tiles).unwrap();
            for (name, proof) in
                [("good: an extension", proof.clone()), ("bad: a hash too many", [proof, vec![root]].concat())]
            {
                let valid = verify_consistency(old, size, &old_root, &root, &proof);
                assert_eq!(valid, name.starts_with("good"), "{name} {old} to {size}");
                vectors.push(json!({
                    "name": name, "old": old, "size": size, "old_root": old_root.to_string(), "root": root.to_string(), "consistency": texts(proof), "valid": valid,
                }));
            }
        }
    }
    vectors
}

fn note(size: u64, root: &str) -> SignedCheckpoint {
    SignedCheckpoint::sign(size, Digest(bytes32(root)), &Party::new("provider").node)
}

fn checkpoints() -> Vec<Value> {
    let good = note(42, "root");
    let text = good.note();
    let key = good.node.to_string();
    let swapped = text.rfind("\u{2014} ").unwrap();
    let cases = [
        ("good", text.to_owned()),
        ("good: an empty log", SignedCheckpoint::sign(0, empty_root(), &Party::new("provider").node).note().to_owned()),
        ("bad: another size than was signed", text.replace("\n42\n", "\n43\n")),
        ("bad: a size with a leading zero", text.replace("\n42\n", "\n042\n")),
        ("bad: a line more", text.replace("\n\n", "\nmore\n\n")),
        ("bad: no line end at the end", text.trim_end().to_owned()),
        ("bad: a hyphen for the dash", text.replace('\u{2014}', "-")),
        ("bad: a key in upper-case hex", text.replace(&key, &key.to_uppercase())),
        ("bad: two signatures", format!("{text}{}", &text[swapped..])),
        (
            "bad: signed by another node",
            text.replace(text.rsplit(' ').next().unwrap(), note_of_other().rsplit(' ').next().unwrap()),
        ),
    ];
    let show = |(name, note): (&str, String)| match SignedCheckpoint::parse(&note) {
        Ok(signed) => {
            json!({ "name": name, "note": note, "valid": true, "node": signed.node.to_string(), "size": signed.size, "root": signed.root.to_string() })
        }
        Err(_) => json!({ "name": name, "note": note, "valid": false }),
    };
    cases.into_iter().map(show).collect()
}

fn note_of_other() -> String {
    SignedCheckpoint::sign(42, Digest(bytes32("root")), &Party::new("consumer").node).note().to_owned()
}

fn frauds() -> Vec<Value> {
    let cases = [
        ("good: two roots of one size", note(42, "root").note().to_owned(), note(42, "other").note().to_owned()),
        ("bad: the same note twice", note(42, "root").note().to_owned(), note(42, "root").note().to_owned()),
        ("bad: two sizes", note(42, "root").note().to_owned(), note(43, "other").note().to_owned()),
        ("bad: two logs", note(42, "other").note().to_owned(), note_of_other()),
        (
            "bad: one is not signed",
            note(42, "root").note().to_owned(),
            note(42, "other").note().replace("\n42\n", "\n44\n"),
        ),
    ];
    let show = |(name, one, other): (&str, String, String)| {
        let guilty = FraudProof { one: one.clone(), other: other.clone() }.check().ok().map(|node| node.to_string());
        json!({ "name": name, "one": one, "other": other, "guilty": guilty })
    };
    cases.into_iter().map(show).collect()
}

fn invoices() -> Vec<Value> {
    let payee = Party::new("provider").lightning;
    let terms = Digest(bytes32("terms"));
    let hash = PaymentHash(bytes32("payment"));
    let good = bolt11(&payee, Msat::sat(250), &terms, &hash, EPOCH);
    let mut damaged = good.clone();
    damaged.replace_range(20..21, if &good[20..21] == "q" { "p" } else { "q" });
    let cases = [
        ("good: 250 sat", good.clone()),
        ("good: one msat", bolt11(&payee, Msat(1), &terms, &hash, EPOCH)),
        ("good: upper case", good.to_uppercase()),
        ("bad: one letter changed", damaged),
        ("bad: cut short", good[..good.len() - 1].to_owned()),
        ("bad: mixed case", format!("L{}", &good[1..])),
        ("bad: empty", String::new()),
    ];
    let show = |(name, text): (&str, String)| match read_invoice(&text) {
        Ok(facts) => json!({
            "name": name, "bolt11": text, "valid": true, "payee": facts.payee.to_string(), "payment_hash": facts.payment_hash.to_string(),
            "amount_msat": facts.amount, "description_hash": facts.description_hash.map(|d| d.to_string()), "network": facts.network,
        }),
        Err(_) => json!({ "name": name, "bolt11": text, "valid": false }),
    };
    cases.into_iter().map(show).collect()
}

fn entries() -> Vec<Value> {
    let mut vectors = Vec::new();
    let mut seen = std::collections::BTreeSet::new();
    let show = |name: &str, entry: &Entry| {
        let bytes = entry.bytes();
        json!({ "name": name, "bytes": hex::encode(&bytes), "leaf": entry.leaf().to_string(), "fields": to_json(&bytes), "verdict": "valid" })
    };
    let world = World::example();
    for entry in world.provider.journal.entries().iter().chain(&world.consumer.journal.entries()) {
        let kind = entry.evidence.as_ref().map_or("none", Evidence::kind);
        if seen.insert(kind.to_owned()) {
            vectors.push(show(&format!("good: {kind}"), entry));
        }
    }
    let session = SessionId(bytes32("session"));
    let head = Head { len: 7, last: Digest(bytes32("leaf")), at: EPOCH };
    let rest = [
        Evidence::ChannelClosed { channel: "123x4x5".into(), reason: "cooperative".into(), force: false },
        Evidence::WalletPayment {
            payment_hash: PaymentHash(bytes32("payment")),
            inbound: false,
            amount: Msat(5_000),
            fee: Msat(7),
            preimage: Some(Preimage(bytes32("preimage"))),
        },
        Evidence::OnChain { txid: Digest(bytes32("txid")), inbound: true, amount: Msat(9_000), fee: Msat(0) },
        Evidence::Succession(succession_of(&World::new()).0),
        Evidence::Misbehaviour {
            peer: NodeKey(bytes32("peer")),
            rule: "quote/dearer".into(),
            statement: vec![1, 2, 3],
        },
        Evidence::Checkpoint { note: note(7, "root").note().to_owned() },
        Evidence::RefundSettled {
            session,
            payment_hash: PaymentHash(bytes32("payment")),
            amount: Msat(5),
            fee: Msat(0),
            preimage: None,
        },
        Evidence::Abandoned {
            session,
            request: RequestId(bytes32("request")),
            last_ack: None,
            numerators: Numerators::ZERO,
        },
        Evidence::PaymentSettled {
            payment_hash: PaymentHash(bytes32("payment")),
            preimage: Preimage(bytes32("x")),
            amount: Msat(1),
            fee: Msat(0),
        },
    ];
    for evidence in rest {
        let name = format!("good: {} again", evidence.kind());
        vectors.push(show(&name, &Entry::chain(&head, EPOCH, Draft::of(evidence))));
    }
    let id = |n: u8| TransferId([n; 16]);
    let accounts = [
        Account::Lightning,
        Account::Prepaid(session),
        Account::Income,
        Account::PrepaidAsset(session),
        Account::Expense,
        Account::RoutingFees,
        Account::RefundsDue(session),
        Account::Dust,
        Account::WorkerPayable(NodeKey(bytes32("worker"))),
        Account::External,
        Account::Clients,
        Account::MinersFees,
    ];
    let mut transfers: Vec<Transfer> = accounts
        .windows(2)
        .zip(1u8..)
        .map(|(pair, n)| Transfer::post(id(n), pair[0], pair[1], Msat(n.into())))
        .collect();
    transfers.push(Transfer::pending(id(20), Account::Expense, Account::PrepaidAsset(session), Msat(9), Some(EPOCH)));
    transfers.push(Transfer::pending(id(21), Account::Expense, Account::PrepaidAsset(session), Msat(9), None));
    transfers.extend([Transfer::post_pending(id(20), Msat(8)), Transfer::void(id(21)), Transfer::expire(id(22))]);
    let all = Entry::chain(&head, EPOCH, Draft { evidence: None, transfers });
    vectors.push(show("good: every account and every kind of transfer, no evidence", &all));
    let good = all.bytes();
    let long_seq = [&good[..1], &[0, 0x18], &good[2..]].concat();
    let evidence_last = {
        let mut bytes = good.clone();
        bytes.extend([0x18, 99, 0]);
        bytes[0] += 1;
        bytes
    };
    for (name, bytes) in [
        ("bad: a number in a longer form than it needs", long_seq),
        ("bad: an unknown field", evidence_last),
        ("bad: a trailing byte", [good.clone(), vec![0]].concat()),
        ("bad: cut short", good[..good.len() - 1].to_vec()),
    ] {
        assert!(Entry::decode(&bytes).is_err(), "{name}");
        vectors.push(json!({ "name": name, "bytes": hex::encode(&bytes), "verdict": "entry/canonical" }));
    }
    vectors
}
