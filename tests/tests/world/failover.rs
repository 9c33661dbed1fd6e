//! Providers, engines and connections that go away under a stream.

use super::assert_undisturbed;
use satgrid_node::consumer::CallError;
use satgrid_tests::world::{Ask, Cheat, Options, World, oracle::undisturbed};
use satgrid_types::node_key;

#[test]
fn the_second_provider_goes_on_where_the_first_died() {
    for tokens in [1, 60, 130, 400] {
        let mut world = World::new(Options::default(), 2, 1);
        let call = world.submit(0, Ask::tokens(50, 600).to(&[0, 1]));
        world.run_while("tokens flow", 20_000, |w| w.call(0, call).tokens.len() < tokens);
        world.crash_provider(0, Default::default());
        world.finish_calls(60_000);
        let log = world.call(0, call);
        assert_undisturbed(&world, log);
        let legs = &log.bill().legs;
        let second = legs.last().unwrap();
        assert_eq!(second.provider, node_key(&world.providers[1].key));
        // The prefix is input at the second provider; each output token is output once.
        assert_eq!(second.usage.prompt + second.usage.completion, 650);
        let billed: u64 = legs.iter().map(|leg| leg.cost.0).sum();
        assert_eq!(world.audit_consumer(0).as_consumer.charged_msat, billed);
        world.assert_agree(1, 0);
    }
}

#[test]
fn when_every_provider_died_the_bill_stands_at_the_last_acks() {
    let mut world = World::new(Options::default(), 2, 1);
    let call = world.submit(0, Ask::tokens(50, 1_000).to(&[0, 1]));
    world.run_while("tokens flow", 20_000, |w| w.call(0, call).tokens.len() < 300);
    world.crash_provider(0, Default::default());
    world.run_while("the second goes on", 20_000, |w| w.call(0, call).tokens.len() < 600);
    world.crash_provider(1, Default::default());
    world.finish_calls(60_000);
    let log = world.call(0, call);
    assert!(matches!(log.error(), CallError::ProvidersFailed { .. }), "{:?}", log.end);
    assert_eq!(log.tokens, undisturbed(&world.options.toy, &log.prompt, 1_000, None)[..log.tokens.len()]);
    assert_eq!(log.bill().legs.len(), 2);
    assert!(log.bill().legs.iter().all(|leg| leg.receipt.is_none()));
    assert_eq!(world.audit_consumer(0).as_consumer.charged_msat, log.bill().cost().0);
}

#[test]
fn without_fallbacks_a_dead_provider_is_an_error() {
    let mut world = World::new(Options::default(), 2, 1);
    let mut ask = Ask::tokens(50, 600).to(&[0, 1]);
    ask.allow_fallbacks = false;
    let call = world.submit(0, ask);
    world.run_while("tokens flow", 20_000, |w| w.call(0, call).tokens.len() < 100);
    world.crash_provider(0, Default::default());
    world.finish_calls(60_000);
    assert!(matches!(world.call(0, call).error(), CallError::ProvidersFailed { .. }));
    assert_eq!(world.consumers[0].journal.count("open"), 1);
}

#[test]
fn a_dead_engine_ends_its_requests_with_receipts_and_they_go_elsewhere() {
    let mut world = World::new(Options::default(), 2, 1);
    let calls: Vec<_> = (0..3).map(|i| world.submit(0, Ask::tokens(50 + i, 600).to(&[0, 1]))).collect();
    world.run_while("tokens flow", 20_000, |w| calls.iter().any(|c| w.call(0, *c).tokens.len() < 100));
    world.kill_engine(0);
    world.run_ms(3_000);
    world.restart_engine(0);
    world.finish_calls(60_000);
    for call in calls {
        let log = world.call(0, call);
        assert_undisturbed(&world, log);
        assert_eq!(log.bill().legs.len(), 2);
        assert!(log.bill().legs.iter().all(|leg| leg.receipt.is_some()), "the node lives: every leg has its receipt");
    }
    world.assert_quiet();
    world.assert_agree(0, 0);
    // The engine is back: its node serves again, in the same session.
    let again = world.submit(0, Ask::tokens(9, 9));
    world.finish_calls(60_000);
    assert_undisturbed(&world, world.call(0, again));
    world.assert_quiet();
    world.assert_agree(0, 0);
}

