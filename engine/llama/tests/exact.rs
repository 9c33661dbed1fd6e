//! The exact profile's promise, on the real process: a stream is the same alone, in company, in any chunks, from a cached prefix,
//! after a crash, and from the middle.
//!
//! `SATGRID_TEST_MODEL` names another model to hold the promise; run it so on every architecture that is sold as exact.

#![allow(clippy::unwrap_used)]

mod common;

use common::{ALL, Listener, TinyModel, job, kill, settings};
use satgrid_engine::port::{Command, Job, JobId, Profile};
use satgrid_engine::sampling::Sampling;

const OUTPUT: u32 = 120;

/// Past two of the steps of 256 positions by which llama.cpp widens its attention, and a window of 512 on the way.
const PROMPT: u32 = 460;

/// The stream under test.
fn subject(id: u64) -> Job {
    Job { id: JobId(id), ..job(7, PROMPT, OUTPUT) }
}

async fn alone(model: &TinyModel) -> Vec<u32> {
    let mut one = Listener::start(settings(&model.path, Profile::Exact, 1)).await;
    let output = one.output(&subject(1)).await;
    assert_eq!(output.len(), OUTPUT as usize);
    output
}

#[tokio::test]
async fn a_stream_is_the_same_in_company_in_chunks_and_from_a_cached_prefix() {
    let model = TinyModel::or_named();
    let expect = alone(&model).await;
    let mut engine = Listener::start(settings(&model.path, Profile::Exact, 8)).await;

    // Among seven others of all lengths, three of them greedy.
    for other in 0..7 {
        let mut other = job(100 + other, 20 + 60 * u32::try_from(other).unwrap(), 150);
        if other.id.0.is_multiple_of(2) {
            other.sampling = Sampling::greedy();
        }
        engine.start_job(&other, ALL, ALL);
    }
    assert_eq!(engine.output(&subject(2)).await, expect, "in company");
    engine.until(|l| (100..107).all(|id| l.heard.get(&id).is_some_and(common::Heard::is_over))).await;

    // In pieces of 1, 2, 3, ... positions, and the output two tokens at a time.
    let pieces = Job { session: [90; 32], ..subject(3) };
    engine.send(Command::Start(pieces.clone()));
    let mut upto = 0;
    for step in 1.. {
        upto += step;
        engine.grant(pieces.id, upto, 0);
        let covered = upto.min(PROMPT);
        engine.until(|l| l.heard.get(&3).is_some_and(|heard| heard.upto == covered)).await;
        if covered == PROMPT {
            break;
        }
    }
    for output in (2..=OUTPUT).step_by(2) {
        engine.grant(pieces.id, ALL, output);
        engine.until(|l| l.heard[&3].output.len() == output as usize).await;
    }
    let heard = engine.end_of(3).await;
    assert_eq!((heard.output, heard.cached), (expect.clone(), 0), "in pieces");

    // From the session's cache: the same prompt, then one that leaves it at 100 and comes back.
    let cached = Job { session: [90; 32], ..subject(4) };
    engine.start_job(&cached, ALL, ALL);
    let heard = engine.end_of(4).await;
    assert_eq!((heard.output, heard.cached), (expect.clone(), PROMPT - 1), "from the cache");
    let mut detour = Job { session: [90; 32], ..job(5, PROMPT, 40) };
    detour.prompt[..150].copy_from_slice(&cached.prompt[..150]);
    engine.start_job(&detour, ALL, ALL);
    assert_eq!(engine.end_of(5).await.cached, 150);
    engine.start_job(&Job { id: JobId(6), ..cached }, ALL, ALL);
    let heard = engine.end_of(6).await;
    assert_eq!((heard.output, heard.cached), (expect, 150), "after a detour");
}

#[tokio::test]
async fn a_stream_goes_on_after_a_crash_as_if_nothing_had_been() {
    let model = TinyModel::or_named();
    let expect = alone(&model).await;
    let mut engine = Listener::start(settings(&model.path, Profile::Exact, 2)).await;
    engine.start_job(&subject(1), ALL, 50);
    engine.until(|l| l.heard.get(&1).is_some_and(|heard| heard.output.len() == 50)).await;
    kill(engine.engine.process_id().unwrap());
    engine.until(|l| l.downs.len() == 1).await;
    assert!(engine.downs[0].contains("signal 9"), "{:?}", engine.downs);
    engine.until(|l| l.ups == 1).await;

    // From the start, and from what was received.
    assert_eq!(engine.output(&subject(2)).await, expect, "replayed");
    let mut rest = subject(3);
    rest.prompt.extend(&expect[..50]);
    rest.resumed = 50;
    rest.max_output = OUTPUT - 50;
    assert_eq!(engine.output(&rest).await, expect[50..], "resumed");
}

#[tokio::test]
async fn threads_do_not_change_a_stream() {
    let model = TinyModel::or_named();
    let expect = alone(&model).await;
    for threads in [2, 3] {
        let mut settings = settings(&model.path, Profile::Exact, 3);
        settings.threads = threads;
        assert_eq!(Listener::start(settings).await.output(&subject(1)).await, expect, "{threads} threads");
    }
}
