//! Keys over HTTP: one's own figures for any key, keys below itself for a key that manages; and what a request has cost
//! or would cost. The operator's own routes over all keys are on the admin port, with the same shapes.

use std::{collections::BTreeMap, sync::Arc};

use axum::{
    Extension, Json, Router,
    extract::{Path, Request, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::get,
};
use satgrid_types::{Msat, RequestId, UnixMs};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    accounts::{AccountError, Accounts, Estimate, Generation, GenerationState, KeyLimits, KeyView, NewKey},
    body,
    error::ApiError,
    gate::Caller,
    reply::{Flavour, RatesReply, UsageReply, finish_word, usd_number},
    request::{self, Parsed, json as parse_json},
    router::Edge,
    service::ServiceError,
};

/// Bodies that make keys are small.
const MAX_ADMIN_BODY: usize = 64 << 10;

impl From<AccountError> for ApiError {
    fn from(error: AccountError) -> ApiError {
        let message = error.to_string();
        match error {
            AccountError::NoSuchKey { .. } => ApiError::new(StatusCode::NOT_FOUND, "key_not_found", message),
            AccountError::Invalid { .. } => ApiError::new(StatusCode::BAD_REQUEST, "invalid_value", message),
            AccountError::Internal { detail } => {
                tracing::error!(%detail, "accounts failed inside this node");
                ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", message)
            }
        }
    }
}

/// A key as JSON; amounts in msat.
pub fn key_json(key: &KeyView) -> Value {
    let limits = &key.limits;
    json!({
        "id": key.id, "object": "api_key", "name": key.name, "kind": key.kind, "parent": key.parent,
        "created_at": key.created_at.as_secs(), "revoked_at": key.revoked_at.map(UnixMs::as_secs),
        "limits": {
            "per_request_msat": limits.per_request, "per_day_msat": limits.per_day, "total_msat": limits.total,
            "requests_per_minute": limits.requests_per_minute, "models": limits.models,
            "expires_at": limits.expires_at.map(UnixMs::as_secs),
        },
        "spent_msat": key.spent, "reserved_msat": key.reserved, "spent_today_msat": key.spent_today,
        "requests": key.requests, "available_msat": key.available, "balance_msat": key.balance,
    })
}

/// What makes a key, as JSON says it.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct NewKeyBody {
    name: String,
    #[serde(default)]
    kind: Option<String>,
    #[serde(default)]
    parent: Option<String>,
    #[serde(default)]
    per_request_msat: Option<Msat>,
    #[serde(default)]
    per_day_msat: Option<Msat>,
    #[serde(default)]
    total_msat: Option<Msat>,
    #[serde(default)]
    requests_per_minute: Option<u32>,
    #[serde(default)]
    models: Vec<String>,
    /// Unix seconds.
    #[serde(default)]
    expires_at: Option<u64>,
}

fn new_key(bytes: &[u8]) -> Result<NewKey, ApiError> {
    let value = parse_json(bytes)?;
    let body: NewKeyBody = serde_json::from_value(value)
        .map_err(|error| ApiError::new(StatusCode::BAD_REQUEST, "invalid_value", format!("A new key: {error}.")))?;
    let manages = match body.kind.as_deref() {
        None | Some("infer") => false,
        Some("manage") => true,
        Some(_) => return Err(ApiError::bad("invalid_value", "kind", "`kind` is `infer` or `manage`.")),
    };
    Ok(NewKey {
        name: body.name,
        manages,
        parent: body.parent,
        limits: KeyLimits {
            per_request: body.per_request_msat,
            per_day: body.per_day_msat,
            total: body.total_msat,
            requests_per_minute: body.requests_per_minute,
            models: body.models,
            expires_at: body.expires_at.map(UnixMs::from_secs),
        },
    })
}

fn with_secret(key: &KeyView, secret: &str) -> Value {
    let mut shown = key_json(key);
    if let Some(object) = shown.as_object_mut() {
        object.insert("secret".to_owned(), Value::from(secret));
    }
    shown
}

fn list_json(keys: &[KeyView]) -> Value {
    json!({ "object": "list", "data": keys.iter().map(key_json).collect::<Vec<_>>() })
}

fn accounts(edge: &Edge) -> Result<&Arc<dyn Accounts>, ApiError> {
    let absent = || ApiError::new(StatusCode::NOT_FOUND, "not_found", "This node keeps no accounts.");
    edge.config.accounts.as_ref().ok_or_else(absent)
}

/// The id of the stored key that came in, if it manages others.
fn manager(caller: &Caller) -> Result<&str, ApiError> {
    match &caller.key {
        Some(key) if caller.manages => Ok(key),
        Some(_) | None => Err(ApiError::new(
            StatusCode::FORBIDDEN,
            "management_key_required",
            "Keys are managed with a key of kind `manage`, or by `satgrid keys` on the node itself.",
        )),
    }
}

