//! How long a payment takes, and what the wallet's own process adds: both in one run, payment by payment in turn.
//! `make bench-wallet`, or `cargo test -p satgrid-wallet-ldk --test speed -- --ignored --nocapture`
#![allow(clippy::unwrap_used)]

mod world;

use satgrid_types::{Digest, Msat};
use satgrid_wallet::{Embedded, InvoiceRequest, Lightning, OpenChannel, WalletEvent, embedded::Receive};
use satgrid_wallet_ldk::{LdkConfig, LdkWallet, Lsp, LspService, Program, WalletProcess};
use sqlx::{Connection, SqliteConnection, sqlite::SqliteConnectOptions};
use std::{
    env,
    ffi::OsString,
    path::Path,
    time::{Duration, Instant},
};
use world::{World, free_addr, next_of};

const PAYMENTS: usize = 40;
/// The bound on what the wallet's process keeps in memory.
const MEMORY_BOUND_KIB: u64 = 80 * 1_024;
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
    assert!(process < MEMORY_BOUND_KIB, "{process} KiB");
    for wallet in [&inside as &dyn Lightning, &apart, &payee] {
        wallet.stop().await.unwrap();
    }
}

/// Payments that a node has behind it, and the bound on its start.
const PAST: u32 = 10_000;
const START_BOUND: Duration = Duration::from_secs(2);

/// A node whose store has one payment behind it starts; then the same store with ten thousand: the one that it made, written
/// again under other hashes, as ldk-node keeps them.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement"]
async fn start_after_many_payments() {
    let world = World::new().await;
    let payer = world.start("payer").await;
    let listen = free_addr();
    let payee = LdkWallet::start(world.config("payee", listen)).await.unwrap();
    world.fund(&[&payer]).await;
    open(&world, &payer, &payee).await;
    pay(&payer, &payee, 1).await;
    payee.stop().await.unwrap();
    drop(payee);
    let started = async |count: usize| {
        let (before, since) = (resident_kib("self"), Instant::now());
        let payee = LdkWallet::start(world.config("payee", listen)).await.unwrap();
        let took = since.elapsed();
        assert_eq!(payee.payments().await.unwrap().len(), count);
        let listed = since.elapsed() - took;
        println!(
            "start with {count} payments: {took:?}, all listed in {listed:?}; {before} -> {} KiB",
            resident_kib("self")
        );
        payee.stop().await.unwrap();
        took
    };
    let few = started(1).await;
    multiply(&world.dir.path().join("payee"), PAST - 1).await;
    let many = started(PAST as usize).await;
    println!("  ratio {:.1}, {} ms for a thousand more", many.as_secs_f64() / few.as_secs_f64(), {
        many.saturating_sub(few).as_millis() / u128::from(PAST / 1_000)
    });
    assert!(many < START_BOUND, "{many:?}");
    payer.stop().await.unwrap();
}

/// Writes the one payment of a stopped node's store so many times more.
async fn multiply(dir: &Path, more: u32) {
    let options = SqliteConnectOptions::new().filename(dir.join("ldk_node_data.sqlite"));
    let mut store = SqliteConnection::connect_with(&options).await.unwrap();
    let of_payments = "FROM ldk_node_data WHERE primary_namespace = 'payments'";
    let rows: Vec<(String, Vec<u8>)> =
        sqlx::query_as(&format!("SELECT key, value {of_payments}")).fetch_all(&mut store).await.unwrap();
    let [(key, value)] = &rows[..] else { panic!("{} payments", rows.len()) };
    let id: Vec<u8> = (0..key.len()).step_by(2).map(|at| u8::from_str_radix(&key[at..at + 2], 16).unwrap()).collect();
    let mut write = store.begin().await.unwrap();
    for n in 0..more {
        let mut other = id.clone();
        other[..4].copy_from_slice(&n.to_be_bytes());
        let mut bytes = value.clone();
        let places: Vec<usize> =
            (0..=bytes.len() - id.len()).filter(|at| bytes[*at..*at + id.len()] == id[..]).collect();
        assert!(!places.is_empty(), "a payment that does not say its hash");
        places.iter().for_each(|at| bytes[*at..*at + id.len()].copy_from_slice(&other));
        let insert = "INSERT INTO ldk_node_data (primary_namespace, secondary_namespace, key, value) VALUES ('payments', '', ?, ?)";
        let key: String = other.iter().map(|byte| format!("{byte:02x}")).collect();
        sqlx::query(insert).bind(key).bind(bytes).execute(&mut *write).await.unwrap();
    }
    write.commit().await.unwrap();
    store.close().await.unwrap();
}

/// The bound on the machine's time from an empty provider to its first earned sat.
const FIRST_SAT_BOUND: Duration = Duration::from_secs(5);

/// A provider with no channel and no coin, from the start of its process on, until its first payment over a channel that a
/// liquidity provider opens for it. No block is mined.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement"]
async fn first_earned_sat() {
    let world = World::new().await;
    let listen = free_addr();
    let service = LspService { fee_ppm: 10_000, min_fee_msat: 100_000 };
    let lsp = LdkWallet::start(LdkConfig { lsp_service: Some(service), ..world.config("lsp", listen) }).await.unwrap();
    let payer = world.start("payer").await;
    world.fund(&[&lsp, &payer]).await;
    world.open(&payer, &lsp, 1_000_000, Msat::ZERO).await;
    let args = ["--exact", "wallet_process", "--ignored", "--nocapture"].map(OsString::from).to_vec();
    let program = Program { exe: env::current_exe().unwrap(), args };
    let named = Lsp { node: lsp.node_id(), addr: listen, token: None, max_fee_permille: 50 };

    let since = Instant::now();
    let config = LdkConfig { lsp: Some(named), ..world.config("provider", free_addr()) };
    let provider = WalletProcess::start(&program, config).await.unwrap();
    let started = since.elapsed();
    let ask = Receive { amount: Msat(20_000_000), description: "first".into(), expiry_secs: 600, max_lsp_fee: None };
    let made = provider.receive(ask).await.unwrap();
    let invoiced = since.elapsed();
    payer.pay(&made.invoice.bolt11, Msat(100_000)).await.unwrap();
    next_of(&provider, |e| matches!(e, WalletEvent::PaymentReceived { .. })).await;
    let earned = since.elapsed();
    println!(
        "an empty provider: started after {started:?}, its invoice after {invoiced:?}, its first sat after {earned:?}"
    );
    assert!(earned < FIRST_SAT_BOUND, "{earned:?}");
    for wallet in [&provider as &dyn Lightning, &payer, &lsp] {
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
