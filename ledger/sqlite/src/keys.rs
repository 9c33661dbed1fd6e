//! Keys, budgets and calls on SQLite: every change is one transaction that proves its limits inside.
//!
//! The rules are `satgrid_ledger::keys`; here they meet rows. One connection does all the writing, in the same file as
//! the journal: whoever copies the ledger copies the budgets with it. What each call writes goes in groups (`groups`).

mod calls;
mod door;
mod groups;
mod house;
mod rows;

use crate::{
    begin::begin,
    open::{self, OpenError},
    reader::row_number,
};
use rows::{KEY_COLUMNS, amount, key_of};
use satgrid_ledger::keys::{KeyId, KeyRecord, KeyRefusal, MAX_DEPTH, MAX_KEYS, NewKey, NewKeyError, day_of};
use satgrid_types::{Msat, RequestId, UnixMs};
use sqlx::{ConnectOptions, Row, SqliteConnection};
use std::{path::Path, sync::Arc};
use thiserror::Error;
use tokio::sync::{Mutex, mpsc};

pub use calls::{CallEnd, CallRow, CallState, NewCall, OpenCall};
pub use door::{InvoiceFor, InvoiceLimits, InvoiceRow, NewInvoice, RefundRow};
pub use house::HousePayment;

/// Rows that one listing gives.
const MAX_LISTED: i64 = 10_000;

/// Why a change of a key or of a call was not made.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum KeyError {
    #[error(transparent)]
    Refused(#[from] KeyRefusal),
    #[error(transparent)]
    BadKey(#[from] NewKeyError),
    #[error("there is no {0}")]
    NoSuchKey(KeyId),
    #[error("{0} keys are kept already; no more are made")]
    Full(u64),
    #[error("so many invoices wait to be paid")]
    TooManyInvoices,
    #[error("the key would hold more than {0}")]
    OverBalance(Msat),
    /// A client asks for a refund to an invoice that another of its refunds pays.
    #[error("this invoice is or was paid by another refund")]
    PaidElsewhere,
    /// A bug of ours: a call that is over, or was never opened.
    #[error("the call {} is not open", .0.short())]
    NotOpen(RequestId),
    #[error("the budgets cannot be written: {0}")]
    Storage(String),
}

impl From<sqlx::Error> for KeyError {
    fn from(error: sqlx::Error) -> KeyError {
        KeyError::Storage(error.to_string())
    }
}

/// Names one call: an API request, and which of its calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct CallRef {
    pub id: RequestId,
    pub part: u32,
}

/// The store. Clones share its connections.
#[derive(Debug, Clone)]
pub struct KeyStore {
    connection: Arc<Mutex<SqliteConnection>>,
    /// Sees what is committed, and waits for no commit.
    reading: Arc<Mutex<SqliteConnection>>,
    /// What calls write, in groups.
    asks: mpsc::Sender<groups::Ask>,
}

impl KeyStore {
    /// Opens beside a journal that [`crate::SqliteJournal`] has opened, and so locked, before; or a file of its own.
    pub async fn open(path: &Path) -> Result<KeyStore, OpenError> {
        let sqlite = |source| OpenError::Sqlite { path: path.to_owned(), source };
        let mut connection = open::writer(path, None).await?;
        sqlx::query("PRAGMA foreign_keys = ON").execute(&mut connection).await.map_err(sqlite)?;
        let connection = Arc::new(Mutex::new(connection));
        let reading = Arc::new(Mutex::new(open::read_options(path).connect().await.map_err(sqlite)?));
        let asks = groups::start(connection.clone(), open::turn(path));
        Ok(KeyStore { connection, reading, asks })
    }

