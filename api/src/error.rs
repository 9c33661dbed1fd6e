//! Errors as OpenAI's clients read them: `{"error": {message, type, param, code}}`, and which status carries which.
//!
//! | status | what |
//! |---|---|
//! | 400 | the request itself; `param` names the field |
//! | 401, 403 | no or wrong key; a web page that may not call |
//! | 402 | money, with `metadata`. Never 429, which clients retry by themselves |
//! | 429 | a key asks more often than it may, with `Retry-After` |
//! | 404, 405, 408, 413, 422 | path or model; method; body too slow; body too large; `Idempotency-Key` reused |
//! | 500, 502, 503, 504 | this node failed; the provider failed; not now; took too long |
//!
//! `x-should-retry: false` goes out wherever a blind retry would cost money again.

use std::any::Any;

use axum::{
    Json,
    http::{HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use satgrid_types::{Msat, PaymentHash, UnixMs};
use serde::Serialize;

use crate::{
    config::limits::MAX_REPLY_BYTES,
    reply::CostReply,
    service::{Bill, LimitSource, ServiceError},
};

pub(crate) const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// An answer that is an error, ready to be sent as a response or inside a stream.
#[derive(Debug, Clone)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    pub(crate) body: Box<ErrorBody>,
    retry: Retry,
}

#[derive(Debug, Clone, Copy)]
enum Retry {
    AsStatusSays,
    Never,
    After(u64),
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct ErrorBody {
    pub(crate) message: String,
    #[serde(rename = "type")]
    kind: &'static str,
    param: Option<String>,
    code: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<Metadata>,
}

#[derive(Debug, Clone, Serialize)]
#[serde(untagged)]
enum Metadata {
    Funds { limit_source: &'static str, required_msat: u64, available_msat: u64, topup: Option<TopUpReply> },
    Reasons { reasons: Vec<String> },
    Charged(CostReply),
}

#[derive(Debug, Clone, Serialize)]
struct TopUpReply {
    bolt11: String,
    payment_hash: String,
    /// Unix seconds, like every time in OpenAI's schema.
    expires_at: u64,
}

impl ErrorBody {
    pub(crate) const fn code(&self) -> &'static str {
        self.code
    }
    #[cfg(test)]
    pub(crate) fn param(&self) -> Option<&str> {
        self.param.as_deref()
    }
}

/// `{"error": ...}`
#[derive(Serialize)]
pub(crate) struct Envelope<'a> {
    pub(crate) error: &'a ErrorBody,
}

impl ApiError {
    pub(crate) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> ApiError {
        let kind = match status {
            StatusCode::PAYMENT_REQUIRED => "insufficient_quota",
            StatusCode::TOO_MANY_REQUESTS => "requests",
            s if s.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        let body = ErrorBody { message: message.into(), kind, param: None, code, metadata: None };
        ApiError { status, body: Box::new(body), retry: Retry::AsStatusSays }
    }

    pub(crate) fn bad(code: &'static str, param: impl Into<String>, message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, code, message).param(param)
    }

    pub(crate) fn param(mut self, param: impl Into<String>) -> ApiError {
        self.body.param = Some(param.into());
        self
    }

    /// The same complaint where the parameter has another name: a chat's `messages` are a response's `input`.
    pub(crate) fn renamed(mut self, from: &str, to: &str) -> ApiError {
        if self.body.param.as_deref() == Some(from) {
            self.body.param = Some(to.to_owned());
        }
        self
    }

    fn metadata(mut self, metadata: Metadata) -> ApiError {
        self.body.metadata = Some(metadata);
        self
    }

    fn retry(mut self, retry: Retry) -> ApiError {
        self.retry = retry;
        self
    }

    /// What will be there in a moment is not there yet.
    pub(crate) fn not_yet(wait: std::time::Duration, message: String) -> ApiError {
        let seconds = wait.as_secs().max(1);
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "not_paid_yet", message).retry(Retry::After(seconds))
    }

    /// What is missing on the key, where that is what the error says and no invoice is with it.
    pub(crate) fn lacks_on_key(&self) -> Option<Msat> {
        match &self.body.metadata {
            Some(Metadata::Funds { limit_source, required_msat, available_msat, topup: None })
                if *limit_source == LimitSource::Key.as_str() =>
            {
                Some(Msat(required_msat.saturating_sub(*available_msat)))
            }
            Some(Metadata::Funds { .. } | Metadata::Reasons { .. } | Metadata::Charged(_)) | None => None,
        }
    }

    pub(crate) fn with_top_up(mut self, bolt11: String, payment_hash: PaymentHash, expires_at: UnixMs) -> ApiError {
        if let Some(Metadata::Funds { topup, .. }) = &mut self.body.metadata {
            let payment_hash = payment_hash.to_string();
            *topup = Some(TopUpReply { bolt11, payment_hash, expires_at: expires_at.as_secs() });
        }
        self
    }

    /// Too many requests: the one case in which clients should come back by themselves.
    pub(crate) fn too_many(wait: std::time::Duration) -> ApiError {
        let seconds = wait.as_secs().saturating_add(u64::from(wait.subsec_nanos() > 0)).max(1);
        let message = format!("Rate limit of this API key reached; try again in {seconds} s.");
        ApiError::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_exceeded", message).retry(Retry::After(seconds))
    }

    pub(crate) fn never_retry(self) -> ApiError {
        self.retry(Retry::Never)
    }

    pub(crate) fn unknown_path(path: &str) -> ApiError {
        let unoffered = ["audio", "images", "files", "batches", "uploads", "fine_tuning", "assistants", "threads"];
        let area = path.strip_prefix("/v1/").and_then(|rest| rest.split('/').next()).unwrap_or_default();
        let message = if area == "responses" {
            "This node keeps no responses: send the whole conversation in `input`.".to_owned()
        } else if unoffered.contains(&area) {
            format!("This node does not offer `{area}`.")
        } else {
            // A path is the client's own text, but a log or a terminal may show it: keep it short and plain.
            let shown: String = path.chars().take(120).map(|c| if c.is_control() { '?' } else { c }).collect();
            format!("Unknown path `{shown}`.")
        };
        ApiError::new(StatusCode::NOT_FOUND, "not_found", message)
    }

    pub(crate) fn wrong_method(method: &str, path: &str) -> ApiError {
        let message = format!("`{path}` does not take {method}.");
        ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
    }
}

impl From<ServiceError> for ApiError {
    fn from(error: ServiceError) -> ApiError {
        let message = error.to_string();
        match error {
            ServiceError::UnknownModel { .. } => {
                ApiError::new(StatusCode::NOT_FOUND, "model_not_found", message).param("model")
            }
            ServiceError::ContextLength { .. } => ApiError::bad("context_length_exceeded", "messages", message),
            ServiceError::WrongKind { .. } => ApiError::bad("unsupported_model", "model", message),
            ServiceError::InvalidRequest { param, .. } => ApiError::bad("invalid_value", param, message),
            ServiceError::Forbidden { code, .. } => ApiError::new(StatusCode::FORBIDDEN, code, message),
            ServiceError::InsufficientFunds(short) => {
                let code = match short.limit {
                    LimitSource::Key => "key_limit_exceeded",
                    LimitSource::Wallet | LimitSource::Node => "insufficient_quota",
                };
                let topup = short.topup.map(|t| TopUpReply {
                    bolt11: t.bolt11,
                    payment_hash: t.payment_hash.to_string(),
                    expires_at: t.expires_at.as_secs(),
                });
                ApiError::new(StatusCode::PAYMENT_REQUIRED, code, message)
                    .metadata(Metadata::Funds {
                        limit_source: short.limit.as_str(),
                        required_msat: short.required.0,
                        available_msat: short.available.0,
                        topup,
                    })
                    .never_retry()
            }
            ServiceError::MaxPriceExceeded { .. } => {
                ApiError::new(StatusCode::PAYMENT_REQUIRED, "max_price_exceeded", message)
                    .param("provider.max_price")
                    .never_retry()
            }
            ServiceError::NoProvider { why, .. } => {
                ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "no_provider", message)
                    .param("model")
                    .metadata(Metadata::Reasons { reasons: why })
            }
            ServiceError::ProviderFailed { bill, .. } => {
                let error = ApiError::new(StatusCode::BAD_GATEWAY, "provider_failed", message);
                match bill {
                    Some(bill) if !bill.cost.is_zero() => {
                        error.metadata(Metadata::Charged(CostReply::of(&bill))).never_retry()
                    }
                    Some(_) | None => error,
                }
            }
            ServiceError::DeadlineExceeded { .. } => {
                ApiError::new(StatusCode::GATEWAY_TIMEOUT, "deadline_exceeded", message).never_retry()
            }
            ServiceError::Busy { retry_after } => {
                let seconds = retry_after.as_secs().max(1);
                ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "busy", message).retry(Retry::After(seconds))
            }
            ServiceError::NotReady { reasons } => ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "not_ready", message)
                .metadata(Metadata::Reasons { reasons }),
            ServiceError::Internal { detail } => {
                tracing::error!(%detail, "request failed inside this node");
                ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", message)
            }
        }
    }
}

