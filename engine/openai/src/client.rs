//! HTTP to the server: bodies out, events in, each within its limits.

use std::time::Duration;

use serde_json::Value;
use tokio::time::timeout;

use crate::{
    config::{Dialect, UpstreamConfig},
    dialect::{self, Ask, Piece},
};

const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// One event of a stream, and one answer to a small question.
const MAX_EVENT_BYTES: usize = 4 << 20;
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// Why the server gave no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum UpstreamError {
    /// Nothing answers there: every job is lost until something does.
    #[error("it is not reached: {0}")]
    Unreachable(String),
    #[error("it answered {status}: {said}")]
    Status { status: u16, said: String },
    #[error("it says: {0}")]
    Said(String),
    #[error("it was silent for {0} s")]
    Silent(u64),
    #[error("its stream broke off")]
    BrokeOff,
    #[error("what it sends is not understood: {0}")]
    Garbled(String),
}

#[derive(Debug, Clone)]
pub(crate) struct Client {
    http: reqwest::Client,
    config: UpstreamConfig,
}

impl Client {
    pub(crate) fn new(config: UpstreamConfig) -> Client {
        let http = reqwest::Client::builder().connect_timeout(CONNECT_WITHIN).no_proxy().build();
        Client { http: http.unwrap_or_default(), config }
    }

    pub(crate) fn config(&self) -> &UpstreamConfig {
        &self.config
    }

    fn request(&self, method: reqwest::Method, path: &str) -> reqwest::RequestBuilder {
        let request = self.http.request(method, format!("{}{path}", self.config.url));
        match &self.config.key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }

    /// A small JSON answer to a question.
    pub(crate) async fn get(&self, path: &str) -> Result<Value, UpstreamError> {
        small(self.request(reqwest::Method::GET, path)).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Result<Value, UpstreamError> {
        small(self.request(reqwest::Method::POST, path).json(body)).await
    }

    /// Whether anything answers.
    pub(crate) async fn answers(&self) -> bool {
        !matches!(self.get("/v1/models").await, Err(UpstreamError::Unreachable(_) | UpstreamError::Silent(_)))
    }

    pub(crate) async fn stream(&self, dialect: Dialect, ask: &Ask<'_>) -> Result<Stream, UpstreamError> {
        let request = self.request(reqwest::Method::POST, dialect::path(dialect)).json(&dialect::body(dialect, ask));
        // With what it says of a refusal: that may never end either.
        let asked = async { checked(request.send().await.map_err(unreachable)?).await };
        let response = timeout(self.config.stall, asked).await;
        let response = response.map_err(|_| UpstreamError::Silent(self.config.stall.as_secs()))??;
        Ok(Stream { response, dialect, buffer: Vec::new(), stall: self.config.stall, ended: false })
    }
}

async fn small(request: reqwest::RequestBuilder) -> Result<Value, UpstreamError> {
    let ask = async {
        let mut response = checked(request.send().await.map_err(unreachable)?).await?;
        let mut body = Vec::new();
        while let Some(bytes) = response.chunk().await.map_err(|_| UpstreamError::BrokeOff)? {
            body.extend_from_slice(&bytes);
            if body.len() > MAX_EVENT_BYTES {
                return Err(UpstreamError::Garbled(format!("more than {MAX_EVENT_BYTES} bytes")));
            }
        }
        serde_json::from_slice(&body).map_err(|error| UpstreamError::Garbled(error.to_string()))
    };
    timeout(ANSWER_WITHIN, ask).await.unwrap_or(Err(UpstreamError::Silent(ANSWER_WITHIN.as_secs())))
}

fn unreachable(error: reqwest::Error) -> UpstreamError {
    if error.is_connect() {
        // The URL may hold a secret; the kind of failure is enough.
        UpstreamError::Unreachable("no connection".to_owned())
    } else {
        UpstreamError::BrokeOff
    }
}

async fn checked(mut response: reqwest::Response) -> Result<reqwest::Response, UpstreamError> {
    let status = response.status().as_u16();
    if response.status().is_success() {
        return Ok(response);
    }
    let said = response.chunk().await.ok().flatten().unwrap_or_default();
    let said: String = String::from_utf8_lossy(&said).chars().filter(|c| !c.is_control()).take(200).collect();
    Err(UpstreamError::Status { status, said })
}

/// An answer that comes piece by piece: server-sent events, or JSON lines. Dropping it ends the work upstream.
#[derive(Debug)]
pub(crate) struct Stream {
    response: reqwest::Response,
    dialect: Dialect,
    buffer: Vec<u8>,
    stall: Duration,
    ended: bool,
}

impl Stream {
    /// The next piece; `None` after the last. Dropping the future loses nothing.
    pub(crate) async fn next(&mut self, seen: usize) -> Result<Option<Piece>, UpstreamError> {
        while !self.ended {
            if let Some(line) = self.line() {
                let data = line.strip_prefix(b"data:").unwrap_or(&line).trim_ascii();
                let other = data.is_empty() || line.starts_with(b":") || line.starts_with(b"event:");
                if other {
                    continue;
                }
                if data == b"[DONE]" {
                    self.ended = true;
                    break;
                }
                let event = serde_json::from_slice(data).map_err(|error| UpstreamError::Garbled(error.to_string()))?;
                let piece = dialect::piece(self.dialect, &event, seen).map_err(UpstreamError::Said)?;
                return Ok(Some(piece));
            }
            let read = timeout(self.stall, self.response.chunk()).await;
            match read.map_err(|_| UpstreamError::Silent(self.stall.as_secs()))? {
                Ok(Some(bytes)) => self.buffer.extend_from_slice(&bytes),
                Ok(None) => self.ended = true,
                Err(_) => return Err(UpstreamError::BrokeOff),
            }
            if self.buffer.len() > MAX_EVENT_BYTES {
                return Err(UpstreamError::Garbled(format!("an event of more than {MAX_EVENT_BYTES} bytes")));
            }
        }
        Ok(None)
    }

    fn line(&mut self) -> Option<Vec<u8>> {
        let end = self.buffer.iter().position(|byte| *byte == b'\n')?;
        let mut line: Vec<u8> = self.buffer.drain(..=end).collect();
        while line.last().is_some_and(|byte| matches!(byte, b'\n' | b'\r')) {
            line.pop();
        }
        Some(line)
    }
}
