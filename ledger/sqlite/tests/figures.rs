//! What a lead counts and measures is there after a restart, is bounded, and is read beside the running node.

#![allow(clippy::unwrap_used)]

use satgrid_ledger_sqlite::{Cost, ExpertRows, FigureStore, SqliteJournal, StagePace, read_figures, read_paces};
use satgrid_types::UnixMs;
use std::collections::BTreeMap;

const MODEL: [u8; 32] = [1; 32];

#[tokio::test]
async fn sums_grow_over_restarts_and_are_halved() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.sqlite");
    assert!(read_figures(&path, MODEL).await.is_err(), "no file yet");
    let journal = SqliteJournal::open(&path).await.unwrap();
    let rows = |a: u64, b: u64| -> ExpertRows { BTreeMap::from([((0, 3), a), ((1, 0), b)]) };
    {
        let store = FigureStore::open(&path).await.unwrap();
        store.add(MODEL, &rows(10, 1)).await.unwrap();
        store.add([2; 32], &rows(7, 7)).await.unwrap();
    }
    let store = FigureStore::open(&path).await.unwrap();
    store.add(MODEL, &rows(5, 0)).await.unwrap();
    // Beside the writer.
    assert_eq!(read_figures(&path, MODEL).await.unwrap().0, rows(15, 1));
    // More than is kept: halved, in proportion, and only this model's.
    store.add(MODEL, &rows(20_000_000, 1_000)).await.unwrap();
    let (kept, _) = store.of(MODEL).await.unwrap();
    assert_eq!(kept, rows(10_000_007, 500));
    assert_eq!(store.of([2; 32]).await.unwrap().0, rows(7, 7));
    assert_eq!(store.of([3; 32]).await.unwrap(), Default::default());
    journal.close().await;
}

#[tokio::test]
async fn measurements_replace_what_was_measured_before() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("figures.sqlite");
    let store = FigureStore::open(&path).await.unwrap();
    let line = |n: f64| [n, 2.0, 3.5, 4.0, 5.0];
    let first = BTreeMap::from([(([7; 32], Cost::Link), line(1.0)), (([7; 32], Cost::Work), line(2.0))]);
    store.keep(MODEL, &first, UnixMs(1)).await.unwrap();
    let second = BTreeMap::from([(([7; 32], Cost::Link), line(9.0)), (([8; 32], Cost::Wait), [f64::NAN; 5])]);
    store.keep(MODEL, &second, UnixMs(2)).await.unwrap();
    let (_, costs) = read_figures(&path, MODEL).await.unwrap();
    assert_eq!(costs, BTreeMap::from([(([7; 32], Cost::Link), line(9.0)), (([7; 32], Cost::Work), line(2.0))]));
}

#[tokio::test]
async fn a_worker_keeps_its_newest_pace() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("figures.sqlite");
    let pace = |node: u8, first: u32, measured_us: u64, lies: u32, at: u64| StagePace {
        node: [node; 32],
        first,
        beyond: first + 4,
        listed_us: 1_000,
        measured_us,
        lies,
        at: UnixMs(at),
    };
    {
        let store = FigureStore::open(&path).await.unwrap();
        for (model, pace) in [
            (MODEL, pace(7, 1, 40_000, 1, 10)),
            (MODEL, pace(7, 1, 50_000, 2, 20)),
            (MODEL, pace(7, 5, 900, 0, 20)),
            ([2; 32], pace(7, 1, 1, 0, 30)),
        ] {
            store.keep_pace(model, &pace).await.unwrap();
        }
        assert_eq!(store.paces(MODEL).await.unwrap().len(), 2);
    }
    let found = read_paces(&path, MODEL).await.unwrap();
    assert_eq!(found, [pace(7, 1, 50_000, 2, 20), pace(7, 5, 900, 0, 20)]);
    assert_eq!(read_paces(&path, [3; 32]).await.unwrap(), []);
}
