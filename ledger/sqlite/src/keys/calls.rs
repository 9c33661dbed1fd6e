//! Calls: opened with a reservation, ended once with what they cost.

use super::{CallRef, KeyError, KeyStore, chain, groups::Ask, rows::amount};
use crate::reader::row_number;
use satgrid_ledger::keys::{KeyId, KeyRecord, admit, day_of};
use satgrid_types::{Msat, RequestId, UnixMs};
use sqlx::{Row, SqliteConnection};

/// Calls of one API request.
const MAX_PARTS: u32 = 128;

/// A call that is about to begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewCall {
    pub id: RequestId,
    pub key: Option<KeyId>,
    /// Who asked, as the operator knows it, where that is no stored key.
    pub caller: Option<String>,
    pub model: String,
    /// The least that is of use.
    pub needed: Msat,
    /// The most that it could cost.
    pub wanted: Msat,
}

/// How a call ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CallEnd {
    pub state: CallState,
    /// What providers were paid.
    pub cost: Msat,
    /// What counts against the key: `cost`, or what its owner is asked for.
    pub charged: Msat,
    /// JSON; holds no text of the caller's.
    pub detail: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallState {
    Open,
    Done,
    Failed,
}

impl CallState {
    pub const fn name(self) -> &'static str {
        match self {
            CallState::Open => "open",
            CallState::Done => "done",
            CallState::Failed => "failed",
        }
    }
}

/// A call as it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CallRow {
    pub call: CallRef,
    pub key: Option<KeyId>,
    pub caller: Option<String>,
    pub model: String,
    pub at: UnixMs,
    pub ended_at: Option<UnixMs>,
    pub state: CallState,
    pub reserved: Msat,
    pub cost: Msat,
    pub charged: Msat,
    pub detail: Option<String>,
}

/// A call that a crash left open, and the requests to providers that it was made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenCall {
    pub call: CallRef,
    pub key: Option<KeyId>,
    pub reserved: Msat,
    pub requests: Vec<RequestId>,
}

impl KeyStore {
    /// Reserves at the call's key and at all above it, and writes the call down; gives what was reserved. Without a key
    /// nothing limits it.
    pub async fn open_call(&self, new: &NewCall, now: UnixMs) -> Result<(CallRef, Msat), KeyError> {
        let new = Box::new(new.clone());
        self.asked(|answer| Ask::Open { new, now, answer }).await
    }

    /// Writes down which request to a provider a call now is. Before any of its tokens is passed on.
    pub async fn leg(&self, call: CallRef, request: RequestId) -> Result<(), KeyError> {
        self.asked(|answer| Ask::Leg { call, request, answer }).await
    }

    /// Ends an open call: posts what it is charged and returns the rest of its reservation. Never posts more than was
    /// reserved at a key: that is what the reservation promised.
    pub async fn end_call(&self, call: CallRef, end: &CallEnd, now: UnixMs) -> Result<Msat, KeyError> {
        let end = Box::new(end.clone());
        self.asked(|answer| Ask::End { call, end, now, answer: Some(answer) }).await
    }

    /// As [`KeyStore::end_call`], and returns before that is on the disk: the next call at the key is opened after it, whoever
    /// asks what was spent waits for it, and after a crash the call is settled for what the journal says.
    pub async fn ending_call(&self, call: CallRef, end: &CallEnd, now: UnixMs) -> Result<(), KeyError> {
        self.tell(Ask::End { call, end: Box::new(end.clone()), now, answer: None }).await
    }

    /// Writes a call without a key down once it is over. Returns before that is on the disk: nothing is owed by it, and the
    /// journal has its receipts. Whoever reads calls waits for it.
    pub async fn ended_call(&self, new: &NewCall, at: UnixMs, end: &CallEnd, now: UnixMs) -> Result<(), KeyError> {
        let ended = Ask::Ended { new: Box::new(new.clone()), at, end: Box::new(end.clone()), now };
        self.tell(ended).await
    }

