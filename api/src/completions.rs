//! `POST /v1/chat/completions`, `POST /v1/completions`, `/v1/responses` and `/v1/embeddings`: parse, admit, then one JSON object
//! or a stream.
//!
//! The status stays open until the first text, the end, an error, or [`FIRST_EVENT_WAIT`]: so a refusal or a provider
//! that fails at once is an HTTP error, and a long prefill shows life in time.

use std::{panic::AssertUnwindSafe, sync::Arc};

use axum::{
    Extension,
    extract::{Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode},
    response::Response,
};
use futures::{StreamExt, TryStreamExt, stream};
use satgrid_types::{RequestId, TokenUsage};
use sha2::{Digest, Sha256};
use tokio::time::{Instant, timeout_at};

use crate::{
    body::{self, busy},
    choices::{self, Reply},
    collect,
    config::limits::{FIRST_EVENT_WAIT, MAX_IDEMPOTENCY_KEY_BYTES},
    door, embeddings,
    error::ApiError,
    gate::Caller,
    idempotency::{Identity, JoinError, Joined, RunKey},
    reply::{Flavour, Head, finish_word},
    request::{self, Echo, Encoding, Parsed},
    responses,
    router::Edge,
    service::{Bill, CallContext, CompletionEvent, CompletionRequest, CompletionStream, Prompt, Service, ServiceError},
    stream::{ChunkWriter, Frames, StreamJob, response},
};

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const IDEMPOTENT_REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");
pub(crate) const COST: HeaderName = HeaderName::from_static("x-satgrid-cost-msat");

pub(crate) async fn chat(
    State(edge): State<Arc<Edge>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    complete(edge, caller, Endpoint::Chunks(Flavour::Chat), request).await
}

pub(crate) async fn text(
    State(edge): State<Arc<Edge>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    complete(edge, caller, Endpoint::Chunks(Flavour::Text), request).await
}

pub(crate) async fn responses(
    State(edge): State<Arc<Edge>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    let answer = complete(edge, caller, Endpoint::Responses, request).await;
    answer.map_err(|error| error.renamed("messages", "input").renamed("max_tokens", "max_output_tokens"))
}

pub(crate) async fn embeddings(
    State(edge): State<Arc<Edge>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    let answer = complete(edge, caller, Endpoint::Embeddings, request).await;
    answer.map_err(|error| error.renamed("messages", "input"))
}

/// How a reply is read and written.
#[derive(Debug, Clone, Copy)]
enum Endpoint {
    Chunks(Flavour),
    Responses,
    Embeddings,
}

/// What the reply's writer must know of the request.
enum Form {
    Completion,
    Response(Box<Echo>),
    Rows(Encoding),
}

impl Endpoint {
    const fn id_prefix(self) -> &'static str {
        match self {
            Endpoint::Chunks(flavour) => flavour.id_prefix(),
            Endpoint::Responses => "resp_",
            Endpoint::Embeddings => "embd-",
        }
    }

    async fn read(self, edge: &Edge, body: &[u8]) -> Result<(Parsed, Form), ApiError> {
        let fresh_seed = fresh_seed(edge);
        match self {
            Endpoint::Chunks(flavour) => {
                request::completion(flavour, body, fresh_seed).map(|parsed| (parsed, Form::Completion))
            }
            Endpoint::Responses => {
                request::response(body, fresh_seed).map(|(parsed, echo)| (parsed, Form::Response(Box::new(echo))))
            }
            Endpoint::Embeddings => {
                let (parsed, encoding, dimensions) = request::embeddings(body)?;
                embeddings::check_dimensions(edge, &parsed.request.model, dimensions).await?;
                Ok((parsed, Form::Rows(encoding)))
            }
        }
    }

    const fn flavour(self) -> Flavour {
        match self {
            Endpoint::Chunks(flavour) => flavour,
            Endpoint::Responses | Endpoint::Embeddings => Flavour::Chat,
        }
    }

    /// Apart from the others in the keys of runs.
    const fn number(self) -> u8 {
        match self {
            Endpoint::Chunks(Flavour::Text) => 0,
            Endpoint::Chunks(Flavour::Chat) => 1,
            Endpoint::Responses => 2,
            Endpoint::Embeddings => 3,
        }
    }
}

