//! Bundles by an exporter who breaks one rule, and chains and signs everything anew so that nothing else gives it away.

use ed25519_dalek::SigningKey;
use satgrid_ledger::{
    audit::Rule,
    bundle::{BundleWriter, EntryItem, Filter, Header},
    entry::{Draft, Entry, Evidence},
    log::{SignedCheckpoint, inclusion_proof, leaf_hash, root_at},
    statements::{Ack, SliceDescriptor},
    testing::{
        Party, Session, Work, World, bolt11, bundle_of, bytes32, chain_entries, checkpoint_of, drafts_of,
        experts_bundle, lead_bundle, lost_bundle, succession_of, tiles_of,
    },
    transfer::{Account, Transfer, TransferKind, TransferOp, transfer_id},
};
use satgrid_pricing::{charge, numerators};
use satgrid_types::{
    AckId, BothSigned, Digest, GivenUp, ModelRoot, Msat, Numerators, PartUsage, PaymentHash, Preimage, QuoteId,
    RequestId, Salt, SessionId, Signed, SignedSuccession, Statement, TransferId, UnixMs, WorkKind, cbor, node_key,
    nostr_key, sign_body,
};

/// The history that is tampered with.
pub(crate) struct Lab {
    pub(crate) world: World,
    pub(crate) first: Session,
    pub(crate) second: Session,
    /// The history up to the first session's end.
    pub(crate) before_second: World,
    /// The history without the first session's last receipt.
    pub(crate) before_receipt: World,
}

impl Lab {
    pub(crate) fn new() -> Lab {
        let mut world = World::new();
        let mut first = world.open();
        world.pay(&mut first, Msat::sat(10));
        world.complete(&mut first, Work { prompt: 200, cached: 0, output: 300, acks: 2 });
        world.fail_payment(&mut first, Msat::sat(5));
        world.pay(&mut first, Msat::sat(5));
        world.abandon(&mut first, Work { prompt: 120, cached: 64, output: 100, acks: 1 });
        let before_receipt = snapshot_of(&world);
        world.complete(&mut first, Work { prompt: 40, cached: 32, output: 128, acks: 2 });
        world.close_with_refund(&mut first);
        let before_second = snapshot_of(&world);
        let mut second = world.open();
        world.pay(&mut second, Msat::sat(10));
        world.complete(&mut second, Work { prompt: 1, cached: 0, output: 1, acks: 0 });
        world.close_with_credit_note(&mut second);
        world.snapshot();
        Lab { world, first, second, before_second, before_receipt }
    }
}

/// The world as it stands: clones of a journal share its entries, this copy does not.
fn snapshot_of(world: &World) -> World {
    let mut copy = world.clone();
    for party in [&mut copy.provider, &mut copy.consumer] {
        let journal = satgrid_ledger::MemoryJournal::new();
        for entry in party.journal.entries() {
            journal.append_now(entry.at, vec![entry.draft()]).unwrap();
        }
        party.journal = journal;
    }
    copy
}

type Drafts = Vec<(UnixMs, Draft)>;
type Edit = fn(&Lab, &mut Drafts);

#[derive(Clone, Copy)]
enum Side {
    Provider,
    Consumer,
}
use Side::{Consumer, Provider};

/// Changes the first evidence that fits.
macro_rules! first {
    ($drafts:expr, $pattern:pat => $change:expr) => {{
        let mut found = false;
        for (_, draft) in $drafts.iter_mut() {
            if let Some($pattern) = &mut draft.evidence {
                $change;
                found = true;
                break;
            }
        }
        assert!(found, "no {}", stringify!($pattern));
    }};
}

