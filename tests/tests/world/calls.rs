//! Calls that go well.

use super::assert_undisturbed;
use satgrid_node::consumer::CallError;
use satgrid_tests::world::{Ask, Options, World};
use satgrid_types::{FinishReason, Msat};

#[test]
fn a_paid_chat_finishes_and_both_journals_agree() {
    let mut world = World::new(Options::default(), 1, 1);
    let call = world.submit(0, Ask::tokens(40, 300));
    world.finish_calls(60_000);
    let log = world.call(0, call);
    assert_undisturbed(&world, log);
    let usage = log.bill().legs[0].usage;
    assert_eq!((log.bill().legs.len(), usage.prompt, usage.completion), (1, 40, 300));
    // 40 x 2 + 300 x 20.000001 + 7, rounded up.
    assert_eq!(log.bill().cost(), Msat(6_088));
    world.assert_quiet();
    world.assert_agree(0, 0);
    let (provider, consumer) = (world.audit_provider(0), world.audit_consumer(0));
    assert_eq!((provider.as_provider.charged_msat, consumer.as_consumer.charged_msat), (6_088, 6_088));
    assert_eq!(provider.as_provider.paid_msat, consumer.as_consumer.paid_msat);
    assert_eq!((provider.open_holds, consumer.open_holds, consumer.as_consumer.receipts), (0, 0, 1));
}

#[test]
fn a_long_prompt_runs_in_pieces_each_acknowledged() {
    let mut world = World::new(Options::default(), 1, 1);
    let call = world.submit(0, Ask::tokens(2_100, 20));
    world.finish_calls(60_000);
    assert_undisturbed(&world, world.call(0, call));
    // 512, 1024, 1536, 2048, 2100.
    assert!(world.consumers[0].journal.count("ack") >= 5);
    world.assert_quiet();
    world.assert_agree(0, 0);
}

#[test]
fn a_long_answer_spans_slices_and_tokens_never_pause_for_money() {
    let mut world = World::new(Options::default(), 1, 1);
    let call = world.submit(0, Ask::tokens(30, 3_000));
    world.finish_calls(120_000);
    let log = world.call(0, call);
    assert_undisturbed(&world, log);
    let slices = world.consumers[0].journal.count("payment-settled");
    assert!(slices >= 4, "60 sat at 10 sat a slice to begin with: {slices}");
    // One engine step is 10 ms; a payment takes 50 to 200 ms and is not seen.
    assert!(log.longest_gap() <= 60, "{} ms", log.longest_gap());
    world.assert_quiet();
    world.assert_agree(0, 0);
}

#[test]
fn sixteen_calls_share_one_session() {
    let mut world = World::new(Options::default(), 1, 1);
    let calls: Vec<_> = (0..16).map(|i| world.submit(0, Ask::tokens(20 + i, 150 + 10 * i))).collect();
    world.finish_calls(120_000);
    for call in calls {
        assert_undisturbed(&world, world.call(0, call));
    }
    assert_eq!(world.consumers[0].journal.count("open"), 1);
    assert_eq!(world.consumers[0].journal.count("receipt"), 16);
    world.assert_quiet();
    world.assert_agree(0, 0);
}

#[test]
fn a_conversation_reuses_session_and_prefix() {
    let mut world = World::new(Options::default(), 1, 1);
    let first = world.submit(0, Ask::tokens(300, 50));
    world.finish_calls(60_000);
    let mut prompt = world.call(0, first).prompt.clone();
    prompt.extend(&world.call(0, first).tokens);
    prompt.extend([5, 6, 7]);
    let mut ask = Ask::tokens(1, 50);
    ask.prompt = prompt;
    let second = world.submit(0, ask);
    world.finish_calls(60_000);
    assert_undisturbed(&world, world.call(0, second));
    let usage = world.call(0, second).bill().legs[0].usage;
    assert!(usage.cached_prompt >= 300, "{usage:?}");
    assert_eq!(world.consumers[0].journal.count("open"), 1);
    world.assert_quiet();
    world.assert_agree(0, 0);
}

#[test]
fn a_cancelled_call_pays_for_what_ran_and_no_more() {
    let mut world = World::new(Options::default(), 1, 1);
    let call = world.submit(0, Ask::tokens(30, 2_000));
    world.run_while("tokens flow", 10_000, |w| w.call(0, call).tokens.len() < 200);
    world.cancel(0, call);
    world.finish_calls(10_000);
    let log = world.call(0, call);
    assert_eq!(*log.error(), CallError::Cancelled);
    let leg = &log.bill().legs[0];
    assert_eq!(leg.usage.completion as usize, log.tokens.len());
    assert!(log.tokens.len() < 260 && leg.receipt.is_some(), "{}", log.tokens.len());
    world.assert_quiet();
    world.assert_agree(0, 0);
}

