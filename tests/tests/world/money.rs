//! Wallets that are empty, slow or refuse; caps; closes.

use super::{assert_undisturbed, strike};
use satgrid_ledger::Account;
use satgrid_node::consumer::{CallError, FundsLimit};
use satgrid_tests::world::{Ask, Options, World};
use satgrid_types::Msat;
use satgrid_wallet::{
    fake::{Crash, Fault},
    port::FailureReason,
};

#[test]
fn an_empty_wallet_is_a_funds_error_at_once() {
    // A channel of 1,000 sat is all reserve.
    let mut world = World::new(Options { channel_sat: 1_000, ..Options::default() }, 1, 1);
    let call = world.submit(0, Ask::tokens(30, 300));
    world.finish_calls(20_000);
    assert!(matches!(world.call(0, call).error(), CallError::Funds { limit: FundsLimit::Wallet, .. }));
    assert_eq!(world.consumers[0].journal.count("payment-attempted"), 0);
    world.assert_quiet();
}

#[test]
fn a_wallet_that_runs_dry_under_a_stream_ends_it_in_good_order() {
    // 30 sat above the reserve; the answer costs 60.
    let mut world = World::new(Options { channel_sat: 1_030, ..Options::default() }, 1, 1);
    let call = world.submit(0, Ask::tokens(30, 3_000));
    world.finish_calls(120_000);
    let log = world.call(0, call);
    assert!(matches!(log.error(), CallError::Funds { .. }), "{:?}", log.end);
    assert!(log.bill().legs[0].receipt.is_some());
    assert!(log.bill().cost() > Msat(25_000), "nearly all of it was used: {}", log.bill().cost());
    world.assert_quiet();
    world.assert_agree(0, 0);
}

#[test]
fn caps_hold() {
    let mut options = Options::default();
    options.consumer.session_cap = Msat::sat(25);
    let mut world = World::new(options, 1, 1);
    let call = world.submit(0, Ask::tokens(30, 3_000));
    world.finish_calls(120_000);
    assert!(matches!(world.call(0, call).error(), CallError::Funds { .. }));
    assert!(world.audit_consumer(0).as_consumer.paid_msat <= 25_000);
    world.assert_quiet();
    // Exposure over all sessions: `check_bounds` looks at every step.
    let mut options = Options::default();
    options.consumer.exposure_cap = Msat::sat(40);
    let mut world = World::new(options, 3, 1);
    for i in 0..6 {
        world.submit(0, Ask::tokens(30, 900).to(&[i % 3]));
    }
    world.finish_calls(200_000);
    world.assert_quiet();
}

/// The cap is on one session, not on a provider for good: the session is closed, its remainder comes back, and what goes
/// on does so in a fresh one.
#[test]
fn calls_go_on_in_a_fresh_session_when_one_is_at_its_cap() {
    let mut options = Options::default();
    options.consumer.session_cap = Msat::sat(25);
    let mut world = World::new(options, 1, 1);
    // Six sat each; four of them come near the cap.
    let calls: Vec<_> = (0..9)
        .map(|_| {
            let call = world.submit(0, Ask::tokens(30, 280));
            world.finish_calls(60_000);
            call
        })
        .collect();
    let mut in_two = 0;
    for call in calls {
        let log = world.call(0, call);
        assert_undisturbed(&world, log);
        in_two += usize::from(log.bill().legs.len() == 2);
    }
    assert!(in_two > 0, "none was in mid-stream when the cap came");
    world.run_ms(30_000);
    let audit = world.audit_consumer(0).as_consumer;
    assert!(audit.paid_msat > 50_000, "{audit:?}");
    // Every session but the last one is closed, and what was left in it is paid back or, where it is dust, owed.
    let journal = &world.consumers[0].journal;
    let (opened, closed) = (journal.count("open"), journal.count("close"));
    assert_eq!((opened >= 3, closed), (true, opened - 1), "{opened} opened");
    assert_eq!(journal.count("refund-received") + journal.count("credit-note"), closed);
    world.assert_quiet();
    world.assert_agree(0, 0);
}