pub(crate) fn all(lab: &Lab) -> Vec<(Rule, Vec<u8>)> {
    let edits: Vec<(Rule, Side, Edit)> = vec![
        (Rule::EntryGenesis, Provider, |_, d| drop(d.remove(0))),
        (Rule::StatementCanonical, Provider, |lab, d| {
            first!(d, Evidence::Ack(both) => {
                let mut body = both.body().to_vec();
                body.splice(2..3, [0x18, 1]);
                *both = raw_both(lab, body);
            });
        }),
        (Rule::StatementSignature, Provider, |_, d| {
            first!(d, Evidence::Ack(both) => {
                *both = BothSigned::from_parts(both.body().to_vec(), *both.consumer_signature(), *both.provider_signature());
            });
        }),
        (
            Rule::StatementVersion,
            Provider,
            |lab, d| first!(d, Evidence::Ack(both) => *both = again(lab, both, |ack| ack.version = 2)),
        ),
        (Rule::StatementSession, Provider, |_, d| {
            let (session, request) = (SessionId(bytes32("nobody's")), RequestId(bytes32("nobody's")));
            append(
                d,
                Draft::of(Evidence::Abandoned { session, request, last_ack: None, numerators: Numerators::ZERO }),
            );
        }),
        (Rule::ListingInvalid, Provider, |_, d| {
            first!(d, Evidence::Listing { event_json } => {
                let changed = event_json.replace("slots\\\":4", "slots\\\":5");
                assert_ne!(changed, *event_json);
                *event_json = changed;
            });
        }),
        (Rule::QuoteListing, Provider, |_, d| drop(d.remove(1))),
        (Rule::QuoteDearer, Provider, |lab, d| requote(lab, d, |quote| quote.rates.output.0 += 1)),
        (Rule::QuoteTerms, Provider, |lab, d| {
            requote(lab, d, |quote| quote.model_root = ModelRoot(bytes32("another")))
        }),
        (Rule::OpenQuote, Provider, |lab, d| {
            let key = SigningKey::from_bytes(&bytes32("a third session"));
            let mut open = lab.first.open.clone().into_statement();
            (open.consumer, open.quote) = (node_key(&key), QuoteId(bytes32("no quote")));
            append(d, Draft::of(Evidence::Open(Signed::sign(&open, &key))));
        }),
        (Rule::OpenTwice, Provider, |_, d| repeat(d, |e| matches!(e, Evidence::Open(_)))),
        (Rule::InvoiceSignature, Provider, |_, d| {
            first!(d, Evidence::Invoice { bolt11, .. } => {
                let other = if bolt11.ends_with('q') { "p" } else { "q" };
                bolt11.replace_range(bolt11.len() - 1.., other);
            });
        }),
        (Rule::InvoicePayee, Provider, |_, d| {
            reinvoice(d, |d, hash, at| {
                bolt11(&Party::new("stranger").lightning, d.amount, &d.description_hash(), &hash, at)
            });
        }),
        (Rule::InvoiceTerms, Provider, |lab, d| {
            let payee = lab.world.provider.lightning;
            reinvoice(d, move |d, hash, at| bolt11(&payee, d.amount, &Digest(bytes32("other terms")), &hash, at));
        }),
        (Rule::InvoiceAmount, Provider, |lab, d| {
            let payee = lab.world.provider.lightning;
            reinvoice(d, move |d, hash, at| bolt11(&payee, Msat(d.amount.0 + 1), &d.description_hash(), &hash, at));
        }),
        (Rule::InvoiceDescriptor, Provider, |lab, d| {
            let payee = lab.world.provider.lightning;
            reinvoice(d, move |d, hash, at| {
                d.consumer = node_key(&SigningKey::from_bytes(&bytes32("another consumer")));
                bolt11(&payee, d.amount, &d.description_hash(), &hash, at)
            });
        }),
        (Rule::InvoiceReuse, Provider, |lab, d| append_invoice(lab, d, 1, 0)),
        (Rule::InvoiceSequence, Provider, |lab, d| append_invoice(lab, d, 9, 9)),
        (Rule::PaymentUnknown, Provider, |_, d| {
            let payment_hash = PaymentHash(bytes32("nobody's payment"));
            append(d, Draft::of(Evidence::PaymentReceived { payment_hash, amount: Msat(1) }));
        }),
        (Rule::PaymentPreimage, Consumer, |_, d| {
            first!(d, Evidence::PaymentSettled { preimage, .. } => *preimage = Preimage(bytes32("another")));
        }),
        (Rule::PaymentAmount, Consumer, |_, d| first!(d, Evidence::PaymentSettled { amount, .. } => amount.0 += 1)),
        (Rule::PaymentTwice, Provider, |_, d| repeat(d, |e| matches!(e, Evidence::PaymentReceived { .. }))),
        (Rule::PaymentInFlight, Consumer, |lab, d| {
            let at = position(d, |e| matches!(e, Evidence::PaymentAttempted { .. })) + 1;
            let (invoice, payment_hash) = invoice(lab, 1, 7, d[at].0);
            let session = lab.first.id;
            let hold = transfer_id(session, None, TransferKind::Slice, 7);
            let pending =
                Transfer::pending(hold, Account::PrepaidAsset(session), Account::Lightning, Msat::sat(1), None);
            let attempt = Evidence::PaymentAttempted { session, k: 1, payment_hash, max_fee: Msat::ZERO };
            d.insert(at, (d[at].0, Draft::of(attempt).with([pending])));
            d.insert(at, (d[at].0, Draft::of(invoice)));
        }),
        (Rule::RequestInvalid, Provider, |lab, d| {
            first!(d, Evidence::Request(signed) => {
                let mut open = signed.peek().unwrap();
                open.quote = QuoteId(bytes32("no quote"));
                *signed = Signed::sign(&open, &lab.first.key);
            });
        }),
        (Rule::RequestUnknown, Provider, |_, d| {
            let at = position(d, |e| matches!(e, Evidence::Request(_)));
            d.remove(at);
        }),
        (Rule::AckSequence, Provider, |_, d| repeat(d, |e| matches!(e, Evidence::Ack(_)))),
        (Rule::AckUsage, Provider, |lab, d| {
            first!(d, Evidence::Ack(both) => *both = again(lab, both, |ack| {
                ack.usage.prompt += 1;
                ack.numerators = numerators(&ack.usage, &lab.first.quote.rates).unwrap();
                ack.cost = charge(ack.numerators);
            }));
        }),
        (
            Rule::AckCost,
            Provider,
            |lab, d| first!(d, Evidence::Ack(both) => *both = again(lab, both, |ack: &mut Ack| ack.numerators.0 += 1)),
        ),
        (
            Rule::ReceiptChain,
            Provider,
            |lab, d| first!(d, Evidence::Receipt { receipt, .. } => *receipt = again(lab, receipt, |r| r.seq += 1)),
        ),
        (Rule::ReceiptTerms, Provider, |lab, d| {
            first!(d, Evidence::Receipt { receipt, .. } => *receipt = again(lab, receipt, |r| r.model_root = ModelRoot(bytes32("another"))));
        }),
        (Rule::ReceiptUsage, Provider, |lab, d| {
            first!(d, Evidence::Receipt { receipt, .. } => *receipt = again(lab, receipt, |r| r.usage.completion -= 1));
        }),
        (
            Rule::ReceiptCost,
            Provider,
            |lab, d| first!(d, Evidence::Receipt { receipt, .. } => *receipt = again(lab, receipt, |r| r.cost.0 += 1)),
        ),
        (Rule::ReceiptCumulative, Provider, |lab, d| {
            first!(d, Evidence::Receipt { receipt, .. } => *receipt = again(lab, receipt, |r| r.cumulative_cost.0 += 1));
        }),
        (Rule::ReceiptSlices, Provider, |lab, d| {
            first!(d, Evidence::Receipt { receipt, .. } => *receipt = again(lab, receipt, |r| r.slices[0].payment_hash = PaymentHash(bytes32("another"))));
        }),
        (Rule::ReceiptLastAck, Provider, |lab, d| {
            first!(d, Evidence::Receipt { receipt, .. } => *receipt = again(lab, receipt, |r| r.last_ack = Some(AckId(bytes32("another")))));
        }),
        (Rule::ReceiptOpening, Provider, |_, d| {
            first!(d, Evidence::Receipt { opening: Some(opening), .. } => opening.salt = Salt(bytes32("another")));
        }),
        (
            Rule::AbandonedCharge,
            Provider,
            |_, d| first!(d, Evidence::Abandoned { numerators, .. } => numerators.0 += 1),
        ),
        (Rule::CloseTwice, Provider, |_, d| {
            let at = position(d, |e| matches!(e, Evidence::Close(_)));
            d.insert(at, d[at].clone());
        }),
        (Rule::CloseRemainder, Provider, |lab, d| {
            first!(d, Evidence::Close(signed) => {
                let mut close = signed.peek().unwrap();
                close.remainder.0 += 1;
                *signed = Signed::sign(&close, &lab.first.key);
            });
        }),
        (Rule::CreditNoteAmount, Provider, |lab, d| {
            first!(d, Evidence::CreditNote(signed) => {
                let mut note = signed.peek().unwrap();
                note.amount.0 += 1;
                *signed = Signed::sign(&note, &lab.world.provider.node);
            });
        }),
        (
            Rule::RefundInvalid,
            Provider,
            |_, d| first!(d, Evidence::RefundAttempted { amount, .. } => amount.0 += 100_000),
        ),
        (Rule::PromiseBroken, Consumer, |lab, d| {
            first!(d, Evidence::Promise(signed) => {
                let mut promise = signed.peek().unwrap();
                promise.node = node_key(&SigningKey::from_bytes(&bytes32("another node")));
                *signed = Signed::sign(&promise, &lab.world.provider.node);
            });
        }),
        (Rule::TransferMalformed, Provider, |_, d| {
            append(d, moved([Transfer::post(TransferId([1; 16]), Account::Lightning, Account::External, Msat::ZERO)]));
        }),
        (Rule::TransferTwoPhase, Provider, |_, d| {
            let first = d.iter().flat_map(|(_, draft)| &draft.transfers).find_map(|t| match t.op {
                TransferOp::Pending { .. } => Some(t.id),
                _ => None,
            });
            let op = TransferOp::VoidPending { pending: first.unwrap() };
            append(d, moved([Transfer { id: TransferId([1; 16]), op }]));
        }),
        (Rule::TransferOverdrawn, Provider, |lab, d| {
            let (debit, credit) = (Account::Prepaid(lab.second.id), Account::Income);
            append(d, moved([Transfer::pending(TransferId([1; 16]), debit, credit, Msat(1), None)]));
        }),
        (Rule::TransferUnbacked, Provider, |_, d| {
            append(d, moved([Transfer::post(TransferId([1; 16]), Account::Lightning, Account::Income, Msat(1))]));
        }),
        (Rule::TransferOverdue, Consumer, |lab, d| {
            let (debit, credit) = (Account::Expense, Account::PrepaidAsset(lab.second.id));
            let now = d.last().unwrap().0;
            append(d, moved([Transfer::pending(TransferId([1; 16]), debit, credit, Msat(1), Some(now.plus_ms(1)))]));
            let three_hours = 3 * 3_600_000;
            let snapshot = Evidence::WalletSnapshot { lightning_msat: Msat::sat(1), onchain_msat: Msat::ZERO };
            d.push((now.plus_ms(three_hours), Draft::of(snapshot)));
        }),
        (Rule::WalletInsolvent, Provider, |_, d| {
            append(d, Draft::of(Evidence::WalletSnapshot { lightning_msat: Msat(1), onchain_msat: Msat(2) }));
        }),
    ];
    let mut bundles: Vec<(Rule, Vec<u8>)> =
        edits.into_iter().map(|(rule, side, edit)| (rule, edited(lab, side, edit))).collect();
    bundles.extend(files(lab));
    bundles.push((Rule::OpenSpendCap, over_the_cap()));
    bundles.extend([
        (Rule::StageWork, lead_bundle(|s| s.usage.position_layers += 1)),
        (Rule::StageRoot, lead_bundle(|s| s.split = None)),
        (Rule::StageTiling, lead_bundle(|s| s.split.as_mut().unwrap().own.truncate(1))),
        (Rule::StageConservation, lead_bundle(|s| s.split.as_mut().unwrap().positions += 1)),
        (Rule::StageRows, lead_bundle(|s| s.work.output = Digest([7; 32]))),
        (Rule::StageOrphan, lead_bundle(|s| s.late = true)),
        (Rule::ExpertWork, experts_bundle(|s| s.usage.expert_rows += 1)),
        (Rule::ExpertRoot, experts_bundle(|s| s.expert_split = None)),
        (Rule::ExpertConservation, experts_bundle(|s| s.expert_split.as_mut().unwrap().layers[1] -= 1)),
    ]);
    let seen: std::collections::BTreeSet<Rule> = bundles.iter().map(|(rule, _)| *rule).collect();
    // Two exports are needed for these; a trial balance that does not hold cannot be written down at all.
    // Claims are files of their own, and notes that are spent need a second session (`credit`).
    let claims = [Rule::ClaimPiece, Rule::ClaimRefund, Rule::ClaimNothing, Rule::ClaimContradicted];
    let elsewhere = [
        &[Rule::CrossMismatch, Rule::CrossMissing, Rule::Fraud, Rule::TransferTrial, Rule::CreditNoteSpent][..],
        &claims,
    ]
    .concat();
    let missing: Vec<&Rule> =
        Rule::ALL.iter().filter(|rule| !seen.contains(rule) && !elsewhere.contains(rule)).collect();
    assert!(missing.is_empty(), "no vector for {missing:?}");
    bundles
}

