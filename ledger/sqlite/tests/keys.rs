//! Budgets that hold: concurrent calls, crashes, chains of keys. A real file, a real SQLite.
#![allow(clippy::unwrap_used)]

use satgrid_ledger::keys::{KeyId, KeyKind, KeyLimits, KeyRefusal, Limit, NewKey};
use satgrid_ledger_sqlite::{
    CallEnd, CallRef, CallState, InvoiceFor, InvoiceLimits, KeyError, KeyStore, NewCall, NewInvoice, SqliteJournal,
};
use satgrid_types::{Msat, PaymentHash, RequestId, UnixMs};
use std::path::Path;

const NOW: UnixMs = UnixMs(1_700_000_000_000);
const DAY: u64 = 24 * 3_600 * 1_000;

async fn store(path: &Path) -> (SqliteJournal, KeyStore) {
    let journal = SqliteJournal::open(path).await.unwrap();
    let keys = KeyStore::open(path).await.unwrap();
    (journal, keys)
}

async fn make(keys: &KeyStore, n: u8, parent: Option<KeyId>, limits: KeyLimits) -> KeyId {
    let new = NewKey { name: format!("k{n}"), kind: KeyKind::Infer, parent, limits };
    keys.create(&new, [n; 32], NOW).await.unwrap().id
}

fn call(n: u8, key: KeyId, needed: u64, wanted: u64) -> NewCall {
    let (needed, wanted) = (Msat(needed), Msat(wanted));
    NewCall { id: RequestId([n; 32]), key: Some(key), caller: None, model: "m".into(), needed, wanted }
}

fn end(cost: u64) -> CallEnd {
    CallEnd { state: CallState::Done, cost: Msat(cost), charged: Msat(cost), detail: "{}".into() }
}

async fn figures(keys: &KeyStore, id: KeyId) -> (u64, u64) {
    let usage = keys.chain(id, NOW).await.unwrap()[0].usage;
    (usage.spent.0, usage.reserved.0)
}

#[tokio::test]
async fn twenty_at_once_on_the_balance_of_one() {
    let dir = tempfile::tempdir().unwrap();
    let (_journal, keys) = store(&dir.path().join("l.sqlite")).await;
    let total = KeyLimits { total: Some(Msat(1_000)), ..KeyLimits::default() };
    let key = make(&keys, 1, None, total).await;
    let asked = (0..20u8).map(|n| {
        let keys = keys.clone();
        tokio::spawn(async move { keys.open_call(&call(n, key, 1_000, 1_000), NOW).await })
    });
    let mut granted: Vec<CallRef> = Vec::new();
    for answer in asked.collect::<Vec<_>>() {
        match answer.await.unwrap() {
            Ok((call, amount)) => {
                assert_eq!(amount, Msat(1_000));
                granted.push(call);
            }
            Err(KeyError::Refused(KeyRefusal::Limit { limit: Limit::Total, available, .. })) => {
                assert_eq!(available, Msat::ZERO);
            }
            Err(other) => panic!("{other}"),
        }
    }
    assert_eq!(granted.len(), 1);
    assert_eq!(figures(&keys, key).await, (0, 1_000));
    assert_eq!(keys.end_call(granted[0], &end(400), NOW).await, Ok(Msat(400)));
    assert_eq!(figures(&keys, key).await, (400, 0));
    // Once only.
    assert_eq!(keys.end_call(granted[0], &end(400), NOW).await, Err(KeyError::NotOpen(granted[0].id)));
    assert_eq!(keys.faults().await, Ok(vec![]));
}

#[tokio::test]
async fn a_sub_key_spends_from_every_key_above_it() {
    let dir = tempfile::tempdir().unwrap();
    let (_journal, keys) = store(&dir.path().join("l.sqlite")).await;
    let top = make(&keys, 1, None, KeyLimits { per_day: Some(Msat(100)), ..KeyLimits::default() }).await;
    let sub = make(&keys, 2, Some(top), KeyLimits { total: Some(Msat(500)), ..KeyLimits::default() }).await;
    // As much as the tighter one leaves.
    let (first, granted) = keys.open_call(&call(1, sub, 30, 300), NOW).await.unwrap();
    assert_eq!(granted, Msat(100));
    assert_eq!((figures(&keys, top).await, figures(&keys, sub).await), ((0, 100), (0, 100)));
    keys.end_call(first, &end(70), NOW).await.unwrap();
    let refused = keys.open_call(&call(2, sub, 31, 31), NOW).await.unwrap_err();
    assert!(matches!(refused, KeyError::Refused(KeyRefusal::Limit { key, limit: Limit::PerDay, .. }) if key == top));
    // Tomorrow the day's limit is new.
    let tomorrow = NOW.plus_ms(DAY);
    let (second, granted) = keys.open_call(&call(2, sub, 31, 90), tomorrow).await.unwrap();
    assert_eq!(granted, Msat(90));
    keys.end_call(second, &end(0), tomorrow).await.unwrap();
    assert_eq!((figures(&keys, top).await, figures(&keys, sub).await), ((70, 0), (70, 0)));
    keys.revoke(top, tomorrow).await.unwrap();
    let refused = keys.open_call(&call(3, sub, 1, 1), tomorrow).await.unwrap_err();
    assert_eq!(refused, KeyError::Refused(KeyRefusal::Revoked(top)));
    assert_eq!(keys.faults().await, Ok(vec![]));
}

