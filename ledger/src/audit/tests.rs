mod lies;
mod own;
mod stages;
mod succession;

use super::*;
use crate::{
    bundle::{BundleWriter, EntryItem, Filter, Header, Opened, open},
    entry::{Draft, Entry, Evidence},
    log::{SignedCheckpoint, leaf_hash},
    statements::{Ack, CreditNote, InclusionPromise, Receipt, RequestOpen, SessionClose, SessionOpen},
    testing::{World, bolt11, bundle_of, bytes32, chain_entries, checkpoint_of, drafts_of},
    transfer::{Account, Transfer, TransferOp},
};
use ed25519_dalek::SigningKey;
use satgrid_pricing::{charge, numerators};
use satgrid_types::{
    BothSigned, Digest, ModelRoot, Msat, MsatPerMtok, NodeKey, Numerators, Preimage, Quote, QuoteId, Salt, Signed,
    Statement, TransferId, UnixMs, node_key,
};
use secp256k1::SecretKey;
use std::collections::BTreeSet;

pub(crate) fn report(bytes: &[u8]) -> Report {
    match open(bytes).unwrap() {
        Opened::Journal(reader) => audit(reader, Detail::Sessions).unwrap(),
        Opened::Fraud(_) | Opened::Claim(_) => panic!("a journal was expected"),
    }
}

#[test]
fn an_honest_world_is_clean_on_both_sides() {
    let world = World::example();
    for redact in [false, true] {
        let provider = report(&world.provider.bundle(Filter::All, redact));
        let consumer = report(&world.consumer.bundle(Filter::All, redact));
        assert_eq!(provider.findings, []);
        assert_eq!(consumer.findings, []);
        assert_eq!(cross_check(&provider, &consumer), []);
        assert_eq!(cross_check(&consumer, &provider), []);
        assert_eq!(provider.as_provider.receipts, 5);
        assert_eq!(provider.as_provider, consumer.as_consumer);
        assert_eq!(provider.balances["income"], i128::from(provider.as_provider.charged_msat));
        assert_eq!(consumer.balances["expense"], i128::from(provider.as_provider.charged_msat));
    }
}

type Drafts = Vec<(UnixMs, Draft)>;

/// Where the `n`-th entry of a kind is.
fn find(drafts: &Drafts, kind: &str, n: usize) -> usize {
    let is = |(_, (_, draft)): &(usize, &(UnixMs, Draft))| draft.evidence.as_ref().is_some_and(|e| e.kind() == kind);
    drafts.iter().enumerate().filter(is).nth(n).unwrap_or_else(|| panic!("no {kind} number {n}")).0
}

fn evidence<'a>(drafts: &'a mut Drafts, kind: &str, n: usize) -> &'a mut Evidence {
    let at = find(drafts, kind, n);
    drafts[at].1.evidence.as_mut().unwrap()
}

fn transfers<'a>(drafts: &'a mut Drafts, kind: &str, n: usize) -> &'a mut Vec<Transfer> {
    let at = find(drafts, kind, n);
    &mut drafts[at].1.transfers
}

fn provider_key() -> SigningKey {
    SigningKey::from_bytes(&bytes32("provider/node"))
}

/// The session key with this public half.
fn session_key(consumer: &NodeKey) -> SigningKey {
    let keys = (1..10).map(|n| SigningKey::from_bytes(&bytes32(&format!("session {n}"))));
    keys.into_iter().find(|key| node_key(key) == *consumer).unwrap()
}

fn first_session_key() -> SigningKey {
    SigningKey::from_bytes(&bytes32("session 1"))
}

fn both<T: Statement>(statement: &T, consumer: &SigningKey) -> BothSigned<T> {
    BothSigned::countersign(&Signed::sign(statement, &provider_key()), consumer)
}

/// Changes the `n`-th receipt and lets both sign it again.
fn bend_receipt(drafts: &mut Drafts, n: usize, bend: impl FnOnce(&mut Receipt)) {
    let Evidence::Receipt { receipt, .. } = evidence(drafts, "receipt", n) else { unreachable!() };
    let mut body = receipt.peek().unwrap();
    let key = session_key(&body.consumer);
    bend(&mut body);
    *receipt = both(&body, &key);
}

