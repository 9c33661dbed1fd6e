//! The wallet's routes of the admin port. They are the operator's hands: what they move is booked as the operator's own.

use super::{Answer, Failed, State, failed};
use crate::drive::{channels::BackupFile, restore};
use axum::{
    Json, Router,
    extract::{Query, State as Shared},
    http::StatusCode,
    routing::{get, post},
};
use satgrid_types::{LightningKey, Msat, PaymentHash, VerifiedListing};
use satgrid_wallet::{
    Channel, ChannelError, ChannelId, Direction, Embedded, OpenChannel, PayError, PaymentRecord, PaymentState,
    embedded::{ANCHOR_RESERVE_SAT, OnchainSend, Receive, Shortage},
    invoice,
    reopen::Reopen,
};
use serde::Deserialize;
use serde_json::{Value, json};
use std::{
    net::SocketAddr,
    sync::{Arc, PoisonError},
};

/// Invoices that an operator makes live for a day unless they say otherwise.
const INVOICE_EXPIRY_S: u32 = 86_400;

pub(super) fn routes() -> Router<State> {
    Router::new()
        .route("/admin/v1/wallet", get(wallet))
        .route("/admin/v1/wallet/address", post(new_address))
        .route("/admin/v1/wallet/sync", post(sync))
        .route("/admin/v1/wallet/open", post(open_channel))
        .route("/admin/v1/wallet/close", post(close_channel))
        .route("/admin/v1/wallet/receive", post(receive))
        .route("/admin/v1/wallet/pay", post(pay))
        .route("/admin/v1/wallet/send", post(send))
        .route("/admin/v1/wallet/fees", get(fees))
        .route("/admin/v1/wallet/backup", get(backup))
        .route("/admin/v1/wallet/restore", get(restoring))
        .route("/admin/v1/wallet/payment", get(payment))
        .route("/admin/v1/wallet/payments", get(payments))
}

/// What only the embedded node can do.
fn embedded(state: &State) -> Result<&Arc<dyn Embedded>, Failed> {
    let text =
        "this node uses a wallet over Nostr Wallet Connect (wallet.nwc): it has no coins and channels of its own";
    state.embedded.as_ref().ok_or_else(|| Failed(StatusCode::NOT_IMPLEMENTED, text.to_owned()))
}

fn unusable(text: impl std::fmt::Display) -> Failed {
    Failed(StatusCode::BAD_REQUEST, text.to_string())
}

async fn wallet(Shared(state): Shared<State>) -> Answer {
    let balance = state.wallet.balance().await.map_err(failed)?;
    let channels = state.wallet.channels().await.map_err(failed)?;
    let facts = match &state.embedded {
        Some(embedded) => Some(embedded.facts().await.map_err(failed)?),
        None => None,
    };
    let lsp = facts.as_ref().and_then(|facts| facts.lsp);
    // Somebody else's wallet finds room for payments by itself.
    let (sells, buys) = if state.embedded.is_some() { state.wants } else { (None, state.wants.1) };
    let shortages: Vec<Value> = Shortage::all(&balance, &channels, lsp.is_some(), sells, buys)
        .iter()
        .map(|s| json!({ "reason": s.reason(), "text": s.to_string(), "remedy": s.remedy(), "blocks": s.blocks() }))
        .collect();
    let ready = |c: &&Channel| c.usable;
    Ok(Json(json!({
        "node": state.wallet.node_id(),
        "kind": if state.embedded.is_some() { "embedded" } else { "nwc" },
        "height": facts.as_ref().map(|facts| facts.height),
        "lsp": lsp,
        "balance": {
            "lightning_total_msat": balance.lightning_total, "payable_msat": balance.payable,
            "largest_payment_msat": balance.largest_payment,
            "receivable_msat": balance.receivable, "closing_sat": balance.closing_sat,
            "onchain_confirmed_sat": balance.onchain_confirmed_sat, "onchain_total_sat": balance.onchain_total_sat,
            "anchor_reserve_sat": facts.as_ref().map(|facts| facts.anchor_reserve_sat),
        },
        "usable_channels": channels.iter().filter(ready).count(),
        "channels": channels.iter().map(channel).collect::<Vec<_>>(),
        "shortages": shortages,
    })))
}

fn channel(c: &Channel) -> Value {
    json!({
        "id": c.id.to_string(), "counterparty": c.counterparty, "capacity_sat": c.capacity_sat,
        "ours_msat": c.ours, "reserve_sat": c.reserve_sat, "payable_msat": c.payable,
        "largest_payment_msat": c.largest_payment, "receivable_msat": c.receivable, "we_opened": c.we_opened,
        "ready": c.ready, "usable": c.usable, "confirmations": c.confirmations,
    })
}

