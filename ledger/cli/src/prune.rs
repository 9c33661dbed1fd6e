//! `prune` and `snapshot`: less of an old journal, and a copy of a running one.

use crate::{
    CLEAN,
    args::{PruneArgs, SnapshotArgs},
    output::{hinted, print},
    source::{Source, only_a_file},
};
use anyhow::Context;
use satgrid_ledger::retention::Retention;
use satgrid_ledger_sqlite::{SqliteJournal, SqliteReader};
use satgrid_types::UnixMs;
use std::time::{SystemTime, UNIX_EPOCH};

const DAY_MS: u64 = 24 * 60 * 60 * 1_000;

pub(crate) async fn run(args: PruneArgs) -> anyhow::Result<u8> {
    only_a_file(&args.db, "pruned", "it keeps all bodies; `export` writes any part of it (docs/adr/0009)")?;
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
    let journal = SqliteJournal::open(&args.db).await?;
    let pruned = journal.prune(bodies).await;
    journal.close().await;
    print(&format!("{} bodies are gone; leaves, transfers and the log's root stay", pruned?))?;
    Ok(CLEAN)
}

pub(crate) async fn snapshot(args: SnapshotArgs) -> anyhow::Result<u8> {
    only_a_file(&args.db, "copied", "pg_dump writes a consistent copy beside a running node (docs/adr/0009)")?;
    if args.out.exists() {
        return Err(hinted(format!("{} exists", args.out.display()), "choose a new name"));
    }
    SqliteReader::open(&args.db).await?.snapshot(&args.out).await?;
    let head = SqliteReader::open(&args.out).await?.head().await?;
    eprintln!("{} entries: {}", head.len, args.out.display());
    Ok(CLEAN)
}
