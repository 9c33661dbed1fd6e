//! A wallet that is somebody else's, behind the port.

use crate::{
    answer::{Looked, fee, looked, preimage, record},
    link,
    watch::{GRACE_MS, Waiting, Watch},
    wire::{self, Encryption, Fault, Request, Response},
};
use async_trait::async_trait;
use nostr_sdk::prelude::{Client, Event, EventId, Filter, Keys, NostrWalletConnectURI, PublicKey, Timestamp};
use satgrid_types::{LightningKey, Msat, PaymentHash, UnixMs};
use satgrid_wallet::{
    Balance, Channel, ChannelError, ChannelId, Direction, FailureReason, Invoice, InvoiceError, InvoiceRequest,
    Lightning, Network, OpenChannel, PayError, PaymentRecord, PaymentState, WalletError, WalletEvent, invoice,
    port::MAX_INVOICE_EXPIRY_SECS,
};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use thiserror::Error;
use tokio::sync::{Notify, mpsc, oneshot, watch};

const ANSWER_WITHIN: Duration = Duration::from_secs(15);
/// Without an answer the same request is sent again.
const REPEAT_AFTER: Duration = Duration::from_secs(4);
/// A payment's answer comes when it has ended.
const PAID_WITHIN: Duration = Duration::from_secs(90);
/// What is waited for is asked about so often; a notification asks at once.
const POLL_EVERY: Duration = Duration::from_secs(1);
/// Payments asked for at once.
const LISTED: usize = 1_000;
const NO_CHANNELS: &str = "a wallet over Nostr Wallet Connect has no coins and channels of its own";

#[derive(Debug, Clone)]
pub struct NwcConfig {
    /// `nostr+walletconnect://...`: a secret.
    pub uri: String,
    pub network: Network,
    /// What is waited for is kept here.
    pub state: PathBuf,
}

/// Why the wallet cannot be used.
#[derive(Debug, Error)]
pub enum ConnectError {
    #[error("this is no nostr+walletconnect: address")]
    Uri,
    #[error("the wallet's relays cannot be used: {0}")]
    Relays(String),
    #[error("{path}: {source}")]
    State { path: PathBuf, source: std::io::Error },
    #[error("the wallet does not answer over its relay: {0}")]
    Silent(String),
    #[error("the wallet names no Lightning node (get_info without a pubkey): invoices could not be checked")]
    NoNode,
    #[error("the wallet is on {given}, this node on {expected}")]
    OtherNetwork { given: String, expected: Network },
}

#[derive(Debug, Error)]
enum AskError {
    #[error("{} ({})", .0.message, .0.code)]
    Fault(Fault),
    #[error("no answer in {0} s")]
    Silent(u64),
    #[error("not sent: {0}")]
    NotSent(String),
    /// It may have passed a relay whose word for it was lost.
    #[error("no relay said that it took it")]
    NotTaken,
}

/// The wallet behind a connection.
pub struct NwcWallet {
    shared: Arc<Shared>,
    node: LightningKey,
    network: Network,
    stopped: watch::Sender<bool>,
}

struct Shared {
    client: Client,
    keys: Keys,
    wallet: PublicKey,
    encryption: Encryption,
    answers: Mutex<BTreeMap<EventId, oneshot::Sender<Response>>>,
    state: Mutex<State>,
    /// There is an event, or something to ask about.
    events: Notify,
    poke: Notify,
}

