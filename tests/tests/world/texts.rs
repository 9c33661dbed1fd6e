//! Texts that are embedded: paid by the prompt token, one receipt for all of a call, and rows that come once whatever breaks.

use satgrid_engine::port::{Command, EngineEvent, Extras, Job, JobId};
use satgrid_engine::toy::{ToyConfig, ToyEngine};
use satgrid_node::consumer::CallError;
use satgrid_tests::world::{Ask, Options, World};
use satgrid_types::{FinishReason, Msat};

/// More than one prompt piece in all, one text longer than a piece.
const LENGTHS: [u32; 5] = [7, 300, 40, 700, 90];
const SUM: u32 = 1_137;

fn options() -> Options {
    Options { toy: ToyConfig { embeds: Some(24), ..ToyConfig::default() }, ..Options::default() }
}

/// The rows of a run without any trouble.
fn expected(options: &Options, prompt: &[u32]) -> Vec<Vec<u8>> {
    let mut toy = ToyEngine::new(options.toy.clone());
    let extras = Extras { embed: Some(LENGTHS.to_vec()), ..Extras::default() };
    let id = JobId(1);
    let job = Job {
        id,
        session: [0; 32],
        prompt: prompt.to_vec(),
        sampling: satgrid_engine::sampling::Sampling::greedy(),
        max_output: 0,
        stop: Vec::new(),
        ignore_eos: false,
        resumed: 0,
        extras,
    };
    toy.handle(Command::Start(job)).unwrap();
    toy.handle(Command::Grant { job: id, prompt_upto: u32::MAX, output_upto: 0 }).unwrap();
    let events = std::iter::from_fn(|| toy.poll_event());
    let row = |event| if let EngineEvent::Embedded { row, .. } = event { Some(row) } else { None };
    events.filter_map(row).collect()
}

#[test]
fn texts_are_embedded_and_paid_by_the_token() {
    let mut world = World::new(options(), 1, 1);
    let call = world.submit(0, Ask::texts(&LENGTHS));
    world.finish_calls(60_000);
    let log = world.call(0, call);
    assert!(matches!(log.end, Some(Ok((FinishReason::Stop, _)))), "{:?}", log.end);
    assert_eq!((&log.rows, log.tokens.len()), (&expected(&world.options, &log.prompt), 0));
    let usage = log.bill().legs[0].usage;
    assert_eq!((log.bill().legs.len(), usage.prompt, usage.cached_prompt, usage.completion), (1, SUM, 0, 0));
    // 1,137 x 2 + 7.
    assert_eq!(log.bill().cost(), Msat(2_281));
    assert_eq!(world.consumers[0].journal.count("receipt"), 1, "one for all texts");
    world.assert_quiet();
    world.assert_agree(0, 0);
    let (provider, consumer) = (world.audit_provider(0), world.audit_consumer(0));
    assert_eq!((provider.as_provider.charged_msat, consumer.as_consumer.charged_msat), (2_281, 2_281));
    assert_eq!((provider.open_holds, consumer.open_holds), (0, 0));
}

#[test]
fn the_second_provider_embeds_what_the_first_did_not() {
    for rows in [0, 1, 3] {
        let mut world = World::new(options(), 2, 1);
        let call = world.submit(0, Ask::texts(&LENGTHS).to(&[0, 1]));
        world.run_while("rows come", 20_000, |w| w.call(0, call).rows.len() < rows);
        world.crash_provider(0, Default::default());
        world.finish_calls(60_000);
        let log = world.call(0, call);
        assert!(log.is_ok(), "{:?}", log.end);
        assert_eq!(log.rows, expected(&world.options, &log.prompt), "each once, in order");
        let done: u32 = LENGTHS.iter().take(rows).sum();
        assert!(log.bill().legs.last().unwrap().usage.prompt <= SUM - done, "{:?}", log.bill());
        assert_eq!(world.audit_consumer(0).as_consumer.charged_msat, log.bill().cost().0);
        world.assert_agree(1, 0);
    }
}

#[test]
fn a_broken_link_and_a_restart_cost_no_row_twice() {
    for turn in 1..3 {
        let mut world = World::new(options(), 1, 1);
        let call = world.submit(0, Ask::texts(&LENGTHS));
        world.run_while("rows come", 20_000, |w| w.call(0, call).rows.len() < 2);
        super::strike(&mut world, turn);
        world.finish_calls(90_000);
        let log = world.call(0, call);
        assert!(log.is_ok(), "{:?}", log.end);
        assert_eq!(log.rows, expected(&world.options, &log.prompt));
        // What was acknowledged of texts without a row is paid a second time, never more than one text and a piece; and a row
        // that came before its acknowledgement is not paid, if its provider dies in between: a piece at the most.
        let paid: u32 = log.bill().legs.iter().map(|leg| leg.usage.prompt).sum();
        assert!((SUM - 512..SUM + 700 + 512).contains(&paid), "{paid}");
        assert_eq!(world.audit_consumer(0).as_consumer.charged_msat, log.bill().cost().0);
        world.assert_agree(0, 0);
    }
}

#[test]
fn a_cancelled_call_pays_for_what_it_acknowledged() {
    let mut world = World::new(options(), 1, 1);
    let call = world.submit(0, Ask::texts(&LENGTHS));
    world.run_while("a row comes", 20_000, |w| w.call(0, call).rows.is_empty());
    world.cancel(0, call);
    world.finish_calls(60_000);
    assert_eq!(*world.call(0, call).error(), CallError::Cancelled);
    assert!(world.audit_consumer(0).as_consumer.charged_msat < 2_281);
    world.assert_quiet();
    world.assert_agree(0, 0);
}

#[test]
fn a_model_does_what_its_listing_says() {
    for (options, ask) in [(options(), Ask::tokens(20, 10)), (Options::default(), Ask::texts(&LENGTHS))] {
        let mut world = World::new(options, 1, 1);
        let call = world.submit(0, ask);
        world.finish_calls(60_000);
        let CallError::ProvidersFailed { reason } = world.call(0, call).error() else {
            panic!("{:?}", world.call(0, call).end)
        };
        assert!(reason.contains("this model"), "{reason}");
        assert_eq!(world.audit_consumer(0).as_consumer.charged_msat, 0);
        world.assert_quiet();
    }
}
