//! The second port behind the edge: keys with budgets, what calls have cost, what one would cost.
//!
//! The daemon implements [`Accounts`] over the node's database. As in [`crate::service`], nothing here knows HTTP or JSON;
//! shapes on the wire are in `keys`.

use async_trait::async_trait;
use satgrid_types::{FinishReason, Msat, RateCard, RequestId, UnixMs};
use thiserror::Error;

use crate::service::{Bill, CompletionRequest, ServiceError};

/// What a node keeps for its API clients beside completions.
#[async_trait]
pub trait Accounts: Send + Sync + 'static {
    /// The stored key whose secret has this SHA-256.
    async fn admit(&self, secret_sha256: [u8; 32]) -> Result<Account, KeyDenied>;

    /// A key's limits and figures; `None` where there is none.
    async fn key(&self, id: &str) -> Result<Option<KeyView>, AccountError>;

    /// Every key, or those directly below one, oldest first.
    async fn keys(&self, below: Option<&str>) -> Result<Vec<KeyView>, AccountError>;

    /// Makes a key. The secret is shown this once.
    async fn create_key(&self, new: NewKey) -> Result<(KeyView, String), AccountError>;

    /// Ends a key and all below it.
    async fn revoke_key(&self, id: &str) -> Result<KeyView, AccountError>;

    /// What an API request came to; its calls in order, none where it is not known.
    async fn generation(&self, id: RequestId) -> Result<Vec<Generation>, AccountError>;

    /// The most that a request can cost if it is sent now.
    async fn estimate(&self, request: CompletionRequest, key: Option<String>) -> Result<Estimate, ServiceError>;

    /// What a bitcoin is worth, where the operator named a source.
    fn exchange_rate(&self) -> Option<ExchangeRate>;
}

/// A stored key that was shown and may be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    /// Not secret: `key_17`.
    pub id: String,
    /// May make and revoke keys below itself, and nothing else.
    pub manages: bool,
    /// Of the key and of those above it that have one: whose, and requests per minute.
    pub paces: Vec<(String, u32)>,
}

/// Why a shown key opens nothing.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum KeyDenied {
    #[error("Incorrect API key provided.")]
    Unknown,
    #[error("This API key was revoked.")]
    Revoked,
    #[error("This API key has expired.")]
    Expired,
    /// The detail goes to the log.
    #[error("This node cannot look the key up now.")]
    Unavailable { detail: String },
}

/// A key as its owner sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyView {
    pub id: String,
    pub name: String,
    /// `infer`, `manage` or `prepaid`.
    pub kind: &'static str,
    pub parent: Option<String>,
    pub created_at: UnixMs,
    pub revoked_at: Option<UnixMs>,
    pub limits: KeyLimits,
    pub spent: Msat,
    /// Held for calls that are not over.
    pub reserved: Msat,
    pub spent_today: Msat,
    pub requests: u64,
    /// What one more call may cost, by this key's own limits; `None` where nothing limits it.
    pub available: Option<Msat>,
    /// Of a prepaid key: what was paid in and is neither spent nor held.
    pub balance: Option<Msat>,
}

/// Absent limits do not limit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KeyLimits {
    pub per_request: Option<Msat>,
    /// From midnight to midnight, UTC.
    pub per_day: Option<Msat>,
    pub total: Option<Msat>,
    pub requests_per_minute: Option<u32>,
    /// Empty: every model.
    pub models: Vec<String>,
    pub expires_at: Option<UnixMs>,
}

/// A key that is asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NewKey {
    pub name: String,
    pub manages: bool,
    pub parent: Option<String>,
    pub limits: KeyLimits,
}

/// Why an account was not changed or read.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum AccountError {
    #[error("There is no key `{id}`.")]
    NoSuchKey { id: String },
    #[error("{message}")]
    Invalid { message: String },
    #[error("This node failed; the log names the cause under this request's id.")]
    Internal { detail: String },
}

/// What became of a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generation {
    pub model: String,
    /// The id of the stored key or the name of the configured one; `None` for a keyless caller.
    pub key: Option<String>,
    pub created_at: UnixMs,
    pub ended_at: Option<UnixMs>,
    pub state: GenerationState,
    pub finish: Option<FinishReason>,
    /// Held while it runs.
    pub reserved: Msat,
    /// What counts against the key.
    pub charged: Msat,
    pub bill: Bill,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GenerationState {
    Open,
    Done,
    Failed,
}

/// The most that a request can cost, before it is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Estimate {
    pub model: String,
    pub prompt_tokens: u32,
    /// The longest output that was planned for.
    pub max_tokens: u32,
    /// At the dearest provider that may serve it, nothing cached.
    pub ceiling: Msat,
    /// If another provider has to take over, who bills what was there as input.
    pub ceiling_with_failover: Msat,
    /// Of the provider that is asked first.
    pub rates: RateCard,
    pub providers: u32,
    /// What the key leaves for it; `None` where nothing limits it.
    pub available: Option<Msat>,
    pub rate: Option<ExchangeRate>,
}

/// Dollars for a bitcoin, at a moment, from a source. Display only: nothing is ever charged by it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExchangeRate {
    pub micro_usd_per_btc: u64,
    pub at: UnixMs,
    /// `fixed`, or the host that was asked.
    pub source: String,
}

/// One bitcoin.
const MSAT_PER_BTC: u128 = 100_000_000_000;
const MICRO: u128 = 1_000_000;

impl ExchangeRate {
    /// An amount in dollars, as a decimal with 12 places, rounded down.
    pub fn usd(&self, amount: Msat) -> String {
        let pico = self.usd_pico(amount);
        let unit = MICRO * MICRO;
        format!("{}.{:012}", pico / unit, pico % unit)
    }

    /// In millionths of millionths of a dollar, rounded down.
    pub(crate) fn usd_pico(&self, amount: Msat) -> u128 {
        // Two 64-bit factors and a million: below 2^148 only on paper; prices of that size saturate.
        let product = u128::from(amount.0) * u128::from(self.micro_usd_per_btc);
        product.saturating_mul(MICRO) / MSAT_PER_BTC
    }

    /// A price in millionths of a dollar, as msat, rounded down: a limit in dollars never buys dearer.
    pub fn msat_of_micro_usd(&self, micro_usd: u64) -> Option<Msat> {
        let msat = u128::from(micro_usd).checked_mul(MSAT_PER_BTC)?.checked_div(u128::from(self.micro_usd_per_btc))?;
        u64::try_from(msat).ok().map(Msat)
    }

    /// Dollars and millionths, for display.
    pub fn usd_per_btc(&self) -> String {
        format!("{}.{:06}", self.micro_usd_per_btc / 1_000_000, self.micro_usd_per_btc % 1_000_000)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dollars_are_exact_decimals() {
        let rate = |micro_usd_per_btc| ExchangeRate { micro_usd_per_btc, at: UnixMs(1), source: "fixed".into() };
        // 100,000 dollars a bitcoin: a sat is a tenth of a cent, an msat a millionth of a dollar.
        let round = rate(100_000_000_000);
        assert_eq!(round.usd(Msat(1)), "0.000001000000");
        assert_eq!(round.usd(Msat(100_000_000_000)), "100000.000000000000");
        assert_eq!(round.msat_of_micro_usd(250_000), Some(Msat(250_000)));
        let odd = rate(97_123_456_789);
        assert_eq!(odd.usd(Msat(3)), "0.000002913703");
        assert_eq!(odd.msat_of_micro_usd(1), Some(Msat(1)));
        assert_eq!(odd.usd_per_btc(), "97123.456789");
        assert_eq!(rate(0).msat_of_micro_usd(1), None);
    }
}
