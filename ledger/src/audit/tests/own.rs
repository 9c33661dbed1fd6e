//! The operator's own money under audit.

use super::*;
use crate::own;
use satgrid_types::PaymentHash;
use sha2::{Digest as _, Sha256};

/// The consumer's honest journal with more drafts at its end.
fn with(drafts: impl IntoIterator<Item = Draft>) -> Report {
    let world = World::example();
    let mut all = drafts_of(&world.consumer.journal.entries());
    let at = all.last().unwrap().0;
    all.extend(drafts.into_iter().map(|draft| (at, draft)));
    report(&bundle_of(&chain_entries(all), &world.consumer.node, Filter::All, false))
}

#[test]
fn it_is_clean_where_it_is_booked_right() {
    let preimage = Preimage([5; 32]);
    let hash = PaymentHash(<[u8; 32]>::from(Sha256::digest(preimage.0)));
    let report = with([
        own::payment(hash, true, Msat(70_000), Msat(0), Some(preimage)),
        own::payment(PaymentHash([9; 32]), false, Msat(5_000), Msat(3), None),
        own::on_chain(Digest([9; 32]), false, Msat(5_000), Msat(300)),
        own::on_chain(Digest([8; 32]), true, Msat(5_000), Msat(0)),
    ]);
    assert_eq!(report.findings, []);
}

/// Journals of before the account for miners' fees have them among the routing fees, and stay clean.
#[test]
fn miners_fees_of_old_journals_verify() {
    let id = TransferId([7; 16]);
    let booked = |transfers: Vec<Transfer>| {
        let mut draft = own::on_chain(Digest([9; 32]), false, Msat(5_000), Msat(300));
        draft.transfers = transfers;
        with([draft]).findings
    };
    let post = |debit, msat| Transfer::post(id, debit, Account::External, Msat(msat));
    assert_eq!(booked(vec![post(Account::RoutingFees, 300)]), []);
    assert_eq!(booked(vec![post(Account::MinersFees, 300)]), []);
    let other = Transfer { id: TransferId([8; 16]), ..post(Account::RoutingFees, 100) };
    for wrong in [
        vec![],
        vec![post(Account::MinersFees, 299)],
        vec![post(Account::Expense, 300)],
        vec![post(Account::MinersFees, 200), other],
    ] {
        let found: Vec<Rule> = booked(wrong.clone()).iter().map(|finding| finding.rule).collect();
        assert_eq!(found, [Rule::TransferUnbacked], "{wrong:?}");
    }
}

#[test]
fn it_is_found_where_it_is_not() {
    #[track_caller]
    fn check(rule: Rule, drafts: Vec<Draft>) {
        let found: BTreeSet<Rule> = with(drafts).findings.iter().map(|finding| finding.rule).collect();
        assert!(found.contains(&rule), "expected {rule}, found {found:?}");
    }
    let out = || own::payment(PaymentHash([9; 32]), false, Msat(5_000), Msat(3), None);
    let mut more = out();
    if let TransferOp::Post { amount, .. } = &mut more.transfers[0].op {
        *amount = Msat(6_000);
    }
    check(Rule::TransferUnbacked, vec![more]);
    check(Rule::InvoiceReuse, vec![out(), Draft::of(out().evidence.unwrap())]);
    let foreign = own::payment(PaymentHash([9; 32]), true, Msat(5_000), Msat(0), Some(Preimage([1; 32])));
    check(Rule::PaymentPreimage, vec![foreign]);
    let mut earns = own::on_chain(Digest([9; 32]), false, Msat(5_000), Msat(300));
    earns.transfers = vec![Transfer::post(earns.transfers[0].id, Account::External, Account::Income, Msat(300))];
    check(Rule::TransferUnbacked, vec![earns]);
}
