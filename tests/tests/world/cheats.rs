//! Peers that lie, on either side.

use super::assert_undisturbed;
use satgrid_node::consumer::CallError;
use satgrid_tests::world::{Ask, Cheat, Options, World};
use satgrid_types::{Msat, MsatPerMtok, RateCard, TokenUsage, node_key};

/// A call to a cheat first and an honest provider second: it finishes, the cheat is caught by `rule`, avoided, and the
/// proof is in the journal.
#[track_caller]
fn check(rule: &str, cheat: impl FnOnce(&mut World)) -> World {
    let mut world = World::new(Options::default(), 2, 1);
    cheat(&mut world);
    let call = world.submit(0, Ask::tokens(50, 400).to(&[0, 1]));
    world.finish_calls(120_000);
    assert_undisturbed(&world, world.call(0, call));
    let consumer = &world.consumers[0];
    assert_eq!(consumer.journal.misbehaviour(), vec![rule.to_owned()]);
    let cheat = node_key(&world.providers[0].key);
    assert_eq!(consumer.penalised, vec![(cheat, rule.to_owned())]);
    assert!(consumer.role.as_ref().unwrap().shunned(world.now).any(|(key, _)| *key == cheat));
    let report = world.audit_consumer(0);
    assert!(report.is_clean(), "{:#?}", report.findings);
    assert_eq!(report.misbehaviour, 1);
    world.assert_agree(1, 0);
    // Again: it is not asked.
    let opens = world.providers[0].journal.count("open");
    let again = world.submit(0, Ask::tokens(50, 40).to(&[0, 1]));
    world.finish_calls(60_000);
    assert_undisturbed(&world, world.call(0, again));
    assert_eq!(world.providers[0].journal.count("open"), opens);
    world
}

fn lie(cheat: Cheat) -> impl FnOnce(&mut World) {
    move |world| world.providers[0].cheat = cheat
}

/// What the first provider's session was charged, by the consumer's journal.
fn charged_by_the_cheat(world: &World) -> Msat {
    let key = node_key(&world.providers[0].key);
    let role = world.consumers[0].role.as_ref().unwrap();
    role.session_states().filter(|s| s.provider() == key).fold(Msat::ZERO, |sum, s| sum.saturating_add(s.charged()))
}

#[test]
fn overcounts_are_caught_and_not_signed() {
    let world = check("overcount-output", lie(Cheat::OvercountAck));
    assert_eq!(world.providers[0].journal.count("ack"), 0);
    assert_eq!(charged_by_the_cheat(&world), Msat::ZERO, "the first ack is a lie: nothing was signed");
    let world = check("overcount-output", lie(Cheat::OvercountReceipt));
    assert_eq!(world.providers[0].journal.count("receipt"), 0);
    assert!(charged_by_the_cheat(&world) < Msat(8_200), "charged at the last honest ack");
}

#[test]
fn a_wrong_price_or_output_is_caught() {
    check("overcharge", lie(Cheat::Overcharge));
    check("output-hash", lie(Cheat::OutputHash));
}

#[test]
fn a_lie_longer_than_an_entry_of_the_journal_stops_nobody() {
    check("row", lie(Cheat::LongRow));
}

#[test]
fn an_engine_that_emits_more_than_was_asked_for_is_caught_or_harmless() {
    let mut world = World::new(Options::default(), 1, 1);
    world.providers[0].toy.faults.overrun = true;
    world.crash_provider(0, Default::default());
    world.restart_provider(0);
    let call = world.submit(0, Ask::tokens(50, 400));
    world.finish_calls(120_000);
    assert_undisturbed(&world, world.call(0, call));
    world.assert_quiet();
}

