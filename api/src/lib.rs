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

mod accounts;
mod admin;
mod body;
mod certificates;
mod choices;
mod collect;
mod completions;
mod config;
mod crowd;
mod door;
mod embeddings;
mod error;
mod gate;
mod histogram;
mod idempotency;
mod keys;
mod logprobs;
mod metrics;
mod models;
mod openapi;
mod pace;
mod reply;
mod request;
mod responses;
mod router;
mod serve;
pub mod service;
mod shutdown;
mod stall;
mod stream;
mod tls;

pub use accounts::{
    Account, AccountError, Accounts, Estimate, ExchangeRate, Generation, GenerationState, KeyDenied, KeyLimits,
    KeyView, NewKey,
};
pub use admin::{AdminError, admin_router, metrics_router, serve_admin};
pub use certificates::Certificates;
pub use config::{ApiConfig, ApiKey, Clock, Entropy, limits};
pub use door::{Door, DoorError, DoorInvoice, InvoiceState, Order, Refund};
pub use gate::STORED_KEY_PREFIX;
pub use histogram::Histogram;
pub use keys::{admin_keys_router, key_json};
pub use metrics::{ApiMetrics, MetricsRegistry, MetricsSource};
pub use serve::{Api, serve};
pub use service::*;
pub use tls::{Tls, TlsError};