struct State {
    watch: Watch,
    /// Shown in this order until acknowledged.
    queue: VecDeque<(PaymentHash, WalletEvent)>,
    /// The payment whose event was last shown: the one that may be acknowledged.
    shown: Option<PaymentHash>,
    /// Payments whose answer is awaited.
    paying: BTreeSet<PaymentHash>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl NwcWallet {
    pub async fn connect(config: NwcConfig) -> Result<NwcWallet, ConnectError> {
        let uri = NostrWalletConnectURI::parse(&config.uri).map_err(|_| ConnectError::Uri)?;
        let watch = Watch::open(config.state.clone())
            .map_err(|source| ConnectError::State { path: config.state.clone(), source })?;
        let client = link::connect(&uri.relays).await.map_err(ConnectError::Relays)?;
        let keys = Keys::new(uri.secret.clone());
        let about = Filter::new().kind(wire::INFO).author(uri.public_key).limit(1);
        let info = client.fetch_events(about, ANSWER_WITHIN).await.ok().and_then(|events| events.first().cloned());
        let encryption = info.as_ref().map_or(Encryption::Nip04, Encryption::of);
        let kinds = [wire::RESPONSE, wire::NOTIFICATION, wire::NOTIFICATION_NIP04];
        let ours = Filter::new().kinds(kinds).author(uri.public_key).pubkey(keys.public_key()).since(Timestamp::now());
        let heard = link::hear(&client, kinds.to_vec());
        link::subscribe(&client, ours).await.map_err(ConnectError::Relays)?;
        let shared = Arc::new(Shared {
            client,
            keys,
            wallet: uri.public_key,
            encryption,
            answers: Mutex::default(),
            state: Mutex::new(State { watch, queue: VecDeque::new(), shown: None, paying: BTreeSet::new() }),
            events: Notify::new(),
            poke: Notify::new(),
        });
        tokio::spawn(shared.clone().listen(heard));
        let silent = |e: AskError| ConnectError::Silent(e.to_string());
        let info = shared.ask("get_info", json!({}), ANSWER_WITHIN).await.map_err(silent)?;
        let node = info["pubkey"].as_str().and_then(|text| text.parse().ok()).ok_or(ConnectError::NoNode)?;
        let given = info["network"].as_str().unwrap_or_default();
        if !given.is_empty() && given != config.network.to_string() {
            return Err(ConnectError::OtherNetwork { given: given.to_owned(), expected: config.network });
        }
        let stopped = watch::Sender::new(false);
        tokio::spawn(shared.clone().poll(stopped.subscribe()));
        Ok(NwcWallet { shared, node, network: config.network, stopped })
    }

    fn running(&self) -> Result<(), WalletError> {
        if *self.stopped.borrow() { Err(WalletError::Stopped) } else { Ok(()) }
    }

    async fn ask(&self, method: &str, params: Value) -> Result<Value, WalletError> {
        self.running()?;
        self.shared.ask(method, params, ANSWER_WITHIN).await.map_err(|e| WalletError::Node { reason: e.to_string() })
    }
}

impl Shared {
    async fn ask(&self, method: &str, params: Value, within: Duration) -> Result<Value, AskError> {
        let request = Request { method: method.to_owned(), params };
        let text = serde_json::to_string(&request).map_err(|e| AskError::NotSent(e.to_string()))?;
        let event = wire::event(&self.keys, &self.wallet, wire::REQUEST, self.encryption, &text, None)
            .ok_or_else(|| AskError::NotSent("it could not be encrypted".to_owned()))?;
        let (to, answer) = oneshot::channel();
        lock(&self.answers).insert(event.id, to);
        let id = event.id;
        let not_sent = match self.client.send_event(&event).await {
            Ok(sent) if sent.success.is_empty() => Some(AskError::NotTaken),
            Ok(_) => None,
            Err(error) => Some(AskError::NotSent(error.to_string())),
        };
        if let Some(error) = not_sent {
            lock(&self.answers).remove(&id);
            return Err(error);
        }
        // No relay keeps it: a wallet that was away for a moment gets the same request again.
        let mut answer = answer;
        let answer = tokio::time::timeout(within, async {
            loop {
                match tokio::time::timeout(REPEAT_AFTER, &mut answer).await {
                    Ok(answer) => return answer,
                    Err(_) => {
                        let _ = self.client.send_event(&event).await;
                    }
                }
            }
        })
        .await;
        lock(&self.answers).remove(&id);
        match answer {
            Ok(Ok(Response { error: Some(fault), .. })) => Err(AskError::Fault(fault)),
            Ok(Ok(Response { result, .. })) => Ok(result.unwrap_or(Value::Null)),
            Ok(Err(_)) | Err(_) => Err(AskError::Silent(within.as_secs())),
        }
    }

