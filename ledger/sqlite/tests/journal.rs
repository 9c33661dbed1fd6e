//! The SQLite journal against the conformance suite, crashes, a second process and a full disk.

#![allow(clippy::unwrap_used)]

use satgrid_ledger::{
    Entry, Journal, JournalError, JournalReader,
    log::{SignedCheckpoint, verify_consistency, verify_inclusion},
    testing::{
        Party,
        conformance::{CASES, READER_CASES, assert_chained, numbered},
    },
};
use satgrid_ledger_sqlite::{OpenError, Options, SqliteJournal, SqliteReader};
use satgrid_types::UnixMs;
use std::{fs, path::Path};

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

async fn all(path: &Path) -> Vec<Entry> {
    let reader = SqliteReader::open(path).await.unwrap();
    let mut entries = Vec::new();
    loop {
        let piece = reader.read(entries.len() as u64, 500).await.unwrap();
        if piece.is_empty() {
            return entries;
        }
        entries.extend(piece);
    }
}

#[test]
fn it_conforms() {
    for (name, case) in CASES {
        let folder = tempfile::tempdir().unwrap();
        runtime().block_on(async {
            let journal = SqliteJournal::open(&folder.path().join("ledger.db")).await.unwrap();
            case(&journal).await;
            journal.close().await;
            println!("{name}");
        });
    }
}

#[test]
fn its_reader_conforms() {
    for (name, case) in READER_CASES {
        let folder = tempfile::tempdir().unwrap();
        runtime().block_on(async {
            let journal = SqliteJournal::open(&folder.path().join("ledger.db")).await.unwrap();
            case(&journal, journal.reader()).await;
            journal.close().await;
            println!("{name}");
        });
    }
}

