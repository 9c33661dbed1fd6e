//! Rows to records. SQLite's integers are signed; ours stay below 2^63.

use super::KeyError;
use satgrid_ledger::keys::{KeyId, KeyKind, KeyLimits, KeyRecord, KeyUsage};
use satgrid_types::{Msat, UnixMs};
use sqlx::{Row, sqlite::SqliteRow};

/// The columns that [`key_of`] reads. The first parameter of a query with them is today.
pub(super) const KEY_COLUMNS: &str = "id, name, kind, parent, created_at, revoked_at, expires_at, per_request, \
    per_day, total, requests_per_minute, models, spent, reserved, paid_in, paid_out, requests, \
    coalesce((SELECT d.spent FROM api_key_days d WHERE d.key = api_keys.id AND d.day = ?), 0)";

pub(super) fn amount(value: i64) -> Msat {
    // Constraints of the table keep amounts from below zero.
    Msat(u64::try_from(value).unwrap_or(0))
}

fn moment(value: i64) -> UnixMs {
    UnixMs(u64::try_from(value).unwrap_or(0))
}

pub(super) fn key_of(row: &SqliteRow) -> Result<KeyRecord, KeyError> {
    let optional = |at: usize| row.get::<Option<i64>, _>(at);
    let id = KeyId(amount(row.get(0)).0);
    let kind = row.get::<&str, _>(2);
    let models: &str = row.get(11);
    Ok(KeyRecord {
        id,
        name: row.get(1),
        kind: KeyKind::from_name(kind).ok_or_else(|| KeyError::Storage(format!("{id} is of no kind: {kind}")))?,
        parent: optional(3).map(|id| KeyId(amount(id).0)),
        created_at: moment(row.get(4)),
        revoked_at: optional(5).map(moment),
        limits: KeyLimits {
            expires_at: optional(6).map(moment),
            per_request: optional(7).map(amount),
            per_day: optional(8).map(amount),
            total: optional(9).map(amount),
            requests_per_minute: optional(10).and_then(|n| u32::try_from(n).ok()),
            models: models.split('\n').filter(|name| !name.is_empty()).map(str::to_owned).collect(),
        },
        usage: KeyUsage {
            spent: amount(row.get(12)),
            reserved: amount(row.get(13)),
            paid_in: amount(row.get(14)),
            paid_out: amount(row.get(15)),
            requests: amount(row.get(16)).0,
            spent_today: amount(row.get(17)),
        },
    })
}
