//! The engine against a small HTTP server written here: every dialect that gives ids, one that gives text only, grants,
//! cancellation, failures and a server that goes away.
#![allow(clippy::unwrap_used, clippy::wildcard_enum_match_arm)]

use axum::{
    Json, Router,
    body::Body,
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use bytes::Bytes;
use futures::StreamExt;
use satgrid_engine::{
    facts::ModelFacts,
    port::{Command, Engine, EngineEvent, EngineFacts, FinishReason, Job, JobError, JobId, Profile, Tokenizer},
    sampling::Sampling,
    toy::ToyTokenizer,
};
use satgrid_engine_openai::{Dialect, ProbeError, Served, UpstreamConfig, UpstreamEngine, probe};
use serde_json::{Value, json};
use std::{
    convert::Infallible,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

const REPLY: &str = "the light came slowly over the water and the stones grew bright until night";
const WITHIN: Duration = Duration::from_secs(20);

/// What the server does and has seen.
#[derive(Default)]
struct Upstream {
    asked: Mutex<Vec<Value>>,
    /// Pieces handed to the connection.
    sent: AtomicUsize,
    /// Answers 500 from this request on.
    fail_from: Option<usize>,
    /// Breaks the stream off after so many pieces.
    break_after: Option<usize>,
    other_tokens: bool,
    endless: bool,
    /// Refuses, and never says why.
    mute: bool,
}

type Up = State<Arc<Upstream>>;

async fn completion(State(up): Up, dialect: Dialect, body: Value) -> Response {
    let count = {
        let mut asked = up.asked.lock().unwrap();
        asked.push(body.clone());
        asked.len()
    };
    if up.fail_from.is_some_and(|from| count >= from) {
        return (StatusCode::INTERNAL_SERVER_ERROR, "out of memory").into_response();
    }
    if up.mute {
        let why = Body::from_stream(futures::stream::pending::<Result<Bytes, Infallible>>());
        return (StatusCode::BAD_GATEWAY, why).into_response();
    }
    let most = body["n_predict"].as_u64().or(body["max_tokens"].as_u64()).unwrap() as usize;
    let whole = ToyTokenizer.tokenize(REPLY, false, false).await.unwrap();
    let reply: Vec<u32> = if up.endless { whole.iter().copied().cycle().take(most).collect() } else { whole };
    let cut = reply.len().min(most);
    let limited = cut == most;
    let mut events = Vec::new();
    for id in &reply[..cut] {
        let piece = ToyTokenizer.pieces(&[*id], false).await.unwrap().concat();
        let text = String::from_utf8(piece).unwrap();
        events.push(match dialect {
            Dialect::LlamaServer => json!({ "content": text, "tokens": [id], "stop": false }),
            Dialect::Vllm => json!({ "choices": [{ "text": text, "token_ids": [id], "finish_reason": null }] }),
            _ => json!({ "choices": [{ "text": text, "finish_reason": null }] }),
        });
    }
    let why = if limited { "limit" } else { "eos" };
    let reason = if limited { "length" } else { "stop" };
    events.push(match dialect {
        Dialect::LlamaServer => json!({ "content": "", "tokens": [], "stop": true, "stop_type": why }),
        _ => json!({ "choices": [{ "text": "", "finish_reason": reason }] }),
    });
    if let Some(after) = up.break_after {
        events.truncate(after);
    }
    let counted = Arc::clone(&up);
    let broken = up.break_after.is_some();
    let frames = futures::stream::iter(events).map(move |event| {
        counted.sent.fetch_add(1, Ordering::SeqCst);
        Ok::<Bytes, Infallible>(Bytes::from(format!("data: {event}\n\n")))
    });
    let done = futures::stream::iter((!broken).then(|| Ok(Bytes::from_static(b"data: [DONE]\n\n"))));
    Response::new(Body::from_stream(frames.chain(done)))
}

async fn tokenize(State(up): Up, Json(body): Json<Value>) -> Json<Value> {
    let text = body["content"].as_str().or(body["prompt"].as_str()).unwrap();
    let mut tokens = ToyTokenizer.tokenize(text, false, false).await.unwrap();
    if up.other_tokens {
        tokens.pop();
    }
    Json(json!({ "tokens": tokens }))
}

/// Starts a server that is this one; its URL.
async fn serve(dialect: Dialect, up: Upstream) -> (Arc<Upstream>, String, tokio::task::JoinHandle<()>) {
    let up = Arc::new(up);
    let ask = move |state: Up, Json(body): Json<Value>| completion(state, dialect, body);
    let app = match dialect {
        Dialect::LlamaServer => Router::new()
            .route(
                "/props",
                get(|| async { Json(json!({ "default_generation_settings": {}, "build_info": "b1-test" })) }),
            )
            .route("/tokenize", post(tokenize))
            .route("/completion", post(ask)),
        Dialect::Vllm => Router::new()
            .route("/version", get(|| async { Json(json!({ "version": "0.11" })) }))
            .route("/tokenize", post(tokenize))
            .route("/v1/completions", post(ask)),
        _ => Router::new().route("/v1/completions", post(ask)),
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let state = Arc::clone(&up);
    let task = tokio::spawn(async move { axum::serve(listener, app.with_state(state)).await.unwrap() });
    (up, url, task)
}

fn facts() -> EngineFacts {
    let model = ModelFacts {
        architecture: "toy".into(),
        name: None,
        layers: 1,
        n_embd: 1,
        n_head: 1,
        n_head_kv: 1,
        context: 2_048,
        vocab: ToyTokenizer.vocab_size(),
        experts: 0,
        experts_used: 0,
        sliding_window: None,
        quantisation: "F16".into(),
        parameters: 1,
        tensor_bytes: 1,
        pooling: None,
        both_ways: false,
    };
    EngineFacts {
        model,
        model_root: [1; 32],
        tokenizer_hash: [2; 32],
        profile: Profile::Fast,
        build_id: [3; 32],
        instruction_set: "upstream".into(),
        slots: 2,
        context: 2_048,
        batch: 512,
        speed: None,
    }
}

fn job(id: u64, prompt: usize, max_output: u32) -> Job {
    Job {
        id: JobId(id),
        session: [7; 32],
        prompt: vec![101; prompt],
        sampling: Sampling::greedy(),
        max_output,
        stop: Vec::new(),
        ignore_eos: false,
        resumed: 0,
        extras: Default::default(),
    }
}

fn engine(url: &str, dialect: Dialect, retokenised: bool) -> Arc<UpstreamEngine> {
    let config = UpstreamConfig::new(url, "m", 2, 2_048);
    UpstreamEngine::new(config, Served { dialect, retokenised }, facts(), Arc::new(ToyTokenizer))
}

async fn next(engine: &UpstreamEngine) -> EngineEvent {
    tokio::time::timeout(WITHIN, engine.next_event()).await.unwrap().unwrap()
}

/// Everything of one job up to its end: the ids and how it ended.
async fn to_end(engine: &UpstreamEngine) -> (Vec<u32>, EngineEvent) {
    let mut ids = Vec::new();
    loop {
        match next(engine).await {
            EngineEvent::Tokens { first, ids: more, .. } => {
                assert_eq!(first as usize, ids.len());
                ids.extend(more);
            }
            EngineEvent::Prefilled { .. } => assert!(ids.is_empty()),
            end => return (ids, end),
        }
    }
}

async fn text(ids: &[u32]) -> String {
    String::from_utf8(ToyTokenizer.pieces(ids, false).await.unwrap().concat()).unwrap()
}

#[tokio::test]
async fn every_dialect_says_the_same() {
    for dialect in [Dialect::LlamaServer, Dialect::Vllm, Dialect::Text] {
        let (up, url, _task) = serve(dialect, Upstream::default()).await;
        let config = UpstreamConfig::new(&format!("{url}/v1/"), "m", 2, 2_048);
        let probed = probe(&config, &ToyTokenizer).await.unwrap();
        let text_only = dialect == Dialect::Text;
        assert_eq!(probed.served, Served { dialect, retokenised: text_only });
        let engine = engine(&url, dialect, text_only);
        engine.send(Command::Start(job(1, 40, 1_000))).unwrap();
        engine.send(Command::Grant { job: JobId(1), prompt_upto: 40, output_upto: 1_000 }).unwrap();
        let (ids, end) = to_end(&engine).await;
        assert_eq!(text(&ids).await, REPLY, "{dialect:?}");
        let evaluated = 40 + ids.len() as u32 - 1;
        assert_eq!(end, EngineEvent::Finished { job: JobId(1), reason: FinishReason::Stop, evaluated });
        let sent = up.asked.lock().unwrap().last().unwrap()["prompt"].clone();
        if text_only {
            assert_eq!(sent, text(&[101; 40]).await);
        } else {
            assert_eq!(sent, json!([101; 40].to_vec()), "the very ids go upstream");
        }
    }
}

#[tokio::test]
async fn nothing_runs_ahead_of_its_grant() {
    let (up, url, _task) = serve(Dialect::LlamaServer, Upstream { endless: true, ..Upstream::default() }).await;
    let engine = engine(&url, Dialect::LlamaServer, false);
    engine.send(Command::Start(job(1, 100, 60))).unwrap();
    engine.send(Command::Grant { job: JobId(1), prompt_upto: 64, output_upto: 0 }).unwrap();
    assert_eq!(next(&engine).await, EngineEvent::Prefilled { job: JobId(1), upto: 64, cached: 0 });
    assert_eq!(up.asked.lock().unwrap()[0]["prompt"].as_array().unwrap().len(), 64, "only what was granted");
    engine.send(Command::Grant { job: JobId(1), prompt_upto: 100, output_upto: 10 }).unwrap();
    let mut ids = 0;
    assert_eq!(next(&engine).await, EngineEvent::Prefilled { job: JobId(1), upto: 100, cached: 0 });
    while ids < 10 {
        let EngineEvent::Tokens { ids: more, .. } = next(&engine).await else { panic!() };
        ids += more.len();
    }
    assert_eq!(ids, 10);
    // Another job runs from start to end meanwhile.
    engine.send(Command::Start(job(2, 5, 4))).unwrap();
    engine.send(Command::Grant { job: JobId(2), prompt_upto: 5, output_upto: 4 }).unwrap();
    loop {
        match next(&engine).await {
            EngineEvent::Finished { job, reason, .. } => {
                assert_eq!((job, reason), (JobId(2), FinishReason::Length));
                break;
            }
            event => assert_eq!(event.job(), Some(JobId(2)), "{event:?}"),
        }
    }
    engine.send(Command::Grant { job: JobId(1), prompt_upto: 100, output_upto: 60 }).unwrap();
    let mut rest = 0;
    loop {
        match next(&engine).await {
            EngineEvent::Tokens { ids, .. } => rest += ids.len(),
            EngineEvent::Finished { reason, .. } => break assert_eq!((reason, rest), (FinishReason::Length, 50)),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_stop_string_and_a_cancellation_end_a_job() {
    let (_up, url, _task) = serve(Dialect::Vllm, Upstream { endless: true, ..Upstream::default() }).await;
    let engine = engine(&url, Dialect::Vllm, false);
    let stopping = Job { stop: vec!["over the".into()], ..job(1, 5, 1_000) };
    engine.send(Command::Start(stopping)).unwrap();
    engine.send(Command::Grant { job: JobId(1), prompt_upto: 5, output_upto: 1_000 }).unwrap();
    let (ids, end) = to_end(&engine).await;
    assert!(matches!(end, EngineEvent::Finished { reason: FinishReason::Stop, .. }));
    assert!(text(&ids).await.ends_with("over the"), "the token that completes it is the last");
    engine.send(Command::Start(job(2, 5, 1_000))).unwrap();
    engine.send(Command::Grant { job: JobId(2), prompt_upto: 5, output_upto: 3 }).unwrap();
    while !matches!(next(&engine).await, EngineEvent::Tokens { .. }) {}
    engine.send(Command::Cancel { job: JobId(2) }).unwrap();
    let (_, end) = async {
        loop {
            if let event @ EngineEvent::Finished { .. } = next(&engine).await {
                break ((), event);
            }
        }
    }
    .await;
    assert!(matches!(end, EngineEvent::Finished { reason: FinishReason::Cancelled, .. }));
}

#[tokio::test]
async fn what_fails_upstream_was_never_reported() {
    let (_up, url, _task) = serve(Dialect::Vllm, Upstream { fail_from: Some(1), ..Upstream::default() }).await;
    let failing = engine(&url, Dialect::Vllm, false);
    failing.send(Command::Start(job(1, 5, 9))).unwrap();
    failing.send(Command::Grant { job: JobId(1), prompt_upto: 5, output_upto: 9 }).unwrap();
    // No prefill and no token was reported: there is nothing to charge for.
    let EngineEvent::Failed { error: JobError::Backend { reason }, .. } = next(&failing).await else { panic!() };
    assert!(reason.contains("500"), "{reason}");
    // Some servers repeat what they were sent.
    assert!(!reason.contains("out of memory"), "{reason}");

    let (_up, url, _task) = serve(Dialect::LlamaServer, Upstream { break_after: Some(4), ..Upstream::default() }).await;
    let breaking = engine(&url, Dialect::LlamaServer, false);
    breaking.send(Command::Start(job(1, 5, 90))).unwrap();
    breaking.send(Command::Grant { job: JobId(1), prompt_upto: 5, output_upto: 90 }).unwrap();
    let (ids, end) = to_end(&breaking).await;
    assert_eq!(ids.len(), 4);
    assert!(matches!(end, EngineEvent::Failed { error: JobError::Backend { .. }, .. }), "{end:?}");
}

#[tokio::test]
async fn an_answer_without_a_word_is_nothing_to_charge_for() {
    let (_up, url, _task) = serve(Dialect::LlamaServer, Upstream { break_after: Some(0), ..Upstream::default() }).await;
    let silent = engine(&url, Dialect::LlamaServer, false);
    for (id, output_upto) in [(1, 0), (2, 9)] {
        silent.send(Command::Start(job(id, 5, 9))).unwrap();
        silent.send(Command::Grant { job: JobId(id), prompt_upto: 5, output_upto }).unwrap();
        let event = next(&silent).await;
        assert!(matches!(event, EngineEvent::Failed { error: JobError::Backend { .. }, .. }), "{event:?}");
    }
}

#[tokio::test]
async fn a_refusal_that_never_ends_is_given_up() {
    let (_up, url, _task) = serve(Dialect::Vllm, Upstream { mute: true, ..Upstream::default() }).await;
    let config = UpstreamConfig { stall: Duration::from_millis(200), ..UpstreamConfig::new(&url, "m", 2, 2_048) };
    let served = Served { dialect: Dialect::Vllm, retokenised: false };
    let engine = UpstreamEngine::new(config, served, facts(), Arc::new(ToyTokenizer));
    engine.send(Command::Start(job(1, 5, 9))).unwrap();
    engine.send(Command::Grant { job: JobId(1), prompt_upto: 5, output_upto: 9 }).unwrap();
    let event = next(&engine).await;
    assert!(matches!(event, EngineEvent::Failed { error: JobError::Backend { .. }, .. }), "{event:?}");
}

#[tokio::test]
async fn a_server_that_goes_away_takes_the_engine_down() {
    let (_up, url, task) = serve(Dialect::Vllm, Upstream::default()).await;
    let engine = engine(&url, Dialect::Vllm, false);
    task.abort();
    let _ = task.await;
    engine.send(Command::Start(job(1, 5, 9))).unwrap();
    engine.send(Command::Grant { job: JobId(1), prompt_upto: 5, output_upto: 9 }).unwrap();
    assert!(matches!(next(&engine).await, EngineEvent::Down { .. }));
    assert!(!engine.is_up());
    assert!(engine.send(Command::Start(job(2, 5, 9))).is_err());
    let gone = probe(&UpstreamConfig::new(&url, "m", 2, 2_048), &ToyTokenizer).await;
    assert!(matches!(gone, Err(ProbeError::NotServing { .. })), "{gone:?}");
}

#[tokio::test]
async fn another_tokenizer_is_not_sold() {
    let (_up, url, _task) = serve(Dialect::LlamaServer, Upstream { other_tokens: true, ..Upstream::default() }).await;
    let refused = probe(&UpstreamConfig::new(&url, "m", 2, 2_048), &ToyTokenizer).await;
    assert!(matches!(refused, Err(ProbeError::OtherTokenizer { .. })), "{refused:?}");
}