#[test]
fn concurrent_appends_are_grouped_and_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.db");
    runtime().block_on(async {
        let journal = SqliteJournal::open(&path).await.unwrap();
        let tasks: Vec<_> = (0..200u64)
            .map(|n| {
                let journal = journal.clone();
                tokio::spawn(async move {
                    let drafts = vec![numbered(n * 2), numbered(n * 2 + 1)];
                    let entries = journal.append(UnixMs(n), drafts.clone()).await.unwrap();
                    assert_eq!(entries[0].draft(), drafts[0]);
                    assert_eq!(entries[1].seq, entries[0].seq + 1, "an append is not torn apart");
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        let entries = all(&path).await;
        assert_eq!(entries.len(), 400);
        assert_chained(&entries);
        journal.close().await;
    });
}

#[test]
fn what_was_acknowledged_survives_a_kill() {
    let folder = tempfile::tempdir().unwrap();
    let (path, copy) = (folder.path().join("ledger.db"), folder.path().join("copy.db"));
    runtime().block_on(async {
        let journal = SqliteJournal::open(&path).await.unwrap();
        journal.append(UnixMs(1), (0..700).map(numbered).collect()).await.unwrap();
        // What the disk holds at this moment is all that a killed process leaves: the files are copied, nothing is closed.
        fs::copy(&path, &copy).unwrap();
        fs::copy(folder.path().join("ledger.db-wal"), folder.path().join("copy.db-wal")).unwrap();
        let again = SqliteJournal::open(&copy).await.unwrap();
        assert_eq!(again.head().await, journal.head().await);
        again.append(UnixMs(2), vec![numbered(700)]).await.unwrap();
        let entries = all(&copy).await;
        assert_eq!(entries.len(), 701);
        assert_chained(&entries);
        again.close().await;
        journal.close().await;
    });
}

#[test]
fn a_torn_wal_recovers_to_a_durable_entry() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.db");
    runtime().block_on(async {
        let journal = SqliteJournal::open(&path).await.unwrap();
        for n in 0..40 {
            journal.append(UnixMs(n), vec![numbered(n)]).await.unwrap();
        }
        let database = fs::read(&path).unwrap();
        let wal = fs::read(folder.path().join("ledger.db-wal")).unwrap();
        let mut lengths = std::collections::BTreeSet::new();
        for cut in [wal.len() - 1, wal.len() - 100, wal.len() * 3 / 4, wal.len() / 2, wal.len() / 2 + 1777] {
            let torn = folder.path().join(format!("torn-{cut}.db"));
            fs::write(&torn, &database).unwrap();
            fs::write(folder.path().join(format!("torn-{cut}.db-wal")), &wal[..cut]).unwrap();
            let journal = SqliteJournal::open(&torn).await.unwrap();
            let entries = all(&torn).await;
            assert_chained(&entries);
            assert_eq!(journal.head().await.unwrap().len, entries.len() as u64);
            lengths.insert(entries.len());
            // It goes on from there.
            let next = journal.append(UnixMs(99), vec![numbered(99)]).await.unwrap();
            assert_eq!(next[0].seq, entries.len() as u64);
            journal.close().await;
        }
        assert!(lengths.len() > 2 && lengths.iter().all(|len| *len <= 40), "{lengths:?}");
        journal.close().await;
    });
}

#[test]
fn a_full_disk_is_told_apart_and_leaves_nothing_half_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.db");
    runtime().block_on(async {
        let journal = SqliteJournal::open_with(&path, Options { max_pages: Some(60) }).await.unwrap();
        let mut written = 0;
        let error = loop {
            match journal.append(UnixMs(1), (0..100).map(numbered).collect()).await {
                Ok(entries) => written += entries.len(),
                Err(error) => break error,
            }
            assert!(written < 100_000, "the limit never came");
        };
        assert_eq!(error, JournalError::Full);
        assert_eq!(journal.head().await.unwrap().len, written as u64);
        journal.close().await;
        let journal = SqliteJournal::open(&path).await.unwrap();
        journal.append(UnixMs(1), vec![numbered(0)]).await.unwrap();
        let entries = all(&path).await;
        assert_eq!(entries.len(), written + 1);
        assert_chained(&entries);
        journal.close().await;
    });
}

/// Not a test of its own: what the second process of the next one runs.
#[test]
#[ignore = "a helper process of a_second_process_is_refused"]
fn second_process() {
    let Some(path) = std::env::var_os("SATGRID_TEST_DB") else { return };
    runtime().block_on(async {
        match SqliteJournal::open(Path::new(&path)).await {
            Ok(_) => println!("opened"),
            Err(error) => println!("refused: {error}"),
        }
    });
}

#[test]
fn a_second_process_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.db");
    let second = || {
        let out = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "second_process", "--nocapture"])
            .env("SATGRID_TEST_DB", &path)
            .output()
            .unwrap();
        String::from_utf8(out.stdout).unwrap()
    };
    runtime().block_on(async {
        let journal = SqliteJournal::open(&path).await.unwrap();
        let said = second();
        let holder = format!("in use by another process (process {})", std::process::id());
        assert!(said.contains("refused") && said.contains(&holder), "{said}");
        assert!(matches!(SqliteJournal::open(&path).await, Err(OpenError::Locked { .. })));
        assert!(SqliteReader::open(&path).await.is_ok(), "reading goes on beside a writer");
        journal.close().await;
    });
    assert!(second().contains("opened"));
}

#[test]
fn other_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    runtime().block_on(async {
        let text = folder.path().join("text.db");
        fs::write(&text, "not a database, but long enough to be mistaken for one by its size".repeat(40)).unwrap();
        assert!(matches!(SqliteJournal::open(&text).await, Err(OpenError::NotAJournal { .. })));
        let missing = folder.path().join("missing.db");
        assert!(matches!(SqliteReader::open(&missing).await, Err(OpenError::Missing { .. })));
        let newer = folder.path().join("newer.db");
        SqliteJournal::open(&newer).await.unwrap().close().await;
        let mut raw = sqlx_connect(&newer).await;
        let row = "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) \
                   VALUES (99990101000000, 'from the future', 1, x'00', 0)";
        sqlx::query(row).execute(&mut raw).await.unwrap();
        sqlx::Connection::close(raw).await.unwrap();
        for error in [SqliteJournal::open(&newer).await.err(), SqliteReader::open(&newer).await.err()] {
            assert!(matches!(error, Some(OpenError::NewerSchema { found: 99_990_101_000_000, .. })), "{error:?}");
        }
    });
}

