//! Lies of an exporter who holds all its keys, that fit their evidence at first sight.

use super::*;

/// The rules that a bent journal breaks.
fn broken(side: Side, bend: impl FnOnce(&mut Drafts)) -> BTreeSet<Rule> {
    let world = World::example();
    let party = match side {
        Provider => &world.provider,
        Consumer => &world.consumer,
    };
    let mut drafts = drafts_of(&party.journal.entries());
    bend(&mut drafts);
    let report = report(&bundle_of(&chain_entries(drafts), &party.node, Filter::All, false));
    report.findings.iter().map(|finding| finding.rule).collect()
}

/// Half of what came in, written down twice under one id: it adds up, and the books take it once.
#[test]
fn a_transfer_that_stands_twice_in_an_entry_moves_once() {
    let found = broken(Provider, |d| {
        let moved = transfers(d, "payment-received", 0);
        let TransferOp::Post { amount, .. } = &mut moved[0].op else { unreachable!() };
        assert_eq!(amount.0 % 2, 0);
        *amount = Msat(amount.0 / 2);
        moved.push(moved[0]);
    });
    assert!(found.contains(&Rule::TransferUnbacked), "{found:?}");
    // The same twice, and whole: a replay, which changes nothing.
    let replayed = broken(Provider, |d| {
        let moved = transfers(d, "payment-received", 0);
        moved.push(moved[0]);
    });
    assert_eq!(replayed, BTreeSet::new());
}
