//! The toy passes the suite, in both profiles and odd sizes; its faults do what they say; the suite catches a cheat.

#![allow(clippy::unwrap_used)]

use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use satgrid_engine::conformance::{conformance, embedding_conformance};
use satgrid_engine::port::{Command, Engine, EngineDown, EngineEvent, Job, JobId, Profile};
use satgrid_engine::sampling::Sampling;
use satgrid_engine::toy::{AsyncToy, Faults, ToyConfig, ToyEngine, ToyTokenizer};

/// The toy never waits for anything but its reader, so a future that is not ready at once is stuck.
fn now<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("the toy is stuck"),
    }
}

fn check(config: ToyConfig) {
    let toy = AsyncToy::new(config);
    now(conformance(&toy, &ToyTokenizer));
    assert_eq!(toy.with(ToyEngine::poll_event), None, "nothing is left over");
}

#[test]
fn the_toy_passes_the_suite() {
    check(ToyConfig::default());
    check(ToyConfig { profile: Profile::Fast, model_seed: 7, ..ToyConfig::default() });
    check(ToyConfig { slots: 2, batch: 1, context: 512, model_seed: 8, ..ToyConfig::default() });
    check(ToyConfig { slots: 16, batch: 7, model_seed: 9, ..ToyConfig::default() });
}

#[test]
fn the_toy_embeds() {
    for (profile, batch, slots) in [(Profile::Exact, 512, 4), (Profile::Fast, 512, 2), (Profile::Fast, 5, 16)] {
        let toy = AsyncToy::new(ToyConfig { profile, batch, slots, embeds: Some(48), ..ToyConfig::default() });
        now(embedding_conformance(&toy, &ToyTokenizer));
        assert_eq!(toy.with(ToyEngine::poll_event), None, "nothing is left over");
    }
}

#[test]
#[should_panic(expected = "granted")]
fn the_suite_catches_an_overrun() {
    check(ToyConfig { faults: Faults { overrun: true, ..Faults::default() }, ..ToyConfig::default() });
}

fn job(id: u64) -> Job {
    Job {
        id: JobId(id),
        session: [1; 32],
        prompt: ToyTokenizer.encode("The river", true, false),
        sampling: Sampling::seeded(0.8, 5),
        max_output: 20,
        stop: Vec::new(),
        ignore_eos: true,
        resumed: 0,
        extras: Default::default(),
    }
}

fn launch(toy: &mut ToyEngine, id: u64) -> Result<(), EngineDown> {
    toy.handle(Command::Start(job(id)))?;
    toy.handle(Command::Grant { job: JobId(id), prompt_upto: u32::MAX, output_upto: u32::MAX })
}

#[test]
fn death_takes_every_job_and_a_restart_serves_again() {
    let faults = Faults { die_after_tokens: Some(5), ..Faults::default() };
    let mut toy = ToyEngine::new(ToyConfig { faults, ..ToyConfig::default() });
    launch(&mut toy, 1).unwrap();
    launch(&mut toy, 2).unwrap();
    let events: Vec<_> = std::iter::from_fn(|| toy.poll_event()).collect();
    let tokens = events.iter().filter(|event| matches!(event, EngineEvent::Tokens { .. })).count();
    assert_eq!(tokens, 5);
    assert!(matches!(events.last(), Some(EngineEvent::Down { .. })));
    assert_eq!(launch(&mut toy, 3), Err(EngineDown));

    toy.restart();
    assert_eq!(toy.poll_event(), Some(EngineEvent::Up));
    launch(&mut toy, 4).unwrap();
    let last = std::iter::from_fn(|| toy.poll_event()).last();
    assert!(matches!(last, Some(EngineEvent::Finished { job: JobId(4), .. })), "{last:?}");
}

#[test]
fn a_queue_has_an_end_and_ids_are_used_once() {
    let mut toy = ToyEngine::new(ToyConfig { slots: 1, queue: 1, ..ToyConfig::default() });
    for id in 1..=3 {
        toy.handle(Command::Start(job(id))).unwrap();
    }
    let failed = |toy: &mut ToyEngine| toy.poll_event().map(|event| format!("{event:?}"));
    assert_eq!(failed(&mut toy).as_deref(), Some("Failed { job: JobId(3), error: Busy }"));
    toy.handle(Command::Start(job(2))).unwrap();
    assert_eq!(failed(&mut toy).as_deref(), Some("Failed { job: JobId(2), error: DuplicateJob }"));
    assert_eq!(failed(&mut toy), None);
    // The first job of that id goes on.
    toy.handle(Command::Cancel { job: JobId(2) }).unwrap();
    assert!(matches!(toy.poll_event(), Some(EngineEvent::Finished { job: JobId(2), .. })));
}

#[test]
fn a_shut_engine_ends_its_events() {
    let toy = AsyncToy::new(ToyConfig::default());
    toy.send(Command::Start(Job { prompt: Vec::new(), ..job(1) })).unwrap();
    toy.shut_down();
    assert!(matches!(now(toy.next_event()), Some(EngineEvent::Failed { .. })));
    assert_eq!(now(toy.next_event()), None);
    assert_eq!(toy.send(Command::Cancel { job: JobId(1) }), Err(EngineDown));
}
