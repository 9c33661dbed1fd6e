//! The edge called in process: statuses, exact bytes, limits, waits in moved time.
//!
//! `UPDATE_GOLDEN=1 cargo test -p satgrid-api` rewrites `tests/golden/`; read the difference before committing it.
#![allow(clippy::unwrap_used)]

#[path = "http/embeddings.rs"]
mod embeddings;
mod support;

use std::{
    net::SocketAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::ConnectInfo,
    http::{HeaderMap, Request, StatusCode},
};
use futures::{StreamExt, stream};
use http_body_util::BodyExt;
use satgrid_api::{Api, ApiConfig, ApiKey, limits};
use satgrid_types::UnixMs;
use serde_json::{Value, json};
use support::Scripted;
use tower::ServiceExt;

struct World {
    service: Arc<Scripted>,
    router: Router,
    _api: Api,
}

struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    text: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|e| panic!("{e}: {}", self.text))
    }
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|v| v.to_str().unwrap())
    }
}

/// Fixed clock, counted ids.
fn config() -> ApiConfig {
    let next = AtomicU8::new(1);
    ApiConfig {
        clock: Arc::new(|| UnixMs(1_700_000_000_500)),
        entropy: Arc::new(move || [next.fetch_add(1, Ordering::SeqCst); 32]),
        ..ApiConfig::default()
    }
}

impl World {
    fn new() -> World {
        World::with(config())
    }

    fn with(config: ApiConfig) -> World {
        let service = Arc::new(Scripted::default());
        let api = Api::new(service.clone(), config);
        World { service, router: api.router(), _api: api }
    }

    /// The response's head at once, its body still to be read.
    async fn open(&self, mut request: Request<Body>) -> axum::response::Response {
        if request.headers_mut().remove("x-test-remote").is_none() {
            let here = SocketAddr::from(([127, 0, 0, 1], 50_000));
            request.extensions_mut().insert(ConnectInfo(here));
        }
        self.router.clone().oneshot(request).await.unwrap()
    }

    async fn call(&self, request: Request<Body>) -> Answer {
        let response = self.open(request).await;
        let (parts, body) = response.into_parts();
        let text = String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap();
        Answer { status: parts.status, headers: parts.headers, text }
    }

    async fn chat(&self, model: &str, extra: Value) -> Answer {
        self.call(chat(model, extra)).await
    }

    fn calls(&self) -> usize {
        self.service.calls.lock().unwrap().len()
    }

    fn produced(&self) -> usize {
        self.service.produced.load(Ordering::SeqCst)
    }

    fn cancelled(&self) -> usize {
        self.service.cancelled.load(Ordering::SeqCst)
    }
}

fn get(path: &str) -> Request<Body> {
    Request::get(path).body(Body::empty()).unwrap()
}

fn post(path: &str, body: impl ToString) -> Request<Body> {
    Request::post(path).header("content-type", "application/json").body(Body::from(body.to_string())).unwrap()
}

fn chat(model: &str, extra: Value) -> Request<Body> {
    let mut body = json!({"model": model, "messages": [{"role": "user", "content": "hi"}]});
    for (key, value) in extra.as_object().unwrap() {
        body[key] = value.clone();
    }
    post("/v1/chat/completions", body)
}

fn with_header(mut request: Request<Body>, name: &'static str, value: &str) -> Request<Body> {
    request.headers_mut().insert(name, value.parse().unwrap());
    request
}

fn golden(name: &str, got: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, got).unwrap();
    }
    let want = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(got, want, "{name} differs from its golden file");
}

