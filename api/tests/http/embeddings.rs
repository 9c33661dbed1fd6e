//! `POST /v1/embeddings` against a scripted service: its two encodings, what it refuses, and that a repeat is one run.

use axum::{body::Body, http::Request};
use serde_json::{Value, json};

use super::{World, chat, post, with_header};

fn ask(model: &str, extra: Value) -> Request<Body> {
    let mut body = json!({"model": model, "input": ["a", "b"]});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    post("/v1/embeddings", body)
}

#[tokio::test]
async fn rows_come_as_numbers_or_as_bytes() {
    let world = World::new();
    let answer = world.call(ask("embedder", json!({}))).await;
    assert_eq!(answer.status.as_u16(), 200);
    let list = answer.json();
    assert_eq!(
        (&list["object"], &list["model"]),
        (&json!("list"), &json!("org/tiny")),
        "the name that the service tells"
    );
    let data = list["data"].as_array().unwrap();
    for (at, row) in data.iter().enumerate() {
        assert_eq!((&row["object"], &row["index"]), (&json!("embedding"), &json!(at)));
        let numbers: Vec<f32> = serde_json::from_value(row["embedding"].clone()).unwrap();
        assert_eq!(numbers, [at as f32 + 0.5, -1.0, 1e-7]);
    }
    let usage = &list["usage"];
    assert!(usage["prompt_tokens"].as_u64() > Some(0) && usage["prompt_tokens"] == usage["total_tokens"], "{usage}");
    assert!(usage["cost_msat"].is_u64() && usage["receipt_ids"].is_array(), "{usage}");
    assert_eq!(answer.header("x-satgrid-cost-msat").unwrap(), usage["cost_msat"].to_string());

    let answer = world.call(ask("embedder", json!({"encoding_format": "base64", "dimensions": 3}))).await;
    // 0.5, -1 and 1e-7 as little-endian floats.
    assert_eq!(answer.json()["data"][0]["embedding"], "AAAAPwAAgL+Vv9Yz");
}

#[tokio::test]
async fn what_cannot_be_embedded_is_refused_by_name() {
    let world = World::new();
    for (request, code, param) in [
        (ask("org/tiny", json!({})), "unsupported_model", "model"),
        (ask("embedder", json!({"dimensions": 2})), "unsupported_value", "dimensions"),
        (ask("too-long", json!({})), "context_length_exceeded", "input"),
        (ask("embedder", json!({"input": {}})), "invalid_value", "input"),
        (ask("embedder", json!({"input": ["", "b"]})), "invalid_value", "input[0]"),
        (chat("embedder", json!({})), "unsupported_model", "model"),
    ] {
        let answer = world.call(request).await;
        let error = &answer.json()["error"];
        assert_eq!((answer.status.as_u16(), &error["param"]), (400, &json!(param)), "{error}");
        assert!(error["code"] == code || code == "invalid_value", "{error}");
    }
}

#[tokio::test]
async fn a_repeat_with_the_same_key_is_one_run() {
    let world = World::new();
    let keyed = || with_header(ask("embedder", json!({})), "idempotency-key", "once");
    let first = world.call(keyed()).await;
    let again = world.call(keyed()).await;
    assert_eq!(first.json(), again.json());
    assert_eq!(again.header("idempotent-replayed").unwrap(), "true");
    assert_eq!(world.service.calls.lock().unwrap().len(), 1);
}
