//! The promises, one function each.

use super::bench::{Bench, End};
use crate::port::{Command, Extras, FinishReason, Job, JobError, JobId};
use crate::sampling::{Sampling, SamplingError};
use crate::stop::{StopMatcher, TextStream};

/// Largest context that the suite fills.
const MAX_FILLED_CONTEXT: usize = 4096;

type Expected = fn(&JobError) -> bool;

pub(super) async fn bad_jobs_are_refused(bench: &mut Bench<'_>) {
    let (context, vocab) = (bench.facts.context, bench.facts.model.vocab);
    let base = bench.job(4);
    let sampling = Sampling { temperature: f32::NAN, ..Sampling::greedy() };
    let embeds = Extras { embed: Some(vec![bench.prompt.len() as u32]), ..Extras::default() };
    let cases: [(Job, Expected); 7] = [
        (Job { prompt: Vec::new(), ..base.clone() }, |e| matches!(e, JobError::PromptEmpty)),
        (Job { prompt: vec![0; context as usize], ..base.clone() }, |e| matches!(e, JobError::PromptTooLong { .. })),
        (Job { prompt: vec![vocab], ..base.clone() }, |e| matches!(e, JobError::UnknownToken { .. })),
        (Job { sampling, ..base.clone() }, |e| matches!(e, JobError::Sampling(SamplingError::OutOfRange { .. }))),
        (Job { stop: vec![String::new()], ..base.clone() }, |e| matches!(e, JobError::BadStop)),
        (Job { extras: embeds, ..base.clone() }, |e| matches!(e, JobError::OtherKind { embeds: false })),
        (Job { resumed: u32::MAX, ..base }, |e| matches!(e, JobError::BadResume { .. })),
    ];
    for (job, expected) in cases {
        let id = bench.job(0).id;
        let trace = bench.run(Job { id, ..job }).await;
        assert!(matches!(&trace.end, Some(End::Failed(error)) if expected(error)), "{:?}", trace.end);
        assert_eq!((trace.upto, trace.ids.len()), (0, 0), "no work for a refused job");
    }
    // Late words about jobs that are over or never were.
    let never = JobId(u64::MAX);
    bench.send(Command::Cancel { job: never });
    bench.send(Command::Grant { job: never, prompt_upto: 9, output_upto: 9 });
    bench.send(Command::ForgetSession { session: [9; 32] });
}

pub(super) async fn greedy_is_repeatable_and_usage_exact(bench: &mut Bench<'_>) {
    let (first, second) = (bench.job(24), bench.job(24));
    let first = bench.run(first).await;
    assert_eq!((first.finished(), first.ids.len(), first.cached), (FinishReason::Length, 24, 0));
    let second = bench.run(second).await;
    assert_eq!((second.finished(), second.cached), (FinishReason::Length, 0), "a cache crossed sessions");
    assert_eq!(first.ids, second.ids, "the same call gave other tokens");
}

pub(super) async fn output_is_bounded(bench: &mut Bench<'_>) {
    for max_output in [0, 1, 7] {
        let job = bench.job(max_output);
        let trace = bench.run(job).await;
        assert_eq!((trace.finished(), trace.ids.len()), (FinishReason::Length, max_output as usize));
    }
    // One token of room in the context; skipped where filling it would take long.
    let context = bench.facts.context as usize;
    if context > MAX_FILLED_CONTEXT {
        return;
    }
    let mut job = bench.job(9);
    job.prompt = bench.prompt.iter().copied().cycle().take(context - 1).collect();
    let trace = bench.run(job).await;
    assert_eq!((trace.finished(), trace.ids.len()), (FinishReason::Length, 1), "the context is full");
}

pub(super) async fn grants_are_honoured(bench: &mut Bench<'_>) {
    let job = bench.job(12);
    let whole = bench.run(job).await;

    let prompt = bench.prompt.len() as u32;
    let job = bench.job(12);
    let id = bench.start(job);
    bench.stands_still(id).await;
    // The bench checks on every event that nothing beyond the grant happens.
    bench.grant(id, prompt / 3, 12);
    bench.until(id, |trace| trace.upto == prompt / 3).await;
    bench.stands_still(id).await;
    bench.grant(id, prompt - 1, 0);
    bench.until(id, |trace| trace.upto == prompt - 1).await;
    bench.stands_still(id).await;
    bench.grant(id, prompt, 0);
    let trace = bench.until(id, |trace| trace.end.is_some()).await;
    assert_eq!(trace.finished(), FinishReason::Length);
    if bench.exact() {
        assert_eq!(trace.ids, whole.ids, "prefill in pieces changed the output");
    }

    let job = bench.job(12);
    let id = bench.start(job);
    bench.grant(id, u32::MAX, 0);
    bench.until(id, |trace| trace.upto == prompt).await;
    bench.stands_still(id).await;
    for (granted, out) in [(1, 1), (5, 5), (2, 5), (11, 11)] {
        bench.grant(id, 0, granted);
        bench.until(id, |trace| trace.ids.len() == out).await;
        bench.stands_still(id).await;
    }
    bench.grant(id, 0, 12);
    let trace = bench.until(id, |trace| trace.end.is_some()).await;
    assert_eq!((trace.finished(), trace.ids.len()), (FinishReason::Length, 12));
    if bench.exact() {
        assert_eq!(trace.ids, whole.ids, "pauses changed the output");
    }
}