    /// Makes a key whose secret hashes to `hash`.
    pub async fn create(&self, new: &NewKey, hash: [u8; 32], now: UnixMs) -> Result<KeyRecord, KeyError> {
        let mut connection = self.connection.lock().await;
        let mut tx = begin(&mut connection).await?;
        let above = match new.parent {
            Some(parent) => {
                let chain = chain(&mut tx, parent, now).await?;
                if chain.is_empty() {
                    return Err(KeyError::NoSuchKey(parent));
                }
                chain
            }
            None => Vec::new(),
        };
        new.check(now, &above)?;
        let (count,): (i64,) = sqlx::query_as("SELECT count(*) FROM api_keys").fetch_one(&mut *tx).await?;
        if count >= row_number(MAX_KEYS) {
            return Err(KeyError::Full(MAX_KEYS));
        }
        let limits = &new.limits;
        let done = sqlx::query(
            "INSERT INTO api_keys (hash, name, kind, parent, created_at, expires_at, per_request, per_day, total, \
             requests_per_minute, models) VALUES (?,?,?,?,?,?,?,?,?,?,?)",
        )
        .bind(hash.as_slice())
        .bind(new.name.trim())
        .bind(new.kind.name())
        .bind(new.parent.map(|id| row_number(id.0)))
        .bind(row_number(now.0))
        .bind(limits.expires_at.map(|at| row_number(at.0)))
        .bind(limits.per_request.map(|limit| row_number(limit.0)))
        .bind(limits.per_day.map(|limit| row_number(limit.0)))
        .bind(limits.total.map(|limit| row_number(limit.0)))
        .bind(limits.requests_per_minute.map(i64::from))
        .bind(limits.models.join("\n"))
        .execute(&mut *tx)
        .await?;
        let id = KeyId(amount(done.last_insert_rowid()).0);
        let record = one(&mut tx, id, now).await?.ok_or(KeyError::NoSuchKey(id))?;
        tx.commit().await?;
        Ok(record)
    }

    /// The key whose secret hashes to this, and those above it, nearest first. Empty where there is none. Of what they spent
    /// and reserved, the last calls may be missing.
    pub async fn find(&self, hash: [u8; 32], now: UnixMs) -> Result<Vec<KeyRecord>, KeyError> {
        let mut connection = self.reading.lock().await;
        let found: Option<(i64,)> = sqlx::query_as("SELECT id FROM api_keys WHERE hash = ?")
            .bind(hash.as_slice())
            .fetch_optional(&mut *connection)
            .await?;
        match found {
            Some((id,)) => chain(&mut connection, KeyId(amount(id).0), now).await,
            None => Ok(Vec::new()),
        }
    }

    /// A key and those above it, nearest first, with every call that ended before. Empty where there is none.
    pub async fn chain(&self, id: KeyId, now: UnixMs) -> Result<Vec<KeyRecord>, KeyError> {
        self.flush().await?;
        self.glance(id, now).await
    }

    /// As [`KeyStore::chain`], without waiting for the disk: of what the keys spent and reserved, the last calls may be missing.
    pub async fn glance(&self, id: KeyId, now: UnixMs) -> Result<Vec<KeyRecord>, KeyError> {
        chain(&mut *self.reading.lock().await, id, now).await
    }

    /// Every key, or every key directly below one, oldest first.
    pub async fn list(&self, below: Option<KeyId>, now: UnixMs) -> Result<Vec<KeyRecord>, KeyError> {
        self.flush().await?;
        let mut connection = self.reading.lock().await;
        let which = if below.is_some() { "parent = ?" } else { "? IS NULL" };
        let rows = sqlx::query(&format!("SELECT {KEY_COLUMNS} FROM api_keys WHERE {which} ORDER BY id LIMIT ?"))
            .bind(row_number(day_of(now)))
            .bind(below.map(|id| row_number(id.0)))
            .bind(MAX_LISTED)
            .fetch_all(&mut *connection)
            .await?;
        rows.iter().map(key_of).collect()
    }

    /// Ends a key and with it every key below. What is open goes on to its end.
    pub async fn revoke(&self, id: KeyId, now: UnixMs) -> Result<KeyRecord, KeyError> {
        let mut connection = self.connection.lock().await;
        sqlx::query("UPDATE api_keys SET revoked_at = coalesce(revoked_at, ?) WHERE id = ?")
            .bind(row_number(now.0))
            .bind(row_number(id.0))
            .execute(&mut *connection)
            .await?;
        one(&mut connection, id, now).await?.ok_or(KeyError::NoSuchKey(id))
    }

