//! Journals as released versions left them: kept files under `fixtures/`, one for each schema, opened by this program.
//!
//! A release that changes the schema keeps its fixture first:
//! `SATGRID_FIXTURE=tests/fixtures/schema-N.db cargo test -p satgrid-ledger-sqlite --test migrations keep -- --ignored`

#![allow(clippy::unwrap_used)]

use satgrid_ledger::{
    Entry, Journal,
    journal::{JournalReader, MAX_READ},
    testing::World,
};
use satgrid_ledger_sqlite::{OpenError, SqliteJournal, SqliteReader};
use sqlx::{Connection, SqliteConnection, sqlite::SqliteConnectOptions};
use std::{
    fs,
    path::{Path, PathBuf},
};

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap().block_on(future)
}

#[test]
#[ignore = "writes a fixture of the schema as it is now"]
fn keep() {
    let target = PathBuf::from(std::env::var_os("SATGRID_FIXTURE").expect("SATGRID_FIXTURE names the file to write"));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.db");
    run(async {
        let (world, journal) = (World::example(), SqliteJournal::open(&path).await.unwrap());
        for entry in world.provider.journal.entries() {
            journal.append(entry.at, vec![entry.draft()]).await.unwrap();
        }
        journal.checkpoint(&world.provider.node).await.unwrap();
        journal.close().await;
        let mut connection = connect(&path).await;
        sqlx::query("VACUUM INTO ?").bind(target.to_str().unwrap()).execute(&mut connection).await.unwrap();
        connection.close().await.unwrap();
    });
}

async fn connect(path: &Path) -> SqliteConnection {
    SqliteConnection::connect_with(&SqliteConnectOptions::new().filename(path)).await.unwrap()
}

async fn schema(path: &Path) -> i64 {
    let mut connection = connect(path).await;
    let (version,): (i64,) =
        sqlx::query_as("SELECT max(version) FROM _sqlx_migrations").fetch_one(&mut connection).await.unwrap();
    connection.close().await.unwrap();
    version
}

fn fixtures() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let mut found: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|file| file.unwrap().path()).collect();
    found.retain(|path| path.extension().is_some_and(|extension| extension == "db"));
    found.sort();
    assert!(!found.is_empty());
    found
}

async fn entries(journal: &SqliteReader) -> Vec<Entry> {
    journal.read(0, MAX_READ).await.unwrap()
}

/// Copies of `name` beside it, made before a migration.
fn copies(folder: &Path, name: &str) -> Vec<PathBuf> {
    let files = fs::read_dir(folder).unwrap().map(|file| file.unwrap().path());
    files.filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with(&format!("{name}.before-"))).collect()
}

#[test]
fn every_released_schema_is_migrated_and_kept() {
    let expected = World::example().provider.journal.entries();
    for fixture in fixtures() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ledger.db");
        fs::copy(&fixture, &path).unwrap();
        run(async {
            let before = schema(&path).await;
            let journal = SqliteJournal::open(&path).await.unwrap();
            let reader = journal.reader().clone();
            assert_eq!(entries(&reader).await, expected, "{}", fixture.display());
            let checkpoint = reader.checkpoint(expected.len() as u64).await.unwrap().unwrap();
            assert_eq!(checkpoint.root, reader.root(checkpoint.size).await.unwrap());
            // It goes on in the new schema.
            journal.append(expected.last().unwrap().at, vec![expected[1].draft()]).await.unwrap();
            assert_eq!(journal.head().await.unwrap().len, expected.len() as u64 + 1);
            journal.close().await;
            let after = schema(&path).await;
            let kept = copies(folder.path(), "ledger.db");
            assert_eq!(kept.len(), usize::from(before != after), "{before} to {after}");
            for copy in kept {
                assert!(copy.to_str().unwrap().ends_with(&format!("before-{after}")));
                assert_eq!(schema(&copy).await, before, "the copy is of the old schema");
                let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&copy).unwrap().permissions());
                assert_eq!(mode & 0o777, 0o600);
                // What an old program finds in it is what was there.
                let mut connection = connect(&copy).await;
                let rows: Vec<(i64, Vec<u8>)> = sqlx::query_as("SELECT seq, bytes FROM entries ORDER BY seq")
                    .fetch_all(&mut connection)
                    .await
                    .unwrap();
                connection.close().await.unwrap();
                let old: Vec<Vec<u8>> = rows.into_iter().map(|(_, bytes)| bytes).collect();
                assert_eq!(old, expected.iter().map(Entry::bytes).collect::<Vec<_>>());
            }
        });
    }
}

#[test]
fn a_tool_that_only_reads_never_migrates() {
    let fixture = &fixtures()[0];
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.db");
    fs::copy(fixture, &path).unwrap();
    run(async {
        let before = schema(&path).await;
        let refused = SqliteReader::open(&path).await.unwrap_err();
        assert!(matches!(refused, OpenError::OlderSchema { .. }), "{refused}");
        assert!(refused.to_string().contains("migrates it at its next start"), "{refused}");
        assert_eq!(schema(&path).await, before);
    });
}

#[test]
fn a_newer_schema_is_refused_and_untouched() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.db");
    run(async {
        SqliteJournal::open(&path).await.unwrap().close().await;
        let mut connection = connect(&path).await;
        let insert = "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) VALUES (99991231235959, 'of tomorrow', 1, x'00', 0)";
        sqlx::query(insert).execute(&mut connection).await.unwrap();
        connection.close().await.unwrap();
        for refused in [SqliteJournal::open(&path).await.err(), SqliteReader::open(&path).await.err()] {
            let refused = refused.unwrap();
            assert!(matches!(refused, OpenError::NewerSchema { .. }), "{refused}");
            assert!(refused.to_string().contains("comes from a newer program"), "{refused}");
        }
        assert_eq!(copies(folder.path(), "ledger.db"), Vec::<PathBuf>::new());
    });
}

#[test]
fn a_copy_that_cannot_be_made_stops_the_migration() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.db");
    fs::copy(&fixtures()[0], &path).unwrap();
    run(async {
        let before = schema(&path).await;
        // Where the copy would go stands a folder.
        let newest = {
            let other = folder.path().join("other.db");
            SqliteJournal::open(&other).await.unwrap().close().await;
            schema(&other).await
        };
        if newest == before {
            return;
        }
        fs::create_dir(folder.path().join(format!("ledger.db.before-{newest}"))).unwrap();
        let refused = SqliteJournal::open(&path).await.unwrap_err();
        assert!(refused.to_string().contains("nothing was migrated"), "{refused}");
        assert_eq!(schema(&path).await, before);
    });
}
