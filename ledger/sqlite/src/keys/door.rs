//! The front door's money: invoices that fill prepaid keys, and refunds out of them.
//!
//! | refund | awaits | a crash here means |
//! |---|---|---|
//! | waiting | its time | nothing was paid; it is tried when its time comes |
//! | attempted | the payment's end | the payment is resolved by its hash |
//! | settled, failed | nothing | what was held and not needed has returned to the key |

use super::{KeyError, KeyStore, rows::amount};
use crate::{begin::begin, reader::row_number};
use satgrid_ledger::keys::KeyId;
use satgrid_types::{Msat, PaymentHash, UnixMs};
use sqlx::{Row, SqliteConnection, sqlite::SqliteRow};

/// Invoices that expired unpaid are forgotten after this: a payment that came in at the last moment is told to a node that was
/// down for days, too.
const FORGET_AFTER_MS: u64 = 14 * 24 * 3_600 * 1_000;
/// Refunds that one look gives.
const MAX_ROWS: i64 = 256;

/// What an invoice is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InvoiceFor {
    Key(KeyId),
    /// A key that is made when it is paid.
    NewKey {
        hash: [u8; 32],
        name: String,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewInvoice {
    /// Who asks, for limits.
    pub asker: String,
    pub hash: PaymentHash,
    pub fills: InvoiceFor,
    pub amount: Msat,
    pub expires_at: UnixMs,
}

/// What may wait to be paid, and what a key may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InvoiceLimits {
    pub open: u32,
    pub open_of_one: u32,
    pub balance: Msat,
}

/// An invoice as it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvoiceRow {
    pub amount: Msat,
    pub expires_at: UnixMs,
    pub key: Option<KeyId>,
    pub paid: bool,
    pub received: Msat,
}

/// A refund as it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RefundRow {
    pub id: u64,
    pub key: KeyId,
    pub amount: Msat,
    pub max_fee: Msat,
    pub destination: String,
    pub state: String,
    pub tries: u32,
    pub hash: Option<PaymentHash>,
    pub bolt11: Option<String>,
    pub fee: Option<Msat>,
    pub reason: Option<String>,
}

const REFUND_COLUMNS: &str = "id, key, amount, max_fee, destination, state, tries, hash, bolt11, fee, reason";

fn hash_of(bytes: &[u8]) -> Option<PaymentHash> {
    bytes.try_into().ok().map(PaymentHash)
}

fn refund_of(row: &SqliteRow) -> RefundRow {
    RefundRow {
        id: amount(row.get(0)).0,
        key: KeyId(amount(row.get(1)).0),
        amount: amount(row.get(2)),
        max_fee: amount(row.get(3)),
        destination: row.get(4),
        state: row.get(5),
        tries: u32::try_from(row.get::<i64, _>(6)).unwrap_or(u32::MAX),
        hash: row.get::<Option<&[u8]>, _>(7).and_then(hash_of),
        bolt11: row.get(8),
        fee: row.get::<Option<i64>, _>(9).map(amount),
        reason: row.get(10),
    }
}