#[test]
fn a_quote_dearer_than_the_listing_is_refused_and_kept() {
    let world = check("quote-dearer-than-listing", |world| {
        let listed = world.providers[0].rates;
        world.providers[0].quoted = RateCard { output: MsatPerMtok(listed.output.0 + 1), ..listed };
        world.publish(0);
    });
    assert_eq!(world.providers[0].journal.count("open"), 0);
    assert_eq!(world.consumers[0].role.as_ref().unwrap().counters().refused_quotes, 1);
}

#[test]
fn false_invoices_are_not_paid() {
    for (rule, cheat) in [
        ("invoice-amount", Cheat::InvoiceAmount),
        ("invoice-description-hash", Cheat::InvoiceTerms),
        ("invoice-payee", Cheat::InvoicePayee),
    ] {
        let world = check(rule, lie(cheat));
        let to_cheat = world.net.balance(world.providers[0].purse.lightning).unwrap().lightning_total;
        assert_eq!(to_cheat, Msat::ZERO, "{rule}");
    }
}

#[test]
fn a_payment_hash_is_good_for_one_slice() {
    use satgrid_wallet::{fake::Fault, port::FailureReason};
    check("payment-hash-reuse", |world| {
        world.providers[0].cheat = Cheat::InvoiceReuse;
        let payer = world.consumers[0].purse.lightning;
        world.net.script(payer, [Fault::Fail(FailureReason::RetriesExhausted)]);
    });
}

#[test]
fn who_takes_a_slice_and_does_not_say_so_costs_one_slice() {
    let world = check("slice-not-credited", lie(Cheat::NeverCredits));
    let taken = world.net.balance(world.providers[0].purse.lightning).unwrap().lightning_total;
    assert_eq!(taken, Msat::sat(10), "the first slice");
    let exposure = world.consumers[0].role.as_ref().unwrap().exposure();
    assert!(exposure >= taken, "and it stays in the figure: {exposure}");
}

#[test]
fn a_refund_is_what_is_owed_whatever_the_invoice_asks_for() {
    let mut options = Options::default();
    options.consumer.slices.first = Msat::sat(100);
    let mut world = World::new(options, 1, 1);
    let (a, b) = (world.providers[0].purse.lightning, world.consumers[0].purse.lightning);
    world.net.add_channel(a, b, 100_000, Msat::ZERO);
    world.providers[0].endowment = Msat::sat(100_000);
    world.consumers[0].greed = 50;
    let call = world.submit(0, Ask::tokens(30, 60));
    world.finish_calls(60_000);
    assert_undisturbed(&world, world.call(0, call));
    world.close_all(0);
    world.run_ms(10_000);
    let provider = &world.providers[0];
    assert_eq!((provider.journal.count("refund-attempted"), provider.journal.count("credit-note")), (0, 1));
    assert_eq!(world.net.balance(a).unwrap().lightning_total, Msat::sat(100_100), "nothing left it");
    world.assert_quiet();
    world.assert_agree(0, 0);
}

#[test]
fn a_consumer_that_never_signs_gets_one_window() {
    let mut world = World::new(Options::default(), 1, 1);
    world.consumers[0].never_signs = true;
    let call = world.submit(0, Ask::tokens(50, 4_000));
    let mut worst = Msat::ZERO;
    while world.open_calls() > 0 && world.now.since(satgrid_tests::world::EPOCH) < 100_000 {
        world.run_ms(200);
        worst = worst.max(world.providers[0].role.as_ref().unwrap().exposure());
    }
    let log = world.call(0, call);
    // The first acknowledgement is the prompt's: without it signed, 256 tokens of output.
    assert_eq!(log.tokens.len(), 256);
    assert!(matches!(log.error(), CallError::ProvidersFailed { .. }), "{:?}", log.end);
    let window = TokenUsage { prompt: 50, completion: 256, ..TokenUsage::default() };
    assert_eq!(worst, satgrid_pricing::cost_alone(&window, &world.options.rates).unwrap());
    // Its own prepaid slice stays where it is.
    assert_eq!(world.providers[0].role.as_ref().unwrap().counters().violations, 1);
}
