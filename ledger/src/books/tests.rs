use super::*;
use crate::transfer::TransferKind;
use proptest::prelude::*;
use satgrid_types::RequestId;

const NOW: UnixMs = UnixMs(1_000);
const SESSION: SessionId = SessionId([1; 32]);

fn id(n: u32) -> TransferId {
    crate::transfer_id(SESSION, None, TransferKind::Other, n)
}
fn funded(msat: u64) -> Books {
    let mut books = Books::new();
    let fund = Transfer::post(id(1_000), Account::Lightning, Account::Prepaid(SESSION), Msat(msat));
    books.apply(NOW, &draft([fund])).unwrap();
    books
}
fn draft(transfers: impl IntoIterator<Item = Transfer>) -> Draft {
    Draft::default().with(transfers)
}
fn hold(n: u32, amount: u64) -> Transfer {
    Transfer::pending(id(n), Account::Prepaid(SESSION), Account::Income, Msat(amount), Some(UnixMs(2_000)))
}

#[test]
fn a_reservation_is_ended_once() {
    let mut books = funded(100);
    books.apply(NOW, &draft([hold(0, 60)])).unwrap();
    let prepaid = Account::Prepaid(SESSION);
    assert_eq!(
        (books.balance(&prepaid), books.available(&prepaid), books.reserved(&prepaid)),
        (100, Msat(40), Msat(60))
    );
    assert_eq!(books.balance(&Account::Income), 0, "a reservation earns nothing");
    let over = books.apply(NOW, &draft([hold(1, 41)]));
    assert_eq!(over, Err(BooksError::Overdrawn { account: prepaid, by: Msat(1) }));
    let more = books.apply(NOW, &draft([Transfer::post_pending(id(0), Msat(61))]));
    assert!(matches!(more, Err(BooksError::PostsMore { .. })));
    let early = books.apply(NOW, &draft([Transfer::expire(id(0))]));
    assert!(matches!(early, Err(BooksError::NotDue { .. })));
    books.apply(NOW, &draft([Transfer::post_pending(id(0), Msat(25))])).unwrap();
    assert_eq!((books.balance(&prepaid), books.available(&prepaid)), (75, Msat(75)), "the rest returns");
    assert_eq!(books.balance(&Account::Income), 25);
    // The same ending again is a replay; another ending is a conflict, since it has the same id.
    books.apply(NOW, &draft([Transfer::post_pending(id(0), Msat(25))])).unwrap();
    assert!(matches!(books.apply(NOW, &draft([Transfer::void(id(0))])), Err(BooksError::Conflict { .. })));
    let under_another_id = Transfer { id: id(9), op: TransferOp::VoidPending { pending: id(0) } };
    assert!(matches!(books.apply(NOW, &draft([under_another_id])), Err(BooksError::Ended { .. })));
    assert!(matches!(books.apply(NOW, &draft([Transfer::void(id(7))])), Err(BooksError::NotPending { .. })));
    assert_eq!(books.balance(&Account::Income), 25);
}

#[test]
fn a_draft_has_a_limit_that_check_and_apply_share() {
    let many = |given: usize| draft((0..u32::try_from(given).unwrap()).map(|n| hold(n, 1)));
    let mut books = funded(10_000);
    let too_many = Err(BooksError::TooMany { given: MAX_TRANSFERS + 1 });
    assert_eq!(books.check(NOW, &many(MAX_TRANSFERS + 1)), too_many);
    assert_eq!(books.apply(NOW, &many(MAX_TRANSFERS + 1)), too_many);
    // 1,000 is the funding's number, whose id a hold may not take again.
    let at_limit = draft(many(MAX_TRANSFERS + 1).transfers.into_iter().filter(|transfer| transfer.id != id(1_000)));
    assert_eq!(at_limit.transfers.len(), MAX_TRANSFERS);
    assert_eq!(books.check(NOW, &at_limit), Ok(()));
    assert_eq!(books.apply(NOW, &at_limit), Ok(()));
}

#[test]
fn holds_fall_due_and_expire() {
    let mut books = funded(100);
    books.apply(NOW, &draft([hold(0, 10)])).unwrap();
    let for_ever = Transfer::pending(id(1), Account::Prepaid(SESSION), Account::Income, Msat(1), None);
    books.apply(NOW, &draft([for_ever])).unwrap();
    assert_eq!((books.due(UnixMs(1_999)), books.due(UnixMs(2_000))), (vec![], vec![id(0)]));
    assert_eq!(books.next_due(), Some(UnixMs(2_000)));
    books.apply(UnixMs(2_000), &draft([Transfer::expire(id(0))])).unwrap();
    assert_eq!(books.next_due(), None);
    let never = books.apply(UnixMs(u64::MAX), &draft([Transfer::expire(id(1))]));
    assert!(matches!(never, Err(BooksError::NoTimeout { .. })));
}

#[test]
fn a_draft_is_whole_or_nothing() {
    let mut books = funded(100);
    let before = books.clone();
    let bad = [hold(0, 50), Transfer::void(id(0)), hold(1, 10), hold(2, 0)];
    assert!(matches!(books.apply(NOW, &draft(bad)), Err(BooksError::Zero { .. })));
    assert_eq!(format!("{books:?}"), format!("{before:?}"));
    // Within one draft, a hold may be made and ended, and money may arrive after it is spent.
    let spend = Transfer::post(id(3), Account::Prepaid(SESSION), Account::Income, Msat(150));
    let fund = Transfer::post(id(4), Account::Lightning, Account::Prepaid(SESSION), Msat(50));
    books.apply(NOW, &draft([spend, fund])).unwrap();
    assert_eq!(books.balance(&Account::Prepaid(SESSION)), 0);
}

