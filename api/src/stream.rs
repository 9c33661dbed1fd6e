//! A completion as server-sent events.
//!
//! One task per stream pulls the work, one event at a time, and hands frames to the connection over a short channel.
//! A slow reader fills the channel and the pull stops; a reader that is gone, or takes nothing for the stall limit,
//! ends the task, which drops the work and so cancels it.
//!
//! Layout: an opening chunk with the role (chat), one chunk per delta, a chunk with `finish_reason`, one with usage if it
//! was asked for, `[DONE]`. An error is a `data: {"error": ...}` in place of the rest, with no `[DONE]` after it:
//! `[DONE]` means that the reply is whole.

use std::{collections::BTreeMap, convert::Infallible, sync::Arc, time::Duration};

use axum::{
    body::{Body, Bytes},
    http::{HeaderValue, header},
    response::Response,
};
use futures::StreamExt;
use serde::Serialize;
use tokio::{sync::mpsc, time::Instant};
use tokio_stream::wrappers::ReceiverStream;
use tracing::Instrument;

use crate::{
    completions::log_end,
    config::limits::{KEEP_ALIVE, MAX_REPLY_BYTES, STREAM_FRAMES},
    error::{ApiError, Envelope},
    logprobs::{ChatLogprobs, TextLogprobs},
    metrics::ApiMetrics,
    reply::{CallReply, Choice, Completion, Delta, Flavour, FunctionReply, Head, Null, UsageReply, finish_word},
    service::{Bill, CompletionEvent, CompletionStream, ServiceError, TokenLogprob},
    shutdown::Closing,
};

const COMMENT: &[u8] = b": keep-alive\n\n";

/// What a stream needs beside its events.
pub(crate) struct StreamJob {
    pub(crate) frames: Box<dyn Frames>,
    /// What was read while the status was still open; `None` if the wait for it ran out.
    pub(crate) first: Option<CompletionEvent>,
    pub(crate) events: CompletionStream,
    pub(crate) stalled_reader: Duration,
    pub(crate) deadline: Instant,
    /// The wait that `deadline` came from.
    pub(crate) max_request: Duration,
    pub(crate) closing: Closing,
    pub(crate) metrics: Arc<ApiMetrics>,
    /// Held while the stream lives.
    pub(crate) permit: tokio::sync::OwnedSemaphorePermit,
}

