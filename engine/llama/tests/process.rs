//! The child process: how it starts, what it refuses, how it dies, and that it never outlives its node.

#![allow(clippy::unwrap_used)]

mod common;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Command as Process, Stdio};
use std::time::{Duration, Instant};

use common::{ALL, Heard, Listener, TinyModel, job, kill, settings, spawn, tiny_bytes};
use satgrid_engine::port::{Command, Engine, EngineDown, FinishReason, Job, Profile};
use satgrid_engine::tiny;
use satgrid_engine_llama::{EngineSettings, SpawnError};

#[tokio::test]
async fn bad_files_are_refused_in_words() {
    let good = tiny_bytes();
    let mut bad_magic = good.clone();
    bad_magic[..4].copy_from_slice(b"GGML");
    let mut unknown = good.clone();
    let at = good.windows(5).position(|w| w == b"llama").unwrap();
    unknown[at..at + 5].copy_from_slice(b"lamma");
    let rows: [(&str, Vec<u8>, &str); 6] = [
        ("empty", Vec::new(), ""),
        ("no GGUF", b"<html>not found</html>".to_vec(), "GGUF"),
        ("bad magic", bad_magic, "GGUF"),
        ("cut in the header", good[..200].to_vec(), ""),
        ("cut in the weights", good[..good.len() - 1000].to_vec(), ""),
        ("unknown architecture", unknown, ""),
    ];
    for (name, bytes, expect) in rows {
        let file = TinyModel::of(&bytes);
        let error = spawn(settings(&file.path, Profile::Exact, 1)).await.map(|_| ()).unwrap_err();
        let SpawnError::LoadFailed { reason } = &error else { panic!("{name}: {error:?}") };
        assert!(reason.contains("model.gguf") && reason.contains(expect), "{name}: {reason}");
    }
}

#[tokio::test]
async fn bad_settings_are_refused_in_words() {
    let model = TinyModel::write();
    let base = settings(&model.path, Profile::Exact, 1);
    let rows = [
        (EngineSettings { model: "/nowhere/model.gguf".into(), ..base.clone() }, "/nowhere/model.gguf"),
        (EngineSettings { context: 1_000_000, ..base.clone() }, "1000000"),
        (EngineSettings { slots: 0, ..base.clone() }, "0 slots"),
        (EngineSettings { slots: 1000, ..base }, "1000 slots"),
    ];
    for (settings, expect) in rows {
        let error = spawn(settings).await.map(|_| ()).unwrap_err();
        assert!(matches!(error, SpawnError::LoadFailed { .. }), "{error:?}");
        assert!(error.to_string().contains(expect), "{error}");
    }
}

#[tokio::test]
async fn nothing_is_done_beyond_a_grant() {
    let model = TinyModel::write();
    for profile in [Profile::Exact, Profile::Fast] {
        let mut engine = Listener::start(settings(&model.path, profile, 2)).await;
        let job = job(1, 40, 30);
        engine.send(Command::Start(job.clone()));
        engine.assert_silence(1000).await;
        for (prompt, output, upto, told) in [(13, 0, 13, 0), (40, 0, 40, 0), (40, 9, 40, 9), (0, 10, 40, 10)] {
            engine.grant(job.id, prompt, output);
            engine.until(|l| l.heard.get(&1).is_some_and(|h| (h.upto, h.output.len()) == (upto, told))).await;
            engine.assert_silence(1000).await;
        }
        engine.grant(job.id, ALL, ALL);
        assert_eq!(engine.end_of(1).await.end, Some((FinishReason::Length, 69)));
    }
}

#[tokio::test]
async fn a_cancelled_job_ends_within_a_batch_and_frees_its_slot() {
    let model = TinyModel::write();
    let mut engine = Listener::start(settings(&model.path, Profile::Exact, 1)).await;
    engine.start_job(&job(1, 20, 450), ALL, ALL);
    engine.start_job(&job(2, 20, 5), ALL, ALL);
    engine.until(|l| l.heard.get(&1).is_some_and(|heard| heard.output.len() >= 3)).await;
    engine.send(Command::Cancel { job: job(1, 1, 1).id });
    let cancelled = engine.end_of(1).await;
    assert_eq!(cancelled.end.unwrap().0, FinishReason::Cancelled);
    assert!(cancelled.output.len() < 450);
    assert_eq!(engine.end_of(2).await.output.len(), 5);
}

#[tokio::test]
async fn a_killed_engine_is_down_and_then_up_with_the_same_facts() {
    let model = TinyModel::write();
    let mut engine = Listener::start(settings(&model.path, Profile::Fast, 2)).await;
    let before = engine.engine.facts();
    assert!(before.speed.is_some_and(|speed| speed.decode_millitokens_per_s > 0));
    for round in 0..2 {
        engine.start_job(&job(round, 20, 400), ALL, 10);
        engine.until(|l| l.heard.get(&round).is_some_and(|heard| heard.output.len() == 10)).await;
        let process = engine.engine.process_id().unwrap();
        kill(process);
        engine.until(|l| l.downs.len() as u64 == round + 1).await;
        let refused = engine.engine.send(Command::Start(job(50, 5, 5)));
        assert!(refused == Err(EngineDown) || engine.engine.process_id() != Some(process));
        engine.until(|l| u64::from(l.ups) == round + 1).await;
    }
    let after = engine.engine.facts();
    assert_eq!((after.build_id, after.model_root), (before.build_id, before.model_root));
    assert_eq!(engine.output(&job(60, 20, 5)).await.len(), 5);
}