async fn complete(edge: Arc<Edge>, caller: Caller, endpoint: Endpoint, request: Request) -> Result<Response, ApiError> {
    if edge.closing.is_draining() {
        return Err(ServiceError::closing().into());
    }
    caller.may_infer()?;
    // Nothing is read for what could not be begun. A place is taken once all of it is here: who sends slowly holds none.
    if edge.in_flight.available_permits() == 0 {
        return Err(busy().into());
    }
    let (parts, body) = request.into_parts();
    let run_key = run_key(&parts.headers, &caller, endpoint)?;
    let body = body::read(&edge, body).await?;
    let permit = Arc::clone(&edge.in_flight).try_acquire_owned().map_err(|_| busy())?;
    let (parsed, form) = endpoint.read(&edge, &body).await?;
    let payer = caller.key.clone().map(|key| (key, caller.address.clone()));
    let (stream, include_usage) = (parsed.stream, parsed.include_usage);
    let run_key = run_key.map(|key| (key, Sha256::digest(&*body).into()));
    drop(body);

    let deadline = Instant::now() + edge.config.max_request;
    let model = parsed.request.model.clone();
    let Joined { identity, mut events, replayed } = begin(&edge, caller, deadline, run_key, parsed)?;
    tracing::info!(completion = %identity.request.short(), ?model, stream, replayed, "completion asked");
    let mut head = Head {
        flavour: endpoint.flavour(),
        id: format!("{}{}", endpoint.id_prefix(), identity.request),
        created: identity.created,
        model,
        fingerprint: None,
    };
    let max_request = edge.config.max_request;
    let mut closing = edge.closing.clone();
    let work = async {
        if !stream {
            return match form {
                Form::Completion => collect::whole(head, events).await,
                Form::Response(echo) => responses::whole(head, *echo, events).await,
                Form::Rows(encoding) => embeddings::whole(head, encoding, events).await,
            };
        }
        let (choice, first) = first_event(&mut head, &mut events).await?;
        let frames: Box<dyn Frames> = match form {
            Form::Response(echo) => Box::new(responses::Reply::new(head, *echo)),
            Form::Completion | Form::Rows(_) => Box::new(ChunkWriter::new(head, include_usage, choice)),
        };
        Ok(response(StreamJob {
            frames,
            first,
            events,
            stalled_reader: edge.config.stalled_reader,
            deadline,
            max_request,
            closing: edge.closing.clone(),
            metrics: Arc::clone(&edge.metrics),
            permit,
        }))
    };
    let mut response = tokio::select! {
        answered = work => match answered {
            Ok(response) => response,
            Err(error) => return Err(door::with_top_up(&edge, payer, error).await),
        },
        () = closing.aborted() => return Err(ServiceError::closing().into()),
        () = tokio::time::sleep_until(deadline) => {
            return Err(ServiceError::DeadlineExceeded { seconds: max_request.as_secs() }.into());
        }
    };
    if replayed {
        response.headers_mut().insert(IDEMPOTENT_REPLAYED, HeaderValue::from_static("true"));
    }
    Ok(response)
}

/// Starts the work, or joins it where the caller's key and body were seen before.
fn begin(
    edge: &Edge,
    caller: Caller,
    deadline: Instant,
    run_key: Option<(RunKey, [u8; 32])>,
    parsed: Parsed,
) -> Result<Joined, ApiError> {
    let identity = Identity { request: RequestId((edge.config.entropy)()), created: (edge.config.clock)().as_secs() };
    let Caller { trace, key, .. } = caller;
    let context = CallContext { request: identity.request, trace, key, deadline: Some(deadline) };
    let Parsed { request, others, echo, .. } = parsed;
    // Each reply is reserved and settled by an id of its own.
    let fresh = others.into_iter().map(|(prompt, other)| {
        let context = CallContext { request: RequestId((edge.config.entropy)()), ..context.clone() };
        (prompt, other, context)
    });
    let all: Vec<_> = std::iter::once((0, request, context.clone())).chain(fresh).collect();
    let service = Arc::clone(&edge.service);
    let start = move || -> CompletionStream {
        let replies = all.into_iter().map(|(prompt, request, context)| {
            let events = one(Arc::clone(&service), request, context, echo);
            Reply { prompt, events }
        });
        choices::merge(replies.collect())
    };
    let Some((key, body)) = run_key else { return Ok(Joined { identity, events: start(), replayed: false }) };
    edge.runs.join(key, body, identity, &edge.closing, start).map_err(|error| match error {
        JoinError::OtherBody => ApiError::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            "idempotency_key_reused",
            "This Idempotency-Key was used with another body.",
        ),
        JoinError::Full => busy().into(),
    })
}