/// Changes the first acknowledgement and lets both sign it again.
fn bend_ack(drafts: &mut Drafts, bend: impl FnOnce(&mut Ack)) {
    let Evidence::Ack(ack) = evidence(drafts, "ack", 1) else { unreachable!() };
    let mut body = ack.peek().unwrap();
    bend(&mut body);
    *ack = both(&body, &first_session_key());
}

fn bend_quote(drafts: &mut Drafts, bend: impl FnOnce(&mut Quote)) {
    let Evidence::Quote(quote) = evidence(drafts, "quote", 0) else { unreachable!() };
    let mut body = quote.peek().unwrap();
    bend(&mut body);
    *quote = Signed::sign(&body, &provider_key());
}

/// Makes the first slice's invoice again, with other terms.
fn bend_invoice(drafts: &mut Drafts, payee: &str, amount: u64, terms: Option<Digest>) {
    let at = drafts[find(drafts, "invoice", 0)].0;
    let Evidence::Invoice { bolt11: text, descriptor, .. } = evidence(drafts, "invoice", 0) else { unreachable!() };
    let facts = read_invoice(text).unwrap();
    let payee = SecretKey::from_slice(&bytes32(payee)).unwrap();
    let terms = terms.unwrap_or_else(|| descriptor.description_hash());
    *text = bolt11(&payee, Msat(amount), &terms, &facts.payment_hash, at);
}

fn duplicate(drafts: &mut Drafts, kind: &str, n: usize) {
    let at = find(drafts, kind, n);
    drafts.insert(at + 1, drafts[at].clone());
}

#[derive(Debug, Clone, Copy)]
enum Side {
    Provider,
    Consumer,
}
use Side::{Consumer, Provider};

type Bend = fn(&mut Drafts);

