//! Processes that die, at any moment, and journals that cannot be written.

use super::assert_undisturbed;
use satgrid_ledger::entry::Evidence;
use satgrid_node::consumer::CallError;
use satgrid_tests::world::{Ask, Options, World};
use satgrid_types::{PaymentHash, node_key};
use satgrid_wallet::fake::{Crash, Fault};
use std::collections::BTreeMap;

const HARD: Crash = Crash { lose_rows_ms: 5_000, close_channels: false };

fn settled(world: &World) -> BTreeMap<PaymentHash, u32> {
    let mut counts = BTreeMap::new();
    for entry in world.consumers[0].journal.entries() {
        if let Some(Evidence::PaymentSettled { payment_hash, .. }) = &entry.evidence {
            *counts.entry(*payment_hash).or_insert(0) += 1;
        }
    }
    counts
}

#[test]
fn a_consumer_that_dies_under_a_payment_pays_it_once() {
    for ms in (0..24).map(|i| 20 + i * 23) {
        let mut world = World::new(Options { seed: ms, ..Options::default() }, 1, 1);
        world.net.script(world.consumers[0].purse.lightning, [Fault::Delay { ms: 400 }]);
        world.submit(0, Ask::tokens(30, 200));
        world.run_ms(ms);
        world.crash_consumer(0, HARD);
        world.run_ms(3_000);
        world.restart_consumer(0);
        world.run_ms(200_000);
        let after = world.submit(0, Ask::tokens(12, 40));
        world.finish_calls(60_000);
        assert_undisturbed(&world, world.call(0, after));
        assert!(settled(&world).values().all(|n| *n == 1), "died at {ms} ms");
        world.assert_quiet();
        world.assert_agree(0, 0);
    }
}

#[test]
fn a_consumer_that_dies_under_streams_meets_its_provider_again() {
    for ms in (0..24).map(|i| 400 + i * 61) {
        let mut world = World::new(Options { seed: ms, ..Options::default() }, 1, 1);
        for i in 0..3 {
            world.submit(0, Ask::tokens(30 + i, 150 + 40 * i));
        }
        world.run_ms(ms);
        world.crash_consumer(0, HARD);
        world.run_ms(1_000);
        world.restart_consumer(0);
        world.run_ms(2_000);
        let after = world.submit(0, Ask::tokens(12, 40));
        world.finish_calls(60_000);
        assert_undisturbed(&world, world.call(0, after));
        assert_eq!(world.consumers[0].role.as_ref().unwrap().counters().lost_sessions, 0, "died at {ms} ms");
        world.run_ms(200_000);
        world.assert_quiet();
        world.assert_agree(0, 0);
    }
}

/// The provider comes back, the session goes on, and the next call is as any other.
#[track_caller]
fn assert_meets_again(world: &mut World, how: &str) {
    world.run_ms(4_000);
    world.restart_provider(0);
    world.run_ms(16_000);
    let after = world.submit(0, Ask::tokens(12, 40));
    world.finish_calls(60_000);
    assert_undisturbed(world, world.call(0, after));
    assert_eq!(world.consumers[0].role.as_ref().unwrap().counters().lost_sessions, 0, "{how}");
    world.assert_quiet();
    world.assert_agree(0, 0);
}

#[test]
fn a_provider_that_dies_meets_its_consumer_again() {
    for ms in (0..40).map(|i| 300 + i * 41) {
        let mut world = World::new(Options { seed: ms, ..Options::default() }, 1, 1);
        for i in 0..4 {
            world.submit(0, Ask::tokens(30 + i, 100 + 40 * i));
        }
        world.run_ms(ms);
        world.crash_provider(0, HARD);
        assert_meets_again(&mut world, &format!("died at {ms} ms"));
    }
}

/// Receipts are offered before the one that they name is on the provider's disk: what a crash takes, its consumer brings back.
#[test]
fn a_provider_that_dies_ahead_of_its_disk_gets_its_receipts_back() {
    let mut most = 0;
    for ms in (0..30).map(|i| 300 + i * 41) {
        let options = Options { seed: ms, latency_ms: (1, 2), journal_ms: (10, 90), ..Options::default() };
        let mut world = World::new(options, 1, 1);
        for i in 0..12 {
            world.submit(0, Ask::tokens(20 + i, 2));
        }
        world.run_ms(ms);
        world.crash_provider(0, HARD);
        let (signed, kept) = (world.consumers[0].journal.count("receipt"), world.providers[0].journal.count("receipt"));
        most = most.max(signed - kept);
        assert_meets_again(&mut world, &format!("died at {ms} ms"));
    }
    // One of them may be the consumer's alone, as before.
    assert!(most >= 3, "at most {most} receipts were brought back at once");
}