#[tokio::test]
async fn a_crash_leaves_the_reservation_and_what_it_was_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("l.sqlite");
    let (journal, keys) = store(&path).await;
    let key = make(&keys, 1, None, KeyLimits { total: Some(Msat(1_000)), ..KeyLimits::default() }).await;
    let (open, _) = keys.open_call(&call(1, key, 600, 600), NOW).await.unwrap();
    keys.leg(open, RequestId([7; 32])).await.unwrap();
    keys.leg(open, RequestId([8; 32])).await.unwrap();
    // One API request may be several calls.
    let (part, _) = keys.open_call(&call(1, key, 100, 100), NOW).await.unwrap();
    assert_eq!((open.part, part.part), (0, 1));
    drop(keys);
    journal.close().await;

    let (_journal, keys) = store(&path).await;
    assert_eq!(figures(&keys, key).await, (0, 700));
    let left = keys.open_calls().await.unwrap();
    assert_eq!(left.len(), 2);
    assert_eq!(left[0].requests, [RequestId([7; 32]), RequestId([8; 32])]);
    for (call, cost) in left.iter().zip([250, 0]) {
        keys.end_call(call.call, &end(cost), NOW).await.unwrap();
    }
    assert_eq!(figures(&keys, key).await, (250, 0));
    assert_eq!(keys.calls(RequestId([1; 32])).await.unwrap()[0].cost, Msat(250));
    assert_eq!(keys.faults().await, Ok(vec![]));
    // A key is found by its secret's hash only.
    assert_eq!(keys.find([1; 32], NOW).await.unwrap()[0].id, key);
    assert!(keys.find([9; 32], NOW).await.unwrap().is_empty());
}

