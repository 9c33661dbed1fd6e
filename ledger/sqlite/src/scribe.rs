//! The thread on which the journal's writing connection lives: SQLite itself, one trip for a group.
//!
//! Rows come in pieces while the writer still makes those after them, and stand in one open transaction until the last piece
//! comes with the end of the group: then it commits, and only then says so. What fails is rolled back whole. The thread keeps
//! the lock of the database until the connection is closed.

use crate::{
    keep,
    lock::Lock,
    open,
    reader::{entry_at, row_number, writing_failed},
};
use rusqlite::{Connection, OptionalExtension};
use satgrid_ledger::{
    entry::Entry,
    journal::{
        JournalError,
        stored::{Row, Written},
    },
    log::TileId,
};
use std::{io, path::Path, sync::mpsc, thread};
use tokio::sync::oneshot;

/// A group of which nothing was written.
#[derive(Debug)]
pub(crate) struct Unwritten {
    pub(crate) error: JournalError,
    /// Why its transaction could not even be left.
    pub(crate) stuck: Option<JournalError>,
}

/// How a group ended. What was written goes back to the thread that made it, and is freed there: freed here, while the next is
/// made there, the two would wait for each other at the allocator's lock, for longer than SQLite takes.
struct Done {
    named: Result<u64, Unwritten>,
    _spent: (Vec<Vec<Row>>, Written),
}

type Errand = Box<dyn FnOnce(&mut Connection) + Send>;

enum Job {
    /// More rows of the group at hand; the first begin its transaction.
    Rows(Vec<Row>),
    /// The last of them, and what is beside the entries. `named`: entries that the index of names has.
    Commit { written: Written, named: u64, answer: oneshot::Sender<Done> },
    /// Anything else, between two groups.
    Errand(Errand),
}

/// The way to the thread. Dropped, it waits until the thread has ended and the lock is gone.
#[derive(Debug)]
pub(crate) struct Scribe {
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Scribe {
    /// Begins on a database that was migrated before.
    pub(crate) fn start(path: &Path, max_pages: Option<u32>, lock: Lock) -> io::Result<Scribe> {
        let (jobs, inbox) = mpsc::channel();
        let path = path.to_owned();
        let work = move || match open::journal(&path, max_pages) {
            Ok(connection) => Desk { connection, spent: Vec::new(), failed: None }.work(&inbox, lock),
            // Every job is answered by silence, which reads as closed.
            Err(error) => tracing::error!(%error, "the ledger's writing connection"),
        };
        let thread = thread::Builder::new().name("ledger".to_owned()).spawn(work)?;
        Ok(Scribe { jobs: Some(jobs), thread: Some(thread) })
    }

    /// Rows that come before others of the same group.
    pub(crate) fn rows(&self, rows: Vec<Row>) {
        // Where nobody listens, the commit fails.
        let _ = self.send(Job::Rows(rows));
    }

    /// Ends the group, and says how many entries the index of names has once it is durable.
    pub(crate) async fn commit(&self, written: Written, named: u64) -> Result<u64, Unwritten> {
        let (answer, answered) = oneshot::channel();
        let closed = |error: JournalError| Unwritten { stuck: Some(error.clone()), error };
        self.send(Job::Commit { written, named, answer }).map_err(closed)?;
        match answered.await {
            Ok(done) => done.named,
            Err(_) => Err(closed(JournalError::Closed)),
        }
    }

    /// Runs an errand on the connection.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        errand: impl FnOnce(&mut Connection) -> Result<T, JournalError> + Send + 'static,
    ) -> Result<T, JournalError> {
        let (answer, answered) = oneshot::channel();
        self.send(Job::Errand(Box::new(move |connection| drop(answer.send(errand(connection))))))?;
        answered.await.unwrap_or(Err(JournalError::Closed))
    }

    fn send(&self, job: Job) -> Result<(), JournalError> {
        let sent = self.jobs.as_ref().map(|jobs| jobs.send(job).is_ok());
        if sent == Some(true) { Ok(()) } else { Err(JournalError::Closed) }
    }
}

