//! Begins a transaction, also on a connection that has lost its last one.
//!
//! On a full disk SQLite leaves a transaction by itself. The rollback that follows then finds none and fails, and the driver goes
//! on to count one as open: every later begin would be refused, though the disk had room again.

use sqlx::{
    Connection, Sqlite, SqliteConnection, Transaction, TransactionManager, sqlite::SqliteTransactionManager as Manager,
};

/// One that may write, from its beginning. The connection is nobody else's meanwhile, so what is counted as open is not.
pub(crate) async fn begin(connection: &mut SqliteConnection) -> Result<Transaction<'_, Sqlite>, sqlx::Error> {
    if Manager::get_transaction_depth(connection) > 0 {
        // One that was dropped is rolled back by the connection's own thread, soon: it is, once that thread has answered.
        connection.ping().await?;
    }
    if Manager::get_transaction_depth(connection) > 0 {
        // A rollback that has something to roll back.
        let _ = sqlx::query("BEGIN").execute(&mut *connection).await;
        Manager::rollback(connection).await?;
    }
    connection.begin_with("BEGIN IMMEDIATE").await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_that_was_dropped_is_no_lost_one() {
        let mut connection = SqliteConnection::connect("sqlite::memory:").await.unwrap();
        sqlx::query("CREATE TABLE t (n)").execute(&mut connection).await.unwrap();
        // Its rollback is under way while the next begins.
        for n in 0..500 {
            let mut tx = begin(&mut connection).await.unwrap();
            sqlx::query("INSERT INTO t VALUES (?)").bind(n).execute(&mut *tx).await.unwrap();
        }
        let mut tx = begin(&mut connection).await.unwrap();
        let left: (i64,) = sqlx::query_as("SELECT count(*) FROM t").fetch_one(&mut *tx).await.unwrap();
        assert_eq!(left.0, 0);
    }
}
