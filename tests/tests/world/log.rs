//! The provider's log as its consumer watches it: promises, tree heads, proofs, and providers that lie about them.

use super::assert_undisturbed;
use satgrid_tests::world::{Ask, Options, World};
use satgrid_types::Digest;

/// A world in which one call was paid, receipted and promised.
fn promised() -> World {
    let mut world = World::new(Options::default(), 1, 1);
    let call = world.submit(0, Ask::tokens(40, 300));
    world.finish_calls(60_000);
    assert_undisturbed(&world, world.call(0, call));
    world.run_ms(2_000);
    world
}

#[test]
fn each_receipt_comes_with_a_promise_that_the_log_keeps() {
    let mut world = promised();
    assert_eq!(world.consumers[0].journal.count("promise"), 1);
    world.sign_head(0, |root| root);
    world.run_ms(2_000);
    let counters = *world.consumers[0].role.as_ref().unwrap().counters();
    assert_eq!((counters.promises, counters.promises_kept), (1, 1));
    // The log grows, and shows that it only grew.
    for _ in 0..3 {
        world.submit(0, Ask::tokens(20, 100));
        world.finish_calls(60_000);
        world.run_ms(2_000);
        world.sign_head(0, |root| root);
        world.run_ms(2_000);
    }
    let counters = *world.consumers[0].role.as_ref().unwrap().counters();
    assert_eq!((counters.promises, counters.promises_kept, counters.misbehaviour), (4, 4, 0));
    world.assert_quiet();
    // The audits hold the promises against the provider's log.
    world.assert_agree(0, 0);
}

#[test]
fn two_histories_are_found_and_kept_as_a_proof_that_verify_judges() {
    let mut world = promised();
    world.sign_head(0, |root| root);
    world.run_ms(2_000);
    assert!(world.consumers[0].journal.misbehaviour().is_empty());
    world.sign_head(0, |_| Digest([7; 32]));
    world.run_ms(2_000);
    assert_eq!(world.consumers[0].journal.misbehaviour(), ["two-histories"]);
    let kept = world.consumers[0].journal.entries().iter().find_map(|entry| match &entry.evidence {
        Some(satgrid_ledger::Evidence::Misbehaviour { statement, .. }) => Some(statement.clone()),
        _ => None,
    });
    match satgrid_ledger::bundle::open(kept.unwrap().as_slice()).unwrap() {
        satgrid_ledger::bundle::Opened::Fraud(proof) => {
            assert_eq!(proof.check(), Ok(satgrid_types::node_key(&world.providers[0].key)));
        }
        satgrid_ledger::bundle::Opened::Journal(_) | satgrid_ledger::bundle::Opened::Claim(_) => {
            panic!("a fraud proof was expected")
        }
    }
}

#[test]
fn a_head_without_the_promised_receipt_or_of_another_log_is_found() {
    // The first head is already a lie: the promised receipt cannot be proved in it.
    let mut world = promised();
    world.sign_head(0, |_| Digest([7; 32]));
    world.run_ms(2_000);
    assert_eq!(world.consumers[0].journal.misbehaviour(), ["promise-broken"]);
    // A later one is: the log does not extend what was shown before.
    let mut world = promised();
    world.sign_head(0, |root| root);
    world.run_ms(2_000);
    world.submit(0, Ask::tokens(20, 100));
    world.finish_calls(60_000);
    world.run_ms(2_000);
    world.sign_head(0, |_| Digest([7; 32]));
    world.run_ms(2_000);
    assert_eq!(world.consumers[0].journal.misbehaviour(), ["log-inconsistent"]);
}
