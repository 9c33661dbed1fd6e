//! The relays that a publisher or a subscriber uses, and how each of them is doing.

use std::sync::Arc;
use std::time::Duration;

use nostr_sdk::pool::transport::websocket::WebSocketTransport;
use nostr_sdk::{Client, Keys, Relay, RelayOptions, RelayUrl};
use thiserror::Error;

/// Relays that one node may use.
const MAX_RELAYS: usize = 32;

/// Which relays, and how soon a lost one is tried again.
#[derive(Debug, Clone)]
pub struct RelayConfig {
    /// `wss://...` or `ws://...`.
    pub urls: Vec<String>,
    /// First wait before another try.
    pub retry: Duration,
}

impl RelayConfig {
    pub fn new(urls: Vec<String>) -> RelayConfig {
        RelayConfig { urls, retry: Duration::from_secs(5) }
    }
}

/// Why relays could not be used at all. A relay that is merely down is no error: it is tried again.
#[derive(Debug, Error)]
pub enum StartError {
    #[error("no relay is configured")]
    NoRelays,
    #[error("{given} relays, at most {MAX_RELAYS}")]
    TooMany { given: usize },
    #[error("{url:?} is no relay URL: {reason}")]
    BadUrl { url: String, reason: String },
    #[error("Nostr client: {0}")]
    Client(String),
}

/// How one relay is doing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RelayHealth {
    pub url: String,
    pub connected: bool,
    /// Connections made so far.
    pub connections: usize,
    /// Attempts to connect so far.
    pub attempts: usize,
    /// Events that it took from us.
    pub delivered: u64,
    /// Events that it did not take.
    pub refused: u64,
    /// What it said, or what went wrong, the last time that something did.
    pub last_error: Option<String>,
}

/// A client with its relays added and connecting.
pub(crate) struct Relays {
    pub(crate) client: Client,
    pub(crate) all: Vec<Relay>,
}

impl Relays {
    /// Checks the URLs and starts connecting in the background.
    ///
    /// `signer` answers relays that ask who we are (NIP-42); `transport` replaces the plain WebSocket.
    pub(crate) async fn connect(
        config: &RelayConfig,
        signer: Option<Keys>,
        transport: Option<Arc<dyn WebSocketTransport>>,
    ) -> Result<Relays, StartError> {
        match config.urls.len() {
            0 => return Err(StartError::NoRelays),
            given if given > MAX_RELAYS => return Err(StartError::TooMany { given }),
            _ => {}
        }
        let mut builder = Client::builder();
        if let Some(transport) = transport {
            builder = builder.websocket_transport(transport);
        }
        if let Some(signer) = signer {
            builder = builder.signer(signer);
        }
        let client = builder.build();
        let mut all = Vec::new();
        for url in &config.urls {
            let bad = |reason: String| StartError::BadUrl { url: url.clone(), reason };
            let parsed = RelayUrl::parse(url).map_err(|e| bad(e.to_string()))?;
            let options = RelayOptions::new().retry_interval(config.retry).adjust_retry_interval(false);
            let added = client.pool().add_relay(parsed.clone(), options).await;
            // A relay that is named twice is one relay.
            if added.map_err(|e| StartError::Client(e.to_string()))? {
                let relay = client.relay(&parsed).await.map_err(|e| StartError::Client(e.to_string()))?;
                all.push(relay);
            }
        }
        client.connect().await;
        Ok(Relays { client, all })
    }
}

/// Brings what can be seen of a relay's connection up to date, and logs when it comes or goes.
pub(crate) fn observe(health: &mut RelayHealth, relay: &Relay) {
    let connected = relay.is_connected();
    let attempts = relay.stats().attempts();
    match (health.connected, connected) {
        (false, true) => tracing::info!(relay = %health.url, "relay connected"),
        (true, false) => {
            tracing::warn!(relay = %health.url, "relay lost; trying again");
            health.last_error = Some("connection lost".into());
        }
        // The second attempt is the first sign that the first one failed: say so once.
        (false, false) if health.attempts <= 1 && attempts > 1 => {
            tracing::warn!(relay = %health.url, "relay does not answer; trying again");
            health.last_error = Some("does not answer".into());
        }
        (false, false) | (true, true) => {}
    }
    health.connected = connected;
    health.connections = relay.stats().success();
    health.attempts = attempts;
}
