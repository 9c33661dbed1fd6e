//! How long a proof takes from a log of ten million leaves, and what an append costs as a journal grows to ten million
//! receipts. Figures, not verdicts; `make bench-ledger` runs them.

#![allow(clippy::unwrap_used)]

use satgrid_ledger::{
    Evidence, Journal, JournalReader,
    entry::Draft,
    journal::{MAX_READ, named_by},
    log::{TileEdge, TileId, leaf_hash, verify_consistency, verify_inclusion},
    own,
    testing::{Work, World},
};
use satgrid_ledger_sqlite::{SqliteJournal, SqliteReader};
use satgrid_types::{Digest, Msat, PaymentHash, UnixMs};
use sqlx::{Connection, SqliteConnection, sqlite::SqliteConnectOptions};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

const LEAVES: u64 = 10_000_000;
const PROOFS: u64 = 2_000;

fn leaf(n: u64) -> Digest {
    leaf_hash(&n.to_be_bytes())
}

/// Writes tiles as the journal would, without the entries above them.
async fn write(connection: &mut SqliteConnection, tiles: &mut BTreeMap<TileId, Vec<u8>>) {
    let mut transaction = connection.begin().await.unwrap();
    for (id, hashes) in core::mem::take(tiles) {
        sqlx::query("INSERT OR REPLACE INTO tiles (level, idx, hashes) VALUES (?, ?, ?)")
            .bind(i64::from(id.level))
            .bind(i64::try_from(id.index).unwrap())
            .bind(hashes)
            .execute(&mut *transaction)
            .await
            .unwrap();
    }
    transaction.commit().await.unwrap();
}

fn spread(mut took: Vec<Duration>) -> String {
    took.sort_unstable();
    let at = |part: usize| took[took.len() * part / 100];
    format!("median {:?}, 99 of 100 under {:?}", at(50), at(99))
}

#[test]
#[ignore = "a measurement"]
fn proofs_from_ten_million_leaves() {
    let leaves = std::env::var("SATGRID_BENCH_LEAVES").map_or(LEAVES, |text| text.parse().unwrap());
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = folder.path().join("ledger.db");
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap().block_on(async {
        SqliteJournal::open(&path).await.unwrap().close().await;
        let mut connection =
            SqliteConnection::connect_with(&SqliteConnectOptions::new().filename(&path)).await.unwrap();
        let (mut edge, mut tiles) = (TileEdge::default(), BTreeMap::new());
        for n in 0..leaves {
            edge.push(leaf(n), &mut |id, hashes| {
                if hashes.len() == satgrid_ledger::log::TILE_WIDTH {
                    tiles.insert(id, hashes.iter().flat_map(|hash| hash.0).collect());
                }
            });
            if tiles.len() >= 2_000 {
                write(&mut connection, &mut tiles).await;
            }
        }
        tiles.extend(edge.tiles().map(|(id, hashes)| (id, hashes.iter().flat_map(|hash| hash.0).collect())));
        write(&mut connection, &mut tiles).await;
        connection.close().await.unwrap();
        let reader = SqliteReader::open(&path).await.unwrap();
        let root = reader.root(leaves).await.unwrap();
        let (mut inclusion, mut consistency) = (Vec::new(), Vec::new());
        for n in 0..PROOFS {
            // Spread over the whole log by a multiplier that shares no factor with it.
            let index = n.wrapping_mul(6_364_136_223_846_793_005) % leaves;
            let began = Instant::now();
            let proof = reader.prove_inclusion(index, leaves).await.unwrap();
            inclusion.push(began.elapsed());
            assert!(verify_inclusion(&leaf(index), index, leaves, &proof, &root));
            if n % 10 == 0 {
                let old = index.max(1);
                let began = Instant::now();
                let proof = reader.prove_consistency(old, leaves).await.unwrap();
                consistency.push(began.elapsed());
                let old_root = reader.root(old).await.unwrap();
                assert!(verify_consistency(old, leaves, &old_root, &root, &proof));
            }
        }
        println!("inclusion proof, {leaves} leaves on disk: {}", spread(inclusion));
        println!("consistency proof, {leaves} leaves on disk: {}", spread(consistency));
    });
}

/// Processor time of this process so far, in seconds.
fn busy() -> f64 {
    const TICKS: f64 = 100.0;
    let text = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<f64> =
        text.rsplit(')').next().unwrap().split_whitespace().map(|f| f.parse().unwrap_or(0.0)).collect();
    (fields[11] + fields[12]) / TICKS
}

const RECEIPTS: u64 = 10_000_000;
/// Entries in one append: the writer's own group under load.
const GROUP: usize = 256;