    /// Calls that nobody ended: after a crash, before anything else is done.
    pub async fn open_calls(&self) -> Result<Vec<OpenCall>, KeyError> {
        let mut connection = self.connection.lock().await;
        let rows = sqlx::query(
            "SELECT c.id, c.part, l.request, c.key, c.reserved FROM api_calls c LEFT JOIN api_call_legs l ON l.id = c.id AND \
             l.part = c.part WHERE c.state = 'open' ORDER BY c.id, c.part",
        )
        .fetch_all(&mut *connection)
        .await?;
        let mut open: Vec<OpenCall> = Vec::new();
        for row in &rows {
            let (Some(id), Ok(part)) = (request_id(row.get(0)), u32::try_from(row.get::<i64, _>(1))) else { continue };
            let call = CallRef { id, part };
            if open.last().is_none_or(|last| last.call != call) {
                let key = row.get::<Option<i64>, _>(3).map(|id| KeyId(amount(id).0));
                open.push(OpenCall { call, key, reserved: amount(row.get(4)), requests: Vec::new() });
            }
            let request = row.get::<Option<&[u8]>, _>(2).and_then(request_id);
            if let (Some(last), Some(request)) = (open.last_mut(), request) {
                last.requests.push(request);
            }
        }
        Ok(open)
    }

    /// The calls of one API request, in order.
    pub async fn calls(&self, id: RequestId) -> Result<Vec<CallRow>, KeyError> {
        self.flush().await?;
        let mut connection = self.connection.lock().await;
        let rows = sqlx::query(
            "SELECT part, key, caller, model, at, ended_at, state, reserved, cost, charged, detail FROM api_calls \
             WHERE id = ? ORDER BY part",
        )
        .bind(id.0.as_slice())
        .fetch_all(&mut *connection)
        .await?;
        let moment = |value: i64| UnixMs(amount(value).0);
        let call_row = |row: &sqlx::sqlite::SqliteRow| CallRow {
            call: CallRef { id, part: u32::try_from(row.get::<i64, _>(0)).unwrap_or(0) },
            key: row.get::<Option<i64>, _>(1).map(|id| KeyId(amount(id).0)),
            caller: row.get(2),
            model: row.get(3),
            at: moment(row.get(4)),
            ended_at: row.get::<Option<i64>, _>(5).map(moment),
            state: match row.get::<&str, _>(6) {
                "done" => CallState::Done,
                "failed" => CallState::Failed,
                _ => CallState::Open,
            },
            reserved: amount(row.get(7)),
            cost: amount(row.get(8)),
            charged: amount(row.get(9)),
            detail: row.get(10),
        };
        Ok(rows.iter().map(call_row).collect())
    }
}

pub(super) async fn open(tx: &mut SqliteConnection, new: &NewCall, now: UnixMs) -> Result<(CallRef, Msat), KeyError> {
    let (above, granted) = match new.key {
        Some(key) => {
            let chain = chain(tx, key, now).await?;
            if chain.is_empty() {
                return Err(KeyError::NoSuchKey(key));
            }
            let granted = admit(&chain, now, &new.model, new.needed, new.wanted)?;
            (chain, granted)
        }
        None => (Vec::new(), new.wanted),
    };
    let call = CallRef { id: new.id, part: next_part(tx, new.id).await? };
    sqlx::query(
        "INSERT INTO api_calls (id, part, key, caller, model, at, day, reserved, state) VALUES (?,?,?,?,?,?,?,?,'open')",
    )
    .bind(call.id.0.as_slice())
    .bind(i64::from(call.part))
    .bind(new.key.map(|id| row_number(id.0)))
    .bind(&new.caller)
    .bind(&new.model)
    .bind(row_number(now.0))
    .bind(row_number(day_of(now)))
    .bind(row_number(granted.0))
    .execute(&mut *tx)
    .await?;
    for key in &above {
        sqlx::query("UPDATE api_keys SET reserved = reserved + ?, requests = requests + 1 WHERE id = ?")
            .bind(row_number(granted.0))
            .bind(row_number(key.id.0))
            .execute(&mut *tx)
            .await?;
    }
    Ok((call, granted))
}

pub(super) async fn leg(tx: &mut SqliteConnection, call: CallRef, request: RequestId) -> Result<(), KeyError> {
    sqlx::query("INSERT OR IGNORE INTO api_call_legs (request, id, part) VALUES (?, ?, ?)")
        .bind(request.0.as_slice())
        .bind(call.id.0.as_slice())
        .bind(i64::from(call.part))
        .execute(tx)
        .await?;
    Ok(())
}