/// One tampered journal a row: what is bent by an exporter who holds all keys, chains the entries anew and signs a new
/// checkpoint, and the rule that gives it away.
const TAMPERED: &[(Rule, Side, &str, Bend)] = &[
    (Rule::EntryGenesis, Provider, "no genesis", |d| {
        d.remove(0);
    }),
    (Rule::EntryGenesis, Provider, "two of them", |d| duplicate(d, "genesis", 0)),
    (Rule::StatementCanonical, Provider, "a receipt over bytes that are not canonical", |d| {
        let Evidence::Receipt { receipt, .. } = evidence(d, "receipt", 0) else { unreachable!() };
        let body = [receipt.body(), &[0]].concat();
        let sign = |key: &SigningKey| satgrid_types::sign_body::<Receipt>(&body, key);
        *receipt = BothSigned::from_parts(body.clone(), sign(&provider_key()), sign(&first_session_key()));
    }),
    (Rule::StatementSignature, Provider, "a receipt that the consumer did not sign", |d| {
        let Evidence::Receipt { receipt, .. } = evidence(d, "receipt", 0) else { unreachable!() };
        *receipt = both(&receipt.peek().unwrap(), &SigningKey::from_bytes(&[9; 32]));
    }),
    (Rule::StatementSignature, Consumer, "a receipt that the provider did not sign", |d| {
        let Evidence::Receipt { receipt, .. } = evidence(d, "receipt", 0) else { unreachable!() };
        let offered = Signed::sign(&receipt.peek().unwrap(), &SigningKey::from_bytes(&[9; 32]));
        *receipt = BothSigned::countersign(&offered, &first_session_key());
    }),
    (Rule::StatementVersion, Provider, "an acknowledgement of version 2", |d| bend_ack(d, |ack| ack.version = 2)),
    (Rule::StatementSession, Provider, "a session without its opening", |d| {
        d.remove(find(d, "open", 0));
    }),
    (Rule::ListingInvalid, Provider, "a listing with another price in it", |d| {
        let Evidence::Listing { event_json } = evidence(d, "listing", 0) else { unreachable!() };
        *event_json = event_json.replacen("900000", "900001", 1);
    }),
    (Rule::QuoteListing, Provider, "a quote without its listing", |d| {
        d.remove(find(d, "listing", 0));
    }),
    (Rule::QuoteDearer, Consumer, "a quote above its listing", |d| {
        bend_quote(d, |quote| quote.rates.output = MsatPerMtok(quote.rates.output.0 + 1));
    }),
    (Rule::QuoteTerms, Consumer, "a quote for another model", |d| {
        bend_quote(d, |quote| quote.model_root = ModelRoot([7; 32]));
    }),
    (Rule::OpenQuote, Provider, "a session at a quote that nobody made", |d| {
        let Evidence::Open(open) = evidence(d, "open", 0) else { unreachable!() };
        let body = SessionOpen { quote: QuoteId([7; 32]), ..open.peek().unwrap() };
        *open = Signed::sign(&body, &first_session_key());
    }),
    (Rule::OpenQuote, Provider, "a session at a quote that ran out", |d| {
        let Evidence::Open(open) = evidence(d, "open", 0) else { unreachable!() };
        let body = open.peek().unwrap();
        let late = body.opened_at.plus_ms(Quote::VALIDITY_MS + 600_000);
        *open = Signed::sign(&SessionOpen { opened_at: late, ..body }, &first_session_key());
    }),
    (Rule::OpenTwice, Provider, "a session opened twice", |d| duplicate(d, "open", 0)),
    (Rule::InvoiceSignature, Provider, "an invoice with a changed letter", |d| {
        let Evidence::Invoice { bolt11, .. } = evidence(d, "invoice", 0) else { unreachable!() };
        let last = bolt11.pop().unwrap();
        bolt11.push(if last == 'q' { 'p' } else { 'q' });
    }),
    (Rule::InvoicePayee, Consumer, "an invoice of another node", |d| bend_invoice(d, "thief", 10_000, None)),
    (Rule::InvoiceAmount, Consumer, "an invoice over more", |d| bend_invoice(d, "provider/lightning", 10_001, None)),
    (Rule::InvoiceTerms, Consumer, "an invoice for other terms", |d| {
        bend_invoice(d, "provider/lightning", 10_000, Some(Digest([1; 32])));
    }),
    (Rule::InvoiceDescriptor, Consumer, "terms of another slice", |d| {
        let Evidence::Invoice { descriptor, .. } = evidence(d, "invoice", 0) else { unreachable!() };
        descriptor.k += 1;
    }),
    (Rule::InvoiceReuse, Provider, "one invoice for two slices", |d| {
        duplicate(d, "invoice", 0);
        let Evidence::Invoice { k, .. } = evidence(d, "invoice", 1) else { unreachable!() };
        *k += 1;
    }),
    (Rule::InvoiceSequence, Provider, "a slice number left out", |d| {
        let Evidence::Invoice { k, .. } = evidence(d, "invoice", 0) else { unreachable!() };
        *k = 3;
    }),
    (Rule::PaymentUnknown, Provider, "money that nobody asked for", |d| {
        d.remove(find(d, "invoice", 0));
    }),
    (Rule::PaymentUnknown, Consumer, "a payment that was not attempted", |d| {
        d.remove(find(d, "payment-attempted", 0));
    }),
    (Rule::PaymentPreimage, Consumer, "another preimage", |d| {
        let Evidence::PaymentSettled { preimage, .. } = evidence(d, "payment-settled", 0) else { unreachable!() };
        *preimage = Preimage([1; 32]);
    }),
    (Rule::PaymentAmount, Consumer, "a payment over more", |d| {
        let Evidence::PaymentSettled { amount, .. } = evidence(d, "payment-settled", 0) else { unreachable!() };
        *amount = Msat(10_001);
    }),
    (Rule::PaymentTwice, Provider, "a payment received twice", |d| duplicate(d, "payment-received", 0)),
    (Rule::PaymentTwice, Consumer, "a payment settled twice", |d| duplicate(d, "payment-settled", 0)),
    (Rule::PaymentInFlight, Consumer, "two attempts at once", |d| duplicate(d, "payment-attempted", 0)),
    (Rule::RequestInvalid, Provider, "a request opened twice", |d| duplicate(d, "request", 0)),
    (Rule::RequestInvalid, Provider, "a request at another quote", |d| {
        let Evidence::Request(request) = evidence(d, "request", 0) else { unreachable!() };
        let body = RequestOpen { quote: QuoteId([7; 32]), ..request.peek().unwrap() };
        *request = Signed::sign(&body, &first_session_key());
    }),
    (Rule::RequestUnknown, Provider, "a receipt without its request", |d| {
        d.remove(find(d, "request", 0));
    }),
    (Rule::RequestUnknown, Provider, "two receipts of one request", |d| duplicate(d, "receipt", 0)),
    (Rule::AckSequence, Provider, "acknowledgements in the wrong order", |d| {
        let (a, b) = (find(d, "ack", 0), find(d, "ack", 1));
        d.swap(a, b);
    }),
    (Rule::AckUsage, Provider, "fewer tokens than before", |d| {
        bend_ack(d, |ack| ack.usage.completion = 1);
    }),
    (Rule::AckUsage, Provider, "more prompt than the request has", |d| {
        bend_ack(d, |ack| ack.usage.prompt += 1);
    }),
    (Rule::AckCost, Provider, "a msat too many", |d| bend_ack(d, |ack| ack.cost = Msat(ack.cost.0 + 1))),
    (Rule::AckCost, Provider, "numerators of other work", |d| {
        bend_ack(d, |ack| {
            ack.numerators = Numerators(ack.numerators.0 + 1);
            ack.cost = charge(ack.numerators);
        });
    }),
    (Rule::ReceiptChain, Provider, "a receipt left out", |d| {
        d.remove(find(d, "receipt", 0));
    }),
    (Rule::ReceiptChain, Provider, "another predecessor", |d| bend_receipt(d, 1, |receipt| receipt.previous = None)),
    (Rule::ReceiptTerms, Provider, "other rates than the quote's", |d| {
        bend_receipt(d, 0, |receipt| receipt.rates.input = MsatPerMtok(1));
    }),
    (Rule::ReceiptTerms, Provider, "another model than the quote's", |d| {
        bend_receipt(d, 0, |receipt| receipt.model_root = ModelRoot([7; 32]));
    }),
    (Rule::ReceiptUsage, Provider, "fewer tokens than were acknowledged", |d| {
        bend_receipt(d, 0, |receipt| {
            receipt.usage.completion -= 1;
            receipt.numerators = numerators(&receipt.usage, &receipt.rates).unwrap();
        });
    }),
    (Rule::ReceiptUsage, Provider, "an output other than the acknowledged one", |d| {
        let Evidence::Receipt { receipt, opening: Some(opening) } = evidence(d, "receipt", 0) else { unreachable!() };
        opening.private.running_hash = Digest([1; 32]);
        let body = Receipt { private_hash: opening.private.commitment(&opening.salt), ..receipt.peek().unwrap() };
        *receipt = both(&body, &first_session_key());
    }),
    (Rule::ReceiptCost, Provider, "a msat too many", |d| {
        bend_receipt(d, 0, |receipt| receipt.cost = Msat(receipt.cost.0 + 1))
    }),
    (Rule::ReceiptCost, Provider, "numerators of other work", |d| {
        bend_receipt(d, 0, |receipt| receipt.numerators = Numerators(receipt.numerators.0 + 1));
    }),
    (Rule::ReceiptCumulative, Provider, "a sum that is not one", |d| {
        bend_receipt(d, 1, |receipt| receipt.cumulative_cost = receipt.cost);
    }),
    (Rule::ReceiptCumulative, Provider, "more paid than its slices", |d| {
        bend_receipt(d, 0, |receipt| receipt.cumulative_paid = Msat(99_000));
    }),
    (Rule::ReceiptSlices, Provider, "a slice over less", |d| {
        bend_receipt(d, 0, |receipt| receipt.slices[0].amount = Msat(1));
    }),
    (Rule::ReceiptSlices, Provider, "a slice counted twice", |d| {
        let Evidence::Receipt { receipt, .. } = evidence(d, "receipt", 0) else { unreachable!() };
        let slices = receipt.peek().unwrap().slices;
        bend_receipt(d, 1, |receipt| receipt.slices = slices);
    }),
    (Rule::ReceiptLastAck, Provider, "no last acknowledgement", |d| {
        bend_receipt(d, 0, |receipt| receipt.last_ack = None)
    }),
    (Rule::ReceiptOpening, Provider, "another salt", |d| {
        let Evidence::Receipt { opening: Some(opening), .. } = evidence(d, "receipt", 0) else { unreachable!() };
        opening.salt = Salt([1; 32]);
    }),
    (Rule::AbandonedCharge, Provider, "more than was acknowledged", |d| {
        let Evidence::Abandoned { numerators, .. } = evidence(d, "abandoned", 0) else { unreachable!() };
        *numerators = Numerators(numerators.0 + 1);
    }),
    (Rule::CloseRemainder, Consumer, "a msat too many", |d| {
        let Evidence::Close(close) = evidence(d, "close", 0) else { unreachable!() };
        let body = close.peek().unwrap();
        *close = Signed::sign(&SessionClose { remainder: Msat(body.remainder.0 + 1), ..body }, &first_session_key());
    }),
    (Rule::CloseRemainder, Provider, "a msat more than is owed", |d| {
        let Evidence::Close(close) = evidence(d, "close", 0) else { unreachable!() };
        let body = close.peek().unwrap();
        *close = Signed::sign(&SessionClose { remainder: Msat(body.remainder.0 + 1), ..body }, &first_session_key());
    }),
    (Rule::CloseTwice, Provider, "a close written down again", |d| {
        let at = find(d, "close", 1);
        d.insert(at, d[at].clone());
    }),
    (Rule::CreditNoteAmount, Provider, "a note over less", |d| {
        let Evidence::CreditNote(note) = evidence(d, "credit-note", 0) else { unreachable!() };
        *note = Signed::sign(&CreditNote { amount: Msat(1), ..note.peek().unwrap() }, &provider_key());
    }),
    (Rule::RefundInvalid, Provider, "a refund that was not attempted", |d| {
        d.remove(find(d, "refund-attempted", 0));
    }),
    (Rule::RefundInvalid, Provider, "a refund over another amount", |d| {
        let Evidence::RefundSettled { amount, .. } = evidence(d, "refund-settled", 0) else { unreachable!() };
        *amount = Msat(amount.0 - 1);
    }),
    (Rule::PromiseBroken, Consumer, "a promise for another log", |d| {
        let Evidence::Promise(promise) = evidence(d, "promise", 0) else { unreachable!() };
        let body = InclusionPromise { node: NodeKey([3; 32]), ..promise.peek().unwrap() };
        *promise = Signed::sign(&body, &provider_key());
    }),
    (Rule::TransferMalformed, Provider, "one id for two transfers", |d| {
        let first = transfers(d, "payment-received", 0)[0];
        let TransferOp::Post { debit, credit, .. } = first.op else { unreachable!() };
        transfers(d, "payment-received", 1)[0] = Transfer::post(first.id, debit, credit, Msat(1));
    }),
    (Rule::TransferTwoPhase, Provider, "a reservation ended twice", |d| {
        let TransferOp::PostPending { pending, .. } = transfers(d, "receipt", 0)[0].op else { unreachable!() };
        let again = Transfer { id: TransferId([1; 16]), op: TransferOp::VoidPending { pending } };
        transfers(d, "receipt", 1).push(again);
    }),
    (Rule::TransferTwoPhase, Provider, "more posted than was reserved", |d| {
        let TransferOp::PostPending { pending, .. } = transfers(d, "receipt", 0)[0].op else { unreachable!() };
        transfers(d, "receipt", 0)[0] = Transfer::post_pending(pending, Msat(1_000_000_000));
    }),
    (Rule::TransferTwoPhase, Provider, "expired under an open request", |d| {
        let TransferOp::PostPending { pending, .. } = transfers(d, "receipt", 0)[0].op else { unreachable!() };
        let at = find(d, "receipt", 0);
        let late = d[at].0.plus_ms(4_000_000);
        d.insert(at, (late, Draft { evidence: None, transfers: vec![Transfer::expire(pending)] }));
    }),
    (Rule::TransferTwoPhase, Consumer, "a payment settled, its reservation kept", |d| {
        transfers(d, "payment-settled", 0).remove(1);
    }),
    (Rule::TransferOverdrawn, Provider, "a reservation over what is there", |d| {
        if let TransferOp::Pending { amount, .. } = &mut transfers(d, "request", 0)[0].op {
            *amount = Msat(99_999_999);
        }
    }),
    (Rule::TransferUnbacked, Provider, "income without a receipt", |d| {
        let TransferOp::Pending { debit: Account::Prepaid(session), .. } = transfers(d, "request", 0)[0].op else {
            unreachable!()
        };
        let at = find(d, "receipt", 0);
        let earn = Transfer::post(TransferId([1; 16]), Account::Prepaid(session), Account::Income, Msat(1));
        d.insert(at, (d[at].0, Draft { evidence: None, transfers: vec![earn] }));
    }),
    (Rule::TransferUnbacked, Provider, "a receipt charged at less", |d| {
        if let TransferOp::PostPending { amount, .. } = &mut transfers(d, "receipt", 0)[0].op {
            *amount = Msat(amount.0 - 1);
        }
    }),
    (Rule::TransferUnbacked, Provider, "a payment credited at less", |d| {
        if let TransferOp::Post { amount, .. } = &mut transfers(d, "payment-received", 0)[0].op {
            *amount = Msat(amount.0 - 1);
        }
    }),
    (Rule::TransferUnbacked, Consumer, "a payment given up without the wallet's word", |d| {
        let TransferOp::PostPending { pending, .. } = transfers(d, "payment-settled", 0)[0].op else { unreachable!() };
        let at = find(d, "payment-settled", 0);
        d.insert(at, (d[at].0, Draft { evidence: None, transfers: vec![Transfer::void(pending)] }));
    }),
    (Rule::TransferUnbacked, Consumer, "a payment reserved over more", |d| {
        if let TransferOp::Pending { amount, .. } = &mut transfers(d, "payment-attempted", 0)[0].op {
            *amount = Msat(amount.0 + 1);
        }
    }),
    (Rule::TransferOverdue, Provider, "a reservation that was forgotten", |d| {
        transfers(d, "receipt", 4).clear();
        let late = d.last().unwrap().0.plus_ms(3 * 3_600_000);
        d.last_mut().unwrap().0 = late;
    }),
    (Rule::WalletInsolvent, Provider, "an empty wallet", |d| {
        *evidence(d, "wallet-snapshot", 0) =
            Evidence::WalletSnapshot { lightning_msat: Msat(1), onchain_msat: Msat::ZERO };
    }),
    (Rule::LogCheckpoint, Provider, "a journalled checkpoint over more than there is", |d| {
        let note = SignedCheckpoint::sign(10_000, Digest([1; 32]), &provider_key()).note().to_owned();
        let at = d.last().unwrap().0;
        d.push((at, Draft::of(Evidence::Checkpoint { note })));
    }),
];

