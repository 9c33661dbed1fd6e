//! What a lead counted and measured of a mixture of experts, beside the journal: which experts its router chose, how fast its
//! workers answered. Sums, bounded, and no part of what anybody owes.

use crate::{
    begin::begin,
    open::{self, OpenError},
    reader::row_number,
};
use satgrid_types::UnixMs;
use sqlx::{ConnectOptions, Connection, Row, SqliteConnection};
use std::{collections::BTreeMap, path::Path};
use tokio::sync::Mutex;

/// Rows of one model beyond which its sums are halved.
const MOST_ROWS: i64 = 20_000_000;
/// Measurements of nodes that are kept; the oldest go first.
const MOST_COSTS: i64 = 4_096;
/// (model, layer, expert) that are kept: no more models are counted beyond.
const MOST_PLACES: i64 = 1 << 20;

/// Rows by (layer, expert).
pub type ExpertRows = BTreeMap<(u32, u32), u64>;

/// What was measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cost {
    /// Calls to a worker on their way, by bytes.
    Link,
    /// A worker's own time, by rows.
    Work,
    /// The trunk's own time of a step, by rows.
    Trunk,
    /// A step's wait for experts, by rows.
    Wait,
}

impl Cost {
    const ALL: [Cost; 4] = [Cost::Link, Cost::Work, Cost::Trunk, Cost::Wait];

    fn name(self) -> &'static str {
        match self {
            Cost::Link => "link",
            Cost::Work => "work",
            Cost::Trunk => "trunk",
            Cost::Wait => "wait",
        }
    }
}

/// The sums of lines, by whose they are.
pub type Costs = BTreeMap<([u8; 32], Cost), [f64; 5]>;

/// The figures of every model that this node leads, its workers' paces ([`crate::StagePace`]) among them.
#[derive(Debug)]
pub struct FigureStore {
    pub(crate) connection: Mutex<SqliteConnection>,
}

impl FigureStore {
    /// Opens beside a journal that was opened, and so locked, before; or a file of its own.
    pub async fn open(path: &Path) -> Result<FigureStore, OpenError> {
        Ok(FigureStore { connection: Mutex::new(open::writer(path, None).await?) })
    }

    /// Adds rows to a model's sums.
    pub async fn add(&self, model: [u8; 32], rows: &ExpertRows) -> Result<(), sqlx::Error> {
        let mut connection = self.connection.lock().await;
        let mut tx = begin(&mut connection).await?;
        let (places,): (i64,) = sqlx::query_as("SELECT count(*) FROM expert_rows WHERE model <> ?")
            .bind(&model[..])
            .fetch_one(&mut *tx)
            .await?;
        if places.saturating_add(row_number(rows.len() as u64)) > MOST_PLACES {
            return Ok(());
        }
        for (&(layer, expert), &more) in rows {
            sqlx::query(
                "INSERT INTO expert_rows (model, layer, expert, rows) VALUES (?1, ?2, ?3, ?4) \
                 ON CONFLICT (model, layer, expert) DO UPDATE SET rows = rows + ?4",
            )
            .bind(&model[..])
            .bind(i64::from(layer))
            .bind(i64::from(expert))
            .bind(row_number(more).min(MOST_ROWS))
            .execute(&mut *tx)
            .await?;
        }
        sqlx::query(
            "UPDATE expert_rows SET rows = rows / 2 WHERE model = ?1 \
             AND (SELECT sum(rows) FROM expert_rows WHERE model = ?1) > ?2",
        )
        .bind(&model[..])
        .bind(MOST_ROWS)
        .execute(&mut *tx)
        .await?;
        tx.commit().await
    }

    /// Keeps what was measured, in place of what was measured before.
    pub async fn keep(&self, model: [u8; 32], costs: &Costs, at: UnixMs) -> Result<(), sqlx::Error> {
        let mut connection = self.connection.lock().await;
        let mut tx = begin(&mut connection).await?;
        for ((node, what), sums) in costs.iter().filter(|(_, sums)| sums.iter().all(|sum| sum.is_finite())) {
            let mut query = sqlx::query(
                "INSERT OR REPLACE INTO expert_costs (model, node, what, at, w, x, y, xx, xy) VALUES (?,?,?,?,?,?,?,?,?)",
            )
            .bind(&model[..])
            .bind(&node[..])
            .bind(what.name())
            .bind(row_number(at.0));
            for sum in sums {
                query = query.bind(*sum);
            }
            query.execute(&mut *tx).await?;
        }
        sqlx::query(
            "DELETE FROM expert_costs WHERE at < (SELECT at FROM expert_costs ORDER BY at DESC LIMIT 1 OFFSET ?)",
        )
        .bind(MOST_COSTS)
        .execute(&mut *tx)
        .await?;
        tx.commit().await
    }

    /// What is kept of a model.
    pub async fn of(&self, model: [u8; 32]) -> Result<(ExpertRows, Costs), sqlx::Error> {
        read(&mut *self.connection.lock().await, model).await
    }
}

/// What is kept of a model, read beside a running node. Empty where the file has a schema without figures.
pub async fn read_figures(path: &Path, model: [u8; 32]) -> Result<(ExpertRows, Costs), sqlx::Error> {
    let mut connection = open::read_options(path).connect().await?;
    let (tables,): (i64,) = sqlx::query_as("SELECT count(*) FROM sqlite_master WHERE name = 'expert_costs'")
        .fetch_one(&mut connection)
        .await?;
    if tables == 0 {
        return Ok(Default::default());
    }
    let found = read(&mut connection, model).await;
    let _ = connection.close().await;
    found
}

async fn read(connection: &mut SqliteConnection, model: [u8; 32]) -> Result<(ExpertRows, Costs), sqlx::Error> {
    let number = |n: i64| u32::try_from(n).unwrap_or(u32::MAX);
    let rows: Vec<(i64, i64, i64)> =
        sqlx::query_as("SELECT layer, expert, rows FROM expert_rows WHERE model = ? AND rows > 0")
            .bind(&model[..])
            .fetch_all(&mut *connection)
            .await?;
    let rows = rows
        .into_iter()
        .map(|(layer, expert, rows)| ((number(layer), number(expert)), u64::try_from(rows).unwrap_or(0)));
    let lines = sqlx::query("SELECT node, what, w, x, y, xx, xy FROM expert_costs WHERE model = ?")
        .bind(&model[..])
        .fetch_all(connection)
        .await?;
    let line = |row: &sqlx::sqlite::SqliteRow| {
        let node: [u8; 32] = row.get::<Vec<u8>, _>(0).try_into().ok()?;
        let name: String = row.get(1);
        let what = Cost::ALL.into_iter().find(|what| what.name() == name)?;
        Some(((node, what), [row.get(2), row.get(3), row.get(4), row.get(5), row.get(6)]))
    };
    Ok((rows.collect(), lines.iter().filter_map(line).collect()))
}