impl KeyStore {
    /// Writes an invoice down before it is shown.
    pub async fn add_invoice(&self, new: &NewInvoice, limits: InvoiceLimits, now: UnixMs) -> Result<(), KeyError> {
        let mut connection = self.connection.lock().await;
        let mut tx = begin(&mut connection).await?;
        sqlx::query("DELETE FROM door_invoices WHERE paid_at IS NULL AND expires_at < ?")
            .bind(row_number(now.0.saturating_sub(FORGET_AFTER_MS)))
            .execute(&mut *tx)
            .await?;
        let (open, of_one): (i64, i64) = sqlx::query_as(
            "SELECT count(*), count(*) FILTER (WHERE asker = ?) FROM door_invoices WHERE paid_at IS NULL AND \
             expires_at > ?",
        )
        .bind(&new.asker)
        .bind(row_number(now.0))
        .fetch_one(&mut *tx)
        .await?;
        if open >= i64::from(limits.open) || of_one >= i64::from(limits.open_of_one) {
            return Err(KeyError::TooManyInvoices);
        }
        let (key, key_hash, name) = match &new.fills {
            InvoiceFor::Key(key) => (Some(row_number(key.0)), None, ""),
            InvoiceFor::NewKey { hash, name } => (None, Some(hash.as_slice()), name.as_str()),
        };
        // What the key holds, and what its open invoices would add.
        let (holds,): (i64,) = sqlx::query_as(
            "SELECT coalesce((SELECT paid_in - paid_out - spent FROM api_keys WHERE id = ?1), 0) + \
             coalesce((SELECT sum(amount) FROM door_invoices WHERE key = ?1 AND paid_at IS NULL AND expires_at > ?2), 0)",
        )
        .bind(key)
        .bind(row_number(now.0))
        .fetch_one(&mut *tx)
        .await?;
        if amount(holds).saturating_add(new.amount) > limits.balance {
            return Err(KeyError::OverBalance(limits.balance));
        }
        sqlx::query(
            "INSERT INTO door_invoices (hash, key, key_hash, name, asker, amount, created_at, expires_at) VALUES \
             (?,?,?,?,?,?,?,?)",
        )
        .bind(new.hash.0.as_slice())
        .bind(key)
        .bind(key_hash)
        .bind(name)
        .bind(&new.asker)
        .bind(row_number(new.amount.0))
        .bind(row_number(now.0))
        .bind(row_number(new.expires_at.0))
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(())
    }

    pub async fn invoice(&self, hash: PaymentHash) -> Result<Option<InvoiceRow>, KeyError> {
        invoice(&mut *self.connection.lock().await, hash).await
    }

    /// A payment has arrived: fills its key, once. `None` where the hash is no invoice of the door's.
    pub async fn invoice_paid(
        &self,
        hash: PaymentHash,
        received: Msat,
        now: UnixMs,
    ) -> Result<Option<InvoiceRow>, KeyError> {
        let mut connection = self.connection.lock().await;
        let mut tx = begin(&mut connection).await?;
        let Some(row) = invoice(&mut tx, hash).await? else { return Ok(None) };
        if row.paid {
            return Ok(Some(row));
        }
        let key = match row.key {
            Some(key) => row_number(key.0),
            None => sqlx::query(
                "INSERT INTO api_keys (hash, name, kind, created_at) \
                 SELECT key_hash, name, 'prepaid', ? FROM door_invoices WHERE hash = ?",
            )
            .bind(row_number(now.0))
            .bind(hash.0.as_slice())
            .execute(&mut *tx)
            .await?
            .last_insert_rowid(),
        };
        sqlx::query("UPDATE api_keys SET paid_in = paid_in + ? WHERE id = ?")
            .bind(row_number(received.0))
            .bind(key)
            .execute(&mut *tx)
            .await?;
        sqlx::query("UPDATE door_invoices SET key = ?, paid_at = ?, received = ?, asker = NULL WHERE hash = ?")
            .bind(key)
            .bind(row_number(now.0))
            .bind(row_number(received.0))
            .bind(hash.0.as_slice())
            .execute(&mut *tx)
            .await?;
        let row = invoice(&mut tx, hash).await?;
        tx.commit().await?;
        Ok(row)
    }

    /// Holds amount and fee limit at the key, and writes the refund down.
    pub async fn open_refund(
        &self,
        key: KeyId,
        refund: (Msat, Msat),
        destination: &str,
        now: UnixMs,
    ) -> Result<RefundRow, KeyError> {
        let (sum, max_fee) = refund;
        let mut connection = self.connection.lock().await;
        let mut tx = begin(&mut connection).await?;
        let held = sum.saturating_add(max_fee);
        // The table's own constraint refuses what the balance does not cover; this says it in figures.
        let left = sqlx::query_as::<_, (i64,)>(
            "SELECT paid_in - paid_out - spent - reserved FROM api_keys WHERE id = ? AND kind = 'prepaid'",
        )
        .bind(row_number(key.0))
        .fetch_optional(&mut *tx)
        .await?;
        let available = left.map(|(left,)| amount(left)).ok_or(KeyError::NoSuchKey(key))?;
        if available < held {
            let limit = satgrid_ledger::keys::Limit::Balance;
            return Err(satgrid_ledger::keys::KeyRefusal::Limit { key, limit, required: held, available }.into());
        }
        sqlx::query("UPDATE api_keys SET paid_out = paid_out + ? WHERE id = ?")
            .bind(row_number(held.0))
            .bind(row_number(key.0))
            .execute(&mut *tx)
            .await?;
        let id = sqlx::query(
            "INSERT INTO door_refunds (key, amount, max_fee, destination, state, next_at, created_at) \
             VALUES (?,?,?,?,'waiting',?,?)",
        )
        .bind(row_number(key.0))
        .bind(row_number(sum.0))
        .bind(row_number(max_fee.0))
        .bind(destination)
        .bind(row_number(now.0))
        .bind(row_number(now.0))
        .execute(&mut *tx)
        .await?
        .last_insert_rowid();
        let row = sqlx::query(&format!("SELECT {REFUND_COLUMNS} FROM door_refunds WHERE id = ?"))
            .bind(id)
            .fetch_one(&mut *tx)
            .await?;
        let row = refund_of(&row);
        tx.commit().await?;
        Ok(row)
    }