/// Faults that the edge itself finds in a completion.
impl ServiceError {
    pub(crate) fn closing() -> ServiceError {
        ServiceError::NotReady { reasons: vec!["shutting down".to_owned()] }
    }

    pub(crate) fn no_result() -> ServiceError {
        ServiceError::Internal { detail: "the completion's stream ended without a result".to_owned() }
    }

    pub(crate) fn reply_too_large() -> ServiceError {
        ServiceError::Internal { detail: format!("a reply grew over {MAX_REPLY_BYTES} bytes") }
    }

    /// For a `Finished` whose reason the port does not allow.
    pub(crate) fn cut_short(bill: Bill) -> ServiceError {
        ServiceError::ProviderFailed { reason: "the run was cut short".to_owned(), bill: Some(Box::new(bill)) }
    }

    pub(crate) fn panicked(panic: &(dyn Any + Send)) -> ServiceError {
        let said = panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str));
        ServiceError::Internal { detail: format!("panic: {}", said.unwrap_or("no message")) }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(Envelope { error: &self.body })).into_response();
        match self.retry {
            Retry::AsStatusSays => {}
            Retry::Never => {
                response.headers_mut().insert(SHOULD_RETRY, HeaderValue::from_static("false"));
            }
            Retry::After(seconds) => {
                response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
            }
        }
        response
    }
}
