//! What a lead measured of those whose layers it buys, beside the journal: the newest figure of each, and no part of what
//! anybody owes.

use crate::{begin::begin, figures::FigureStore, open, reader::row_number};
use satgrid_types::UnixMs;
use sqlx::{ConnectOptions, Connection, SqliteConnection};
use std::path::Path;

/// Paces that are kept; the oldest go first.
const MOST_PACES: i64 = 4_096;

/// A worker's time through some layers of a model, in microseconds a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StagePace {
    pub node: [u8; 32],
    /// Its layers: the first, and the one beyond the last.
    pub first: u32,
    pub beyond: u32,
    /// What it listed then, and what was measured.
    pub listed_us: u64,
    pub measured_us: u64,
    /// Measurements in a row in which these were far apart.
    pub lies: u32,
    pub at: UnixMs,
}

impl FigureStore {
    /// Keeps what was measured, in place of what was measured before.
    pub async fn keep_pace(&self, model: [u8; 32], pace: &StagePace) -> Result<(), sqlx::Error> {
        let mut connection = self.connection.lock().await;
        let mut tx = begin(&mut connection).await?;
        sqlx::query(
            "INSERT OR REPLACE INTO stage_paces (model, node, first, beyond, listed_us, measured_us, lies, at) \
             VALUES (?,?,?,?,?,?,?,?)",
        )
        .bind(&model[..])
        .bind(&pace.node[..])
        .bind(i64::from(pace.first))
        .bind(i64::from(pace.beyond))
        .bind(row_number(pace.listed_us))
        .bind(row_number(pace.measured_us))
        .bind(i64::from(pace.lies))
        .bind(row_number(pace.at.0))
        .execute(&mut *tx)
        .await?;
        sqlx::query(
            "DELETE FROM stage_paces WHERE at < (SELECT at FROM stage_paces ORDER BY at DESC LIMIT 1 OFFSET ?)",
        )
        .bind(MOST_PACES)
        .execute(&mut *tx)
        .await?;
        tx.commit().await
    }

    /// What is kept of a model's workers.
    pub async fn paces(&self, model: [u8; 32]) -> Result<Vec<StagePace>, sqlx::Error> {
        read(&mut *self.connection.lock().await, model).await
    }
}

/// What is kept of a model's workers, read beside a running node. Empty where the file has a schema without paces.
pub async fn read_paces(path: &Path, model: [u8; 32]) -> Result<Vec<StagePace>, sqlx::Error> {
    let mut connection = open::read_options(path).connect().await?;
    let (tables,): (i64,) = sqlx::query_as("SELECT count(*) FROM sqlite_master WHERE name = 'stage_paces'")
        .fetch_one(&mut connection)
        .await?;
    let found = if tables == 0 { Ok(Vec::new()) } else { read(&mut connection, model).await };
    let _ = connection.close().await;
    found
}

async fn read(connection: &mut SqliteConnection, model: [u8; 32]) -> Result<Vec<StagePace>, sqlx::Error> {
    type Row = (Vec<u8>, i64, i64, i64, i64, i64, i64);
    let rows: Vec<Row> = sqlx::query_as(
        "SELECT node, first, beyond, listed_us, measured_us, lies, at FROM stage_paces WHERE model = ? \
         ORDER BY node, first, beyond",
    )
    .bind(&model[..])
    .fetch_all(connection)
    .await?;
    let pace = |(node, first, beyond, listed, measured, lies, at): Row| {
        Some(StagePace {
            node: node.try_into().ok()?,
            first: u32::try_from(first).ok()?,
            beyond: u32::try_from(beyond).ok()?,
            listed_us: u64::try_from(listed).ok()?,
            measured_us: u64::try_from(measured).ok()?,
            lies: u32::try_from(lies).ok()?,
            at: UnixMs(u64::try_from(at).ok()?),
        })
    };
    Ok(rows.into_iter().filter_map(pace).collect())
}
