//! Checkpoints that others signed: what a node compares.

use crate::reader::{row_number, storage};
use satgrid_ledger::{
    journal::{JournalError, Witness, stored::KEPT_PER_NODE},
    log::SignedCheckpoint,
};
use satgrid_types::UnixMs;
use sqlx::PgConnection;

pub(crate) async fn witness(
    connection: &mut PgConnection,
    heard: &SignedCheckpoint,
    at: UnixMs,
) -> Result<Witness, JournalError> {
    let node = heard.node.0;
    let below: Option<(String,)> =
        sqlx::query_as("SELECT note FROM witnessed WHERE node = $1 AND size <= $2 ORDER BY size DESC LIMIT 1")
            .bind(&node[..])
            .bind(row_number(heard.size))
            .fetch_optional(&mut *connection)
            .await
            .map_err(|e| storage(&e))?;
    let below = below.map(|(note,)| {
        SignedCheckpoint::parse(&note).map_err(|e| JournalError::Damaged { seq: 0, what: e.to_string() })
    });
    let shows = Witness::of(heard, below.transpose()?);
    if !shows.is_new() {
        return Ok(shows);
    }
    sqlx::query("INSERT INTO witnessed (node, size, note, heard_at) VALUES ($1, $2, $3, $4)")
        .bind(&node[..])
        .bind(row_number(heard.size))
        .bind(heard.note())
        .bind(row_number(at.0))
        .execute(&mut *connection)
        .await
        .map_err(|e| storage(&e))?;
    sqlx::query(
        "DELETE FROM witnessed WHERE node = $1 AND size NOT IN (SELECT size FROM witnessed WHERE node = $1 ORDER BY size DESC LIMIT $2)",
    )
    .bind(&node[..])
    .bind(KEPT_PER_NODE)
    .execute(connection)
    .await
    .map_err(|e| storage(&e))?;
    Ok(shows)
}