pub(super) async fn cancellation(bench: &mut Bench<'_>) {
    let cancelled = |end: &Option<End>| matches!(end, Some(End::Finished { reason: FinishReason::Cancelled, .. }));
    let job = bench.job(10_000);
    let id = bench.launch(job);
    bench.until(id, |trace| trace.ids.len() >= 3).await;
    bench.send(Command::Cancel { job: id });
    bench.send(Command::Cancel { job: id });
    let trace = bench.until(id, |trace| trace.end.is_some()).await;
    assert!(cancelled(&trace.end), "{:?}", trace.end);
    bench.stands_still(id).await;

    // Before any grant, and between grants.
    let job = bench.job(8);
    let id = bench.start(job);
    bench.send(Command::Cancel { job: id });
    let trace = bench.until(id, |trace| trace.end.is_some()).await;
    assert_eq!(trace.end, Some(End::Finished { reason: FinishReason::Cancelled, evaluated: 0 }));
    let job = bench.job(8);
    let id = bench.start(job);
    bench.grant(id, u32::MAX, 2);
    bench.until(id, |trace| trace.ids.len() == 2).await;
    bench.send(Command::Cancel { job: id });
    let trace = bench.until(id, |trace| trace.end.is_some()).await;
    assert!(cancelled(&trace.end) && trace.ids.len() == 2, "{trace:?}");
}

pub(super) async fn prefixes_are_reused_within_a_session_only(bench: &mut Bench<'_>) {
    let first = bench.job(6);
    let session = first.session;
    let prompt = first.prompt.clone();
    let trace = bench.run(first).await;
    let more: Vec<u32> = prompt.iter().chain(&trace.ids).chain(&prompt[1..5]).copied().collect();

    let longer = |bench: &mut Bench<'_>, session: Option<[u8; 32]>| {
        let job = bench.job(6);
        Job { session: session.unwrap_or(job.session), prompt: more.clone(), ..job }
    };
    let job = longer(bench, Some(session));
    let reused = bench.run(job).await;
    assert_eq!(reused.finished(), FinishReason::Length);
    let known = prompt.len() as u32;
    assert!(reused.cached >= known, "{} cached of a prefix of {known} that this session had just run", reused.cached);
    assert!((reused.cached as usize) < prompt.len() + trace.ids.len(), "the last token was never evaluated");

    let job = longer(bench, None);
    let fresh = bench.run(job).await;
    assert_eq!((fresh.finished(), fresh.cached), (FinishReason::Length, 0), "another session's prefix was used");
    if bench.exact() {
        assert_eq!(reused.ids, fresh.ids, "a reused prefix changed the output");
    }

    bench.send(Command::ForgetSession { session });
    let job = longer(bench, Some(session));
    let forgotten = bench.run(job).await;
    assert_eq!((forgotten.finished(), forgotten.cached), (FinishReason::Length, 0), "the session was not forgotten");

    // Forgotten while a job runs: what it leaves is not kept either.
    let job = longer(bench, Some(session));
    let id = bench.start(job);
    bench.grant(id, u32::MAX, 2);
    bench.until(id, |trace| trace.ids.len() == 2).await;
    bench.send(Command::ForgetSession { session });
    bench.grant(id, u32::MAX, u32::MAX);
    bench.until(id, |trace| trace.end.is_some()).await;
    let job = longer(bench, Some(session));
    let forgotten = bench.run(job).await;
    assert_eq!((forgotten.finished(), forgotten.cached), (FinishReason::Length, 0), "kept after it was forgotten");

    // The same prompt again: all but its last position may come from the cache, and the grant still bounds the
    // report.
    let job = longer(bench, Some(session));
    let id = bench.start(job);
    bench.grant(id, 5, 6);
    let trace = bench.until(id, |trace| trace.upto == 5).await;
    assert!(trace.cached <= 5);
    bench.grant(id, u32::MAX, 6);
    let again = bench.until(id, |trace| trace.end.is_some()).await;
    assert_eq!(again.finished(), FinishReason::Length);
    if bench.exact() {
        assert_eq!(again.ids, fresh.ids);
    }
}

