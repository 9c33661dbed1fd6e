//! Memory of the nodes at rest.

use crate::machine::{engines, processor_seconds, resident, wallets};
use crate::market::Market;
use crate::report::{Goal, Report};
use std::time::{Duration, Instant};

/// Of a gateway at rest, in MB.
const GOAL_MB: f64 = 120.0;
/// How long the nodes' use of the processor is watched at least.
const WATCHED: Duration = Duration::from_secs(10);
/// A tokenizer's process ends a minute after its last call; this long it is waited for.
const UNLOADED_WITHIN: Duration = Duration::from_secs(150);

pub(crate) async fn measure(market: &Market, at_rest_since: Instant, report: &mut Report) {
    let gateway = market.consumer.pid();
    let nodes = [gateway, market.provider.pid()];
    let (watched, before) = (Instant::now(), nodes.map(processor_seconds));
    while !engines(gateway).is_empty() {
        assert!(at_rest_since.elapsed() < UNLOADED_WITHIN, "the tokenizer's process does not end");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    // Long enough for ticks of 10 ms to tell something.
    tokio::time::sleep(WATCHED.saturating_sub(watched.elapsed())).await;
    let share = |pid: u32, before: f64| (processor_seconds(pid) - before) / watched.elapsed().as_secs_f64() * 100.0;
    let shares = [share(nodes[0], before[0]), share(nodes[1], before[1])];
    let consumer = resident(gateway).unwrap();
    let of_wallet = |node: u32| wallets(node).iter().filter_map(|pid| resident(*pid)).map(|r| r.all).sum::<f64>();
    report.figure("gateway at rest, tokenizer unloaded", "MB resident", consumer.all, Goal::AtMost(GOAL_MB));
    report.figure("its wallet's process", "MB resident", of_wallet(gateway), Goal::None);
    let provider = resident(market.provider.pid()).unwrap();
    report.figure("provider's node beside its engine", "MB resident", provider.all, Goal::None);
    let engine: f64 = engines(market.provider.pid()).iter().filter_map(|pid| resident(*pid)).map(|r| r.all).sum();
    report.note(format!(
        "memory: gateway {:.1} MB of its own and {:.1} MB of mapped files (the program); provider {:.1} and {:.1}; \
         its engine's process {engine:.0} MB; {} s after the last call; at rest they take {:.1} % and {:.1} % of a core",
        consumer.anonymous,
        consumer.all - consumer.anonymous,
        provider.anonymous,
        provider.all - provider.anonymous,
        at_rest_since.elapsed().as_secs(),
        shares[0],
        shares[1],
    ));
}
