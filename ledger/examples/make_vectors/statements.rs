//! Vectors of every signed statement: good ones, and one for each way to be wrong.

use crate::{Files, cbor_json::to_json};
use ed25519_dalek::{Signer, SigningKey};
use minicbor::Decoder;
use satgrid_ledger::{
    statements::{
        Ack, CreditNote, CreditReason, CreditTransfer, InclusionPromise, Receipt, RefundTo, RequestOpen, SessionClose,
        SessionOpen, SlicePaid,
    },
    testing::bytes32,
};
use satgrid_types::{
    AckId, BuildId, Digest, EngineProfile, FinishReason, GivenUp, LightningKey, ListingId, ModelRoot, Msat,
    MsatPerMtok, NodeKey, NostrKey, Numerators, PaymentHash, Quote, QuoteId, RateCard, ReceiptId, RequestId, SessionId,
    Signature, Statement, Succession, Terms, TokenUsage, TokenizerHash, UnixMs, VerifyError, cbor, node_key, sign_body,
    signed_bytes, statement_id, verify_body,
};
use serde_json::{Map, Value, json};

/// Who must sign a kind of statement.
#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    Provider,
    Consumer,
    Both,
}

impl By {
    fn names(self) -> &'static [&'static str] {
        match self {
            By::Provider => &["provider"],
            By::Consumer => &["consumer"],
            By::Both => &["provider", "consumer"],
        }
    }
}

fn key(name: &str) -> SigningKey {
    SigningKey::from_bytes(&bytes32(&format!("vectors/{name}")))
}

