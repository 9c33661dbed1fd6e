//! What the logs hold: the request's id on every line, and never a prompt or a reply.
#![allow(clippy::unwrap_used)]

mod support;

use std::{
    io::Write,
    sync::{Arc, Mutex},
};

use axum::{body::Body, http::Request};
use http_body_util::BodyExt;
use satgrid_api::{Api, ApiConfig, ApiKey};
use tower::ServiceExt;
use tracing_subscriber::fmt::MakeWriter;

#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Lines;
    fn make_writer(&'a self) -> Lines {
        self.clone()
    }
}

#[tokio::test(start_paused = true)]
async fn every_line_names_its_request_and_none_tells_what_was_said() {
    let lines = Lines::default();
    let subscriber = tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_writer(lines.clone());
    // Tests run their runtime on this thread, so the streams' tasks log here too.
    let _guard = tracing::subscriber::set_default(subscriber.with_ansi(false).finish());

    let secret = "PROMPT-THAT-NOBODY-MAY-READ";
    let config = ApiConfig { keys: vec![ApiKey::new("alice", "sk-secret-key")], ..ApiConfig::default() };
    let api = Api::new(Arc::new(support::Scripted::default()), config);
    let models = [
        "org/tiny",
        "breaks",
        "no-funds",
        "too-long",
        "internal",
        "panics",
        "panics-late",
        "no-result",
        "none\nforged=line",
    ];
    let good = models.map(|model| {
        serde_json::json!({"model": model, "messages": [{"role": "user", "content": secret}], "stop": secret})
            .to_string()
    });
    let bad = [format!("{{\"messages\": \"{secret}\""), format!("{{\"model\": 1, \"{secret}\": \"{secret}\"}}")];
    for (n, body) in good.into_iter().chain(bad).enumerate() {
        for (stream, key) in [(true, "sk-secret-key"), (false, "sk-secret-key"), (false, "sk-wrong-key")] {
            let request = Request::post("/v1/chat/completions")
                .header("x-request-id", "trace-7")
                .header("idempotency-key", format!("{secret}-{n}-{stream}"))
                .header("authorization", format!("Bearer {key}"))
                .body(Body::from(body.replacen('{', &format!("{{\"stream\": {stream}, "), 1)))
                .unwrap();
            api.router().oneshot(request).await.unwrap().into_body().collect().await.unwrap();
        }
    }
    let log = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
    for unwanted in [secret, "Hello", "Hel", "sk-secret", "sk-wrong"] {
        assert!(!log.contains(unwanted), "{unwanted} in:\n{log}");
    }
    for wanted in [
        "completion asked",
        "completion ended",
        "cost_msat=210",
        "disk is full",
        "the script says so late",
        "turned away",
    ] {
        assert!(log.contains(wanted), "no {wanted:?} in:\n{log}");
    }
    for line in log.lines().filter(|line| line.contains("satgrid_api")) {
        assert!(line.contains("request_id=trace-7"), "{line}");
    }
    assert!(!log.lines().any(|line| line.starts_with("forged")), "{log}");
}
