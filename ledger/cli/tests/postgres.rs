//! The built binary on a journal that stands on a PostgreSQL server: copied, pruned, and shown from either.

#![allow(clippy::unwrap_used)]

#[path = "../../postgres/tests/server/mod.rs"]
mod server;
mod support;

use satgrid_ledger::{Journal, JournalReader, journal::named_by, testing::Party};
use satgrid_ledger_postgres::PostgresJournal;
use satgrid_ledger_sqlite::SqliteReader;
use satgrid_types::{NodeKey, UnixMs, node_key};
use server::{START, Server};
use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};
use support::{Fixture, json, ledger};

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

async fn opened(url: &str) -> PostgresJournal {
    let started = Instant::now();
    loop {
        match PostgresJournal::open(url).await {
            Ok(journal) => return journal,
            Err(error) => assert!(started.elapsed() < START, "the server does not come up: {error}"),
        }
        // A real process starts in real time.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// As the fixture's file of the same party, and what was heard of the other's log.
async fn filled(url: &str, party: &Party, heard: &Party) -> NodeKey {
    let journal = opened(url).await;
    for entry in party.journal.entries() {
        journal.append(entry.at, vec![entry.draft()]).await.unwrap();
    }
    let other = journal.checkpoint(&heard.node).await.unwrap();
    journal.witness(&other, UnixMs(7)).await.unwrap();
    journal.checkpoint(&party.node).await.unwrap();
    journal.close().await;
    node_key(&heard.node)
}

#[test]
fn a_journal_on_a_server_is_copied_and_pruned_as_a_file_is() {
    let Some(server) = Server::start() else { return };
    let (fixture, url) = (Fixture::new(), server.url("postgres"));
    let heard = run(filled(&url, &fixture.world.provider, &fixture.world.consumer));
    let (file, copy) = (fixture.text("provider.db"), fixture.text("copy.db"));
    let said = ledger(&["snapshot", "--db", &url, "--out", &copy]);
    assert_eq!(said.code, 0, "{}", said.err);
    assert_eq!(ledger(&["snapshot", "--db", &url, "--out", &copy]).code, 2, "nothing is overwritten");
    assert!(!fixture.path("copy.db-wal").exists(), "one file");
    run(async {
        let entries = fixture.world.provider.journal.entries();
        let from = SqliteReader::open(&fixture.path("provider.db")).await.unwrap();
        let copied = SqliteReader::open(&fixture.path("copy.db")).await.unwrap();
        let size = entries.len() as u64;
        assert_eq!(JournalReader::read(&copied, 0, 4_000).await.unwrap(), entries, "private fields included");
        assert_eq!(JournalReader::root(&copied, size).await, JournalReader::root(&from, size).await);
        assert_eq!(JournalReader::checkpoint(&copied, size).await, JournalReader::checkpoint(&from, size).await);
        assert_eq!(JournalReader::witnessed(&copied, heard).await.unwrap().len(), 1);
        let names: BTreeSet<_> = entries.iter().filter_map(named_by).collect();
        assert_eq!(JournalReader::named(&copied, names.iter().copied().collect()).await.unwrap().len(), names.len());
    });
    assert_eq!(fixture.export("copy.db", "copy.bundle", &[]).code, 0);
    assert_eq!(ledger(&["verify", &fixture.text("copy.bundle")]).code, 0);

    let balance = json(&["balance", "--db", &file]);
    let prune = |more: &[&str]| ledger(&[&["prune", "--db", &url, "--older-than-days", "1"], more].concat());
    assert!(prune(&[]).out.contains("could go"));
    // A node that runs: its connection is its lock.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let node = runtime.block_on(opened(&url));
    let refused = prune(&["--yes"]);
    assert!(refused.code == 2 && refused.err.contains("in use by another process"), "{}", refused.err);
    runtime.block_on(node.close());
    let done = prune(&["--yes"]);
    assert!(done.code == 0 && done.out.contains("bodies are gone"), "{} {}", done.out, done.err);
    assert!(prune(&["--yes"]).out.starts_with("0 bodies"));
    assert_eq!(json(&["balance", "--db", &url]), balance);

    // What is left is shown from the server and from a copy of it alike.
    let pruned = fixture.text("pruned.db");
    assert_eq!(ledger(&["snapshot", "--db", &url, "--out", &pruned]).code, 0);
    let stakes = json(&["claim", "--db", &url]);
    assert!(!stakes.as_array().unwrap().is_empty());
    assert_eq!(stakes, json(&["claim", "--db", &pruned]));
    let part = fixture.text("part.bundle");
    for db in [&url, &pruned] {
        let whole = ledger(&["export", "--db", db, "--out", &fixture.text("whole.bundle")]);
        assert!(whole.code == 2 && whole.err.contains("pruned") && whole.err.contains("hint:"), "{}", whole.err);
        for stake in stakes.as_array().unwrap() {
            let session = stake["session"].as_str().unwrap();
            assert_eq!(ledger(&["export", "--db", db, "--out", &part, "--session", session]).code, 0);
            assert_eq!(ledger(&["verify", &part]).code, 0);
        }
    }
}