pub(crate) fn write(files: &mut Files) {
    let (provider, consumer) = (node_key(&key("provider")), node_key(&key("consumer")));
    let rates = RateCard {
        input: MsatPerMtok(900_000),
        cached_input: MsatPerMtok(90_000),
        output: MsatPerMtok(3_300_001),
        per_request: Msat(5),
        ..RateCard::default()
    };
    let now = UnixMs(1_767_225_600_000);
    let quote = Quote {
        version: 1,
        provider,
        lightning_node: LightningKey([2; 33]),
        consumer,
        listing: ListingId(bytes32("listing")),
        model_root: ModelRoot(bytes32("model")),
        tokenizer: TokenizerHash(bytes32("tokenizer")),
        quantisation: "Q4_K_M".into(),
        profile: EngineProfile::Exact,
        build: BuildId(bytes32("build")),
        instruction_set: "avx2".into(),
        context_length: 4_096,
        rates,
        terms: Terms::default(),
        issued_at: now,
        valid_until: now.plus_ms(600_000),
        nonce: u64::MAX,
    };
    let session = SessionId(bytes32("session"));
    let request = RequestId(bytes32("request"));
    let usage = TokenUsage { prompt: 200, cached_prompt: 64, completion: 128, reasoning: 32, part: None };
    kind(
        files,
        By::Provider,
        &[
            ("plain", quote.clone()),
            (
                "the other profile, a second rate card",
                Quote { profile: EngineProfile::Fast, rates: RateCard::default(), nonce: 0, ..quote },
            ),
        ],
    );
    let open = SessionOpen {
        version: 1,
        provider,
        consumer,
        quote: QuoteId(bytes32("quote")),
        refund_to: RefundTo::InvoiceAtClose,
        spend_cap: Msat::sat(1_000),
        opened_at: now,
    };
    kind(
        files,
        By::Consumer,
        &[
            ("refund by an invoice at the close", open.clone()),
            ("refund to BOLT 12", SessionOpen { refund_to: RefundTo::Bolt12("lno1qcp4256ypq".into()), ..open.clone() }),
            (
                "refund to a Lightning address",
                SessionOpen { refund_to: RefundTo::LightningAddress("a@example.com".into()), ..open.clone() },
            ),
            ("refund to BOLT 11", SessionOpen { refund_to: RefundTo::Bolt11("lnbcrt1".into()), ..open }),
        ],
    );
    let start = RequestOpen {
        version: 1,
        session,
        request,
        quote: QuoteId(bytes32("quote")),
        prompt_tokens: 200,
        max_output: 256,
        private_hash: Digest(bytes32("private")),
        opened_at: now,
        part: None,
    };
    kind(files, By::Consumer, &[("plain", start)]);
    let ack = Ack {
        version: 1,
        session,
        request,
        seq: 1,
        usage,
        numerators: Numerators(555_560_128),
        cost: Msat(556),
        running_hash: Digest(bytes32("running")),
    };
    kind(files, By::Both, &[("plain", ack)]);
    let first = Receipt {
        version: 1,
        session,
        seq: 0,
        previous: None,
        request,
        quote: QuoteId(bytes32("quote")),
        listing: ListingId(bytes32("listing")),
        model: "gemma-3-270m".into(),
        model_root: ModelRoot(bytes32("model")),
        tokenizer: TokenizerHash(bytes32("tokenizer")),
        quantisation: "Q4_K_M".into(),
        engine: "llama.cpp".into(),
        profile: EngineProfile::Exact,
        build: BuildId(bytes32("build")),
        instruction_set: "avx2".into(),
        usage,
        rates,
        numerators: Numerators(555_560_128),
        cost: Msat(556),
        cumulative_numerators: Numerators(555_560_128),
        cumulative_cost: Msat(556),
        cumulative_paid: Msat::ZERO,
        slices: Vec::new(),
        finish: FinishReason::Stop,
        started_at: now,
        first_token_ms: None,
        duration_ms: 0,
        private_hash: Digest(bytes32("private")),
        last_ack: None,
        error: None,
        provider,
        consumer,
        stage_root: None,
        expert_root: None,
        fingerprint_root: None,
        part: None,
        split: None,
        expert_rows: None,
        expert_split: None,
    };
    let slice =
        |k: u32| SlicePaid { k, payment_hash: PaymentHash(bytes32(&format!("payment {k}"))), amount: Msat::sat(10) };
    let full = Receipt {
        seq: 1,
        previous: Some(ReceiptId(bytes32("previous"))),
        slices: vec![slice(0), slice(1)],
        cumulative_paid: Msat::sat(20),
        finish: FinishReason::Error,
        first_token_ms: Some(120),
        duration_ms: 4_000,
        last_ack: Some(AckId(bytes32("ack"))),
        error: Some("the engine ran out of memory".into()),
        stage_root: Some(Digest(bytes32("stages"))),
        expert_root: Some(Digest(bytes32("experts"))),
        fingerprint_root: Some(Digest(bytes32("fingerprints"))),
        ..first.clone()
    };
    kind(files, By::Both, &[("no option present", first), ("every option present", full)]);
    let close =
        SessionClose { version: 1, session, last_receipt: None, remainder: Msat(9_444), invoice: None, closed_at: now };
    let with = SessionClose {
        last_receipt: Some(ReceiptId(bytes32("receipt"))),
        invoice: Some("lnbcrt1".into()),
        ..close.clone()
    };
    kind(files, By::Consumer, &[("no option present", close), ("every option present", with)]);
    let note = CreditNote {
        version: 1,
        session,
        provider,
        consumer,
        amount: Msat(9_444),
        reason: CreditReason::Dust,
        issued_at: now,
        valid_until: now.plus_ms(CreditNote::VALIDITY_MS),
    };
    kind(files, By::Provider, &[("plain", note)]);
    let transfer = CreditTransfer {
        version: 1,
        provider,
        from: session,
        consumer,
        to: SessionId(bytes32("another session")),
        note: Digest(bytes32("note")),
        amount: Msat(9_444),
    };
    kind(files, By::Both, &[("plain", transfer)]);
    let succession = Succession {
        version: 1,
        old: provider,
        new: Some(consumer),
        old_nostr: NostrKey(bytes32("nostr")),
        new_nostr: Some(NostrKey(bytes32("another nostr"))),
        at: now,
        why: GivenUp::Routine,
    };
    kind(
        files,
        By::Both,
        &[("rotation: the provider's key stands for the old one, the consumer's for the new", succession)],
    );
    let promise = InclusionPromise {
        version: 1,
        node: provider,
        session,
        receipt: ReceiptId(bytes32("receipt")),
        leaf: Digest(bytes32("leaf")),
        index: 17,
        promised_at: now,
    };
    kind(files, By::Provider, &[("plain", promise)]);
}

/// One statement's bytes with keys and signatures, as a vector holds them.
#[derive(Clone)]
struct Signed {
    body: Vec<u8>,
    keys: Vec<NodeKey>,
    signatures: Vec<Signature>,
}

