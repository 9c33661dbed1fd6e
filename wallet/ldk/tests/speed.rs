//! How long a payment takes and what a node weighs. Run by hand, for docs/testing.md:
//! `cargo test -p satgrid-wallet-ldk --test speed -- --ignored --nocapture`
#![allow(clippy::unwrap_used)]

mod world;

use satgrid_types::{Digest, Msat};
use satgrid_wallet::{InvoiceRequest, Lightning, WalletEvent};
use std::time::{Duration, Instant};
use world::{World, next};

const PAYMENTS: usize = 40;

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement"]
async fn payments_over_a_direct_channel() {
    let world = World::new().await;
    let before = resident_kib();
    let since = Instant::now();
    let payer = world.start("payer").await;
    let first = since.elapsed();
    let one = resident_kib();
    let payee = world.start("payee").await;
    let two = resident_kib();
    world.fund(&[&payer, &payee]).await;
    let since = Instant::now();
    let height = payer.height();
    world.open(&payer, &payee, 1_000_000, Msat::ZERO).await;
    let (ready, blocks) = (since.elapsed(), payer.height() - height);
    let mut times = Vec::new();
    for _ in 0..PAYMENTS {
        let request = InvoiceRequest { amount: Msat(250_000), description_hash: Digest([1; 32]), expiry_secs: 120 };
        let since = Instant::now();
        let made = payee.create_invoice(request).await.unwrap();
        payer.pay(&made.bolt11, Msat(0)).await.unwrap();
        next(&payer, |e| matches!(e, WalletEvent::PaymentSettled { hash, .. } if *hash == made.payment_hash)).await;
        times.push(since.elapsed());
        next(&payee, |e| matches!(e, WalletEvent::PaymentReceived { .. })).await;
    }
    times.sort();
    let at = |share: usize| times[(times.len() - 1) * share / 100];
    let since = Instant::now();
    payer.stop().await.unwrap();
    eprintln!(
        "start {first:?}; channel ready in {ready:?} after {blocks} blocks; {PAYMENTS} payments, invoice to event: \
         p50 {:?} p90 {:?} p99 {:?}; stop {:?}; resident: {before} KiB with the chain alone, {one} with one node, \
         {two} with two, {} at the end",
        at(50),
        at(90),
        at(99),
        since.elapsed(),
        resident_kib()
    );
    assert!(at(50) < Duration::from_secs(5));
    payee.stop().await.unwrap();
}

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