/// The consumer's export with a promise, signed by the provider, of another leaf than its log holds.
pub(crate) fn promise_of_another_leaf(lab: &Lab) -> Vec<u8> {
    edited(lab, Consumer, |lab, d| {
        first!(d, Evidence::Promise(signed) => {
            let mut promise = signed.peek().unwrap();
            promise.leaf = Digest(bytes32("another leaf"));
            *signed = Signed::sign(&promise, &lab.world.provider.node);
        });
    })
}

/// Honest: slice 0 was invoiced twice, and the first of its invoices was paid.
pub(crate) fn replaced_invoice_paid(lab: &Lab) -> Vec<u8> {
    edited(lab, Provider, |lab, d| {
        let at = position(d, |e| matches!(e, Evidence::Invoice { .. })) + 1;
        let time = d[at].0;
        d.insert(at, (time, Draft::of(invoice(lab, 0, 1, time).0)));
    })
}

/// Slice 0 was invoiced a second time over 1 sat instead of 10, the first invoice was paid, and the second amount credited.
pub(crate) fn replaced_invoice_credited_wrongly(lab: &Lab) -> Vec<u8> {
    edited(lab, Provider, |lab, d| {
        let at = position(d, |e| matches!(e, Evidence::Invoice { .. })) + 1;
        let time = d[at].0;
        d.insert(at, (time, Draft::of(invoice(lab, 0, 1, time).0)));
        let received = position(d, |e| matches!(e, Evidence::PaymentReceived { .. }));
        for transfer in &mut d[received].1.transfers {
            if let TransferOp::Post { amount, .. } = &mut transfer.op {
                *amount = Msat(2 * amount.0);
            }
        }
    })
}