/// One reply, from its service.
fn one(service: Arc<dyn Service>, request: CompletionRequest, context: CallContext, echo: bool) -> CompletionStream {
    let begun = async move {
        let prefix = if echo { echoed(&*service, &request).await? } else { None };
        let events = service.complete(request, context).await?;
        let prefix = prefix.map(|delta| Ok(CompletionEvent::Text { delta }));
        Ok::<_, ServiceError>(stream::iter(prefix).chain(events))
    };
    let events = stream::once(begun).try_flatten();
    // Streams run in tasks of their own, where a panic would be a silence: nobody after it would answer.
    let caught = AssertUnwindSafe(events).catch_unwind();
    Box::pin(caught.map(|event| event.unwrap_or_else(|panic| Err(ServiceError::panicked(&*panic)))))
}

/// The prompt's text, which the reply begins with.
async fn echoed(service: &dyn Service, request: &CompletionRequest) -> Result<Option<String>, ServiceError> {
    match &request.prompt {
        Prompt::Text(text) => Ok(Some(text.clone())),
        Prompt::Tokens(tokens) => service.detokenize(request.model.clone(), tokens.clone()).await.map(Some),
        Prompt::Messages(_) | Prompt::Embed(_) => Ok(None),
    }
}

fn fresh_seed(edge: &Edge) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = (edge.config.entropy)();
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}

/// What decides the status, and whose it is: the first text, the end, or an error; `None` if neither came in time.
async fn first_event(
    head: &mut Head,
    events: &mut CompletionStream,
) -> Result<(u32, Option<CompletionEvent>), ApiError> {
    let limit = Instant::now() + FIRST_EVENT_WAIT;
    let mut choice = 0;
    loop {
        match timeout_at(limit, events.next()).await {
            Err(_) => return Ok((choice, None)),
            Ok(Some(Ok(CompletionEvent::Started { model, fingerprint }))) => {
                head.model = model;
                head.fingerprint = fingerprint;
            }
            Ok(Some(Ok(CompletionEvent::Text { delta }))) if delta.is_empty() => {}
            Ok(Some(Ok(
                event @ (CompletionEvent::Text { .. }
                | CompletionEvent::Reasoning { .. }
                | CompletionEvent::Logprobs { .. }
                | CompletionEvent::Embedding { .. }
                | CompletionEvent::ToolCall { .. }
                | CompletionEvent::Arguments { .. }
                | CompletionEvent::Ended { .. }),
            ))) => return Ok((choice, Some(event))),
            Ok(Some(Ok(CompletionEvent::Choice { index }))) => choice = index,
            Ok(Some(Ok(CompletionEvent::Finished { reason, bill }))) if finish_word(reason).is_none() => {
                return Err(ServiceError::cut_short(bill).into());
            }
            Ok(Some(Ok(event @ CompletionEvent::Finished { .. }))) => return Ok((choice, Some(event))),
            Ok(Some(Err(error))) => return Err(error.into()),
            Ok(None) => return Err(ServiceError::no_result().into()),
        }
    }
}

/// Counts and money, never text.
pub(crate) fn log_end(finish_reason: &'static str, bill: &Bill) {
    let TokenUsage { prompt, cached_prompt, completion, .. } = bill.usage;
    tracing::info!(finish_reason, prompt, cached_prompt, completion, cost_msat = bill.cost.0, "completion ended");
}

/// The client's `Idempotency-Key`, bound to who sent it and where.
fn run_key(headers: &HeaderMap, caller: &Caller, endpoint: Endpoint) -> Result<Option<RunKey>, ApiError> {
    let Some(value) = headers.get(IDEMPOTENCY_KEY) else { return Ok(None) };
    if value.is_empty() || value.len() > MAX_IDEMPOTENCY_KEY_BYTES {
        let message = format!("`Idempotency-Key` must have 1 to {MAX_IDEMPOTENCY_KEY_BYTES} bytes.");
        return Err(ApiError::new(StatusCode::BAD_REQUEST, "invalid_value", message));
    }
    let mut hash = Sha256::new();
    // Each part but the last is of fixed length, so no two triples run together.
    hash.update(Sha256::digest(caller.key.as_deref().unwrap_or_default().as_bytes()));
    hash.update([u8::from(caller.key.is_some()), endpoint.number()]);
    hash.update(value.as_bytes());
    Ok(Some(hash.finalize().into()))
}
