//! The front door's desk: invoices that fill prepaid keys, and refunds out of them.
//!
//! Strangers' money stands in the node's wallet, key by key in the database (`satgrid_ledger_sqlite`), and as one liability,
//! `clients`, in the journal, which has each deposit, charge and refund before it takes effect ([`books`]).
//! What strangers ask for is bought: from this node itself where it is a provider ([`house`]), else in the market like anything
//! else that this node buys; with sessions, receipts and all.
//!
//! | file | for |
//! |---|---|
//! | `acme`, `life` | the door's certificate, from an authority; when one ends |
//! | `books` | transfers in the journal |
//! | `house` | the consumer that buys this provider's own models |
//! | `l402` | tokens |
//! | `refunds` | the task that pays them, and what becomes of each payment |

pub(crate) mod acme;
mod books;
mod house;
mod l402;
pub(crate) mod life;
mod refunds;

pub(crate) use books::{Charged, Till};
pub(crate) use house::HouseWallet;

use crate::config;
use crate::drive::{journal::JournalWriter, now, payments};
use crate::lnurl::Destination;
use async_trait::async_trait;
use satgrid_api::{Door, DoorError, DoorInvoice, InvoiceState, Order, Refund};
use satgrid_ledger::keys::{KeyId, KeyRefusal};
use satgrid_ledger_sqlite::{InvoiceFor, InvoiceLimits, KeyError, KeyStore, NewInvoice, RefundRow};
use satgrid_types::{Digest, Msat, PaymentHash};
use satgrid_wallet::{InvoiceRequest, Lightning, invoice};
use sha2::Digest as _;
use std::sync::Arc;
use tokio::sync::mpsc;

const INVOICE_EXPIRY_SECS: u32 = 600;
/// Invoices of the door that may wait to be paid at one time.
const MAX_OPEN_INVOICES: u32 = 1_000;
/// Of them, those that one address asked for.
const MAX_OPEN_INVOICES_OF_ONE: u32 = 50;
const MSAT_PER_SAT: u64 = 1_000;
/// A refund's route may cost so much of it, and at least a sat.
const FEE_PERMILLE: u64 = 10;

/// The desk. One for a node.
pub(crate) struct DoorDesk {
    keys: KeyStore,
    journal: JournalWriter,
    wallet: Arc<dyn Lightning>,
    payments: mpsc::UnboundedSender<payments::Command>,
    handled: mpsc::UnboundedSender<PaymentHash>,
    mint: l402::Mint,
    settings: config::Door,
    margin_permille: u64,
    network: satgrid_wallet::Network,
    /// Woken when a refund is asked for.
    asked: tokio::sync::Notify,
}

/// What the desk works with.
pub(crate) struct Parts {
    pub keys: KeyStore,
    pub journal: JournalWriter,
    pub wallet: Arc<dyn Lightning>,
    pub payments: mpsc::UnboundedSender<payments::Command>,
    pub handled: mpsc::UnboundedSender<PaymentHash>,
    pub settings: config::Door,
    pub margin_permille: u64,
    pub network: satgrid_wallet::Network,
    /// This node's own, permanent.
    pub secret: [u8; 32],
}

impl DoorDesk {
    pub(crate) fn new(parts: Parts) -> Arc<DoorDesk> {
        let Parts { keys, journal, wallet, payments, handled, settings, margin_permille, network, secret } = parts;
        let mint = l402::Mint::new(&secret);
        let asked = tokio::sync::Notify::new();
        Arc::new(DoorDesk { keys, journal, wallet, payments, handled, mint, settings, margin_permille, network, asked })
    }

    /// A payment has arrived. Whether it was one of the door's, and is booked: first in the journal, then at its key, so
    /// that nothing is spent that the journal does not know. `Err`: show the event again.
    pub(crate) async fn received(&self, hash: PaymentHash, amount: Msat) -> Result<bool, String> {
        let text = |error: KeyError| error.to_string();
        let Some(row) = self.keys.invoice(hash).await.map_err(text)? else { return Ok(false) };
        if !row.paid {
            self.journal.append(vec![books::deposit(hash, amount)]).await?;
            self.keys.invoice_paid(hash, amount, now()).await.map_err(text)?;
            tracing::info!(payment = %hash, %amount, "a client paid in at the front door");
        }
        Ok(true)
    }