fn party(lab: &Lab, side: Side) -> &Party {
    match side {
        Provider => &lab.world.provider,
        Consumer => &lab.world.consumer,
    }
}

fn edited(lab: &Lab, side: Side, edit: Edit) -> Vec<u8> {
    let party = party(lab, side);
    let mut drafts = drafts_of(&party.journal.entries());
    edit(lab, &mut drafts);
    bundle_of(&chain_entries(drafts), &party.node, Filter::All, false)
}

fn over_the_cap() -> Vec<u8> {
    let mut world = World::new();
    let mut session = world.open();
    world.pay(&mut session, Msat::sat(1_001));
    world.consumer.bundle(Filter::All, false)
}

fn append(drafts: &mut Drafts, draft: Draft) {
    let at = drafts.last().unwrap().0;
    drafts.push((at, draft));
}

fn moved(transfers: impl IntoIterator<Item = Transfer>) -> Draft {
    Draft { evidence: None, transfers: transfers.into_iter().collect() }
}

fn position(drafts: &Drafts, is: fn(&Evidence) -> bool) -> usize {
    drafts.iter().position(|(_, draft)| draft.evidence.as_ref().is_some_and(is)).unwrap()
}

/// The same evidence a second time, without its transfers.
fn repeat(drafts: &mut Drafts, is: fn(&Evidence) -> bool) {
    let at = position(drafts, is);
    let (time, draft) = drafts[at].clone();
    drafts.insert(at + 1, (time, Draft { transfers: Vec::new(), ..draft }));
}