#[tokio::test]
async fn calls_without_a_key_are_read_once_written() {
    let dir = tempfile::tempdir().unwrap();
    let (_journal, keys) = store(&dir.path().join("l.sqlite")).await;
    for n in 0..100u8 {
        let new = NewCall { key: None, caller: Some("tom".into()), ..call(n, KeyId(1), 0, 0) };
        keys.ended_call(&new, NOW, &end(u64::from(n)), UnixMs(NOW.0 + 7)).await.unwrap();
        // Nobody waits for the disk, but whoever reads does.
        let row = keys.calls(new.id).await.unwrap().remove(0);
        assert_eq!(
            (row.cost, row.state, row.key, row.reserved),
            (Msat(u64::from(n)), CallState::Done, None, Msat::ZERO)
        );
        assert_eq!((row.at, row.ended_at, row.caller.as_deref()), (NOW, Some(UnixMs(NOW.0 + 7)), Some("tom")));
    }
    // The same request once more, as `n` choices are: the next part of it.
    let again = NewCall { key: None, ..call(3, KeyId(1), 0, 0) };
    keys.ended_call(&again, NOW, &end(5), NOW).await.unwrap();
    let parts: Vec<u32> = keys.calls(again.id).await.unwrap().iter().map(|row| row.call.part).collect();
    assert_eq!(parts, [0, 1]);
    assert!(keys.open_calls().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_refusal_leaves_its_group_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (_journal, keys) = store(&dir.path().join("l.sqlite")).await;
    let key = make(&keys, 1, None, KeyLimits { total: Some(Msat(10_000)), ..KeyLimits::default() }).await;
    let (opened, _) = keys.open_call(&call(1, key, 4_000, 4_000), NOW).await.unwrap();
    let other = CallRef { id: RequestId([9; 32]), part: 0 };
    let (dear, nobodys, three, one) = (call(2, key, 7_000, 7_000), call(3, KeyId(77), 1, 1), end(3_000), end(1));
    let (ended, unknown, refused, taken) = tokio::join!(
        keys.end_call(opened, &three, NOW),
        keys.end_call(other, &one, NOW),
        keys.open_call(&nobodys, NOW),
        keys.open_call(&dear, NOW),
    );
    assert_eq!(ended.unwrap(), Msat(3_000));
    assert!(matches!(unknown, Err(KeyError::NotOpen(id)) if id == other.id));
    assert!(matches!(refused, Err(KeyError::NoSuchKey(KeyId(77)))));
    // 10,000 less 3,000 spent leaves the 7,000 that it needs: it came after the end of the first.
    assert_eq!(taken.unwrap().1, Msat(7_000));
    assert_eq!(figures(&keys, key).await, (3_000, 7_000));
    assert!(keys.faults().await.unwrap().is_empty());
}

/// Whose end nobody waits for.
#[tokio::test]
async fn the_next_call_knows_what_the_last_one_cost() {
    let dir = tempfile::tempdir().unwrap();
    let (_journal, keys) = store(&dir.path().join("l.sqlite")).await;
    let key = make(&keys, 1, None, KeyLimits { total: Some(Msat(1_000)), ..KeyLimits::default() }).await;
    for n in 0..10 {
        // All that is left is reserved each time: it is granted only where the last reservation was given back.
        let (opened, granted) = keys.open_call(&call(n, key, 100, 1_000), NOW).await.unwrap();
        assert_eq!(granted, Msat(1_000 - 100 * u64::from(n)));
        keys.ending_call(opened, &end(100), NOW).await.unwrap();
        assert_eq!(
            keys.list(None, NOW).await.unwrap()[0].usage.spent,
            Msat(100 * u64::from(n + 1)),
            "whoever asks waits"
        );
        assert_eq!(keys.glance(key, NOW).await.unwrap()[0].usage.reserved, Msat::ZERO);
    }
    assert!(matches!(keys.open_call(&call(10, key, 100, 100), NOW).await, Err(KeyError::Refused(_))));
    // Ended once, however it is told.
    let row = keys.calls(RequestId([3; 32])).await.unwrap()[0].call;
    keys.ending_call(row, &end(100), NOW).await.unwrap();
    assert_eq!(figures(&keys, key).await, (1_000, 0));
    assert!(keys.faults().await.unwrap().is_empty());
}

/// A key that a stranger paid for at the door.
async fn prepaid(keys: &KeyStore, amount: Msat) -> KeyId {
    let hash = PaymentHash([5; 32]);
    let fills = InvoiceFor::NewKey { hash: [6; 32], name: "door".into() };
    let new = NewInvoice { asker: "a".into(), hash, fills, amount, expires_at: NOW.plus_ms(DAY) };
    let limits = InvoiceLimits { open: 1, open_of_one: 1, balance: amount };
    keys.add_invoice(&new, limits, NOW).await.unwrap();
    keys.invoice_paid(hash, amount, NOW).await.unwrap().unwrap().key.unwrap()
}

#[tokio::test]
async fn refunds_that_failed_before_keep_no_other_out() {
    let dir = tempfile::tempdir().unwrap();
    let (_journal, keys) = store(&dir.path().join("l.sqlite")).await;
    let key = prepaid(&keys, Msat::sat(100)).await;
    let one = (Msat::sat(2), Msat::sat(1));
    let first = keys.open_refund(key, one, "a@slow.example", NOW).await.unwrap().id;
    let second = keys.open_refund(key, one, "b@example.com", NOW).await.unwrap().id;
    keys.refund_waits(first, "it did not answer", NOW.plus_ms(10)).await.unwrap();
    assert!(keys.refunds_due(NOW).await.unwrap().iter().all(|row| row.id == second));
    let due: Vec<u64> = keys.refunds_due(NOW.plus_ms(20)).await.unwrap().iter().map(|row| row.id).collect();
    assert_eq!(due, [second, first], "in the order of their times");
}

#[tokio::test]
async fn every_attempted_refund_is_found_again_page_by_page() {
    let dir = tempfile::tempdir().unwrap();
    let (_journal, keys) = store(&dir.path().join("l.sqlite")).await;
    let key = prepaid(&keys, Msat::sat(1_000)).await;
    let mut attempted = Vec::new();
    for n in 0..300u16 {
        let id = keys.open_refund(key, (Msat::sat(1), Msat::sat(1)), "a@example.com", NOW).await.unwrap().id;
        let mut hash = [7; 32];
        hash[..2].copy_from_slice(&n.to_be_bytes());
        keys.refund_attempted(id, PaymentHash(hash), "lnbc").await.unwrap();
        attempted.push(id);
    }
    let mut found = Vec::new();
    loop {
        let page = keys.refunds_attempted(found.last().copied().unwrap_or(0)).await.unwrap();
        if page.is_empty() {
            break;
        }
        found.extend(page.iter().map(|row| row.id));
    }
    assert_eq!(found, attempted);
}
