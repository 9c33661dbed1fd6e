//! The same suites that the SQLite journal passes, on a PostgreSQL that is started for the test as a plain process.
//!
//! Where no server binary can be found they say so, loudly, and test nothing; `SATGRID_REQUIRE_POSTGRES=1` makes that a
//! failure. Debian: `apt-get install postgresql`.

#![allow(clippy::unwrap_used)]

mod server;

use satgrid_ledger::{
    Entry, Journal, JournalError, JournalReader,
    journal::{Witness, copied::Copied},
    log::{FraudProof, SignedCheckpoint},
    testing::conformance::{CASES, READER_CASES, assert_chained, lets_go_of_bodies, numbered},
};
use satgrid_ledger_postgres::{OpenError, PostgresJournal, PostgresReader};
use satgrid_types::{Digest, UnixMs, node_key};
use server::{START, Server};
use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

/// The address of a new, empty database.
async fn database(server: &Server) -> String {
    use sqlx::{Connection, PgConnection};
    static MADE: AtomicU32 = AtomicU32::new(0);
    let name = format!("journal{}", MADE.fetch_add(1, Ordering::Relaxed));
    let started = Instant::now();
    let mut connection = loop {
        match PgConnection::connect(&server.url("postgres")).await {
            Ok(connection) => break connection,
            Err(error) => assert!(started.elapsed() < START, "the server does not come up: {error}"),
        }
        // A real process starts in real time.
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    sqlx::query(&format!("CREATE DATABASE {name}")).execute(&mut connection).await.unwrap();
    connection.close().await.unwrap();
    server.url(&name)
}

async fn all(reader: &PostgresReader) -> Vec<Entry> {
    let mut entries: Vec<Entry> = Vec::new();
    loop {
        let piece = reader.read(entries.len() as u64, 500).await.unwrap();
        if piece.is_empty() {
            return entries;
        }
        entries.extend(piece);
    }
}

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap().block_on(future)
}

/// One server for all: starting one takes a second.
#[test]
fn it_is_a_journal_like_any_other() {
    let Some(server) = Server::start() else { return };
    run(async {
        for (name, case) in CASES {
            let journal = PostgresJournal::open(&database(&server).await).await.unwrap();
            case(&journal).await;
            journal.close().await;
            println!("{name}");
        }
        for (name, case) in READER_CASES {
            let journal = PostgresJournal::open(&database(&server).await).await.unwrap();
            case(&journal, journal.reader()).await;
            journal.close().await;
            println!("{name}");
        }
        concurrent_appends(&database(&server).await).await;
        one_writer(&database(&server).await).await;
        lost_connection(&database(&server).await).await;
        checkpoints(&database(&server).await).await;
        schemas(&server).await;
        pruning(&database(&server).await).await;
        of_one_moment(&database(&server).await).await;
    });
}