fn raw_both<T: Statement>(lab: &Lab, body: Vec<u8>) -> BothSigned<T> {
    let provider = sign_body::<T>(&body, &lab.world.provider.node);
    let consumer = sign_body::<T>(&body, &lab.first.key);
    BothSigned::from_parts(body, provider, consumer)
}

/// A changed statement, signed anew by both.
fn again<T: Statement>(lab: &Lab, both: &BothSigned<T>, change: impl FnOnce(&mut T)) -> BothSigned<T> {
    let mut statement = both.peek().unwrap();
    change(&mut statement);
    raw_both(lab, satgrid_types::cbor::encode(&statement))
}

/// A further quote for the first session, right after it was opened.
fn requote(lab: &Lab, drafts: &mut Drafts, change: fn(&mut satgrid_types::Quote)) {
    let at = position(drafts, |e| matches!(e, Evidence::Open(_))) + 1;
    let mut quote = lab.first.quote.clone().into_statement();
    quote.nonce += 100;
    change(&mut quote);
    let quote = Evidence::Quote(Signed::sign(&quote, &lab.world.provider.node));
    drafts.insert(at, (drafts[at].0, Draft::of(quote)));
}

/// The first invoice, made again by `make` from its terms, its payment hash and its time.
fn reinvoice(drafts: &mut Drafts, make: impl Fn(&mut SliceDescriptor, PaymentHash, UnixMs) -> String) {
    let at = position(drafts, |e| matches!(e, Evidence::Invoice { .. }));
    let (time, draft) = &mut drafts[at];
    if let Some(Evidence::Invoice { bolt11, descriptor, .. }) = &mut draft.evidence {
        let hash = satgrid_ledger::audit::read_invoice(bolt11).unwrap().payment_hash;
        *bolt11 = make(descriptor, hash, *time);
    }
}

