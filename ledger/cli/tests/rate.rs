//! How fast a bundle is verified, against a bare loop of the same signature checks in one run. A figure, not a verdict:
//! `cargo test -p satgrid-ledger-cli --test rate -- --ignored --nocapture`

#![allow(clippy::unwrap_used, clippy::wildcard_enum_match_arm)]

use satgrid_ledger::{
    Evidence,
    audit::{Detail, audit, read_invoice},
    bundle::{Filter, Opened, open},
    statements::{Ack, Receipt, RequestOpen},
    testing::{Session, Work, World},
};
use satgrid_types::{Msat, NodeKey, node_key, verify_body};
use std::{collections::BTreeMap, time::Instant};

#[test]
#[ignore = "a measurement"]
fn verify_rate() {
    let mut world = World::new();
    let mut keys: BTreeMap<[u8; 32], NodeKey> = BTreeMap::new();
    for _ in 0..50 {
        let mut session: Session = world.open();
        keys.insert(session.id.0, node_key(&session.key));
        for _ in 0..4 {
            world.pay(&mut session, Msat::sat(20));
            for _ in 0..5 {
                world.complete(&mut session, Work { prompt: 100, cached: 0, output: 100, acks: 1 });
            }
        }
        world.close_with_refund(&mut session);
    }
    let (entries, provider) = (world.provider.journal.entries(), node_key(&world.provider.node));
    let bytes = world.provider.bundle(Filter::All, false);

    // Bodies, signatures and keys lie ready: nothing is decoded in the bare loop but invoices.
    let mut checks: Vec<Box<dyn Fn()>> = Vec::new();
    for entry in entries {
        match entry.evidence.unwrap() {
            Evidence::Receipt { receipt, .. } => {
                let consumer = keys[&receipt.peek().unwrap().session.0];
                checks.push(Box::new(move || {
                    verify_body::<Receipt>(receipt.body(), &provider, receipt.provider_signature()).unwrap();
                    verify_body::<Receipt>(receipt.body(), &consumer, receipt.consumer_signature()).unwrap();
                }));
            }
            Evidence::Ack(ack) => {
                let consumer = keys[&ack.peek().unwrap().session.0];
                checks.push(Box::new(move || {
                    verify_body::<Ack>(ack.body(), &provider, ack.provider_signature()).unwrap();
                    verify_body::<Ack>(ack.body(), &consumer, ack.consumer_signature()).unwrap();
                }));
            }
            Evidence::Request(request) => {
                let consumer = keys[&request.peek().unwrap().session.0];
                checks.push(Box::new(move || {
                    verify_body::<RequestOpen>(request.body(), &consumer, request.signature()).unwrap();
                }));
            }
            Evidence::Invoice { bolt11, .. } => checks.push(Box::new(move || {
                read_invoice(&bolt11).unwrap();
            })),
            _ => {}
        }
    }
    let started = Instant::now();
    checks.iter().for_each(|check| check());
    let bare = started.elapsed();

    let started = Instant::now();
    let Opened::Journal(reader) = open(&bytes[..]).unwrap() else { panic!("a journal was expected") };
    let report = audit(reader, Detail::Totals).unwrap();
    let whole = started.elapsed();
    assert!(report.is_clean());
    println!(
        "{} entries, {} receipts: audit {whole:?}, bare loop {bare:?}: ratio {:.2}",
        report.entries,
        report.as_provider.receipts,
        bare.as_secs_f64() / whole.as_secs_f64()
    );
}