    /// About to pay: before the wallet is asked. One invoice is paid by one refund, whatever its client asks.
    pub async fn refund_attempted(&self, id: u64, hash: PaymentHash, bolt11: &str) -> Result<RefundRow, KeyError> {
        let mut connection = self.connection.lock().await;
        let row = sqlx::query(&format!(
            "UPDATE door_refunds SET state = 'attempted', tries = tries + 1, hash = ?1, bolt11 = ?2 WHERE id = ?3 AND \
             state = 'waiting' AND NOT EXISTS (SELECT 1 FROM door_refunds WHERE hash = ?1 AND id <> ?3 AND \
             state IN ('attempted', 'settled')) RETURNING {REFUND_COLUMNS}"
        ))
        .bind(hash.0.as_slice())
        .bind(bolt11)
        .bind(row_number(id))
        .fetch_optional(&mut *connection)
        .await?;
        row.as_ref().map(refund_of).ok_or(KeyError::PaidElsewhere)
    }

    /// Paid: what the fee limit held too much returns to the key.
    pub async fn refund_settled(&self, hash: PaymentHash, fee: Msat) -> Result<Option<RefundRow>, KeyError> {
        self.end_refund(hash, |row| (Msat(row.max_fee.0.saturating_sub(fee.0)), "settled", Some(fee), None)).await
    }

    /// Failed for good: all of it returns to the key.
    pub async fn refund_failed(&self, hash: PaymentHash, reason: &str) -> Result<Option<RefundRow>, KeyError> {
        self.end_refund(hash, |row| (row.amount.saturating_add(row.max_fee), "failed", None, Some(reason.to_owned())))
            .await
    }