#[test]
fn session_keys_are_found_again_whatever_failed_before() {
    let mut world = World::new(Options::default(), 3, 1);
    // Sessions that never open take up indices while others open.
    world.crash_provider(0, Crash::default());
    world.submit(0, Ask::tokens(10, 10));
    world.submit(0, Ask::tokens(10, 10).to(&[1]));
    world.submit(0, Ask::tokens(10, 10).to(&[2]));
    world.finish_calls(60_000);
    world.crash_consumer(0, HARD);
    world.run_ms(100);
    world.restart_consumer(0);
    world.run_ms(20_000);
    let calls = [world.submit(0, Ask::tokens(10, 10).to(&[1])), world.submit(0, Ask::tokens(10, 10).to(&[2]))];
    world.finish_calls(60_000);
    calls.iter().for_each(|call| assert_undisturbed(&world, world.call(0, *call)));
    assert_eq!(world.consumers[0].journal.count("open"), 2, "both sessions were taken up again");
    world.restart_provider(0);
    let first = world.submit(0, Ask::tokens(10, 10));
    world.finish_calls(60_000);
    assert_undisturbed(&world, world.call(0, first));
    world.assert_quiet();
}

#[test]
fn a_provider_whose_journal_fails_promises_nothing_more() {
    let mut world = World::new(Options::default(), 2, 1);
    let call = world.submit(0, Ask::tokens(50, 600).to(&[0, 1]));
    world.run_while("tokens flow", 20_000, |w| w.call(0, call).tokens.len() < 200);
    world.providers[0].journal.broken = true;
    world.finish_calls(60_000);
    assert_undisturbed(&world, world.call(0, call));
    assert!(world.providers[0].halted.is_some());
    // What it signed after that is nothing: the consumer's last ack of it is one that it had.
    let first = &world.call(0, call).bill().legs[0];
    assert!(first.receipt.is_none());
    world.assert_agree(1, 0);
    let refused = world.submit(0, Ask::tokens(5, 5));
    world.finish_calls(60_000);
    assert!(!world.call(0, refused).is_ok());
}

#[test]
fn a_node_whose_disk_is_nearly_full_ends_what_runs_and_takes_nothing_new_until_there_is_room() {
    let mut world = World::new(Options::default(), 2, 1);
    let why = || Some("12 MiB are free".to_owned());
    let call = world.submit(0, Ask::tokens(50, 600));
    world.run_while("tokens flow", 20_000, |w| w.call(0, call).tokens.len() < 100);
    // The provider: the stream goes on to its end and is paid for, the next call goes elsewhere.
    world.pause_provider(0, why());
    let next = world.submit(0, Ask::tokens(30, 60).to(&[0, 1]));
    world.finish_calls(60_000);
    assert_undisturbed(&world, world.call(0, call));
    assert!(world.call(0, call).bill().legs[0].receipt.is_some());
    assert_undisturbed(&world, world.call(0, next));
    assert_eq!(world.call(0, next).bill().legs[0].provider, node_key(&world.providers[1].key));
    let invoices = world.providers[0].journal.count("invoice");
    let alone = world.submit(0, Ask::tokens(30, 60));
    world.finish_calls(60_000);
    assert!(matches!(world.call(0, alone).error(), CallError::ProvidersFailed { .. }));
    assert_eq!(world.providers[0].journal.count("invoice"), invoices, "no money is taken for work that is not begun");
    world.pause_provider(0, None);
    world.run_ms(20_000);
    let again = world.submit(0, Ask::tokens(30, 60));
    world.finish_calls(60_000);
    assert_undisturbed(&world, world.call(0, again));
    // The consumer.
    let call = world.submit(0, Ask::tokens(50, 600));
    world.run_while("tokens flow", 20_000, |w| w.call(0, call).tokens.len() < 100);
    world.pause_consumer(0, why());
    let refused = world.submit(0, Ask::tokens(5, 5));
    assert!(matches!(world.call(0, refused).error(), CallError::Paused { .. }));
    world.finish_calls(60_000);
    assert_undisturbed(&world, world.call(0, call));
    world.pause_consumer(0, None);
    let again = world.submit(0, Ask::tokens(30, 60));
    world.finish_calls(60_000);
    assert_undisturbed(&world, world.call(0, again));
    world.assert_quiet();
    world.assert_agree(0, 0);
}

#[test]
fn a_consumer_whose_journal_fails_signs_and_pays_nothing_more() {
    let mut world = World::new(Options::default(), 1, 1);
    let call = world.submit(0, Ask::tokens(50, 2_000));
    world.run_while("tokens flow", 20_000, |w| w.call(0, call).tokens.len() < 200);
    let paid = world.consumers[0].journal.count("payment-attempted");
    world.consumers[0].journal.broken = true;
    world.finish_calls(60_000);
    assert!(matches!(world.call(0, call).error(), CallError::Journal { .. }));
    assert!(!world.call(0, call).bill().legs.is_empty(), "the bill says what was signed for");
    let refused = world.submit(0, Ask::tokens(5, 5));
    assert!(matches!(world.call(0, refused).error(), CallError::Journal { .. }));
    world.run_ms(60_000);
    assert_eq!(world.consumers[0].journal.count("payment-attempted"), paid);
    // The disk has room again: a restart takes everything up.
    world.crash_consumer(0, Crash::default());
    world.consumers[0].journal.broken = false;
    world.restart_consumer(0);
    world.run_ms(20_000);
    let after = world.submit(0, Ask::tokens(12, 40));
    world.finish_calls(60_000);
    assert_undisturbed(&world, world.call(0, after));
    world.assert_quiet();
    world.assert_agree(0, 0);
}
