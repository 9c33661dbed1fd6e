//! One streamed completion over plain HTTP, as any client of the OpenAI API would send it.

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::io::Write;
use std::time::{Duration, Instant};

use super::client::Payment;
use super::nodes::Market;

/// Of the whole answer.
const WITHIN: Duration = Duration::from_secs(300);
/// How long no payment has been on its way when the last one is taken to be done on both sides.
const QUIET: Duration = Duration::from_millis(250);
const BETWEEN_WITHIN: Duration = Duration::from_secs(5);
/// Repeatable, and not stuck in a loop as greedy base models are.
const TEMPERATURE: f32 = 0.7;
const SEED: u64 = 42;

pub(super) struct Request {
    /// Ends in `/v1`.
    pub(super) url: String,
    pub(super) model: String,
    pub(super) prompt: String,
    pub(super) max_tokens: u32,
}

/// What came back.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Chat {
    pub(super) prompt: String,
    pub(super) text: String,
    pub(super) finish_reason: String,
    pub(super) usage: Usage,
    /// From sending the request to the first piece of text; a session and a first slice are in it.
    pub(super) first_token_ms: u64,
    pub(super) total_ms: u64,
    /// Tokens after the first, over the time after the first.
    pub(super) tokens_per_s: f64,
    /// The provider that was killed in the middle, by name.
    pub(super) killed: Option<String>,
}