#[tokio::test(start_paused = true)]
async fn replies_have_openais_shape_to_the_byte() {
    let usage = json!({"stream": true, "stream_options": {"include_usage": true}});
    let response =
        |model: &str, stream| post("/v1/responses", json!({"model": model, "input": "hi", "stream": stream}));
    let text = |stream| post("/v1/completions", json!({"model": "org/tiny", "prompt": "hi", "stream": stream}));
    for (name, request) in [
        ("chat.json", chat("org/tiny", json!({}))),
        ("chat-two-providers.json", chat("two-legs", json!({}))),
        ("chat.sse", chat("org/tiny", json!({"stream": true}))),
        ("chat-usage.sse", chat("two-legs", usage)),
        ("chat-breaks.sse", chat("breaks", json!({"stream": true}))),
        ("chat-runs-dry.sse", chat("runs-dry", json!({"stream": true}))),
        ("chat-calls.json", chat("thinks-and-calls", json!({}))),
        ("chat-calls.sse", chat("thinks-and-calls", json!({"stream": true}))),
        ("chat-cut-in-a-call.json", chat("cut-in-a-call", json!({}))),
        ("text.json", text(false)),
        ("text.sse", text(true)),
        ("response.json", response("org/tiny", false)),
        ("response-calls.json", response("thinks-and-calls", false)),
        ("response-calls.sse", response("thinks-and-calls", true)),
        ("response-incomplete.json", response("two-legs", false)),
        ("response-breaks.sse", response("breaks", true)),
        ("models.json", get("/v1/models")),
        ("model.json", get("/v1/models/org/tiny")),
        ("tokenize.json", post("/v1/tokenize", json!({"model": "org/tiny", "prompt": "hi"}))),
        ("detokenize.json", post("/v1/detokenize", json!({"model": "org/tiny", "tokens": [104, 105]}))),
        ("health.json", get("/health")),
    ] {
        let answer = World::new().call(request).await;
        assert_eq!(answer.status, StatusCode::OK, "{name}: {}", answer.text);
        let kind = if name.ends_with("sse") { "text/event-stream; charset=utf-8" } else { "application/json" };
        assert_eq!(answer.header("content-type"), Some(kind), "{name}");
        golden(name, &answer.text);
    }
}

#[tokio::test(start_paused = true)]
async fn any_text_survives_the_stream() {
    let whole = World::new().chat("nasty", json!({})).await.json()["choices"][0]["message"]["content"].clone();
    assert_eq!(whole, format!("{}lo", support::NASTY));
    let streamed = World::new().chat("nasty", json!({"stream": true})).await;
    let data = streamed.text.split_terminator("\n\n").map(|frame| frame.strip_prefix("data: ").unwrap());
    let (done, chunks) = data.collect::<Vec<_>>().split_last().map(|(last, rest)| (*last, rest.to_vec())).unwrap();
    assert_eq!(done, "[DONE]");
    let chunks = chunks.iter().map(|chunk| serde_json::from_str::<Value>(chunk).unwrap());
    let deltas = chunks.map(|chunk| chunk["choices"][0]["delta"]["content"].as_str().unwrap_or_default().to_owned());
    assert_eq!(deltas.collect::<String>(), whole);
}

#[tokio::test(start_paused = true)]
async fn every_refusal_has_its_status_and_code() {
    let mut errors = String::new();
    for (model, status, retry, after) in [
        ("nobody-has-it", 404, None, None),
        ("no-funds", 402, Some("false"), None),
        ("key-limit", 402, Some("false"), None),
        ("too-dear", 402, Some("false"), None),
        ("too-long", 400, None, None),
        ("bad-param", 400, None, None),
        ("no-provider", 503, None, None),
        ("busy", 503, None, Some("7")),
        ("not-ready", 503, None, None),
        ("fails", 502, None, None),
        ("fails-charged", 502, Some("false"), None),
        ("cut", 502, Some("false"), None),
        ("internal", 500, None, None),
        ("panics", 500, None, None),
        ("no-result", 500, None, None),
    ] {
        let answer = World::new().chat(model, json!({})).await;
        assert_eq!(answer.status.as_u16(), status, "{model}: {}", answer.text);
        assert_eq!(answer.header("x-should-retry"), retry, "{model}");
        assert_eq!(answer.header("retry-after"), after, "{model}");
        assert!(answer.header("x-request-id").is_some(), "{model}");
        assert!(!answer.text.contains("secret"), "details of our faults stay in the log");
        errors += &format!("{model}: {status} {}\n", answer.text);
        // What is known before the first text is a status for a stream as well.
        if !["cut", "no-result"].contains(&model) {
            let streamed = World::new().chat(model, json!({"stream": true})).await;
            assert_eq!((streamed.status, &streamed.text), (answer.status, &answer.text), "{model} streamed");
        }
    }
    golden("errors.txt", &errors);
    for key in [None, Some("k")] {
        let mut request = chat("panics-late", json!({"stream": true}));
        if let Some(key) = key {
            request = with_header(request, "idempotency-key", key);
        }
        let broken = World::new().call(request).await;
        assert!(broken.text.ends_with("\"code\":\"internal_error\"}}\n\n"), "{}", broken.text);
    }
    let late = World::new().chat("breaks-first", json!({"stream": true})).await;
    assert_eq!(late.status, StatusCode::SERVICE_UNAVAILABLE, "an error before the first text");
}