#[test]
fn one_id_is_one_transfer() {
    let mut books = funded(100);
    let same = Transfer::post(id(5), Account::Expense, Account::Expense, Msat(1));
    assert!(matches!(books.apply(NOW, &draft([same])), Err(BooksError::SameAccount { .. })));
    books.apply(NOW, &draft([hold(0, 5), hold(0, 5)])).unwrap();
    assert_eq!(books.reserved(&Account::Prepaid(SESSION)), Msat(5));
    assert!(matches!(books.apply(NOW, &draft([hold(0, 6)])), Err(BooksError::Conflict { .. })));
    assert!(matches!(books.apply(NOW, &draft([hold(6, 1), hold(6, 2)])), Err(BooksError::Conflict { .. })));
}

#[test]
fn a_session_that_is_over_is_let_go() {
    let mut books = funded(100);
    assert!(!books.retire(SESSION), "there is money in it");
    books.apply(NOW, &draft([hold(0, 100)])).unwrap();
    assert!(!books.retire(SESSION), "there is a reservation in it");
    books.apply(NOW, &draft([Transfer::post_pending(id(0), Msat(100))])).unwrap();
    assert!(books.knows(&id(0)));
    assert!(books.retire(SESSION));
    assert!(!books.knows(&id(0)) && !books.knows(&id(1_000)));
    assert_eq!(books.accounts().filter(|(account, _)| account.session().is_some()).count(), 0);
    assert_eq!(books.trial_balance(), (200, 200), "what is forgotten still counts");
}

fn accounts() -> impl Strategy<Value = Account> {
    let sessions = (0u8..3).prop_map(|n| SessionId([n; 32]));
    prop_oneof![
        Just(Account::Lightning),
        Just(Account::Income),
        Just(Account::Expense),
        Just(Account::External),
        Just(Account::Clients),
        Just(Account::MinersFees),
        sessions.clone().prop_map(Account::Prepaid),
        sessions.clone().prop_map(Account::PrepaidAsset),
        sessions.prop_map(Account::RefundsDue),
    ]
}

fn transfers() -> impl Strategy<Value = Transfer> {
    let id = || (0u32..40).prop_map(id);
    let pair = || (accounts(), accounts(), 0u64..1_000);
    prop_oneof![
        (id(), pair()).prop_map(|(id, (debit, credit, amount))| Transfer::post(id, debit, credit, Msat(amount))),
        (id(), pair(), prop::option::of(0u64..2_000)).prop_map(|(id, (debit, credit, amount), until)| {
            Transfer::pending(id, debit, credit, Msat(amount), until.map(UnixMs))
        }),
        (id(), 0u64..1_000).prop_map(|(pending, amount)| Transfer::post_pending(pending, Msat(amount))),
        id().prop_map(Transfer::void),
        id().prop_map(Transfer::expire),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn books_conserve(drafts in prop::collection::vec((0u64..2_000, prop::collection::vec(transfers(), 1..4)), 1..60)) {
        let mut books = Books::new();
        let mut applied = Vec::new();
        for (at, transfers) in drafts {
            let draft = draft(transfers);
            let before = format!("{books:?}");
            let checked = books.check(UnixMs(at), &draft);
            let done = books.apply(UnixMs(at), &draft);
            prop_assert_eq!(&checked, &done);
            match done {
                Ok(()) => applied.push((at, draft)),
                Err(_) => prop_assert_eq!(before, format!("{books:?}"), "a refused draft leaves no trace"),
            }
            let (debits, credits) = books.trial_balance();
            prop_assert_eq!(debits, credits);
            for (account, sums) in books.accounts() {
                let left = books.balance(account) - i128::from(books.reserved(account).0);
                prop_assert!(!account.never_negative() || left >= 0, "{} {:?}", account, sums);
                prop_assert_eq!(i128::from(books.available(account).0), left.max(0));
            }
            // Reservations in the sums are exactly those of the holds.
            let held: u128 = books.holds().map(|(_, hold)| u128::from(hold.amount.0)).sum();
            prop_assert_eq!(held, books.accounts().map(|(_, sums)| sums.debits_pending).sum::<u128>());
            prop_assert_eq!(held, books.accounts().map(|(_, sums)| sums.credits_pending).sum::<u128>());
        }
        // Replayed once more, every draft that was applied changes nothing.
        let before = format!("{books:?}");
        for (at, draft) in &applied {
            books.apply(UnixMs(*at), draft).unwrap();
        }
        prop_assert_eq!(before, format!("{books:?}"));
        // And from nothing, the same drafts give the same books.
        let mut again = Books::new();
        for (at, draft) in &applied {
            again.apply(UnixMs(*at), draft).unwrap();
        }
        prop_assert_eq!(format!("{books:?}"), format!("{again:?}"));
    }

    #[test]
    fn a_transfer_reads_back(transfer in transfers(), request in any::<[u8; 32]>(), k: u32) {
        let bytes = cbor::encode(&transfer);
        prop_assert_eq!(cbor::decode::<Transfer>(&bytes).unwrap(), transfer);
        let request = RequestId(request);
        let id = crate::transfer_id(SESSION, Some(request), TransferKind::Hold, k);
        prop_assert_ne!(id, crate::transfer_id(SESSION, Some(request), TransferKind::Hold, k.wrapping_add(1)));
    }
}