    async fn end_refund(
        &self,
        hash: PaymentHash,
        how: impl FnOnce(&RefundRow) -> (Msat, &'static str, Option<Msat>, Option<String>),
    ) -> Result<Option<RefundRow>, KeyError> {
        let mut connection = self.connection.lock().await;
        let mut tx = begin(&mut connection).await?;
        let found =
            sqlx::query(&format!("SELECT {REFUND_COLUMNS} FROM door_refunds WHERE hash = ? AND state = 'attempted'"))
                .bind(hash.0.as_slice())
                .fetch_optional(&mut *tx)
                .await?;
        let Some(row) = found.as_ref().map(refund_of) else { return Ok(None) };
        let (returned, state, fee, reason) = how(&row);
        sqlx::query("UPDATE api_keys SET paid_out = paid_out - ? WHERE id = ?")
            .bind(row_number(returned.0))
            .bind(row_number(row.key.0))
            .execute(&mut *tx)
            .await?;
        sqlx::query("UPDATE door_refunds SET state = ?, fee = ?, reason = ? WHERE id = ?")
            .bind(state)
            .bind(fee.map(|fee| row_number(fee.0)))
            .bind(reason)
            .bind(row_number(row.id))
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
        Ok(Some(row))
    }

    /// To be tried again then.
    pub async fn refund_waits(&self, id: u64, reason: &str, next_at: UnixMs) -> Result<(), KeyError> {
        let mut connection = self.connection.lock().await;
        sqlx::query(
            "UPDATE door_refunds SET state = 'waiting', tries = tries + (state = 'waiting'), reason = ?, next_at = ? \
             WHERE id = ? AND state IN ('waiting', 'attempted')",
        )
        .bind(reason)
        .bind(row_number(next_at.0))
        .bind(row_number(id))
        .execute(&mut *connection)
        .await?;
        Ok(())
    }

    /// A refund that was never attempted is given up: all of it returns to the key.
    pub async fn refund_given_up(&self, id: u64, reason: &str) -> Result<(), KeyError> {
        let mut connection = self.connection.lock().await;
        let mut tx = begin(&mut connection).await?;
        let done =
            sqlx::query("UPDATE door_refunds SET state = 'failed', reason = ? WHERE id = ? AND state = 'waiting'")
                .bind(reason)
                .bind(row_number(id))
                .execute(&mut *tx)
                .await?;
        if done.rows_affected() == 1 {
            sqlx::query(
                "UPDATE api_keys SET paid_out = paid_out - (SELECT amount + max_fee FROM door_refunds WHERE id = ?) \
                 WHERE id = (SELECT key FROM door_refunds WHERE id = ?)",
            )
            .bind(row_number(id))
            .bind(row_number(id))
            .execute(&mut *tx)
            .await?;
        }
        tx.commit().await?;
        Ok(())
    }

    /// Whether a refund has made this payment, or is making it.
    pub async fn has_refund(&self, hash: PaymentHash) -> Result<bool, KeyError> {
        let mut connection = self.connection.lock().await;
        let (found,): (bool,) = sqlx::query_as(
            "SELECT EXISTS (SELECT 1 FROM door_refunds WHERE hash = ? AND state IN ('attempted', 'settled'))",
        )
        .bind(hash.0.as_slice())
        .fetch_one(&mut *connection)
        .await?;
        Ok(found)
    }

    /// The refund whose payment this is, while it has no end.
    pub async fn refund_of_payment(&self, hash: PaymentHash) -> Result<Option<RefundRow>, KeyError> {
        let mut connection = self.connection.lock().await;
        let row =
            sqlx::query(&format!("SELECT {REFUND_COLUMNS} FROM door_refunds WHERE hash = ? AND state = 'attempted'"))
                .bind(hash.0.as_slice())
                .fetch_optional(&mut *connection)
                .await?;
        Ok(row.as_ref().map(refund_of))
    }

    /// Refunds whose time has come, those that wait longest first: many that fail again and again keep no other out.
    pub async fn refunds_due(&self, now: UnixMs) -> Result<Vec<RefundRow>, KeyError> {
        self.refunds("state = 'waiting' AND next_at <= ?", row_number(now.0), "next_at, id").await
    }

    /// Refunds whose payment has no end yet: those after this id, as many as are read at once.
    pub async fn refunds_attempted(&self, after: u64) -> Result<Vec<RefundRow>, KeyError> {
        self.refunds("state = 'attempted' AND id > ?", row_number(after), "id").await
    }

    pub async fn refunds_of(&self, key: KeyId) -> Result<Vec<RefundRow>, KeyError> {
        self.refunds("key = ?", row_number(key.0), "id").await
    }

    async fn refunds(&self, which: &str, value: i64, order: &str) -> Result<Vec<RefundRow>, KeyError> {
        let mut connection = self.connection.lock().await;
        let asked = format!("SELECT {REFUND_COLUMNS} FROM door_refunds WHERE {which} ORDER BY {order} LIMIT ?");
        let rows = sqlx::query(&asked).bind(value).bind(MAX_ROWS).fetch_all(&mut *connection).await?;
        Ok(rows.iter().map(refund_of).collect())
    }
}

async fn invoice(connection: &mut SqliteConnection, hash: PaymentHash) -> Result<Option<InvoiceRow>, KeyError> {
    let row = sqlx::query("SELECT amount, expires_at, key, paid_at, received FROM door_invoices WHERE hash = ?")
        .bind(hash.0.as_slice())
        .fetch_optional(connection)
        .await?;
    Ok(row.map(|row| InvoiceRow {
        amount: amount(row.get(0)),
        expires_at: UnixMs(amount(row.get(1)).0),
        key: row.get::<Option<i64>, _>(2).map(|id| KeyId(amount(id).0)),
        paid: row.get::<Option<i64>, _>(3).is_some(),
        received: amount(row.get::<Option<i64>, _>(4).unwrap_or(0)),
    }))
}
