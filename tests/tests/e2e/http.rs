//! HTTP as a client of the OpenAI API speaks it, and the nodes' admin ports.

use super::market::{Market, Node};
use reqwest::{Client, Response};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const WITHIN: Duration = Duration::from_secs(90);

pub(crate) fn client() -> Client {
    Client::builder().no_proxy().timeout(WITHIN).build().unwrap()
}

/// A streamed request for `tokens` tokens that no end-of-text token cuts short.
pub(crate) fn long(market: &Market, tokens: u32) -> Value {
    json!({
        "model": market.model, "max_tokens": tokens, "seed": 7, "temperature": 1.0,
        "messages": [{ "role": "user", "content": "the light of the river" }],
        // The tiny model's end-of-text token.
        "logit_bias": { "2": -100 },
        "stream": true, "stream_options": { "include_usage": true },
    })
}

pub(crate) async fn post(market: &Market, body: &Value) -> Response {
    client().post(format!("{}/chat/completions", market.api)).json(body).send().await.unwrap()
}

pub(crate) async fn answer(response: Response) -> (u16, Value) {
    let status = response.status().as_u16();
    (status, response.json().await.unwrap())
}

/// A stream of server-sent events, read one by one.
pub(crate) struct Events {
    response: Response,
    buffer: Vec<u8>,
    pub(crate) pieces: u32,
    pub(crate) usage: Option<Value>,
    pub(crate) error: Option<Value>,
    pub(crate) done: bool,
}

impl Events {
    pub(crate) async fn open(market: &Market, body: &Value) -> Events {
        let response = post(market, body).await;
        let status = response.status();
        if !status.is_success() {
            panic!("{status}: {}", response.text().await.unwrap());
        }
        Events::of(response)
    }

    pub(crate) fn of(response: Response) -> Events {
        assert!(response.status().is_success(), "{}", response.status());
        Events { response, buffer: Vec::new(), pieces: 0, usage: None, error: None, done: false }
    }

    /// Reads on until so many pieces of text have come.
    pub(crate) async fn until(&mut self, pieces: u32) {
        while self.pieces < pieces && self.more().await {}
        assert!(self.pieces >= pieces, "only {} pieces: {:?}", self.pieces, self.error);
    }

    /// Reads on until the stream ends or breaks.
    pub(crate) async fn read_out(&mut self) {
        while self.more().await {}
    }

    async fn more(&mut self) -> bool {
        let Ok(Some(bytes)) = self.response.chunk().await else { return false };
        self.buffer.extend_from_slice(&bytes);
        while let Some(end) = self.buffer.windows(2).position(|pair| pair == b"\n\n") {
            let event: Vec<u8> = self.buffer.drain(..end + 2).collect();
            if let Some(data) = String::from_utf8(event).unwrap().trim().strip_prefix("data: ") {
                self.event(data);
            }
        }
        true
    }

    fn event(&mut self, data: &str) {
        if data == "[DONE]" {
            self.done = true;
            return;
        }
        let chunk: Value = serde_json::from_str(data).unwrap();
        if chunk["choices"][0]["delta"]["content"].as_str().is_some_and(|text| !text.is_empty()) {
            self.pieces += 1;
        }
        if !chunk["usage"].is_null() {
            self.usage = Some(chunk["usage"].clone());
        }
        if !chunk["error"].is_null() {
            self.error = Some(chunk["error"].clone());
        }
    }
}

/// `GET /admin/v1/PATH`; `None` where the node does not answer.
pub(crate) async fn admin(node: &Node, path: &str) -> Option<Value> {
    let token = std::fs::read_to_string(node.dir.join("admin-token")).ok()?;
    let request = client().get(format!("http://{}/admin/v1/{path}", node.admin)).bearer_auth(token.trim());
    request.send().await.ok()?.json().await.ok()
}

pub(crate) async fn admin_post(node: &Node, path: &str) -> Value {
    let token = std::fs::read_to_string(node.dir.join("admin-token")).unwrap();
    let request = client().post(format!("http://{}/admin/v1/{path}", node.admin)).bearer_auth(token.trim());
    request.send().await.unwrap().json().await.unwrap()
}

/// Asks every 50 ms until there is an answer.
pub(crate) async fn wait_for<T, F: Future<Output = Option<T>>>(
    what: &str,
    within: Duration,
    mut ask: impl FnMut() -> F,
) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = ask().await {
            return found;
        }
        assert!(began.elapsed() < within, "{what}: not within {} s", within.as_secs());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
