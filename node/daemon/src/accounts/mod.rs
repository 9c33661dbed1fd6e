//! The API's `Accounts` over the node's database: stored keys, what their calls reserved and cost, and the exchange rate.
//!
//! | file | for |
//! |---|---|
//! | `budget` | one call's money: reserved before it is sent, posted when it ended, whatever ended it |
//! | `detail` | what is kept of a call, as JSON, and the way back |
//! | `estimate` | the ceiling of a request that is not sent |
//! | `meter` | what calls came to, for `/metrics` |
//! | `rate` | dollars for a bitcoin, where the operator named a source |
//! | `recover` | calls that a crash left open, settled for what the journal says |
//!
//! Nothing here decides what is allowed: that is `satgrid_ledger::keys`, proved inside each transaction.

pub(crate) mod budget;
mod detail;
mod estimate;
pub(crate) mod meter;
pub(crate) mod rate;
pub(crate) mod recover;

use crate::door::Till;
use crate::drive::now;
use crate::traces::Traces;
use async_trait::async_trait;
use meter::Meter;
use rand::RngCore;
use rate::Rate;
use satgrid_api::{
    Account, AccountError, Accounts, CompletionRequest, Estimate, ExchangeRate, Generation, KeyDenied, KeyView,
    ServiceError,
};
use satgrid_ledger::keys::{self, KeyId, KeyKind, KeyRecord, KeyRefusal};
use satgrid_ledger_sqlite::{KeyError, KeyStore};
use satgrid_types::RequestId;
use sha2::{Digest, Sha256};
use std::sync::{Arc, OnceLock, Weak};

/// Random bytes of a secret.
const SECRET_BYTES: usize = 32;

/// What the API asks beside completions.
pub(crate) struct Desk {
    pub keys: KeyStore,
    pub rate: Rate,
    pub meter: Arc<Meter>,
    /// Where strangers' calls are charged.
    pub till: Till,
    /// Where calls are traced, if a collector is named.
    pub traces: Option<Traces>,
    /// Plans and tokenises for estimates; set once the gateway stands.
    gateway: OnceLock<Weak<crate::service::Gateway>>,
}

impl Desk {
    pub(crate) fn new(keys: KeyStore, rate: Rate, till: Till, traces: Option<Traces>) -> Arc<Desk> {
        Arc::new(Desk { keys, rate, meter: Arc::default(), till, traces, gateway: OnceLock::new() })
    }

    pub(crate) fn serves(&self, gateway: &Arc<crate::service::Gateway>) {
        // The first one stays: a node has one gateway.
        let _ = self.gateway.set(Arc::downgrade(gateway));
    }
}

/// A fresh secret of a stored key.
pub(crate) fn secret() -> String {
    let mut bytes = [0; SECRET_BYTES];
    rand::rngs::OsRng.fill_bytes(&mut bytes);
    format!("{}{}", satgrid_api::STORED_KEY_PREFIX, hex::encode(bytes))
}

#[async_trait]
impl Accounts for Desk {
    async fn admit(&self, secret_sha256: [u8; 32]) -> Result<Account, KeyDenied> {
        let now = now();
        let unavailable = |error: KeyError| KeyDenied::Unavailable { detail: error.to_string() };
        let chain = self.keys.find(secret_sha256, now).await.map_err(unavailable)?;
        let Some(shown) = chain.first() else { return Err(KeyDenied::Unknown) };
        for key in &chain {
            match key.usable(now) {
                Ok(()) => {}
                Err(KeyRefusal::Expired(_)) => return Err(KeyDenied::Expired),
                Err(
                    KeyRefusal::Revoked(_)
                    | KeyRefusal::CannotInfer(_)
                    | KeyRefusal::Model { .. }
                    | KeyRefusal::Limit { .. },
                ) => return Err(KeyDenied::Revoked),
            }
        }
        Ok(Account {
            id: shown.id.to_string(),
            manages: shown.kind == KeyKind::Manage,
            paces: chain.iter().filter_map(|key| Some((key.id.to_string(), key.limits.requests_per_minute?))).collect(),
        })
    }

