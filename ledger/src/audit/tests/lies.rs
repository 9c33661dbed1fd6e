//! Lies of an exporter who holds all its keys, that fit their evidence at first sight.

use super::*;

/// The rules that a bent journal breaks.
fn broken(side: Side, bend: impl FnOnce(&mut Drafts)) -> BTreeSet<Rule> {
    let world = World::example();
    let party = match side {
        Provider => &world.provider,
        Consumer => &world.consumer,
    };
    let mut drafts = drafts_of(&party.journal.entries());
    bend(&mut drafts);
    let report = report(&bundle_of(&chain_entries(drafts), &party.node, Filter::All, false));
    report.findings.iter().map(|finding| finding.rule).collect()
}

/// Half of what came in, written down twice under one id: it adds up, and the books take it once.
#[test]
fn a_transfer_that_stands_twice_in_an_entry_moves_once() {
    let found = broken(Provider, |d| {
        let moved = transfers(d, "payment-received", 0);
        let TransferOp::Post { amount, .. } = &mut moved[0].op else { unreachable!() };
        assert_eq!(amount.0 % 2, 0);
        *amount = Msat(amount.0 / 2);
        moved.push(moved[0]);
    });
    assert!(found.contains(&Rule::TransferUnbacked), "{found:?}");
    // The same twice, and whole: a replay, which changes nothing.
    let replayed = broken(Provider, |d| {
        let moved = transfers(d, "payment-received", 0);
        moved.push(moved[0]);
    });
    assert_eq!(replayed, BTreeSet::new());
}

/// A preimage is what a payer has to show, so "received" is no word of a payer's; and the payee, who knows the preimage, may
/// not book what it owes as something that it has paid.
#[test]
fn a_payment_is_said_by_whose_it_is() {
    let unpaid = broken(Consumer, |d| {
        let at = find(d, "payment-attempted", 0);
        let Some(Evidence::PaymentAttempted { session, payment_hash, .. }) = d[at].1.evidence else { unreachable!() };
        let amount = Msat::sat(10);
        let credit = Transfer::post(TransferId([1; 16]), Account::Lightning, Account::Prepaid(session), amount);
        // Nothing was paid: the journal ends here.
        d.truncate(at);
        let time = d[at - 1].0;
        d.push((time, Draft::of(Evidence::PaymentReceived { payment_hash, amount }).with([credit])));
    });
    assert_eq!(unpaid, BTreeSet::from([Rule::PaymentUnknown]));
    let unowed = broken(Provider, |d| {
        let at = find(d, "payment-received", 0);
        let Some(Evidence::Invoice { session, .. }) = d[at - 1].1.evidence else { unreachable!() };
        let Some(Evidence::PaymentReceived { payment_hash, amount }) = d[at].1.evidence else { unreachable!() };
        let (time, asset) = (d[at].0, Account::PrepaidAsset(session));
        let preimage = Preimage(bytes32(&format!("preimage {session} 0 1")));
        d.truncate(at);
        let hold = Transfer::pending(TransferId([1; 16]), asset, Account::Lightning, amount, None);
        let attempted = Evidence::PaymentAttempted { session, k: 0, payment_hash, max_fee: Msat::ZERO };
        d.push((time, Draft::of(attempted).with([hold])));
        let settled = Evidence::PaymentSettled { payment_hash, preimage, amount, fee: Msat::ZERO };
        d.push((time, Draft::of(settled).with([Transfer::post_pending(hold.id, amount)])));
    });
    assert_eq!(unowed, BTreeSet::from([Rule::PaymentUnknown]));
}

/// One side's file held against itself, or against another that says to be of the same side, accuses nobody else.
#[test]
fn two_files_of_one_side_say_nothing_about_the_other() {
    let world = World::example();
    for party in [&world.provider, &world.consumer] {
        let report = report(&party.bundle(Filter::All, false));
        let found = cross_check(&report, &report);
        assert_eq!(found.len(), report.sessions.len());
        assert!(found.iter().all(|f| (f.rule, f.party) == (Rule::CrossMismatch, Party::Exporter)), "{found:?}");
    }
}