#[test]
fn each_tampered_journal_is_given_away_by_its_rule() {
    let world = World::example();
    let sides = [&world.provider, &world.consumer].map(|party| drafts_of(&party.journal.entries()));
    for (rule, side, what, bend) in TAMPERED {
        let (mut drafts, key) = match side {
            Provider => (sides[0].clone(), &world.provider.node),
            Consumer => (sides[1].clone(), &world.consumer.node),
        };
        bend(&mut drafts);
        let report = report(&bundle_of(&chain_entries(drafts), key, Filter::All, false));
        let found: BTreeSet<Rule> = report.findings.iter().map(|finding| finding.rule).collect();
        assert!(found.contains(rule), "{side:?}, {what}: expected {rule}, found {found:?}");
    }
}

/// Entries written as they are, under a checkpoint over `sealed`.
fn written(entries: &[Entry], sealed: &[Entry], key: &SigningKey, header: &Header) -> Vec<u8> {
    let checkpoint = checkpoint_of(sealed, key);
    let mut writer = BundleWriter::start(Vec::new(), header, &checkpoint).unwrap();
    entries.iter().for_each(|entry| writer.entry(entry, false, None).unwrap());
    writer.finish().unwrap()
}

#[test]
fn the_log_gives_away_what_was_done_to_the_file() {
    let world = World::example();
    let (entries, key) = (world.provider.journal.entries(), &world.provider.node);
    let header = Header::new(node_key(key), Filter::All);
    let check = |what: &str, entries: &[Entry], sealed: &[Entry], rule: Rule| {
        let report = report(&written(entries, sealed, key, &header));
        assert!(report.has(rule), "{what}: {:?}", report.findings);
    };
    let bent = |bend: &dyn Fn(&mut Vec<Entry>)| {
        let mut bent = entries.clone();
        bend(&mut bent);
        bent
    };
    let last = entries.len() - 1;
    let dropped = bent(&|e| drop(e.pop()));
    check("the last entry dropped", &dropped, &entries, Rule::LogSize);
    let missing = bent(&|e| drop(e.remove(9)));
    check("an entry dropped", &missing, &missing, Rule::EntrySequence);
    check("an entry repeated", &bent(&|e| e.insert(9, e[9].clone())), &entries, Rule::EntrySequence);
    check("two entries swapped", &bent(&|e| e.swap(9, 10)), &entries, Rule::EntrySequence);
    let later = bent(&|e| e[last].at = e[last].at.plus_ms(1));
    check("the last entry's time changed", &later, &entries, Rule::LogRoot);
    let unchained = bent(&|e| e[9].prev = Digest([1; 32]));
    check("an entry unchained", &unchained, &unchained, Rule::EntryChain);
    let back = bent(&|e| e[9].at = UnixMs(1));
    check("a clock that ran backwards", &back, &back, Rule::EntryClock);
}

