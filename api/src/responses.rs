//! `/v1/responses`: one reply as OpenAI's response object, whole or as its typed events.
//!
//! The same fold makes both: it turns a completion's events into items (thinking, a message, calls) and writes an event for
//! each change; a whole reply is what is there at the end. Nothing is kept after that.
//!
//! | an item is | opened by | closed by |
//! |---|---|---|
//! | `reasoning` | thinking | anything else |
//! | `message` | text | a call, or the end |
//! | `function_call` | a call | the next one, text, or the end |

use axum::{
    Json,
    body::Bytes,
    response::{IntoResponse, Response},
};
use futures::StreamExt;
use satgrid_types::FinishReason;
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::{
    completions::{COST, log_end},
    config::limits::MAX_REPLY_BYTES,
    error::ApiError,
    logprobs::ChatLogprobs,
    reply::{CostReply, Head, finish_word},
    request::Echo,
    service::{Bill, CompletionEvent, CompletionStream, ServiceError, TokenLogprob},
    stream::{Frames, Written},
};

/// What OpenAI's schema calls a failure inside a response.
const FAILED: &str = "server_error";

pub(crate) async fn whole(head: Head, echo: Echo, mut events: CompletionStream) -> Result<Response, ApiError> {
    let mut reply = Reply::new(head, echo);
    loop {
        let event = match events.next().await {
            Some(event) => event?,
            None => return Err(ServiceError::no_result().into()),
        };
        if reply.event(event)? {
            let cost = reply.bill.cost.0;
            let mut response = Json(reply.object()).into_response();
            response.headers_mut().insert(COST, cost.into());
            return Ok(response);
        }
        reply.frames.clear();
    }
}

/// A reply under way.
pub(crate) struct Reply {
    head: Head,
    echo: Echo,
    items: Vec<Item>,
    /// Whether the last item still grows.
    open: bool,
    status: Status,
    bill: Bill,
    error: Option<(String, &'static str)>,
    /// Of the text that comes next.
    logprobs: Vec<TokenLogprob>,
    bytes: usize,
    sequence: u64,
    begun: bool,
    frames: Vec<u8>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Status {
    InProgress,
    Completed,
    /// It met the longest length that was asked for, or the model's context.
    Incomplete,
    Failed,
}

impl Status {
    const fn as_str(self) -> &'static str {
        match self {
            Status::InProgress => "in_progress",
            Status::Completed => "completed",
            Status::Incomplete => "incomplete",
            Status::Failed => "failed",
        }
    }
}

struct Item {
    kind: Kind,
    id: String,
    status: Status,
}

enum Kind {
    Reasoning { text: String },
    Message { text: String, logprobs: Vec<TokenLogprob> },
    Call { index: u32, call_id: String, name: String, arguments: String },
}

#[derive(Serialize)]
struct Usage {
    input_tokens: u32,
    input_tokens_details: Value,
    output_tokens: u32,
    output_tokens_details: Value,
    total_tokens: u32,
    #[serde(flatten)]
    cost: CostReply,
}

impl Item {
    fn part(&self) -> Value {
        match &self.kind {
            Kind::Reasoning { text } => json!({ "type": "reasoning_text", "text": text }),
            Kind::Message { text, logprobs } => {
                json!({ "type": "output_text", "text": text, "annotations": [], "logprobs": logprob_list(logprobs) })
            }
            Kind::Call { .. } => Value::Null,
        }
    }

    fn object(&self) -> Value {
        let status = self.status.as_str();
        match &self.kind {
            // As an item is added it has no part yet: those are events of their own.
            Kind::Reasoning { text } => {
                let content = if text.is_empty() { json!([]) } else { json!([self.part()]) };
                json!({ "id": self.id, "type": "reasoning", "status": status, "summary": [], "content": content })
            }
            Kind::Message { text, .. } => {
                let content =
                    if text.is_empty() && self.status == Status::InProgress { json!([]) } else { json!([self.part()]) };
                json!({ "id": self.id, "type": "message", "status": status, "role": "assistant", "content": content })
            }
            Kind::Call { call_id, name, arguments, .. } => json!({
                "id": self.id, "type": "function_call", "status": status, "call_id": call_id, "name": name,
                "arguments": arguments,
            }),
        }
    }
}

fn logprob_list(tokens: &[TokenLogprob]) -> Value {
    if tokens.is_empty() {
        return json!([]);
    }
    let written = serde_json::to_value(ChatLogprobs::of(tokens)).unwrap_or_default();
    written.get("content").cloned().unwrap_or_else(|| json!([]))
}

impl Reply {
    pub(crate) fn new(head: Head, echo: Echo) -> Reply {
        Reply {
            head,
            echo,
            items: Vec::new(),
            open: false,
            status: Status::InProgress,
            bill: Bill::default(),
            error: None,
            logprobs: Vec::new(),
            bytes: 0,
            sequence: 0,
            begun: false,
            frames: Vec::new(),
        }
    }