pub(super) async fn end(
    tx: &mut SqliteConnection,
    call: CallRef,
    end: &CallEnd,
    now: UnixMs,
) -> Result<Msat, KeyError> {
    let row = sqlx::query("SELECT key, reserved, day FROM api_calls WHERE id = ? AND part = ? AND state = 'open'")
        .bind(call.id.0.as_slice())
        .bind(i64::from(call.part))
        .fetch_optional(&mut *tx)
        .await?
        .ok_or(KeyError::NotOpen(call.id))?;
    let key: Option<i64> = row.get(0);
    let (reserved, day): (i64, i64) = (row.get(1), row.get(2));
    let charged = match key {
        Some(_) => end.charged.min(amount(reserved)),
        None => end.charged,
    };
    sqlx::query(
        "UPDATE api_calls SET state = ?, ended_at = ?, cost = ?, charged = ?, detail = ? WHERE id = ? AND part = ?",
    )
    .bind(end.state.name())
    .bind(row_number(now.0))
    .bind(row_number(end.cost.0))
    .bind(row_number(charged.0))
    .bind(&end.detail)
    .bind(call.id.0.as_slice())
    .bind(i64::from(call.part))
    .execute(&mut *tx)
    .await?;
    if let Some(key) = key {
        for key in chain(tx, KeyId(amount(key).0), now).await? {
            post(tx, &key, reserved, charged, day).await?;
        }
    }
    Ok(charged)
}

/// A call without a key, over before it is written down.
pub(super) async fn ended(
    tx: &mut SqliteConnection,
    new: &NewCall,
    at: UnixMs,
    end: &CallEnd,
    now: UnixMs,
) -> Result<(), KeyError> {
    let done = sqlx::query(
        "INSERT INTO api_calls (id, part, caller, model, at, day, reserved, state, ended_at, cost, charged, detail) \
         SELECT ?1, count(*), ?2, ?3, ?4, ?5, 0, ?6, ?7, ?8, ?9, ?10 FROM api_calls WHERE id = ?1 HAVING count(*) < ?11",
    )
    .bind(new.id.0.as_slice())
    .bind(&new.caller)
    .bind(&new.model)
    .bind(row_number(at.0))
    .bind(row_number(day_of(at)))
    .bind(end.state.name())
    .bind(row_number(now.0))
    .bind(row_number(end.cost.0))
    .bind(row_number(end.charged.0))
    .bind(&end.detail)
    .bind(i64::from(MAX_PARTS))
    .execute(tx)
    .await?;
    if done.rows_affected() == 0 { Err(KeyError::NotOpen(new.id)) } else { Ok(()) }
}

async fn next_part(tx: &mut SqliteConnection, id: RequestId) -> Result<u32, KeyError> {
    let (part,): (i64,) =
        sqlx::query_as("SELECT count(*) FROM api_calls WHERE id = ?").bind(id.0.as_slice()).fetch_one(tx).await?;
    u32::try_from(part).ok().filter(|part| *part < MAX_PARTS).ok_or(KeyError::NotOpen(id))
}

fn request_id(bytes: &[u8]) -> Option<RequestId> {
    bytes.try_into().ok().map(RequestId)
}

async fn post(
    connection: &mut SqliteConnection,
    key: &KeyRecord,
    reserved: i64,
    charged: Msat,
    day: i64,
) -> Result<(), KeyError> {
    sqlx::query("UPDATE api_keys SET reserved = reserved - ?, spent = spent + ? WHERE id = ?")
        .bind(reserved)
        .bind(row_number(charged.0))
        .bind(row_number(key.id.0))
        .execute(&mut *connection)
        .await?;
    sqlx::query(
        "INSERT INTO api_key_days (key, day, spent) VALUES (?, ?, ?) \
         ON CONFLICT (key, day) DO UPDATE SET spent = spent + excluded.spent",
    )
    .bind(row_number(key.id.0))
    .bind(day)
    .bind(row_number(charged.0))
    .execute(connection)
    .await?;
    Ok(())
}