/// What a provider owes becomes its own only once nobody can claim it by its note any more.
#[test]
fn a_remainder_is_kept_no_sooner_than_its_note_runs_out() {
    let kept = |after_ms: Option<u64>, with_note: bool| {
        broken(Provider, |d| {
            let note = find(d, "credit-note", 0);
            let Some(Evidence::CreditNote(signed)) = &d[note].1.evidence else { unreachable!() };
            let body = signed.peek().unwrap();
            d.truncate(if with_note { note + 1 } else { note });
            let last = d.last().unwrap().0;
            let time = after_ms.map_or(last, |after| body.valid_until.plus_ms(after));
            let due = Account::RefundsDue(body.session);
            let keep = Transfer::post(TransferId([1; 16]), due, Account::Dust, body.amount);
            d.push((time, Draft { evidence: None, transfers: vec![keep] }));
        })
    };
    let lie = BTreeSet::from([Rule::TransferUnbacked]);
    assert_eq!(kept(None, true), lie, "on the same day");
    assert_eq!(kept(Some(0), false), lie, "without a note");
    assert_eq!(kept(Some(0), true), BTreeSet::new());
}

/// A refund that came in is no occasion to call routing fees expenses.
#[test]
fn a_refund_moves_no_fees_into_expenses() {
    let found = broken(Consumer, |d| {
        let shift = Transfer::post(TransferId([1; 16]), Account::Expense, Account::RoutingFees, Msat(1_000_000));
        transfers(d, "refund-received", 0).push(shift);
    });
    assert_eq!(found, BTreeSet::from([Rule::TransferUnbacked]));
}

/// A promise that comes once its session is over, as a provider would have it that does not mean to keep it.
#[test]
fn a_late_promise_binds_as_any_other() {
    let world = World::example();
    let provider = report(&world.provider.bundle(Filter::All, false));
    let late = |bend: fn(&mut InclusionPromise), key: &SigningKey| {
        let mut drafts = drafts_of(&world.consumer.journal.entries());
        let (_, promised) = drafts.remove(find(&drafts, "promise", 0));
        let Some(Evidence::Promise(signed)) = promised.evidence else { unreachable!() };
        let mut body = signed.peek().unwrap();
        bend(&mut body);
        let at = drafts.last().unwrap().0;
        drafts.push((at, Draft::of(Evidence::Promise(Signed::sign(&body, key)))));
        report(&bundle_of(&chain_entries(drafts), &world.consumer.node, Filter::All, false))
    };
    let honest = late(|_| (), &provider_key());
    assert_eq!((&honest.findings, cross_check(&provider, &honest)), (&Vec::new(), Vec::new()));
    let broken = late(|promise| promise.leaf = Digest([1; 32]), &provider_key());
    assert_eq!(broken.findings, []);
    let found: Vec<Rule> = cross_check(&provider, &broken).iter().map(|finding| finding.rule).collect();
    assert_eq!(found, [Rule::PromiseBroken]);
    let forged = late(|_| (), &first_session_key());
    assert!(forged.has(Rule::StatementSignature), "{:?}", forged.findings);
}

/// A clock that was a day ahead and was set back: entries keep the day's time, and reservations run out by the clock.
#[test]
fn a_clock_that_was_set_back_makes_no_reservation_overdue() {
    let found = broken(Provider, |d| {
        let TransferOp::Pending { debit, credit, .. } = transfers(d, "request", 5)[0].op else { unreachable!() };
        let now = d.last().unwrap().0;
        let hold = Transfer::pending(TransferId([1; 16]), debit, credit, Msat(1), Some(now.plus_ms(3_600_000)));
        d.push((now.plus_ms(24 * 3_600_000), Draft { evidence: None, transfers: vec![hold] }));
    });
    assert_eq!(found, BTreeSet::new());
}

