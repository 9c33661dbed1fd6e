//! The small endpoints: models, tokens, health, and those that only say what this node does not do.

use std::sync::Arc;

use axum::{
    Json,
    extract::{OriginalUri, Path, Request, State},
    http::{Method, StatusCode},
    response::{IntoResponse, Response},
};

use crate::{
    accounts::ExchangeRate,
    body,
    error::ApiError,
    reply::{DetokenizeReply, HealthReply, ModelList, ModelReply, TokenizeReply},
    request,
    router::Edge,
    service::{Service, ServiceError},
};

pub(crate) async fn list(State(edge): State<Arc<Edge>>) -> Response {
    let rate = exchange_rate(&edge);
    let models = edge.service.models().await;
    let data = models.into_iter().map(|model| ModelReply::new(model, rate.as_ref())).collect();
    Json(ModelList { object: "list", data }).into_response()
}

pub(crate) async fn one(State(edge): State<Arc<Edge>>, Path(id): Path<String>) -> Result<Response, ApiError> {
    let found = edge.service.models().await.into_iter().find(|model| model.id == id);
    let model = found.ok_or(ServiceError::UnknownModel { model: id })?;
    Ok(Json(ModelReply::new(model, exchange_rate(&edge).as_ref())).into_response())
}

fn exchange_rate(edge: &Edge) -> Option<ExchangeRate> {
    edge.config.accounts.as_ref().and_then(|accounts| accounts.exchange_rate())
}

pub(crate) async fn tokenize(State(edge): State<Arc<Edge>>, request: Request) -> Result<Response, ApiError> {
    let body = body::read(&edge, request.into_body()).await?;
    let reply = edge.service.tokenize(request::tokenize(&body)?).await?;
    let reply = TokenizeReply { count: reply.tokens.len(), max_model_len: reply.context_length, tokens: reply.tokens };
    Ok(Json(reply).into_response())
}

pub(crate) async fn detokenize(State(edge): State<Arc<Edge>>, request: Request) -> Result<Response, ApiError> {
    let body = body::read(&edge, request.into_body()).await?;
    let (model, tokens) = request::detokenize(&body)?;
    let prompt = edge.service.detokenize(model, tokens).await?;
    Ok(Json(DetokenizeReply { content: prompt.clone(), prompt }).into_response())
}

pub(crate) async fn health(State(edge): State<Arc<Edge>>) -> Response {
    health_of(&*edge.service, edge.closing.is_draining()).await
}

/// 200 `ok` or 503 `unavailable`, with the reasons in both.
pub(crate) async fn health_of(service: &dyn Service, draining: bool) -> Response {
    let mut readiness = service.ready().await;
    if draining {
        readiness.ready = false;
        readiness.reasons.push("shutting down".to_owned());
    }
    let (code, status) = match readiness.ready {
        true => (StatusCode::OK, "ok"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "unavailable"),
    };
    (code, Json(HealthReply { status, reasons: readiness.reasons })).into_response()
}

pub(crate) async fn unknown_path(OriginalUri(uri): OriginalUri) -> ApiError {
    ApiError::unknown_path(uri.path())
}

pub(crate) async fn wrong_method(method: Method, OriginalUri(uri): OriginalUri) -> ApiError {
    ApiError::wrong_method(method.as_str(), uri.path())
}
