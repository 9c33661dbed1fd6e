//! The same suites that the SQLite journal passes, on a PostgreSQL that is started for the test as a plain process.
//!
//! Where no server binary can be found they say so, loudly, and test nothing; `SATGRID_REQUIRE_POSTGRES=1` makes that a
//! failure. Debian: `apt-get install postgresql`.

#![allow(clippy::unwrap_used)]

use rustix::process::{Pid, Signal, geteuid, kill_process};
use satgrid_ledger::{
    Entry, Journal, JournalError, JournalReader,
    journal::Witness,
    log::{FraudProof, SignedCheckpoint},
    testing::conformance::{CASES, READER_CASES, assert_chained, numbered},
};
use satgrid_ledger_postgres::{OpenError, PostgresJournal, PostgresReader};
use satgrid_types::{Digest, UnixMs, node_key};
use std::{
    fs,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

/// PostgreSQL refuses to run as root; then it runs as nobody.
const NOBODY: u32 = 65_534;
const START: Duration = Duration::from_secs(60);

/// A server of its own folder and socket, gone with this value.
struct Server {
    folder: tempfile::TempDir,
    process: Child,
    databases: AtomicU32,
}

/// The folder with `initdb` and `postgres`.
fn binaries() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    if let Ok(versions) = fs::read_dir("/usr/lib/postgresql") {
        folders.extend(versions.filter_map(|version| Some(version.ok()?.path().join("bin"))));
    }
    folders.into_iter().find(|folder| folder.join("initdb").exists() && folder.join("postgres").exists())
}

fn command(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.env("LC_ALL", "C").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    if geteuid().is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    command
}

impl Server {
    /// Starts one; `None`, with a loud line, where this machine has none.
    fn start() -> Option<Server> {
        let Some(bin) = binaries() else {
            let line = "SKIPPED: no PostgreSQL server on this machine (apt-get install postgresql): nothing was tested";
            assert!(std::env::var_os("SATGRID_REQUIRE_POSTGRES").is_none(), "{line}");
            eprintln!("{line}");
            return None;
        };
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o700)).unwrap();
        if geteuid().is_root() {
            std::os::unix::fs::chown(folder.path(), Some(NOBODY), Some(NOBODY)).unwrap();
        }
        let data = folder.path().join("data");
        let made = command(&bin.join("initdb"))
            .args(["-U", "satgrid", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync", "-D"])
            .arg(&data)
            .current_dir(folder.path())
            .status()
            .unwrap();
        assert!(made.success(), "initdb: {made}");
        // Durability is the server's business and not under test: without fsync the suite is quick.
        let process = command(&bin.join("postgres"))
            .arg("-D")
            .arg(&data)
            .arg("-k")
            .arg(folder.path())
            .args(["-c", "listen_addresses=", "-c", "fsync=off", "-c", "max_connections=50"])
            .current_dir(folder.path())
            .spawn()
            .unwrap();
        Some(Server { folder, process, databases: AtomicU32::new(0) })
    }

    fn url(&self, database: &str) -> String {
        format!("postgres://satgrid@localhost/{database}?host={}", self.folder.path().display())
    }

    /// The address of a new, empty database.
    async fn database(&self) -> String {
        use sqlx::{Connection, PgConnection};
        let name = format!("journal{}", self.databases.fetch_add(1, Ordering::Relaxed));
        let started = Instant::now();
        let mut connection = loop {
            match PgConnection::connect(&self.url("postgres")).await {
                Ok(connection) => break connection,
                Err(error) => assert!(started.elapsed() < START, "the server does not come up: {error}"),
            }
            // A real process starts in real time.
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        sqlx::query(&format!("CREATE DATABASE {name}")).execute(&mut connection).await.unwrap();
        connection.close().await.unwrap();
        self.url(&name)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // SIGINT is a fast, clean stop; killing it would leave its children to find out.
        if let Some(pid) = Pid::from_raw(i32::try_from(self.process.id()).unwrap_or(0)) {
            let _ = kill_process(pid, Signal::INT);
        }
        for _ in 0..200 {
            if matches!(self.process.try_wait(), Ok(Some(_))) {
                return;
            }
            thread::sleep(Duration::from_millis(25));
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
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
            let journal = PostgresJournal::open(&server.database().await).await.unwrap();
            case(&journal).await;
            journal.close().await;
            println!("{name}");
        }
        for (name, case) in READER_CASES {
            let journal = PostgresJournal::open(&server.database().await).await.unwrap();
            case(&journal, journal.reader()).await;
            journal.close().await;
            println!("{name}");
        }
        concurrent_appends(&server.database().await).await;
        one_writer(&server.database().await).await;
        lost_connection(&server.database().await).await;
        checkpoints(&server.database().await).await;
        schemas(&server).await;
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
    let url = server.database().await;
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
