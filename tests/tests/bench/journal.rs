//! The ledger's own speed: entries that are durable, in groups, and what SQLite alone makes of the same bytes.

use crate::Size;
use crate::report::{Goal, Report, median};
use futures::future::join_all;
use rustix::time::{ClockId, clock_gettime};
use satgrid_ledger::{
    entry::Draft,
    journal::{
        Journal,
        stored::{Group, Tip},
    },
    testing::{Work, World},
};
use satgrid_ledger_sqlite::SqliteJournal;
use satgrid_types::{Msat, UnixMs};
use std::path::Path;
use std::time::{Duration, Instant};
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

/// What was done in a turn, by the clock and by the processor.
#[derive(Clone, Copy)]
struct Took {
    per_s: f64,
    cpu_us: f64,
}

impl Took {
    fn over(entries: usize, began: (Instant, Duration)) -> Took {
        let (clock, cpu) = (began.0.elapsed(), cpu() - began.1);
        Took { per_s: entries as f64 / clock.as_secs_f64(), cpu_us: cpu.as_secs_f64() * 1e6 / entries as f64 }
    }
}

/// What the threads of this process have computed so far, together.
fn cpu() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).unwrap()
}

/// Each entry is an append of its own; those that wait together are committed together.
async fn ours(path: &Path, drafts: &[Draft], group: usize) -> Took {
    let journal = SqliteJournal::open(path).await.unwrap();
    let waves: Vec<Vec<Draft>> = drafts.chunks(group).map(<[Draft]>::to_vec).collect();
    let began = (Instant::now(), cpu());
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
    let took = Took::over(drafts.len(), began);
    assert_eq!((asked, journal.head().await.unwrap().len), (written, drafts.len() as u64));
    journal.close().await;
    took
}

/// What one transaction of the journal writes.
struct Raw {
    /// Number, canonical bytes, opening.
    rows: Vec<(i64, Vec<u8>, Option<Vec<u8>>)>,
    /// Level, index, hashes.
    tiles: Vec<(u8, i64, Vec<u8>)>,
    names: Vec<[u8; 32]>,
    /// How many entries the index of names has then.
    upto: Option<i64>,
}

/// All that the journal writes of these drafts, made before anything is measured.
fn raw(drafts: &[Draft], group: usize) -> Vec<Raw> {
    let number = |n: u64| i64::try_from(n).unwrap();
    let (mut tip, mut named, mut out) = (Tip::empty(), 0, Vec::new());
    for wave in drafts.chunks(group) {
        let mut group = Group::after(&tip);
        group.append(UnixMs(1), wave.to_vec()).unwrap();
        let (written, after) = group.finish();
        let index = written.index(named);
        let names = index.map_or(Vec::new(), |(names, _)| names.iter().map(|name| name.0).collect());
        let upto = index.map(|(_, len)| len);
        (tip, named) = (after, upto.unwrap_or(named));
        let tiles = written.tiles.into_iter().map(|(id, hashes)| (id.level, number(id.index), hashes)).collect();
        let rows = written.rows.into_iter().map(|row| (number(row.seq), row.bytes, row.opening)).collect();
        out.push(Raw { rows, tiles, names, upto: upto.map(number) });
    }
    out
}

/// As the migrations make them.
const TABLES: &str = "
    CREATE TABLE entries (seq INTEGER PRIMARY KEY, at INTEGER NOT NULL, bytes BLOB NOT NULL, opening BLOB, leaf BLOB) STRICT;
    CREATE TABLE tiles (level INTEGER NOT NULL, idx INTEGER NOT NULL, hashes BLOB NOT NULL, PRIMARY KEY (level, idx)) STRICT, WITHOUT ROWID;
    CREATE TABLE named (hash BLOB NOT NULL PRIMARY KEY) STRICT, WITHOUT ROWID;
    CREATE TABLE named_upto (one INTEGER PRIMARY KEY CHECK (one = 1), len INTEGER NOT NULL) STRICT;
    INSERT INTO named_upto (one, len) VALUES (1, 0);";

