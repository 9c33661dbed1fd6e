//! Which path goes where, and the layers that every request passes: id, panic net, CORS, gate.

use std::{any::Any, sync::Arc, time::Duration};

use axum::{
    Router,
    http::{HeaderName, HeaderValue, Method, header, request::Parts},
    middleware::{from_fn, from_fn_with_state},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use tokio::sync::Semaphore;
use tower_http::{
    catch_panic::CatchPanicLayer,
    cors::{AllowHeaders, AllowOrigin, CorsLayer},
};

use crate::{
    body::PIECE_BYTES,
    completions,
    config::ApiConfig,
    door,
    error::{ApiError, SHOULD_RETRY},
    gate,
    idempotency::Runs,
    keys,
    metrics::ApiMetrics,
    models, openapi,
    pace::Pace,
    service::{Service, ServiceError},
    shutdown::Closing,
};

/// How long a browser may remember a preflight.
const PREFLIGHT_AGE: Duration = Duration::from_secs(600);

/// What the handlers share.
pub(crate) struct Edge {
    pub(crate) service: Arc<dyn Service>,
    pub(crate) config: ApiConfig,
    pub(crate) pace: Pace,
    pub(crate) runs: Arc<Runs>,
    pub(crate) in_flight: Arc<Semaphore>,
    pub(crate) reading: Semaphore,
    pub(crate) closing: Closing,
    pub(crate) metrics: Arc<ApiMetrics>,
}

pub(crate) fn router(
    service: Arc<dyn Service>,
    config: ApiConfig,
    metrics: Arc<ApiMetrics>,
    closing: Closing,
) -> Router {
    let edge = Arc::new(Edge {
        service,
        pace: Pace::default(),
        runs: Runs::new(config.idempotency_runs, config.idempotency_window, config.idempotency_grace),
        in_flight: Arc::new(Semaphore::new(config.max_in_flight)),
        reading: Semaphore::new(config.max_reading_bytes / PIECE_BYTES),
        config,
        closing,
        metrics,
    });
    Router::new()
        .route("/health", get(models::health))
        .route("/v1/openapi.json", get(openapi::serve))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::one))
        .route("/v1/chat/completions", post(completions::chat))
        .route("/v1/completions", post(completions::text))
        .route("/v1/responses", post(completions::responses))
        .route("/v1/tokenize", post(models::tokenize))
        .route("/v1/detokenize", post(models::detokenize))
        .route("/v1/embeddings", post(completions::embeddings))
        .route("/v1/estimate", post(keys::estimate))
        .route("/v1/generations/{id}", get(keys::generation))
        .route("/v1/key", get(keys::own))
        .route("/v1/keys", get(keys::list).post(keys::create))
        .route("/v1/keys/{id}", get(keys::show).delete(keys::revoke))
        .route("/v1/topup", post(door::top_up))
        .route("/v1/invoices/{hash}", get(door::invoice))
        .route("/v1/refund", get(door::refunds).post(door::refund))
        .fallback(models::unknown_path)
        .method_not_allowed_fallback(models::wrong_method)
        .layer(from_fn_with_state(Arc::clone(&edge), gate::gate))
        .layer(cors(&edge))
        .layer(CatchPanicLayer::custom(panicked))
        .layer(from_fn_with_state(Arc::clone(&edge), gate::trace))
        .layer(from_fn(security_headers))
        .with_state(edge)
}

/// With keys configured a page of any origin may ask, since a browser adds no key by itself; keyless callers are held
/// to the allowed origins by the gate as well.
fn cors(edge: &Arc<Edge>) -> CorsLayer {
    let config = Arc::clone(edge);
    let origin = AllowOrigin::predicate(move |origin: &HeaderValue, _: &Parts| {
        !config.config.keys.is_empty()
            || config.config.accounts.is_some()
            || gate::allows_origin(&config.config, origin)
    });
    let exposed = ["x-request-id", "x-satgrid-cost-msat", "idempotent-replayed"].map(HeaderName::from_static);
    CorsLayer::new()
        .allow_origin(origin)
        .allow_methods([Method::GET, Method::POST, Method::DELETE])
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers([SHOULD_RETRY, header::RETRY_AFTER].into_iter().chain(exposed).collect::<Vec<_>>())
        .allow_private_network(true)
        .max_age(PREFLIGHT_AGE)
}

fn panicked(panic: Box<dyn Any + Send>) -> Response {
    ApiError::from(ServiceError::panicked(&*panic)).into_response()
}

async fn security_headers(request: axum::extract::Request, next: axum::middleware::Next) -> Response {
    let mut response = next.run(request).await;
    response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}