    /// Whether it was the last event.
    fn event(&mut self, event: CompletionEvent) -> Result<bool, ServiceError> {
        self.bytes = self.bytes.saturating_add(event.bytes());
        if self.bytes > MAX_REPLY_BYTES {
            return Err(ServiceError::reply_too_large());
        }
        if let CompletionEvent::Started { model, fingerprint } = event {
            if !self.begun {
                self.head.model = model;
                self.head.fingerprint = fingerprint;
            }
            return Ok(false);
        }
        self.begin();
        match event {
            CompletionEvent::Started { .. } | CompletionEvent::Choice { .. } | CompletionEvent::Embedding { .. } => {}
            CompletionEvent::Logprobs { tokens } => self.logprobs.extend(tokens),
            CompletionEvent::Text { delta } if delta.is_empty() => {}
            CompletionEvent::Text { delta } => self.text(&delta),
            CompletionEvent::Reasoning { delta } => self.reasoning(&delta),
            CompletionEvent::ToolCall { index, name } => {
                self.close(Status::Completed);
                let call_id = self.head.call_id(0, index);
                self.add("fc", Kind::Call { index, call_id, name, arguments: String::new() });
            }
            CompletionEvent::Arguments { index, delta } => self.arguments(index, &delta),
            CompletionEvent::Ended { reason } => {
                finish_word(reason).ok_or_else(|| ServiceError::cut_short(Bill::default()))?;
            }
            CompletionEvent::Finished { reason, bill } => {
                let word = finish_word(reason).ok_or_else(|| ServiceError::cut_short(bill.clone()))?;
                log_end(word, &bill);
                let status = if reason == FinishReason::Length { Status::Incomplete } else { Status::Completed };
                if self.items.is_empty() {
                    // Nothing was said: clients read the text of the first message all the same.
                    self.message();
                }
                self.close(status);
                self.status = status;
                self.bill = bill;
                let kind = if status == Status::Completed { "response.completed" } else { "response.incomplete" };
                self.whole_event(kind);
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn begin(&mut self) {
        if !std::mem::replace(&mut self.begun, true) {
            self.whole_event("response.created");
            self.whole_event("response.in_progress");
        }
    }

    fn text(&mut self, delta: &str) {
        if !(self.open && matches!(self.last(), Some(Kind::Message { .. }))) {
            self.message();
        }
        let tokens = std::mem::take(&mut self.logprobs);
        let written = logprob_list(&tokens);
        if let Some(Item { kind: Kind::Message { text, logprobs }, .. }) = self.items.last_mut() {
            text.push_str(delta);
            logprobs.extend(tokens);
        }
        self.of_part("response.output_text.delta", json!({ "delta": delta, "logprobs": written }));
    }

    fn message(&mut self) {
        self.close(Status::Completed);
        self.add("msg", Kind::Message { text: String::new(), logprobs: Vec::new() });
        let part = json!({ "type": "output_text", "text": "", "annotations": [], "logprobs": [] });
        self.of_part("response.content_part.added", json!({ "part": part }));
    }

    fn reasoning(&mut self, delta: &str) {
        if !(self.open && matches!(self.last(), Some(Kind::Reasoning { .. }))) {
            self.close(Status::Completed);
            self.add("rs", Kind::Reasoning { text: String::new() });
            let part = json!({ "type": "reasoning_text", "text": "" });
            self.of_part("response.content_part.added", json!({ "part": part }));
        }
        if let Some(Item { kind: Kind::Reasoning { text }, .. }) = self.items.last_mut() {
            text.push_str(delta);
        }
        self.of_part("response.reasoning_text.delta", json!({ "delta": delta }));
    }

    /// Calls come one after the other, so it is the last item's; another's would be a mistake of ours and is left out.
    fn arguments(&mut self, wanted: u32, delta: &str) {
        if let Some(Item { kind: Kind::Call { index, arguments, .. }, .. }) = self.items.last_mut()
            && *index == wanted
        {
            arguments.push_str(delta);
            self.of_item("response.function_call_arguments.delta", json!({ "delta": delta }));
        }
    }

    fn last(&self) -> Option<&Kind> {
        self.items.last().map(|item| &item.kind)
    }

    fn add(&mut self, prefix: &str, kind: Kind) {
        let number = self.items.len();
        let id = format!("{prefix}_{}{number:04x}", self.head.id.rsplit('_').next().unwrap_or_default());
        self.items.push(Item { kind, id, status: Status::InProgress });
        self.open = true;
        self.of_output("response.output_item.added");
    }

    /// Ends the item that grows, if one does.
    fn close(&mut self, status: Status) {
        if !std::mem::replace(&mut self.open, false) {
            return;
        }
        let Some(item) = self.items.last_mut() else { return };
        item.status = status;
        let part = item.part();
        match &item.kind {
            Kind::Reasoning { text } => {
                let text = text.clone();
                self.of_part("response.reasoning_text.done", json!({ "text": text }));
                self.of_part("response.content_part.done", json!({ "part": part }));
            }
            Kind::Message { text, logprobs } => {
                let done = json!({ "text": text, "logprobs": logprob_list(logprobs) });
                self.of_part("response.output_text.done", done);
                self.of_part("response.content_part.done", json!({ "part": part }));
            }
            Kind::Call { name, arguments, .. } => {
                let done = json!({ "name": name, "arguments": arguments });
                self.of_item("response.function_call_arguments.done", done);
            }
        }
        self.of_output("response.output_item.done");
    }

    /// An event about the last item's only part.
    fn of_part(&mut self, kind: &str, mut fields: Value) {
        fields["content_index"] = json!(0);
        self.of_item(kind, fields);
    }

    /// An event about the last item.
    fn of_item(&mut self, kind: &str, mut fields: Value) {
        fields["item_id"] = json!(self.items.last().map(|item| item.id.as_str()));
        self.frame(kind, fields, self.items.len().saturating_sub(1));
    }

    /// An event that holds the last item.
    fn of_output(&mut self, kind: &str) {
        let item = self.items.last().map(Item::object);
        self.frame(kind, json!({ "item": item }), self.items.len().saturating_sub(1));
    }

    fn frame(&mut self, kind: &str, mut fields: Value, output_index: usize) {
        fields["output_index"] = json!(output_index);
        self.write(kind, fields);
    }

    /// An event that holds the response as it is.
    fn whole_event(&mut self, kind: &str) {
        let fields = json!({ "response": self.object() });
        self.write(kind, fields);
    }

    fn write(&mut self, kind: &str, mut fields: Value) {
        fields["type"] = json!(kind);
        fields["sequence_number"] = json!(self.sequence);
        self.sequence += 1;
        // JSON has no raw line break, so one line is enough.
        self.frames.extend_from_slice(format!("event: {kind}\ndata: {fields}\n\n").as_bytes());
    }

    fn object(&self) -> Value {
        let Head { id, created, model, fingerprint, .. } = &self.head;
        let ended = self.status != Status::InProgress;
        let incomplete = (self.status == Status::Incomplete).then(|| json!({ "reason": "max_output_tokens" }));
        let error = self.error.as_ref().map(|(message, code)| json!({ "code": code, "message": message }));
        let Echo { max_output_tokens, parallel_tool_calls, top_logprobs, .. } = &self.echo;
        let mut object = Map::from_iter([
            ("id".to_owned(), json!(id)),
            ("object".to_owned(), json!("response")),
            ("created_at".to_owned(), json!(created)),
            ("status".to_owned(), json!(self.status.as_str())),
            ("background".to_owned(), json!(false)),
            ("error".to_owned(), json!(error)),
            ("incomplete_details".to_owned(), json!(incomplete)),
            ("max_output_tokens".to_owned(), json!(max_output_tokens)),
            ("model".to_owned(), json!(model)),
            ("output".to_owned(), self.items.iter().map(Item::object).collect()),
            ("parallel_tool_calls".to_owned(), json!(parallel_tool_calls)),
            ("previous_response_id".to_owned(), Value::Null),
            ("store".to_owned(), json!(false)),
            ("top_logprobs".to_owned(), json!(top_logprobs)),
            ("truncation".to_owned(), json!("disabled")),
            ("usage".to_owned(), if ended { json!(self.usage()) } else { Value::Null }),
        ]);
        object.extend(self.echo.repeated());
        if let Some(fingerprint) = fingerprint {
            object.insert("system_fingerprint".to_owned(), json!(fingerprint));
        }
        Value::Object(object)
    }

    fn usage(&self) -> Usage {
        let usage = &self.bill.usage;
        Usage {
            input_tokens: usage.prompt,
            input_tokens_details: json!({ "cached_tokens": usage.cached_prompt, "cache_write_tokens": 0 }),
            output_tokens: usage.completion,
            output_tokens_details: json!({ "reasoning_tokens": usage.reasoning }),
            total_tokens: usage.prompt.saturating_add(usage.completion),
            cost: CostReply::of(&self.bill),
        }
    }

    fn fail(&mut self, error: ServiceError) {
        if let ServiceError::ProviderFailed { bill: Some(bill), .. } = &error {
            self.bill = (**bill).clone();
        }
        let error = ApiError::from(error);
        tracing::warn!(status = error.status.as_u16(), message = error.body.message, "stream ended in an error");
        self.begin();
        self.close(Status::Incomplete);
        self.status = Status::Failed;
        // OpenAI's list of codes is closed; the finer one goes into the message.
        self.error = Some((format!("{} ({})", error.body.message, error.body.code()), FAILED));
        self.whole_event("response.failed");
    }
}

impl Frames for Reply {
    fn write(&mut self, event: Option<Result<CompletionEvent, ServiceError>>) -> Written {
        let result = match event {
            Some(Ok(event)) => self.event(event),
            Some(Err(error)) => Err(error),
            None => Err(ServiceError::no_result()),
        };
        let last = result.unwrap_or_else(|error| {
            self.fail(error);
            true
        });
        Written { bytes: Bytes::from(std::mem::take(&mut self.frames)), last }
    }
}