#[tokio::test(start_paused = true)]
async fn paths_and_methods_that_are_not_there() {
    let world = World::new();
    for (request, status, code) in [
        (get("/"), 404, "not_found"),
        (get("/v1"), 404, "not_found"),
        (get("/v1/nothing"), 404, "not_found"),
        (post("/v1/audio/speech", "{}"), 404, "not_found"),
        (post("/v1/images/generations", "{}"), 404, "not_found"),
        (get("/v1/files"), 404, "not_found"),
        (post("/v1/batches", "{}"), 404, "not_found"),
        (get("/v1/models/none/such"), 404, "model_not_found"),
        (post("/v1/tokenize", json!({"model": "none", "prompt": "x"})), 404, "model_not_found"),
        (post("/v1/embeddings", json!({"model": "embedder"})), 400, "missing_required_parameter"),
        (get("/v1/chat/completions"), 405, "method_not_allowed"),
        (post("/v1/models", "{}"), 405, "method_not_allowed"),
        (post("/v1/chat/completions", "{nope"), 400, "invalid_json"),
        (chat("org/tiny", json!({"messages": []})), 400, "invalid_value"),
    ] {
        let what = format!("{} {}", request.method(), request.uri());
        let answer = world.call(request).await;
        let error = &answer.json()["error"];
        assert_eq!((answer.status.as_u16(), error["code"].as_str()), (status, Some(code)), "{what}");
        assert!(error["message"].is_string() && error["type"].is_string() && error.get("param").is_some(), "{what}");
        assert!(answer.header("x-request-id").is_some(), "{what}");
        if status == 405 {
            assert!(answer.header("allow").is_some(), "{what}");
        }
    }
    assert_eq!(world.calls(), 0, "nothing reached the service");
}

#[tokio::test(start_paused = true)]
async fn health_says_why_not() {
    let world = World::new();
    world.service.not_ready.lock().unwrap().push("no channel is open".into());
    let answer = world.call(with_header(get("/health"), "x-test-remote", "1")).await;
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(answer.json(), json!({"status": "unavailable", "reasons": ["no channel is open"]}));
}

#[tokio::test(start_paused = true)]
async fn the_service_gets_our_id_and_the_clients_trace() {
    let world = World::with(ApiConfig { keys: vec![ApiKey::new("alice", "sk-a")], ..config() });
    let request = with_header(chat("org/tiny", json!({"seed": 5})), "x-request-id", "my-trace");
    let answer = world.call(with_header(request, "authorization", "Bearer sk-a")).await;
    assert_eq!(answer.header("x-request-id"), Some("my-trace"));
    assert_eq!(answer.header("x-satgrid-cost-msat"), Some("210"));
    let (request, context) = world.service.calls.lock().unwrap()[0].clone();
    assert_eq!((context.trace.as_str(), context.key.as_deref()), ("my-trace", Some("alice")));
    assert_eq!(answer.json()["id"], format!("chatcmpl-{}", context.request));
    assert_eq!(request.sampling.seed, 5);
    assert!(context.deadline.is_some());
    let stranger = world.call(with_header(chat("org/tiny", json!({})), "x-test-remote", "1")).await;
    assert_eq!((stranger.status.as_u16(), stranger.json()["error"]["code"].as_str()), (401, Some("invalid_api_key")));
    assert_eq!(world.calls(), 1);
}