#[test]
fn the_file_itself_is_judged() {
    let world = World::example();
    let (entries, key) = (world.provider.journal.entries(), &world.provider.node);
    let other = &world.consumer.node;
    let own = Header::new(node_key(key), Filter::All);
    let has = |bytes: Vec<u8>, rule: Rule| {
        let report = report(&bytes);
        assert!(report.has(rule), "{rule}: {:?}", report.findings);
    };
    has(written(&entries, &entries, other, &own), Rule::LogCheckpoint);
    has(written(&entries, &entries, other, &Header::new(node_key(other), Filter::All)), Rule::BundleNode);
    has(written(&[], &[], key, &own), Rule::EntryGenesis);
    let session = *report(&world.provider.bundle(Filter::All, false)).sessions.keys().next().unwrap();
    let partial = Header::new(node_key(key), Filter::Session(session));
    has(written(&entries, &entries, key, &partial), Rule::LogInclusion);
    has(written(&entries, &entries, key, &partial), Rule::BundleFilter);

    let checkpoint = checkpoint_of(&entries, key);
    let mut writer = BundleWriter::start(Vec::new(), &own, &checkpoint).unwrap();
    let item = |entry: &Entry| EntryItem { entry: entry.bytes(), opening: None, proof: None };
    writer.item(item(&entries[0])).unwrap();
    writer.item(EntryItem { entry: vec![0xa0], ..item(&entries[1]) }).unwrap();
    writer.item(EntryItem { opening: Some(vec![0xa0]), ..item(&entries[2]) }).unwrap();
    writer.item(EntryItem { proof: Some(vec![Digest([0; 32])]), ..item(&entries[3]) }).unwrap();
    let report = report(&writer.finish().unwrap());
    for rule in [Rule::EntryCanonical, Rule::ReceiptOpening, Rule::LogInclusion, Rule::LogSize] {
        assert!(report.has(rule), "{rule}: {:?}", report.findings);
    }
}

