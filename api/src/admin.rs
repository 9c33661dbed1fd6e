//! The admin port: health and figures, for this machine only.
//!
//! No key guards it, so it refuses to listen anywhere but on loopback, and to answer under a foreign host name.

use std::{io, net::SocketAddr, sync::Arc};

use axum::{
    Router,
    extract::{Request, State},
    http::{HeaderValue, StatusCode, Uri, header},
    middleware::{Next, from_fn},
    response::{IntoResponse, Response},
    routing::get,
};
use thiserror::Error;
use tokio::net::TcpListener;

use crate::{error::ApiError, gate, metrics::MetricsRegistry, models, service::Service};

#[derive(Debug, Error)]
pub enum AdminError {
    #[error("the admin port listens on loopback only, not on {0}")]
    NotLoopback(SocketAddr),
    #[error(transparent)]
    Io(#[from] io::Error),
}

#[derive(Clone)]
struct Admin {
    service: Arc<dyn Service>,
    metrics: Arc<MetricsRegistry>,
}

/// `/health` and `/metrics`. The daemon may merge its own routes into it.
pub fn admin_router(service: Arc<dyn Service>, metrics: MetricsRegistry) -> Router {
    Router::new()
        .route("/health", get(health))
        .route("/metrics", get(figures))
        .fallback(models::unknown_path)
        .method_not_allowed_fallback(models::wrong_method)
        .layer(from_fn(local_names_only))
        .with_state(Admin { service, metrics: Arc::new(metrics) })
}

/// `/metrics` alone, for a node without an endpoint of its own.
pub fn metrics_router(metrics: MetricsRegistry) -> Router {
    let render = move || {
        let metrics = metrics.clone();
        async move { rendered(&metrics) }
    };
    Router::new()
        .route("/metrics", get(render))
        .fallback(models::unknown_path)
        .method_not_allowed_fallback(models::wrong_method)
        .layer(from_fn(local_names_only))
}

/// Serves `router` until `shutdown` resolves. Refuses a listener that others can reach.
pub async fn serve_admin(
    listener: TcpListener,
    router: Router,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), AdminError> {
    let address = listener.local_addr()?;
    if !address.ip().is_loopback() {
        return Err(AdminError::NotLoopback(address));
    }
    Ok(axum::serve(listener, router).with_graceful_shutdown(shutdown).await?)
}

async fn health(State(admin): State<Admin>) -> Response {
    models::health_of(&*admin.service, false).await
}

async fn figures(State(admin): State<Admin>) -> Response {
    rendered(&admin.metrics)
}

fn rendered(metrics: &MetricsRegistry) -> Response {
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    ([(header::CONTENT_TYPE, kind)], metrics.render()).into_response()
}

async fn local_names_only(request: Request, next: Next) -> Response {
    let uri: Uri = request.uri().clone();
    if request.headers().contains_key(header::ORIGIN) || !gate::names_this_machine(request.headers(), &uri) {
        let message = "The admin port answers this machine's own programs only.";
        return ApiError::new(StatusCode::FORBIDDEN, "host_not_allowed", message).into_response();
    }
    next.run(request).await
}