#[test]
fn a_call_that_waits_can_be_cancelled() {
    let mut world = World::new(Options::default(), 1, 1);
    let call = world.submit(0, Ask::tokens(30, 100));
    world.cancel(0, call);
    assert_eq!(*world.call(0, call).error(), CallError::Cancelled);
    world.run_ms(5_000);
    world.assert_quiet();
}

#[test]
fn an_idle_connection_closes_and_the_balance_serves_the_next_call() {
    let mut world = World::new(Options::default(), 1, 1);
    let first = world.submit(0, Ask::tokens(10, 20));
    world.finish_calls(60_000);
    world.run_ms(20 * 60_000);
    world.publish(0);
    let second = world.submit(0, Ask::tokens(10, 20));
    world.finish_calls(60_000);
    assert_undisturbed(&world, world.call(0, first));
    assert_undisturbed(&world, world.call(0, second));
    let journal = &world.consumers[0].journal;
    assert_eq!((journal.count("open"), journal.count("payment-settled")), (1, 1));
    assert_eq!(journal.count("quote"), 2, "ten minutes later a quote has run out");
    world.assert_quiet();
    world.assert_agree(0, 0);
}

#[test]
fn a_quote_that_runs_out_under_a_stream_is_renewed_beside_it() {
    let mut options = Options::default();
    options.provider.quote_validity_ms = 20_000;
    let mut world = World::new(options, 1, 1);
    world.providers[0].step_ms = 100;
    let call = world.submit(0, Ask::tokens(30, 3_000));
    world.finish_calls(300_000);
    assert_undisturbed(&world, world.call(0, call));
    assert!(world.consumers[0].journal.count("quote") >= 3);
    assert_eq!(world.consumers[0].journal.misbehaviour(), Vec::<String>::new());
    world.assert_quiet();
    world.assert_agree(0, 0);
}

#[test]
fn the_same_seed_gives_the_same_journals() {
    let run = |seed| {
        let mut world = World::new(Options { seed, ..Options::default() }, 2, 1);
        world.submit(0, Ask::tokens(100, 700).to(&[0, 1]).seeded(4));
        world.run_ms(3_000);
        world.crash_provider(0, Default::default());
        world.finish_calls(60_000);
        assert!(world.call(0, satgrid_node::consumer::CallId(0)).is_ok());
        world.fingerprint()
    };
    assert_eq!(run(7), run(7));
    assert_ne!(run(7), run(8));
}

#[test]
fn a_finish_reason_is_the_receipts() {
    let mut world = World::new(Options::default(), 1, 1);
    let call = world.submit(0, Ask::tokens(4, 1));
    world.finish_calls(60_000);
    assert!(matches!(world.call(0, call).end, Some(Ok((FinishReason::Length, _)))));
    world.assert_quiet();
}

/// Nobody failed: the client is told to come again, not that its provider broke.
#[test]
fn a_call_that_every_provider_turns_away_is_told_so() {
    // A provider takes 32 requests of one session.
    let mut world = World::new(Options::default(), 1, 1);
    let calls: Vec<_> = (0..40).map(|i| world.submit(0, Ask::tokens(10 + i, 60))).collect();
    world.finish_calls(300_000);
    let (mut served, mut full) = (0, 0);
    for call in calls {
        let log = world.call(0, call);
        if log.is_ok() {
            assert_undisturbed(&world, log);
            served += 1;
        } else {
            assert!(matches!(log.error(), CallError::Full { .. }), "{:?}", log.end);
            full += 1;
        }
    }
    assert!(served >= 32 && full > 0, "{served} served, {full} turned away");
    world.assert_quiet();
    world.assert_agree(0, 0);
}

/// Keys cost nothing: two sessions from one address share what one consumer may have open.
#[test]
fn one_peer_has_its_places_once_over_all_its_sessions() {
    for (same_host, turned_away) in [(true, 1), (false, 0)] {
        let mut options = Options::default();
        options.provider.max_requests_per_peer = 3;
        let mut world = World::new(options, 1, 2);
        if same_host {
            world.consumers[1].host = world.consumers[0].host;
        }
        let mut calls = Vec::new();
        for turn in 0..2 {
            for c in 0..2 {
                calls.push((c, world.submit(c, Ask::tokens(30, 1_400 + turn))));
                world.run_ms(600);
            }
        }
        world.finish_calls(120_000);
        let full =
            |(c, call): &&(usize, _)| matches!(world.call(*c, *call).end, Some(Err((CallError::Full { .. }, _))));
        assert_eq!(calls.iter().filter(full).count(), turned_away, "from one address: {same_host}");
        assert_eq!(calls.iter().filter(|(c, call)| world.call(*c, *call).is_ok()).count(), 4 - turned_away);
        world.assert_quiet();
    }
}