/// `GET /v1/key`: the key that is shown.
pub(crate) async fn own(
    State(edge): State<Arc<Edge>>,
    Extension(caller): Extension<Caller>,
) -> Result<Response, ApiError> {
    let none = || ApiError::new(StatusCode::NOT_FOUND, "key_not_found", "This call shows no stored key.");
    let id = caller.key.as_deref().ok_or_else(none)?;
    let key = accounts(&edge)?.key(id).await?.ok_or_else(none)?;
    Ok(Json(json!({ "data": key_json(&key) })).into_response())
}

pub(crate) async fn list(
    State(edge): State<Arc<Edge>>,
    Extension(caller): Extension<Caller>,
) -> Result<Response, ApiError> {
    let keys = accounts(&edge)?.keys(Some(manager(&caller)?)).await?;
    Ok(Json(list_json(&keys)).into_response())
}

pub(crate) async fn create(
    State(edge): State<Arc<Edge>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    let by = manager(&caller)?.to_owned();
    let accounts = Arc::clone(accounts(&edge)?);
    let mut new = new_key(&body::read(&edge, request.into_body()).await?)?;
    let parent = new.parent.take().unwrap_or_else(|| by.clone());
    if !is_below(&*accounts, &parent, &by).await? {
        return Err(AccountError::NoSuchKey { id: parent }.into());
    }
    new.parent = Some(parent);
    let (key, secret) = accounts.create_key(new).await?;
    Ok((StatusCode::CREATED, Json(with_secret(&key, &secret))).into_response())
}

pub(crate) async fn show(
    State(edge): State<Arc<Edge>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let accounts = accounts(&edge)?;
    let by = manager(&caller)?;
    let known = if is_below(&**accounts, &id, by).await? { accounts.key(&id).await? } else { None };
    let key = known.ok_or(AccountError::NoSuchKey { id })?;
    Ok(Json(key_json(&key)).into_response())
}

pub(crate) async fn revoke(
    State(edge): State<Arc<Edge>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let accounts = accounts(&edge)?;
    if !is_below(&**accounts, &id, manager(&caller)?).await? {
        return Err(AccountError::NoSuchKey { id }.into());
    }
    Ok(Json(key_json(&accounts.revoke_key(&id).await?)).into_response())
}

/// Whether `id` is `top` or stands below it. Keys stand only a few deep.
async fn is_below(accounts: &dyn Accounts, id: &str, top: &str) -> Result<bool, AccountError> {
    let mut next = Some(id.to_owned());
    while let Some(id) = next {
        if id == top {
            return Ok(true);
        }
        next = accounts.key(&id).await?.and_then(|key| key.parent);
    }
    Ok(false)
}

/// `GET /v1/generations/{id}`: the id of a completion, with or without its prefix.
pub(crate) async fn generation(
    State(edge): State<Arc<Edge>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let unknown = || {
        let shown: String = id.chars().take(80).filter(|c| !c.is_control()).collect();
        ApiError::new(StatusCode::NOT_FOUND, "generation_not_found", format!("There is no generation `{shown}`."))
    };
    let accounts = accounts(&edge)?;
    let tail = id.rsplit(['-', '_']).next().unwrap_or_default();
    let request: RequestId = tail.parse().map_err(|_| unknown())?;
    let calls = accounts.generation(request).await?;
    for call in &calls {
        if !may_see(&**accounts, &caller, call.key.as_deref()).await? {
            return Err(unknown());
        }
    }
    let Some(first) = calls.first() else { return Err(unknown()) };
    let sum = |of: fn(&Generation) -> Msat| calls.iter().fold(Msat::ZERO, |sum, call| sum.saturating_add(of(call)));
    let body = GenerationReply {
        id: &id,
        object: "generation",
        model: &first.model,
        key: first.key.as_deref(),
        created: first.created_at.as_secs(),
        cost_msat: sum(|call| call.bill.cost),
        charged_msat: sum(|call| call.charged),
        calls: calls.iter().map(CallReply::of).collect(),
    };
    Ok(Json(body).into_response())
}

/// A keyless caller on this machine is the operator; a key sees its own calls and those of the keys below it.
async fn may_see(accounts: &dyn Accounts, caller: &Caller, of: Option<&str>) -> Result<bool, AccountError> {
    match (&caller.key, of) {
        (None, _) => Ok(true),
        (Some(key), Some(of)) => Ok(key == of || is_below(accounts, of, key).await?),
        (Some(_), None) => Ok(false),
    }
}

#[derive(Serialize)]
struct GenerationReply<'a> {
    id: &'a str,
    object: &'static str,
    model: &'a str,
    key: Option<&'a str>,
    created: u64,
    cost_msat: Msat,
    /// What counted against the key.
    charged_msat: Msat,
    calls: Vec<CallReply>,
}

#[derive(Serialize)]
struct CallReply {
    model: String,
    state: &'static str,
    finish_reason: Option<&'static str>,
    created: u64,
    ended: Option<u64>,
    reserved_msat: Msat,
    charged_msat: Msat,
    usage: UsageReply,
}

