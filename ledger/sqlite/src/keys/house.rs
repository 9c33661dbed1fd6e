//! What a node's house has paid to it: invoices of the node's own wallet, settled inside the process.

use super::{KeyError, KeyStore, rows::amount};
use crate::reader::row_number;
use satgrid_types::{Msat, PaymentHash, Preimage, UnixMs};
use sqlx::{Row, sqlite::SqliteRow};

/// A payment of the house: from this row on it is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HousePayment {
    pub hash: PaymentHash,
    pub amount: Msat,
    pub preimage: Preimage,
}

fn payment_of(row: &SqliteRow) -> Option<HousePayment> {
    let hash = PaymentHash(row.get::<&[u8], _>(0).try_into().ok()?);
    let preimage = Preimage(row.get::<&[u8], _>(2).try_into().ok()?);
    Some(HousePayment { hash, amount: amount(row.get(1)), preimage })
}

impl KeyStore {
    /// Writes a payment down; the same again changes nothing.
    pub async fn add_house_payment(&self, paid: &HousePayment, now: UnixMs) -> Result<(), KeyError> {
        let mut connection = self.connection.lock().await;
        sqlx::query("INSERT OR IGNORE INTO door_house (hash, amount, preimage, at) VALUES (?, ?, ?, ?)")
            .bind(paid.hash.0.as_slice())
            .bind(row_number(paid.amount.0))
            .bind(paid.preimage.0.as_slice())
            .bind(row_number(now.0))
            .execute(&mut *connection)
            .await?;
        Ok(())
    }

    pub async fn house_payment(&self, hash: PaymentHash) -> Result<Option<HousePayment>, KeyError> {
        let mut connection = self.connection.lock().await;
        let row = sqlx::query("SELECT hash, amount, preimage FROM door_house WHERE hash = ?")
            .bind(hash.0.as_slice())
            .fetch_optional(&mut *connection)
            .await?;
        Ok(row.as_ref().and_then(payment_of))
    }

    /// The latest payments, oldest first.
    pub async fn house_payments(&self, most: u32) -> Result<Vec<HousePayment>, KeyError> {
        let mut connection = self.connection.lock().await;
        let rows = sqlx::query("SELECT hash, amount, preimage FROM door_house ORDER BY id DESC LIMIT ?")
            .bind(i64::from(most))
            .fetch_all(&mut *connection)
            .await?;
        Ok(rows.iter().rev().filter_map(payment_of).collect())
    }
}