pub(crate) fn response(job: StreamJob) -> Response {
    let (tx, rx) = mpsc::channel(STREAM_FRAMES);
    tokio::spawn(pump(job, tx).in_current_span());
    let mut response = Response::new(Body::from_stream(ReceiverStream::new(rx).map(Ok::<Bytes, Infallible>)));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // nginx would otherwise collect the stream before passing it on.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

async fn pump(mut job: StreamJob, tx: mpsc::Sender<Bytes>) {
    let _open = job.metrics.stream_opened();
    let _permit = job.permit;
    let mut frames = job.frames;
    let mut silent_since = Instant::now();
    let mut next = job.first.map(Ok);
    if next.is_none() && !send(&tx, Bytes::from_static(COMMENT), job.stalled_reader).await {
        return;
    }
    loop {
        let event = match next.take() {
            Some(event) => Some(event),
            None => tokio::select! {
                biased;
                () = tx.closed() => {
                    job.metrics.client_left();
                    return;
                }
                () = job.closing.aborted() => Some(Err(ServiceError::closing())),
                () = tokio::time::sleep_until(job.deadline) => Some(Err(ServiceError::DeadlineExceeded { seconds: job.max_request.as_secs() })),
                event = job.events.next() => event,
                () = tokio::time::sleep_until(silent_since + KEEP_ALIVE) => {
                    if !send(&tx, Bytes::from_static(COMMENT), job.stalled_reader).await {
                        job.metrics.client_left();
                        return;
                    }
                    silent_since = Instant::now();
                    continue;
                }
            },
        };
        let written = frames.write(event);
        if !written.bytes.is_empty() {
            if !send(&tx, written.bytes, job.stalled_reader).await {
                job.metrics.client_left();
                return;
            }
            silent_since = Instant::now();
        }
        if written.last {
            return;
        }
    }
}

/// Whether the reader took it in time.
async fn send(tx: &mpsc::Sender<Bytes>, bytes: Bytes, stalled_reader: Duration) -> bool {
    matches!(tokio::time::timeout(stalled_reader, tx.send(bytes)).await, Ok(Ok(())))
}

/// What turns a completion's events into the frames of one endpoint.
pub(crate) trait Frames: Send {
    /// All frames of one event, as one write. An error, or an end before the end, has a frame too.
    fn write(&mut self, event: Option<Result<CompletionEvent, ServiceError>>) -> Written;
}

/// Chunks of a chat or a text completion.
pub(crate) struct ChunkWriter {
    head: Head,
    include_usage: bool,
    /// Whose events come now.
    current: u32,
    choices: BTreeMap<u32, ChoiceState>,
    bytes: usize,
}

/// What one choice has said.
#[derive(Default)]
struct ChoiceState {
    opened: bool,
    called: bool,
    /// Of the text that comes next.
    logprobs: Vec<TokenLogprob>,
    /// Where its text stands, in characters.
    offset: usize,
}

pub(crate) struct Written {
    pub(crate) bytes: Bytes,
    pub(crate) last: bool,
}

impl Frames for ChunkWriter {
    fn write(&mut self, event: Option<Result<CompletionEvent, ServiceError>>) -> Written {
        let mut out = Vec::new();
        let result = match event {
            Some(Ok(event)) => self.event(event, &mut out),
            Some(Err(error)) => Err(error),
            None => Err(ServiceError::no_result()),
        };
        let last = result.unwrap_or_else(|error| {
            let error = ApiError::from(error);
            tracing::warn!(status = error.status.as_u16(), message = error.body.message, "stream ended in an error");
            frame(&Envelope { error: &error.body }, &mut out);
            true
        });
        Written { bytes: Bytes::from(out), last }
    }
}

impl ChunkWriter {
    /// `current` is the choice whose events come first.
    pub(crate) fn new(head: Head, include_usage: bool, current: u32) -> ChunkWriter {
        ChunkWriter { head, include_usage, current, choices: BTreeMap::new(), bytes: 0 }
    }

    /// Whether it was the last event.
    fn event(&mut self, event: CompletionEvent, out: &mut Vec<u8>) -> Result<bool, ServiceError> {
        self.bytes = self.bytes.saturating_add(event.bytes());
        if self.bytes > MAX_REPLY_BYTES {
            return Err(ServiceError::reply_too_large());
        }
        match event {
            CompletionEvent::Started { model, fingerprint } => {
                // Every chunk carries the same head, so what comes late is not used.
                if self.choices.is_empty() {
                    self.head.model = model;
                    self.head.fingerprint = fingerprint;
                }
            }
            CompletionEvent::Choice { index } => self.current = index,
            // No stream is asked for rows.
            CompletionEvent::Embedding { .. } => {}
            CompletionEvent::Logprobs { tokens } => self.choice().logprobs.extend(tokens),
            CompletionEvent::Text { delta } if delta.is_empty() => {}
            CompletionEvent::Text { delta } => self.text(&delta, out),
            CompletionEvent::Reasoning { delta } => self.delta(Delta::Reasoning { reasoning_content: &delta }, out),
            CompletionEvent::ToolCall { index, name } => {
                self.choice().called = true;
                let call = CallReply {
                    index: Some(index),
                    id: Some(self.head.call_id(self.current, index)),
                    kind: Some("function"),
                    function: FunctionReply { name: Some(name), arguments: String::new() },
                };
                self.delta(Delta::Calls { tool_calls: [call] }, out);
            }
            CompletionEvent::Arguments { index, delta } => {
                let function = FunctionReply { name: None, arguments: delta };
                let call = CallReply { index: Some(index), id: None, kind: None, function };
                self.delta(Delta::Calls { tool_calls: [call] }, out);
            }
            CompletionEvent::Ended { reason } => {
                let word = finish_word(reason).ok_or_else(|| ServiceError::cut_short(Bill::default()))?;
                self.end(word, &Bill::default(), out);
            }
            CompletionEvent::Finished { reason, bill } => {
                let Some(word) = finish_word(reason) else {
                    return Err(ServiceError::cut_short(bill));
                };
                self.end(word, &bill, out);
                if self.include_usage {
                    let usage = Some(Some(UsageReply::of(&bill)));
                    frame(&Completion::<Choice<'_>>::new(&self.head, self.object(), Vec::new(), usage), out);
                }
                out.extend_from_slice(b"data: [DONE]\n\n");
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn choice(&mut self) -> &mut ChoiceState {
        self.choices.entry(self.current).or_default()
    }

    /// Chat streams begin with the role.
    fn open(&mut self, out: &mut Vec<u8>) {
        let index = self.current;
        let opened = std::mem::replace(&mut self.choice().opened, true);
        if !opened && self.head.flavour == Flavour::Chat {
            let delta = Delta::Opening { role: "assistant", content: "", refusal: Null };
            self.write_choice(Choice::Delta { index, delta, logprobs: None, finish_reason: None }, out);
        }
    }

    fn text(&mut self, text: &str, out: &mut Vec<u8>) {
        self.open(out);
        let (index, flavour) = (self.current, self.head.flavour);
        let choice = self.choice();
        let tokens = std::mem::take(&mut choice.logprobs);
        let written = match flavour {
            Flavour::Chat => {
                let logprobs = (!tokens.is_empty()).then(|| ChatLogprobs::of(&tokens));
                Choice::Delta { index, delta: Delta::Content { content: text }, logprobs, finish_reason: None }
            }
            Flavour::Text => {
                let logprobs = (!tokens.is_empty()).then(|| TextLogprobs::of(&tokens, &mut choice.offset));
                Choice::Text { text, index, logprobs, finish_reason: None }
            }
        };
        self.write_choice(written, out);
    }

    fn delta(&mut self, delta: Delta<'_>, out: &mut Vec<u8>) {
        self.open(out);
        self.write_choice(Choice::Delta { index: self.current, delta, logprobs: None, finish_reason: None }, out);
    }

    fn end(&mut self, word: &'static str, bill: &Bill, out: &mut Vec<u8>) {
        self.open(out);
        // A reply that met its length may have cut a call, so it says so.
        let word = if self.choice().called && word == "stop" { "tool_calls" } else { word };
        log_end(word, bill);
        let (index, finish_reason) = (self.current, Some(word));
        let choice = match self.head.flavour {
            Flavour::Chat => Choice::Delta { index, delta: Delta::Closing {}, logprobs: None, finish_reason },
            Flavour::Text => Choice::Text { text: "", index, logprobs: None, finish_reason },
        };
        self.write_choice(choice, out);
    }

    fn write_choice(&self, choice: Choice<'_>, out: &mut Vec<u8>) {
        // OpenAI: `usage` is null in every chunk but the last when it was asked for, and absent when not.
        let usage = self.include_usage.then_some(None);
        frame(&Completion::new(&self.head, self.object(), vec![choice], usage), out);
    }

    const fn object(&self) -> &'static str {
        match self.head.flavour {
            Flavour::Chat => "chat.completion.chunk",
            Flavour::Text => "text_completion",
        }
    }
}

/// `data: JSON` and an empty line. JSON has no raw line break, so one line is enough.
fn frame(object: &impl Serialize, out: &mut Vec<u8>) {
    out.extend_from_slice(b"data: ");
    // Strings and integers into memory: this cannot fail.
    if serde_json::to_writer(&mut *out, object).is_err() {
        tracing::error!("a chunk could not be written as JSON");
    }
    out.extend_from_slice(b"\n\n");
}