#[test]
fn a_stuck_payment_is_never_paid_again_and_serves_when_it_arrives() {
    let mut world = World::new(Options::default(), 1, 1);
    let stuck = Fault::Stuck { ms: 40_000, then_settles: true };
    world.net.script(world.consumers[0].purse.lightning, [stuck]);
    let call = world.submit(0, Ask::tokens(30, 100));
    world.run_ms(30_000);
    assert_eq!(world.consumers[0].journal.count("payment-attempted"), 1);
    world.finish_calls(60_000);
    assert_undisturbed(&world, world.call(0, call));
    assert_eq!(world.consumers[0].journal.count("payment-settled"), 1);
    world.assert_quiet();
    world.assert_agree(0, 0);
}

#[test]
fn a_stuck_first_payment_sends_the_call_elsewhere_in_time() {
    let mut world = World::new(Options::default(), 2, 1);
    let stuck = Fault::Stuck { ms: 300_000, then_settles: false };
    world.net.script(world.consumers[0].purse.lightning, [stuck]);
    let call = world.submit(0, Ask::tokens(30, 100).to(&[0, 1]));
    world.finish_calls(120_000);
    assert_undisturbed(&world, world.call(0, call));
    world.run_ms(400_000);
    world.assert_quiet();
    world.assert_agree(0, 0);
    world.assert_agree(1, 0);
}

/// The HTLC is out, `pay` broke before it could say so, the payee goes away, and the second sending finds no route: its
/// failed row is about the second sending and proves nothing about the first.
#[test]
fn a_refused_second_sending_does_not_end_a_payment_that_is_out() {
    let mut world = World::new(Options::default(), 2, 1);
    world.net.script(world.consumers[0].purse.lightning, [Fault::Break]);
    let call = world.submit(0, Ask::tokens(30, 100).to(&[0, 1]));
    let sent = |w: &World| w.net.balance(w.consumers[0].purse.lightning).unwrap().outbound_in_flight;
    world.run_while("the payment leaves", 5_000, |w| !sent(w));
    world.crash_provider(0, Crash::default());
    // The bounds are checked at every step.
    world.finish_calls(60_000);
    assert!(world.call(0, call).end.is_some());
    assert_eq!(world.consumers[0].journal.count("payment-failed"), 0);
}

#[test]
fn a_failed_payment_is_tried_again_with_a_new_invoice() {
    let mut world = World::new(Options::default(), 1, 1);
    let fail = Fault::Fail(FailureReason::RetriesExhausted);
    world.net.script(world.consumers[0].purse.lightning, [fail, fail]);
    let call = world.submit(0, Ask::tokens(30, 100));
    world.finish_calls(60_000);
    assert_undisturbed(&world, world.call(0, call));
    assert_eq!(world.consumers[0].journal.count("payment-failed"), 2);
    world.assert_quiet();
    world.assert_agree(0, 0);
}

#[test]
fn payments_that_always_fail_leave_the_provider() {
    let mut world = World::new(Options::default(), 1, 1);
    let fail = Fault::Fail(FailureReason::RetriesExhausted);
    world.net.script(world.consumers[0].purse.lightning, [fail; 8]);
    let call = world.submit(0, Ask::tokens(30, 100));
    world.finish_calls(60_000);
    assert!(matches!(world.call(0, call).error(), CallError::ProvidersFailed { .. }));
    assert!(world.consumers[0].journal.count("payment-failed") <= 4);
    world.assert_quiet();
}

#[test]
fn wallet_events_that_are_lost_or_come_twice_are_booked_once() {
    for fault in
        [Fault::LoseEvent, Fault::DuplicateEvent, Fault::Break, Fault::Fee(Msat(90)), Fault::Delay { ms: 2_500 }]
    {
        let mut world = World::new(Options::default(), 1, 1);
        world.net.script(world.consumers[0].purse.lightning, [fault; 40]);
        let call = world.submit(0, Ask::tokens(30, 1_500));
        world.finish_calls(300_000);
        assert_undisturbed(&world, world.call(0, call));
        world.run_ms(60_000);
        world.assert_quiet();
        world.assert_agree(0, 0);
    }
}

