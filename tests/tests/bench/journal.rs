//! The ledger's own speed: entries that are durable, in groups, and what SQLite alone makes of the same bytes.

use crate::Size;
use crate::report::{Goal, Report, median};
use futures::future::join_all;
use satgrid_ledger::{
    entry::{Draft, Head},
    journal::{Chained, Journal, chain},
    testing::{Work, World},
};
use satgrid_ledger_sqlite::SqliteJournal;
use satgrid_types::{Msat, UnixMs};
use std::path::Path;
use std::time::Instant;
use tokio::task::unconstrained;

const GOAL_PER_S: f64 = 5_000.0;
/// Entries that wait together: with 16 streams few do, under load many. The node's writer joins up to 256 appends.
const GROUPS: [usize; 3] = [16, 64, 256];
/// The group to which the goal is applied.
const GOAL_GROUP: usize = 64;

/// What a provider writes in real sessions: requests, acks, receipts, payments, each with its transfers.
fn drafts() -> Vec<Draft> {
    let mut world = World::new();
    for _ in 0..4 {
        let mut session = world.open();
        world.pay(&mut session, Msat::sat(100));
        for _ in 0..8 {
            world.complete(&mut session, Work { prompt: 64, cached: 0, output: 128, acks: 1 });
        }
    }
    world.provider.journal.entries().iter().map(|entry| entry.draft()).collect()
}

/// Each entry is an append of its own; those that wait together are committed together.
async fn ours(path: &Path, drafts: &[Draft], group: usize) -> f64 {
    let journal = SqliteJournal::open(path).await.unwrap();
    let waves: Vec<Vec<Draft>> = drafts.chunks(group).map(<[Draft]>::to_vec).collect();
    let began = Instant::now();
    let (mut asked, mut written) = (0, 0);
    for wave in waves {
        asked += wave.len();
        // All of the wave ask before the writer runs: this runtime has one thread.
        let appends = wave.into_iter().map(|draft| journal.append(UnixMs(1), vec![draft]));
        // Without a budget, which would cut a wave of more than 128 in two.
        for done in unconstrained(join_all(appends)).await {
            written += done.unwrap().len();
        }
    }
    let took = began.elapsed();
    assert_eq!((asked, journal.head().await.unwrap().len), (written, drafts.len() as u64));
    journal.close().await;
    drafts.len() as f64 / took.as_secs_f64()
}

/// Number, canonical bytes, opening.
type Row = (i64, Vec<u8>, Option<Vec<u8>>);

/// The same bytes in the same groups, and nothing else: no hashes, no chain, no log, no channel between tasks.
fn sqlite_alone(path: &Path, rows: &[Row], group: usize) -> f64 {
    let mut database = rusqlite::Connection::open(path).unwrap();
    database.pragma_update(None, "journal_mode", "WAL").unwrap();
    database.pragma_update(None, "synchronous", "FULL").unwrap();
    database.pragma_update(None, "wal_autocheckpoint", 4_000).unwrap();
    let table =
        "CREATE TABLE entries (seq INTEGER PRIMARY KEY, at INTEGER NOT NULL, bytes BLOB NOT NULL, opening BLOB) STRICT";
    database.execute(table, []).unwrap();
    let began = Instant::now();
    for group in rows.chunks(group) {
        let transaction = database.transaction().unwrap();
        {
            let mut insert = transaction.prepare_cached("INSERT INTO entries VALUES (?, 1, ?, ?)").unwrap();
            for (seq, bytes, opening) in group {
                insert.execute((seq, bytes, opening)).unwrap();
            }
        }
        transaction.commit().unwrap();
    }
    rows.len() as f64 / began.elapsed().as_secs_f64()
}

pub(crate) async fn measure(size: Size, report: &mut Report) {
    // A real disk: the folder for temporary files may be memory.
    let disk = std::env::var("BENCH_DISK").unwrap_or_else(|_| env!("CARGO_TARGET_TMPDIR").into());
    let dir = tempfile::tempdir_in(disk).unwrap();
    let sample = drafts();
    let all: Vec<Draft> = sample.iter().cycle().take(size.journal_entries).cloned().collect();
    let mut head = Head::EMPTY;
    let mut rows = Vec::with_capacity(all.len());
    for draft in &all {
        let Chained { entry, bytes, opening, .. } = chain(head, UnixMs(1), vec![draft.clone()]).unwrap().remove(0);
        head = entry.head();
        rows.push((i64::try_from(entry.seq).unwrap(), bytes, opening));
    }
    let bytes: usize = rows.iter().map(|(_, bytes, opening)| bytes.len() + opening.as_ref().map_or(0, Vec::len)).sum();
    for group in GROUPS {
        // Small groups wait for the disk each time: fewer of them tell as much.
        let some = (size.journal_entries * group / GROUPS[2]).max(group * 20).min(all.len());
        let mut turns = Vec::new();
        for turn in 1..=size.journal_turns {
            let path = dir.path().join(format!("ours-{group}-{turn}"));
            let a = ours(&path, &all[..some], group).await;
            let path = dir.path().join(format!("alone-{group}-{turn}"));
            // A thread of its own, as the journal's: on a busy machine one that just computed wakes later.
            let alone = std::thread::scope(|scope| scope.spawn(|| sqlite_alone(&path, &rows[..some], group)).join());
            let b = alone.unwrap();
            eprintln!("journal, groups of {group}, turn {turn}: {a:.0} entries/s; SQLite alone {b:.0}");
            turns.push((a, b));
        }
        let what = format!("journal, groups of {group} : SQLite alone");
        report.ratio(&what, "entries/s", &turns, Goal::None);
        if group == GOAL_GROUP {
            let ours: Vec<f64> = turns.iter().map(|turn| turn.0).collect();
            report.figure("durable entries a second", "entries/s", median(&ours), Goal::AtLeast(GOAL_PER_S));
        }
    }
    report.note(format!("journal: {} bytes an entry on average, each group waited for with fsync", bytes / rows.len()));
}