#[tokio::test(start_paused = true)]
async fn browsers_get_cors_only_where_they_may_call() {
    let world = World::new();
    let preflight = |origin: &str| {
        let request = Request::options("/v1/chat/completions").body(Body::empty()).unwrap();
        let request = with_header(request, "access-control-request-method", "POST");
        let request = with_header(request, "access-control-request-headers", "authorization,content-type");
        with_header(request, "origin", origin)
    };
    let local = world.call(preflight("http://localhost:3000")).await;
    assert_eq!(local.status, StatusCode::OK);
    assert_eq!(local.header("access-control-allow-origin"), Some("http://localhost:3000"));
    assert_eq!(local.header("access-control-allow-headers"), Some("authorization,content-type"));
    let foreign = world.call(preflight("https://evil.example")).await;
    assert_eq!(foreign.header("access-control-allow-origin"), None);
    let posted = world.call(with_header(chat("org/tiny", json!({})), "origin", "https://evil.example")).await;
    assert_eq!((posted.status.as_u16(), world.calls()), (403, 0));
    let page = world.call(with_header(get("/v1/models"), "origin", "http://localhost:3000")).await;
    assert_eq!(page.header("access-control-allow-origin"), Some("http://localhost:3000"));
    assert!(page.header("access-control-expose-headers").unwrap().contains("x-request-id"));
}

