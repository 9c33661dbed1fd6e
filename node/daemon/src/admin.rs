//! The admin port: what the operator's tools ask a running node. Loopback only, and only with the token that stands in
//! the node's folder: other users of this machine cannot read it.

mod apps;
mod sweep;
mod wallet;

use crate::clock::Trouble;
use crate::drive::{
    bookkeeper::Own,
    channels,
    consumer::{self, ConsumerView},
    market::{Listening, Market},
    now,
    provider::ProviderView,
    restore,
    sweep::Sweeper,
    upstream::RunningEngine,
};
use anyhow::Context;
use axum::{
    Json, Router,
    extract::{Path as UrlPath, Request, State as Shared},
    http::{StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use rand::RngCore;
use satgrid_api::{Accounts, admin_keys_router};
use satgrid_market_nostr::RelayHealth;
use satgrid_node::consumer::ConsumerEvent;
use satgrid_types::{Msat, NodeKey, NostrKey, SessionId, UnixMs};
use satgrid_wallet::{Embedded, Lightning};
use satgrid_wallet_nwc::NwcService;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::{
    io::Write,
    net::SocketAddr,
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::{Arc, RwLock},
};
use tokio::sync::{mpsc, watch};

/// The file of the token, below the node's folder.
pub(crate) const TOKEN_FILE: &str = "admin-token";

/// What the routes show and ask.
#[derive(Clone)]
pub(crate) struct State {
    pub token: String,
    pub node_key: NodeKey,
    pub nostr_key: NostrKey,
    pub wallet: Arc<dyn Lightning>,
    /// Absent where the wallet is somebody else's.
    pub embedded: Option<Arc<dyn Embedded>>,
    /// Channels that the operator asked to force-close.
    pub wished: channels::Wished,
    pub restoring: restore::Shared,
    /// Payments by hand are the operator's own, and booked as such.
    pub own: Own,
    /// Absent where the wallet is somebody else's.
    pub sweeper: Option<Arc<Sweeper>>,
    /// Our wallet for other apps.
    pub apps: Option<Arc<NwcService>>,
    pub app_relays: Vec<String>,
    /// The smallest slice that is sold, and that is bought.
    pub wants: (Option<Msat>, Option<Msat>),
    pub network: &'static str,
    pub quic_listen: Option<SocketAddr>,
    pub provider: Option<Arc<RwLock<ProviderView>>>,
    pub consumer: Option<Arc<RwLock<ConsumerView>>>,
    pub consumer_inbox: Option<mpsc::Sender<consumer::Message>>,
    pub relays: watch::Receiver<Vec<RelayHealth>>,
    pub api_listen: Option<SocketAddr>,
    /// What is for sale, by its listed name, with the engine that runs it.
    pub engines: Vec<(String, RunningEngine)>,
    pub started: UnixMs,
    pub market: Market,
    pub heard: Option<Arc<Listening>>,
    pub clock: Trouble,
}

/// The token of this node, made on first use, readable by its owner only.
pub(crate) fn token(dir: &Path) -> anyhow::Result<String> {
    let path = dir.join(TOKEN_FILE);
    // A start that was cut off, or met a full disk, leaves the file empty: that is no token, since showing none would show it.
    if let Some(known) = std::fs::read_to_string(&path).ok().filter(|text| !text.trim().is_empty()) {
        return Ok(known.trim().to_owned());
    }
    let mut bytes = [0; 32];
    rand::rngs::OsRng.fill_bytes(&mut bytes);
    let token = hex::encode(bytes);
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    file.write_all(token.as_bytes())?;
    Ok(token)
}

/// The guarded routes.
pub(crate) fn router(state: State, accounts: Arc<dyn Accounts>) -> Router {
    Router::new()
        .route("/admin/v1/status", get(status))
        .merge(wallet::routes())
        .merge(apps::routes())
        .merge(sweep::routes())
        .route("/admin/v1/sessions/{session}/close", post(close_session))
        .with_state(state.clone())
        .merge(admin_keys_router(accounts))
        .layer(axum::middleware::from_fn_with_state(state, authorise))
}

/// Lets in whoever shows the token. Hashes are compared, so that time tells nothing of it.
async fn authorise(Shared(state): Shared<State>, request: Request, next: Next) -> Response {
    let shown = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let shown = shown.and_then(|value| value.strip_prefix("Bearer "));
    if shown.is_some_and(|shown| Sha256::digest(shown) == Sha256::digest(&state.token)) {
        return next.run(request).await;
    }
    let text = format!("show the token in {TOKEN_FILE} of the node's folder as `Authorization: Bearer`");
    (StatusCode::UNAUTHORIZED, Json(json!({ "error": text }))).into_response()
}

/// An error of the wallet or of the request, as JSON.
struct Failed(StatusCode, String);

impl IntoResponse for Failed {
    fn into_response(self) -> Response {
        (self.0, Json(json!({ "error": self.1 }))).into_response()
    }
}

fn failed(error: impl std::fmt::Display) -> Failed {
    Failed(StatusCode::BAD_GATEWAY, error.to_string())
}

type Answer = Result<Json<Value>, Failed>;

async fn status(Shared(state): Shared<State>) -> Answer {
    let provider = state.provider.as_ref().and_then(|view| view.read().ok().map(|view| view.clone()));
    let consumer = state.consumer.as_ref().and_then(|view| view.read().ok().map(|view| view.clone()));
    let relays: Vec<Value> = state
        .relays
        .borrow()
        .iter()
        .map(|r| json!({ "url": r.url, "connected": r.connected, "last_error": r.last_error }))
        .collect();
    let engines: Vec<Value> = state
        .engines
        .iter()
        .map(|(model, engine)| {
            let facts = engine.facts();
            json!({ "model": model, "process": engine.process_id(), "slots": facts.slots, "context": facts.context })
        })
        .collect();
    let mut refused = state.market.refusals();
    if let Some(heard) = &state.heard {
        refused.extend(heard.counters().into_iter().filter(|(reason, _)| *reason != "accepted"));
    }
    Ok(Json(json!({
        "node_key": state.node_key,
        "nostr_key": state.nostr_key,
        "lightning_node": state.wallet.node_id(),
        "lightning_listen": match &state.embedded {
            Some(embedded) => embedded.facts().await.ok().and_then(|facts| facts.listen),
            None => None,
        },
        "network": state.network,
        "version": env!("CARGO_PKG_VERSION"),
        "uptime_s": now().since(state.started) / 1_000,
        "quic_listen": state.quic_listen,
        "api_listen": state.api_listen,
        "engines": engines,
        "provider": provider.map(|view| provider_json(&view)),
        "consumer": consumer.map(|view| consumer_json(&view)),
        "relays": relays,
        "clock": state.clock.borrow().clone(),
        "listings": state.market.live().len(),
        "refused_listings": refused,
    })))
}

fn provider_json(view: &ProviderView) -> Value {
    let c = &view.counters;
    json!({
        "counters": {
            "requests_started": c.requests_started, "requests_refused": c.requests_refused, "receipts": c.receipts,
            "abandoned": c.abandoned, "violations": c.violations, "slices": c.slices, "payments_unknown": c.payments_unknown,
            "links_unused": c.links_unused, "sessions_forgotten": c.sessions_forgotten,
        },
        "open_requests": view.open_requests,
        "links": view.links,
        "sessions": view.sessions,
        "prepaid_msat": view.prepaid,
        "refunds_due_msat": view.refunds_due,
        "exposure_msat": view.exposure,
        "largest_exposure_msat": view.largest_exposure,
        "halted": view.halted,
        "paused": view.paused,
    })
}

fn consumer_json(view: &ConsumerView) -> Value {
    let c = &view.counters;
    let sessions: Vec<Value> = view
        .sessions
        .iter()
        .map(|s| {
            json!({
                "session": s.session, "provider": s.provider, "state": s.state, "paid_msat": s.paid, "charged_msat": s.charged,
                "remainder_msat": s.remainder, "refunded_msat": s.refunded,
            })
        })
        .collect();
    let avoided: Vec<Value> =
        view.avoided.iter().map(|(provider, why)| json!({ "provider": provider, "why": why })).collect();
    json!({
        "counters": {
            "calls": c.calls, "finished": c.finished, "failed": c.failed, "failovers": c.failovers,
            "resumed": c.resumed,
            "receipts": c.receipts, "slices": c.slices, "misbehaviour": c.misbehaviour,
            "refused_quotes": c.refused_quotes, "lost_sessions": c.lost_sessions,
            "refunds_asked_again": c.refunds_asked_again,
        },
        "open_calls": view.open_calls,
        "exposure_msat": view.exposure,
        "largest_exposure_msat": view.largest_exposure,
        "sessions": sessions,
        "avoided": avoided,
        "halted": view.halted,
        "paused": view.paused,
    })
}

async fn close_session(Shared(state): Shared<State>, UrlPath(session): UrlPath<SessionId>) -> Answer {
    let inbox = state.consumer_inbox.as_ref().ok_or(Failed(StatusCode::NOT_FOUND, "this node does not buy".into()))?;
    let known = state
        .consumer
        .as_ref()
        .and_then(|view| view.read().ok().map(|v| v.sessions.iter().any(|s| s.session == session)));
    if known != Some(true) {
        return Err(Failed(StatusCode::NOT_FOUND, format!("no session {session} at this node")));
    }
    let event = consumer::Message::Event(ConsumerEvent::CloseSession { session });
    inbox.send(event).await.map_err(failed)?;
    Ok(Json(json!({})))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_token_is_made_once_and_never_empty() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(TOKEN_FILE);
        let made = token(dir.path()).unwrap();
        assert_eq!(made.len(), 64);
        assert_eq!(token(dir.path()).unwrap(), made, "the same again");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        for cut_off in ["", "\n"] {
            std::fs::write(&path, cut_off).unwrap();
            let anew = token(dir.path()).unwrap();
            assert_eq!(anew.len(), 64, "{cut_off:?}");
            assert_ne!(anew, made);
            assert_eq!(std::fs::read_to_string(&path).unwrap(), anew);
        }
    }
}