/// A journal of nothing but receipts, each with the transfer that books it, appended in durable groups. What an entry costs is
/// told over the tenth of the journal that ends at each power of ten, so that growth shows.
#[test]
#[ignore = "a measurement"]
fn growth_of_a_journal() {
    let receipts = std::env::var("SATGRID_BENCH_GROWTH").map_or(RECEIPTS, |text| text.parse().unwrap());
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = folder.path().join("ledger.db");
    let mut world = World::new();
    let mut session = world.open();
    world.pay(&mut session, Msat::sat(100));
    for _ in 0..8 {
        world.complete(&mut session, Work { prompt: 64, cached: 0, output: 128, acks: 1 });
    }
    let drafts = world.provider.journal.entries().into_iter().map(|entry| entry.draft());
    let is_receipt = |draft: &Draft| matches!(draft.evidence, Some(Evidence::Receipt { .. }));
    // Without the private fields, as a journal that was redacted: ten million of those alone are some gigabytes.
    let sample: Vec<Draft> = drafts
        .filter(is_receipt)
        .map(|mut draft| {
            if let Some(Evidence::Receipt { opening, .. }) = &mut draft.evidence {
                *opening = None;
            }
            draft
        })
        .collect();
    let group: Vec<Draft> = sample.iter().cycle().take(GROUP).cloned().collect();
    println!("| receipts | durable receipts/s of the clock | processor, us a receipt | bytes a receipt on disk |");
    println!("|---|---|---|---|");
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap().block_on(async {
        let journal = SqliteJournal::open(&path).await.unwrap();
        let (mut written, mut mark) = (0_u64, 10_000_u64.min(receipts));
        let mut since = (0, Instant::now(), busy());
        while written < receipts {
            if written < mark - mark / 10 && written + GROUP as u64 >= mark - mark / 10 {
                since = (written + GROUP as u64, Instant::now(), busy());
            }
            journal.append(UnixMs(1), group.clone()).await.unwrap();
            written += GROUP as u64;
            if written >= mark {
                let (from, clock, cpu) = since;
                let (n, took, used) = ((written - from) as f64, clock.elapsed().as_secs_f64(), busy() - cpu);
                let bytes = std::fs::metadata(&path).unwrap().len() / written;
                println!("| {written} | {:.0} | {:.1} | {bytes} |", n / took, used / n * 1e6);
                mark = if mark >= receipts { u64::MAX } else { (mark * 10).min(receipts) };
            }
        }
        journal.close().await;
    });
}

/// What the bookkeeper's start costs: every entry read for what it names, or each of the wallet's payments looked up.
#[test]
#[ignore = "a measurement"]
fn what_entries_name_read_and_looked_up() {
    const AT_ONCE: u64 = 4_096;
    let payments = std::env::var("SATGRID_BENCH_PAYMENTS").map_or(200_000, |text| text.parse().unwrap());
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = folder.path().join("ledger.db");
    let hash = |n: u64| leaf(n);
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap().block_on(async {
        let journal = SqliteJournal::open(&path).await.unwrap();
        for from in (0..payments).step_by(AT_ONCE as usize) {
            let draft = |n| own::payment(PaymentHash(hash(n).0), true, Msat(1_000), Msat::ZERO, None);
            journal.append(UnixMs(1), (from..payments.min(from + AT_ONCE)).map(draft).collect()).await.unwrap();
        }
        let began = Instant::now();
        let (mut next, mut named) = (0, BTreeSet::new());
        loop {
            let entries = journal.read(next, MAX_READ).await.unwrap();
            let Some(last) = entries.last() else { break };
            next = last.seq + 1;
            named.extend(entries.iter().filter_map(named_by));
        }
        let read = began.elapsed();
        assert_eq!(named.len() as u64, payments);
        let began = Instant::now();
        let asked: Vec<Digest> = (0..payments).map(hash).collect();
        let mut found = 0;
        for piece in asked.chunks(MAX_READ) {
            found += journal.reader().named(piece).await.unwrap().len() as u64;
        }
        assert_eq!(found, payments);
        println!("{payments} payments: read from the journal in {read:?}, looked up in {:?}", began.elapsed());
        let began = Instant::now();
        assert_eq!(journal.reader().named(&asked[..100]).await.unwrap().len(), 100);
        println!("  the last hundred of them, looked up in {:?}", began.elapsed());
        journal.close().await;
        let began = Instant::now();
        let journal = SqliteJournal::open(&path).await.unwrap();
        println!("  opened again in {:?}", began.elapsed());
        journal.close().await;
        let mut connection =
            SqliteConnection::connect_with(&SqliteConnectOptions::new().filename(&path)).await.unwrap();
        sqlx::query("DELETE FROM named").execute(&mut connection).await.unwrap();
        sqlx::query("UPDATE named_upto SET len = 0").execute(&mut connection).await.unwrap();
        connection.close().await.unwrap();
        let began = Instant::now();
        let journal = SqliteJournal::open(&path).await.unwrap();
        println!("  opened by a program that indexes it for the first time in {:?}", began.elapsed());
        assert_eq!(journal.reader().named(&asked[..100]).await.unwrap().len(), 100);
        journal.close().await;
    });
}