#[test]
fn a_close_brings_the_remainder_back() {
    let mut world = World::new(Options::default(), 1, 1);
    let (a, b) = (world.providers[0].purse.lightning, world.consumers[0].purse.lightning);
    world.net.add_channel(a, b, 100_000, Msat::ZERO);
    world.providers[0].endowment = Msat::sat(100_000);
    world.consumers[0].config.slices.first = Msat::sat(100);
    world.crash_consumer(0, Crash::default());
    world.restart_consumer(0);
    let call = world.submit(0, Ask::tokens(30, 60));
    world.finish_calls(60_000);
    assert_undisturbed(&world, world.call(0, call));
    world.close_all(0);
    world.run_ms(10_000);
    let totals = world.audit_consumer(0).as_consumer;
    assert_eq!(totals.refunded_msat, totals.paid_msat - totals.charged_msat);
    assert_eq!(world.audit_provider(0).as_provider.refunded_msat, totals.refunded_msat);
    world.assert_quiet();
    world.assert_agree(0, 0);
    // The next call opens a new session.
    let next = world.submit(0, Ask::tokens(30, 60));
    world.finish_calls(60_000);
    assert_undisturbed(&world, world.call(0, next));
    assert_eq!(world.consumers[0].journal.count("open"), 2);
    world.assert_quiet();
}

#[test]
fn dust_is_owed_at_once() {
    let mut world = World::new(Options::default(), 1, 1);
    let call = world.submit(0, Ask::tokens(30, 60));
    world.finish_calls(60_000);
    assert_undisturbed(&world, world.call(0, call));
    world.close_all(0);
    world.run_ms(10_000);
    // 10 sat paid, about 1.3 used; 8.7 is below the dust of 10 sat.
    let journal = &world.consumers[0].journal;
    assert_eq!((journal.count("credit-note"), journal.count("refund-received")), (1, 0));
    assert_eq!(world.providers[0].journal.count("refund-attempted"), 0);
    world.assert_quiet();
    world.assert_agree(0, 0);
}

#[test]
fn what_cannot_be_paid_back_is_owed_by_a_signed_note() {
    let mut options = Options::default();
    options.consumer.slices.first = Msat::sat(100);
    let mut world = World::new(options, 1, 1);
    let call = world.submit(0, Ask::tokens(30, 60));
    world.finish_calls(60_000);
    assert_undisturbed(&world, world.call(0, call));
    world.close_all(0);
    world.run_ms(10_000);
    // The provider got 100 sat on a channel whose reserve is 10,000: nothing is payable.
    assert_eq!(world.consumers[0].journal.count("credit-note"), 1);
    assert_eq!(world.providers[0].journal.count("refund-attempted"), 1);
    let owed = world.providers[0].journal.books().liabilities();
    assert_eq!(u128::from(owed.0), u128::from(100_000 - world.audit_provider(0).as_provider.charged_msat));
    world.assert_quiet();
    world.assert_agree(0, 0);
}