async fn new_address(Shared(state): Shared<State>) -> Answer {
    let address = state.wallet.new_address().await.map_err(failed)?;
    Ok(Json(json!({ "address": address })))
}

async fn sync(Shared(state): Shared<State>) -> Answer {
    state.wallet.sync().await.map_err(failed)?;
    Ok(Json(json!({})))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Open {
    /// A Lightning node id; or whose listing names it: a provider's key or its beginning, or a model that it sells.
    node: String,
    /// `host:port`; where it is missing, the listing's.
    #[serde(default)]
    addr: Option<String>,
    capacity_sat: u64,
    #[serde(default)]
    push_msat: u64,
}

async fn open_channel(Shared(state): Shared<State>, Json(open): Json<Open>) -> Answer {
    let (node, addr) = whom(&state, &open).await?;
    let request = OpenChannel { node, addr, capacity_sat: open.capacity_sat, push: Msat(open.push_msat) };
    state.wallet.open_channel(request).await.map_err(|error| match error {
        ChannelError::Funds { .. } | ChannelError::OverCap { .. } => {
            Failed(StatusCode::PAYMENT_REQUIRED, error.to_string())
        }
        ChannelError::Unreachable { .. }
        | ChannelError::NoSuchChannel(_)
        | ChannelError::Refused { .. }
        | ChannelError::Wallet(_) => failed(error),
    })?;
    Ok(Json(json!({ "node": node, "addr": addr, "anchor_reserve_sat": ANCHOR_RESERVE_SAT })))
}

async fn whom(state: &State, open: &Open) -> Result<(LightningKey, SocketAddr), Failed> {
    let named: Option<LightningKey> = open.node.parse().ok();
    let live = state.market.live();
    let fits = |l: &&Arc<VerifiedListing>| match &named {
        Some(node) => l.lightning_node == *node,
        None => l.model == open.node || (open.node.len() >= 6 && l.node_key.to_string().starts_with(&open.node)),
    };
    let listing = live.iter().filter(fits).find(|l| l.lightning_address.is_some());
    let node = named.or(listing.map(|l| l.lightning_node)).ok_or_else(|| {
        unusable(format!("{:?} is no Lightning node id, and no live listing that takes channels is its", open.node))
    })?;
    let addr = open.addr.clone().or_else(|| listing.and_then(|l| l.lightning_address.clone()));
    let addr =
        addr.ok_or_else(|| unusable(format!("no listing says where {node} takes channels; name its HOST:PORT")))?;
    let found = tokio::net::lookup_host(&addr).await.ok().and_then(|mut found| found.next());
    Ok((node, found.ok_or_else(|| unusable(format!("{addr} has no address")))?))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Close {
    /// The channel's id, or its beginning.
    channel: String,
    #[serde(default)]
    force: bool,
}

async fn close_channel(Shared(state): Shared<State>, Json(close): Json<Close>) -> Answer {
    let channels = state.wallet.channels().await.map_err(failed)?;
    let named: Vec<ChannelId> =
        channels.iter().filter(|c| c.id.to_string().starts_with(&close.channel)).map(|c| c.id).collect();
    let [id] = named[..] else {
        return Err(unusable(format!("{} channels of this wallet begin with {:?}", named.len(), close.channel)));
    };
    let wished = || state.wished.lock().unwrap_or_else(PoisonError::into_inner);
    if close.force {
        // Before it happens: whoever opens force-closed channels again is to leave this one.
        wished().insert(id.to_string());
    }
    if let Err(error) = state.wallet.close_channel(id, close.force).await {
        wished().remove(&id.to_string());
        return Err(failed(error));
    }
    Ok(Json(json!({ "channel": id.to_string(), "forced": close.force })))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Ask {
    amount_msat: Msat,
    #[serde(default)]
    description: String,
    #[serde(default)]
    expiry_s: Option<u32>,
    #[serde(default)]
    max_lsp_fee_msat: Option<Msat>,
}

async fn receive(Shared(state): Shared<State>, Json(ask): Json<Ask>) -> Answer {
    let receive = Receive {
        amount: ask.amount_msat,
        description: ask.description,
        expiry_secs: ask.expiry_s.unwrap_or(INVOICE_EXPIRY_S),
        max_lsp_fee: ask.max_lsp_fee_msat,
    };
    let made = embedded(&state)?.receive(receive).await.map_err(unusable)?;
    state.own.add(made.invoice.payment_hash);
    let receivable = state.wallet.balance().await.map_err(failed)?.receivable;
    Ok(Json(json!({
        "invoice": made.invoice.bolt11, "payment_hash": made.invoice.payment_hash, "lsp_fee_msat": made.lsp_fee,
        "receivable_msat": receivable, "opens_channel": made.lsp_fee.is_some(),
    })))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Pay {
    invoice: String,
    max_fee_msat: Msat,
}

async fn pay(Shared(state): Shared<State>, Json(pay): Json<Pay>) -> Answer {
    let facts = invoice::read(&pay.invoice).map_err(unusable)?;
    state.own.add(facts.payment_hash);
    state.wallet.pay(&pay.invoice, pay.max_fee_msat).await.map_err(|error| match error {
        PayError::BadInvoice { .. } | PayError::Expired => unusable(error),
        PayError::NoRoute { .. } => Failed(StatusCode::PAYMENT_REQUIRED, error.to_string()),
        PayError::Stopped | PayError::Uncertain { .. } => failed(error),
    })?;
    Ok(Json(json!({ "payment_hash": facts.payment_hash, "amount_msat": facts.amount })))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Send {
    address: String,
    /// Absent: everything above the anchor reserve.
    #[serde(default)]
    amount_sat: Option<u64>,
    #[serde(default)]
    sat_per_vb: Option<u32>,
}

async fn send(Shared(state): Shared<State>, Json(send): Json<Send>) -> Answer {
    let Send { address, amount_sat, sat_per_vb } = send;
    let txid = embedded(&state)?.send_onchain(OnchainSend { address, amount_sat, sat_per_vb }).await;
    Ok(Json(json!({ "txid": txid.map_err(unusable)? })))
}

async fn fees(Shared(state): Shared<State>) -> Answer {
    let wallet = embedded(&state)?;
    let (paid, facts) = (wallet.fees_paid().await.map_err(failed)?, wallet.facts().await.map_err(failed)?);
    Ok(Json(json!({
        "paid": { "routing_msat": paid.routing, "lsp_msat": paid.lsp, "onchain_msat": paid.onchain },
        "anchor_reserve_sat": facts.anchor_reserve_sat,
        "anchor_reserve_per_channel_sat": ANCHOR_RESERVE_SAT,
        "lsp": facts.lsp,
    })))
}

async fn backup(Shared(state): Shared<State>) -> Answer {
    let backup = embedded(&state)?.channel_backup().await.map_err(failed)?;
    let restoring = restore::peek(&state.restoring);
    // The very file that the node writes, so that a restore reads it.
    let file = BackupFile::of(state.network, backup, restoring.as_ref(), &Reopen::default());
    Ok(Json(serde_json::to_value(file).map_err(failed)?))
}

async fn restoring(Shared(state): Shared<State>) -> Answer {
    Ok(Json(serde_json::to_value(restore::peek(&state.restoring)).map_err(failed)?))
}

#[derive(Deserialize)]
struct Which {
    hash: PaymentHash,
}

async fn payment(Shared(state): Shared<State>, Query(which): Query<Which>) -> Answer {
    let found = state.wallet.lookup(which.hash).await.map_err(failed)?;
    Ok(Json(match found {
        PaymentState::Unknown => json!({ "state": "unknown" }),
        PaymentState::InFlight => json!({ "state": "in_flight" }),
        PaymentState::Settled { preimage, fee, amount } => {
            json!({ "state": "settled", "preimage": preimage, "fee_msat": fee, "amount_msat": amount })
        }
        PaymentState::Failed { reason } => json!({ "state": "failed", "reason": reason.to_string() }),
    }))
}

async fn payments(Shared(state): Shared<State>) -> Answer {
    let rows = state.wallet.payments().await.map_err(failed)?;
    Ok(Json(Value::Array(rows.iter().map(row).collect())))
}

fn row(p: &PaymentRecord) -> Value {
    let state = match (&p.state, p.direction) {
        (PaymentState::Unknown, _) => "unknown",
        // Nobody has sent anything yet: an invoice of ours that waits, or that nobody ever paid.
        (PaymentState::InFlight, Direction::Inbound) => "unpaid",
        (PaymentState::InFlight, Direction::Outbound) => "in_flight",
        (PaymentState::Settled { .. }, _) => "settled",
        (PaymentState::Failed { .. }, _) => "failed",
    };
    json!({
        "payment_hash": p.hash, "at": p.at,
        "direction": match p.direction { Direction::Inbound => "inbound", Direction::Outbound => "outbound" },
        "amount_msat": p.amount, "fee_msat": p.fee, "state": state,
    })
}