impl Drop for Scribe {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the ledger's thread ended in a panic");
        }
    }
}

/// What the thread has before it.
struct Desk {
    connection: Connection,
    /// Rows of the group at hand that are written.
    spent: Vec<Vec<Row>>,
    /// Why the group at hand failed; the rest of it is let pass.
    failed: Option<Unwritten>,
}

impl Desk {
    fn work(mut self, inbox: &mpsc::Receiver<Job>, lock: Lock) {
        for job in inbox {
            match job {
                Job::Rows(rows) => {
                    if self.failed.is_none()
                        && let Err(error) = self.insert(&rows)
                    {
                        self.failed = Some(self.abandon(&error));
                    }
                    self.spent.push(rows);
                }
                Job::Commit { written, named, answer } => {
                    let named = match self.failed.take() {
                        Some(failed) => Err(failed),
                        None => self.finish(&written, named).map_err(|error| self.abandon(&error)),
                    };
                    let _spent = (core::mem::take(&mut self.spent), written);
                    // A writer that is gone needs no answer.
                    let _ = answer.send(Done { named, _spent });
                }
                Job::Errand(errand) => errand(&mut self.connection),
            }
        }
        // Everything is durable already; closing only tidies the WAL.
        if let Err((_, error)) = self.connection.close() {
            tracing::warn!(%error, "closing the journal");
        }
        // The lock outlives the last write.
        drop(lock);
    }

    fn insert(&self, rows: &[Row]) -> Result<(), rusqlite::Error> {
        if self.connection.is_autocommit() {
            self.connection.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
        }
        let mut insert =
            self.connection.prepare_cached("INSERT INTO entries (seq, at, bytes, opening) VALUES (?, ?, ?, ?)")?;
        for row in rows {
            insert.execute((row_number(row.seq), row_number(row.at.0), &row.bytes, &row.opening))?;
        }
        Ok(())
    }

    fn finish(&self, written: &Written, named: u64) -> Result<u64, rusqlite::Error> {
        self.insert(&written.rows)?;
        let mut tile =
            self.connection.prepare_cached("INSERT OR REPLACE INTO tiles (level, idx, hashes) VALUES (?, ?, ?)")?;
        for (id, hashes) in &written.tiles {
            tile.execute((id.level, row_number(id.index), hashes))?;
        }
        let index = written.index(named);
        if let Some((names, len)) = index {
            keep::take_names(&self.connection, names, len)?;
        }
        self.connection.prepare_cached("COMMIT")?.execute([])?;
        Ok(index.map_or(named, |(_, len)| len))
    }

    /// Leaves a transaction that failed. SQLite leaves some by itself.
    fn abandon(&self, error: &rusqlite::Error) -> Unwritten {
        let left = if self.connection.is_autocommit() { Ok(()) } else { self.connection.execute_batch("ROLLBACK") };
        Unwritten { error: writing_failed(error), stuck: left.err().map(|e| writing_failed(&e)) }
    }
}

/// Where the journal ends.
pub(crate) fn last_entry(connection: &mut Connection) -> Result<Option<Entry>, JournalError> {
    let sql = "SELECT seq, bytes, opening FROM entries ORDER BY seq DESC LIMIT 1";
    let entry = connection.query_row(sql, [], |row| Ok(entry_at(row))).optional();
    entry.map_err(|e| writing_failed(&e))?.transpose()
}

/// These tiles as they are stored; empty where there is none.
pub(crate) fn tiles(connection: &mut Connection, ids: &[TileId]) -> Result<Vec<Vec<u8>>, JournalError> {
    let failed = |e: rusqlite::Error| writing_failed(&e);
    let sql = "SELECT hashes FROM tiles WHERE level = ? AND idx = ?";
    let mut tile = connection.prepare_cached(sql).map_err(failed)?;
    let mut tiles = Vec::with_capacity(ids.len());
    for id in ids {
        let hashes = tile.query_row((id.level, row_number(id.index)), |row| row.get(0)).optional().map_err(failed)?;
        tiles.push(hashes.unwrap_or_default());
    }
    Ok(tiles)
}