#[test]
fn a_note_is_asked_for_again_and_paid_once_the_channel_allows() {
    // (what happens between the note and the money, days until then)
    for (restart, days) in [(false, 0), (true, 1), (false, 29), (false, 31)] {
        let mut options = Options::default();
        options.consumer.slices.first = Msat::sat(100);
        let mut world = World::new(options, 1, 1);
        let call = world.submit(0, Ask::tokens(30, 60));
        world.finish_calls(60_000);
        assert_undisturbed(&world, world.call(0, call));
        world.close_all(0);
        world.run_ms(10_000);
        assert_eq!(world.consumers[0].journal.count("credit-note"), 1);
        let owed = world.consumers[0].role.as_ref().unwrap().exposure();
        assert!(owed > Msat::sat(90), "what is owed may be lost: {owed}");
        if restart {
            world.crash_consumer(0, Crash::default());
            world.crash_provider(0, Crash::default());
            world.run_ms(100);
            world.restart_provider(0);
            world.restart_consumer(0);
            let listing = world.providers[0].listing.clone();
            world.consumers[0].role.as_mut().unwrap().learn(&listing);
            world.tick_consumer(0);
        }
        world.run_ms(days * 24 * 3_600_000);
        let asked = world.consumers[0].role.as_ref().unwrap().counters().refunds_asked_again;
        assert!(asked <= 40, "{asked} times in {days} days");
        // Now the provider has outbound money.
        let (a, b) = (world.providers[0].purse.lightning, world.consumers[0].purse.lightning);
        world.net.add_channel(a, b, 100_000, Msat::ZERO);
        world.providers[0].endowment = world.providers[0].endowment.saturating_add(Msat::sat(100_000));
        world.run_ms(25 * 3_600_000);
        let totals = world.audit_consumer(0).as_consumer;
        let paid = if days <= 30 { totals.paid_msat - totals.charged_msat } else { 0 };
        assert_eq!(totals.refunded_msat, paid, "after {days} days");
        assert_eq!(world.audit_provider(0).as_provider.refunded_msat, paid);
        assert_eq!(world.providers[0].journal.count("credit-note"), 1, "one note, however often it is asked");
        let left = world.consumers[0].role.as_ref().unwrap().exposure();
        assert_eq!(left.is_zero(), paid > 0, "{left}");
        world.assert_quiet();
        world.assert_agree(0, 0);
    }
}

#[test]
fn an_idle_session_is_closed_and_its_balance_comes_back() {
    let mut options = Options::default();
    options.consumer.refund_idle = true;
    options.consumer.slices.first = Msat::sat(100);
    let mut world = World::new(options, 1, 1);
    let (a, b) = (world.providers[0].purse.lightning, world.consumers[0].purse.lightning);
    world.net.add_channel(a, b, 100_000, Msat::ZERO);
    world.providers[0].endowment = Msat::sat(100_000);
    world.submit(0, Ask::tokens(30, 60));
    world.finish_calls(60_000);
    world.run_ms(4 * 60_000);
    assert_eq!(world.consumers[0].journal.count("close"), 0, "not idle for long enough");
    world.run_ms(2 * 60_000);
    let totals = world.audit_consumer(0).as_consumer;
    assert_eq!(totals.refunded_msat, totals.paid_msat - totals.charged_msat);
    assert_eq!(world.consumers[0].role.as_ref().unwrap().exposure(), Msat::ZERO);
    let next = world.submit(0, Ask::tokens(30, 60));
    world.finish_calls(60_000);
    assert_undisturbed(&world, world.call(0, next));
    world.assert_quiet();
    world.assert_agree(0, 0);
}

#[test]
fn a_close_survives_deaths_on_both_sides() {
    for ms in (0..30).map(|i| i * 7) {
        let mut options = Options { seed: ms, ..Options::default() };
        options.consumer.slices.first = Msat::sat(100);
        let mut world = World::new(options, 1, 1);
        let (a, b) = (world.providers[0].purse.lightning, world.consumers[0].purse.lightning);
        world.net.add_channel(a, b, 100_000, Msat::ZERO);
        world.providers[0].endowment = Msat::sat(100_000);
        world.submit(0, Ask::tokens(30, 60));
        world.finish_calls(60_000);
        world.close_all(0);
        world.run_ms(ms);
        strike(&mut world, ms);
        for _ in 0..4 {
            world.run_ms(60_000);
            world.close_all(0);
        }
        world.run_ms(60_000);
        let totals = world.audit_consumer(0).as_consumer;
        let notes = world.consumers[0].journal.count("credit-note");
        let back = totals.refunded_msat == totals.paid_msat - totals.charged_msat;
        assert!(back || notes > 0, "died {ms} ms after the close: neither refunded nor owed");
        world.assert_quiet();
        world.assert_agree(0, 0);
        let due =
            world.providers[0].journal.books().accounts().filter(|(a, _)| matches!(a, Account::RefundsDue(_))).count();
        assert!(due <= 1);
    }
}
