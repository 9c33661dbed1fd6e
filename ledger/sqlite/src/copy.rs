//! A copy of a journal that stands on another database, row by row into a file of its own: to be read, shown and proven from.
//! It has no entry of its own, and decodes none.

use crate::{
    open::{self, OpenError},
    reader::{row_number, storage},
};
use satgrid_ledger::journal::{
    JournalError,
    copied::{Copied, CopiedEntry, CopiedNote},
};
use sqlx::{Connection, SqliteConnection};
use std::{
    fs::{self, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

/// A file that is being written. Dropped before [`SqliteCopy::finish`], it is removed again.
#[derive(Debug)]
pub struct SqliteCopy {
    connection: Option<SqliteConnection>,
    file: Unfinished,
}

/// Half a journal would read as a whole one.
#[derive(Debug)]
struct Unfinished(Option<PathBuf>);

impl Drop for Unfinished {
    fn drop(&mut self) {
        let Some(path) = self.0.take() else { return };
        for end in ["", "-wal", "-shm"] {
            let mut name = path.clone().into_os_string();
            name.push(end);
            let _ = fs::remove_file(name);
        }
    }
}

impl SqliteCopy {
    /// A new file; one that is there is left alone.
    pub async fn create(path: &Path) -> Result<SqliteCopy, OpenError> {
        let io = |source: io::Error| OpenError::Io { path: path.to_owned(), source };
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(io)?;
        let file = Unfinished(Some(path.to_owned()));
        let connection = open::writer(path, None).await?;
        Ok(SqliteCopy { connection: Some(connection), file })
    }

    /// Takes rows in; each is given once.
    pub async fn take(&mut self, rows: Copied) -> Result<(), JournalError> {
        let connection = self.connection.as_mut().ok_or(JournalError::Closed)?;
        let taken = async {
            let mut transaction = connection.begin().await?;
            insert(&mut transaction, rows).await?;
            transaction.commit().await
        };
        taken.await.map_err(|e| storage(&e))
    }

    /// The copy is whole: one file, on the disk.
    pub async fn finish(mut self) -> Result<(), JournalError> {
        let mut connection = self.connection.take().ok_or(JournalError::Closed)?;
        sqlx::query("PRAGMA journal_mode = DELETE").execute(&mut connection).await.map_err(|e| storage(&e))?;
        connection.close().await.map_err(|e| storage(&e))?;
        let path = self.file.0.take().ok_or(JournalError::Closed)?;
        let synced = fs::File::open(path).and_then(|file| file.sync_all());
        synced.map_err(|error| JournalError::Storage(error.to_string()))
    }
}

async fn insert(connection: &mut SqliteConnection, rows: Copied) -> Result<(), sqlx::Error> {
    match rows {
        Copied::Entries(entries) => {
            for CopiedEntry { seq, at, bytes, opening, leaf } in entries {
                sqlx::query("INSERT INTO entries (seq, at, bytes, opening, leaf) VALUES (?, ?, ?, ?, ?)")
                    .bind(row_number(seq))
                    .bind(row_number(at))
                    .bind(bytes)
                    .bind(opening)
                    .bind(leaf)
                    .execute(&mut *connection)
                    .await?;
            }
        }
        Copied::Tiles(tiles) => {
            for (id, hashes) in tiles {
                sqlx::query("INSERT INTO tiles (level, idx, hashes) VALUES (?, ?, ?)")
                    .bind(i64::from(id.level))
                    .bind(row_number(id.index))
                    .bind(hashes)
                    .execute(&mut *connection)
                    .await?;
            }
        }
        Copied::Checkpoints(notes) => {
            for (size, note) in notes {
                sqlx::query("INSERT INTO checkpoints (size, note) VALUES (?, ?)")
                    .bind(row_number(size))
                    .bind(note)
                    .execute(&mut *connection)
                    .await?;
            }
        }
        Copied::Witnessed(notes) => {
            for CopiedNote { node, size, note, heard_at } in notes {
                sqlx::query("INSERT INTO witnessed (node, size, note, heard_at) VALUES (?, ?, ?, ?)")
                    .bind(node)
                    .bind(row_number(size))
                    .bind(note)
                    .bind(row_number(heard_at))
                    .execute(&mut *connection)
                    .await?;
            }
        }
        Copied::Names { names, upto } => {
            for name in names {
                sqlx::query("INSERT INTO named (hash) VALUES (?)")
                    .bind(name.0.to_vec())
                    .execute(&mut *connection)
                    .await?;
            }
            sqlx::query("UPDATE named_upto SET len = ? WHERE one = 1")
                .bind(row_number(upto))
                .execute(connection)
                .await?;
        }
    }
    Ok(())
}