async fn sqlx_connect(path: &Path) -> sqlx::SqliteConnection {
    use sqlx::ConnectOptions;
    sqlx::sqlite::SqliteConnectOptions::new().filename(path).connect().await.unwrap()
}

#[test]
fn a_changed_entry_is_noticed_when_the_journal_is_opened() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.db");
    runtime().block_on(async {
        let journal = SqliteJournal::open(&path).await.unwrap();
        journal.append(UnixMs(1), vec![numbered(1), numbered(2)]).await.unwrap();
        journal.close().await;
        let other = Entry { at: UnixMs(2), ..all(&path).await[1].clone() };
        let mut raw = sqlx_connect(&path).await;
        sqlx::query("UPDATE entries SET bytes = ? WHERE seq = 1").bind(other.bytes()).execute(&mut raw).await.unwrap();
        sqlx::Connection::close(raw).await.unwrap();
        assert!(matches!(SqliteJournal::open(&path).await, Err(OpenError::Damaged { seq: 1, .. })));
    });
}

#[test]
fn proofs_and_checkpoints_come_from_the_stored_tiles() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.db");
    let party = Party::new("provider");
    runtime().block_on(async {
        let journal = SqliteJournal::open(&path).await.unwrap();
        let mut checkpoints: Vec<SignedCheckpoint> = Vec::new();
        for size in [1u64, 255, 256, 257, 600, 1_100] {
            let from = checkpoints.last().map_or(0, |last| last.size);
            journal.append(UnixMs(1), (from..size).map(numbered).collect()).await.unwrap();
            checkpoints.push(journal.checkpoint(&party.node).await.unwrap());
        }
        let entries = all(&path).await;
        let reader = journal.reader();
        for new in &checkpoints {
            assert_eq!(reader.root(new.size).await.unwrap(), new.root);
            for index in [0, new.size / 2, new.size - 1] {
                let proof = reader.prove_inclusion(index, new.size).await.unwrap();
                let leaf = entries[usize::try_from(index).unwrap()].leaf();
                assert!(verify_inclusion(&leaf, index, new.size, &proof, &new.root), "{index} of {}", new.size);
            }
            for old in checkpoints.iter().filter(|old| old.size <= new.size) {
                let proof = reader.prove_consistency(old.size, new.size).await.unwrap();
                assert!(verify_consistency(old.size, new.size, &old.root, &new.root, &proof));
            }
        }
        assert_eq!(reader.checkpoint(599).await.unwrap().as_ref(), Some(&checkpoints[3]));
        assert_eq!(reader.checkpoint(0).await.unwrap(), None);
        assert!(reader.prove_inclusion(2_000, 1_100).await.is_err());
        journal.close().await;
    });
}

/// The rate of durable appends; a figure, not a verdict. `cargo test -p satgrid-ledger-sqlite -- --ignored append_rate --nocapture`
#[test]
#[ignore = "a measurement"]
fn append_rate() {
    let folder = tempfile::tempdir_in(".").unwrap();
    let path = folder.path().join("ledger.db");
    runtime().block_on(async {
        let journal = SqliteJournal::open(&path).await.unwrap();
        let world = satgrid_ledger::testing::World::example();
        let receipt = world.provider.journal.entries().into_iter().find(|e| e.opening().is_some()).unwrap();
        for callers in [1u64, 16, 256] {
            let started = std::time::Instant::now();
            let per_caller = 4_000 / callers;
            let tasks: Vec<_> = (0..callers)
                .map(|_| {
                    let (journal, draft) = (journal.clone(), receipt.draft());
                    tokio::spawn(async move {
                        for _ in 0..per_caller {
                            journal.append(UnixMs(1), vec![draft.clone()]).await.unwrap();
                        }
                    })
                })
                .collect();
            for task in tasks {
                task.await.unwrap();
            }
            let rate = (callers * per_caller) as f64 / started.elapsed().as_secs_f64();
            println!("{callers} callers: {rate:.0} durable entries/s");
        }
        journal.close().await;
    });
}
