//! The OpenAI-compatible edge: HTTP, JSON and server-sent events in front of one small port, [`Service`].
//!
//! This room parses and checks what clients send, decides who may come in, and gives replies and errors the shape that
//! OpenAI's own clients expect, with our prices and receipts beside it. It knows no provider, no wallet and no engine,
//! decides nothing about money, and never logs a prompt or a reply.
//!
//! Reading order: [`service`] (the port), `router` (what is served), `completions` (the walk of one request), `stream`
//! (server-sent events), `error` (statuses), `gate` (who comes in), `idempotency`, `serve` (connections and shutdown).
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod admin;
mod body;
mod completions;
mod config;
mod error;
mod gate;
mod idempotency;
mod metrics;
mod models;
mod reply;
mod request;
mod router;
mod serve;
pub mod service;
mod shutdown;
mod stream;

pub use admin::{AdminError, admin_router, serve_admin};
pub use config::{ApiConfig, ApiKey, Clock, Entropy, limits};
pub use metrics::{ApiMetrics, MetricsRegistry, MetricsSource};
pub use serve::{Api, serve};
pub use service::*;
