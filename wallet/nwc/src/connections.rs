//! The apps that may use our wallet, on disk: who they are, what each may spend, what each has asked for.
//!
//! The app's own secret is shown once, when the connection is made, and not kept.

use crate::{
    budget::{Budget, OverBudget, Renewal},
    watch::replace,
};
use nostr_sdk::prelude::{Keys, NostrWalletConnectURI, PublicKey, RelayUrl, SecretKey};
use satgrid_types::{Msat, PaymentHash, UnixMs};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::{collections::BTreeMap, io, path::PathBuf};
use thiserror::Error;

/// Connections at once.
const MAX_CONNECTIONS: usize = 64;
/// Invoices and payments of one app that are remembered.
const MAX_ROWS: usize = 1_000;
const KEY_CONTEXT: &[u8] = b"satgrid-nwc-v1\0";

#[derive(Debug, Error)]
pub enum StoreError {
    #[error("{path}: {source}")]
    File { path: PathBuf, source: io::Error },
    #[error("there is a connection named {0:?} already")]
    Taken(String),
    #[error("there is no connection named {0:?}")]
    NoSuch(String),
    #[error("{MAX_CONNECTIONS} connections are the limit; revoke one")]
    TooMany,
    #[error("{0:?} is no relay: write ws:// or wss://")]
    Relay(String),
    #[error(transparent)]
    OverBudget(#[from] OverBudget),
}

/// One app.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Connection {
    pub name: String,
    /// The app's public key, in hex.
    pub app: String,
    pub created_at: UnixMs,
    /// `None`: it may not pay at all.
    pub budget: Option<Budget>,
    /// What it made and paid, by payment hash.
    pub(crate) rows: BTreeMap<PaymentHash, Row>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Row {
    pub outgoing: bool,
    pub bolt11: String,
    pub description: String,
    pub amount: Msat,
    pub created_at: UnixMs,
    pub expires_at: UnixMs,
    /// The app was told that it was paid.
    pub told: bool,
}

/// What a connection is made with.
#[derive(Debug, Clone)]
pub struct NewConnection {
    pub name: String,
    /// Zero: it may see and receive, and not pay.
    pub budget: Msat,
    pub renewal: Renewal,
    pub relays: Vec<String>,
    /// 32 random bytes: the app's secret.
    pub secret: [u8; 32],
}

#[derive(Debug)]
pub struct Connections {
    path: PathBuf,
    master: [u8; 32],
    all: Vec<Connection>,
}

impl Connections {
    /// `master`: a secret of this node, from which the keys that apps talk to are derived.
    pub fn open(path: PathBuf, master: [u8; 32]) -> Result<Connections, StoreError> {
        let all = match std::fs::read(&path) {
            Ok(text) => {
                serde_json::from_slice(&text).map_err(|e| StoreError::File { path: path.clone(), source: e.into() })?
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(source) => return Err(StoreError::File { path, source }),
        };
        Ok(Connections { path, master, all })
    }

    pub fn all(&self) -> &[Connection] {
        &self.all
    }

    /// Makes a connection and gives the address for the app, which holds its secret.
    pub fn add(&mut self, now: UnixMs, new: NewConnection) -> Result<String, StoreError> {
        if self.all.iter().any(|c| c.name == new.name) {
            return Err(StoreError::Taken(new.name));
        }
        if self.all.len() >= MAX_CONNECTIONS {
            return Err(StoreError::TooMany);
        }
        let relays = new
            .relays
            .iter()
            .map(|relay| RelayUrl::parse(relay).map_err(|_| StoreError::Relay(relay.clone())))
            .collect::<Result<Vec<_>, _>>()?;
        let secret =
            SecretKey::from_slice(&new.secret).map_err(|_| StoreError::NoSuch("a usable secret".to_owned()))?;
        let app = Keys::new(secret.clone()).public_key();
        let budget = (!new.budget.is_zero()).then(|| Budget::new(now, new.budget, new.renewal));
        let connection =
            Connection { name: new.name, app: app.to_hex(), created_at: now, budget, rows: BTreeMap::new() };
        let service = self.service_keys(&app).public_key();
        self.all.push(connection);
        self.save()?;
        Ok(NostrWalletConnectURI::new(service, relays, secret, None).to_string())
    }

    /// From here on its requests are not answered.
    pub fn revoke(&mut self, name: &str) -> Result<(), StoreError> {
        let before = self.all.len();
        self.all.retain(|c| c.name != name);
        if self.all.len() == before {
            return Err(StoreError::NoSuch(name.to_owned()));
        }
        self.save()
    }

    /// The key under which this app knows us: another for each app, so that relays cannot tell that they are one wallet.
    pub(crate) fn service_keys(&self, app: &PublicKey) -> Keys {
        let mut counter = 0u8;
        loop {
            let mut hasher = Sha256::new();
            hasher.update(KEY_CONTEXT);
            hasher.update(self.master);
            hasher.update(app.to_bytes());
            hasher.update([counter]);
            // All but a vanishing share of hashes is a key.
            match SecretKey::from_slice(&hasher.finalize()) {
                Ok(secret) => return Keys::new(secret),
                Err(_) => counter = counter.wrapping_add(1),
            }
        }
    }

    /// The apps with the keys that they talk to.
    pub(crate) fn keys(&self) -> Vec<(PublicKey, Keys)> {
        let apps = self.all.iter().filter_map(|c| PublicKey::from_hex(&c.app).ok());
        apps.map(|app| (app, self.service_keys(&app))).collect()
    }

    pub(crate) fn of(&self, app: &PublicKey) -> Option<&Connection> {
        let app = app.to_hex();
        self.all.iter().find(|c| c.app == app)
    }

    /// Changes a connection; durable when it returns. `None`: it was revoked meanwhile.
    pub(crate) fn change<T>(
        &mut self,
        app: &PublicKey,
        change: impl FnOnce(&mut Connection) -> Result<T, StoreError>,
    ) -> Result<Option<T>, StoreError> {
        let app = app.to_hex();
        let Some(connection) = self.all.iter_mut().find(|c| c.app == app) else { return Ok(None) };
        let changed = change(connection)?;
        while connection.rows.len() > MAX_ROWS {
            // One for which budget is held is needed to end that.
            let held = connection.budget.as_ref().map(|budget| &budget.reserved);
            let free = connection.rows.iter().filter(|(hash, _)| held.is_none_or(|held| !held.contains_key(*hash)));
            let oldest = free.min_by_key(|(_, row)| row.created_at).map(|(hash, _)| *hash);
            let Some(oldest) = oldest else { break };
            connection.rows.remove(&oldest);
        }
        self.save()?;
        Ok(Some(changed))
    }

    fn save(&self) -> Result<(), StoreError> {
        let text = serde_json::to_vec_pretty(&self.all).map_err(io::Error::from);
        text.and_then(|text| replace(&self.path, &text))
            .map_err(|source| StoreError::File { path: self.path.clone(), source })
    }
}
