//! `prune` and `snapshot`: less of an old journal, and a copy of a running one.

use crate::{
    CLEAN,
    args::{PruneArgs, SnapshotArgs},
    output::{hinted, print},
    source::{Source, address},
};
use anyhow::Context;
use satgrid_ledger::{journal::JournalReader, retention::Retention};
use satgrid_ledger_postgres::{PostgresJournal, PostgresReader};
use satgrid_ledger_sqlite::{SqliteCopy, SqliteJournal, SqliteReader};
use satgrid_types::UnixMs;
use std::{
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

const DAY_MS: u64 = 24 * 60 * 60 * 1_000;

pub(crate) async fn run(args: PruneArgs) -> anyhow::Result<u8> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock stands before 1970")?;
    let now = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
    let before = UnixMs(now.saturating_sub(args.older_than_days.saturating_mul(DAY_MS)));
    let mut source = Source::open(&args.db).await?;
    if matches!(source, Source::Bundle(_)) {
        return Err(hinted("an exported file cannot be pruned", "export a part of the journal instead"));
    }
    let mut retention = Retention::new();
    loop {
        let entries = source.next().await?;
        if entries.is_empty() {
            break;
        }
        for entry in entries {
            retention.observe(&entry).with_context(|| format!("entry {}", entry.seq))?;
        }
    }
    let bodies = retention.finish(before);
    if !args.yes {
        print(&format!("{} bodies of sessions that are over could go", bodies.len()))?;
        eprintln!("with --yes they do, for ever: export first what you may have to show");
        return Ok(CLEAN);
    }
    // The writer's lock: a running node is not pruned under its feet.
    let pruned = match address(&args.db)? {
        Some(url) => {
            let journal = PostgresJournal::open(&url).await?;
            let pruned = journal.prune(bodies).await;
            journal.close().await;
            pruned
        }
        None => {
            let journal = SqliteJournal::open(&args.db).await?;
            let pruned = journal.prune(bodies).await;
            journal.close().await;
            pruned
        }
    };
    print(&format!("{} bodies are gone; leaves, transfers and the log's root stay", pruned?))?;
    Ok(CLEAN)
}

pub(crate) async fn snapshot(args: SnapshotArgs) -> anyhow::Result<u8> {
    if args.out.exists() {
        return Err(hinted(format!("{} exists", args.out.display()), "choose a new name"));
    }
    match address(&args.db)? {
        Some(url) => copy(&url, &args.out).await?,
        None => SqliteReader::open(&args.db).await?.snapshot(&args.out).await?,
    }
    let reader = SqliteReader::open(&args.out).await?;
    let head = reader.head().await?;
    if head.len > 0 {
        // Its tiles are of the same moment as its entries.
        reader.root(head.len).await?;
    }
    eprintln!("{} entries: {}", head.len, args.out.display());
    Ok(CLEAN)
}

/// A server's journal as a file, every row as of one moment.
async fn copy(url: &str, out: &Path) -> anyhow::Result<()> {
    let mut rows = PostgresReader::open(url).await?.snapshot().await?;
    let mut copy = SqliteCopy::create(out).await?;
    while let Some(piece) = rows.next().await? {
        copy.take(piece).await?;
    }
    Ok(copy.finish().await?)
}
