//! Other apps that use this wallet: made, listed and revoked over the admin port.

use super::{Answer, Failed, State, failed};
use crate::drive::now;
use axum::{
    Json, Router,
    extract::State as Shared,
    http::StatusCode,
    routing::{get, post},
};
use rand::RngCore;
use satgrid_types::Msat;
use satgrid_wallet_nwc::{Connection, NewConnection, NwcService, StoreError, budget::Renewal};
use serde::Deserialize;
use serde_json::{Value, json};

pub(super) fn routes() -> Router<State> {
    Router::new()
        .route("/admin/v1/wallet/apps", get(list).post(add))
        .route("/admin/v1/wallet/apps/revoke", post(revoke))
}

fn service(state: &State) -> Result<&NwcService, Failed> {
    let text = "no relay is configured (market.relays), so apps cannot connect";
    state.apps.as_deref().ok_or_else(|| Failed(StatusCode::NOT_IMPLEMENTED, text.to_owned()))
}

async fn list(Shared(state): Shared<State>) -> Answer {
    let at = now();
    let app = |c: &Connection| {
        json!({
            "name": c.name, "app": c.app, "created_at": c.created_at,
            "budget_msat": c.budget.as_ref().map(|b| b.limit), "left_msat": c.budget.as_ref().map(|b| b.left(at)),
            "renewal": c.budget.as_ref().map(|b| b.renewal),
        })
    };
    let apps: Vec<Value> = service(&state)?.look(|all| all.all().iter().map(app).collect());
    Ok(Json(Value::Array(apps)))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Add {
    name: String,
    #[serde(default)]
    budget_msat: Msat,
    #[serde(default)]
    renewal: Renewal,
}

async fn add(Shared(state): Shared<State>, Json(add): Json<Add>) -> Answer {
    let mut secret = [0; 32];
    rand::rngs::OsRng.fill_bytes(&mut secret);
    let Add { name, budget_msat: budget, renewal } = add;
    let new = NewConnection { name, budget, renewal, relays: state.app_relays.clone(), secret };
    let uri = service(&state)?.change(|all| all.add(now(), new)).map_err(refused)?;
    Ok(Json(json!({ "uri": uri })))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Revoke {
    name: String,
}

async fn revoke(Shared(state): Shared<State>, Json(revoke): Json<Revoke>) -> Answer {
    service(&state)?.change(|all| all.revoke(&revoke.name)).map_err(refused)?;
    Ok(Json(json!({})))
}

fn refused(error: StoreError) -> Failed {
    match error {
        StoreError::File { .. } => failed(error),
        StoreError::Taken(_)
        | StoreError::NoSuch(_)
        | StoreError::TooMany
        | StoreError::Relay(_)
        | StoreError::OverBudget(_) => Failed(StatusCode::BAD_REQUEST, error.to_string()),
    }
}