#[test]
fn a_dead_engine_without_another_provider_is_an_error_with_a_receipt() {
    let mut world = World::new(Options::default(), 1, 1);
    let call = world.submit(0, Ask::tokens(50, 600));
    world.run_while("tokens flow", 20_000, |w| w.call(0, call).tokens.len() < 100);
    world.kill_engine(0);
    world.finish_calls(60_000);
    let log = world.call(0, call);
    assert!(matches!(log.error(), CallError::ProvidersFailed { .. }));
    assert_eq!(log.bill().legs[0].usage.completion as usize, log.tokens.len());
    assert!(log.bill().legs[0].receipt.is_some());
    world.assert_quiet();
    world.assert_agree(0, 0);
}

#[test]
fn a_broken_connection_is_resumed_and_both_sides_stand_at_the_same_figure() {
    // Broken at many moments, so that some break loses a countersignature on its way.
    for ms in (0..40).map(|i| 700 + i * 37) {
        let mut world = World::new(Options { seed: ms, ..Options::default() }, 1, 1);
        let calls: Vec<_> = (0..4).map(|i| world.submit(0, Ask::tokens(30 + i, 140 + 20 * i))).collect();
        world.run_ms(ms);
        world.break_links(0, 0);
        world.run_ms(20_000);
        let after = world.submit(0, Ask::tokens(12, 40));
        world.finish_calls(60_000);
        assert_undisturbed(&world, world.call(0, after));
        assert!(calls.iter().all(|call| world.call(0, *call).end.is_some()));
        assert_eq!(world.consumers[0].role.as_ref().unwrap().counters().lost_sessions, 0, "broken at {ms} ms");
        assert_eq!(world.consumers[0].journal.count("open"), 1, "broken at {ms} ms");
        world.assert_quiet();
        world.assert_agree(0, 0);
    }
}

#[test]
fn a_broken_stream_goes_on_under_its_own_request() {
    // Broken at many moments, for a moment and for a good while; once more while it is being resumed.
    for (i, ms) in (0..36).map(|i| (i, 500 + i * 41)) {
        let mut world = World::new(Options { seed: ms, ..Options::default() }, 2, 1);
        let calls: Vec<_> = (0..3).map(|i| world.submit(0, Ask::tokens(30 + 300 * i, 500 + i).to(&[0, 1]))).collect();
        world.run_ms(ms);
        world.break_links(0, 0);
        if i % 3 == 1 {
            world.providers[0].unreachable_until = world.now.plus_ms(2_500);
        }
        if i % 3 == 2 {
            world.run_ms(10 + i * 5);
            world.break_links(0, 0);
        }
        world.finish_calls(120_000);
        for call in &calls {
            let log = world.call(0, *call);
            assert_undisturbed(&world, log);
            assert_eq!(log.started.len(), 1, "broken at {ms} ms: it went on as the same request");
            assert_eq!(log.bill().legs.len(), 1);
            assert!(log.bill().legs[0].receipt.is_some(), "broken at {ms} ms");
        }
        let counters = *world.consumers[0].role.as_ref().unwrap().counters();
        assert_eq!((counters.failovers, counters.lost_sessions), (0, 0), "broken at {ms} ms");
        assert!(counters.resumed > 0 || ms < 1_200, "broken at {ms} ms: {counters:?}");
        world.assert_quiet();
        world.assert_agree(0, 0);
    }
}

/// The provider's disk is slower than the way to the consumer: what it says again waits for no entry, or the tokens that
/// its engine makes meanwhile come first, and an honest provider is taken for one that breaks a rule.
#[test]
fn a_slow_disk_does_not_put_what_is_said_again_out_of_order() {
    for ms in (0..24).map(|i| 900 + i * 57) {
        let slow = Options { seed: ms, latency_ms: (1, 3), journal_ms: (60, 200), ..Options::default() };
        let mut world = World::new(slow, 1, 1);
        let calls: Vec<_> = (0..3).map(|i| world.submit(0, Ask::tokens(30 + 300 * i, 500 + i))).collect();
        world.run_ms(ms);
        world.break_links(0, 0);
        world.finish_calls(120_000);
        for call in &calls {
            assert_undisturbed(&world, world.call(0, *call));
            assert_eq!(world.call(0, *call).bill().legs.len(), 1, "broken at {ms} ms");
        }
        assert_eq!(world.consumers[0].journal.count("misbehaviour"), 0, "broken at {ms} ms");
        world.assert_quiet();
        world.assert_agree(0, 0);
    }
}