/// An invoice of slice `k` of the first session, with the payment hash of the `n`-th payment of a row of its own.
fn invoice(lab: &Lab, k: u32, n: u32, at: UnixMs) -> (Evidence, PaymentHash) {
    let session = lab.first.id;
    let descriptor = SliceDescriptor {
        version: 1,
        session,
        k,
        amount: Msat::sat(1),
        quote: lab.first.quote.quote_id(),
        provider: lab.first.quote.provider,
        consumer: lab.first.quote.consumer,
        previous_receipt: None,
    };
    let payment_hash = PaymentHash(bytes32(&format!("another payment {n}")));
    let bolt11 =
        bolt11(&lab.world.provider.lightning, descriptor.amount, &descriptor.description_hash(), &payment_hash, at);
    (Evidence::Invoice { session, k, bolt11, descriptor }, payment_hash)
}

/// Two invoices right after the first: of slice 1, and of slice `k` with the payment hash of row `n`.
fn append_invoice(lab: &Lab, drafts: &mut Drafts, k: u32, n: u32) {
    let at = position(drafts, |e| matches!(e, Evidence::PaymentReceived { .. })) + 1;
    let time = drafts[at].0;
    drafts.insert(at, (time, Draft::of(invoice(lab, k, n, time).0)));
    drafts.insert(at, (time, Draft::of(invoice(lab, 1, 0, time).0)));
}