    /// An invoice of the wallet's, written down with what it fills before anyone sees it.
    async fn make(
        &self,
        asker: &str,
        amount: Msat,
        fills: impl FnOnce(PaymentHash) -> InvoiceFor,
    ) -> Result<DoorInvoice, DoorError> {
        let description_hash = Digest(sha2::Sha256::digest(b"satgrid front door").into());
        let request = InvoiceRequest { amount, description_hash, expiry_secs: INVOICE_EXPIRY_SECS };
        let made = self.wallet.create_invoice(request).await.map_err(internal)?;
        let expires_at = now().plus_ms(u64::from(INVOICE_EXPIRY_SECS) * 1_000);
        let (hash, asker) = (made.payment_hash, asker.to_owned());
        let new = NewInvoice { hash, asker, fills: fills(hash), amount, expires_at };
        let limits = InvoiceLimits {
            open: MAX_OPEN_INVOICES,
            open_of_one: MAX_OPEN_INVOICES_OF_ONE,
            balance: Msat(self.settings.max_balance_sat.saturating_mul(MSAT_PER_SAT)),
        };
        match self.keys.add_invoice(&new, limits, now()).await {
            Ok(()) => Ok(DoorInvoice { bolt11: made.bolt11, payment_hash: hash, amount, expires_at, secret: None }),
            Err(KeyError::TooManyInvoices) => Err(DoorError::TooManyInvoices),
            Err(error @ KeyError::OverBalance(_)) => {
                Err(DoorError::Invalid { param: "amount_sat", message: format!("Too much: {error}.") })
            }
            Err(error) => Err(internal(error)),
        }
    }

    /// An invoice that fills this key, if it is one that holds a balance.
    async fn fill(&self, asker: &str, key: &str, amount: Msat) -> Result<DoorInvoice, DoorError> {
        let id = key_id(key)?;
        let chain = self.keys.chain(id, now()).await.map_err(internal)?;
        let prepaid = chain.first().is_some_and(|key| key.kind == satgrid_ledger::keys::KeyKind::Prepaid);
        if !prepaid {
            let message = "This key holds no balance; its owner sets what it may spend.".to_owned();
            return Err(DoorError::Invalid { param: "authorization", message });
        }
        self.make(asker, amount, |_| InvoiceFor::Key(id)).await
    }

    /// Whole sats within the door's bounds.
    fn bounded(&self, amount: Msat) -> Msat {
        let sat = amount.0.div_ceil(MSAT_PER_SAT).clamp(self.settings.min_sat.max(1), self.settings.max_sat.max(1));
        Msat(sat.saturating_mul(MSAT_PER_SAT))
    }

    /// A price that one invoice covers. Less than it would be paid for nothing: the call reserves all of it.
    fn whole(&self, price: Msat) -> Result<Msat, DoorError> {
        let most = Msat(self.settings.max_sat.min(self.settings.max_balance_sat).saturating_mul(MSAT_PER_SAT));
        if price > most {
            return Err(DoorError::PriceTooHigh { price, most });
        }
        Ok(self.bounded(price))
    }

    fn within(&self, amount: Msat) -> Result<(), DoorError> {
        if self.bounded(amount) == amount {
            return Ok(());
        }
        let (least, most) = (self.settings.min_sat, self.settings.max_sat);
        let message = format!("`amount_sat` must be between {least} and {most}.");
        Err(DoorError::Invalid { param: "amount_sat", message })
    }
}

fn internal(error: impl std::fmt::Display) -> DoorError {
    DoorError::Internal { detail: error.to_string() }
}

fn key_id(key: &str) -> Result<KeyId, DoorError> {
    let other = |_| DoorError::Invalid { param: "authorization", message: "This key holds no balance.".to_owned() };
    key.parse().map_err(other)
}

fn shown(row: RefundRow) -> Refund {
    let RefundRow { id, amount, max_fee, state, fee, hash, reason, .. } = row;
    Refund { id, amount, max_fee, state, fee, payment_hash: hash, reason }
}

#[async_trait]
impl Door for DoorDesk {
    async fn invoice(&self, order: Order, asker: &str) -> Result<DoorInvoice, DoorError> {
        match order {
            Order::TopUp { key, amount } => {
                self.within(amount)?;
                self.fill(asker, &key, amount).await
            }
            Order::Missing { key, amount } => self.fill(asker, &key, self.bounded(amount)).await,
            Order::NewKey { amount } => {
                self.within(amount)?;
                let secret = crate::accounts::secret();
                let hash = sha2::Sha256::digest(secret.as_bytes()).into();
                let name = "front door".to_owned();
                let made = self.make(asker, amount, |_| InvoiceFor::NewKey { hash, name }).await?;
                Ok(DoorInvoice { secret: Some(secret), ..made })
            }
            Order::L402 { amount } => {
                let amount = self.whole(amount)?;
                // The key is found by the payment hash.
                let fills = |hash| InvoiceFor::NewKey { hash: l402::key_hash(hash), name: "L402".to_owned() };
                let made = self.make(asker, amount, fills).await?;
                Ok(DoorInvoice { secret: Some(self.mint.token(made.payment_hash)), ..made })
            }
        }
    }