fn kind<T: Statement>(files: &mut Files, by: By, good: &[(&str, T)]) {
    let mut vectors = Vec::new();
    for (name, statement) in good {
        let signed = honest::<T>(by, cbor::encode(statement));
        vectors.push(vector::<T>(by, &format!("good: {name}"), &signed, true));
    }
    let body = cbor::encode(&good.last().unwrap().1);
    for (name, bad) in bad_bodies(&body) {
        // Signed as they stand: what is wrong is the encoding alone.
        vectors.push(vector::<T>(by, name, &honest::<T>(by, bad), false));
    }
    for (name, signed) in bad_signatures::<T>(by, &body) {
        vectors.push(vector::<T>(by, name, &signed, false));
    }
    let about = format!("{}: signed by {}; at most {} bytes", T::KIND, by.names().join(" and "), T::MAX_LEN);
    files.json(&format!("{}.json", T::KIND), &about, vectors);
}

fn signers(by: By) -> Vec<SigningKey> {
    by.names().iter().map(|name| key(name)).collect()
}

fn honest<T: Statement>(by: By, body: Vec<u8>) -> Signed {
    let keys = signers(by);
    let signatures = keys.iter().map(|key| sign_body::<T>(&body, key)).collect();
    Signed { body, keys: keys.iter().map(node_key).collect(), signatures }
}

fn vector<T: Statement>(by: By, name: &str, signed: &Signed, good: bool) -> Value {
    let named = |values: Vec<String>| -> Map<String, Value> {
        by.names().iter().map(|name| (*name).to_owned()).zip(values.into_iter().map(Value::from)).collect()
    };
    let verdict = verdict::<T>(signed);
    assert_eq!(verdict == "valid", good, "{}: {name}: {verdict}", T::KIND);
    let mut vector = json!({
        "name": name,
        "kind": T::KIND,
        "body": hex::encode(&signed.body),
        "keys": named(signed.keys.iter().map(NodeKey::to_string).collect()),
        "signatures": named(signed.signatures.iter().map(|s| hex::encode(s.0)).collect()),
        "verdict": verdict,
    });
    if good {
        vector["id"] = json!(hex::encode(statement_id::<T>(&signed.body)));
        vector["fields"] = to_json(&signed.body);
    }
    vector
}

/// `valid`, or the rule that is broken.
fn verdict<T: Statement>(signed: &Signed) -> &'static str {
    if cbor::decode_limited::<T>(&signed.body, T::MAX_LEN).is_err() {
        return "statement/canonical";
    }
    let mut checks = signed.keys.iter().zip(&signed.signatures);
    let held: Result<(), VerifyError> = checks.try_for_each(|(key, sig)| verify_body::<T>(&signed.body, key, sig));
    if held.is_ok() { "valid" } else { "statement/signature" }
}

/// The fields of a map, each as its key's and its value's bytes.
fn fields(body: &[u8]) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut d = Decoder::new(body);
    let len = d.map().unwrap().unwrap();
    let take = |d: &mut Decoder<'_>| {
        let from = d.position();
        d.skip().unwrap();
        body[from..d.position()].to_vec()
    };
    (0..len).map(|_| (take(&mut d), take(&mut d))).collect()
}

fn rebuilt(fields: &[(Vec<u8>, Vec<u8>)]) -> Vec<u8> {
    let mut out = minicbor::Encoder::new(Vec::new());
    out.map(fields.len() as u64).unwrap();
    let mut out = out.into_writer();
    fields.iter().for_each(|(key, value)| out.extend(key.iter().chain(value)));
    out
}

fn bad_bodies(body: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    let good = fields(body);
    assert_eq!(rebuilt(&good), body);
    let changed = |change: &dyn Fn(&mut Vec<(Vec<u8>, Vec<u8>)>)| {
        let mut fields = good.clone();
        change(&mut fields);
        rebuilt(&fields)
    };
    let mut indefinite = vec![0xbf];
    good.iter().for_each(|(key, value)| indefinite.extend(key.iter().chain(value)));
    indefinite.push(0xff);
    let mut tagged = vec![0xd9, 0xd9, 0xf7];
    tagged.extend_from_slice(body);
    vec![
        ("bad: an integer in a longer form than it needs", changed(&|f| f[0].1 = vec![0x18, 0x01])),
        ("bad: two fields in the wrong order", changed(&|f| f.swap(0, 1))),
        ("bad: a field twice", changed(&|f| f.insert(1, f[0].clone()))),
        ("bad: an unknown field", changed(&|f| f.push((vec![0x18, 99], vec![0])))),
        ("bad: a field left out", changed(&|f| drop(f.remove(1)))),
        ("bad: null for an absent field", changed(&|f| f.push((vec![0x18, 99], vec![0xf6])))),
        ("bad: a float", changed(&|f| f[0].1 = vec![0xf9, 0x3c, 0x00])),
        ("bad: a negative integer", changed(&|f| f[0].1 = vec![0x20])),
        ("bad: text where bytes belong", changed(&|f| f[1].1[0] ^= 0x20)),
        ("bad: a byte string of another length", changed(&|f| f[1].1 = vec![0x41, 0x00])),
        ("bad: a map of indefinite length", indefinite),
        ("bad: a tag", tagged),
        ("bad: a trailing byte", [body, &[0]].concat()),
        ("bad: cut short", body[..body.len() - 1].to_vec()),
        ("bad: empty", Vec::new()),
    ]
}