#[test]
fn a_header_that_selects_another_session_or_peer_is_found() {
    let world = World::example();
    let check = |what: &str, bundle: Vec<u8>, named: [u8; 32]| {
        assert_eq!(report(&bundle).findings, [], "{what}");
        let at = bundle.windows(32).position(|bytes| bytes == named).unwrap();
        for byte in [0, 15, 16, 31] {
            let mut bent = bundle.clone();
            bent[at + byte] ^= 8;
            let report = report(&bent);
            assert!(report.has(Rule::BundleFilter), "{what}, byte {byte}: {:?}", report.findings);
        }
    };
    for party in [&world.provider, &world.consumer] {
        let whole = report(&party.bundle(Filter::All, false));
        for (id, session) in &whole.sessions {
            // One of the sessions is over and forgotten by the end, the others are open.
            check("session", party.bundle(Filter::Session(*id), false), id.0);
            let consumer = session.consumer.unwrap();
            check("consumer", party.bundle(Filter::Peer(consumer), false), consumer.0);
        }
    }
    let provider = node_key(&world.provider.node);
    check("provider", world.consumer.bundle(Filter::Peer(provider), false), provider.0);
}

#[test]
fn more_than_the_consumer_allowed_is_found() {
    let mut world = World::new();
    let mut session = world.open();
    world.pay(&mut session, Msat::sat(1_001));
    assert!(report(&world.consumer.bundle(Filter::All, false)).has(Rule::OpenSpendCap));
}

