//! How fast a bundle is verified, against a bare loop of the same signature checks in one run. A figure, not a verdict:
//! `cargo test -p satgrid-ledger-cli --test rate -- --ignored --nocapture`

#![allow(clippy::unwrap_used, clippy::wildcard_enum_match_arm)]

mod yardstick;

use satgrid_ledger::{
    audit::{Detail, audit},
    bundle::{Filter, Opened, open},
    testing::{Session, Work, World},
};
use satgrid_types::{Msat, NodeKey, node_key};
use std::{collections::BTreeMap, time::Instant};
use yardstick::bare_checks;

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

    let checks = bare_checks(entries, &keys, provider);
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