/// The same bytes in the same groups, and nothing else: no encoding, no hashes, no chain, no channel between tasks. The rows of
/// the entries alone, or those of every table that the journal keeps of them.
fn sqlite_alone(path: &Path, groups: &[Raw], every_table: bool) -> Took {
    let mut database = rusqlite::Connection::open(path).unwrap();
    database.pragma_update(None, "journal_mode", "WAL").unwrap();
    database.pragma_update(None, "synchronous", "FULL").unwrap();
    database.pragma_update(None, "wal_autocheckpoint", 4_000).unwrap();
    database.execute_batch(TABLES).unwrap();
    let began = (Instant::now(), cpu());
    for group in groups {
        let transaction = database.transaction().unwrap();
        let run = |sql: &str| transaction.prepare_cached(sql).unwrap();
        let mut insert = run("INSERT INTO entries (seq, at, bytes, opening) VALUES (?, 1, ?, ?)");
        for (seq, bytes, opening) in &group.rows {
            insert.execute((seq, bytes, opening)).unwrap();
        }
        drop(insert);
        if every_table {
            let mut tile = run("INSERT OR REPLACE INTO tiles (level, idx, hashes) VALUES (?, ?, ?)");
            for (level, index, hashes) in &group.tiles {
                tile.execute((level, index, hashes)).unwrap();
            }
            let mut name = run("INSERT OR IGNORE INTO named (hash) VALUES (?)");
            for hash in &group.names {
                name.execute([hash]).unwrap();
            }
            if let Some(upto) = group.upto {
                run("UPDATE named_upto SET len = ? WHERE one = 1").execute([upto]).unwrap();
            }
        }
        transaction.commit().unwrap();
    }
    Took::over(groups.iter().map(|group| group.rows.len()).sum(), began)
}

pub(crate) async fn measure(size: Size, report: &mut Report) {
    // A real disk: the folder for temporary files may be memory.
    let disk = std::env::var("BENCH_DISK").unwrap_or_else(|_| env!("CARGO_TARGET_TMPDIR").into());
    let dir = tempfile::tempdir_in(disk).unwrap();
    let sample = drafts();
    let all: Vec<Draft> = sample.iter().cycle().take(size.journal_entries).cloned().collect();
    let mut bytes = 0;
    for group in GROUPS {
        // Small groups wait for the disk each time: fewer of them tell as much.
        let some = (size.journal_entries * group / GROUPS[2]).max(group * 20).min(all.len());
        let groups = raw(&all[..some], group);
        let len =
            |(_, bytes, opening): &(i64, Vec<u8>, Option<Vec<u8>>)| bytes.len() + opening.as_ref().map_or(0, Vec::len);
        bytes = groups.iter().flat_map(|group| &group.rows).map(len).sum::<usize>() / some;
        let mut turns = Vec::new();
        for turn in 1..=size.journal_turns {
            let path = |who: &str| dir.path().join(format!("{who}-{group}-{turn}"));
            let ours = ours(&path("ours"), &all[..some], group).await;
            // A thread of its own, as the journal's: on a busy machine one that just computed wakes later.
            let alone = |who: &str, every_table| {
                let path = path(who);
                std::thread::scope(|scope| scope.spawn(|| sqlite_alone(&path, &groups, every_table)).join()).unwrap()
            };
            let (entries, tables) = (alone("entries", false), alone("tables", true));
            eprintln!(
                "journal, groups of {group}, turn {turn}: {:.0} entries/s; SQLite alone {:.0}, all tables {:.0}",
                ours.per_s, entries.per_s, tables.per_s
            );
            turns.push((ours, entries, tables));
        }
        let rates = |baseline: fn(&(Took, Took, Took)) -> Took| -> Vec<_> {
            turns.iter().map(|turn| (turn.0.per_s, baseline(turn).per_s)).collect()
        };
        let what = format!("journal, groups of {group} : SQLite alone");
        report.ratio(&what, "entries/s", &rates(|turn| turn.1), Goal::None);
        report.ratio(&format!("{what}, all tables"), "entries/s", &rates(|turn| turn.2), Goal::None);
        let cpu = |of: fn(&(Took, Took, Took)) -> Took| median(&turns.iter().map(|t| of(t).cpu_us).collect::<Vec<_>>());
        let (a, b, c) = (cpu(|turn| turn.0), cpu(|turn| turn.1), cpu(|turn| turn.2));
        report.note(format!(
            "groups of {group}: processor, us an entry: journal {a:.2}, SQLite alone {b:.2}, all tables {c:.2}"
        ));
        if group == GOAL_GROUP {
            let ours: Vec<f64> = turns.iter().map(|turn| turn.0.per_s).collect();
            report.figure("durable entries a second", "entries/s", median(&ours), Goal::AtLeast(GOAL_PER_S));
        }
    }
    report.note(format!("journal: {bytes} bytes an entry on average, each group waited for with fsync"));
}