    /// Every key whose figures are not the sums of its calls: empty unless the database was changed by hand.
    pub async fn faults(&self) -> Result<Vec<KeyId>, KeyError> {
        self.flush().await?;
        let mut connection = self.reading.lock().await;
        let rows = sqlx::query(
            "WITH RECURSIVE under (top, id) AS (SELECT id, id FROM api_keys UNION \
             SELECT under.top, k.id FROM api_keys k JOIN under ON k.parent = under.id) \
             SELECT k.id FROM api_keys k LEFT JOIN (SELECT under.top AS top, \
               sum(CASE c.state WHEN 'open' THEN c.reserved ELSE 0 END) AS reserved, sum(c.charged) AS spent \
               FROM under JOIN api_calls c ON c.key = under.id GROUP BY under.top) s ON s.top = k.id \
             WHERE k.reserved <> coalesce(s.reserved, 0) OR k.spent <> coalesce(s.spent, 0) \
               OR k.spent <> coalesce((SELECT sum(spent) FROM api_key_days d WHERE d.key = k.id), 0)",
        )
        .fetch_all(&mut *connection)
        .await?;
        Ok(rows.iter().map(|row| KeyId(amount(row.get(0)).0)).collect())
    }
}

async fn one(connection: &mut SqliteConnection, id: KeyId, now: UnixMs) -> Result<Option<KeyRecord>, KeyError> {
    let row = sqlx::query(&format!("SELECT {KEY_COLUMNS} FROM api_keys WHERE id = ?"))
        .bind(row_number(day_of(now)))
        .bind(row_number(id.0))
        .fetch_optional(connection)
        .await?;
    row.as_ref().map(key_of).transpose()
}

/// A key and those above it; bounded by the depth that creation allows.
async fn chain(connection: &mut SqliteConnection, id: KeyId, now: UnixMs) -> Result<Vec<KeyRecord>, KeyError> {
    let mut found = Vec::new();
    let mut next = Some(id);
    while let Some(id) = next.take()
        && found.len() < MAX_DEPTH
    {
        let Some(record) = one(connection, id, now).await? else { break };
        next = record.parent;
        found.push(record);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use satgrid_ledger::keys::{KeyKind, KeyLimits};

    #[tokio::test]
    async fn a_disk_that_was_full_and_has_room_again_is_written_to() {
        let folder = tempfile::tempdir().unwrap();
        let keys = KeyStore::open(&folder.path().join("keys.sqlite")).await.unwrap();
        let now = UnixMs(1_700_000_000_000);
        let limit = |pages: u32| {
            let keys = keys.clone();
            let pragma = format!("PRAGMA max_page_count = {pages}");
            async move { sqlx::query(&pragma).execute(&mut *keys.connection.lock().await).await.unwrap() }
        };
        let call = |n: u64| {
            let mut id = [0; 32];
            id[..8].copy_from_slice(&n.to_be_bytes());
            let (model, one) = ("m".repeat(4_000), Msat(1));
            NewCall { id: RequestId(id), key: None, caller: None, model, needed: one, wanted: one }
        };
        // As many pages as there are: the next that is wanted is not had.
        limit(1).await;
        let mut n = 0;
        let full = loop {
            if let Err(error) = keys.open_call(&call(n), now).await {
                break error;
            }
            n += 1;
            assert!(n < 10_000, "the limit never came");
        };
        assert!(matches!(full, KeyError::Storage(_)), "{full}");
        limit(1 << 30).await;
        keys.open_call(&call(n), now).await.unwrap();
        let new = NewKey { name: "n".into(), kind: KeyKind::Infer, parent: None, limits: KeyLimits::default() };
        keys.create(&new, [1; 32], now).await.unwrap();
    }
}