/// The same weights under another vocabulary are not what was sold.
#[tokio::test]
async fn an_engine_does_not_come_back_with_another_tokenizer() {
    let model = TinyModel::write();
    let mut engine = Listener::start(settings(&model.path, Profile::Fast, 1)).await;
    // Beside it and renamed, as the running process reads the old file as memory.
    let replace = |bytes: Vec<u8>| {
        let beside = model.path.with_extension("new");
        std::fs::write(&beside, bytes).unwrap();
        std::fs::rename(beside, &model.path).unwrap();
    };
    let other = tiny::TinyModel { chat_template: Some("{{ messages }}".to_owned()), ..tiny::TinyModel::default() };
    replace(other.to_bytes().unwrap());
    kill(engine.engine.process_id().unwrap());
    engine.until(|l| l.downs.len() == 1).await;
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(2) {
        assert!(!engine.engine.is_up());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    replace(tiny_bytes());
    engine.until(|l| l.ups == 1).await;
    assert_eq!(engine.output(&job(1, 20, 5)).await.len(), 5);
}

#[tokio::test]
async fn events_end_when_the_engine_is_shut_down_and_its_process_is_gone() {
    let model = TinyModel::write();
    let mut engine = Listener::start(settings(&model.path, Profile::Exact, 1)).await;
    let process = engine.engine.process_id().unwrap();
    engine.start_job(&job(1, 20, 400), ALL, ALL);
    engine.until(|l| l.heard.contains_key(&1)).await;
    engine.engine.shut_down();
    assert_eq!(engine.engine.send(Command::Start(job(2, 5, 5))), Err(EngineDown));
    while engine.engine.next_event().await.is_some() {}
    assert_gone(process);
}

#[tokio::test]
async fn a_dropped_engine_leaves_no_process() {
    let model = TinyModel::write();
    let engine = spawn(settings(&model.path, Profile::Exact, 1)).await.unwrap();
    let process = engine.process_id().unwrap();
    drop(engine);
    let begin = Instant::now();
    while is_running(process) && begin.elapsed() < Duration::from_secs(10) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_gone(process);
}

/// The node may be killed without a chance to clean up: the end of its socket is enough.
#[test]
fn a_worker_exits_when_its_parent_is_gone() {
    let model = TinyModel::write();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut worker = Process::new(common::program().exe)
        .args(["--model".as_ref(), model.path.as_os_str(), "--profile".as_ref(), "fast".as_ref()])
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .spawn()
        .unwrap();
    drop(ours);
    let begin = Instant::now();
    while worker.try_wait().unwrap().is_none() && begin.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(worker.try_wait().unwrap().and_then(|status| status.code()), Some(0));
}

#[test]
fn a_worker_that_no_node_started_says_so() {
    let worker = |args: &[&str]| {
        let program = common::program().exe;
        Process::new(program).args(args).stdin(Stdio::null()).stderr(Stdio::null()).status().unwrap().code()
    };
    assert_eq!(worker(&["--model", "x.gguf"]), Some(64));
    assert_eq!(worker(&[]), Some(64));
}

#[tokio::test]
async fn stop_strings_and_ends_finish_a_job() {
    let model = TinyModel::write();
    let mut engine = Listener::start(settings(&model.path, Profile::Exact, 2)).await;
    // A job that is free to end does so sooner or later, or runs to its length: both are told with exact counts.
    for id in 1..20 {
        let job = Job { ignore_eos: false, ..job(id, 10 + u32::try_from(id).unwrap(), 200) };
        engine.start_job(&job, ALL, ALL);
        let Heard { output, end, cached, .. } = engine.end_of(id).await;
        let (reason, evaluated) = end.unwrap();
        assert_eq!(reason == FinishReason::Length, output.len() == 200, "{reason:?} after {}", output.len());
        let prompt = u32::try_from(job.prompt.len()).unwrap();
        assert_eq!(evaluated, prompt - cached + u32::try_from(output.len()).unwrap() - 1);
    }
}

fn is_running(process: u32) -> bool {
    // A zombie is gone too: it holds no memory and runs nothing.
    std::fs::read_to_string(format!("/proc/{process}/stat"))
        .is_ok_and(|stat| stat.rsplit(')').next().is_some_and(|rest| !rest.trim_start().starts_with('Z')))
}

fn assert_gone(process: u32) {
    assert!(!is_running(process), "process {process} is still there");
}