/// The last chunk's `usage`: OpenAI's fields and ours.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Usage {
    pub(super) prompt_tokens: u32,
    pub(super) completion_tokens: u32,
    pub(super) cost_msat: u64,
    pub(super) cost_details: CostDetails,
    pub(super) receipt_ids: Vec<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct CostDetails {
    pub(super) routing_fees_msat: u64,
    pub(super) providers: Vec<Leg>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Leg {
    pub(super) provider: String,
    pub(super) receipt_id: Option<String>,
    pub(super) prompt_tokens: u32,
    pub(super) cached_tokens: u32,
    pub(super) completion_tokens: u32,
    pub(super) cost_msat: u64,
    pub(super) msat_per_mtok: Rates,
    pub(super) per_request_msat: u64,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Rates {
    pub(super) input: u64,
    pub(super) cached_input: u64,
    pub(super) output: u64,
}

/// Sends the request and reads to the end; `aloud` shows the text on standard error as it arrives.
pub(super) async fn stream(
    market: &mut Market,
    request: &Request,
    aloud: bool,
    kill_after: Option<u32>,
) -> anyhow::Result<Chat> {
    market.clock.say(format!("POST {}/chat/completions, streamed, at most {} tokens", request.url, request.max_tokens));
    let body = json!({
        "model": request.model,
        "messages": [{ "role": "user", "content": request.prompt }],
        "max_tokens": request.max_tokens, "temperature": TEMPERATURE, "seed": SEED,
        "stream": true, "stream_options": { "include_usage": true },
    });
    let client = reqwest::Client::builder().no_proxy().timeout(WITHIN).build()?;
    let sent = Instant::now();
    let response = client.post(format!("{}/chat/completions", request.url)).json(&body).send().await?;
    let status = response.status();
    if !status.is_success() {
        bail!("the gateway answers {status}: {}", response.text().await.unwrap_or_default());
    }
    if aloud {
        eprint!("\n    {}", request.prompt);
    }
    let mut stream = Stream { aloud, ..Stream::default() };
    let mut response = response;
    let mut killed = None;
    while let Some(bytes) = response.chunk().await.context("the stream broke off")? {
        stream.feed(&bytes, sent)?;
        if let Some(after) = kill_after.filter(|after| killed.is_none() && stream.pieces >= *after) {
            killed = Some(kill_serving(market, after).await?);
        }
    }
    if aloud {
        eprint!("\n\n");
    }
    let total = sent.elapsed();
    if !stream.done {
        bail!("the stream ended without [DONE]");
    }
    let usage: Usage = serde_json::from_value(stream.usage.context("the stream brought no usage")?)?;
    let first = stream.first.unwrap_or(total);
    let after_first = total.saturating_sub(first).as_secs_f64().max(1e-3);
    Ok(Chat {
        prompt: request.prompt.clone(),
        text: stream.text,
        finish_reason: stream.finish_reason.unwrap_or_default(),
        tokens_per_s: f64::from(usage.completion_tokens.saturating_sub(1)) / after_first,
        usage,
        first_token_ms: millis(first),
        total_ms: millis(total),
        killed,
    })
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Kills the one provider that the consumer has a session with, between two payments.
async fn kill_serving(market: &mut Market, after: u32) -> anyhow::Result<String> {
    let consumer = market.consumer()?.admin.status().await?.consumer.context("the consumer has no status")?;
    let session = consumer.sessions.last().context("text came without a session")?;
    between_payments(market).await?;
    let name = market.kill(session.provider).await?;
    eprintln!();
    market.clock.say(format!("{name} killed (SIGKILL) after {after} pieces of text"));
    Ok(name.to_owned())
}

/// ldk-node 0.7.1 closes a channel by force whose node is killed while a payment settles, and a slice below the dust
/// limit is then left to the miners. What that does to the books is for the tests of kills in mid-payment; here the
/// stream is what is watched.
async fn between_payments(market: &Market) -> anyhow::Result<()> {
    let consumer = market.consumer()?.admin.clone();
    let mut quiet_since = Instant::now();
    let deadline = quiet_since + BETWEEN_WITHIN;
    while quiet_since.elapsed() < QUIET && Instant::now() < deadline {
        if consumer.payments().await?.iter().any(Payment::is_flying) {
            quiet_since = Instant::now();
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

/// Server-sent events, put together from pieces of any size.
#[derive(Default)]
struct Stream {
    aloud: bool,
    buffer: Vec<u8>,
    text: String,
    pieces: u32,
    first: Option<Duration>,
    finish_reason: Option<String>,
    usage: Option<Value>,
    done: bool,
}

impl Stream {
    fn feed(&mut self, bytes: &[u8], sent: Instant) -> anyhow::Result<()> {
        self.buffer.extend_from_slice(bytes);
        while let Some(end) = self.buffer.windows(2).position(|pair| pair == b"\n\n") {
            let event: Vec<u8> = self.buffer.drain(..end + 2).collect();
            for line in String::from_utf8_lossy(&event).lines() {
                if let Some(data) = line.strip_prefix("data: ") {
                    self.event(data, sent)?;
                }
            }
        }
        Ok(())
    }

    fn event(&mut self, data: &str, sent: Instant) -> anyhow::Result<()> {
        if data == "[DONE]" {
            self.done = true;
            return Ok(());
        }
        let chunk: Value = serde_json::from_str(data).context("a chunk is no JSON")?;
        if !chunk["error"].is_null() {
            bail!("the gateway ended the stream: {}", chunk["error"]);
        }
        if let Some(text) = chunk["choices"][0]["delta"]["content"].as_str().filter(|text| !text.is_empty()) {
            self.first.get_or_insert_with(|| sent.elapsed());
            self.pieces += 1;
            self.text.push_str(text);
            if self.aloud {
                eprint!("{}", text.replace('\n', "\n    "));
                let _ = std::io::stderr().flush();
            }
        }
        if let Some(reason) = chunk["choices"][0]["finish_reason"].as_str() {
            self.finish_reason = Some(reason.to_owned());
        }
        if !chunk["usage"].is_null() {
            self.usage = Some(chunk["usage"].clone());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// However the network cuts them, events come out whole.
    #[test]
    fn events_from_pieces() {
        let events = "data: {\"choices\":[{\"delta\":{\"content\":\"zwölf \"}}]}\n\n: keep-alive\n\n\
            data: {\"choices\":[{\"delta\":{\"content\":\"sat\"},\"finish_reason\":\"stop\"}]}\n\n\
            data: {\"choices\":[],\"usage\":{\"cost_msat\":7}}\n\ndata: [DONE]\n\n";
        for size in [1, 2, 3, 7, 1_000] {
            let mut stream = Stream::default();
            for piece in events.as_bytes().chunks(size) {
                stream.feed(piece, Instant::now()).unwrap();
            }
            assert_eq!((stream.text.as_str(), stream.pieces, stream.done), ("zwölf sat", 2, true), "{size}");
            assert_eq!(stream.finish_reason.as_deref(), Some("stop"));
            assert_eq!(stream.usage.unwrap()["cost_msat"], 7);
        }
        let error = "data: {\"error\":{\"message\":\"both gone\"}}\n\n";
        assert!(Stream::default().feed(error.as_bytes(), Instant::now()).is_err());
    }
}
