//! Credit notes spent in later sessions: before new money, once, and over deaths on either side.

use super::{assert_undisturbed, strike};
use satgrid_ledger::Account;
use satgrid_tests::world::{Ask, Options, World};
use satgrid_types::Msat;

/// A world in which a session was closed and its remainder could not be paid back: it stands in a note.
fn owed(seed: u64) -> World {
    let mut options = Options { seed, ..Options::default() };
    options.consumer.slices.first = Msat::sat(100);
    options.consumer.first_routed = Msat::sat(100);
    let mut world = World::new(options, 1, 1);
    world.submit(0, Ask::tokens(30, 60));
    world.finish_calls(60_000);
    world.close_all(0);
    world.run_ms(10_000);
    assert_eq!(world.consumers[0].journal.count("credit-note"), 1);
    world
}

fn transfers(world: &World) -> (usize, usize) {
    (world.providers[0].journal.count("credit-transfer"), world.consumers[0].journal.count("credit-transfer"))
}

#[test]
fn what_is_owed_is_spent_before_new_money_is_sent() {
    let mut world = owed(1);
    let before = world.consumers[0].role.as_ref().unwrap().exposure();
    assert!(!before.is_zero());
    let call = world.submit(0, Ask::tokens(30, 60));
    world.finish_calls(60_000);
    assert_undisturbed(&world, world.call(0, call));
    assert_eq!(transfers(&world), (1, 1));
    assert_eq!(world.consumers[0].journal.count("payment-attempted"), 1, "the second session cost nothing new");
    let role = world.consumers[0].role.as_ref().unwrap();
    assert_eq!(role.counters().notes_spent, 1);
    assert_eq!(role.exposure(), before.saturating_sub(world.call(0, call).bill().cost()));
    world.assert_quiet();
    world.assert_agree(0, 0);
    // Once it is used up, slices are paid as ever, and the old session asks for nothing more.
    let call = world.submit(0, Ask::tokens(30, 3_000));
    world.finish_calls(120_000);
    assert_undisturbed(&world, world.call(0, call));
    world.run_ms(3 * 24 * 3_600_000);
    assert_eq!(world.consumers[0].role.as_ref().unwrap().counters().refunds_asked_again, 0);
    assert_eq!(transfers(&world), (1, 1));
    world.assert_quiet();
    world.assert_agree(0, 0);
}

#[test]
fn a_remainder_that_credit_left_is_owed_and_spent_again() {
    let mut world = owed(2);
    for n in 2..5 {
        let call = world.submit(0, Ask::tokens(30, 60));
        world.finish_calls(60_000);
        assert_undisturbed(&world, world.call(0, call));
        assert_eq!(transfers(&world), (n - 1, n - 1));
        world.close_all(0);
        world.run_ms(10_000);
        assert_eq!(world.consumers[0].journal.count("credit-note"), n);
    }
    assert_eq!(world.consumers[0].journal.count("payment-attempted"), 1);
    let books = world.providers[0].journal.books();
    let due = |account: &&Account| matches!(account, Account::RefundsDue(_)) && books.balance(account) != 0;
    assert_eq!(books.accounts().map(|(account, _)| account).filter(due).count(), 1, "of the last session alone");
    world.assert_quiet();
    world.assert_agree(0, 0);
}

#[test]
fn a_note_is_spent_once_whoever_dies_when() {
    let mut spent_unheard = 0;
    for ms in (0..96).map(|i| i * 4) {
        let mut world = owed(ms);
        world.submit(0, Ask::tokens(30, 60));
        world.run_ms(ms);
        spent_unheard += usize::from(transfers(&world) == (1, 0));
        strike(&mut world, ms / 4);
        world.finish_calls(120_000);
        // A provider whose connection was lost is left alone for a quarter of a minute.
        world.run_ms(20_000);
        let call = world.submit(0, Ask::tokens(30, 60));
        world.finish_calls(120_000);
        assert_undisturbed(&world, world.call(0, call));
        assert_eq!(transfers(&world), (1, 1), "died {ms} ms after the call");
        world.assert_quiet();
        world.assert_agree(0, 0);
    }
    assert!(spent_unheard > 0, "some died between the provider's word and the consumer's ear");
}
