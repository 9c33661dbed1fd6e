//! Sweeps asked for by hand.

use super::{Answer, Failed, State};
use crate::drive::sweep::{Ask, Sweeper};
use axum::{Json, Router, extract::State as Shared, http::StatusCode, routing::get};
use serde_json::json;
use std::sync::Arc;

pub(super) fn routes() -> Router<State> {
    Router::new()
        .route("/admin/v1/wallet/sweeps", get(list).post(now))
        .route("/admin/v1/wallet/sweeps/preview", axum::routing::post(preview))
}

fn sweeper(state: &State) -> Result<&Arc<Sweeper>, Failed> {
    let text = "sweeps are made from the embedded wallet; this node uses another (wallet.nwc)";
    state.sweeper.as_ref().ok_or_else(|| Failed(StatusCode::NOT_IMPLEMENTED, text.to_owned()))
}

fn refused(error: anyhow::Error) -> Failed {
    Failed(StatusCode::BAD_REQUEST, format!("{error:#}"))
}

async fn list(Shared(state): Shared<State>) -> Answer {
    Ok(Json(json!(sweeper(&state)?.list().map_err(refused)?)))
}

async fn preview(Shared(state): Shared<State>, Json(ask): Json<Ask>) -> Answer {
    Ok(Json(json!(sweeper(&state)?.preview(&ask).await.map_err(refused)?)))
}

async fn now(Shared(state): Shared<State>, Json(ask): Json<Ask>) -> Answer {
    Ok(Json(json!(sweeper(&state)?.now(&ask).await.map_err(refused)?)))
}