/// What is wrong with the file rather than with an entry's content.
fn files(lab: &Lab) -> Vec<(Rule, Vec<u8>)> {
    let party = &lab.world.provider;
    let (key, stranger) = (&party.node, SigningKey::from_bytes(&bytes32("a stranger")));
    let entries = party.journal.entries();
    let items = |entries: &[Entry]| -> Vec<EntryItem> { entries.iter().map(item).collect() };
    let node = Header::new(node_key(key), Filter::All);
    let checkpoint = checkpoint_of(&entries, key);
    let without_one: Vec<Entry> = entries.iter().filter(|entry| entry.seq != 9).cloned().collect();
    let mut unchained = entries.clone();
    link(&mut unchained, |entry| {
        if entry.seq == 9 {
            entry.prev = Digest(bytes32("another leaf"));
        }
    });
    let mut backwards = entries.clone();
    link(&mut backwards, |entry| {
        if entry.seq == 9 {
            entry.at = UnixMs(entry.at.0 - 10_000);
        }
    });
    let mut long_form = items(&entries);
    let body = &mut long_form[9].entry;
    // Field 0, the number, in two bytes.
    body.splice(2..3, [0x18, 9]);
    let mut tiles = satgrid_ledger::log::MemoryTiles::default();
    long_form.iter().for_each(|item| tiles.push(leaf_hash(&item.entry)));
    let size = tiles.size();
    let root = root_at(size, &mut tiles).unwrap();
    let long_checkpoint = SignedCheckpoint::sign(size, root, key);
    let mut partial = partial_items(lab, &entries, checkpoint.size);
    partial[3].proof.as_mut().unwrap()[0] = Digest(bytes32("another hash"));
    let one_session = Header::new(node_key(key), Filter::Session(lab.first.id));
    let other_session = Header::new(node_key(key), Filter::Session(SessionId(bytes32("another"))));
    vec![
        (
            Rule::BundleNode,
            raw(&Header::new(node_key(&stranger), Filter::All), &checkpoint_of(&entries, &stranger), items(&entries)),
        ),
        (Rule::BundleFilter, raw(&other_session, &checkpoint, partial_items(lab, &entries, checkpoint.size))),
        (Rule::LogCheckpoint, raw(&node, &checkpoint_of(&entries, &stranger), items(&entries))),
        (
            Rule::LogRoot,
            raw(&node, &SignedCheckpoint::sign(checkpoint.size, Digest(bytes32("another root")), key), items(&entries)),
        ),
        (Rule::LogSize, raw(&node, &checkpoint, items(&entries[..entries.len() - 1]))),
        (Rule::LogInclusion, raw(&one_session, &checkpoint, partial)),
        (Rule::EntryCanonical, raw(&node, &long_checkpoint, long_form)),
        (Rule::EntrySequence, raw(&node, &checkpoint_of(&without_one, key), items(&without_one))),
        (Rule::EntryChain, raw(&node, &checkpoint_of(&unchained, key), items(&unchained))),
        (Rule::EntryClock, raw(&node, &checkpoint_of(&backwards, key), items(&backwards))),
    ]
}

fn item(entry: &Entry) -> EntryItem {
    EntryItem { entry: entry.bytes(), opening: entry.opening().map(satgrid_types::cbor::encode), proof: None }
}

/// Changes entries and chains each to what the one before has become; `change` comes last, so it may break the chain.
fn link(entries: &mut [Entry], change: impl Fn(&mut Entry)) {
    let mut last = Digest([0; 32]);
    for entry in entries {
        entry.prev = last;
        change(entry);
        last = entry.leaf();
    }
}