#[test]
fn a_zero_fee_and_a_costless_request_are_in_order() {
    let mut world = World::with_rates(satgrid_types::RateCard::default());
    (world.slice_fee, world.refund_fee) = (Msat::ZERO, Msat::ZERO);
    let mut session = world.open();
    world.pay(&mut session, Msat::sat(10));
    world.complete(&mut session, crate::testing::Work { prompt: 5, cached: 0, output: 5, acks: 1 });
    world.abandon(&mut session, crate::testing::Work { prompt: 5, cached: 0, output: 5, acks: 0 });
    world.snapshot();
    assert_eq!(report(&world.provider.bundle(Filter::All, false)).findings, []);
    assert_eq!(report(&world.consumer.bundle(Filter::All, false)).findings, []);
}

#[test]
fn a_slice_may_be_invoiced_again_and_either_invoice_paid() {
    let world = World::example();
    for after in [0, 1] {
        let mut drafts = drafts_of(&world.provider.journal.entries());
        let at = find(&drafts, "invoice", 0);
        let (time, mut again) = drafts[at].clone();
        let Some(Evidence::Invoice { bolt11: text, descriptor, .. }) = &mut again.evidence else { unreachable!() };
        let payee = SecretKey::from_slice(&bytes32("provider/lightning")).unwrap();
        let hash = satgrid_types::PaymentHash([after; 32]);
        *text = bolt11(&payee, descriptor.amount, &descriptor.description_hash(), &hash, time);
        drafts.insert(at + usize::from(after), (time, again));
        let bundle = bundle_of(&chain_entries(drafts), &world.provider.node, Filter::All, false);
        assert_eq!(report(&bundle).findings, []);
    }
}

