//! How long a payment takes, and what the wallet's own process adds: both in one run, payment by payment in turn.
//! `make bench-wallet`, or `cargo test -p satgrid-wallet-ldk --test speed -- --ignored --nocapture`
#![allow(clippy::unwrap_used)]

mod world;

use satgrid_types::{Digest, Msat};
use satgrid_wallet::{Embedded, InvoiceRequest, Lightning, OpenChannel, WalletEvent};
use satgrid_wallet_ldk::{LdkWallet, Program, WalletProcess};
use std::{
    env,
    ffi::OsString,
    time::{Duration, Instant},
};
use world::{World, free_addr, next_of};

const PAYMENTS: usize = 40;
/// Payments at once, and how many of them.
const AT_ONCE: usize = 8;
const ROUNDS: usize = 4;

/// Not a test: the wallet's process, with its socket for standard input.
#[test]
#[ignore = "started by the measurement below"]
fn wallet_process() {
    let _ = satgrid_wallet_ldk::process::worker_main();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement"]
async fn payments_over_a_direct_channel() {
    let world = World::new().await;
    let before = resident_kib("self");
    let since = Instant::now();
    let inside = world.start("inside").await;
    let first = since.elapsed();
    let one = resident_kib("self");
    let payee = world.start("payee").await;
    let args = ["--exact", "wallet_process", "--ignored", "--nocapture"].map(OsString::from).to_vec();
    let program = Program { exe: env::current_exe().unwrap(), args };
    let since = Instant::now();
    let apart = WalletProcess::start(&program, world.config("apart", free_addr())).await.unwrap();
    let started = since.elapsed();
    let mut ready = Vec::new();
    for payer in [&inside as &dyn Lightning, &apart] {
        world.fund_address(&payer.new_address().await.unwrap());
        for wallet in [&inside as &dyn Lightning, &apart, &payee] {
            wallet.sync().await.unwrap();
        }
        let since = Instant::now();
        open(&world, payer, &payee).await;
        ready.push(since.elapsed());
    }
    let (mut floor, mut ours) = (Vec::new(), Vec::new());
    for _ in 0..PAYMENTS {
        floor.push(pay(&inside, &payee, 1).await);
        ours.push(pay(&apart, &payee, 1).await);
    }
    let (mut floor_rate, mut our_rate) = (Duration::ZERO, Duration::ZERO);
    for _ in 0..ROUNDS {
        floor_rate += pay(&inside, &payee, AT_ONCE).await;
        our_rate += pay(&apart, &payee, AT_ONCE).await;
    }
    floor.sort();
    ours.sort();
    let at = |times: &[Duration], share: usize| times[(times.len() - 1) * share / 100];
    let rate = |took: Duration| (AT_ONCE * ROUNDS) as f64 / took.as_secs_f64();
    let ratio = at(&ours, 50).as_secs_f64() / at(&floor, 50).as_secs_f64();
    let process = apart.pid().map_or(0, |pid| resident_kib(&pid.to_string()));
    println!("node start: {first:?} inside, {started:?} in a process of its own; channel ready in {ready:?}");
    println!("{PAYMENTS} payments one after another, invoice to event, p50 / p90 / p99:");
    for (name, times) in [("ldk-node in this process", &floor), ("wallet's own process", &ours)] {
        println!("  {name:<26} {:?} / {:?} / {:?}", at(times, 50), at(times, 90), at(times, 99));
    }
    println!("  ratio of the p50s          {ratio:.2} (bound 1.5)");
    println!(
        "{AT_ONCE} at once: {:.1}/s in this process, {:.1}/s in its own: {:.2} of it",
        rate(floor_rate),
        rate(our_rate),
        rate(our_rate) / rate(floor_rate)
    );
    println!("resident: {before} KiB with the chain alone, {one} with one node; the wallet's process {process} KiB");
    assert!(ratio < 1.5, "{ratio}");
    for wallet in [&inside as &dyn Lightning, &apart, &payee] {
        wallet.stop().await.unwrap();
    }
}

async fn open(world: &World, payer: &dyn Lightning, payee: &LdkWallet) {
    let addr = payee.facts().await.unwrap().listen.unwrap();
    let open = OpenChannel { node: payee.node_id(), addr, capacity_sat: 1_000_000, push: Msat::ZERO };
    payer.open_channel(open).await.unwrap();
    while !payer.channels().await.unwrap().iter().any(|c| c.usable) {
        world.mine(1);
        payer.sync().await.unwrap();
        payee.sync().await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    next_of(payer, |e| matches!(e, WalletEvent::ChannelReady { .. })).await;
    next_of(payee, |e| matches!(e, WalletEvent::ChannelReady { .. })).await;
}

/// So many payments at once, from invoices to the payer's events.
async fn pay(payer: &dyn Lightning, payee: &LdkWallet, count: usize) -> Duration {
    let request = InvoiceRequest { amount: Msat(250_000), description_hash: Digest([1; 32]), expiry_secs: 120 };
    let since = Instant::now();
    for _ in 0..count {
        let made = payee.create_invoice(request).await.unwrap();
        payer.pay(&made.bolt11, Msat(0)).await.unwrap();
    }
    for _ in 0..count {
        next_of(payer, |e| matches!(e, WalletEvent::PaymentSettled { .. })).await;
    }
    let took = since.elapsed();
    for _ in 0..count {
        next_of(payee, |e| matches!(e, WalletEvent::PaymentReceived { .. })).await;
    }
    took
}

fn resident_kib(process: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