pub(super) async fn stop_strings_across_tokens(bench: &mut Bench<'_>) {
    let base = bench.job(32);
    let whole = bench.run(base.clone()).await;
    let pieces = bench.pieces(&whole.ids).await;
    let ends: Vec<usize> = pieces
        .iter()
        .scan(0, |sum, piece| {
            *sum += piece.len();
            Some(*sum)
        })
        .collect();
    let text = pieces.concat();
    // A stop string that begins in one token and ends in another, with whole characters.
    let straddling = ends.iter().filter(|end| **end >= 1 && **end < text.len()).find_map(|&border| {
        let reach = |from: usize, to: usize| std::str::from_utf8(text.get(from..to)?).ok();
        (1..=4).find_map(|back| {
            (1..=4)
                .find_map(|on| reach(border.checked_sub(back)?, border + on).filter(|stop| stop.chars().count() >= 2))
        })
    });
    let Some(stop) = straddling else { panic!("no two whole characters in {}", String::from_utf8_lossy(&text)) };

    // What should come out, by the matcher alone.
    let mut matcher = StopMatcher::new(&[stop]);
    let last = pieces.iter().position(|piece| {
        matcher.push(piece);
        matcher.stopped()
    });
    let last = last.expect("the stop string is in the text");
    let id = bench.job(0).id;
    let job = Job { id, stop: vec!["\u{0}never".to_owned(), stop.to_owned()], session: [0xA5; 32], ..base };
    let trace = bench.run(job).await;
    assert_eq!(trace.finished(), FinishReason::Stop, "{stop:?}");
    assert_eq!(trace.ids, whole.ids[..=last], "the token that completes {stop:?} is the last");

    let mut shown = TextStream::new(&[stop]);
    let mut out = String::new();
    for piece in bench.pieces(&trace.ids).await {
        out += &shown.push(&piece);
    }
    out += &shown.finish();
    assert!(shown.stopped() && !out.contains(stop), "{stop:?} leaked into {out:?}");
}

pub(super) async fn end_of_generation(bench: &mut Bench<'_>) {
    let special = bench.tok.special();
    let Some(eos) = special.eos else { return };
    let eager = Sampling { logit_bias: vec![(eos, 900.0)], ..Sampling::greedy() };
    let job = bench.job(8);
    let trace = bench.run(Job { sampling: eager.clone(), ignore_eos: false, ..job }).await;
    assert_eq!(
        (trace.finished(), &trace.ids[..]),
        (FinishReason::Stop, &[eos][..]),
        "EOS is delivered and ends the job"
    );

    let job = bench.job(8);
    let trace = bench.run(Job { sampling: eager, ..job }).await;
    assert_eq!((trace.finished(), trace.ids.len()), (FinishReason::Length, 8));
    assert!(trace.ids.iter().all(|id| !special.eog.contains(id)), "an ignored end was drawn: {:?}", trace.ids);
}

pub(super) async fn many_sessions_at_once(bench: &mut Bench<'_>) {
    let count = bench.facts.slots.min(8) as usize;
    let jobs = |bench: &mut Bench<'_>| -> Vec<Job> {
        let cut = |at: usize| bench.prompt[..bench.prompt.len() - at].to_vec();
        let prompts: Vec<_> = (0..count).map(cut).collect();
        prompts.into_iter().map(|prompt| Job { prompt, ..bench.job(16) }).collect()
    };
    let mut alone = Vec::new();
    for job in jobs(bench) {
        alone.push(bench.run(job).await.ids);
    }
    let together: Vec<JobId> = jobs(bench).into_iter().map(|job| bench.launch(job)).collect();
    for (id, alone) in together.into_iter().zip(alone) {
        let trace = bench.until(id, |trace| trace.end.is_some()).await;
        assert_eq!((trace.finished(), trace.ids.len()), (FinishReason::Length, 16));
        if bench.exact() {
            assert_eq!(trace.ids, alone, "neighbours changed the output");
        }
    }
}

pub(super) async fn more_jobs_than_slots(bench: &mut Bench<'_>) {
    let count = bench.facts.slots + 1;
    let ids: Vec<JobId> = (0..count)
        .map(|_| {
            let job = bench.job(2);
            bench.launch(job)
        })
        .collect();
    for id in ids {
        let trace = bench.until(id, |trace| trace.end.is_some()).await;
        assert_eq!((trace.finished(), trace.ids.len()), (FinishReason::Length, 2));
    }
}

pub(super) async fn sampled_streams_replay_and_resume(bench: &mut Bench<'_>) {
    let sampling = |seed| Sampling { top_p: 0.95, presence_penalty: 0.3, ..Sampling::seeded(1.0, seed) };
    let job = |bench: &mut Bench<'_>, seed| Job { sampling: sampling(seed), ..bench.job(24) };
    let (one, same, other) = (job(bench, 11), job(bench, 11), job(bench, 12));
    let one = bench.run(one).await;
    assert_eq!(one.finished(), FinishReason::Length);
    assert_eq!(bench.run(same).await.ids, one.ids, "the same seed gave other tokens");
    assert_ne!(bench.run(other).await.ids, one.ids, "another seed gave the same tokens");

    if bench.exact() {
        for received in [1, 9, 23] {
            let base = job(bench, 11);
            let prompt = base.prompt.iter().chain(&one.ids[..received]).copied().collect();
            let resumed = Job { prompt, resumed: received as u32, max_output: 24 - received as u32, ..base };
            let rest = bench.run(resumed).await;
            assert_eq!(rest.finished(), FinishReason::Length);
            assert_eq!(rest.ids, one.ids[received..], "resumed after {received} tokens");
        }
    }
}