    async fn key(&self, id: &str) -> Result<Option<KeyView>, AccountError> {
        let Ok(id) = id.parse::<KeyId>() else { return Ok(None) };
        let chain = self.keys.chain(id, now()).await.map_err(account_error)?;
        Ok(chain.first().map(view))
    }

    async fn keys(&self, below: Option<&str>) -> Result<Vec<KeyView>, AccountError> {
        let below = below.map(key_id).transpose()?;
        let found = self.keys.list(below, now()).await.map_err(account_error)?;
        Ok(found.iter().map(view).collect())
    }

    async fn create_key(&self, new: satgrid_api::NewKey) -> Result<(KeyView, String), AccountError> {
        let satgrid_api::NewKey { name, manages, parent, limits } = new;
        let kind = if manages { KeyKind::Manage } else { KeyKind::Infer };
        let parent = parent.as_deref().map(key_id).transpose()?;
        let satgrid_api::KeyLimits { per_request, per_day, total, requests_per_minute, models, expires_at } = limits;
        let limits = keys::KeyLimits { per_request, per_day, total, requests_per_minute, models, expires_at };
        let secret = secret();
        let hash = Sha256::digest(secret.as_bytes()).into();
        let new = keys::NewKey { name, kind, parent, limits };
        let record = self.keys.create(&new, hash, now()).await.map_err(account_error)?;
        tracing::info!(key = %record.id, kind = kind.name(), "API key made");
        Ok((view(&record), secret))
    }

    async fn revoke_key(&self, id: &str) -> Result<KeyView, AccountError> {
        let record = self.keys.revoke(key_id(id)?, now()).await.map_err(account_error)?;
        tracing::info!(key = %record.id, "API key revoked");
        Ok(view(&record))
    }

    async fn generation(&self, id: RequestId) -> Result<Vec<Generation>, AccountError> {
        let calls = self.keys.calls(id).await.map_err(account_error)?;
        Ok(calls.into_iter().map(detail::generation).collect())
    }

    async fn estimate(&self, request: CompletionRequest, key: Option<String>) -> Result<Estimate, ServiceError> {
        let gateway = self.gateway.get().and_then(Weak::upgrade);
        let gateway = gateway.ok_or_else(|| ServiceError::NotReady { reasons: vec!["starting".to_owned()] })?;
        estimate::estimate(self, &gateway, &request, key.as_deref()).await
    }

    fn exchange_rate(&self) -> Option<ExchangeRate> {
        self.rate.now()
    }
}

fn key_id(id: &str) -> Result<KeyId, AccountError> {
    let shown: String = id.chars().filter(|c| !c.is_control()).take(40).collect();
    id.parse().map_err(|_| AccountError::NoSuchKey { id: shown })
}

fn account_error(error: KeyError) -> AccountError {
    match error {
        KeyError::NoSuchKey(id) => AccountError::NoSuchKey { id: id.to_string() },
        KeyError::BadKey(_)
        | KeyError::Refused(_)
        | KeyError::Full(_)
        | KeyError::TooManyInvoices
        | KeyError::OverBalance(_)
        | KeyError::PaidElsewhere => AccountError::Invalid { message: error.to_string() },
        KeyError::NotOpen(_) | KeyError::Storage(_) => AccountError::Internal { detail: error.to_string() },
    }
}

fn view(record: &KeyRecord) -> KeyView {
    let KeyRecord { id, name, kind, parent, created_at, revoked_at, limits, usage } = record;
    KeyView {
        id: id.to_string(),
        name: name.clone(),
        kind: kind.name(),
        parent: parent.map(|id| id.to_string()),
        created_at: *created_at,
        revoked_at: *revoked_at,
        limits: satgrid_api::KeyLimits {
            per_request: limits.per_request,
            per_day: limits.per_day,
            total: limits.total,
            requests_per_minute: limits.requests_per_minute,
            models: limits.models.clone(),
            expires_at: limits.expires_at,
        },
        spent: usage.spent,
        reserved: usage.reserved,
        spent_today: usage.spent_today,
        requests: usage.requests,
        available: record.room().map(|(room, _)| room),
        balance: (*kind == KeyKind::Prepaid).then(|| record.balance()),
    }
}