#[test]
fn two_exports_that_disagree_are_found() {
    let world = World::example();
    let consumer = report(&world.consumer.bundle(Filter::All, false));
    let rules = |bend: Bend| -> Vec<Rule> {
        let mut drafts = drafts_of(&world.provider.journal.entries());
        bend(&mut drafts);
        let provider = report(&bundle_of(&chain_entries(drafts), &world.provider.node, Filter::All, false));
        let both = [cross_check(&provider, &consumer), cross_check(&consumer, &provider)];
        assert_eq!(both[0].len(), both[1].len(), "the order of the files does not matter");
        both[0].iter().map(|finding| finding.rule).collect()
    };
    assert_eq!(rules(|_| ()), []);
    let truncated = rules(|d| d.truncate(find(d, "open", 2)));
    assert!(truncated.contains(&Rule::CrossMissing), "{truncated:?}");
    let forgotten = rules(|d| {
        d.truncate(find(d, "receipt", 4));
    });
    assert!(forgotten.contains(&Rule::CrossMismatch) && forgotten.contains(&Rule::PromiseBroken), "{forgotten:?}");
    // The same receipts, at other places of the log than those that were promised.
    let moved = rules(|d| {
        let extra = d[find(d, "wallet-snapshot", 0)].1.clone();
        d.insert(2, (d[2].0, extra));
    });
    assert_eq!(moved.iter().collect::<BTreeSet<_>>(), BTreeSet::from([&Rule::PromiseBroken]));
}

#[test]
fn every_rule_is_covered_and_its_id_is_unique() {
    let ids: BTreeSet<&str> = Rule::ALL.iter().map(Rule::id).collect();
    assert_eq!(ids.len(), Rule::ALL.len());
    let here = concat!(include_str!("tests.rs"), include_str!("tests/stages.rs"), include_str!("credit.rs"));
    // Debits differ from credits only if the books themselves are wrong; two histories are a file of their own.
    let claims = [Rule::ClaimPiece, Rule::ClaimRefund, Rule::ClaimNothing, Rule::ClaimContradicted];
    let elsewhere = [&[Rule::TransferTrial, Rule::Fraud][..], &claims].concat();
    for rule in Rule::ALL.iter().filter(|rule| !elsewhere.contains(rule)) {
        assert!(here.contains(&format!("Rule::{rule:?}")), "no test for {rule}");
    }
}

#[test]
fn a_leaf_is_the_hash_of_the_bytes_on_file() {
    let world = World::example();
    for entry in world.provider.journal.entries() {
        assert_eq!(entry.leaf(), leaf_hash(&entry.bytes()));
        assert_eq!(Entry::decode(&entry.bytes()).unwrap().bytes(), entry.bytes());
    }
}