#[tokio::test(start_paused = true)]
async fn a_silent_stream_shows_that_it_lives() {
    let world = World::new();
    let start = tokio::time::Instant::now();
    let response = world.open(chat("slow", json!({"stream": true}))).await;
    assert_eq!((response.status(), start.elapsed()), (StatusCode::OK, limits::FIRST_EVENT_WAIT));
    let mut frames = response.into_body().into_data_stream();
    let mut seen = Vec::new();
    while let Some(frame) = frames.next().await {
        let frame = String::from_utf8(frame.unwrap().to_vec()).unwrap();
        seen.push((start.elapsed().as_secs(), frame.lines().filter(|l| !l.is_empty()).count(), frame));
    }
    let times: Vec<_> = seen.iter().map(|(at, lines, _)| (*at, *lines)).collect();
    // A comment when the status was sent, then after every 15 s of silence; role and text come in one write.
    assert_eq!(times, [(10, 1), (25, 1), (40, 2), (55, 1), (56, 1), (56, 2)], "{seen:#?}");
    for comment in [0, 1, 3] {
        assert_eq!(seen[comment].2, ": keep-alive\n\n");
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_leaves_stops_the_work() {
    let world = World::new();
    let response = world.open(chat("hangs", json!({"stream": true}))).await;
    let mut frames = response.into_body().into_data_stream();
    assert!(frames.next().await.is_some());
    assert_eq!(world.cancelled(), 0);
    drop(frames);
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert_eq!(world.cancelled(), 1);

    // Before the head was sent, and without streaming.
    for stream in [true, false] {
        let before = world.cancelled();
        let extra = json!({"stream": stream});
        let model = if stream { "slow" } else { "hangs" };
        let asked = tokio::time::timeout(Duration::from_secs(1), world.open(chat(model, extra)));
        assert!(asked.await.is_err());
        assert_eq!(world.cancelled(), before + 1, "stream: {stream}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_slow_reader_holds_the_work_back_and_a_stalled_one_ends_it() {
    let world = World::new();
    let response = world.open(chat("endless", json!({"stream": true}))).await;
    let mut frames = response.into_body().into_data_stream();
    tokio::time::sleep(Duration::from_secs(1)).await;
    // Those in the channel, the one being sent, nothing more.
    let bound = limits::STREAM_FRAMES + 1;
    assert_eq!(world.produced(), bound);
    for _ in 0..10 {
        assert!(frames.next().await.is_some());
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(world.produced(), bound + 10);
    tokio::time::sleep(ApiConfig::default().stalled_reader).await;
    assert_eq!(world.cancelled(), 1, "the reader took nothing for the whole limit");
}

#[tokio::test(start_paused = true)]
async fn an_endless_reply_ends_in_an_error() {
    let whole = World::new().chat("endless", json!({})).await;
    assert_eq!(whole.status, StatusCode::INTERNAL_SERVER_ERROR);
    let streamed = World::new().chat("endless", json!({"stream": true})).await;
    assert!(streamed.text.len() > limits::MAX_REPLY_BYTES);
    let last = streamed.text.trim_end().rsplit("\n\n").next().unwrap();
    assert!(last.starts_with("data: {\"error\":"), "{last}");
}

#[tokio::test(start_paused = true)]
async fn work_that_takes_too_long_is_given_up() {
    let limit = Duration::from_secs(100);
    let world = World::with(ApiConfig { max_request: limit, ..config() });
    let start = tokio::time::Instant::now();
    let whole = world.chat("hangs", json!({})).await;
    assert_eq!((whole.status.as_u16(), whole.header("x-should-retry")), (504, Some("false")));
    assert_eq!(start.elapsed(), limit);
    let streamed = world.chat("hangs", json!({"stream": true})).await;
    assert!(streamed.text.contains("deadline_exceeded") && !streamed.text.contains("[DONE]"), "{}", streamed.text);
    assert_eq!(world.cancelled(), 2);
}

#[tokio::test(start_paused = true)]
async fn bodies_are_bounded_in_size_and_time() {
    let world = World::with(ApiConfig { max_body_bytes: 200, ..config() });
    let fits = chat("org/tiny", json!({"user": "x".repeat(80)}));
    assert_eq!(world.call(fits).await.status, StatusCode::OK);
    let large = chat("org/tiny", json!({"user": "x".repeat(200)}));
    let answer = world.call(large).await;
    assert_eq!((answer.status.as_u16(), answer.json()["error"]["code"].as_str()), (413, Some("request_too_large")));

    let drip = stream::iter([Ok::<_, std::io::Error>(Bytes::from_static(b"{"))]).chain(stream::pending());
    let request = Request::post("/v1/chat/completions").body(Body::from_stream(drip)).unwrap();
    assert_eq!(world.call(request).await.status, StatusCode::REQUEST_TIMEOUT);
    let broken = stream::iter([Ok(Bytes::from_static(b"{")), Err(std::io::Error::other("gone"))]);
    let request = Request::post("/v1/chat/completions").body(Body::from_stream(broken)).unwrap();
    assert_eq!(world.call(request).await.json()["error"]["code"], "incomplete_body");
}

#[tokio::test(start_paused = true)]
async fn more_than_the_node_can_carry_is_refused_at_once() {
    let world = World::with(ApiConfig { max_in_flight: 1, ..config() });
    let open = world.open(chat("hangs", json!({"stream": true}))).await;
    let second = world.chat("org/tiny", json!({})).await;
    assert_eq!((second.status.as_u16(), second.json()["error"]["code"].as_str()), (503, Some("busy")));
    assert!(second.header("retry-after").is_some());
    drop(open);
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert_eq!(world.chat("org/tiny", json!({})).await.status, StatusCode::OK, "the slot is free again");
}

#[tokio::test(start_paused = true)]
async fn an_idempotency_key_is_billed_once() {
    let world = World::new();
    let keyed = |request| with_header(request, "idempotency-key", "k1");
    let first = world.call(keyed(chat("org/tiny", json!({})))).await;
    let again = world.call(keyed(chat("org/tiny", json!({})))).await;
    assert_eq!((again.status, &again.text), (StatusCode::OK, &first.text));
    assert_eq!((first.header("idempotent-replayed"), again.header("idempotent-replayed")), (None, Some("true")));
    assert_eq!(world.calls(), 1);

    let other = world.call(keyed(chat("org/tiny", json!({"seed": 1})))).await;
    assert_eq!((other.status.as_u16(), other.json()["error"]["code"].as_str()), (422, Some("idempotency_key_reused")));

    // A stream that broke off at the client is taken up again with the same id, from its start.
    let keyed = |request| with_header(request, "idempotency-key", "k2");
    let request = || keyed(chat("gated", json!({"stream": true})));
    let mut frames = world.open(request()).await.into_body().into_data_stream();
    let begun = frames.next().await.unwrap().unwrap();
    drop(frames);
    tokio::time::sleep(Duration::from_secs(1)).await;
    world.service.gate.notify_one();
    let whole = world.call(request()).await;
    assert!(whole.text.starts_with(std::str::from_utf8(&begun).unwrap()) && whole.text.ends_with("data: [DONE]\n\n"));
    assert_eq!((world.calls(), world.cancelled()), (2, 0));

    // A refusal costs nothing and may be tried again.
    let keyed = |request| with_header(request, "idempotency-key", "k3");
    for calls in [3, 4] {
        assert_eq!(world.call(keyed(chat("busy", json!({})))).await.status.as_u16(), 503);
        assert_eq!(world.calls(), calls);
    }
    let long = with_header(chat("org/tiny", json!({})), "idempotency-key", &"k".repeat(256));
    assert_eq!(world.call(long).await.status, StatusCode::BAD_REQUEST);
}
