//! A reply as one JSON object: every event is gathered, then written once.

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use futures::StreamExt;
use satgrid_types::FinishReason;

use crate::{
    completions::{COST, log_end},
    config::limits::{MAX_CHOICES, MAX_REPLY_BYTES},
    error::ApiError,
    logprobs::{ChatLogprobs, TextLogprobs},
    reply::{CallReply, Choice, Completion, Flavour, FunctionReply, Head, MessageReply, Null, UsageReply, finish_word},
    service::{Bill, CompletionEvent, CompletionStream, ServiceError, TokenLogprob},
};

/// One choice as far as it has come.
#[derive(Default)]
struct Gathered {
    text: String,
    reasoning: String,
    calls: Vec<(String, String)>,
    logprobs: Option<Vec<TokenLogprob>>,
    finish: Option<&'static str>,
}

impl Gathered {
    fn end(&mut self, reason: FinishReason) -> Option<()> {
        let word = finish_word(reason)?;
        // A reply that met its length may have cut a call, so it says so.
        let called = !self.calls.is_empty() && reason == FinishReason::Stop;
        self.finish = Some(if called { "tool_calls" } else { word });
        Some(())
    }

    fn word(&self) -> &'static str {
        self.finish.unwrap_or("stop")
    }
}

/// Events of a reply that is held in memory until its end: no more of them than a reply may have.
pub(crate) struct Bounded {
    events: CompletionStream,
    bytes: usize,
}

impl Bounded {
    pub(crate) fn new(events: CompletionStream) -> Bounded {
        Bounded { events, bytes: 0 }
    }

    /// The next event. There is one until the last: a stream that ends without it has failed.
    pub(crate) async fn next(&mut self) -> Result<CompletionEvent, ServiceError> {
        let event = self.events.next().await.ok_or_else(ServiceError::no_result)??;
        self.bytes = self.bytes.saturating_add(event.bytes());
        if self.bytes > MAX_REPLY_BYTES {
            return Err(ServiceError::reply_too_large());
        }
        Ok(event)
    }
}

pub(crate) async fn whole(mut head: Head, events: CompletionStream) -> Result<Response, ApiError> {
    let mut choices = vec![Gathered::default()];
    let (mut current, mut events) = (0, Bounded::new(events));
    loop {
        let event = events.next().await?;
        if let CompletionEvent::Choice { index } = event {
            current = index.min(MAX_CHOICES) as usize;
            choices.resize_with(choices.len().max(current + 1), Gathered::default);
            continue;
        }
        let Some(choice) = choices.get_mut(current) else { continue };
        match event {
            CompletionEvent::Started { model, fingerprint } => {
                head.model = model;
                head.fingerprint = fingerprint;
            }
            CompletionEvent::Text { delta } => choice.text.push_str(&delta),
            CompletionEvent::Reasoning { delta } => choice.reasoning.push_str(&delta),
            CompletionEvent::Logprobs { tokens } => choice.logprobs.get_or_insert_default().extend(tokens),
            CompletionEvent::ToolCall { name, .. } => choice.calls.push((name, String::new())),
            CompletionEvent::Arguments { index, delta } => {
                if let Some((_, arguments)) = choice.calls.get_mut(index as usize) {
                    arguments.push_str(&delta);
                }
            }
            CompletionEvent::Choice { .. } | CompletionEvent::Embedding { .. } => {}
            CompletionEvent::Ended { reason } => {
                choice.end(reason).ok_or_else(|| ServiceError::cut_short(Bill::default()))?;
            }
            CompletionEvent::Finished { reason, bill } => {
                choice.end(reason).ok_or_else(|| ServiceError::cut_short(bill.clone()))?;
                return Ok(object(&head, &choices, &bill));
            }
        }
    }
}

fn object(head: &Head, choices: &[Gathered], bill: &Bill) -> Response {
    choices.iter().for_each(|choice| log_end(choice.word(), bill));
    let indexed = (0_u32..).zip(choices);
    let (object, choices) = match head.flavour {
        Flavour::Chat => ("chat.completion", indexed.map(|(index, choice)| chat(head, index, choice)).collect()),
        Flavour::Text => ("text_completion", indexed.map(|(index, choice)| text(index, choice)).collect::<Vec<_>>()),
    };
    let usage = Some(Some(UsageReply::of(bill)));
    let mut response = Json(Completion::new(head, object, choices, usage)).into_response();
    response.headers_mut().insert(COST, bill.cost.0.into());
    response
}

fn chat<'a>(head: &Head, index: u32, choice: &'a Gathered) -> Choice<'a> {
    let calls = (0_u32..).zip(&choice.calls).map(|(call, (name, arguments))| CallReply {
        index: None,
        id: Some(head.call_id(index, call)),
        kind: Some("function"),
        function: FunctionReply { name: Some(name.clone()), arguments: arguments.clone() },
    });
    let silent = choice.text.is_empty() && !choice.calls.is_empty();
    let message = MessageReply {
        role: "assistant",
        // A reply that only calls tools says nothing.
        content: (!silent).then_some(choice.text.as_str()),
        refusal: Null,
        annotations: [],
        reasoning_content: (!choice.reasoning.is_empty()).then_some(choice.reasoning.as_str()),
        tool_calls: calls.collect(),
    };
    let logprobs = choice.logprobs.as_deref().map(ChatLogprobs::of);
    Choice::Message { index, message, logprobs, finish_reason: choice.word() }
}

fn text(index: u32, choice: &Gathered) -> Choice<'_> {
    let logprobs = choice.logprobs.as_deref().map(|tokens| TextLogprobs::of(tokens, &mut 0));
    Choice::Text { text: &choice.text, index, logprobs, finish_reason: Some(choice.word()) }
}