async fn concurrent_appends(url: &str) {
    let journal = PostgresJournal::open(url).await.unwrap();
    let tasks: Vec<_> = (0..200u64)
        .map(|n| {
            let journal = journal.clone();
            tokio::spawn(async move {
                let entries = journal.append(UnixMs(n), vec![numbered(n * 2), numbered(n * 2 + 1)]).await.unwrap();
                assert_eq!(entries[1].seq, entries[0].seq + 1, "an append is not torn apart");
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let entries = all(journal.reader()).await;
    assert_eq!(entries.len(), 400);
    assert_chained(&entries);
    journal.close().await;
    // It goes on after a restart.
    let again = PostgresJournal::open(url).await.unwrap();
    assert_eq!(again.append(UnixMs(0), vec![numbered(7)]).await.unwrap()[0].seq, 400);
    again.close().await;
}

async fn one_writer(url: &str) {
    let journal = PostgresJournal::open(url).await.unwrap();
    let refused = PostgresJournal::open(url).await.unwrap_err();
    assert!(matches!(refused, OpenError::Locked { .. }), "{refused}");
    assert!(refused.to_string().contains("in use by another process"), "{refused}");
    PostgresReader::open(url).await.unwrap();
    journal.close().await;
    PostgresJournal::open(url).await.unwrap().close().await;
}

/// The server drops the writer's connection: its lock is free for another, so the first may write no more.
async fn lost_connection(url: &str) {
    use sqlx::{Connection, PgConnection};
    let journal = PostgresJournal::open(url).await.unwrap();
    journal.append(UnixMs(1), vec![numbered(1)]).await.unwrap();
    let mut operator = PgConnection::connect(url).await.unwrap();
    let kill = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted";
    sqlx::query(kill).execute(&mut operator).await.unwrap();
    assert!(journal.append(UnixMs(2), vec![numbered(2)]).await.is_err());
    assert!(matches!(journal.append(UnixMs(2), vec![numbered(2)]).await, Err(JournalError::Storage(_))));
    let other = PostgresJournal::open(url).await.unwrap();
    assert_eq!(other.head().await.unwrap().len, 1, "the last durable entry");
    assert_eq!(other.append(UnixMs(3), vec![numbered(3)]).await.unwrap()[0].seq, 1);
    assert!(journal.append(UnixMs(4), vec![numbered(4)]).await.is_err(), "for good");
    other.close().await;
    operator.close().await.unwrap();
}

async fn checkpoints(url: &str) {
    let key = satgrid_ledger::testing::World::example().provider.node;
    let journal = PostgresJournal::open(url).await.unwrap();
    journal.append(UnixMs(1), (0..600).map(numbered).collect()).await.unwrap();
    let signed = journal.checkpoint(&key).await.unwrap();
    assert_eq!(journal.reader().checkpoint(10_000).await.unwrap(), Some(signed.clone()));
    assert_eq!((signed.size, signed.root), (600, journal.reader().root(600).await.unwrap()));
    let note = |size, root| SignedCheckpoint::sign(size, Digest([root; 32]), &key);
    assert_eq!(journal.witness(&note(10, 1), UnixMs(1)).await.unwrap(), Witness::First);
    assert_eq!(journal.witness(&note(10, 1), UnixMs(1)).await.unwrap(), Witness::Known);
    let grown = Witness::Grown { from: Box::new(note(10, 1)) };
    assert_eq!(journal.witness(&note(20, 2), UnixMs(1)).await.unwrap(), grown);
    let Witness::Conflict { with } = journal.witness(&note(20, 3), UnixMs(1)).await.unwrap() else { panic!() };
    let proof = FraudProof { one: with.note().into(), other: note(20, 3).note().into() };
    assert_eq!(proof.check(), Ok(node_key(&key)));
    assert_eq!(journal.reader().witnessed(node_key(&key)).await.unwrap(), [note(20, 2), note(10, 1)]);
    journal.close().await;
}

async fn schemas(server: &Server) {
    use sqlx::{Connection, PgConnection};
    let url = database(server).await;
    let refused = PostgresReader::open(&url).await.unwrap_err();
    assert!(matches!(refused, OpenError::NotAJournal { .. }), "{refused}");
    PostgresJournal::open(&url).await.unwrap().close().await;
    let mut connection = PgConnection::connect(&url).await.unwrap();
    let insert = "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) VALUES (99991231235959, 'of tomorrow', true, '\\x00', 0)";
    sqlx::query(insert).execute(&mut connection).await.unwrap();
    connection.close().await.unwrap();
    for refused in [PostgresJournal::open(&url).await.err(), PostgresReader::open(&url).await.err()] {
        let refused = refused.unwrap();
        assert!(matches!(refused, OpenError::NewerSchema { .. }), "{refused}");
        assert!(refused.to_string().contains("comes from a newer program"), "{refused}");
    }
    for bad in ["mysql://x", "not an address"] {
        assert!(matches!(PostgresJournal::open(bad).await, Err(OpenError::Address(_))), "{bad}");
    }
    let secret = "postgres://u:hunter2@127.0.0.1:1/x";
    let error = PostgresJournal::open(secret).await.unwrap_err().to_string();
    assert!(!error.contains("hunter2") && error.contains("127.0.0.1"), "{error}");
}

async fn pruning(url: &str) {
    let journal = PostgresJournal::open(url).await.unwrap();
    let prune = async |bodies| journal.prune(bodies).await;
    let last = lets_go_of_bodies(&journal, journal.reader(), prune).await;
    // The journal goes on, also after a restart.
    journal.close().await;
    let journal = PostgresJournal::open(url).await.unwrap();
    assert_eq!(journal.append(UnixMs(0), vec![numbered(1)]).await.unwrap()[0].prev, last);
    journal.close().await;
}

/// Rows that are read while the writer goes on belong together.
async fn of_one_moment(url: &str) {
    let journal = PostgresJournal::open(url).await.unwrap();
    let writer = {
        let journal = journal.clone();
        tokio::spawn(async move {
            for n in 0..60 {
                journal.append(UnixMs(n), (0..50).map(numbered).collect()).await.unwrap();
            }
        })
    };
    let mut sizes = Vec::new();
    loop {
        let over = writer.is_finished();
        let mut snapshot = journal.reader().snapshot().await.unwrap();
        let (mut entries, mut leaves) = (0, 0);
        while let Some(piece) = snapshot.next().await.unwrap() {
            match piece {
                Copied::Entries(rows) => entries += rows.len(),
                Copied::Tiles(tiles) => {
                    leaves +=
                        tiles.iter().filter(|(id, _)| id.level == 0).map(|(_, bytes)| bytes.len() / 32).sum::<usize>();
                }
                Copied::Checkpoints(_) | Copied::Witnessed(_) | Copied::Names { .. } => {}
            }
        }
        assert_eq!((entries % 50, leaves), (0, entries), "an append is in it whole or not at all, and with its leaves");
        sizes.push(entries);
        if over {
            break;
        }
    }
    writer.await.unwrap();
    assert!(sizes.is_sorted() && sizes.last() == Some(&3_000), "{sizes:?}");
    journal.close().await;
}