    async fn listen(self: Arc<Self>, mut heard: mpsc::Receiver<Event>) {
        while let Some(event) = heard.recv().await {
            if event.pubkey != self.wallet {
                continue;
            }
            if event.kind != wire::RESPONSE {
                self.poke.notify_one();
                continue;
            }
            let about = wire::tag(&event, "e").and_then(|id| EventId::from_hex(id).ok());
            let Some(to) = about.and_then(|id| lock(&self.answers).remove(&id)) else { continue };
            let text = self.encryption.open(self.keys.secret_key(), &self.wallet, &event.content);
            match text.and_then(|text| serde_json::from_str(&text).ok()) {
                Some(response) => {
                    let _ = to.send(response);
                }
                None => tracing::warn!("the wallet's answer could not be read"),
            }
        }
    }

    /// Asks about everything that is waited for, and queues what has ended.
    async fn poll(self: Arc<Self>, mut stopped: watch::Receiver<bool>) {
        loop {
            tokio::select! {
                _ = stopped.wait_for(|stopped| *stopped) => return,
                () = self.poke.notified() => {}
                () = tokio::time::sleep(POLL_EVERY) => {}
            }
            let waiting: Vec<(PaymentHash, Waiting)> = {
                let mut state = lock(&self.state);
                let _ = state.watch.forget_expired(now());
                let queued: BTreeSet<PaymentHash> = state.queue.iter().map(|(hash, _)| *hash).collect();
                state.watch.rows().filter(|(h, _)| !queued.contains(h)).map(|(h, w)| (*h, w.clone())).collect()
            };
            for (hash, row) in waiting {
                let event = match row.failed {
                    Some(reason) => Some(WalletEvent::PaymentFailed { hash, reason }),
                    None => match (self.look_after(hash).await, row.direction) {
                        (Ok(Some(Looked::Settled { preimage: Some(preimage), fee, .. })), Direction::Outbound) => {
                            Some(WalletEvent::PaymentSettled { hash, preimage, fee })
                        }
                        (Ok(Some(Looked::Settled { amount, .. })), Direction::Inbound) => {
                            Some(WalletEvent::PaymentReceived { hash, amount })
                        }
                        // Only of a payment that nobody is making now: a failed row may be an earlier try's.
                        (Ok(Some(Looked::Failed)), Direction::Outbound)
                            if !lock(&self.state).paying.contains(&hash) =>
                        {
                            Some(WalletEvent::PaymentFailed { hash, reason: FailureReason::Other })
                        }
                        // Its invoice is over, and the wallet never knew it: nobody pays it any more.
                        (Ok(None), Direction::Outbound)
                            if now().since(row.expires_at) >= GRACE_MS && !lock(&self.state).paying.contains(&hash) =>
                        {
                            Some(WalletEvent::PaymentFailed { hash, reason: FailureReason::NeverSent })
                        }
                        (Ok(_) | Err(_), _) => None,
                    },
                };
                if let Some(event) = event {
                    self.queue(hash, event);
                }
            }
        }
    }

    fn queue(&self, hash: PaymentHash, event: WalletEvent) {
        let mut state = lock(&self.state);
        if state.watch.get(&hash).is_some() && !state.queue.iter().any(|(queued, _)| *queued == hash) {
            state.queue.push_back((hash, event));
            self.events.notify_one();
        }
    }

    /// Looks, and remembers whether the wallet knows of it.
    async fn look_after(&self, hash: PaymentHash) -> Result<Option<Looked>, AskError> {
        let looked = self.look(hash).await?;
        let mut state = lock(&self.state);
        let known = looked.is_some() || state.paying.contains(&hash);
        state.watch.heard(hash, known);
        Ok(looked)
    }

