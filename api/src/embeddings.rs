//! Rows of embedded texts as OpenAI's list: every row is gathered, then written once.

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::Serialize;

use crate::{
    collect::Bounded,
    completions::{COST, log_end},
    error::ApiError,
    reply::{CostReply, Head},
    request::Encoding,
    router::Edge,
    service::{Bill, CompletionEvent, CompletionStream},
};

#[derive(Serialize)]
struct EmbeddingList<'a> {
    object: &'static str,
    data: Vec<Embedding>,
    model: &'a str,
    usage: EmbeddingUsage,
}

#[derive(Serialize)]
struct Embedding {
    object: &'static str,
    index: usize,
    embedding: Numbers,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Numbers {
    Float(Vec<f32>),
    Base64(String),
}

#[derive(Serialize)]
struct EmbeddingUsage {
    prompt_tokens: u32,
    total_tokens: u32,
    #[serde(flatten)]
    cost: CostReply,
}

/// A row cannot be cut: only models that are trained for it keep a meaning, and no file says so.
pub(crate) async fn check_dimensions(edge: &Edge, model: &str, asked: Option<u32>) -> Result<(), ApiError> {
    let Some(asked) = asked else { return Ok(()) };
    let known = edge.service.models().await.into_iter().find(|known| known.id == model);
    match known.and_then(|known| known.embeds) {
        Some(numbers) if numbers != asked => {
            let message =
                format!("`{model}` gives rows of {numbers} numbers and does not allow others: leave `dimensions` out.");
            Err(ApiError::bad("unsupported_value", "dimensions", message))
        }
        // A model that is unknown or does not embed is told as such where it is asked.
        Some(_) | None => Ok(()),
    }
}

pub(crate) async fn whole(mut head: Head, encoding: Encoding, events: CompletionStream) -> Result<Response, ApiError> {
    let (mut data, mut events) = (Vec::new(), Bounded::new(events));
    loop {
        match events.next().await? {
            CompletionEvent::Started { model, fingerprint } => {
                head.model = model;
                head.fingerprint = fingerprint;
            }
            CompletionEvent::Embedding { row } => {
                let embedding = match encoding {
                    Encoding::Base64 => Numbers::Base64(STANDARD.encode(&row)),
                    Encoding::Float => Numbers::Float(
                        row.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
                    ),
                };
                data.push(Embedding { object: "embedding", index: data.len(), embedding });
            }
            CompletionEvent::Finished { bill, .. } => return Ok(object(&head, data, &bill)),
            CompletionEvent::Text { .. }
            | CompletionEvent::Reasoning { .. }
            | CompletionEvent::Logprobs { .. }
            | CompletionEvent::ToolCall { .. }
            | CompletionEvent::Arguments { .. }
            | CompletionEvent::Choice { .. }
            | CompletionEvent::Ended { .. } => {}
        }
    }
}

fn object(head: &Head, data: Vec<Embedding>, bill: &Bill) -> Response {
    log_end("embedded", bill);
    let tokens = bill.usage.prompt;
    let usage = EmbeddingUsage { prompt_tokens: tokens, total_tokens: tokens, cost: CostReply::of(bill) };
    let list = EmbeddingList { object: "list", data, model: &head.model, usage };
    let mut response = Json(list).into_response();
    response.headers_mut().insert(COST, bill.cost.0.into());
    response
}
