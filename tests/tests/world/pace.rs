//! Payments that keep up with the engine, and what that costs in exposure.

use super::assert_undisturbed;
use satgrid_ledger::{Account, Entry, Evidence, TransferOp};
use satgrid_node::consumer::CallId;
use satgrid_tests::world::{Ask, Options, World};
use satgrid_types::{Msat, node_key};
use satgrid_wallet::{fake::Fault, port::FailureReason};

/// A market in which the engine makes so many tokens in 10 ms, and a payment takes so long.
fn market(tokens_per_step: u32, payment_ms: u64) -> Options {
    let mut options = Options { latency_ms: (5, 5), journal_ms: (1, 3), ..Options::default() };
    options.wallet.delay_ms = (payment_ms, payment_ms);
    options.toy.slots = tokens_per_step;
    options.consumer.session_cap = Msat::sat(1_000_000);
    options
}

/// Keeps so many calls open until so many have ended; how long that took, in ms.
fn keep_busy(world: &mut World, streams: usize, calls: usize, output: u32) -> u64 {
    let began = world.now;
    let mut made: Vec<CallId> = Vec::new();
    while made.len() < calls {
        made.push(world.submit(0, Ask::tokens(30, output)));
        world.run_while("a place is free", 600_000, |w| w.open_calls() >= streams);
    }
    world.run_while("every call ends", 600_000, |w| w.open_calls() > 0);
    made.iter().for_each(|call| assert_undisturbed(world, world.call(0, *call)));
    world.now.since(began)
}

fn delivered(world: &World) -> Msat {
    let key = node_key(&world.providers[0].key);
    world.consumers[0].role.as_ref().map_or(Msat::ZERO, |role| role.settled_with(&key))
}

/// The time of the same calls where everything was prepaid long ago, and the time where slices are paid as they fall due.
#[test]
fn a_fast_engine_does_not_wait_for_payments_once_value_is_proven() {
    // (tokens in 10 ms, ms a payment takes, streams, calls, output of each)
    for (step, payment, streams, calls, output) in [
        (2, 80, 1, 12, 128),
        (2, 500, 1, 12, 128),
        (2, 500, 1, 2, 1_200),
        (2, 1_800, 4, 16, 128),
        (30, 80, 12, 36, 200),
        (30, 500, 12, 60, 200),
    ] {
        let rate = u64::from(step) * 100 * 20;
        let mut world = World::new(market(step, payment), 1, 1);
        // Fifteen payment times of work: then a tenth of what is proven covers one and a half.
        let enough = Msat(rate * (payment + 100) / 1_000 * 20);
        while delivered(&world) < enough {
            keep_busy(&mut world, streams, streams, output);
        }
        let before = world.consumers[0].journal.count("payment-settled");
        let took = keep_busy(&mut world, streams, calls, output);
        let slices = world.consumers[0].journal.count("payment-settled") - before;

        let mut rich = market(step, payment);
        rich.consumer.slices.first = Msat::sat(5_000);
        rich.consumer.first_routed = Msat::sat(5_000);
        let mut ideal = World::new(rich, 1, 1);
        keep_busy(&mut ideal, 1, 1, 10);
        let least = keep_busy(&mut ideal, streams, calls, output);

        let what = format!("{step} tokens a step, payments of {payment} ms, {streams} streams");
        let what = format!("{what}: {took} ms instead of {least} ms, {slices} slices");
        assert!(slices >= 2, "nothing was measured: {what}");
        assert!(took * 97 <= least * 100, "{what}");
        world.run_ms(5_000);
        world.assert_quiet();
        world.assert_agree(0, 0);
    }
}

/// What a provider of the usual kind may hold is what it was before speed was measured.
#[test]
fn a_slow_engine_is_prepaid_no_more_than_before() {
    let mut world = World::new(market(1, 300), 1, 1);
    world.providers[0].step_ms = 25;
    let mut most = Msat::ZERO;
    let mut watch = |world: &World| {
        most = most.max(world.consumers[0].role.as_ref().unwrap().exposure());
    };
    for _ in 0..20 {
        let call = world.submit(0, Ask::tokens(30, 200));
        world.run_while("the call ends", 600_000, |w| {
            watch(w);
            w.call(0, call).end.is_none()
        });
    }
    // What the fixed figures of old (50 tokens/s, 500 ms) made of the same calls.
    assert_eq!(most, Msat(14_862));
}

/// What was attempted, in order, and whether it failed.
fn attempted(world: &World) -> Vec<(Msat, bool)> {
    let entries = world.consumers[0].journal.entries();
    let of_failure = |entry: &Entry| match entry.evidence {
        Some(Evidence::PaymentFailed { payment_hash, .. }) => Some(payment_hash),
        Some(_) | None => None,
    };
    let failed = |hash| entries.iter().filter_map(of_failure).any(|failed| failed == hash);
    let mut all = Vec::new();
    for entry in entries {
        let Some(Evidence::PaymentAttempted { payment_hash, .. }) = entry.evidence else { continue };
        let amount = entry.transfers.iter().find_map(|transfer| {
            let TransferOp::Pending { debit: Account::PrepaidAsset(_), amount, .. } = transfer.op else { return None };
            Some(amount)
        });
        all.push((amount.unwrap(), failed(payment_hash)));
    }
    all
}

/// What a route carries is learnt from payments that fail: the next slice is half, and it grows again once that passes.
#[test]
fn a_slice_that_its_route_does_not_carry_is_tried_at_half() {
    let mut world = World::new(market(30, 500), 1, 1);
    while delivered(&world) < Msat::sat(2_000) {
        keep_busy(&mut world, 12, 24, 200);
    }
    let before = attempted(&world).len();
    let fail = Fault::Fail(FailureReason::RetriesExhausted);
    world.net.script(world.consumers[0].purse.lightning, [fail, fail]);
    keep_busy(&mut world, 12, 36, 200);
    let all = attempted(&world);
    let (tried, later) = all[before..].split_at(3);
    let [(first, true), (second, true), (third, false)] = tried else { panic!("{tried:?}") };
    let floor = Msat::sat(10);
    assert!(*first > Msat(4 * floor.0), "there is something to halve: {first}");
    assert!(second.0 <= first.0 / 2 && third.0 <= (second.0 / 2).max(floor.0), "{tried:?}");
    let most = later.iter().map(|(amount, _)| amount.0).max().unwrap();
    assert!(most > third.0, "it grows again: {later:?}");
    assert!(later.iter().all(|(_, failed)| !failed));
    world.run_ms(60_000);
    world.assert_quiet();
    world.assert_agree(0, 0);
}
