//! The provider's log as its consumer watches it: promises, tree heads, proofs, and providers that lie about them.

use super::assert_undisturbed;
use satgrid_ledger::log::{FraudProof, SignedCheckpoint};
use satgrid_node::consumer::{ConsumerConfig, ConsumerEvent};
use satgrid_tests::world::{Ask, Cheat, Options, World};
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

/// A head of another log is followed by one of the right log before its question is answered, and then the connection breaks:
/// the proof is owed all the same.
#[test]
fn a_head_that_the_next_one_overtakes_is_still_to_be_proved() {
    let mut world = promised();
    world.sign_head(0, |root| root);
    world.run_ms(2_000);
    let grow = |world: &mut World| {
        world.submit(0, Ask::tokens(20, 100));
        world.finish_calls(60_000);
        world.run_ms(2_000);
    };
    world.providers[0].cheat = Cheat::NoProofs;
    grow(&mut world);
    world.sign_head(0, |_| Digest([7; 32]));
    world.run_ms(2_000);
    grow(&mut world);
    world.sign_head(0, |root| root);
    world.run_ms(2_000);
    assert!(world.consumers[0].journal.misbehaviour().is_empty());
    world.break_links(0, 0);
    world.providers[0].cheat = Cheat::None;
    grow(&mut world);
    world.sign_head(0, |root| root);
    world.run_ms(2_000);
    assert_eq!(world.consumers[0].journal.misbehaviour(), ["log-inconsistent"]);
}

/// A relay has a head of a size that the provider never told us: the provider must join it to its log.
#[test]
fn a_head_that_others_heard_is_to_be_proved_too() {
    let mut world = promised();
    let key = world.providers[0].key.clone();
    let heard = |world: &mut World, size: u64, root: Digest| {
        let head = Box::new(SignedCheckpoint::sign(size, root, &key));
        let now = world.now;
        world.consumers[0].role.as_mut().unwrap().handle(now, ConsumerEvent::OthersHead(head));
        world.settle();
        world.run_ms(2_000);
    };
    world.sign_head(0, |root| root);
    world.run_ms(2_000);
    // The first entry alone, of this log.
    let first = world.providers[0].journal.entries()[0].leaf();
    heard(&mut world, 1, first);
    assert!(world.consumers[0].journal.misbehaviour().is_empty());
    heard(&mut world, 2, Digest([7; 32]));
    assert_eq!(world.consumers[0].journal.misbehaviour(), ["log-inconsistent"]);
}

/// A world whose consumer gives its provider so long to speak about its log.
fn impatient(cheat: Cheat) -> World {
    let consumer = ConsumerConfig { log_ms: 60_000, ..ConsumerConfig::default() };
    let mut world = World::new(Options { consumer, ..Options::default() }, 1, 1);
    world.providers[0].cheat = cheat;
    let call = world.submit(0, Ask::tokens(40, 300));
    world.finish_calls(60_000);
    assert_undisturbed(&world, world.call(0, call));
    world.run_ms(2_000);
    world
}

#[test]
fn a_provider_that_is_silent_about_its_log_is_found_by_its_deadline() {
    // No promise, no head over a promise, no answer to a question: each has a name in the ledger, and the provider is left.
    for (cheat, signs, rule) in [
        (Cheat::NoPromises, false, "promise-overdue"),
        (Cheat::None, false, "log-silent"),
        (Cheat::NoProofs, true, "log-silent"),
    ] {
        let mut world = impatient(cheat);
        if signs {
            world.sign_head(0, |root| root);
        }
        world.run_ms(50_000);
        assert!(world.consumers[0].journal.misbehaviour().is_empty(), "{cheat:?}: not yet");
        world.run_ms(15_000);
        assert_eq!(world.consumers[0].journal.misbehaviour(), [rule], "{cheat:?}");
        assert_eq!(world.consumers[0].penalised.len(), 1, "{cheat:?}");
        let now = world.now;
        assert_eq!(world.consumers[0].role.as_ref().unwrap().shunned(now).count(), 1, "{cheat:?}");
    }
    // One that speaks is left in peace.
    let mut world = impatient(Cheat::None);
    world.sign_head(0, |root| root);
    world.run_ms(120_000);
    assert!(world.consumers[0].journal.misbehaviour().is_empty());
}

#[test]
fn a_clock_that_was_moved_accuses_nobody() {
    // It owes a promise. Our clock is set ahead by more than the wait for it, or this machine sleeps for so long.
    let mut world = impatient(Cheat::NoPromises);
    let now = world.now;
    let ahead = now.plus_ms(65_000);
    let role = world.consumers[0].role.as_mut().unwrap();
    role.handle(ahead, ConsumerEvent::ClockMoved);
    role.handle(ahead.plus_ms(30_000), ConsumerEvent::Tick);
    world.settle();
    assert!(world.consumers[0].journal.misbehaviour().is_empty());
    // And set right: it has its whole time again, and no more than that.
    world.consumers[0].role.as_mut().unwrap().handle(now, ConsumerEvent::ClockMoved);
    world.run_ms(50_000);
    assert!(world.consumers[0].journal.misbehaviour().is_empty());
    world.run_ms(15_000);
    assert_eq!(world.consumers[0].journal.misbehaviour(), ["promise-overdue"]);
}

#[test]
fn two_histories_that_others_heard_are_kept_once_even_of_a_provider_without_a_session() {
    let mut world = World::new(Options::default(), 1, 1);
    let key = world.providers[0].key.clone();
    let note = |byte: u8| SignedCheckpoint::sign(9, Digest([byte; 32]), &key).note().to_owned();
    let proof = FraudProof { one: note(1), other: note(2) };
    let now = world.now;
    for _ in 0..3 {
        // A relay repeats what it has.
        let role = world.consumers[0].role.as_mut().unwrap();
        role.handle(now, ConsumerEvent::SecondHistory(Box::new(proof.clone())));
        world.settle();
    }
    world.run_ms(1_000);
    assert_eq!(world.consumers[0].journal.misbehaviour(), ["two-histories"]);
    assert_eq!(world.consumers[0].role.as_ref().unwrap().shunned(now).count(), 1);
    // Signed by somebody else, or the same root: it proves nothing.
    let same = FraudProof { one: note(3), other: note(3) };
    world.consumers[0].role.as_mut().unwrap().handle(now, ConsumerEvent::SecondHistory(Box::new(same)));
    world.run_ms(1_000);
    assert_eq!(world.consumers[0].journal.misbehaviour().len(), 1);
}
