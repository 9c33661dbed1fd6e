//! The whole market under seeded faults. A seed that fails is replayed, with everything that happens printed, by
//! `SATGRID_SEEDS=17 cargo test -p satgrid-tests --test sim -- --nocapture`; other seeds run by `SATGRID_SEEDS=1000..2000`.
#![allow(clippy::unwrap_used)]

use satgrid_tests::sim::{self, Stats};
use std::{
    ops::Range,
    panic,
    sync::Mutex,
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

const SEEDS: Range<u64> = 0..200;
const THREADS: usize = 2;

/// `17`, `10..20` or nothing.
fn seeds() -> (Range<u64>, bool) {
    let Ok(text) = std::env::var("SATGRID_SEEDS") else { return (SEEDS, false) };
    let number = |text: &str| text.trim().parse::<u64>().expect("SATGRID_SEEDS is `first..last` or one number");
    match text.split_once("..") {
        Some((first, last)) => (number(first)..number(last), false),
        None => (number(&text)..number(&text) + 1, true),
    }
}

#[test]
fn sim_200_seeds() {
    let (seeds, trace) = seeds();
    let next = AtomicU64::new(seeds.start);
    let results: Mutex<(Stats, Vec<(u64, String)>)> = Mutex::default();
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        break;
                    }
                    let run = panic::catch_unwind(|| sim::run(seed, trace));
                    let mut results = results.lock().unwrap();
                    match run {
                        Ok((stats, _)) => results.0.add(stats),
                        Err(cause) => {
                            let text = cause.downcast_ref::<String>().cloned();
                            let text = text.or_else(|| cause.downcast_ref::<&str>().map(ToString::to_string));
                            let text = text.unwrap_or_default().chars().take(600).collect();
                            results.1.push((seed, text));
                        }
                    }
                }
            });
        }
    });
    let (stats, mut failed) = results.into_inner().unwrap();
    failed.sort();
    println!("{} seeds: {stats:?}", seeds.end - seeds.start);
    for (seed, text) in &failed {
        println!(
            "seed {seed} failed: {text}\n  replay: SATGRID_SEEDS={seed} cargo test -p satgrid-tests --test sim -- --nocapture"
        );
    }
    assert!(failed.is_empty(), "{} of {} seeds failed", failed.len(), seeds.end - seeds.start);
    assert!(seeds != SEEDS || stats.reached_everything(), "some kind of trouble never happened: {stats:?}");
}

#[test]
fn the_same_seed_gives_the_same_journals() {
    for seed in [3, 71, 140] {
        assert_eq!(sim::run(seed, false), sim::run(seed, false), "seed {seed}");
    }
    assert_ne!(sim::run(3, false).1, sim::run(71, false).1);
}
