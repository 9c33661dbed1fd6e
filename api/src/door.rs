//! The front door for strangers: clients without a node pay invoices and spend what they paid in.
//!
//! | client | shows | gets |
//! |---|---|---|
//! | new | nothing, with a completion | 402, `WWW-Authenticate: L402`, an invoice over what the request can cost |
//! | has paid it | `Authorization: L402 TOKEN:PREIMAGE` | the answer; what is left stays on the token |
//! | new | `POST /v1/topup` | a key and an invoice that fills it |
//! | holds a key | `Authorization: Bearer sk-satgrid-...` | answers, `GET /v1/key`, more top-ups, `POST /v1/refund` |
//!
//! Keys, reservations and refusals are those of every stored key (`accounts`); here is only what strangers add.

use std::{net::IpAddr, sync::Arc, time::Duration};

use async_trait::async_trait;
use axum::{
    Extension, Json,
    extract::{Path, Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use satgrid_types::{Msat, PaymentHash, UnixMs};
use serde::Deserialize;
use serde_json::{Value, json};
use thiserror::Error;

use crate::{
    body, crowd, error::ApiError, gate::Caller, keys, reply::Flavour, request, router::Edge, service::ServiceError,
};

/// What the node does for strangers.
#[async_trait]
pub trait Door: Send + Sync + 'static {
    /// An invoice that fills a key, or makes one, once it is paid.
    /// `asker` is who asks, for limits.
    async fn invoice(&self, order: Order, asker: &str) -> Result<DoorInvoice, DoorError>;

    /// What the key of an L402 credential is found by.
    async fn credential(&self, token: &str, preimage: &str) -> Result<[u8; 32], DoorError>;

    async fn invoice_state(&self, hash: PaymentHash) -> Result<Option<InvoiceState>, DoorError>;

    /// Pays back what a key has left, or a part of it.
    async fn refund(&self, key: &str, destination: &str, amount: Option<Msat>) -> Result<Refund, DoorError>;

    async fn refunds(&self, key: &str) -> Result<Vec<Refund>, DoorError>;

    /// What a stranger is asked for something that costs the node this much.
    fn price(&self, cost: Msat) -> Msat;

    /// Proxies in front whose word on who asks is taken.
    fn proxies(&self) -> &[IpAddr];
}

/// What is to be paid for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    /// A new key, with its secret in the answer.
    NewKey {
        amount: Msat,
    },
    TopUp {
        key: String,
        amount: Msat,
    },
    /// What a key lacks for one request; at least the smallest invoice.
    Missing {
        key: String,
        amount: Msat,
    },
    /// A token that carries its own key; at least so much.
    L402 {
        amount: Msat,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DoorInvoice {
    pub bolt11: String,
    pub payment_hash: PaymentHash,
    pub amount: Msat,
    pub expires_at: UnixMs,
    /// The new key's secret, or the token.
    pub secret: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InvoiceState {
    Open,
    Paid,
    Expired,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refund {
    pub id: u64,
    pub amount: Msat,
    pub max_fee: Msat,
    /// `waiting`, `attempted`, `settled` or `failed`.
    pub state: String,
    pub fee: Option<Msat>,
    pub payment_hash: Option<PaymentHash>,
    /// Why the last try came to nothing.
    pub reason: Option<String>,
}

/// Why the door did not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum DoorError {
    #[error("{message}")]
    Invalid { param: &'static str, message: String },
    /// Not our token, or not its preimage.
    #[error("Incorrect L402 token or preimage.")]
    BadCredential,
    #[error("This node's wallet has not seen the payment yet; try again in a moment.")]
    NotPaidYet,
    #[error("{required} needed, {available} on this key.")]
    Balance { required: Msat, available: Msat },
    /// No single invoice of this door covers what the request may cost.
    #[error(
        "This may cost {price}, and an invoice for one request is over {most} at most: lower its limit of tokens \
         (`max_tokens`), or fill a prepaid key with `POST /v1/topup` and send it with that."
    )]
    PriceTooHigh { price: Msat, most: Msat },
    #[error("Too many invoices wait to be paid; try again in a minute.")]
    TooManyInvoices,
    #[error("This node failed; the log names the cause under this request's id.")]
    Internal { detail: String },
}

const INVOICES_RETRY: Duration = Duration::from_secs(60);
const UNPAID_RETRY: Duration = Duration::from_secs(1);
/// Invoices that one address may ask for in a minute.
pub(crate) const INVOICES_PER_MINUTE: u32 = 20;
/// Other requests without a key, of one address, in a minute; and those of one key that cost nothing.
pub(crate) const STRANGERS_PER_MINUTE: u32 = 120;

impl From<DoorError> for ApiError {
    fn from(error: DoorError) -> ApiError {
        let message = error.to_string();
        match error {
            DoorError::Invalid { param, .. } => ApiError::bad("invalid_value", param, message),
            DoorError::BadCredential => ApiError::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message),
            DoorError::NotPaidYet => ApiError::not_yet(UNPAID_RETRY, message),
            DoorError::Balance { .. } => {
                ApiError::new(StatusCode::PAYMENT_REQUIRED, "key_limit_exceeded", message).never_retry()
            }
            DoorError::PriceTooHigh { .. } => ApiError::new(StatusCode::BAD_REQUEST, "price_too_high", message),
            DoorError::TooManyInvoices => ApiError::too_many(INVOICES_RETRY),
            DoorError::Internal { detail } => ServiceError::Internal { detail }.into(),
        }
    }
}

/// Who asks, for limits: the peer, or what a trusted proxy says of it.
pub(crate) fn address(edge: &Edge, headers: &HeaderMap, peer: Option<IpAddr>) -> String {
    let proxies = edge.config.door.as_ref().map_or(&[][..], |door| door.proxies());
    let trusted = |ip: &IpAddr| proxies.iter().any(|proxy| proxy.to_canonical() == ip.to_canonical());
    let told = headers.get_all("x-forwarded-for").into_iter().filter_map(|value| value.to_str().ok());
    let told: Vec<&str> = told.flat_map(|list| list.split(',')).collect();
    // From the nearest hop outwards: the first that is no proxy of ours is who asks, and what stands before is its word.
    let mut ip = peer;
    for hop in told.iter().rev() {
        match (ip.filter(|ip| trusted(ip)), hop.trim().parse()) {
            (Some(_), Ok(next)) => ip = Some(next),
            (_, _) => break,
        }
    }
    ip.map_or_else(|| "unknown".to_owned(), |ip| crowd::customer(ip).to_string())
}

/// An L402 credential, also under its old name.
pub(crate) fn credential(headers: &HeaderMap) -> Option<(&str, &str)> {
    let (scheme, rest) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    let ours = scheme.eq_ignore_ascii_case("l402") || scheme.eq_ignore_ascii_case("lsat");
    if ours { rest.trim().rsplit_once(':') } else { None }
}

/// Paths that strangers may see without a key.
pub(crate) fn is_open(path: &str) -> bool {
    path == "/v1/models"
        || path.starts_with("/v1/models/")
        || matches!(path, "/v1/openapi.json" | "/v1/topup" | "/v1/estimate" | "/v1/tokenize" | "/v1/detokenize")
        || path.starts_with("/v1/invoices/")
}

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";
const RESPONSES: &str = "/v1/responses";
const EMBEDDINGS: &str = "/v1/embeddings";

/// Paths that cost money.
pub(crate) fn is_sold(path: &str) -> bool {
    matches!(path, CHAT | TEXT | RESPONSES | EMBEDDINGS)
}

/// Answers a completion without a key: 402, with an invoice over what it can cost.
pub(crate) async fn challenge(edge: &Edge, address: &str, request: Request) -> Result<Response, ApiError> {
    let Some(door) = &edge.config.door else { return Err(ServiceError::no_result().into()) };
    let wait = edge.pace.take(&format!("invoice {address}"), INVOICES_PER_MINUTE);
    wait.map_err(ApiError::too_many)?;
    let path = request.uri().path().to_owned();
    let body = body::read(edge, request.into_body()).await?;
    // What is wrong with a request is told before it is paid for.
    let parsed = match path.as_str() {
        RESPONSES => request::response(&body, 0).map(|(parsed, _)| parsed)?,
        EMBEDDINGS => request::embeddings(&body).map(|(parsed, _, _)| parsed)?,
        TEXT => request::completion(Flavour::Text, &body, 0)?,
        _ => request::completion(Flavour::Chat, &body, 0)?,
    };
    let cost = match &edge.config.accounts {
        Some(accounts) => keys::whole(accounts, parsed, None).await?.ceiling_with_failover,
        None => Msat::ZERO,
    };
    let made = door.invoice(Order::L402 { amount: door.price(cost) }, address).await?;
    let token = made.secret.clone().unwrap_or_default();
    let challenge = format!("L402 version=\"0\", token=\"{token}\", macaroon=\"{token}\", invoice=\"{}\"", made.bolt11);
    let message = format!("Pay {} to ask this, then send `Authorization: L402 TOKEN:PREIMAGE`.", made.amount);
    let error = json!({ "error": {
        "message": message, "type": "insufficient_quota", "param": null, "code": "payment_required",
        "metadata": {
            "limit_source": "key", "required_msat": made.amount, "available_msat": 0, "token": token,
            "topup": {
                "bolt11": made.bolt11, "payment_hash": made.payment_hash, "expires_at": made.expires_at.as_secs(),
            },
        },
    } });
    let mut response = (StatusCode::PAYMENT_REQUIRED, Json(error)).into_response();
    response.headers_mut().insert(crate::error::SHOULD_RETRY, HeaderValue::from_static("false"));
    if let Ok(value) = HeaderValue::from_str(&challenge) {
        response.headers_mut().insert(header::WWW_AUTHENTICATE, value);
    }
    Ok(response)
}

/// A refusal for want of money on a prepaid key, with the invoice that fills it.
pub(crate) async fn with_top_up(edge: &Edge, payer: Option<(String, String)>, error: ApiError) -> ApiError {
    let (Some(door), Some((key, address)), Some(amount)) = (&edge.config.door, payer, error.lacks_on_key()) else {
        return error;
    };
    // Whoever asks too often is told what is missing, and asks for an invoice by itself.
    if edge.pace.take(&format!("invoice {address}"), INVOICES_PER_MINUTE).is_err() {
        return error;
    }
    match door.invoice(Order::Missing { key, amount }, &address).await {
        Ok(made) => error.with_top_up(made.bolt11, made.payment_hash, made.expires_at),
        // A key of the operator's holds no balance.
        Err(_) => error,
    }
}

fn door(edge: &Edge) -> Result<&Arc<dyn Door>, ApiError> {
    let absent = || ApiError::new(StatusCode::NOT_FOUND, "not_found", "This endpoint takes no strangers.");
    edge.config.door.as_ref().ok_or_else(absent)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TopUpBody {
    amount_sat: u64,
}

/// `POST /v1/topup`: without a key, one is made when its invoice is paid.
pub(crate) async fn top_up(
    State(edge): State<Arc<Edge>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    let door = Arc::clone(door(&edge)?);
    let body = body::read(&edge, request.into_body()).await?;
    let TopUpBody { amount_sat } = parsed(&body)?;
    let absurd = || ApiError::bad("invalid_value", "amount_sat", "`amount_sat` is too large.");
    let amount = Msat::from_sat(amount_sat).ok_or_else(absurd)?;
    let asker = caller.address.clone();
    let order = match caller.key {
        Some(key) => Order::TopUp { key, amount },
        None => {
            let wait = edge.pace.take(&format!("invoice {}", caller.address), INVOICES_PER_MINUTE);
            wait.map_err(ApiError::too_many)?;
            Order::NewKey { amount }
        }
    };
    let made = door.invoice(order, &asker).await?;
    let answer = json!({
        "object": "topup", "invoice": made.bolt11, "payment_hash": made.payment_hash, "amount_msat": made.amount,
        "expires_at": made.expires_at.as_secs(), "key": made.secret,
    });
    Ok((StatusCode::CREATED, Json(answer)).into_response())
}

fn parsed<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let value = request::json(body)?;
    serde_json::from_value(value)
        .map_err(|error| ApiError::new(StatusCode::BAD_REQUEST, "invalid_value", format!("The body: {error}.")))
}

/// `GET /v1/invoices/{hash}`: whether it is paid. Whoever knows the hash may ask.
pub(crate) async fn invoice(State(edge): State<Arc<Edge>>, Path(hash): Path<String>) -> Result<Response, ApiError> {
    let unknown = || ApiError::new(StatusCode::NOT_FOUND, "invoice_not_found", "There is no such invoice.");
    let hash: PaymentHash = hash.parse().map_err(|_| unknown())?;
    let state = match door(&edge)?.invoice_state(hash).await?.ok_or_else(unknown)? {
        InvoiceState::Open => "open",
        InvoiceState::Paid => "paid",
        InvoiceState::Expired => "expired",
    };
    Ok(Json(json!({ "object": "invoice", "payment_hash": hash, "state": state })).into_response())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RefundBody {
    destination: String,
    #[serde(default)]
    amount_msat: Option<Msat>,
}

fn refund_json(refund: &Refund) -> Value {
    json!({
        "object": "refund", "id": refund.id, "state": refund.state, "amount_msat": refund.amount,
        "max_fee_msat": refund.max_fee, "fee_msat": refund.fee, "payment_hash": refund.payment_hash,
        "reason": refund.reason,
    })
}

/// `POST /v1/refund`: back to an invoice or a Lightning address.
pub(crate) async fn refund(
    State(edge): State<Arc<Edge>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    let door = Arc::clone(door(&edge)?);
    let key = own_key(caller)?;
    let body = body::read(&edge, request.into_body()).await?;
    let RefundBody { destination, amount_msat } = parsed(&body)?;
    let refund = door.refund(&key, &destination, amount_msat).await?;
    Ok((StatusCode::ACCEPTED, Json(refund_json(&refund))).into_response())
}

pub(crate) async fn refunds(
    State(edge): State<Arc<Edge>>,
    Extension(caller): Extension<Caller>,
) -> Result<Response, ApiError> {
    let refunds = door(&edge)?.refunds(&own_key(caller)?).await?;
    let data: Vec<Value> = refunds.iter().map(refund_json).collect();
    Ok(Json(json!({ "object": "list", "data": data })).into_response())
}

fn own_key(caller: Caller) -> Result<String, ApiError> {
    let none = || ApiError::new(StatusCode::UNAUTHORIZED, "invalid_api_key", "Show the key that is to be paid back.");
    caller.key.ok_or_else(none)
}