/// Any provider quotes to a key that asks: it cannot know that the key has a session elsewhere.
#[test]
fn a_quote_for_another_providers_session_accuses_nobody_else() {
    let world = World::example();
    let mut drafts = drafts_of(&world.consumer.journal.entries());
    let Evidence::Quote(quote) = evidence(&mut drafts, "quote", 0) else { unreachable!() };
    let other = SigningKey::from_bytes(&bytes32("another provider"));
    let body = Quote { provider: node_key(&other), ..quote.peek().unwrap() };
    let asked = Draft::of(Evidence::Quote(Signed::sign(&body, &other)));
    let at = find(&drafts, "open", 0) + 1;
    drafts.insert(at, (drafts[at].0, asked));
    let report = report(&bundle_of(&chain_entries(drafts), &world.consumer.node, Filter::All, false));
    let found = report.findings.iter().find(|finding| finding.rule == Rule::OpenQuote);
    assert_eq!(found.map(|finding| finding.party), Some(Party::Exporter));
}

/// A checkpoint in the journal itself that says another history than the entries before it.
#[test]
fn a_journalled_checkpoint_is_of_the_entries_before_it() {
    let noted = |root: Option<Digest>| {
        broken(Provider, |d| {
            let (size, time) = (d.len() as u64, d.last().unwrap().0);
            let head = checkpoint_of(&chain_entries(d.clone()), &provider_key());
            let note = SignedCheckpoint::sign(size, root.unwrap_or(head.root), &provider_key()).note().to_owned();
            d.push((time, Draft::of(Evidence::Checkpoint { note })));
        })
    };
    assert_eq!(noted(None), BTreeSet::new());
    assert_eq!(noted(Some(Digest([1; 32]))), BTreeSet::from([Rule::LogCheckpoint]));
}

/// Whatever an exporter leaves out or repeats, and chains anew: nobody else is named alone for it.
#[test]
fn what_is_left_out_or_repeated_accuses_no_other_party_alone() {
    let world = World::example();
    let mut doubted = BTreeSet::new();
    for party in [&world.provider, &world.consumer] {
        let whole = drafts_of(&party.journal.entries());
        for at in 0..whole.len() {
            for left_out in [true, false] {
                let mut drafts = whole.clone();
                if left_out {
                    drafts.remove(at);
                } else {
                    drafts.insert(at + 1, whole[at].clone());
                }
                let report = report(&bundle_of(&chain_entries(drafts), &party.node, Filter::All, false));
                for finding in &report.findings {
                    match finding.party {
                        Party::Exporter => {}
                        Party::ExporterOrProvider(_) | Party::ExporterOrConsumer(_) => {
                            doubted.insert(finding.rule);
                        }
                        Party::Provider(_) | Party::Consumer(_) => panic!("entry {at}: {finding:?}"),
                    }
                }
            }
        }
    }
    for rule in [
        Rule::OpenQuote,
        Rule::OpenTwice,
        Rule::RequestUnknown,
        Rule::RequestInvalid,
        Rule::AckSequence,
        Rule::ReceiptChain,
        Rule::ReceiptLastAck,
        Rule::ReceiptSlices,
        Rule::ReceiptCumulative,
        Rule::CloseRemainder,
    ] {
        assert!(doubted.contains(&rule), "{rule} is not among {doubted:?}");
    }
}

/// What a signature proves by itself is held against its signer alone.
#[test]
fn what_its_own_signature_proves_names_a_party_alone() {
    let world = World::example();
    let mut drafts = drafts_of(&world.consumer.journal.entries());
    bend_quote(&mut drafts, |quote| quote.rates.output.0 += 1);
    let report = report(&bundle_of(&chain_entries(drafts), &world.consumer.node, Filter::All, false));
    let dearer = report.findings.iter().find(|finding| finding.rule == Rule::QuoteDearer);
    assert_eq!(dearer.map(|finding| finding.party), Some(Party::Provider(node_key(&world.provider.node))));
    // The session, on the other hand, accepted a quote that this file lacks: its own doing or the exporter's.
    let open = report.findings.iter().find(|finding| finding.rule == Rule::OpenQuote);
    assert!(matches!(open.map(|finding| finding.party), Some(Party::ExporterOrConsumer(_))), "{open:?}");
}
