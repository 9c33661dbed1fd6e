//! How long a proof takes from a log of ten million leaves. A figure, not a verdict; `make bench-ledger` runs it.

#![allow(clippy::unwrap_used)]

use satgrid_ledger::{
    JournalReader,
    log::{TileEdge, TileId, leaf_hash, verify_consistency, verify_inclusion},
};
use satgrid_ledger_sqlite::{SqliteJournal, SqliteReader};
use satgrid_types::Digest;
use sqlx::{Connection, SqliteConnection, sqlite::SqliteConnectOptions};
use std::{
    collections::BTreeMap,
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