impl CallReply {
    fn of(call: &Generation) -> CallReply {
        let (state, reserved_msat) = match call.state {
            GenerationState::Open => ("open", call.reserved),
            GenerationState::Done => ("done", Msat::ZERO),
            GenerationState::Failed => ("failed", Msat::ZERO),
        };
        CallReply {
            model: call.model.clone(),
            state,
            finish_reason: call.finish.and_then(finish_word),
            created: call.created_at.as_secs(),
            ended: call.ended_at.map(UnixMs::as_secs),
            reserved_msat,
            charged_msat: call.charged,
            usage: UsageReply::of(&call.bill),
        }
    }
}

#[derive(Serialize)]
struct EstimateReply {
    object: &'static str,
    model: String,
    prompt_tokens: u32,
    max_tokens: u32,
    /// Replies that the ceilings are for: `n`, for each prompt.
    choices: usize,
    ceiling_msat: Msat,
    ceiling_with_failover_msat: Msat,
    available_msat: Option<Msat>,
    msat_per_mtok: RatesReply,
    per_request_msat: Msat,
    providers: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    ceiling_usd: Option<serde_json::Number>,
    #[serde(skip_serializing_if = "Option::is_none")]
    exchange_rate: Option<Value>,
}

/// The estimate of a request with all its replies: each is reserved and settled by itself, so their ceilings add up.
pub(crate) async fn whole(
    accounts: &Arc<dyn Accounts>,
    parsed: Parsed,
    key: Option<String>,
) -> Result<Estimate, ServiceError> {
    let mut estimate = accounts.estimate(parsed.request, key).await?;
    let mut by_prompt = BTreeMap::from([(0, (estimate.ceiling, estimate.ceiling_with_failover))]);
    for (prompt, other) in parsed.others {
        let (one, failover) = match by_prompt.get(&prompt) {
            Some(known) => *known,
            None => {
                let Estimate { ceiling, ceiling_with_failover, .. } = accounts.estimate(other, None).await?;
                by_prompt.insert(prompt, (ceiling, ceiling_with_failover));
                (ceiling, ceiling_with_failover)
            }
        };
        estimate.ceiling = estimate.ceiling.saturating_add(one);
        estimate.ceiling_with_failover = estimate.ceiling_with_failover.saturating_add(failover);
    }
    Ok(estimate)
}

/// `POST /v1/estimate`: the body of a chat or text completion, which is not sent.
pub(crate) async fn estimate(
    State(edge): State<Arc<Edge>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    let accounts = Arc::clone(accounts(&edge)?);
    let body = body::read(&edge, request.into_body()).await?;
    let chat = parse_json(&body)?.get("messages").is_some();
    let flavour = if chat { Flavour::Chat } else { Flavour::Text };
    let parsed = request::completion(flavour, &body, 0)?;
    let choices = parsed.others.len().saturating_add(1);
    let Estimate {
        model,
        prompt_tokens,
        max_tokens,
        ceiling,
        ceiling_with_failover,
        rates,
        providers,
        available,
        rate,
    } = whole(&accounts, parsed, caller.key).await?;
    let reply = EstimateReply {
        object: "estimate",
        model,
        prompt_tokens,
        max_tokens,
        choices,
        ceiling_msat: ceiling,
        ceiling_with_failover_msat: ceiling_with_failover,
        available_msat: available,
        msat_per_mtok: RatesReply::from(&rates),
        per_request_msat: rates.per_request,
        providers,
        ceiling_usd: rate.as_ref().and_then(|rate| usd_number(&rate.usd(ceiling))),
        exchange_rate: rate.as_ref().map(crate::reply::rate_json),
    };
    Ok(Json(reply).into_response())
}

/// The operator's routes over every key, for the admin port. The daemon puts its own guard around them.
pub fn admin_keys_router(accounts: Arc<dyn Accounts>) -> Router {
    Router::new()
        .route("/admin/v1/keys", get(admin_list).post(admin_create))
        .route("/admin/v1/keys/{id}", get(admin_show).delete(admin_revoke))
        .with_state(accounts)
}

async fn admin_list(State(accounts): State<Arc<dyn Accounts>>) -> Result<Response, ApiError> {
    Ok(Json(list_json(&accounts.keys(None).await?)).into_response())
}

async fn admin_create(State(accounts): State<Arc<dyn Accounts>>, request: Request) -> Result<Response, ApiError> {
    let broken = |error: axum::Error| ApiError::new(StatusCode::BAD_REQUEST, "incomplete_body", error.to_string());
    let bytes = axum::body::to_bytes(request.into_body(), MAX_ADMIN_BODY).await.map_err(broken)?;
    let (key, secret) = accounts.create_key(new_key(&bytes)?).await?;
    Ok((StatusCode::CREATED, Json(with_secret(&key, &secret))).into_response())
}

async fn admin_show(State(accounts): State<Arc<dyn Accounts>>, Path(id): Path<String>) -> Result<Response, ApiError> {
    let key = accounts.key(&id).await?.ok_or(AccountError::NoSuchKey { id })?;
    Ok(Json(key_json(&key)).into_response())
}

async fn admin_revoke(State(accounts): State<Arc<dyn Accounts>>, Path(id): Path<String>) -> Result<Response, ApiError> {
    Ok(Json(key_json(&accounts.revoke_key(&id).await?)).into_response())
}
