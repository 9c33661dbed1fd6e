//! Speed and memory, as ratios from one run: `make bench`.
//!
//! Each figure stands beside its own baseline, measured in the same run, turn and turn about, so that a busy machine slows
//! both. What is printed is the median of the turns. Nothing here passes or fails by time: machines differ, and a figure
//! that misses its goal is marked, not asserted. What is asserted is that the work was done: every stream ended whole,
//! was paid and receipted; every entry is in the journal; the bundle is clean.
//!
//! | file | what is measured | against |
//! |---|---|---|
//! | `streams` | paid streams through the API: real processes, real channel, real slices | the same engine, driven directly |
//! | `journal` | durable entries of the ledger, group commit | SQLite alone: same bytes, same groups |
//! | `audit` | `satgrid-ledger verify` | a loop of the same signature checks |
//! | `memory` | the gateway at rest, its tokenizer's process gone | 120 MB |
//!
//! `SATGRID_BIN` names the node; `satgrid-ledger` lies beside it. `BENCH=long` takes more turns and longer streams;
//! `BENCH_ONLY=streams,journal,audit,memory` picks; `BENCH_THREADS` sets the engine's threads, of both sides.
#![allow(clippy::wildcard_enum_match_arm)]
#![allow(clippy::unwrap_used)]

#[path = "bench/audit.rs"]
mod audit;
#[path = "bench/journal.rs"]
mod journal;
#[path = "bench/machine.rs"]
mod machine;
#[path = "bench/market.rs"]
mod market;
#[path = "bench/memory.rs"]
mod memory;
#[path = "bench/report.rs"]
mod report;
#[path = "bench/streams.rs"]
mod streams;

use machine::Machine;
use market::Market;
use report::Report;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// How much is measured.
#[derive(Clone, Copy)]
struct Size {
    /// Turns of one stream, and its tokens.
    single_turns: u32,
    single_tokens: u32,
    /// Turns of short answers, for the first token.
    first_turns: u32,
    /// Turns of 16 streams, and the tokens of each.
    crowd_turns: u32,
    crowd_tokens: u32,
    journal_turns: u32,
    journal_entries: usize,
    audit_turns: u32,
    /// Their history must fit the life of one listing.
    audit_receipts: u32,
}

const SHORT: Size = Size {
    single_turns: 5,
    single_tokens: 128,
    first_turns: 11,
    crowd_turns: 3,
    crowd_tokens: 64,
    journal_turns: 9,
    journal_entries: 20_000,
    audit_turns: 3,
    audit_receipts: 16_000,
};

const LONG: Size = Size {
    single_turns: 9,
    single_tokens: 512,
    first_turns: 21,
    crowd_turns: 5,
    crowd_tokens: 256,
    journal_turns: 15,
    journal_entries: 100_000,
    audit_turns: 5,
    audit_receipts: 16_000,
};

/// The shipped binaries.
struct Binaries {
    node: PathBuf,
    ledger: PathBuf,
}

impl Binaries {
    fn find() -> Binaries {
        let node = std::env::var_os("SATGRID_BIN").map(PathBuf::from);
        let node = node.expect("SATGRID_BIN names the satgrid binary; `make bench` sets it");
        assert!(node.is_file(), "{} is not there: `make build` makes it", node.display());
        let ledger = node.parent().unwrap_or(Path::new(".")).join("satgrid-ledger");
        Binaries { node, ledger }
    }
}

fn wanted(part: &str) -> bool {
    std::env::var("BENCH_ONLY").map_or(true, |only| only.split(',').any(|name| name == part))
}

#[test]
#[ignore = "measures for minutes; `make bench` runs it"]
fn bench() {
    let size = if std::env::var("BENCH").is_ok_and(|size| size == "long") { LONG } else { SHORT };
    // The journal is measured without them.
    let binaries = Binaries::find;
    // One thread: the nodes end with the thread that started them, and the measuring side takes little from what it measures.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let began = Instant::now();
    let machine = Machine::look();
    let mut report = Report::default();
    runtime.block_on(async {
        let mut market = None;
        if wanted("streams") || wanted("memory") {
            let up = Market::start(&binaries().node).await;
            streams::warm_up(&up).await;
            if wanted("streams") {
                streams::single(&up, size, &mut report).await;
                streams::first_token(&up, size, &mut report).await;
                streams::crowd(&up, size, &mut report).await;
            }
            market = Some((up, Instant::now()));
        }
        // The gateway comes to rest while the ledger is measured.
        if wanted("journal") {
            journal::measure(size, &mut report).await;
        }
        if wanted("audit") {
            audit::measure(&binaries().ledger, size, &mut report);
        }
        if let Some((up, at_rest_since)) = market {
            if wanted("memory") {
                memory::measure(&up, at_rest_since, &mut report).await;
            }
            up.stop().await;
        }
    });
    report.print(&machine, &Machine::look(), began.elapsed());
}