#[test]
fn a_provider_that_stays_away_is_left_after_a_while_and_at_once_where_another_can_go_on() {
    // (seconds away, providers, legs): with another provider the call moves after 3 s, alone it waits for a minute.
    for (away_s, providers, legs, ok) in [(2, 2, 1, true), (10, 2, 2, true), (50, 1, 1, true), (90, 1, 1, false)] {
        let mut world = World::new(Options::default(), providers, 1);
        let all: Vec<usize> = (0..providers).collect();
        let call = world.submit(0, Ask::tokens(50, 600).to(&all));
        world.run_while("tokens flow", 20_000, |w| w.call(0, call).tokens.len() < 200);
        world.providers[0].unreachable_until = world.now.plus_ms(away_s * 1_000);
        world.break_links(0, 0);
        world.finish_calls(120_000);
        let log = world.call(0, call);
        assert_eq!(log.is_ok(), ok, "{away_s} s: {:?}", log.end);
        assert_eq!(log.bill().legs.len(), legs, "{away_s} s");
        if ok {
            assert_undisturbed(&world, log);
        }
        // Whatever became of it, the two meet again.
        world.run_ms(120_000);
        world.publish(0);
        let after = world.submit(0, Ask::tokens(12, 40));
        world.finish_calls(120_000);
        assert_undisturbed(&world, world.call(0, after));
        world.assert_quiet();
        world.assert_agree(0, 0);
    }
}

#[test]
fn nothing_runs_for_a_consumer_that_stays_away_and_its_slot_is_free_after_a_minute() {
    let mut world = World::new(Options::default(), 1, 1);
    let call = world.submit(0, Ask::tokens(50, 2_000));
    world.run_while("tokens flow", 20_000, |w| w.call(0, call).tokens.len() < 200);
    world.providers[0].unreachable_until = world.now.plus_ms(300_000);
    world.break_links(0, 0);
    world.run_ms(5_000);
    let (worked, most) = (world.providers[0].work.clone(), world.providers[0].role.as_ref().unwrap().exposure());
    assert_eq!(world.providers[0].role.as_ref().unwrap().open_requests(), 1, "held");
    world.run_ms(50_000);
    assert_eq!(world.providers[0].work, worked, "no work beyond the window, however long it is held");
    assert_eq!(world.providers[0].role.as_ref().unwrap().exposure(), most);
    world.run_ms(10_000);
    assert_eq!(world.providers[0].role.as_ref().unwrap().open_requests(), 0, "the hold is over");
    world.finish_calls(60_000);
    assert!(matches!(world.call(0, call).error(), CallError::ProvidersFailed { .. }));
}

/// Four streams fill the four slots, their consumer goes away, and another one comes: it does not wait for a minute.
#[test]
fn what_is_held_for_a_consumer_that_is_away_gives_way_to_one_that_is_here() {
    let mut world = World::new(Options::default(), 1, 2);
    let calls: Vec<_> = (0..4).map(|i| world.submit(0, Ask::tokens(50 + i, 2_000))).collect();
    world.run_while("tokens flow", 20_000, |w| calls.iter().any(|call| w.call(0, *call).tokens.len() < 100));
    world.crash_consumer(0, Default::default());
    world.run_ms(4_000);
    assert_eq!(world.providers[0].role.as_ref().unwrap().open_requests(), 4, "held");
    let begin = world.now;
    let other = world.submit(1, Ask::tokens(30, 100));
    world.finish_calls(60_000);
    assert_undisturbed(&world, world.call(1, other));
    let took = world.now.since(begin);
    assert!(took < 15_000, "served after {took} ms");
    world.restart_consumer(0);
    world.run_ms(5_000);
    let after = world.submit(0, Ask::tokens(12, 40));
    world.finish_calls(60_000);
    assert_undisturbed(&world, world.call(0, after));
    world.assert_quiet();
    world.assert_agree(0, 0);
    world.assert_agree(0, 1);
}