    async fn credential(&self, token: &str, preimage: &str) -> Result<[u8; 32], DoorError> {
        let hash = self.mint.check(token, preimage).ok_or(DoorError::BadCredential)?;
        match self.keys.invoice(hash).await.map_err(internal)? {
            Some(row) if row.paid => Ok(l402::key_hash(hash)),
            Some(_) => Err(DoorError::NotPaidYet),
            None => Err(DoorError::BadCredential),
        }
    }

    async fn invoice_state(&self, hash: PaymentHash) -> Result<Option<InvoiceState>, DoorError> {
        let row = self.keys.invoice(hash).await.map_err(internal)?;
        Ok(row.map(|row| match (row.paid, row.expires_at <= now()) {
            (true, _) => InvoiceState::Paid,
            (false, true) => InvoiceState::Expired,
            (false, false) => InvoiceState::Open,
        }))
    }

    async fn refund(&self, key: &str, destination: &str, amount: Option<Msat>) -> Result<Refund, DoorError> {
        let id = key_id(key)?;
        let invalid = |message: String| DoorError::Invalid { param: "destination", message };
        let place: Destination = destination.parse().map_err(|why: &str| invalid(why.to_owned()))?;
        let chain = self.keys.chain(id, now()).await.map_err(internal)?;
        let balance = chain.first().map(satgrid_ledger::keys::KeyRecord::balance).unwrap_or_default();
        let asked = match &place {
            Destination::Bolt11(bolt11) => {
                let facts = invoice::read(bolt11).map_err(|error| invalid(error.to_string()))?;
                if facts.network != Some(self.network) {
                    return Err(invalid("The invoice is of another network.".to_owned()));
                }
                if facts.payee == self.wallet.node_id() {
                    return Err(invalid("The invoice is this node's own.".to_owned()));
                }
                let sum = facts.amount.ok_or_else(|| invalid("The invoice names no amount.".to_owned()))?;
                if amount.is_some_and(|amount| amount != sum) {
                    return Err(invalid("`amount_msat` is not the invoice's amount.".to_owned()));
                }
                sum
            }
            Destination::Address { .. } => amount.unwrap_or_else(|| most_refund(balance)),
        };
        if asked.is_zero() {
            return Err(DoorError::Balance { required: Msat(2 * MSAT_PER_SAT), available: balance });
        }
        let opened = self.keys.open_refund(id, (asked, max_fee(asked)), destination.trim(), now()).await;
        let row = opened.map_err(|error| match error {
            KeyError::Refused(KeyRefusal::Limit { required, available, .. }) => {
                DoorError::Balance { required, available }
            }
            KeyError::NoSuchKey(_) => {
                DoorError::Invalid { param: "authorization", message: "This key holds no balance.".to_owned() }
            }
            other @ (KeyError::Refused(_)
            | KeyError::BadKey(_)
            | KeyError::Full(_)
            | KeyError::TooManyInvoices
            | KeyError::OverBalance(_)
            | KeyError::PaidElsewhere
            | KeyError::NotOpen(_)
            | KeyError::Storage(_)) => internal(other),
        })?;
        self.asked.notify_one();
        Ok(shown(row))
    }

    async fn refunds(&self, key: &str) -> Result<Vec<Refund>, DoorError> {
        let rows = self.keys.refunds_of(key_id(key)?).await.map_err(internal)?;
        Ok(rows.into_iter().map(shown).collect())
    }

    fn price(&self, cost: Msat) -> Msat {
        satgrid_pricing::with_margin(cost, self.margin_permille)
    }

    fn proxies(&self) -> &[std::net::IpAddr] {
        &self.settings.trusted_proxies
    }
}

/// What a route may cost, held beside the refund.
fn max_fee(amount: Msat) -> Msat {
    Msat((amount.0 / 1_000 * FEE_PERMILLE).max(MSAT_PER_SAT))
}

/// The largest whole number of sats that a balance covers together with its fee limit.
fn most_refund(balance: Msat) -> Msat {
    let mut sum = balance.0.saturating_sub(MSAT_PER_SAT) / MSAT_PER_SAT * MSAT_PER_SAT;
    while sum > 0 && sum.saturating_add(max_fee(Msat(sum)).0) > balance.0 {
        sum = sum.saturating_sub(MSAT_PER_SAT.max(sum / 200 / MSAT_PER_SAT * MSAT_PER_SAT));
    }
    Msat(sum)
}

#[cfg(test)]
#[path = "tests.rs"]
mod desk;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refund_and_its_fee_fit_the_balance() {
        for balance in [0, 999, 1_000, 2_000, 2_999, 5_000, 100_000, 1_234_567, 1_000_000_000, 98_765_432_109] {
            let sum = most_refund(Msat(balance));
            assert!(sum.0 == 0 || sum.0 + max_fee(sum).0 <= balance, "{balance}: {sum}");
            assert!(balance < 2_000 || sum.0 > 0, "{balance}");
            assert!(balance < 100_000 || sum.0 * 100 > balance * 97, "{balance}: {sum} leaves too much");
        }
    }
}