fn bad_signatures<T: Statement>(by: By, body: &[u8]) -> Vec<(&'static str, Signed)> {
    let good = honest::<T>(by, body.to_vec());
    let changed = |change: &dyn Fn(&mut Signed)| {
        let mut signed = good.clone();
        change(&mut signed);
        signed
    };
    let resigned = |message: &[u8]| {
        let message = message.to_vec();
        changed(&move |s| {
            s.signatures = signers(by).iter().map(|key| Signature(key.sign(&message).to_bytes())).collect()
        })
    };
    let mut other_version = signed_bytes::<T>(body);
    other_version["satgrid-".len() + T::KIND.len() + 2] = b'2';
    let mut no_zero = signed_bytes::<T>(body);
    no_zero.remove("satgrid-".len() + T::KIND.len() + 3);
    let other_kind = [b"satgrid-other-v1\0", body].concat();
    let mut vectors = vec![
        ("bad: one bit of the body flipped after signing", changed(&|s| flip_time(&mut s.body))),
        ("bad: one bit of R flipped", changed(&|s| s.signatures[0].0[3] ^= 1)),
        ("bad: one bit of S flipped", changed(&|s| s.signatures[0].0[40] ^= 1)),
        ("bad: S plus the group order", changed(&|s| add_order(&mut s.signatures[0]))),
        ("bad: signed by another key", changed(&|s| s.signatures[0] = sign_body::<T>(body, &key("stranger")))),
        ("bad: another key than the signer's", changed(&|s| s.keys[0] = node_key(&key("stranger")))),
        ("bad: signed for another kind", resigned(&other_kind)),
        ("bad: signed for another version of the context", resigned(&other_version)),
        ("bad: signed without the context's zero byte", resigned(&no_zero)),
        ("bad: signed without a context", resigned(body)),
        ("bad: a small-order key, which verifies anything where it is let in", changed(&|s| weak(s, 1, 0))),
        ("bad: a small-order key in a non-canonical encoding", changed(&|s| weak(s, 0xee, 0x7f))),
    ];
    if by == By::Both {
        vectors.push(("bad: the two signatures swapped", changed(&|s| s.signatures.swap(0, 1))));
        vectors.push(("bad: the provider's signature twice", changed(&|s| s.signatures[1] = s.signatures[0])));
        vectors.push(("bad: one bit of the consumer's signature flipped", changed(&|s| s.signatures[1].0[3] ^= 1)));
    }
    vectors
}

/// Flips the lowest bit of the last byte of the first 32-byte field: the result is canonical, and another statement.
fn flip_time(body: &mut [u8]) {
    let at = body.windows(2).position(|w| w == [0x58, 0x20]).unwrap() + 2 + 31;
    body[at] ^= 1;
}

/// The identity as key (in the encoding with these first and last bytes) and as R, and S = 0.
fn weak(signed: &mut Signed, first: u8, last: u8) {
    let mut point = if last == 0 { [0; 32] } else { [0xff; 32] };
    (point[0], point[31]) = (first, last);
    signed.keys[0] = NodeKey(point);
    let mut signature = [0; 64];
    signature[0] = 1;
    signed.signatures[0] = Signature(signature);
}

/// S + L: the same scalar, not below the group order.
fn add_order(signature: &mut Signature) {
    const L: [u8; 32] = [
        0xed, 0xd3, 0xf5, 0x5c, 0x1a, 0x63, 0x12, 0x58, 0xd6, 0x9c, 0xf7, 0xa2, 0xde, 0xf9, 0xde, 0x14, 0, 0, 0, 0, 0,
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10,
    ];
    let mut carry = 0u16;
    for (byte, add) in signature.0[32..].iter_mut().zip(L) {
        let sum = u16::from(*byte) + u16::from(add) + carry;
        *byte = sum as u8;
        carry = sum >> 8;
    }
    assert_eq!(carry, 0);
}