#[test]
fn a_client_that_leaves_while_its_stream_is_held_is_not_waited_for() {
    let mut world = World::new(Options::default(), 1, 1);
    let calls: Vec<_> = (0..2).map(|i| world.submit(0, Ask::tokens(50 + i, 600))).collect();
    world.run_while("tokens flow", 20_000, |w| calls.iter().any(|c| w.call(0, *c).tokens.len() < 100));
    world.providers[0].unreachable_until = world.now.plus_ms(4_000);
    world.break_links(0, 0);
    world.run_ms(1_000);
    world.cancel(0, calls[0]);
    assert!(matches!(world.call(0, calls[0]).error(), CallError::Cancelled));
    world.finish_calls(60_000);
    assert_undisturbed(&world, world.call(0, calls[1]));
    world.assert_quiet();
    world.assert_agree(0, 0);
}

#[test]
fn a_provider_that_comes_back_without_the_request_begins_it_again_from_what_was_received() {
    let mut world = World::new(Options::default(), 1, 1);
    let call = world.submit(0, Ask::tokens(50, 600));
    world.run_while("tokens flow", 20_000, |w| w.call(0, call).tokens.len() < 200);
    world.crash_provider(0, Default::default());
    world.run_ms(5_000);
    world.restart_provider(0);
    world.finish_calls(120_000);
    let log = world.call(0, call);
    assert_undisturbed(&world, log);
    assert_eq!((log.started.len(), log.bill().legs.len()), (2, 2));
    world.assert_quiet();
    world.assert_agree(0, 0);
}

#[test]
fn a_text_that_had_ended_before_its_provider_died_is_not_gone_on_with() {
    // A token that comes early is taken for the end; the toy engine knows nothing of it and would go on for ever.
    let mut world = World::new(Options::default(), 2, 1);
    let mut ask = Ask::tokens(50, 600).to(&[0, 1]);
    let text = undisturbed(&world.options.toy, &ask.prompt, 600, None);
    let call = {
        ask.ends = [text[119]].into();
        world.submit(0, ask)
    };
    let first = text.iter().position(|token| *token == text[119]).unwrap() + 1;
    world.run_while("the end comes", 20_000, |w| w.call(0, call).tokens.len() < first);
    // Cut to where the end was the last token: chunks of this engine are of one token.
    assert_eq!(world.call(0, call).tokens.len(), first);
    world.crash_provider(0, Default::default());
    world.finish_calls(60_000);
    let log = world.call(0, call);
    assert!(log.is_ok(), "{:?}", log.end);
    assert_eq!((log.tokens.len(), log.started.len()), (first, 1), "nobody was asked to go on");
    world.assert_agree(1, 0);
}

#[test]
fn a_resume_after_a_quarter_of_an_hour_still_meets() {
    let mut world = World::new(Options::default(), 1, 1);
    world.submit(0, Ask::tokens(30, 600));
    world.run_ms(2_111);
    world.break_links(0, 0);
    world.run_ms(15 * 60_000);
    world.publish(0);
    let after = world.submit(0, Ask::tokens(12, 40));
    world.finish_calls(60_000);
    assert_undisturbed(&world, world.call(0, after));
    assert_eq!(world.consumers[0].journal.count("open"), 1);
    world.assert_quiet();
    world.assert_agree(0, 0);
}

#[test]
fn a_provider_that_goes_silent_is_left_for_the_next() {
    let mut world = World::new(Options::default(), 2, 1);
    world.providers[0].cheat = Cheat::SilentAfter(100);
    let call = world.submit(0, Ask::tokens(50, 600).to(&[0, 1]));
    world.finish_calls(200_000);
    let log = world.call(0, call);
    assert_undisturbed(&world, log);
    assert_eq!(log.bill().legs.last().unwrap().provider, node_key(&world.providers[1].key));
}

#[test]
fn an_unreachable_provider_is_passed_over() {
    let mut world = World::new(Options::default(), 2, 1);
    world.crash_provider(0, Default::default());
    let call = world.submit(0, Ask::tokens(50, 60).to(&[0, 1]));
    world.finish_calls(60_000);
    assert_undisturbed(&world, world.call(0, call));
    let alone = world.submit(0, Ask::tokens(50, 60));
    world.finish_calls(60_000);
    assert!(matches!(world.call(0, alone).error(), CallError::ProvidersFailed { .. }));
}