    async fn look(&self, hash: PaymentHash) -> Result<Option<Looked>, AskError> {
        let answer = self.ask("lookup_invoice", json!({ "payment_hash": hash.to_string() }), ANSWER_WITHIN).await;
        match answer {
            Ok(found) => Ok(Some(looked(&found, hash))),
            Err(AskError::Fault(fault)) if fault.code == "NOT_FOUND" => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn pay(self: Arc<Self>, hash: PaymentHash, bolt11: String) {
        let paid = self.ask("pay_invoice", json!({ "invoice": bolt11 }), PAID_WITHIN).await;
        let failed = match &paid {
            // Without a relay's word it may have left: it is looked up until it has an end.
            Ok(_) | Err(AskError::Silent(_) | AskError::NotTaken) => None,
            // It never left.
            Err(AskError::NotSent(_)) => Some(FailureReason::Other),
            Err(AskError::Fault(fault)) => match fault.code.as_str() {
                "INSUFFICIENT_BALANCE" | "QUOTA_EXCEEDED" => Some(FailureReason::NoRoute),
                "PAYMENT_FAILED" => Some(FailureReason::RetriesExhausted),
                "RESTRICTED" | "UNAUTHORIZED" | "RATE_LIMITED" | "NOT_IMPLEMENTED" => Some(FailureReason::Rejected),
                // Anything else may have happened after it was sent: it is looked up until it has an end.
                _ => None,
            },
        };
        {
            let mut state = lock(&self.state);
            state.paying.remove(&hash);
            if let Some(reason) = failed
                && let Err(error) = state.watch.fail(&hash, reason)
            {
                tracing::error!(%error, "the state of the connected wallet was not written");
            }
        }
        if let Err(error) = &paid {
            tracing::info!(payment = %hash, %error, "the connected wallet did not say that it paid");
        }
        let preimage = paid.ok().and_then(|paid| Some((preimage(&paid, hash)?, fee(&paid))));
        match preimage {
            Some((preimage, fee)) => self.queue(hash, WalletEvent::PaymentSettled { hash, preimage, fee }),
            None => self.poke.notify_one(),
        }
    }
}

#[async_trait]
impl Lightning for NwcWallet {
    fn node_id(&self) -> LightningKey {
        self.node
    }
    fn network(&self) -> Network {
        self.network
    }

    async fn create_invoice(&self, request: InvoiceRequest) -> Result<Invoice, InvoiceError> {
        let InvoiceRequest { amount, description_hash, expiry_secs } = request;
        if amount.is_zero() {
            return Err(InvoiceError::ZeroAmount);
        }
        if expiry_secs == 0 || expiry_secs > MAX_INVOICE_EXPIRY_SECS {
            return Err(InvoiceError::Expiry { asked: expiry_secs });
        }
        let terms = description_hash.to_string();
        let params = json!({ "amount": amount.0, "description_hash": terms, "expiry": expiry_secs });
        let made = self.ask("make_invoice", params).await?;
        let bolt11 = made["invoice"].as_str().unwrap_or_default().to_owned();
        let node = |reason: String| WalletError::Node { reason };
        let facts = invoice::read(&bolt11).map_err(|e| node(format!("the wallet's invoice is none: {e}")))?;
        if facts.amount != Some(amount) || facts.description_hash != Some(description_hash) {
            let reason = "the wallet's invoice does not say what was asked: it cannot make invoices over given terms";
            return Err(node(reason.to_owned()).into());
        }
        let payment_hash = facts.payment_hash;
        let expires_at = facts.expires_at;
        let direction = Direction::Inbound;
        let waiting = Waiting { direction, amount, bolt11: bolt11.clone(), expires_at, failed: None };
        lock(&self.shared.state).watch.add(payment_hash, waiting).map_err(|e| node(e.to_string()))?;
        Ok(Invoice { bolt11, payment_hash })
    }

    async fn pay(&self, bolt11: &str, _max_fee: Msat) -> Result<(), PayError> {
        let bad = |reason: String| PayError::BadInvoice { reason };
        let facts = invoice::read(bolt11).map_err(|e| bad(e.to_string()))?;
        let amount = facts.amount.ok_or_else(|| bad("it names no amount".to_owned()))?;
        if facts.network != Some(self.network) {
            return Err(bad(format!("it is for {:?}, this wallet is on {}", facts.network, self.network)));
        }
        let hash = facts.payment_hash;
        match self.lookup(hash).await {
            Ok(PaymentState::InFlight | PaymentState::Settled { .. }) => return Ok(()),
            Ok(PaymentState::Unknown | PaymentState::Failed { .. }) => {}
            Err(WalletError::Stopped) => return Err(PayError::Stopped),
            Err(WalletError::Node { reason }) => return Err(PayError::Uncertain { reason }),
        }
        if facts.is_expired(now()) {
            return Err(PayError::Expired);
        }
        {
            let mut state = lock(&self.shared.state);
            if !state.paying.insert(hash) {
                return Ok(());
            }
            state.watch.heard(hash, true);
            // What an earlier try left to be told is no longer so.
            state.queue.retain(|(queued, _)| *queued != hash);
            let (direction, expires_at) = (Direction::Outbound, facts.expires_at);
            let waiting = Waiting { direction, amount, bolt11: bolt11.to_owned(), expires_at, failed: None };
            if let Err(error) = state.watch.add(hash, waiting) {
                state.paying.remove(&hash);
                return Err(bad(format!("what is waited for cannot be written: {error}")));
            }
        }
        tokio::spawn(self.shared.clone().pay(hash, bolt11.to_owned()));
        Ok(())
    }

    async fn lookup(&self, hash: PaymentHash) -> Result<PaymentState, WalletError> {
        self.running()?;
        let (failed, paying, row) = {
            let state = lock(&self.shared.state);
            let row = state.watch.get(&hash);
            (row.and_then(|row| row.failed), state.paying.contains(&hash), row.is_some())
        };
        if let Some(reason) = failed {
            return Ok(PaymentState::Failed { reason });
        }
        if paying {
            return Ok(PaymentState::InFlight);
        }
        let found = self.shared.look(hash).await.map_err(|e| WalletError::Node { reason: e.to_string() })?;
        Ok(match found {
            Some(Looked::Settled { preimage: Some(preimage), fee, amount }) => {
                PaymentState::Settled { preimage, fee, amount }
            }
            // A success without its preimage proves nothing.
            Some(Looked::Settled { preimage: None, .. } | Looked::Pending) => PaymentState::InFlight,
            Some(Looked::Failed) => PaymentState::Failed { reason: FailureReason::Other },
            None if row
                && lock(&self.shared.state).watch.get(&hash).is_some_and(|r| r.direction == Direction::Inbound) =>
            {
                PaymentState::InFlight
            }
            None => PaymentState::Unknown,
        })
    }

    async fn payments_since(&self, since: UnixMs) -> Result<Vec<PaymentRecord>, WalletError> {
        // The wallet reckons by when a transaction was begun, we by when it ended: as long as an invoice lives in between.
        let from = since.as_secs().saturating_sub(u64::from(MAX_INVOICE_EXPIRY_SECS));
        let mut records: BTreeMap<PaymentHash, PaymentRecord> = BTreeMap::new();
        loop {
            let ask = json!({ "from": from, "limit": LISTED, "offset": records.len(), "unpaid": true });
            let listed = self.ask("list_transactions", ask).await?;
            let rows = listed["transactions"].as_array().map_or(&[][..], Vec::as_slice);
            let before = records.len();
            records.extend(rows.iter().filter_map(record).map(|row| (row.hash, row)));
            // A wallet that knows no offsets says the same again.
            if rows.len() < LISTED || records.len() == before {
                break;
            }
        }
        let begins = UnixMs::from_secs(since.as_secs());
        let mut records: Vec<PaymentRecord> = records.into_values().filter(|row| row.at >= begins).collect();
        records.sort_by_key(|record| (record.at, record.hash));
        Ok(records)
    }

    async fn balance(&self) -> Result<Balance, WalletError> {
        let answer = self.ask("get_balance", json!({})).await?;
        let has = Msat(answer["balance"].as_u64().unwrap_or_default());
        let state = lock(&self.shared.state);
        Ok(Balance {
            lightning_total: has,
            payable: has,
            largest_payment: has,
            // It is not told; whoever makes an invoice learns it.
            receivable: Msat(u64::from(u32::MAX) * 1_000),
            outbound_in_flight: state.watch.may_be_out(&state.paying),
            ..Balance::default()
        })
    }

    /// The connection stands for one channel: usable while a relay is connected.
    async fn channels(&self) -> Result<Vec<Channel>, WalletError> {
        let balance = self.balance().await?;
        let connected = self.shared.client.relays().await.values().any(nostr_sdk::Relay::is_connected);
        Ok(vec![Channel {
            id: ChannelId(self.shared.wallet.to_bytes()),
            counterparty: self.node,
            capacity_sat: balance.lightning_total.0 / 1_000,
            ours: balance.lightning_total,
            reserve_sat: 0,
            payable: balance.payable,
            largest_payment: balance.largest_payment,
            receivable: balance.receivable,
            we_opened: false,
            ready: true,
            usable: connected,
            confirmations: 0,
        }])
    }

    async fn connect(&self, _: LightningKey, _: SocketAddr) -> Result<(), ChannelError> {
        Err(ChannelError::Refused { reason: NO_CHANNELS.to_owned() })
    }
    async fn open_channel(&self, _: OpenChannel) -> Result<(), ChannelError> {
        Err(ChannelError::Refused { reason: NO_CHANNELS.to_owned() })
    }
    async fn close_channel(&self, _: ChannelId, _: bool) -> Result<(), ChannelError> {
        Err(ChannelError::Refused { reason: NO_CHANNELS.to_owned() })
    }
    async fn new_address(&self) -> Result<String, WalletError> {
        Err(WalletError::Node { reason: NO_CHANNELS.to_owned() })
    }
    async fn sync(&self) -> Result<(), WalletError> {
        self.running()?;
        self.shared.poke.notify_one();
        tokio::task::yield_now().await;
        Ok(())
    }

    async fn next_event(&self) -> Result<WalletEvent, WalletError> {
        let mut stopped = self.stopped.subscribe();
        loop {
            let notified = self.shared.events.notified();
            self.running()?;
            {
                let mut state = lock(&self.shared.state);
                if let Some((hash, event)) = state.queue.front().cloned() {
                    state.shown = Some(hash);
                    return Ok(event);
                }
            }
            tokio::select! {
                _ = stopped.wait_for(|stopped| *stopped) => return Err(WalletError::Stopped),
                () = notified => {}
            }
        }
    }

    async fn event_handled(&self) -> Result<(), WalletError> {
        self.running()?;
        let mut state = lock(&self.shared.state);
        let shown = state.shown.take();
        let Some(hash) = shown.filter(|hash| state.queue.front().is_some_and(|(front, _)| front == hash)) else {
            return Ok(());
        };
        state.queue.pop_front();
        state.watch.remove(&hash).map_err(|e| WalletError::Node { reason: e.to_string() })
    }

    /// Empty: NIP-47 has no signatures by the Lightning node.
    fn sign_message(&self, _: &[u8]) -> String {
        String::new()
    }

    async fn stop(&self) -> Result<(), WalletError> {
        if !self.stopped.send_replace(true) {
            self.shared.client.shutdown().await;
        }
        Ok(())
    }
}

fn now() -> UnixMs {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    UnixMs(u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX))
}
