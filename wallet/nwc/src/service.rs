//! Our wallet for the user's other apps.
//!
//! | a request | is answered when |
//! |---|---|
//! | from a key that has no connection, or one revoked | never |
//! | older than a minute, or past its own expiry | never: the app has given up on it |
//! | `pay_invoice` | what it may cost is held in the budget, on disk, before the wallet is asked; then at its end |
//! | anything else | at once |
//!
//! An app sees its own invoices and payments and nobody else's.

use crate::{
    budget::Quiet,
    connections::{Connections, Row, StoreError},
    link,
    wire::{self, Encryption, Fault, METHODS, REQUEST_LIVES_S, Request, Response},
};
use nostr_sdk::prelude::{Client, Event, EventBuilder, Filter, Keys, PublicKey, RelayUrl, Tag, Timestamp};
use satgrid_types::{Digest as Terms, Msat, PaymentHash, UnixMs};
use satgrid_wallet::{
    Embedded, InvoiceRequest, Lightning, PayError, PaymentState, embedded::Receive, invoice,
    port::MAX_INVOICE_EXPIRY_SECS,
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio::sync::{Notify, watch};

const DEFAULT_EXPIRY_SECS: u64 = 3_600;
/// How long a payment's end is waited for before the app is left to look it up.
const PAY_WITHIN: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How often held budgets and unpaid invoices are looked at.
const RECONCILE_EVERY: Duration = Duration::from_secs(1);
/// A route may cost this share of the amount, and this much at least.
const FEE_SHARE: u64 = 100;
const LEAST_FEE: Msat = Msat(1_000);
/// Requests of one app in a minute.
const REQUESTS_A_MINUTE: u32 = 120;

#[derive(Debug, Clone)]
pub struct ServiceConfig {
    pub relays: Vec<String>,
}

/// What an app has open: payments that hold budget, with the end of their invoices, and invoices that it was not told of.
type Open = (PublicKey, Vec<(PaymentHash, UnixMs)>, Vec<(PaymentHash, Row)>);

/// A running service. Dropping it ends it.
pub struct NwcService {
    shared: Arc<Shared>,
    stopped: watch::Sender<bool>,
}

struct Shared {
    client: Client,
    wallet: Arc<dyn Lightning>,
    embedded: Option<Arc<dyn Embedded>>,
    connections: Mutex<Connections>,
    changed: Notify,
    asked: Mutex<BTreeMap<PublicKey, (u64, u32)>>,
    /// One step of a payment at a time: see [`Shared::turn`].
    turns: Mutex<BTreeMap<PaymentHash, Arc<tokio::sync::Mutex<()>>>>,
}

impl NwcService {
    pub async fn start(
        config: ServiceConfig,
        wallet: Arc<dyn Lightning>,
        embedded: Option<Arc<dyn Embedded>>,
        connections: Connections,
    ) -> Result<NwcService, String> {
        let relays = config.relays.iter().map(|r| RelayUrl::parse(r).map_err(|e| format!("{r}: {e}")));
        let client = link::connect(&relays.collect::<Result<Vec<_>, _>>()?).await?;
        let connections = Mutex::new(connections);
        let (changed, asked, turns) = (Notify::new(), Mutex::default(), Mutex::default());
        let shared = Arc::new(Shared { client, wallet, embedded, connections, changed, asked, turns });
        let stopped = watch::Sender::new(false);
        let mut ends = stopped.subscribe();
        let serving = shared.clone();
        tokio::spawn(async move {
            tokio::select! {
                _ = ends.wait_for(|stopped| *stopped) => {}
                () = serving.clone().serve() => {}
                () = serving.reconcile() => {}
            }
        });
        Ok(NwcService { shared, stopped })
    }

    pub fn look<T>(&self, f: impl FnOnce(&Connections) -> T) -> T {
        f(&self.shared.connections())
    }

    /// Changes the connections; it is heard at once.
    pub fn change<T>(&self, f: impl FnOnce(&mut Connections) -> T) -> T {
        let changed = f(&mut self.shared.connections());
        self.shared.changed.notify_one();
        changed
    }
}

impl Drop for NwcService {
    fn drop(&mut self) {
        self.stopped.send_replace(true);
    }
}

impl Shared {
    fn connections(&self) -> MutexGuard<'_, Connections> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whoever holds it is alone with this payment: nobody sends it between what is read of it and what is then written
    /// about its budget. Else the end of one try would give back what a second one spends.
    fn turn(&self, hash: PaymentHash) -> Arc<tokio::sync::Mutex<()>> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        turns.retain(|_, turn| Arc::strong_count(turn) > 1);
        turns.entry(hash).or_default().clone()
    }

    /// Announces and answers; anew whenever the connections change.
    async fn serve(self: Arc<Self>) {
        let mut heard = link::hear(&self.client, vec![wire::REQUEST]);
        let mut subscribed = None;
        loop {
            let keys = self.connections().keys();
            for (_, ours) in &keys {
                if let Some(info) = info(ours) {
                    let _ = self.client.send_event(&info).await;
                }
            }
            let to_us: Vec<PublicKey> = keys.iter().map(|(_, ours)| ours.public_key()).collect();
            if to_us.is_empty() {
                self.changed.notified().await;
                continue;
            }
            let filter = Filter::new().kind(wire::REQUEST).pubkeys(to_us).since(Timestamp::now());
            let Ok(next) = link::subscribe(&self.client, filter).await else {
                tokio::time::sleep(RECONCILE_EVERY).await;
                continue;
            };
            // The old one ends when the new one stands: a request in between is kept by no relay.
            if let Some(last) = subscribed.replace(next) {
                self.client.unsubscribe(&last).await;
            }
            loop {
                let event = tokio::select! {
                    () = self.changed.notified() => break,
                    event = heard.recv() => match event {
                        Some(event) => event,
                        None => return,
                    },
                };
                tokio::spawn(self.clone().request(event));
            }
        }
    }

    async fn request(self: Arc<Self>, event: Event) {
        let now_s = Timestamp::now().as_secs();
        let expires = wire::tag(&event, "expiration").and_then(|text| text.parse::<u64>().ok());
        if event.created_at.as_secs() + REQUEST_LIVES_S < now_s || expires.is_some_and(|at| at < now_s) {
            return;
        }
        let app = event.pubkey;
        let ours = {
            let connections = self.connections();
            // A key of another app's, or of nobody's, opens nothing.
            let ours = connections.of(&app).map(|_| connections.service_keys(&app));
            ours.filter(|ours| wire::tag(&event, "p") == Some(ours.public_key().to_hex().as_str()))
        };
        let Some(ours) = ours else { return };
        let encryption = Encryption::of(&event);
        let Some(text) = encryption.open(ours.secret_key(), &app, &event.content) else { return };
        let (method, answer) = match serde_json::from_str::<Request>(&text) {
            Ok(Request { method, params }) => {
                let answer = if self.allowed_now(&app, now_s) {
                    self.answer(&app, &method, &params).await
                } else {
                    Err(Fault::new("RATE_LIMITED", format!("{REQUESTS_A_MINUTE} requests a minute are the limit")))
                };
                (method, answer)
            }
            Err(error) => ("unknown".to_owned(), Err(Fault::new("OTHER", format!("the request is no JSON: {error}")))),
        };
        let (result, error) = match answer {
            Ok(result) => (Some(result), None),
            Err(fault) => (None, Some(fault)),
        };
        let response = Response { result_type: method, error, result };
        self.send(&ours, &app, wire::RESPONSE, encryption, &response, Some(&event)).await;
    }

    fn allowed_now(&self, app: &PublicKey, now_s: u64) -> bool {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let (minute, count) = asked.entry(*app).or_insert((now_s / 60, 0));
        if *minute != now_s / 60 {
            (*minute, *count) = (now_s / 60, 0);
        }
        *count += 1;
        *count <= REQUESTS_A_MINUTE
    }

    async fn send(
        &self,
        ours: &Keys,
        app: &PublicKey,
        kind: nostr_sdk::Kind,
        encryption: Encryption,
        what: &impl serde::Serialize,
        about: Option<&Event>,
    ) {
        let Ok(text) = serde_json::to_string(what) else { return };
        let Some(event) = wire::event(ours, app, kind, encryption, &text, about) else { return };
        if let Err(error) = self.client.send_event(&event).await {
            tracing::warn!(%error, "an app's answer was not sent");
        }
    }

    async fn answer(&self, app: &PublicKey, method: &str, params: &Value) -> Result<Value, Fault> {
        match method {
            "get_info" => Ok(json!({
                "alias": "satgrid", "pubkey": self.wallet.node_id(), "network": self.wallet.network().to_string(),
                "methods": METHODS, "notifications": ["payment_received"],
            })),
            "get_balance" => {
                let balance = self.wallet.balance().await.map_err(internal)?;
                Ok(json!({ "balance": balance.payable }))
            }
            "make_invoice" => self.make_invoice(app, params).await,
            "pay_invoice" => self.pay_invoice(app, params).await,
            "lookup_invoice" => {
                let hash = which(params)?;
                let row = self.connections().of(app).and_then(|c| c.rows.get(&hash).cloned());
                let row = row.ok_or_else(|| Fault::new("NOT_FOUND", "no invoice or payment of this connection"))?;
                let state = self.wallet.lookup(hash).await.map_err(internal)?;
                Ok(transaction(hash, &row, &state))
            }
            "list_transactions" => self.list(app, params).await,
            other => Err(Fault::new("NOT_IMPLEMENTED", format!("{other} is not offered"))),
        }
    }

    async fn make_invoice(&self, app: &PublicKey, params: &Value) -> Result<Value, Fault> {
        let amount = Msat(params["amount"].as_u64().unwrap_or_default());
        let description = params["description"].as_str().unwrap_or_default().to_owned();
        let asked = params["expiry"].as_u64().unwrap_or(DEFAULT_EXPIRY_SECS);
        let expiry_secs =
            u32::try_from(asked.min(u64::from(MAX_INVOICE_EXPIRY_SECS))).unwrap_or(MAX_INVOICE_EXPIRY_SECS);
        let refused = |e: satgrid_wallet::InvoiceError| Fault::new("OTHER", e.to_string());
        let made = match (params["description_hash"].as_str(), &self.embedded) {
            (Some(hash), _) => {
                let description_hash: Terms =
                    hash.parse().map_err(|_| Fault::new("OTHER", "description_hash is no hash in hex"))?;
                self.wallet.create_invoice(InvoiceRequest { amount, description_hash, expiry_secs }).await
            }
            (None, Some(embedded)) => {
                let ask = Receive { amount, description: description.clone(), expiry_secs, max_lsp_fee: None };
                embedded.receive(ask).await.map(|received| received.invoice)
            }
            (None, None) => {
                let description_hash = Terms(Sha256::digest(&description).into());
                self.wallet.create_invoice(InvoiceRequest { amount, description_hash, expiry_secs }).await
            }
        };
        let made = made.map_err(refused)?;
        let created_at = now();
        let expires_at = created_at.plus_ms(u64::from(expiry_secs) * 1_000);
        let row =
            Row { outgoing: false, bolt11: made.bolt11, description, amount, created_at, expires_at, told: false };
        let said = transaction(made.payment_hash, &row, &PaymentState::InFlight);
        self.remember(app, made.payment_hash, row)?;
        Ok(said)
    }

    fn remember(&self, app: &PublicKey, hash: PaymentHash, row: Row) -> Result<(), Fault> {
        let kept = self.connections().change(app, |connection| {
            connection.rows.insert(hash, row);
            Ok(())
        });
        kept.map_err(stored)?.ok_or_else(revoked)
    }

    async fn pay_invoice(&self, app: &PublicKey, params: &Value) -> Result<Value, Fault> {
        let bolt11 = params["invoice"].as_str().unwrap_or_default().to_owned();
        let facts = invoice::read(&bolt11).map_err(|e| Fault::new("OTHER", e.to_string()))?;
        let amount = facts.amount.ok_or_else(|| Fault::new("OTHER", "the invoice names no amount"))?;
        let hash = facts.payment_hash;
        let max_fee = Msat(amount.0 / FEE_SHARE).max(LEAST_FEE);
        let row = Row {
            outgoing: true,
            bolt11: bolt11.clone(),
            description: String::new(),
            amount,
            created_at: now(),
            expires_at: facts.expires_at,
            told: true,
        };
        let turn = self.turn(hash);
        {
            let _turn = turn.lock().await;
            // What this app has paid and what was counted is told again, and not counted again.
            if self.has_counted(app, &hash)
                && let PaymentState::Settled { preimage, fee, .. } = self.wallet.lookup(hash).await.map_err(internal)?
            {
                return Ok(json!({ "preimage": preimage, "fees_paid": fee }));
            }
            // On disk before the wallet is asked: a crash may forget an answer, never a payment.
            let first = self
                .connections()
                .change(app, |connection| {
                    let first = match &mut connection.budget {
                        Some(budget) => budget.reserve(now(), hash, amount.saturating_add(max_fee))?,
                        None => return Err(StoreError::NoSuch("budget".to_owned())),
                    };
                    connection.rows.insert(hash, row);
                    Ok(first)
                })
                .map_err(stored)?
                .ok_or_else(revoked)?;
            if let Err(error) = self.wallet.pay(&bolt11, max_fee).await {
                // An earlier try may be out: what is held for it stays held until that one has its end.
                if error.sent_nothing() && first {
                    self.ended(app, hash, None)?;
                }
                let code = match &error {
                    PayError::NoRoute { amount, payable, .. } if payable < amount => "INSUFFICIENT_BALANCE",
                    PayError::NoRoute { .. } | PayError::Expired => "PAYMENT_FAILED",
                    PayError::BadInvoice { .. } => "OTHER",
                    PayError::Stopped | PayError::Uncertain { .. } => "INTERNAL",
                };
                return Err(Fault::new(code, error.to_string()));
            }
        }
        let deadline = tokio::time::Instant::now() + PAY_WITHIN;
        loop {
            {
                let _turn = turn.lock().await;
                match self.wallet.lookup(hash).await.map_err(internal)? {
                    PaymentState::Settled { preimage, fee, amount: paid } => {
                        // Another invoice may have had this hash: what was paid counts.
                        let paid = if paid.is_zero() { amount } else { paid };
                        self.ended(app, hash, Some(paid.saturating_add(fee)))?;
                        return Ok(json!({ "preimage": preimage, "fees_paid": fee }));
                    }
                    PaymentState::Failed { reason } => {
                        self.ended(app, hash, None)?;
                        return Err(Fault::new("PAYMENT_FAILED", reason.to_string()));
                    }
                    PaymentState::Unknown | PaymentState::InFlight => {}
                }
            }
            if tokio::time::Instant::now() >= deadline {
                let text = "the payment is still under way; look it up before you try again";
                return Err(Fault::new("INTERNAL", text));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Whether this app asked for this payment before and nothing is held for it any more.
    fn has_counted(&self, app: &PublicKey, hash: &PaymentHash) -> bool {
        let connections = self.connections();
        connections.of(app).is_some_and(|connection| {
            let held = connection.budget.as_ref().is_some_and(|budget| budget.reserved.contains_key(hash));
            !held && connection.rows.get(hash).is_some_and(|row| row.outgoing)
        })
    }

    /// A payment cost this much, or nothing.
    fn ended(&self, app: &PublicKey, hash: PaymentHash, cost: Option<Msat>) -> Result<(), Fault> {
        let changed = self.connections().change(app, |connection| {
            if let Some(budget) = &mut connection.budget {
                match cost {
                    Some(cost) => budget.settled(now(), hash, cost),
                    None => budget.failed(&hash),
                }
            }
            Ok(())
        });
        changed.map(drop).map_err(stored)
    }

    async fn list(&self, app: &PublicKey, params: &Value) -> Result<Value, Fault> {
        let number = |key: &str| params[key].as_u64();
        let (from, until) = (number("from").unwrap_or(0), number("until").unwrap_or(u64::MAX));
        let unpaid = params["unpaid"].as_bool().unwrap_or(false);
        let kind = params["type"].as_str();
        let mut rows: Vec<(PaymentHash, Row)> = self
            .connections()
            .of(app)
            .map(|c| c.rows.iter().map(|(hash, row)| (*hash, row.clone())).collect())
            .unwrap_or_default();
        rows.sort_by_key(|(hash, row)| (core::cmp::Reverse(row.created_at), *hash));
        let mut found = Vec::new();
        for (hash, row) in rows {
            let at = row.created_at.as_secs();
            let other = kind.is_some_and(|kind| kind != if row.outgoing { "outgoing" } else { "incoming" });
            if at < from || at > until || other {
                continue;
            }
            let state = self.wallet.lookup(hash).await.map_err(internal)?;
            if unpaid || matches!(state, PaymentState::Settled { .. }) {
                found.push(transaction(hash, &row, &state));
            }
        }
        let skip = usize::try_from(number("offset").unwrap_or(0)).unwrap_or(usize::MAX);
        let take = usize::try_from(number("limit").unwrap_or(u64::MAX)).unwrap_or(usize::MAX);
        Ok(json!({ "transactions": found.into_iter().skip(skip).take(take).collect::<Vec<_>>() }))
    }

    /// Ends what a payment held whose end nobody waited for, and tells apps of what they were paid.
    async fn reconcile(&self) {
        let (began, mut quiet) = (tokio::time::Instant::now(), Quiet::default());
        loop {
            tokio::time::sleep(RECONCILE_EVERY).await;
            let all: Vec<Open> = {
                let connections = self.connections();
                let expires = |c: &crate::Connection, hash: &PaymentHash| {
                    c.rows.get(hash).map_or(UnixMs(u64::MAX), |row| row.expires_at)
                };
                let held = |c: &crate::Connection| {
                    let held = c.budget.iter().flat_map(|b| b.reserved.keys());
                    held.map(|hash| (*hash, expires(c, hash))).collect()
                };
                let untold = |c: &crate::Connection| {
                    c.rows.iter().filter(|(_, row)| !row.told).map(|(hash, row)| (*hash, row.clone())).collect()
                };
                let known = connections.all().iter().filter_map(|c| Some((PublicKey::from_hex(&c.app).ok()?, c)));
                known.map(|(app, c)| (app, held(c), untold(c))).collect()
            };
            quiet.keep(|hash| all.iter().any(|(_, held, _)| held.iter().any(|(held, _)| held == hash)));
            for (app, held, untold) in all {
                for (hash, expires_at) in held {
                    let turn = self.turn(hash);
                    let _turn = turn.lock().await;
                    match self.wallet.lookup(hash).await {
                        Ok(PaymentState::Settled { fee, amount, .. }) => {
                            let _ = self.ended(&app, hash, Some(amount.saturating_add(fee)));
                        }
                        Ok(PaymentState::Failed { .. }) => {
                            let _ = self.ended(&app, hash, None);
                        }
                        Ok(PaymentState::Unknown | PaymentState::InFlight) => {
                            let over = now() >= expires_at && self.nothing_is_out().await;
                            if quiet.saw(began.elapsed(), hash, over) {
                                let _ = self.ended(&app, hash, None);
                            }
                        }
                        Err(_) => {}
                    }
                }
                for (hash, row) in untold {
                    if let Ok(state @ PaymentState::Settled { .. }) = self.wallet.lookup(hash).await {
                        self.tell(&app, hash, &row, &state).await;
                    }
                }
            }
        }
    }

    /// As [`satgrid_wallet::payment`] has it.
    async fn nothing_is_out(&self) -> bool {
        let usable = self.wallet.channels().await.is_ok_and(|all| all.iter().any(|channel| channel.usable));
        usable && self.wallet.balance().await.is_ok_and(|balance| !balance.outbound_in_flight)
    }

    async fn tell(&self, app: &PublicKey, hash: PaymentHash, row: &Row, state: &PaymentState) {
        let ours = self.connections().service_keys(app);
        let said = json!({ "notification_type": "payment_received", "notification": transaction(hash, row, state) });
        for (kind, encryption) in
            [(wire::NOTIFICATION, Encryption::Nip44), (wire::NOTIFICATION_NIP04, Encryption::Nip04)]
        {
            self.send(&ours, app, kind, encryption, &said, None).await;
        }
        let told = self.connections().change(app, |connection| {
            if let Some(row) = connection.rows.get_mut(&hash) {
                row.told = true;
            }
            Ok(())
        });
        if let Err(error) = told {
            tracing::warn!(%error, "an app will be told of a payment twice");
        }
    }
}

fn info(ours: &Keys) -> Option<Event> {
    let tags =
        [Tag::parse(["encryption", "nip44_v2 nip04"]).ok()?, Tag::parse(["notifications", "payment_received"]).ok()?];
    EventBuilder::new(wire::INFO, METHODS.join(" ")).tags(tags).sign_with_keys(ours).ok()
}

fn transaction(hash: PaymentHash, row: &Row, state: &PaymentState) -> Value {
    let mut said = json!({
        "type": if row.outgoing { "outgoing" } else { "incoming" },
        "invoice": row.bolt11, "description": row.description, "payment_hash": hash,
        "amount": row.amount, "fees_paid": 0, "created_at": row.created_at.as_secs(),
        "expires_at": row.expires_at.as_secs(), "state": "pending",
    });
    match state {
        PaymentState::Settled { preimage, fee, amount } => {
            said["state"] = json!("settled");
            said["preimage"] = json!(preimage);
            said["fees_paid"] = json!(fee);
            said["amount"] = json!(amount);
            said["settled_at"] = json!(now().as_secs());
        }
        PaymentState::Failed { .. } => said["state"] = json!("failed"),
        PaymentState::InFlight | PaymentState::Unknown => {}
    }
    said
}

fn which(params: &Value) -> Result<PaymentHash, Fault> {
    let by_hash = params["payment_hash"].as_str().and_then(|text| text.parse().ok());
    let by_invoice = || params["invoice"].as_str().and_then(|text| invoice::read(text).ok()).map(|f| f.payment_hash);
    by_hash.or_else(by_invoice).ok_or_else(|| Fault::new("OTHER", "name a payment_hash or an invoice"))
}

fn internal(error: satgrid_wallet::WalletError) -> Fault {
    Fault::new("INTERNAL", error.to_string())
}
fn revoked() -> Fault {
    Fault::new("UNAUTHORIZED", "this connection was revoked")
}
fn stored(error: StoreError) -> Fault {
    match error {
        StoreError::OverBudget(over) => Fault::new("QUOTA_EXCEEDED", over.to_string()),
        StoreError::NoSuch(_) => Fault::new("RESTRICTED", "this connection may not pay"),
        StoreError::File { .. } | StoreError::Taken(_) | StoreError::TooMany | StoreError::Relay(_) => {
            Fault::new("INTERNAL", error.to_string())
        }
    }
}

fn now() -> UnixMs {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    UnixMs(u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX))
}