fn partial_items(lab: &Lab, entries: &[Entry], size: u64) -> Vec<EntryItem> {
    let mut tiles = tiles_of(entries);
    let mut selector = satgrid_ledger::bundle::Selector::new(Filter::Session(lab.first.id));
    entries.iter().for_each(|entry| selector.observe(entry));
    let mut selection = selector.select();
    let wanted = entries.iter().filter(|entry| selection.wants(entry));
    wanted
        .map(|entry| EntryItem { proof: Some(inclusion_proof(entry.seq, size, &mut tiles).unwrap()), ..item(entry) })
        .collect()
}

fn raw(header: &Header, checkpoint: &SignedCheckpoint, items: Vec<EntryItem>) -> Vec<u8> {
    let mut writer = BundleWriter::start(Vec::new(), header, checkpoint).unwrap();
    items.into_iter().for_each(|item| writer.item(item).unwrap());
    writer.finish().unwrap()
}

/// The rotated provider's export with a succession that does not follow from the key before, or that nobody signed.
pub(crate) fn successions(world: &World) -> Vec<(&'static str, Rule, Vec<u8>)> {
    let with = |bend: &dyn Fn(&mut Vec<(UnixMs, Draft)>, usize)| {
        let mut drafts = drafts_of(&world.provider.journal.entries());
        let at = drafts.iter().position(|(_, draft)| matches!(draft.evidence, Some(Evidence::Succession(_)))).unwrap();
        bend(&mut drafts, at);
        bundle_of(&chain_entries(drafts), &world.provider.node, Filter::All, false)
    };
    let instead = |signed: SignedSuccession| {
        with(&|drafts, at| drafts[at].1.evidence = Some(Evidence::Succession(signed.clone())))
    };
    let consumer = (&world.consumer.node, nostr_key(&world.consumer.nostr));
    let usurped = SignedSuccession::rotate(consumer, (&world.provider.node, consumer.1), world.now, GivenUp::Stolen);
    let ended = SignedSuccession::revoke((&World::new().provider.node, consumer.1), world.now, GivenUp::Ended);
    let (signed, ..) = succession_of(&World::new());
    let mut bytes = cbor::encode(&signed);
    *bytes.last_mut().unwrap() ^= 1;
    let unaccepted = cbor::decode_limited(&bytes, bytes.len()).unwrap();
    vec![
        ("succession-missing", Rule::BundleNode, with(&|drafts, at| drop(drafts.remove(at)))),
        ("succession-of-another-key", Rule::BundleNode, instead(usurped)),
        ("succession-to-nobody", Rule::BundleNode, instead(ended)),
        ("succession-not-accepted", Rule::StatementSignature, instead(unaccepted)),
    ]
}

/// Losses that a lead's receipt speaks of, or does not, against what its worker signed.
pub(crate) fn losses() -> Vec<(&'static str, Rule, Vec<u8>)> {
    let evaluated = |positions| PartUsage::default().plus(WorkKind::Prefill, positions, 8).unwrap();
    vec![
        ("bad-lead-lost-and-unsaid", Rule::StageRows, lost_bundle(|s| s.split.as_mut().unwrap().lost = None)),
        ("bad-lead-lost-and-none-missing", Rule::StageRows, lost_bundle(|s| s.work.bytes_in = 48)),
        ("bad-lead-lost-and-more-received", Rule::StageRows, lost_bundle(|s| s.work.bytes_in = 49)),
        ("bad-lead-lost-too-few", Rule::StageConservation, lost_bundle(|s| s.usage = evaluated(49))),
        (
            "bad-lead-lost-what-was-sold",
            Rule::StageConservation,
            lost_bundle(|s| {
                let split = s.split.as_mut().unwrap();
                split.positions -= 10;
                split.lost.as_mut().unwrap().positions += 10;
            }),
        ),
    ]
}
